//! The shape of a ledger: which lineages there are, how they hang together, which steps each records.
//!
//! Pure, and small whatever the length of the run: objects pass by once, in the order of their numbers. What
//! the receipts say is not looked at here (`replay`), only that none is missing and none is there twice.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use serde::Serialize;

use super::receipts::Carried;
use super::record::{Object, Opening, Origin, object_path};
use crate::data::DealSpec;
use crate::types::{Lineage, Receipt, Step};

/// What is wrong, and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, thiserror::Error)]
pub struct Violation {
    /// In which object of the run.
    pub object: String,
    /// At which step, if at one.
    pub step: Option<Step>,
    /// What.
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.step {
            Some(step) => write!(f, "{}, step {step}: {}", self.object, self.what),
            None => write!(f, "{}: {}", self.object, self.what),
        }
    }
}

impl Violation {
    /// One that concerns no single step.
    pub(super) fn of(object: String, what: impl Into<String>) -> Self {
        Self { object, step: None, what: what.into() }
    }

    pub(super) fn at(object: String, step: Step, what: impl Into<String>) -> Self {
        Self { object, step: Some(step), what: what.into() }
    }
}

/// A lineage as far as it has been read.
#[derive(Debug, Clone)]
struct Branch {
    opening: Opening,
    /// The step after its last record.
    end: Step,
}

/// All lineages of a ledger.
#[derive(Debug, Clone, Default)]
pub struct Branches {
    objects: u64,
    receipts: u64,
    writer: String,
    /// The lineage that may be gone on with.
    open: Option<Lineage>,
    lineages: BTreeMap<Lineage, Branch>,
}

/// The steps that count, and who records them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Path {
    /// Oldest first; each one's steps follow those of the one before.
    pub segments: Vec<(Lineage, Range<Step>)>,
    /// The first step: 0, or where recording began.
    pub first: Step,
    /// What only the newest checkpoint holds: its step, and the receipts that lead to it.
    pub carried: Option<(Step, Vec<Receipt>)>,
    /// The step after the last.
    pub end: Step,
    /// The deal that all segments share; none if there are none.
    pub deal: Option<DealSpec>,
    /// The dataset that all segments share.
    pub dataset_sha256: Option<String>,
}

impl Branches {
    /// How many lineages there are.
    #[must_use]
    pub fn lineages(&self) -> u64 {
        self.lineages.len() as u64
    }

    /// How many objects have passed.
    #[must_use]
    pub fn objects(&self) -> u64 {
        self.objects
    }

    /// Receipts in all of them.
    #[must_use]
    pub fn receipts(&self) -> u64 {
        self.receipts
    }

    /// Takes the next object.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn add(&mut self, object: &Object) -> Result<(), Violation> {
        let wanted = self.objects + 1;
        if object.number != wanted {
            return Err(Violation::of(object_path(wanted), "it is missing"));
        }
        let name = object_path(object.number);
        let Some(lineage) = object.lineage else {
            self.objects = wanted;
            self.writer.clone_from(&object.writer);
            self.open = None;
            return Ok(());
        };
        if object.writer != self.writer {
            let what = format!(
                "coordinator {} wrote it, though {} had claimed the ledger",
                object.writer, self.writer
            );
            return Err(Violation::of(name, what));
        }
        if let Some(opening) = &object.opening {
            self.check_opening(&name, lineage, opening)?;
            let branch = Branch { opening: opening.clone(), end: opening.first };
            self.lineages.insert(lineage, branch);
            self.open = Some(lineage);
        }
        let open = self.open;
        let branch = match self.lineages.get_mut(&lineage) {
            Some(branch) if open == Some(lineage) => branch,
            Some(_) => {
                let what = format!("it goes on with lineage {lineage}, which is not open any more");
                return Err(Violation::of(name, what));
            }
            None => {
                let what = format!("it goes on with lineage {lineage}, which no object opens");
                return Err(Violation::of(name, what));
            }
        };
        for run in &object.receipts {
            if run.first > branch.end {
                let what = format!("it is missing: step {} is recorded next", run.first);
                return Err(Violation::at(name, branch.end, what));
            }
            if run.first < branch.end {
                let what = format!("it is recorded twice: step {} was next", branch.end);
                return Err(Violation::at(name, run.first, what));
            }
            // An object that was decoded has no empty run.
            branch.end = run.next().unwrap_or(branch.end);
            self.receipts += run.fingerprints.len() as u64;
        }
        self.objects = wanted;
        Ok(())
    }

    fn check_opening(
        &self,
        name: &str,
        lineage: Lineage,
        opening: &Opening,
    ) -> Result<(), Violation> {
        let wrong = |what: String| Err(Violation::of(name.to_owned(), what));
        let first = opening.first;
        match opening.origin {
            Origin::Start if first != Step(0) => {
                wrong(format!("lineage {lineage} is to begin the run, at step {first}"))
            }
            Origin::Start | Origin::Unrecorded => Ok(()),
            Origin::Lineage(parent) => {
                self.leaves(name, parent, first)?;
                let from = self.lineages.get(&parent).map(|branch| &branch.opening);
                if from.is_some_and(|from| {
                    from.deal != opening.deal || from.dataset_sha256 != opening.dataset_sha256
                }) {
                    return wrong(format!(
                        "lineage {lineage} deals other samples than lineage {parent}, from which it comes"
                    ));
                }
                Ok(())
            }
        }
    }

    /// Whether `parent` is there and recorded up to `step`, where `name` goes on from it.
    fn leaves(&self, name: &str, parent: Lineage, step: Step) -> Result<(), Violation> {
        let Some(branch) = self.lineages.get(&parent) else {
            let what = format!("it goes on from lineage {parent}, which is not there");
            return Err(Violation::of(name.to_owned(), what));
        };
        if branch.end < step {
            let what = format!(
                "it is missing: lineage {parent} ends before it and is gone on from at step {step}"
            );
            return Err(Violation::at(name.to_owned(), branch.end, what));
        }
        if branch.opening.first > step {
            let what = format!("lineage {parent}, from which it goes on, begins later");
            return Err(Violation::at(name.to_owned(), step, what));
        }
        Ok(())
    }

    /// The steps that count: those of the newest lineage and its ancestors, or, where the newest
    /// checkpoint is ahead of it, those that lead to the checkpoint, from which a resume would go on.
    ///
    /// # Errors
    /// When the checkpoint goes on from what is not recorded.
    pub fn path(&self, checkpoint: Option<(Step, &Carried)>) -> Result<Path, Violation> {
        let newest = self.lineages.iter().next_back();
        let recorded = newest.map_or(Step(0), |(_, branch)| branch.end);
        let mut path = Path {
            segments: Vec::new(),
            first: recorded,
            carried: None,
            end: recorded,
            deal: None,
            dataset_sha256: None,
        };
        let mut from = newest.map(|(lineage, _)| *lineage);
        if let Some((step, carried)) = checkpoint {
            let name = format!("the checkpoint of step {step}");
            if let Origin::Lineage(parent) = carried.origin {
                self.leaves(&name, parent, carried.first)?;
            }
            let receipts =
                carried.up_to(step).map_err(|error| Violation::of(name, error.to_string()))?;
            if step > recorded {
                from = match carried.origin {
                    Origin::Lineage(parent) => Some(parent),
                    Origin::Start | Origin::Unrecorded => None,
                };
                path.first = carried.first;
                path.carried = Some((step, receipts));
                path.end = step;
            }
        }
        while let Some((lineage, branch)) =
            from.and_then(|lineage| self.lineages.get_key_value(&lineage))
        {
            let opening = &branch.opening;
            path.segments.push((*lineage, opening.first..path.first));
            path.first = opening.first;
            path.deal = Some(opening.deal.clone());
            path.dataset_sha256 = Some(opening.dataset_sha256.clone());
            // Older than this one, or it would not have been there to be gone on from: this ends.
            from = match opening.origin {
                Origin::Lineage(parent) => Some(parent),
                Origin::Start | Origin::Unrecorded => None,
            };
        }
        path.segments.reverse();
        Ok(path)
    }
}
