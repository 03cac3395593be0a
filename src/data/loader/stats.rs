//! Where a loader's time goes, cheap enough to be counted always.

/// What a loader has done since it started, and what is in its queues now.
///
/// Seconds of fetching are summed over fetches and seconds of threads over threads, so they may be more than
/// have passed.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LoaderStats {
    /// Batches that the trainer has taken.
    pub batches: u64,
    /// Blocks fetched.
    pub blocks: u64,
    /// Their bytes as they are stored.
    pub block_bytes: u64,
    /// Seconds that fetches took, verification included.
    pub fetch_s: f64,
    /// Seconds of threads at decoding.
    pub decode_s: f64,
    /// Seconds of threads at augmenting and batching.
    pub augment_s: f64,
    /// Seconds of threads that had nothing to do until a fetch ended.
    pub wait_for_fetch_s: f64,
    /// Seconds of threads that had nothing to do until the trainer took a batch.
    pub wait_for_trainer_s: f64,
    /// Seconds that the trainer waited for batches.
    pub trainer_waited_s: f64,
    /// Blocks being fetched now.
    pub fetching: usize,
    /// Blocks fetched and not decoded now.
    pub undecoded: usize,
    /// Batches ready now.
    pub ready: usize,
    /// Bytes of decoded blocks kept now.
    pub kept_bytes: usize,
}

/// Who keeps a pipeline from being faster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Fetching: the store, or too few fetches side by side.
    Fetch,
    /// Decoding: too few threads.
    Decode,
    /// Augmenting and batching: too few threads.
    Augment,
    /// The trainer, as it should be.
    Trainer,
}

impl LoaderStats {
    /// What the threads spent most of their time at or waiting for.
    pub fn slowest(&self) -> Stage {
        let mut slowest = (Stage::Trainer, self.wait_for_trainer_s);
        for (stage, seconds) in [
            (Stage::Fetch, self.wait_for_fetch_s),
            (Stage::Decode, self.decode_s),
            (Stage::Augment, self.augment_s),
        ] {
            if seconds > slowest.1 {
                slowest = (stage, seconds);
            }
        }
        slowest.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_is_what_threads_spend_most_time_on() {
        let stats = LoaderStats { decode_s: 2.0, augment_s: 1.0, ..LoaderStats::default() };
        assert_eq!(stats.slowest(), Stage::Decode);
        assert_eq!(LoaderStats { augment_s: 3.0, ..stats.clone() }.slowest(), Stage::Augment);
        assert_eq!(LoaderStats { wait_for_fetch_s: 3.0, ..stats.clone() }.slowest(), Stage::Fetch);
        assert_eq!(LoaderStats { wait_for_trainer_s: 3.0, ..stats }.slowest(), Stage::Trainer);
    }
}
