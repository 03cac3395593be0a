//! Verified blocks on the local disk, shared by every process of a machine, so that a warm epoch reads nothing from the network.
//!
//! A block is anything with a known [`ObjectDigest`]: a row group, a footer, an index. It is found by what
//! it *is*, not by where it came from, so runs over one dataset, or over copies of it, share it, and nothing in
//! here can be out of date. Every read is verified against the digest: the disk is not trusted, nothing is
//! synced, and a block that a crash has torn is removed, counted and fetched again.
//!
//! **The bound** is in bytes (each file's real length, no rounding to disk blocks) over all processes, to the
//! block: room is reserved under a lock before a byte is written (`folder.rs`). The limit that holds is that of the process that
//! inserts, so of two limits the smaller one wins while its process inserts. The lock is the kernel's (`flock`):
//! SIGKILL frees it. Reading takes no lock; a block that is evicted while it is read lives on
//! through the open file.
//!
//! **Eviction** is random replacement: reads keep no books, and a pool larger than the cache, walked once an epoch,
//! still hits in proportion to what is kept, where the least recently used block is the very one needed next.
//!
//! **It never stops a run.** What cannot be kept (disk full, folder read-only or another user's, lock not got in time) is not
//! kept, counted, and said once; a disk that hangs is given up. A share of the disk is left free (processes that
//! write at the same moment may together overstep that by a block each).
//!
//! What it is not: a place for anything that must last, or a cache of decoded samples (`data::cache` is).

mod counts;
mod folder;

pub use counts::BlockCacheCounts;

use std::ffi::OsString;
use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;

use self::folder::{BlockName, Folder};
use crate::types::ObjectDigest;

/// Where a cache is and what it may take.
#[derive(Debug, Clone)]
pub struct BlockCacheOptions {
    /// Its folder; made when it is not there.
    pub dir: PathBuf,
    /// Bytes of all blocks together.
    pub limit_bytes: u64,
    /// Bytes of the disk that must stay free; by default a twentieth of it, between 1 and 16 GiB.
    pub keep_free_bytes: Option<u64>,
    /// How long a fetch waits for the disk; one that takes longer hangs (a dead network file system).
    pub disk_patience: Duration,
}

impl BlockCacheOptions {
    /// A cache of `limit_bytes` in `dir`, with the defaults for the rest.
    #[must_use]
    pub fn new(dir: impl Into<PathBuf>, limit_bytes: u64) -> Self {
        let disk_patience = Duration::from_secs(30);
        Self { dir: dir.into(), limit_bytes, keep_free_bytes: None, disk_patience }
    }
}

/// What became of a block that was kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// It is there now.
    New,
    /// Somebody had kept it before.
    AlreadyThere,
}

/// Why a block was not kept. None of it is an error to the run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotKept {
    /// It is larger than the limit.
    #[error("a block of {bytes} bytes is larger than the whole cache")]
    TooLarge {
        /// Its length.
        bytes: u64,
    },
    /// Others held the lock, or were writing into all the room there is.
    #[error("other processes keep the cache busy")]
    Busy,
    /// Disk or quota is full, or would be beyond what must stay free.
    #[error("no space: {0}")]
    NoSpace(String),
    /// The folder does not let us: read-only, another user's, no locks, no folder at all.
    #[error("{0}")]
    Unusable(String),
}

impl From<io::Error> for NotKept {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull
            | io::ErrorKind::QuotaExceeded
            | io::ErrorKind::FileTooLarge => Self::NoSpace(error.to_string()),
            _ => Self::Unusable(error.to_string()),
        }
    }
}

/// What has been said already: a line each, not one for every block.
#[derive(Debug, Default)]
struct Said {
    too_large: AtomicBool,
    busy: AtomicBool,
    no_space: AtomicBool,
    unusable: AtomicBool,
    unreadable: AtomicBool,
}

#[derive(Debug)]
struct Inner {
    folder: Folder,
    options: BlockCacheOptions,
    /// Why nothing can be kept here, found out at the start.
    closed: Option<NotKept>,
    stalled: AtomicBool,
    said: Said,
    counts: Mutex<BlockCacheCounts>,
}

/// The cache, as one process sees it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct BlockCache {
    inner: Arc<Inner>,
}

impl BlockCache {
    /// Opens the cache in a folder and removes what dead writers left there. Never fails: a folder that cannot
    /// be used is said, and then holds only what it already has.
    #[must_use]
    pub fn open(options: BlockCacheOptions) -> Self {
        let folder = Folder::new(&options.dir);
        let closed = folder.prepare().err().map(NotKept::from);
        let inner = Inner {
            folder,
            options,
            closed,
            stalled: AtomicBool::new(false),
            said: Said::default(),
            counts: Mutex::default(),
        };
        let cache = Self { inner: Arc::new(inner) };
        let opened = match &cache.inner.closed {
            Some(why) => Err(why.clone()),
            None => cache.inner.folder.lock().and_then(|locked| Ok(locked.recount()?)).map(|_| ()),
        };
        if let Err(why) = opened {
            cache.say(&why);
        }
        cache
    }

    /// The cache for a dataset at `url`: in `dir` if that is given; else, where the dataset comes over a
    /// network, in the user's cache folder. `None` with a limit of zero or without a place.
    #[must_use]
    pub fn for_dataset(url: &str, dir: Option<&str>, limit_gib: u32) -> Option<Self> {
        let place = place(url, dir, std::env::var_os("XDG_CACHE_HOME"), std::env::var_os("HOME"));
        let dir = place.filter(|_| limit_gib > 0)?;
        Some(Self::open(BlockCacheOptions::new(dir, u64::from(limit_gib) << 30)))
    }

    /// What this process has done with it so far.
    #[must_use]
    pub fn counts(&self) -> BlockCacheCounts {
        let (evicted, evicted_bytes) = self.inner.folder.evicted();
        BlockCacheCounts { evicted, evicted_bytes, ..*self.tally() }
    }

    /// The block from the cache, else from `fetch`, whose bytes must match `digest` and are then kept.
    ///
    /// # Errors
    /// Those of `fetch`.
    pub async fn or_fetch<E>(
        &self,
        digest: &ObjectDigest,
        fetch: impl Future<Output = Result<Bytes, E>>,
    ) -> Result<Bytes, E> {
        let wanted = digest.clone();
        if let Some(found) = self.off_thread(move |cache| cache.get(&wanted)).await.flatten() {
            return Ok(found);
        }
        let bytes = fetch.await?;
        let (digest, kept) = (digest.clone(), bytes.clone());
        // Waited for, so that there is never more unwritten than is being fetched.
        self.off_thread(move |cache| cache.insert(&digest, &kept)).await;
        Ok(bytes)
    }

    /// Blocking work, away from the thread that serves the network; `None` where the disk hangs.
    async fn off_thread<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> T + Send + 'static,
    ) -> Option<T> {
        if self.inner.stalled.load(Ordering::Relaxed) {
            return None;
        }
        let cache = self.clone();
        let task = tokio::task::spawn_blocking(move || work(&cache));
        match tokio::time::timeout(self.inner.options.disk_patience, task).await {
            Ok(done) => done.ok(),
            Err(_) => {
                if !self.inner.stalled.swap(true, Ordering::Relaxed) {
                    let dir = self.inner.options.dir.display();
                    tracing::warn!(%dir, "the block cache's disk hangs: going on without it");
                }
                None
            }
        }
    }

    /// The block's bytes, verified; blocks the calling thread.
    #[must_use]
    pub fn get(&self, digest: &ObjectDigest) -> Option<Bytes> {
        let found = BlockName::of(digest).and_then(|name| self.read(&name, digest));
        let mut counts = self.tally();
        match &found {
            Some(bytes) => {
                counts.hits += 1;
                counts.hit_bytes += bytes.len() as u64;
            }
            None => counts.misses += 1,
        }
        found
    }

    fn read(&self, name: &BlockName, digest: &ObjectDigest) -> Option<Bytes> {
        let why = match self.inner.folder.read(name) {
            Ok(bytes) if digest.matches(&bytes) => return Some(bytes.into()),
            Ok(_) => "other bytes than its name says".to_owned(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) if folder::is_damage(&error) => error.to_string(),
            Err(error) => {
                if first(&self.inner.said.unreadable) {
                    let dir = self.inner.options.dir.display();
                    tracing::warn!(%dir, block = %name, %error, "cannot read the block cache");
                }
                return None;
            }
        };
        tracing::warn!(block = %name, why, "a cached block is damaged: fetching it again");
        self.tally().corrupt += 1;
        if self.inner.closed.is_none() {
            self.inner.folder.remove(name);
        }
        None
    }

    /// Keeps a block of which the caller knows that it matches; blocks the calling thread.
    ///
    /// # Errors
    /// [`NotKept`], which has been counted and said.
    pub fn insert(&self, digest: &ObjectDigest, bytes: &[u8]) -> Result<Kept, NotKept> {
        let outcome = self.try_insert(digest, bytes);
        let mut counts = self.tally();
        match &outcome {
            Ok(Kept::New) => {
                counts.inserted += 1;
                counts.inserted_bytes += digest.bytes;
            }
            Ok(Kept::AlreadyThere) => counts.already_there += 1,
            Err(NotKept::TooLarge { .. }) => counts.too_large += 1,
            Err(NotKept::Busy) => counts.busy += 1,
            Err(NotKept::NoSpace(_)) => counts.no_space += 1,
            Err(NotKept::Unusable(_)) => counts.unusable += 1,
        }
        drop(counts);
        outcome.inspect_err(|why| self.say(why))
    }

    fn try_insert(&self, digest: &ObjectDigest, bytes: &[u8]) -> Result<Kept, NotKept> {
        if let Some(why) = &self.inner.closed {
            return Err(why.clone());
        }
        // A digest comes from a manifest, which may say anything; it becomes a file's name only here.
        let name = BlockName::of(digest).filter(|_| digest.bytes == bytes.len() as u64);
        let name = name.ok_or_else(|| NotKept::Unusable("that is no block's digest".to_owned()))?;
        let BlockCacheOptions { limit_bytes, keep_free_bytes, .. } = self.inner.options;
        match self.inner.folder.reserve(name, limit_bytes, keep_free_bytes)? {
            Some(reservation) => reservation.publish(bytes),
            None => Ok(Kept::AlreadyThere),
        }
    }

    fn say(&self, why: &NotKept) {
        let said = &self.inner.said;
        let said = match why {
            NotKept::TooLarge { .. } => &said.too_large,
            NotKept::Busy => &said.busy,
            NotKept::NoSpace(_) => &said.no_space,
            NotKept::Unusable(_) => &said.unusable,
        };
        if first(said) {
            let dir = self.inner.options.dir.display();
            tracing::warn!(%dir, %why, "the block cache does not keep everything; the run goes on");
        }
    }

    fn tally(&self) -> MutexGuard<'_, BlockCacheCounts> {
        self.inner.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether this is the first time.
fn first(said: &AtomicBool) -> bool {
    !said.swap(true, Ordering::Relaxed)
}

/// Where the blocks of the dataset at `url` are kept, from what the user and the environment say.
fn place(
    url: &str,
    dir: Option<&str>,
    xdg_cache_home: Option<OsString>,
    home: Option<OsString>,
) -> Option<PathBuf> {
    if let Some(dir) = dir {
        return Some(PathBuf::from(dir));
    }
    // What is on this machine already would only be there twice.
    if url.starts_with("file:") || url.starts_with("memory:") {
        return None;
    }
    // The XDG specification: a relative path there is to be ignored.
    let absolute = |path: OsString| Some(PathBuf::from(path)).filter(|path| path.is_absolute());
    let caches = xdg_cache_home.and_then(absolute);
    let caches = caches.or_else(|| Some(home.and_then(absolute)?.join(".cache")))?;
    Some(caches.join("cpcr/blocks"))
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
