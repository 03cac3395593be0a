//! From an assignment to a trainer that is ready for its next step.

use std::sync::Arc;
use std::time::Duration;

use tch::Device;
use tokio::runtime::Runtime;

use super::methods::{self, check_share};
use super::ranks::Ranks;
use super::{TrainerError, device};
use crate::bridge::ops::SumOverRanks;
use crate::checkpoint::{Retention, RunIdentity, Writer, WriterOptions, load_latest};
use crate::collective::{ProcessGroup, Reducer, Rendezvous};
use crate::config::{self, ConfigSource, RunConfig};
use crate::data::{Dataset, Loader, LoaderPlan};
use crate::eval::Summary;
use crate::eval::report::{Record, RunEvent, RunHistory};
use crate::ledger::{Attestation, Receipts};
use crate::method::Method;
use crate::model::{Ensemble, Heads, Sgd};
use crate::proto::{Assignment, Doing, LedgerStart, TrainerEvent};
use crate::store::{BlockCache, Store, StoreOptions};
use crate::types::{Backend, Rank, Step, WorldSize};

/// Size of a gradient bucket. The network has 10 MB of gradients: several buckets, so that their
/// communication hides behind the backward pass.
const BUCKET_BYTES: usize = 2 << 20;
/// Step records that a history keeps at most.
const RECORDS_MAX: u64 = 2000;

/// Everything that the loop works with.
pub struct Trainer {
    pub(super) config: RunConfig,
    pub(super) rank: Rank,
    pub(super) world: WorldSize,
    pub(super) threads: u32,
    pub(super) seed: u64,
    pub(super) patch: (usize, usize),
    pub(super) backend: Backend,
    pub(super) device: Device,
    pub(super) step: Step,
    pub(super) total: Step,
    pub(super) record_every: u64,
    pub(super) method: Box<dyn Method>,
    pub(super) nets: Ensemble,
    pub(super) loader: Loader,
    pub(super) dataset: Dataset,
    /// Of steps that the ledger is not known to hold.
    pub(super) receipts: Receipts,
    pub(super) history: RunHistory,
    pub(super) summary: Option<Summary>,
    pub(super) run: Store,
    pub(super) writer: Option<Writer>,
    pub(super) ranks: Arc<Ranks>,
    /// Sums batch-norm statistics over the ranks; none where each rank has its own.
    pub(super) sync: Option<Arc<dyn SumOverRanks>>,
    /// The group that gradients travel on; `None` for one rank.
    pub(super) gradients: Option<ProcessGroup>,
    pub(super) reducer: Option<Reducer>,
    reduced: Option<Heads>,
    // Last, so that it outlives everything that does I/O on it.
    pub(super) runtime: Runtime,
}

impl Trainer {
    /// Reads the run, forms the group, restores the newest checkpoint.
    pub(super) fn prepare(assignment: &Assignment) -> Result<Self, TrainerError> {
        tch::set_num_threads(i32::try_from(assignment.threads).unwrap_or(1));
        tch::set_num_interop_threads(1);
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let run = Store::open(&assignment.run, &StoreOptions::default())?;
        let text = runtime.block_on(run.get("config.toml"))?;
        let text = String::from_utf8_lossy(&text).into_owned();
        let config = config::load(&ConfigSource::Text(text), &[])?;
        let dataset = open_dataset(&config)?;
        let checkpoint = runtime.block_on(load_latest(&run))?;

        let device = device::open(assignment.backend, config.train.precision)?;
        let mut nets = ensemble(&config, &dataset, device)?;
        let mut history = RunHistory::default();
        let mut receipts = Receipts::new();
        let mut step = Step(0);
        if let Some(checkpoint) = checkpoint {
            step = checkpoint.manifest.step;
            check_identity(&checkpoint.manifest, &config, &dataset)?;
            receipts = super::persist::restore(&checkpoint, &mut nets, &mut history)?;
            let world = assignment.world.0;
            history.push(Record::Event(RunEvent::Resumed { step: step.0, world }));
        } else if let Some(url) = &config.train.init_from {
            let state = super::persist::given_weights(&runtime, url)?;
            nets.start_from(&state).map_err(|e| TrainerError::InitialWeights {
                url: url.clone(),
                reason: e.to_string(),
            })?;
        }
        let total = Step(config.train.iterations);
        let loader = Loader::start(dataset.clone(), loader_plan(&config, assignment, step, total))?;
        let method = methods::method(&config, loader.deal().labelled_epoch_steps());
        check_share(&config, loader.share())?;
        let writer = match assignment.rank {
            Rank(0) => Some(start_writer(&runtime, &run, &config, &dataset)?),
            _ => None,
        };
        let (gradients, ranks) = groups(assignment, &config, device)?;
        let ranks = Arc::new(ranks);
        let patch = config.patch_size as usize;
        Ok(Self {
            rank: assignment.rank,
            world: assignment.world,
            threads: assignment.threads,
            seed: config.train.seed,
            patch: (patch, patch),
            backend: assignment.backend,
            device,
            step,
            total,
            record_every: (total.0 / RECORDS_MAX).max(1),
            method,
            nets,
            loader,
            dataset,
            receipts,
            history,
            summary: None,
            run,
            writer,
            sync: (config.model.sync_batch_norm && assignment.world.0 > 1)
                .then(|| Arc::clone(&ranks) as Arc<dyn SumOverRanks>),
            ranks,
            gradients,
            reducer: None,
            reduced: None,
            config,
            runtime,
        })
    }

    /// What the ledger needs to know of this start; rank 0 says it.
    pub(super) fn attestation(&self) -> Result<Option<LedgerStart>, TrainerError> {
        if self.rank != Rank(0) {
            return Ok(None);
        }
        let attested = Attestation {
            world: self.world,
            dataset_sha256: self.dataset.digest().sha256.clone(),
            deal: self.loader.deal().spec().clone(),
            carried: self.receipts.carried(),
        };
        Ok(Some(attested.to_wire()?))
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
                tracing::info!(?outcome, "checkpoint");
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
fn ensemble(
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
fn check_identity(
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

fn loader_plan(config: &RunConfig, a: &Assignment, start: Step, end: Step) -> LoaderPlan {
    let patch = config.patch_size as usize;
    LoaderPlan {
        seed: config.train.seed,
        rank: a.rank,
        world: a.world,
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

fn start_writer(
    runtime: &Runtime,
    run: &Store,
    config: &RunConfig,
    dataset: &Dataset,
) -> Result<Writer, TrainerError> {
    let identity = RunIdentity {
        config_sha256: config.identity(),
        dataset_sha256: dataset.digest().sha256.clone(),
    };
    let retention = Some(Retention { keep_last: config.checkpoint.keep_last as usize });
    let options = WriterOptions { identity, retention };
    Ok(Writer::start(runtime.handle().clone(), run.clone(), options)?)
}

/// The gradients' group, and those for everything else; none for one rank.
fn groups(
    a: &Assignment,
    config: &RunConfig,
    device: Device,
) -> Result<(Option<ProcessGroup>, Ranks), TrainerError> {
    if a.world.0 == 1 {
        return Ok((None, Ranks::default()));
    }
    let meet = |purpose: &str| Rendezvous {
        store_addr: a.kv_address,
        prefix: format!("{}/generation-{}/{purpose}", a.epoch, a.generation),
        rank: a.rank,
        world: a.world,
        timeout: Duration::from_secs(config.recovery.collective_timeout_s),
        interface: a.interface,
    };
    let on_device = |purpose: &str| match a.backend {
        Backend::Gloo => ProcessGroup::gloo(&meet(purpose)),
        Backend::Nccl => ProcessGroup::nccl(&meet(purpose), device),
    };
    let gradients = on_device("gradients")?;
    let host = Some(ProcessGroup::gloo(&meet("side"))?);
    let device = match a.backend {
        Backend::Gloo => None,
        Backend::Nccl => Some(on_device("side-device")?),
    };
    Ok((Some(gradients), Ranks { host, device }))
}
