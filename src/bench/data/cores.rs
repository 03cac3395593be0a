//! One core for whoever is measured, the others for the server.
//!
//! A process inherits the cores of the thread that starts it, so the division is made by moving the
//! calling thread for as long as it takes to start a child.

use std::io::{self, Read};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde::Serialize;

/// How often a running child is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// Which cores are whose.
#[derive(Debug, Clone, Serialize)]
pub struct Cores {
    /// The server's and this process's.
    pub server: Vec<usize>,
    /// A contender's.
    pub contender: Vec<usize>,
}

impl Cores {
    /// Divides the cores that this process may use, and moves it to the server's: to be called
    /// before it has other threads. Where there is one core only, all share it.
    #[must_use]
    pub fn divide() -> Self {
        let all: Vec<usize> = match sched_getaffinity(None) {
            Ok(set) => (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect(),
            Err(_) => Vec::new(),
        };
        let cores = match all.split_first() {
            Some((first, rest)) if !rest.is_empty() => {
                Self { server: rest.to_vec(), contender: vec![*first] }
            }
            _ => Self { server: all.clone(), contender: all },
        };
        cores.stay(&cores.server);
        cores
    }

    /// Moves the calling thread.
    fn stay(&self, cores: &[usize]) {
        let mut set = CpuSet::new();
        cores.iter().for_each(|cpu| set.set(*cpu));
        if let Err(error) = sched_setaffinity(None, &set) {
            tracing::warn!(%error, "the server and what is measured share their cores");
        }
    }

    /// Runs a contender on its core, to its end.
    ///
    /// # Errors
    /// When it cannot be started, or takes longer than `limit`.
    pub fn run(
        &self,
        line: &[String],
        environment: &[(&'static str, String)],
        limit: Duration,
    ) -> io::Result<Output> {
        let (program, arguments) =
            line.split_first().ok_or_else(|| io::Error::other("an empty command"))?;
        self.stay(&self.contender);
        let child = Command::new(program)
            .args(arguments)
            .envs(environment.iter().map(|(name, value)| (*name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        self.stay(&self.server);
        let mut child = child?;
        let drain = |pipe: Option<Box<dyn Read + Send>>| {
            std::thread::spawn(move || {
                let mut bytes = Vec::new();
                if let Some(mut pipe) = pipe {
                    // What a broken pipe held so far is all that there will be.
                    pipe.read_to_end(&mut bytes).ok();
                }
                bytes
            })
        };
        let stdout = drain(child.stdout.take().map(|pipe| Box::new(pipe) as Box<dyn Read + Send>));
        let stderr = drain(child.stderr.take().map(|pipe| Box::new(pipe) as Box<dyn Read + Send>));
        let started = Instant::now();
        let status = loop {
            match child.try_wait()? {
                Some(status) => break status,
                None if started.elapsed() > limit => {
                    child.kill()?;
                    child.wait()?;
                    return Err(io::Error::other(format!("not done after {limit:?}")));
                }
                // Nothing wakes a thread when a child ends and a time runs out, whichever is first.
                None => std::thread::sleep(LOOK),
            }
        };
        let bytes = |thread: std::thread::JoinHandle<Vec<u8>>| thread.join().unwrap_or_default();
        Ok(Output { status, stdout: bytes(stdout), stderr: bytes(stderr) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_that_takes_too_long_is_ended() {
        let cores = Cores { server: vec![0], contender: vec![0] };
        let line = |text: &str| ["sh", "-c", text].map(str::to_owned).to_vec();
        let done = cores.run(&line("echo a; echo b >&2; exit 3"), &[], Duration::from_secs(60));
        let done = done.unwrap();
        assert_eq!(
            (done.status.code(), &done.stdout[..], &done.stderr[..]),
            (Some(3), &b"a\n"[..], &b"b\n"[..])
        );
        let started = Instant::now();
        assert!(cores.run(&line("exec sleep 600"), &[], Duration::from_millis(50)).is_err());
        assert!(started.elapsed() < Duration::from_secs(60));
    }
}
