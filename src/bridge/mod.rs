//! The bridge to libtorch's C++: the one place in the package that may be unsafe.
//!
//! It is not an abstraction layer: each submodule offers what `tch` lacks and nothing more.

pub mod alloc;
pub mod ops;
