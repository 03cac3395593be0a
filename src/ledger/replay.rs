//! The replay: the deal computed again for every step that counts, and compared with what is recorded.
//!
//! Two things are shown, one apart from the other: that each step used the samples that were planned (its
//! fingerprint), and that the plan deals each sample of the pool once an epoch (a bitmap for each epoch, with
//! no fingerprint involved). Pure; receipts pass by once, memory is a bit for each sample of the
//! epochs in progress.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::Serialize;

use super::branches::{Path, Violation};
use super::explain::explain;
use super::fingerprint::Part;
use super::record::{Object, object_path};
use crate::data::{Deal, Draw};
use crate::types::{Receipt, Step};

/// What a replay has counted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Steps, each recorded once and as planned.
    pub steps: u64,
    /// The first of them.
    pub first_step: Step,
    /// Unlabelled samples in all of them.
    pub samples: u64,
    /// Samples of the unlabelled pool.
    pub pool: u64,
    /// Epochs in which each of the pool's samples counted, once.
    pub epochs_complete: u64,
    /// Epochs of which these steps are a part, at the end (and where recording began within one): no
    /// sample counted twice.
    pub epochs_partial: u64,
}

/// A replay in progress.
#[derive(Debug)]
pub struct Replay<'a> {
    path: &'a Path,
    deal: &'a Deal,
    next: Step,
    epochs: Epochs,
}

impl<'a> Replay<'a> {
    /// Of the steps of `path` under `deal`.
    #[must_use]
    pub fn new(path: &'a Path, deal: &'a Deal) -> Self {
        let batch = u64::from(deal.spec().batch_unlabelled);
        let epochs = Epochs::new(deal.spec().unlabelled.clone(), path.first.0 * batch);
        Self { path, deal, next: path.first, epochs }
    }

    /// Takes the receipts that count from the next object.
    ///
    /// # Errors
    /// The first that is not as planned.
    pub fn object(&mut self, object: &Object) -> Result<(), Violation> {
        let segment =
            self.path.segments.iter().find(|(lineage, _)| object.lineage == Some(*lineage));
        let Some((_, steps)) = segment else { return Ok(()) };
        for receipt in object.receipts().filter(|receipt| steps.contains(&receipt.step)) {
            self.step(receipt, || object_path(object.number))?;
        }
        Ok(())
    }

    /// After the last object: what the checkpoint carries, and the counts.
    ///
    /// # Errors
    /// As [`Self::object`]; or a path that has not been walked to its end.
    pub fn finish(mut self) -> Result<Counts, Violation> {
        if let Some((step, receipts)) = &self.path.carried {
            for receipt in receipts {
                self.step(*receipt, || format!("the checkpoint of step {step}"))?;
            }
        }
        if self.next != self.path.end {
            let name = "ledger".to_owned();
            return Err(Violation::at(name, self.next, "it is missing"));
        }
        let steps = self.path.end.0 - self.path.first.0;
        let samples = steps * u64::from(self.deal.spec().batch_unlabelled);
        self.epochs.counts(steps, self.path.first, samples)
    }

    fn step(&mut self, receipt: Receipt, object: impl Fn() -> String) -> Result<(), Violation> {
        let step = self.next;
        if receipt.step != step {
            let what = format!("it is missing: step {} is recorded in its place", receipt.step);
            return Err(Violation::at(object(), step, what));
        }
        let slots = 0..self.deal.spec().batch_unlabelled;
        let draws: Vec<Draw> = slots.clone().map(|slot| self.deal.unlabelled(step, slot)).collect();
        let planned = Part::of(step, &slots, &draws);
        if receipt.samples != planned.samples {
            let what = format!(
                "{} unlabelled samples are recorded, {} were planned",
                receipt.samples, planned.samples
            );
            return Err(Violation::at(object(), step, what));
        }
        if receipt.fingerprint != planned.fingerprint {
            let what = explain(self.deal, step, receipt.fingerprint);
            return Err(Violation::at(object(), step, what));
        }
        for draw in draws {
            self.epochs.count(draw).map_err(|what| Violation::at(object(), step, what))?;
        }
        self.next = step.next();
        self.epochs.close((step.0 + 1) * u64::from(slots.end), step)
    }
}

/// Which samples each epoch in progress has seen.
#[derive(Debug)]
struct Epochs {
    pool: Range<u64>,
    /// The position in the stream at which the replay begins.
    start: u64,
    /// Every position before this one has been counted.
    done: u64,
    seen: BTreeMap<u64, Seen>,
    complete: u64,
    partial: u64,
}

/// A bit for each sample of the pool.
#[derive(Debug)]
struct Seen {
    bits: Vec<u64>,
    count: u64,
}

impl Epochs {
    fn new(pool: Range<u64>, start: u64) -> Self {
        Self { pool, start, done: start, seen: BTreeMap::new(), complete: 0, partial: 0 }
    }

    fn size(&self) -> u64 {
        self.pool.end.saturating_sub(self.pool.start)
    }

    fn count(&mut self, draw: Draw) -> Result<(), String> {
        let (sample, epoch) = (draw.sample, draw.epoch.0);
        if !self.pool.contains(&sample) {
            return Err(format!("sample {sample} is none of the unlabelled pool"));
        }
        // What ended before is not opened again.
        if (epoch + 1).saturating_mul(self.size()) <= self.done {
            return Err(format!("sample {sample} is dealt in epoch {epoch}, which is over"));
        }
        let words = self.size().div_ceil(64) as usize;
        let seen =
            self.seen.entry(epoch).or_insert_with(|| Seen { bits: vec![0; words], count: 0 });
        let index = sample - self.pool.start;
        let (word, bit) = (&mut seen.bits[(index / 64) as usize], 1 << (index % 64));
        if *word & bit != 0 {
            return Err(format!("sample {sample} is dealt twice in epoch {epoch}"));
        }
        *word |= bit;
        seen.count += 1;
        Ok(())
    }

    /// Everything before position `end` has been counted: closes the epochs that lie before it.
    fn close(&mut self, end: u64, step: Step) -> Result<(), Violation> {
        self.done = end;
        let size = self.size();
        while let Some(entry) = self.seen.first_entry() {
            let epoch = *entry.key();
            if (epoch + 1) * size > end {
                return Ok(());
            }
            let count = entry.remove().count;
            let planned = (epoch + 1) * size - (epoch * size).max(self.start);
            if count != planned {
                let what = format!("epoch {epoch} ends, {count} of {planned} samples were dealt");
                return Err(Violation::at("the deal".to_owned(), step, what));
            }
            if planned == size {
                self.complete += 1;
            } else {
                self.partial += 1;
            }
        }
        Ok(())
    }

    fn counts(self, steps: u64, first_step: Step, samples: u64) -> Result<Counts, Violation> {
        let pool = self.size();
        for (epoch, seen) in &self.seen {
            let planned = self.done - (epoch * pool).max(self.start);
            if seen.count != planned {
                let what = format!("{} of {planned} samples of epoch {epoch}", seen.count);
                return Err(Violation::of("the deal".to_owned(), what));
            }
        }
        let epochs_partial = self.partial + self.seen.len() as u64;
        let epochs_complete = self.complete;
        Ok(Counts { steps, first_step, samples, pool, epochs_complete, epochs_partial })
    }
}

#[cfg(test)]
#[path = "replay_tests.rs"]
mod tests;
