//! What can be chosen for an import, how it is written on a command line, and what is refused.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::data::error::DataError;
use crate::data::import::Pattern;
use crate::data::nifti::Geometry;

/// Which files, and what to make of them.
#[derive(Debug, Clone, PartialEq)]
pub struct NiftiSource {
    /// What the dataset is called in reports.
    pub name: String,
    /// The folder that the patterns are relative to.
    pub folder: PathBuf,
    /// Where images lie, by `{case}`.
    pub images: Pattern,
    /// Where labels lie, by `{case}`; a case without one is unlabelled.
    pub labels: Option<Pattern>,
    /// Where in a case's name the `{patient}` stands; without it the patient is what comes before
    /// the first `_`, or the whole name.
    pub patient: Option<Pattern>,
    /// Class names by label value, background first; needed where there are labels.
    pub classes: Vec<String>,
    /// Label values that mean another class.
    pub map: LabelMap,
    /// Across which axis slices are cut.
    pub axis: SliceAxis,
    /// What becomes of intensities.
    pub intensity: Intensity,
    /// Which patients are for what.
    pub split: SplitRule,
}

impl NiftiSource {
    /// Everything by default but where the files are.
    pub fn new(folder: impl Into<PathBuf>, images: Pattern) -> Self {
        let folder = folder.into();
        let name = folder.file_name().map(|name| name.to_string_lossy().into_owned());
        Self {
            name: name.unwrap_or_else(|| "NIfTI".to_owned()),
            folder,
            images,
            labels: None,
            patient: None,
            classes: Vec::new(),
            map: LabelMap::default(),
            axis: SliceAxis::default(),
            intensity: Intensity::default(),
            split: SplitRule::default(),
        }
    }

    /// Class names, once it is sure that the choices fit together.
    pub(super) fn checked_classes(&self) -> Result<Vec<String>, DataError> {
        let classes = match (&self.labels, self.classes.len()) {
            (Some(_), 0) => {
                let why = "labels need classes: give their names, background first, or a number";
                return Err(DataError::Unusable(why.to_owned()));
            }
            // A dataset has classes even before anyone has labelled it.
            (None, 0) => vec!["background".to_owned(), "class 1".to_owned()],
            _ => self.classes.clone(),
        };
        self.map.check(classes.len())?;
        Ok(classes)
    }
}

/// Whose `case` is, by a pattern with `{patient}`: without one what comes before the first `_`, or
/// the whole name.
pub(in crate::data::import) fn patient_of<'a>(
    pattern: Option<&Pattern>,
    case: &'a str,
) -> Result<&'a str, DataError> {
    match pattern {
        None => Ok(case
            .split_once('_')
            .map(|(patient, _)| patient)
            .filter(|patient| !patient.is_empty())
            .unwrap_or(case)),
        Some(pattern) => pattern.name_in(case).ok_or_else(|| {
            let pattern = pattern.text();
            DataError::Unusable(format!("case `{case}` does not fit `{pattern}`"))
        }),
    }
}

/// Reads class names `background,liver,tumour`, or how many classes there are, background included.
///
/// # Errors
/// [`DataError::Unusable`]: an empty name, one that stands twice, or a number out of 2..=255.
pub fn class_names(text: &str) -> Result<Vec<String>, DataError> {
    let bad = |why: &str| Err(DataError::Unusable(format!("classes `{text}`: {why}")));
    if let Ok(count) = text.parse::<usize>() {
        if !(2..=255).contains(&count) {
            return bad("not 2..=255");
        }
        let named = (1..count).map(|class| format!("class {class}"));
        return Ok(std::iter::once("background".to_owned()).chain(named).collect());
    }
    let names: Vec<String> = text.split(',').map(|name| name.trim().to_owned()).collect();
    if names.iter().any(String::is_empty) {
        return bad("a name is empty");
    }
    if names.iter().enumerate().any(|(at, name)| names[..at].contains(name)) {
        return bad("a name stands twice");
    }
    Ok(names)
}

/// What label values mean: another class than their own number, or no more than is listed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LabelMap {
    pairs: BTreeMap<i64, u8>,
    /// Whether a value that is not in `pairs` means nothing, rather than its own number.
    complete: bool,
    /// The value that means "not annotated" in the source.
    ignored: Option<i64>,
}

impl LabelMap {
    /// Reads `FROM=TO`s: a value in the files, a class counted from zero. Several values may mean
    /// one class.
    ///
    /// # Errors
    /// [`DataError::Unusable`]: no such pair, a value that is mapped twice, or a wish to ignore one.
    pub fn parse<T: AsRef<str>>(pairs: &[T]) -> Result<Self, DataError> {
        let mut map = BTreeMap::new();
        for pair in pairs.iter().map(AsRef::as_ref) {
            let bad = |why: &str| DataError::Unusable(format!("label mapping `{pair}`: {why}"));
            let (from, to) = pair.split_once('=').ok_or_else(|| bad("it is no FROM=TO"))?;
            if to.trim().eq_ignore_ascii_case("ignore") {
                return Err(bad("there is no ignore label here yet: map it to a class"));
            }
            let from: i64 = from.trim().parse().map_err(|_| bad("FROM is no whole number"))?;
            let to: u8 = to.trim().parse().map_err(|_| bad("TO is no class, 0 to 255"))?;
            if map.insert(from, to).is_some() {
                return Err(bad("its value is mapped twice"));
            }
        }
        Ok(Self { pairs: map, complete: false, ignored: None })
    }

    /// The values that a source declares, one class each in their order, where this map says
    /// nothing else of them. Others mean nothing.
    pub(in crate::data::import) fn over(&self, values: &[i64], ignored: Option<i64>) -> Self {
        let mut pairs: BTreeMap<i64, u8> = values.iter().copied().zip(0..=u8::MAX).collect();
        pairs.extend(&self.pairs);
        Self { pairs, complete: true, ignored }
    }

    /// Whether there can be so many `classes`, and every class that it names is one of them.
    pub(in crate::data::import) fn check(&self, classes: usize) -> Result<(), DataError> {
        if !(2..=255).contains(&classes) {
            return Err(DataError::Unusable(format!("{classes} classes, not 2..=255")));
        }
        match self.pairs.iter().find(|(_, to)| usize::from(**to) >= classes) {
            Some((from, to)) => Err(DataError::Unusable(format!(
                "label {from} is mapped to class {to} of {classes}, counted from zero"
            ))),
            None => Ok(()),
        }
    }

    /// The class that `value` means; `None` where it is none of `classes`.
    pub(super) fn class_of(&self, value: f64, classes: usize) -> Option<u8> {
        let near = whole(value)?;
        let mapped = self.pairs.get(&near).copied();
        let own = || if self.complete { None } else { u8::try_from(near).ok() };
        mapped.or_else(own).filter(|class| usize::from(*class) < classes)
    }

    /// Why `value` means no class, and what to do about it.
    pub(super) fn why_not(&self, value: f64, classes: usize) -> String {
        match whole(value) {
            Some(near) if self.ignored == Some(near) => format!(
                "label {near} is `ignore`, and there is no ignore label here yet: map it to a \
                 class, such as --map {near}=0"
            ),
            Some(near) if self.complete => format!(
                "label {near} is none of the labels that the dataset declares: map it to a class, \
                 such as --map {near}=0"
            ),
            _ => format!(
                "label {value} is none of the classes 0 to {}: map it to one (--map), or name \
                 more classes",
                classes - 1
            ),
        }
    }
}

/// Labels stored with a scale come back a rounding error off. `None` for what is no whole number.
fn whole(value: f64) -> Option<i64> {
    let near = value.round();
    // The comparison is false for what is no number.
    ((value - near).abs() <= 1e-4 && near.abs() < 1e15).then_some(near as i64)
}

/// Across which axis of the voxel grid slices are cut.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum SliceAxis {
    /// The one with the largest spacing, the last of equals; for each image anew.
    #[default]
    Auto,
    /// 0, 1 or 2 for x, y or z of the file.
    Given(usize),
}

impl FromStr for SliceAxis {
    type Err = DataError;

    fn from_str(text: &str) -> Result<Self, DataError> {
        match text {
            "auto" => Ok(Self::Auto),
            "0" => Ok(Self::Given(0)),
            "1" => Ok(Self::Given(1)),
            "2" => Ok(Self::Given(2)),
            _ => Err(DataError::Unusable(format!("axis `{text}` is not auto, 0, 1 or 2"))),
        }
    }
}

impl SliceAxis {
    /// Axes of the file along (slice, row, column) of the dataset; `Err` says why there are none.
    pub(in crate::data) fn order(self, geometry: &Geometry) -> Result<[usize; 3], &'static str> {
        let axis = match self {
            Self::Given(axis) => axis,
            // One slice in a file: it is the one that was taken.
            Self::Auto if geometry.shape[2] == 1 => 2,
            Self::Auto => {
                let spacing =
                    geometry.spacing_mm.ok_or("it has no spacing to choose a slice axis by")?;
                // Headers round: what is larger by a thousandth is not larger.
                [1, 0].into_iter().fold(2, |best, axis| {
                    if spacing[axis] > spacing[best] * 1.001 { axis } else { best }
                })
            }
        };
        // Of the other two the one that moves faster runs along a row, as it does in the file.
        match axis {
            0 => Ok([0, 2, 1]),
            1 => Ok([1, 2, 0]),
            2 => Ok([2, 1, 0]),
            _ => Err("the slice axis is not 0, 1 or 2"),
        }
    }
}

/// What becomes of a volume's intensities. Every frame of a 4-D image is a volume of its own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Intensity {
    /// The least to 0, the greatest to 1.
    #[default]
    MinMax,
    /// The mean to 0, a standard deviation to 1.
    ZScore,
    /// `low` and less to 0, `high` and more to 1: for CT, in Hounsfield units.
    Window {
        /// What becomes 0.
        low: f64,
        /// What becomes 1.
        high: f64,
    },
}

impl FromStr for Intensity {
    type Err = DataError;

    fn from_str(text: &str) -> Result<Self, DataError> {
        let window = || {
            let (low, high) = text.strip_prefix("window:")?.split_once(':')?;
            let (low, high): (f64, f64) = (low.parse().ok()?, high.parse().ok()?);
            (low.is_finite() && high.is_finite() && low < high)
                .then_some(Self::Window { low, high })
        };
        match text {
            "minmax" => Ok(Self::MinMax),
            "zscore" => Ok(Self::ZScore),
            _ => window().ok_or_else(|| {
                DataError::Unusable(format!(
                    "intensity `{text}` is not minmax, zscore or window:LOW:HIGH with LOW < HIGH"
                ))
            }),
        }
    }
}

impl Intensity {
    /// Applies it to all voxels of a volume, which are finite. A constant volume becomes zeros.
    pub(in crate::data) fn apply(self, values: &mut [f32]) {
        let wide = |value: &f32| f64::from(*value);
        let (zero, one) = match self {
            Self::MinMax => (
                values.iter().map(wide).fold(f64::INFINITY, f64::min),
                values.iter().map(wide).fold(f64::NEG_INFINITY, f64::max),
            ),
            Self::ZScore => {
                let count = values.len().max(1) as f64;
                let mean = values.iter().map(wide).sum::<f64>() / count;
                let squares = values.iter().map(|value| (wide(value) - mean).powi(2));
                (mean, mean + (squares.sum::<f64>() / count).sqrt())
            }
            Self::Window { low, high } => (low, high),
        };
        let range = one - zero;
        for value in values {
            let scaled = if range > 0.0 { (wide(value) - zero) / range } else { 0.0 };
            *value = match self {
                Self::Window { .. } => scaled.clamp(0.0, 1.0),
                Self::MinMax | Self::ZScore => scaled,
            } as f32;
        }
    }
}

/// Which patients are for what. Only patients whose every case has a label are asked to judge.
#[derive(Debug, Clone, PartialEq)]
pub enum SplitRule {
    /// Parts of the labelled patients, at least one patient each where they are above zero; drawn
    /// by patient, so that one more patient moves few others.
    Fractions {
        /// To choose checkpoints by.
        val: f64,
        /// To report on.
        test: f64,
        /// What the draw depends on, beside the patients' names.
        seed: u64,
    },
    /// These; all others are trained on.
    Patients {
        /// To choose checkpoints by.
        val: Vec<String>,
        /// To report on.
        test: Vec<String>,
    },
}

impl Default for SplitRule {
    fn default() -> Self {
        Self::Fractions { val: 0.1, test: 0.2, seed: 1 }
    }
}

/// What is asked for of the division; what is left open is the importer's to choose.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SplitWishes {
    /// Part of the labelled patients to choose checkpoints by.
    pub val: Option<f64>,
    /// Part of the labelled patients to report on.
    pub test: Option<f64>,
    /// What the draw depends on.
    pub seed: Option<u64>,
    /// The patients to choose checkpoints by, instead of a draw.
    pub val_patients: Vec<String>,
    /// The patients to report on, instead of a draw.
    pub test_patients: Vec<String>,
}

impl SplitWishes {
    /// The rule, with the usual shares for what is left open.
    pub fn rule(&self) -> SplitRule {
        if !(self.val_patients.is_empty() && self.test_patients.is_empty()) {
            let (val, test) = (self.val_patients.clone(), self.test_patients.clone());
            return SplitRule::Patients { val, test };
        }
        let mut rule = SplitRule::default();
        if let SplitRule::Fractions { val, test, seed } = &mut rule {
            *val = self.val.unwrap_or(*val);
            *test = self.test.unwrap_or(*test);
            *seed = self.seed.unwrap_or(*seed);
        }
        rule
    }

    /// The rule where `folder` holds the test patients already.
    pub(in crate::data::import) fn rule_beside(
        &self,
        folder: &str,
    ) -> Result<SplitRule, DataError> {
        if self.test.is_some_and(|test| test != 0.0) || !self.test_patients.is_empty() {
            return Err(DataError::Unusable(format!(
                "the labelled patients of `{folder}` are the test split: --test and \
                 --test-patients do not go with it"
            )));
        }
        Ok(Self { test: Some(0.0), ..self.clone() }.rule())
    }
}
