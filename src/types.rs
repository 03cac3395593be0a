//! The small words that everything else is written in: ranks, steps, generations, digests.
//!
//! Newtypes, so that a rank can never be passed where a step is meant. No behaviour beyond
//! conversion and printing lives here.

use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(
            Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl From<$inner> for $name {
            fn from(value: $inner) -> Self {
                Self(value)
            }
        }
    };
}

number!(
    /// A trainer's place within one generation, `0..world`.
    Rank(u32)
);
number!(
    /// How many trainers a generation has.
    WorldSize(u32)
);
number!(
    /// Optimiser steps. `Step(t)` names the state after `t` steps, and the step that leads on from it.
    Step(u64)
);
number!(
    /// One pass over a stream of samples.
    Epoch(u64)
);
number!(
    /// One fixed set of ranks with one process group; the next one starts after a loss.
    Generation(u64)
);
number!(
    /// One line of a run's history, from a start or a resume on: the number of the ledger's object that opens it.
    Lineage(u64)
);
number!(
    /// One machine (or one agent on this machine).
    NodeId(u32)
);

impl Step {
    /// The state one optimiser step later.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// Which collectives a generation uses, and with them on which devices it trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// Gloo between CPUs.
    Gloo,
    /// NCCL between GPUs, one for each trainer.
    Nccl,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gloo => "Gloo, CPU",
            Self::Nccl => "NCCL, GPU",
        })
    }
}

/// What attests a committed step: which unlabelled samples the global batch held, whatever the number of ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Receipt {
    /// The step that leads on from this state: the one that the deal calls so.
    pub step: Step,
    /// Sum over the unlabelled slots (`ledger::fingerprint`).
    pub fingerprint: u64,
    /// Unlabelled samples of the batch.
    pub samples: u32,
}

/// Length and SHA-256 of an object's bytes: what a reader verifies before it uses them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectDigest {
    /// Length in bytes.
    pub bytes: u64,
    /// Lower-case hexadecimal SHA-256.
    pub sha256: String,
}

impl ObjectDigest {
    /// The digest of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self { bytes: bytes.len() as u64, sha256: hex::encode(Sha256::digest(bytes)) }
    }

    /// Whether `bytes` are the ones this digest was taken of.
    #[must_use]
    pub fn matches(&self, bytes: &[u8]) -> bool {
        *self == Self::of(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_tells_a_changed_byte_and_a_changed_length() {
        let digest = ObjectDigest::of(b"abc");
        assert_eq!(
            digest.sha256,
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert!(digest.matches(b"abc"));
        assert!(!digest.matches(b"abd"));
        assert!(!digest.matches(b"ab"));
    }
}
