//! The bridge to libtorch's C++: all of this crate's `unsafe` and C++ is below this folder.
//!
//! Each submodule gives safe types over opaque handles; what to do with them (retries, buckets,
//! generations) is decided above. Nothing here knows ranks' meaning, storage or configuration.
#![allow(unsafe_code)]

pub mod alloc;
pub mod c10d;
pub mod cuda;
pub mod error;
pub mod ops;
