//! Tensor operations that `tch` lacks, as safe functions over a small C++ file each: backward
//! from given gradients, SGD with state, channels-last, fused batch norm, fused losses, TorchScript.
//!
//! Not a tensor library: whatever `tch` can do well is done with `tch`. The kernels are for the
//! CPU; callers choose another way on other devices.
#![allow(unsafe_code)]

mod ffi;
mod fused;
mod script;

use std::ffi::CStr;

use tch::Tensor;

pub use fused::{
    NormAct, PairGradients, PairTerms, SumOverRanks, conv3x3, conv3x3_pair, dice_sums, norm_act,
    pair_loss,
};
pub use script::{ScriptTensor, script_module};

/// Why an operation of the bridge failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpError {
    /// The C++ side refused or failed.
    #[error("{op}: {message}")]
    Failed {
        /// Which entry.
        op: &'static str,
        /// libtorch's own words.
        message: String,
    },
    /// A `tch` call failed.
    #[error(transparent)]
    Torch(#[from] tch::TchError),
    /// Roots and gradients differ in number.
    #[error("{roots} roots with {grads} gradients")]
    Mismatch {
        /// Number of roots.
        roots: usize,
        /// Number of gradients.
        grads: usize,
    },
}

/// Turns an entry's status into a result.
fn check(op: &'static str, status: i32) -> Result<(), OpError> {
    if status == 0 {
        return Ok(());
    }
    // SAFETY: the entry returns a pointer to this thread's NUL-terminated message, which lives
    // until the next failing call on this thread; it is copied before this function returns.
    let message = unsafe { CStr::from_ptr(ffi::cpcr_ops_last_error()) };
    Err(OpError::Failed { op, message: message.to_string_lossy().into_owned() })
}

/// Borrowed tensor pointers, for entries that take a list.
fn pointers(tensors: &[Tensor]) -> Vec<ffi::In> {
    tensors.iter().map(|t| t.as_ptr().cast()).collect()
}

/// Takes over a tensor that an entry has made.
fn adopt(op: &'static str, made: ffi::Out) -> Result<Tensor, OpError> {
    if made.is_null() {
        return Err(OpError::Failed { op, message: "no tensor came back".into() });
    }
    // SAFETY: `made` is a non-null `new at::Tensor` from the C++ side, handed over to us alone;
    // the returned value deletes it once.
    Ok(unsafe { Tensor::from_ptr(made.cast()) })
}

/// `torch.autograd.backward(roots, grads)`: accumulates into the leaves' gradients.
///
/// # Errors
/// Where autograd fails, hooks (such as the Reducer's) included.
pub fn backward(roots: &[Tensor], grads: &[Tensor]) -> Result<(), OpError> {
    if roots.len() != grads.len() {
        return Err(OpError::Mismatch { roots: roots.len(), grads: grads.len() });
    }
    let (r, g) = (pointers(roots), pointers(grads));
    // SAFETY: both arrays hold `len` pointers to live tensors (borrowed for this call) and are
    // only read; the entry catches every exception.
    check("backward", unsafe { ffi::cpcr_ops_backward(r.as_ptr(), g.as_ptr(), r.len() as i64) })
}

/// Forgets the gradients (`zero_grad(set_to_none=True)`); a view into a bucket is no obstacle.
///
/// # Errors
/// Does not fail on leaf tensors.
pub fn grads_to_none(parameters: &[Tensor]) -> Result<(), OpError> {
    let p = pointers(parameters);
    // SAFETY: the array holds `len` pointers to live tensors; a tensor is a handle, and setting
    // the gradient of the shared implementation is what this function is for. Rust hands out no
    // reference into a gradient, so nothing dangles.
    check("grads_to_none", unsafe { ffi::cpcr_ops_grads_to_none(p.as_ptr(), p.len() as i64) })
}

/// One step of `torch.optim.SGD` on tensors that all have gradients, bit for bit; with `first`,
/// the momentum buffers are set rather than updated.
///
/// # Errors
/// A parameter without a gradient, or shapes that differ.
pub fn sgd(
    parameters: &[Tensor],
    buffers: &[Tensor],
    lr: f64,
    momentum: f64,
    weight_decay: f64,
    first: bool,
) -> Result<(), OpError> {
    if parameters.len() != buffers.len() {
        return Err(OpError::Mismatch { roots: parameters.len(), grads: buffers.len() });
    }
    let (p, b) = (pointers(parameters), pointers(buffers));
    // SAFETY: both arrays hold `len` pointers to live tensors; the entry writes their elements
    // in place, as every in-place method of tch does through a shared handle.
    check("sgd", unsafe {
        ffi::cpcr_ops_sgd(
            p.as_ptr(),
            b.as_ptr(),
            p.len() as i64,
            lr,
            momentum,
            weight_decay,
            i32::from(first),
        )
    })
}

/// The same values with channels-last strides; differentiable, and a no-op where they are so.
///
/// # Errors
/// A tensor that is not four-dimensional.
pub fn channels_last(tensor: &Tensor) -> Result<Tensor, OpError> {
    let mut out: ffi::Out = std::ptr::null_mut();
    // SAFETY: `tensor` lives through the call and is only read; `out` is a valid place for one
    // pointer, written only on success.
    check("channels_last", unsafe {
        ffi::cpcr_ops_channels_last(tensor.as_ptr().cast(), &raw mut out)
    })?;
    adopt("channels_last", out)
}

/// Whether the strides are channels-last.
///
/// # Errors
/// An undefined tensor.
pub fn is_channels_last(tensor: &Tensor) -> Result<bool, OpError> {
    let mut out = 0;
    // SAFETY: `tensor` lives through the call and is only read; `out` is a valid i32.
    check("is_channels_last", unsafe {
        ffi::cpcr_ops_is_channels_last(tensor.as_ptr().cast(), &raw mut out)
    })?;
    Ok(out != 0)
}

/// A dropout mask, 0 or 1 / (1 - p), shaped, typed and laid out like `like`: a function of `key`
/// alone, whatever the number of threads.
///
/// # Errors
/// A tensor that is not on the CPU, or p outside [0, 1).
pub fn dropout_mask(like: &Tensor, p: f64, key: u64) -> Result<Tensor, OpError> {
    let mut out: ffi::Out = std::ptr::null_mut();
    // SAFETY: `like` lives through the call and only its metadata is read; `out` is a valid
    // place for one pointer, written only on success.
    check("dropout_mask", unsafe {
        ffi::cpcr_ops_dropout_mask(like.as_ptr().cast(), p, key, &raw mut out)
    })?;
    adopt("dropout_mask", out)
}

/// Allows or forbids TF32 in matrix products and convolutions on GPUs, for the whole process.
/// By default libtorch allows it in convolutions, which then agree to three digits only.
///
/// # Errors
/// Where libtorch refuses.
pub fn allow_tf32(allow: bool) -> Result<(), OpError> {
    // SAFETY: sets two flags of libtorch's global context; no pointer is passed.
    check("allow_tf32", unsafe { ffi::cpcr_ops_allow_tf32(i32::from(allow)) })
}
