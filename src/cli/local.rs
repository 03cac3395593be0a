//! The processes of a local run: how the launcher starts them, and starts them again.
//!
//! Every child asks the kernel to die with the launcher. A child that ends before the run has is
//! started again while the budget lasts.

use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};

use super::ssh::Way;
use super::{Failure, sibling, ssh};
use crate::trust::JoinToken;
use crate::worker::PARENT_VARIABLE;

/// Longest wait for a child's first line.
const START: Duration = Duration::from_secs(10);
/// How often one is started that is killed before.
const STARTS_MAX: u32 = 4;
/// How long one that has closed its output may take to end.
const ENDING: Duration = Duration::from_secs(1);

/// An agent, or the ssh that leads to it.
#[derive(Debug)]
pub struct Agent {
    child: Child,
    /// What keeps an agent on another host alive.
    _input: Option<ChildStdin>,
}

impl Agent {
    /// Waits for its end.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub async fn wait(&mut self) -> std::io::Result<std::process::ExitStatus> {
        self.child.wait().await
    }

    /// Kills it.
    ///
    /// # Errors
    /// When it cannot be.
    pub async fn kill(&mut self) -> std::io::Result<()> {
        self.child.kill().await
    }
}

/// What all children share.
#[derive(Debug, Clone)]
pub struct Family {
    /// Folder for logs.
    pub logs: PathBuf,
    /// Environment for all of them: credentials and endpoint of the embedded S3 server, the join token.
    pub environment: Vec<(String, String)>,
}

impl Family {
    fn command(&self, program: impl AsRef<std::ffi::OsStr>, log: &str) -> Result<Command, Failure> {
        std::fs::create_dir_all(&self.logs)
            .map_err(|e| Failure::failed(format!("{}: {e}", self.logs.display())))?;
        let path = self.logs.join(log);
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(|e| Failure::failed(format!("{}: {e}", path.display())))?;
        let mut command = Command::new(program);
        command
            .envs(self.environment.iter().cloned())
            .env(PARENT_VARIABLE, std::process::id().to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            // Ctrl-C reaches the launcher alone: the others, the S3 server among them, are needed
            // until the last checkpoint is written.
            .process_group(0)
            .kill_on_drop(true);
        Ok(command)
    }

    /// Starts `cpcr` with `arguments` and waits for the address that it prints; again, where it is killed before that.
    ///
    /// # Errors
    /// When it ends by itself or stays silent instead; the log's last line says why.
    pub async fn server(
        &self,
        log: &str,
        arguments: &[String],
    ) -> Result<(Child, SocketAddr), Failure> {
        for _ in 0..STARTS_MAX {
            let mut command = self.command(sibling("cpcr")?, log)?;
            let mut child =
                command.args(arguments).stdout(Stdio::piped()).spawn().map_err(Failure::failed)?;
            let stdout = child.stdout.take().ok_or_else(|| Failure::failed("no stdout"))?;
            let mut lines = BufReader::new(stdout).lines();
            let line = tokio::time::timeout(START, lines.next_line()).await;
            if let Ok(Ok(Some(line))) = &line
                && let Ok(address) = line.trim().parse()
            {
                return Ok((child, address));
            }
            // One that is at its end already says how.
            let ended = tokio::time::timeout(ENDING, child.wait()).await;
            if !matches!(ended, Ok(Ok(status)) if status.signal().is_some()) {
                break;
            }
        }
        let why = self.last_line(log);
        Err(Failure::failed(format!("`cpcr {}` did not start: {why}", arguments.join(" "))))
    }

    /// Starts an agent, with environment variables of its own.
    ///
    /// # Errors
    /// When the process cannot be made.
    pub fn agent(
        &self,
        node: u32,
        environment: &[(&str, &str)],
        arguments: &[String],
    ) -> Result<Agent, Failure> {
        self.command(sibling("cpcr")?, &format!("agent-{node}.log"))?
            .envs(environment.iter().copied())
            .args(arguments)
            .spawn()
            .map(|child| Agent { child, _input: None })
            .map_err(Failure::failed)
    }

    /// Starts an agent on another host; it ends when this process does.
    ///
    /// # Errors
    /// When ssh cannot be started.
    pub(super) async fn agent_on(
        &self,
        (host, node): (&str, u32),
        way: &Way<'_>,
        token: &JoinToken,
        arguments: &[String],
    ) -> Result<Agent, Failure> {
        let program = std::env::var_os(ssh::SSH_VARIABLE).unwrap_or_else(|| "ssh".into());
        let failed = |error| Failure::failed(format!("{}: {error}", program.display()));
        let mut child = self
            .command(&program, &format!("agent-{node}.log"))?
            .args(ssh::arguments(host, way, arguments))
            .stdin(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let mut input = child.stdin.take().ok_or_else(|| Failure::failed("no stdin"))?;
        let preamble = ssh::preamble(token, std::env::vars_os());
        // One that has ended already is told by its status; the pipe holds more than this.
        input.write_all(preamble.as_bytes()).await.ok();
        Ok(Agent { child, _input: Some(input) })
    }

    /// The last line of a log that is not empty.
    #[must_use]
    pub fn last_line(&self, log: &str) -> String {
        let text = std::fs::read_to_string(self.logs.join(log)).unwrap_or_default();
        let last = text.lines().rev().find(|line| !line.trim().is_empty());
        last.unwrap_or("no output").trim_start_matches("error: ").to_owned()
    }
}
