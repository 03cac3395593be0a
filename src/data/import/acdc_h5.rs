//! ACDC in the SSL4MIS preparation: HDF5 files `image` and `label`, and lists that order them.
//!
//! `train_slices.list` names 2-D files `patientNNN_frameMM_slice_K`, `val.list` and `test.list` 3-D
//! files `patientNNN_frameMM`. The order of the lists is kept: "7 labelled patients" means the
//! first slices of `train_slices.list`. The files have no voxel spacing, so neither has the dataset.
//!
//! Files come from outside and may be damaged: sizes are checked before memory is taken, and
//! whatever the parser does with them ends as an error that names the file.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use hdf5_reader::{Hdf5File, OpenOptions};

use super::read_small;
use crate::data::error::{DataError, caught};
use crate::data::manifest::{Manifest, Split};
use crate::data::source::ObjectWriter;
use crate::data::write::{self, NewSlice, NewVolume, Plan, PlannedCase, Work, WriteOptions};

/// Class names by label value.
pub const CLASSES: [&str; 4] = ["background", "right ventricle", "myocardium", "left ventricle"];

/// The largest file that is opened, and the most decoded bytes of one dataset in it.
const FILE_BYTES_MAX: u64 = 1 << 30;

/// The largest list that is read.
const LIST_BYTES_MAX: u64 = 16 << 20;

/// Where the files are.
#[derive(Debug, Clone)]
pub struct AcdcSource {
    /// The folder with the HDF5 files, or the one above its `data`.
    pub files: PathBuf,
    /// The folder with the lists, where that is another one.
    pub lists: Option<PathBuf>,
}

/// Imports what `train_slices.list`, `val.list` and, if there is one, `test.list` name. Reads several
/// volumes side by side.
pub async fn import(
    source: &AcdcSource,
    sink: Arc<dyn ObjectWriter>,
    work: &Work,
) -> Result<Manifest, DataError> {
    let mut plans = train_volumes(&source.list("train_slices.list")?)?;
    for (list, split) in [("val.list", Split::Val), ("test.list", Split::Test)] {
        match source.list(list) {
            Ok(names) => plans.extend(whole_volumes(&names, split)?),
            Err(DataError::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    let folders = source.folders();
    let planned = plans.iter().map(|plan| {
        let files = plan.files(&folders)?;
        Ok(PlannedCase { name: &plan.name, patient: &plan.patient, split: plan.split, files })
    });
    let plan = Plan::new([]).reading(&source.files, planned)?;
    let options = WriteOptions::new("ACDC (SSL4MIS)", &CLASSES).sized(work);
    let read = move |plan: &VolumePlan| Ok(vec![read_volume(&folders, plan)?]);
    write::write(sink, &options, plan, plans, read, work).await
}

/// A volume and the files it is in.
#[derive(Debug)]
struct VolumePlan {
    name: String,
    patient: String,
    split: Split,
    files: Files,
}

#[derive(Debug)]
enum Files {
    /// One 2-D file a slice: (slice from zero, name).
    Slices(Vec<(u32, String)>),
    /// One 3-D file, named like the volume.
    Whole,
}

impl AcdcSource {
    /// Names in a list, in order.
    fn list(&self, name: &str) -> Result<Vec<String>, DataError> {
        let mut folders = vec![self.files.clone()];
        match &self.lists {
            Some(lists) => folders = vec![lists.clone()],
            None => folders.extend(self.files.parent().map(Path::to_path_buf)),
        }
        let found = folders.iter().map(|folder| folder.join(name)).find(|path| path.is_file());
        let path = found.ok_or_else(|| DataError::NotFound {
            object: folders[0].join(name).display().to_string(),
        })?;
        let text = read_small(&path, LIST_BYTES_MAX)?;
        let text = String::from_utf8(text).map_err(|_| bad(&path, "it is no text"))?;
        // Lists circulate with and without the suffix, and with trailing blank lines.
        let names = text.lines().map(|line| line.trim().trim_end_matches(".h5"));
        let names: Vec<String> = names.filter(|name| !name.is_empty()).map(str::to_owned).collect();
        match names.iter().find(|name| name.contains(['/', '\\'])) {
            Some(name) => Err(bad(&path, format!("`{name}` is no name of a file"))),
            None => Ok(names),
        }
    }

    /// Folders in which files may lie, in the layouts that circulate.
    fn folders(&self) -> Vec<PathBuf> {
        ["", "data", "data/slices", "slices"].map(|part| self.files.join(part)).to_vec()
    }
}

fn bad(path: &Path, why: impl ToString) -> DataError {
    DataError::Import { path: path.to_owned(), why: why.to_string() }
}

/// Slices of one volume stand side by side in the list; their order within it is kept.
fn train_volumes(names: &[String]) -> Result<Vec<VolumePlan>, DataError> {
    let mut volumes: Vec<VolumePlan> = Vec::new();
    for name in names {
        let parsed = name.rsplit_once("_slice_").and_then(|(volume, number)| {
            let number = number.parse::<u32>().ok()?.checked_sub(1)?;
            Some((volume, patient_of(volume)?, number))
        });
        let Some((volume, patient, number)) = parsed else {
            let why = format!("`{name}` is no patientNNN_frameMM_slice_K");
            return Err(bad(Path::new("train_slices.list"), why));
        };
        match volumes.last_mut() {
            Some(VolumePlan { name: last, files: Files::Slices(files), .. }) if last == volume => {
                files.push((number, name.clone()));
            }
            _ => volumes.push(VolumePlan {
                name: volume.to_owned(),
                patient: patient.to_owned(),
                split: Split::Train,
                files: Files::Slices(vec![(number, name.clone())]),
            }),
        }
    }
    Ok(volumes)
}

fn whole_volumes(names: &[String], split: Split) -> Result<Vec<VolumePlan>, DataError> {
    let plan = |name: &String| {
        let patient = patient_of(name).ok_or_else(|| {
            let why = format!("`{name}` is no patientNNN_frameMM");
            bad(Path::new(&format!("{split}.list")), why)
        })?;
        let patient = patient.to_owned();
        Ok(VolumePlan { name: name.clone(), patient, split, files: Files::Whole })
    };
    names.iter().map(plan).collect()
}

fn patient_of(volume: &str) -> Option<&str> {
    volume.split_once("_frame").map(|(patient, _)| patient).filter(|patient| !patient.is_empty())
}

/// The file `name` in one of `folders`.
fn find(folders: &[PathBuf], name: &str) -> Result<PathBuf, DataError> {
    let name = format!("{name}.h5");
    let paths = folders.iter().map(|folder| folder.join(&name));
    paths
        .clone()
        .find(|path| path.is_file())
        .ok_or_else(|| bad(&folders[0].join(&name), "a list names it, and it is not there"))
}

impl VolumePlan {
    fn files(&self, folders: &[PathBuf]) -> Result<Vec<PathBuf>, DataError> {
        match &self.files {
            Files::Whole => Ok(vec![find(folders, &self.name)?]),
            Files::Slices(names) => names.iter().map(|(_, name)| find(folders, name)).collect(),
        }
    }
}

fn read_volume(folders: &[PathBuf], plan: &VolumePlan) -> Result<NewVolume, DataError> {
    let slices = match &plan.files {
        Files::Whole => {
            let path = find(folders, &plan.name)?;
            let arrays = read_file(&path)?;
            let [depth, h, w] = arrays.shape[..] else {
                return Err(bad(&path, format!("shape {:?} is no volume's", arrays.shape)));
            };
            (0..depth).map(|at| arrays.slice(at as u32, at, (h, w))).collect()
        }
        Files::Slices(names) => names
            .iter()
            .map(|(number, name)| {
                let path = find(folders, name)?;
                let arrays = read_file(&path)?;
                let [h, w] = arrays.shape[..] else {
                    return Err(bad(&path, format!("shape {:?} is no slice's", arrays.shape)));
                };
                Ok(arrays.slice(*number, 0, (h, w)))
            })
            .collect::<Result<_, _>>()?,
    };
    Ok(NewVolume {
        name: plan.name.clone(),
        patient: plan.patient.clone(),
        split: plan.split,
        spacing_mm: None,
        affine: None,
        slices,
    })
}

/// What one file holds.
#[derive(Debug)]
struct Arrays {
    shape: Vec<usize>,
    image: Vec<f32>,
    label: Vec<u8>,
}

impl Arrays {
    fn slice(&self, number: u32, at: usize, shape: (usize, usize)) -> NewSlice {
        let pixels = at * shape.0 * shape.1..(at + 1) * shape.0 * shape.1;
        NewSlice {
            slice: number,
            shape,
            image: self.image[pixels.clone()].to_vec(),
            label: Some(self.label[pixels].to_vec()),
        }
    }
}

/// Reads `image` and `label`.
fn read_file(path: &Path) -> Result<Arrays, DataError> {
    parse_caught(read_small(path, FILE_BYTES_MAX)?).map_err(|why| bad(path, why))
}

fn parse_caught(bytes: Vec<u8>) -> Result<Arrays, String> {
    caught(str::to_owned, || parse(bytes))
}

/// Whether the bytes are a file that is imported: for fuzzing.
#[doc(hidden)]
pub fn check(bytes: Vec<u8>) -> Result<(), String> {
    parse_caught(bytes).map(|_| ())
}

fn parse(bytes: Vec<u8>) -> Result<Arrays, String> {
    let file_bytes = bytes.len();
    let options = OpenOptions::default().with_max_read_bytes(FILE_BYTES_MAX as usize);
    let file = Hdf5File::from_vec_with_options(bytes, options).map_err(|e| e.to_string())?;
    let dataset = |name: &str| file.dataset(name).map_err(|error| format!("`{name}`: {error}"));
    let (image, label) = (dataset("image")?, dataset("label")?);
    let shape: Vec<usize> = image.shape().iter().map(|side| *side as usize).collect();
    if image.shape() != label.shape() {
        return Err(format!("image {:?} and label {:?} differ", image.shape(), label.shape()));
    }
    let pixels = shape.iter().try_fold(1_usize, |all, side| all.checked_mul(*side));
    let pixels = pixels.filter(|pixels| *pixels > 0 && *pixels <= pixels_max(file_bytes));
    let pixels = pixels
        .ok_or_else(|| format!("shape {shape:?} cannot be in a file of {file_bytes} bytes"))?;
    let failed = |error: hdf5_reader::error::Error| error.to_string();
    let mut values = vec![0_f32; pixels];
    if let Err(error) = image.read_into(&mut values) {
        let mut wide = vec![0_f64; pixels];
        image.read_into(&mut wide).map_err(|_| failed(error))?;
        values = wide.into_iter().map(|value| value as f32).collect();
    }
    let mut classes = vec![0_u8; pixels];
    label.read_into(&mut classes).map_err(failed)?;
    Ok(Arrays { shape, image: values, label: classes })
}

/// Deflate shrinks nothing more than 1032 times: a claim beyond that is a lie about memory.
fn pixels_max(file_bytes: usize) -> usize {
    file_bytes.saturating_mul(1032).min(FILE_BYTES_MAX as usize / size_of::<f32>())
}

#[cfg(test)]
#[path = "acdc_h5_tests.rs"]
mod tests;
