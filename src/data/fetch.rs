//! Fetching bytes that are the ones that were written, however often that takes.
//!
//! The one place where bytes from storage become trusted: a mismatch is counted and fetched again,
//! some times within a bound, and is then an error that names object and place. The store
//! underneath has already repeated what failed visibly; what arrives here came without complaint.

use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::error::DataError;
use super::source::ObjectReader;
use crate::types::ObjectDigest;

/// How often bytes are fetched before they count as damaged where they lie.
pub(super) const TRIES_MAX: u32 = 6;
/// No new try begins after this; each is bounded by the store.
const TRYING_MAX: Duration = Duration::from_secs(60);
/// Before the first repetition, and doubled for each more.
const PAUSE: Duration = Duration::from_millis(5);

/// Fetches bytes that match `digest`: all of `object`, or a range of it. `what` names them in errors.
pub(super) async fn verified(
    reader: &dyn ObjectReader,
    object: &str,
    range: Option<Range<u64>>,
    digest: &ObjectDigest,
    what: &str,
) -> Result<Bytes, DataError> {
    let started = Instant::now();
    let offset = range.as_ref().map_or(0, |range| range.start);
    let mut tries = 0;
    loop {
        let fetched = match range.clone() {
            Some(range) => reader.get_range(object, range).await,
            None => reader.get(object).await,
        };
        let bytes = fetched.map_err(|error| DataError::read(object, error))?;
        let found = ObjectDigest::of(&bytes);
        if found == *digest {
            return Ok(bytes);
        }
        reader.mismatch(object, offset);
        tries += 1;
        if tries == TRIES_MAX || started.elapsed() > TRYING_MAX {
            let end = offset + digest.bytes;
            let what = format!(
                "{what}, bytes {offset}..{end}: expected SHA-256 {}, found {} in {} bytes",
                digest.sha256, found.sha256, found.bytes
            );
            return Err(DataError::Damaged { object: object.to_owned(), what, tries });
        }
        tokio::time::sleep(PAUSE * (1 << (tries - 1))).await;
    }
}

/// Fetches a whole object whose digest nobody knows: the bytes that came twice.
///
/// For the manifest, which everything else is verified against; it is read once by a process.
pub(super) async fn agreed(reader: &dyn ObjectReader, object: &str) -> Result<Bytes, DataError> {
    let get = || async { reader.get(object).await.map_err(|error| DataError::read(object, error)) };
    // Its digest only: a large pool's manifest need not be here twice.
    let mut last = ObjectDigest::of(&get().await?);
    for _ in 1..TRIES_MAX {
        let again = get().await?;
        let digest = ObjectDigest::of(&again);
        if digest == last {
            return Ok(again);
        }
        reader.mismatch(object, 0);
        last = digest;
    }
    let what = "no two of its answers were alike".to_owned();
    Err(DataError::Damaged { object: object.to_owned(), what, tries: TRIES_MAX })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use futures::future::BoxFuture;

    use super::*;
    use crate::data::source::SourceError;

    /// Answers with other bytes the first `wrong` times, and notes every complaint.
    struct Wrong {
        wrong: u32,
        asked: AtomicU32,
        complaints: AtomicU32,
    }

    impl Wrong {
        fn times(wrong: u32) -> Self {
            Self { wrong, asked: AtomicU32::new(0), complaints: AtomicU32::new(0) }
        }
    }

    impl ObjectReader for Wrong {
        fn get<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<Bytes, SourceError>> {
            let number = self.asked.fetch_add(1, Ordering::SeqCst);
            let bytes = if number < self.wrong { vec![number as u8] } else { b"right".to_vec() };
            Box::pin(async move { Ok(bytes.into()) })
        }

        fn get_range<'a>(
            &'a self,
            path: &'a str,
            _: Range<u64>,
        ) -> BoxFuture<'a, Result<Bytes, SourceError>> {
            self.get(path)
        }

        fn mismatch(&self, path: &str, offset: u64) {
            assert_eq!((path, offset), ("a", 7));
            self.complaints.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[tokio::test]
    async fn a_mismatch_is_told_and_fetched_again_some_times() {
        let digest = ObjectDigest::of(b"right");
        for wrong in 0..=TRIES_MAX {
            let reader = Wrong::times(wrong);
            let fetched = verified(&reader, "a", Some(7..12), &digest, "it").await;
            assert_eq!(reader.complaints.load(Ordering::SeqCst), wrong);
            match fetched {
                Ok(bytes) => assert!(bytes == "right" && wrong < TRIES_MAX),
                Err(error) => {
                    assert_eq!(wrong, TRIES_MAX);
                    let words = error.to_string();
                    assert!(words.contains("`a`") && words.contains("it, bytes 7..12"), "{words}");
                    assert!(words.contains(&digest.sha256), "{words}");
                }
            }
        }
    }
}
