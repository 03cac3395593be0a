//! One case: its images, a file for each channel, and its label to volumes of slices. What is
//! checked here is what the files must have in common, and what their values may be.

use std::cell::Cell;
use std::path::Path;

use super::cases::{Case, Recipe};
use crate::data::error::DataError;
use crate::data::nifti::{Geometry, Nifti, read_file};
use crate::data::preprocess::{Grid, frame_name};
use crate::data::shard::MAX_SLICE_PIXELS;
use crate::data::write::{NewSlice, NewVolume};

/// How far orientation (millimetres, or millimetres per voxel) and spacing may differ within a
/// case: headers hold 32-bit numbers, and programs round them differently.
const GEOMETRY_TOLERANCE: f64 = 1e-3;

/// How far the lengths of an affine's columns may be from the spacing, as a part of it. An affine
/// that is further off tells nothing: ACDC's files have one of unit spacing.
const AFFINE_TOLERANCE: f64 = 0.02;

/// The most voxels of a case, over frames and channels: 8 GiB of intensities.
const CASE_VOXELS_MAX: usize = 1 << 31;

/// Reads a case: the axis it was cut across, and one volume, or one per frame.
pub(super) fn read_case(
    recipe: &Recipe,
    case: &Case,
) -> Result<(usize, Vec<NewVolume>), DataError> {
    let (geometry, frames) = read_images(recipe, case)?;
    let label = match &case.label {
        Some(path) => {
            let label = read_file(path)?;
            compare((&case.images[0], &geometry), (path, &label.header.geometry), "its image")?;
            Some((path.as_path(), label))
        }
        None => None,
    };
    let image = &case.images[0];
    let preprocessing = recipe.preprocessing();
    let grid = preprocessing.grid(image, &geometry)?;
    let order = grid.order;
    let [_, rows, columns] = grid.shape();
    let pixels = rows.saturating_mul(columns).saturating_mul(case.images.len());
    if pixels > MAX_SLICE_PIXELS {
        let why = format!("slices of {pixels} pixels are more than the {MAX_SLICE_PIXELS} allowed");
        return Err(bad(image, why));
    }
    let volume = |(frame, values): (usize, Vec<f32>)| {
        let name = match geometry.shape[3] {
            1 => case.name.clone(),
            frames => frame_name(&case.name, frame, frames),
        };
        let labels = match &label {
            Some((path, label)) => Some(labels(recipe, path, label, frame)?),
            None => None,
        };
        Ok::<_, DataError>(NewVolume {
            name,
            patient: case.patient.clone(),
            split: case.split,
            spacing_mm: geometry.spacing_mm.map(|spacing| order.map(|axis| spacing[axis])),
            affine: meant_affine(&geometry).map(|affine| reordered(&affine, order)),
            slices: slices(&grid, &values, labels.as_deref()),
        })
    };
    let apart = case.cine.iter().flat_map(|cine| &cine.apart).copied().collect::<Vec<_>>();
    let kept = frames.into_iter().enumerate().filter(|(frame, _)| !apart.contains(frame));
    let volumes = kept.map(volume).collect::<Result<_, _>>()?;
    Ok((order[0], volumes))
}

/// All channels: their common geometry, and `[C, z, y, x]` of each frame, scaled by channel.
fn read_images(recipe: &Recipe, case: &Case) -> Result<(Geometry, Vec<Vec<f32>>), DataError> {
    let mut common: Option<(&Path, Geometry)> = None;
    let mut frames: Vec<Vec<f32>> = Vec::new();
    // One file in memory at a time.
    for path in &case.images {
        let image = read_file(path)?;
        let geometry = &image.header.geometry;
        if let Some((first, common)) = &common {
            compare((first, common), (path, geometry), "its first channel")?;
        } else {
            check_frames(case, path, geometry)?;
            frames.resize(image.frames(), Vec::new());
            common = Some((path, geometry.clone()));
        }
        for (frame, values) in frames.iter_mut().enumerate() {
            values.extend(recipe.preprocessing().intensities(path, &image, frame)?);
        }
    }
    let (_, geometry) =
        common.ok_or_else(|| DataError::Unusable(format!("case `{}` has no image", case.name)))?;
    Ok((geometry, frames))
}

/// Whether the frames are those that are expected, and all channels fit into memory.
fn check_frames(case: &Case, path: &Path, geometry: &Geometry) -> Result<(), DataError> {
    let found = geometry.shape[3];
    if let Some(cine) = &case.cine {
        if let Some(frames) = cine.frames.filter(|frames| *frames != found) {
            return Err(bad(path, format!("it has {found} frames, Info.cfg says {frames}")));
        }
        if let Some(frame) = cine.apart.iter().find(|frame| **frame >= found) {
            let why = format!("it has {found} frames, Info.cfg names frame {}", frame + 1);
            return Err(bad(path, why));
        }
    }
    let voxels =
        geometry.shape.iter().fold(case.images.len(), |all, side| all.saturating_mul(*side));
    if voxels > CASE_VOXELS_MAX {
        let why = format!("{voxels} voxels in all channels are more than {CASE_VOXELS_MAX}");
        return Err(bad(path, why));
    }
    Ok(())
}

fn bad(path: &Path, why: impl ToString) -> DataError {
    DataError::Import { path: path.to_owned(), why: why.to_string() }
}

/// The affine, unless the file's own spacing contradicts it.
fn meant_affine(geometry: &Geometry) -> Option<[[f64; 4]; 4]> {
    let (affine, Some(spacing)) = (geometry.affine?, geometry.spacing_mm) else {
        return geometry.affine;
    };
    let fits = |axis: usize| {
        let length = affine[..3].iter().map(|row| row[axis] * row[axis]).sum::<f64>().sqrt();
        geometry.shape[axis] == 1
            || (length - spacing[axis]).abs() <= AFFINE_TOLERANCE * spacing[axis]
    };
    (0..3).all(fits).then_some(affine)
}

/// A file that lies elsewhere than its case's image labels or shows something else. Where only one
/// of the two says how it is oriented, shape and spacing decide.
fn compare(
    (image_path, image): (&Path, &Geometry),
    (path, other): (&Path, &Geometry),
    image_is: &str,
) -> Result<(), DataError> {
    let of = format!("that of {image_is} `{}`", image_path.display());
    if image.shape != other.shape {
        let why = format!("its shape {:?} is not {:?}, {of}", other.shape, image.shape);
        return Err(bad(path, why));
    }
    let far = |a: f64, b: f64| (a - b).abs() > GEOMETRY_TOLERANCE;
    if let (Some(image), Some(other)) = (image.spacing_mm, other.spacing_mm)
        && image.iter().zip(other).any(|(a, b)| far(*a, b))
    {
        let why = format!("its spacing {other:?} mm is not {image:?} mm, {of}");
        return Err(bad(path, why));
    }
    if let (Some(image), Some(other)) = (meant_affine(image), meant_affine(other)) {
        for (row, (ours, theirs)) in other.iter().zip(image).enumerate() {
            for (column, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
                if far(*ours, theirs) {
                    return Err(bad(
                        path,
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
fn labels(recipe: &Recipe, path: &Path, label: &Nifti, frame: usize) -> Result<Vec<u8>, DataError> {
    let classes = recipe.classes.len();
    let unknown = Cell::new(None);
    let found = label.frame(frame, |value| {
        recipe.map.class_of(value, classes).unwrap_or_else(|| {
            unknown.set(unknown.get().or(Some(value)));
            0
        })
    });
    match unknown.get() {
        Some(value) => Err(bad(path, recipe.map.why_not(value, classes))),
        None => found.ok_or_else(|| bad(path, format!("frame {frame} is missing"))),
    }
}

/// The affine of a voxel index (slice, row, column): its columns in another order.
fn reordered(affine: &[[f64; 4]; 4], order: [usize; 3]) -> [[f64; 4]; 4] {
    affine.map(|row| [row[order[0]], row[order[1]], row[order[2]], row[3]])
}

/// Cuts `[C, z, y, x]`, and the label's `[z, y, x]`, into slices.
fn slices(grid: &Grid, values: &[f32], labels: Option<&[u8]>) -> Vec<NewSlice> {
    let [depth, height, width] = grid.shape();
    let channels = || values.chunks_exact((depth * height * width).max(1));
    let cut = |slice: usize| NewSlice {
        slice: slice as u32,
        shape: (height, width),
        image: channels().flat_map(|channel| grid.slice(channel, slice)).collect(),
        label: labels.map(|labels| grid.slice(labels, slice)),
    };
    (0..depth).map(cut).collect()
}
