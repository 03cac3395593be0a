//! s3s-fs, with writes to one key taken one after the other.
//!
//! s3s-fs looks whether an object exists and then writes it, so two `If-None-Match: *` requests
//! at once can both be told that they made it. Everything this crate commits rests on exactly one
//! being told so; hence [`KeyedFs`]: all that changes a key holds that key's lock. It also makes a
//! bucket when something is first put there, and reads files in pieces of 256 KiB where s3s-fs takes
//! 4. An upload that is over is answered as S3 answers it. It is no second S3 implementation: every other call goes
//! straight through.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::BytesMut;
use s3s::dto::*;
use s3s::{S3, S3Error, S3ErrorCode, S3Request, S3Response, S3Result, s3_error};
use s3s_fs::FileSystem;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio::sync::OwnedMutexGuard;
use tokio::time::timeout;

use super::error::chain;

/// Longest that a write may wait for its key, and then hold it: a client that stalls in the
/// middle of its body must not keep the name.
const WRITE_S_MAX: Duration = Duration::from_secs(120);

/// What is read of a file at once, and how many of these wait for a slow client.
const PIECE_BYTES: usize = 256 << 10;
const PIECES_AHEAD: usize = 2;

/// What `#[async_trait]`, which the S3 trait is written in, makes of an `async fn`.
type Reply<'a, T> = Pin<Box<dyn Future<Output = S3Result<S3Response<T>>> + Send + 'a>>;

/// One lock for each key being written right now; as many as there are requests, which the
/// server bounds.
#[derive(Debug, Default)]
struct KeyLocks(Arc<Mutex<Table>>);

type Table = HashMap<(String, String), Arc<tokio::sync::Mutex<()>>>;

/// A held key. The guard goes before the ticket, which then finds the lock unused.
struct Held {
    _guard: OwnedMutexGuard<()>,
    _ticket: Ticket,
}

/// Keeps a key's lock in the table while somebody holds it or waits for it.
struct Ticket {
    table: Arc<Mutex<Table>>,
    key: (String, String),
    lock: Option<Arc<tokio::sync::Mutex<()>>>,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        self.lock = None;
        if table.get(&self.key).is_some_and(|lock| Arc::strong_count(lock) == 1) {
            table.remove(&self.key);
        }
    }
}

impl KeyLocks {
    async fn hold(&self, bucket: &str, key: &str) -> Held {
        let key = (bucket.to_owned(), key.to_owned());
        let lock = {
            let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(table.entry(key.clone()).or_default())
        };
        // Made before the wait: a request that is cancelled in it must clean up too.
        let ticket = Ticket { table: Arc::clone(&self.0), key, lock: Some(Arc::clone(&lock)) };
        Held { _guard: lock.lock_owned().await, _ticket: ticket }
    }
}

/// The file system that the embedded server serves.
#[derive(Debug)]
pub(super) struct KeyedFs {
    inner: FileSystem,
    root: PathBuf,
    locks: Option<KeyLocks>,
}

impl KeyedFs {
    /// Serves `root`. Without `exclusive_creates` it is plain s3s-fs, for the test that shows why.
    pub(super) fn new(root: PathBuf, exclusive_creates: bool) -> Result<Self, s3s_fs::Error> {
        let inner = FileSystem::new(&root)?;
        Ok(Self { inner, root, locks: exclusive_creates.then(KeyLocks::default) })
    }

    /// Makes the bucket if it is missing; s3s has checked the name (no slash, no leading dot).
    async fn ensure_bucket(&self, bucket: &str) -> S3Result<()> {
        let made = tokio::fs::create_dir_all(self.root.join(bucket)).await;
        made.map_err(|error| storage_error(S3Error::internal_error(error)))
    }

    /// The body of an answer, read in large pieces; none where the file is not the one that was answered about.
    async fn large_pieces(
        &self,
        (bucket, key): (&str, &str),
        answer: &GetObjectOutput,
    ) -> Option<StreamingBlob> {
        // s3s-fs resolves every other name in its own way.
        key.split('/').all(|part| !matches!(part, "" | "." | "..")).then_some(())?;
        let mut file = tokio::fs::File::open(self.root.join(bucket).join(key)).await.ok()?;
        let found = file.metadata().await.ok()?;
        let (first, total) = match &answer.content_range {
            Some(range) => {
                let (range, total) = range.strip_prefix("bytes ")?.split_once('/')?;
                (range.split_once('-')?.0.parse().ok()?, total.parse().ok()?)
            }
            None => (0, found.len()),
        };
        let mut left = u64::try_from(answer.content_length?).ok()?;
        // It may have been replaced meanwhile: then the answer's headers are of another one.
        let same = found.len() == total
            && found.modified().ok().map(Timestamp::from) == answer.last_modified
            && (answer.content_range.is_some() || left == total);
        same.then_some(())?;
        file.seek(io::SeekFrom::Start(first)).await.ok()?;
        let (pieces, stream) = tokio::sync::mpsc::channel(PIECES_AHEAD);
        tokio::spawn(async move {
            while left > 0 {
                let mut piece = BytesMut::with_capacity(PIECE_BYTES);
                let read = match (&mut file).take(left).read_buf(&mut piece).await {
                    Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
                    Ok(bytes) => Ok(bytes as u64),
                    Err(error) => Err(error),
                };
                left = read.as_ref().map_or(0, |bytes| left - bytes);
                // A client that has left needs no more.
                if pieces.send(read.map(|_| piece.freeze())).await.is_err() {
                    return;
                }
            }
        });
        Some(StreamingBlob::wrap(tokio_stream::wrappers::ReceiverStream::new(stream)))
    }

    /// Whether an upload is under way. Of one that is not, s3s-fs says that it is somebody else's; pieces may be left of it.
    async fn has_upload(&self, id: &str) -> io::Result<bool> {
        let is_id = id.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
        if !is_id || tokio::fs::try_exists(self.root.join(format!(".upload-{id}.json"))).await? {
            return Ok(true);
        }
        let mut entries = tokio::fs::read_dir(&self.root).await?;
        while let Some(entry) = entries.next_entry().await? {
            if entry.file_name().to_string_lossy().starts_with(&format!(".upload_id-{id}.")) {
                tokio::fs::remove_file(entry.path()).await?;
            }
        }
        Ok(false)
    }

    /// Does `work` while holding the key, within the bound.
    async fn exclusively<T>(
        &self,
        bucket: String,
        key: String,
        work: impl Future<Output = S3Result<T>>,
    ) -> S3Result<T> {
        let held = async {
            let _held = match &self.locks {
                Some(locks) => Some(locks.hold(&bucket, &key).await),
                None => None,
            };
            work.await.map_err(storage_error)
        };
        match timeout(WRITE_S_MAX, held).await {
            Ok(result) => result,
            Err(_) => Err(s3_error!(RequestTimeout, "the write took too long")),
        }
    }
}

/// A full disk said so that the client does not retry it as a server error.
fn storage_error(error: S3Error) -> S3Error {
    let full = |kind: io::ErrorKind| {
        matches!(kind, io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    };
    // Not the trait's `source`, which s3s leaves empty.
    let is_full = error.source().is_some_and(|source| {
        chain(source).any(|cause| cause.downcast_ref::<io::Error>().is_some_and(|e| full(e.kind())))
    });
    if !is_full {
        return error;
    }
    let code = S3ErrorCode::Custom("StorageFull".into());
    let mut answer = S3Error::with_message(code, "the disk behind this server is full");
    // `http` by way of a crate that is here anyway; a 5xx would be retried by every client.
    answer.set_status_code(tonic::codegen::http::StatusCode::BAD_REQUEST);
    answer
}

macro_rules! straight_through {
    ($($name:ident($input:ty) -> $output:ty;)*) => {
        $(
            fn $name<'s, 'a>(&'s self, req: S3Request<$input>) -> Reply<'a, $output>
            where
                's: 'a,
            {
                self.inner.$name(req)
            }
        )*
    };
}

/// Calls that change a key: its lock is held, and its bucket exists.
macro_rules! one_at_a_time {
    ($($name:ident($input:ty) -> $output:ty;)*) => {
        $(
            fn $name<'s, 'a>(&'s self, req: S3Request<$input>) -> Reply<'a, $output>
            where
                's: 'a,
            {
                Box::pin(async move {
                    self.ensure_bucket(&req.input.bucket).await?;
                    let (bucket, key) = (req.input.bucket.clone(), req.input.key.clone());
                    self.exclusively(bucket, key, self.inner.$name(req)).await
                })
            }
        )*
    };
}

/// Calls about a bucket, which exists as soon as anybody asks.
macro_rules! in_a_bucket {
    ($($name:ident($input:ty) -> $output:ty;)*) => {
        $(
            fn $name<'s, 'a>(&'s self, req: S3Request<$input>) -> Reply<'a, $output>
            where
                's: 'a,
            {
                Box::pin(async move {
                    self.ensure_bucket(&req.input.bucket).await?;
                    self.inner.$name(req).await.map_err(storage_error)
                })
            }
        )*
    };
}

impl S3 for KeyedFs {
    fn get_object<'s, 'a>(&'s self, req: S3Request<GetObjectInput>) -> Reply<'a, GetObjectOutput>
    where
        's: 'a,
    {
        Box::pin(async move {
            let (bucket, key) = (req.input.bucket.clone(), req.input.key.clone());
            let mut answer = self.inner.get_object(req).await?;
            if let Some(body) = self.large_pieces((&bucket, &key), &answer.output).await {
                answer.output.body = Some(body);
            }
            Ok(answer)
        })
    }

    fn abort_multipart_upload<'s, 'a>(
        &'s self,
        req: S3Request<AbortMultipartUploadInput>,
    ) -> Reply<'a, AbortMultipartUploadOutput>
    where
        's: 'a,
    {
        Box::pin(async move {
            let AbortMultipartUploadInput { bucket, key, upload_id, .. } = req.input.clone();
            let abort = async {
                match self.has_upload(&upload_id).await {
                    Ok(true) => self.inner.abort_multipart_upload(req).await,
                    Ok(false) => Err(s3_error!(NoSuchUpload)),
                    Err(error) => Err(S3Error::internal_error(error)),
                }
            };
            self.exclusively(bucket, key, abort).await
        })
    }

    one_at_a_time! {
        put_object(PutObjectInput) -> PutObjectOutput;
        copy_object(CopyObjectInput) -> CopyObjectOutput;
        delete_object(DeleteObjectInput) -> DeleteObjectOutput;
        complete_multipart_upload(CompleteMultipartUploadInput) -> CompleteMultipartUploadOutput;
    }

    in_a_bucket! {
        head_bucket(HeadBucketInput) -> HeadBucketOutput;
        get_bucket_location(GetBucketLocationInput) -> GetBucketLocationOutput;
        list_objects(ListObjectsInput) -> ListObjectsOutput;
        list_objects_v2(ListObjectsV2Input) -> ListObjectsV2Output;
        create_multipart_upload(CreateMultipartUploadInput) -> CreateMultipartUploadOutput;
        upload_part(UploadPartInput) -> UploadPartOutput;
    }

    straight_through! {
        create_bucket(CreateBucketInput) -> CreateBucketOutput;
        delete_bucket(DeleteBucketInput) -> DeleteBucketOutput;
        list_buckets(ListBucketsInput) -> ListBucketsOutput;
        head_object(HeadObjectInput) -> HeadObjectOutput;
        delete_objects(DeleteObjectsInput) -> DeleteObjectsOutput;
        upload_part_copy(UploadPartCopyInput) -> UploadPartCopyOutput;
        list_parts(ListPartsInput) -> ListPartsOutput;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whole, and from the middle; with a name that s3s-fs resolves, not we.
    #[tokio::test]
    async fn large_pieces_are_the_bytes_that_were_asked_for() {
        use futures::TryStreamExt;
        let folder = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..3 * PIECE_BYTES + 7).map(|at| ((at * 31) >> 3) as u8).collect();
        std::fs::create_dir(folder.path().join("b")).unwrap();
        std::fs::write(folder.path().join("b/k"), &bytes).unwrap();
        let files = KeyedFs::new(folder.path().to_owned(), true).unwrap();
        let total = bytes.len();
        let modified = std::fs::metadata(folder.path().join("b/k")).unwrap().modified().unwrap();
        for (first, last) in [(0, total - 1), (5, 5), (PIECE_BYTES - 1, total - 2)] {
            let answer = GetObjectOutput {
                content_length: Some((last - first + 1) as i64),
                content_range: Some(format!("bytes {first}-{last}/{total}")),
                last_modified: Some(Timestamp::from(modified)),
                ..Default::default()
            };
            let body = files.large_pieces(("b", "k"), &answer).await.unwrap();
            let pieces: Vec<_> = body.try_collect().await.unwrap();
            assert!(pieces.concat() == bytes[first..=last], "{first} to {last}");
            assert!(files.large_pieces(("b", "../b/k"), &answer).await.is_none());
            // Headers of another file: replaced since.
            let other = GetObjectOutput { last_modified: None, ..answer };
            assert!(files.large_pieces(("b", "k"), &other).await.is_none());
        }
    }

    #[tokio::test]
    async fn the_table_empties_when_nobody_holds_a_key() {
        let locks = KeyLocks::default();
        let first = locks.hold("b", "k").await;
        let waiting = timeout(Duration::from_millis(20), locks.hold("b", "k")).await;
        assert!(waiting.is_err(), "two held one key");
        let other = locks.hold("b", "other").await;
        drop((first, other));
        assert!(locks.0.lock().unwrap().is_empty());
    }
}
