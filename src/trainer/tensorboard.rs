//! TensorBoard's event files of a run, in its folder `tensorboard/`: a file after each validation and checkpoint, with the
//! records since the one before. Rank 0 writes them, beside training; how they are encoded is `telemetry::tensorboard`'s.
//!
//! Every rank has the history, and where files end follows from the step alone: so whoever is rank 0 next goes on without a
//! gap. What a resumed run does again is purged by readers.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::Mutex;
use tokio::task::JoinHandle;

use super::TrainerError;
use super::setup::Trainer;
use crate::config::RunConfig;
use crate::eval::report::{StepRecord, ValidationRecord};
use crate::store::{Store, StoreError};
use crate::telemetry::tensorboard::{Events, file_name, verbatim};

/// The folder.
const FOLDER: &str = "tensorboard";

/// Files that may wait for the store.
const WAITING_MAX: usize = 4;
/// Longest that the end of a run waits for them.
const END_MAX: Duration = Duration::from_secs(10);

/// This process's part in it.
#[derive(Debug)]
pub struct TensorBoard {
    /// The next file's name, once it is known what is there. Whoever holds it writes: in turn.
    next: Arc<Mutex<Option<Next>>>,
    /// Whether this process has written one.
    begun: bool,
    /// When the file before was written.
    last: SystemTime,
    writing: Option<JoinHandle<()>>,
}

/// What the next file is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Next {
    /// When the first of the run was begun.
    began_unix_s: u64,
    part: u64,
}

/// Whether a file ends with this step.
fn ends_at(config: &RunConfig, step: u64) -> bool {
    let all = [config.validate.every, config.checkpoint.every];
    step == config.train.iterations || all.into_iter().any(|every| step.is_multiple_of(every))
}

/// The last step of the file before the one that ends at `step`.
fn file_before(config: &RunConfig, step: u64) -> u64 {
    let all = [config.validate.every, config.checkpoint.every];
    let before = |every: u64| step.saturating_sub(1) / every * every;
    all.into_iter().map(before).max().unwrap_or_default()
}

impl TensorBoard {
    fn new() -> Self {
        Self { next: Arc::default(), begun: false, last: SystemTime::now(), writing: None }
    }

    /// Waits for the files that are being written, not for long.
    pub fn finish(&mut self, runtime: &tokio::runtime::Runtime) {
        if let Some(writing) = self.writing.take()
            && runtime.block_on(async { tokio::time::timeout(END_MAX, writing).await }).is_err()
        {
            tracing::warn!("the last file for TensorBoard is not written: the store is slow");
        }
    }
}

/// What the next file after those that are there is called.
async fn after(run: &Store) -> Result<Next, StoreError> {
    let place = |path: &str| {
        let name = path.rsplit('/').next()?.strip_prefix("events.out.tfevents.")?;
        let (time, part) = name.split_once(".cpcr.")?;
        Some((time.parse::<u64>().ok()?, part.parse::<u64>().ok()?))
    };
    let objects = run.list(FOLDER).await?;
    let newest = objects.iter().filter_map(|object| place(&object.path)).max();
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let (began_unix_s, part) = newest.map_or((now.as_secs(), 0), |(time, part)| (time, part + 1));
    Ok(Next { began_unix_s, part })
}

async fn put(run: &Store, next: &Mutex<Option<Next>>, bytes: Vec<u8>) -> Result<(), StoreError> {
    let mut next = next.lock().await;
    let Next { began_unix_s, part } = match *next {
        Some(next) => next,
        None => after(run).await?,
    };
    *next = Some(Next { began_unix_s, part: part + 1 });
    run.put(&format!("{FOLDER}/{}", file_name(began_unix_s, part)), bytes.into()).await
}

/// Writes the file that ends with the step done last, if one does: beside training, which waits for no store here. Not worth a
/// failure: what cannot be written is warned of.
pub fn write(t: &mut Trainer) -> Result<(), TrainerError> {
    let pictures = std::mem::take(&mut t.pictures);
    if t.rank.0 != 0 || !t.config.telemetry.tensorboard || !ends_at(&t.config, t.step.0) {
        return Ok(());
    }
    let mut board = t.tensorboard.take().unwrap_or_else(TensorBoard::new);
    if Arc::strong_count(&board.next) > WAITING_MAX {
        tracing::warn!("a file for TensorBoard is left out: the store is behind");
        t.tensorboard = Some(board);
        return Ok(());
    }
    let config = toml::to_string(&t.config).map_err(|e| TrainerError::Report(e.to_string()))?;
    let bytes = encode(t, &board, &config, &pictures).into_bytes();
    let (run, next) = (t.run.clone(), Arc::clone(&board.next));
    board.writing = Some(t.runtime.spawn(async move {
        if let Err(error) = put(&run, &next, bytes).await {
            tracing::warn!(%error, "a file for TensorBoard is not written");
        }
    }));
    board.begun = true;
    board.last = SystemTime::now();
    t.tensorboard = Some(board);
    Ok(())
}

/// The records since the file before, as events; pictures are of this step.
fn encode(t: &Trainer, board: &TensorBoard, config: &str, pictures: &[Vec<u8>]) -> Events {
    let (from, to) = (file_before(&t.config, t.step.0), t.step.0);
    // Records have no times: they are spread over the time since the file before.
    let since = board.last.elapsed().unwrap_or_default().as_secs_f64();
    let begin = board.last.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let steps = to.saturating_sub(from).max(1) as f64;
    let wall_s = |step: u64| {
        begin.as_secs_f64() + since * (step.saturating_sub(from) as f64 / steps).min(1.0)
    };
    let first = (!board.begun).then_some(from + 1);
    let mut events = Events::begin(wall_s(from), first);
    if !board.begun {
        events.text("configuration", from + 1, wall_s(from), &verbatim(config));
    }
    let news = |step: u64| step > from && step <= to;
    for record in t.history.steps.iter().filter(|record| news(record.step)) {
        scalars(&mut events, record, wall_s(record.step));
    }
    for record in t.history.validations.iter().filter(|record| news(record.step)) {
        dice(&mut events, record, wall_s(record.step));
    }
    for (number, png) in pictures.iter().enumerate() {
        let (height, width) = size_of_png(png);
        events.image_png(&format!("validation/{number}"), to, wall_s(to), png, height, width);
    }
    events
}

fn scalars(events: &mut Events, record: &StepRecord, wall_s: f64) {
    for (name, value) in &record.losses {
        events.scalar(&format!("loss/{name}"), record.step, wall_s, *value);
    }
    for (tag, value) in [
        ("train/learning_rate", record.lr),
        ("train/consistency_weight", record.consistency_weight),
        ("speed/images_per_s", record.images_per_s),
        ("speed/data_wait_share", record.data_wait_share),
    ] {
        events.scalar(tag, record.step, wall_s, value);
    }
}

fn dice(events: &mut Events, record: &ValidationRecord, wall_s: f64) {
    events.scalar("dice/mean", record.step, wall_s, record.mean_dice);
    for (class, dice) in &record.class_dice {
        events.scalar(&format!("dice/{class}"), record.step, wall_s, *dice);
    }
}

/// Height and width, as the header says them.
fn size_of_png(png: &[u8]) -> (u32, u32) {
    let number = |at: usize| {
        let bytes = png.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u32::from_be_bytes)
    };
    (number(20), number(16))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::StoreOptions;

    #[test]
    fn files_end_at_validations_and_checkpoints_and_leave_no_step_out() {
        let mut config = RunConfig::default();
        (config.validate.every, config.checkpoint.every) = (4, 6);
        config.train.iterations = 17;
        let ends: Vec<u64> = (1..=17).filter(|step| ends_at(&config, *step)).collect();
        assert_eq!(ends, [4, 6, 8, 12, 16, 17]);
        let before: Vec<u64> = ends.iter().map(|step| file_before(&config, *step)).collect();
        assert_eq!(before, [0, 4, 6, 8, 12, 16]);
    }

    #[tokio::test]
    async fn another_process_counts_on_under_the_runs_first_time() {
        let run = Store::open("memory:///", &StoreOptions::default()).unwrap();
        assert_eq!(after(&run).await.unwrap().part, 0);
        for part in [0, 1, 11] {
            let path = format!("{FOLDER}/{}", file_name(1_700_000_000, part));
            run.put(&path, b"x".as_slice().into()).await.unwrap();
        }
        let next = Mutex::default();
        put(&run, &next, b"y".to_vec()).await.unwrap();
        put(&run, &next, b"z".to_vec()).await.unwrap();
        let path = format!("{FOLDER}/{}", file_name(1_700_000_000, 13));
        assert_eq!(&*run.get(&path).await.unwrap(), b"z");
    }
}
