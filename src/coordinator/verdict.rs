//! What interrupted a generation, and what became of it: one verdict per interruption. Pure; written down in
//! `chronicle`.
//!
//! A loss shows in many places at once. The first cause is the process that ended, fell silent or said
//! goodbye; ranks that only saw their group break are its victims. Times are the coordinator's own: when a process
//! really died nobody knows, so that a detection is measured from the last progress before, which is more.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::events::Now;
use crate::types::{Generation, NodeId, Rank, Step, WorldSize};

/// The format of a [`Verdict`].
pub const FORMAT: u32 = 1;

/// What it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CauseKind {
    /// A trainer ended by itself, by an error of its own.
    TrainerExited,
    /// A trainer was killed by a signal from outside.
    TrainerKilled,
    /// The same, while the kernel's out-of-memory killer struck on that machine.
    OutOfMemory,
    /// A trainer showed no sign of life, and its agent killed it.
    TrainerFrozen,
    /// An agent's connection closed and did not come back.
    AgentLost,
    /// An agent gave no sign of life.
    AgentSilent,
    /// An agent was started anew: its trainer went with the one before.
    AgentReplaced,
    /// No rank made progress.
    NoProgress,
    /// The ranks lost their group, and no process showed itself to blame.
    GroupBroke,
    /// Not all ranks came back to the coordinator that followed another.
    NotAdopted,
    /// No loss: a member more.
    Joined,
    /// No loss: a platform wanted its node back, and the others do without.
    GivenBack,
}

impl CauseKind {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::TrainerExited,
        Self::TrainerKilled,
        Self::OutOfMemory,
        Self::TrainerFrozen,
        Self::AgentLost,
        Self::AgentSilent,
        Self::AgentReplaced,
        Self::NoProgress,
        Self::GroupBroke,
        Self::NotAdopted,
        Self::Joined,
        Self::GivenBack,
    ];

    /// Its name in records and metrics.
    #[must_use]
    pub fn name(self) -> String {
        named(&self)
    }
}

/// How a value without fields is written.
fn named(value: &impl Serialize) -> String {
    let json = serde_json::to_value(value).ok();
    json.and_then(|json| Some(json.as_str()?.to_owned())).unwrap_or_default()
}

/// What a generation ended of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cause {
    /// What it was.
    pub kind: CauseKind,
    /// Where.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeId>,
    /// Which rank of the generation that was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank: Option<Rank>,
    /// Exit status, or 128 + signal, of a process that ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<i32>,
    /// What was seen of it, in words.
    pub evidence: String,
    /// What its process was last heard to be at.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub doing: String,
}

impl Cause {
    /// One without a node of its own.
    pub(super) fn of_all(kind: CauseKind, evidence: String) -> Self {
        Self { kind, node: None, rank: None, status: None, evidence, doing: String::new() }
    }

    /// One of an agent.
    pub(super) fn of_node(kind: CauseKind, node: NodeId, rank: Option<Rank>) -> Self {
        let evidence = match kind {
            CauseKind::AgentSilent => "no sign of life",
            CauseKind::AgentReplaced => "a new agent took its place",
            CauseKind::Joined => "it is ready",
            CauseKind::GivenBack => "its platform wants it back",
            _ => "its connection closed",
        };
        let node = Some(node);
        Self { node, rank, ..Self::of_all(kind, evidence.to_owned()) }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let node = self.node.unwrap_or(NodeId(0));
        match self.kind {
            CauseKind::NoProgress | CauseKind::NotAdopted => f.write_str(&self.evidence),
            CauseKind::GroupBroke => write!(f, "the group broke: {}", self.evidence),
            CauseKind::Joined => write!(f, "node {node} joins"),
            CauseKind::GivenBack => write!(f, "node {node} is given back"),
            CauseKind::AgentLost | CauseKind::AgentSilent | CauseKind::AgentReplaced => {
                write!(f, "node {node} was lost: {}", self.evidence)
            }
            _ => match self.rank {
                Some(rank) => {
                    write!(f, "the trainer of node {node} (rank {rank}) {}", self.evidence)
                }
                None => write!(f, "the trainer of node {node} {}", self.evidence),
            },
        }
    }
}

/// A rank that only saw its group break.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Victim {
    /// Where.
    pub node: NodeId,
    /// Which rank it was.
    pub rank: Rank,
    /// What it saw, if it said so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub evidence: Option<String>,
}

/// What becomes of an interruption: its JSON record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// [`FORMAT`].
    pub format: u32,
    /// The generation that ended.
    pub generation: Generation,
    /// How many ranks it had.
    pub world: WorldSize,
    /// Steps done by then, as far as was known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step: Option<Step>,
    /// What it ended of.
    pub cause: Cause,
    /// Whatever else was lost before the next generation began.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub also: Vec<Cause>,
    /// Who suffered it.
    pub victims: Vec<Victim>,
    /// Seconds from the last progress to the end of the generation.
    pub detect_s: f64,
    /// Seconds from there to the start of the next generation; none where there was no other.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub regroup_s: Option<f64>,
    /// Seconds from there to its first step; none where it took none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step_s: Option<f64>,
    /// The next generation and how many ranks it has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<(Generation, WorldSize)>,
    /// The same time once more, by what survivors did; none where no step followed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phases: Option<Phases>,
}

/// An outage by what happened in it: each phase begins where the one before ends. Seconds.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Phases {
    /// From the last progress to the end of the generation.
    pub detect_s: f64,
    /// Until all survivors had left it.
    pub fence_s: f64,
    /// Until the next one's groups had formed.
    pub regroup_s: f64,
    /// Until that had agreed on a state, and all had it.
    pub restore_s: f64,
    /// Until its first step.
    pub first_step_s: f64,
}

impl Phases {
    /// Their names, in order.
    pub const NAMES: [&str; 5] = ["detect", "fence", "regroup", "restore", "first_step"];

    /// How long each took, in order.
    #[must_use]
    pub fn seconds(&self) -> [f64; 5] {
        [self.detect_s, self.fence_s, self.regroup_s, self.restore_s, self.first_step_s]
    }

    /// Between these moments. Each is at least the one before: what is heard late is no later phase's fault.
    fn between(mut moments: [Now; 6]) -> Self {
        for at in 1..moments.len() {
            moments[at] = moments[at].max(moments[at - 1]);
        }
        let [detect_s, fence_s, regroup_s, restore_s, first_step_s] =
            std::array::from_fn(|at| (moments[at + 1] - moments[at]).as_secs_f64());
        Self { detect_s, fence_s, regroup_s, restore_s, first_step_s }
    }
}

impl Verdict {
    /// Whether it was a loss.
    #[must_use]
    pub fn is_loss(&self) -> bool {
        !matches!(self.cause.kind, CauseKind::Joined | CauseKind::GivenBack)
    }

    /// Seconds without training: from the last progress to the next step, if there was one.
    #[must_use]
    pub fn outage_s(&self) -> Option<f64> {
        Some(self.detect_s + self.regroup_s? + self.step_s?)
    }

    /// It in one line.
    #[must_use]
    pub fn line(&self) -> String {
        let Self { cause, detect_s, .. } = self;
        match (self.next, self.phases) {
            (Some((generation, world)), Some(phases)) => format!(
                "{world} workers train again as generation {generation} ({cause}): noticed within {detect_s:.2} s, \
                 together again after {:.2} s, the next step after {:.2} s",
                phases.fence_s + phases.regroup_s + phases.restore_s,
                phases.first_step_s
            ),
            (Some((generation, _)), ..) => {
                format!("generation {generation}, which followed ({cause}), took no step")
            }
            _ => format!("no generation followed ({cause})"),
        }
    }
}

/// An interruption, while it lasts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Interruption {
    pub(super) cause: Cause,
    pub(super) generation: Generation,
    pub(super) world: WorldSize,
    pub(super) step: Option<Step>,
    pub(super) victims: Vec<Victim>,
    pub(super) also: Vec<Cause>,
    /// The last progress before, and the end of the generation.
    pub(super) last_progress: Now,
    pub(super) ended: Now,
    /// When a survivor was last heard to have left it.
    pub(super) fenced: Now,
    /// When which generation followed.
    pub(super) followed: Option<(Now, Generation, WorldSize)>,
    /// When that one's groups had formed, and when it had its state.
    pub(super) grouped: Option<Now>,
    pub(super) restored: Option<Now>,
}

impl Interruption {
    /// Whether it is a loss.
    pub(super) fn is_loss(&self) -> bool {
        !matches!(self.cause.kind, CauseKind::Joined | CauseKind::GivenBack)
    }

    /// What its time counts as.
    pub(super) fn part(&self) -> Part {
        if self.is_loss() { Part::Recovery } else { Part::Joining }
    }

    /// A rank of the lost generation has left it, and says what it saw.
    pub(super) fn saw(&mut self, now: Now, node: NodeId, evidence: &str) {
        self.fenced = self.fenced.max(now);
        if let Some(victim) = self.victims.iter_mut().find(|victim| victim.node == node) {
            victim.evidence.get_or_insert_with(|| evidence.to_owned());
        }
    }

    /// A victim is lost, too, before the next generation began.
    pub(super) fn lost_too(&mut self, cause: Cause) {
        let victim = self.victims.iter().position(|victim| Some(victim.node) == cause.node);
        if let (Some(at), None) = (victim, self.followed) {
            let Victim { rank, .. } = self.victims.remove(at);
            self.also.push(Cause { rank: Some(rank), ..cause });
        }
    }

    /// The end of it: the next step `now`, or none any more.
    pub(super) fn over(self, now: Option<Now>) -> Verdict {
        let seconds = |from: Now, to: Now| to.saturating_sub(from).as_secs_f64();
        let followed = self.followed.map(|(at, ..)| at);
        let phases = followed.zip(now).map(|(followed, step)| {
            let grouped = self.grouped.unwrap_or(followed);
            let restored = self.restored.unwrap_or(grouped);
            // One that is heard later than its step did not hold that up.
            Phases::between(
                [self.last_progress, self.ended, self.fenced, grouped, restored, step]
                    .map(|moment| moment.min(step)),
            )
        });
        Verdict {
            phases,
            format: FORMAT,
            generation: self.generation,
            world: self.world,
            step: self.step,
            cause: self.cause,
            also: self.also,
            victims: self.victims,
            detect_s: seconds(self.last_progress, self.ended),
            regroup_s: followed.map(|at| seconds(self.ended, at)),
            step_s: followed.zip(now).map(|(at, now)| seconds(at, now)),
            next: self.followed.map(|(_, generation, world)| (generation, world)),
        }
    }
}

/// What a process that ended is to be called.
#[must_use]
pub fn kind_of_exit(status: i32, frozen: bool, out_of_memory: bool) -> CauseKind {
    match status {
        _ if frozen => CauseKind::TrainerFrozen,
        137 if out_of_memory => CauseKind::OutOfMemory,
        129.. => CauseKind::TrainerKilled,
        _ => CauseKind::TrainerExited,
    }
}

/// Where the time of a run went: every moment is in one part, so that they sum to the whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Part {
    /// Until enough workers are there.
    Waiting,
    /// From there to the first step.
    Starting,
    /// Steps that count.
    Training,
    /// Steps that were done before, lost, and done again.
    Rework,
    /// Validation.
    Validation,
    /// Waiting for a checkpoint to be committed.
    Saving,
    /// From the last progress before a loss to the first step after it.
    Recovery,
    /// The same around a member that joins.
    Joining,
    /// From the wish to stop, or the last step, to the end.
    Stopping,
}

impl Part {
    /// Its name in records and metrics.
    #[must_use]
    pub fn name(self) -> String {
        named(&self)
    }
}

/// The account of one coordinator's time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Account {
    parts: std::collections::BTreeMap<Part, Duration>,
    until: Now,
    losses: u32,
    joins: u32,
}

impl Account {
    /// All since the last mark was `part`.
    pub(super) fn mark(&mut self, now: Now, part: Part) {
        *self.parts.entry(part).or_default() += now.saturating_sub(self.until);
        self.until = self.until.max(now);
    }

    /// One interruption more.
    pub(super) fn count(&mut self, loss: bool) {
        *(if loss { &mut self.losses } else { &mut self.joins }) += 1;
    }

    /// The account so far.
    #[must_use]
    pub fn goodput(&self) -> Goodput {
        let seconds = |part: &Part| self.parts.get(part).copied().unwrap_or_default();
        let wall = self.until.as_secs_f64();
        let training = seconds(&Part::Training).as_secs_f64();
        Goodput {
            format: FORMAT,
            wall_s: wall,
            goodput: if wall > 0.0 { training / wall } else { 0.0 },
            parts_s: self.parts.iter().map(|(part, time)| (*part, time.as_secs_f64())).collect(),
            losses: self.losses,
            joins: self.joins,
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Waiting => "waiting for workers",
            Self::Starting => "starting",
            Self::Training => "training",
            Self::Rework => "steps done again",
            Self::Validation => "validation",
            Self::Saving => "waiting for checkpoints",
            Self::Recovery => "recovery",
            Self::Joining => "joins",
            Self::Stopping => "stopping",
        })
    }
}

impl fmt::Display for Goodput {
    /// One line: the share of training, then the other parts that took a tenth of a second or more.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "training took {:.1} % of {:.1} s", 100.0 * self.goodput, self.wall_s)?;
        for (part, seconds) in &self.parts_s {
            if *part != Part::Training && *seconds >= 0.1 {
                write!(f, ", {part} {seconds:.1} s")?;
            }
        }
        match self.losses {
            0 => Ok(()),
            1 => f.write_str("; 1 loss"),
            losses => write!(f, "; {losses} losses"),
        }
    }
}

/// An [`Account`] as it is written down.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Goodput {
    /// [`FORMAT`].
    pub format: u32,
    /// Seconds since the coordinator's start.
    pub wall_s: f64,
    /// The share of them in which steps that count were done.
    pub goodput: f64,
    /// Seconds by part; they sum to `wall_s`.
    pub parts_s: std::collections::BTreeMap<Part, f64>,
    /// Losses of a generation.
    pub losses: u32,
    /// Generations that ended for a member that joined, or was given back.
    pub joins: u32,
}
