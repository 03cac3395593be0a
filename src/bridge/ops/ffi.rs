//! The entries of the C++ files of this folder, as declared there. Each returns 0, or 1 and
//! leaves a message; none lets an exception out.

use std::ffi::{c_char, c_int, c_void};

/// `const at::Tensor*`, borrowed.
pub(super) type In = *const c_void;
/// `at::Tensor*`, owned by the receiver.
pub(super) type Out = *mut c_void;
/// Sums a float64 tensor over ranks in place; 0 on success.
pub(super) type HookCall = unsafe extern "C" fn(*mut c_void, *mut c_void) -> c_int;
/// Frees a hook's context.
pub(super) type HookDrop = unsafe extern "C" fn(*mut c_void);

unsafe extern "C" {
    pub(super) fn cpcr_ops_last_error() -> *const c_char;
    pub(super) fn cpcr_ops_backward(roots: *const In, grads: *const In, n: i64) -> c_int;
    pub(super) fn cpcr_ops_grads_to_none(list: *const In, n: i64) -> c_int;
    pub(super) fn cpcr_ops_sgd(
        params: *const In,
        buffers: *const In,
        n: i64,
        lr: f64,
        momentum: f64,
        weight_decay: f64,
        first: c_int,
    ) -> c_int;
    pub(super) fn cpcr_ops_channels_last(tensor: In, out: *mut Out) -> c_int;
    pub(super) fn cpcr_ops_is_channels_last(tensor: In, out: *mut c_int) -> c_int;
    pub(super) fn cpcr_ops_allow_tf32(allow: c_int) -> c_int;
    pub(super) fn cpcr_ops_dropout_mask(like: In, p: f64, key: u64, out: *mut Out) -> c_int;
    pub(super) fn cpcr_ops_norm_act(
        x: In,
        weight: In,
        bias: In,
        running_mean: In,
        running_var: In,
        momentum: f64,
        eps: f64,
        slope: f64,
        p: f64,
        key: u64,
        hook_call: Option<HookCall>,
        hook_drop: Option<HookDrop>,
        context: *mut c_void,
        out: *mut Out,
    ) -> c_int;
    pub(super) fn cpcr_ops_conv3x3(x: In, weight: In, bias: In, out: *mut Out) -> c_int;
    pub(super) fn cpcr_ops_conv3x3_pair(
        x1: In,
        x2: In,
        weight: In,
        bias: In,
        out: *mut Out,
    ) -> c_int;
    pub(super) fn cpcr_ops_dice_sums(l1: In, l2: In, labels: In, out: *mut Out) -> c_int;
    pub(super) fn cpcr_ops_pair_loss(
        l1: In,
        l2: In,
        labels: In,
        dice: In,
        focal: f64,
        gamma: f64,
        kd: f64,
        temperature: f64,
        entropy: f64,
        g1: *mut Out,
        g2: *mut Out,
        values: *mut Out,
    ) -> c_int;
    pub(super) fn cpcr_ops_script(
        names: *const *const c_char,
        tensors: *const In,
        are_buffers: *const c_int,
        n: i64,
        source: *const c_char,
        out: *mut Out,
    ) -> c_int;
}
