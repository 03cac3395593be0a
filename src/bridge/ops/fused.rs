//! The fused kernels: batch norm with activation and dropout, and the losses of a decoder pair.
//! What they compute is said in `norm.cpp` and `losses.cpp`; `model` and `loss` hold the same
//! formulas in plain operations, and tests hold the two against each other.

use std::ffi::{c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::null_mut;
use std::sync::Arc;

use tch::Tensor;

use super::{OpError, adopt, check, ffi};

/// Sums a tensor over all ranks, in place. Ranks must call it in the same order.
pub trait SumOverRanks: Send + Sync {
    /// Sums `tensor` over ranks.
    ///
    /// # Errors
    /// In words, where the collective fails.
    fn sum_in_place(&self, tensor: &Tensor) -> Result<(), String>;
}

/// What [`norm_act`] needs besides the activations.
pub struct NormAct<'a> {
    /// Scale, float32 `[C]`.
    pub weight: &'a Tensor,
    /// Offset, float32 `[C]`.
    pub bias: &'a Tensor,
    /// Running mean, float32 `[C]`, updated in place.
    pub running_mean: &'a Tensor,
    /// Running (unbiased) variance, float32 `[C]`, updated in place.
    pub running_var: &'a Tensor,
    /// Weight of the new statistics.
    pub momentum: f64,
    /// Added to the variance.
    pub eps: f64,
    /// Slope of the leaky ReLU below zero.
    pub slope: f64,
    /// Probability of dropout; 0 is none.
    pub dropout: f64,
    /// Key of the dropout mask.
    pub key: u64,
    /// Sums statistics over ranks, forwards and backwards.
    pub sync: Option<Arc<dyn SumOverRanks>>,
}

type Hook = Arc<dyn SumOverRanks>;

unsafe extern "C" fn hook_call(context: *mut c_void, tensor: *mut c_void) -> c_int {
    // SAFETY: `context` is the Box<Hook> that `norm_act` leaked; the C++ side calls this only
    // before `hook_drop`, and only shared access is taken.
    let hook = unsafe { &*context.cast::<Hook>() };
    // SAFETY: `tensor` points at a live at::Tensor of the caller; the clone is a handle of its
    // own to the same storage, dropped here.
    let tensor = unsafe { Tensor::clone_from_ptr(tensor.cast()) };
    // A panic must not unwind through C++ frames.
    match catch_unwind(AssertUnwindSafe(|| hook.sum_in_place(&tensor))) {
        Ok(Ok(())) => 0,
        Ok(Err(message)) => {
            tracing::error!(%message, "summing batch-norm statistics over ranks");
            1
        }
        Err(_) => 1,
    }
}

unsafe extern "C" fn hook_drop(context: *mut c_void) {
    // SAFETY: the C++ holder calls this exactly once, with the pointer that Box::into_raw gave.
    drop(unsafe { Box::from_raw(context.cast::<Hook>()) });
}

/// Batch norm in training mode, leaky ReLU and dropout: channels-last `[N, C, H, W]` to the same.
///
/// # Errors
/// Another layout, device or type; a failing sum over ranks.
pub fn norm_act(x: &Tensor, args: &NormAct) -> Result<Tensor, OpError> {
    let mut out: ffi::Out = null_mut();
    let context = match &args.sync {
        Some(hook) => Box::into_raw(Box::new(Arc::clone(hook))).cast::<c_void>(),
        None => null_mut(),
    };
    let synced = args.sync.is_some();
    // SAFETY: all tensors live through the call; the running statistics are written in place
    // like any in-place method of tch does. `context` is null or a leaked Box<Hook>, which the
    // C++ side takes over first of all and frees through `hook_drop` once the graph is gone.
    check("norm_act", unsafe {
        ffi::cpcr_ops_norm_act(
            x.as_ptr().cast(),
            args.weight.as_ptr().cast(),
            args.bias.as_ptr().cast(),
            args.running_mean.as_ptr().cast(),
            args.running_var.as_ptr().cast(),
            args.momentum,
            args.eps,
            args.slope,
            args.dropout,
            args.key,
            synced.then_some(hook_call as ffi::HookCall),
            synced.then_some(hook_drop as ffi::HookDrop),
            context,
            &raw mut out,
        )
    })?;
    adopt("norm_act", out)
}

/// Per decoder and class, over the labelled samples: `[2, 3, C]` float64 of intersection,
/// squared probabilities and label counts.
///
/// # Errors
/// Unfit shapes or types, or a label that is no class.
pub fn dice_sums(l1: &Tensor, l2: &Tensor, labels: &Tensor) -> Result<Tensor, OpError> {
    let mut out: ffi::Out = null_mut();
    // SAFETY: the tensors live through the call and are only read; the C++ side checks shapes,
    // types and layouts before it touches data. `out` is a valid place for one pointer.
    check("dice_sums", unsafe {
        ffi::cpcr_ops_dice_sums(
            l1.as_ptr().cast(),
            l2.as_ptr().cast(),
            labels.as_ptr().cast(),
            &raw mut out,
        )
    })?;
    adopt("dice_sums", out)
}

/// Which terms [`pair_loss`] computes; a factor of zero leaves its term out. The factors multiply
/// sums over this rank's pixels in the gradients; the values come back without them.
#[derive(Debug, Clone, Copy, Default)]
pub struct PairTerms<'a> {
    /// d loss / d (intersection, squared probabilities), `[2, 2, C]`: Dice's part.
    pub dice: Option<&'a Tensor>,
    /// Factor of focal loss.
    pub focal: f64,
    /// Exponent of focal loss.
    pub gamma: f64,
    /// Factor of distillation, both ways.
    pub kd: f64,
    /// Temperature of distillation.
    pub temperature: f64,
    /// Factor of the entropy of the mean prediction.
    pub entropy: f64,
}

/// What [`pair_loss`] gives back.
#[derive(Debug)]
pub struct PairGradients {
    /// d loss / d logits of decoder 1.
    pub g1: Tensor,
    /// d loss / d logits of decoder 2.
    pub g2: Tensor,
    /// Plain sums over this rank's pixels, float64 `[focal, kd, entropy]`.
    pub sums: Tensor,
}

/// Values and gradients of the losses between two decoders' logits `[N, C, H, W]`; `labels`
/// (uint8 `[N_l, H, W]`) belong to the first samples.
///
/// # Errors
/// Unfit shapes, types or layouts.
pub fn pair_loss(
    l1: &Tensor,
    l2: &Tensor,
    labels: Option<&Tensor>,
    terms: &PairTerms,
) -> Result<PairGradients, OpError> {
    let (mut g1, mut g2, mut sums): (ffi::Out, ffi::Out, ffi::Out) =
        (null_mut(), null_mut(), null_mut());
    let pointer = |t: Option<&Tensor>| t.map_or(std::ptr::null(), |t| t.as_ptr().cast::<c_void>());
    // SAFETY: the tensors live through the call and are only read, null standing for absent
    // where the C++ side expects it; shapes, types and layouts are checked there before data is
    // touched. The three out places are written only on success.
    check("pair_loss", unsafe {
        ffi::cpcr_ops_pair_loss(
            l1.as_ptr().cast(),
            l2.as_ptr().cast(),
            pointer(labels),
            pointer(terms.dice),
            terms.focal,
            terms.gamma,
            terms.kd,
            terms.temperature,
            terms.entropy,
            &raw mut g1,
            &raw mut g2,
            &raw mut sums,
        )
    })?;
    Ok(PairGradients {
        g1: adopt("pair_loss", g1)?,
        g2: adopt("pair_loss", g2)?,
        sums: adopt("pair_loss", sums)?,
    })
}
