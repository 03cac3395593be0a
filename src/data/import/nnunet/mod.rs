//! nnU-Net's raw datasets: `dataset.json`, `imagesTr/CASE_0000.nii.gz` with a file for each channel,
//! `labelsTr/CASE.nii.gz`; both versions of the format.
//!
//! Cases of `imagesTs` are the test split where `labelsTs` has their labels, else they are trained
//! on without. Validation is a fold of `splits_final.json` where there is one, else drawn by
//! patient. Refused by name are regions, the `ignore` label and formats other than NIfTI. Files come
//! from outside: names in JSON are compared with those of files, never made into paths.

mod description;
mod folds;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::nifti::cases::{self, Case, Recipe};
use super::nifti::files::{ENTRIES_MAX, dicom_hint, walk};
use super::nifti::options::patient_of;
use super::nifti::{Intensity, LabelMap, SliceAxis, SplitWishes};
use super::{Pattern, read_small};
use crate::data::error::DataError;
use crate::data::manifest::{Manifest, Split};
use crate::data::source::ObjectWriter;
use crate::data::write::Work;
use description::{Description, Labels};

/// The largest `dataset.json` that is read: v1's list every case.
const DESCRIPTION_BYTES_MAX: u64 = 64 << 20;

const SPLITS: &str = "splits_final.json";

/// Where the dataset is, and what to make of it.
#[derive(Debug, Clone, PartialEq)]
pub struct NnunetSource {
    /// The folder with `dataset.json`.
    pub folder: PathBuf,
    /// Where in a case's name the `{patient}` stands; without it the patient is what comes before
    /// the first `_`, or the whole name.
    pub patient: Option<Pattern>,
    /// Class names by class, instead of those of `dataset.json`; empty for those.
    pub classes: Vec<String>,
    /// Label values that mean another class.
    pub map: LabelMap,
    /// Across which axis slices are cut.
    pub axis: SliceAxis,
    /// What becomes of each channel's intensities.
    pub intensity: Intensity,
    /// How cases are divided.
    pub split: NnunetSplit,
}

/// How cases are divided into training and validation.
#[derive(Debug, Clone, PartialEq)]
pub enum NnunetSplit {
    /// By a fold of a file, or of the folder's own `splits_final.json`.
    Fold {
        /// The file; without it the folder's own, which then must be there.
        file: Option<PathBuf>,
        /// Which fold, from zero.
        number: usize,
    },
    /// By patient.
    Wishes(SplitWishes),
    /// By the first fold of the folder's own file if there is one, else by patient.
    Usual,
}

impl NnunetSource {
    /// Everything by default but where the dataset is.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self {
            folder: folder.into(),
            patient: None,
            classes: Vec::new(),
            map: LabelMap::default(),
            axis: SliceAxis::default(),
            intensity: Intensity::default(),
            split: NnunetSplit::Usual,
        }
    }
}

/// Imports a dataset. Reads several cases side by side.
///
/// # Errors
/// [`DataError::Import`] with the name of the file that is missing, odd or damaged;
/// [`DataError::Unusable`] for choices that do not go together.
pub async fn import(
    source: &NnunetSource,
    sink: Arc<dyn ObjectWriter>,
    work: &Work,
) -> Result<Manifest, DataError> {
    let description = describe(&source.folder)?;
    let plan = plan(source, &description)?;
    let (classes, map) = classes(source, &description)?;
    let name = source.folder.file_name().map(|name| name.to_string_lossy().into_owned());
    let recipe = Recipe {
        name: name.unwrap_or_else(|| "nnU-Net".to_owned()),
        classes,
        channels: description.channels,
        map,
        axis: source.axis,
        intensity: source.intensity,
    };
    cases::write(recipe, &source.folder, plan, sink, work).await
}

fn describe(folder: &Path) -> Result<Description, DataError> {
    let path = folder.join("dataset.json");
    if !path.is_file() {
        let files = files_in(folder)?;
        let mut why = "it is missing: --in is one DatasetNNN_NAME folder of nnUNet_raw".to_owned();
        why += dicom_hint(files.iter().map(|file| folder.join(file))).unwrap_or_default();
        return Err(bad(&path, why));
    }
    let bytes = read_small(&path, DESCRIPTION_BYTES_MAX)?;
    Description::parse(&bytes).map_err(|why| bad(&path, why))
}

/// Class names, and which label values mean which. Names that were given leave nothing of what
/// `dataset.json` declares: values then mean their own number, as in other NIfTI files.
fn classes(
    source: &NnunetSource,
    description: &Description,
) -> Result<(Vec<String>, LabelMap), DataError> {
    let (names, map) = match &description.labels {
        _ if !source.classes.is_empty() => (source.classes.clone(), source.map.clone()),
        Labels::Unclear(why) => {
            let why = format!("{why}: name classes with --classes and values with --map");
            return Err(bad(&source.folder.join("dataset.json"), why));
        }
        Labels::Classes { values, ignored } => {
            let (values, names): (Vec<i64>, Vec<String>) = values.iter().cloned().unzip();
            (names, source.map.over(&values, *ignored))
        }
    };
    map.check(names.len())?;
    Ok((names, map))
}

/// All cases, divided.
fn plan(source: &NnunetSource, description: &Description) -> Result<Vec<Case>, DataError> {
    let folder = &source.folder;
    let mut plan = cases_in(source, description, ["imagesTr", "labelsTr"])?;
    if description.cases.is_some_and(|cases| cases != plan.len() as u64) {
        let declared = description.cases.unwrap_or_default();
        tracing::warn!(
            "dataset.json declares {declared} training cases, imagesTr has {}",
            plan.len()
        );
    }
    let mut others = match folder.join("imagesTs").is_dir() {
        true => cases_in(source, description, ["imagesTs", "labelsTs"])?,
        false => Vec::new(),
    };
    let tested = others.iter().any(|case| case.label.is_some());
    let own = folder.join(SPLITS);
    let fold = match &source.split {
        NnunetSplit::Fold { file, number } => Some((file.clone().unwrap_or(own), *number)),
        NnunetSplit::Usual if own.is_file() => Some((own, 0)),
        NnunetSplit::Usual | NnunetSplit::Wishes(_) => None,
    };
    if let Some((path, number)) = fold {
        let left_out = folds::divide(&mut plan, &path, number)?;
        if left_out > 0 {
            tracing::warn!("{left_out} cases of imagesTr are not in fold {number}: left out");
        }
    } else {
        let mut all = plan.clone();
        all.extend_from_slice(&others);
        cases::check_patients(&all)?;
        let usual = SplitWishes::default();
        let wishes = if let NnunetSplit::Wishes(wishes) = &source.split { wishes } else { &usual };
        let rule = if tested { wishes.rule_beside("imagesTs")? } else { wishes.rule() };
        cases::divide(&mut plan, &rule)?;
    }
    for case in &mut others {
        case.split = if case.label.is_some() { Split::Test } else { Split::Train };
    }
    check_others(folder, &plan, &others)?;
    plan.append(&mut others);
    Ok(plan)
}

/// Nobody is in two splits, and no two cases have one name.
fn check_others(folder: &Path, plan: &[Case], others: &[Case]) -> Result<(), DataError> {
    let names: BTreeSet<&str> = plan.iter().map(|case| case.name.as_str()).collect();
    let mut splits: BTreeMap<&str, &Case> = BTreeMap::new();
    for case in plan.iter().chain(others) {
        let first = splits.entry(&case.patient).or_insert(case);
        if first.split != case.split {
            let why = format!(
                "patient `{}` is in {} (case `{}`) and in {} (case `{}`): say with --patient what \
                 of a case's name is the patient",
                case.patient, first.split, first.name, case.split, case.name
            );
            return Err(bad(folder, why));
        }
    }
    match others.iter().find(|case| names.contains(case.name.as_str())) {
        Some(case) => {
            Err(bad(&case.images[0], format!("case `{}` is in imagesTr, too", case.name)))
        }
        None => Ok(()),
    }
}

/// The cases of one pair of folders, in the order of their names.
fn cases_in(
    source: &NnunetSource,
    description: &Description,
    [images, labels]: [&str; 2],
) -> Result<Vec<Case>, DataError> {
    let ending = description.ending.as_str();
    let count = description.channels.len();
    let folder = source.folder.join(images);
    let mut found: BTreeMap<String, BTreeSet<usize>> = BTreeMap::new();
    let files = files_in(&folder)?;
    for file in files.iter().filter(|file| file.ends_with(ending)) {
        let Some((case, channel)) = case_and_channel(&file[..file.len() - ending.len()]) else {
            let why = format!(
                "its name is not CASE_0000{ending}: bring the dataset into nnU-Net's format \
                 (nnUNetv2_convert_MSD_dataset), or use --from nifti"
            );
            return Err(bad(&folder.join(file), why));
        };
        if channel >= count {
            let why = format!("channel {channel}: dataset.json has {count}, counted from 0");
            return Err(bad(&folder.join(file), why));
        }
        found.entry(case.to_owned()).or_default().insert(channel);
    }
    if found.is_empty() {
        let mut why = format!("no CASE_0000{ending} is in it");
        why += dicom_hint(files.iter().map(|file| folder.join(file))).unwrap_or_default();
        return Err(bad(&folder, why));
    }
    let mut labelled = labels_in(&source.folder.join(labels), images == "imagesTr", ending)?;
    let mut cases = Vec::with_capacity(found.len());
    for (name, channels) in found {
        let file = |channel| folder.join(format!("{name}_{channel:04}{ending}"));
        if let Some(channel) = (0..count).find(|channel| !channels.contains(channel)) {
            let why = format!("it is missing: dataset.json has {count} channels for each case");
            return Err(bad(&file(channel), why));
        }
        cases.push(Case {
            patient: patient_of(source.patient.as_ref(), &name)?.to_owned(),
            split: Split::Train,
            images: (0..count).map(file).collect(),
            label: labelled.remove(&name),
            cine: None,
            name,
        });
    }
    match labelled.into_iter().next() {
        Some((name, label)) => {
            Err(bad(&label, format!("it is a label, and no image of case `{name}` is in {images}")))
        }
        None => Ok(cases),
    }
}

/// Labels by case.
fn labels_in(
    folder: &Path,
    needed: bool,
    ending: &str,
) -> Result<BTreeMap<String, PathBuf>, DataError> {
    if !needed && !folder.is_dir() {
        return Ok(BTreeMap::new());
    }
    let files = files_in(folder)?;
    let names = files.iter().filter_map(|file| Some((file.strip_suffix(ending)?, file)));
    let labels: BTreeMap<String, PathBuf> =
        names.map(|(case, file)| (case.to_owned(), folder.join(file))).collect();
    if needed && labels.is_empty() {
        let why = format!(
            "no label ends in `{ending}`, which is dataset.json's file_ending ({} files are here)",
            files.len()
        );
        return Err(bad(folder, why));
    }
    Ok(labels)
}

fn files_in(folder: &Path) -> Result<Vec<String>, DataError> {
    let (mut files, mut left) = (Vec::new(), ENTRIES_MAX);
    walk(folder, "", 0, &mut left, &mut files)?;
    Ok(files)
}

/// `patient001_frame01_0000` is channel 0 of `patient001_frame01`.
fn case_and_channel(stem: &str) -> Option<(&str, usize)> {
    let (case, channel) = stem.rsplit_once('_')?;
    let plain = channel.len() == 4 && channel.bytes().all(|byte| byte.is_ascii_digit());
    (plain && !case.is_empty()).then_some((case, channel.parse().ok()?))
}

fn bad(path: &Path, why: impl ToString) -> DataError {
    DataError::Import { path: path.to_owned(), why: why.to_string() }
}

#[cfg(test)]
mod tests;
