//! Whether steps are quick enough for the waits that `recovery.target_s` allows. Pure.
//!
//! A collective gives up after a time that the target says. If steps take nearly as long, it would end generations that
//! are well, one after the other: better to say so, with the figure, after a run's first few. Later a run is never ended for
//! being slow: that may pass.

use std::time::Duration;

use super::TrainerError;
use crate::config::Recovery;

/// Steps that are measured, after a first one that also warms up.
const STEPS: usize = 7;
/// Steps of a run after which nobody is refused.
pub(super) const RUN_STEPS: u64 = STEPS as u64 + 1;
/// A wait is at least so many times the usual step.
const MARGIN: u32 = 3;

/// The first steps of a process.
#[derive(Debug, Default)]
pub(super) struct Pace {
    seen: usize,
    took: Vec<Duration>,
}

impl Pace {
    /// A step took so long.
    ///
    /// # Errors
    /// [`TrainerError::TooSlow`], once, if waits are too short for steps like those so far.
    pub(super) fn step(&mut self, took: Duration, recovery: &Recovery) -> Result<(), TrainerError> {
        self.seen += 1;
        if self.seen == 1 || self.took.len() == STEPS {
            return Ok(());
        }
        self.took.push(took);
        if self.took.len() < STEPS {
            return Ok(());
        }
        self.took.sort_unstable();
        let (usual, wait) = (self.took[STEPS / 2], recovery.collective());
        if usual * MARGIN <= wait {
            return Ok(());
        }
        let least_s =
            recovery.target_s as f64 * (usual * MARGIN).as_secs_f64() / wait.as_secs_f64();
        Err(TrainerError::TooSlow {
            step_s: usual.as_secs_f64(),
            wait_s: wait.as_secs_f64(),
            target_s: recovery.target_s,
            least_s: least_s.ceil() as u64,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(target_s: u64, step_s: f64) -> Option<String> {
        let recovery = Recovery { target_s, ..Recovery::default() };
        let mut pace = Pace::default();
        let mut steps = std::iter::once(60.0).chain([step_s; 20]);
        steps
            .find_map(|s| pace.step(Duration::from_secs_f64(s), &recovery).err())
            .map(|error| error.to_string())
    }

    #[test]
    fn a_target_too_small_for_the_steps_is_refused_with_the_figure() {
        assert_eq!(refused(8, 6.6), None);
        let why = refused(8, 7.0).unwrap();
        assert!(why.contains("7.0 s") && why.contains("recovery.target_s = 8"), "{why}");
        assert!(why.contains("at least 9"), "{why}");
        assert_eq!(refused(9, 7.0), None);
    }
}
