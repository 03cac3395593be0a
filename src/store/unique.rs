//! Names that no other process has used: attempts, probes, writer ids.
//!
//! Not for secrets, and never part of anything that must be reproducible.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::{SystemTime, UNIX_EPOCH};

/// Sixteen hexadecimal digits that differ between calls, processes and machines.
///
/// The randomness is the operating system's, through the standard library's hash seeds; process
/// id and clock are mixed in so that a cloned virtual machine does not repeat its names.
#[must_use]
pub fn unique_id() -> String {
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    hasher.write_u128(since_epoch.as_nanos());
    format!("{:016x}", hasher.finish())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::unique_id;

    #[test]
    fn ids_do_not_repeat() {
        let ids: HashSet<_> = (0..10_000).map(|_| unique_id()).collect();
        assert_eq!(ids.len(), 10_000);
    }
}
