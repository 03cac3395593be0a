//! Why a trainer stops, by what can be done about it.

use crate::bridge::ops::OpError;
use crate::checkpoint::CheckpointError;
use crate::collective::CollectiveError;
use crate::config::ConfigError;
use crate::data::DataError;
use crate::ledger::LedgerError;
use crate::method::MethodError;
use crate::model::ModelError;
use crate::proto::{EXIT_FAILED, EXIT_USAGE};
use crate::store::StoreError;
use crate::trust::TrustError;
use crate::types::Step;

/// Why a trainer stops.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainerError {
    /// The configuration cannot be used: the user's to mend.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A resumed run differs in what may not change: the user's to mend.
    #[error(
        "checkpoint {step} was made with another {what}; use another --run, or the old settings"
    )]
    Mismatch {
        /// The checkpoint.
        step: Step,
        /// What differs.
        what: &'static str,
    },
    /// There is no GPU to train on: see `cpcr doctor`, or take the CPU.
    #[error("no GPU: {0} (`cpcr doctor` tells more; --backend gloo trains on the CPU)")]
    Device(String),
    /// The join token cannot be used: the user's to mend.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// A peer or its store was lost: the generation ends.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// Data cannot be read.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The run's store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A checkpoint could not be written or read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Receipts cannot be kept, or a checkpoint's make no sense.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The network refused.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The method's step failed.
    #[error(transparent)]
    Method(#[from] MethodError),
    /// `train.init_from` names no weights that fit: the user's to mend.
    #[error("train.init_from = {url}: {reason}")]
    InitialWeights {
        /// As configured.
        url: String,
        /// What is wrong.
        reason: String,
    },
    /// A bridge call failed.
    #[error(transparent)]
    Op(#[from] OpError),
    /// libtorch failed.
    #[error(transparent)]
    Torch(#[from] tch::TchError),
    /// Evaluation or the report failed.
    #[error("{0}")]
    Report(String),
    /// What was asked for cannot be done: change the arguments.
    #[error("{0}")]
    Unusable(String),
    /// The operating system refused.
    #[error("{0}")]
    System(#[from] std::io::Error),
    /// Waits are too short for this machine: the user's to mend.
    #[error(
        "a step takes {step_s:.1} s here, and a wait of {wait_s:.0} s, which follows from recovery.target_s = {target_s}, \
         would end workers that are well: set recovery.target_s to at least {least_s}"
    )]
    TooSlow {
        /// The usual step.
        step_s: f64,
        /// How long a collective waits.
        wait_s: f64,
        /// As configured.
        target_s: u64,
        /// What would do.
        least_s: u64,
    },
    /// The loss is no number any more.
    #[error("the loss is {total} after step {step}: lower train.lr, or look at the data")]
    Diverged {
        /// After this step.
        step: Step,
        /// What it is.
        total: f64,
    },
}

/// Whether a network's error may come from a peer that was lost in a collective; what it says of a
/// state or an input is as true the next time.
fn is_lost_peer(error: &ModelError) -> bool {
    matches!(error, ModelError::Torch(_) | ModelError::Op(_))
}

impl TrainerError {
    /// Whether a new generation may do better. What is wrong with the data, the configuration or
    /// the method would be met again.
    #[must_use]
    pub fn is_curable(&self) -> bool {
        match self {
            Self::Store(error) | Self::Checkpoint(CheckpointError::Store(error)) => {
                matches!(error, StoreError::Unreachable { .. } | StoreError::Other { .. })
            }
            Self::Data(error) => {
                matches!(error, DataError::Read { .. } | DataError::Thread(_) | DataError::Stopped)
            }
            // The bridge's and libtorch's own errors are also how a lost peer shows in a backward pass.
            Self::Collective(error) => !matches!(error, CollectiveError::Unsupported(_)),
            Self::Model(error) => is_lost_peer(error),
            Self::Method(MethodError::Model(error)) => is_lost_peer(error),
            Self::Method(MethodError::Networks(_)) => false,
            Self::Op(_) | Self::Torch(_) | Self::Method(_) => true,
            Self::Checkpoint(CheckpointError::WriterStopped) | Self::System(_) => true,
            Self::Checkpoint(_)
            | Self::Ledger(_)
            | Self::Config(_)
            | Self::Trust(_)
            | Self::Mismatch { .. }
            | Self::InitialWeights { .. }
            | Self::Device(_)
            | Self::Report(_)
            | Self::Unusable(_)
            | Self::TooSlow { .. }
            | Self::Diverged { .. } => false,
        }
    }

    /// Whether this is how the loss of a peer shows, or an order to leave the group: then the state is sound, and
    /// another generation can be joined with it. What is not recognised costs a new process, no step.
    #[must_use]
    pub fn is_lost_peer(&self) -> bool {
        match self {
            Self::Collective(error) => error.ends_generation(),
            Self::Op(_) | Self::Torch(_) | Self::Model(_) | Self::Method(_) => {
                // libtorch appends its C++ stack; the first line is the message.
                let text = self.to_string();
                let message = text.split("\nException raised from").next().unwrap_or_default();
                CollectiveError::of_message(message.to_owned()).ends_generation()
            }
            _ => false,
        }
    }

    /// The process's exit status.
    #[must_use]
    pub fn exit_status(&self) -> i32 {
        match self {
            Self::Config(_)
            | Self::Trust(_)
            | Self::Mismatch { .. }
            | Self::InitialWeights { .. }
            | Self::TooSlow { .. }
            | Self::Unusable(_) => EXIT_USAGE,
            _ => EXIT_FAILED,
        }
    }
}
