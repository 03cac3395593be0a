//! Object storage behind one small interface: where datasets, runs and checkpoints live.
//!
//! [`Store`] is a cheap clone over `object_store` for `s3://`, `gs://`, `az://`, `file:///`,
//! `memory:///` and plain paths. It adds what the rest of this crate relies on and the engine
//! leaves open: create-if-absent that recognises its own retried write, reads verified against a
//! digest, one bounded deadline for everything, and errors that say what to do next.
//!
//! Beside it, [`BlockCache`] keeps verified blocks on the local disk for all processes of a machine.
//!
//! What it is not: a file system, or a place for formats. Nothing here knows what the
//! bytes mean.

mod aws_profile;
mod backend;
mod block_cache;
mod error;
mod fault_plan;
mod fault_proxy;
mod fault_wire;
mod faulty;
mod http_note;
mod latency;
mod options;
mod read;
mod read_faults;
mod s3_keyed;
mod s3_server;
#[allow(clippy::module_inception)]
mod store;
mod transfer;
mod unique;

pub use block_cache::{BlockCache, BlockCacheCounts, BlockCacheOptions, Kept, NotKept};
pub use error::StoreError;
pub use fault_plan::{FaultPlan, InjectedFault};
pub use fault_proxy::{FaultProxy, InjectedCounts};
pub use faulty::{Fault, FaultyStore};
pub use options::{MissingFolder, StoreOptions};
pub use read_faults::{FaultKind, ReadFaults};
pub use s3_server::{S3Server, S3ServerError, S3ServerOptions, serve};
pub use store::{Created, ObjectInfo, Store};
pub use transfer::is_upload_note;
pub use unique::unique_id;
