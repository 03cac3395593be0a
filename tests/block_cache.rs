//! The block cache over processes: writers killed at any moment, two limits at once, full disks, and runs that no longer
//! need the network.
//!
//! The processes are this test binary again: it runs [`as_a_process`] alone, with its part in the environment.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)] // The lint's exception for tests stops at their helpers.

mod support;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use cpcr::data::source::{FolderObjects, ObjectReader, SourceError};
use cpcr::data::synth::{self, SynthOptions};
use cpcr::data::write::Work;
use cpcr::data::{Dataset, Split};
use cpcr::store::{BlockCache, BlockCacheCounts, BlockCacheOptions, Kept, NotKept};
use cpcr::types::ObjectDigest;
use futures::future::BoxFuture;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use support::{launch, skipped, succeed, text};

/// The part of a process, as `name argument…`; unset where the test binary was started by hand.
const PART: &str = "CPCR_TEST_BLOCK_CACHE_PART";
/// How long a process may live if nobody ends it.
const LIFE_MAX: Duration = Duration::from_secs(60);
/// Different blocks that the hammering processes know: ten times what fits.
const BLOCKS: u64 = 100;

/// The `n`-th block: half a KiB to 16.
fn block(n: u64) -> (ObjectDigest, Vec<u8>) {
    let mut bytes: Vec<u8> = (0..512 * (1 + n % 32)).map(|at| (n + at * 7) as u8).collect();
    bytes[..8].copy_from_slice(&n.to_le_bytes());
    (ObjectDigest::of(&bytes), bytes)
}

fn open(dir: &Path, limit_bytes: u64) -> BlockCache {
    let options = BlockCacheOptions::new(dir, limit_bytes);
    BlockCache::open(BlockCacheOptions { keep_free_bytes: Some(0), ..options })
}

fn this_binary() -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(AS_A_PROCESS).stdin(Stdio::piped()).stdout(Stdio::piped());
    command
}

const AS_A_PROCESS: [&str; 3] = ["--exact", "as_a_process", "--nocapture"];

/// What the other tests start. Run by hand it has no part and does nothing.
#[test]
fn as_a_process() {
    let Ok(part) = std::env::var(PART) else { return };
    let words: Vec<&str> = part.split('\n').collect();
    let dir = Path::new(words[1]);
    match words[0] {
        "hammer" => hammer(dir, words[2].parse().unwrap(), words[3].parse().unwrap()),
        "fill" => fill(dir),
        "pass" => println!("\nread {:?}", pass(dir, Path::new(words[2]))),
        other => panic!("{other}?"),
    }
}

/// Gets and inserts blocks on three threads until killed, or until its standard input ends.
fn hammer(dir: &Path, limit_bytes: u64, seed: u64) {
    let cache = open(dir, limit_bytes);
    let threads: Vec<_> = (0..3)
        .map(|number| {
            let cache = cache.clone();
            thread::spawn(move || {
                let mut rng = ChaCha8Rng::seed_from_u64(seed * 3 + number);
                let started = Instant::now();
                while started.elapsed() < LIFE_MAX {
                    let (digest, bytes) = block(rng.next_u64() % BLOCKS);
                    match cache.get(&digest) {
                        Some(found) if found != bytes => std::process::exit(3),
                        Some(_) => {}
                        None => drop(cache.insert(&digest, &bytes)),
                    }
                }
            })
        })
        .collect();
    println!("\ngoing");
    let mut nothing = Vec::new();
    std::io::stdin().read_to_end(&mut nothing).unwrap();
    drop(threads);
    println!("{}", cache.counts());
    std::process::exit(0);
}

/// A process that hammers, and has begun to.
fn hammering(dir: &Path, limit_bytes: u64, seed: u64) -> Child {
    let part = format!("hammer\n{}\n{limit_bytes}\n{seed}", dir.display());
    let mut child = this_binary().env(PART, part).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "going"));
    child
}

/// Real lengths of all files but the account: blocks and what is being written, with nobody changing their number.
fn bytes_in(dir: &Path) -> u64 {
    let lock = File::open(dir.join("v1/account")).unwrap();
    lock.lock().unwrap();
    let folders = fs::read_dir(dir.join("v1")).unwrap().map(|entry| entry.unwrap().path());
    let files = folders.filter(|path| path.is_dir()).flat_map(|part| fs::read_dir(part).unwrap());
    // A writer that gives up removes its own file without the lock, if that is not to be had.
    files.map(|file| file.unwrap().metadata().map_or(0, |found| found.len())).sum()
}

fn account(dir: &Path) -> u64 {
    fs::read_to_string(dir.join("v1/account")).unwrap().trim().parse().unwrap()
}

/// Every block that is there is right; how many are.
fn intact(cache: &BlockCache, known: &[(ObjectDigest, Vec<u8>)]) -> usize {
    let found = known.iter().filter(|(digest, bytes)| {
        cache.get(digest).inspect(|found| assert_eq!(found, bytes)).is_some()
    });
    let count = found.count();
    assert_eq!(cache.counts().corrupt, 0);
    count
}

#[test]
fn writers_killed_at_any_moment_leave_a_sound_cache_within_its_limit_and_no_lock() {
    const ROUNDS: u64 = 200;
    const LIMITS: [u64; 2] = [80 << 10, 50 << 10];
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let known: Vec<_> = (0..BLOCKS).map(block).collect();
    let (mut left_by_the_dead, mut kept) = (0, 0);
    for round in 0..ROUNDS {
        // Every fourth round has two processes with different limits, which die one after the other.
        let count = if round % 4 == 0 { 2 } else { 1 };
        let mut children: Vec<_> = LIMITS[..count]
            .iter()
            .zip(1..)
            .map(|(limit, number)| hammering(dir, *limit, round * 2 + number))
            .collect();
        for child in &mut children {
            thread::sleep(Duration::from_micros(rng.next_u64() % 20_000));
            child.kill().unwrap();
            let status = child.wait().unwrap();
            assert_eq!(status.code(), None, "round {round}: {status}, not killed");
            let bytes = bytes_in(dir);
            assert!(bytes <= LIMITS[0], "round {round}: {bytes} bytes");
        }
        left_by_the_dead += fs::read_dir(dir.join("v1/tmp")).unwrap().count();

        let started = Instant::now();
        let cache = open(dir, LIMITS[0]);
        let (digest, bytes) = block(BLOCKS + round);
        assert_eq!(cache.insert(&digest, &bytes), Ok(Kept::New), "round {round}");
        assert_eq!(cache.get(&digest).unwrap(), bytes);
        // A lock left behind would have been an error above; this is generous to a busy machine.
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
        assert_eq!(fs::read_dir(dir.join("v1/tmp")).unwrap().count(), 0, "round {round}");
        assert_eq!(account(dir), bytes_in(dir), "round {round}");
        kept += intact(&cache, &known);
    }
    // Or the rounds have shown nothing.
    assert!(left_by_the_dead > 0 && kept > 1000, "{left_by_the_dead} torn, {kept} kept");
}

#[test]
fn processes_with_different_limits_keep_to_the_larger_one_and_to_the_smaller_when_alone() {
    const LIMITS: [u64; 2] = [80 << 10, 30 << 10];
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let mut children = LIMITS.map(|limit| hammering(dir, limit, limit));
    let (mut seen, mut looks) = (0, 0);
    let started = Instant::now();
    // On a busy machine the one with the larger limit may take a while to get there.
    while looks < 200 || seen <= LIMITS[1] {
        assert!(started.elapsed() < LIFE_MAX, "the larger limit was never used: {seen}");
        let bytes = bytes_in(dir);
        assert!(bytes <= LIMITS[0], "{bytes}");
        (seen, looks) = (seen.max(bytes), looks + 1);
    }
    let ended = |child: &mut Child| {
        drop(child.stdin.take());
        assert!(child.wait().unwrap().success(), "wrong bytes were read");
    };
    ended(&mut children[0]);
    // What was kept meanwhile goes with the next insertions of the other one.
    let started = Instant::now();
    while bytes_in(dir) > LIMITS[1] {
        assert!(started.elapsed() < LIFE_MAX, "{} bytes", bytes_in(dir));
        thread::yield_now();
    }
    for _ in 0..50 {
        assert!(bytes_in(dir) <= LIMITS[1]);
    }
    ended(&mut children[1]);
    // Whatever there is, is right; there may be none, if the last thing that happened was three reservations.
    let known: Vec<_> = (0..BLOCKS).map(block).collect();
    let cache = open(dir, LIMITS[1]);
    intact(&cache, &known);
    let (digest, bytes) = block(BLOCKS);
    assert_eq!(cache.insert(&digest, &bytes), Ok(Kept::New));
    assert_eq!(cache.get(&digest).unwrap(), bytes);
}

/// Fills a cache on a disk that is smaller than its limit.
fn fill(dir: &Path) {
    let cache = open(dir, 1 << 30);
    let outcomes: Vec<_> = (0..100)
        .map(|n| {
            let (digest, bytes) = block(n);
            (n, cache.insert(&digest, &bytes))
        })
        .collect();
    for (n, outcome) in &outcomes {
        let (digest, bytes) = block(*n);
        match outcome {
            Ok(Kept::New) => assert_eq!(cache.get(&digest).unwrap(), bytes),
            Ok(Kept::AlreadyThere) => {}
            Err(NotKept::NoSpace(_)) => assert_eq!(cache.get(&digest), None),
            Err(other) => panic!("{other}"),
        }
    }
    let BlockCacheCounts { inserted, no_space, corrupt, .. } = cache.counts();
    assert!(inserted > 0 && no_space > 0 && corrupt == 0, "{}", cache.counts());
    assert_eq!(fs::read_dir(dir.join("v1/tmp")).unwrap().count(), 0);
    assert_eq!(account(dir), bytes_in(dir));
}

/// A shell that prepares the disk, then this binary in its place.
fn filling(program: &[&str], script: &str, dir: &Path) {
    let mut command = Command::new(program[0]);
    command.args(&program[1..]).args(["sh", "-c", &format!("{script}; exec \"$@\""), "sh"]);
    command.arg(std::env::current_exe().unwrap()).args(AS_A_PROCESS);
    let output = command.env(PART, format!("fill\n{}", dir.display())).output().unwrap();
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    assert!(text(&output.stdout).contains("1 passed"), "{}", text(&output.stdout));
}

#[test]
fn on_a_full_disk_it_goes_on_with_what_it_has() {
    // Files beyond some KiB cannot be written: everywhere, also halfway through a block.
    let folder = tempfile::tempdir().unwrap();
    filling(&["env"], "trap '' XFSZ; ulimit -f 8", folder.path());

    let mount = |options: &str, dir: &Path| {
        format!("mount -t tmpfs -o {options} tmpfs '{}' || exit 9", dir.display())
    };
    let alone = ["unshare", "--user", "--map-root-user", "--mount"];
    let try_out = mount("size=128k", folder.path());
    let tried = Command::new(alone[0]).args(&alone[1..]).args(["sh", "-c", &try_out]).output();
    if !tried.is_ok_and(|output| output.status.success()) {
        return skipped("a full tmpfs", "no mounts in user namespaces here");
    }
    // Out of space, and out of files: the latter is found out only by trying.
    for options in ["size=128k", "size=10m,nr_inodes=40"] {
        let folder = tempfile::tempdir().unwrap();
        filling(&alone, &mount(options, folder.path()), folder.path());
    }
}

/// Counts what is read of a folder.
struct Counting {
    objects: FolderObjects,
    whole: Arc<AtomicU64>,
    ranges: Arc<AtomicU64>,
}

impl ObjectReader for Counting {
    fn get<'a>(&'a self, path: &'a str) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        self.whole.fetch_add(1, Ordering::SeqCst);
        self.objects.get(path)
    }

    fn get_range<'a>(
        &'a self,
        path: &'a str,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        self.ranges.fetch_add(1, Ordering::SeqCst);
        self.objects.get_range(path, range)
    }
}

/// Opens a dataset and loads every volume; (whole objects, ranges) read for that.
fn pass(data: &Path, cache: &Path) -> (u64, u64) {
    let (whole, ranges) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let objects = FolderObjects::new(data);
    let reader = Counting { objects, whole: Arc::clone(&whole), ranges: Arc::clone(&ranges) };
    let dataset = Dataset::open_cached(Arc::new(reader), Some(open(cache, 1 << 30))).unwrap();
    for volume in Split::ALL.into_iter().flat_map(|split| dataset.volumes(split)) {
        dataset.load_volume(volume).unwrap();
    }
    let counts = dataset.cache_counts().unwrap();
    assert_eq!(counts.misses, counts.inserted + counts.already_there, "{counts}");
    (whole.load(Ordering::SeqCst), ranges.load(Ordering::SeqCst))
}

#[test]
fn a_second_pass_and_a_second_process_read_the_manifest_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let [data, cache] = ["data", "cache"].map(|name| folder.path().join(name));
    let options =
        SynthOptions { train_patients: 4, val_patients: 1, test_patients: 1, ..Default::default() };
    let sink = Arc::new(FolderObjects::new(&data));
    futures::executor::block_on(synth::write(sink, &options, &Work::on(2))).unwrap();

    let (whole, ranges) = pass(&data, &cache);
    assert!(whole > 2 && ranges > 3, "{whole} {ranges}");
    // The manifest, which has no digest, is read until two answers agree.
    assert_eq!(pass(&data, &cache), (2, 0));
    let part = format!("pass\n{}\n{}", data.display(), cache.display());
    let output = this_binary().env(PART, part).output().unwrap();
    assert!(text(&output.stdout).contains("read (2, 0)"), "{}", text(&output.stdout));

    // A flipped byte is fetched again, and only that block.
    let blocks: Vec<PathBuf> = fs::read_dir(cache.join("v1"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir() && !path.ends_with("tmp"))
        .flat_map(|part| fs::read_dir(part).unwrap().map(|file| file.unwrap().path()))
        .collect();
    let largest = blocks.iter().max_by_key(|path| path.metadata().unwrap().len()).unwrap();
    let mut bytes = fs::read(largest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(largest, bytes).unwrap();
    assert_eq!(pass(&data, &cache), (2, 1));
    assert_eq!(pass(&data, &cache), (2, 0));
}

/// The whole, as a user starts it: with a warm cache the shards are not read at all, so they may be gone.
#[test]
fn a_second_run_trains_without_the_shards() {
    let folder = tempfile::tempdir().unwrap();
    let data = support::dataset(folder.path());
    let cache = format!("loader.cache_dir={}", folder.path().join("cache").display());
    let run = |name: &str| {
        let set = ["train.iterations=12", &cache, "loader.cache_gib=1"];
        launch(folder.path(), &data, name, 1, &set).output().unwrap()
    };
    succeed(&run("first"));
    fs::remove_dir_all(data.join("shards")).unwrap();
    succeed(&run("second"));
}
