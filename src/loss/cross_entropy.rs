//! Cross-entropy, -log p of the true class, as a sum over pixels: means are left to the caller,
//! who knows how many pixels all ranks have together.

use tch::{Kind, Tensor};

use super::{LossError, precise};

/// The sum over pixels: logits `[N, C, H, W]`, labels int64 `[N, H, W]`.
///
/// # Errors
/// Unfit shapes, or a label that is no class.
pub fn sum(logits: &Tensor, labels: &Tensor) -> Result<Tensor, LossError> {
    Ok(by_pixel(logits, labels)?.f_sum(Kind::Double)?)
}

/// The sum over the pixels where `mask` `[N, H, W]` is one.
///
/// # Errors
/// Unfit shapes, or a label that is no class.
pub fn masked_sum(logits: &Tensor, labels: &Tensor, mask: &Tensor) -> Result<Tensor, LossError> {
    let each = by_pixel(logits, labels)?;
    let mask = mask.f_unsqueeze(1)?.f_to_kind(each.f_kind()?)?;
    Ok(each.f_mul(&mask)?.f_sum(Kind::Double)?)
}

/// `[N, 1, H, W]`
fn by_pixel(logits: &Tensor, labels: &Tensor) -> Result<Tensor, LossError> {
    let log_p = logits.f_log_softmax(1, precise(logits)?)?;
    // [N, H, W] -> [N, 1, H, W]
    Ok(log_p.f_gather(1, &labels.f_unsqueeze(1)?, false)?.f_neg()?)
}
