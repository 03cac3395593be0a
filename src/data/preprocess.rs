//! From an image as it comes to slices as the network sees them, and back: which axis slices are
//! cut across, and what becomes of intensities.
//!
//! An import and a prediction go through the same functions, so a network sees in use what it saw
//! in training. Zooming to the patch size is not here (`augment`): that is the training's choice.

use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::error::DataError;
use super::import::nifti::{Intensity, SliceAxis};
use super::nifti::{Geometry, Nifti};
use super::shard::MAX_SLICE_PIXELS;

/// How a dataset's volumes were made from images; written into its manifest. What is absent there
/// reads as the defaults: what every import did before there was a choice.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Preprocessing {
    /// What became of intensities, volume by volume.
    pub intensity: Intensity,
    /// Across which axis of the voxel grid slices were cut.
    pub slice_axis: SliceAxis,
}

impl Preprocessing {
    /// Whether the manifest need not name it.
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// How the image at `path`, which lies as `geometry` says, is cut.
    ///
    /// # Errors
    /// [`DataError::Import`]: no spacing to choose an axis by, or slices that are too large.
    pub fn grid(&self, path: &Path, geometry: &Geometry) -> Result<Grid, DataError> {
        let order = self.slice_axis.order(geometry).map_err(|why| bad(path, why))?;
        let pixels = geometry.shape[order[1]].saturating_mul(geometry.shape[order[2]]);
        if pixels > MAX_SLICE_PIXELS {
            let why =
                format!("slices of {pixels} pixels are more than the {MAX_SLICE_PIXELS} allowed");
            return Err(bad(path, why));
        }
        Ok(Grid { sides: geometry.shape, order })
    }

    /// `[z, y, x]` of one frame of the image at `path`, scaled as asked for.
    ///
    /// # Errors
    /// [`DataError::Import`]: the frame is not there, or holds what is no intensity.
    pub fn intensities(
        &self,
        path: &Path,
        image: &Nifti,
        frame: usize,
    ) -> Result<Vec<f32>, DataError> {
        let values = image.frame(frame, |value| value as f32);
        let mut values = values.ok_or_else(|| bad(path, format!("frame {frame} is missing")))?;
        if let Some(value) = values.iter().find(|value| !value.is_finite()) {
            return Err(bad(path, format!("it holds a voxel of {value}, which is no intensity")));
        }
        self.intensity.apply(&mut values);
        Ok(values)
    }
}

/// The name of one frame of a case with several.
pub fn frame_name(case: &str, frame: usize, frames: usize) -> String {
    let digits = frames.to_string().len().max(2);
    format!("{case}_frame{:0digits$}", frame + 1)
}

fn bad(path: &Path, why: impl ToString) -> DataError {
    DataError::Import { path: path.to_owned(), why: why.to_string() }
}

/// The voxel grid of an image and the order in which it is cut. Files hold a frame as `[z, y, x]`,
/// x fastest; networks want `[slice, row, column]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    sides: [usize; 4],
    /// Axes of the file along (slice, row, column).
    pub order: [usize; 3],
}

impl Grid {
    /// Slices, rows, columns.
    pub fn shape(&self) -> [usize; 3] {
        self.order.map(|axis| self.sides[axis])
    }

    /// How far apart in a file's frame (slices, rows, columns) are.
    fn strides(&self) -> [usize; 3] {
        let strides = [1, self.sides[0], self.sides[0] * self.sides[1]];
        self.order.map(|axis| strides[axis])
    }

    /// Slice `slice` of a file's frame: `[row, column]`.
    pub fn slice<T: Copy>(&self, frame: &[T], slice: usize) -> Vec<T> {
        let ([_, rows, columns], [deep, down, along]) = (self.shape(), self.strides());
        let row = |row: usize| {
            (0..columns).map(move |column| frame[slice * deep + row * down + column * along])
        };
        (0..rows).flat_map(row).collect()
    }

    /// A file's frame `[z, y, x]` as `[slice, row, column]`.
    pub fn cut<T: Copy>(&self, frame: &[T]) -> Vec<T> {
        (0..self.shape()[0]).flat_map(|slice| self.slice(frame, slice)).collect()
    }

    /// The reverse of [`Grid::cut`].
    pub fn uncut<T: Copy + Default>(&self, volume: &[T]) -> Vec<T> {
        let ([_, rows, columns], [deep, down, along]) = (self.shape(), self.strides());
        let mut frame = vec![T::default(); volume.len()];
        for (at, value) in volume.iter().enumerate() {
            let (slice, row, column) = (at / (rows * columns), at / columns % rows, at % columns);
            frame[slice * deep + row * down + column * along] = *value;
        }
        frame
    }
}

impl fmt::Display for SliceAxis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Given(axis) => axis.fmt(f),
        }
    }
}

impl fmt::Display for Intensity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MinMax => f.write_str("minmax"),
            Self::ZScore => f.write_str("zscore"),
            Self::Window { low, high } => write!(f, "window:{low}:{high}"),
        }
    }
}

impl From<SliceAxis> for String {
    fn from(axis: SliceAxis) -> Self {
        axis.to_string()
    }
}

impl From<Intensity> for String {
    fn from(intensity: Intensity) -> Self {
        intensity.to_string()
    }
}

impl TryFrom<String> for SliceAxis {
    type Error = DataError;

    fn try_from(text: String) -> Result<Self, DataError> {
        text.parse()
    }
}

impl TryFrom<String> for Intensity {
    type Error = DataError;

    fn try_from(text: String) -> Result<Self, DataError> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cutting_is_undone_whatever_the_axis() {
        let geometry =
            |spacing| Geometry { shape: [2, 3, 4, 1], spacing_mm: Some(spacing), affine: None };
        let frame: Vec<usize> = (0..24).collect();
        let at = |x: usize, y: usize, z: usize| (z * 3 + y) * 2 + x;
        let auto = Preprocessing::default();
        for (spacing, shape, second) in [
            ([1.0, 1.0, 5.0], [4, 3, 2], at(1, 0, 0)),
            ([1.0, 5.0, 1.0], [3, 4, 2], at(1, 0, 0)),
            ([5.0, 1.0, 1.0], [2, 4, 3], at(0, 1, 0)),
        ] {
            let grid = auto.grid(Path::new("a"), &geometry(spacing)).unwrap();
            assert_eq!(grid.shape(), shape);
            let volume = grid.cut(&frame);
            assert_eq!((volume[0], volume[1]), (0, second), "a row runs along the faster axis");
            let mut all = volume.clone();
            all.sort_unstable();
            assert_eq!(all, frame, "every voxel once");
            assert_eq!(grid.uncut(&volume), frame);
        }
    }

    #[test]
    fn a_manifest_says_it_in_the_words_of_the_command_line() {
        let made = Preprocessing {
            intensity: Intensity::Window { low: -100.5, high: 240.0 },
            slice_axis: SliceAxis::Given(1),
        };
        let json = serde_json::to_string(&made).unwrap();
        assert_eq!(json, r#"{"intensity":"window:-100.5:240","slice_axis":"1"}"#);
        assert_eq!(serde_json::from_str::<Preprocessing>(&json).unwrap(), made);
        assert_eq!(serde_json::from_str::<Preprocessing>("{}").unwrap(), Preprocessing::default());
        for bad in [r#"{"intensity":"window:9:1"}"#, r#"{"slice_axis":"3"}"#] {
            assert!(serde_json::from_str::<Preprocessing>(bad).is_err(), "{bad}");
        }
    }
}
