//! The one error of this module, its variants named by what a caller can do about them.

use std::time::Duration;

use crate::bridge::error::{BridgeError, Failure};

/// Why a collective, a rendezvous or a reduction failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CollectiveError {
    /// Somebody did not come, or froze: end the generation, find out who.
    #[error("timed out: {0}")]
    Timeout(String),
    /// A peer's connection broke: end the generation and go on without it.
    #[error("a peer was lost: {0}")]
    PeerLost(String),
    /// This side gave up, or was told that the generation is over.
    #[error("aborted: {0}")]
    Aborted(String),
    /// The ranks could not find each other: check addresses and the key-value service.
    #[error("rendezvous failed: {0}")]
    Rendezvous(String),
    /// This build or machine cannot do it: choose another backend.
    #[error("not supported here: {0}")]
    Unsupported(String),
    /// No memory left: a smaller batch may fit.
    #[error("out of memory: {0}")]
    OutOfMemory(String),
    /// The engine refused what it was asked: a bug, here or there.
    #[error("engine: {0}")]
    Engine(String),
}

impl CollectiveError {
    /// Reads the class out of an engine's message.
    #[must_use]
    pub fn of_message(message: String) -> Self {
        Self::of(Failure::of_message(&message), message)
    }

    /// Whether the group is at fault and a new generation may cure it.
    #[must_use]
    pub fn ends_generation(&self) -> bool {
        matches!(
            self,
            Self::Timeout(_) | Self::PeerLost(_) | Self::Aborted(_) | Self::Rendezvous(_)
        )
    }

    /// The same while joining: what has no better name is a failed rendezvous, and says for how
    /// long it was tried.
    pub(super) fn joining(error: BridgeError, timeout: Duration) -> Self {
        let message = format!("joining within {timeout:?}: {}", error.message);
        match error.failure {
            Failure::Generic => Self::Rendezvous(message),
            failure => Self::of(failure, message),
        }
    }

    fn of(failure: Failure, message: String) -> Self {
        match failure {
            Failure::Generic => Self::Engine(message),
            Failure::Timeout => Self::Timeout(message),
            Failure::PeerLost => Self::PeerLost(message),
            Failure::Aborted => Self::Aborted(message),
            Failure::OutOfMemory => Self::OutOfMemory(message),
        }
    }
}

impl From<BridgeError> for CollectiveError {
    fn from(error: BridgeError) -> Self {
        Self::of(error.failure, error.message)
    }
}

/// What `f_backward` says when the reduction inside it fails.
impl From<tch::TchError> for CollectiveError {
    fn from(error: tch::TchError) -> Self {
        // libtorch appends its C++ stack; the first line is the message.
        let text = error.to_string();
        let message = text.split("\nException raised from").next().unwrap_or_default();
        Self::of_message(message.to_owned())
    }
}
