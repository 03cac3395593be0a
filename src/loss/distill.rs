//! Distillation between two decoders: T^2 KL(softmax(b/T) || softmax(a/T)), the teacher b
//! detached, both ways, summed over classes and pixels.
//!
//! Means are left to the caller, who knows how many pixels all ranks have together. On auxiliary
//! logits it is applied to the coarse maps: their nearest-upsampled copies have the same mean.

use tch::{Kind, Tensor};

use super::{LossError, precise};

/// The temperature of the method.
pub const TEMPERATURE: f64 = 10.0;

/// KD(a <- b) as a sum over pixels, differentiable in `a` alone.
///
/// # Errors
/// Shapes that differ.
pub fn one_way(a: &Tensor, b: &Tensor, temperature: f64) -> Result<Tensor, LossError> {
    let kind = precise(a)?;
    let student = a.f_div_scalar(temperature)?.f_log_softmax(1, kind)?;
    let teacher = b.f_detach()?.f_div_scalar(temperature)?.f_log_softmax(1, kind)?;
    let kl = teacher.f_exp()?.f_mul(&teacher.f_sub(&student)?)?;
    Ok(kl.f_sum(Kind::Double)?.f_mul_scalar(temperature * temperature)?)
}

/// KD(a <- b) + KD(b <- a) as a sum over pixels.
///
/// # Errors
/// Shapes that differ.
pub fn both_ways(a: &Tensor, b: &Tensor, temperature: f64) -> Result<Tensor, LossError> {
    Ok(one_way(a, b, temperature)?.f_add(&one_way(b, a, temperature)?)?)
}
