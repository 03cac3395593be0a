//! What one of our own contenders does, in a process of its own: its memory is its own too.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use bytes::Bytes;
use futures::StreamExt;
use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};

use super::{BATCH, DataBenchError, Reading};
use crate::bench::{cpu_seconds, peak_rss_mib};
use crate::bridge::alloc;
use crate::data::source::{ObjectReader, SourceError};
use crate::data::{Dataset, Loader, LoaderPlan, Split};
use crate::store::{BlockCache, BlockCacheOptions, Store, StoreOptions};
use crate::types::{Rank, Step, WorldSize};

/// Objects that the bare loop fetches side by side.
const GETS: usize = 8;

/// What a disk cache may take: more than the pool.
const CACHE_BYTES: u64 = 64 << 30;

/// What a contender is to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "task", rename_all = "snake_case")]
pub enum Task {
    /// Fetches every shard of the dataset and looks at none.
    Get {
        /// The dataset.
        url: String,
    },
    /// Loads batches as a trainer does: verified and decoded, in the deal's order, not augmented.
    Read {
        /// The dataset.
        url: String,
        /// Workers.
        world: u32,
        /// Which of them this is.
        rank: u32,
        /// Which steps; else those of one whole epoch.
        steps: Option<Range<u64>>,
        /// Where to keep blocks on disk.
        cache: Option<String>,
    },
}

impl Task {
    /// One epoch of one worker.
    pub(super) fn epoch(url: &str, world: u32, rank: u32) -> Self {
        Self::Read { url: url.to_owned(), world, rank, steps: None, cache: None }
    }

    /// The same with a disk cache in `folder`.
    pub(super) fn cached(mut self, folder: &Path) -> Self {
        if let Self::Read { cache, .. } = &mut self {
            *cache = Some(folder.display().to_string());
        }
        self
    }
}

/// Does it.
///
/// # Errors
/// [`DataBenchError`] when data cannot be read.
pub fn perform(task: &Task) -> Result<Reading, DataBenchError> {
    // As in a trainer's process. The bare loop gains most from it.
    alloc::tune();
    match task {
        Task::Get { url } => get(url),
        Task::Read { url, world, rank, steps, cache } => {
            read(url, WorldSize(*world), Rank(*rank), steps.clone(), cache.as_deref())
        }
    }
}

/// A reader that counts what passes through it.
struct Counting {
    inner: Store,
    bytes: AtomicU64,
    requests: AtomicU64,
}

impl Counting {
    fn count(&self, bytes: Result<Bytes, SourceError>) -> Result<Bytes, SourceError> {
        let bytes = bytes?;
        self.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.requests.fetch_add(1, Ordering::Relaxed);
        Ok(bytes)
    }
}

impl ObjectReader for Counting {
    fn get<'a>(&'a self, path: &'a str) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        Box::pin(async move { self.count(ObjectReader::get(&self.inner, path).await) })
    }

    fn get_range<'a>(
        &'a self,
        path: &'a str,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        Box::pin(async move { self.count(ObjectReader::get_range(&self.inner, path, range).await) })
    }
}

fn read(
    url: &str,
    world: WorldSize,
    rank: Rank,
    steps: Option<Range<u64>>,
    cache: Option<&str>,
) -> Result<Reading, DataBenchError> {
    let (began, cpu_began) = (Instant::now(), cpu_seconds("self"));
    let inner = Store::open(url, &StoreOptions::default().existing())?;
    let counting =
        Arc::new(Counting { inner, bytes: AtomicU64::new(0), requests: AtomicU64::new(0) });
    let cache = cache.map(|dir| BlockCache::open(BlockCacheOptions::new(dir, CACHE_BYTES)));
    let dataset = Dataset::open_cached(Arc::clone(&counting) as Arc<dyn ObjectReader>, cache)?;
    let rows = dataset.manifest().rows(Split::Train);
    let steps = steps.unwrap_or(0..rows / u64::from(BATCH));
    let mut loader = Loader::start(dataset.clone(), plan(&dataset, world, rank, &steps)?)?;
    let (mut images, mut first_batch_s) = (0, None);
    while let Some(batch) = loader.next()? {
        first_batch_s.get_or_insert_with(|| began.elapsed().as_secs_f64());
        images += batch.draws.len() as u64;
    }
    let seconds = began.elapsed().as_secs_f64();
    Ok(Reading {
        images,
        seconds,
        first_batch_s: first_batch_s.unwrap_or(seconds),
        cpu_s: cpu_seconds("self") - cpu_began,
        peak_rss_mib: peak_rss_mib("self"),
        bytes: counting.bytes.load(Ordering::Relaxed),
        requests: counting.requests.load(Ordering::Relaxed),
    })
}

/// The unlabelled stream alone, slices as they are.
fn plan(
    dataset: &Dataset,
    world: WorldSize,
    rank: Rank,
    steps: &Range<u64>,
) -> Result<LoaderPlan, DataBenchError> {
    let first = dataset.load_volume(crate::data::VolumeId(0))?;
    Ok(LoaderPlan {
        seed: 1,
        rank,
        world,
        start: Step(steps.start),
        end: Step(steps.end),
        batch_labelled: 0,
        batch_unlabelled: BATCH,
        labelled_patients: 0,
        patch: (first.shape[1], first.shape[2]),
        prefetch: 4,
        threads: 1,
        fetches: 16,
        cache_bytes: LoaderPlan::CACHE_BYTES,
        augment: false,
    })
}

/// Every shard, whole, as fast as they come.
fn get(url: &str) -> Result<Reading, DataBenchError> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.map_err(DataBenchError::io("start a runtime"))?;
    let (began, cpu_began) = (Instant::now(), cpu_seconds("self"));
    let store = Store::open(url, &StoreOptions::default().existing())?;
    let dataset = Dataset::open(Arc::new(store.clone()))?;
    let (store, shards) = (&store, &dataset.manifest().shards);
    let (mut bytes, mut first_batch_s) = (0, None);
    runtime.block_on(async {
        let gets = shards.iter().map(|shard| store.get(&shard.object));
        let mut gets = futures::stream::iter(gets).buffer_unordered(GETS);
        while let Some(object) = gets.next().await {
            bytes += object?.len() as u64;
            first_batch_s.get_or_insert_with(|| began.elapsed().as_secs_f64());
        }
        Ok::<_, DataBenchError>(())
    })?;
    let seconds = began.elapsed().as_secs_f64();
    Ok(Reading {
        images: shards.iter().map(|shard| shard.rows).sum(),
        seconds,
        first_batch_s: first_batch_s.unwrap_or(seconds),
        cpu_s: cpu_seconds("self") - cpu_began,
        peak_rss_mib: peak_rss_mib("self"),
        bytes,
        requests: shards.len() as u64,
    })
}
