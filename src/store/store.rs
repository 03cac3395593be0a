//! [`Store`]: a place for objects, cheap to clone, every wait bounded.
//!
//! Adapters for tests stand in `faulty.rs`; large transfers in `transfer.rs`. No method takes a
//! flag, keeps a stream open, or returns before its write is durable.

use std::fmt;
use std::future::Future;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};
use tokio::sync::OnceCell;
use tokio::time::timeout;

use super::backend::{self, Engines, NetworkHint};
use super::error::StoreError;
use super::latency::Latency;
use super::options::StoreOptions;
use super::read::{Fetched, Wanted};
use super::read_faults::{FaultCounters, FaultKind, ReadFaults};
use super::unique::unique_id;
use crate::types::ObjectDigest;

/// How often one create is tried while the store answers neither "made" nor "taken".
const CREATE_TRIES_MAX: u32 = 6;
/// How often an object is fetched that does not come as it was written.
const UNSOUND_MAX: u32 = 5;
/// A failed first contact answers everyone who was waiting for it, not each in turn.
const FAILED_CONTACT_SHARED: Duration = Duration::from_secs(1);
/// Deletions under way at once.
const DELETES_MAX: usize = 8;

/// What [`Store::create`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Created {
    /// The object is there now, and these are its bytes.
    New,
    /// Someone else's object has that name; nothing was changed.
    Exists,
}

/// One object in a listing.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ObjectInfo {
    /// Name relative to the store it was listed from.
    pub path: String,
    /// Length in bytes.
    pub bytes: u64,
}

pub(super) struct Shared {
    pub engines: Engines,
    pub options: StoreOptions,
    pub counters: FaultCounters,
    pub latency: Latency,
    reached: OnceCell<()>,
    failed: Mutex<Option<(Instant, StoreError)>>,
}

impl Shared {
    fn new(engines: Engines, options: StoreOptions) -> Self {
        Self {
            engines,
            options,
            counters: FaultCounters::default(),
            latency: Latency::default(),
            reached: OnceCell::new(),
            failed: Mutex::new(None),
        }
    }
}

/// A place for objects: a bucket, a folder, or memory, from some prefix on.
#[derive(Clone)]
pub struct Store {
    pub(super) shared: Arc<Shared>,
    prefix: Path,
    url: String,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Store({})", self.url)
    }
}

impl fmt::Display for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.url)
    }
}

impl Store {
    /// Opens `url`: `s3://`, `gs://`, `az://`, `file:///`, `memory:///` or a plain path, with the
    /// clouds' usual environment variables. Contacts nobody: see [`Store::probe`].
    ///
    /// Every `memory:///` is a fresh, empty store, shared only by clones.
    pub fn open(url: &str, options: &StoreOptions) -> Result<Self, StoreError> {
        let backend = backend::open(url, options)?;
        Ok(Self {
            shared: Arc::new(Shared::new(backend.engines, options.clone())),
            prefix: backend.prefix,
            url: backend.url,
        })
    }

    /// A store over any engine, with default bounds: for tests and adapters.
    #[must_use]
    pub fn from_engine(engine: Arc<dyn ObjectStore>, url: &str) -> Self {
        Self {
            shared: Arc::new(Shared::new(Engines::local(engine), StoreOptions::default())),
            prefix: Path::default(),
            url: url.to_owned(),
        }
    }

    /// The store that begins at `path` within this one.
    #[must_use]
    pub fn child(&self, path: &str) -> Self {
        let prefix = self.prefix.parts().chain(Path::from(path).parts()).collect();
        let url = format!("{}/{}", self.url.trim_end_matches('/'), path.trim_matches('/'));
        Self { shared: Arc::clone(&self.shared), prefix, url: url.trim_end_matches('/').to_owned() }
    }

    /// The URL, without a trailing slash.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The whole object. Not verified: see [`Store::get_verified`].
    pub async fn get(&self, path: &str) -> Result<Bytes, StoreError> {
        self.contact().await?;
        self.get_whole(path).await
    }

    /// Exactly the bytes of `range`; a shorter object is `Corrupt`.
    pub async fn get_range(&self, path: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        self.contact().await?;
        let detail = match self.read(path, &Wanted::part(range.clone())).await {
            Ok(Fetched::Bytes(bytes)) if bytes.len() as u64 == range.end - range.start => {
                return Ok(bytes);
            }
            Ok(Fetched::Bytes(bytes)) => {
                format!("bytes {range:?} were asked for, {} came", bytes.len())
            }
            Ok(Fetched::Large { .. }) => format!("bytes {range:?} were asked for, all came"),
            Err(error @ StoreError::Other { .. }) => match self.head(path).await {
                Ok(info) if info.bytes < range.end => {
                    format!("bytes {range:?} were asked for, it has {}", info.bytes)
                }
                _ => return Err(error),
            },
            Err(error) => return Err(error),
        };
        Err(StoreError::Corrupt { url: self.url.clone(), path: path.to_owned(), detail })
    }

    /// The whole object, if it is the one that `digest` was taken of.
    ///
    /// A mismatch is fetched again (a broken transfer), and in the end is `Corrupt` (a broken object).
    pub async fn get_verified(
        &self,
        path: &str,
        digest: &ObjectDigest,
    ) -> Result<Bytes, StoreError> {
        let sound = |bytes: &[u8]| digest.matches(bytes);
        let bytes = self.fetch_sound(path, self.tries().max(2), sound).await?;
        if digest.matches(&bytes) {
            return Ok(bytes);
        }
        let found = ObjectDigest::of(&bytes);
        Err(StoreError::Corrupt {
            url: self.url.clone(),
            path: path.to_owned(),
            detail: format!(
                "expected {} bytes with SHA-256 {}, found {} bytes with {}",
                digest.bytes, digest.sha256, found.bytes, found.sha256
            ),
        })
    }

    /// How often bytes are fetched that are not as they should be: a disk says the same each time.
    fn tries(&self) -> u32 {
        if self.shared.engines.reads.is_some() { UNSOUND_MAX } else { 1 }
    }

    /// The whole object, fetched again as long as it is not `sound`, a few times: then what came last, for the
    /// caller to say what is wrong with it.
    pub async fn get_sound(
        &self,
        path: &str,
        sound: impl Fn(&[u8]) -> bool,
    ) -> Result<Bytes, StoreError> {
        self.fetch_sound(path, self.tries(), sound).await
    }

    async fn fetch_sound(
        &self,
        path: &str,
        tries: u32,
        sound: impl Fn(&[u8]) -> bool,
    ) -> Result<Bytes, StoreError> {
        let mut bytes = self.get(path).await?;
        for _ in 1..tries {
            if sound(&bytes) {
                break;
            }
            self.mismatch(path, 0);
            bytes = self.get(path).await?;
        }
        Ok(bytes)
    }

    /// The whole object, which is small and whose digest nobody knows: the bytes that came twice.
    pub async fn get_agreed(&self, path: &str) -> Result<Bytes, StoreError> {
        let mut seen = vec![self.get(path).await?];
        if self.tries() == 1 {
            return Ok(seen.remove(0));
        }
        for _ in 1..self.tries() {
            let again = self.get(path).await?;
            if seen.contains(&again) {
                return Ok(again);
            }
            self.mismatch(path, 0);
            seen.push(again);
        }
        let detail = "no two of its answers were alike".to_owned();
        Err(StoreError::Corrupt { url: self.url.clone(), path: path.to_owned(), detail })
    }

    /// What went wrong with reads so far, here and in all clones and children of this store.
    #[must_use]
    pub fn read_faults(&self) -> ReadFaults {
        self.shared.counters.snapshot()
    }

    /// Counts bytes of `path` from `offset` on that did not match their hash.
    pub fn mismatch(&self, path: &str, offset: u64) {
        let location = self.locate(path).unwrap_or_default();
        let kind = self.shared.counters.mismatch(location.as_ref());
        let detail = "the bytes do not match their hash";
        self.shared.counters.fault(kind, location.as_ref(), offset, detail);
    }

    /// Writes the object, replacing what was there; readers see the old or the new, never a part.
    pub async fn put(&self, path: &str, bytes: Bytes) -> Result<(), StoreError> {
        self.contact().await?;
        self.put_whole(path, bytes).await
    }

    /// Writes the object if nothing has that name.
    ///
    /// The network may lose the answer to a successful write, and the retry then meets its own
    /// object; so a taken name is read back, and the same bytes count as `New`. Where exactly one
    /// of several writers must win, their bytes must differ: put a writer id in them.
    pub async fn create(&self, path: &str, bytes: Bytes) -> Result<Created, StoreError> {
        self.contact().await?;
        let location = self.locate(path)?;
        let mut backoff = Duration::from_millis(50);
        let mut tries = 0;
        loop {
            tries += 1;
            let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
            let payload = PutPayload::from(bytes.clone());
            let put = self.shared.engines.engine.put_opts(&location, payload, options);
            let error = match self.bounded("create", path, put).await {
                Ok(_) => return Ok(Created::New),
                // Also 409 for two creates at once, of which possibly neither succeeded.
                Err(error @ StoreError::AlreadyExists { .. }) => error,
                // Unknown whether the write arrived.
                Err(error) if error.is_transient() => error,
                Err(error) => return Err(error),
            };
            match self.get_whole(path).await {
                Ok(found) if found == bytes => {
                    let detail = "the write had been carried out";
                    let kind = FaultKind::AnswerLost;
                    self.shared.counters.fault(kind, location.as_ref(), 0, detail);
                    return Ok(Created::New);
                }
                Ok(_) => return Ok(Created::Exists),
                Err(StoreError::NotFound { .. }) if tries < CREATE_TRIES_MAX => {}
                Err(_) => return Err(error),
            }
            tokio::time::sleep(backoff).await;
            backoff *= 2;
        }
    }

    /// All objects whose name begins with the folder `prefix` (whole path segments; `""` for
    /// all), in the order of their names.
    pub async fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>, StoreError> {
        self.contact().await?;
        let location = self.locate(prefix)?;
        let skip = self.prefix.parts().count();
        let mut stream = self.shared.engines.engine.list(Some(&location));
        let mut objects = Vec::new();
        while let Some(meta) = self.bounded("list", prefix, stream.try_next()).await? {
            let path: Path = meta.location.parts().skip(skip).collect();
            objects.push(ObjectInfo { path: path.to_string(), bytes: meta.size });
        }
        objects.sort();
        Ok(objects)
    }

    /// Removes the object; one that is not there is no error.
    pub async fn delete(&self, path: &str) -> Result<(), StoreError> {
        self.contact().await?;
        let location = self.locate(path)?;
        match self.bounded("delete", path, self.shared.engines.engine.delete(&location)).await {
            Err(error) if error.is_not_found() => Ok(()),
            other => other,
        }
    }

    /// Removes everything that [`Store::list`] would name, and says how much that was.
    pub async fn delete_prefix(&self, prefix: &str) -> Result<usize, StoreError> {
        let objects = self.list(prefix).await?;
        let count = objects.len();
        futures::stream::iter(objects.into_iter().map(Ok))
            .try_for_each_concurrent(DELETES_MAX, |object| async move {
                self.delete(&object.path).await
            })
            .await?;
        Ok(count)
    }

    /// Name and length, or `NotFound`.
    pub async fn head(&self, path: &str) -> Result<ObjectInfo, StoreError> {
        self.contact().await?;
        let location = self.locate(path)?;
        let meta =
            self.bounded("look up", path, self.shared.engines.engine.head(&location)).await?;
        Ok(ObjectInfo { path: path.to_owned(), bytes: meta.size })
    }

    /// Whether the object is there.
    pub async fn exists(&self, path: &str) -> Result<bool, StoreError> {
        match self.head(path).await {
            Ok(_) => Ok(true),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Proves that the store can be reached, written, and refuses to create a name twice.
    ///
    /// Everything that is committed rests on the last of these, so a store that lets it is
    /// `Unsafe`. The probe's object is removed again.
    pub async fn probe(&self) -> Result<(), StoreError> {
        let path = format!(".probe/{}", unique_id());
        let first = self.create(&path, Bytes::from(unique_id())).await?;
        let second = self.create(&path, Bytes::from(unique_id())).await;
        let cleanup = self.delete(&path).await;
        let detail = match (first, second?) {
            (Created::New, Created::Exists) => return cleanup,
            (Created::New, Created::New) => "a name was created twice",
            (Created::Exists, _) => "a fresh name was said to exist",
        };
        Err(StoreError::Unsafe { url: self.url.clone(), detail: detail.to_owned() })
    }

    /// Makes sure that the store has answered once, within the short first-contact bound.
    pub(super) async fn contact(&self) -> Result<(), StoreError> {
        let Some(hint) = &self.shared.engines.network else { return Ok(()) };
        self.shared.reached.get_or_try_init(|| self.first_contact(hint)).await?;
        Ok(())
    }

    async fn first_contact(&self, hint: &NetworkHint) -> Result<(), StoreError> {
        let failed = || self.shared.failed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, error)) = &*failed()
            && at.elapsed() < FAILED_CONTACT_SHARED
        {
            return Err(error.clone());
        }
        let bound = self.shared.options.first_contact;
        let location = self.locate(".contact")?;
        // Any answer will do, "not found" and "denied" too: the operation itself will say it better.
        let answered = async {
            loop {
                // Several tries within the bound: one lost answer says little about a store.
                match timeout(bound / 4, self.shared.engines.engine.head(&location)).await {
                    Ok(Err(error))
                        if StoreError::from_engine(&self.url, "reach", "", &error)
                            .is_transient() =>
                    {
                        tokio::time::sleep(bound / 40).await;
                    }
                    Ok(_) => return,
                    Err(_) => {}
                }
            }
        };
        if timeout(bound, answered).await.is_ok() {
            return Ok(());
        }
        let detail = format!("no answer within {:.0} s; {}", bound.as_secs_f64(), hint.0);
        let error = StoreError::Unreachable { url: self.url.clone(), detail };
        *failed() = Some((Instant::now(), error.clone()));
        Err(error)
    }

    /// Runs one engine operation inside the deadline and translates its error.
    pub(super) async fn bounded<T>(
        &self,
        operation: &'static str,
        path: &str,
        work: impl Future<Output = object_store::Result<T>>,
    ) -> Result<T, StoreError> {
        let options = &self.shared.options;
        // The engine stops retrying at `deadline`; its last request may take `timeout` more.
        let bound = options.deadline + options.timeout;
        match timeout(bound, work).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(self.translated(operation, path, &error)),
            Err(_) => Err(StoreError::Unreachable {
                url: self.url.clone(),
                detail: format!(
                    "{operation} '{path}' took more than {:.0} s; {}",
                    bound.as_secs_f64(),
                    self.hint()
                ),
            }),
        }
    }

    /// The engine's error in this module's words, with a hint where nobody was reached.
    pub(super) fn translated(
        &self,
        operation: &'static str,
        path: &str,
        error: &object_store::Error,
    ) -> StoreError {
        match StoreError::from_engine(&self.url, operation, path, error) {
            StoreError::Unreachable { url, detail } => {
                StoreError::Unreachable { url, detail: format!("{detail}; {}", self.hint()) }
            }
            other => other,
        }
    }

    /// What to check when nobody answers.
    pub(super) fn hint(&self) -> &str {
        self.shared.engines.network.as_ref().map_or("", |hint| hint.0.as_str())
    }

    /// The engine's name for `path`.
    pub(super) fn locate(&self, path: &str) -> Result<Path, StoreError> {
        let relative =
            Path::parse(path.trim_end_matches('/')).map_err(|error| StoreError::Other {
                url: self.url.clone(),
                operation: "name",
                path: path.to_owned(),
                detail: error.to_string(),
            })?;
        Ok(self.prefix.parts().chain(relative.parts()).collect())
    }
}
