//! Folders of NIfTI-1 files: images and their labels, paired by what stands for `{case}` in their
//! names.
//!
//! A label is optional, for all cases and for each. Slices are cut across one axis of the voxel
//! grid; nothing is resampled or turned. A dataset is split by patient. Labelled training patients
//! come first, in the order of their names, so "K labelled patients" means the first K of these.
//!
//! [`options`] says what can be chosen, `files` finds and pairs, `split` divides, `volume` reads
//! one case. Files come from outside: every refusal names the file.

mod files;
pub mod options;
mod split;
mod volume;

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;

use super::side_by_side;
use crate::data::error::DataError;
use crate::data::manifest::{Manifest, Split};
use crate::data::source::ObjectWriter;
use crate::data::write::{DatasetWriter, WriteOptions};

pub use options::{Intensity, LabelMap, NiftiSource, SliceAxis, SplitRule, class_names};

/// Imports what `source` describes. Reads up to `threads` cases side by side; memory holds these
/// and one unfinished shard per split.
///
/// # Errors
/// [`DataError::Unusable`] for choices that contradict each other or the folder,
/// [`DataError::Import`] with the file's name for one that cannot be used.
pub async fn import(
    source: &NiftiSource,
    sink: Arc<dyn ObjectWriter>,
    threads: usize,
) -> Result<Manifest, DataError> {
    let classes = source.checked_classes()?;
    let classes: Vec<&str> = classes.iter().map(String::as_str).collect();
    let mut plans = VecDeque::from(plan(source)?);
    let mut options = WriteOptions::new(&source.name, &classes);
    options.preprocessing = source.preprocessing();
    let mut writer = DatasetWriter::new(sink, options)?;
    while !plans.is_empty() {
        let chunk: Vec<CasePlan> = plans.drain(..plans.len().min(threads.max(1))).collect();
        let read = |case: &CasePlan| volume::read_case(source, classes.len(), case);
        for volumes in side_by_side(&chunk, threads, read) {
            for volume in volumes? {
                writer.add(volume).await?;
            }
        }
    }
    writer.finish().await
}

/// A case, whose it is and what it is for.
#[derive(Debug, Clone, PartialEq, Eq)]
struct CasePlan {
    case: String,
    patient: String,
    split: Split,
    image: PathBuf,
    label: Option<PathBuf>,
}

/// All cases in the order of the dataset.
fn plan(source: &NiftiSource) -> Result<Vec<CasePlan>, DataError> {
    let pairs = files::pairs(source)?;
    let mut plans = Vec::with_capacity(pairs.len());
    let mut labelled = BTreeMap::new();
    for pair in pairs {
        let patient = source.patient_of(&pair.case)?.to_owned();
        *labelled.entry(patient.clone()).or_insert(true) &= pair.label.is_some();
        plans.push(CasePlan {
            case: pair.case,
            patient,
            split: Split::Train,
            image: pair.image,
            label: pair.label,
        });
    }
    // `BRATS_001`, `BRATS_002`, ...: the default rule would make one patient of a whole dataset.
    if let (1, Some((patient, _)), true) =
        (labelled.len(), labelled.first_key_value(), plans.len() > 1)
    {
        return Err(DataError::Unusable(format!(
            "all {} cases are of one patient, `{patient}`: say which part of `{}` is the patient, \
             such as {{patient}} for the whole of it",
            plans.len(),
            plans[0].case
        )));
    }
    let splits = split::assign(&source.split, &labelled)?;
    for plan in &mut plans {
        plan.split = splits.get(&plan.patient).copied().unwrap_or(Split::Train);
    }
    // What the manifest asks for: labelled before unlabelled, a patient's volumes side by side.
    plans.sort_by(|a, b| {
        let key = |plan: &CasePlan| (plan.split, plan.label.is_none());
        key(a).cmp(&key(b)).then_with(|| (&a.patient, &a.case).cmp(&(&b.patient, &b.case)))
    });
    Ok(plans)
}

#[cfg(test)]
mod tests;
