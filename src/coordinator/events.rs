//! What the coordinator's state machine is told and what it answers: plain data, no behaviour.

use std::time::Duration;

use crate::ledger::Recorded;
use crate::types::{Backend, Generation, NodeId, Rank, WorldSize};

/// Time since the coordinator's start; it comes with every event.
pub type Now = Duration;

/// How patient the coordinator is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Members that a generation needs.
    pub nodes: u32,
    /// Which collectives; none: NCCL where every member has a GPU of its own, else Gloo.
    pub backend: Option<Backend>,
    /// Generations that may be lost before the run gives up.
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
    /// Longest wait for trainers to leave, when draining or stopping.
    pub drain: Duration,
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
    /// A trainer said something: it is ready, did a step, validated.
    Progressed {
        /// On which node.
        node: NodeId,
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
    },
    /// The ledger holds steps of a generation.
    Recorded(Recorded),
    /// The ledger cannot be written any more: the run goes no further unproven.
    LedgerLost {
        /// Exit status.
        status: i32,
        /// Why.
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
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Start a trainer.
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
    /// Tell everyone that the run has ended.
    Finish {
        /// Exit status.
        status: i32,
        /// Why.
        reason: String,
    },
    /// A line for the user.
    Note(String),
}
