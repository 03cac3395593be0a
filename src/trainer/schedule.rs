//! Which loss terms count at which step (METHOD, "CPCR: the training objective"). Pure.

use crate::config::{Loss, Method};
use crate::loss::TermWeights;
use crate::types::Step;

/// The weights of every step of a run.
#[derive(Debug, Clone)]
pub struct Schedule {
    loss: Loss,
    method: Method,
    warm_up: u64,
}

impl Schedule {
    /// A schedule whose warm-up lasts `warmup_epochs` passes of `epoch_steps` steps each.
    #[must_use]
    pub fn new(loss: &Loss, method: Method, epoch_steps: u64) -> Self {
        let warm_up = loss.warmup_epochs.saturating_mul(epoch_steps);
        Self { loss: loss.clone(), method, warm_up }
    }

    /// The weights of the step that leads on from `done` steps.
    #[must_use]
    pub fn at(&self, done: Step) -> TermWeights {
        let focal = if self.method == Method::CpcrFocal { 1.0 } else { 0.0 };
        let supervised = TermWeights { dice: 1.0, focal, kd_main: 0.0, entropy: 0.0, kd_aux: 0.0 };
        if done.0 < self.warm_up {
            return supervised;
        }
        TermWeights {
            kd_main: self.loss.distill_weight,
            entropy: self.loss.entropy_weight,
            kd_aux: self.consistency(done),
            ..supervised
        }
    }

    /// lambda(t) = w exp(-5 (1 - min(e, E) / E)^2), e = t div `rampup_every`.
    fn consistency(&self, done: Step) -> f64 {
        let length = self.loss.rampup_epochs;
        if length == 0 {
            return self.loss.consistency_weight;
        }
        let epoch = (done.0 / self.loss.rampup_every.max(1)).min(length);
        let left = 1.0 - epoch as f64 / length as f64;
        self.loss.consistency_weight * (-5.0 * left * left).exp()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loss::rampup;

    #[test]
    fn the_defaults_are_the_papers_ramp_up_after_990_steps_of_warm_up() {
        let schedule = Schedule::new(&Loss::default(), Method::Cpcr, 11);
        assert!(!schedule.at(Step(989)).needs_aux());
        for done in [990, 1500, 12_345, 29_999, 30_000, 49_999] {
            let weights = schedule.at(Step(done));
            assert!((weights.kd_aux - rampup::lambda(done)).abs() < 1e-15, "{done}");
            assert_eq!((weights.dice, weights.focal, weights.kd_main), (1.0, 0.0, 0.1));
        }
    }
}
