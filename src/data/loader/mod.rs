//! The loader: batches in the deal's order, prepared ahead of the trainer in stages.
//!
//! ```text
//! deal ─► fetch (async, `fetches` at once) ─► decode ─► augment + batch ─► Loader::next
//!                                             └ `threads` threads of its own ┘
//! ```
//!
//! What is done next is decided in one place, `schedule`, under one lock; `stages` does it. A thread
//! takes whatever the earliest unfinished step needs, so decoding and augmenting share the threads as the
//! work falls. What a batch holds depends on the plan alone, never on which thread made it or when.
//!
//! Memory is bounded by `prefetch` batches, `cache_bytes` of decoded blocks, and the blocks on their way
//! (at most twice as many as fetches and slots). An error comes at its step's place in the order, after
//! the batches before it.

mod schedule;
mod stages;
mod stats;

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::task::AbortHandle;

use super::augment::Shape;
use super::dataset::{Dataset, EncodedBlock};
use super::error::DataError;
use super::sampler::{Deal, DealSpec, Draw, Share};
use super::shard::SliceRow;
use crate::types::{Rank, Step, WorldSize};
use schedule::{Bounds, Schedule};
pub use stats::{LoaderStats, Stage};

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
    /// Threads that decode, augment and batch, at least one.
    pub threads: usize,
    /// Blocks fetched side by side, at least one.
    pub fetches: usize,
    /// Bytes of decoded blocks kept. Where one step alone needs more, it gets it, and blocks are fetched anew.
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

/// A decoded block.
type Rows = Arc<Vec<SliceRow>>;

struct State {
    schedule: Schedule<EncodedBlock, Rows>,
    /// Finished, not yet given; at most `prefetch`.
    ready: BTreeMap<u64, Batch>,
    stats: LoaderStats,
    stopped: bool,
}

struct Shared {
    dataset: Dataset,
    plan: LoaderPlan,
    deal: Deal,
    share: Share,
    state: Mutex<State>,
    /// For the threads: there may be work, or it is time to stop.
    work: Condvar,
    /// For the fetching task: there may be something to fetch.
    room: Notify,
    /// For the trainer: a batch is ready, or there will be none.
    ready: Condvar,
}

/// Prepares batches ahead. Dropping it stops its threads and its fetches.
pub struct Loader {
    shared: Arc<Shared>,
    fetching: Option<AbortHandle>,
    threads: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Loader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Loader").field("plan", &self.shared.plan).finish_non_exhaustive()
    }
}

impl Loader {
    /// Checks the plan and starts fetching.
    ///
    /// # Errors
    /// [`DataError::Unusable`] and [`DataError::Deal`] for a plan that cannot be;
    /// [`DataError::Thread`] where the system gives no threads.
    pub fn start(dataset: Dataset, plan: LoaderPlan) -> Result<Self, DataError> {
        let deal = plan.deal(&dataset)?;
        let share = deal.share(plan.rank, plan.world)?;
        let counts = [plan.prefetch, plan.threads, plan.fetches, plan.patch.0, plan.patch.1];
        if counts.contains(&0) {
            return Err(DataError::Unusable(
                "the loader needs a prefetch, a thread, a fetch and a patch of at least one"
                    .to_owned(),
            ));
        }
        let bounds = Bounds {
            end: plan.end,
            prefetch: plan.prefetch,
            fetches: plan.fetches,
            budget_bytes: plan.cache_bytes,
        };
        let schedule = Schedule::new(deal.clone(), share.clone(), plan.start, bounds);
        let threads = plan.threads;
        let shared = Arc::new(Shared {
            dataset,
            plan,
            deal,
            share,
            state: Mutex::new(State {
                schedule,
                ready: BTreeMap::new(),
                stats: LoaderStats::default(),
                stopped: false,
            }),
            work: Condvar::new(),
            room: Notify::new(),
            ready: Condvar::new(),
        });
        // On failure what did start is stopped by the drop.
        let mut loader = Self { shared, fetching: None, threads: Vec::with_capacity(threads) };
        let fetch = stages::fetch(Arc::clone(&loader.shared));
        loader.fetching = Some(loader.shared.dataset.spawn(fetch)?);
        for number in 0..threads {
            let shared = Arc::clone(&loader.shared);
            let thread = std::thread::Builder::new().name(format!("cpcr-data-{number}"));
            let thread = thread.spawn(move || stages::work(&shared));
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

    /// What its stages have done so far.
    pub fn stats(&self) -> LoaderStats {
        self.shared.lock().stats()
    }

    /// The next batch, waiting for it if need be; `None` when the plan's steps are done.
    ///
    /// # Errors
    /// Why this step cannot be made. After an error the loader has stopped.
    #[allow(clippy::should_implement_trait, reason = "it is fallible, which no iterator is")]
    pub fn next(&mut self) -> Result<Option<Batch>, DataError> {
        let asked = Instant::now();
        let shared = &self.shared;
        let mut state = shared.lock();
        loop {
            if state.stopped {
                return Err(DataError::Stopped);
            }
            let Some(step) = state.schedule.next_given() else { return Ok(None) };
            if let Some(batch) = state.ready.remove(&step.0) {
                state.schedule.give();
                let waited = asked.elapsed();
                state.stats.batches += 1;
                state.stats.trainer_waited_s += waited.as_secs_f64();
                shared.changed();
                return Ok(Some(Batch { waited, ..batch }));
            }
            if let Some(error) = state.schedule.take_failure() {
                state.stopped = true;
                shared.changed();
                return Err(error);
            }
            state = shared.ready.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        let stats = {
            let mut state = self.shared.lock();
            state.stopped = true;
            state.stats()
        };
        self.shared.changed();
        if let Some(fetching) = self.fetching.take() {
            fetching.abort();
        }
        for thread in self.threads.drain(..) {
            // A panic was caught and reported within the thread.
            thread.join().ok();
        }
        let slowest = stats.slowest();
        tracing::debug!(rank = self.shared.plan.rank.0, ?slowest, ?stats, "the loader has ended");
    }
}

impl State {
    fn stats(&self) -> LoaderStats {
        LoaderStats {
            fetching: self.schedule.fetching(),
            undecoded: self.schedule.undecoded(),
            ready: self.ready.len(),
            kept_bytes: self.schedule.kept_bytes(),
            ..self.stats.clone()
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the threads and the fetching task look again.
    fn changed(&self) {
        self.work.notify_all();
        self.room.notify_one();
    }
}

#[cfg(test)]
mod flow_tests;
#[cfg(test)]
mod tests;
