//! The loader: batches in the deal's order, prepared ahead by threads of its own.
//!
//! Each thread takes the next step that nobody has, at most `prefetch` ahead of the trainer, finds
//! its blocks, augments its samples, and leaves the batch for [`Loader::next`]. What a batch holds
//! depends on the plan alone, never on which thread made it or when. Memory is bounded by
//! `prefetch` batches and `cache_bytes` of decoded blocks.

use std::collections::{BTreeMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::augment::{Augmentation, Shape, zoom};
use super::cache::BlockCache;
use super::dataset::{Dataset, StopFlag};
use super::error::DataError;
use super::sampler::{Deal, DealSpec, Draw, Share};
use super::shard::SliceRow;
use crate::types::{Rank, Step, WorldSize};

/// What one rank loads.
#[derive(Debug, Clone)]
pub struct LoaderPlan {
    /// `train.seed`.
    pub seed: u64,
    /// This trainer.
    pub rank: Rank,
    /// How many there are.
    pub world: WorldSize,
    /// The first step to load a batch for.
    pub start: Step,
    /// The step to stop before.
    pub end: Step,
    /// Labelled samples in a global batch.
    pub batch_labelled: u32,
    /// Unlabelled samples in a global batch.
    pub batch_unlabelled: u32,
    /// How many labelled patients are used with their labels; the rest are unlabelled.
    pub labelled_patients: u32,
    /// Height and width that every slice is brought to.
    pub patch: Shape,
    /// Batches prepared ahead, at least one.
    pub prefetch: usize,
    /// Threads that prepare them, at least one.
    pub threads: usize,
    /// Bytes of decoded blocks kept. Below one block per unlabelled slot blocks are fetched anew.
    pub cache_bytes: usize,
    /// Whether slices are augmented; off for tests that compare pixels.
    pub augment: bool,
}

impl LoaderPlan {
    /// A budget that holds a block for each of 12 slots, and the labelled slices of 14 patients.
    pub const CACHE_BYTES: usize = 256 << 20;

    /// The deal that this plan loads from `dataset`.
    pub fn deal(&self, dataset: &Dataset) -> Result<Deal, DataError> {
        let (labelled, unlabelled) = dataset.manifest().pools(self.labelled_patients)?;
        Ok(Deal::new(DealSpec {
            seed: self.seed,
            labelled,
            unlabelled,
            block_rows: dataset.manifest().block_rows,
            batch_labelled: self.batch_labelled,
            batch_unlabelled: self.batch_unlabelled,
        })?)
    }
}

/// What one rank trains on in one step.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// The step it is for.
    pub step: Step,
    /// Channels of its images, at least one.
    pub channels: usize,
    /// `[n_labelled + n_unlabelled, channels, H, W]`, labelled first.
    pub images: Vec<f32>,
    /// `[n_labelled, H, W]`.
    pub labels: Vec<u8>,
    /// Labelled samples in it; may be none.
    pub n_labelled: usize,
    /// Unlabelled samples in it; may be none.
    pub n_unlabelled: usize,
    /// Which samples these are, labelled first.
    pub draws: Vec<Draw>,
    /// How long [`Loader::next`] waited for it.
    pub waited: Duration,
}

struct State {
    /// The next step that no thread has taken.
    next_taken: u64,
    /// The next step that [`Loader::next`] returns.
    next_given: u64,
    /// Finished, not yet given; at most `prefetch`.
    ready: BTreeMap<u64, Result<Batch, DataError>>,
}

struct Shared {
    dataset: Dataset,
    plan: LoaderPlan,
    deal: Deal,
    share: Share,
    cache: BlockCache,
    stop: StopFlag,
    state: Mutex<State>,
    /// A batch is ready, one was given, or it is time to stop.
    changed: Condvar,
}

/// Prepares batches ahead. Dropping it stops its threads and waits for them.
pub struct Loader {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Loader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Loader").field("plan", &self.shared.plan).finish_non_exhaustive()
    }
}

impl Loader {
    /// Checks the plan and starts the threads.
    pub fn start(dataset: Dataset, plan: LoaderPlan) -> Result<Self, DataError> {
        let deal = plan.deal(&dataset)?;
        let share = deal.share(plan.rank, plan.world)?;
        if plan.prefetch == 0 || plan.threads == 0 || plan.patch.0 == 0 || plan.patch.1 == 0 {
            return Err(DataError::Unusable(
                "the loader needs a prefetch, a thread and a patch of at least one".to_owned(),
            ));
        }
        let start = plan.start.0;
        let threads = plan.threads;
        let shared = Arc::new(Shared {
            cache: BlockCache::new(dataset.clone(), plan.cache_bytes),
            dataset,
            plan,
            deal,
            share,
            stop: StopFlag::default(),
            state: Mutex::new(State {
                next_taken: start,
                next_given: start,
                ready: BTreeMap::new(),
            }),
            changed: Condvar::new(),
        });
        let mut loader = Self { shared, threads: Vec::with_capacity(threads) };
        for number in 0..threads {
            let shared = Arc::clone(&loader.shared);
            let thread = std::thread::Builder::new().name(format!("cpcr-data-{number}"));
            let thread = thread.spawn(move || work(&shared));
            // On failure the threads that did start are stopped by the drop.
            loader.threads.push(thread.map_err(|error| DataError::Thread(error.to_string()))?);
        }
        Ok(loader)
    }

    /// The slots this rank serves.
    pub fn share(&self) -> &Share {
        &self.shared.share
    }

    /// The deal behind the batches.
    pub fn deal(&self) -> &Deal {
        &self.shared.deal
    }

    /// The next batch, waiting for it if need be; `None` when the plan's steps are done. After an
    /// error the loader has stopped.
    #[allow(clippy::should_implement_trait, reason = "it is fallible, which no iterator is")]
    pub fn next(&mut self) -> Result<Option<Batch>, DataError> {
        let asked = Instant::now();
        let shared = &self.shared;
        let mut state = shared.lock();
        loop {
            if shared.stop.is_stopped() {
                return Err(DataError::Stopped);
            }
            let step = state.next_given;
            if step >= shared.plan.end.0 {
                return Ok(None);
            }
            if let Some(batch) = state.ready.remove(&step) {
                state.next_given += 1;
                if batch.is_err() {
                    shared.stop.stop();
                }
                shared.changed.notify_all();
                return batch.map(|batch| Some(Batch { waited: asked.elapsed(), ..batch }));
            }
            state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        {
            let _state = self.shared.lock();
            self.shared.stop.stop();
        }
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            // A panic was caught and reported within the thread.
            thread.join().ok();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the next step, waiting while the trainer is too far behind.
    fn take(&self) -> Option<Step> {
        let mut state = self.lock();
        loop {
            if self.stop.is_stopped() || state.next_taken >= self.plan.end.0 {
                return None;
            }
            if state.next_taken < state.next_given + self.plan.prefetch as u64 {
                state.next_taken += 1;
                return Some(Step(state.next_taken - 1));
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Everything of one step, from the deal to pixels.
    fn prepare(&self, step: Step) -> Result<Batch, DataError> {
        let draws = self.deal.batch(step, &self.share);
        let n_labelled = self.share.labelled.len();
        let block_rows = self.dataset.manifest().block_rows;
        let wanted: HashSet<u64> = draws.iter().map(|draw| draw.sample / block_rows).collect();
        let blocks = self.cache.get_all(&wanted, &self.stop)?;
        let pixels = self.plan.patch.0 * self.plan.patch.1;
        let channels = self.dataset.manifest().channel_count();
        let mut images = Vec::with_capacity(draws.len() * channels * pixels);
        let mut labels = Vec::with_capacity(n_labelled * pixels);
        for (slot, draw) in draws.iter().enumerate() {
            let block = blocks.get(&(draw.sample / block_rows));
            let row = block.and_then(|block| block.get((draw.sample % block_rows) as usize));
            let row = row.ok_or_else(|| self.broken(*draw, "is not where the deal says"))?;
            self.add(row, *draw, slot < n_labelled, &mut images, &mut labels)?;
        }
        let n_unlabelled = draws.len() - n_labelled;
        let waited = Duration::ZERO;
        Ok(Batch { step, channels, images, labels, n_labelled, n_unlabelled, draws, waited })
    }

    fn add(
        &self,
        row: &SliceRow,
        draw: Draw,
        with_label: bool,
        images: &mut Vec<f32>,
        labels: &mut Vec<u8>,
    ) -> Result<(), DataError> {
        let augmentation = if self.plan.augment {
            Augmentation::draw(self.plan.seed, draw.epoch, draw.sample)
        } else {
            Augmentation::None
        };
        // One draw for all of a sample: its channels and its label stay on each other.
        for channel in row.image.chunks_exact(row.shape.0 * row.shape.1) {
            let (image, shape) = augmentation.apply(channel, row.shape);
            images.extend(zoom(&image, shape, self.plan.patch));
        }
        if with_label {
            let label = row.label.as_ref().ok_or_else(|| self.broken(draw, "has no label"))?;
            let (label, shape) = augmentation.apply(label, row.shape);
            labels.extend(zoom(&label, shape, self.plan.patch));
        }
        Ok(())
    }

    fn broken(&self, draw: Draw, why: &str) -> DataError {
        let name = &self.dataset.manifest().name;
        DataError::invalid(name, format!("training row {} {why}", draw.sample))
    }
}

/// One thread: takes steps and prepares them until there are no more, or one fails.
fn work(shared: &Shared) {
    while let Some(step) = shared.take() {
        let prepared = catch_unwind(AssertUnwindSafe(|| shared.prepare(step)));
        let batch = prepared.unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
            let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
            Err(DataError::Thread(text.unwrap_or_else(|| "it panicked".to_owned())))
        });
        let failed = batch.is_err();
        shared.lock().ready.insert(step.0, batch);
        shared.changed.notify_all();
        if failed {
            return;
        }
    }
}

#[cfg(test)]
#[path = "loader_tests.rs"]
mod tests;
