//! What the binaries do: arguments as typed, then resolved, then one call.
//!
//! `cpcr` and `cpcr-launch` reach no tensor type and so link no libtorch; what needs tensors is
//! behind `cpcr-engine`, which `cpcr` starts.

pub mod audit;
pub mod bench;
pub mod commands;
pub mod compare;
pub mod data;
pub mod doctor;
pub mod gpus;
pub mod import;
pub mod launch;
mod launch_arguments;
pub mod local;
mod manifests;
mod meter;
pub mod run;
pub mod serve;
pub mod signals;
mod slurm;
mod ssh;
mod view;

use std::io::Write;
use std::path::PathBuf;

use crate::proto::{EXIT_FAILED, EXIT_USAGE};

/// A command's failure: one line and an exit status.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// What to print after `error: `.
    pub message: String,
    /// With what to leave.
    pub status: i32,
}

impl Failure {
    /// Bad usage or configuration: 2.
    pub fn usage(error: impl std::fmt::Display) -> Self {
        Self { message: error.to_string(), status: EXIT_USAGE }
    }

    /// Anything else: 1.
    pub fn failed(error: impl std::fmt::Display) -> Self {
        Self { message: error.to_string(), status: EXIT_FAILED }
    }
}

/// Prints results on stdout. A reader that has gone away (`| head`) is no failure: it had enough.
///
/// # Errors
/// Any other failure to write, a full disk for one.
pub fn print(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::failed(format!("write to stdout: {error}")))
        }
        _ => Ok(()),
    }
}

/// Says something on stderr; where nobody can hear it, that is that.
pub fn tell(line: &str) {
    let _unheard = writeln!(std::io::stderr().lock(), "{line}");
}

/// Prints a failure in one line, without a backtrace, and gives its exit status.
#[must_use]
pub fn finish(result: Result<i32, Failure>) -> std::process::ExitCode {
    let status = result.unwrap_or_else(|failure| {
        tell(&format!("error: {}", failure.message.replace('\n', " ")));
        failure.status
    });
    std::process::ExitCode::from(u8::try_from(status).unwrap_or(1))
}

/// A binary of this package: the one beside the running one.
///
/// # Errors
/// When it is not there.
pub fn sibling(name: &str) -> Result<PathBuf, Failure> {
    let own = std::env::current_exe().map_err(Failure::failed)?;
    let mut folder = own.parent().map(PathBuf::from).unwrap_or_default();
    if folder.ends_with("deps") {
        folder.pop(); // a test's binary
    }
    let path = folder.join(name);
    if path.is_file() {
        return Ok(path);
    }
    Err(Failure::failed(format!(
        "{} is missing: build it with `cargo build --release`",
        path.display()
    )))
}

/// How a value of an enumeration is written on the command line.
fn named(value: impl clap::ValueEnum) -> String {
    value.to_possible_value().map(|name| name.get_name().to_owned()).unwrap_or_default()
}

/// Threads for each of `trainers` on this machine: its CPU quota, divided.
#[must_use]
pub fn threads_each(trainers: u32) -> u32 {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    (u32::try_from(cores).unwrap_or(1) / trainers.max(1)).max(1)
}
