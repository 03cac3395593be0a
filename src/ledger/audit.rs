//! The audit of a run in the bucket: objects streamed twice, first for their shape, then for what they say.
//!
//! Reads only. The newest checkpoint is read before the ledger is listed: what it relies on was recorded
//! before, so a run may go on while it is audited. Not here: how the outcome is shown (`cli`).

use futures::{StreamExt, TryStreamExt, stream};
use serde::Serialize;

use super::branches::{Branches, Path, Violation};
use super::error::LedgerError;
use super::receipts::Carried;
use super::record::object_path;
use super::replay::{Counts, Replay};
use super::writer::{numbers, read};
use crate::checkpoint::{self, CheckpointError};
use crate::config::RunConfig;
use crate::data::{Dataset, Deal, DealSpec};
use crate::store::Store;
use crate::types::Step;

/// Objects fetched side by side.
const FETCHES_MAX: usize = 8;

/// A sound ledger, in numbers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// What counts.
    #[serde(flatten)]
    pub counts: Counts,
    /// Of these steps, those that only the newest checkpoint holds yet; a resume records them.
    pub steps_in_checkpoint_only: u64,
    /// Steps that were recorded and then trained again from a checkpoint.
    pub superseded_steps: u64,
    /// Starts and resumes.
    pub lineages: u64,
    /// Those of which steps count.
    pub lineages_followed: u64,
    /// Objects of the ledger.
    pub objects: u64,
    /// Whether the deal was compared with the dataset itself.
    pub dataset_checked: bool,
}

/// Why there is no [`Report`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AuditError {
    /// The ledger is not sound.
    #[error("{0}")]
    Violation(#[from] Violation),
    /// The run was trained by a release that kept no ledger.
    #[error(
        "no ledger, but a checkpoint of step {0}: a release of cpcr without one trained it, or somebody removed it; nothing can be proved"
    )]
    NoLedger(Step),
    /// Only the dataset could say what was planned.
    #[error(
        "the ledger is empty, and the checkpoint of step {0} carries receipts: start the run again, which records them, or make the dataset reachable"
    )]
    NotYetRecorded(Step),
    /// The ledger could not be read.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The checkpoints could not be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
}

/// Follows the newest lineage of `run` and replays its deal.
///
/// # Errors
/// [`AuditError::Violation`] with the first thing that is wrong.
pub async fn audit(
    run: &Store,
    config: &RunConfig,
    dataset: Option<&Dataset>,
) -> Result<Report, AuditError> {
    let newest = checkpoint::latest_state(run).await?;
    let carried = newest
        .map(|(manifest, state)| Ok((manifest.step, Carried::of(&state, manifest.step)?)))
        .transpose()
        .map_err(|error: LedgerError| {
            Violation::of("the newest checkpoint".to_owned(), error.to_string())
        })?;
    let there = numbers(run).await?;
    let (branches, fault) = shape(run, &there).await?;
    if branches.lineages() == 0
        && fault.is_none()
        && let Some((step, carried)) = &carried
        && *carried == Carried::unrecorded(*step)
    {
        return Err(AuditError::NoLedger(*step));
    }
    // What is wrong further on does not hide what is wrong before it.
    let checkpoint = carried.as_ref().map(|(step, carried)| (*step, carried));
    let path = branches.path(checkpoint.filter(|_| fault.is_none()))?;
    let spec = match (&path.deal, dataset) {
        (Some(deal), _) => deal.clone(),
        (None, Some(dataset)) => planned(config, dataset)?,
        (None, None) => match (&fault, path.end) {
            (Some(fault), _) => return Err(fault.clone().into()),
            (None, step) if step > Step(0) => return Err(AuditError::NotYetRecorded(step)),
            (None, _) => return Ok(nothing(&branches)),
        },
    };
    let deal =
        Deal::new(spec).map_err(|error| Violation::of("the deal".to_owned(), error.to_string()))?;
    let mut replay = Replay::new(&path, &deal);
    let mut objects =
        stream::iter(1..=branches.objects()).map(|number| read(run, number)).buffered(FETCHES_MAX);
    while let Some(object) = objects.try_next().await.map_err(named)? {
        replay.object(&object)?;
    }
    if let Some(fault) = fault {
        return Err(fault.into());
    }
    let counts = replay.finish()?;
    compare(&path, deal.spec(), config, dataset)?;
    let in_checkpoint = path.carried.as_ref().map_or(0, |(_, receipts)| receipts.len() as u64);
    Ok(Report {
        superseded_steps: branches.receipts() - (counts.steps - in_checkpoint),
        steps_in_checkpoint_only: in_checkpoint,
        counts,
        lineages: branches.lineages(),
        lineages_followed: path.segments.len() as u64,
        objects: branches.objects(),
        dataset_checked: dataset.is_some(),
    })
}

/// The lineages, as far as the first object that is not right, and what is wrong with that one.
async fn shape(run: &Store, there: &[u64]) -> Result<(Branches, Option<Violation>), AuditError> {
    let mut branches = Branches::default();
    let mut objects = stream::iter(there).map(|number| read(run, *number)).buffered(FETCHES_MAX);
    while let Some(object) = objects.next().await {
        let number = branches.objects() + 1;
        let fault = match object {
            Ok(object) => branches.add(&object).err(),
            // Its number is not known, but that of the object before is.
            Err(_) if !there.contains(&number) => {
                Some(Violation::of(object_path(number), "it is missing"))
            }
            Err(error) => match named(error) {
                AuditError::Violation(fault) => Some(fault),
                error => return Err(error),
            },
        };
        if fault.is_some() {
            return Ok((branches, fault));
        }
    }
    Ok((branches, None))
}

/// Damage and formats are the ledger's fault; what the store says is not.
fn named(error: LedgerError) -> AuditError {
    match error {
        LedgerError::Damaged { object, detail } => Violation::of(object, detail).into(),
        LedgerError::NewerFormat { ref object, .. } => {
            let what = error.to_string();
            let what = what.strip_prefix(object.as_str()).unwrap_or(&what).trim_start();
            Violation::of(object.clone(), what).into()
        }
        error => error.into(),
    }
}

/// The deal that the configuration asks for on `dataset`.
fn planned(config: &RunConfig, dataset: &Dataset) -> Result<DealSpec, Violation> {
    let manifest = dataset.manifest();
    let (labelled, unlabelled) = manifest
        .pools(config.data.labelled)
        .map_err(|error| Violation::of("config.toml".to_owned(), error.to_string()))?;
    let batch_unlabelled = if unlabelled.is_empty() { 0 } else { config.unlabelled_batch() };
    Ok(DealSpec {
        seed: config.train.seed,
        labelled,
        unlabelled,
        block_rows: manifest.block_rows,
        batch_labelled: config.batch.labelled,
        batch_unlabelled,
    })
}

/// Whether the recorded deal is the one that the configuration and the dataset ask for.
fn compare(
    path: &Path,
    deal: &DealSpec,
    config: &RunConfig,
    dataset: Option<&Dataset>,
) -> Result<(), Violation> {
    let wanted = match dataset {
        Some(dataset) => planned(config, dataset)?,
        // What only the dataset knows is taken as recorded.
        None => DealSpec {
            seed: config.train.seed,
            batch_labelled: config.batch.labelled,
            batch_unlabelled: match deal.unlabelled.is_empty() {
                true => 0,
                false => config.unlabelled_batch(),
            },
            ..deal.clone()
        },
    };
    let differs = |what: &str, recorded: String, wanted: String| {
        let what = format!("{what}: {wanted} now, {recorded} in the ledger");
        Err(Violation::of("config.toml and its dataset".to_owned(), what))
    };
    if *deal != wanted {
        return differs("the deal", format!("{deal:?}"), format!("{wanted:?}"));
    }
    if let (Some(dataset), Some(recorded)) = (dataset, &path.dataset_sha256)
        && dataset.digest().sha256 != *recorded
    {
        let now = dataset.digest().sha256.clone();
        return differs("the SHA-256 of the dataset's manifest", recorded.clone(), now);
    }
    Ok(())
}

/// A run that has not taken a step.
fn nothing(branches: &Branches) -> Report {
    let (steps, samples, pool, epochs_complete, epochs_partial) = (0, 0, 0, 0, 0);
    let first_step = Step(0);
    Report {
        counts: Counts { steps, first_step, samples, pool, epochs_complete, epochs_partial },
        steps_in_checkpoint_only: 0,
        superseded_steps: 0,
        lineages: branches.lineages(),
        lineages_followed: 0,
        objects: branches.objects(),
        dataset_checked: false,
    }
}
