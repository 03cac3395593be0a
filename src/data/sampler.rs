//! The deal: which sample stands in which slot of which step. Pure: no IO, clock or state.
//!
//! **Unlabelled.** Position `p = t * B + s` of step `t` and slot `s < B`; epoch `e = p div N` for a
//! pool of `N`. Epoch `e` holds the positions `[eN, (e+1)N)`, and slot `s` owns those of them that
//! are `s` modulo `B`: `N div B` or one more. Cut the epoch's permuted sequence `0..N` into `B`
//! stretches of exactly those lengths and let slot `s` walk down stretch `s`: each index of each
//! epoch is then used once, whether or not `B` divides `N`, also where a batch straddles epochs.
//!
//! **Permuted sequence.** Blocks of the pool are permuted, then the rows within each. Blocks are
//! those of the stored rows, so the pool's first and last may be short; where these two land is
//! one inverse look-up each, hence any index resolves in constant time and memory.
//!
//! **Labelled.** A fresh permutation of the pool each epoch, the remainder dropped. A pool smaller
//! than its batch is chained: passes over it follow each other without a gap, and one iteration
//! counts as an epoch.
//!
//! The world size appears only in [`Deal::share`], so the order cannot depend on it.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::permutation::{Permutation, key_of};
use crate::types::{Epoch, Rank, Step, WorldSize};

/// Keeps the streams' keys apart.
#[derive(Clone, Copy)]
enum Domain {
    Labelled = 1,
    Blocks = 2,
    WithinBlock = 3,
}

/// Why a batch cannot be dealt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DealError {
    /// Some worker would have nothing to do in any step.
    #[error("{world} workers share a global batch of {batch}: use at most {batch} workers")]
    WorldTooLarge {
        /// Workers asked for.
        world: u32,
        /// Samples of one global batch.
        batch: u32,
    },
    /// A rank that the world does not have.
    #[error("rank {rank} of {world} workers does not exist")]
    NoSuchRank {
        /// The rank asked for.
        rank: u32,
        /// Workers there are.
        world: u32,
    },
    /// A labelled batch is wanted and there is nothing to fill it with.
    #[error("a labelled batch of {batch} cannot be dealt from no labelled samples")]
    NothingLabelled {
        /// Labelled samples wanted in a batch.
        batch: u32,
    },
    /// No samples would be dealt at all.
    #[error("the batch is empty: set a labelled or an unlabelled batch size")]
    EmptyBatch,
    /// Blocks of no rows.
    #[error("blocks must hold at least one row")]
    EmptyBlocks,
}

/// Everything that the order of samples depends on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DealSpec {
    /// `train.seed`.
    pub seed: u64,
    /// Rows of the training split that are used with their labels.
    pub labelled: Range<u64>,
    /// Rows of the training split that are used without.
    pub unlabelled: Range<u64>,
    /// Rows in a stored block, which is what is fetched at once.
    pub block_rows: u64,
    /// Labelled samples in a global batch.
    pub batch_labelled: u32,
    /// Unlabelled samples in a global batch; none are dealt while the pool is empty.
    pub batch_unlabelled: u32,
}

/// One sample in one pass over its stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Draw {
    /// Row of the training split.
    pub sample: u64,
    /// Which pass over the stream this is: with the seed and the sample it keys augmentation.
    pub epoch: Epoch,
}

/// The slots of both streams that one rank serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// Slots of the labelled part of the batch.
    pub labelled: Range<u32>,
    /// Slots of the unlabelled part.
    pub unlabelled: Range<u32>,
}

/// A validated [`DealSpec`].
#[derive(Debug, Clone)]
pub struct Deal {
    spec: DealSpec,
    blocks: PoolBlocks,
}

impl Deal {
    /// Checks `spec`; an empty unlabelled pool sets its batch to zero.
    pub fn new(mut spec: DealSpec) -> Result<Self, DealError> {
        if spec.unlabelled.is_empty() {
            spec.batch_unlabelled = 0;
        }
        if spec.block_rows == 0 {
            return Err(DealError::EmptyBlocks);
        }
        if spec.labelled.is_empty() && spec.batch_labelled > 0 {
            return Err(DealError::NothingLabelled { batch: spec.batch_labelled });
        }
        if spec.batch_labelled.saturating_add(spec.batch_unlabelled) == 0 {
            return Err(DealError::EmptyBatch);
        }
        let blocks = PoolBlocks::new(spec.unlabelled.clone(), spec.block_rows);
        Ok(Self { spec, blocks })
    }

    /// What the order is a function of, the unlabelled batch being the one that is dealt.
    pub fn spec(&self) -> &DealSpec {
        &self.spec
    }

    /// The slots of `rank`: adjacent ones, as evenly as can be over both streams together.
    ///
    /// The first ranks take the labelled remainder and the last ones the unlabelled remainder, so
    /// that totals differ by at most one sample.
    pub fn share(&self, rank: Rank, world: WorldSize) -> Result<Share, DealError> {
        let (rank, world) = (rank.0, world.0);
        let batch = self.spec.batch_labelled.saturating_add(self.spec.batch_unlabelled);
        if world > batch {
            return Err(DealError::WorldTooLarge { world, batch });
        }
        if rank >= world {
            return Err(DealError::NoSuchRank { rank, world });
        }
        let labelled_start = |r: u32| {
            r * (self.spec.batch_labelled / world) + r.min(self.spec.batch_labelled % world)
        };
        let plain = world - self.spec.batch_unlabelled % world;
        let unlabelled_start =
            |r: u32| r * (self.spec.batch_unlabelled / world) + r.saturating_sub(plain);
        Ok(Share {
            labelled: labelled_start(rank)..labelled_start(rank + 1),
            unlabelled: unlabelled_start(rank)..unlabelled_start(rank + 1),
        })
    }

    /// What a rank with `share` sees in the step that leads on from `step`, labelled first.
    pub fn batch(&self, step: Step, share: &Share) -> Vec<Draw> {
        let labelled = share.labelled.clone().map(|slot| self.labelled(step, slot));
        labelled.chain(share.unlabelled.clone().map(|slot| self.unlabelled(step, slot))).collect()
    }

    /// Iterations of one labelled epoch: what warm-up counts.
    pub fn labelled_epoch_steps(&self) -> u64 {
        let pool = range_len(&self.spec.labelled);
        (pool / u64::from(self.spec.batch_labelled.max(1))).max(1)
    }

    /// The labelled epoch that `step` belongs to.
    pub fn labelled_epoch(&self, step: Step) -> Epoch {
        Epoch(step.0 / self.labelled_epoch_steps())
    }

    /// The labelled sample in `slot` of `step`.
    pub fn labelled(&self, step: Step, slot: u32) -> Draw {
        debug_assert!(slot < self.spec.batch_labelled);
        let pool = range_len(&self.spec.labelled);
        let batch = u64::from(self.spec.batch_labelled);
        let (pass, index) = if pool < batch {
            let position = step.0 * batch + u64::from(slot);
            (position / pool, position % pool)
        } else {
            let steps = pool / batch;
            (step.0 / steps, (step.0 % steps) * batch + u64::from(slot))
        };
        let key = key_of(&[self.spec.seed, Domain::Labelled as u64, pass]);
        let row = Permutation::new(pool, key).apply(index);
        Draw { sample: self.spec.labelled.start + row, epoch: Epoch(pass) }
    }

    /// The unlabelled sample in `slot` of `step`.
    pub fn unlabelled(&self, step: Step, slot: u32) -> Draw {
        debug_assert!(slot < self.spec.batch_unlabelled);
        let pool = range_len(&self.spec.unlabelled);
        let (batch, slot) = (u64::from(self.spec.batch_unlabelled), u64::from(slot));
        let epoch = (step.0 * batch + slot) / pool;
        let first = epoch * pool;
        // Positions before `end` that belong to slots before `slot`.
        let before = |end: u64| (end / batch) * slot + (end % batch).min(slot);
        let stretch_start = before(first + pool) - before(first);
        // The first step whose position in this slot is at or after the epoch's first position.
        let first_step = first.saturating_sub(slot).div_ceil(batch);
        let index = stretch_start + (step.0 - first_step);
        Draw { sample: self.blocks.row(self.spec.seed, epoch, index), epoch: Epoch(epoch) }
    }
}

fn range_len(range: &Range<u64>) -> u64 {
    range.end.saturating_sub(range.start)
}

/// A pool of rows as the stored blocks cut it: all full but, perhaps, the first and the last.
#[derive(Debug, Clone)]
struct PoolBlocks {
    rows: Range<u64>,
    block_rows: u64,
    /// Number of the pool's first block among the stored ones.
    first: u64,
    count: u64,
}

impl PoolBlocks {
    fn new(rows: Range<u64>, block_rows: u64) -> Self {
        let first = rows.start / block_rows;
        let end = if rows.is_empty() { first } else { rows.end.div_ceil(block_rows) };
        Self { rows, block_rows, first, count: end - first }
    }

    /// The pool's rows in its block `block` (counted from the pool's first).
    fn rows_of(&self, block: u64) -> Range<u64> {
        let start = (self.first + block) * self.block_rows;
        start.max(self.rows.start)..(start + self.block_rows).min(self.rows.end)
    }

    /// The row at `index` of the permuted sequence of `epoch`.
    fn row(&self, seed: u64, epoch: u64, index: u64) -> u64 {
        let order = Permutation::new(self.count, key_of(&[seed, Domain::Blocks as u64, epoch]));
        let missing = |block: u64| self.block_rows - range_len(&self.rows_of(block));
        // (place in the permuted sequence, rows missing there) of the two blocks that may be short.
        let head = (order.invert(0), missing(0));
        let tail = (order.invert(self.count - 1), missing(self.count - 1));
        let start = |place: u64| {
            let lost = |(at, rows): (u64, u64)| if at < place { rows } else { 0 };
            let tail_lost = if self.count > 1 { lost(tail) } else { 0 };
            place * self.block_rows - lost(head) - tail_lost
        };
        // Short blocks before `index` move it on by less than two blocks.
        let mut place = index / self.block_rows;
        while place + 1 < self.count && start(place + 1) <= index {
            place += 1;
        }
        let rows = self.rows_of(order.apply(place));
        let key = key_of(&[seed, Domain::WithinBlock as u64, epoch, rows.start]);
        rows.start + Permutation::new(range_len(&rows), key).apply(index - start(place))
    }
}

#[cfg(test)]
#[path = "shuffle_tests.rs"]
mod shuffle_tests;
#[cfg(test)]
#[path = "sampler_tests.rs"]
mod tests;
