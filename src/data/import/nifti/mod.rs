//! Folders of NIfTI-1 files: images and their labels, paired by what stands for `{case}` in their
//! names.
//!
//! A label is optional, for all cases and for each. Slices are cut across one axis of the voxel
//! grid; nothing is resampled or turned. A dataset is split by patient. Labelled training patients
//! come first, in the order of their names, so "K labelled patients" means the first K of these.
//!
//! [`options`] says what can be chosen, `files` finds and pairs. `cases`, `split` and `volume`, which
//! divide, read and write, are also those of the importers that find their files in other ways. Files come from outside: every refusal names the file.

pub(super) mod cases;
pub(super) mod files;
pub mod options;
mod split;
mod volume;

use std::sync::Arc;

use crate::data::error::DataError;
use crate::data::manifest::{Manifest, Split};
use crate::data::source::ObjectWriter;
use crate::data::write::Work;
use cases::{Case, Recipe};

pub use options::{
    Intensity, LabelMap, NiftiSource, SliceAxis, SplitRule, SplitWishes, class_names,
};

/// Imports what `source` describes. Goes on with what an earlier import left.
///
/// # Errors
/// [`DataError::Unusable`] for choices that contradict each other or the folder,
/// [`DataError::Import`] with the file's name for one that cannot be used.
pub async fn import(
    source: &NiftiSource,
    sink: Arc<dyn ObjectWriter>,
    work: &Work,
) -> Result<Manifest, DataError> {
    let recipe = Recipe {
        name: source.name.clone(),
        classes: source.checked_classes()?,
        channels: Vec::new(),
        map: source.map.clone(),
        axis: source.axis,
        intensity: source.intensity,
    };
    cases::write(recipe, &source.folder, plan(source)?, sink, work).await
}

/// All cases, divided.
fn plan(source: &NiftiSource) -> Result<Vec<Case>, DataError> {
    let case = |pair: files::Pair| {
        let patient = options::patient_of(source.patient.as_ref(), &pair.case)?.to_owned();
        Ok::<_, DataError>(Case {
            name: pair.case,
            patient,
            split: Split::Train,
            images: vec![pair.image],
            label: pair.label,
            cine: None,
        })
    };
    let mut plan = files::pairs(source)?.into_iter().map(case).collect::<Result<Vec<_>, _>>()?;
    cases::check_patients(&plan)?;
    cases::divide(&mut plan, &source.split)?;
    Ok(plan)
}

#[cfg(test)]
pub(super) mod tests;
