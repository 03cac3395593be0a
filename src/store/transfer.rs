//! Large objects, moved in bounded pieces.
//!
//! One request for a whole checkpoint would hold a connection for minutes and spend the retry
//! budget of all its bytes on the first lost packet. Pieces are retried one by one. Small objects,
//! and stores without a network, take one operation.
//!
//! Pieces of an upload whose process is killed are kept, and charged for, but in no listing. Where a note was left
//! ([`Store::put_noted`]), another process can end it ([`Store::clear_upload`]).

use std::ops::Range;

use bytes::{Bytes, BytesMut};
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::{MultipartId, ObjectStoreExt, PutPayload};

use super::error::StoreError;
use super::read::{Fetched, WHOLE_BYTES_MAX, Wanted};
use super::store::Store;

/// One piece of a larger one; S3 wants at least 5 MiB and at most 10,000 pieces.
const PIECE_BYTES_MIN: u64 = 8 << 20;
const PIECES_MAX: u64 = 9_000;
/// Pieces under way at once.
const PIECES_CONCURRENT: usize = 4;
/// What the name of a note on an upload has after its object's.
const NOTE: &str = ".upload";

/// An object on its way in pieces.
struct Upload<'a> {
    store: &'a dyn MultipartStore,
    path: &'a str,
    location: Path,
    id: MultipartId,
}

/// Whether `path` names a note on an upload.
#[must_use]
pub fn is_upload_note(path: &str) -> bool {
    path.ends_with(NOTE)
}

impl Store {
    pub(super) async fn get_whole(&self, path: &str) -> Result<Bytes, StoreError> {
        match self.read(path, &Wanted::default()).await? {
            Fetched::Bytes(bytes) => Ok(bytes),
            Fetched::Large { bytes, e_tag } => self.get_pieces(path, bytes, e_tag).await,
        }
    }

    async fn get_pieces(
        &self,
        path: &str,
        size: u64,
        e_tag: Option<String>,
    ) -> Result<Bytes, StoreError> {
        let capacity = usize::try_from(size).unwrap_or(usize::MAX);
        let corrupt = |detail: String| StoreError::Corrupt {
            url: self.url().to_owned(),
            path: path.to_owned(),
            detail,
        };
        let mut requests: Vec<BoxFuture<'_, Result<Bytes, StoreError>>> = Vec::new();
        for range in pieces(size) {
            // The same object for every piece, even if someone overwrites it meanwhile.
            let wanted = Wanted { range: Some(range), if_match: e_tag.clone() };
            let piece = async move {
                match self.read(path, &wanted).await? {
                    Fetched::Bytes(bytes) => Ok(bytes),
                    Fetched::Large { .. } => Err(corrupt("all came for a part".to_owned())),
                }
            };
            requests.push(piece.boxed());
        }
        let whole = stream::iter(requests)
            .buffered(PIECES_CONCURRENT)
            .try_fold(BytesMut::new(), |mut whole, piece| async move {
                whole.reserve(capacity.saturating_sub(whole.len()));
                whole.extend_from_slice(&piece);
                Ok(whole)
            })
            .await
            .map_err(|error| match error {
                StoreError::AlreadyExists { .. } => {
                    corrupt("it was overwritten while being read".to_owned())
                }
                other => other,
            })?;
        if whole.len() != capacity {
            return Err(corrupt(format!("{size} bytes were announced, {} came", whole.len())));
        }
        Ok(whole.freeze())
    }

    /// The store for writes in pieces, if `bytes` are to be written so.
    fn in_pieces(&self, bytes: &Bytes) -> Option<&dyn MultipartStore> {
        self.shared.engines.uploads.as_deref().filter(|_| bytes.len() as u64 > WHOLE_BYTES_MAX)
    }

    pub(super) async fn put_whole(&self, path: &str, bytes: Bytes) -> Result<(), StoreError> {
        if let Some(store) = self.in_pieces(&bytes) {
            let upload = self.begin(store, path).await?;
            return self.send(&upload, &bytes).await;
        }
        let location = self.locate(path)?;
        let put = self.shared.engines.engine.put(&location, PutPayload::from(bytes));
        self.bounded("write", path, put).await.map(drop)
    }

    /// [`Store::put`], with a note beside the object, `PATH.upload`, as long as it is on its way in pieces.
    ///
    /// # Errors
    /// As [`Store::put`].
    pub async fn put_noted(&self, path: &str, bytes: Bytes) -> Result<(), StoreError> {
        self.contact().await?;
        let Some(store) = self.in_pieces(&bytes) else { return self.put_whole(path, bytes).await };
        let upload = self.begin(store, path).await?;
        let note = format!("{path}{NOTE}");
        let noted = self.put_whole(&note, upload.id.clone().into()).await;
        let sent = match noted {
            Ok(()) => self.put_pieces(&upload, &bytes).await,
            Err(error) => Err(error),
        };
        if sent.is_err() && !self.abort(&upload).await {
            return sent; // the note says what is left to do
        }
        if let Err(error) = self.delete(&note).await {
            // The object is there, or its upload is over: the note is one file too many, and goes with its folder.
            tracing::debug!(%error, "a note on an upload that is over stays");
        }
        sent
    }

    /// Ends the upload that `note` is about, whose writer is gone, and removes the note.
    ///
    /// # Errors
    /// When the store fails; the note then stays for another time.
    pub async fn clear_upload(&self, note: &str) -> Result<(), StoreError> {
        let path = note.strip_suffix(NOTE).unwrap_or(note);
        if let Some(store) = self.shared.engines.uploads.as_deref() {
            let id = match self.get_agreed(note).await {
                Ok(id) => String::from_utf8_lossy(&id).into_owned(),
                Err(StoreError::NotFound { .. }) => return Ok(()),
                Err(error) => return Err(error),
            };
            let location = self.locate(path)?;
            let abort = store.abort_multipart(&location, &id);
            match self.bounded("abort", path, abort).await {
                // Its end was reached, or somebody was here before.
                Ok(()) | Err(StoreError::NotFound { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        self.delete(note).await
    }

    async fn begin<'a>(
        &self,
        store: &'a dyn MultipartStore,
        path: &'a str,
    ) -> Result<Upload<'a>, StoreError> {
        let location = self.locate(path)?;
        let id = self.bounded("write", path, store.create_multipart(&location)).await?;
        Ok(Upload { store, path, location, id })
    }

    async fn send(&self, upload: &Upload<'_>, bytes: &Bytes) -> Result<(), StoreError> {
        let sent = self.put_pieces(upload, bytes).await;
        if sent.is_err() {
            self.abort(upload).await;
        }
        sent
    }

    /// Ends an upload; `false` where that could not be.
    async fn abort(&self, upload: &Upload<'_>) -> bool {
        let abort = upload.store.abort_multipart(&upload.location, &upload.id);
        let aborted = self.bounded("abort", upload.path, abort).await.inspect_err(|error| {
            tracing::debug!(%error, "an unfinished upload stays behind; the bucket's lifecycle rules clear it");
        });
        aborted.is_ok()
    }

    async fn put_pieces(&self, upload: &Upload<'_>, bytes: &Bytes) -> Result<(), StoreError> {
        let Upload { store, path, location, id } = upload;
        let mut parts: Vec<BoxFuture<'_, Result<PartId, StoreError>>> = Vec::new();
        for (index, range) in pieces(bytes.len() as u64).enumerate() {
            let piece = bytes.slice(range.start as usize..range.end as usize).into();
            let part = store.put_part(location, id, index, piece);
            parts.push(self.bounded("write", path, part).boxed());
        }
        let parts = stream::iter(parts).buffered(PIECES_CONCURRENT).try_collect().await?;
        let complete = store.complete_multipart(location, id, parts);
        self.bounded("write", path, complete).await.map(drop)
    }
}

/// Adjacent ranges that cover `size` bytes: few enough, and none too small but the last.
fn pieces(size: u64) -> impl Iterator<Item = Range<u64>> {
    let piece = PIECE_BYTES_MIN.max(size.div_ceil(PIECES_MAX));
    (0..size.div_ceil(piece)).map(move |i| i * piece..((i + 1) * piece).min(size))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use object_store::memory::InMemory;

    use super::*;
    use crate::store::{Fault, FaultyStore};

    /// An object that was written is no failure because its note could not be removed: checkpoints would fail for that.
    #[tokio::test]
    async fn an_object_is_written_if_and_only_if_it_is_said_to_be() {
        let bytes: Bytes = vec![7; WHOLE_BYTES_MAX as usize + 1].into();
        let mut written = Vec::new();
        for operation in 0..4 {
            let memory = Arc::new(InMemory::new());
            let engine = FaultyStore::new(memory.clone(), Fault::FailsAt(operation));
            let mut store = Store::from_engine(engine, "faulty:///");
            Arc::get_mut(&mut store.shared).unwrap().engines.uploads = Some(memory.clone());
            let said = store.put_noted("large", bytes.clone()).await.is_ok();
            let sound = Store::from_engine(memory, "memory:///");
            assert_eq!(said, sound.exists("large").await.unwrap(), "operation {operation}");
            written.push(said);
        }
        assert!(written.contains(&true) && written.contains(&false), "{written:?}");
    }

    #[test]
    fn pieces_cover_everything_once_within_the_limits() {
        for size in [0, 1, PIECE_BYTES_MIN, PIECE_BYTES_MIN + 1, 100 << 20, 1 << 40] {
            let all: Vec<_> = pieces(size).collect();
            assert!(all.len() <= 10_000, "{} pieces for {size}", all.len());
            assert_eq!(all.iter().map(|r| r.end - r.start).sum::<u64>(), size);
            assert!(all.windows(2).all(|pair| pair[0].end == pair[1].start));
        }
    }
}
