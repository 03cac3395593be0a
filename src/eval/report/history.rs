//! What happened in a run, as it is kept: JSON Lines, one record a line, only ever appended.
//!
//! A record is written when its step is; a run that resumes from a checkpoint says so, and what
//! was recorded after that checkpoint no longer counts. A line that cannot be read (a write that
//! was cut off) costs that line, not the report: it is counted, and the report says so.
//!
//! JSON has no NaN: a loss that diverged is written as null and read as NaN.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

/// One optimiser step.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct StepRecord {
    /// Steps done, this one included.
    pub step: u64,
    /// Loss terms by name, unweighted; `total` is what was differentiated.
    #[serde(deserialize_with = "nulls_are_nan")]
    pub losses: BTreeMap<String, f64>,
    /// Learning rate of this step.
    #[serde(deserialize_with = "null_is_nan")]
    pub lr: f64,
    /// The ramp-up's weight, lambda(t).
    #[serde(deserialize_with = "null_is_nan")]
    pub consistency_weight: f64,
    /// Images per second, over all workers.
    #[serde(deserialize_with = "null_is_nan")]
    pub images_per_s: f64,
    /// Share of the step's time spent waiting for data, `0..=1`.
    #[serde(deserialize_with = "null_is_nan")]
    pub data_wait_share: f64,
}

/// One validation.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct ValidationRecord {
    /// Steps done.
    pub step: u64,
    /// Mean Dice over volumes, then classes.
    #[serde(deserialize_with = "null_is_nan")]
    pub mean_dice: f64,
    /// Mean Dice of each foreground class, by name.
    #[serde(deserialize_with = "nulls_are_nan")]
    pub class_dice: BTreeMap<String, f64>,
}

/// What else a reader of the report wants to know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "kebab-case")]
pub enum RunEvent {
    /// The run went on from a checkpoint.
    Resumed {
        /// Its step: records after it are superseded.
        step: u64,
        /// Trainers from here on.
        world: u32,
    },
    /// A process was lost.
    ProcessLost {
        /// Steps done by then.
        step: u64,
        /// Which, and how it died.
        detail: String,
    },
    /// Anything else worth a line.
    Note {
        /// Steps done by then.
        step: u64,
        /// The line.
        detail: String,
    },
}

impl RunEvent {
    /// Steps done when it happened.
    #[must_use]
    pub fn step(&self) -> u64 {
        match self {
            Self::Resumed { step, .. }
            | Self::ProcessLost { step, .. }
            | Self::Note { step, .. } => *step,
        }
    }
}

/// One line of the history.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Record {
    /// A step.
    Step(StepRecord),
    /// A validation.
    Validation(ValidationRecord),
    /// An event.
    Event(RunEvent),
}

impl Record {
    /// The record as a line, line feed included: what a writer appends.
    ///
    /// # Errors
    /// None that these types can cause; the encoder's signature has one.
    pub fn to_line(&self) -> Result<Vec<u8>, serde_json::Error> {
        let mut line = serde_json::to_vec(self)?;
        line.push(b'\n');
        Ok(line)
    }
}

/// The history that counts: in order of steps, each at most once.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RunHistory {
    /// Steps.
    pub steps: Vec<StepRecord>,
    /// Validations.
    pub validations: Vec<ValidationRecord>,
    /// Events, in the order in which they happened.
    pub events: Vec<RunEvent>,
    /// Lines that could not be read.
    pub damaged_lines: usize,
}

impl RunHistory {
    /// Reads JSON Lines; lines that are no record are counted, not read.
    #[must_use]
    pub fn from_json_lines(bytes: &[u8]) -> Self {
        let mut history = Self::default();
        for line in bytes.split(|b| *b == b'\n') {
            if line.trim_ascii().is_empty() {
                continue;
            }
            match serde_json::from_slice(line) {
                // A checkpoint has them behind all steps, those after a resume among them.
                Ok(Record::Event(event)) => history.events.push(event),
                Ok(record) => history.push(record),
                Err(_) => history.damaged_lines += 1,
            }
        }
        history
    }

    /// Adds a record; what it supersedes goes.
    pub fn push(&mut self, record: Record) {
        match record {
            Record::Step(step) => {
                self.forget_steps_from(step.step);
                self.steps.push(step);
            }
            Record::Validation(validation) => {
                self.forget_validations_from(validation.step);
                self.validations.push(validation);
            }
            Record::Event(event) => {
                if let RunEvent::Resumed { step, .. } = event {
                    self.forget_steps_from(step + 1);
                    self.forget_validations_from(step + 1);
                }
                self.events.push(event);
            }
        }
    }

    /// The validation with the highest mean Dice, the first of equals.
    #[must_use]
    pub fn best(&self) -> Option<&ValidationRecord> {
        self.ranked().first().copied()
    }

    /// The validations by mean Dice, the highest first, of equals the first. One without a number comes last.
    #[must_use]
    pub fn ranked(&self) -> Vec<&ValidationRecord> {
        let value = |v: &ValidationRecord| if v.mean_dice.is_nan() { -1.0 } else { v.mean_dice };
        let mut all: Vec<_> = self.validations.iter().collect();
        all.sort_by(|a, b| value(b).total_cmp(&value(a)));
        all
    }

    fn forget_steps_from(&mut self, step: u64) {
        let keep = self.steps.partition_point(|s| s.step < step);
        self.steps.truncate(keep);
    }

    fn forget_validations_from(&mut self, step: u64) {
        let keep = self.validations.partition_point(|v| v.step < step);
        self.validations.truncate(keep);
    }
}

fn null_is_nan<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(f64::NAN))
}

fn nulls_are_nan<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<String, f64>, D::Error> {
    let values = BTreeMap::<String, Option<f64>>::deserialize(from)?;
    Ok(values.into_iter().map(|(name, value)| (name, value.unwrap_or(f64::NAN))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: u64, lr: f64) -> Record {
        Record::Step(StepRecord { step, lr, ..Default::default() })
    }

    #[test]
    fn what_a_resumed_run_did_again_counts_once() {
        let resumed = Record::Event(RunEvent::Resumed { step: 2, world: 3 });
        let records =
            [step(1, 0.1), step(2, 0.1), step(3, 0.1), step(4, 0.1), resumed, step(3, 0.2)];
        let mut bytes: Vec<u8> = records.iter().flat_map(|r| r.to_line().unwrap()).collect();
        bytes.extend(br#"{"kind":"step","st"#); // cut off in the middle
        let history = RunHistory::from_json_lines(&bytes);
        assert_eq!(history.damaged_lines, 1);
        let lrs: Vec<_> = history.steps.iter().map(|s| (s.step, s.lr)).collect();
        assert_eq!(lrs, [(1, 0.1), (2, 0.1), (3, 0.2)]);
        assert_eq!(history.events.len(), 1);
    }

    /// A run that was resumed twice lost what it had done in between.
    #[test]
    fn what_a_resumed_run_did_is_kept_in_its_next_checkpoint() {
        let mut history = RunHistory::default();
        history.push(step(1, 0.1));
        history.push(Record::Event(RunEvent::Resumed { step: 1, world: 1 }));
        history.push(step(2, 0.1));
        let steps = history.steps.iter().cloned().map(Record::Step);
        let records = steps.chain(history.events.iter().cloned().map(Record::Event));
        let bytes: Vec<u8> = records.flat_map(|record| record.to_line().unwrap()).collect();
        assert_eq!(RunHistory::from_json_lines(&bytes), history);
    }

    #[test]
    fn a_loss_that_diverged_survives_the_file() {
        let losses = BTreeMap::from([("total".to_owned(), f64::NAN)]);
        let line = Record::Step(StepRecord { step: 1, losses, ..Default::default() }).to_line();
        let history = RunHistory::from_json_lines(&line.unwrap());
        assert!(history.steps[0].losses["total"].is_nan());
    }

    #[test]
    fn the_first_of_equally_good_validations_is_best() {
        let mut history = RunHistory::default();
        for (step, mean_dice) in [(1, 0.5), (2, 0.8), (3, 0.8), (4, f64::NAN)] {
            let class_dice = BTreeMap::new();
            history.push(Record::Validation(ValidationRecord { step, mean_dice, class_dice }));
        }
        assert_eq!(history.best().unwrap().step, 2);
        let ranked: Vec<_> = history.ranked().iter().map(|v| v.step).collect();
        assert_eq!(ranked, [2, 3, 1, 4]);
    }
}
