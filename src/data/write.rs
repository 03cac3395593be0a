//! Writes a dataset: volumes in list order go in, shards, indexes and last the manifest come out.
//!
//! The manifest is written last, so a dataset that was cut short does not exist. Memory holds one
//! unfinished shard per split.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

use super::error::DataError;
use super::manifest::{
    CHANNELS_MAX, MANIFEST_PATH, MAX_BLOCK_ROWS, Manifest, ShardEntry, Split, VolumeEntry,
    format_for, to_json,
};
use super::preprocess::Preprocessing;
use super::shard::{SliceRow, encode};
use super::source::ObjectWriter;
use crate::data::augment::Shape;
use crate::types::ObjectDigest;

/// How a dataset is laid out.
#[derive(Debug, Clone)]
pub struct WriteOptions {
    /// What the dataset is called in reports.
    pub name: String,
    /// Class names by label value, background first.
    pub classes: Vec<String>,
    /// How volumes were made from images, for those that are predicted later.
    pub preprocessing: Preprocessing,
    /// Names of the images' channels in their order; empty for one channel without a name.
    pub channels: Vec<String>,
    /// Rows in a block: what is fetched at once.
    pub block_rows: u32,
    /// Blocks in a shard.
    pub shard_blocks: u32,
    /// zstd level, 1..=22.
    pub zstd_level: i32,
}

impl WriteOptions {
    /// Blocks of 8 slices (about 1.5 MB of cardiac MRI), shards of 32 blocks.
    pub fn new(name: impl Into<String>, classes: &[&str]) -> Self {
        Self {
            name: name.into(),
            classes: classes.iter().map(|class| (*class).to_owned()).collect(),
            preprocessing: Preprocessing::default(),
            channels: Vec::new(),
            block_rows: 8,
            shard_blocks: 32,
            zstd_level: 3,
        }
    }
}

/// A slice on its way in.
#[derive(Debug, Clone, PartialEq)]
pub struct NewSlice {
    /// Its place in the volume, from zero. Slices may come in any order, which is kept.
    pub slice: u32,
    /// Height and width.
    pub shape: Shape,
    /// Intensities `[C, H, W]`; in [0, 1] per volume and channel, unless an import was asked for z-scores.
    pub image: Vec<f32>,
    /// Class of each pixel, where it is known.
    pub label: Option<Vec<u8>>,
}

/// A volume on its way in. Labelled means that every slice has a label.
#[derive(Debug, Clone, PartialEq)]
pub struct NewVolume {
    /// Unique name.
    pub name: String,
    /// Whose it is.
    pub patient: String,
    /// What it is for.
    pub split: Split,
    /// Millimetres between voxels along (slice, row, column).
    pub spacing_mm: Option<[f64; 3]>,
    /// Voxel index (slice, row, column) to patient space in millimetres.
    pub affine: Option<[[f64; 4]; 4]>,
    /// Its slices.
    pub slices: Vec<NewSlice>,
}

#[derive(Default)]
struct Pending {
    rows: Vec<SliceRow>,
    shards: Vec<ShardEntry>,
    volume_rows: u64,
}

/// Takes volumes and writes shards as they fill.
pub struct DatasetWriter {
    sink: Arc<dyn ObjectWriter>,
    options: WriteOptions,
    volumes: Vec<VolumeEntry>,
    pending: BTreeMap<Split, Pending>,
}

impl DatasetWriter {
    /// A writer into `sink`.
    pub fn new(sink: Arc<dyn ObjectWriter>, options: WriteOptions) -> Result<Self, DataError> {
        let block_rows = u64::from(options.block_rows);
        if block_rows == 0 || block_rows > MAX_BLOCK_ROWS || options.shard_blocks == 0 {
            return Err(DataError::Unusable(format!(
                "blocks of {block_rows} rows and shards of {} blocks cannot be written",
                options.shard_blocks
            )));
        }
        if options.channels.len() > CHANNELS_MAX {
            let channels = options.channels.len();
            let why = format!("images of {channels} channels: at most {CHANNELS_MAX} are written");
            return Err(DataError::Unusable(why));
        }
        Ok(Self { sink, options, volumes: Vec::new(), pending: BTreeMap::new() })
    }

    /// Adds a volume behind those of its split.
    pub async fn add(&mut self, volume: NewVolume) -> Result<(), DataError> {
        let channels = self.options.channels.len().max(1);
        check(&volume, self.options.classes.len(), channels)?;
        let id = self.volumes.len() as u32;
        let pending = self.pending.entry(volume.split).or_default();
        self.volumes.push(VolumeEntry {
            name: volume.name,
            patient: volume.patient,
            split: volume.split,
            labelled: volume.slices.iter().all(|slice| slice.label.is_some()),
            spacing_mm: volume.spacing_mm,
            affine: volume.affine,
            first_row: pending.volume_rows,
            slices: volume.slices.len() as u32,
        });
        pending.volume_rows += volume.slices.len() as u64;
        pending.rows.extend(volume.slices.into_iter().map(|slice| SliceRow {
            volume: id,
            slice: slice.slice,
            channels,
            shape: slice.shape,
            image: slice.image.into(),
            label: slice.label.map(Into::into),
        }));
        let shard_rows = (self.options.block_rows * self.options.shard_blocks) as usize;
        loop {
            let pending = self.pending.entry(volume.split).or_default();
            if pending.rows.len() < shard_rows {
                return Ok(());
            }
            let rest = pending.rows.split_off(shard_rows);
            let full = std::mem::replace(&mut pending.rows, rest);
            self.write_shard(volume.split, full).await?;
        }
    }

    /// Writes what is left, then the manifest.
    pub async fn finish(mut self) -> Result<Manifest, DataError> {
        for split in Split::ALL {
            let rows =
                self.pending.get_mut(&split).map(|pending| std::mem::take(&mut pending.rows));
            if let Some(rows) = rows.filter(|rows| !rows.is_empty()) {
                self.write_shard(split, rows).await?;
            }
        }
        let manifest = Manifest {
            format: format_for(self.options.channels.len()),
            name: self.options.name.clone(),
            classes: self.options.classes.clone(),
            preprocessing: self.options.preprocessing,
            channels: self.options.channels.clone(),
            block_rows: u64::from(self.options.block_rows),
            shards: self.pending.into_values().flat_map(|pending| pending.shards).collect(),
            volumes: self.volumes,
        };
        let bytes = manifest.to_bytes()?;
        // What could not be opened again is not written either.
        Manifest::parse(&bytes)?;
        put(self.sink.as_ref(), MANIFEST_PATH, bytes.into()).await?;
        Ok(manifest)
    }

    async fn write_shard(&mut self, split: Split, rows: Vec<SliceRow>) -> Result<(), DataError> {
        let shards = &mut self.pending.entry(split).or_default().shards;
        let stem = format!("shards/{split}-{:05}", shards.len());
        let (object, index) = (format!("{stem}.parquet"), format!("{stem}.index.json"));
        let encoded =
            encode(&object, &rows, self.options.block_rows as usize, self.options.zstd_level)?;
        let index_bytes = to_json(&index, &encoded.index)?;
        shards.push(ShardEntry {
            split,
            object: object.clone(),
            digest: ObjectDigest::of(&encoded.bytes),
            rows: rows.len() as u64,
            index: index.clone(),
            index_digest: ObjectDigest::of(&index_bytes),
        });
        put(self.sink.as_ref(), &object, encoded.bytes).await?;
        put(self.sink.as_ref(), &index, index_bytes.into()).await
    }
}

async fn put(sink: &dyn ObjectWriter, object: &str, bytes: Bytes) -> Result<(), DataError> {
    let written = sink.put(object, bytes).await;
    written.map_err(|source| DataError::Write { object: object.to_owned(), source })
}

/// Every slice is whole, its labels are classes, and either all or none have labels.
fn check(volume: &NewVolume, classes: usize, channels: usize) -> Result<(), DataError> {
    let bad = |why: String| Err(DataError::invalid(&volume.name, why));
    if volume.slices.is_empty() {
        return bad("it has no slices".to_owned());
    }
    let labelled = volume.slices.iter().filter(|slice| slice.label.is_some()).count();
    if labelled != 0 && labelled != volume.slices.len() {
        return bad(format!("{labelled} of {} slices have labels", volume.slices.len()));
    }
    let mut numbers: Vec<u32> = volume.slices.iter().map(|slice| slice.slice).collect();
    numbers.sort_unstable();
    if numbers.windows(2).any(|pair| pair[0] == pair[1]) {
        return bad("a slice appears twice".to_owned());
    }
    for slice in &volume.slices {
        let pixels = slice.shape.0 * slice.shape.1;
        if pixels == 0 || slice.image.len() != channels * pixels {
            return bad(format!(
                "slice {} is not of shape {:?} in {channels} channels",
                slice.slice, slice.shape
            ));
        }
        if slice.image.iter().any(|value| !value.is_finite()) {
            return bad(format!("slice {} holds values that are no numbers", slice.slice));
        }
        if let Some(label) = &slice.label {
            if label.len() != pixels {
                return bad(format!("the label of slice {} has another shape", slice.slice));
            }
            if let Some(class) = label.iter().find(|class| usize::from(**class) >= classes) {
                return bad(format!("slice {} has class {class} of {classes}", slice.slice));
            }
        }
    }
    Ok(())
}
