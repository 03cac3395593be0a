//! `cpcr-launch`: trains on this machine. Thin: parse, call, map errors to an exit status.

use std::process::ExitCode;

use clap::Parser;
use cpcr::cli::{self, Failure, launch};
use cpcr::telemetry::Process;
use tracing::Instrument;

// One thread: children must be started by the thread whose death they follow.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let arguments = launch::Arguments::parse();
    let process = Process { level: "warn", ..Process::new("launcher") };
    let telemetry = match cpcr::telemetry::init(&process, || tracing::info_span!("launch")) {
        Ok(guard) => guard,
        Err(error) => return cli::finish(Err(Failure::usage(error))),
    };
    // `cpcr compare` starts launchers; what it leaves behind would go on with a run that its next start takes up.
    if !cpcr::worker::die_with_parent() {
        return cli::finish(Err(Failure::failed("the process that started this one is gone")));
    }
    let span = telemetry.span().clone();
    cli::finish(launch::launch(arguments).instrument(span).await)
}
