//! The coordinator: who is a member, when a generation starts and ends, how the run ends.
//!
//! `state` is the pure core, `apply(state, now, event) -> effects`; `service` is the gRPC shell
//! around it, `records` the task beside it that writes the ledger, `chronicle` one for verdicts and the account of time,
//! `board` what the run shows of itself. No tensor type is reachable from here, and a trainer never waits for it inside a
//! step: it may be slow, or die, without a wrong number: trainers go on stepping, and the next coordinator adopts them.

pub mod board;
mod chronicle;
pub mod events;
#[doc(hidden)]
pub mod hear;
mod members;
mod outbound;
mod records;
mod reports;
pub mod service;
pub mod state;
mod traces;
pub mod verdict;

pub use records::LedgerPlace;

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod state_tests;
#[cfg(test)]
mod verdict_tests;
