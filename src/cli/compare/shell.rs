//! The processes of a comparison: one launcher at a time, then one evaluation at a time.
//!
//! Both die with this process; a run that they leave behind is resumed when the comparison is started
//! again. SIGINT and SIGTERM reach this process alone: a launcher is asked to stop, writes its
//! checkpoint and leaves with 75. Nothing is decided here about methods or figures.

use std::os::unix::process::ExitStatusExt;
use std::pin::Pin;
use std::process::{ExitStatus, Stdio};

use tokio::process::{Child, Command};

use super::plan::{PlannedRun, Selection};
use super::scores::Evaluation;
use crate::cli::run::BackendArgument;
use crate::cli::{Failure, named, sibling, tell};
use crate::proto::{EXIT_DONE, EXIT_RESUMABLE};
use crate::worker::PARENT_VARIABLE;

/// Resolves with the signal that ends the comparison. Not to be awaited after it has resolved.
pub type Interrupt = Pin<Box<dyn Future<Output = String>>>;

/// How something that may be interrupted ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Ended<T> {
    /// It is done.
    Done(T),
    /// It was interrupted; the same command goes on.
    Interrupted,
}

fn command(binary: &str) -> Result<Command, Failure> {
    let mut command = Command::new(sibling(binary)?);
    command
        .env(PARENT_VARIABLE, std::process::id().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        // A terminal's Ctrl-C is for this process, which passes it on once.
        .process_group(0)
        .kill_on_drop(true);
    Ok(command)
}

/// Trains a run, or goes on with it, as `cpcr-launch` does; its progress goes to stderr.
///
/// # Errors
/// [`Failure`] with the launcher's own status where it fails.
pub async fn train(
    run: &PlannedRun,
    url: &str,
    data: &str,
    nodes: u32,
    backend: BackendArgument,
    interrupt: &mut Interrupt,
) -> Result<Ended<()>, Failure> {
    let mut command = command("cpcr-launch")?;
    command.args(["--run", url, "--data", data, "--nodes", &nodes.to_string()]);
    command.args(["--backend", &named(backend)]);
    if let Some(source) = &run.source {
        command.args(["--config", source]);
    }
    for pair in &run.set {
        command.args(["--set", pair]);
    }
    let mut child = command
        .spawn()
        .map_err(|error| Failure::failed(format!("cpcr-launch cannot be started: {error}")))?;
    let (status, stopped) = tokio::select! {
        status = child.wait() => (status, false),
        signal = &mut *interrupt => {
            tell(&format!("{signal}: stopping {}", run.name));
            ask_to_stop(&child);
            (child.wait().await, true)
        }
    };
    verdict(&run.name, status.map_err(Failure::failed)?, stopped)
}

fn ask_to_stop(child: &Child) {
    let pid = child.id().and_then(|id| i32::try_from(id).ok());
    let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) else { return };
    if let Err(error) = rustix::process::kill_process(pid, rustix::process::Signal::TERM) {
        tracing::warn!(%error, "the launcher could not be asked to stop");
    }
}

/// What a launcher's end means for the comparison.
fn verdict(name: &str, status: ExitStatus, stopped: bool) -> Result<Ended<()>, Failure> {
    match (status.code(), stopped) {
        (Some(EXIT_DONE), false) => Ok(Ended::Done(())),
        // A launcher that was just starting or just ending dies of the signal, or is done.
        (Some(EXIT_DONE | EXIT_RESUMABLE) | None, true) | (Some(EXIT_RESUMABLE), false) => {
            Ok(Ended::Interrupted)
        }
        (Some(code), _) => Err(Failure {
            message: format!(
                "{name} ended with status {code}; what is complete stays, and the same command goes on"
            ),
            status: code,
        }),
        (None, false) => Err(Failure::failed(format!(
            "{name}: its launcher was killed by signal {}; the same command goes on",
            status.signal().unwrap_or_default()
        ))),
    }
}

/// Scores a run's checkpoint as `cpcr eval` does.
///
/// # Errors
/// [`Failure`] where the engine fails, or says what this release does not understand.
pub async fn evaluate(
    name: &str,
    url: &str,
    split: &str,
    spacing: &str,
    selection: Selection,
    interrupt: &mut Interrupt,
) -> Result<Ended<Evaluation>, Failure> {
    let step = match selection {
        Selection::Best => "best",
        Selection::Last => "latest",
    };
    let mut command = command("cpcr-engine")?;
    command.args(["eval", "--json", "--run", url, "--split", split]);
    command.args(["--step", step, "--spacing", spacing]).stdout(Stdio::piped());
    let output = tokio::select! {
        output = command.output() => output,
        // Nothing is lost with it: dropped, it is killed.
        _ = &mut *interrupt => return Ok(Ended::Interrupted),
    };
    let output = output
        .map_err(|error| Failure::failed(format!("cpcr-engine cannot be started: {error}")))?;
    if output.status.code() != Some(EXIT_DONE) {
        let told = String::from_utf8_lossy(&output.stderr);
        let why = told.trim_end().lines().last().unwrap_or("it was killed");
        return Err(Failure {
            message: format!("evaluation of {name}: {}", why.trim_start_matches("error: ")),
            status: output.status.code().unwrap_or(crate::proto::EXIT_FAILED),
        });
    }
    serde_json::from_slice(&output.stdout)
        .map(Ended::Done)
        .map_err(|error| Failure::failed(format!("evaluation of {name}: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_launchers_end_is_passed_on() {
        // Raw wait statuses: the exit status in the second byte, else the signal.
        let told = |raw: i32, stopped: bool| {
            let ended = verdict("cpcr-seed1", ExitStatus::from_raw(raw), stopped);
            ended.map_err(|failure| (failure.status, failure.message))
        };
        assert_eq!(told(0, false), Ok(Ended::Done(())));
        for (raw, stopped) in [(75 << 8, false), (75 << 8, true), (0, true), (15, true)] {
            assert_eq!(told(raw, stopped), Ok(Ended::Interrupted), "{raw} {stopped}");
        }
        for (raw, stopped, status) in
            [(1 << 8, false, 1), (2 << 8, false, 2), (1 << 8, true, 1), (9, false, 1)]
        {
            let (found, message) = told(raw, stopped).unwrap_err();
            assert_eq!(found, status);
            assert!(message.contains("cpcr-seed1"), "{message}");
        }
    }
}
