//! BCP, bidirectional copy-paste (Bai et al., CVPR 2023; as the authors' ACDC code runs it).
//!
//! One U-Net and its teacher. A rectangle of two thirds of the height and width is cut out of one image and
//! filled from another, one rectangle a step for all. First (the warm-up) labelled images are mixed with
//! labelled ones. Then an unlabelled image gets a labelled rectangle, and a labelled image an unlabelled one; the
//! truth of what is unlabelled is the teacher's arg-max, of each class the largest connected part. Dice and cross-entropy
//! are taken inside and outside of the rectangle and added up, weight 1 where the truth is a label and 1/2 where it
//! is the teacher's; the total is half their sum. The teacher keeps 0.99 of itself in each step.
//!
//! Different from the published code: both stages are one run, and the second begins with the last weights of the first,
//! not with its best. Images are mixed with those of the same rank.

use tch::{Device, Kind, Tensor};

use super::{Method, MethodError, Passes, StepInput, main_logits, u_net};
use crate::eval::components::keep_largest;
use crate::loss::{LossError, StepLoss, cross_entropy, dice};
use crate::model::{Cast, Draws, Ensemble, Heads, NetworkConfig, key_of};

/// The weight of what only the teacher says.
pub const PATCH_WEIGHT: f64 = 0.5;
/// Keeps Dice finite, as in the authors' code.
const SMOOTH: f64 = 1e-10;

/// The method.
#[derive(Debug, Clone, Copy)]
pub struct Bcp {
    /// Iterations of the first stage.
    pub warm_up: u64,
    /// How much of itself the teacher keeps in a step.
    pub decay: f64,
}

/// The rectangle of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patch {
    top: i64,
    left: i64,
    height: i64,
    width: i64,
}

impl Patch {
    /// The rectangle of the step after `done` iterations in images of `[height, width]`.
    #[must_use]
    pub fn of(seed: u64, done: u64, [height, width]: [i64; 2]) -> Self {
        let key = key_of("copy and paste", &[seed, done]);
        let side = |whole: i64| (whole * 2 / 3).max(1);
        // A place in 0 .. whole - side, the last one excluded.
        let place = |bits: u64, whole: i64| {
            let free = (whole - side(whole)).max(1) as u64;
            (bits % free) as i64
        };
        Self {
            top: place(key >> 32, height),
            left: place(key & 0xffff_ffff, width),
            height: side(height),
            width: side(width),
        }
    }

    /// `[H, W]`: one outside of it, zero inside.
    fn outside(&self, like: &Tensor) -> Result<Tensor, MethodError> {
        let size = [like.size()[2], like.size()[3]];
        let mask = Tensor::f_ones(size, (like.f_kind()?, like.device()))?;
        let inside = mask.f_narrow(0, self.top, self.height)?.f_narrow(1, self.left, self.width)?;
        let _zero = inside.shallow_clone().f_zero_()?;
        Ok(mask)
    }
}

/// A half of the samples for each of the two ways to mix; both the whole where it cannot be divided.
fn halves(samples: &Tensor) -> Result<[Tensor; 2], MethodError> {
    let n = samples.size()[0];
    let first = (n + 1) / 2;
    let a = samples.f_narrow(0, 0, first)?;
    let b = if n > first { samples.f_narrow(0, first, n - first)? } else { a.shallow_clone() };
    Ok([a, b])
}

/// `n` samples, again from the start where there are fewer.
fn cycled(samples: &Tensor, n: i64) -> Result<Tensor, MethodError> {
    let own = samples.size()[0].max(1);
    let places: Vec<i64> = (0..n).map(|i| i % own).collect();
    let places = Tensor::f_from_slice(&places)?.f_to_device(samples.device())?;
    Ok(samples.f_index_select(0, &places)?)
}

/// Images and truths that are mixed: what stands outside of the rectangle, what inside.
struct Mix {
    images: Tensor,
    outside: Tensor,
    inside: Tensor,
}

/// Mixes `(images, labels)` with others, as many as the longer of the two has.
fn mix(
    out: (&Tensor, &Tensor),
    inner: (&Tensor, &Tensor),
    mask: &Tensor,
) -> Result<Mix, MethodError> {
    let n = out.0.size()[0].max(inner.0.size()[0]);
    let rest = mask.f_neg()?.f_add_scalar(1.0)?;
    let (a, b) = (cycled(out.0, n)?, cycled(inner.0, n)?);
    Ok(Mix {
        images: a.f_mul(mask)?.f_add(&b.f_mul(&rest)?)?,
        outside: cycled(out.1, n)?,
        inside: cycled(inner.1, n)?,
    })
}

impl Bcp {
    fn learns_from_teacher(&self, done: u64) -> bool {
        done >= self.warm_up
    }

    /// What the teacher takes for the truth: int64 `[N, H, W]`.
    fn pseudo_labels(
        nets: &Ensemble,
        step: &StepInput,
        images: &Tensor,
        pass: u64,
    ) -> Result<Tensor, MethodError> {
        let teacher = nets.teacher().ok_or(MethodError::Networks("a teacher"))?;
        let draws: Draws = step.draws("teacher", pass);
        let outputs = teacher.forward_train(images, &draws, Heads::Main, step.sync)?;
        let classes = main_logits(&outputs, 0)?.f_argmax(1, false)?;
        let (size, device) = (classes.size(), classes.device());
        let flat = classes.f_to_kind(Kind::Uint8)?.f_to_device(Device::Cpu)?.f_reshape([-1i64])?;
        let mut labels: Vec<u8> = Vec::<u8>::try_from(&flat)?;
        let [height, width] = [size[1], size[2]].map(|side| side as usize);
        for slice in labels.chunks_mut((height * width).max(1)) {
            keep_largest(slice, [1, height, width]);
        }
        let labels = Tensor::f_from_slice(&labels)?.f_view(size.as_slice())?;
        Ok(labels.f_to_kind(Kind::Int64)?.f_to_device(device)?)
    }

    fn mixed(
        &self,
        nets: &Ensemble,
        step: &StepInput,
        mask: &Tensor,
    ) -> Result<Vec<Mix>, MethodError> {
        let labelled = step.images.f_narrow(0, 0, step.labelled())?;
        let [image_a, image_b] = halves(&labelled)?;
        let [label_a, label_b] = halves(&step.labels.f_to_kind(Kind::Int64)?)?;
        if !self.learns_from_teacher(step.done) {
            return Ok(vec![mix((&image_a, &label_a), (&image_b, &label_b), mask)?]);
        }
        let [rest_a, rest_b] = halves(&step.unlabelled_images()?)?;
        let pseudo_a = Self::pseudo_labels(nets, step, &rest_a, 0)?;
        let pseudo_b = Self::pseudo_labels(nets, step, &rest_b, 1)?;
        Ok(vec![
            mix((&rest_a, &pseudo_a), (&image_a, &label_a), mask)?,
            mix((&image_b, &label_b), (&rest_b, &pseudo_b), mask)?,
        ])
    }
}

impl Method for Bcp {
    fn cast(&self) -> Cast {
        Cast { two_students: false, teacher: true }
    }

    fn network(&self, sizes: NetworkConfig) -> NetworkConfig {
        u_net(sizes)
    }

    fn terms(&self) -> &'static [&'static str] {
        &["dice", "ce", "total"]
    }

    fn consistency_weight(&self, done: u64) -> f64 {
        if self.learns_from_teacher(done) { PATCH_WEIGHT } else { 0.0 }
    }

    fn teacher_decay(&self, done: u64) -> f64 {
        if self.learns_from_teacher(done) { self.decay } else { 0.0 }
    }

    /// Targets: the mask, then for each pass the truth outside and inside of the rectangle.
    fn forward(&self, nets: &Ensemble, step: &StepInput) -> Result<Passes, MethodError> {
        let size = step.images.size();
        let patch = Patch::of(step.seed, step.done, [size[2], size[3]]);
        let mask = patch.outside(step.images)?;
        let mixed = tch::no_grad(|| self.mixed(nets, step, &mask))?;
        let (mut outputs, mut targets) = (Vec::new(), vec![mask]);
        for (pass, mix) in mixed.into_iter().enumerate() {
            let draws = step.draws("student", pass as u64);
            // The second pass goes on from the first one's statistics.
            let statistics = outputs.last_mut().map(crate::model::Outputs::take_statistics);
            outputs.push(nets.main().forward_train_after(
                statistics.unwrap_or_default(),
                &mix.images,
                &draws,
                Heads::Main,
                step.sync,
            )?);
            targets.extend([mix.outside, mix.inside]);
        }
        Ok(Passes { outputs, targets })
    }

    fn loss(&self, passes: &Passes, step: &StepInput) -> Result<StepLoss, MethodError> {
        let [mask, truths @ ..] = passes.targets.as_slice() else {
            return Err(MethodError::Networks("targets"));
        };
        // What is labelled counts whole; the teacher's stands outside in the first pass, inside in the second.
        let teachers = self.consistency_weight(step.done);
        let weights: [[f64; 2]; 2] = match passes.outputs.len() {
            1 => [[1.0, 1.0]; 2],
            _ => [[teachers, 1.0], [1.0, teachers]],
        };
        let (mut dice, mut ce) = (Vec::new(), Vec::new());
        for ((outputs, truth), weights) in passes.outputs.iter().zip(truths.chunks(2)).zip(weights)
        {
            let [outside, inside] = truth else { return Err(MethodError::Networks("truths")) };
            let [d, c] =
                mixed_loss(main_logits(outputs, 0)?, [outside, inside], mask, weights, step)?;
            dice.push(d);
            ce.push(c);
        }
        let shares = [(0.5, super::sum_of(&dice)?), (0.5, super::sum_of(&ce)?)];
        Ok(StepLoss::of(self.terms(), &shares, &step.counts)?)
    }
}

/// The shares of Dice and cross-entropy outside and inside of the rectangle, each times its weight.
fn mixed_loss(
    logits: &Tensor,
    truths: [&Tensor; 2],
    outside: &Tensor,
    weights: [f64; 2],
    step: &StepInput,
) -> Result<[Tensor; 2], MethodError> {
    let spread = step.spread();
    let n = logits.size()[0];
    let inside = outside.f_neg()?.f_add_scalar(1.0)?;
    let (mut dice, mut sums) = (Vec::new(), Vec::new());
    for ((truth, mask), weight) in truths.into_iter().zip([outside, &inside]).zip(weights) {
        let mask = mask.f_unsqueeze(0)?.f_expand([n, mask.size()[0], mask.size()[1]], false)?;
        let of_class = dice::masked_sums(logits, truth, Some(&mask))?;
        dice.push(spread.dice(&of_class, SMOOTH, true)?.f_mul_scalar(weight)?);
        let ce = cross_entropy::masked_sum(logits, truth, &mask)?.f_mul_scalar(weight)?;
        sums.extend([ce, mask.f_sum(Kind::Double)?]);
    }
    // [outside, inside] x [cross-entropy, pixels], over the whole batch
    let sums = spread.sum(&Tensor::f_stack(&sums, 0)?.f_view([2i64, 2])?)?;
    let ce = sums.f_select(1, 0)?.f_div(&sums.f_select(1, 1)?)?;
    let ce: Result<Tensor, LossError> = spread.part(&ce.f_sum(Kind::Double)?);
    Ok([super::sum_of(&dice)?, ce?])
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Case, outputs};
    use super::*;

    const BCP: Bcp = Bcp { warm_up: 10, decay: 0.99 };

    #[test]
    fn the_rectangle_is_two_thirds_and_moves_inside_the_image() {
        let mut tops = std::collections::BTreeSet::new();
        for done in 0..200 {
            let patch = Patch::of(1, done, [96, 48]);
            assert_eq!((patch.height, patch.width), (64, 32));
            assert!((0..32).contains(&patch.top) && (0..16).contains(&patch.left), "{patch:?}");
            tops.insert(patch.top);
        }
        assert_eq!(tops.len(), 32);
        let like = Tensor::zeros([1, 1, 96, 48], (Kind::Float, Device::Cpu));
        let mask = Patch::of(1, 5, [96, 48]).outside(&like).unwrap();
        assert_eq!(mask.sum(Kind::Double).double_value(&[]), 96.0 * 48.0 - 64.0 * 32.0);
    }

    /// Before the teacher counts labelled images are mixed, afterwards each way once.
    #[test]
    fn images_and_truths_are_mixed_alike() {
        let case = Case::new(2, 2, [48, 48]);
        let nets = case.ensemble(&BCP);
        let passes = BCP.forward(&nets, &case.step(0)).unwrap();
        assert_eq!((passes.outputs.len(), passes.targets.len()), (1, 3));
        assert_eq!(passes.targets[1], case.labels.narrow(0, 0, 1).to_kind(Kind::Int64));
        assert_eq!(passes.targets[2], case.labels.narrow(0, 1, 1).to_kind(Kind::Int64));
        let passes = BCP.forward(&nets, &case.step(10)).unwrap();
        assert_eq!((passes.outputs.len(), passes.targets.len()), (2, 5));
        // First pass: the teacher's outside, the label inside; second the other way round.
        assert_eq!(passes.targets[2], case.labels.narrow(0, 0, 1).to_kind(Kind::Int64));
        assert_eq!(passes.targets[3], case.labels.narrow(0, 1, 1).to_kind(Kind::Int64));
        // Samples 0 and 1 are labelled, 2 and 3 are not; what stands outside comes first.
        let (mask, image) = (&passes.targets[0], |i: i64| case.images.narrow(0, i, 1));
        let shown =
            |outside: i64, inside: i64| image(outside) * mask + image(inside) * (1.0 - mask);
        let mixed = |done| tch::no_grad(|| BCP.mixed(&nets, &case.step(done), mask)).unwrap();
        let self_training = mixed(10);
        assert_eq!(self_training[0].images, shown(2, 0));
        assert_eq!(self_training[1].images, shown(1, 3));
        assert_eq!(mixed(0)[0].images, shown(0, 1));
        // The teacher's word for sample 2, cleaned.
        let said = Bcp::pseudo_labels(&nets, &case.step(10), &image(2), 0).unwrap();
        assert_eq!(passes.targets[1], said);
        assert!(said.max().int64_value(&[]) <= 1 && said.size() == [1, 48, 48]);
        // A rank with three and one: everything is used, the short one again.
        assert_eq!(
            cycled(&Tensor::from_slice(&[5i64, 6]), 3).unwrap(),
            Tensor::from_slice(&[5i64, 6, 5])
        );
    }

    /// One image of two pixels by hand: pixel 0 outside, pixel 1 inside of the rectangle.
    #[test]
    fn each_side_has_its_truth_and_its_weight() {
        let case = Case::new(1, 1, [1, 2]);
        let logits = Tensor::from_slice(&[1.0f32, 0.0, 0.0, 2.0]).view([1, 2, 1, 2]);
        let mask = Tensor::from_slice(&[1.0f32, 0.0]).view([1, 2]);
        let truth = |class: i64| Tensor::from_slice(&[class, class]).view([1, 1, 2]);
        let passes = Passes {
            outputs: vec![outputs(&logits), outputs(&logits)],
            targets: vec![mask, truth(0), truth(0), truth(0), truth(1)],
        };
        let loss = BCP.loss(&passes, &case.step(10)).unwrap();
        let values: std::collections::BTreeMap<_, _> = loss.values().unwrap().into_iter().collect();
        // p of class 0 at pixel 0, of class 1 at pixel 1.
        let (p, q) = (1.0 / (1.0 + (-1.0f64).exp()), 1.0 / (1.0 + (-2.0f64).exp()));
        // Pass 1: 1/2 outside, 1 inside (truth 0); pass 2: 1 outside, 1/2 inside (truth 1).
        let ce = -0.5 * p.ln() - (1.0 - q).ln() - p.ln() - 0.5 * q.ln();
        assert!((values["ce"] - ce).abs() < 1e-6, "{values:?} {ce}");
        // A class that is neither there nor said has its whole square in the denominator: a ratio of 0.
        let one = |p: f64| 1.0 - 0.5 * (2.0 * p / (p * p + 1.0));
        let dice = 0.5 * one(p) + one(1.0 - q) + one(p) + 0.5 * one(q);
        assert!((values["dice"] - dice).abs() < 1e-6, "{values:?} {dice}");
        assert!((values["total"] - 0.5 * (dice + ce)).abs() < 1e-6, "{values:?}");
    }
}
