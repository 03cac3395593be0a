//! MC-Net, mutual consistency (Wu et al., MICCAI 2021; as CPCR's authors run it, METHOD "URPC and
//! MC-Net").
//!
//! Two decoders, main predictions only. Dice(d1) + Dice(d2) + lambda(t) [MSE(p1, sharp(p2)) +
//! MSE(p2, sharp(p1))] over the whole batch, sharp(p) = p^(1/T) / (p^(1/T) + (1 - p)^(1/T)), T = 0.1; the
//! sharpened target is not detached.

use tch::{Kind, Tensor};

use super::{
    Consistency, Method, MethodError, Passes, StepInput, main_logits, one_pass, probabilities,
};
use crate::loss::{StepLoss, dice};
use crate::model::{Ensemble, Heads, NetworkConfig};

/// T of the sharpening.
const TEMPERATURE: f64 = 0.1;

/// The method.
#[derive(Debug, Clone, Copy)]
pub struct McNet {
    /// lambda(t).
    pub consistency: Consistency,
}

impl Method for McNet {
    fn network(&self, sizes: NetworkConfig) -> NetworkConfig {
        NetworkConfig { pyramid: false, ..sizes }
    }

    fn terms(&self) -> &'static [&'static str] {
        &["dice", "consistency", "total"]
    }

    fn consistency_weight(&self, done: u64) -> f64 {
        self.consistency.at(done)
    }

    fn forward(&self, nets: &Ensemble, step: &StepInput) -> Result<Passes, MethodError> {
        one_pass(nets, step, Heads::Main)
    }

    fn loss(&self, passes: &Passes, step: &StepInput) -> Result<StepLoss, MethodError> {
        let outputs = passes.outputs.first().ok_or(MethodError::Networks("a student"))?;
        let logits = [main_logits(outputs, 0)?, main_logits(outputs, 1)?];
        let (spread, n) = (step.spread(), step.labelled());
        let labels = step.labels.f_to_kind(Kind::Int64)?;
        let dice = |logits: &Tensor| -> Result<Tensor, MethodError> {
            let sums = dice::sums(&logits.f_narrow(0, 0, n)?, &labels)?;
            Ok(spread.dice(&sums, dice::SMOOTH, n > 0)?)
        };
        let dice = dice(logits[0])?.f_add(&dice(logits[1])?)?;
        let weight = self.consistency_weight(step.done);
        let consistency = if weight == 0.0 {
            dice.f_zeros_like()?
        } else {
            let [p, q] = [probabilities(logits[0])?, probabilities(logits[1])?];
            let there = p.f_sub(&sharpen(&q)?)?.f_square()?.f_sum(Kind::Double)?;
            let back = q.f_sub(&sharpen(&p)?)?.f_square()?.f_sum(Kind::Double)?;
            let numbers = step.counts.samples as f64 * step.pixels() * p.size()[1] as f64;
            spread.mean(&there.f_add(&back)?, numbers)?
        };
        Ok(StepLoss::of(self.terms(), &[(1.0, dice), (weight, consistency)], &step.counts)?)
    }
}

/// sharp(p), elementwise.
///
/// # Errors
/// Where libtorch fails.
pub fn sharpen(p: &Tensor) -> Result<Tensor, MethodError> {
    let power = 1.0 / TEMPERATURE;
    let up = p.f_pow_tensor_scalar(power)?;
    let rest = p.f_neg()?.f_add_scalar(1.0)?.f_pow_tensor_scalar(power)?;
    Ok(up.f_div(&up.f_add(&rest)?)?)
}
