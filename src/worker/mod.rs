//! The agent: one per node, small, without libtorch, and never blocked by a collective.
//!
//! It keeps a stream to the coordinator, hosts a key-value service for c10d stores, starts the
//! trainer it is told to start, relays its events, and kills it when told to. It decides nothing
//! about the run; that is the coordinator's.

mod agent;
mod child;
mod completion;
mod logs;
mod reach;

pub use agent::{AgentError, AgentOptions, run_agent};
pub use child::{ChildOptions, PARENT_VARIABLE, TrainerChild, die_with_parent};
