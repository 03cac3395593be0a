//! `cpcr coordinator` and `cpcr worker`: the processes of a run, each of which somebody else starts and starts again: the
//! launcher, Kubernetes, Slurm.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::run::{self, BackendArgument, NodeRange, Resume};
use super::{Failure, gpus, sibling, slurm, threads_each};
use crate::config::{self, ConfigSource, RunConfig};
use crate::coordinator::board::serve::{self, BoardServer};
use crate::coordinator::board::shared::{SharedBoard, unix_now};
use crate::coordinator::board::{Board, Facts, meter};
use crate::coordinator::{LedgerPlace, events::Limits, service};
use crate::page;
use crate::proto::{EXIT_DONE, EXIT_RESUMABLE};
use crate::store::{Store, StoreError, StoreOptions};
use crate::telemetry::probe::Signs;
use crate::telemetry::{self, Process};
use crate::trust::Trust;
use crate::types::{NodeId, Step};
use crate::worker::{AgentError, AgentOptions, ChildOptions, run_agent};

/// Longest silence of trainers that start: a checkpoint comes from far away.
const START: Duration = Duration::from_secs(180);
/// Longest silence of trainers that have begun, unless their steps are slow: more than the outage of a
/// store that they ride out (75 s, and a write's last request of 30).
const PROGRESS: Duration = Duration::from_secs(120);
/// How long after a group broke the coordinator waits for the cause to show, before it goes on without knowing it.
const GRACE: Duration = Duration::from_secs(2);

/// What `cpcr coordinator` is told.
#[derive(Debug, clap::Args)]
pub struct CoordinatorArguments {
    /// Where to listen.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// How many workers: N, or MIN:MAX for a run that goes on with any number in between.
    #[arg(long, value_name = "N|MIN:MAX")]
    nodes: NodeRange,
    /// Workers beyond that, which wait to take a place.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=64))]
    spares: u32,
    /// The run's folder.
    #[arg(long)]
    run: String,
    /// A preset or a TOML file for a run that starts here; without it RUN/config.toml counts.
    #[arg(long)]
    config: Option<String>,
    /// One configuration key, e.g. `train.iterations=100`; may be repeated.
    #[arg(long, value_name = "KEY=VALUE", requires = "config")]
    set: Vec<String>,
    /// The dataset's folder.
    #[arg(long, value_name = "URL", requires = "config")]
    data: Option<String>,
    /// `auto` goes on from the newest checkpoint; `never` refuses a folder that has one.
    #[arg(long, default_value = "auto", value_enum)]
    resume: Resume,
    /// Which collectives; `auto` takes NCCL if every trainer has a GPU of its own, else Gloo.
    #[arg(long, default_value = "auto", value_enum)]
    backend: BackendArgument,
    /// A folder for signs of life, for `cpcr probe`.
    #[arg(long)]
    state: Option<PathBuf>,
    /// Where the run's page and its metrics are to be seen: an address, or `off`. Beyond loopback they want the token
    /// and a password (`cpcr page-password`).
    #[arg(long, default_value = "127.0.0.1:0", value_name = "ADDR|off")]
    dashboard: Dashboard,
}

/// Where the page is to be seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dashboard(pub Option<SocketAddr>);

impl std::str::FromStr for Dashboard {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "off" => Ok(Self(None)),
            address => address
                .parse()
                .map(|address| Self(Some(address)))
                .map_err(|_| "an address like 127.0.0.1:8080, or `off`, is wanted".to_owned()),
        }
    }
}

impl std::fmt::Display for Dashboard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(address) => address.fmt(f),
            None => f.write_str("off"),
        }
    }
}

impl CoordinatorArguments {
    /// The run's folder.
    pub(super) fn run(&self) -> &str {
        &self.run
    }
}

/// What `cpcr worker` is told.
#[derive(Debug, clap::Args)]
pub struct WorkerArguments {
    /// The coordinator, HOST:PORT; under Slurm the host that `srun` was started on, port 7070.
    #[arg(long)]
    coordinator: Option<String>,
    /// Which node this is, 0 to N-1; Kubernetes and Slurm say it by themselves.
    #[arg(long, env = "JOB_COMPLETION_INDEX")]
    node: Option<u32>,
    /// The run's folder.
    #[arg(long)]
    run: String,
    /// Folder for the trainer's log.
    #[arg(long, default_value = "logs")]
    logs: PathBuf,
    /// CPU threads for the trainer; default all.
    #[arg(long)]
    threads: Option<u32>,
    /// GPUs that the trainer could use; default: as many as libtorch finds.
    #[arg(long)]
    gpus: Option<u32>,
    /// How long the coordinator may be out of reach, in seconds.
    #[arg(long, default_value_t = 20)]
    patience_s: u64,
    /// A folder for signs of life, for `cpcr probe`.
    #[arg(long)]
    state: Option<PathBuf>,
    /// Ends when its input does: for a worker at the end of an ssh connection.
    #[arg(long, hide = true)]
    while_stdin: bool,
}

impl WorkerArguments {
    /// What the process is.
    pub(super) fn process(&self) -> Process {
        let node = self.node.map(|node| ("cpcr.node", node.to_string()));
        let attributes = std::iter::once(("cpcr.run", self.run.clone())).chain(node).collect();
        Process { attributes, ..Process::new("worker") }
    }
}

/// What a coordinator is.
pub(super) fn coordinator_process(run: &str) -> Process {
    Process { attributes: vec![("cpcr.run", run.to_owned())], ..Process::new("coordinator") }
}

/// Ends this process (75) when whoever holds its input is gone; trainers end with their agent.
fn end_with_input() {
    std::thread::spawn(|| {
        // What is said there is nothing to it, and a failure is an end.
        std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink()).ok();
        std::process::exit(EXIT_RESUMABLE);
    });
}

/// Who may connect to this process, by its environment.
///
/// # Errors
/// [`Failure`] for a token that cannot be used.
pub(super) fn trust() -> Result<Trust, Failure> {
    Trust::from_environment().map_err(Failure::usage)
}

fn signs(folder: Option<PathBuf>) -> Result<Signs, Failure> {
    let Some(folder) = folder else { return Ok(Signs::default()) };
    Signs::in_folder(folder.clone())
        .map_err(|error| Failure::usage(format!("--state {}: {error}", folder.display())))
}

/// Tells the parent where this process listens.
pub(super) fn announce(address: SocketAddr) -> Result<(), Failure> {
    super::print(&format!("{address}\n"))
}

/// Serves a run as its coordinator.
///
/// # Errors
/// [`Failure`]: one line and an exit status.
pub async fn coordinator(a: CoordinatorArguments) -> Result<i32, Failure> {
    let trust = trust()?;
    trust.may_listen(a.listen).map_err(Failure::usage)?;
    a.dashboard.0.map_or(Ok(()), |address| trust.may_listen(address)).map_err(Failure::usage)?;
    let signs = signs(a.state)?;
    let options = StoreOptions::default();
    let config = match a.config {
        None => run::configuration(&a.run, &options).await?,
        Some(name) => {
            let mut config =
                config::load(&ConfigSource::Named(name), &a.set).map_err(Failure::usage)?;
            config.data.url = a.data.as_deref().map(run::absolute).or(config.data.url);
            run::prepare(config, &a.run, a.nodes.max, a.resume, &options).await?
        }
    };
    let limits = Limits {
        min: a.nodes.min,
        max: a.nodes.max,
        spares: a.spares,
        backend: a.backend.chosen(),
        restarts: config.recovery.restarts,
        wait: Duration::from_secs(config.recovery.wait_s),
        heartbeat: config.recovery.silence(),
        start: START,
        progress: PROGRESS,
        grace: GRACE,
        drain: Duration::from_secs(20),
    };
    let ledger = LedgerPlace {
        run: Store::open(&a.run, &options).map_err(Failure::usage)?,
        checkpoint_every: config.checkpoint.every,
        steps: Step(config.train.iterations),
    };
    if run::says_complete(&ledger.run, &config).await? {
        return Ok(EXIT_DONE);
    }
    let listener = tokio::net::TcpListener::bind(a.listen)
        .await
        .map_err(|e| Failure::failed(format!("cannot listen on {}: {e}", a.listen)))?;
    announce(listener.local_addr().map_err(Failure::failed)?)?;
    let board = board(&config, &a.run, &ledger.run).await;
    let metrics = telemetry::metrics(&coordinator_process(&a.run)).map_err(Failure::usage)?;
    if let Some(metrics) = &metrics {
        meter::observe(&metrics.meter(), board.inner());
    }
    let page = show(a.dashboard, &trust, &board, &ledger.run).await;
    let url = page.as_ref().map(|page| page.url.clone()).unwrap_or_default();
    let stop = super::signals::interrupted();
    let outcome = service::serve((listener, trust), limits, ledger, (signs, board, url), stop)
        .await
        .map_err(Failure::failed)?;
    if let Some(page) = page {
        page.end().await;
    }
    tracing::info!(status = outcome.status, "{}", outcome.reason);
    Ok(outcome.status)
}

/// The run's board, with what an earlier coordinator wrote down of it. The run does without where that cannot be read.
async fn board(config: &RunConfig, url: &str, run: &Store) -> SharedBoard {
    let before = match run.get(page::SEEN_PATH).await {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .inspect_err(|error| tracing::warn!(%error, "`{}` is damaged", page::SEEN_PATH))
            .ok(),
        Err(StoreError::NotFound { .. }) => None,
        Err(error) => {
            tracing::warn!(%error, "`{}` cannot be read", page::SEEN_PATH);
            None
        }
    };
    let facts = Facts {
        run: page::Run {
            name: config.name.clone(),
            url: page::shown(url),
            data: page::shown(config.data.url.as_deref().unwrap_or_default()),
            method: config.method.name(),
            classes: Vec::new(),
            steps: config.train.iterations,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        },
        loader_threads: config.loader.threads,
        checkpoint_every: config.checkpoint.every,
    };
    SharedBoard::new(Board::new(facts, before, unix_now()))
}

/// Starts the page. Training does without where it cannot be had: its address may be taken.
async fn show(
    wanted: Dashboard,
    trust: &Trust,
    board: &SharedBoard,
    run: &Store,
) -> Option<BoardServer> {
    let address = wanted.0?;
    let listener = match tokio::net::TcpListener::bind(address).await {
        Ok(listener) => listener,
        Err(error) => {
            tracing::warn!(%error, "the run's page cannot be served on {address}");
            return None;
        }
    };
    let page = serve::start(listener, trust, board.clone(), run.clone());
    let page = page.inspect_err(|error| tracing::warn!(%error, "the run's page cannot be served"));
    let page = page.ok()?;
    tracing::info!("dashboard: {}", page.url);
    Some(page)
}

/// Serves a node as its agent.
///
/// # Errors
/// [`Failure`]: one line and an exit status.
pub async fn worker(a: WorkerArguments) -> Result<i32, Failure> {
    let trust = trust()?;
    let (coordinator, node) = slurm::place(a.coordinator, a.node, |name| std::env::var(name).ok())?;
    if a.while_stdin {
        end_with_input();
    }
    let gpus = match a.gpus {
        Some(gpus) => gpus,
        None => u32::try_from(gpus::visible().await?.len()).unwrap_or(u32::MAX),
    };
    let options = AgentOptions {
        coordinator,
        node: NodeId(node),
        run: a.run,
        threads: a.threads.unwrap_or_else(|| threads_each(1)),
        gpus,
        child: ChildOptions { engine: sibling("cpcr-engine")?, logs: a.logs },
        patience: Duration::from_secs(a.patience_s),
        signs: signs(a.state)?,
        trust,
    };
    let ended = run_agent(&options, super::signals::interrupted()).await;
    ended.map_err(|error| match error {
        AgentError::Trust(_) => Failure::usage(error),
        _ => Failure::failed(error),
    })
}
