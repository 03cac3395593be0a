//! What the pixels of a dataset are like: intensities, slice shapes, class balance.
//!
//! A [`Tally`] is what is counted: of one volume, or merged over many. It has a fixed size, whatever the number of pixels,
//! and tallies are merged in list order, so that the sums do not depend on threads. [`Statistics`] is what becomes of it,
//! stored as `statistics.json` beside the manifest. It is not part of the manifest: a dataset keeps its identity whether it
//! has statistics or not, and trainers do not fetch them. Pure; nothing is read here.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::error::DataError;
use super::manifest::{Manifest, Split};
use super::shard::SliceRow;
use crate::types::ObjectDigest;

/// Where the statistics lie within a dataset.
pub const STATISTICS_PATH: &str = "statistics.json";

/// The newest format of [`Statistics`] that this program reads.
const FORMAT: u32 = 1;

/// Of a 32-bit float the sign, the exponent and five bits of the fraction choose its bin: 1/32 wide, relatively.
const BIN_SHIFT: u32 = 18;
const BINS: usize = 1 << (32 - BIN_SHIFT);

/// Distinct shapes that are told apart in a split; slices of further ones are counted together.
const SHAPES_MAX: usize = 256;

/// Sums that come back from JSON to the last bit: this program's parser rounds decimal fractions.
mod bits {
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(value: &f64, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(value.to_bits())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
        u64::deserialize(from).map(f64::from_bits)
    }
}

/// Counts of values in bins of fixed edges, with their moments.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Histogram {
    count: u64,
    #[serde(with = "bits")]
    min: f64,
    #[serde(with = "bits")]
    max: f64,
    #[serde(with = "bits")]
    sum: f64,
    #[serde(with = "bits")]
    squares: f64,
    /// Those that are not empty, by number.
    bins: BTreeMap<u16, u64>,
}

impl Default for Histogram {
    fn default() -> Self {
        let (min, max) = (f64::INFINITY, f64::NEG_INFINITY);
        Self { count: 0, min, max, sum: 0.0, squares: 0.0, bins: BTreeMap::new() }
    }
}

/// The bin of `value`; greater values never have a lower one.
fn bin_of(value: f32) -> usize {
    let bits = value.to_bits();
    let ordered = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    (ordered >> BIN_SHIFT) as usize
}

/// The value at the lower edge of a bin.
fn edge(bin: u32) -> f64 {
    let ordered = bin << BIN_SHIFT;
    f64::from(f32::from_bits(if ordered >> 31 == 1 { ordered & !(1 << 31) } else { !ordered }))
}

impl Histogram {
    fn of(values: impl Iterator<Item = f32>) -> Self {
        let mut bins = vec![0_u64; BINS];
        let mut all = Self::default();
        for value in values {
            bins[bin_of(value)] += 1;
            let value = f64::from(value);
            all.count += 1;
            (all.min, all.max) = (all.min.min(value), all.max.max(value));
            all.sum += value;
            all.squares += value * value;
        }
        let filled = bins.into_iter().enumerate().filter(|(_, count)| *count > 0);
        all.bins = filled.map(|(bin, count)| (bin as u16, count)).collect();
        all
    }

    fn merge(&mut self, other: &Self) {
        self.count += other.count;
        (self.min, self.max) = (self.min.min(other.min), self.max.max(other.max));
        self.sum += other.sum;
        self.squares += other.squares;
        for (bin, count) in &other.bins {
            *self.bins.entry(*bin).or_default() += count;
        }
    }

    /// The value below which the part `share` of all lies, by a straight line across its bin.
    fn quantile(&self, share: f64) -> f64 {
        let wanted = share * self.count as f64;
        let mut below = 0.0;
        for (bin, count) in &self.bins {
            let count = *count as f64;
            if below + count >= wanted {
                let (low, high) = (edge(u32::from(*bin)), edge(u32::from(*bin) + 1));
                let at = low + (high - low) * ((wanted - below) / count);
                return at.clamp(self.min, self.max);
            }
            below += count;
        }
        self.max
    }

    fn fingerprint(&self) -> Option<Fingerprint> {
        let count = (self.count > 0).then_some(self.count as f64)?;
        let mean = self.sum / count;
        Some(Fingerprint {
            pixels: self.count,
            min: self.min,
            p0_5: self.quantile(0.005),
            mean,
            std: (self.squares / count - mean * mean).max(0.0).sqrt(),
            p99_5: self.quantile(0.995),
            max: self.max,
        })
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct ChannelTally {
    all: Histogram,
    foreground: Histogram,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct ClassTally {
    pixels: u64,
    slices: u64,
    volumes: u64,
}

/// Slices by shape, `HEIGHTxWIDTH`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shapes {
    /// Slices of each shape.
    pub slices: BTreeMap<String, u64>,
    /// Slices of shapes beyond the 256 that came first.
    pub others: u64,
}

impl Shapes {
    fn add(&mut self, shape: String, slices: u64) {
        if self.slices.len() < SHAPES_MAX || self.slices.contains_key(&shape) {
            *self.slices.entry(shape).or_default() += slices;
        } else {
            self.others += slices;
        }
    }
}

/// What is counted: shapes in all splits; intensities and classes in training alone.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Tally {
    shapes: BTreeMap<Split, Shapes>,
    channels: Vec<ChannelTally>,
    labelled_volumes: u64,
    classes: Vec<ClassTally>,
}

impl Tally {
    /// Of one volume of `split`, whose images have `channels` channels, among `classes` classes.
    pub(crate) fn of(split: Split, rows: &[SliceRow], channels: usize, classes: usize) -> Self {
        let mut tally = Self::default();
        let shapes = tally.shapes.entry(split).or_default();
        for row in rows {
            shapes.add(format!("{}x{}", row.shape.0, row.shape.1), 1);
        }
        if split != Split::Train {
            return tally;
        }
        let plane = |row: &SliceRow, channel: usize| {
            let pixels = row.shape.0 * row.shape.1;
            channel * pixels..(channel + 1) * pixels
        };
        let channel = |at: usize| {
            let pixels = || rows.iter().flat_map(move |row| &row.image[plane(row, at)]);
            let labels = || rows.iter().filter_map(|row| Some((row, row.label.as_deref()?)));
            let foreground = labels().flat_map(move |(row, label)| {
                let pixels = row.image[plane(row, at)].iter().zip(label);
                pixels.filter(|(_, class)| **class > 0).map(|(value, _)| *value)
            });
            let all = Histogram::of(pixels().copied());
            ChannelTally { all, foreground: Histogram::of(foreground) }
        };
        tally.channels = (0..channels).map(channel).collect();
        if rows.iter().all(|row| row.label.is_some()) {
            tally.labelled_volumes = 1;
            tally.classes = balance(rows, classes);
        }
        tally
    }

    /// Adds what was counted elsewhere.
    pub(crate) fn merge(&mut self, other: &Self) {
        for (split, shapes) in &other.shapes {
            let into = self.shapes.entry(*split).or_default();
            for (shape, slices) in &shapes.slices {
                into.add(shape.clone(), *slices);
            }
            into.others += shapes.others;
        }
        self.channels.resize_with(self.channels.len().max(other.channels.len()), Default::default);
        for (into, from) in self.channels.iter_mut().zip(&other.channels) {
            into.all.merge(&from.all);
            into.foreground.merge(&from.foreground);
        }
        self.labelled_volumes += other.labelled_volumes;
        self.classes.resize_with(self.classes.len().max(other.classes.len()), Default::default);
        for (into, from) in self.classes.iter_mut().zip(&other.classes) {
            into.pixels += from.pixels;
            into.slices += from.slices;
            into.volumes += from.volumes;
        }
    }

    /// What it says about the dataset of `manifest`, whose bytes have the digest `of`.
    pub(crate) fn statistics(&self, manifest: &Manifest, of: ObjectDigest) -> Statistics {
        let name = |at: usize| manifest.channels.get(at).cloned();
        let pixels: u64 = self.classes.iter().map(|class| class.pixels).sum();
        let class = |(at, name): (usize, &String)| {
            let tally = self.classes.get(at).cloned().unwrap_or_default();
            ClassBalance {
                name: name.clone(),
                pixels: tally.pixels,
                share: if pixels > 0 { tally.pixels as f64 / pixels as f64 } else { 0.0 },
                slices: tally.slices,
                volumes: tally.volumes,
                volumes_without: self.labelled_volumes - tally.volumes,
            }
        };
        let channel = |(at, tally): (usize, &ChannelTally)| ChannelIntensity {
            name: name(at),
            all: tally.all.fingerprint(),
            foreground: tally.foreground.fingerprint(),
        };
        Statistics {
            format: FORMAT,
            manifest: of,
            shapes: self.shapes.clone(),
            intensity: self.channels.iter().enumerate().map(channel).collect(),
            labelled_volumes: self.labelled_volumes,
            classes: manifest.classes.iter().enumerate().map(class).collect(),
        }
    }
}

/// Pixels, slices and volumes of each class in one volume.
fn balance(rows: &[SliceRow], classes: usize) -> Vec<ClassTally> {
    let mut found = vec![ClassTally::default(); classes];
    for label in rows.iter().filter_map(|row| row.label.as_deref()) {
        let mut pixels = [0_u64; 256];
        for class in label {
            pixels[usize::from(*class)] += 1;
        }
        for (tally, pixels) in found.iter_mut().zip(pixels) {
            tally.pixels += pixels;
            tally.slices += u64::from(pixels > 0);
        }
    }
    for tally in &mut found {
        tally.volumes = u64::from(tally.slices > 0);
    }
    found
}

/// Where the values of some pixels lie. Percentiles are right to 1/32 of their value.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// How many pixels.
    pub pixels: u64,
    /// The least.
    pub min: f64,
    /// Below it lie 0.5 %.
    pub p0_5: f64,
    /// Their mean.
    pub mean: f64,
    /// Their standard deviation.
    pub std: f64,
    /// Below it lie 99.5 %.
    pub p99_5: f64,
    /// The greatest.
    pub max: f64,
}

/// Intensities of one channel over the training volumes, as stored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChannelIntensity {
    /// The channel's name, where it has one.
    pub name: Option<String>,
    /// Over all pixels.
    pub all: Option<Fingerprint>,
    /// Over pixels that have a label other than the background.
    pub foreground: Option<Fingerprint>,
}

/// How often a class occurs in labelled training volumes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClassBalance {
    /// Its name.
    pub name: String,
    /// Its pixels.
    pub pixels: u64,
    /// Their part of all labelled pixels.
    pub share: f64,
    /// Slices with at least one.
    pub slices: u64,
    /// Volumes with at least one.
    pub volumes: u64,
    /// Labelled volumes without any.
    pub volumes_without: u64,
}

/// `statistics.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Statistics {
    /// Format number.
    pub format: u32,
    /// The manifest of the dataset that they are of.
    pub manifest: ObjectDigest,
    /// Slices by shape, for each split.
    pub shapes: BTreeMap<Split, Shapes>,
    /// Intensities of each channel in training.
    pub intensity: Vec<ChannelIntensity>,
    /// Training volumes with labels.
    pub labelled_volumes: u64,
    /// Classes in these.
    pub classes: Vec<ClassBalance>,
}

impl Statistics {
    /// Reads `statistics.json` of the dataset whose manifest has the digest `manifest`.
    pub fn parse(bytes: &[u8], manifest: &ObjectDigest) -> Result<Self, DataError> {
        let invalid = |why: &dyn std::fmt::Display| DataError::invalid(STATISTICS_PATH, why);
        super::manifest::check_format(STATISTICS_PATH, bytes, FORMAT)?;
        let found: Self = serde_json::from_slice(bytes).map_err(|error| invalid(&error))?;
        if found.manifest != *manifest {
            return Err(invalid(&"it is of another dataset"));
        }
        Ok(found)
    }
}

#[cfg(test)]
#[path = "statistics_tests.rs"]
mod tests;
