//! `cpcr`: the commands that need no tensors; the others are handed to `cpcr-engine`.

use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command as Process;
use std::time::Duration;

use clap::{Parser, Subcommand};
use serde::Serialize;

use super::bench::{self, DataArguments};
use super::compare::{self, CompareArguments};
use super::data::{self, Data};
use super::run::{self, BackendArgument, NodeRange, Resume};
use super::{Failure, audit, doctor, gpus, sibling, threads_each};
use crate::checkpoint;
use crate::config::{self, ConfigSource};
use crate::coordinator::{LedgerPlace, events::Limits, service};
use crate::proto::{EXIT_DONE, EXIT_FAILED};
use crate::store::{
    FaultPlan, FaultProxy, InjectedFault, S3ServerOptions, Store, StoreOptions, serve,
};
use crate::telemetry::probe::{self, Sign, Signs};
use crate::types::{NodeId, Step};
use crate::worker::{AgentOptions, ChildOptions, PARENT_VARIABLE, run_agent};

/// Longest silence of trainers that start: a checkpoint comes from far away.
const START: Duration = Duration::from_secs(180);
/// Longest silence of trainers that have begun, unless their steps are slow: more than the outage of a
/// store that they ride out (75 s, and a write's last request of 30).
const PROGRESS: Duration = Duration::from_secs(120);
/// How long after a group broke the coordinator waits for the cause to show, before it goes on without knowing it.
const GRACE: Duration = Duration::from_secs(2);

/// Semi-supervised medical segmentation over many workers; `cpcr-launch` runs it all.
#[derive(Debug, Parser)]
#[command(name = "cpcr", version)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serves a run: members, generations, the end. Prints its address.
    Coordinator(CoordinatorArguments),
    /// Serves one node: starts and watches its trainer.
    Worker(WorkerArguments),
    /// The embedded S3 server. Prints its address.
    S3(S3Arguments),
    /// Makes, imports, checks and describes datasets.
    #[command(subcommand)]
    Data(Data),
    /// Lists or verifies the checkpoints of a run.
    #[command(subcommand)]
    Checkpoints(Checkpoints),
    /// Proves from a run's ledger that each unlabelled sample counted once an epoch.
    Audit {
        /// The run.
        run: String,
        /// JSON on stdout.
        #[arg(long)]
        json: bool,
    },
    /// For a platform's probes: whether a coordinator or worker with the same --state gives signs of life.
    Probe {
        /// alive: its loop turns; ready: a worker has its coordinator.
        #[arg(value_parser = ["alive", "ready"])]
        what: String,
        /// The folder.
        #[arg(long)]
        state: PathBuf,
    },
    /// Tells what this machine lacks.
    Doctor {
        /// A store to probe.
        #[arg(long)]
        store: Option<String>,
        /// JSON on stdout.
        #[arg(long)]
        json: bool,
    },
    /// Scores a checkpoint of a run on the volumes of a split.
    #[command(disable_help_flag = true)]
    Eval {
        /// Handed to cpcr-engine.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
    /// Trains every method with every seed and writes one table.
    Compare(Box<CompareArguments>),
    /// Segments a folder of NIfTI files with a checkpoint: a mask for each.
    #[command(disable_help_flag = true)]
    Predict {
        /// Handed to cpcr-engine.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
    /// Writes a checkpoint as safetensors or TorchScript, for other programs.
    #[command(disable_help_flag = true)]
    Export {
        /// Handed to cpcr-engine.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
    /// Measures what users can measure again.
    #[command(subcommand)]
    Bench(Bench),
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// The training step against the same network in plain PyTorch.
    #[command(disable_help_flag = true)]
    Step {
        /// Handed to cpcr-engine.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
    /// How long a checkpoint holds training up, beside a plain copy of as many bytes.
    #[command(disable_help_flag = true)]
    Checkpoint {
        /// Handed to cpcr-engine.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
    /// Streaming slices from object storage, beside a bare loop of GETs and other people's loaders.
    Data(DataArguments),
    /// A coordinator with very many members.
    Coordinator(bench::CoordinatorArguments),
    /// One contender of `bench data`.
    #[command(hide = true)]
    DataChild {
        /// What to do, as JSON.
        task: String,
    },
}

#[derive(Debug, clap::Args)]
struct CoordinatorArguments {
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
}

#[derive(Debug, clap::Args)]
struct WorkerArguments {
    /// The coordinator, HOST:PORT.
    #[arg(long)]
    coordinator: String,
    /// Which node this is, 0 to N-1.
    #[arg(long, env = "JOB_COMPLETION_INDEX")]
    node: u32,
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
}

#[derive(Debug, clap::Args)]
struct S3Arguments {
    /// Buckets are the folders in here.
    #[arg(long)]
    dir: PathBuf,
    /// Where to listen; loopback only, there is no TLS.
    #[arg(long, default_value = "127.0.0.1:9000")]
    listen: SocketAddr,
    /// The one user's name.
    #[arg(long, env = "AWS_ACCESS_KEY_ID")]
    access_key: String,
    /// The one user's secret.
    #[arg(long, env = "AWS_SECRET_ACCESS_KEY")]
    secret_key: String,
    /// For rehearsals: the share of requests that go wrong, in all ways that requests do.
    #[arg(long, hide = true, default_value_t = 0.0)]
    faults: f64,
    /// Which of them.
    #[arg(long, hide = true, default_value_t = 0)]
    faults_seed: u64,
}

#[derive(Debug, Subcommand)]
enum Checkpoints {
    /// Lists them.
    Ls {
        /// The run.
        run: String,
        /// JSON on stdout.
        #[arg(long)]
        json: bool,
    },
    /// Re-reads them and checks every hash.
    Verify {
        /// The run.
        run: String,
        /// JSON on stdout.
        #[arg(long)]
        json: bool,
    },
}

/// Runs `cpcr`; the result is the exit status.
///
/// # Errors
/// [`Failure`]: one line and an exit status.
pub async fn run(arguments: Arguments) -> Result<i32, Failure> {
    match arguments.command {
        Command::Coordinator(arguments) => coordinator(arguments).await,
        Command::Worker(arguments) => worker(arguments).await,
        Command::S3(arguments) => s3(arguments).await,
        Command::Data(command) => data::run(command).await,
        Command::Checkpoints(command) => checkpoints(command).await,
        Command::Audit { run, json } => audit::audit(&run, json).await,
        Command::Doctor { store, json } => diagnose(store.as_deref(), json).await,
        Command::Eval { rest } => engine("eval", &rest),
        Command::Compare(arguments) => compare::compare(*arguments).await,
        Command::Predict { rest } => engine("predict", &rest),
        Command::Export { rest } => engine("export", &rest),
        Command::Probe { what, state } => probed(&what, &state),
        Command::Bench(Bench::Step { rest }) => engine_bench("step", rest),
        Command::Bench(Bench::Checkpoint { rest }) => engine_bench("checkpoint", rest),
        Command::Bench(Bench::Data(arguments)) => bench::measure(arguments),
        Command::Bench(Bench::Coordinator(arguments)) => bench::coordinator(arguments).await,
        Command::Bench(Bench::DataChild { task }) => bench::child(&task),
    }
}

fn signs(folder: Option<PathBuf>) -> Result<Signs, Failure> {
    let Some(folder) = folder else { return Ok(Signs::default()) };
    Signs::in_folder(folder.clone())
        .map_err(|error| Failure::usage(format!("--state {}: {error}", folder.display())))
}

fn probed(what: &str, folder: &Path) -> Result<i32, Failure> {
    let sign = if what == "alive" { Sign::Alive } else { Sign::Ready };
    probe::look(folder, sign).map(|()| EXIT_DONE).map_err(Failure::failed)
}

fn engine_bench(what: &str, rest: Vec<String>) -> Result<i32, Failure> {
    engine("bench", &std::iter::once(what.to_owned()).chain(rest).collect::<Vec<_>>())
}

/// Tells the parent where this process listens.
fn announce(address: SocketAddr) -> Result<(), Failure> {
    super::print(&format!("{address}\n"))
}

async fn coordinator(a: CoordinatorArguments) -> Result<i32, Failure> {
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
    let outcome = service::serve(listener, limits, ledger, signs, super::signals::interrupted())
        .await
        .map_err(Failure::failed)?;
    tracing::info!(status = outcome.status, "{}", outcome.reason);
    Ok(outcome.status)
}

async fn worker(a: WorkerArguments) -> Result<i32, Failure> {
    let gpus = match a.gpus {
        Some(gpus) => gpus,
        None => u32::try_from(gpus::visible().await?.len()).unwrap_or(u32::MAX),
    };
    let options = AgentOptions {
        coordinator: a.coordinator,
        node: NodeId(a.node),
        run: a.run,
        threads: a.threads.unwrap_or_else(|| threads_each(1)),
        gpus,
        child: ChildOptions { engine: sibling("cpcr-engine")?, logs: a.logs },
        patience: Duration::from_secs(a.patience_s),
        signs: signs(a.state)?,
    };
    run_agent(&options, super::signals::interrupted()).await.map_err(Failure::failed)
}

async fn s3(a: S3Arguments) -> Result<i32, Failure> {
    let mut options = S3ServerOptions::on_loopback(a.dir, a.access_key, a.secret_key);
    options.listen = a.listen;
    let server = serve(options).await.map_err(Failure::failed)?;
    let mut proxy = None;
    if a.faults > 0.0 {
        let each = a.faults / InjectedFault::ALL.len() as f64;
        let plan = FaultPlan::seeded(a.faults_seed);
        let plan = InjectedFault::ALL.into_iter().fold(plan, |plan, fault| plan.rate(fault, each));
        proxy = Some(FaultProxy::start(server.addr(), plan).await.map_err(Failure::failed)?);
    }
    announce(proxy.as_ref().map_or(server.addr(), FaultProxy::addr))?;
    super::signals::interrupted().await;
    server.shutdown().await;
    Ok(EXIT_DONE)
}

async fn checkpoints(command: Checkpoints) -> Result<i32, Failure> {
    let (run, json, verify) = match command {
        Checkpoints::Ls { run, json } => (run, json, false),
        Checkpoints::Verify { run, json } => (run, json, true),
    };
    let store = Store::open(&run, &StoreOptions::default().existing()).map_err(Failure::usage)?;
    let rows = if verify {
        checkpoint::verify_rows(&store).await
    } else {
        checkpoint::list_rows(&store).await
    };
    let rows = rows.map_err(Failure::failed)?;
    print(&rows, json)?;
    let damaged = rows.iter().any(|row| row.problem.is_some());
    Ok(if damaged { EXIT_FAILED } else { EXIT_DONE })
}

/// JSON for programs, TOML-like indented JSON for people.
fn print(value: &impl Serialize, json: bool) -> Result<(), Failure> {
    let text =
        if json { serde_json::to_string(value) } else { serde_json::to_string_pretty(value) };
    super::print(&format!("{}\n", text.map_err(Failure::failed)?))?;
    Ok(())
}

async fn diagnose(store: Option<&str>, json: bool) -> Result<i32, Failure> {
    let outcome = match store {
        Some(url) => {
            let probed = async { Store::open(url, &StoreOptions::default())?.probe().await };
            probed.await.map(|()| "creates exclusively".to_owned()).map_err(|e| e.to_string())
        }
        None => Ok(String::new()),
    };
    let report = doctor::doctor(store, &|_| outcome.clone());
    if json {
        print(&report, true)?;
    } else {
        super::print(&format!("{}\n", report.text()))?;
    }
    Ok(if report.verdict() == doctor::Verdict::Fail { EXIT_FAILED } else { EXIT_DONE })
}

/// Runs a command of `cpcr-engine` and passes its status on.
fn engine(command: &str, rest: &[String]) -> Result<i32, Failure> {
    let status = Process::new(sibling("cpcr-engine")?)
        // Not the parent of this process, which its environment may name.
        .env(PARENT_VARIABLE, std::process::id().to_string())
        .arg(command)
        .args(rest)
        .status()
        .map_err(Failure::failed)?;
    status.code().ok_or_else(|| {
        let signal = status.signal().unwrap_or_default();
        let memory = if signal == 9 { ", as by a machine that is out of memory" } else { "" };
        Failure::failed(format!("cpcr-engine {command} was killed by signal {signal}{memory}"))
    })
}
