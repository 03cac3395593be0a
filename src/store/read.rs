//! Reads that survive: what stands between a network store's moods and the bytes.
//!
//! Every attempt is bounded by a time to its first byte and a least throughput; a failed one is repeated after a random
//! pause that grows (honouring `Retry-After`), within one deadline; one that is much later than usual is raced by a
//! second request. Each fault is counted and named. Bytes of another length or place than asked for are never
//! returned; whether they are the right ones only a hash can say, and that is the caller's.
//! The engine's own retries are off for these requests: they would hide what happened.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use object_store::client::HttpErrorKind;
use object_store::path::Path;
use object_store::{Error, GetOptions, GetRange, ObjectStore, ObjectStoreExt};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::error::{StoreError, http_kind, one_line};
use super::http_note::Note;
use super::read_faults::FaultKind;
use super::store::Store;

/// The largest object that is moved in one request.
pub(super) const WHOLE_BYTES_MAX: u64 = 16 << 20;
/// Pauses between attempts: decorrelated jitter (M. Brooker, "Exponential Backoff And Jitter").
const PAUSE_MIN: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_secs(3);
/// A body slower than this is late enough to be raced.
const LATE_BYTES_PER_S: u64 = 4 << 20;

/// What is to be read of an object.
#[derive(Debug, Clone, Default)]
pub(super) struct Wanted {
    /// All of it if `None`.
    pub range: Option<Range<u64>>,
    /// Only under this `ETag`.
    pub if_match: Option<String>,
}

/// What came.
pub(super) enum Fetched {
    Bytes(Bytes),
    /// Too much for one request: read it in pieces.
    Large {
        bytes: u64,
        e_tag: Option<String>,
    },
}

/// How an attempt that brought nothing ended.
enum Ending {
    /// Another attempt may do better.
    Fault(Fault),
    /// The object ends before the range does.
    Shorter(u64),
    /// Another attempt would end the same.
    Final(Error),
}

struct Fault {
    kind: FaultKind,
    detail: String,
    retry_after: Option<Duration>,
}

fn fault<T>(kind: FaultKind, detail: impl Into<String>) -> Result<T, Ending> {
    Err(Ending::Fault(Fault { kind, detail: detail.into(), retry_after: None }))
}

impl Wanted {
    /// The bytes `range`.
    pub fn part(range: Range<u64>) -> Self {
        Self { range: Some(range), if_match: None }
    }

    fn offset(&self) -> u64 {
        self.range.as_ref().map_or(0, |range| range.start)
    }

    fn options(&self) -> GetOptions {
        GetOptions {
            range: self.range.clone().map(GetRange::Bounded),
            if_match: self.if_match.clone(),
            ..GetOptions::default()
        }
    }

    fn words(&self) -> String {
        self.range.as_ref().map_or_else(String::new, |r| format!(" (bytes {}..{})", r.start, r.end))
    }
}

impl Store {
    /// Reads what is `wanted` of `path`, whatever happens until the deadline.
    pub(super) async fn read(&self, path: &str, wanted: &Wanted) -> Result<Fetched, StoreError> {
        let location = self.locate(path)?;
        let Some(engine) = self.shared.engines.reads.as_deref() else {
            return self.read_locally(path, &location, wanted).await;
        };
        let options = &self.shared.options;
        let started = Instant::now();
        let deadline = started + options.deadline;
        let mut pause = PAUSE_MIN;
        let mut tries = 0;
        loop {
            tries += 1;
            let ended = match timeout_at(deadline, self.raced(engine, &location, wanted)).await {
                Ok(ended) => ended,
                Err(_) => fault(FaultKind::Stall, "no answer by the deadline"),
            };
            let fault = match ended {
                Ok(fetched) => return Ok(fetched),
                Err(Ending::Final(error)) => return Err(self.translated("read", path, &error)),
                Err(Ending::Shorter(bytes)) => return Err(self.too_short(path, wanted, bytes)),
                Err(Ending::Fault(fault)) => fault,
            };
            self.count(&fault, &location, wanted);
            pause = next_pause(pause);
            // A server may ask for more patience than there is: the deadline is ours.
            let asked = fault.retry_after.unwrap_or_default().min(options.deadline / 4);
            let wait = pause.max(asked);
            if tries > options.retries || Instant::now() + wait >= deadline {
                let detail = format!(
                    "read '{path}'{} failed {tries} times in {:.1} s, last by {}: {}; {}",
                    wanted.words(),
                    started.elapsed().as_secs_f64(),
                    fault.kind,
                    fault.detail,
                    self.hint()
                );
                return Err(StoreError::Unreachable { url: self.url().to_owned(), detail });
            }
            self.shared.counters.retried();
            sleep(wait).await;
        }
    }

    /// Reads from a store that has no network in between: one attempt.
    async fn read_locally(
        &self,
        path: &str,
        location: &Path,
        wanted: &Wanted,
    ) -> Result<Fetched, StoreError> {
        let engine = &self.shared.engines.engine;
        self.shared.counters.sent();
        let read = async {
            match wanted.range.clone() {
                Some(range) => engine.get_range(location, range).await,
                None => engine.get(location).await?.bytes().await,
            }
        };
        let bytes = self.bounded("read", path, read).await?;
        self.shared.counters.received(location.as_ref(), bytes.len(), None);
        Ok(Fetched::Bytes(bytes))
    }

    /// One attempt; and when it is much later than usual, another beside it, and one more if that is refused.
    /// The first answer counts.
    async fn raced(
        &self,
        engine: &dyn ObjectStore,
        location: &Path,
        wanted: &Wanted,
    ) -> Result<Fetched, Ending> {
        let counters = &self.shared.counters;
        let note = Note::new();
        let first = self.attempt(engine, location, wanted, &note);
        tokio::pin!(first);
        let mut patience = self.shared.latency.late_after();
        if let Ok(ended) = timeout(patience, first.as_mut()).await {
            return ended;
        }
        if let Some(answer) = note.answer() {
            // The first byte was in time; the others have theirs.
            let bytes = answer.length.unwrap_or(WHOLE_BYTES_MAX);
            patience += Duration::from_secs_f64(bytes as f64 / LATE_BYTES_PER_S as f64);
            if let Ok(ended) = timeout(patience, first.as_mut()).await {
                return ended;
            }
        }
        let mut pause = PAUSE_MIN;
        while counters.may_hedge() {
            let second_note = Note::new();
            let second = self.attempt(engine, location, wanted, &second_note);
            tokio::pin!(second);
            let refused = tokio::select! {
                ended = first.as_mut() => match ended {
                    Err(Ending::Fault(fault)) => {
                        self.count(&fault, location, wanted);
                        return second.await;
                    }
                    ended => return ended,
                },
                ended = second.as_mut() => match ended {
                    Err(Ending::Fault(fault)) => fault,
                    ended => {
                        counters.hedge_won();
                        let late = note.answer().map_or(FaultKind::Stall, |_| FaultKind::Trickle);
                        counters.fault(late, location.as_ref(), wanted.offset(), "a second request overtook it");
                        return ended;
                    }
                },
            };
            // The first may still come, or never: neither to be waited for alone nor to be given up.
            self.count(&refused, location, wanted);
            pause = next_pause(pause).max(refused.retry_after.unwrap_or_default());
            if let Ok(ended) = timeout(pause, first.as_mut()).await {
                return ended;
            }
        }
        first.await
    }

    /// One request, bounded in every phase.
    async fn attempt(
        &self,
        engine: &dyn ObjectStore,
        location: &Path,
        wanted: &Wanted,
        note: &Arc<Note>,
    ) -> Result<Fetched, Ending> {
        let options = &self.shared.options;
        self.shared.counters.sent();
        let mut get = wanted.options();
        get.extensions.insert(Arc::clone(note));
        let opened = match timeout(options.first_byte, engine.get_opts(location, get)).await {
            Ok(Ok(opened)) => opened,
            Ok(Err(error)) => return Err(ending(error, note, wanted)),
            Err(_) => {
                let waited = options.first_byte.as_secs_f64();
                return fault(FaultKind::Stall, format!("no first byte within {waited:.1} s"));
            }
        };
        self.shared.latency.record(note.answered_after());
        let (range, object_bytes) = (opened.range.clone(), opened.meta.size);
        match &wanted.range {
            Some(asked) if *asked != range => return Err(Ending::Shorter(object_bytes)),
            None if note.answer().is_some_and(|answer| answer.status == 206) => {
                return fault(FaultKind::WrongRange, "a part came for the whole object");
            }
            None if object_bytes > WHOLE_BYTES_MAX => {
                return Ok(Fetched::Large { bytes: object_bytes, e_tag: opened.meta.e_tag });
            }
            _ => {}
        }
        let length = range.end - range.start;
        let e_tag = opened.meta.e_tag.clone();
        let seconds = length as f64 / options.throughput_min_bytes_per_s.max(1) as f64;
        let bound = options.first_byte + Duration::from_secs_f64(seconds);
        let bytes = match timeout(bound, opened.bytes()).await {
            Ok(Ok(bytes)) => bytes,
            Ok(Err(error)) => return fault(FaultKind::Truncated, one_line(&error.to_string())),
            Err(_) => {
                let took = bound.as_secs_f64();
                return fault(FaultKind::Trickle, format!("{length} bytes took over {took:.1} s"));
            }
        };
        if bytes.len() as u64 != length {
            let detail = format!("{length} bytes were announced, {} came", bytes.len());
            return fault(FaultKind::Truncated, detail);
        }
        if bytes.is_empty() {
            self.confirm_empty(engine, location).await?;
        }
        self.shared.counters.received(location.as_ref(), bytes.len(), e_tag.as_deref());
        Ok(Fetched::Bytes(bytes))
    }

    /// An answer with nothing in it may be an empty object or half an answer: asks for its length.
    async fn confirm_empty(&self, engine: &dyn ObjectStore, location: &Path) -> Result<(), Ending> {
        match timeout(self.shared.options.first_byte, engine.head(location)).await {
            Ok(Ok(meta)) if meta.size == 0 => Ok(()),
            Ok(Ok(meta)) => fault(FaultKind::Empty, format!("it has {} bytes", meta.size)),
            _ => fault(FaultKind::Empty, "and its length was not to be had"),
        }
    }

    fn count(&self, fault: &Fault, location: &Path, wanted: &Wanted) {
        let (object, offset) = (location.as_ref(), wanted.offset());
        self.shared.counters.fault(fault.kind, object, offset, &fault.detail);
    }

    fn too_short(&self, path: &str, wanted: &Wanted, bytes: u64) -> StoreError {
        let detail =
            format!("it has {bytes} bytes, which is less than was asked for{}", wanted.words());
        StoreError::Corrupt { url: self.url().to_owned(), path: path.to_owned(), detail }
    }
}

/// What the engine's error means for the next attempt.
fn ending(error: Error, note: &Note, wanted: &Wanted) -> Ending {
    let answer = note.answer().unwrap_or_default();
    let kind = match answer.status {
        503 => FaultKind::Unavailable,
        429 => FaultKind::Throttled,
        408 | 500..=599 => FaultKind::ServerError,
        200 if wanted.range.is_some() && answer.length == Some(0) => FaultKind::Empty,
        200 if wanted.range.is_some() => FaultKind::WrongRange,
        206 => FaultKind::WrongRange,
        // No answer to this request; perhaps the one for its credentials got none.
        0 => match http_kind(&error) {
            Some(HttpErrorKind::Connect | HttpErrorKind::Timeout) => FaultKind::Unreachable,
            Some(HttpErrorKind::Decode) => return Ending::Final(error),
            Some(_) => FaultKind::Reset,
            None if error.to_string().contains("status code: 5") => FaultKind::Unreachable,
            None => return Ending::Final(error),
        },
        _ => return Ending::Final(error),
    };
    let detail = one_line(&error.to_string());
    Ending::Fault(Fault { kind, detail, retry_after: answer.retry_after })
}

/// A pause between the shortest and three times the last one, at random and never too long.
fn next_pause(last: Duration) -> Duration {
    // The standard library's hash seeds are the operating system's randomness.
    let random = RandomState::new().build_hasher().finish();
    let unit = (random >> 11) as f64 / (1_u64 << 53) as f64;
    let span = (last * 3).saturating_sub(PAUSE_MIN);
    (PAUSE_MIN + span.mul_f64(unit)).min(PAUSE_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_differ_and_stay_bounded() {
        let mut pause = PAUSE_MIN;
        let pauses: Vec<Duration> = (0..1000)
            .map(|_| {
                pause = next_pause(pause);
                pause
            })
            .collect();
        assert!(pauses.iter().all(|pause| (PAUSE_MIN..=PAUSE_MAX).contains(pause)));
        assert!(pauses.iter().any(|pause| *pause > PAUSE_MAX / 2), "they do not grow");
        assert!(pauses.windows(2).any(|two| two[1] < two[0]), "they are not random");
    }
}
