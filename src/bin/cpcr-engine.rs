//! `cpcr-engine`: what needs libtorch. Started by an agent or by `cpcr`, not by people.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use cpcr::bench::step::{self, StepOptions};
use cpcr::cli::{self, Failure};
use cpcr::proto::{Assignment, EXIT_DONE, TrainerEvent};
use cpcr::telemetry::Guard;

/// The part of cpcr that links libtorch; `cpcr` and its agents start it.
#[derive(Debug, Parser)]
#[command(name = "cpcr-engine", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// One rank of one generation.
    Trainer {
        /// What its agent wants, as JSON.
        #[arg(long)]
        assignment: String,
    },
    /// Prints how many GPUs libtorch can use.
    Devices,
    /// Measurements that anybody can repeat.
    #[command(subcommand)]
    Bench(Bench),
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// The training step against the same network in plain PyTorch.
    Step {
        /// One line of JSON on stdout instead of an indented report.
        #[arg(long)]
        json: bool,
        /// Samples a step, half of them labelled.
        #[arg(long, default_value_t = 24)]
        batch: i64,
        /// Side of the images in pixels.
        #[arg(long, default_value_t = 256)]
        side: i64,
        /// Threads, ours and the peer's.
        #[arg(long, default_value_t = 2)]
        threads: i32,
        /// Timed steps of each case.
        #[arg(long, default_value_t = 5)]
        steps: usize,
        /// Steps over which bf16's losses are compared with f32's; 0: not at all.
        #[arg(long, default_value_t = 0)]
        gap_steps: usize,
        /// A Python with PyTorch, for the peer; without one only ours is measured.
        #[arg(long, env = "CPCR_PEER_PYTHON")]
        peer_python: Option<std::path::PathBuf>,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    cpcr::bridge::alloc::tune();
    let telemetry = match cpcr::telemetry::init("trainer", None, "info") {
        Ok(guard) => guard,
        Err(error) => return cli::finish(Err(Failure::usage(error))),
    };
    if !cpcr::worker::die_with_parent() {
        return cli::finish(Err(Failure::failed("the agent that started this trainer is gone")));
    }
    match arguments.command {
        Command::Trainer { assignment } => train(&assignment, &telemetry),
        Command::Devices => {
            println!("{}", cpcr::bridge::cuda::device_count());
            ExitCode::SUCCESS
        }
        Command::Bench(bench) => cli::finish(measure(bench)),
    }
}

fn train(assignment: &str, telemetry: &Guard) -> ExitCode {
    let result = serde_json::from_str::<Assignment>(assignment).map_err(Failure::usage);
    cli::finish(result.and_then(|assignment| {
        cpcr::trainer::run(&assignment, telemetry).map_err(|error| {
            let (text, curable) = (error.to_string(), error.is_curable());
            cpcr::trainer::emit(&TrainerEvent::Failed { text, curable });
            Failure { message: error.to_string(), status: error.exit_status() }
        })
    }))
}

fn measure(bench: Bench) -> Result<i32, Failure> {
    let Bench::Step { json, batch, side, threads, steps, gap_steps, peer_python } = bench;
    let options =
        StepOptions { batch, side, threads, steps, gap_steps, peer_python, ..Default::default() };
    let report = step::run(&options).map_err(Failure::failed)?;
    let text =
        if json { serde_json::to_string(&report) } else { serde_json::to_string_pretty(&report) };
    println!("{}", text.map_err(Failure::failed)?);
    Ok(EXIT_DONE)
}
