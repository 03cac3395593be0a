//! From an assignment to a trainer that waits for its generation.

use std::sync::Arc;

use tch::Device;
use tokio::runtime::Runtime;

use super::methods;
use super::pace::Pace;
use super::ranks::Ranks;
use super::snapshot::Copies;
use super::tensorboard::TensorBoard;
use super::{TrainerError, device, traces};
use crate::bridge::ops::SumOverRanks;
use crate::checkpoint::{Outcome, Retention, RunIdentity, Writer, WriterOptions};
use crate::collective::{ProcessGroup, Reducer};
use crate::config::{self, ConfigSource, RunConfig};
use crate::data::{DataError, Dataset, Loader, LoaderPlan};
use crate::eval::Summary;
use crate::eval::report::RunHistory;
use crate::ledger::Receipts;
use crate::method::Method;
use crate::model::{Ensemble, Heads, Sgd};
use crate::proto::{Assignment, Doing, TrainerEvent};
use crate::store::{BlockCache, Store, StoreOptions};
use crate::trust::Trust;
use crate::types::{Generation, Rank, Step, WorldSize};

/// Size of a gradient bucket. The network has 10 MB of gradients: several buckets, so that their
/// communication hides behind the backward pass.
const BUCKET_BYTES: usize = 2 << 20;
/// Step records that a history keeps at most.
const RECORDS_MAX: u64 = 2000;

/// Everything that the loop works with. What outlives a generation is the state (networks, optimisers, step, receipts,
/// history) and what is opened once; the rest comes with [`Trainer::join`] and goes with [`Trainer::leave`].
pub struct Trainer {
    pub(super) config: RunConfig,
    pub(super) assignment: Assignment,
    pub(super) trust: Trust,
    pub(super) seed: u64,
    pub(super) patch: (usize, usize),
    pub(super) device: Device,
    pub(super) total: Step,
    pub(super) record_every: u64,
    pub(super) method: Box<dyn Method>,
    pub(super) dataset: Dataset,
    pub(super) run: Store,

    /// Whether the state below is whole: that of `step`, agreed on by a generation.
    pub(super) live: bool,
    /// Whether the networks are as they were drawn.
    pub(super) pristine: bool,
    pub(super) step: Step,
    pub(super) nets: Ensemble,
    /// Of steps that the ledger is not known to hold.
    pub(super) receipts: Receipts,
    pub(super) history: RunHistory,
    /// The newest checkpoint that this process has handed to its writer.
    pub(super) submitted: Option<Step>,
    pub(super) writer: Option<Writer>,
    pub(super) copies: Copies,
    pub(super) pace: Pace,

    pub(super) generation: Generation,
    pub(super) rank: Rank,
    pub(super) world: WorldSize,
    /// Whether the generation before did not get to this step's validation.
    pub(super) validation_due: bool,
    pub(super) summary: Option<Summary>,
    /// Of the last validation, as PNG: rank 0's.
    pub(super) pictures: Vec<Vec<u8>>,
    pub(super) writing_pictures: Option<tokio::task::JoinHandle<()>>,
    pub(super) tensorboard: Option<TensorBoard>,
    pub(super) loader: Option<Loader>,
    pub(super) ranks: Arc<Ranks>,
    /// Sums batch-norm statistics over the ranks; none where each rank has its own.
    pub(super) sync: Option<Arc<dyn SumOverRanks>>,
    /// The group that gradients travel on; `None` for one rank.
    pub(super) gradients: Option<ProcessGroup>,
    pub(super) reducer: Option<Reducer>,
    pub(super) reduced: Option<Heads>,
    // Last, so that it outlives everything that does I/O on it.
    pub(super) runtime: Runtime,
}

impl Trainer {
    /// Reads the run, opens the dataset, draws the networks.
    pub(super) fn prepare(assignment: &Assignment) -> Result<Self, TrainerError> {
        tch::set_num_threads(i32::try_from(assignment.threads).unwrap_or(1));
        tch::set_num_interop_threads(1);
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let run = Store::open(&assignment.run, &StoreOptions::default())?;
        let text = runtime.block_on(run.get_agreed("config.toml"))?;
        let text = String::from_utf8_lossy(&text).into_owned();
        let config = config::load(&ConfigSource::Text(text), &[])?;
        let dataset = open_dataset(&config)?;
        let device = device::open(assignment.backend, config.train.precision)?;
        let nets = ensemble(&config, &dataset, device)?;
        let total = Step(config.train.iterations);
        // The labelled stream is the same for all worlds.
        let deal = loader_plan(&config, Rank(0), WorldSize(1), Step(0), total).deal(&dataset)?;
        let method = methods::method(&config, deal.labelled_epoch_steps());
        let patch = config.patch_size as usize;
        Ok(Self {
            assignment: assignment.clone(),
            trust: Trust::from_environment()?,
            seed: config.train.seed,
            patch: (patch, patch),
            device,
            total,
            record_every: (total.0 / RECORDS_MAX).max(1),
            method,
            dataset,
            run,
            live: false,
            pristine: true,
            step: Step(0),
            nets,
            receipts: Receipts::new(),
            history: RunHistory::default(),
            submitted: None,
            writer: None,
            copies: Copies::default(),
            pace: Pace::default(),
            generation: Generation(0),
            rank: Rank(0),
            world: WorldSize(1),
            validation_due: false,
            summary: None,
            pictures: Vec::new(),
            writing_pictures: None,
            tensorboard: None,
            loader: None,
            ranks: Arc::default(),
            sync: None,
            gradients: None,
            reducer: None,
            reduced: None,
            config,
            runtime,
        })
    }

    /// The generation's loader.
    pub(super) fn loader(&self) -> Result<&Loader, TrainerError> {
        self.loader.as_ref().ok_or(TrainerError::Data(DataError::Stopped))
    }

    /// Whether a validation belongs to the step that was done last.
    pub(super) fn validates_here(&self) -> bool {
        let at = self.step.0;
        at > 0 && (at.is_multiple_of(self.config.validate.every) || self.step == self.total)
    }

    /// Whether a checkpoint belongs to the step that was done last.
    pub(super) fn checkpoints_here(&self) -> bool {
        let at = self.step.0;
        at > 0 && (at.is_multiple_of(self.config.checkpoint.every) || self.step == self.total)
    }

    /// Has gradients averaged over the ranks for just the parameters that get one with `heads`.
    pub(super) fn reduce_over(&mut self, heads: Heads) -> Result<(), TrainerError> {
        let Some(group) = &self.gradients else { return Ok(()) };
        if self.reduced == Some(heads) {
            return Ok(());
        }
        self.reducer = None;
        self.clear_gradients()?;
        self.reducer = Some(Reducer::new(&self.nets.trained(heads), group, BUCKET_BYTES)?);
        self.reduced = Some(heads);
        Ok(())
    }

    /// Unsets every gradient.
    pub(super) fn clear_gradients(&self) -> Result<(), TrainerError> {
        Ok(self.nets.clear_gradients()?)
    }

    /// Waits until every checkpoint is committed, and tells the agent of them.
    pub(super) fn flush(&self) -> Result<(), TrainerError> {
        if let Some(writer) = &self.writer {
            let busy = TrainerEvent::Busy { step: self.step, doing: Doing::Saving };
            for outcome in writer.flush(|| super::emit(&busy))? {
                let (Outcome::Written(manifest) | Outcome::AlreadyThere(manifest)) = outcome;
                tracing::info!(step = %manifest.step, "the checkpoint is committed");
            }
        }
        Ok(())
    }
}

/// The run's dataset, read through this machine's block cache.
fn open_dataset(config: &RunConfig) -> Result<Dataset, TrainerError> {
    let data = config.data.url.clone().unwrap_or_default();
    let store = Store::open(&data, &StoreOptions::default().existing())?;
    let dir = config.loader.cache_dir.as_deref();
    let cache = BlockCache::for_dataset(store.url(), dir, config.loader.cache_gib);
    Ok(Dataset::open_cached(Arc::new(store), cache)?)
}

/// Fresh networks and optimisers of the configured method.
pub(super) fn ensemble(
    config: &RunConfig,
    dataset: &Dataset,
    device: Device,
) -> Result<Ensemble, TrainerError> {
    let net = methods::network(config, dataset.manifest());
    let train = &config.train;
    let sgd = Sgd::new(train.lr, train.momentum, train.weight_decay);
    let cast = methods::method(config, 0).cast();
    Ok(Ensemble::new(&net, cast, device, train.seed, &sgd)?)
}

/// Refuses a checkpoint of another configuration or dataset.
pub(super) fn check_identity(
    manifest: &crate::checkpoint::Manifest,
    config: &RunConfig,
    dataset: &Dataset,
) -> Result<(), TrainerError> {
    let step = manifest.step;
    if manifest.config_sha256 != config.identity() {
        return Err(TrainerError::Mismatch { step, what: "configuration" });
    }
    if manifest.dataset_sha256 != dataset.digest().sha256 {
        return Err(TrainerError::Mismatch { step, what: "dataset" });
    }
    Ok(())
}

pub(super) fn loader_plan(
    config: &RunConfig,
    rank: Rank,
    world: WorldSize,
    start: Step,
    end: Step,
) -> LoaderPlan {
    let patch = config.patch_size as usize;
    LoaderPlan {
        seed: config.train.seed,
        rank,
        world,
        start,
        end,
        batch_labelled: config.batch.labelled,
        batch_unlabelled: config.unlabelled_batch(),
        labelled_patients: config.data.labelled,
        patch: (patch, patch),
        prefetch: config.loader.prefetch as usize,
        threads: config.loader.threads as usize,
        fetches: config.loader.fetches as usize,
        cache_bytes: LoaderPlan::CACHE_BYTES,
        augment: true,
    }
}

pub(super) fn start_writer(t: &Trainer) -> Result<Writer, TrainerError> {
    let identity = RunIdentity {
        config_sha256: t.config.identity(),
        dataset_sha256: t.dataset.digest().sha256.clone(),
    };
    let kept = &t.config.checkpoint;
    let retention = Some(Retention {
        keep_last: kept.keep_last as usize,
        keep_every: kept.keep_every,
        keep_best: kept.keep_best as usize,
    });
    let options = WriterOptions { identity, retention, written: traces::checkpoint_written };
    Ok(Writer::start(t.runtime.handle().clone(), t.run.clone(), options)?)
}
