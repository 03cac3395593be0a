//! What ranks tell each other beside gradients: Dice sums, loss terms, votes, scores.
//!
//! All of it on a process group of its own, in the same order on every rank, so that it never
//! waits behind the Reducer's buckets.

use tch::{Device, Kind, Tensor};

use super::TrainerError;
use crate::bridge::ops::SumOverRanks;
use crate::collective::{ProcessGroup, ReduceOp, Work};
use crate::ledger::{PIECES, Part};
use crate::loss::StepLoss;
use crate::types::Rank;

/// The groups for what is small: one between hosts, and on GPUs one between devices too. Both are
/// `None` when there is one rank only.
#[derive(Debug, Default)]
pub struct Ranks {
    /// Gloo: tensors on the CPU.
    pub host: Option<ProcessGroup>,
    /// NCCL: tensors on a GPU.
    pub device: Option<ProcessGroup>,
}

impl SumOverRanks for Ranks {
    fn sum_in_place(&self, tensor: &Tensor) -> Result<(), String> {
        match self.group_of(tensor) {
            Some(group) => group.all_reduce(tensor, ReduceOp::Sum).map_err(|e| e.to_string()),
            None => Ok(()),
        }
    }
}

impl Ranks {
    fn group_of(&self, tensor: &Tensor) -> Option<&ProcessGroup> {
        if tensor.device() == Device::Cpu { self.host.as_ref() } else { self.device.as_ref() }
    }

    /// Every rank's `tensor` becomes rank 0's.
    ///
    /// # Errors
    /// When a rank is lost.
    pub fn copy_from_first(&self, tensor: &Tensor) -> Result<(), TrainerError> {
        match self.group_of(tensor) {
            Some(group) => Ok(group.broadcast(tensor, Rank(0))?),
            None => Ok(()),
        }
    }

    /// The bytes of rank `from`, which alone has any, on every rank.
    ///
    /// # Errors
    /// When a rank is lost.
    pub fn bytes_from(&self, from: Rank, bytes: Option<Vec<u8>>) -> Result<Vec<u8>, TrainerError> {
        let Some(group) = &self.host else { return Ok(bytes.unwrap_or_default()) };
        let length = Tensor::f_from_slice(&[bytes.as_ref().map_or(0, Vec::len) as i64])?;
        group.broadcast(&length, from)?;
        let buffer = match bytes {
            Some(bytes) => Tensor::f_from_slice(&bytes)?,
            None => Tensor::f_zeros([length.f_int64_value(&[0])?], (Kind::Uint8, Device::Cpu))?,
        };
        group.broadcast(&buffer, from)?;
        Ok(Vec::<u8>::try_from(&buffer)?)
    }

    /// Every rank's bytes, in rank order.
    ///
    /// # Errors
    /// When a rank is lost.
    pub fn gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, TrainerError> {
        let Some(group) = &self.host else { return Ok(vec![bytes.to_vec()]) };
        let length = Tensor::f_from_slice(&[bytes.len() as i64])?;
        let lengths: Vec<i64> = group
            .all_gather(&length)?
            .iter()
            .map(|t| t.f_int64_value(&[0]))
            .collect::<Result<_, _>>()?;
        let longest = lengths.iter().copied().max().unwrap_or(0).max(1);
        let mut padded = bytes.to_vec();
        padded.resize(usize::try_from(longest).unwrap_or(0), 0);
        let all = group.all_gather(&Tensor::f_from_slice(&padded)?)?;
        let mut parts = Vec::with_capacity(all.len());
        for (tensor, length) in all.iter().zip(lengths) {
            let mut part: Vec<u8> = Vec::<u8>::try_from(tensor)?;
            part.truncate(usize::try_from(length).unwrap_or(0));
            parts.push(part);
        }
        Ok(parts)
    }
}

/// The small all-reduce at a step's end: loss terms, what was fed, and a vote on stopping.
///
/// Every rank reads the same sums after the same step, so all stop at the same one.
pub struct Tail {
    sums: Tensor,
    work: Option<Work>,
}

/// What the ranks said together.
#[derive(Debug, Clone, PartialEq)]
pub struct TailSums {
    /// The loss's terms over the whole batch.
    pub terms: Vec<f64>,
    /// The unlabelled samples of the whole batch.
    pub fed: Part,
    /// Whether any rank wants to stop.
    pub stop: bool,
}

impl Tail {
    /// Starts it; the backward pass runs meanwhile. `fed` is this rank's part of the batch.
    ///
    /// # Errors
    /// When a rank is lost.
    pub fn start(
        loss: &StepLoss,
        fed: Part,
        stop: bool,
        ranks: &Ranks,
    ) -> Result<Self, TrainerError> {
        let vote = Tensor::f_from_slice(&[f64::from(u8::from(stop))])?;
        let terms = loss.terms.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?;
        let fed = Tensor::f_from_slice(&fed.pieces())?;
        let sums = Tensor::f_cat(&[terms, fed, vote], 0)?;
        let work = match &ranks.host {
            Some(group) => Some(group.start_all_reduce(&sums, ReduceOp::Sum)?),
            None => None,
        };
        Ok(Self { sums, work })
    }

    /// Waits for it.
    ///
    /// # Errors
    /// When a rank is lost.
    pub fn wait(self) -> Result<TailSums, TrainerError> {
        if let Some(work) = self.work {
            work.wait()?;
        }
        let mut terms: Vec<f64> = Vec::<f64>::try_from(&self.sums)?;
        let stop = terms.pop().is_some_and(|votes| votes > 0.0);
        let mut pieces = [0.0; PIECES];
        let rest = terms.len().saturating_sub(PIECES);
        for (piece, sum) in pieces.iter_mut().zip(terms.drain(rest..)) {
            *piece = sum;
        }
        Ok(TailSums { terms, fed: Part::from_pieces(pieces), stop })
    }
}
