//! What every importer of NIfTI files does once it knows its cases: divide them by patient, read
//! them side by side, write them in the manifest's order. Which files make a case is its own.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::options::{Intensity, LabelMap, SliceAxis, SplitRule};
use super::{split, volume};
use crate::data::error::DataError;
use crate::data::manifest::{Manifest, Split};
use crate::data::preprocess::Preprocessing;
use crate::data::source::ObjectWriter;
use crate::data::write::{self, Plan, PlannedCase, Work, WriteOptions};

/// A case: its files, whose it is and what it is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::data::import) struct Case {
    /// Unique name.
    pub name: String,
    /// Whose it is.
    pub patient: String,
    /// What it is for.
    pub split: Split,
    /// A file for each channel.
    pub images: Vec<PathBuf>,
    /// Where it has one.
    pub label: Option<PathBuf>,
    /// What is known of the frames of a 4-D image; without it all are taken.
    pub cine: Option<Cine>,
}

/// A 4-D image of which some frames have files of their own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::data::import) struct Cine {
    /// How many frames it must have, where that is known.
    pub frames: Option<usize>,
    /// Frames that are left out, from zero.
    pub apart: Vec<usize>,
}

/// What is made of all cases alike.
#[derive(Debug, Clone)]
pub(in crate::data::import) struct Recipe {
    /// What the dataset is called in reports.
    pub name: String,
    /// Class names by class, background first.
    pub classes: Vec<String>,
    /// Channel names, as many as a case has images; empty for one without a name.
    pub channels: Vec<String>,
    /// What label values mean.
    pub map: LabelMap,
    /// Across which axis slices are cut.
    pub axis: SliceAxis,
    /// What becomes of each channel's intensities.
    pub intensity: Intensity,
}

impl Recipe {
    /// What the manifest says of how volumes were made.
    pub(super) fn preprocessing(&self) -> Preprocessing {
        Preprocessing { intensity: self.intensity, slice_axis: self.axis }
    }
}

/// Refuses one patient for a whole dataset: `BRATS_001`, `BRATS_002`, ... by the default rule.
pub(in crate::data::import) fn check_patients(cases: &[Case]) -> Result<(), DataError> {
    match cases {
        [first, rest @ ..]
            if !rest.is_empty() && rest.iter().all(|case| case.patient == first.patient) =>
        {
            Err(DataError::Unusable(format!(
                "all {} cases are of one patient, `{}`: say which part of `{}` is the patient, \
                 such as {{patient}} for the whole of it",
                cases.len(),
                first.patient,
                first.name
            )))
        }
        _ => Ok(()),
    }
}

/// Divides cases by patient; who is in no other split is trained on.
pub(in crate::data::import) fn divide(
    cases: &mut [Case],
    rule: &SplitRule,
) -> Result<(), DataError> {
    let mut labelled = BTreeMap::new();
    for case in cases.iter() {
        *labelled.entry(case.patient.clone()).or_insert(true) &= case.label.is_some();
    }
    let splits = split::assign(rule, &labelled)?;
    for case in cases {
        case.split = splits.get(&case.patient).copied().unwrap_or(Split::Train);
    }
    Ok(())
}

/// Reads and writes `cases`, whose files are below `folder`.
pub(in crate::data::import) async fn write(
    recipe: Recipe,
    folder: &Path,
    mut cases: Vec<Case>,
    sink: Arc<dyn ObjectWriter>,
    work: &Work,
) -> Result<Manifest, DataError> {
    // What the manifest asks for: labelled before unlabelled, a patient's volumes side by side.
    cases.sort_by(|a, b| {
        let key = |case: &Case| (case.split, case.label.is_none());
        key(a).cmp(&key(b)).then_with(|| (&a.patient, &a.name).cmp(&(&b.patient, &b.name)))
    });
    let classes: Vec<&str> = recipe.classes.iter().map(String::as_str).collect();
    let mut options = WriteOptions::new(&recipe.name, &classes);
    options.channels.clone_from(&recipe.channels);
    options.preprocessing = recipe.preprocessing();
    let planned = cases.iter().map(|case| {
        let files = case.images.iter().chain(&case.label).cloned().collect();
        Ok(PlannedCase { name: &case.name, patient: &case.patient, split: case.split, files })
    });
    let plan = Plan::new([("labels", format!("{:?}", recipe.map))]).reading(folder, planned)?;
    let axes = Arc::new(Mutex::new(Axes::default()));
    let found = Arc::clone(&axes);
    let read = move |case: &Case| {
        let (axis, volumes) = volume::read_case(&recipe, case)?;
        found.lock().unwrap_or_else(PoisonError::into_inner).add(axis, &case.name);
        Ok(volumes)
    };
    let manifest = write::write(sink, &options.sized(work), plan, cases, read, work).await?;
    if let Some(words) = axes.lock().unwrap_or_else(PoisonError::into_inner).differ() {
        tracing::warn!("{words}");
    }
    Ok(manifest)
}

/// Across which axis of the file which images were cut: the first few names and how many. They come in any
/// order.
#[derive(Debug, Default)]
struct Axes(BTreeMap<usize, (BTreeSet<String>, usize)>);

impl Axes {
    const NAMED: usize = 3;

    fn add(&mut self, axis: usize, case: &str) {
        let (names, count) = self.0.entry(axis).or_default();
        *count += 1;
        names.insert(format!("`{case}`"));
        if names.len() > Self::NAMED {
            names.pop_last();
        }
    }

    /// A warning, where they are not all cut alike.
    fn differ(&self) -> Option<String> {
        let part = |(axis, (names, count)): (&usize, &(BTreeSet<String>, usize))| {
            let more = match count - names.len() {
                0 => String::new(),
                more => format!(" and {more} more"),
            };
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            format!("across axis {axis} of {}{more}", names.join(", "))
        };
        let parts: Vec<String> = self.0.iter().map(part).collect();
        (parts.len() > 1).then(|| {
            format!(
                "spacing chose other slice axes for other images: slices are cut {}; --axis cuts \
                 all alike",
                parts.join("; ")
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_cut_across_other_axes_are_named() {
        let mut axes = Axes::default();
        for case in ["a", "b", "c", "d", "e"] {
            axes.add(2, case);
        }
        assert_eq!(axes.differ(), None);
        axes.add(0, "odd");
        let words = axes.differ().unwrap();
        for part in ["axis 0 of `odd`;", "axis 2 of `a`, `b`, `c` and 2 more;", "--axis"] {
            assert!(words.contains(part), "{words}");
        }
    }
}
