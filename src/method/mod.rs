//! The training methods: what each computes in a step, from images to loss terms and what is
//! differentiated. One file a method, each with its source; all behind [`Method`], so that the training loop
//! is one and the same.
//!
//! Knows nothing of processes, storage or configuration: sums over ranks are a trait, draws are keyed, weights
//! and lengths are numbers. Not here: building a method from a configuration (the trainer does).

mod bcp;
mod cpcr;
mod cps;
mod mcnet;
mod mean_teacher;
mod supervised;
#[cfg(test)]
mod testing;
mod urpc;

pub use bcp::{Bcp, PATCH_WEIGHT, Patch};
pub use cpcr::Cpcr;
pub use cps::Cps;
pub use mcnet::{McNet, sharpen};
pub use mean_teacher::{MeanTeacher, uncertainty_threshold};
pub use supervised::Supervised;
pub use urpc::Urpc;

use std::fmt::Debug;
use std::sync::Arc;

use tch::{Kind, Tensor};

use crate::bridge::ops::{OpError, SumOverRanks};
use crate::loss::{Counts, LossError, Spread, StepLoss, cross_entropy, dice, rampup::RampUp};
use crate::model::{Cast, Draws, Ensemble, Heads, ModelError, NetworkConfig, Outputs, key_of};

/// Why a step cannot be computed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MethodError {
    /// A network refused.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A loss refused.
    #[error(transparent)]
    Loss(#[from] LossError),
    /// A call of the bridge failed.
    #[error(transparent)]
    Op(#[from] OpError),
    /// A libtorch call failed.
    #[error(transparent)]
    Torch(#[from] tch::TchError),
    /// The networks are not those that the method asked for.
    #[error("the method's networks lack {0}")]
    Networks(&'static str),
}

/// What a method gets for one step on one rank.
pub struct StepInput<'a> {
    /// `[N, in, H, W]`, labelled samples first. Either part may be empty, where the method can do with that.
    pub images: &'a Tensor,
    /// uint8 `[N_l, H, W]`.
    pub labels: &'a Tensor,
    /// Which samples these are, by their row in the training split; `[N]`.
    pub samples: &'a [u64],
    /// What all ranks have together.
    pub counts: Counts,
    /// Iterations done before this one.
    pub done: u64,
    /// Seed of every draw.
    pub seed: u64,
    /// This rank.
    pub rank: u64,
    /// Sums batch-norm statistics over the ranks; none where each rank has its own.
    pub sync: Option<&'a Arc<dyn SumOverRanks>>,
    /// Sums everything else.
    pub ranks: &'a dyn SumOverRanks,
    /// Dice over the whole batch, not over each rank's part.
    pub global_dice: bool,
}

impl StepInput<'_> {
    /// Labelled samples on this rank.
    fn labelled(&self) -> i64 {
        self.labels.size().first().copied().unwrap_or(0)
    }

    /// `[N_u, in, H, W]`
    fn unlabelled_images(&self) -> Result<Tensor, MethodError> {
        let (n, labelled) = (self.images.size()[0], self.labelled());
        Ok(self.images.f_narrow(0, labelled, n - labelled)?)
    }

    /// The draws of the network with that purpose: independent of each other's.
    fn draws(&self, purpose: &str, pass: u64) -> Draws {
        Draws::keyed(key_of(purpose, &[self.seed, pass]), self.done, self.rank)
    }

    /// Pixels of one image.
    fn pixels(&self) -> f64 {
        self.images.size().iter().skip(2).product::<i64>() as f64
    }

    fn spread(&self) -> Spread<'_> {
        Spread { counts: self.counts, ranks: self.ranks, global_dice: self.global_dice }
    }
}

/// What a forward pass leaves for the loss.
#[derive(Debug)]
pub struct Passes {
    /// The students' passes, in the method's order.
    pub outputs: Vec<Outputs>,
    /// What has no gradient: teachers' predictions, pseudo-labels, masks, in the method's order.
    pub targets: Vec<Tensor>,
}

/// A training method.
pub trait Method: Debug + Send {
    /// How many networks it works with: one student, if it says nothing else.
    fn cast(&self) -> Cast {
        Cast::default()
    }

    /// The network it is defined on, from the configured sizes of a DBPNet.
    fn network(&self, sizes: NetworkConfig) -> NetworkConfig {
        sizes
    }

    /// The names of its loss terms, `total` last.
    fn terms(&self) -> &'static [&'static str];

    /// Which heads get a gradient after `done` iterations.
    fn heads(&self, _done: u64) -> Heads {
        Heads::Main
    }

    /// The weight of what is learnt from unlabelled samples after `done` iterations, for the record.
    fn consistency_weight(&self, done: u64) -> f64;

    /// How much of itself the teacher keeps when the step after `done` iterations has been applied.
    fn teacher_decay(&self, _done: u64) -> f64 {
        0.0
    }

    /// The networks' passes.
    ///
    /// # Errors
    /// [`MethodError`]
    fn forward(&self, nets: &Ensemble, step: &StepInput) -> Result<Passes, MethodError>;

    /// Loss terms, and what is differentiated.
    ///
    /// # Errors
    /// [`MethodError`]
    fn loss(&self, passes: &Passes, step: &StepInput) -> Result<StepLoss, MethodError>;
}

/// A weight that is zero in the warm-up and then lambda(t).
#[derive(Debug, Clone, Copy)]
pub struct Consistency {
    /// Iterations in which only supervised terms count.
    pub warm_up: u64,
    /// lambda(t), t counted from the first iteration of the run.
    pub ramp: RampUp,
}

impl Consistency {
    /// The weight after `done` iterations.
    #[must_use]
    pub fn at(&self, done: u64) -> f64 {
        if done < self.warm_up { 0.0 } else { self.ramp.at(done) }
    }
}

/// The whole batch through the one student.
fn one_pass(nets: &Ensemble, step: &StepInput, heads: Heads) -> Result<Passes, MethodError> {
    let draws = Draws::keyed(step.seed, step.done, step.rank);
    let outputs = nets.main().forward_train(step.images, &draws, heads, step.sync)?;
    Ok(Passes { outputs: vec![outputs], targets: Vec::new() })
}

/// A plain U-Net from a DBPNet's sizes: decoder 1 alone, without a pyramid.
fn u_net(sizes: NetworkConfig) -> NetworkConfig {
    NetworkConfig { up: sizes.up.iter().copied().take(1).collect(), pyramid: false, ..sizes }
}

/// Decoder `decoder`'s main logits of a pass.
fn main_logits(outputs: &Outputs, decoder: usize) -> Result<&Tensor, MethodError> {
    outputs.decoders.get(decoder).map(|d| &d.main).ok_or(MethodError::Networks("a decoder"))
}

/// The shares of Dice and cross-entropy on the labelled samples, the first ones of `logits`
/// `[N, C, H, W]`.
fn supervised(logits: &Tensor, step: &StepInput) -> Result<[Tensor; 2], MethodError> {
    let (n, spread) = (step.labelled(), step.spread());
    let (logits, labels) = (logits.f_narrow(0, 0, n)?, step.labels.f_to_kind(Kind::Int64)?);
    let dice = spread.dice(&dice::sums(&logits, &labels)?, dice::SMOOTH, n > 0)?;
    let pixels = step.counts.labelled as f64 * step.pixels();
    let ce = spread.mean(&cross_entropy::sum(&logits, &labels)?, pixels)?;
    Ok([dice, ce])
}

/// The sum of tensors of one shape.
fn sum_of(tensors: &[Tensor]) -> Result<Tensor, MethodError> {
    Ok(Tensor::f_stack(tensors, 0)?.f_sum_dim_intlist([0i64].as_slice(), false, None::<Kind>)?)
}

/// Softmax over classes, in the type that losses are computed in.
fn probabilities(logits: &Tensor) -> Result<Tensor, MethodError> {
    let kind = if logits.f_kind()? == Kind::Double { Kind::Double } else { Kind::Float };
    Ok(logits.f_softmax(1, kind)?)
}
