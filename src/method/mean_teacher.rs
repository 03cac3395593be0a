//! Mean teacher (Tarvainen and Valpola, NeurIPS 2017), and with the uncertainty mask UA-MT (Yu et al.,
//! MICCAI 2019); both as the SSL4MIS benchmark runs them on ACDC.
//!
//! One U-Net; its teacher is the moving average of its weights. (Dice + CE) / 2 on the labelled samples,
//! lambda(t) times a consistency on the unlabelled ones between the student's softmax and that of the teacher,
//! which sees the images with noise clip(N(0, 0.1), +-0.2) added. Plain: the mean square. UA-MT: the teacher looks
//! eight times more, each time with noise and dropout of its own; squares count only where the entropy u of
//! their mean (in nats) is below a threshold that rises from 3/4 ln 2 to ln 2: sum(mask d) / (2 sum(mask)).
//! The teacher's passes use the batch's own statistics, as in training.

use tch::{Kind, Tensor};

use super::{
    Consistency, Method, MethodError, Passes, StepInput, main_logits, one_pass, probabilities,
    supervised, u_net,
};
use crate::loss::{StepLoss, rampup::RampUp};
use crate::model::{Cast, Draws, Ensemble, Heads, NetworkConfig, input_noise, key_of};

/// Standard deviation of the noise that the teacher's images get.
const SIGMA: f64 = 0.1;
/// What it is clipped at.
const LIMIT: f64 = 0.2;
/// How often UA-MT's teacher looks; two looks go through it together.
const LOOKS: u64 = 8;

/// The method.
#[derive(Debug, Clone, Copy)]
pub struct MeanTeacher {
    /// lambda(t).
    pub consistency: Consistency,
    /// How much of itself the teacher keeps in a step, at most: it keeps 1 - 1/(t + 1) at first.
    pub decay: f64,
    /// UA-MT's mask; iterations in all are its ramp-up's length.
    pub uncertainty: Option<u64>,
}

/// UA-MT's threshold on the entropy after `done` of `total` iterations.
#[must_use]
pub fn uncertainty_threshold(done: u64, total: u64) -> f64 {
    let ramp = RampUp { top: 1.0, length: total, every: 1 }.at(done);
    (0.75 + 0.25 * ramp) * std::f64::consts::LN_2
}

impl MeanTeacher {
    /// The teacher's softmax on `images` with the noise of look `look`.
    fn look(
        nets: &Ensemble,
        step: &StepInput,
        images: &Tensor,
        looks: &[u64],
    ) -> Result<Tensor, MethodError> {
        let teacher = nets.teacher().ok_or(MethodError::Networks("a teacher"))?;
        let samples = step.samples.get(step.labelled() as usize..).unwrap_or_default();
        // Keyed by sample, so that the number of workers changes nothing.
        let keys: Vec<u64> = looks
            .iter()
            .flat_map(|look| samples.iter().map(move |sample| (*look, *sample)))
            .map(|(look, sample)| key_of("input noise", &[step.seed, step.done, look, sample]))
            .collect();
        let images = Tensor::f_cat(&vec![images; looks.len()], 0)?;
        let seen = images.f_add(&input_noise(&images, &keys, SIGMA, LIMIT)?)?;
        let draws: Draws = step.draws("teacher", looks.first().copied().unwrap_or(0));
        // Its statistics are dropped: the teacher's follow the student's.
        let outputs = teacher.forward_train(&seen, &draws, Heads::Main, step.sync)?;
        probabilities(main_logits(&outputs, 0)?)
    }

    /// `[N_u, 1, H, W]`: entropy in nats of the mean over many looks.
    fn uncertainty(
        nets: &Ensemble,
        step: &StepInput,
        images: &Tensor,
    ) -> Result<Tensor, MethodError> {
        let mut sum: Option<Tensor> = None;
        for pair in 0..LOOKS / 2 {
            let p = Self::look(nets, step, images, &[1 + 2 * pair, 2 + 2 * pair])?;
            let n = images.size()[0];
            let both = p.f_narrow(0, 0, n)?.f_add(&p.f_narrow(0, n, n)?)?;
            sum = Some(match sum {
                None => both,
                Some(sum) => sum.f_add(&both)?,
            });
        }
        let mean = sum.ok_or(MethodError::Networks("looks"))?.f_mul_scalar(1.0 / LOOKS as f64)?;
        let log = mean.f_add_scalar(1e-6)?.f_log()?;
        Ok(mean.f_mul(&log)?.f_sum_dim_intlist([1i64].as_slice(), true, None::<Kind>)?.f_neg()?)
    }
}

impl Method for MeanTeacher {
    fn cast(&self) -> Cast {
        Cast { two_students: false, teacher: true }
    }

    fn network(&self, sizes: NetworkConfig) -> NetworkConfig {
        u_net(sizes)
    }

    fn terms(&self) -> &'static [&'static str] {
        &["dice", "ce", "consistency", "total"]
    }

    fn consistency_weight(&self, done: u64) -> f64 {
        self.consistency.at(done)
    }

    fn teacher_decay(&self, done: u64) -> f64 {
        (1.0 - 1.0 / (done as f64 + 1.0)).min(self.decay)
    }

    /// Targets: the teacher's softmax, and UA-MT's mask.
    fn forward(&self, nets: &Ensemble, step: &StepInput) -> Result<Passes, MethodError> {
        let mut passes = one_pass(nets, step, Heads::Main)?;
        if self.consistency_weight(step.done) != 0.0 {
            tch::no_grad(|| -> Result<(), MethodError> {
                let images = step.unlabelled_images()?;
                passes.targets.push(Self::look(nets, step, &images, &[0])?);
                if let Some(total) = self.uncertainty {
                    let limit = uncertainty_threshold(step.done, total);
                    passes.targets.push(Self::uncertainty(nets, step, &images)?.f_lt(limit)?);
                }
                Ok(())
            })?;
        }
        Ok(passes)
    }

    fn loss(&self, passes: &Passes, step: &StepInput) -> Result<StepLoss, MethodError> {
        let outputs = passes.outputs.first().ok_or(MethodError::Networks("a student"))?;
        let logits = main_logits(outputs, 0)?;
        let [dice, ce] = supervised(logits, step)?;
        let n = step.labelled();
        let consistency = match passes.targets.as_slice() {
            [] => dice.f_zeros_like()?,
            [teacher, mask @ ..] => {
                let mine = probabilities(&logits.f_narrow(0, n, logits.size()[0] - n)?)?;
                let off = mine.f_sub(teacher)?.f_square()?;
                consistency(&off, mask.first(), step)?
            }
        };
        let weight = self.consistency_weight(step.done);
        Ok(StepLoss::of(
            self.terms(),
            &[(0.5, dice), (0.5, ce), (weight, consistency)],
            &step.counts,
        )?)
    }
}

/// The share of the mean of `off` `[N_u, C, H, W]`, or of its masked form.
fn consistency(
    off: &Tensor,
    mask: Option<&Tensor>,
    step: &StepInput,
) -> Result<Tensor, MethodError> {
    let spread = step.spread();
    let Some(mask) = mask else {
        let numbers = step.counts.unlabelled() as f64 * step.pixels() * off.size()[1] as f64;
        return Ok(spread.mean(&off.f_sum(Kind::Double)?, numbers)?);
    };
    let mask = mask.f_to_kind(off.f_kind()?)?;
    let sums = [off.f_mul(&mask)?.f_sum(Kind::Double)?, mask.f_sum(Kind::Double)?];
    let sums = spread.sum(&Tensor::f_stack(&sums, 0)?)?;
    let below = sums.f_select(0, 1)?.f_mul_scalar(2.0)?.f_add_scalar(1e-16)?;
    Ok(spread.part(&sums.f_select(0, 0)?.f_div(&below)?)?)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Case, always, outputs};
    use super::*;

    fn method(uncertainty: Option<u64>) -> MeanTeacher {
        MeanTeacher { consistency: always(0.5), decay: 0.99, uncertainty }
    }

    #[test]
    fn the_teacher_is_the_true_mean_first_and_the_threshold_rises_to_ln_2() {
        let mt = method(None);
        assert_eq!(mt.teacher_decay(0), 0.0);
        assert_eq!(mt.teacher_decay(1), 0.5);
        assert_eq!(mt.teacher_decay(5000), 0.99);
        let at = |done| uncertainty_threshold(done, 1000) / std::f64::consts::LN_2;
        assert!((at(0) - (0.75 + 0.25 * (-5.0f64).exp())).abs() < 1e-12);
        assert!(at(500) > at(499));
        assert!((at(1000) - 1.0).abs() < 1e-12);
    }

    /// Two unlabelled pixels by hand, plain and with a mask that leaves one of them.
    #[test]
    fn consistency_is_the_mean_square_or_that_of_the_certain_pixels() {
        let case = Case::new(1, 1, [1, 2]);
        // Equal logits: 1/2 each.
        let logits = Tensor::zeros([2, 2, 1, 2], (Kind::Float, tch::Device::Cpu));
        let teacher = Tensor::from_slice(&[0.9f32, 0.6, 0.1, 0.4]).view([1, 2, 1, 2]);
        let value = |targets: Vec<Tensor>| {
            let passes = Passes { outputs: vec![outputs(&logits)], targets };
            let loss = method(None).loss(&passes, &case.step(0)).unwrap();
            let values = loss.values().unwrap();
            let get = |name| values.iter().find(|(n, _)| *n == name).unwrap().1;
            let supervised = 0.5 * (get("dice") + get("ce"));
            assert!((get("total") - supervised - 0.5 * get("consistency")).abs() < 1e-9);
            get("consistency")
        };
        // Squares: 0.16 at the first pixel, 0.01 at the second, in both classes.
        let plain = value(vec![teacher.shallow_clone()]);
        assert!((plain - 0.34 / 4.0).abs() < 1e-6, "{plain}");
        let mask = Tensor::from_slice(&[true, false]).view([1, 1, 1, 2]);
        let masked = value(vec![teacher.shallow_clone(), mask]);
        assert!((masked - 0.32 / 2.0).abs() < 1e-6, "{masked}");
        let nobody = Tensor::from_slice(&[false, false]).view([1, 1, 1, 2]);
        assert_eq!(value(vec![teacher, nobody]), 0.0);
    }

    /// With noise but without dropout the mask's passes are functions of seed, step and sample.
    #[test]
    fn the_teachers_targets_are_its_predictions_and_have_no_gradient() {
        let case = Case::new(2, 2, [32, 32]);
        let nets = case.ensemble(&method(Some(100)));
        let passes = method(Some(100)).forward(&nets, &case.step(3)).unwrap();
        let [teacher, mask] = passes.targets.as_slice() else { panic!("{:?}", passes.targets) };
        assert_eq!(teacher.size(), [2, 2, 32, 32]);
        assert_eq!((mask.size(), mask.kind()), (vec![2, 1, 32, 32], Kind::Bool));
        assert!(!teacher.requires_grad());
        let again = method(Some(100)).forward(&nets, &case.step(3)).unwrap();
        assert_eq!(&again.targets[0], teacher);
        let later = method(Some(100)).forward(&nets, &case.step(4)).unwrap();
        assert_ne!(&later.targets[0], teacher);
    }
}
