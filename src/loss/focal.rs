//! Focal loss without alpha; the factor (1 - p_t)^gamma is detached. Gamma 0 is cross-entropy.

use tch::{Kind, Tensor};

use super::{LossError, precise};

/// Gamma of the `cpcr-focal` preset.
pub const GAMMA: f64 = 2.5;

/// Sum over pixels: logits `[N_l, C, H, W]`, labels int64 `[N_l, H, W]`.
///
/// # Errors
/// Unfit shapes, or a label that is no class.
pub fn sum(logits: &Tensor, labels: &Tensor, gamma: f64) -> Result<Tensor, LossError> {
    let log_p = logits.f_log_softmax(1, precise(logits)?)?;
    // [N, H, W] -> [N, 1, H, W]
    let log_pt = log_p.f_gather(1, &labels.f_unsqueeze(1)?, false)?;
    let rest = log_pt.f_detach()?.f_exp()?.f_mul_scalar(-1.0)?.f_add_scalar(1.0)?;
    let factor = rest.f_clamp_min(0.0)?.f_pow_tensor_scalar(gamma)?;
    Ok(factor.f_mul(&log_pt)?.f_sum(Kind::Double)?.f_neg()?)
}
