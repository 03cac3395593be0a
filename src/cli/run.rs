//! A run's folder, before its first process starts: resolved, probed, and given its configuration.
//!
//! Whoever starts a run does this once: the launcher on one machine, the coordinator on a cluster.
//! Trainers then read `RUN/config.toml` and nothing else.

use std::sync::Arc;

use clap::ValueEnum;

use super::{Failure, tell, threads_each};
use crate::checkpoint;
use crate::config::{self, ConfigSource, RunConfig};
use crate::data::Manifest;
use crate::data::synth::{self, SynthOptions};
use crate::data::write::Work;
use crate::ledger;
use crate::store::{Store, StoreError, StoreOptions};
use crate::types::{Backend, ObjectDigest, Step};

/// What to do with a run that has begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Resume {
    /// Go on from its newest checkpoint.
    Auto,
    /// Refuse it.
    Never,
}

/// Which collectives, as the user asks for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BackendArgument {
    /// NCCL if every trainer has a GPU of its own, else Gloo.
    Auto,
    /// Gloo, on CPUs.
    Gloo,
    /// NCCL, on GPUs.
    Nccl,
}

impl BackendArgument {
    /// The backend that was asked for; none leaves it to the coordinator.
    #[must_use]
    pub fn chosen(self) -> Option<Backend> {
        match self {
            Self::Auto => None,
            Self::Gloo => Some(Backend::Gloo),
            Self::Nccl => Some(Backend::Nccl),
        }
    }
}

/// A path becomes absolute, so that every process means the same folder; URLs stay.
#[must_use]
pub fn absolute(url: &str) -> String {
    if url.contains("://") {
        return url.to_owned();
    }
    std::path::absolute(url).map_or_else(|_| url.to_owned(), |path| path.display().to_string())
}

/// Workers that the largest run may have.
const NODES_MAX: u32 = 1024;

/// How many workers a run may have: `N`, or `MIN:MAX`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeRange {
    /// Below this it waits.
    pub min: u32,
    /// More are not taken in.
    pub max: u32,
}

impl std::str::FromStr for NodeRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (min, max) = text.split_once(':').unwrap_or((text, text));
        let number = |text: &str| text.parse::<u32>().ok().filter(|n| (1..=NODES_MAX).contains(n));
        match (number(min), number(max)) {
            (Some(min), Some(max)) if min <= max => Ok(Self { min, max }),
            _ => Err(format!("N or MIN:MAX is wanted, from 1 to {NODES_MAX}")),
        }
    }
}

/// The run's own configuration, as [`prepare`] left it.
///
/// # Errors
/// [`Failure`] where there is none or it cannot be read.
pub async fn configuration(run: &str, options: &StoreOptions) -> Result<RunConfig, Failure> {
    let store = Store::open(run, &options.clone().existing()).map_err(Failure::usage)?;
    read(&store).await?.ok_or_else(|| {
        Failure::usage(format!(
            "{run} has no config.toml: start the run with --config, or by cpcr-launch"
        ))
    })
}

/// The configuration of the run in a folder, if one began there.
///
/// # Errors
/// [`Failure`] where it cannot be read or is none.
pub async fn read(store: &Store) -> Result<Option<RunConfig>, Failure> {
    if !store.exists("config.toml").await.map_err(Failure::failed)? {
        return Ok(None);
    }
    let text = store.get_agreed("config.toml").await.map_err(Failure::failed)?;
    let text = String::from_utf8_lossy(&text).into_owned();
    config::load(&ConfigSource::Text(text), &[]).map(Some).map_err(Failure::usage)
}

/// Whether the run has nothing left to do, which the user is told. Where that is said, the last checkpoint is read.
///
/// # Errors
/// [`Failure`] where the store does not answer.
pub async fn says_complete(store: &Store, config: &RunConfig) -> Result<bool, Failure> {
    let steps = Step(config.train.iterations);
    if !ledger::is_complete(store, steps).await.map_err(Failure::failed)? {
        return Ok(false);
    }
    // Without the last checkpoint, or with a damaged one, there is something to do.
    let newest = checkpoint::latest(store).await.map_err(Failure::failed)?;
    let complete = newest.is_some_and(|newest| newest.step >= steps);
    if complete {
        tell(&format!("complete already: {store} has all its {steps} steps (train.iterations)"));
    }
    Ok(complete)
}

/// Refuses a dataset that is not the one of the run's checkpoints. By its manifest's hash: it may have moved.
async fn same_dataset(store: &Store, data: &str, manifest: &[u8]) -> Result<(), Failure> {
    let newest = checkpoint::latest_state(store).await.map_err(Failure::failed)?;
    match newest {
        Some((newest, _)) if newest.dataset_sha256 != ObjectDigest::of(manifest).sha256 => {
            Err(Failure::usage(format!(
                "{store} holds a run on another dataset than {data}; use another --run, or its own dataset"
            )))
        }
        _ => Ok(()),
    }
}

/// A store that does not answer may do so later (1: a cluster tries again); all else is to be mended (2).
fn unavailable(error: StoreError) -> Failure {
    match error {
        StoreError::Unreachable { .. } => Failure::failed(error),
        error => Failure::usage(error),
    }
}

/// Makes the batch that of the whole run where it was given for each worker.
pub fn scale(config: &mut RunConfig, nodes: u32) {
    let batch = &mut config.batch;
    if batch.per_worker {
        batch.labelled = batch.labelled.saturating_mul(nodes);
        batch.unlabelled = batch.unlabelled.saturating_mul(nodes);
        batch.per_worker = false;
    }
}

/// Makes the demonstration's dataset, synthetic cardiac phantoms, unless it is there.
///
/// # Errors
/// [`Failure`] where it cannot be written.
pub async fn phantoms(data: Store) -> Result<(), Failure> {
    if data.exists("manifest.json").await.map_err(Failure::failed)? {
        return Ok(());
    }
    tell("making the dataset: synthetic cardiac phantoms");
    let work = Work::on(threads_each(1) as usize);
    let made = synth::write(Arc::new(data), &SynthOptions::default(), &work).await;
    made.map(|_| ()).map_err(Failure::failed)
}

/// Checks that the dataset is there and has the labels that are wanted, probes the run's store, sees that a run which has begun is
/// the same one, then writes its configuration. Nothing is made before the checks have passed.
///
/// # Errors
/// [`Failure`] with status 2 for what the user must mend.
pub async fn prepare(
    mut config: RunConfig,
    run: &str,
    nodes: u32,
    resume: Resume,
    options: &StoreOptions,
) -> Result<RunConfig, Failure> {
    scale(&mut config, nodes);
    let global = config.batch.labelled.saturating_add(config.unlabelled_batch());
    if nodes > global {
        return Err(Failure::usage(format!(
            "--nodes {nodes}: more workers than the {global} samples of a batch"
        )));
    }
    config.check_shares(nodes).map_err(Failure::usage)?;
    let Some(data) = &config.data.url else {
        return Err(Failure::usage(
            "no dataset: give --data URL (make one with `cpcr data import` or `cpcr data synth`)",
        ));
    };
    let dataset = Store::open(data, &options.clone().existing()).map_err(Failure::usage)?;
    let manifest = match dataset.get_agreed("manifest.json").await {
        Ok(manifest) => manifest,
        Err(StoreError::NotFound { .. }) => {
            return Err(Failure::usage(format!("{data} is no dataset: it has no manifest.json")));
        }
        Err(error) => return Err(unavailable(error)),
    };
    // Every trainer would find the same, on its GPU, again and again.
    Manifest::parse(&manifest)
        .and_then(|manifest| manifest.pools(config.data.labelled))
        .map_err(|error| Failure::usage(format!("{data}: {error}")))?;
    let store = Store::open(run, options).map_err(Failure::usage)?;
    store.probe().await.map_err(unavailable)?;
    if let Some(earlier) = read(&store).await?
        && !store.list("checkpoints").await.map_err(Failure::failed)?.is_empty()
    {
        if resume == Resume::Never {
            return Err(Failure::usage(format!("{run} holds a run already (--resume never)")));
        }
        same_dataset(&store, data, &manifest).await?;
        let differences = config.differences(&earlier);
        if !differences.is_empty() {
            return Err(Failure::usage(format!(
                "{run} holds a run with other settings: {}; use another --run",
                differences.join("; ")
            )));
        }
    }
    let text = toml::to_string(&config).map_err(Failure::failed)?;
    store.put("config.toml", text.into()).await.map_err(Failure::failed)?;
    Ok(config)
}
