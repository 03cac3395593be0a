//! What went wrong on the way to the bytes, counted by kind: shared by all clones of a store.
//!
//! A fault that a second request cured is no error, but a run that lives on second requests wants to be known. Counting
//! costs an atomic addition; log lines are held down to one a second. Nothing is decided here.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// One log line at most in this time; those in between are counted in the next.
const LOG_PAUSE: Duration = Duration::from_secs(1);
/// Objects whose `ETag` is remembered, to tell a changed object from a damaged transfer.
const TAGS_MAX: usize = 4096;
/// Second requests are at most these few, and [`HEDGE_SHARE`] of all.
const HEDGES_FREE: u64 = 4;
/// One in so many requests may have a second one racing it.
const HEDGE_SHARE: u64 = 20;
/// Unused ones are saved up to this many: a link that turns slow after a million good reads must not be
/// asked for everything twice.
const HEDGES_SAVED_MAX: u64 = 16;

/// One kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum FaultKind {
    /// 503.
    Unavailable,
    /// Another 5xx, or 408.
    ServerError,
    /// 429.
    Throttled,
    /// No connection.
    Unreachable,
    /// The connection broke before an answer.
    Reset,
    /// The connection broke in the middle of the body.
    Truncated,
    /// Nothing came for an object that is not empty.
    Empty,
    /// Another part of the object than was asked for.
    WrongRange,
    /// No first byte in time, or so late that a second request overtook it.
    Stall,
    /// A body that came too slowly.
    Trickle,
    /// Bytes that do not match their hash.
    Corrupt,
    /// The same, under an `ETag` that the object did not have before.
    Changed,
    /// A write that was carried out although its answer was lost.
    AnswerLost,
}

impl FaultKind {
    /// All of them, in the order of their counters.
    pub const ALL: [Self; 13] = [
        Self::Unavailable,
        Self::ServerError,
        Self::Throttled,
        Self::Unreachable,
        Self::Reset,
        Self::Truncated,
        Self::Empty,
        Self::WrongRange,
        Self::Stall,
        Self::Trickle,
        Self::Corrupt,
        Self::Changed,
        Self::AnswerLost,
    ];

    /// Its name in logs and reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Unavailable => "unavailable",
            Self::ServerError => "server_error",
            Self::Throttled => "throttled",
            Self::Unreachable => "unreachable",
            Self::Reset => "reset",
            Self::Truncated => "truncated",
            Self::Empty => "empty",
            Self::WrongRange => "wrong_range",
            Self::Stall => "stall",
            Self::Trickle => "trickle",
            Self::Corrupt => "corrupt",
            Self::Changed => "changed",
            Self::AnswerLost => "answer_lost",
        }
    }
}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a store has read so far, and what went wrong meanwhile. Counts only ever grow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReadFaults {
    /// Read requests sent, repeated and second ones included.
    pub requests: u64,
    /// Bytes that reads returned.
    pub bytes: u64,
    /// Requests that repeat a failed one.
    pub retries: u64,
    /// Second requests that raced a late one.
    pub hedges_sent: u64,
    /// Those that came first.
    pub hedges_won: u64,
    kinds: [u64; FaultKind::ALL.len()],
}

impl ReadFaults {
    /// Faults of `kind`.
    #[must_use]
    pub fn of(&self, kind: FaultKind) -> u64 {
        self.kinds[kind as usize]
    }

    /// Faults of all kinds.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.kinds.iter().sum()
    }
}

/// `corrupt 2, reset 1`: the kinds that occurred.
impl fmt::Display for ReadFaults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seen = FaultKind::ALL.into_iter().filter(|kind| self.of(*kind) > 0);
        let words: Vec<_> = seen.map(|kind| format!("{kind} {}", self.of(kind))).collect();
        f.write_str(if words.is_empty() { "none" } else { "" })?;
        f.write_str(&words.join(", "))
    }
}

/// The counters behind [`ReadFaults`].
#[derive(Debug, Default)]
pub(super) struct FaultCounters {
    requests: AtomicU64,
    bytes: AtomicU64,
    retries: AtomicU64,
    hedges_sent: AtomicU64,
    /// Of the budget: sent, or forfeited.
    hedges_spent: AtomicU64,
    hedges_won: AtomicU64,
    kinds: [AtomicU64; FaultKind::ALL.len()],
    log: Mutex<LogPause>,
    /// The first and the last `ETag` seen of an object.
    tags: Mutex<HashMap<String, (String, String)>>,
}

#[derive(Debug, Default)]
struct LogPause {
    last: Option<Instant>,
    kept_back: u64,
}

impl FaultCounters {
    pub fn snapshot(&self) -> ReadFaults {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ReadFaults {
            requests: read(&self.requests),
            bytes: read(&self.bytes),
            retries: read(&self.retries),
            hedges_sent: read(&self.hedges_sent),
            hedges_won: read(&self.hedges_won),
            kinds: std::array::from_fn(|kind| read(&self.kinds[kind])),
        }
    }

    pub fn sent(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    pub fn retried(&self) {
        self.retries.fetch_add(1, Ordering::Relaxed);
    }

    pub fn hedge_won(&self) {
        self.hedges_won.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes one second request from the budget, if there is one left.
    pub fn may_hedge(&self) -> bool {
        let budget = HEDGES_FREE + self.requests.load(Ordering::Relaxed) / HEDGE_SHARE;
        let take = |spent: u64| {
            let spent = spent.max(budget.saturating_sub(HEDGES_SAVED_MAX));
            (spent < budget).then_some(spent + 1)
        };
        let taken =
            self.hedges_spent.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok();
        if taken {
            self.hedges_sent.fetch_add(1, Ordering::Relaxed);
        }
        taken
    }

    /// `bytes` of `object` have come, under `e_tag`.
    pub fn received(&self, object: &str, bytes: usize, e_tag: Option<&str>) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        let Some(e_tag) = e_tag else { return };
        let mut tags = self.tags.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, last)) = tags.get_mut(object) {
            if last != e_tag {
                e_tag.clone_into(last);
            }
            return;
        }
        if tags.len() == TAGS_MAX {
            tags.clear();
        }
        tags.insert(object.to_owned(), (e_tag.to_owned(), e_tag.to_owned()));
    }

    /// Bytes of `object` did not match their hash: whether that is another object by now.
    pub fn mismatch(&self, object: &str) -> FaultKind {
        let tags = self.tags.lock().unwrap_or_else(PoisonError::into_inner);
        match tags.get(object) {
            Some((first, last)) if first != last => FaultKind::Changed,
            _ => FaultKind::Corrupt,
        }
    }

    /// Counts a fault, and logs it unless another was logged just now.
    pub fn fault(&self, kind: FaultKind, object: &str, offset: u64, detail: &str) {
        self.kinds[kind as usize].fetch_add(1, Ordering::Relaxed);
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        if log.last.is_some_and(|last| last.elapsed() < LOG_PAUSE) {
            log.kept_back += 1;
            return;
        }
        let unlogged = std::mem::take(&mut log.kept_back);
        log.last = Some(Instant::now());
        // No warning: a further request cures it, or an error follows.
        tracing::info!(object, offset, %kind, detail, unlogged, "a fault on the way to the bytes");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_those_of_their_kind() {
        let counters = FaultCounters::default();
        for (number, kind) in FaultKind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, number, "{kind} is not where its counter is");
            (0..=number).for_each(|_| counters.fault(kind, "a", 0, ""));
        }
        let faults = counters.snapshot();
        assert_eq!(faults.of(FaultKind::Reset), 5);
        assert_eq!(faults.total(), (1..=13).sum::<u64>());
        assert_eq!(ReadFaults::default().to_string(), "none");
        assert!(faults.to_string().starts_with("unavailable 1, server_error 2, "), "{faults}");
    }

    #[test]
    fn second_requests_stay_a_small_share() {
        let counters = FaultCounters::default();
        let mut hedges = 0;
        for _ in 0..1000 {
            counters.sent();
            hedges += u64::from(counters.may_hedge());
        }
        assert_eq!(hedges, HEDGES_FREE + 1000 / HEDGE_SHARE);
    }

    #[test]
    fn a_link_that_turns_slow_after_many_good_reads_is_not_asked_twice_for_everything() {
        let counters = FaultCounters::default();
        (0..1_000_000).for_each(|_| counters.sent());
        let hedges = (0..100).filter(|_| counters.may_hedge()).count();
        assert_eq!(hedges as u64, HEDGES_SAVED_MAX);
        assert_eq!(counters.snapshot().hedges_sent, HEDGES_SAVED_MAX);
    }

    #[test]
    fn a_mismatch_under_another_tag_is_a_changed_object() {
        let counters = FaultCounters::default();
        counters.received("a", 1, Some("x"));
        assert_eq!(counters.mismatch("a"), FaultKind::Corrupt);
        counters.received("a", 1, Some("y"));
        assert_eq!(counters.mismatch("a"), FaultKind::Changed);
        counters.received("a", 1, Some("x"));
        assert_eq!(counters.mismatch("a"), FaultKind::Corrupt);
        assert_eq!(counters.mismatch("b"), FaultKind::Corrupt);
    }
}
