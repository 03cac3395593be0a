//! URPC, uncertainty rectified pyramid consistency (Luo et al., MICCAI 2021; as CPCR's authors run it,
//! METHOD "URPC and MC-Net").
//!
//! One decoder with the pyramid. Supervised: the mean over the four heads of (Dice + CE) / 2. On unlabelled
//! samples, P the mean of the four softmaxes: V_k = sum_c P (log P - log p_k), w_k = exp(-V_k),
//! C_k = mean((P - p_k)^2 w_k) / (mean(w_k) + 1e-8); the total adds lambda(t) / 2 times the mean of the C_k.
//! The original also adds the mean of the V_k.

use tch::{Kind, Tensor};

use super::{
    Consistency, Method, MethodError, Passes, StepInput, one_pass, probabilities, sum_of,
    supervised,
};
use crate::loss::StepLoss;
use crate::model::{Ensemble, Heads, NetworkConfig, Pyramid};

/// Of lambda(t), as the authors run it.
const SHARE: f64 = 0.5;
/// Keeps a quotient finite.
const EPSILON: f64 = 1e-8;

/// The method.
#[derive(Debug, Clone, Copy)]
pub struct Urpc {
    /// lambda(t).
    pub consistency: Consistency,
}

impl Method for Urpc {
    fn network(&self, sizes: NetworkConfig) -> NetworkConfig {
        NetworkConfig { up: sizes.up.iter().copied().take(1).collect(), ..sizes }
    }

    fn terms(&self) -> &'static [&'static str] {
        &["dice", "ce", "consistency", "total"]
    }

    fn heads(&self, _done: u64) -> Heads {
        Heads::All
    }

    fn consistency_weight(&self, done: u64) -> f64 {
        SHARE * self.consistency.at(done)
    }

    fn forward(&self, nets: &Ensemble, step: &StepInput) -> Result<Passes, MethodError> {
        one_pass(nets, step, Heads::All)
    }

    fn loss(&self, passes: &Passes, step: &StepInput) -> Result<StepLoss, MethodError> {
        let outputs = passes.outputs.first().ok_or(MethodError::Networks("a student"))?;
        let decoder = outputs.decoders.first().ok_or(MethodError::Networks("a decoder"))?;
        let heads = full_size(decoder)?;
        let share = 1.0 / heads.len() as f64;
        let (mut dice, mut ce) = (Vec::new(), Vec::new());
        for logits in &heads {
            let [d, c] = supervised(logits, step)?;
            dice.push(d);
            ce.push(c);
        }
        let weight = self.consistency_weight(step.done);
        let consistency =
            if weight == 0.0 { dice[0].f_zeros_like()? } else { rectified(&heads, step)? };
        let shares = [
            (0.5, sum_of(&dice)?.f_mul_scalar(share)?),
            (0.5, sum_of(&ce)?.f_mul_scalar(share)?),
            (weight, consistency),
        ];
        Ok(StepLoss::of(self.terms(), &shares, &step.counts)?)
    }
}

/// The four predictions at full size: main, strides 2, 4, 8, each `[N, C, H, W]`.
fn full_size(decoder: &Pyramid) -> Result<Vec<Tensor>, MethodError> {
    let size = [decoder.main.size()[2], decoder.main.size()[3]];
    let aux = decoder.aux.as_ref().ok_or(MethodError::Networks("auxiliary heads"))?;
    let mut all = vec![decoder.main.shallow_clone()];
    for logits in aux {
        all.push(logits.f_upsample_nearest2d(size, None, None)?);
    }
    Ok(all)
}

/// The share of the mean over heads of C_k on the unlabelled samples. Nothing is detached.
fn rectified(heads: &[Tensor], step: &StepInput) -> Result<Tensor, MethodError> {
    let labelled = step.labelled();
    let rest = |t: &Tensor| t.f_narrow(0, labelled, t.size()[0] - labelled);
    let (mut p, mut log_p) = (Vec::new(), Vec::new());
    for logits in heads {
        let logits = rest(logits)?;
        p.push(probabilities(&logits)?);
        log_p.push(logits.f_log_softmax(1, p[0].f_kind()?)?);
    }
    let mean = sum_of(&p)?.f_mul_scalar(1.0 / heads.len() as f64)?;
    // A class that no head gives any chance has 0 log 0 = 0.
    let entropy = mean.f_mul(&mean.f_clamp_min(f64::from(f32::MIN_POSITIVE))?.f_log()?)?;
    let mut sums = Vec::with_capacity(2 * heads.len());
    for (p, log_p) in p.iter().zip(&log_p) {
        // [N, C, H, W] -> [N, 1, H, W]
        let v = entropy.f_sub(&mean.f_mul(log_p)?)?;
        let v = v.f_sum_dim_intlist([1i64].as_slice(), true, None::<Kind>)?;
        let w = v.f_neg()?.f_exp()?;
        let off = mean.f_sub(p)?.f_square()?.f_mul(&w)?;
        sums.extend([off.f_sum(Kind::Double)?, w.f_sum(Kind::Double)?]);
    }
    let spread = step.spread();
    // [heads, 2] over the whole batch
    let sums = spread.sum(&Tensor::f_stack(&sums, 0)?.f_view([heads.len() as i64, 2])?)?;
    let pixels = (step.counts.unlabelled() as f64 * step.pixels()).max(1.0);
    let classes = heads[0].size()[1] as f64;
    let off = sums.f_select(1, 0)?.f_mul_scalar(1.0 / (pixels * classes))?;
    let weight = sums.f_select(1, 1)?.f_mul_scalar(1.0 / pixels)?.f_add_scalar(EPSILON)?;
    Ok(spread.part(&off.f_div(&weight)?.f_mean(Kind::Double)?)?)
}
