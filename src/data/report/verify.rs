//! Whether a dataset is what its manifest says: every hash, every row's volume, every patient's split.
//!
//! Memory does not grow with the pool but by 16 bytes for each name of a volume: tables are read one after the
//! other, shards on a few threads.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use serde::Serialize;

use crate::data::dataset::Dataset;
use crate::data::error::DataError;
use crate::data::manifest::{Split, VolumeId};
use crate::data::shard::SliceRow;
use crate::data::statistics::{STATISTICS_PATH, Statistics};
use crate::data::tables::name_key;
use crate::data::write::Work;
use crate::types::ObjectDigest;

/// An object that is not what the manifest says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The shard, or the table, concerned.
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
    /// Volume tables looked at.
    pub tables: usize,
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

/// [`verify_watched`] with nobody watching.
pub fn verify(dataset: &Dataset, threads: usize) -> Verified {
    verify_watched(dataset, &Work::on(threads))
}

/// Re-reads everything, compares every hash, decodes every row and looks whose it is, on `work.threads`
/// threads; then looks for patients in two splits in the volume tables (of the volumes in the manifest that
/// was done when the dataset was opened).
pub fn verify_watched(dataset: &Dataset, work: &Work) -> Verified {
    let manifest = dataset.manifest();
    let shards = &manifest.shards;
    work.meter.start((shards.len() + manifest.tables.len()) as u64);
    let owners = Owners::new(dataset);
    let next = AtomicUsize::new(0);
    let done: Mutex<(u64, Vec<Problem>)> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..work.threads.clamp(1, shards.len().max(1)) {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::SeqCst);
                    let Some(shard) = shards.get(number) else { return };
                    let mut rows = Rows::new(&owners, number);
                    let result = dataset.verify_shard(number, |row| rows.look(row));
                    let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
                    match result {
                        Ok(bytes) => {
                            done.0 += bytes;
                            work.meter.add_bytes(bytes);
                        }
                        Err(error) => done.1.push(problem(&shard.object, &error)),
                    }
                    work.meter.add_case();
                }
            });
        }
    });
    let (bytes, mut problems) = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    problems.extend(tables(dataset, work));
    problems.extend(statistics(dataset));
    problems.sort_by(|a, b| a.object.cmp(&b.object));
    let manifest = dataset.digest().clone();
    let tables = dataset.manifest().tables.len();
    Verified { manifest, shards: shards.len(), tables, bytes, problems }
}

/// What is wrong with volume tables: at most one thing each.
fn tables(dataset: &Dataset, work: &Work) -> Vec<Problem> {
    let manifest = dataset.manifest();
    if manifest.tables.is_empty() {
        return Vec::new();
    }
    let mut names: HashSet<_> =
        manifest.volumes.iter().map(|volume| name_key(&volume.name)).collect();
    // Of training patients only those of other splits are asked for.
    let held_out = manifest.volumes.iter().filter(|volume| volume.split != Split::Train);
    let held_out: HashMap<_, Split> =
        held_out.map(|volume| (name_key(&volume.patient), volume.split)).collect();
    let mut problems = Vec::new();
    for (number, table) in manifest.tables.iter().enumerate() {
        work.meter.add_case();
        let volumes = match dataset.table(number) {
            Ok(volumes) => volumes,
            Err(error) => {
                problems.push(problem(&table.object, &error));
                continue;
            }
        };
        let why = volumes.iter().find_map(|volume| {
            if !names.insert(name_key(&volume.name)) {
                return Some(format!("two volumes are called `{}`", volume.name));
            }
            let split = held_out.get(&name_key(&volume.patient))?;
            Some(format!("patient `{}` is in train and in {split}", volume.patient))
        });
        problems.extend(why.map(|why| Problem { object: table.object.clone(), why }));
    }
    problems
}

/// Statistics that cannot be read, or are another dataset's. None is no problem.
fn statistics(dataset: &Dataset) -> Option<Problem> {
    let found = dataset.beside(STATISTICS_PATH);
    let parsed = found.and_then(|bytes| match bytes {
        Some(bytes) => Statistics::parse(&bytes, dataset.digest()).map(|_| ()),
        None => Ok(()),
    });
    parsed.err().map(|error| problem(STATISTICS_PATH, &error))
}

/// Which volume a row belongs to.
struct Owners<'a> {
    dataset: &'a Dataset,
    /// Of each split, volumes that the manifest lists, by first row.
    listed: [Vec<(u64, VolumeId)>; 3],
    /// The first row of each shard within its split.
    shards: Vec<u64>,
}

impl<'a> Owners<'a> {
    fn new(dataset: &'a Dataset) -> Self {
        let manifest = dataset.manifest();
        let mut next = [0; 3];
        let first = |shard: &crate::data::manifest::ShardEntry| {
            let row = next[shard.split as usize];
            next[shard.split as usize] += shard.rows;
            row
        };
        let shards = manifest.shards.iter().map(first).collect();
        let listed = Split::ALL.map(|split| {
            manifest.volumes_of(split).map(|(id, volume)| (volume.first_row, id)).collect()
        });
        Self { dataset, listed, shards }
    }

    /// The volume that has row `row` of `split`, and all its rows.
    fn of(&self, split: Split, row: u64) -> Result<(VolumeId, Range<u64>), DataError> {
        let manifest = self.dataset.manifest();
        let tables = if split == Split::Train { manifest.tables.as_slice() } else { &[] };
        let id = match tables.partition_point(|table| table.first_row <= row).checked_sub(1) {
            None => {
                let listed = &self.listed[split as usize];
                let at = listed.partition_point(|(first, _)| *first <= row).checked_sub(1);
                at.map(|at| listed[at].1)
            }
            Some(number) => {
                let volumes = self.dataset.table(number)?;
                let at = volumes.partition_point(|volume| volume.first_row <= row).checked_sub(1);
                at.map(|at| VolumeId(manifest.first_of_table(number).0 + at as u32))
            }
        };
        let none = || DataError::Unusable(format!("row {row} of {split} is no volume's"));
        let id = id.ok_or_else(none)?;
        Ok((id, self.dataset.volume_entry(id)?.rows()))
    }
}

/// Looks at the rows of one shard, in order.
struct Rows<'a> {
    owners: &'a Owners<'a>,
    split: Split,
    next: u64,
    owner: VolumeId,
    rows: Range<u64>,
    /// Slices of the volume in this shard.
    slices: HashSet<u32>,
}

impl<'a> Rows<'a> {
    fn new(owners: &'a Owners<'a>, shard: usize) -> Self {
        let split = owners.dataset.manifest().shards[shard].split;
        let next = owners.shards[shard];
        Self { owners, split, next, owner: VolumeId(0), rows: 0..0, slices: HashSet::new() }
    }

    fn look(&mut self, row: &SliceRow) -> Result<(), String> {
        if !self.rows.contains(&self.next) {
            let found = self.owners.of(self.split, self.next);
            (self.owner, self.rows) = found.map_err(|error| error.to_string())?;
            self.slices.clear();
        }
        let VolumeId(owner) = self.owner;
        if row.volume != owner {
            return Err(format!("row {} is of volume {}, not {owner}", self.next, row.volume));
        }
        if !self.slices.insert(row.slice) {
            return Err(format!("slice {} of volume {owner} is there twice", row.slice));
        }
        self.next += 1;
        Ok(())
    }
}

fn problem(object: &str, error: &DataError) -> Problem {
    Problem { object: object.to_owned(), why: chain(error) }
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
