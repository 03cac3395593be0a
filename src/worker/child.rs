//! One trainer process, as its agent sees it: JSON lines in and out, an exit status, a kill.

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use tokio::time::Instant;

use crate::proto::{Assignment, Doing, Membership, Place, TrainerEvent, TrainerOrder};
use crate::telemetry::TRACEPARENT;
use crate::telemetry::logging::LOG_FORMAT;
use crate::types::{Backend, Generation, NodeId, Step};

/// The environment variable by which a child learns whose death it must follow.
pub const PARENT_VARIABLE: &str = "CPCR_PARENT_PID";

/// What a trainer's environment holds so that failures of its groups come back as errors instead of
/// tearing the process down; torch reads it when a group is made.
const GROUP_ENVIRONMENT: [(&str, &str); 3] = [
    // Clean up and report; don't end the process.
    ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2"),
    // The heartbeat monitor would end the process when an abort hangs; the agent does that.
    ("TORCH_NCCL_ENABLE_MONITORING", "0"),
    // The flight recorder looks its groups up without a lock, and we have several.
    ("TORCH_FR_BUFFER_SIZE", "0"),
];

/// NCCL picks an interface by itself, and rather one that others reach: a run on one host is to stay on it.
fn nccl_environment(assignment: &Assignment) -> Vec<(&'static str, &'static str)> {
    if !assignment.interface.is_loopback() || std::env::var_os("NCCL_SOCKET_IFNAME").is_some() {
        return Vec::new();
    }
    vec![("NCCL_SOCKET_IFNAME", "lo"), ("NCCL_IB_DISABLE", "1")]
}

/// What the trainer's signals say of it, beside what the user has set.
fn resource_attributes(node: NodeId, run: &str) -> String {
    // Commas, equals signs and others would end a value: percent-encoding is the format's own way.
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./:".contains(&byte);
    let run: String = run
        .bytes()
        .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect();
    let own = format!("cpcr.node={node},cpcr.run={run}");
    match std::env::var("OTEL_RESOURCE_ATTRIBUTES") {
        Ok(given) if !given.is_empty() => format!("{given},{own}"),
        _ => own,
    }
}

/// How a trainer is started.
#[derive(Debug, Clone)]
pub struct ChildOptions {
    /// The `cpcr-engine` binary.
    pub engine: PathBuf,
    /// Folder for the trainer's log, by node.
    pub logs: PathBuf,
}

/// A running trainer.
pub struct TrainerChild {
    /// What it computes on.
    pub backend: Backend,
    /// The place that it was given last.
    pub place: Option<Membership>,
    /// Of which rank and generation it speaks, by its own word; that may not be its place yet.
    speaks_for: Option<Place>,
    /// Whether it has left that place, and waits with its state.
    pub stranded: bool,
    /// Steps done, as far as it has said that it has a state.
    pub done: Option<Step>,
    /// Whether its agent has killed it.
    pub killed: bool,
    /// Whether it has said that it fails, and ends by itself.
    failing: bool,
    /// When it was last heard.
    heard: Instant,
    /// What it was last heard to be at.
    doing: String,
    /// What the kernel had killed for want of memory before it started.
    oom_kills: u64,
    child: Child,
    orders: Option<ChildStdin>,
    events: Lines<BufReader<ChildStdout>>,
}

/// What a trainer did.
pub enum ChildEvent {
    /// It reported something.
    Line {
        /// In JSON.
        line: String,
        /// Whether that is progress.
        stepped: bool,
        /// Whether it is about steps, or what belongs to them.
        of_steps: bool,
    },
    /// It lives.
    Alive,
    /// It printed something else.
    Noise(String),
    /// Its process ended: exit status (or 128 + signal) and what was seen, in words.
    Exited(i32, String),
}

impl ChildOptions {
    /// The log of a node's trainers: JSON, one object a line.
    #[must_use]
    pub fn log(&self, node: NodeId) -> PathBuf {
        self.logs.join(format!("trainer-{node}.jsonl"))
    }
}

impl TrainerChild {
    /// Starts a trainer.
    ///
    /// # Errors
    /// When the process or its log file cannot be made.
    pub fn spawn(
        options: &ChildOptions,
        node: NodeId,
        assignment: &Assignment,
        traceparent: Option<&str>,
    ) -> std::io::Result<Self> {
        std::fs::create_dir_all(&options.logs)?;
        let log = std::fs::OpenOptions::new().create(true).append(true).open(options.log(node))?;
        let text = serde_json::to_string(assignment).map_err(std::io::Error::other)?;
        let mut child = Command::new(&options.engine)
            .arg("trainer")
            .arg("--assignment")
            .arg(text)
            .env(PARENT_VARIABLE, std::process::id().to_string())
            .env(LOG_FORMAT, "json")
            .envs(traceparent.map(|context| (TRACEPARENT, context)))
            .env("OTEL_RESOURCE_ATTRIBUTES", resource_attributes(node, &assignment.run))
            .envs(GROUP_ENVIRONMENT)
            .envs(nccl_environment(assignment))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            // Ctrl-C is for whoever decides: the trainer stops by order, after a checkpoint.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let orders = child.stdin.take();
        let stdout = child.stdout.take().ok_or_else(|| std::io::Error::other("no stdout"))?;
        Ok(Self {
            backend: assignment.backend,
            place: None,
            speaks_for: None,
            stranded: false,
            done: None,
            killed: false,
            failing: false,
            heard: Instant::now(),
            doing: "starting".to_owned(),
            oom_kills: oom_kills(),
            child,
            orders,
            events: BufReader::new(stdout).lines(),
        })
    }

    /// The next line or the end. Lines come first: everything the trainer said is heard.
    pub async fn next(&mut self) -> ChildEvent {
        if let Ok(Some(line)) = self.events.next_line().await {
            self.heard = Instant::now();
            return self.said(line);
        }
        match self.child.wait().await {
            Ok(status) => {
                let (code, evidence) = describe(status);
                ChildEvent::Exited(code, evidence)
            }
            Err(error) => ChildEvent::Exited(1, format!("could not be waited for: {error}")),
        }
    }

    /// What a line means to its agent.
    fn said(&mut self, line: String) -> ChildEvent {
        // libtorch prints lines of its own to stdout; events are JSON objects.
        if !line.starts_with('{') {
            return ChildEvent::Noise(line);
        }
        let event = serde_json::from_str(&line);
        if let Ok(event) = &event {
            self.note_doing(event);
        }
        let of_steps = matches!(
            event,
            Ok(TrainerEvent::Grouped(_)
                | TrainerEvent::Ready { .. }
                | TrainerEvent::Step { .. }
                | TrainerEvent::Busy { .. }
                | TrainerEvent::Validation { .. }
                | TrainerEvent::Checkpoint { .. }
                | TrainerEvent::Vitals(_))
        );
        let stepped = match event {
            Ok(TrainerEvent::Alive) => return ChildEvent::Alive,
            Ok(TrainerEvent::Grouped(place)) => {
                self.speaks_for = Some(place);
                false
            }
            Ok(TrainerEvent::Ready { place, step, .. }) => {
                self.speaks_for = Some(place);
                self.done = Some(step);
                false
            }
            Ok(TrainerEvent::Step { step, .. } | TrainerEvent::Busy { step, .. }) => {
                self.done = Some(step);
                true
            }
            Ok(TrainerEvent::Stranded { generation, done, .. }) => {
                self.done = done;
                self.stranded |= self.generation() == Some(generation);
                false
            }
            Ok(TrainerEvent::Failed { .. }) => {
                self.failing = true;
                false
            }
            // What it is goes to the coordinator, who says so if it cannot be read.
            Ok(_) | Err(_) => false,
        };
        ChildEvent::Line { line, stepped, of_steps }
    }

    fn note_doing(&mut self, event: &TrainerEvent) {
        self.doing = match event {
            TrainerEvent::Standby => "waiting for a generation".to_owned(),
            // Only rank 0 says each step.
            TrainerEvent::Ready { step, .. } => format!("training, from step {step} on"),
            TrainerEvent::Step { step, .. } => format!("training, {step} steps done"),
            TrainerEvent::Busy { step, doing: Doing::Validating } => {
                format!("validating, {step} steps done")
            }
            TrainerEvent::Busy { step, doing: Doing::Saving } => {
                format!("waiting for a checkpoint, {step} steps done")
            }
            TrainerEvent::Stranded { .. } => "waiting without a group".to_owned(),
            _ => return,
        };
    }

    /// What something that it did is about: steps are of the place that it has said, anything else of the one that it was
    /// given last.
    #[must_use]
    pub fn subject(&self, event: &ChildEvent) -> Place {
        let of_steps = matches!(event, ChildEvent::Line { of_steps: true, .. });
        let given = self.place.as_ref();
        let given = given.map(|place| Place { generation: place.generation, rank: place.rank });
        self.speaks_for.filter(|_| of_steps).or(given).unwrap_or_default()
    }

    /// What it was last heard to be at.
    #[must_use]
    pub fn doing(&self) -> &str {
        &self.doing
    }

    /// Whether the kernel has killed anything on this machine for want of memory since it started.
    #[must_use]
    pub fn memory_ran_out(&self) -> bool {
        oom_kills() > self.oom_kills
    }

    /// Whether it can be given a place, or keeps one.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        !self.killed && !self.failing
    }

    /// The generation that it was told to join last.
    #[must_use]
    pub fn generation(&self) -> Option<Generation> {
        self.place.as_ref().map(|place| place.generation)
    }

    /// Gives it a place in a generation.
    pub async fn join(&mut self, membership: Membership) {
        self.place = Some(membership.clone());
        self.stranded = false;
        self.doing = format!("joining generation {}", membership.generation);
        self.order(&TrainerOrder::Join(membership)).await;
    }

    /// Whether nothing has been heard of it for `patience`: even its pulse has stopped.
    #[must_use]
    pub fn is_silent(&self, patience: Duration) -> bool {
        self.heard.elapsed() > patience
    }

    /// Passes an order on. A trainer that is gone shows by its exit, so a failure is only logged.
    pub async fn order(&mut self, order: &TrainerOrder) {
        let Some(stdin) = &mut self.orders else { return };
        let Ok(mut line) = serde_json::to_string(order) else { return };
        line.push('\n');
        if let Err(error) = stdin.write_all(line.as_bytes()).await {
            tracing::warn!(%error, "the trainer takes no orders");
        }
    }

    /// SIGKILL: the one cure for a stuck collective. The exit shows through [`Self::next`].
    pub fn kill(&mut self) {
        self.killed = true;
        if let Err(error) = self.child.start_kill() {
            tracing::debug!(%error, "already gone");
        }
    }
}

/// Processes that the kernel has killed for want of memory, in whichever container; 0 where it does not say.
fn oom_kills() -> u64 {
    let counters = std::fs::read_to_string("/proc/vmstat").unwrap_or_default();
    let mut lines = counters.lines();
    lines.find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok()).unwrap_or_default()
}

/// Exit status in the shell's way, and in words.
fn describe(status: ExitStatus) -> (i32, String) {
    match (status.code(), status.signal()) {
        (Some(code), _) => (code, format!("exited with status {code}")),
        (None, Some(signal)) => (128 + signal, format!("was killed by signal {signal}")),
        (None, None) => (1, "ended without a status".to_owned()),
    }
}

/// Asks the kernel to end this process with the parent that [`PARENT_VARIABLE`] names.
///
/// Does nothing where the variable is absent: then a person started the process. Returns `false`
/// if that parent is gone already, so that the caller leaves at once.
#[must_use]
pub fn die_with_parent() -> bool {
    let Some(parent) = std::env::var(PARENT_VARIABLE).ok().and_then(|p| p.parse::<i32>().ok())
    else {
        return true;
    };
    if let Err(error) =
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
    {
        tracing::warn!(%error, "this process may outlive its parent");
    }
    rustix::process::getppid().is_some_and(|pid| pid.as_raw_nonzero().get() == parent)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::TrainerEvent;
    use crate::types::{Rank, WorldSize};

    /// A step of the generation before counted for the next one, where the agent had been told of that before it had read the
    /// step.
    #[tokio::test]
    async fn a_step_is_of_the_generation_that_took_it() {
        let folder = tempfile::tempdir().unwrap();
        let options = ChildOptions { engine: "/bin/cat".into(), logs: folder.path().to_owned() };
        let assignment = Assignment {
            backend: Backend::Gloo,
            interface: [127, 0, 0, 1].into(),
            run: "memory:///".to_owned(),
            threads: 1,
        };
        let mut child = TrainerChild::spawn(&options, NodeId(0), &assignment, None).unwrap();
        let membership = |generation, rank| Membership {
            generation: Generation(generation),
            epoch: "e".to_owned(),
            rank: Rank(rank),
            world: WorldSize(2),
            kv_address: ([127, 0, 0, 1], 1).into(),
            traceparent: None,
        };
        let place =
            |generation, rank| Place { generation: Generation(generation), rank: Rank(rank) };
        let ready =
            |place| TrainerEvent::Ready { place, step: Step(3), restored: false, ledger: None };
        let busy = TrainerEvent::Busy { step: Step(4), doing: Doing::Validating };
        let failed = TrainerEvent::Failed { text: "full".to_owned(), status: 1, curable: false };
        let said = |child: &mut TrainerChild, event: &TrainerEvent| {
            let event = child.said(serde_json::to_string(event).unwrap());
            child.subject(&event)
        };
        child.join(membership(1, 1)).await;
        assert_eq!(said(&mut child, &ready(place(1, 1))), place(1, 1));
        child.join(membership(2, 0)).await;
        assert_eq!(said(&mut child, &busy), place(1, 1), "it was on its way");
        assert_eq!(said(&mut child, &failed), place(2, 0));
        assert_eq!(said(&mut child, &ready(place(2, 0))), place(2, 0));
        assert_eq!(said(&mut child, &busy), place(2, 0));
        child.kill();
    }
}
