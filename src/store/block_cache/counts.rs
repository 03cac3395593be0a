//! What one process has done with the block cache, in numbers. Not the cache's size: that is the folder's to say.

use std::fmt;

/// Sums since the process opened the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BlockCacheCounts {
    /// Blocks found and verified.
    pub hits: u64,
    /// Bytes of them.
    pub hit_bytes: u64,
    /// Blocks that were not there, or not usable.
    pub misses: u64,
    /// Blocks that were there and damaged; misses too.
    pub corrupt: u64,
    /// Blocks kept.
    pub inserted: u64,
    /// Bytes of them.
    pub inserted_bytes: u64,
    /// Blocks that another thread or process had kept first.
    pub already_there: u64,
    /// Blocks removed to make room.
    pub evicted: u64,
    /// Bytes of them.
    pub evicted_bytes: u64,
    /// Not kept: larger than the limit.
    pub too_large: u64,
    /// Not kept: the lock was not got in time, or others were writing into all the room.
    pub busy: u64,
    /// Not kept: disk or quota full.
    pub no_space: u64,
    /// Not kept: the folder does not let us.
    pub unusable: u64,
}

impl BlockCacheCounts {
    /// Blocks that were not kept, for whatever reason.
    #[must_use]
    pub fn not_kept(&self) -> u64 {
        self.too_large + self.busy + self.no_space + self.unusable
    }
}

impl fmt::Display for BlockCacheCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { hits, hit_bytes, misses, corrupt, inserted, inserted_bytes, .. } = self;
        let Self { already_there, evicted, evicted_bytes, .. } = self;
        write!(f, "{hits} hits ({hit_bytes} bytes), {misses} misses ({corrupt} damaged), ")?;
        write!(
            f,
            "{inserted} kept ({inserted_bytes} bytes; {already_there} were there already), "
        )?;
        write!(f, "{evicted} evicted ({evicted_bytes} bytes), {} not kept", self.not_kept())?;
        let Self { too_large, busy, no_space, unusable, .. } = self;
        if self.not_kept() > 0 {
            write!(f, " ({too_large} too large, {busy} busy, {no_space} no space, ")?;
            write!(f, "{unusable} folder unusable)")?;
        }
        Ok(())
    }
}
