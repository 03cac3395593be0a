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

/// Batch norm in training mode, leaky ReLU and dropout: `[N, C, H, W]` to the same. One pass over
/// memory for channels-last float32 and bfloat16 on the CPU; plain operations, and no dropout, for
/// other layouts, types and devices.
///
/// # Errors
/// A dropout where there is none; shapes that do not fit; a failing sum over ranks.
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

/// A convolution with a 3 x 3 kernel, stride 1 and padding 1: `[N, I, H, W]` with weights
/// `[O, I, 3, 3]` and bias `[O]` to `[N, O, H, W]`. On the CPU those with few channels have kernels
/// of their own; all others, other types, layouts and devices are libtorch's `conv2d`.
///
/// # Errors
/// Shapes or types that do not belong together.
pub fn conv3x3(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor, OpError> {
    let mut out: ffi::Out = null_mut();
    // SAFETY: the tensors live through the call and are only read; the C++ side checks shapes,
    // types and layouts before it touches data. `out` is a valid place for one pointer.
    check("conv3x3", unsafe {
        ffi::cpcr_ops_conv3x3(
            x.as_ptr().cast(),
            weight.as_ptr().cast(),
            bias.as_ptr().cast(),
            &raw mut out,
        )
    })?;
    adopt("conv3x3", out)
}

/// [`conv3x3`] of two inputs joined on channels, `[N, I1, H, W]` and `[N, I2, H, W]` with weights
/// `[O, I1 + I2, 3, 3]`; where there is a kernel for it, without joining them.
///
/// # Errors
/// Shapes or types that do not belong together.
pub fn conv3x3_pair(
    inputs: [&Tensor; 2],
    weight: &Tensor,
    bias: &Tensor,
) -> Result<Tensor, OpError> {
    let mut out: ffi::Out = null_mut();
    // SAFETY: as in `conv3x3`.
    check("conv3x3_pair", unsafe {
        ffi::cpcr_ops_conv3x3_pair(
            inputs[0].as_ptr().cast(),
            inputs[1].as_ptr().cast(),
            weight.as_ptr().cast(),
            bias.as_ptr().cast(),
            &raw mut out,
        )
    })?;
    adopt("conv3x3_pair", out)
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

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::bridge::ops::{backward, channels_last};

    /// The output and the gradients of input, weight and bias.
    fn through(
        convolve: impl Fn(&Tensor, &Tensor, &Tensor) -> Tensor,
        inputs: [&Tensor; 3],
        upstream: &Tensor,
    ) -> Vec<Tensor> {
        let [x, w, b] = inputs.map(|t| t.detach().set_requires_grad(true));
        let y = convolve(&x, &w, &b);
        backward(&[y.shallow_clone()], &[upstream.shallow_clone()]).unwrap();
        vec![y.detach(), x.grad(), w.grad(), b.grad()]
    }

    /// Channel counts of every path, and two that have none; a width of no whole number of blocks.
    #[test]
    fn convolutions_of_few_channels_are_those_of_libtorch() {
        let plain = |x: &Tensor, w: &Tensor, b: &Tensor| {
            x.f_conv2d(w, Some(b), [1i64, 1], [1i64, 1], [1i64, 1], 1).unwrap()
        };
        let ours = |x: &Tensor, w: &Tensor, b: &Tensor| conv3x3(x, w, b).unwrap();
        let shapes = [
            (1, 16),
            (3, 32),
            (16, 16),
            (32, 16),
            (16, 32),
            (64, 32),
            (16, 4),
            (64, 5),
            (256, 32),
            (32, 2),
            (8, 8),
            (16, 6),
        ];
        for (inputs, outputs) in shapes {
            for (h, w) in [(5, 40), (5, 37), (1, 16), (23, 24)] {
                tch::manual_seed(inputs * 100 + outputs);
                let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu));
                let x = channels_last(&random(&[3, inputs, h, w])).unwrap();
                let weight = channels_last(&random(&[outputs, inputs, 3, 3])).unwrap();
                let (b, g) = (random(&[outputs]), random(&[3, outputs, h, w]));
                let exact = [&x, &weight, &b].map(|t| t.to_kind(Kind::Double));
                let exact = through(plain, exact.each_ref(), &g.to_kind(Kind::Double));
                let got = through(ours, [&x, &weight, &b], &g);
                for (what, (a, b)) in ["y", "dx", "dw", "db"].iter().zip(got.iter().zip(&exact)) {
                    let off = (a.to_kind(Kind::Double) - b).abs().max().double_value(&[]);
                    let scale = b.abs().max().double_value(&[]);
                    assert!(
                        off <= 5e-6 * scale,
                        "{inputs} -> {outputs} at {h} x {w}: {what} off by {off:e} of {scale}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_convolution_of_a_pair_is_that_of_the_joined() {
        for (first, second, outputs) in [(16, 16, 16), (32, 32, 32), (16, 32, 64), (8, 8, 16)] {
            tch::manual_seed(outputs);
            let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu));
            let inputs = [first, second].map(|c| channels_last(&random(&[2, c, 6, 40])).unwrap());
            let w = channels_last(&random(&[outputs, first + second, 3, 3])).unwrap();
            let (b, g) = (random(&[outputs]), random(&[2, outputs, 6, 40]));
            let run = |joined: bool, kind: Kind| {
                let leaf = |t: &Tensor| t.to_kind(kind).detach().set_requires_grad(true);
                let ([x1, x2], w, b) = (inputs.each_ref().map(leaf), leaf(&w), leaf(&b));
                let y = if joined {
                    Tensor::cat(&[&x1, &x2], 1)
                        .f_conv2d(&w, Some(&b), [1i64, 1], [1i64, 1], [1i64, 1], 1)
                        .unwrap()
                } else {
                    conv3x3_pair([&x1, &x2], &w, &b).unwrap()
                };
                backward(&[y.shallow_clone()], &[g.to_kind(kind)]).unwrap();
                [y.detach(), x1.grad(), x2.grad(), w.grad(), b.grad()]
            };
            let (exact, got) = (run(true, Kind::Double), run(false, Kind::Float));
            for (i, (a, b)) in got.iter().zip(&exact).enumerate() {
                let off = (a.to_kind(Kind::Double) - b).abs().max().double_value(&[]);
                let scale = b.abs().max().double_value(&[]);
                assert!(
                    off <= 5e-6 * scale,
                    "{first} + {second} -> {outputs}: {i} off by {off:e} of {scale}"
                );
            }
        }
    }

    /// The network's first convolution needs no gradient of its input.
    #[test]
    fn an_input_without_a_gradient_is_left_alone() {
        let x = channels_last(&Tensor::randn([2, 1, 16, 16], (Kind::Float, Device::Cpu))).unwrap();
        let w = Tensor::randn([16, 1, 3, 3], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let b = Tensor::zeros([16], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let y = conv3x3(&x, &w, &b).unwrap();
        backward(&[y.shallow_clone()], &[y.ones_like()]).unwrap();
        assert!(!x.grad().defined() && w.grad().defined() && b.grad().defined());
    }
}
