//! What can go wrong with the ledger, named by what the caller decides.

use crate::store::StoreError;
use crate::types::{Generation, Step};

/// A ledger that cannot be written or read.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum LedgerError {
    /// Bytes are missing or not those that were written.
    #[error("{object} is damaged: {detail}")]
    Damaged {
        /// Which object, relative to the run.
        object: String,
        /// What is wrong.
        detail: String,
    },
    /// Written by a later release of this program, which alone can read it.
    #[error(
        "{object} has format {found}, this program reads up to {known}: use the release of cpcr that wrote it, or a newer one"
    )]
    NewerFormat {
        /// Which object.
        object: String,
        /// Its format.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// The number that this writer was about to use is another's: it must stop.
    #[error(
        "another coordinator serves this run: it has written {object}; this one stops (start only one for a run)"
    )]
    Fenced {
        /// Which object.
        object: String,
    },
    /// Something that was said for the ledger never came, and the run ends: the checkpoint carries it.
    #[error(
        "some steps of generation {generation} are not recorded: what was said of them was lost on the way"
    )]
    Unheard {
        /// Whose.
        generation: Generation,
    },
    /// Receipts do not follow each other: a defect of this program.
    #[error("the receipt of step {wanted} never came, that of step {found} did")]
    Gap {
        /// The step that comes next.
        wanted: Step,
        /// What came.
        found: Step,
    },
    /// Nobody takes the receipts from this trainer, which cannot keep more.
    #[error("the ledger lacks the last {kept} steps: the coordinator does not get to write them")]
    Unrecorded {
        /// Receipts kept.
        kept: usize,
    },
    /// A record that makes no sense.
    #[error("ledger: {0}")]
    Invalid(String),
    /// The store failed; says nothing about the ledger.
    #[error(transparent)]
    Store(#[from] StoreError),
}
