//! `cpcr eval`: what a checkpoint is worth on the volumes of a split.
//!
//! The same code as validation during training; only where the weights come from differs. Not
//! here: choosing hyperparameters on the test split, which nothing can prevent.

use std::sync::Arc;

use super::methods::network;
use super::validate::{BATCH, score_volumes};
use super::{TrainerError, snapshot};
use crate::checkpoint::{self, Checkpoint};
use crate::config::{self, ConfigSource, RunConfig};
use crate::data::{Dataset, Split};
use crate::eval::report::RunHistory;
use crate::eval::{DistanceUnit, EmptyPolicy, EvalSettings, Summary};
use crate::model::{Network, main_state};
use crate::store::{Store, StoreOptions};
use crate::types::Step;

/// Which checkpoint of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pick {
    /// The newest one that is whole.
    Latest,
    /// The one with the best mean Dice in validation, as far as it was kept.
    Best,
    /// That of a step.
    At(Step),
}

/// What to evaluate, on what and how.
#[derive(Debug, Clone)]
pub struct EvaluateOptions {
    /// The run's folder.
    pub run: String,
    /// Which of its checkpoints.
    pub pick: Pick,
    /// The dataset; the run's own by default.
    pub data: Option<String>,
    /// Which volumes.
    pub split: Split,
    /// What distances are counted in.
    pub unit: DistanceUnit,
    /// What an empty mask is worth.
    pub policy: EmptyPolicy,
}

/// The checkpoint that was taken, and its scores.
#[derive(Debug)]
pub struct Evaluated {
    /// Its step.
    pub step: Step,
    /// Scores by case, by class, and their means.
    pub summary: Summary,
}

/// Loads a checkpoint and scores every labelled volume of a split.
///
/// # Errors
/// [`TrainerError`]: no such checkpoint, a dataset of other classes, volumes without labels.
pub fn evaluate(options: &EvaluateOptions) -> Result<Evaluated, TrainerError> {
    let (config, checkpoint) = open_run(&options.run, options.pick)?;
    let data = options.data.clone().or_else(|| config.data.url.clone()).unwrap_or_default();
    let dataset = open_dataset(options.data.as_ref(), &config, &checkpoint)?;
    let net = trained(&config, &checkpoint, &dataset)?;
    let patch = config.patch_size as usize;
    let settings = EvalSettings {
        patch: (patch, patch),
        classes: u8::try_from(net.config().classes).unwrap_or(u8::MAX),
        batch: BATCH,
        unit: options.unit,
        policy: options.policy,
    };
    let cases = score_volumes(&net, &dataset, options.split, &settings, |_| true, |_, _| Ok(()))?;
    if cases.is_empty() {
        let why = format!("{data} has no labelled volume in the {:?} split", options.split);
        return Err(TrainerError::Report(why.to_lowercase()));
    }
    let names: Vec<String> = dataset.manifest().classes.iter().skip(1).cloned().collect();
    let summary = Summary::of([cases], &names, &settings)
        .map_err(|error| TrainerError::Report(error.to_string()))?;
    Ok(Evaluated { step: checkpoint.manifest.step, summary })
}

/// The configuration of a run, and one of its checkpoints.
pub(super) fn open_run(url: &str, wanted: Pick) -> Result<(RunConfig, Checkpoint), TrainerError> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let run = Store::open(url, &StoreOptions::default().existing())?;
    let text = runtime.block_on(run.get_agreed("config.toml"))?;
    let config =
        config::load(&ConfigSource::Text(String::from_utf8_lossy(&text).into_owned()), &[])?;
    let checkpoint = runtime.block_on(pick(&run, wanted))?;
    Ok((config, checkpoint))
}

/// The dataset that a checkpoint was trained on, or the one named instead: for its classes and for how
/// its images were prepared. Another one than the checkpoint's must be named; it is told of then.
pub(super) fn open_dataset(
    named: Option<&String>,
    config: &RunConfig,
    checkpoint: &Checkpoint,
) -> Result<Dataset, TrainerError> {
    let url = named.or(config.data.url.as_ref()).cloned().unwrap_or_default();
    let opened = Store::open(&url, &StoreOptions::default().existing())
        .map_err(TrainerError::from)
        .and_then(|store| Ok(Dataset::open(Arc::new(store))?));
    let dataset = opened.map_err(|error| {
        TrainerError::Report(format!(
            "the dataset {url} names the classes and how images are prepared: {error}; say where \
             it is with --data URL"
        ))
    })?;
    let step = checkpoint.manifest.step;
    if dataset.digest().sha256 == checkpoint.manifest.dataset_sha256 {
        return Ok(dataset);
    }
    if named.is_none() {
        return Err(TrainerError::Unusable(format!(
            "{url} is not the dataset that checkpoint {step} was trained on any more: its patients, \
             splits or preparation may be others; give --data {url} to use it all the same"
        )));
    }
    tracing::warn!(%url, "checkpoint {step} was trained on another dataset");
    Ok(dataset)
}

async fn pick(run: &Store, pick: Pick) -> Result<Checkpoint, TrainerError> {
    let none = || TrainerError::Report(format!("{} has no whole checkpoint", run.url()));
    match pick {
        Pick::At(step) => Ok(checkpoint::load(run, step).await?),
        Pick::Latest => checkpoint::load_latest(run).await?.ok_or_else(none),
        Pick::Best => {
            let newest = checkpoint::load_latest(run).await?.ok_or_else(none)?;
            let best = history(&newest).best().map_or(newest.manifest.step, |best| Step(best.step));
            if best == newest.manifest.step {
                Ok(newest)
            } else {
                Ok(checkpoint::load(run, best).await?)
            }
        }
    }
}

fn history(checkpoint: &Checkpoint) -> RunHistory {
    let lines = checkpoint.state.0.get("history").and_then(|history| history.as_str());
    lines.map(|lines| RunHistory::from_json_lines(lines.as_bytes())).unwrap_or_default()
}

/// The network of a run with a checkpoint's weights.
pub(super) fn trained(
    config: &RunConfig,
    checkpoint: &Checkpoint,
    dataset: &Dataset,
) -> Result<Network, TrainerError> {
    let net = network(config, dataset.manifest());
    let net = Network::new(net, tch::Device::Cpu, config.train.seed)?;
    // What else a method trains (a second network, a teacher) is not evaluated.
    net.params().load_host(&main_state(snapshot::unnamed(&checkpoint.model)?))?;
    Ok(net)
}
