//! `cpcr`: coordinator, worker, data, checkpoints, doctor. Links no libtorch. Thin: parse, call,
//! map errors to an exit status.

use std::process::ExitCode;

use clap::Parser;
use cpcr::cli::{self, Failure, commands};
use tracing::Instrument;

// One thread: an agent's trainer must be started by the thread whose death it follows.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let arguments = commands::Arguments::parse();
    let (process, span) = arguments.process();
    let telemetry = match cpcr::telemetry::init(&process, span) {
        Ok(guard) => guard,
        Err(error) => return cli::finish(Err(Failure::usage(error))),
    };
    if !cpcr::worker::die_with_parent() {
        return cli::finish(Err(Failure::failed("the process that started this one is gone")));
    }
    let span = telemetry.span().clone();
    cli::finish(commands::run(arguments).instrument(span).await)
}
