//! The CPCR objective: from a step's logits to gradients with respect to them.
//!
//! The trainer calls [`Objective::step`] and hands `roots` and `grads` to `bridge::ops::backward`.
//! A term of weight zero is not computed. Over W ranks every rank holds a part of the batch; its
//! gradients come out multiplied by W, so that averaging over ranks gives those of the whole
//! batch: mean-type terms are local sum * W / global count, Dice's derivatives are taken at the
//! global sums.

use tch::{Device, Kind, Tensor};

use super::{Counts, LossError, StepLoss, dice, distill, entropy, focal, precise};
use crate::bridge::ops::{self, PairTerms, SumOverRanks};
use crate::model::{Outputs, Pyramid};

/// What [`StepLoss::terms`] holds, in order.
pub const TERMS: [&str; 6] = ["dice", "focal", "kd_main", "entropy", "kd_aux", "total"];

/// The terms' weights in one step; zero leaves a term out.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TermWeights {
    /// Dice of both decoders.
    pub dice: f64,
    /// Focal loss of both decoders.
    pub focal: f64,
    /// Distillation between the main predictions.
    pub kd_main: f64,
    /// Entropy of the mean prediction.
    pub entropy: f64,
    /// The cross-pyramid term; it needs the auxiliary heads.
    pub kd_aux: f64,
}

impl TermWeights {
    /// Whether the auxiliary heads are needed.
    #[must_use]
    pub fn needs_aux(&self) -> bool {
        self.kd_aux != 0.0
    }
}

/// Which implementation computes the losses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Path {
    /// The fused kernels on the CPU, plain operations elsewhere.
    #[default]
    Auto,
    /// Plain operations everywhere: what the kernels are checked against.
    Plain,
}

/// The objective.
#[derive(Debug, Clone, Copy)]
pub struct Objective {
    /// T of distillation.
    pub temperature: f64,
    /// Exponent of focal loss.
    pub gamma: f64,
    /// Dice over the whole batch; else over each rank's part, and the mean over the ranks that have
    /// labels, as data-parallel training without it would.
    pub global_dice: bool,
    /// Implementation.
    pub path: Path,
}

impl Default for Objective {
    fn default() -> Self {
        Self {
            temperature: distill::TEMPERATURE,
            gamma: focal::GAMMA,
            global_dice: true,
            path: Path::Auto,
        }
    }
}

/// One pair of maps and the factors its sums are taken with.
struct Pair<'a> {
    logits: [&'a Tensor; 2],
    labels: Option<&'a Tensor>,
    /// `[2, 2, C]`, scaled.
    dice: Option<&'a Tensor>,
    focal: f64,
    kd: f64,
    entropy: f64,
}

/// Gradients of both maps, sums `[3]` of focal, KD and entropy.
type PairResult = (Tensor, Tensor, Tensor);

impl Objective {
    /// Values and gradients of one step. `labels` (uint8 or int64 `[N_l, H, W]`) belong to the
    /// first N_l samples; a rank may have none. Ranks must agree on `weights`: with `dice` not
    /// zero each calls `ranks` once.
    ///
    /// # Errors
    /// Inputs that do not belong together; a failing sum over ranks.
    pub fn step(
        &self,
        outputs: &Outputs,
        labels: &Tensor,
        weights: &TermWeights,
        counts: &Counts,
        ranks: &dyn SumOverRanks,
    ) -> Result<StepLoss, LossError> {
        let [one, two] = outputs.decoders.as_slice() else {
            return Err(LossError::Input("two decoders' predictions are wanted".into()));
        };
        let main = [&one.main, &two.main];
        let size = main[0].size();
        let [_, _, h, w] = size[..] else {
            return Err(LossError::Input(format!("logits of shape {size:?}")));
        };
        let device = main[0].device();
        let labels = labels.f_to_device(device)?.f_to_kind(Kind::Uint8)?.f_contiguous()?;
        let world = f64::from(counts.world);
        let per = |samples: u64, pixels: i64| 1.0 / (samples.max(1) as f64 * pixels as f64);
        let (all, labelled) = (per(counts.samples, h * w), per(counts.labelled, h * w));

        let has_labels = labels.size()[0] > 0;
        // How many ranks' Dice make the batch's: all tell the same global one, or each its own.
        let tellers = match self.global_dice {
            true => world,
            false => world.min(counts.labelled as f64),
        };
        let dice_scale = weights.dice * if self.global_dice { world } else { world / tellers };
        let dice = self.dice(main, &labels, dice_scale, ranks)?;
        let (g1, g2, sums) = self.pair(&Pair {
            logits: main,
            labels: has_labels.then_some(&labels),
            dice: dice.as_ref().map(|(_, c)| c),
            focal: weights.focal * world * labelled,
            kd: weights.kd_main * world * all,
            entropy: weights.entropy * world * all,
        })?;
        let mut roots = vec![main[0].shallow_clone(), main[1].shallow_clone()];
        let mut grads = vec![g1, g2];
        let zero = Tensor::f_zeros([1i64], (Kind::Double, device))?;
        let kd_aux = if weights.needs_aux() {
            self.aux([one, two], weights, counts, &mut roots, &mut grads)?
        } else {
            zero.shallow_clone()
        };
        // The sum over ranks is what counts: each tells its part.
        let dice = match dice {
            Some((value, _)) if self.global_dice || has_labels => {
                value.f_sum(Kind::Double)?.f_view([1i64])?.f_mul_scalar(1.0 / tellers)?
            }
            _ => zero,
        };
        let scale = Tensor::f_from_slice(&[labelled, all, all])?.f_to_device(device)?;
        let terms = Tensor::f_cat(&[dice, sums.f_mul(&scale)?, kd_aux], 0)?;
        let factors =
            [weights.dice, weights.focal, weights.kd_main, weights.entropy, weights.kd_aux];
        let factors = Tensor::f_from_slice(&factors)?.f_to_device(device)?;
        let total = terms.f_mul(&factors)?.f_sum(Kind::Double)?.f_view([1i64])?;
        let terms = Tensor::f_cat(&[terms, total], 0)?;
        Ok(StepLoss { names: &TERMS, terms, roots, grads })
    }

    fn fused(&self, logits: &Tensor) -> bool {
        self.path == Path::Auto && logits.device() == Device::Cpu && logits.kind() != Kind::Double
    }

    /// The values `[2]` and the scaled derivatives `[2, 2, C]`, at the sums over all ranks.
    fn dice(
        &self,
        main: [&Tensor; 2],
        labels: &Tensor,
        scale: f64,
        ranks: &dyn SumOverRanks,
    ) -> Result<Option<(Tensor, Tensor)>, LossError> {
        if scale == 0.0 {
            return Ok(None);
        }
        let sums = tch::no_grad(|| -> Result<Tensor, LossError> {
            let [a, b] = [main[0].f_detach()?, main[1].f_detach()?];
            if self.fused(&a) {
                return Ok(ops::dice_sums(&a, &b, labels)?);
            }
            let n = labels.size()[0];
            let labels = labels.f_to_kind(Kind::Int64)?;
            let one = |t: Tensor| dice::sums(&t.f_narrow(0, 0, n)?, &labels);
            Ok(Tensor::f_stack(&[one(a)?, one(b)?], 0)?)
        })?;
        if self.global_dice {
            ranks.sum_in_place(&sums).map_err(LossError::Ranks)?;
        }
        let (value, derivatives) = dice::from_sums(&sums)?;
        Ok(Some((value, derivatives.f_mul_scalar(scale)?)))
    }

    /// The cross-pyramid term: distillation on the three coarse maps, over 3.
    fn aux(
        &self,
        decoders: [&Pyramid; 2],
        weights: &TermWeights,
        counts: &Counts,
        roots: &mut Vec<Tensor>,
        grads: &mut Vec<Tensor>,
    ) -> Result<Tensor, LossError> {
        let (Some(one), Some(two)) = (&decoders[0].aux, &decoders[1].aux) else {
            return Err(LossError::Input("kd_aux has a weight, but no auxiliary logits".into()));
        };
        let mut value = Tensor::f_zeros([1i64], (Kind::Double, one[0].device()))?;
        for (a, b) in one.iter().zip(two) {
            let pixels = a.size().iter().skip(2).product::<i64>() as f64;
            let each = 1.0 / (3.0 * counts.samples.max(1) as f64 * pixels);
            let (ga, gb, sums) = self.pair(&Pair {
                logits: [a, b],
                labels: None,
                dice: None,
                focal: 0.0,
                kd: weights.kd_aux * f64::from(counts.world) * each,
                entropy: 0.0,
            })?;
            value = value.f_add(&sums.f_narrow(0, 1, 1)?.f_mul_scalar(each)?)?;
            roots.extend([a.shallow_clone(), b.shallow_clone()]);
            grads.extend([ga, gb]);
        }
        Ok(value)
    }

    fn pair(&self, pair: &Pair) -> Result<PairResult, LossError> {
        let [a, b] = [pair.logits[0].f_detach()?, pair.logits[1].f_detach()?];
        if !self.fused(&a) {
            return self.pair_plain(a, b, pair);
        }
        let terms = PairTerms {
            dice: pair.dice,
            focal: pair.focal,
            gamma: self.gamma,
            kd: pair.kd,
            temperature: self.temperature,
            entropy: pair.entropy,
        };
        let out = ops::pair_loss(&a, &b, pair.labels, &terms)?;
        Ok((out.g1, out.g2, out.sums))
    }

    /// The same by autograd on detached logits.
    fn pair_plain(&self, a: Tensor, b: Tensor, pair: &Pair) -> Result<PairResult, LossError> {
        let kinds = [a.f_kind()?, b.f_kind()?];
        let kind = precise(&a)?;
        let leaf = |t: Tensor| t.f_to_kind(kind)?.f_detach()?.f_set_requires_grad(true);
        let (a, b) = (leaf(a)?, leaf(b)?);
        let zero = || Tensor::f_zeros([1i64], (Kind::Double, a.device()));
        let (mut total, mut sums) = (zero()?, [zero()?, zero()?, zero()?]);
        let mut add = |slot: usize, factor: f64, sum: Tensor| -> Result<(), LossError> {
            total = total.f_add(&sum.f_mul_scalar(factor)?)?;
            if let Some(place) = sums.get_mut(slot) {
                *place = sum.f_detach()?.f_view([1i64])?;
            }
            Ok(())
        };
        if let Some(labels) = pair.labels {
            let (n, labels) = (labels.size()[0], labels.f_to_kind(Kind::Int64)?);
            let (la, lb) = (a.f_narrow(0, 0, n)?, b.f_narrow(0, 0, n)?);
            if pair.focal != 0.0 {
                let sum = focal::sum(&la, &labels, self.gamma)?;
                add(0, pair.focal, sum.f_add(&focal::sum(&lb, &labels, self.gamma)?)?)?;
            }
            if let Some(derivatives) = pair.dice {
                // [2, 3, C] -> [2, 2, C]: I and P are what moves.
                let sums =
                    Tensor::f_stack(&[dice::sums(&la, &labels)?, dice::sums(&lb, &labels)?], 0)?;
                let moving = sums.f_narrow(1, 0, 2)?.f_mul(derivatives)?;
                add(usize::MAX, 1.0, moving.f_sum(Kind::Double)?)?;
            }
        }
        if pair.kd != 0.0 {
            add(1, pair.kd, distill::both_ways(&a, &b, self.temperature)?)?;
        }
        if pair.entropy != 0.0 {
            add(2, pair.entropy, entropy::of_mean(&a, &b)?)?;
        }
        let gradients = if total.requires_grad() {
            Tensor::f_run_backward(&[&total], &[&a, &b], false, false)?
        } else {
            vec![a.f_zeros_like()?, b.f_zeros_like()?]
        };
        let sums = Tensor::f_cat(&sums, 0)?;
        let [ga, gb] = [gradients[0].f_to_kind(kinds[0])?, gradients[1].f_to_kind(kinds[1])?];
        Ok((ga, gb, sums))
    }
}
