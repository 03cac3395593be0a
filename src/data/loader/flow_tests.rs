//! The loader's stages against stores that are slow, damaged, stuck or broken.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc;

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::sync::Barrier;

use super::schedule::Job;
use super::*;
use crate::data::manifest::Split;
use crate::data::source::{MemoryObjects, ObjectReader, SourceError};
use crate::data::write::{DatasetWriter, NewSlice, NewVolume, WriteOptions};

/// Rows of a block.
const ROWS: u64 = 8;

/// Volumes of eight slices, the first two labelled, in shards of `shard_blocks` blocks.
fn stored(volumes: u32, side: usize, shard_blocks: u32) -> Arc<MemoryObjects> {
    let objects = Arc::new(MemoryObjects::default());
    let options = WriteOptions {
        shard_blocks,
        zstd_level: 1,
        ..WriteOptions::new("flow", &["background", "heart"])
    };
    let mut writer = DatasetWriter::new(objects.clone(), options).unwrap();
    let slice = |volume: u32, slice: u32| NewSlice {
        slice,
        shape: (side, side),
        // Incompressible, so that blocks are about as large as their pixels.
        image: (0..(side * side) as u64)
            .map(|pixel| u64::from(volume * 8 + slice) << 32 | pixel)
            .map(|number| (crate::data::permutation::mix(number) >> 40) as f32 / 16_777_216.0)
            .collect(),
        label: (volume < 2 || volume == volumes).then(|| vec![0; side * side]),
    };
    futures::executor::block_on(async {
        for volume in 0..=volumes {
            let new = NewVolume {
                name: format!("v{volume}"),
                patient: format!("p{volume}"),
                split: if volume == volumes { Split::Val } else { Split::Train },
                spacing_mm: None,
                affine: None,
                slices: (0..8).map(|number| slice(volume, number)).collect(),
            };
            writer.add(new).await.unwrap();
        }
        writer.finish().await.unwrap();
    });
    objects
}

fn plan() -> LoaderPlan {
    LoaderPlan {
        seed: 11,
        rank: Rank(0),
        world: WorldSize(1),
        start: Step(0),
        end: Step(30),
        batch_labelled: 2,
        batch_unlabelled: 6,
        labelled_patients: 2,
        patch: (8, 8),
        prefetch: 3,
        threads: 2,
        fetches: 8,
        cache_bytes: LoaderPlan::CACHE_BYTES,
        augment: true,
    }
}

/// What a test does with the read of a row group, before it is served.
type Hook = dyn Fn(u64) -> BoxFuture<'static, ()> + Send + Sync;

/// Counts, and asks its hook with the number of each row group that is read (from zero).
struct Watched {
    objects: Arc<MemoryObjects>,
    bytes: AtomicU64,
    groups: AtomicU64,
    hook: Box<Hook>,
}

impl Watched {
    fn new(
        objects: Arc<MemoryObjects>,
        hook: impl Fn(u64) -> BoxFuture<'static, ()> + Send + Sync + 'static,
    ) -> Arc<Self> {
        let (bytes, groups) = (AtomicU64::new(0), AtomicU64::new(0));
        Arc::new(Self { objects, bytes, groups, hook: Box::new(hook) })
    }
}

impl ObjectReader for Watched {
    fn get<'a>(&'a self, path: &'a str) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        let len = self.objects.bytes(path).map_or(0, |bytes| bytes.len());
        self.bytes.fetch_add(len as u64, Ordering::SeqCst);
        self.objects.get(path)
    }

    fn get_range<'a>(
        &'a self,
        path: &'a str,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        self.bytes.fetch_add(range.end - range.start, Ordering::SeqCst);
        // A footer reaches to the end of its object.
        let footer = self.objects.bytes(path).is_some_and(|all| all.len() as u64 == range.end);
        Box::pin(async move {
            if !footer {
                (self.hook)(self.groups.fetch_add(1, Ordering::SeqCst)).await;
            }
            self.objects.get_range(path, range).await
        })
    }
}

fn served() -> BoxFuture<'static, ()> {
    Box::pin(std::future::ready(()))
}

fn never() -> BoxFuture<'static, ()> {
    Box::pin(std::future::pending())
}

fn start(reader: Arc<dyn ObjectReader>, plan: LoaderPlan) -> Loader {
    Loader::start(Dataset::open(reader).unwrap(), plan).unwrap()
}

/// Distinct blocks that `step` needs.
fn blocks_of(loader: &Loader, step: u64) -> BTreeSet<u64> {
    let draws = loader.deal().batch(Step(step), loader.share());
    draws.iter().map(|draw| draw.sample / ROWS).collect()
}

/// All batches up to the end or an error, and the error.
fn drain(loader: &mut Loader) -> (Vec<Batch>, Option<DataError>) {
    let mut batches = Vec::new();
    loop {
        match loader.next() {
            Ok(Some(batch)) => batches.push(batch),
            Ok(None) => return (batches, None),
            Err(error) => return (batches, Some(error)),
        }
    }
}

#[test]
fn one_thread_has_many_fetches_in_flight() {
    let together = Arc::new(Barrier::new(6));
    let all_met = Arc::new(AtomicBool::new(false));
    let met = Arc::clone(&all_met);
    let reader = Watched::new(stored(40, 8, 4), move |number| {
        let (together, met) = (Arc::clone(&together), Arc::clone(&met));
        Box::pin(async move {
            if number < 6 {
                // Were there fewer at once, they would wait here for ever.
                let wait = tokio::time::timeout(Duration::from_secs(20), together.wait());
                met.fetch_or(wait.await.is_ok(), Ordering::SeqCst);
            }
        })
    });
    let mut loader = start(reader, LoaderPlan { threads: 1, ..plan() });
    assert_eq!(drain(&mut loader).0.len(), 30);
    assert!(all_met.load(Ordering::SeqCst));
}

#[test]
fn there_are_no_more_fetches_in_flight_than_allowed() {
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let counted = (Arc::clone(&now), Arc::clone(&most));
    let reader = Watched::new(stored(40, 8, 4), move |_| {
        let (now, most) = counted.clone();
        Box::pin(async move {
            most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            tokio::task::yield_now().await;
            now.fetch_sub(1, Ordering::SeqCst);
        })
    });
    let mut loader = start(reader, LoaderPlan { fetches: 3, ..plan() });
    assert_eq!(drain(&mut loader).0.len(), 30);
    assert_eq!(most.load(Ordering::SeqCst), 3);
}

/// Only the blocks of the first step are ever served, in pools of any size: were another one waited for, or
/// anything listed or skipped through, no batch would come.
#[test]
fn the_first_batch_in_the_middle_of_an_epoch_needs_its_own_blocks_only() {
    for volumes in [20, 400] {
        let objects = stored(volumes, 4, 4);
        let middle = u64::from(volumes) * 8 / 6 / 2;
        let plan = LoaderPlan { start: Step(middle), end: Step(middle + 20), ..plan() };
        let dataset = Dataset::open(objects.clone()).unwrap();
        let deal = plan.deal(&dataset).unwrap();
        let share = deal.share(plan.rank, plan.world).unwrap();
        let draws = deal.batch(plan.start, &share);
        let own: BTreeSet<u64> = draws.iter().map(|draw| draw.sample / ROWS).collect();
        let own = own.len() as u64;
        let reader =
            Watched::new(objects, move |number| if number < own { served() } else { never() });
        let batch = start(reader, plan).next().unwrap().unwrap();
        assert_eq!((batch.step, batch.draws), (Step(middle), draws));
    }
}

#[test]
fn dropping_it_in_mid_flight_cancels_its_fetches() {
    /// Tells when it is dropped.
    struct Told(mpsc::Sender<()>);
    impl Drop for Told {
        fn drop(&mut self) {
            self.0.send(()).ok();
        }
    }
    let (begun, has_begun) = mpsc::channel();
    let (ended, has_ended) = mpsc::channel();
    let reader = Watched::new(stored(40, 8, 4), move |_| {
        begun.send(()).ok();
        let told = Told(ended.clone());
        Box::pin(async move {
            let _told = told;
            std::future::pending::<()>().await;
        })
    });
    let loader = start(reader, plan());
    let patience = Duration::from_secs(20);
    let first = blocks_of(&loader, 0).len().min(plan().fetches);
    for _ in 0..first {
        has_begun.recv_timeout(patience).unwrap();
    }
    let shared = Arc::downgrade(&loader.shared);
    drop(loader);
    for _ in 0..first {
        has_ended.recv_timeout(patience).unwrap();
    }
    // The threads are joined; the task may hold its last reference for a moment longer.
    assert!(shared.strong_count() <= 1);
}

#[test]
fn no_more_than_prefetch_is_prepared() {
    let mut loader = start(stored(40, 8, 4), plan());
    loader.next().unwrap().unwrap();
    let mut state = loader.shared.lock();
    while state.ready.len() < 3 {
        state = loader.shared.ready.wait(state).unwrap();
    }
    assert!(state.schedule.is_full());
    assert!(state.schedule.next_job().is_none_or(|job| matches!(job, Job::Decode { .. })));
    drop(state);
    assert_eq!(loader.stats().ready, 3);
}

#[test]
fn a_damaged_shard_is_told_at_its_place_after_the_batches_before_it() {
    let objects = stored(40, 8, 1);
    let shard = "shards/train-00025.parquet";
    let mut bytes = objects.bytes(shard).unwrap().to_vec();
    bytes[10] ^= 1;
    objects.replace(shard, bytes.into());
    for (threads, cache_bytes) in [(1, LoaderPlan::CACHE_BYTES), (4, 1), (4, 20_000)] {
        let mut loader =
            start(objects.clone(), LoaderPlan { threads, cache_bytes, end: Step(60), ..plan() });
        let failing = (0..60).find(|step| blocks_of(&loader, *step).contains(&25)).unwrap();
        assert!(failing > 3, "step {failing} is too early to show anything");
        let (batches, error) = drain(&mut loader);
        assert_eq!(batches.len() as u64, failing);
        let error = error.unwrap();
        assert!(matches!(&error, DataError::Damaged { object, .. } if object == shard), "{error}");
        assert!(matches!(loader.next(), Err(DataError::Stopped)));
    }
}

#[test]
fn a_panic_in_a_fetch_is_an_error() {
    let reader = Watched::new(stored(40, 8, 4), |number| {
        assert!(number != 12, "the store's bug");
        served()
    });
    let (batches, error) = drain(&mut start(reader, plan()));
    assert!(batches.len() < 30);
    assert!(
        matches!(&error, Some(DataError::Thread(why)) if why == "the store's bug"),
        "{error:?}"
    );
}

#[test]
fn a_panic_in_a_stage_is_an_error() {
    let shared = Arc::clone(&start(stored(10, 8, 4), plan()).shared);
    shared.lock().stopped = false;
    stages::fail_next(&shared, Box::new("a stage's bug".to_owned()));
    let mut loader = Loader { shared, fetching: None, threads: Vec::new() };
    let (_, error) = drain(&mut loader);
    assert!(matches!(&error, Some(DataError::Thread(why)) if why == "a stage's bug"), "{error:?}");
}

/// A worker reads its slots' stretches and no more: ceil(B / W) / B of the pool, and two shards.
#[test]
fn a_worker_fetches_its_share_of_the_pool_plus_two_shards() {
    let objects = stored(320, 24, 8);
    let dataset = Dataset::open(objects.clone()).unwrap();
    let shards: Vec<u64> = dataset.manifest().shards.iter().map(|s| s.digest.bytes).collect();
    let pool: u64 = shards.iter().sum();
    let shard = shards[0];
    assert!(shards.len() > 40);
    let batch = 12_u32;
    let rows = dataset.manifest().rows(Split::Train) - 16;
    for world in 1..=8_u32 {
        for rank in [0, world - 1] {
            let reader = Watched::new(objects.clone(), |_| served());
            let plan = LoaderPlan {
                rank: Rank(rank),
                world: WorldSize(world),
                batch_labelled: 0,
                batch_unlabelled: batch,
                end: Step(rows / u64::from(batch)),
                // Room for the blocks in use and little more: far less than the pool.
                cache_bytes: 40 * 8 * 24 * 24 * 4,
                ..plan()
            };
            assert!((plan.cache_bytes as u64) < pool / 5);
            let manifest = objects.bytes("manifest.json").unwrap().len() as u64;
            let mut loader = start(reader.clone(), plan);
            assert!(drain(&mut loader).1.is_none());
            let read = reader.bytes.load(Ordering::SeqCst) - manifest;
            let most = pool * u64::from(batch.div_ceil(world)) / u64::from(batch) + 2 * shard;
            assert!(read <= most, "rank {rank} of {world}: {read} bytes, {most} allowed");
            assert!(read > pool / u64::from(world) / 2, "rank {rank} of {world}: {read} bytes");
        }
    }
}

#[test]
fn its_figures_tell_what_it_did() {
    let reader = Watched::new(stored(40, 8, 4), |_| served());
    let mut loader = start(reader.clone(), plan());
    let (batches, error) = drain(&mut loader);
    assert!(error.is_none());
    let stats = loader.stats();
    assert_eq!(stats.batches, batches.len() as u64);
    assert_eq!(stats.blocks, reader.groups.load(Ordering::SeqCst));
    assert!(stats.block_bytes > stats.blocks * 8 * 8 * 8 * 3);
    assert!(stats.decode_s > 0.0 && stats.augment_s > 0.0 && stats.fetch_s > 0.0);
    let waited: f64 = batches.iter().map(|batch| batch.waited.as_secs_f64()).sum();
    assert!((stats.trainer_waited_s - waited).abs() < 1e-6);
    assert_eq!((stats.fetching, stats.undecoded, stats.ready), (0, 0, 0));
    assert!(stats.kept_bytes > 0);
}
