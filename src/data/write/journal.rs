//! The progress of a write, beside the dataset that it makes: `import/00000001.json` and so on.
//!
//! Records are only ever created, each under the next number, and removed together once the manifest is
//! there. The first says what is made of what; one follows each shard that is stored. Whoever goes on begins
//! with a record of its own: of two at once, the one that finds its number taken has lost and stops. What the
//! loser stored meanwhile are the same bytes, because both follow the same plan.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use serde::{Deserialize, Serialize};

use super::layout::Completed;
use super::plan::Plan;
use crate::data::error::DataError;
use crate::data::manifest::{MANIFEST_PATH, Manifest, ShardEntry, VolumeEntry, check_format};
use crate::data::source::{ObjectWriter, SourceError};
use crate::data::statistics::Tally;
use crate::store::unique_id;

/// Where records lie.
const FOLDER: &str = "import";

/// The newest format of records that this program reads.
const FORMAT: u32 = 1;

/// Records that are read or removed side by side.
const RECORDS_MAX: usize = 16;

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    format: u32,
    writer: Writer,
    event: Event,
}

/// Who wrote a record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Writer {
    id: String,
    host: String,
    process: u32,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Event {
    /// Somebody began.
    Begun(Plan),
    /// Somebody went on.
    Resumed,
    /// A shard is stored, with its index.
    Stored {
        shard: ShardEntry,
        /// Volumes that are complete with it.
        volumes: Vec<DoneVolume>,
        /// Of all volumes that are complete.
        tally: Tally,
    },
}

/// A volume, its case, and how many volumes that has.
#[derive(Debug, Serialize, Deserialize)]
struct DoneVolume {
    case: u32,
    of: u32,
    volume: VolumeEntry,
    /// The volume's fractions once more, to the last bit: this program's parser rounds decimal ones.
    bits: Vec<u64>,
}

impl DoneVolume {
    fn new(mut done: Completed) -> Self {
        let bits = fractions(&mut done.volume).map(|value| value.to_bits()).collect();
        Self { case: done.case, of: done.of, volume: done.volume, bits }
    }

    fn exact(mut self) -> VolumeEntry {
        for (value, bits) in fractions(&mut self.volume).zip(&self.bits) {
            *value = f64::from_bits(*bits);
        }
        self.volume
    }
}

fn fractions(volume: &mut VolumeEntry) -> impl Iterator<Item = &mut f64> {
    let affine = volume.affine.iter_mut().flatten().flatten();
    volume.spacing_mm.iter_mut().flatten().chain(affine)
}

/// What an earlier run has left.
#[derive(Debug, Default)]
pub(super) struct Recovered {
    /// The manifest, where all is done but the end of the journal.
    pub manifest: Option<Manifest>,
    /// Stored shards, in the order in which they were.
    pub shards: Vec<ShardEntry>,
    /// Cases all of whose volumes are in these.
    pub cases_done: HashMap<u32, Vec<VolumeEntry>>,
    /// What was counted in volumes that are complete.
    pub tally: Tally,
}

/// Writes records.
pub(super) struct Journal {
    sink: Arc<dyn ObjectWriter>,
    writer: Writer,
    next: u64,
}

impl Journal {
    /// Begins a journal, or goes on with the one that is there.
    pub(super) async fn open(
        sink: Arc<dyn ObjectWriter>,
        plan: Plan,
    ) -> Result<(Self, Recovered), DataError> {
        let writer = Writer {
            id: unique_id(),
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            process: std::process::id(),
        };
        let paths = list(sink.as_ref()).await?;
        let mut journal = Self { sink, writer, next: paths.len() as u64 + 1 };
        if paths.is_empty() {
            journal.refuse_dataset().await?;
            journal.write(Event::Begun(plan)).await?;
            // Another import may have ended, and removed its journal, since the look before.
            if let Err(error) = journal.refuse_dataset().await {
                journal.remove().await?;
                return Err(error);
            }
            return Ok((journal, Recovered::default()));
        }
        let manifest = journal.manifest().await?;
        if manifest.is_some() && paths[0] != path_of(1) {
            // Left by one that was overtaken: nobody knows any more of what.
            return Err(DataError::DatasetExists);
        }
        journal.check_plan(&paths[0], &plan).await?;
        if manifest.is_some() {
            return Ok((journal, Recovered { manifest, ..Recovered::default() }));
        }
        let recovered = journal.recover(&paths).await?;
        journal.write(Event::Resumed).await?;
        tracing::info!(shards = recovered.shards.len(), "going on with an earlier import");
        Ok((journal, recovered))
    }

    /// Refuses to go on with what was begun with another plan.
    async fn check_plan(&self, first: &str, plan: &Plan) -> Result<(), DataError> {
        let record = read(self.sink.as_ref(), first).await?;
        match record.event {
            Event::Begun(begun) if first == path_of(1) => match plan.difference(&begun) {
                Some(difference) => Err(DataError::ChangedImport(difference)),
                None => Ok(()),
            },
            _ => Err(DataError::invalid(first, "the records before it are missing")),
        }
    }

    /// Reads all records, in order.
    async fn recover(&self, paths: &[String]) -> Result<Recovered, DataError> {
        let mut recovered = Recovered::default();
        let mut cases: HashMap<u32, (u32, Vec<VolumeEntry>)> = HashMap::new();
        let records = stream::iter(paths).map(|path| read(self.sink.as_ref(), path));
        let mut records = records.buffered(RECORDS_MAX).enumerate();
        while let Some((at, record)) = records.next().await {
            let record = record?;
            let invalid = |why: &str| Err(DataError::invalid(&paths[at], why));
            if paths[at] != path_of(at as u64 + 1) {
                return invalid("a record before it is missing");
            }
            match record.event {
                Event::Begun(_) if at == 0 => {}
                Event::Stored { shard, volumes, tally } if at > 0 => {
                    recovered.shards.push(shard);
                    recovered.tally = tally;
                    for done in volumes {
                        let case = cases.entry(done.case).or_insert((done.of, Vec::new()));
                        case.1.push(done.exact());
                    }
                }
                Event::Resumed if at > 0 => {}
                _ => return invalid("it stands in the wrong place"),
            }
        }
        let whole = cases.into_iter().filter(|(_, (of, volumes))| volumes.len() == *of as usize);
        recovered.cases_done = whole.map(|(case, (_, volumes))| (case, volumes)).collect();
        Ok(recovered)
    }

    /// Records that `shard` is stored.
    pub(super) async fn stored(
        &mut self,
        shard: &ShardEntry,
        completed: Vec<Completed>,
        tally: &Tally,
    ) -> Result<(), DataError> {
        let volumes = completed.into_iter().map(DoneVolume::new).collect();
        self.write(Event::Stored { shard: shard.clone(), volumes, tally: tally.clone() }).await
    }

    /// Removes all records: the dataset is there.
    pub(super) async fn remove(&self) -> Result<(), DataError> {
        let mut paths = list(self.sink.as_ref()).await?;
        // The first goes last: while any is there, the plan is.
        paths.reverse();
        let Some(first) = paths.pop() else { return Ok(()) };
        let remove = |path: String| async move {
            let removed = self.sink.delete(&path).await;
            removed.map_err(|source| DataError::Write { object: path, source })
        };
        let others = stream::iter(paths).map(remove).buffered(RECORDS_MAX);
        others.try_collect::<Vec<()>>().await?;
        remove(first).await
    }

    async fn write(&mut self, event: Event) -> Result<(), DataError> {
        let object = path_of(self.next);
        let record = Record { format: FORMAT, writer: self.writer.clone(), event };
        let mut bytes =
            serde_json::to_vec(&record).map_err(|error| DataError::invalid(&object, error))?;
        bytes.push(b'\n');
        let created = self.sink.create(&object, Bytes::from(bytes)).await;
        if created.map_err(|source| DataError::Write { object: object.clone(), source })? {
            self.next += 1;
            return Ok(());
        }
        let other = read(self.sink.as_ref(), &object).await?.writer;
        Err(DataError::AnotherImport(format!(
            "process {} on {} has written {object}",
            other.process, other.host
        )))
    }

    async fn manifest(&self) -> Result<Option<Manifest>, DataError> {
        match self.sink.get(MANIFEST_PATH).await {
            Ok(bytes) => Manifest::parse(&bytes).map(Some),
            Err(SourceError::NotFound) => Ok(None),
            Err(error) => Err(DataError::read(MANIFEST_PATH, error)),
        }
    }

    async fn refuse_dataset(&self) -> Result<(), DataError> {
        match self.sink.get(MANIFEST_PATH).await {
            Ok(_) => Err(DataError::DatasetExists),
            Err(SourceError::NotFound) => Ok(()),
            Err(error) => Err(DataError::read(MANIFEST_PATH, error)),
        }
    }
}

fn path_of(number: u64) -> String {
    format!("{FOLDER}/{number:08}.json")
}

async fn list(sink: &dyn ObjectWriter) -> Result<Vec<String>, DataError> {
    sink.list(FOLDER).await.map_err(|error| DataError::read(FOLDER, error))
}

async fn read(sink: &dyn ObjectWriter, path: &str) -> Result<Record, DataError> {
    let bytes = sink.get(path).await.map_err(|error| DataError::read(path, error))?;
    check_format(path, &bytes, FORMAT)?;
    serde_json::from_slice(&bytes).map_err(|error| DataError::invalid(path, error))
}
