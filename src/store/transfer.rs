//! Large objects, moved in bounded pieces.
//!
//! One request for a whole checkpoint would hold a connection for minutes and spend the retry
//! budget of all its bytes on the first lost packet. Pieces are retried one by one. Small objects,
//! and stores without a network, take one operation.

use std::ops::Range;

use bytes::{Bytes, BytesMut};
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use object_store::{MultipartUpload, ObjectStoreExt, PutMultipartOptions, PutPayload};

use super::error::StoreError;
use super::read::{Fetched, WHOLE_BYTES_MAX, Wanted};
use super::store::Store;

/// One piece of a larger one; S3 wants at least 5 MiB and at most 10,000 pieces.
const PIECE_BYTES_MIN: u64 = 8 << 20;
const PIECES_MAX: u64 = 9_000;
/// Pieces under way at once.
const PIECES_CONCURRENT: usize = 4;

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

    pub(super) async fn put_whole(&self, path: &str, bytes: Bytes) -> Result<(), StoreError> {
        let location = self.locate(path)?;
        let engine = &self.shared.engine;
        if self.shared.network.is_none() || bytes.len() as u64 <= WHOLE_BYTES_MAX {
            let payload = PutPayload::from(bytes);
            return self.bounded("write", path, engine.put(&location, payload)).await.map(drop);
        }
        let begin = engine.put_multipart_opts(&location, PutMultipartOptions::default());
        let mut upload = self.bounded("write", path, begin).await?;
        let sent = self.put_pieces(path, &mut *upload, &bytes).await;
        if sent.is_err()
            && let Err(error) = self.bounded("abort", path, upload.abort()).await
        {
            tracing::debug!(%error, "an unfinished upload stays behind; the bucket's lifecycle rules clear it");
        }
        sent
    }

    async fn put_pieces(
        &self,
        path: &str,
        upload: &mut dyn MultipartUpload,
        bytes: &Bytes,
    ) -> Result<(), StoreError> {
        let mut parts: Vec<BoxFuture<'_, Result<(), StoreError>>> = Vec::new();
        for range in pieces(bytes.len() as u64) {
            let part =
                upload.put_part(bytes.slice(range.start as usize..range.end as usize).into());
            parts.push(self.bounded("write", path, part).boxed());
        }
        stream::iter(parts).buffer_unordered(PIECES_CONCURRENT).try_collect::<Vec<()>>().await?;
        self.bounded("write", path, upload.complete()).await.map(drop)
    }
}

/// Adjacent ranges that cover `size` bytes: few enough, and none too small but the last.
fn pieces(size: u64) -> impl Iterator<Item = Range<u64>> {
    let piece = PIECE_BYTES_MIN.max(size.div_ceil(PIECES_MAX));
    (0..size.div_ceil(piece)).map(move |i| i * piece..((i + 1) * piece).min(size))
}

#[cfg(test)]
mod tests {
    use super::*;

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
