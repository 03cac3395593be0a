//! One process and its threads: a naive model, damage, folders that do not let us. Killed processes are in `tests/block_cache.rs`.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::AtomicUsize;
use std::time::Instant;

use proptest::prelude::*;
use rustix::fs::{FileType, Mode};

use super::*;

/// The `n`-th block: its digest and its bytes, 1 to 64 of them.
fn block(n: u64) -> (ObjectDigest, Vec<u8>) {
    let bytes: Vec<u8> = (0..=(n * 37) % 64).map(|at| (n * 7 + at) as u8).collect();
    (ObjectDigest::of(&bytes), bytes)
}

fn open(dir: &Path, limit_bytes: u64) -> BlockCache {
    let options = BlockCacheOptions::new(dir, limit_bytes);
    // The machine's disk may be nearly full.
    BlockCache::open(BlockCacheOptions { keep_free_bytes: Some(0), ..options })
}

fn insert(cache: &BlockCache, n: u64) -> Result<Kept, NotKept> {
    let (digest, bytes) = block(n);
    cache.insert(&digest, &bytes)
}

fn file_of(dir: &Path, n: u64) -> PathBuf {
    let digest = block(n).0;
    dir.join("v1").join(&digest.sha256[..2]).join(format!("{}-{}", digest.sha256, digest.bytes))
}

/// Real lengths of all blocks, by name.
fn blocks_in(dir: &Path) -> BTreeMap<String, u64> {
    let parts = fs::read_dir(dir.join("v1")).unwrap().map(|entry| entry.unwrap().path());
    let parts = parts.filter(|path| path.is_dir() && !path.ends_with("tmp"));
    let files = parts.flat_map(|part| fs::read_dir(part).unwrap()).map(Result::unwrap);
    files.map(|f| (f.file_name().into_string().unwrap(), f.metadata().unwrap().len())).collect()
}

fn account(dir: &Path) -> u64 {
    fs::read_to_string(dir.join("v1/account")).unwrap().trim().parse().unwrap()
}

#[derive(Debug, Clone)]
enum Action {
    Insert {
        handle: usize,
        block: u64,
    },
    Get {
        handle: usize,
        block: u64,
    },
    /// A byte of a cached block changes on the disk.
    Damage {
        block: u64,
    },
    /// A writer dies with a reservation: the account has its bytes, and so has a file that nobody holds.
    Die {
        bytes: u64,
    },
    Reopen {
        handle: usize,
    },
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let (handle, block) = (|| 0..2_usize, || 0..40_u64);
    let action = prop_oneof![
        8 => (handle(), block()).prop_map(|(handle, block)| Action::Insert { handle, block }),
        4 => (handle(), block()).prop_map(|(handle, block)| Action::Get { handle, block }),
        1 => block().prop_map(|block| Action::Damage { block }),
        1 => (1..64_u64).prop_map(|bytes| Action::Die { bytes }),
        1 => handle().prop_map(|handle| Action::Reopen { handle }),
    ];
    prop::collection::vec(action, 1..100)
}

/// What must be there: blocks by name, whether damaged; and what the dead have left.
#[derive(Default)]
struct Model {
    blocks: BTreeMap<String, (u64, bool)>,
    left_by_the_dead: u64,
}

impl Model {
    fn bytes(&self) -> u64 {
        self.blocks.values().map(|(bytes, _)| bytes).sum::<u64>() + self.left_by_the_dead
    }

    /// Takes what was evicted from the disk's own word, after checking that it had to be.
    fn inserted(&mut self, dir: &Path, name: &str, bytes: u64, limit: u64) {
        self.blocks.insert(name.to_owned(), (bytes, false));
        let there = blocks_in(dir);
        // Nothing comes back by itself, and the new one stays.
        assert!(
            there.contains_key(name) && there.keys().all(|name| self.blocks.contains_key(name))
        );
        let gone = self.blocks.iter().filter(|(name, _)| !there.contains_key(*name));
        let largest_gone = gone.map(|(_, (bytes, _))| *bytes).max();
        self.blocks.retain(|name, _| there.contains_key(name));
        if let Some(largest) = largest_gone {
            assert!(self.bytes() + largest > limit, "evicted without need");
        }
        // A recount on the way may have removed what the dead had left.
        self.left_by_the_dead = account(dir) - there.values().sum::<u64>();
        assert!(self.bytes() <= limit, "{} bytes, {limit} are allowed", self.bytes());
    }
}

fn run(actions: Vec<Action>, limits: [u64; 2]) {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let mut handles = limits.map(|limit| open(dir, limit));
    let mut model = Model::default();
    for action in actions {
        match action {
            Action::Insert { handle, block: n } => {
                let (digest, bytes) = block(n);
                let (name, limit) = (format!("{}-{}", digest.sha256, digest.bytes), limits[handle]);
                let outcome = handles[handle].insert(&digest, &bytes);
                if digest.bytes > limit {
                    assert_eq!(outcome, Err(NotKept::TooLarge { bytes: digest.bytes }));
                } else if model.blocks.contains_key(&name) {
                    assert_eq!(outcome, Ok(Kept::AlreadyThere));
                } else {
                    assert_eq!(outcome, Ok(Kept::New));
                    model.inserted(dir, &name, digest.bytes, limit);
                }
            }
            Action::Get { handle, block: n } => {
                let (digest, bytes) = block(n);
                let name = format!("{}-{}", digest.sha256, digest.bytes);
                let found = handles[handle].get(&digest);
                let intact = model.blocks.get(&name).is_some_and(|(_, damaged)| !damaged);
                assert_eq!(found, intact.then(|| Bytes::from(bytes)));
                if !intact {
                    model.blocks.remove(&name);
                }
            }
            Action::Damage { block: n } => {
                let (digest, mut bytes) = block(n);
                let name = format!("{}-{}", digest.sha256, digest.bytes);
                if let Some((_, damaged)) = model.blocks.get_mut(&name) {
                    bytes[0] ^= 1;
                    fs::write(file_of(dir, n), bytes).unwrap();
                    *damaged = true;
                }
            }
            Action::Die { bytes } => {
                // As a reservation would have it: it does not go over the limit either.
                if model.bytes() + bytes <= limits[0] {
                    let temp = format!("{}-{bytes}", crate::store::unique_id());
                    fs::write(dir.join("v1/tmp").join(temp), b"half").unwrap();
                    let used = account(dir) + bytes;
                    fs::write(dir.join("v1/account"), format!("{used:020}\n")).unwrap();
                    model.left_by_the_dead += bytes;
                }
            }
            Action::Reopen { handle } => {
                handles[handle] = open(dir, limits[handle]);
                model.left_by_the_dead = 0;
                assert_eq!(fs::read_dir(dir.join("v1/tmp")).unwrap().count(), 0);
            }
        }
        let there: BTreeMap<_, _> =
            model.blocks.iter().map(|(n, (b, _))| (n.clone(), *b)).collect();
        assert_eq!(blocks_in(dir), there);
        assert_eq!(account(dir), model.bytes());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn it_holds_what_a_naive_model_says_within_the_inserters_limit(
        actions in actions(),
        limits in [40..600_u64, 40..600_u64],
    ) {
        run(actions, limits);
    }
}

/// What happens to a cached block's bytes.
type Damage = fn(&mut Vec<u8>);

#[test]
fn a_damaged_block_is_removed_counted_and_kept_anew() {
    let folder = tempfile::tempdir().unwrap();
    let cache = open(folder.path(), 1000);
    let (digest, bytes) = block(5);
    let damages: [Damage; 4] = [
        |bytes| bytes[0] ^= 0x80,
        |bytes| bytes.truncate(3),
        |bytes| bytes.push(0),
        |bytes| bytes.clear(),
    ];
    for (round, damage) in damages.into_iter().enumerate() {
        assert_eq!(insert(&cache, 5), Ok(Kept::New));
        assert_eq!(cache.get(&digest).as_deref(), Some(&bytes[..]));
        let mut changed = bytes.clone();
        damage(&mut changed);
        fs::write(file_of(folder.path(), 5), changed).unwrap();
        assert_eq!(cache.get(&digest), None);
        assert_eq!(cache.counts().corrupt, round as u64 + 1);
        assert_eq!((blocks_in(folder.path()).len(), account(folder.path())), (0, 0));
    }
    let counts = cache.counts();
    assert_eq!((counts.hits, counts.misses, counts.inserted), (4, 4, 4));
    assert!(counts.to_string().contains("4 misses (4 damaged)"), "{counts}");
}

#[test]
fn a_fetch_happens_only_for_what_is_not_there() {
    let folder = tempfile::tempdir().unwrap();
    let cache = open(folder.path(), 1000);
    let (digest, bytes) = block(9);
    let fetches = AtomicUsize::new(0);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let fetch = |answer: Result<Vec<u8>, &'static str>| {
        runtime.block_on(cache.or_fetch(&digest, async {
            fetches.fetch_add(1, Ordering::Relaxed);
            answer.map(Bytes::from)
        }))
    };
    assert_eq!(fetch(Err("no network")), Err("no network"));
    assert_eq!(fetch(Ok(bytes.clone())).unwrap(), bytes);
    assert_eq!(fetch(Err("not asked")).unwrap(), bytes);
    assert_eq!(fetches.load(Ordering::Relaxed), 2);
}

/// A pipe that nobody writes to stands for a network file system that does not answer.
#[test]
fn a_disk_that_hangs_is_given_up() {
    let folder = tempfile::tempdir().unwrap();
    let options = BlockCacheOptions::new(folder.path(), 1000);
    let disk_patience = Duration::from_millis(50);
    let cache = BlockCache::open(BlockCacheOptions { disk_patience, ..options });
    let (digest, bytes) = block(9);
    let pipe = file_of(folder.path(), 9);
    fs::create_dir_all(pipe.parent().unwrap()).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, FileType::Fifo, Mode::RWXU, 0).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    for _ in 0..2 {
        let fetched = cache.or_fetch(&digest, async { Ok::<_, ()>(Bytes::from(bytes.clone())) });
        assert_eq!(runtime.block_on(fetched).unwrap(), bytes);
    }
    assert!(cache.inner.stalled.load(Ordering::Relaxed));
    // Wakes the reader, for which the runtime would wait.
    drop(OpenOptions::new().write(true).open(&pipe).unwrap());
}

#[test]
fn who_does_not_get_the_lock_reads_on_and_waits_in_vain_only_once() {
    let folder = tempfile::tempdir().unwrap();
    let cache = open(folder.path(), 1000);
    insert(&cache, 1).unwrap();
    let holder = File::open(folder.path().join("v1/account")).unwrap();
    holder.lock().unwrap();
    assert_eq!(insert(&cache, 2), Err(NotKept::Busy));
    let started = Instant::now();
    for n in 3..20 {
        assert_eq!(insert(&cache, n), Err(NotKept::Busy));
    }
    assert!(started.elapsed() < 5 * folder::LOCK_PATIENCE, "{:?}", started.elapsed());
    assert!(cache.get(&block(1).0).is_some());
    assert_eq!(cache.counts().busy, 18);
    drop(holder);
    assert_eq!(insert(&cache, 2), Ok(Kept::New));
}

#[test]
fn what_dead_writers_left_vanishes_and_what_living_ones_write_stays_and_counts() {
    let folder = tempfile::tempdir().unwrap();
    drop(open(folder.path(), 100));
    let temp = |name: &str| folder.path().join("v1/tmp").join(name);
    let living = File::create(temp("aa-70")).unwrap();
    living.try_lock().unwrap();
    for dead in ["bb-50", "no number"] {
        fs::write(temp(dead), b"half a block").unwrap();
    }
    let cache = open(folder.path(), 100);
    let left: Vec<_> = fs::read_dir(folder.path().join("v1/tmp")).unwrap().flatten().collect();
    assert_eq!((left.len(), left[0].file_name()), (1, "aa-70".into()));
    assert_eq!(account(folder.path()), 70);
    // 30 bytes of room: those being written cannot be evicted.
    let (large, small) = (block(5), block(2));
    assert!(large.1.len() > 30 && small.1.len() <= 30);
    assert_eq!(cache.insert(&large.0, &large.1), Err(NotKept::Busy));
    assert_eq!(cache.insert(&small.0, &small.1), Ok(Kept::New));
}

#[test]
fn an_account_that_says_too_much_is_set_right_before_it_costs_the_whole_cache() {
    let folder = tempfile::tempdir().unwrap();
    let cache = open(folder.path(), 100);
    for text in ["00000000000000000099\n", "torn", "18446744073709551615\n"] {
        fs::write(folder.path().join("v1/account"), text).unwrap();
        assert_eq!(insert(&cache, 5), Ok(Kept::New), "{text}");
        assert_eq!(account(folder.path()), block(5).0.bytes, "{text}");
        fs::remove_file(file_of(folder.path(), 5)).unwrap();
    }
}

#[test]
fn a_digest_that_is_no_hash_names_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let cache = open(folder.path(), 1000);
    let bytes = b"x";
    let upper = ObjectDigest::of(bytes).sha256.to_uppercase();
    for sha256 in ["../../../x".to_owned(), String::new(), "é".repeat(32), "/".repeat(64), upper] {
        let digest = ObjectDigest { bytes: 1, sha256 };
        assert!(matches!(cache.insert(&digest, bytes), Err(NotKept::Unusable(_))), "{digest:?}");
        assert_eq!(cache.get(&digest), None);
    }
    let other_length = ObjectDigest { bytes: 2, ..ObjectDigest::of(bytes) };
    assert!(matches!(cache.insert(&other_length, bytes), Err(NotKept::Unusable(_))));
    assert!(blocks_in(folder.path()).is_empty());
}

#[test]
fn nobody_else_may_look() {
    let folder = tempfile::tempdir().unwrap();
    let v1 = folder.path().join("v1");
    fs::create_dir(&v1).unwrap();
    fs::set_permissions(&v1, Permissions::from_mode(0o755)).unwrap();
    let cache = open(folder.path(), 1000);
    insert(&cache, 1).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
    assert_eq!(mode(&v1), 0o700);
    assert_eq!(mode(&v1.join("account")), 0o600);
    assert_eq!(mode(&file_of(folder.path(), 1)), 0o600);
}

#[test]
fn a_disk_that_is_nearly_full_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    insert(&open(folder.path(), 1000), 1).unwrap();
    let options = BlockCacheOptions::new(folder.path(), 1000);
    let cache = BlockCache::open(BlockCacheOptions { keep_free_bytes: Some(1 << 60), ..options });
    assert!(matches!(insert(&cache, 2), Err(NotKept::NoSpace(_))));
    assert!(cache.get(&block(1).0).is_some());
    assert_eq!(cache.counts().no_space, 1);
}

#[test]
fn a_folder_that_cannot_be_written_still_serves_what_it_has() {
    let folder = tempfile::tempdir().unwrap();
    insert(&open(folder.path(), 1000), 1).unwrap();
    let v1 = folder.path().join("v1");
    if rustix::process::geteuid().is_root() {
        // Permissions do not stop root, but a folder of somebody else does.
        std::os::unix::fs::chown(&v1, Some(12345), None).unwrap();
    } else {
        fs::set_permissions(v1.join("tmp"), Permissions::from_mode(0o500)).unwrap();
    }
    let cache = open(folder.path(), 1000);
    assert!(matches!(insert(&cache, 2), Err(NotKept::Unusable(_))));
    assert!(cache.get(&block(1).0).is_some());
    fs::set_permissions(v1.join("tmp"), Permissions::from_mode(0o700)).unwrap();

    // No folder at all: everything is a miss.
    let file = folder.path().join("file");
    fs::write(&file, b"").unwrap();
    let cache = open(&file.join("cache"), 1000);
    assert!(matches!(insert(&cache, 2), Err(NotKept::Unusable(_))));
    assert_eq!((cache.get(&block(1).0), cache.counts().misses), (None, 1));
}

#[test]
fn a_folder_that_somebody_removes_is_made_again() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("cache");
    let cache = open(&dir, 1000);
    insert(&cache, 1).unwrap();
    fs::remove_dir_all(&dir).unwrap();
    assert_eq!(cache.get(&block(1).0), None);
    assert_eq!(insert(&cache, 1), Ok(Kept::New));
    assert_eq!(account(&dir), block(1).0.bytes);
}

#[test]
fn the_place_is_what_was_asked_for_or_the_users_caches_for_what_comes_over_a_network() {
    let at = |url, dir, xdg: Option<&str>, home: Option<&str>| {
        place(url, dir, xdg.map(OsString::from), home.map(OsString::from))
    };
    let some = |path: &str| Some(PathBuf::from(path));
    assert_eq!(at("file:///d", Some("/c"), None, None), some("/c"));
    assert_eq!(at("s3://b/d", Some("/c"), Some("/x"), Some("/h")), some("/c"));
    assert_eq!(at("s3://b/d", None, Some("/x"), Some("/h")), some("/x/cpcr/blocks"));
    assert_eq!(at("gs://b/d", None, Some("x"), Some("/h")), some("/h/.cache/cpcr/blocks"));
    assert_eq!(at("az://b/d", None, Some(""), None), None);
    assert_eq!(at("file:///d", None, Some("/x"), Some("/h")), None);
    assert_eq!(at("memory:///", None, Some("/x"), Some("/h")), None);
    assert!(BlockCache::for_dataset("file:///d", Some("/c"), 0).is_none());
}
