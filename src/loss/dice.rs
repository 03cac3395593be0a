//! Dice over all classes, background included, from sums over the labelled pixels of all ranks.
//!
//! Per class 1 - (2 I + s) / (P + G + s) with I = sum p g, P = sum p^2, G = sum g, s = 1e-5; the
//! mean over classes. Because it is no mean over pixels it is computed in two stages: sums (which
//! ranks add up), then value and derivatives from the sums.

use tch::{Kind, Tensor};

use super::{LossError, precise};

/// s of the formula.
pub const SMOOTH: f64 = 1e-5;

/// I, P, G per class of one decoder, `[3, C]`, differentiable: logits `[N_l, C, H, W]`, labels
/// int64 `[N_l, H, W]`.
///
/// # Errors
/// Unfit shapes.
pub fn sums(logits: &Tensor, labels: &Tensor) -> Result<Tensor, LossError> {
    masked_sums(logits, labels, None)
}

/// The same over the places where `mask` `[N_l, H, W]` is one.
///
/// # Errors
/// Unfit shapes.
pub fn masked_sums(
    logits: &Tensor,
    labels: &Tensor,
    mask: Option<&Tensor>,
) -> Result<Tensor, LossError> {
    let classes = logits.size()[1];
    let kind = precise(logits)?;
    let p = logits.f_softmax(1, kind)?;
    // [N, H, W] -> [N, H, W, C] -> [N, C, H, W]
    let g = labels.f_one_hot(classes)?.f_permute([0i64, 3, 1, 2])?.f_to_kind(kind)?;
    let (p, g) = match mask {
        None => (p, g),
        Some(mask) => {
            let mask = mask.f_unsqueeze(1)?.f_to_kind(kind)?;
            (p.f_mul(&mask)?, g.f_mul(&mask)?)
        }
    };
    let over = [0i64, 2, 3];
    let sum = |t: Tensor| t.f_sum_dim_intlist(over.as_slice(), false, Kind::Double);
    let (i, s) = (sum(p.f_mul(&g)?)?, sum(p.f_mul(&p)?)?);
    Ok(Tensor::f_stack(&[i, s, sum(g)?], 0)?)
}

/// The loss, a scalar, from sums `[3, C]` over the whole batch; differentiable.
///
/// # Errors
/// Unfit shapes.
pub fn value(sums: &Tensor, smooth: f64) -> Result<Tensor, LossError> {
    let (i, p, g) = (sums.f_select(0, 0)?, sums.f_select(0, 1)?, sums.f_select(0, 2)?);
    let numerator = i.f_mul_scalar(2.0)?.f_add_scalar(smooth)?;
    let ratio = numerator.f_div(&p.f_add(&g)?.f_add_scalar(smooth)?)?;
    Ok(ratio.f_mean(Kind::Double)?.f_mul_scalar(-1.0)?.f_add_scalar(1.0)?)
}

/// The loss of each decoder and its derivatives with respect to I and P, from sums `[D, 3, C]`:
/// `[D]` and `[D, 2, C]`, float64.
///
/// # Errors
/// Unfit shapes.
pub fn from_sums(sums: &Tensor) -> Result<(Tensor, Tensor), LossError> {
    let (i, p, g) = (sums.f_select(1, 0)?, sums.f_select(1, 1)?, sums.f_select(1, 2)?);
    let classes = *i.size().last().unwrap_or(&1) as f64;
    let numerator = i.f_mul_scalar(2.0)?.f_add_scalar(SMOOTH)?;
    let denominator = p.f_add(&g)?.f_add_scalar(SMOOTH)?;
    let ratio = numerator.f_div(&denominator)?;
    let value = ratio.f_mul_scalar(-1.0)?.f_add_scalar(1.0)?;
    let value = value.f_mean_dim([-1i64].as_slice(), false, Kind::Double)?;
    let di = denominator.f_reciprocal()?.f_mul_scalar(-2.0 / classes)?;
    let dp = ratio.f_div(&denominator)?.f_mul_scalar(1.0 / classes)?;
    Ok((value, Tensor::f_stack(&[di, dp], 1)?))
}
