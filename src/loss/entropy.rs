//! Entropy of the two decoders' mean prediction, as a share of its maximum log C.

use tch::{Kind, Tensor};

use super::{LossError, precise};

/// Added inside the logarithm.
const EPSILON: f64 = 1e-6;

/// Sum over pixels of -sum_c q log(q + 1e-6) / log C, q the mean of both softmaxes.
///
/// # Errors
/// Shapes that differ.
pub fn of_mean(a: &Tensor, b: &Tensor) -> Result<Tensor, LossError> {
    let kind = precise(a)?;
    let q = a.f_softmax(1, kind)?.f_add(&b.f_softmax(1, kind)?)?.f_mul_scalar(0.5)?;
    let h = q.f_mul(&q.f_add_scalar(EPSILON)?.f_log()?)?.f_sum(Kind::Double)?;
    Ok(h.f_mul_scalar(-1.0 / (a.size()[1] as f64).ln())?)
}
