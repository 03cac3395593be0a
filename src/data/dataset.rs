//! An opened dataset: verified blocks and volumes, fetched on a small runtime of its own.
//!
//! Everything here blocks the calling thread and may be called from any thread; the waiting is
//! done by the runtime, so a caller that is told to stop leaves at once. What is returned has been
//! verified against the manifest, through the index of its shard. Nothing but a bounded number of
//! footers is kept: caching blocks is the loader's business.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream;

use super::augment::Shape;
use super::error::DataError;
use super::fetch::{agreed, verified};
use super::manifest::{
    MANIFEST_PATH, Manifest, ShardEntry, ShardIndex, Split, VolumeEntry, VolumeId,
};
use super::shard::{ShardFooter, SliceRow};
use super::source::ObjectReader;
use crate::store::ReadFaults;
use crate::types::ObjectDigest;

/// Footers kept parsed. A rank walks a few stretches, each within one shard at a time.
const FOOTERS_MAX: usize = 64;

/// Blocks fetched side by side by one call.
const FETCHES_MAX: usize = 8;

/// How often a waiting thread looks whether it has been told to stop.
const STOP_POLL: Duration = Duration::from_millis(20);

/// Set once to make every blocking call of a loader return.
#[derive(Debug, Clone, Default)]
pub struct StopFlag(Arc<AtomicBool>);

impl StopFlag {
    /// Makes those who wait return.
    pub fn stop(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Whether [`Self::stop`] has been called.
    pub fn is_stopped(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// A whole volume, as evaluation wants it.
#[derive(Debug, Clone, PartialEq)]
pub struct Volume {
    /// Its name.
    pub name: String,
    /// Slices, rows, columns.
    pub shape: [usize; 3],
    /// Channels of its images, at least one.
    pub channels: usize,
    /// Intensities `[D, C, H, W]`.
    pub slices: Vec<f32>,
    /// Classes `[D, H, W]`, where they are known.
    pub labels: Option<Vec<u8>>,
    /// Millimetres between voxels along (slice, row, column), where the source says.
    pub spacing_mm: Option<[f64; 3]>,
    /// Voxel index to patient space, where the source says.
    pub affine: Option<[[f64; 4]; 4]>,
}

/// A shard's index and footer.
#[derive(Debug)]
struct OpenShard {
    index: ShardIndex,
    footer: ShardFooter,
}

/// Stops the runtime without waiting: it may be dropped on an async thread.
#[derive(Debug)]
struct IoRuntime(Option<tokio::runtime::Runtime>);

impl Drop for IoRuntime {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// Shard numbers (into the manifest) of one split, each with its first block.
#[derive(Debug, Default)]
struct SplitBlocks {
    shards: Vec<(u64, usize)>,
}

struct Inner {
    reader: Arc<dyn ObjectReader>,
    runtime: IoRuntime,
    manifest: Manifest,
    digest: ObjectDigest,
    splits: [SplitBlocks; 3],
    /// Most recently used last.
    open: Mutex<VecDeque<(usize, Arc<OpenShard>)>>,
}

/// A dataset whose manifest has been read and checked. Cheap to clone.
#[derive(Clone)]
pub struct Dataset {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for Dataset {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dataset").field("name", &self.inner.manifest.name).finish_non_exhaustive()
    }
}

impl Dataset {
    /// Fetches and checks the manifest.
    pub fn open(reader: Arc<dyn ObjectReader>) -> Result<Self, DataError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("cpcr-data-io")
            .enable_all()
            .build()
            .map_err(|error| DataError::Thread(format!("start the data runtime: {error}")))?;
        let runtime = IoRuntime(Some(runtime));
        let source = Arc::clone(&reader);
        let manifest = async move { agreed(&*source, MANIFEST_PATH).await };
        let bytes = wait(&runtime, &StopFlag::default(), manifest)??;
        let manifest = Manifest::parse(&bytes)?;
        let mut splits: [SplitBlocks; 3] = Default::default();
        for (number, shard) in manifest.shards.iter().enumerate() {
            let shards = &mut splits[shard.split as usize].shards;
            let first = shards.last().map_or(0, |(first, previous)| {
                first + manifest.shards[*previous].rows.div_ceil(manifest.block_rows)
            });
            shards.push((first, number));
        }
        let digest = ObjectDigest::of(&bytes);
        let open = Mutex::default();
        Ok(Self { inner: Arc::new(Inner { reader, runtime, manifest, digest, splits, open }) })
    }

    /// What the dataset says about itself.
    pub fn manifest(&self) -> &Manifest {
        &self.inner.manifest
    }

    /// Length and hash of the manifest: the dataset's identity.
    pub fn digest(&self) -> &ObjectDigest {
        &self.inner.digest
    }

    /// The volumes of `split`, in list order.
    pub fn volumes(&self, split: Split) -> Vec<VolumeId> {
        self.manifest().volumes_of(split).map(|(id, _)| id).collect()
    }

    /// A volume's entry in the manifest.
    pub fn volume_entry(&self, id: VolumeId) -> Result<&VolumeEntry, DataError> {
        let entry = self.manifest().volumes.get(id.0 as usize);
        entry.ok_or_else(|| DataError::Unusable(format!("there is no volume number {}", id.0)))
    }

    /// Fetches a volume, its slices in anatomical order.
    pub fn load_volume(&self, id: VolumeId) -> Result<Volume, DataError> {
        let entry = self.volume_entry(id)?;
        let wanted = entry.rows();
        let block_rows = self.manifest().block_rows;
        let blocks: Vec<u64> =
            (wanted.start / block_rows..wanted.end.div_ceil(block_rows)).collect();
        let decoded = self.fetch_blocks(entry.split, &blocks, &StopFlag::default())?;
        let mut rows: Vec<SliceRow> = decoded
            .into_iter()
            .zip(&blocks)
            .flat_map(|(rows, block)| (block * block_rows..).zip(rows))
            .filter(|(number, _)| wanted.contains(number))
            .map(|(_, row)| row)
            .collect();
        rows.sort_by_key(|row| row.slice);
        assemble(id, entry, rows)
    }

    /// Fetches, verifies and decodes blocks of `split`; in the order asked for.
    pub(crate) fn fetch_blocks(
        &self,
        split: Split,
        blocks: &[u64],
        stop: &StopFlag,
    ) -> Result<Vec<Vec<SliceRow>>, DataError> {
        let inner = Arc::clone(&self.inner);
        let places: Vec<(usize, usize)> =
            blocks.iter().map(|block| self.place(split, *block)).collect::<Result<_, _>>()?;
        let fetched: Vec<_> = wait(&self.inner.runtime, stop, async move {
            let fetches = places.into_iter().map(|place| fetch_group(Arc::clone(&inner), place));
            stream::iter(fetches).buffered(FETCHES_MAX).collect::<Vec<_>>().await
        })?;
        // Decoding is work for the calling thread, not for the one that serves the network.
        fetched
            .into_iter()
            .map(|fetched| {
                let (shard, group, bytes) = fetched?;
                self.decode(&shard, group, bytes)
            })
            .collect()
    }

    /// What went wrong with reads so far, and was cured: see [`ReadFaults`].
    pub fn read_faults(&self) -> ReadFaults {
        self.inner.reader.read_faults()
    }

    /// Re-reads every object of a shard in full and compares all hashes with the manifest.
    pub(crate) fn verify_shard(&self, number: usize) -> Result<u64, DataError> {
        let inner = Arc::clone(&self.inner);
        let (shard, bytes) = wait(&self.inner.runtime, &StopFlag::default(), async move {
            let shard = open_shard(&inner, number).await?;
            let entry = &inner.manifest.shards[number];
            let what = "the whole object";
            let bytes = verified(&*inner.reader, &entry.object, None, &entry.digest, what).await?;
            Ok::<_, DataError>((shard, bytes))
        })??;
        for (number, group) in shard.index.groups.iter().enumerate() {
            let start = group.offset as usize;
            let bytes = bytes.slice(start..start + group.digest.bytes as usize);
            if !group.digest.matches(&bytes) {
                return Err(DataError::invalid(&shard.index.object, "the index has other hashes"));
            }
            self.decode(&shard, number, bytes)?;
        }
        Ok(bytes.len() as u64)
    }

    /// The rows of a shard's row group, with as many channels as the manifest says.
    fn decode(
        &self,
        shard: &OpenShard,
        group: usize,
        bytes: Bytes,
    ) -> Result<Vec<SliceRow>, DataError> {
        let rows = shard.footer.decode(group, &shard.index.groups[group], bytes)?;
        let channels = self.manifest().channel_count();
        match rows.iter().find(|row| row.channels != channels) {
            None => Ok(rows),
            Some(row) => {
                let why = format!("images of {} channels, not {channels}", row.channels);
                Err(DataError::invalid(&shard.index.object, why))
            }
        }
    }

    /// (shard number in the manifest, row group in it) of a block.
    fn place(&self, split: Split, block: u64) -> Result<(usize, usize), DataError> {
        let shards = &self.inner.splits[split as usize].shards;
        let after = shards.partition_point(|(first, _)| *first <= block);
        let found = after.checked_sub(1).map(|at| shards[at]);
        let (first, number) = found.ok_or_else(|| no_block(split, block))?;
        let groups = self.manifest().shards[number].rows.div_ceil(self.manifest().block_rows);
        if block - first >= groups {
            return Err(no_block(split, block));
        }
        Ok((number, (block - first) as usize))
    }
}

fn no_block(split: Split, block: u64) -> DataError {
    DataError::Unusable(format!("there is no block {block} in the {split} split"))
}

fn assemble(id: VolumeId, entry: &VolumeEntry, rows: Vec<SliceRow>) -> Result<Volume, DataError> {
    let name = || entry.name.clone();
    if rows.iter().any(|row| row.volume != id.0) || rows.len() != entry.slices as usize {
        return Err(DataError::invalid(name(), "its rows belong to another volume"));
    }
    let shape: Shape = rows.first().map_or((0, 0), |row| row.shape);
    if rows.iter().any(|row| row.shape != shape) {
        return Err(DataError::invalid(name(), "its slices are not all of one shape"));
    }
    let labels = rows.iter().map(|row| row.label.as_deref()).collect::<Option<Vec<_>>>();
    Ok(Volume {
        name: name(),
        shape: [rows.len(), shape.0, shape.1],
        channels: rows.first().map_or(1, |row| row.channels),
        labels: labels.map(|labels| labels.concat()),
        slices: rows.into_iter().flat_map(|row| row.image).collect(),
        spacing_mm: entry.spacing_mm,
        affine: entry.affine,
    })
}

/// Runs `future` on the runtime and waits for it, or until told to stop.
fn wait<T: Send + 'static>(
    runtime: &IoRuntime,
    stop: &StopFlag,
    future: impl Future<Output = T> + Send + 'static,
) -> Result<T, DataError> {
    let runtime = runtime.0.as_ref().ok_or(DataError::Stopped)?;
    let (send, receive) = mpsc::sync_channel(1);
    let task = runtime.spawn(async move {
        // A receiver that is gone was told to stop and wants nothing any more.
        send.send(future.await).ok();
    });
    loop {
        match receive.recv_timeout(STOP_POLL) {
            Ok(value) => return Ok(value),
            Err(mpsc::RecvTimeoutError::Timeout) if stop.is_stopped() => {
                task.abort();
                return Err(DataError::Stopped);
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                return Err(DataError::Thread("a fetch did not finish".to_owned()));
            }
        }
    }
}

type Group = (Arc<OpenShard>, usize, Bytes);

async fn fetch_group(
    inner: Arc<Inner>,
    (number, group): (usize, usize),
) -> Result<Group, DataError> {
    let shard = open_shard(&inner, number).await?;
    let entry = &shard.index.groups[group];
    let range = entry.offset..entry.offset + entry.digest.bytes;
    let what = format!("row group {group}");
    let bytes =
        verified(&*inner.reader, &shard.index.object, Some(range), &entry.digest, &what).await?;
    Ok((shard, group, bytes))
}

/// A shard's index and footer, kept from before or fetched. Two callers may fetch the same one at
/// once; both are verified and either is kept.
async fn open_shard(inner: &Inner, number: usize) -> Result<Arc<OpenShard>, DataError> {
    if let Some(shard) = inner.take_open(number) {
        return Ok(shard);
    }
    let entry: &ShardEntry = &inner.manifest.shards[number];
    let reader = &*inner.reader;
    let bytes = verified(reader, &entry.index, None, &entry.index_digest, "the index").await?;
    let index = ShardIndex::parse(&bytes, entry, inner.manifest.block_rows)?;
    let range = index.footer_offset..entry.digest.bytes;
    let digest = &index.footer_digest;
    let footer = verified(reader, &entry.object, Some(range), digest, "the footer").await?;
    let footer = ShardFooter::parse(&index, footer)?;
    let shard = Arc::new(OpenShard { index, footer });
    inner.keep_open(number, Arc::clone(&shard));
    Ok(shard)
}

impl Inner {
    fn take_open(&self, number: usize) -> Option<Arc<OpenShard>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let at = open.iter().position(|(other, _)| *other == number)?;
        let found = open.remove(at)?;
        let shard = Arc::clone(&found.1);
        open.push_back(found);
        Some(shard)
    }

    fn keep_open(&self, number: usize, shard: Arc<OpenShard>) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|(other, _)| *other != number);
        if open.len() == FOOTERS_MAX {
            open.pop_front();
        }
        open.push_back((number, shard));
    }
}

#[cfg(test)]
#[path = "dataset_tests.rs"]
mod tests;
