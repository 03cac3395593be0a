//! Checkpoints: immutable objects under a fresh attempt, then one created manifest.
//!
//! A checkpoint exists when its manifest does:
//!
//! ```text
//! checkpoints/step-00001200/<attempt>/{model,optimizer}.safetensors, state.json
//! checkpoints/step-00001200/manifest.json     created last, never changed
//! ```
//!
//! `manifest` and the plan in `retention` are pure. No tensor library here: tensors come and go as
//! host bytes, so that a coordinator can list and verify without one.

mod error;
mod host_tensor;
mod inspect;
mod manifest;
mod reader;
mod retention;
mod seal;
mod writer;

pub use error::CheckpointError;
pub use host_tensor::{HostTensor, NamedTensors, decode_tensors, encode_tensors};
pub use inspect::{CheckpointRow, Status, list_rows, verify_rows};
pub use manifest::{
    FORMAT, MODEL_FILE, Manifest, OPTIMIZER_FILE, ObjectEntry, Position, STATE_FILE, TrainState,
    manifest_path, parse_step, step_folder,
};
pub use reader::{Checkpoint, latest, latest_state, load, load_latest, read_manifest, verify};
pub use retention::{Retained, Retention, plan, retain};
pub use seal::{seal, unseal};
pub use writer::{Outcome, RunIdentity, Snapshot, Writer, WriterOptions, Written, write};
