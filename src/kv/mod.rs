//! The small key-value service through which the ranks of a generation find each other.
//!
//! It lives in one member's agent, outside every trainer, so that no trainer's death takes it
//! along; losing it ends that generation only. The agent runs the [`server`]; trainers use the
//! [`client`] behind c10d's store. No torch here: the agent must not link libtorch.
//!
//! Who connects holds the run's token ([`trust`](crate::trust)), or is on the same host. Not a database: nothing is kept on
//! disk, and members are not told apart but by the prefix that the coordinator hands to them.

pub mod client;
mod memory;
mod protocol;
pub mod server;

pub use client::{KvClient, KvError};
pub use server::KvServer;

/// Longest key, in bytes.
pub const KEY_BYTES_MAX: usize = 1024;
/// Longest value, in bytes.
pub const VALUE_BYTES_MAX: usize = 1 << 20;
/// Most keys in one request.
pub const KEYS_PER_REQUEST_MAX: usize = 4096;
/// All keys and values of one server together, in bytes.
pub const TOTAL_BYTES_MAX: usize = 256 << 20;
