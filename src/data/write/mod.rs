//! Writes a dataset: cases in list order go in, shards, indexes and last the manifest come out.
//!
//! Cases are read on several threads, a few ahead; `layout` cuts their slices into shards, which are
//! encoded on the same threads and stored side by side; `journal` records what is stored, so that a write
//! that was cut short goes on where it was, to the same bytes. The manifest is written last, so a dataset
//! that was cut short does not exist. Memory holds the cases that are read ahead, one unfinished shard per
//! split and a few that are being stored.

mod journal;
mod layout;
mod plan;
mod pool;

use std::sync::Arc;

use bytes::Bytes;
use futures::channel::mpsc;
use futures::{SinkExt, StreamExt, TryStreamExt, stream};

use super::error::DataError;
use super::manifest::{
    CHANNELS_MAX, FORMAT_TABLES, MANIFEST_PATH, MAX_BLOCK_ROWS, Manifest, ShardEntry, Split,
    VolumeEntry, format_for, to_json,
};
use super::preprocess::Preprocessing;
use super::shard::{SliceRow, encode};
use super::source::ObjectWriter;
use super::statistics::{STATISTICS_PATH, Tally};
use super::tables::{LISTED_MAX, TABLE_VOLUMES, VolumeTable};
use crate::data::augment::Shape;
use crate::types::ObjectDigest;
use journal::{Journal, Recovered};
use layout::{Completed, Job, Layout, ReadVolume, ShardJob};
pub use plan::Plan;
pub(in crate::data) use plan::PlannedCase;
use pool::Pool;
pub use pool::{Meter, Work};

/// Shards that are encoded and stored side by side.
const SHARDS_MAX: usize = 4;

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
    /// About how many bytes a shard has, taking its pixels to shrink to half.
    pub shard_bytes: u64,
    /// The most blocks in each of a split's first 64 shards: a small dataset has some, too.
    pub shard_blocks: u32,
    /// zstd level, 1..=22.
    pub zstd_level: i32,
    /// Unlabelled training volumes that the manifest itself lists; the others go to volume tables.
    pub listed_max: usize,
    /// Volumes in each of these.
    pub table_volumes: usize,
}

impl WriteOptions {
    /// Blocks of 8 slices (about 1.5 MB of cardiac MRI), shards of 64 MiB, the first of at most 32 blocks.
    pub fn new(name: impl Into<String>, classes: &[&str]) -> Self {
        Self {
            name: name.into(),
            classes: classes.iter().map(|class| (*class).to_owned()).collect(),
            preprocessing: Preprocessing::default(),
            channels: Vec::new(),
            block_rows: 8,
            shard_bytes: 64 << 20,
            shard_blocks: 32,
            zstd_level: 3,
            listed_max: LISTED_MAX,
            table_volumes: TABLE_VOLUMES,
        }
    }

    /// The same with what `work` asks for.
    #[must_use]
    pub fn sized(mut self, work: &Work) -> Self {
        self.block_rows = work.block_rows.unwrap_or(self.block_rows);
        if let Some(shard_bytes) = work.shard_bytes {
            // Who asks for a size gets it from the first shard on.
            (self.shard_bytes, self.shard_blocks) = (shard_bytes, u32::MAX);
        }
        self
    }

    fn check(&self) -> Result<(), DataError> {
        let block_rows = u64::from(self.block_rows);
        if block_rows == 0
            || block_rows > MAX_BLOCK_ROWS
            || self.shard_blocks == 0
            || self.shard_bytes == 0
        {
            return Err(DataError::Unusable(format!(
                "blocks of {block_rows} rows and shards of {} bytes or {} blocks cannot be written \
                 (blocks have 1 to {MAX_BLOCK_ROWS} rows)",
                self.shard_bytes, self.shard_blocks
            )));
        }
        if self.channels.len() > CHANNELS_MAX {
            let channels = self.channels.len();
            let why = format!("images of {channels} channels: at most {CHANNELS_MAX} are written");
            return Err(DataError::Unusable(why));
        }
        Ok(())
    }

    fn channel_count(&self) -> usize {
        self.channels.len().max(1)
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

/// Takes volumes that are in memory, and writes them all at once: for few.
pub struct DatasetWriter {
    sink: Arc<dyn ObjectWriter>,
    options: WriteOptions,
    volumes: Vec<NewVolume>,
}

impl DatasetWriter {
    /// A writer into `sink`.
    pub fn new(sink: Arc<dyn ObjectWriter>, options: WriteOptions) -> Result<Self, DataError> {
        options.check()?;
        Ok(Self { sink, options, volumes: Vec::new() })
    }

    /// Adds a volume behind those of its split.
    pub async fn add(&mut self, volume: NewVolume) -> Result<(), DataError> {
        check(&volume, self.options.classes.len(), self.options.channel_count())?;
        self.volumes.push(volume);
        Ok(())
    }

    /// Writes them, then the manifest.
    pub async fn finish(self) -> Result<Manifest, DataError> {
        let plan = Plan::new([("volumes", self.volumes.len().to_string())]);
        let given = |volume: &NewVolume| Ok(vec![volume.clone()]);
        write(self.sink, &self.options, plan, self.volumes, given, &Work::on(1)).await
    }
}

/// Writes the dataset that `cases` make, in their order; `read` makes the volumes of one, on a thread of its
/// own. `plan` is what the result depends on: where `sink` holds a part of the same plan's dataset, that is
/// gone on with, and its cases are not read again.
///
/// # Errors
/// [`DataError::DatasetExists`] and [`DataError::ChangedImport`] where `sink` holds something else,
/// [`DataError::AnotherImport`] where somebody else writes there now, and whatever reading and storing say.
pub async fn write<C: Send + Sync + 'static>(
    sink: Arc<dyn ObjectWriter>,
    options: &WriteOptions,
    mut plan: Plan,
    cases: Vec<C>,
    read: impl Fn(&C) -> Result<Vec<NewVolume>, DataError> + Send + Sync + 'static,
    work: &Work,
) -> Result<Manifest, DataError> {
    options.check()?;
    plan.add_layout(options);
    let (mut journal, recovered) = Journal::open(Arc::clone(&sink), plan).await?;
    if let Some(manifest) = recovered.manifest {
        // All was there but for the end of the journal.
        journal.remove().await?;
        return Ok(manifest);
    }
    work.meter.start(cases.len() as u64);
    let source: (Vec<C>, Read<C>) = (cases, Arc::new(read));
    let (tally, manifest) =
        store_cases(sink.as_ref(), options, &mut journal, recovered, source, work).await?;
    let bytes = manifest.to_bytes()?;
    // What could not be opened again is not written either.
    Manifest::parse(&bytes)?;
    let statistics = tally.statistics(&manifest, ObjectDigest::of(&bytes));
    let statistics = to_json(STATISTICS_PATH, &statistics)?;
    put(sink.as_ref(), STATISTICS_PATH, statistics.into()).await?;
    let made = sink.create(MANIFEST_PATH, bytes.into()).await;
    if !made.map_err(|source| DataError::Write { object: MANIFEST_PATH.to_owned(), source })? {
        let why = "its manifest.json is there now, and is not the one of this import";
        return Err(DataError::AnotherImport(why.to_owned()));
    }
    journal.remove().await?;
    Ok(manifest)
}

/// What makes the volumes of a case.
type Read<C> = Arc<dyn Fn(&C) -> Result<Vec<NewVolume>, DataError> + Send + Sync>;

/// Reads cases and stores their shards and tables: two halves that run side by side, a channel between them.
async fn store_cases<C: Send + Sync + 'static>(
    sink: &dyn ObjectWriter,
    options: &WriteOptions,
    journal: &mut Journal,
    recovered: Recovered,
    (cases, read): (Vec<C>, Read<C>),
    work: &Work,
) -> Result<(Tally, Manifest), DataError> {
    let pool = &Pool::start(work.threads)?;
    let Recovered { mut cases_done, mut shards, mut tally, .. } = recovered;
    let mut layout = Layout::new(options, &shards);
    let (mut jobs, queued) = mpsc::channel::<Job>(0);
    let reading = async move {
        let read_case = |(number, case): (usize, C)| {
            let number = number as u32;
            let (done, read) = (cases_done.remove(&number), Arc::clone(&read));
            async move {
                match done {
                    Some(volumes) => Ok(ReadCase::Before(volumes)),
                    None => {
                        let volumes = read_case(pool, read, case, options, &work.meter).await?;
                        Ok::<_, DataError>(ReadCase::Now(number, volumes))
                    }
                }
            }
        };
        let ahead = work.threads.max(1) + 1;
        let mut cases = stream::iter(cases.into_iter().enumerate()).map(read_case).buffered(ahead);
        while let Some(case) = cases.try_next().await? {
            let made = match case {
                ReadCase::Before(volumes) => layout.skip(volumes)?,
                ReadCase::Now(number, volumes) => layout.add(number, volumes)?,
            };
            send(&mut jobs, made).await?;
            work.meter.add_case();
        }
        send(&mut jobs, layout.finish()?).await?;
        // `jobs` goes with this block: the other half then knows that all are there.
        Ok::<_, DataError>(layout.volumes)
    };
    let storing = async {
        let mut stored = queued.map(|job| store_job(sink, options, pool, job)).buffered(SHARDS_MAX);
        let mut tables = Vec::new();
        while let Some(stored) = stored.try_next().await? {
            match stored {
                Stored::Table(table) => tables.push(table),
                Stored::Shard(shard, completed) => {
                    completed.iter().for_each(|volume| tally.merge(&volume.tally));
                    journal.stored(&shard, completed, &tally).await?;
                    shards.push(shard);
                }
            }
        }
        Ok((tally, shards, tables))
    };
    let (volumes, (tally, shards, tables)) = futures::try_join!(reading, storing)?;
    Ok((tally, manifest_of(options, shards, volumes, tables)))
}

/// Reads, checks and counts a case, on the pool.
async fn read_case<C: Send + Sync + 'static>(
    pool: &Pool,
    read: Read<C>,
    case: C,
    options: &WriteOptions,
    meter: &Meter,
) -> Result<Vec<ReadVolume>, DataError> {
    let (classes, channels) = (options.classes.len(), options.channel_count());
    let work = move || {
        let checked = |volume| ReadVolume::new(volume, classes, channels);
        read(&case)?.into_iter().map(checked).collect::<Result<Vec<_>, DataError>>()
    };
    let volumes = pool.run(work).await??;
    meter.add_bytes(volumes.iter().map(ReadVolume::pixel_bytes).sum());
    Ok(volumes)
}

fn manifest_of(
    options: &WriteOptions,
    mut shards: Vec<ShardEntry>,
    volumes: Vec<VolumeEntry>,
    tables: Vec<VolumeTable>,
) -> Manifest {
    // Within a split they are in order already, whatever their numbers look like as text.
    shards.sort_by_key(|shard| shard.split);
    let palettes = shards.iter().any(|shard| shard.palettes);
    let tables_format = if tables.is_empty() { 1 } else { FORMAT_TABLES };
    let format = format_for(options.channels.len(), palettes).max(tables_format);
    Manifest {
        format,
        name: options.name.clone(),
        classes: options.classes.clone(),
        preprocessing: options.preprocessing,
        channels: options.channels.clone(),
        block_rows: u64::from(options.block_rows),
        shards,
        volumes,
        tables,
    }
}

/// What becomes of a case: its volumes, or what is known of them because all their rows are stored.
enum ReadCase {
    Before(Vec<VolumeEntry>),
    Now(u32, Vec<ReadVolume>),
}

async fn send(jobs: &mut mpsc::Sender<Job>, made: Vec<Job>) -> Result<(), DataError> {
    for job in made {
        // The other half has failed and says why itself.
        jobs.send(job).await.map_err(|_| DataError::Stopped)?;
    }
    Ok(())
}

enum Stored {
    Shard(ShardEntry, Vec<Completed>),
    Table(VolumeTable),
}

/// Encodes a shard on the pool and stores it with its index; or stores a table.
async fn store_job(
    sink: &dyn ObjectWriter,
    options: &WriteOptions,
    pool: &Pool,
    job: Job,
) -> Result<Stored, DataError> {
    let ShardJob { split, number, rows, completed } = match job {
        Job::Shard(job) => job,
        Job::Table(table, bytes) => {
            put(sink, &table.object, bytes).await?;
            return Ok(Stored::Table(table));
        }
    };
    let (block_rows, zstd_level) = (options.block_rows as usize, options.zstd_level);
    let encoded = pool.run(move || encode_shard(split, number, &rows, block_rows, zstd_level));
    let (shard, bytes, index) = encoded.await??;
    put(sink, &shard.object, bytes).await?;
    put(sink, &shard.index, index).await?;
    Ok(Stored::Shard(shard, completed))
}

/// A shard's entry, its bytes and those of its index.
fn encode_shard(
    split: Split,
    number: usize,
    rows: &[SliceRow],
    block_rows: usize,
    zstd_level: i32,
) -> Result<(ShardEntry, Bytes, Bytes), DataError> {
    let stem = format!("shards/{split}-{number:05}");
    let (object, index) = (format!("{stem}.parquet"), format!("{stem}.index.json"));
    let encoded = encode(&object, rows, block_rows, zstd_level)?;
    let index_bytes = to_json(&index, &encoded.index)?;
    let shard = ShardEntry {
        split,
        object,
        digest: ObjectDigest::of(&encoded.bytes),
        rows: rows.len() as u64,
        index,
        index_digest: ObjectDigest::of(&index_bytes),
        palettes: encoded.palettes,
    };
    Ok((shard, encoded.bytes, index_bytes.into()))
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

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
