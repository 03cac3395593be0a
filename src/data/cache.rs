//! Decoded blocks in memory, bounded; each fetched by one thread however many want it.
//!
//! Lives within one loader. Over budget the least recently used block goes; one that is still in
//! use lives on in the hands that hold it. A block larger than the whole budget is never kept.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::dataset::{Dataset, StopFlag};
use super::error::DataError;
use super::manifest::Split;
use super::shard::SliceRow;

/// A decoded block.
pub(crate) type Block = Arc<Vec<SliceRow>>;

struct Kept {
    block: Block,
    bytes: usize,
    used: u64,
}

#[derive(Default)]
struct State {
    kept: HashMap<u64, Kept>,
    bytes: usize,
    clock: u64,
    /// Blocks that some thread is fetching.
    claimed: HashSet<u64>,
}

/// Blocks of the training split.
pub(crate) struct BlockCache {
    dataset: Dataset,
    budget_bytes: usize,
    state: Mutex<State>,
    changed: Condvar,
}

impl BlockCache {
    pub(crate) fn new(dataset: Dataset, budget_bytes: usize) -> Self {
        Self { dataset, budget_bytes, state: Mutex::default(), changed: Condvar::new() }
    }

    /// All of `blocks`, from memory, from another thread's fetch, or fetched here.
    pub(crate) fn get_all(
        &self,
        blocks: &HashSet<u64>,
        stop: &StopFlag,
    ) -> Result<HashMap<u64, Block>, DataError> {
        let mut found = HashMap::with_capacity(blocks.len());
        loop {
            let mine = self.claim_missing(blocks, &mut found);
            if !mine.is_empty() {
                let claims = Claims { cache: self, blocks: &mine };
                let decoded = self.dataset.fetch_blocks(Split::Train, &mine, stop)?;
                for (block, rows) in mine.iter().zip(decoded) {
                    let rows = Arc::new(rows);
                    self.keep(*block, &rows);
                    found.insert(*block, rows);
                }
                drop(claims);
            }
            if found.len() == blocks.len() {
                return Ok(found);
            }
            if stop.is_stopped() {
                return Err(DataError::Stopped);
            }
            // What others have claimed: wait until they have it or have failed.
            let state = self.lock();
            let waits = |block: &u64| !found.contains_key(block) && state.claimed.contains(block);
            if mine.is_empty() && blocks.iter().any(waits) {
                let timeout = Duration::from_millis(50);
                drop(self.changed.wait_timeout(state, timeout));
            }
        }
    }

    /// Takes what is here into `found` and claims what nobody is fetching.
    fn claim_missing(&self, blocks: &HashSet<u64>, found: &mut HashMap<u64, Block>) -> Vec<u64> {
        let mut state = self.lock();
        let mut mine = Vec::new();
        for number in blocks {
            if found.contains_key(number) {
                continue;
            }
            state.clock += 1;
            let used = state.clock;
            if let Some(kept) = state.kept.get_mut(number) {
                kept.used = used;
                found.insert(*number, Arc::clone(&kept.block));
            } else if state.claimed.insert(*number) {
                mine.push(*number);
            }
        }
        mine
    }

    fn keep(&self, number: u64, block: &Block) {
        let bytes = block.iter().map(SliceRow::memory_bytes).sum();
        if bytes > self.budget_bytes {
            return;
        }
        let mut state = self.lock();
        while state.bytes + bytes > self.budget_bytes {
            let oldest = state.kept.iter().min_by_key(|(_, kept)| kept.used);
            let Some(oldest) = oldest.map(|(number, _)| *number) else { return };
            let freed = state.kept.remove(&oldest).map_or(0, |kept| kept.bytes);
            state.bytes -= freed;
        }
        state.clock += 1;
        let used = state.clock;
        let kept = Kept { block: Arc::clone(block), bytes, used };
        let replaced = state.kept.insert(number, kept).map_or(0, |kept| kept.bytes);
        state.bytes = state.bytes + bytes - replaced;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Gives claims back, whether the fetch worked, failed or panicked.
struct Claims<'a> {
    cache: &'a BlockCache,
    blocks: &'a [u64],
}

impl Drop for Claims<'_> {
    fn drop(&mut self) {
        let mut state = self.cache.lock();
        for block in self.blocks {
            state.claimed.remove(block);
        }
        self.cache.changed.notify_all();
    }
}
