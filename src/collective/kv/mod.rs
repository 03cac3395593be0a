//! The small key-value service that hosts a generation's c10d store.
//!
//! It lives with an agent, so that it outlives any trainer; losing it ends one generation only.
//! Neither side knows tensors: an agent links no libtorch. Values live in memory alone.

mod client;
mod frame;
mod server;

pub use client::{KvClient, KvError};
pub use server::KvServer;
