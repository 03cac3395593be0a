//! The loader's stages: the task that fetches, and the threads that decode, augment and batch.
//!
//! They do what [`super::schedule`] says and tell it how it went. A panic in any of them becomes the error
//! of the step that it was for; nobody is left waiting.

use std::any::Any;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};

use super::schedule::Job;
use super::{Batch, Rows, Shared, State};
use crate::data::augment::Augmentation;
use crate::data::dataset::EncodedBlock;
use crate::data::error::DataError;
use crate::data::manifest::Split;
use crate::data::resample::Resampling;
use crate::data::sampler::Draw;
use crate::data::shard::{Labels, SliceRow};
use crate::types::Step;

/// Fetches blocks as the schedule wants them, until the task is aborted.
pub(super) async fn fetch(shared: Arc<Shared>) {
    let running = AssertUnwindSafe(fetch_all(&shared)).catch_unwind().await;
    if let Err(panic) = running {
        fail_next(&shared, panic);
    }
}

async fn fetch_all(shared: &Shared) {
    let mut running = FuturesUnordered::new();
    loop {
        {
            let mut state = shared.lock();
            if state.stopped {
                return;
            }
            while let Some(block) = state.schedule.next_fetch() {
                running.push(fetch_one(shared, block));
            }
        }
        tokio::select! {
            Some((block, took, result)) = running.next() => {
                fetched(&mut shared.lock(), block, took, result);
                shared.changed();
                shared.ready.notify_all();
            }
            () = shared.room.notified() => {}
        }
    }
}

async fn fetch_one(
    shared: &Shared,
    block: u64,
) -> (u64, Duration, Result<EncodedBlock, DataError>) {
    let started = Instant::now();
    let fetch = shared.dataset.fetch_block(Split::Train, block);
    let result = AssertUnwindSafe(fetch).catch_unwind().await;
    (block, started.elapsed(), result.unwrap_or_else(|panic| Err(panicked(panic))))
}

fn fetched(state: &mut State, block: u64, took: Duration, result: Result<EncodedBlock, DataError>) {
    state.stats.fetch_s += took.as_secs_f64();
    if let Ok(encoded) = &result {
        state.stats.blocks += 1;
        state.stats.block_bytes += encoded.len() as u64;
    }
    state.schedule.fetched(block, result);
}

/// One thread: does what is most urgent until it is told to stop.
pub(super) fn work(shared: &Shared) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| work_until_stopped(shared))) {
        fail_next(shared, panic);
    }
}

fn work_until_stopped(shared: &Shared) {
    let mut state = shared.lock();
    while !state.stopped {
        let Some(job) = state.schedule.next_job() else {
            state = wait_for_work(shared, state);
            continue;
        };
        drop(state);
        // What was just taken may have made room for a fetch.
        shared.room.notify_one();
        let started = Instant::now();
        match job {
            Job::Decode { block, fetched, labelled } => {
                let decoded = guarded(|| decode(shared, fetched, labelled));
                state = shared.lock();
                state.stats.decode_s += started.elapsed().as_secs_f64();
                state.schedule.decoded(block, decoded);
            }
            Job::Batch { step, draws, blocks } => {
                let batch = guarded(|| assemble(shared, step, draws, &blocks));
                state = shared.lock();
                state.stats.augment_s += started.elapsed().as_secs_f64();
                match batch {
                    Ok(batch) => drop(state.ready.insert(step.0, batch)),
                    Err(error) => state.schedule.fail(step, error),
                }
            }
        }
        shared.changed();
        shared.ready.notify_all();
    }
}

/// Sleeps until something has changed, and remembers whom it was waiting for.
fn wait_for_work<'a>(shared: &'a Shared, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
    let for_trainer = state.schedule.is_full();
    let for_fetch = !for_trainer && !state.schedule.is_over() && state.schedule.fetching() > 0;
    let started = Instant::now();
    let mut state = shared.work.wait(state).unwrap_or_else(PoisonError::into_inner);
    let waited_s = started.elapsed().as_secs_f64();
    if for_trainer {
        state.stats.wait_for_trainer_s += waited_s;
    } else if for_fetch {
        state.stats.wait_for_fetch_s += waited_s;
    }
    state
}

/// A block's rows, and the bytes they take.
fn decode(
    shared: &Shared,
    fetched: EncodedBlock,
    labelled: bool,
) -> Result<(Rows, usize), DataError> {
    let labels = if labelled { Labels::Decode } else { Labels::Skip };
    let rows = shared.dataset.decode_block(fetched, labels)?;
    let bytes = rows.iter().map(SliceRow::memory_bytes).sum();
    Ok((Arc::new(rows), bytes))
}

/// A step's batch from its blocks.
fn assemble(
    shared: &Shared,
    step: Step,
    draws: Vec<Draw>,
    blocks: &HashMap<u64, Rows>,
) -> Result<Batch, DataError> {
    let n_labelled = shared.share.labelled.len();
    let block_rows = shared.deal.spec().block_rows;
    let pixels = shared.plan.patch.0 * shared.plan.patch.1;
    let channels = shared.dataset.manifest().channel_count();
    let mut images = Vec::with_capacity(draws.len() * channels * pixels);
    let mut labels = Vec::with_capacity(n_labelled * pixels);
    for (slot, draw) in draws.iter().enumerate() {
        let block = blocks.get(&(draw.sample / block_rows));
        let row = block.and_then(|block| block.get((draw.sample % block_rows) as usize));
        let row = row.ok_or_else(|| broken(shared, *draw, "is not where the deal says"))?;
        let augmentation = if shared.plan.augment {
            Augmentation::draw(shared.plan.seed, draw.epoch, draw.sample)
        } else {
            Augmentation::None
        };
        // One for all of a sample: its channels and its label stay on each other.
        let resampling = Resampling::new(augmentation, row.shape, shared.plan.patch);
        for channel in row.image.chunks_exact(row.shape.0 * row.shape.1) {
            resampling.append(channel, &mut images);
        }
        if slot < n_labelled {
            let label = row.label.as_ref().ok_or_else(|| broken(shared, *draw, "has no label"))?;
            resampling.append(label.as_slice(), &mut labels);
        }
    }
    let n_unlabelled = draws.len() - n_labelled;
    let waited = Duration::ZERO;
    Ok(Batch { step, channels, images, labels, n_labelled, n_unlabelled, draws, waited })
}

fn broken(shared: &Shared, draw: Draw, why: &str) -> DataError {
    let name = &shared.dataset.manifest().name;
    DataError::invalid(name, format!("training row {} {why}", draw.sample))
}

fn guarded<T>(work: impl FnOnce() -> Result<T, DataError>) -> Result<T, DataError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| Err(panicked(panic)))
}

/// A stage has come to its end outside of any step's work: the next batch is where that is told.
pub(super) fn fail_next(shared: &Shared, panic: Box<dyn Any + Send>) {
    let mut state = shared.lock();
    if let Some(step) = state.schedule.next_given() {
        state.schedule.fail(step, panicked(panic));
    }
    drop(state);
    shared.changed();
    shared.ready.notify_all();
}

fn panicked(panic: Box<dyn Any + Send>) -> DataError {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    DataError::Thread(text.unwrap_or_else(|| "it panicked".to_owned()))
}
