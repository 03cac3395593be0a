//! Gradient averaging that overlaps with backward: c10d's Reducer over buckets of our choice.
//!
//! Buckets are a function of the parameter list alone and never rebuilt, so that a resumed run
//! sums in the same order. Every parameter given must get a gradient in every backward; build
//! another Reducer when the set changes (after warm-up).

use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use super::error::CollectiveError;
use super::group::{Inner, ProcessGroup};
use crate::bridge::c10d;

/// The first bucket's cap, as DDP has it: communication starts early in backward.
const FIRST_BUCKET_BYTES_MAX: usize = 1 << 20;

/// Averages gradients over a group while backward runs.
pub struct Reducer {
    // Dropped before the group that it uses.
    reducer: c10d::Reducer,
    params: Vec<Tensor>,
    _group: Arc<Inner>,
}

impl Reducer {
    /// A reducer of the leaves `params`, in buckets of about `bucket_bytes`; the last parameters,
    /// whose gradients come first, go first. Gradients become views into the buckets.
    ///
    /// # Errors
    /// When there are no parameters, or one is no leaf that requires a gradient.
    pub fn new(
        params: &[Tensor],
        group: &ProcessGroup,
        bucket_bytes: usize,
    ) -> Result<Self, CollectiveError> {
        if params.is_empty() {
            return Err(CollectiveError::Engine("a reducer of no parameters".into()));
        }
        if let Some(index) = params.iter().position(|param| !param.requires_grad()) {
            return Err(CollectiveError::Engine(format!("parameter {index} requires no gradient")));
        }
        let sizes: Vec<ParamSize> = params.iter().map(ParamSize::of).collect();
        let first = FIRST_BUCKET_BYTES_MAX.min(bucket_bytes / 4);
        let buckets = assign_buckets(&sizes, first, bucket_bytes);
        let cap = i64::try_from(bucket_bytes).unwrap_or(i64::MAX);
        let reducer = c10d::Reducer::new(group.inner().group()?, params, &buckets, cap)?;
        let params = params.iter().map(Tensor::shallow_clone).collect();
        Ok(Self { reducer, params, _group: group.inner().clone() })
    }

    /// Call after forward and before each `f_backward`, whose error converts into
    /// [`CollectiveError`]; when that returns, gradients are averages over all ranks.
    ///
    /// # Errors
    /// When the reduction before is unfinished.
    pub fn prepare_for_backward(&mut self, outputs: &[Tensor]) -> Result<(), CollectiveError> {
        Ok(self.reducer.prepare_for_backward(outputs)?)
    }

    /// Sets the parameters' gradients to none, for the next step. (`zero_grad` cannot: gradients
    /// are views.)
    ///
    /// # Errors
    /// When the engine refuses.
    pub fn clear_gradients(&self) -> Result<(), CollectiveError> {
        Ok(c10d::clear_gradients(&self.params)?)
    }
}

/// What decides a parameter's bucket.
#[derive(Debug, Clone, Copy, PartialEq)]
struct ParamSize {
    bytes: usize,
    kind: Kind,
    device: Device,
}

impl ParamSize {
    fn of(param: &Tensor) -> Self {
        let kind = param.kind();
        Self { bytes: param.numel() * kind.elt_size_in_bytes(), kind, device: param.device() }
    }
}

/// Parameter indices by bucket, from the last parameter back: a bucket is closed when it has
/// reached its cap (`first` for the first one) or the next parameter is of another kind.
fn assign_buckets(sizes: &[ParamSize], first: usize, cap: usize) -> Vec<Vec<usize>> {
    let mut buckets: Vec<Vec<usize>> = Vec::new();
    let mut filled = usize::MAX;
    let mut previous: Option<ParamSize> = None;
    for (index, &size) in sizes.iter().enumerate().rev() {
        let limit = if buckets.len() <= 1 { first } else { cap };
        let other = previous.is_some_and(|p| p.kind != size.kind || p.device != size.device);
        if filled >= limit || other {
            buckets.push(Vec::new());
            filled = 0;
        }
        if let Some(bucket) = buckets.last_mut() {
            bucket.push(index);
        }
        filled += size.bytes;
        previous = Some(size);
    }
    buckets
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(bytes: &[usize]) -> Vec<ParamSize> {
        bytes
            .iter()
            .map(|&bytes| ParamSize { bytes, kind: Kind::Float, device: Device::Cpu })
            .collect()
    }

    #[test]
    fn buckets_go_backwards_the_first_one_small() {
        let buckets = assign_buckets(&sizes(&[40, 40, 40, 40, 10, 10]), 20, 80);
        assert_eq!(buckets, [vec![5, 4], vec![3, 2], vec![1, 0]]);
    }

    #[test]
    fn a_bucket_holds_one_kind_only_and_every_parameter_is_in_one() {
        let mut mixed = sizes(&[4, 4, 4, 4]);
        mixed[1].kind = Kind::Double;
        assert_eq!(assign_buckets(&mixed, 1000, 1000), [vec![3, 2], vec![1], vec![0]]);
        assert_eq!(assign_buckets(&sizes(&[4, 0, 4]), 0, 0).concat(), [2, 1, 0]);
    }
}
