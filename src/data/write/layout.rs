//! Where rows go: which volume has which number, which rows make a shard, which volumes go to a table.
//!
//! Pure: volumes in list order go in, shards to encode and tables to store come out. It is a function of the
//! volumes alone, so that a write that goes on cuts the same shards as one that was never interrupted.

use std::collections::{HashMap, HashSet, VecDeque};

use bytes::Bytes;

use super::{NewVolume, WriteOptions, check};
use crate::data::error::DataError;
use crate::data::manifest::{ShardEntry, Split, VolumeEntry, VolumeId};
use crate::data::shard::SliceRow;
use crate::data::statistics::Tally;
use crate::data::tables::{NameKey, VolumeTable, name_key};

/// Shards of a split that are kept small: see [`WriteOptions::shard_blocks`].
const SMALL_SHARDS: usize = 64;

/// A volume that was read, checked and counted.
pub(super) struct ReadVolume {
    /// As it will be listed, but for its first row.
    entry: VolumeEntry,
    rows: Vec<SliceRow>,
    tally: Tally,
}

impl ReadVolume {
    pub(super) fn new(
        volume: NewVolume,
        classes: usize,
        channels: usize,
    ) -> Result<Self, DataError> {
        check(&volume, classes, channels)?;
        let entry = VolumeEntry {
            name: volume.name,
            patient: volume.patient,
            split: volume.split,
            labelled: volume.slices.iter().all(|slice| slice.label.is_some()),
            spacing_mm: volume.spacing_mm,
            affine: volume.affine,
            first_row: 0,
            slices: volume.slices.len() as u32,
        };
        let rows = volume.slices.into_iter().map(|slice| SliceRow {
            volume: 0,
            slice: slice.slice,
            channels,
            shape: slice.shape,
            image: slice.image.into(),
            label: slice.label.map(Into::into),
        });
        let rows: Vec<SliceRow> = rows.collect();
        let tally = Tally::of(entry.split, &rows, channels, classes);
        Ok(Self { entry, rows, tally })
    }

    pub(super) fn pixel_bytes(&self) -> u64 {
        self.rows.iter().map(|row| row.memory_bytes() as u64).sum()
    }
}

/// A volume all of whose rows are in shards by now.
#[derive(Debug)]
pub(super) struct Completed {
    /// The case it is of, and how many volumes that has.
    pub case: u32,
    pub of: u32,
    pub volume: VolumeEntry,
    pub tally: Tally,
}

/// A shard to encode and store.
#[derive(Debug)]
pub(super) struct ShardJob {
    pub split: Split,
    pub number: usize,
    pub rows: Vec<SliceRow>,
    /// Volumes whose last row it has.
    pub completed: Vec<Completed>,
}

/// What is to be stored next.
#[derive(Debug)]
pub(super) enum Job {
    Shard(ShardJob),
    Table(VolumeTable, Bytes),
}

/// One split's rows.
#[derive(Debug, Default)]
struct Rows {
    /// Not in a shard yet.
    pending: Vec<SliceRow>,
    pending_bytes: u64,
    /// In shards, from this run or an earlier one.
    cut: u64,
    shards: usize,
    /// Of all volumes so far.
    added: u64,
    /// Volumes with pending rows.
    open: VecDeque<Completed>,
}

/// The dataset so far.
pub(super) struct Layout {
    block_rows: usize,
    shard_bytes: u64,
    shard_blocks: usize,
    listed_max: usize,
    table_volumes: usize,
    splits: [Rows; 3],
    names: HashSet<NameKey>,
    patients: HashMap<NameKey, Split>,
    /// Volumes that the manifest lists.
    pub volumes: Vec<VolumeEntry>,
    unlabelled: usize,
    /// Volumes for the next table.
    tabled: Vec<VolumeEntry>,
    tables: usize,
    in_tables: u32,
}

impl Layout {
    /// An empty one, but for the rows of `shards`, which are stored.
    pub(super) fn new(options: &WriteOptions, shards: &[ShardEntry]) -> Self {
        let mut splits: [Rows; 3] = Default::default();
        for shard in shards {
            let rows = &mut splits[shard.split as usize];
            rows.cut += shard.rows;
            rows.shards += 1;
        }
        Self {
            block_rows: options.block_rows as usize,
            shard_bytes: options.shard_bytes,
            shard_blocks: options.shard_blocks as usize,
            listed_max: options.listed_max,
            table_volumes: options.table_volumes.max(1),
            splits,
            names: HashSet::new(),
            patients: HashMap::new(),
            volumes: Vec::new(),
            unlabelled: 0,
            tabled: Vec::new(),
            tables: 0,
            in_tables: 0,
        }
    }

    /// The volumes of case number `case`.
    pub(super) fn add(
        &mut self,
        case: u32,
        volumes: Vec<ReadVolume>,
    ) -> Result<Vec<Job>, DataError> {
        let of = volumes.len() as u32;
        let mut jobs = Vec::new();
        for ReadVolume { mut entry, rows, tally } in volumes {
            let split = entry.split;
            entry.first_row = self.splits[split as usize].added;
            let id = self.list(entry.clone(), &mut jobs)?;
            let mut stored = entry.first_row;
            let last = entry.rows().end;
            if last > self.splits[split as usize].cut {
                let completed = Completed { case, of, volume: entry, tally };
                self.splits[split as usize].open.push_back(completed);
            }
            for row in rows {
                stored += 1;
                // What an earlier run has stored is not stored again.
                if stored > self.splits[split as usize].cut {
                    self.push(split, SliceRow { volume: id.0, ..row }, &mut jobs);
                }
            }
        }
        Ok(jobs)
    }

    /// Volumes of a case all of whose rows an earlier run has stored.
    pub(super) fn skip(&mut self, volumes: Vec<VolumeEntry>) -> Result<Vec<Job>, DataError> {
        let mut jobs = Vec::new();
        for entry in volumes {
            let rows = &self.splits[entry.split as usize];
            if entry.first_row != rows.added || entry.rows().end > rows.cut {
                let why = "the journal has other rows for it: remove the destination's `import`";
                return Err(DataError::invalid(entry.name, why));
            }
            self.list(entry, &mut jobs)?;
        }
        Ok(jobs)
    }

    /// The shards and the table that are not full.
    pub(super) fn finish(&mut self) -> Result<Vec<Job>, DataError> {
        let mut jobs = Vec::new();
        for split in Split::ALL {
            if !self.splits[split as usize].pending.is_empty() {
                jobs.push(self.cut(split));
            }
        }
        self.seal_table(&mut jobs)?;
        Ok(jobs)
    }

    /// Numbers a volume and lists it, in the manifest or in a table.
    fn list(&mut self, entry: VolumeEntry, jobs: &mut Vec<Job>) -> Result<VolumeId, DataError> {
        if !self.names.insert(name_key(&entry.name)) {
            return Err(DataError::invalid(&entry.name, "two volumes are called so"));
        }
        let split = *self.patients.entry(name_key(&entry.patient)).or_insert(entry.split);
        if split != entry.split {
            let why = format!("patient `{}` is in {split} and in {}", entry.patient, entry.split);
            return Err(DataError::invalid(&entry.name, why));
        }
        let pool = entry.split == Split::Train && !entry.labelled;
        if entry.split == Split::Train && entry.labelled && self.unlabelled > 0 {
            return Err(DataError::invalid(&entry.name, "it has labels, one before it has none"));
        }
        self.splits[entry.split as usize].added += u64::from(entry.slices);
        self.unlabelled += usize::from(pool);
        if !pool || self.unlabelled <= self.listed_max {
            self.volumes.push(entry);
            return Ok(VolumeId(self.volumes.len() as u32 - 1));
        }
        let id = VolumeId(VolumeId::TABLED_FIRST + self.in_tables);
        self.in_tables += 1;
        self.tabled.push(entry);
        if self.tabled.len() == self.table_volumes {
            self.seal_table(jobs)?;
        }
        Ok(id)
    }

    fn seal_table(&mut self, jobs: &mut Vec<Job>) -> Result<(), DataError> {
        if !self.tabled.is_empty() {
            let (table, bytes) = VolumeTable::seal(self.tables, std::mem::take(&mut self.tabled))?;
            self.tables += 1;
            jobs.push(Job::Table(table, bytes));
        }
        Ok(())
    }

    /// Adds a row, and cuts a shard where a block ends and the shard is full.
    fn push(&mut self, split: Split, row: SliceRow, jobs: &mut Vec<Job>) {
        let rows = &mut self.splits[split as usize];
        // Slices of most scanners shrink to a half or less.
        rows.pending_bytes += row.memory_bytes() as u64 / 2;
        rows.pending.push(row);
        let whole = rows.pending.len().is_multiple_of(self.block_rows);
        let blocks = rows.pending.len() / self.block_rows;
        let small = rows.shards < SMALL_SHARDS && blocks >= self.shard_blocks;
        if whole && (small || rows.pending_bytes >= self.shard_bytes) {
            jobs.push(self.cut(split));
        }
    }

    fn cut(&mut self, split: Split) -> Job {
        let rows = &mut self.splits[split as usize];
        let cut = std::mem::take(&mut rows.pending);
        rows.pending_bytes = 0;
        rows.cut += cut.len() as u64;
        rows.shards += 1;
        let complete = |volume: &Completed| volume.volume.rows().end <= rows.cut;
        let count = rows.open.iter().take_while(|volume| complete(volume)).count();
        let completed = rows.open.drain(..count).collect();
        Job::Shard(ShardJob { split, number: rows.shards - 1, rows: cut, completed })
    }
}
