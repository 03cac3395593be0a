//! `cpcr-launch`: trains on this machine. Thin: parse, call, map errors to an exit status.

use std::process::ExitCode;

use clap::Parser;
use cpcr::cli::{self, Failure, launch};

// One thread: children must be started by the thread whose death they follow.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let arguments = launch::Arguments::parse();
    let _telemetry = match cpcr::telemetry::init("launcher", None, "warn") {
        Ok(guard) => guard,
        Err(error) => return cli::finish(Err(Failure::usage(error))),
    };
    // `cpcr compare` starts launchers; what it leaves behind would go on with a run that its next start takes up.
    if !cpcr::worker::die_with_parent() {
        return cli::finish(Err(Failure::failed("the process that started this one is gone")));
    }
    cli::finish(launch::launch(arguments).await)
}
