//! `cpcr`: the commands that need no tensors; the others are handed to `cpcr-engine`.

use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command as Program;

use base64::prelude::{BASE64_STANDARD, Engine};
use clap::{Parser, Subcommand};
use serde::Serialize;
use tracing::Span;

use super::bench::{self, DataArguments};
use super::compare::{self, CompareArguments};
use super::data::{self, Data};
use super::serve::{self, CoordinatorArguments, WorkerArguments};
use super::{Failure, audit, doctor, sibling};
use crate::checkpoint;
use crate::proto::{EXIT_DONE, EXIT_FAILED};
use crate::store::{
    FaultPlan, FaultProxy, InjectedFault, S3ServerError, S3ServerOptions, Store, StoreOptions,
    serve,
};
use crate::telemetry::Process;
use crate::telemetry::probe::{self, Sign};
use crate::worker::PARENT_VARIABLE;

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
    Coordinator(Box<CoordinatorArguments>),
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
    /// Prints the password of the run's page beyond loopback, by the token in this process's environment.
    PagePassword,
    /// Prints the certificate, in PEM, by which the run's page beyond loopback can be told from others.
    PageCertificate,
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
    /// What instrumentation costs a training step.
    Telemetry(bench::TelemetryArguments),
    /// The process that is measured.
    #[command(hide = true)]
    TelemetryChild {
        /// As JSON.
        #[arg(long)]
        task: String,
    },
    /// One contender of `bench data`.
    #[command(hide = true)]
    DataChild {
        /// What to do, as JSON.
        task: String,
    },
}

#[derive(Debug, clap::Args)]
struct S3Arguments {
    /// Buckets are the folders in here.
    #[arg(long)]
    dir: PathBuf,
    /// Where to listen. Plain HTTP on loopback; beyond it HTTPS, for holders of CPCR_JOIN_TOKEN.
    #[arg(long, default_value = "127.0.0.1:9000")]
    listen: SocketAddr,
    /// The one user's name; the secret is AWS_SECRET_ACCESS_KEY's.
    #[arg(long, env = "AWS_ACCESS_KEY_ID", hide_env_values = true)]
    access_key: String,
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

impl Arguments {
    /// What this process is, and the span of its life. An agent has one when its coordinator has told it of the run's.
    #[must_use]
    pub fn process(&self) -> (Process, fn() -> Span) {
        let none: fn() -> Span = Span::none;
        match &self.command {
            Command::Coordinator(arguments) => {
                (serve::coordinator_process(arguments.run()), || tracing::info_span!("run"))
            }
            Command::Worker(arguments) => (arguments.process(), none),
            _ => (Process::new("cpcr"), none),
        }
    }
}

/// Runs `cpcr`; the result is the exit status.
///
/// # Errors
/// [`Failure`]: one line and an exit status.
pub async fn run(arguments: Arguments) -> Result<i32, Failure> {
    match arguments.command {
        Command::Coordinator(arguments) => serve::coordinator(*arguments).await,
        Command::Worker(arguments) => serve::worker(arguments).await,
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
        Command::PagePassword => page_password(),
        Command::PageCertificate => page_certificate(),
        Command::Bench(Bench::Step { rest }) => engine_bench("step", rest),
        Command::Bench(Bench::Checkpoint { rest }) => engine_bench("checkpoint", rest),
        Command::Bench(Bench::Data(arguments)) => bench::measure(arguments),
        Command::Bench(Bench::Coordinator(arguments)) => bench::coordinator(arguments).await,
        Command::Bench(Bench::Telemetry(arguments)) => bench::telemetry(arguments),
        Command::Bench(Bench::TelemetryChild { task }) => bench::telemetry_child(&task),
        Command::Bench(Bench::DataChild { task }) => bench::child(&task),
    }
}

fn probed(what: &str, folder: &Path) -> Result<i32, Failure> {
    let sign = if what == "alive" { Sign::Alive } else { Sign::Ready };
    probe::look(folder, sign).map(|()| EXIT_DONE).map_err(Failure::failed)
}

fn no_token() -> Failure {
    Failure::usage("CPCR_JOIN_TOKEN, or CPCR_JOIN_TOKEN_FILE, is wanted: the run's token")
}

fn page_certificate() -> Result<i32, Failure> {
    let trust = serve::trust()?;
    let der = BASE64_STANDARD.encode(trust.page_certificate().ok_or_else(no_token)?);
    let mut pem = "-----BEGIN CERTIFICATE-----\n".to_owned();
    for line in der.as_bytes().chunks(64) {
        pem += &format!("{}\n", String::from_utf8_lossy(line));
    }
    super::print(&format!("{pem}-----END CERTIFICATE-----\n"))?;
    Ok(EXIT_DONE)
}

fn page_password() -> Result<i32, Failure> {
    let trust = serve::trust()?;
    let password = trust.page_password().ok_or_else(no_token)?;
    super::print(&format!("{password}\n"))?;
    Ok(EXIT_DONE)
}

fn engine_bench(what: &str, rest: Vec<String>) -> Result<i32, Failure> {
    engine("bench", &std::iter::once(what.to_owned()).chain(rest).collect::<Vec<_>>())
}

async fn s3(a: S3Arguments) -> Result<i32, Failure> {
    // Not an argument: process lists show those to everybody.
    let secret = std::env::var("AWS_SECRET_ACCESS_KEY").map_err(|error| {
        Failure::usage(format!("AWS_SECRET_ACCESS_KEY, the one user's secret: {error}"))
    })?;
    let mut options = S3ServerOptions::on_loopback(a.dir, a.access_key, secret);
    options.listen = a.listen;
    options.trust = serve::trust()?;
    let server = serve(options).await.map_err(|error| match error {
        S3ServerError::Trust(_) => Failure::usage(error),
        _ => Failure::failed(error),
    })?;
    let mut proxy = None;
    if a.faults > 0.0 {
        let each = a.faults / InjectedFault::ALL.len() as f64;
        let plan = FaultPlan::seeded(a.faults_seed);
        let plan = InjectedFault::ALL.into_iter().fold(plan, |plan, fault| plan.rate(fault, each));
        proxy = Some(FaultProxy::start(server.addr(), plan).await.map_err(Failure::failed)?);
    }
    serve::announce(proxy.as_ref().map_or(server.addr(), FaultProxy::addr))?;
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
    let status = Program::new(sibling("cpcr-engine")?)
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
