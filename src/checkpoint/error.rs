//! What can go wrong with a checkpoint, named by what the caller decides.

use crate::store::StoreError;
use crate::types::Step;

/// A checkpoint that could not be written or read.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// Bytes of this checkpoint are missing or not those that were written: take an older one.
    #[error("the checkpoint of step {step} is damaged: {detail}")]
    Damaged {
        /// Which one.
        step: Step,
        /// What is wrong, naming the object.
        detail: String,
    },
    /// There is no checkpoint of that step.
    #[error("there is no checkpoint of step {step} in {url}")]
    Missing {
        /// Which one.
        step: Step,
        /// The run.
        url: String,
    },
    /// Written by a later release of this program, which alone can read it.
    #[error(
        "the checkpoint of step {step} has format {found}, this program reads up to {known}: use the release of cpcr that wrote it, or a newer one"
    )]
    NewerFormat {
        /// Which one.
        step: Step,
        /// Its format.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// What was to be written is no valid checkpoint.
    #[error("the snapshot of step {step} cannot be written: {detail}")]
    Invalid {
        /// Which one.
        step: Step,
        /// Why.
        detail: String,
    },
    /// Bytes that are no safetensors file, or tensors that cannot be made into one.
    #[error("tensors: {detail}")]
    Tensors {
        /// What is wrong.
        detail: String,
    },
    /// The store failed; says nothing about the checkpoint.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The writer's thread has ended.
    #[error("the checkpoint writer has stopped")]
    WriterStopped,
}

impl CheckpointError {
    /// Whether an older checkpoint should be taken instead: never for a network that is down.
    #[must_use]
    pub fn is_damage(&self) -> bool {
        matches!(self, Self::Damaged { .. })
    }
}
