//! What the loader does next: which block to fetch, which to decode, which step to make a batch of.
//!
//! Pure decisions: no thread, clock or IO. The deal is *walked* ahead of the trainer, step by step; each
//! block that a walked step needs and that is not here is wanted, and what is needed first is fetched and
//! decoded first. A step whose blocks are all decoded can be *taken*, in the deal's order. Walking is
//! bounded in steps, blocks and bytes, so nothing here grows with the pool.
//!
//! Decoded blocks are kept within a budget. One that no walked step needs goes first, unlabelled ones
//! before labelled ones: a slot never comes back to a block it has left, while labelled rows are drawn
//! from everywhere. Of a pool that is far larger than the budget the former go at once: next epoch they
//! would be gone anyway. The first step that is not taken yet gets its blocks whatever the budget is.

use std::collections::{BTreeSet, HashMap, VecDeque};

use crate::data::error::DataError;
use crate::data::sampler::{Deal, Draw, Share};
use crate::types::Step;

/// Steps walked ahead of the ones taken, at most.
const STEPS_AHEAD_MAX: usize = 256;

/// A pool of so many budgets is not worth keeping parts of.
const LARGE_BUDGETS: usize = 2;

/// The part of the budget that blocks which no step has used yet may take.
const AHEAD_PART: usize = 4;

/// What a schedule may not exceed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// The step to stop before.
    pub(super) end: Step,
    /// Steps taken ahead of those given to the trainer.
    pub(super) prefetch: usize,
    /// Blocks being fetched at once.
    pub(super) fetches: usize,
    /// Bytes of decoded blocks.
    pub(super) budget_bytes: usize,
}

/// Work for a thread. `F` is a fetched block, `B` a decoded one.
#[derive(Debug)]
pub(super) enum Job<F, B> {
    /// Decode a block.
    Decode {
        /// Its number in the training split.
        block: u64,
        /// Its bytes.
        fetched: F,
        /// Whether rows of it are used with their labels.
        labelled: bool,
    },
    /// Make a step's batch.
    Batch {
        /// The step.
        step: Step,
        /// Its samples.
        draws: Vec<Draw>,
        /// The blocks that hold them.
        blocks: HashMap<u64, B>,
    },
}

/// How far a block has come.
#[derive(Debug)]
enum Content<F, B> {
    Wanted,
    Fetching,
    Fetched(F),
    Decoding,
    Decoded { rows: B, bytes: usize },
}

#[derive(Debug)]
struct Block<F, B> {
    content: Content<F, B>,
    /// Walked steps, not taken yet, that need it; ascending.
    needed: VecDeque<u64>,
    /// The step that took it last, since it was fetched.
    used: Option<u64>,
}

/// A walked step.
#[derive(Debug)]
struct Planned {
    draws: Vec<Draw>,
    /// Distinct.
    blocks: Vec<u64>,
}

#[derive(Debug)]
pub(super) struct Schedule<F, B> {
    deal: Deal,
    share: Share,
    bounds: Bounds,
    /// The step that the trainer gets next.
    given: u64,
    /// The step that is walked next.
    walked: u64,
    /// The steps before `walked` that are not taken yet.
    ahead: VecDeque<Planned>,
    blocks: HashMap<u64, Block<F, B>>,
    /// (step that needs it first, block) of those to fetch.
    wanted: BTreeSet<(u64, u64)>,
    /// (step that needs it first, block) of those to decode.
    fetched: BTreeSet<(u64, u64)>,
    /// (whether labelled, step of its last use, block) of decoded ones that no walked step needs.
    idle: BTreeSet<(bool, u64, u64)>,
    fetching: usize,
    decoding: usize,
    /// Decoded blocks that no step has taken.
    unused: usize,
    kept_bytes: usize,
    /// Of the largest block so far: what one that is not decoded yet may take.
    largest_bytes: usize,
    failed: Option<(u64, DataError)>,
}

impl<F, B: Clone> Schedule<F, B> {
    /// Of what `share` gets from `deal`, from `start` on.
    pub(super) fn new(deal: Deal, share: Share, start: Step, bounds: Bounds) -> Self {
        Self {
            deal,
            share,
            bounds,
            given: start.0,
            walked: start.0,
            ahead: VecDeque::new(),
            blocks: HashMap::new(),
            wanted: BTreeSet::new(),
            fetched: BTreeSet::new(),
            idle: BTreeSet::new(),
            fetching: 0,
            decoding: 0,
            unused: 0,
            kept_bytes: 0,
            largest_bytes: 0,
            failed: None,
        }
    }

    /// The step that the trainer gets next; `None` at the end.
    pub(super) fn next_given(&self) -> Option<Step> {
        (self.given < self.bounds.end.0).then_some(Step(self.given))
    }

    /// The trainer got the step [`Self::next_given`].
    pub(super) fn give(&mut self) {
        self.given += 1;
    }

    /// Blocks being fetched.
    pub(super) fn fetching(&self) -> usize {
        self.fetching
    }

    /// Blocks fetched and not decoded.
    pub(super) fn undecoded(&self) -> usize {
        self.fetched.len()
    }

    /// Bytes of the decoded blocks that are kept.
    pub(super) fn kept_bytes(&self) -> usize {
        self.kept_bytes
    }

    /// Whether nothing can be taken until the trainer takes a batch.
    pub(super) fn is_full(&self) -> bool {
        self.first_untaken() >= self.given + self.bounds.prefetch as u64
    }

    /// Whether every step has been taken that ever will be.
    pub(super) fn is_over(&self) -> bool {
        self.first_untaken() >= self.end()
    }

    /// `step` cannot be made. Those before it still are; the first failure is what counts.
    pub(super) fn fail(&mut self, step: Step, error: DataError) {
        if self.failed.as_ref().is_none_or(|(other, _)| step.0 < *other) {
            self.failed = Some((step.0, error));
        }
    }

    /// Why the step that the trainer gets next cannot be made.
    pub(super) fn take_failure(&mut self) -> Option<DataError> {
        let given = self.given;
        self.failed.take_if(|(step, _)| *step <= given).map(|(_, error)| error)
    }

    /// A block to fetch now: whoever asks does it.
    pub(super) fn next_fetch(&mut self) -> Option<u64> {
        self.walk();
        let (step, block) = *self.wanted.first()?;
        if step >= self.end() || self.fetching >= self.bounds.fetches || !self.make_room(step) {
            return None;
        }
        self.wanted.remove(&(step, block));
        self.fetching += 1;
        self.set(block, Content::Fetching);
        Some(block)
    }

    /// A fetch has ended.
    pub(super) fn fetched(&mut self, block: u64, result: Result<F, DataError>) {
        self.fetching -= 1;
        let step = self.first_need(block);
        match result {
            Ok(fetched) => {
                self.fetched.insert((step, block));
                self.set(block, Content::Fetched(fetched));
            }
            Err(error) => self.fail(Step(step), error),
        }
    }

    /// The most urgent work for a thread: whoever asks does it.
    pub(super) fn next_job(&mut self) -> Option<Job<F, B>> {
        self.walk();
        if let Some(batch) = self.take_step() {
            return Some(batch);
        }
        let (step, block) = *self.fetched.first()?;
        if step >= self.end() {
            return None;
        }
        self.fetched.remove(&(step, block));
        let labelled = self.is_labelled(block);
        match self.set(block, Content::Decoding)? {
            Content::Fetched(fetched) => {
                self.decoding += 1;
                Some(Job::Decode { block, fetched, labelled })
            }
            _ => None,
        }
    }

    /// A block has been decoded, to so many bytes.
    pub(super) fn decoded(&mut self, block: u64, result: Result<(B, usize), DataError>) {
        self.decoding -= 1;
        match result {
            Ok((rows, bytes)) => {
                self.unused += 1;
                self.kept_bytes += bytes;
                self.largest_bytes = self.largest_bytes.max(bytes);
                self.set(block, Content::Decoded { rows, bytes });
                self.trim();
            }
            Err(error) => self.fail(Step(self.first_need(block)), error),
        }
    }

    /// Where steps end: at the plan's end, or at a failure before it.
    fn end(&self) -> u64 {
        self.failed.as_ref().map_or(self.bounds.end.0, |(step, _)| *step)
    }

    fn first_untaken(&self) -> u64 {
        self.walked - self.ahead.len() as u64
    }

    /// The step that needs `block` first. Whatever is on its way here is needed.
    fn first_need(&self, block: u64) -> u64 {
        let needed = self.blocks.get(&block).and_then(|block| block.needed.front());
        needed.copied().unwrap_or(self.given)
    }

    fn is_labelled(&self, block: u64) -> bool {
        let spec = self.deal.spec();
        let rows = block * spec.block_rows..(block + 1) * spec.block_rows;
        rows.start < spec.labelled.end && spec.labelled.start < rows.end
    }

    fn set(&mut self, block: u64, content: Content<F, B>) -> Option<Content<F, B>> {
        let block = self.blocks.get_mut(&block)?;
        Some(std::mem::replace(&mut block.content, content))
    }

    /// Walks on while few blocks are on their way: enough to keep every fetch and thread busy.
    fn walk(&mut self) {
        let slots = self.share.labelled.len() + self.share.unlabelled.len();
        while self.walked < self.end() {
            let ahead = self.wanted.len()
                + self.fetching
                + self.fetched.len()
                + self.decoding
                + self.unused;
            let enough = ahead >= 2 * (self.bounds.fetches + slots)
                || ahead.saturating_mul(self.largest_bytes) > self.bounds.budget_bytes / AHEAD_PART
                || self.ahead.len() >= STEPS_AHEAD_MAX;
            if enough && !self.ahead.is_empty() {
                return;
            }
            let draws = self.deal.batch(Step(self.walked), &self.share);
            let block_rows = self.deal.spec().block_rows;
            let distinct: BTreeSet<u64> = draws.iter().map(|d| d.sample / block_rows).collect();
            let blocks: Vec<u64> = distinct.into_iter().collect();
            for block in &blocks {
                self.need(*block, self.walked);
            }
            self.ahead.push_back(Planned { draws, blocks });
            self.walked += 1;
        }
    }

    fn need(&mut self, number: u64, step: u64) {
        let labelled = self.is_labelled(number);
        let block = self.blocks.entry(number).or_insert_with(|| {
            self.wanted.insert((step, number));
            Block { content: Content::Wanted, needed: VecDeque::new(), used: None }
        });
        if let (true, Some(used)) = (block.needed.is_empty(), block.used) {
            self.idle.remove(&(labelled, used, number));
        }
        block.needed.push_back(step);
    }

    /// The first step not taken yet, if all it needs is here and the trainer is not too far behind.
    fn take_step(&mut self) -> Option<Job<F, B>> {
        let step = self.first_untaken();
        if self.is_full() || step >= self.end() {
            return None;
        }
        let mut blocks = HashMap::new();
        for number in &self.ahead.front()?.blocks {
            match &self.blocks.get(number)?.content {
                Content::Decoded { rows, .. } => blocks.insert(*number, rows.clone()),
                _ => return None,
            };
        }
        let planned = self.ahead.pop_front()?;
        for number in planned.blocks {
            let labelled = self.is_labelled(number);
            let Some(block) = self.blocks.get_mut(&number) else { continue };
            block.needed.pop_front();
            self.unused -= usize::from(block.used.is_none());
            block.used = Some(step);
            if block.needed.is_empty() {
                self.idle.insert((labelled, step, number));
            }
        }
        // Before anything is dropped, so that what the next step needs is known.
        self.walk();
        self.drop_left();
        self.trim();
        Some(Job::Batch { step: Step(step), draws: planned.draws, blocks })
    }

    /// Whether one more block, which `step` needs, may be fetched.
    fn make_room(&mut self, step: u64) -> bool {
        if self.largest_bytes == 0 && step > self.first_untaken() {
            // Until one is decoded, nobody knows how large they are.
            return false;
        }
        let on_the_way = self.fetching + self.fetched.len() + self.decoding + 1;
        let coming = on_the_way.saturating_mul(self.largest_bytes);
        while self.kept_bytes.saturating_add(coming) > self.bounds.budget_bytes {
            if self.drop_idle() {
                continue;
            }
            if step > self.first_untaken() {
                return false;
            }
            if !self.drop_needed_later(step) {
                return true;
            }
        }
        true
    }

    /// Drops what nobody needs while there is too much.
    fn trim(&mut self) {
        while self.kept_bytes > self.bounds.budget_bytes && self.drop_idle() {}
    }

    /// Drops the unlabelled blocks that no walked step needs, where the pool is too large to keep.
    fn drop_left(&mut self) {
        let spec = self.deal.spec();
        let rows = spec.unlabelled.end.saturating_sub(spec.unlabelled.start);
        let blocks = rows.div_ceil(spec.block_rows.max(1));
        let pool_bytes = (blocks as usize).saturating_mul(self.largest_bytes);
        if pool_bytes <= self.bounds.budget_bytes.saturating_mul(LARGE_BUDGETS) {
            return;
        }
        while self.idle.first().is_some_and(|(labelled, _, _)| !labelled) {
            self.drop_idle();
        }
    }

    fn drop_idle(&mut self) -> bool {
        let Some((_, _, number)) = self.idle.pop_first() else { return false };
        if let Some(Block { content: Content::Decoded { bytes, .. }, .. }) =
            self.blocks.remove(&number)
        {
            self.kept_bytes -= bytes;
        }
        true
    }

    /// Drops the decoded block that is needed last, after `step`: it is fetched again for then.
    fn drop_needed_later(&mut self, step: u64) -> bool {
        let decoded = self.blocks.iter().filter_map(|(number, block)| match block.content {
            Content::Decoded { bytes, .. } => Some((*block.needed.front()?, *number, bytes)),
            _ => None,
        });
        let latest = decoded.filter(|(needed, _, _)| *needed > step).max();
        let Some((needed, number, bytes)) = latest else { return false };
        if let Some(block) = self.blocks.get_mut(&number) {
            block.content = Content::Wanted;
            self.unused -= usize::from(block.used.take().is_none());
        }
        self.kept_bytes -= bytes;
        self.wanted.insert((needed, number));
        true
    }
}

#[cfg(test)]
#[path = "schedule_tests.rs"]
mod tests;
