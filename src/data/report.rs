//! What `cpcr data verify` and `cpcr data info` say, as data. Printing is the command line's.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use serde::Serialize;

use super::dataset::Dataset;
use super::error::DataError;
use super::manifest::Split;
use crate::types::ObjectDigest;

/// What one split holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
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
}

/// What a dataset holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
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
}

/// What a dataset's manifest says about it; fetches nothing more.
pub fn info(dataset: &Dataset) -> Result<Info, DataError> {
    let manifest = dataset.manifest();
    let splits = Split::ALL.map(|split| {
        let volumes = || manifest.volumes_of(split).map(|(_, volume)| volume);
        let patients = |labelled: bool| {
            let chosen = volumes().filter(|volume| volume.labelled || !labelled);
            chosen.map(|volume| &volume.patient).collect::<BTreeSet<_>>().len()
        };
        let info = SplitInfo {
            patients: patients(false),
            labelled_patients: patients(true),
            volumes: volumes().count(),
            labelled_volumes: volumes().filter(|volume| volume.labelled).count(),
            slices: manifest.rows(split),
            shards: manifest.shards_of(split).count(),
            bytes: manifest.shards_of(split).map(|shard| shard.digest.bytes).sum(),
        };
        (split.name(), info)
    });
    let patients = manifest.labelled_patients().len() as u32;
    Ok(Info {
        name: manifest.name.clone(),
        manifest: dataset.digest().clone(),
        format: manifest.format,
        classes: manifest.classes.clone(),
        channels: manifest.channel_count(),
        channel_names: manifest.channels.clone(),
        block_rows: manifest.block_rows,
        splits: splits.into(),
        labelled_slices: (1..=patients)
            .map(|patients| Ok(manifest.pools(patients)?.0.end))
            .collect::<Result<_, DataError>>()?,
    })
}

/// An object that is not what the manifest says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The shard concerned.
    pub object: String,
    /// What is wrong, and with which object.
    pub why: String,
}

/// The outcome of [`verify`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verified {
    /// The digest of the manifest that everything was compared with.
    pub manifest: ObjectDigest,
    /// Shards looked at.
    pub shards: usize,
    /// Bytes of shards that are as they should be.
    pub bytes: u64,
    /// What is not; empty for a sound dataset.
    pub problems: Vec<Problem>,
}

impl Verified {
    /// Whether nothing is wrong.
    pub fn is_sound(&self) -> bool {
        self.problems.is_empty()
    }
}

/// Re-reads everything, compares every hash and decodes every row, on `threads` threads.
///
/// That no patient is in two splits was checked when the dataset was opened.
pub fn verify(dataset: &Dataset, threads: usize) -> Verified {
    let shards = &dataset.manifest().shards;
    let next = AtomicUsize::new(0);
    let done: Mutex<(u64, Vec<Problem>)> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..threads.clamp(1, shards.len().max(1)) {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::SeqCst);
                    let Some(shard) = shards.get(number) else { return };
                    let result = dataset.verify_shard(number);
                    let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
                    match result {
                        Ok(bytes) => done.0 += bytes,
                        Err(error) => {
                            done.1
                                .push(Problem { object: shard.object.clone(), why: chain(&error) });
                        }
                    }
                }
            });
        }
    });
    let (bytes, mut problems) = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    problems.sort_by(|a, b| a.object.cmp(&b.object));
    Verified { manifest: dataset.digest().clone(), shards: shards.len(), bytes, problems }
}

/// An error with its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
