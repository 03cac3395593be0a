//! The ACDC challenge's own tree: `training/patient001/` with `Info.cfg`, the two labelled frames
//! `patient001_frame01.nii.gz` and `patient001_frame01_gt.nii.gz`, and the whole beat in
//! `patient001_4d.nii.gz`; `testing/` alike.
//!
//! What `Info.cfg` calls ED and ES is imported, and where it is asked for the other frames of
//! training patients without labels. Labelled patients of `testing/` are the test split, where both
//! folders are there. A patient without any label is trained on without. Not here: SSL4MIS' HDF5
//! files, which are `acdc_h5`'s.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::acdc_h5::CLASSES;
use super::nifti::cases::{self, Case, Cine, Recipe};
use super::nifti::files::{ENTRIES_MAX, dicom_hint};
use super::nifti::{Intensity, LabelMap, SliceAxis, SplitWishes};
use super::read_small;
use crate::data::error::DataError;
use crate::data::manifest::{Manifest, Split};
use crate::data::source::ObjectWriter;
use crate::data::write::Work;

/// The largest `Info.cfg` that is read; they have about 80 bytes.
const INFO_BYTES_MAX: u64 = 1 << 16;

/// The folder of the patients to report on.
const TESTING: &str = "testing";

/// Where the tree is, and what to make of it.
#[derive(Debug, Clone, PartialEq)]
pub struct AcdcTree {
    /// The folder with `training` and `testing`, one of these, or the one above `database`.
    pub folder: PathBuf,
    /// Whether the frames of training patients between ED and ES come too, unlabelled.
    pub all_frames: bool,
    /// Class names by class, instead of ACDC's; empty for those.
    pub classes: Vec<String>,
    /// Label values that mean another class.
    pub map: LabelMap,
    /// Across which axis slices are cut.
    pub axis: SliceAxis,
    /// What becomes of intensities.
    pub intensity: Intensity,
    /// Which patients are for what.
    pub split: SplitWishes,
}

impl AcdcTree {
    /// Everything by default but where the tree is.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self {
            folder: folder.into(),
            all_frames: false,
            classes: Vec::new(),
            map: LabelMap::default(),
            axis: SliceAxis::default(),
            intensity: Intensity::default(),
            split: SplitWishes::default(),
        }
    }
}

/// Imports a tree. Reads several volumes side by side.
///
/// # Errors
/// [`DataError::Import`] with the name of the file that is missing, odd or damaged;
/// [`DataError::Unusable`] for choices that do not go together.
pub async fn import(
    tree: &AcdcTree,
    sink: Arc<dyn ObjectWriter>,
    work: &Work,
) -> Result<Manifest, DataError> {
    let classes = match tree.classes.as_slice() {
        [] => CLASSES.map(str::to_owned).to_vec(),
        names => names.to_vec(),
    };
    tree.map.check(classes.len())?;
    let recipe = Recipe {
        name: "ACDC".to_owned(),
        classes,
        channels: Vec::new(),
        map: tree.map.clone(),
        axis: tree.axis,
        intensity: tree.intensity,
    };
    cases::write(recipe, &tree.folder, plan(tree)?, sink, work).await
}

/// All cases, divided.
fn plan(tree: &AcdcTree) -> Result<Vec<Case>, DataError> {
    let (training, testing) = patients(tree)?;
    let mut plan = frames_of(training.values())?;
    let mut held_out = frames_of(testing.values())?;
    let labelled_test = held_out.iter().any(|case| case.label.is_some());
    let rule = if labelled_test { tree.split.rule_beside(TESTING)? } else { tree.split.rule() };
    if !labelled_test {
        plan.append(&mut held_out);
    }
    cases::divide(&mut plan, &rule)?;
    for mut case in held_out {
        // Without a label nothing can be reported on it.
        case.split = if case.label.is_some() { Split::Test } else { Split::Train };
        plan.push(case);
    }
    if tree.all_frames {
        let trained = |(name, _): &(&String, &Patient)| {
            plan.iter().any(|case| case.split == Split::Train && case.patient == **name)
        };
        let all = training.iter().chain(&testing).filter(trained);
        let cines = all.map(|(_, patient)| patient.cine()).collect::<Result<Vec<_>, _>>()?;
        plan.extend(cines);
    }
    Ok(plan)
}

fn frames_of<'a>(patients: impl Iterator<Item = &'a Patient>) -> Result<Vec<Case>, DataError> {
    let mut cases = Vec::new();
    for patient in patients {
        cases.extend(patient.frames()?);
    }
    Ok(cases)
}

type Patients = BTreeMap<String, Patient>;

/// Patients by name: to train on, and those of `testing/` where there is `training/` too.
fn patients(tree: &AcdcTree) -> Result<(Patients, Patients), DataError> {
    let roots = [tree.folder.clone(), tree.folder.join("database")];
    let root = roots.iter().find(|root| root.join("training").is_dir());
    let Some(root) = root else {
        // One of the two folders itself; or only the other one is there.
        let testing = tree.folder.join(TESTING);
        let folder = if testing.is_dir() { testing } else { tree.folder.clone() };
        return Ok((patients_in(&folder)?, Patients::new()));
    };
    let training = patients_in(&root.join("training"))?;
    let testing = root.join(TESTING);
    let testing = if testing.is_dir() { patients_in(&testing)? } else { Patients::new() };
    match testing.iter().find(|(name, _)| training.contains_key(*name)) {
        Some((name, patient)) => {
            Err(bad(&patient.folder, format!("patient `{name}` is in training, too")))
        }
        None => Ok((training, testing)),
    }
}

fn patients_in(folder: &Path) -> Result<Patients, DataError> {
    let mut found = Patients::new();
    let mut files = Vec::new();
    let entries = std::fs::read_dir(folder).map_err(|error| bad(folder, error))?;
    for entry in entries.take(ENTRIES_MAX) {
        let entry = entry.map_err(|error| bad(folder, error))?;
        let path = entry.path();
        let Ok(name) = entry.file_name().into_string() else { continue };
        if !path.is_dir() {
            files.push(path);
        } else if name.starts_with("patient") {
            let info = Info::read(&path.join("Info.cfg"))?;
            found.insert(name.clone(), Patient { name, folder: path, info });
        }
    }
    if found.is_empty() {
        let mut why = "no folder `patientNNN` is in it".to_owned();
        why += dicom_hint(files.into_iter()).unwrap_or_default();
        return Err(bad(folder, why));
    }
    Ok(found)
}

/// What an `Info.cfg` says that matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Info {
    /// End-diastole and end-systole, frames from one.
    labelled: [usize; 2],
    frames: Option<usize>,
}

impl Info {
    fn read(path: &Path) -> Result<Self, DataError> {
        if !path.is_file() {
            let why = "it is missing: it says which frames are ED and ES";
            return Err(bad(path, why));
        }
        let text = String::from_utf8(read_small(path, INFO_BYTES_MAX)?);
        let text = text.map_err(|_| bad(path, "it is no text"))?;
        Self::parse(&text).map_err(|why| bad(path, why))
    }

    /// Lines `KEY: VALUE`; others than these three say nothing about files.
    fn parse(text: &str) -> Result<Self, String> {
        let mut numbers = BTreeMap::new();
        for line in text.lines() {
            let Some((key, value)) = line.split_once(':') else { continue };
            let (key, value) = (key.trim(), value.trim());
            if !["ED", "ES", "NbFrame"].contains(&key) {
                continue;
            }
            let number =
                value.parse::<usize>().ok().filter(|n| (1..=i16::MAX as usize).contains(n));
            let number = number.ok_or_else(|| format!("`{key}: {value}` is no frame's number"))?;
            if numbers.insert(key, number).is_some() {
                return Err(format!("`{key}` stands in it twice"));
            }
        }
        let frame = |key| {
            numbers.get(key).copied().ok_or_else(|| format!("a line `{key}: FRAME` is missing"))
        };
        let (labelled, frames) = ([frame("ED")?, frame("ES")?], numbers.get("NbFrame").copied());
        if labelled[0] == labelled[1] {
            return Err(format!("ED and ES are both frame {}", labelled[0]));
        }
        if let Some(frames) = frames
            && let Some(frame) = labelled.iter().find(|frame| **frame > frames)
        {
            return Err(format!("frame {frame} is none of its {frames} (NbFrame)"));
        }
        Ok(Self { labelled, frames })
    }
}

#[derive(Debug, Clone)]
struct Patient {
    name: String,
    folder: PathBuf,
    info: Info,
}

impl Patient {
    /// ED and ES. Either both have a label, or none has.
    fn frames(&self) -> Result<[Case; 2], DataError> {
        let [ed, es] = self.info.labelled.map(|frame| format!("{}_frame{frame:02}", self.name));
        let images = [self.file(&ed)?, self.file(&es)?];
        let label = |frame: &str| self.file(&format!("{frame}_gt"));
        let labels = match [label(&ed), label(&es)] {
            [Err(_), Err(_)] => [None, None],
            [ed, es] => [Some(ed?), Some(es?)],
        };
        let ([ed_image, es_image], [ed_label, es_label]) = (images, labels);
        Ok([self.case(ed, ed_image, ed_label), self.case(es, es_image, es_label)])
    }

    /// The frames that are neither ED nor ES.
    fn cine(&self) -> Result<Case, DataError> {
        let image = self.file(&format!("{}_4d", self.name))?;
        let apart = self.info.labelled.map(|frame| frame - 1).to_vec();
        let cine = Some(Cine { frames: self.info.frames, apart });
        Ok(Case { cine, ..self.case(self.name.clone(), image, None) })
    }

    fn case(&self, name: String, image: PathBuf, label: Option<PathBuf>) -> Case {
        let patient = self.name.clone();
        Case { name, patient, split: Split::Train, images: vec![image], label, cine: None }
    }

    /// Archives circulate with and without compression.
    fn file(&self, stem: &str) -> Result<PathBuf, DataError> {
        let paths = ["nii.gz", "nii"].map(|end| self.folder.join(format!("{stem}.{end}")));
        let found = paths.iter().find(|path| path.is_file()).cloned();
        found.ok_or_else(|| bad(&paths[0], "it is missing (as .nii, too): Info.cfg asks for it"))
    }
}

fn bad(path: &Path, why: impl ToString) -> DataError {
    DataError::Import { path: path.to_owned(), why: why.to_string() }
}

#[cfg(test)]
#[path = "acdc_tests.rs"]
mod tests;
