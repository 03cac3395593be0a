//! What the coordinator's state machine is told and what it answers: plain data, no behaviour.

use std::time::Duration;

use super::verdict::{CauseKind, Verdict};
use crate::ledger::Recorded;
use crate::types::{Backend, Generation, NodeId, Rank, Step, WorldSize};

/// Time since the coordinator's start; it comes with every event.
pub type Now = Duration;

/// How patient the coordinator is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Members that a generation needs.
    pub min: u32,
    /// Members that it has at most.
    pub max: u32,
    /// Members beyond that, which wait to take a place.
    pub spares: u32,
    /// Which collectives; none: NCCL where every member has a GPU of its own, else Gloo.
    pub backend: Option<Backend>,
    /// Losses, without a step that none had taken before, until the run gives up; those within `grace` of one
    /// that counts are the same.
    pub restarts: u32,
    /// Longest wait for missing members.
    pub wait: Duration,
    /// Longest silence of a member.
    pub heartbeat: Duration,
    /// Longest silence of a generation's trainers before their first sign of progress.
    pub start: Duration,
    /// The same later on; three times the longest silence that ended well, if that is more: steps
    /// may be slow.
    pub progress: Duration,
    /// How long those who have lost their group wait for the cause to show.
    pub grace: Duration,
    /// Longest wait for trainers to stop.
    pub drain: Duration,
}

/// A trainer that has outlived a coordinator, or a connection to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Running {
    /// The generation that it was told to join last.
    pub generation: Generation,
    /// Its rank there.
    pub rank: Rank,
    /// How many ranks there are.
    pub world: WorldSize,
    /// Whether its group is gone.
    pub stranded: bool,
    /// Steps done, if it has a state.
    pub done: Option<Step>,
}

/// How a trainer gets on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// By a step.
    Step {
        /// So many are done.
        done: Step,
        /// Whether these are all: what is left to do needs no one more.
        last: bool,
    },
    /// It validates.
    Validating,
    /// It waits for a checkpoint to be committed.
    Saving,
}

/// How far a generation has got before its first step. For the record: nothing depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Milestone {
    /// Its groups have formed.
    Grouped,
    /// It has its state.
    Restored,
}

/// What happens to the coordinator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// An agent said hello.
    Joined {
        /// Which node it serves.
        node: NodeId,
        /// Fresh with every start of the agent.
        incarnation: String,
        /// Its key-value service.
        kv_address: String,
        /// GPUs that its trainer could use.
        gpus: u32,
        /// Its trainer, if it has brought one along.
        running: Option<Running>,
    },
    /// An agent's stream ended.
    Left {
        /// Which.
        node: NodeId,
        /// Which life of it.
        incarnation: String,
    },
    /// Any message from an agent.
    Heard {
        /// Which.
        node: NodeId,
    },
    /// A trainer gets on: it did a step, validated.
    Progressed {
        /// On which node.
        node: NodeId,
        /// Of which generation.
        generation: Generation,
        /// By what.
        progress: Progress,
    },
    /// A generation gets to where it can begin.
    Arrived {
        /// On which node.
        node: NodeId,
        /// Which one.
        generation: Generation,
        /// How far.
        milestone: Milestone,
    },
    /// A trainer is prepared, and waits for a generation.
    TrainerStandby {
        /// On which node.
        node: NodeId,
    },
    /// A trainer has lost its group; it waits for another with its state.
    TrainerStranded {
        /// On which node.
        node: NodeId,
        /// Which one it has lost.
        generation: Generation,
        /// Steps done, if it has a state.
        done: Option<Step>,
        /// What it saw.
        evidence: String,
    },
    /// A trainer says why it fails; its process ends soon.
    TrainerFailed {
        /// On which node.
        node: NodeId,
        /// Of which generation.
        generation: Generation,
        /// Why, in its own words.
        evidence: String,
        /// The exit status that is coming.
        status: i32,
        /// Whether another generation may do better.
        curable: bool,
    },
    /// A trainer's process ended.
    TrainerExited {
        /// On which node.
        node: NodeId,
        /// Of which generation.
        generation: Generation,
        /// Exit status, or 128 + signal.
        status: i32,
        /// What the agent saw, or what the trainer said.
        evidence: String,
        /// What that is to be called.
        kind: CauseKind,
        /// What it was last heard to be at.
        doing: String,
    },
    /// A generation has done all there is to do: rank 0's report is written, its last checkpoint committed.
    Completed {
        /// On which node.
        node: NodeId,
        /// Which one. It may not be the newest, which then has nothing left to do.
        generation: Generation,
    },
    /// The ledger holds steps of a generation.
    Recorded(Recorded),
    /// Something that a generation's rank 0 said for the ledger was lost on the way.
    ReceiptsMissing {
        /// Which one's.
        generation: Generation,
    },
    /// The ledger cannot be written any more: the run goes no further unproven.
    LedgerLost {
        /// Exit status.
        status: i32,
        /// Why.
        reason: String,
    },
    /// A node's platform wants it back.
    NodeWanted {
        /// Which.
        node: NodeId,
        /// Why, in words.
        reason: String,
    },
    /// The user or the platform wants the run to checkpoint and end.
    StopRequested {
        /// Who asked.
        reason: String,
    },
    /// Time passed.
    Tick,
}

/// What the shell is to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Have a trainer join a generation, and start one if there is none.
    Start {
        /// On this node.
        node: NodeId,
        /// For this generation.
        generation: Generation,
        /// As this rank.
        rank: Rank,
        /// Of so many.
        world: WorldSize,
        /// With the c10d store hosted here.
        kv_address: String,
        /// With these collectives, on their devices.
        backend: Backend,
    },
    /// Start a trainer that waits for a generation.
    Prepare {
        /// On this node.
        node: NodeId,
        /// With these collectives.
        backend: Backend,
    },
    /// Have a trainer leave a generation, and wait with its state.
    Leave {
        /// On this node.
        node: NodeId,
        /// Which one.
        generation: Generation,
    },
    /// Have a trainer say once more where the ledger has to go on.
    Attest {
        /// On this node.
        node: NodeId,
        /// Of this generation.
        generation: Generation,
    },
    /// Kill the trainer of a generation.
    End {
        /// On this node.
        node: NodeId,
        /// Of this generation.
        generation: Generation,
        /// Why.
        reason: String,
    },
    /// Have the trainer checkpoint and leave.
    CheckpointAndStop {
        /// On this node.
        node: NodeId,
        /// Of this generation.
        generation: Generation,
    },
    /// Tell the trainer what the ledger holds.
    Recorded {
        /// On this node.
        node: NodeId,
        /// What.
        recorded: Recorded,
    },
    /// Tell an agent to go (75): the run does without it.
    Release {
        /// On this node.
        node: NodeId,
        /// Why.
        reason: String,
    },
    /// Tell everyone that the run has ended.
    Finish {
        /// Exit status.
        status: i32,
        /// Why.
        reason: String,
    },
    /// A line for the user.
    Note(String),
    /// What became of a loss, for the record.
    Verdict(Box<Verdict>),
}
