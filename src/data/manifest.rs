//! What a dataset says about itself: `manifest.json` and one index beside each shard.
//!
//! The chain of trust: the manifest holds the digest of every index, an index those of its shard's
//! footer and row groups. The manifest itself is known by its own digest, which a run records.
//! Pure parsing and checking; nothing is fetched here.
//!
//! Rows are numbered per split, in list order, from zero. The training split lists labelled
//! volumes before unlabelled ones, so "the first K labelled patients" and "the rest" are both
//! ranges of rows, and a trainer needs to know none of the unlabelled ones: a large pool's are in
//! volume tables. All blocks (row groups) of a split hold `block_rows` rows, but the last one.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::error::DataError;
use super::preprocess::Preprocessing;
use super::tables::{self, VolumeTable};
use crate::types::ObjectDigest;

/// The newest format this program reads. What an older one can mean is still written as it was, byte for
/// byte: images of one channel as format 1, those of several as format 2. Format 3 has volume tables, format 4
/// palettes. An older program refuses what it does not know by name.
pub const FORMAT: u32 = 4;

/// The oldest format with [`VolumeTable`]s.
pub(crate) const FORMAT_TABLES: u32 = 3;

/// The most channels that an image has.
pub const CHANNELS_MAX: usize = 64;

/// The oldest format with images as values and places among them.
const FORMAT_PALETTES: u32 = 4;

/// The oldest format in which images of `channels` channels can be written, some of them with `palettes`.
pub(crate) fn format_for(channels: usize, palettes: bool) -> u32 {
    match (palettes, channels) {
        (true, _) => FORMAT_PALETTES,
        (false, 2..) => 2,
        (false, _) => 1,
    }
}

/// Where the manifest lies within a dataset.
pub const MANIFEST_PATH: &str = "manifest.json";

/// What a volume is for. Patients are never in two of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// Gradients come from these alone.
    Train,
    /// Chooses among checkpoints.
    Val,
    /// Looked at once.
    Test,
}

impl Split {
    /// All of them, in the order they are stored.
    pub const ALL: [Self; 3] = [Self::Train, Self::Val, Self::Test];

    /// Its name in paths and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Val => "val",
            Self::Test => "test",
        }
    }
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A volume's number: its place in [`Manifest::volumes`], or [`Self::TABLED_FIRST`] and its place among those
/// that are in tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct VolumeId(pub u32);

impl VolumeId {
    /// The number of the first volume that is in a table: half of all numbers.
    pub const TABLED_FIRST: u32 = 1 << 31;
}

/// One volume: slices of one patient at one time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VolumeEntry {
    /// Unique name, such as `patient099_frame01`.
    pub name: String,
    /// Whose it is.
    pub patient: String,
    /// What it is for.
    pub split: Split,
    /// Whether its slices have labels.
    pub labelled: bool,
    /// Millimetres between voxels along (slice, row, column); absent where the source has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spacing_mm: Option<[f64; 3]>,
    /// Voxel index (slice, row, column) to patient space (right, anterior, superior) in
    /// millimetres, rows of a 4 x 4 matrix.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affine: Option<[[f64; 4]; 4]>,
    /// Row of its first slice within its split.
    pub first_row: u64,
    /// How many slices it has.
    pub slices: u32,
}

impl VolumeEntry {
    /// Its rows within its split.
    pub fn rows(&self) -> Range<u64> {
        self.first_row..self.first_row + u64::from(self.slices)
    }
}

/// One Parquet object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardEntry {
    /// The split all its rows belong to.
    pub split: Split,
    /// Path of the Parquet object.
    pub object: String,
    /// Length and hash of the whole object.
    pub digest: ObjectDigest,
    /// Rows in it.
    pub rows: u64,
    /// Path of its [`ShardIndex`].
    pub index: String,
    /// Length and hash of the index.
    pub index_digest: ObjectDigest,
    /// Whether it has images as values and places among them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub palettes: bool,
}

/// `manifest.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Format number; see [`FORMAT`].
    pub format: u32,
    /// What the dataset is called in reports.
    pub name: String,
    /// Class names by label value; the first is the background.
    pub classes: Vec<String>,
    /// How its volumes were made from images. Left out where it is the default, which is what
    /// manifests without it mean.
    #[serde(default, skip_serializing_if = "Preprocessing::is_default")]
    pub preprocessing: Preprocessing,
    /// Names of the images' channels, in their order; empty for one channel without a name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub channels: Vec<String>,
    /// Rows in a block, which is a Parquet row group.
    pub block_rows: u64,
    /// Shards, the splits one after the other, rows in order.
    pub shards: Vec<ShardEntry>,
    /// Volumes in list order: all but those in tables.
    pub volumes: Vec<VolumeEntry>,
    /// Where the unlabelled training volumes are that follow those in `volumes`, in a large pool.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tables: Vec<VolumeTable>,
}

/// One row group of a shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupEntry {
    /// Where its bytes start in the shard.
    pub offset: u64,
    /// Rows in it.
    pub rows: u64,
    /// Length and hash of its bytes.
    pub digest: ObjectDigest,
}

/// Beside each shard: where its parts lie and what they hash to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardIndex {
    /// Format number; see [`FORMAT`].
    pub format: u32,
    /// Path of the shard.
    pub object: String,
    /// Where the Parquet footer starts; it reaches to the end of the shard.
    pub footer_offset: u64,
    /// Length and hash of the footer.
    pub footer_digest: ObjectDigest,
    /// Row groups in order.
    pub groups: Vec<GroupEntry>,
}

/// Refuses a newer format before the rest is parsed: a newer one may not parse at all.
pub(super) fn check_format(object: &str, bytes: &[u8], supported: u32) -> Result<(), DataError> {
    #[derive(Deserialize)]
    struct Format {
        format: u32,
    }
    let Format { format } =
        serde_json::from_slice(bytes).map_err(|error| DataError::invalid(object, error))?;
    match format {
        0 => Err(DataError::invalid(object, "format 0 never existed")),
        found if found > supported => {
            Err(DataError::NewerFormat { object: object.to_owned(), found, supported })
        }
        _ => Ok(()),
    }
}

impl ShardIndex {
    /// Reads an index and checks it against the shard it is of.
    pub fn parse(bytes: &[u8], shard: &ShardEntry, block_rows: u64) -> Result<Self, DataError> {
        let object = shard.index.as_str();
        check_format(object, bytes, FORMAT)?;
        let index: Self =
            serde_json::from_slice(bytes).map_err(|error| DataError::invalid(object, error))?;
        let why = |why: &str| Err(DataError::invalid(object, why));
        if index.object != shard.object {
            return why("it is of another shard");
        }
        let mut end = 0;
        for (number, group) in index.groups.iter().enumerate() {
            let last = number + 1 == index.groups.len();
            if group.rows == 0 || group.rows > block_rows || (!last && group.rows != block_rows) {
                return why("its row groups are not uniform");
            }
            if group.offset < end {
                return why("its row groups overlap");
            }
            end = group.offset.saturating_add(group.digest.bytes);
        }
        if index.groups.iter().map(|group| group.rows).sum::<u64>() != shard.rows {
            return why("its rows are not those of the manifest");
        }
        if end > index.footer_offset
            || index.footer_offset.checked_add(index.footer_digest.bytes)
                != Some(shard.digest.bytes)
        {
            return why("its ranges do not fit the shard");
        }
        Ok(index)
    }
}

impl Manifest {
    /// Reads and checks `manifest.json`.
    pub fn parse(bytes: &[u8]) -> Result<Self, DataError> {
        check_format(MANIFEST_PATH, bytes, FORMAT)?;
        let manifest: Self = serde_json::from_slice(bytes)
            .map_err(|error| DataError::invalid(MANIFEST_PATH, error))?;
        manifest.check().map_err(|why| DataError::invalid(MANIFEST_PATH, why))?;
        Ok(manifest)
    }

    /// The bytes of `manifest.json`: the same for equal manifests.
    pub fn to_bytes(&self) -> Result<Vec<u8>, DataError> {
        to_json(MANIFEST_PATH, self)
    }

    /// How many channels every image has, at least one.
    pub fn channel_count(&self) -> usize {
        self.channels.len().max(1)
    }

    /// Rows of a split.
    pub fn rows(&self, split: Split) -> u64 {
        self.shards_of(split).map(|shard| shard.rows).sum()
    }

    /// Shards of a split, in row order.
    pub fn shards_of(&self, split: Split) -> impl Iterator<Item = &ShardEntry> {
        self.shards.iter().filter(move |shard| shard.split == split)
    }

    /// Volumes of a split that are not in tables, in list order.
    pub fn volumes_of(&self, split: Split) -> impl Iterator<Item = (VolumeId, &VolumeEntry)> {
        let numbered = self.volumes.iter().enumerate();
        numbered
            .map(|(id, volume)| (VolumeId(id as u32), volume))
            .filter(move |(_, volume)| volume.split == split)
    }

    /// Patients of the training split that have labels, in list order.
    pub fn labelled_patients(&self) -> Vec<&str> {
        let mut patients: Vec<&str> = Vec::new();
        for (_, volume) in self.volumes_of(Split::Train).filter(|(_, volume)| volume.labelled) {
            if patients.last() != Some(&volume.patient.as_str()) {
                patients.push(&volume.patient);
            }
        }
        patients
    }

    /// The training rows used with labels (those of the first `patients` labelled patients), and
    /// the rest, used without.
    pub fn pools(&self, patients: u32) -> Result<(Range<u64>, Range<u64>), DataError> {
        let all = self.labelled_patients();
        let Some(chosen) = all.get(..patients as usize) else {
            return Err(DataError::Unusable(format!(
                "data.labelled = {patients}, but the dataset has {} labelled training patients",
                all.len()
            )));
        };
        let chosen: BTreeSet<&str> = chosen.iter().copied().collect();
        let labelled = self
            .volumes_of(Split::Train)
            .filter(|(_, volume)| volume.labelled && chosen.contains(volume.patient.as_str()))
            .map(|(_, volume)| u64::from(volume.slices))
            .sum();
        Ok((0..labelled, labelled..self.rows(Split::Train)))
    }

    /// What must hold for rows to mean anything; says what does not.
    fn check(&self) -> Result<(), String> {
        if self.block_rows == 0 || self.block_rows > MAX_BLOCK_ROWS {
            return Err(format!("block_rows is {}, not 1..={MAX_BLOCK_ROWS}", self.block_rows));
        }
        if self.classes.len() < 2 || self.classes.len() > 255 {
            return Err(format!("{} classes, not 2..=255", self.classes.len()));
        }
        if self.channels.len() > CHANNELS_MAX {
            return Err(format!("{} channels, not 1..={CHANNELS_MAX}", self.channels.len()));
        }
        if self.format < format_for(self.channels.len(), false) {
            return Err(format!("{} channels in format {}", self.channels.len(), self.format));
        }
        if self.format < FORMAT_PALETTES && self.shards.iter().any(|shard| shard.palettes) {
            return Err(format!("palettes in format {}", self.format));
        }
        if !self.tables.is_empty() && self.format < FORMAT_TABLES {
            return Err(format!("volume tables in format {}", self.format));
        }
        self.check_shards()?;
        self.check_volumes()?;
        self.check_patients()
    }

    fn check_shards(&self) -> Result<(), String> {
        for split in Split::ALL {
            let shards: Vec<_> = self.shards_of(split).collect();
            for (number, shard) in shards.iter().enumerate() {
                let last = number + 1 == shards.len();
                if shard.rows == 0 || (!last && !shard.rows.is_multiple_of(self.block_rows)) {
                    return Err(format!("`{}` does not hold whole blocks", shard.object));
                }
                if shard.rows > u64::from(u32::MAX) {
                    return Err(format!("`{}` claims {} rows", shard.object, shard.rows));
                }
            }
        }
        Ok(())
    }

    fn check_volumes(&self) -> Result<(), String> {
        let mut names = BTreeSet::new();
        for split in Split::ALL {
            let mut next = 0;
            let mut unlabelled = false;
            for (_, volume) in self.volumes_of(split) {
                if !names.insert(&volume.name) {
                    return Err(format!("two volumes are called `{}`", volume.name));
                }
                if volume.first_row != next || volume.slices == 0 {
                    return Err(format!("the rows of `{}` are not next in line", volume.name));
                }
                next += u64::from(volume.slices);
                if split == Split::Train && volume.labelled && unlabelled {
                    return Err(format!("`{}` has labels, one before it has none", volume.name));
                }
                unlabelled |= !volume.labelled;
            }
            if split == Split::Train {
                next = tables::check(&self.tables, next)?;
            }
            let rows = self.rows(split);
            if next != rows {
                return Err(format!("{split}: volumes have {next} rows, shards {rows}"));
            }
        }
        Ok(())
    }

    fn check_patients(&self) -> Result<(), String> {
        let labelled = self.labelled_patients();
        if labelled.iter().collect::<BTreeSet<_>>().len() != labelled.len() {
            return Err("a labelled patient's volumes are not side by side".to_owned());
        }
        let mut split_of = BTreeMap::new();
        for volume in &self.volumes {
            let split = *split_of.entry(&volume.patient).or_insert(volume.split);
            if split != volume.split {
                let patient = &volume.patient;
                return Err(format!("patient `{patient}` is in {split} and in {}", volume.split));
            }
        }
        Ok(())
    }
}

/// A block is what is decoded at once: more rows than this are no block.
pub(crate) const MAX_BLOCK_ROWS: u64 = 4096;

/// JSON for people and programs, with a newline at its end.
pub(crate) fn to_json<T: Serialize>(object: &str, value: &T) -> Result<Vec<u8>, DataError> {
    let mut bytes =
        serde_json::to_vec_pretty(value).map_err(|error| DataError::invalid(object, error))?;
    bytes.push(b'\n');
    Ok(bytes)
}

#[cfg(test)]
#[path = "manifest_tests.rs"]
mod tests;
