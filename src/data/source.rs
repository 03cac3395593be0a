//! The seam to storage: two small traits, a folder and a map in memory that implement them.
//!
//! Not a storage layer: no retries, no caching. `store::Store` has those and is
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

/// Writes whole objects, and looks at what is there.
pub trait ObjectWriter: ObjectReader {
    /// Stores `bytes` under `path`; when this returns, a reader sees all of them.
    fn put<'a>(&'a self, path: &'a str, bytes: Bytes) -> BoxFuture<'a, Result<(), SourceError>>;
    /// Stores `bytes` under `path` unless something else is there; `false` where it is.
    fn create<'a>(
        &'a self,
        path: &'a str,
        bytes: Bytes,
    ) -> BoxFuture<'a, Result<bool, SourceError>>;
    /// Paths of all objects in `folder`, sorted.
    fn list<'a>(&'a self, folder: &'a str) -> BoxFuture<'a, Result<Vec<String>, SourceError>>;
    /// Removes `path`, if it is there.
    fn delete<'a>(&'a self, path: &'a str) -> BoxFuture<'a, Result<(), SourceError>>;
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

    fn create<'a>(
        &'a self,
        path: &'a str,
        bytes: Bytes,
    ) -> BoxFuture<'a, Result<bool, SourceError>> {
        let created = *self.lock().entry(path.to_owned()).or_insert(bytes.clone()) == bytes;
        Box::pin(async move { Ok(created) })
    }

    fn list<'a>(&'a self, folder: &'a str) -> BoxFuture<'a, Result<Vec<String>, SourceError>> {
        let inside =
            |path: &String| path.strip_prefix(folder).is_some_and(|rest| rest.starts_with('/'));
        let paths = self.paths().into_iter().filter(inside).collect();
        Box::pin(async { Ok(paths) })
    }

    fn delete<'a>(&'a self, path: &'a str) -> BoxFuture<'a, Result<(), SourceError>> {
        self.lock().remove(path);
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

/// `bytes` in a file that has no name yet, in the folder of `file`.
fn written_beside(file: &Path, bytes: &[u8]) -> Result<tempfile::NamedTempFile, SourceError> {
    let folder = file.parent().unwrap_or_else(|| Path::new("."));
    std::fs::create_dir_all(folder)?;
    // A reader sees the whole object or none: write beside it, then rename.
    let mut partial = tempfile::NamedTempFile::new_in(folder)?;
    std::io::Write::write_all(&mut partial, bytes)?;
    Ok(partial)
}

fn create_whole(file: &Path, bytes: &[u8]) -> Result<bool, SourceError> {
    match written_beside(file, bytes)?.persist_noclobber(file) {
        Ok(_) => Ok(true),
        Err(error) if error.error.kind() == std::io::ErrorKind::AlreadyExists => {
            Ok(std::fs::read(file)? == bytes)
        }
        Err(error) => Err(error.error.into()),
    }
}

fn paths_in(root: &Path, folder: &str) -> Result<Vec<String>, SourceError> {
    let entries = match std::fs::read_dir(root.join(folder)) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let name = |entry: std::io::Result<std::fs::DirEntry>| {
        Ok(format!("{folder}/{}", entry?.file_name().to_string_lossy()))
    };
    let mut paths = entries.map(name).collect::<std::io::Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
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
        Box::pin(async move {
            let file = self.file(path)?;
            written_beside(&file, &bytes)?.persist(file).map_err(|error| error.error)?;
            Ok(())
        })
    }

    fn create<'a>(
        &'a self,
        path: &'a str,
        bytes: Bytes,
    ) -> BoxFuture<'a, Result<bool, SourceError>> {
        Box::pin(async move { create_whole(&self.file(path)?, &bytes) })
    }

    fn list<'a>(&'a self, folder: &'a str) -> BoxFuture<'a, Result<Vec<String>, SourceError>> {
        Box::pin(async move { paths_in(&self.root, folder) })
    }

    fn delete<'a>(&'a self, path: &'a str) -> BoxFuture<'a, Result<(), SourceError>> {
        Box::pin(async move {
            match std::fs::remove_file(self.file(path)?) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
                _ => Ok(()),
            }
        })
    }
}
