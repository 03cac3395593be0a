//! What outlives a trainer: checkpoints, and the report at the end.

use super::TrainerError;
use super::orders::Orders;
use super::setup::{self, Trainer};
use super::snapshot::{Circumstances, hand_over, unnamed};
use super::{pictures, validate};
use crate::checkpoint::{self, Checkpoint, Position};
use crate::eval::report::{self, ReportInputs, RunHistory};
use crate::ledger::{Carried, Receipts};
use crate::model::{Ensemble, HostTensor, main_state};
use crate::page::{self, Document};
use crate::store::{Store, StoreError, StoreOptions};
use crate::types::{Rank, Step};

/// A checkpoint of this step. Rank 0 only: every rank has the same weights, and rank 0's running statistics are the
/// run's.
pub fn checkpoint(t: &mut Trainer) -> Result<(), TrainerError> {
    let Some(writer) = t.writer.as_ref().filter(|_| t.rank.0 == 0) else { return Ok(()) };
    let step = crate::telemetry::number(t.step.0);
    let _held = tracing::info_span!("checkpoint", step).entered();
    let batch = &t.config.batch;
    let of = Circumstances {
        step: t.step,
        world_size: t.world,
        threads: t.assignment.threads,
        position: Position {
            labelled: t.step.0 * u64::from(batch.labelled),
            unlabelled: t.step.0 * u64::from(t.config.unlabelled_batch()),
        },
        history: t.history.clone(),
        carried: t.receipts.carried(),
    };
    hand_over(writer, &t.nets, &t.copies, of)?;
    t.submitted = Some(t.step);
    Ok(())
}

/// A checkpoint by a trainer that belongs to no generation any more, if it has anything to keep.
pub fn checkpoint_alone(t: &mut Trainer) -> Result<(), TrainerError> {
    if !t.live || t.step == Step(0) {
        return Ok(());
    }
    if t.writer.is_none() {
        t.writer = Some(setup::start_writer(t)?);
    }
    t.rank = Rank(0);
    checkpoint(t)?;
    t.flush()
}

/// Puts a checkpoint's state in force; the result are the receipts that it carries.
pub fn restore(
    checkpoint: &Checkpoint,
    nets: &mut Ensemble,
    history: &mut RunHistory,
) -> Result<Receipts, TrainerError> {
    nets.load_host(unnamed(&checkpoint.model)?, unnamed(&checkpoint.optimizer)?)?;
    if let Some(lines) = checkpoint.state.0.get("history").and_then(|h| h.as_str()) {
        *history = RunHistory::from_json_lines(lines.as_bytes());
    }
    let step = checkpoint.manifest.step;
    Ok(Receipts::resume(&Carried::of(&checkpoint.state, step)?, step)?)
}

/// The weights that `train.init_from` names: a safetensors file of a network's state, or a
/// checkpoint's own.
pub fn given_weights(
    runtime: &tokio::runtime::Runtime,
    url: &str,
) -> Result<Vec<HostTensor>, TrainerError> {
    let wrong = |reason: String| TrainerError::InitialWeights { url: url.to_owned(), reason };
    let (folder, file) = url
        .rsplit_once('/')
        .filter(|(folder, file)| !folder.is_empty() && file.ends_with(".safetensors"))
        .ok_or_else(|| wrong("URL/FILE.safetensors is wanted".to_owned()))?;
    let unread = |error: StoreError| match error {
        // It may come back.
        StoreError::Unreachable { .. } | StoreError::Other { .. } => TrainerError::Store(error),
        error => wrong(error.to_string()),
    };
    let store = Store::open(folder, &StoreOptions::default().existing()).map_err(unread)?;
    let bytes = runtime.block_on(store.get(file)).map_err(unread)?;
    let tensors = checkpoint::decode_tensors(&bytes).map_err(|e| wrong(e.to_string()))?;
    Ok(main_state(unnamed(&tensors).map_err(|e| wrong(e.to_string()))?))
}

/// This machine, without its name.
fn machine() -> String {
    let system = rustix::system::uname();
    let [name, release] =
        [system.sysname(), system.release()].map(|s| s.to_string_lossy().into_owned());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    let model = model.map_or("unknown processor", |(_, model)| model.trim());
    format!("{cores} cores of {model}, {name} {release}")
}

/// What the coordinator has written down of the run. The report does without where that cannot be had.
fn seen_by_coordinator(t: &Trainer) -> Option<Document> {
    let bytes = match t.runtime.block_on(t.run.get(page::SEEN_PATH)) {
        Ok(bytes) => bytes,
        Err(StoreError::NotFound { .. }) => return None,
        Err(error) => {
            tracing::warn!(%error, "the report lacks what the coordinator has seen");
            return None;
        }
    };
    serde_json::from_slice(&bytes)
        .inspect_err(|error| tracing::warn!(%error, "`{}` is damaged", page::SEEN_PATH))
        .ok()
}

/// Rank 0 writes the report into the run.
pub fn final_report(t: &mut Trainer, orders: &Orders) -> Result<(), TrainerError> {
    if t.summary.is_none() {
        // A complete run that was started again: its validation is made once more.
        validate::validate(t, orders)?;
    }
    if t.rank.0 != 0 {
        return Ok(());
    }
    if let Some(tensorboard) = &mut t.tensorboard {
        tensorboard.finish(&t.runtime);
    }
    // The report is worth more than its pictures.
    let lacks = |error: &TrainerError| tracing::warn!(%error, "the report lacks pictures");
    let overlays = pictures::of_first(t).inspect_err(lacks).unwrap_or_default();
    let extremes = t.summary.as_ref().map(|summary| pictures::of_extremes(t, summary));
    let extremes = extremes.transpose().inspect_err(lacks).ok().flatten();
    let [best, worst] = extremes.unwrap_or_default();
    let seen = seen_by_coordinator(t);
    let method = t.config.method.name();
    let config = toml::to_string(&t.config).map_err(|e| TrainerError::Report(e.to_string()))?;
    let names = validate::class_names(t);
    let environment = [
        ("workers".to_owned(), t.world.to_string()),
        ("threads per worker".to_owned(), t.assignment.threads.to_string()),
        ("backend".to_owned(), t.assignment.backend.to_string()),
        ("device".to_owned(), format!("{:?}", t.device)),
        ("precision".to_owned(), format!("{:?}", t.config.train.precision).to_lowercase()),
        ("seed".to_owned(), t.seed.to_string()),
        ("dataset".to_owned(), format!("sha256 {}", t.dataset.digest().sha256)),
        ("machine of rank 0".to_owned(), machine()),
        ("cpcr".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
        ("libtorch".to_owned(), "2.11".to_owned()),
    ];
    let files = report::render(&ReportInputs {
        name: &t.config.name,
        run_url: &page::shown(t.run.url()),
        data_url: &page::shown(t.config.data.url.as_deref().unwrap_or_default()),
        history: &t.history,
        summary: t.summary.as_ref(),
        class_names: &names,
        config: &config,
        environment: &environment,
        overlays: &overlays,
        best: &best,
        worst: &worst,
        method: &method,
        steps: t.total.0,
        seen: seen.as_ref(),
    })
    .map_err(|e| TrainerError::Report(e.to_string()))?;
    t.runtime.block_on(async {
        for (path, bytes) in files {
            t.run.put(&path, bytes.into()).await?;
        }
        Ok::<_, TrainerError>(())
    })
}
