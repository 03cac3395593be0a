//! `cpcr-launch`: one machine, one command. It resolves the configuration, prepares the run's
//! folder, starts a coordinator and N agents, shows one progress line, and starts again what dies.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Parser;
use tokio::process::Child;

use super::local::Family;
use super::run::{self, BackendArgument, NodeRange, Resume, absolute};
use super::{Failure, gpus, named, tell, threads_each};
use crate::config::{self, ConfigSource, RunConfig};
use crate::coordinator::verdict::Goodput;
use crate::proto::wire::coordinator_client::CoordinatorClient;
use crate::proto::wire::{RunStatus, StopRequest, WatchRequest};
use crate::proto::{Doing, EXIT_DONE, EXIT_RESUMABLE, TrainerEvent};
use crate::store::{Store, StoreOptions};
use crate::telemetry::progress::RunStatus as Shown;
use crate::telemetry::progress::{Outcome, Progress, ProgressState};

/// How long an agent may take to leave once the run has ended.
const LINGER: std::time::Duration = std::time::Duration::from_secs(5);

/// Trains on this machine: a coordinator, N agents, N trainers.
#[derive(Debug, Parser)]
#[command(name = "cpcr-launch", version)]
pub struct Arguments {
    /// How many workers: N, or MIN:MAX for a run that goes on with any number in between.
    #[arg(long, default_value = "4", value_name = "N|MIN:MAX")]
    nodes: NodeRange,
    /// Workers beyond that, which wait to take a place.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=64))]
    spares: u32,
    /// A preset (demo, acdc-7, acdc-14, acdc-quick) or a TOML file.
    #[arg(long)]
    config: Option<String>,
    /// One configuration key, e.g. `train.iterations=100`; may be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// The dataset's folder: s3://, gs://, az://, file:// or a path.
    #[arg(long, value_name = "URL")]
    data: Option<String>,
    /// The run's folder; default ./runs/<config name>.
    #[arg(long, value_name = "URL")]
    run: Option<String>,
    /// `auto` goes on from the newest checkpoint; `never` refuses a folder that has one.
    #[arg(long, default_value = "auto", value_enum)]
    resume: Resume,
    /// Which collectives; `auto` takes NCCL if every trainer has a GPU of its own, else Gloo.
    #[arg(long, default_value = "auto", value_enum)]
    backend: BackendArgument,
}

/// A run, resolved.
struct Plan {
    config: RunConfig,
    nodes: NodeRange,
    spares: u32,
    backend: BackendArgument,
    /// GPUs of this machine, one for each agent as far as they go.
    gpus: Vec<String>,
    run: String,
    family: Family,
    /// Where the report can be opened on this machine, if it can.
    report: Option<PathBuf>,
    /// The embedded S3 server of the demonstration.
    s3: Option<Child>,
}

/// Runs `cpcr-launch`; the result is the exit status.
///
/// # Errors
/// [`Failure`]: one line and an exit status.
pub async fn launch(arguments: Arguments) -> Result<i32, Failure> {
    let gpus = match arguments.backend {
        BackendArgument::Gloo => Vec::new(),
        BackendArgument::Auto | BackendArgument::Nccl => gpus::visible().await?,
    };
    if arguments.backend == BackendArgument::Nccl && gpus.len() < arguments.nodes.max as usize {
        return Err(Failure::usage(format!(
            "--backend nccl: {} trainers want a GPU each, libtorch can use {}; see `cpcr doctor`",
            arguments.nodes.max,
            gpus.len()
        )));
    }
    let demonstration = arguments.config.is_none() && arguments.data.is_none();
    let source = match (&arguments.config, demonstration) {
        (Some(name), _) => ConfigSource::Named(name.clone()),
        (None, true) => ConfigSource::Named("demo".to_owned()),
        (None, false) => ConfigSource::Defaults,
    };
    let mut config = config::load(&source, &arguments.set).map_err(Failure::usage)?;
    if let Some(data) = &arguments.data {
        config.data.url = Some(absolute(data));
    }
    let mut plan = if demonstration && config.data.url.is_none() {
        demonstrate(&arguments, config, gpus).await?
    } else {
        plain(&arguments, config, gpus)
    };
    let options = options(&plan);
    plan.config =
        run::prepare(plan.config, &plan.run, plan.nodes.max, arguments.resume, &options).await?;
    let store = Store::open(&plan.run, &options).map_err(Failure::usage)?;
    let complete = run::says_complete(&store, &plan.config).await?;
    let status = if complete { EXIT_DONE } else { supervise(&plan).await? };
    if status == EXIT_DONE
        && let Some(report) = &plan.report
    {
        tell(&format!("report: {}", report.display()));
    }
    if let Some(s3) = &mut plan.s3
        && let Err(error) = s3.kill().await
    {
        tracing::warn!(%error, "the S3 server could not be ended");
    }
    Ok(status)
}

fn local_folder(url: &str) -> Option<PathBuf> {
    match url.split_once("://") {
        None => Some(PathBuf::from(url)),
        Some(("file", path)) => Some(PathBuf::from(path)),
        Some(_) => None,
    }
}

/// A run on data of the user's own.
fn plain(arguments: &Arguments, config: RunConfig, gpus: Vec<String>) -> Plan {
    let run = absolute(&arguments.run.clone().unwrap_or(format!("runs/{}", config.name)));
    let folder = local_folder(&run);
    let logs =
        folder.clone().unwrap_or_else(|| PathBuf::from("runs").join(&config.name)).join("logs");
    let report = folder.map(|folder| folder.join("report/index.html"));
    let family = Family { logs, environment: Vec::new() };
    let Arguments { nodes, spares, backend, .. } = *arguments;
    Plan { config, nodes, spares, backend, gpus, run, family, report, s3: None }
}

/// The built-in demonstration: phantoms behind an S3 server whose bucket is in the run's folder.
async fn demonstrate(
    arguments: &Arguments,
    mut config: RunConfig,
    gpus: Vec<String>,
) -> Result<Plan, Failure> {
    let run = absolute(&arguments.run.clone().unwrap_or(format!("runs/{}", config.name)));
    let Some(folder) = local_folder(&run) else {
        return Err(Failure::usage(format!(
            "--run {run}: the demonstration keeps its bucket in a local folder"
        )));
    };
    let mut family = Family { logs: folder.join("logs"), environment: Vec::new() };
    let credentials = [("AWS_ACCESS_KEY_ID", "cpcr"), ("AWS_SECRET_ACCESS_KEY", "demonstration")];
    family.environment = credentials.map(|(k, v)| (k.to_owned(), v.to_owned())).to_vec();
    let bucket = folder.join("bucket");
    let arguments_s3 = ["s3", "--dir", &bucket.display().to_string(), "--listen", "127.0.0.1:0"]
        .map(str::to_owned);
    let (s3, address) = family.server("s3.log", &arguments_s3).await?;
    family.environment.extend([
        ("AWS_ENDPOINT".to_owned(), format!("http://{address}")),
        ("AWS_REGION".to_owned(), "us-east-1".to_owned()),
        ("AWS_ALLOW_HTTP".to_owned(), "true".to_owned()),
    ]);
    config.data.url = Some("s3://cpcr/data".to_owned());
    let report = Some(folder.join("bucket/cpcr/run/report/index.html"));
    let run = "s3://cpcr/run".to_owned();
    let Arguments { nodes, spares, backend, .. } = *arguments;
    let plan = Plan { config, nodes, spares, backend, gpus, run, family, report, s3: Some(s3) };
    let data = Store::open("s3://cpcr/data", &options(&plan)).map_err(Failure::usage)?;
    run::phantoms(data).await?;
    Ok(plan)
}

/// The launcher's own store options: what the children get by their environment.
fn options(plan: &Plan) -> StoreOptions {
    plan.family.environment.iter().fold(StoreOptions::default(), |options, (key, value)| {
        options.with(key.to_lowercase(), value)
    })
}

/// Which child ended, with what exit status; none if a signal killed it.
enum Ended {
    Coordinator(Option<i32>),
    Agent(usize, Option<i32>),
}

/// The processes of a run.
struct Processes<'a> {
    plan: &'a Plan,
    coordinator: Child,
    address: SocketAddr,
    agents: Vec<Option<Child>>,
    restarts_left: u32,
}

impl Processes<'_> {
    fn coordinator_arguments(plan: &Plan, listen: &str) -> Vec<String> {
        [
            "coordinator".to_owned(),
            format!("--listen={listen}"),
            format!("--nodes={}:{}", plan.nodes.min, plan.nodes.max),
            format!("--spares={}", plan.spares),
            format!("--run={}", plan.run),
            format!("--backend={}", named(plan.backend)),
        ]
        .to_vec()
    }

    fn agent(&self, node: u32) -> Result<Child, Failure> {
        let plan = self.plan;
        let gpu = plan.gpus.get(node as usize);
        plan.family.agent(
            node,
            // An empty list shows none.
            &[("CUDA_VISIBLE_DEVICES", gpu.map_or("", String::as_str))],
            &[
                "worker".to_owned(),
                format!("--coordinator={}", self.address),
                format!("--node={node}"),
                format!("--run={}", plan.run),
                format!("--logs={}", plan.family.logs.display()),
                format!("--threads={}", threads_each(plan.nodes.max)),
                format!("--gpus={}", u32::from(gpu.is_some())),
            ],
        )
    }

    /// Waits for a child to end.
    async fn next_end(&mut self) -> Result<Ended, Failure> {
        let agents = self.agents.iter_mut().enumerate();
        let ended = futures::future::select_all(agents.map(|(node, child)| {
            Box::pin(async move {
                match child {
                    Some(child) => (node, child.wait().await),
                    None => std::future::pending().await,
                }
            })
        }));
        tokio::select! {
            status = self.coordinator.wait() => {
                Ok(Ended::Coordinator(status.map_err(Failure::failed)?.code()))
            }
            ((node, status), _, _) = ended => {
                Ok(Ended::Agent(node, status.map_err(Failure::failed)?.code()))
            }
        }
    }

    /// Starts again what the run still needs; `Some`: the run is over, with this status.
    async fn react(
        &mut self,
        ended: Ended,
        progress: &mut Progress,
    ) -> Result<Option<i32>, Failure> {
        match ended {
            Ended::Coordinator(Some(status)) => return Ok(Some(status)),
            Ended::Coordinator(None) => {
                // It may have died of old age: the end is in the bucket before anybody is told.
                let store = Store::open(&self.plan.run, &options(self.plan));
                if run::says_complete(&store.map_err(Failure::failed)?, &self.plan.config).await? {
                    return Ok(Some(EXIT_DONE));
                }
                self.spend("the coordinator died")?;
                progress.note("the coordinator died; starting it again (training goes on)");
                let listen = self.address.to_string();
                let arguments = Self::coordinator_arguments(self.plan, &listen);
                let family = &self.plan.family;
                (self.coordinator, _) = family.server("coordinator.log", &arguments).await?;
            }
            // It left in good order; the coordinator will say why.
            Ended::Agent(node, Some(_)) => self.agents[node] = None,
            Ended::Agent(node, None) => {
                self.spend(&format!("the agent of node {node} died"))?;
                progress.note(&format!("the agent of node {node} died; starting it again"));
                let id = u32::try_from(node).unwrap_or(u32::MAX);
                self.agents[node] = Some(self.agent(id)?);
            }
        }
        Ok(None)
    }

    /// Waits for the agents, which have heard of the end; what lingers is killed. When the launcher
    /// leaves, nothing of the run is left behind.
    async fn end(&mut self) {
        for child in self.agents.iter_mut().flatten() {
            if tokio::time::timeout(LINGER, child.wait()).await.is_err()
                && let Err(error) = child.kill().await
            {
                tracing::warn!(%error, "an agent could not be killed");
            }
        }
    }

    fn spend(&mut self, what: &str) -> Result<(), Failure> {
        match self.restarts_left.checked_sub(1) {
            Some(left) => {
                self.restarts_left = left;
                Ok(())
            }
            None => Err(Failure::failed(format!("{what}, and the restarts are used up"))),
        }
    }
}

/// From the first process to the last.
async fn supervise(plan: &Plan) -> Result<i32, Failure> {
    let arguments = Processes::coordinator_arguments(plan, "127.0.0.1:0");
    let (coordinator, address) = plan.family.server("coordinator.log", &arguments).await?;
    let restarts_left = plan.config.recovery.restarts;
    let mut processes = Processes { plan, coordinator, address, agents: Vec::new(), restarts_left };
    for node in 0..plan.nodes.max + plan.spares {
        let child = processes.agent(node)?;
        processes.agents.push(Some(child));
    }
    let terminal = std::io::stderr().is_terminal();
    let mut progress = Progress::new(plan.config.train.iterations, terminal);
    let mut shown = View::default();
    let (statuses, mut updates) = tokio::sync::watch::channel(RunStatus::default());
    let watcher = tokio::spawn(follow(address, statuses));
    let mut interrupted = Box::pin(super::signals::interrupted());
    let mut stopping = false;
    let status = loop {
        tokio::select! {
            ended = processes.next_end() => {
                if let Some(status) = processes.react(ended?, &mut progress).await? { break status }
            }
            Ok(()) = updates.changed() => {
                let status = updates.borrow_and_update().clone();
                let step = shown.state.step;
                shown.show(&status, &mut progress);
                if shown.state.step > step {
                    // What gets on may be restarted again.
                    processes.restarts_left = plan.config.recovery.restarts;
                }
            }
            signal = &mut interrupted, if !stopping => {
                stopping = true;
                progress.note(&format!("{signal}: writing a checkpoint, then stopping"));
                ask_to_stop(address, signal).await;
            }
        }
    };
    processes.end().await;
    shown.show(&updates.borrow_and_update().clone(), &mut progress);
    watcher.abort();
    finish(plan, status, &shown, progress);
    Ok(status)
}

fn finish(plan: &Plan, status: i32, shown: &View, progress: Progress) {
    let outcome = match status {
        EXIT_DONE => Outcome::Complete,
        EXIT_RESUMABLE => Outcome::Interrupted,
        _ => Outcome::Failed(if shown.reason.is_empty() {
            plan.family.last_line("coordinator.log")
        } else {
            shown.reason.clone()
        }),
    };
    progress.finish(&outcome, &shown.state);
    if matches!(status, EXIT_DONE | EXIT_RESUMABLE)
        && let Ok(goodput) = serde_json::from_str::<Goodput>(&shown.goodput)
    {
        tell(&goodput.to_string());
    }
    if status == EXIT_DONE && !shown.dice.is_empty() {
        let width = shown.dice.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        tell("validation   Dice");
        for (name, dice) in &shown.dice {
            tell(&format!("  {name:<width$}  {dice:.4}", width = width.max(9)));
        }
    }
}

async fn ask_to_stop(address: SocketAddr, reason: String) {
    let asked = async {
        let mut client = CoordinatorClient::connect(format!("http://{address}")).await.ok()?;
        client.stop(StopRequest { reason }).await.ok()
    };
    if asked.await.is_none() {
        tracing::warn!("the coordinator could not be asked to stop; its own signal will do");
    }
}

/// Keeps the newest status at hand, through restarts of the coordinator.
async fn follow(address: SocketAddr, statuses: tokio::sync::watch::Sender<RunStatus>) {
    loop {
        if let Ok(mut client) = CoordinatorClient::connect(format!("http://{address}")).await
            && let Ok(stream) = client.watch(WatchRequest {}).await
        {
            let mut stream = stream.into_inner();
            while let Ok(Some(status)) = stream.message().await {
                statuses.send_replace(status);
            }
        }
        // Nothing tells when a coordinator listens again: this is the poll.
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
}

/// What the progress line shows.
#[derive(Default)]
struct View {
    state: ProgressState,
    notes: usize,
    reason: String,
    /// Where the time went, as JSON.
    goodput: String,
    /// The last validation's Dice by class, the mean last.
    dice: Vec<(String, f64)>,
}

impl View {
    fn show(&mut self, status: &RunStatus, progress: &mut Progress) {
        if status.notes.len() < self.notes {
            self.notes = 0; // another coordinator
        }
        for note in &status.notes[self.notes..] {
            progress.note(note);
        }
        self.notes = status.notes.len();
        self.reason.clone_from(&status.reason);
        self.goodput.clone_from(&status.goodput);
        let newest = serde_json::from_str(&status.progress);
        if let Ok(TrainerEvent::Step { step, terms, images_per_s, .. }) = &newest {
            self.state.step = step.0;
            self.state.losses = terms.iter().map(|(name, value)| (name.clone(), *value)).collect();
            // The sum of them comes first.
            self.state.losses.sort_by_key(|(name, _)| name != "total");
            self.state.images_per_s = *images_per_s;
        }
        if let Ok(TrainerEvent::Validation { dice, mean_dice, .. }) =
            serde_json::from_str(&status.validation)
        {
            self.state.val_dice = Some(mean_dice);
            self.dice = dice;
            self.dice.push(("mean".to_owned(), mean_dice));
        }
        self.state.world = status.members;
        self.state.status = match status.phase.as_str() {
            "waiting for workers" => {
                Shown::Waiting { present: status.members, wanted: status.wanted }
            }
            "training" if self.state.step == 0 => Shown::Starting,
            "training" => match newest {
                Ok(TrainerEvent::Busy { doing: Doing::Validating, .. }) => Shown::Validating,
                Ok(TrainerEvent::Busy { doing: Doing::Saving, .. }) => Shown::Stopping,
                _ => Shown::Training,
            },
            "stopping" => Shown::Stopping,
            "recovering" => Shown::Recovering,
            _ => self.state.status,
        };
        progress.update(&self.state);
    }
}
