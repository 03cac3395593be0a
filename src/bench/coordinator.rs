//! What a coordinator costs that has very many members: a real one, in a process of its own, and agents that say hello
//! and give signs of life from this one. They start no trainers, so this is the control plane alone.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use futures::StreamExt;
use serde::Serialize;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::{cpu_seconds, peak_rss_mib};
use crate::proto::wire::coordinator_client::CoordinatorClient;
use crate::proto::wire::{self, agent_message, order};
use crate::trust::{JoinToken, TOKEN_VARIABLE, Trust, TrustError};

/// How often a member gives a sign of life: as an agent does.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// After which who was turned away comes again.
const AGAIN: Duration = Duration::from_millis(200);
/// Longest that all of them may take to be told their places.
const JOINING_MAX: Duration = Duration::from_secs(60);

/// Why it could not be measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CoordinatorBenchError {
    /// A process or its pipes failed.
    #[error("{what}: {source}")]
    Io {
        /// Verb and object.
        what: &'static str,
        /// The cause.
        source: std::io::Error,
    },
    /// No token can be made.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// The coordinator did not do what it should.
    #[error("{0}")]
    Coordinator(String),
}

/// What was measured.
#[derive(Debug, Serialize)]
pub struct CoordinatorReport {
    /// Members with a connection each.
    pub members: u32,
    /// From the first hello until all had their places.
    pub joined_s: f64,
    /// How long it was measured after that.
    pub seconds: f64,
    /// The share of a core that the coordinator took meanwhile.
    pub cores: f64,
    /// The most memory it has had at once.
    pub peak_rss_mib: f64,
}

/// Measures `members` for `seconds`; `program` is `cpcr`, `data` a dataset, `run` a new folder.
///
/// # Errors
/// [`CoordinatorBenchError`]: no coordinator, or one that loses its members.
pub async fn run(
    program: &Path,
    data: &Path,
    run: &Path,
    (members, seconds): (u32, u64),
) -> Result<CoordinatorReport, CoordinatorBenchError> {
    let token = JoinToken::random()?;
    let trust = Trust::holding(&token)?;
    let (child, address) = start(program, &token, (data, run), members).await?;
    let pid = child.id().map(|pid| pid.to_string()).unwrap_or_default();
    let began = Instant::now();
    let (told, mut places) = mpsc::channel(members as usize);
    let mut lives = JoinSet::new();
    for node in 0..members {
        lives.spawn(member((trust.clone(), address.clone()), node, told.clone()));
    }
    let all = async {
        for _ in 0..members {
            places.recv().await;
        }
    };
    if tokio::time::timeout(JOINING_MAX, all).await.is_err() {
        let seconds = JOINING_MAX.as_secs();
        let why = format!("{members} members were not told their places within {seconds} s");
        return Err(CoordinatorBenchError::Coordinator(why));
    }
    let joined_s = began.elapsed().as_secs_f64();
    let (since, cpu) = (Instant::now(), cpu_seconds(&pid));
    // Whoever leaves, or is told another place, spoils it.
    let spoilt = tokio::time::timeout(Duration::from_secs(seconds), async {
        tokio::select! { _ = lives.join_next() => {}, _ = places.recv() => {} }
    });
    if spoilt.await.is_ok() {
        let why = "members were lost while nothing happened to them".to_owned();
        return Err(CoordinatorBenchError::Coordinator(why));
    }
    let (took, cpu) = (since.elapsed().as_secs_f64(), cpu_seconds(&pid) - cpu);
    let peak_rss_mib = peak_rss_mib(&pid);
    Ok(CoordinatorReport { members, joined_s, seconds: took, cores: cpu / took, peak_rss_mib })
}

/// A coordinator for `members`, and where it listens. It ends with its [`Child`].
async fn start(
    program: &Path,
    token: &JoinToken,
    (data, run): (&Path, &Path),
    members: u32,
) -> Result<(Child, String), CoordinatorBenchError> {
    let io = |what| move |source| CoordinatorBenchError::Io { what, source };
    let mut child = Command::new(program)
        .args(["coordinator", "--config", "demo", "--backend", "gloo", "--nodes"])
        .arg(members.to_string())
        // A worker needs a sample of each batch.
        .args(["--set", &format!("batch.labelled={members}"), "--data"])
        .arg(data)
        .arg("--run")
        .arg(run)
        .env(TOKEN_VARIABLE, token.expose())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(io("start a coordinator"))?;
    let stdout = child.stdout.take();
    let Some(stdout) = stdout else {
        return Err(CoordinatorBenchError::Coordinator("it has no output".to_owned()));
    };
    let line = BufReader::new(stdout).lines().next_line().await;
    match line.map_err(io("read a coordinator's address"))? {
        Some(address) => Ok((child, address)),
        None => Err(CoordinatorBenchError::Coordinator("it ended at once".to_owned())),
    }
}

type Failed = Box<dyn std::error::Error + Send + Sync>;

/// A member's life: its hello, then signs of life, until its stream ends.
async fn member(at: (Trust, String), node: u32, told: mpsc::Sender<()>) -> Result<(), Failed> {
    // So many at once, all from one address, are turned away by turns, and come again as agents do.
    let mut orders = loop {
        match join(&at, node).await {
            Ok(orders) => break orders,
            Err(_) => tokio::time::sleep(AGAIN).await,
        }
    };
    while let Some(order) = orders.message().await? {
        if matches!(order.kind, Some(order::Kind::Start(_))) {
            told.send(()).await?;
        }
    }
    Ok(())
}

async fn join(
    (trust, address): &(Trust, String),
    node: u32,
) -> Result<tonic::Streaming<wire::Order>, Failed> {
    let mut client = CoordinatorClient::new(trust.channel(address).await?);
    let hello = wire::Hello {
        node,
        incarnation: node.to_string(),
        kv_address: "127.0.0.1:1".to_owned(),
        ..wire::Hello::default()
    };
    let alive = futures::stream::unfold((), |()| async {
        tokio::time::sleep(HEARTBEAT).await;
        Some((agent_message::Kind::Heartbeat(wire::Heartbeat {}), ()))
    });
    let hello = futures::stream::iter([agent_message::Kind::Hello(hello)]);
    let messages = hello.chain(alive).map(|kind| wire::AgentMessage { kind: Some(kind) });
    Ok(client.join(messages).await?.into_inner())
}
