//! Collectives: how the ranks of one generation exchange tensors and average gradients.
//!
//! A [`ProcessGroup`] is joined through a [`Rendezvous`] and lives as long as its generation;
//! after a loss it is dropped and a smaller one is joined under a fresh prefix. A [`Reducer`]
//! averages gradients during backward. [`kv`] is the meeting place and knows no torch.
//!
//! Not here: who is a member, when a generation ends, what a step is. Calls block; the trainer's
//! own thread makes them, never an async executor's.

mod error;
mod group;
mod reducer;
mod store;

pub use crate::bridge::c10d::ReduceOp;
pub use error::CollectiveError;
pub use group::{ProcessGroup, Rendezvous, Work, usable_gpus};
pub use reducer::Reducer;
