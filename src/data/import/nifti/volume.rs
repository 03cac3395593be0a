//! One case: an image and its label to volumes of slices. What is checked here is what both must
//! have in common, and what their values may be.

use std::cell::Cell;
use std::path::Path;

use super::CasePlan;
use super::options::NiftiSource;
use crate::data::error::DataError;
use crate::data::nifti::{Geometry, Nifti, read_file};
use crate::data::preprocess::{Grid, frame_name};
use crate::data::write::{NewSlice, NewVolume};

/// How far an image's and its label's orientation (millimetres, or millimetres per voxel) and
/// spacing may differ: headers hold 32-bit numbers, and programs round them differently.
const GEOMETRY_TOLERANCE: f64 = 1e-3;

/// Reads a case: one volume, or one per frame.
pub(super) fn read_case(
    source: &NiftiSource,
    classes: usize,
    case: &CasePlan,
) -> Result<Vec<NewVolume>, DataError> {
    let image = read_file(&case.image)?;
    let label = match &case.label {
        Some(path) => {
            let label = read_file(path)?;
            compare(&case.image, &image.header.geometry, path, &label.header.geometry)?;
            Some((path.as_path(), label))
        }
        None => None,
    };
    let geometry = &image.header.geometry;
    let preprocessing = source.preprocessing();
    let grid = preprocessing.grid(&case.image, geometry)?;
    let order = grid.order;
    let volume = |frame: usize| {
        let name = match image.frames() {
            1 => case.case.clone(),
            frames => frame_name(&case.case, frame, frames),
        };
        let values = preprocessing.intensities(&case.image, &image, frame)?;
        let labels = match &label {
            Some((path, label)) => Some(labels(source, classes, path, label, frame)?),
            None => None,
        };
        Ok(NewVolume {
            name,
            patient: case.patient.clone(),
            split: case.split,
            spacing_mm: geometry.spacing_mm.map(|spacing| order.map(|axis| spacing[axis])),
            affine: geometry.affine.map(|affine| reordered(&affine, order)),
            slices: slices(&grid, &values, labels.as_deref()),
        })
    };
    (0..image.frames()).map(volume).collect()
}

fn bad(path: &Path, why: impl ToString) -> DataError {
    DataError::Import { path: path.to_owned(), why: why.to_string() }
}

/// A label that lies elsewhere than its image labels something else. Where only one of the two
/// says how it is oriented, shape and spacing decide.
fn compare(
    image_path: &Path,
    image: &Geometry,
    label_path: &Path,
    label: &Geometry,
) -> Result<(), DataError> {
    let of = format!("that of its image `{}`", image_path.display());
    if image.shape != label.shape {
        let why = format!("its shape {:?} is not {:?}, {of}", label.shape, image.shape);
        return Err(bad(label_path, why));
    }
    let far = |a: f64, b: f64| (a - b).abs() > GEOMETRY_TOLERANCE;
    if let (Some(image), Some(label)) = (image.spacing_mm, label.spacing_mm)
        && image.iter().zip(label).any(|(a, b)| far(*a, b))
    {
        let why = format!("its spacing {label:?} mm is not {image:?} mm, {of}");
        return Err(bad(label_path, why));
    }
    if let (Some(image), Some(label)) = (image.affine, label.affine) {
        for (row, (ours, theirs)) in label.iter().zip(image).enumerate() {
            for (column, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
                if far(*ours, theirs) {
                    return Err(bad(
                        label_path,
                        format!(
                            "its orientation has {ours} in row {row}, column {column} of the \
                             affine, which is not {theirs}, {of}: off by {:.4} mm",
                            (ours - theirs).abs()
                        ),
                    ));
                }
            }
        }
    }
    Ok(())
}

/// Classes `[z, y, x]` of one frame.
fn labels(
    source: &NiftiSource,
    classes: usize,
    path: &Path,
    label: &Nifti,
    frame: usize,
) -> Result<Vec<u8>, DataError> {
    let unknown = Cell::new(None);
    let found = label.frame(frame, |value| {
        source.map.class_of(value, classes).unwrap_or_else(|| {
            unknown.set(unknown.get().or(Some(value)));
            0
        })
    });
    match unknown.get() {
        Some(value) => Err(bad(
            path,
            format!(
                "label {value} is none of the classes 0 to {}: map it to one, or name more classes",
                classes - 1
            ),
        )),
        None => found.ok_or_else(|| bad(path, format!("frame {frame} is missing"))),
    }
}

/// The affine of a voxel index (slice, row, column): its columns in another order.
fn reordered(affine: &[[f64; 4]; 4], order: [usize; 3]) -> [[f64; 4]; 4] {
    affine.map(|row| [row[order[0]], row[order[1]], row[order[2]], row[3]])
}

/// Cuts `[z, y, x]` into slices.
fn slices(grid: &Grid, values: &[f32], labels: Option<&[u8]>) -> Vec<NewSlice> {
    let [depth, height, width] = grid.shape();
    let cut = |slice: usize| NewSlice {
        slice: slice as u32,
        shape: (height, width),
        image: grid.slice(values, slice),
        label: labels.map(|labels| grid.slice(labels, slice)),
    };
    (0..depth).map(cut).collect()
}
