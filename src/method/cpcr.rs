//! CPCR, cross-pyramid consistency regularisation on DBPNet (arXiv 2511.08435).
//!
//! L(t) = Sup(d1) + Sup(d2) + [after the warm-up] a KD_main + b Ent + lambda(t) KD_aux, with
//! Sup = Dice (`cpcr`, the authors' code of 2025-03-30) or Dice + Focal (`cpcr-focal`, 2025-05-11).
//! The terms themselves are [`crate::loss::Objective`].

use super::{Consistency, Method, MethodError, Passes, StepInput, one_pass};
use crate::loss::{Objective, StepLoss, TERMS, TermWeights};
use crate::model::{Ensemble, Heads};

/// The method.
#[derive(Debug, Clone, Copy)]
pub struct Cpcr {
    /// Temperature, gamma, implementation.
    pub objective: Objective,
    /// The supervised part has a focal term too.
    pub focal: bool,
    /// a, of the distillation between the main predictions.
    pub distill_weight: f64,
    /// b, of the entropy.
    pub entropy_weight: f64,
    /// lambda(t).
    pub consistency: Consistency,
}

impl Cpcr {
    /// The weights after `done` iterations.
    #[must_use]
    pub fn weights(&self, done: u64) -> TermWeights {
        let focal = if self.focal { 1.0 } else { 0.0 };
        let supervised = TermWeights { dice: 1.0, focal, kd_main: 0.0, entropy: 0.0, kd_aux: 0.0 };
        if done < self.consistency.warm_up {
            return supervised;
        }
        TermWeights {
            kd_main: self.distill_weight,
            entropy: self.entropy_weight,
            kd_aux: self.consistency.at(done),
            ..supervised
        }
    }
}

impl Method for Cpcr {
    fn terms(&self) -> &'static [&'static str] {
        &TERMS
    }

    fn heads(&self, done: u64) -> Heads {
        if self.weights(done).needs_aux() { Heads::All } else { Heads::Main }
    }

    fn consistency_weight(&self, done: u64) -> f64 {
        self.weights(done).kd_aux
    }

    /// The whole batch goes through the network in the warm-up too: it moves the statistics.
    fn forward(&self, nets: &Ensemble, step: &StepInput) -> Result<Passes, MethodError> {
        one_pass(nets, step, self.heads(step.done))
    }

    fn loss(&self, passes: &Passes, step: &StepInput) -> Result<StepLoss, MethodError> {
        let outputs = passes.outputs.first().ok_or(MethodError::Networks("a student"))?;
        let objective = Objective { global_dice: step.global_dice, ..self.objective };
        let weights = self.weights(step.done);
        Ok(objective.step(outputs, step.labels, &weights, &step.counts, step.ranks)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loss::rampup::RampUp;

    #[test]
    fn the_defaults_are_the_papers_ramp_up_after_990_steps_of_warm_up() {
        let method = Cpcr {
            objective: Objective::default(),
            focal: false,
            distill_weight: 0.1,
            entropy_weight: 0.1,
            consistency: Consistency { warm_up: 990, ramp: RampUp::default() },
        };
        assert_eq!((method.heads(989), method.heads(990)), (Heads::Main, Heads::All));
        for done in [990, 1500, 12_345, 29_999, 30_000, 49_999] {
            let weights = method.weights(done);
            assert!((weights.kd_aux - RampUp::default().at(done)).abs() < 1e-15, "{done}");
            assert_eq!((weights.dice, weights.focal, weights.kd_main), (1.0, 0.0, 0.1));
        }
        assert_eq!(Cpcr { focal: true, ..method }.weights(0).focal, 1.0);
    }
}
