//! Which loss terms count at which step (METHOD, "CPCR: the training objective"). Pure.

use crate::config::{Loss, Method};
use crate::loss::{TermWeights, rampup::RampUp};
use crate::types::Step;

/// The weights of every step of a run.
#[derive(Debug, Clone)]
pub struct Schedule {
    supervised: TermWeights,
    distill_weight: f64,
    entropy_weight: f64,
    consistency: RampUp,
    warm_up: u64,
}

impl Schedule {
    /// A schedule whose warm-up lasts `warmup_epochs` passes of `epoch_steps` steps each.
    #[must_use]
    pub fn new(loss: &Loss, method: Method, epoch_steps: u64) -> Self {
        let focal = if method == Method::CpcrFocal { 1.0 } else { 0.0 };
        Self {
            supervised: TermWeights { dice: 1.0, focal, kd_main: 0.0, entropy: 0.0, kd_aux: 0.0 },
            distill_weight: loss.distill_weight,
            entropy_weight: loss.entropy_weight,
            consistency: RampUp {
                top: loss.consistency_weight,
                length: loss.rampup_epochs,
                every: loss.rampup_every,
            },
            warm_up: loss.warmup_epochs.saturating_mul(epoch_steps),
        }
    }

    /// The weights of the step that leads on from `done` steps.
    #[must_use]
    pub fn at(&self, done: Step) -> TermWeights {
        if done.0 < self.warm_up {
            return self.supervised;
        }
        TermWeights {
            kd_main: self.distill_weight,
            entropy: self.entropy_weight,
            kd_aux: self.consistency.at(done.0),
            ..self.supervised
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_the_papers_ramp_up_after_990_steps_of_warm_up() {
        let schedule = Schedule::new(&Loss::default(), Method::Cpcr, 11);
        assert!(!schedule.at(Step(989)).needs_aux());
        for done in [990, 1500, 12_345, 29_999, 30_000, 49_999] {
            let weights = schedule.at(Step(done));
            assert!((weights.kd_aux - RampUp::default().at(done)).abs() < 1e-15, "{done}");
            assert_eq!((weights.dice, weights.focal, weights.kd_main), (1.0, 0.0, 0.1));
        }
    }
}
