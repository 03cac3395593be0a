//! An opened dataset: verified blocks and volumes, fetched on a small runtime of its own.
//!
//! What is public here blocks the calling thread and may be called from any thread; the loader runs
//! its fetches on the runtime itself. What is returned has been verified against the manifest, through
//! the index of its shard. Nothing but a bounded number of footers is kept in memory: keeping decoded
//! blocks is the loader's business, and keeping fetched ones on the disk that of the block cache, if
//! one is given.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError, mpsc};

use bytes::Bytes;
use futures::stream;
use futures::{StreamExt, TryStreamExt};
use tokio::sync::OnceCell;
use tokio::task::AbortHandle;

use super::augment::Shape;
use super::error::DataError;
use super::fetch::{agreed, verified};
use super::manifest::{
    MANIFEST_PATH, Manifest, ShardEntry, ShardIndex, Split, VolumeEntry, VolumeId,
};
use super::shard::{Labels, ShardFooter, SliceRow};
use super::source::ObjectReader;
use crate::store::{BlockCache, BlockCacheCounts, ReadFaults};
use crate::types::ObjectDigest;

/// Footers kept, some 15 KB each with their indexes; parsed they would be ten times as large, and parsing one is little
/// next to decoding a block. Blocks come from all shards in turn, so a pool of more shards than this reads
/// indexes and footers again: small next to a block, and from the disk where there is a cache.
const FOOTERS_MAX: usize = 512;

/// Volume tables kept parsed, a few MB each.
const TABLES_MAX: usize = 4;

/// Blocks fetched side by side by one call.
const FETCHES_MAX: usize = 8;

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
    /// Verified.
    footer: Bytes,
}

/// A verified row group, not decoded yet.
#[derive(Debug)]
pub(crate) struct EncodedBlock {
    shard: Arc<OpenShard>,
    group: usize,
    bytes: Bytes,
}

impl EncodedBlock {
    /// Its bytes as they are stored.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }
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
    cache: Option<BlockCache>,
    runtime: IoRuntime,
    manifest: Manifest,
    digest: ObjectDigest,
    splits: [SplitBlocks; 3],
    /// Most recently used last. A cell is empty while its first user fetches.
    open: Mutex<VecDeque<(usize, ShardCell)>>,
    /// Volume tables by number, the newest first.
    tables: Mutex<Vec<(usize, Arc<Vec<VolumeEntry>>)>>,
}

type ShardCell = Arc<OnceCell<Arc<OpenShard>>>;

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
        Self::open_cached(reader, None)
    }

    /// The same; blocks, footers and indexes are then looked for in `cache` before they are fetched.
    pub fn open_cached(
        reader: Arc<dyn ObjectReader>,
        cache: Option<BlockCache>,
    ) -> Result<Self, DataError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("cpcr-data-io")
            .enable_all()
            .build()
            .map_err(|error| DataError::Thread(format!("start the data runtime: {error}")))?;
        let runtime = IoRuntime(Some(runtime));
        let source = Arc::clone(&reader);
        let manifest = async move { agreed(&*source, MANIFEST_PATH).await };
        let bytes = wait(&runtime, manifest)??;
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
        let (open, tables) = (Mutex::default(), Mutex::default());
        let inner = Inner { reader, cache, runtime, manifest, digest, splits, open, tables };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// What the block cache has done for this dataset's process so far; `None` without one.
    pub fn cache_counts(&self) -> Option<BlockCacheCounts> {
        self.inner.cache.as_ref().map(BlockCache::counts)
    }

    /// What the dataset says about itself.
    pub fn manifest(&self) -> &Manifest {
        &self.inner.manifest
    }

    /// Length and hash of the manifest: the dataset's identity.
    pub fn digest(&self) -> &ObjectDigest {
        &self.inner.digest
    }

    /// The volumes of `split`, in list order. Fetches no table.
    pub fn volumes(&self, split: Split) -> Vec<VolumeId> {
        let manifest = self.manifest();
        let tabled = (VolumeId::TABLED_FIRST..).take(manifest.tabled_count(split)).map(VolumeId);
        manifest.volumes_of(split).map(|(id, _)| id).chain(tabled).collect()
    }

    /// A volume's entry, from the manifest or from its table.
    pub fn volume_entry(&self, id: VolumeId) -> Result<VolumeEntry, DataError> {
        let entry = match self.manifest().tabled(id) {
            Some((table, place)) => self.table(table)?.get(place).cloned(),
            None => self.manifest().volumes.get(id.0 as usize).cloned(),
        };
        entry.ok_or_else(|| DataError::Unusable(format!("there is no volume number {}", id.0)))
    }

    /// The volumes that a table lists; the last few tables are kept.
    pub(super) fn table(&self, number: usize) -> Result<Arc<Vec<VolumeEntry>>, DataError> {
        let kept = || self.inner.tables.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, found)) = kept().iter().find(|(kept, _)| *kept == number) {
            return Ok(Arc::clone(found));
        }
        let inner = Arc::clone(&self.inner);
        let bytes = wait(&self.inner.runtime, async move {
            let table = &inner.manifest.tables[number];
            verified(&*inner.reader, &table.object, None, &table.digest, "the table").await
        })??;
        let found = Arc::new(self.manifest().tables[number].parse(&bytes)?);
        let mut kept = kept();
        kept.truncate(TABLES_MAX - 1);
        kept.insert(0, (number, Arc::clone(&found)));
        Ok(found)
    }

    /// An object beside the shards that no digest seals; `None` where there is none.
    pub(super) fn beside(&self, object: &'static str) -> Result<Option<Bytes>, DataError> {
        let reader = Arc::clone(&self.inner.reader);
        let fetched = wait(&self.inner.runtime, async move {
            reader.get(object).await.map_err(|error| DataError::read(object, error))
        })?;
        match fetched {
            Ok(bytes) => Ok(Some(bytes)),
            Err(DataError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Fetches a volume, its slices in anatomical order.
    pub fn load_volume(&self, id: VolumeId) -> Result<Volume, DataError> {
        let entry = self.volume_entry(id)?;
        let wanted = entry.rows();
        let block_rows = self.manifest().block_rows;
        let blocks: Vec<u64> =
            (wanted.start / block_rows..wanted.end.div_ceil(block_rows)).collect();
        let decoded = self.fetch_blocks(entry.split, &blocks)?;
        let mut rows: Vec<SliceRow> = decoded
            .into_iter()
            .zip(&blocks)
            .flat_map(|(rows, block)| (block * block_rows..).zip(rows))
            .filter(|(number, _)| wanted.contains(number))
            .map(|(_, row)| row)
            .collect();
        rows.sort_by_key(|row| row.slice);
        assemble(id, &entry, rows)
    }

    /// Fetches, verifies and decodes blocks of `split`; in the order asked for.
    pub(crate) fn fetch_blocks(
        &self,
        split: Split,
        blocks: &[u64],
    ) -> Result<Vec<Vec<SliceRow>>, DataError> {
        let fetches: Vec<_> = blocks.iter().map(|block| self.fetch_block(split, *block)).collect();
        // The first error ends it: each of the others would wait as long again for a store that is gone.
        let fetched: Vec<_> = wait(&self.inner.runtime, async move {
            stream::iter(fetches).buffered(FETCHES_MAX).try_collect::<Vec<_>>().await
        })??;
        // Decoding is work for the calling thread, not for the one that serves the network.
        fetched.into_iter().map(|fetched| self.decode_block(fetched, Labels::Decode)).collect()
    }

    /// Fetches and verifies a block of `split`. To be awaited on this dataset's runtime.
    pub(crate) fn fetch_block(
        &self,
        split: Split,
        block: u64,
    ) -> impl Future<Output = Result<EncodedBlock, DataError>> + Send + use<> {
        let (inner, place) = (Arc::clone(&self.inner), self.place(split, block));
        async move {
            let (shard, group, bytes) = fetch_group(inner, place?).await?;
            Ok(EncodedBlock { shard, group, bytes })
        }
    }

    /// The rows of a fetched block.
    pub(crate) fn decode_block(
        &self,
        block: EncodedBlock,
        labels: Labels,
    ) -> Result<Vec<SliceRow>, DataError> {
        self.decode(&block.shard, block.group, block.bytes, labels)
    }

    /// Starts `task` on this dataset's runtime.
    pub(crate) fn spawn(
        &self,
        task: impl Future<Output = ()> + Send + 'static,
    ) -> Result<AbortHandle, DataError> {
        let runtime = self.inner.runtime.0.as_ref().ok_or(DataError::Stopped)?;
        Ok(runtime.spawn(task).abort_handle())
    }

    /// What went wrong with reads so far, and was cured: see [`ReadFaults`].
    pub fn read_faults(&self) -> ReadFaults {
        self.inner.reader.read_faults()
    }

    /// Re-reads every object of a shard in full and compares all hashes with the manifest; `look` is shown
    /// every row, in order, and says what is wrong with it.
    pub(crate) fn verify_shard(
        &self,
        number: usize,
        mut look: impl FnMut(&SliceRow) -> Result<(), String>,
    ) -> Result<u64, DataError> {
        let inner = Arc::clone(&self.inner);
        let (shard, bytes) = wait(&self.inner.runtime, async move {
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
            for row in self.decode(&shard, number, bytes, Labels::Decode)? {
                look(&row).map_err(|why| DataError::invalid(&shard.index.object, why))?;
            }
        }
        Ok(bytes.len() as u64)
    }

    /// The rows of a shard's row group, with as many channels as the manifest says.
    fn decode(
        &self,
        shard: &OpenShard,
        group: usize,
        bytes: Bytes,
        labels: Labels,
    ) -> Result<Vec<SliceRow>, DataError> {
        let footer = ShardFooter::parse(&shard.index, shard.footer.clone())?;
        let rows = footer.decode(group, &shard.index.groups[group], bytes, labels)?;
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
        slices: rows.iter().map(|row| &row.image[..]).collect::<Vec<_>>().concat(),
        spacing_mm: entry.spacing_mm,
        affine: entry.affine,
    })
}

/// Runs `future` on the runtime and waits for it.
fn wait<T: Send + 'static>(
    runtime: &IoRuntime,
    future: impl Future<Output = T> + Send + 'static,
) -> Result<T, DataError> {
    let runtime = runtime.0.as_ref().ok_or(DataError::Stopped)?;
    let (send, receive) = mpsc::sync_channel(1);
    runtime.spawn(async move {
        // The receiver waits just below.
        send.send(future.await).ok();
    });
    receive.recv().map_err(|_| DataError::Thread("a fetch did not finish".to_owned()))
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
    let fetch = verified(&*inner.reader, &shard.index.object, Some(range), &entry.digest, &what);
    let bytes = inner.cached(&entry.digest, fetch).await?;
    Ok((shard, group, bytes))
}

/// A shard's index and footer, kept from before or fetched; by one of those who want it at a time.
async fn open_shard(inner: &Inner, number: usize) -> Result<Arc<OpenShard>, DataError> {
    let cell = inner.open_cell(number);
    cell.get_or_try_init(|| read_shard(inner, number)).await.cloned()
}

async fn read_shard(inner: &Inner, number: usize) -> Result<Arc<OpenShard>, DataError> {
    let entry: &ShardEntry = &inner.manifest.shards[number];
    let reader = &*inner.reader;
    let fetch = verified(reader, &entry.index, None, &entry.index_digest, "the index");
    let bytes = inner.cached(&entry.index_digest, fetch).await?;
    let index = ShardIndex::parse(&bytes, entry, inner.manifest.block_rows)?;
    let range = index.footer_offset..entry.digest.bytes;
    let digest = &index.footer_digest;
    let fetch = verified(reader, &entry.object, Some(range), digest, "the footer");
    let footer = inner.cached(digest, fetch).await?;
    Ok(Arc::new(OpenShard { index, footer }))
}

impl Inner {
    /// The bytes of `digest` from the disk, else from `fetch`.
    async fn cached(
        &self,
        digest: &ObjectDigest,
        fetch: impl Future<Output = Result<Bytes, DataError>>,
    ) -> Result<Bytes, DataError> {
        match &self.cache {
            Some(cache) => cache.or_fetch(digest, fetch).await,
            None => fetch.await,
        }
    }

    /// The place of a shard's index and footer, for the longest unused one if need be.
    fn open_cell(&self, number: usize) -> ShardCell {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let at = open.iter().position(|(other, _)| *other == number);
        let found = at.and_then(|at| open.remove(at)).unwrap_or_else(|| (number, Arc::default()));
        if open.len() == FOOTERS_MAX {
            open.pop_front();
        }
        let cell = Arc::clone(&found.1);
        open.push_back(found);
        cell
    }
}

#[cfg(test)]
#[path = "dataset_tests.rs"]
mod tests;
