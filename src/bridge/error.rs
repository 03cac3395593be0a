//! What came back from C++: a class that a caller can act on, and the engine's own words.
//!
//! Not the error type of any module above: `collective` turns it into its own.

use std::ffi::{CStr, c_char, c_int};
use std::fmt;

unsafe extern "C" {
    fn cpcr_last_error() -> *const c_char;
}

/// The class of a failure inside libtorch; the numbers are `cpcr::Code` of `c10d/guard.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Failure {
    /// None of the below.
    Generic = 1,
    /// Something did not happen in time: a peer is missing or frozen, or the store is.
    Timeout = 2,
    /// A peer's (or the store's) connection broke.
    PeerLost = 3,
    /// This side gave the operation up.
    Aborted = 4,
    /// No memory left, on the host or the device.
    OutOfMemory = 5,
}

impl Failure {
    /// The code that C++ is to see.
    #[must_use]
    pub fn code(self) -> i32 {
        self as i32
    }

    /// Reads the class out of an engine's message: c10d, Gloo and NCCL throw one exception type
    /// for everything, so their words are all there is. `tests/collective.rs` provokes each.
    #[must_use]
    pub fn of_message(message: &str) -> Self {
        let message = message.to_ascii_lowercase();
        let says = |phrases: &[&str]| phrases.iter().any(|phrase| message.contains(phrase));
        // In this order: an abort closes connections, and a timeout does too.
        if says(&["cpcr: group aborted", "was aborted", "communicator was aborted"]) {
            Self::Aborted
        } else if says(&["out of memory", "can't allocate memory", "bad_alloc"]) {
            Self::OutOfMemory
        } else if says(&["timed out", "timeout", "time out"]) {
            Self::Timeout
        } else if says(&[
            "connection closed",
            "connection reset",
            "connection refused",
            "broken pipe",
            "no route to host",
            "network is unreachable",
            "socket closed",
            "remote process exited",
            "nccl remote error",
            "ncclremoteerror",
            "ncclsystemerror",
        ]) {
            Self::PeerLost
        } else {
            Self::Generic
        }
    }

    pub(super) fn of_code(code: c_int, message: &str) -> Self {
        match code {
            2 => Self::Timeout,
            3 => Self::PeerLost,
            4 => Self::Aborted,
            5 => Self::OutOfMemory,
            _ => Self::of_message(message),
        }
    }
}

/// A failure that C++ reported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BridgeError {
    /// What kind of failure.
    pub failure: Failure,
    /// The engine's message, without a C++ stack trace.
    pub message: String,
}

impl fmt::Display for BridgeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for BridgeError {}

/// The result of an entry into C++: `Ok` for 0, else the class and the message of this thread.
///
/// # Errors
/// When `code` says so.
pub fn check(code: c_int) -> Result<(), BridgeError> {
    if code == 0 {
        return Ok(());
    }
    // SAFETY: `cpcr_last_error` returns a NUL-terminated string that belongs to this thread and
    // lives until this thread's next call into the bridge; it is copied before any.
    let message = unsafe { CStr::from_ptr(cpcr_last_error()) }.to_string_lossy().into_owned();
    Err(BridgeError { failure: Failure::of_code(code, &message), message })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_the_engines_are_told_apart() {
        for (message, failure) in [
            ("[pair.cc:547] Connection closed by peer [10.0.0.2]:4411", Failure::PeerLost),
            ("read: Connection reset by peer", Failure::PeerLost),
            ("Timed out waiting 1000ms for recv operation to complete", Failure::Timeout),
            ("Application timeout caused pair closure", Failure::Timeout),
            ("cpcr: group aborted, connection closed", Failure::Aborted),
            ("CUDA out of memory. Tried to allocate 2 GiB", Failure::OutOfMemory),
            ("shape mismatch", Failure::Generic),
        ] {
            assert_eq!(Failure::of_message(message), failure, "{message}");
        }
    }
}
