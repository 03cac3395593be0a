//! How long this store's answers usually take, and from when on one is late.
//!
//! A window of the last answers, not a histogram: a store that becomes slow for everybody must not
//! be sent twice the requests for long.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Answers that count.
const WINDOW: usize = 128;
/// The percentile is taken anew after so many.
const EVERY: u64 = 16;
/// Nothing is late before this.
const LATE_MIN: Duration = Duration::from_millis(250);
/// Late is so many times the 95th percentile.
const LATE_FACTOR: u32 = 4;

/// Times to the first byte.
#[derive(Debug, Default)]
pub(super) struct Latency {
    recent_us: Mutex<VecDeque<u64>>,
    recorded: AtomicU64,
    p95_us: AtomicU64,
}

impl Latency {
    /// An answer took `time` to its first byte.
    pub fn record(&self, time: Duration) {
        let mut recent = self.recent_us.lock().unwrap_or_else(PoisonError::into_inner);
        if recent.len() == WINDOW {
            recent.pop_front();
        }
        recent.push_back(u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
        if self.recorded.fetch_add(1, Ordering::Relaxed) % EVERY == EVERY - 1 {
            let mut sorted: Vec<u64> = recent.iter().copied().collect();
            sorted.sort_unstable();
            self.p95_us.store(sorted[(sorted.len() * 95).div_ceil(100) - 1], Ordering::Relaxed);
        }
    }

    /// After this long an answer is much later than usual.
    pub fn late_after(&self) -> Duration {
        LATE_MIN.max(Duration::from_micros(self.p95_us.load(Ordering::Relaxed)) * LATE_FACTOR)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn late_follows_the_95th_percentile_of_the_last_answers() {
        let latency = Latency::default();
        assert_eq!(latency.late_after(), LATE_MIN);
        for answer in 0..160_u64 {
            // Two in a hundred stall: they do not make the others less late.
            let ms = if answer % 50 == 0 { 60_000 } else { 100 };
            latency.record(Duration::from_millis(ms));
        }
        assert_eq!(latency.late_after(), Duration::from_millis(400));
        (0..WINDOW).for_each(|_| latency.record(Duration::from_millis(1)));
        assert_eq!(latency.late_after(), LATE_MIN);
    }
}
