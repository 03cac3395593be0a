//! The ledger: which unlabelled samples each committed step used, as objects that are only ever created.
//!
//! ```text
//! ledger/00000001.json     a claim: from here on this coordinator writes
//! ledger/00000002.json     lineage 2 opens; its first receipts
//! ledger/00000003.json     more of them
//! ```
//!
//! A step's *receipt* is a sum over the global batch (`fingerprint`), so any one rank that applied the
//! step attests all of it. Trainers keep receipts until the ledger has them (`receipts`), also inside
//! checkpoints; the coordinator writes them down (`recorder` decides, `writer` does it). A start or a
//! resume opens a *lineage*, which supersedes what an earlier one recorded from its first step on.
//! [`audit()`] follows the newest and replays the deal.
//!
//! **Why there is never a hole.** A trainer forgets a receipt only when told that lineage `l` is recorded up to
//! some step, and a checkpoint says just that, with every receipt after it. Whoever resumes it opens a
//! lineage that leaves `l` at that step and begins with those receipts. So each checkpoint stands for itself,
//! whichever others are kept, whoever died in between, and whatever was recorded after it.
//!
//! Not here: any decision about the run, and what a sample is (`data`).

mod audit;
mod branches;
mod completion;
mod error;
mod explain;
mod fingerprint;
mod receipts;
mod record;
mod recorder;
mod replay;
mod writer;

#[cfg(test)]
mod simulation;

pub use audit::{AuditError, Report, audit};
pub use branches::{Branches, Path, Violation};
pub use completion::{COMPLETION_PATH, complete, is_complete};
pub use error::LedgerError;
pub use fingerprint::{PIECES, Part};
pub use receipts::{Carried, RECEIPTS_MAX, Receipts, STATE_KEY};
pub use record::{Attestation, FORMAT, Object, Opening, Origin, Run, object_path};
pub use recorder::{Recorded, Recorder};
pub use replay::{Counts, Replay};
pub use writer::{claim, create, numbers, read};
