//! The seam to storage: two small traits, a folder and a map in memory that implement them.
//!
//! Not a storage layer: no retries, no caching, no listing. `store::Store` has those and is
//! plugged in behind the same traits.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use futures::future::BoxFuture;

use crate::store::ReadFaults;

/// Why storage could not answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// Nothing has that name.
    #[error("not found")]
    NotFound,
    /// Anything else; the store has already retried what can be retried.
    #[error(transparent)]
    Other(#[from] Box<dyn std::error::Error + Send + Sync>),
}

impl From<std::io::Error> for SourceError {
    fn from(error: std::io::Error) -> Self {
        if error.kind() == std::io::ErrorKind::NotFound {
            Self::NotFound
        } else {
            Self::Other(Box::new(error))
        }
    }
}

/// Reads whole objects and ranges of them. Paths are relative to the dataset, `/` between parts.
pub trait ObjectReader: Send + Sync + 'static {
    /// All bytes of `path`.
    fn get<'a>(&'a self, path: &'a str) -> BoxFuture<'a, Result<Bytes, SourceError>>;
    /// The bytes `range` of `path`.
    fn get_range<'a>(
        &'a self,
        path: &'a str,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<Bytes, SourceError>>;
    /// Told by who verifies: bytes of `path` from `offset` on did not match their hash.
    fn mismatch(&self, _path: &str, _offset: u64) {}
    /// What went wrong with reads so far; nothing where nobody counts.
    fn read_faults(&self) -> ReadFaults {
        ReadFaults::default()
    }
}

/// Writes whole objects.
pub trait ObjectWriter: Send + Sync + 'static {
    /// Stores `bytes` under `path`; when this returns, a reader sees all of them.
    fn put<'a>(&'a self, path: &'a str, bytes: Bytes) -> BoxFuture<'a, Result<(), SourceError>>;
}

/// Objects in memory, for tests and for datasets that never leave the process.
#[derive(Default)]
pub struct MemoryObjects {
    objects: Mutex<BTreeMap<String, Bytes>>,
}

impl fmt::Debug for MemoryObjects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryObjects").field("paths", &self.paths()).finish()
    }
}

impl MemoryObjects {
    /// Names of everything stored, sorted.
    pub fn paths(&self) -> Vec<String> {
        self.lock().keys().cloned().collect()
    }

    /// Replaces an object; `false` where there was none.
    pub fn replace(&self, path: &str, bytes: Bytes) -> bool {
        self.lock().insert(path.to_owned(), bytes).is_some()
    }

    /// The bytes under `path`.
    pub fn bytes(&self, path: &str) -> Option<Bytes> {
        self.lock().get(path).cloned()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Bytes>> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ObjectReader for MemoryObjects {
    fn get<'a>(&'a self, path: &'a str) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        let found = self.bytes(path).ok_or(SourceError::NotFound);
        Box::pin(async move { found })
    }

    fn get_range<'a>(
        &'a self,
        path: &'a str,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        let found = self.bytes(path).ok_or(SourceError::NotFound).map(|all| {
            let len = all.len() as u64;
            all.slice(range.start.min(len) as usize..range.end.min(len) as usize)
        });
        Box::pin(async move { found })
    }
}

impl ObjectWriter for MemoryObjects {
    fn put<'a>(&'a self, path: &'a str, bytes: Bytes) -> BoxFuture<'a, Result<(), SourceError>> {
        self.lock().insert(path.to_owned(), bytes);
        Box::pin(async { Ok(()) })
    }
}

/// Objects as files of one local folder.
#[derive(Debug, Clone)]
pub struct FolderObjects {
    root: PathBuf,
}

impl FolderObjects {
    /// The folder `root`; made when something is written.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    fn file(&self, path: &str) -> Result<PathBuf, SourceError> {
        let plain = |part: &str| !matches!(part, "" | "." | "..");
        if path.split('/').all(plain) {
            Ok(self.root.join(path))
        } else {
            Err(SourceError::Other(format!("`{path}` is no plain relative path").into()))
        }
    }
}

fn read_range(file: &Path, range: Range<u64>) -> Result<Bytes, SourceError> {
    let mut file = std::fs::File::open(file)?;
    let end = range.end.min(file.metadata()?.len());
    file.seek(SeekFrom::Start(range.start))?;
    let mut bytes = Vec::with_capacity(end.saturating_sub(range.start) as usize);
    file.take(end.saturating_sub(range.start)).read_to_end(&mut bytes)?;
    Ok(bytes.into())
}

fn write_whole(file: &Path, bytes: &[u8]) -> Result<(), SourceError> {
    let folder = file.parent().unwrap_or_else(|| Path::new("."));
    std::fs::create_dir_all(folder)?;
    // A reader sees the whole object or none: write beside it, then rename.
    let mut partial = tempfile::NamedTempFile::new_in(folder)?;
    std::io::Write::write_all(&mut partial, bytes)?;
    partial.persist(file).map_err(|error| SourceError::from(error.error))?;
    Ok(())
}

impl ObjectReader for FolderObjects {
    fn get<'a>(&'a self, path: &'a str) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        Box::pin(async move { Ok(std::fs::read(self.file(path)?)?.into()) })
    }

    fn get_range<'a>(
        &'a self,
        path: &'a str,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        Box::pin(async move { read_range(&self.file(path)?, range) })
    }
}

impl ObjectWriter for FolderObjects {
    fn put<'a>(&'a self, path: &'a str, bytes: Bytes) -> BoxFuture<'a, Result<(), SourceError>> {
        Box::pin(async move { write_whole(&self.file(path)?, &bytes) })
    }
}
