//! `cpcr-engine`: what needs libtorch. Started by an agent or by `cpcr`, not by people.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use cpcr::cli::{self, Failure};
use cpcr::proto::{Assignment, TrainerEvent};

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
    let Command::Trainer { assignment } = arguments.command;
    let result = serde_json::from_str::<Assignment>(&assignment).map_err(Failure::usage);
    cli::finish(result.and_then(|assignment| {
        cpcr::trainer::run(&assignment, &telemetry).map_err(|error| {
            let text = format!("rank {}: {error}", assignment.rank);
            cpcr::trainer::emit(&TrainerEvent::Note { text });
            Failure { message: error.to_string(), status: error.exit_status() }
        })
    }))
}
