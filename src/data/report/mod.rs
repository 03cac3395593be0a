//! What `cpcr data info` and `cpcr data verify` say, as data. Printing is the command line's.

mod verify;

use std::collections::{BTreeMap, HashSet};

use serde::Serialize;

use super::dataset::{Dataset, Volume};
use super::error::DataError;
use super::manifest::{Manifest, Split, VolumeEntry, VolumeId};
use super::shard::SliceRow;
use super::statistics::{STATISTICS_PATH, Statistics, Tally};
use super::tables::name_key;
use super::write::Work;
use crate::types::ObjectDigest;

pub use verify::{Problem, Verified, verify, verify_watched};

/// The least, the middle and the greatest of some numbers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// The least.
    pub min: f64,
    /// The middle one; of an even number the upper of the two in the middle.
    pub median: f64,
    /// The greatest.
    pub max: f64,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        Some(Self { min, median: values[values.len() / 2], max })
    }
}

/// What one split holds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SplitInfo {
    /// Patients in it.
    pub patients: usize,
    /// Patients with at least one labelled volume.
    pub labelled_patients: usize,
    /// Volumes in it.
    pub volumes: usize,
    /// Volumes with labels.
    pub labelled_volumes: usize,
    /// Slices in it.
    pub slices: u64,
    /// Shards it is stored in.
    pub shards: usize,
    /// Bytes of those shards.
    pub bytes: u64,
    /// Millimetres between voxels along (slice, row, column), over volumes; `None` where none has a spacing.
    pub spacing_mm: Option<[Spread; 3]>,
    /// Volumes without a spacing.
    pub volumes_without_spacing: usize,
}

/// What a dataset holds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Info {
    /// Its name.
    pub name: String,
    /// Its identity: the digest of its manifest.
    pub manifest: ObjectDigest,
    /// Format number.
    pub format: u32,
    /// Class names by label value.
    pub classes: Vec<String>,
    /// Channels of its images.
    pub channels: usize,
    /// Their names, where they have some.
    pub channel_names: Vec<String>,
    /// Rows in a block.
    pub block_rows: u64,
    /// Its splits, by name.
    pub splits: BTreeMap<&'static str, SplitInfo>,
    /// Slices with labels for the first 1, 2, 3, ... labelled patients.
    pub labelled_slices: Vec<u64>,
    /// What its pixels are like, where somebody has counted them.
    pub statistics: Option<Statistics>,
}

/// What a dataset's manifest, volume tables and statistics say about it; fetches no shard.
pub fn info(dataset: &Dataset) -> Result<Info, DataError> {
    let statistics = dataset.beside(STATISTICS_PATH)?;
    let parse = |bytes: bytes::Bytes| Statistics::parse(&bytes, dataset.digest());
    describe(dataset, statistics.map(parse).transpose()?)
}

/// The same, with statistics counted anew: reads every volume, `work.threads` side by side.
pub fn scan(dataset: &Dataset, work: &Work) -> Result<Info, DataError> {
    let manifest = dataset.manifest();
    let all = Split::ALL.map(|split| dataset.volumes(split)).concat();
    work.meter.start(all.len() as u64);
    let mut tally = Tally::default();
    for ids in all.chunks(work.threads.max(1)) {
        let counted: Vec<Result<Tally, DataError>> = std::thread::scope(|scope| {
            let threads: Vec<_> =
                ids.iter().map(|id| scope.spawn(|| tally_of(dataset, *id, work))).collect();
            let failed = |_| Err(DataError::Thread("it panicked over a volume".to_owned()));
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(failed)).collect()
        });
        for one in counted {
            tally.merge(&one?);
        }
    }
    describe(dataset, Some(tally.statistics(manifest, dataset.digest().clone())))
}

fn tally_of(dataset: &Dataset, id: VolumeId, work: &Work) -> Result<Tally, DataError> {
    let split = dataset.volume_entry(id)?.split;
    let rows = rows_of(dataset.load_volume(id)?);
    work.meter.add_bytes(rows.iter().map(|row| row.memory_bytes() as u64).sum());
    work.meter.add_case();
    let manifest = dataset.manifest();
    Ok(Tally::of(split, &rows, manifest.channel_count(), manifest.classes.len()))
}

/// A volume's slices, one by one again.
fn rows_of(volume: Volume) -> Vec<SliceRow> {
    let [depth, height, width] = volume.shape;
    let (pixels, values) = (height * width, volume.channels * height * width);
    let row = |at: usize| SliceRow {
        volume: 0,
        slice: at as u32,
        channels: volume.channels,
        shape: (height, width),
        image: volume.slices[at * values..(at + 1) * values].to_vec().into(),
        label: volume
            .labels
            .as_ref()
            .map(|all| all[at * pixels..(at + 1) * pixels].to_vec().into()),
    };
    (0..depth).map(row).collect()
}

fn describe(dataset: &Dataset, statistics: Option<Statistics>) -> Result<Info, DataError> {
    let manifest = dataset.manifest();
    let mut splits = BTreeMap::new();
    for split in Split::ALL {
        splits.insert(split.name(), describe_split(dataset, split)?);
    }
    Ok(Info {
        name: manifest.name.clone(),
        manifest: dataset.digest().clone(),
        format: manifest.format,
        classes: manifest.classes.clone(),
        channels: manifest.channel_count(),
        channel_names: manifest.channels.clone(),
        block_rows: manifest.block_rows,
        splits,
        labelled_slices: labelled_slices(manifest),
        statistics,
    })
}

fn describe_split(dataset: &Dataset, split: Split) -> Result<SplitInfo, DataError> {
    let manifest = dataset.manifest();
    let (mut patients, mut labelled_patients) = (HashSet::new(), HashSet::new());
    let (mut volumes, mut labelled_volumes, mut volumes_without_spacing) = (0, 0, 0);
    let mut spacing: [Vec<f64>; 3] = Default::default();
    each_volume(dataset, split, |volume| {
        volumes += 1;
        patients.insert(name_key(&volume.patient));
        if volume.labelled {
            labelled_volumes += 1;
            labelled_patients.insert(name_key(&volume.patient));
        }
        match volume.spacing_mm {
            Some(found) => spacing.iter_mut().zip(found).for_each(|(all, one)| all.push(one)),
            None => volumes_without_spacing += 1,
        }
    })?;
    let [slice, row, column] = spacing.map(Spread::of);
    Ok(SplitInfo {
        patients: patients.len(),
        labelled_patients: labelled_patients.len(),
        volumes,
        labelled_volumes,
        slices: manifest.rows(split),
        shards: manifest.shards_of(split).count(),
        bytes: manifest.shards_of(split).map(|shard| shard.digest.bytes).sum(),
        spacing_mm: slice.zip(row).zip(column).map(|((slice, row), column)| [slice, row, column]),
        volumes_without_spacing,
    })
}

/// Shows every volume of `split`, one table in memory at a time.
fn each_volume(
    dataset: &Dataset,
    split: Split,
    mut show: impl FnMut(&VolumeEntry),
) -> Result<(), DataError> {
    let manifest = dataset.manifest();
    manifest.volumes_of(split).for_each(|(_, volume)| show(volume));
    if split == Split::Train {
        for number in 0..manifest.tables.len() {
            dataset.table(number)?.iter().for_each(&mut show);
        }
    }
    Ok(())
}

/// Where the labelled rows of the first 1, 2, 3, ... patients end: labelled volumes come first.
fn labelled_slices(manifest: &Manifest) -> Vec<u64> {
    let mut ends: Vec<u64> = Vec::new();
    let mut last = None;
    for (_, volume) in manifest.volumes_of(Split::Train).filter(|(_, volume)| volume.labelled) {
        if last == Some(&volume.patient) {
            ends.pop();
        }
        ends.push(volume.rows().end);
        last = Some(&volume.patient);
    }
    ends
}
