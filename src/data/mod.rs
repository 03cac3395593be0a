//! Datasets: what is stored, who gets which sample in which step, and how it reaches a trainer.
//!
//! [`manifest`] and [`shard`] are the bytes at rest; [`mod@write`] makes them and [`dataset`] reads
//! them, verified. [`sampler`] is the deal: a pure function from (seed, step, slot) to a sample.
//! [`loader`] joins the two on threads of its own. [`import`] and [`synth`] are where datasets come
//! from, [`nifti`] is a format they come in. No tensor type, no clock and no network client is reachable from here: storage is the
//! small trait in [`source`].

pub mod augment;
pub mod dataset;
mod error;
mod fetch;
pub mod import;
pub mod loader;
pub mod manifest;
pub mod nifti;
pub mod order;
mod palette;
pub mod permutation;
pub mod preprocess;
pub mod report;
mod resample;
pub mod sampler;
pub mod shard;
pub mod source;
pub mod statistics;
mod stored;
pub mod synth;
pub mod tables;
mod thrift;
pub mod write;

pub use dataset::{Dataset, Volume};
pub use error::DataError;
pub use loader::{Batch, Loader, LoaderPlan};
pub use manifest::{Manifest, Split, VolumeEntry, VolumeId};
pub use preprocess::Preprocessing;
pub use sampler::{Deal, DealError, DealSpec, Draw, Share};
