//! The pools that are read: one of phantoms, and large ones that repeat one of its shards.
//!
//! A pool of ten million slices would be two terabytes. What its size can cost a loader is in its
//! manifest and its order, not in its pixels: so a large pool's manifest names the same shard again
//! and again, and is otherwise what an import would have written.

use std::sync::Arc;

use bytes::Bytes;

use super::{DataBenchError, DataOptions, Site};
use crate::data::Split;
use crate::data::manifest::{FORMAT, MANIFEST_PATH, Manifest, ShardEntry, VolumeEntry};
use crate::data::synth::{self, SynthOptions};
use crate::data::tables::{LISTED_MAX, TABLE_VOLUMES, VolumeTable};
use crate::data::write::Work;
use crate::store::{Store, StoreOptions};
use crate::types::ObjectDigest;

/// Intensities of a volume, about as many as ACDC's have.
const INTENSITY_STEPS: u32 = 400;
/// Slices of a volume: ACDC's have about ten.
const VOLUME_SLICES: u32 = 10;

/// What was made.
pub(super) struct Pool {
    pub slices: u64,
    /// As stored.
    pub bytes: u64,
    manifest: Manifest,
}

impl Pool {
    pub(super) fn largest_shard_bytes(&self) -> u64 {
        self.manifest.shards.iter().map(|shard| shard.digest.bytes).max().unwrap_or(0)
    }
}

/// Unlabelled phantoms, all of one size.
pub(super) async fn phantoms(site: &Site, options: &DataOptions) -> Result<Pool, DataBenchError> {
    let synth = SynthOptions {
        train_patients: options.patients,
        val_patients: 0,
        test_patients: 0,
        side_px: (options.side_px, options.side_px),
        slices: (VOLUME_SLICES, VOLUME_SLICES),
        labelled_patients: Some(0),
        intensity_steps: Some(INTENSITY_STEPS),
        ..SynthOptions::default()
    };
    let sink = open(site, "pool")?;
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let manifest = synth::write(Arc::new(sink), &synth, &Work::on(threads)).await?;
    let slices = manifest.rows(Split::Train);
    let bytes = manifest.shards.iter().map(|shard| shard.digest.bytes).sum();
    Ok(Pool { slices, bytes, manifest })
}

/// A pool of at least `slices` slices that repeats the first shard of `pool`, under `prefix`.
pub(super) async fn repeated(
    site: &Site,
    prefix: &str,
    pool: &Pool,
    slices: u64,
) -> Result<(), DataBenchError> {
    let bad = |why: &str| DataBenchError::Contender { who: prefix.to_owned(), why: why.to_owned() };
    let first: ShardEntry =
        pool.manifest.shards.first().cloned().ok_or_else(|| bad("an empty pool"))?;
    let (from, to) = (open(site, "pool")?, open(site, prefix)?);
    for object in [&first.object, &first.index] {
        to.put(object, from.get(object).await?).await?;
    }
    let count = slices.div_ceil(first.rows);
    let mut manifest = pool.manifest.clone();
    let mut listed = volumes(count * first.rows);
    let rest = listed.split_off(listed.len().min(LISTED_MAX));
    manifest.volumes = listed;
    // No trainer reads the tables themselves, so these are named and not written.
    manifest.tables = rest.chunks(TABLE_VOLUMES).enumerate().map(table).collect();
    if !manifest.tables.is_empty() {
        manifest.format = FORMAT;
    }
    manifest.shards = vec![first; count as usize];
    to.put(MANIFEST_PATH, Bytes::from(manifest.to_bytes()?)).await?;
    Ok(())
}

fn table((number, volumes): (usize, &[VolumeEntry])) -> VolumeTable {
    VolumeTable {
        object: format!("volumes/train-{number:05}.json"),
        digest: ObjectDigest::of(&number.to_le_bytes()),
        first_row: volumes.first().map_or(0, |volume| volume.first_row),
        rows: volumes.iter().map(|volume| u64::from(volume.slices)).sum(),
        volumes: volumes.len() as u32,
    }
}

/// As many volumes as make `slices` slices.
fn volumes(slices: u64) -> Vec<VolumeEntry> {
    let mut first_row = 0;
    let mut volumes = Vec::new();
    while first_row < slices {
        let rows = (slices - first_row).min(u64::from(VOLUME_SLICES));
        let number = volumes.len();
        volumes.push(VolumeEntry {
            name: format!("patient{number:07}_frame01"),
            patient: format!("patient{number:07}"),
            split: Split::Train,
            labelled: false,
            spacing_mm: Some([10.0, 1.4, 1.4]),
            affine: None,
            first_row,
            slices: rows as u32,
        });
        first_row += rows;
    }
    volumes
}

/// The place behind `prefix`, as any client sees it: the server hashes what comes through it, and
/// would hash files that were put beside it with every read.
pub(super) fn open(site: &Site, prefix: &str) -> Result<Store, DataBenchError> {
    let mut options = StoreOptions::default();
    for (key, value) in site.environment(&site.endpoint()) {
        options = options.with(key.to_ascii_lowercase(), value);
    }
    Ok(Store::open(&site.url(prefix), &options)?)
}
