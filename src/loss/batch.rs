//! What a batch that is spread over ranks makes of a loss: shares whose sum over the ranks is the
//! value over the whole batch, and whose gradients, averaged over the ranks, are the whole batch's.
//!
//! A mean's share is the local sum over the global count. What is no mean (Dice, ratios) is made of
//! sums over all ranks, and each rank tells one W-th of it. Here for objectives by plain
//! automatic differentiation; CPCR's has kernels of its own and does the same by hand.

use tch::{Device, Kind, Tensor};

use super::{LossError, dice};
use crate::bridge::ops::SumOverRanks;

/// How many samples all ranks have together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Ranks.
    pub world: u32,
    /// Labelled samples of the global batch.
    pub labelled: u64,
    /// All samples of the global batch.
    pub samples: u64,
}

impl Counts {
    /// Unlabelled samples of the global batch.
    #[must_use]
    pub fn unlabelled(&self) -> u64 {
        self.samples.saturating_sub(self.labelled)
    }
}

/// No other ranks: sums are what they are.
#[derive(Debug, Clone, Copy, Default)]
pub struct Alone;

impl SumOverRanks for Alone {
    fn sum_in_place(&self, _tensor: &Tensor) -> Result<(), String> {
        Ok(())
    }
}

/// What a step's losses are, and where they pull.
#[derive(Debug)]
pub struct StepLoss {
    /// The terms' names, `total` last.
    pub names: &'static [&'static str],
    /// A value for each name, float64, before weights except `total`. This rank's share: the sum
    /// over ranks is the value over the whole batch. Terms that were left out are 0.
    pub terms: Tensor,
    /// What is differentiated.
    pub roots: Vec<Tensor>,
    /// d total / d root, times the number of ranks.
    pub grads: Vec<Tensor>,
}

impl StepLoss {
    /// The weighted sum of differentiable shares, each a float64 scalar. `names` has one name more
    /// than there are shares, for the total.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn of(
        names: &'static [&'static str],
        shares: &[(f64, Tensor)],
        counts: &Counts,
    ) -> Result<Self, LossError> {
        debug_assert_eq!(names.len(), shares.len() + 1);
        let device = shares.first().map_or(Device::Cpu, |(_, share)| share.device());
        let mut total = Tensor::f_zeros([1i64], (Kind::Double, device))?;
        let mut terms = Vec::with_capacity(names.len());
        for (weight, share) in shares {
            let share = share.f_view([1i64])?;
            if *weight != 0.0 {
                total = total.f_add(&share.f_mul_scalar(*weight)?)?;
            }
            terms.push(share.f_detach()?);
        }
        terms.push(total.f_detach()?);
        let pull = Tensor::f_full([1i64], f64::from(counts.world), (Kind::Double, device))?;
        Ok(Self { names, terms: Tensor::f_cat(&terms, 0)?, roots: vec![total], grads: vec![pull] })
    }

    /// The terms as numbers: waits for the device.
    ///
    /// # Errors
    /// Where the copy fails.
    pub fn values(&self) -> Result<Vec<(&'static str, f64)>, LossError> {
        let host = self.terms.f_to_device(Device::Cpu)?;
        let mut values = Vec::with_capacity(self.names.len());
        for (i, name) in self.names.iter().enumerate() {
            values.push((*name, host.f_double_value(&[i as i64])?));
        }
        Ok(values)
    }
}

/// A batch over its ranks.
pub struct Spread<'a> {
    /// What all ranks have together.
    pub counts: Counts,
    /// The ranks.
    pub ranks: &'a dyn SumOverRanks,
    /// Dice over the whole batch; else over each rank's part, and the mean over the ranks that have
    /// labels.
    pub global_dice: bool,
}

impl Spread<'_> {
    /// The share of a mean: a local sum over the global count, 0 where nothing is counted.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn mean(&self, local_sum: &Tensor, count: f64) -> Result<Tensor, LossError> {
        Ok(local_sum.f_to_kind(Kind::Double)?.f_mul_scalar(1.0 / count.max(1.0))?)
    }

    /// The sum over ranks of `local` (float64), with the gradient of the local part: what a function
    /// of global sums passes on to this rank's samples. Every rank calls it, in the same order.
    ///
    /// # Errors
    /// A failing sum over ranks.
    pub fn sum(&self, local: &Tensor) -> Result<Tensor, LossError> {
        let here = local.f_detach()?;
        let mut global = here.f_empty_like()?;
        global.f_copy_(&here)?;
        self.ranks.sum_in_place(&global).map_err(LossError::Ranks)?;
        // The bracket is zero and carries the gradient.
        Ok(global.f_add(&local.f_sub(&here)?)?)
    }

    /// The share of a value that every rank has whole, made of [`Spread::sum`]s. Its gradient stays
    /// whole: each rank's is that of its own samples only, and those add up.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn part(&self, whole: &Tensor) -> Result<Tensor, LossError> {
        let others = 1.0 - 1.0 / f64::from(self.counts.world.max(1));
        Ok(whole.f_sub(&whole.f_detach()?.f_mul_scalar(others)?)?)
    }

    /// The share of a Dice loss made of local sums `[3, C]` ([`dice::sums`]); `counted` tells
    /// whether this rank has anything in them.
    ///
    /// # Errors
    /// A failing sum over ranks.
    pub fn dice(&self, sums: &Tensor, smooth: f64, counted: bool) -> Result<Tensor, LossError> {
        if self.global_dice {
            return self.part(&dice::value(&self.sum(sums)?, smooth)?);
        }
        let tellers = u64::from(self.counts.world).min(self.counts.labelled).max(1);
        let share = if counted { 1.0 / tellers as f64 } else { 0.0 };
        Ok(dice::value(sums, smooth)?.f_mul_scalar(share)?)
    }
}
