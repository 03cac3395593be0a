//! The cache's folder: names, the account of bytes under its lock, reservations, eviction.
//!
//! ```text
//! DIR/v1/account                  bytes in use, as text; its flock is the lock
//! DIR/v1/ab/ab…-<bytes>           a block, by SHA-256 and length
//! DIR/v1/tmp/<unique>-<bytes>     a reservation, flocked by its writer for as long as that lives
//! ```
//!
//! The account grows before a reservation exists and shrinks after a file is gone, so a crash at any point leaves it too
//! large, never too small. A recount heals that: lengths stand in names, and a reservation whose flock can be had is a
//! dead writer's. Whatever changes what a recount would count happens under the lock. Not here: whether bytes are the
//! right ones, and what is said about a failure.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::{Kept, NotKept};
use crate::store::unique_id;
use crate::types::ObjectDigest;

/// How long the lock is waited for. It is held for fractions of a millisecond, and while a recount runs.
pub(super) const LOCK_PATIENCE: Duration = Duration::from_secs(1);
/// Longest pause between two looks at the lock: `flock` knows no deadline, so there is no event to wait for.
const LOCK_PAUSE_MAX: Duration = Duration::from_millis(2);
/// Evictions for one insertion: a lowered limit is reached over some insertions, not in one long one.
const EVICTIONS_MAX: usize = 256;
/// Insertions before a recount is due again, at least; else as many as it counted blocks, so that they pay for it.
const RECOUNT_EVERY_MIN: u64 = 64;
/// Digits of the account: always the same, so that a write never leaves a part of the last one.
const ACCOUNT_DIGITS: usize = 20;
/// EIO: the disk cannot read it back.
const EIO: i32 = 5;

/// A block's file name, from a digest that can be one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BlockName {
    text: String,
    bytes: u64,
}

impl BlockName {
    /// `None` unless the hash is 64 lower-case hexadecimal digits: anything else could be a path.
    pub fn of(digest: &ObjectDigest) -> Option<Self> {
        let is_hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        let ObjectDigest { bytes, sha256 } = digest;
        (sha256.len() == 64 && sha256.bytes().all(is_hex))
            .then(|| Self { text: format!("{sha256}-{bytes}"), bytes: *bytes })
    }

    fn parse(text: &str) -> Option<Self> {
        let (sha256, bytes) = text.split_once('-')?;
        let digest = ObjectDigest { bytes: bytes.parse().ok()?, sha256: sha256.to_owned() };
        Self::of(&digest).filter(|name| name.text == text)
    }
}

impl fmt::Display for BlockName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Whether reading failed because of what is on the disk, so that fetching the block again cures it.
pub(super) fn is_damage(error: &io::Error) -> bool {
    error.kind() == ErrorKind::InvalidData || error.raw_os_error() == Some(EIO)
}

/// The folder `DIR/v1`.
#[derive(Debug)]
pub(super) struct Folder {
    root: PathBuf,
    random: RandomState,
    draws: AtomicU64,
    /// The lock was waited for in vain: not again before it has been got once.
    hopeless: AtomicBool,
    /// Insertions until a full cache is recounted.
    until_recount: AtomicU64,
    evicted: AtomicU64,
    evicted_bytes: AtomicU64,
}

impl Folder {
    pub fn new(dir: &Path) -> Self {
        Self {
            root: dir.join("v1"),
            random: RandomState::new(),
            draws: AtomicU64::new(0),
            hopeless: AtomicBool::new(false),
            until_recount: AtomicU64::new(0),
            evicted: AtomicU64::new(0),
            evicted_bytes: AtomicU64::new(0),
        }
    }

    /// Makes the folder, ours alone (patients' scans), or says why nothing can be written there.
    pub fn prepare(&self) -> io::Result<()> {
        make_folder(&self.root)?;
        let found = fs::metadata(&self.root)?;
        if found.uid() != rustix::process::geteuid().as_raw() {
            let why = format!("{} belongs to user {}", self.root.display(), found.uid());
            return Err(io::Error::new(ErrorKind::PermissionDenied, why));
        }
        if found.mode() & 0o077 != 0 {
            fs::set_permissions(&self.root, Permissions::from_mode(0o700))?;
        }
        make_folder(&self.temporary())?;
        self.open_account().map(|_| ())
    }

    /// Blocks evicted by this process, and their bytes.
    pub fn evicted(&self) -> (u64, u64) {
        (self.evicted.load(Ordering::Relaxed), self.evicted_bytes.load(Ordering::Relaxed))
    }

    /// The file's bytes; one of another length than its name says is `InvalidData`.
    pub fn read(&self, name: &BlockName) -> io::Result<Vec<u8>> {
        let file = File::open(self.block(name))?;
        let len = file.metadata()?.len();
        if len != name.bytes {
            return Err(io::Error::new(ErrorKind::InvalidData, format!("it has {len} bytes")));
        }
        let mut bytes = Vec::with_capacity(usize::try_from(len).map_err(io::Error::other)?);
        file.take(len).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// Removes a block. Without the lock its bytes stay in the account until a recount.
    pub fn remove(&self, name: &BlockName) {
        let locked = self.lock().ok();
        if fs::remove_file(self.block(name)).is_ok()
            && let Some(locked) = locked
        {
            locked.give_back(name.bytes);
        }
    }

    /// Room for a block within `limit_bytes`; `None` if it is there already.
    pub fn reserve(
        &self,
        name: BlockName,
        limit_bytes: u64,
        keep_free_bytes: Option<u64>,
    ) -> Result<Option<Reservation<'_>>, NotKept> {
        if name.bytes > limit_bytes {
            return Err(NotKept::TooLarge { bytes: name.bytes });
        }
        let locked = self.lock()?;
        if self.block(&name).exists() {
            return Ok(None);
        }
        self.check_free(name.bytes, keep_free_bytes)?;
        let used = locked.make_room(name.bytes, limit_bytes)?;
        locked.write(used + name.bytes)?;
        let temp = self.temporary().join(format!("{}-{}", unique_id(), name.bytes));
        match create_held(&temp) {
            Ok(file) => Ok(Some(Reservation { folder: self, name, temp, file, settled: false })),
            Err(error) => {
                fs::remove_file(&temp).ok();
                locked.give_back(name.bytes);
                Err(error.into())
            }
        }
    }

    /// Takes the lock, which is freed when the result is dropped.
    pub fn lock(&self) -> Result<Locked<'_>, NotKept> {
        let hopeless = self.hopeless.load(Ordering::Relaxed);
        let deadline = Instant::now() + if hopeless { Duration::ZERO } else { LOCK_PATIENCE };
        let mut pause = Duration::from_micros(20);
        loop {
            // Opened anew each time: threads exclude each other like processes do, and a folder that somebody
            // removed and made again has another file.
            let account = self.open_account()?;
            match account.try_lock() {
                Ok(()) if self.is_current(&account)? => {
                    self.hopeless.store(false, Ordering::Relaxed);
                    return Ok(Locked { folder: self, account });
                }
                Ok(()) | Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => return Err(error.into()),
            }
            if Instant::now() >= deadline {
                self.hopeless.store(true, Ordering::Relaxed);
                return Err(NotKept::Busy);
            }
            thread::sleep(pause);
            pause = (pause * 2).min(LOCK_PAUSE_MAX);
        }
    }

    fn open_account(&self) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let path = self.root.join("account");
        options.open(&path).or_else(|error| match error.kind() {
            // Somebody has tidied up.
            ErrorKind::NotFound => {
                make_folder(&self.temporary()).and_then(|()| options.open(&path))
            }
            _ => Err(error),
        })
    }

    fn is_current(&self, account: &File) -> io::Result<bool> {
        let ours = account.metadata()?;
        match fs::metadata(self.root.join("account")) {
            Ok(named) => Ok((named.dev(), named.ino()) == (ours.dev(), ours.ino())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn check_free(&self, bytes: u64, keep_free_bytes: Option<u64>) -> Result<(), NotKept> {
        let disk = rustix::fs::statvfs(&self.root).map_err(io::Error::from)?;
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        let twentieth = disk.f_blocks.saturating_mul(disk.f_frsize) / 20;
        let keep = keep_free_bytes.unwrap_or(twentieth.clamp(1 << 30, 16 << 30));
        if free < keep.saturating_add(bytes) {
            let why = format!("{free} bytes of the disk are free, and {keep} shall stay so");
            return Err(NotKept::NoSpace(why));
        }
        Ok(())
    }

    fn temporary(&self) -> PathBuf {
        self.root.join("tmp")
    }

    fn part(&self, part: u8) -> PathBuf {
        self.root.join(format!("{part:02x}"))
    }

    fn block(&self, name: &BlockName) -> PathBuf {
        self.root.join(&name.text[..2]).join(&name.text)
    }

    fn blocks_in(&self, part: u8) -> io::Result<Vec<BlockName>> {
        Ok(names_in(&self.part(part))?.iter().filter_map(|name| BlockName::parse(name)).collect())
    }
}

/// A folder and its parents, for nobody else.
fn make_folder(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Names in a folder; none where there is no folder.
fn names_in(folder: &Path) -> io::Result<Vec<String>> {
    match fs::read_dir(folder) {
        Ok(entries) => entries
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<io::Result<_>>(),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// A new file whose lock tells others that its writer lives.
fn create_held(temp: &Path) -> io::Result<File> {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(temp)?;
    file.try_lock().map_err(io::Error::from)?;
    Ok(file)
}

/// The folder while its lock is held.
#[derive(Debug)]
pub(super) struct Locked<'a> {
    folder: &'a Folder,
    account: File,
}

impl Locked<'_> {
    /// Counts what is there, removes what dead writers left, and sets the account right.
    pub fn recount(&self) -> io::Result<u64> {
        let folder = self.folder;
        let mut used = 0_u64;
        for name in names_in(&folder.temporary())? {
            if !remove_if_dead(&folder.temporary().join(&name))? {
                let bytes = name.rsplit_once('-').and_then(|(_, bytes)| bytes.parse().ok());
                used = used.saturating_add(bytes.unwrap_or(0));
            }
        }
        let mut blocks = 0;
        for part in 0..=u8::MAX {
            for name in folder.blocks_in(part)? {
                used = used.saturating_add(name.bytes);
                blocks += 1;
            }
        }
        self.write(used)?;
        folder.until_recount.store(RECOUNT_EVERY_MIN.max(blocks), Ordering::Relaxed);
        Ok(used)
    }

    /// Evicts until `bytes` more fit into `limit`; what is in use then.
    fn make_room(&self, bytes: u64, limit: u64) -> Result<u64, NotKept> {
        let fits = |used: u64| used.saturating_add(bytes) <= limit;
        let order = Ordering::Relaxed;
        let until_recount = &self.folder.until_recount;
        let is_due = until_recount.fetch_update(order, order, |left| left.checked_sub(1)).is_err();
        let mut used = match self.read()? {
            Some(used) if fits(used) || !is_due => used,
            _ => self.recount()?,
        };
        let mut evictions = 0;
        while !fits(used) && evictions < EVICTIONS_MAX {
            match self.evict_one() {
                Ok(Some(freed)) => used = used.saturating_sub(freed),
                // Nothing left, and yet it says full: writers are at work, or it is wrong.
                Ok(None) => {
                    used = self.recount()?;
                    break;
                }
                Err(error) => {
                    self.write(used)?;
                    return Err(error.into());
                }
            }
            evictions += 1;
        }
        if !fits(used) {
            self.write(used)?;
            return Err(NotKept::Busy);
        }
        Ok(used)
    }

    /// Removes a random block; its length, or `None` where there is none.
    fn evict_one(&self) -> io::Result<Option<u64>> {
        let folder = self.folder;
        let random = folder.random.hash_one(folder.draws.fetch_add(1, Ordering::Relaxed));
        let [start, ..] = random.to_le_bytes();
        for step in 0..=u8::MAX {
            let blocks = folder.blocks_in(start.wrapping_add(step))?;
            if blocks.is_empty() {
                continue;
            }
            let pick = &blocks[(random >> 8) as usize % blocks.len()];
            match fs::remove_file(folder.block(pick)) {
                // Gone without the lock means that its bytes were never given back.
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            folder.evicted.fetch_add(1, Ordering::Relaxed);
            folder.evicted_bytes.fetch_add(pick.bytes, Ordering::Relaxed);
            return Ok(Some(pick.bytes));
        }
        Ok(None)
    }

    /// Takes off the account what is no longer there. Fails silently: too much in the account does no harm.
    fn give_back(&self, bytes: u64) {
        if let Ok(Some(used)) = self.read() {
            self.write(used.saturating_sub(bytes)).ok();
        }
    }

    /// The account; `None` if it cannot be understood (new, or torn by a power cut).
    fn read(&self) -> io::Result<Option<u64>> {
        let mut text = [0; ACCOUNT_DIGITS];
        match self.account.read_exact_at(&mut text, 0) {
            Ok(()) => Ok(str::from_utf8(&text).ok().and_then(|text| text.parse().ok())),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn write(&self, used: u64) -> io::Result<()> {
        self.account.write_all_at(format!("{used:0ACCOUNT_DIGITS$}\n").as_bytes(), 0)
    }
}

/// Removes a reservation whose writer is dead; `false` if it lives.
fn remove_if_dead(temp: &Path) -> io::Result<bool> {
    let file = match OpenOptions::new().write(true).open(temp) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(true),
        Err(error) => return Err(error),
    };
    match file.try_lock() {
        Ok(()) => fs::remove_file(temp).map(|()| true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Room that the account has for a block. Dropped without being published, it gives it back.
#[derive(Debug)]
pub(super) struct Reservation<'a> {
    folder: &'a Folder,
    name: BlockName,
    temp: PathBuf,
    file: File,
    settled: bool,
}

impl Reservation<'_> {
    /// Writes the block and gives it its name, whole or not at all.
    pub fn publish(mut self, bytes: &[u8]) -> Result<Kept, NotKept> {
        self.file.write_all(bytes)?;
        // Under the lock: a recount sees it once, and of two writers of one block one gives way.
        let locked = self.folder.lock()?;
        let path = self.folder.block(&self.name);
        if path.exists() {
            // Dropping the reservation takes the lock itself.
            drop(locked);
            return Ok(Kept::AlreadyThere);
        }
        let mut renamed = fs::rename(&self.temp, &path);
        if let (Err(ErrorKind::NotFound), Some(part)) =
            (renamed.as_ref().map_err(io::Error::kind), path.parent())
        {
            renamed = make_folder(part).and_then(|()| fs::rename(&self.temp, &path));
        }
        self.settled = renamed.is_ok();
        drop(locked);
        Ok(renamed.map(|()| Kept::New)?)
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        if self.settled {
            return;
        }
        let locked = self.folder.lock().ok();
        if fs::remove_file(&self.temp).is_ok()
            && let Some(locked) = locked
        {
            locked.give_back(self.name.bytes);
        }
    }
}
