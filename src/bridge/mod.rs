//! The one place that may be `unsafe`: C++ and its Rust wrappers, each block with its own argument.
//!
//! Not an interface: `collective`, `model` and `trainer` give these pieces their meaning.

pub mod alloc;
pub(crate) mod c10d;
pub mod ops;
