//! The receipts that a rank keeps: of the steps it has applied and the ledger is not known to hold.
//!
//! They are part of a rank's state as its weights are: a checkpoint carries them ([`Carried`]), together with
//! up to where which lineage is recorded. Pure.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::error::LedgerError;
use super::record::{Origin, Run};
use crate::checkpoint::TrainState;
use crate::types::{Lineage, Receipt, Step};

/// Receipts that a rank keeps at most: days of steps, 24 MB.
pub const RECEIPTS_MAX: usize = 1 << 20;

/// Where [`Carried`] stands in a checkpoint's `state.json`.
pub const STATE_KEY: &str = "ledger";

/// What a checkpoint says of the steps before it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Carried {
    /// What is recorded up to `first`.
    pub origin: Origin,
    /// The first step that nobody is known to have recorded.
    pub first: Step,
    /// The receipts from there to the checkpoint.
    pub receipts: Vec<Run>,
}

impl Carried {
    /// What the trainer's record in the checkpoint of `step` says, under [`STATE_KEY`].
    ///
    /// # Errors
    /// [`LedgerError::Invalid`] where it makes no sense.
    pub fn of(state: &TrainState, step: Step) -> Result<Self, LedgerError> {
        match state.0.get(STATE_KEY) {
            None => Ok(Self::unrecorded(step)),
            Some(value) => Self::deserialize(value).map_err(|error| {
                LedgerError::Invalid(format!("checkpoint of step {step}: {error}"))
            }),
        }
    }

    /// That of a checkpoint which says nothing about receipts.
    #[must_use]
    pub fn unrecorded(step: Step) -> Self {
        let origin = if step == Step(0) { Origin::Start } else { Origin::Unrecorded };
        Self { origin, first: step, receipts: Vec::new() }
    }

    /// The receipts, if they are those of all steps from `first` to the checkpoint of `step`, and `first` is 0
    /// where nothing was recorded before.
    ///
    /// # Errors
    /// [`LedgerError::Invalid`].
    pub fn up_to(&self, step: Step) -> Result<Vec<Receipt>, LedgerError> {
        let count: usize = self.receipts.iter().map(|run| run.fingerprints.len()).sum();
        let mut next = Some(self.first);
        for run in &self.receipts {
            next = if next == Some(run.first) { run.next() } else { None };
        }
        let begins = self.origin != Origin::Start || self.first == Step(0);
        if next != Some(step) || count > RECEIPTS_MAX || !begins {
            return Err(LedgerError::Invalid(format!(
                "the checkpoint of step {step} carries {count} receipts from step {} on, which do not lead to it",
                self.first
            )));
        }
        Ok(self.receipts.iter().flat_map(Run::receipts).collect())
    }
}

/// A rank's receipts, bounded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Receipts {
    origin: Origin,
    /// The step of the oldest one kept, or of the next one to come.
    first: Step,
    kept: VecDeque<Receipt>,
}

impl Receipts {
    /// Those of a run that starts.
    #[must_use]
    pub fn new() -> Self {
        Self { origin: Origin::Start, first: Step(0), kept: VecDeque::new() }
    }

    /// Those that the checkpoint of `step` carries.
    ///
    /// # Errors
    /// [`LedgerError::Invalid`] if they do not lead to it.
    pub fn resume(carried: &Carried, step: Step) -> Result<Self, LedgerError> {
        let kept = carried.up_to(step)?.into();
        Ok(Self { origin: carried.origin, first: carried.first, kept })
    }

    /// Keeps the receipt of a step that was applied just now.
    ///
    /// # Errors
    /// [`LedgerError::Unrecorded`] when there is no room: training on would be training without proof.
    pub fn push(&mut self, receipt: Receipt) -> Result<(), LedgerError> {
        if self.kept.len() >= RECEIPTS_MAX {
            return Err(LedgerError::Unrecorded { kept: self.kept.len() });
        }
        let wanted = Step(self.first.0 + self.kept.len() as u64);
        if receipt.step != wanted {
            return Err(LedgerError::Gap { wanted, found: receipt.step });
        }
        self.kept.push_back(receipt);
        Ok(())
    }

    /// Forgets what `lineage` holds: the steps before `step`. What is not known here is not forgotten, and an
    /// acknowledgement older than an earlier one changes nothing.
    pub fn acknowledge(&mut self, lineage: Lineage, step: Step) {
        let recorded = step.0.saturating_sub(self.first.0);
        if step < self.first || recorded > self.kept.len() as u64 {
            return;
        }
        // It fits: it is at most the length.
        self.kept.drain(..recorded as usize);
        self.origin = Origin::Lineage(lineage);
        self.first = step;
    }

    /// What a checkpoint made now has to carry.
    #[must_use]
    pub fn carried(&self) -> Carried {
        Carried { origin: self.origin, first: self.first, receipts: Run::pack(&self.kept) }
    }
}

impl Default for Receipts {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receipt(step: u64) -> Receipt {
        Receipt { step: Step(step), fingerprint: step * 7, samples: 2 }
    }

    fn of(steps: std::ops::Range<u64>) -> Receipts {
        let mut receipts = Receipts::new();
        steps.for_each(|step| receipts.push(receipt(step)).unwrap());
        receipts
    }

    #[test]
    fn acknowledged_ones_are_forgotten_and_the_rest_survives_a_checkpoint() {
        let mut receipts = of(0..10);
        receipts.acknowledge(Lineage(2), Step(6));
        receipts.acknowledge(Lineage(1), Step(4)); // late: changes nothing
        receipts.acknowledge(Lineage(2), Step(11)); // of steps that it never took
        let carried = receipts.carried();
        assert_eq!((carried.origin, carried.first), (Origin::Lineage(Lineage(2)), Step(6)));
        assert_eq!(Receipts::resume(&carried, Step(10)).unwrap(), receipts);
        assert!(Receipts::resume(&carried, Step(11)).is_err());
        let mut torn = carried.clone();
        torn.receipts[0].first = Step(5);
        assert!(Receipts::resume(&torn, Step(10)).is_err());
    }

    #[test]
    fn a_step_cannot_be_left_out_nor_taken_twice() {
        let mut receipts = of(0..3);
        assert!(matches!(receipts.push(receipt(4)), Err(LedgerError::Gap { .. })));
        assert!(matches!(receipts.push(receipt(2)), Err(LedgerError::Gap { .. })));
        receipts.push(receipt(3)).unwrap();
    }

    #[test]
    fn there_is_a_bound_and_an_acknowledgement_makes_room() {
        let bound = RECEIPTS_MAX as u64;
        let mut receipts = of(0..bound);
        let error = receipts.push(receipt(bound)).unwrap_err();
        assert!(error.to_string().contains("1048576 steps"), "{error}");
        receipts.acknowledge(Lineage(2), Step(1));
        receipts.push(receipt(bound)).unwrap();
    }

    #[test]
    fn what_begins_the_run_begins_at_step_0() {
        let receipts = Run::pack(&[receipt(3), receipt(4)]);
        let carried = Carried { origin: Origin::Start, first: Step(3), receipts };
        assert!(carried.up_to(Step(5)).is_err());
        assert!(Carried { origin: Origin::Unrecorded, ..carried }.up_to(Step(5)).is_ok());
    }

    #[test]
    fn a_checkpoint_that_knows_nothing_of_receipts_says_so() {
        assert_eq!(Carried::unrecorded(Step(0)), Receipts::new().carried());
        assert_eq!(Carried::unrecorded(Step(9)).origin, Origin::Unrecorded);
    }
}
