//! The supervised lower bound: DBPNet and CPCR's supervised terms on the labelled stream alone.
//!
//! Dice(d1) + Dice(d2); unlabelled samples are neither fetched nor seen, so they move no batch-norm
//! statistics either. What a semi-supervised method adds is the difference to this.

use super::{Method, MethodError, Passes, StepInput, one_pass};
use crate::loss::{Objective, StepLoss, TERMS, TermWeights};
use crate::model::{Ensemble, Heads};

/// The method.
#[derive(Debug, Clone, Copy, Default)]
pub struct Supervised {
    /// Implementation of the Dice terms.
    pub objective: Objective,
}

impl Method for Supervised {
    fn terms(&self) -> &'static [&'static str] {
        &TERMS
    }

    fn consistency_weight(&self, _done: u64) -> f64 {
        0.0
    }

    fn forward(&self, nets: &Ensemble, step: &StepInput) -> Result<Passes, MethodError> {
        one_pass(nets, step, Heads::Main)
    }

    fn loss(&self, passes: &Passes, step: &StepInput) -> Result<StepLoss, MethodError> {
        let outputs = passes.outputs.first().ok_or(MethodError::Networks("a student"))?;
        let objective = Objective { global_dice: step.global_dice, ..self.objective };
        let weights =
            TermWeights { dice: 1.0, focal: 0.0, kd_main: 0.0, entropy: 0.0, kd_aux: 0.0 };
        Ok(objective.step(outputs, step.labels, &weights, &step.counts, step.ranks)?)
    }
}
