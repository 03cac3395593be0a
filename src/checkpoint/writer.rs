//! Writing checkpoints beside training: a thread with a queue of one.
//!
//! [`Writer`] is used from the training thread, which is no async task: `submit` hands over what makes
//! a snapshot and returns; `flush` waits. The protocol is [`write()`]: objects under a fresh attempt, all
//! acknowledged, then one created manifest. A crash anywhere leaves either no manifest or a whole
//! checkpoint.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use tokio::runtime::Handle;
use tracing::Span;

use super::error::CheckpointError;
use super::host_tensor::{NamedTensors, encode_tensors};
use super::manifest::{
    FORMAT, MODEL_FILE, Manifest, OPTIMIZER_FILE, ObjectEntry, Position, STATE_FILE, TrainState,
    manifest_path, step_folder,
};
use super::reader::{read_manifest, verify};
use super::retention::{Retention, retain};
use crate::store::{Created, Store, unique_id};
use crate::telemetry::Past;
use crate::types::{ObjectDigest, Step, WorldSize};

/// Outcomes kept for a flush that may never come.
const OUTCOMES_MAX: usize = 16;

/// One state of training, copied out of the tensors that go on changing.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Optimiser steps done.
    pub step: Step,
    /// Trainers that took the last one.
    pub world_size: WorldSize,
    /// Threads per trainer.
    pub threads: u32,
    /// Where the streams stand.
    pub position: Position,
    /// The network's parameters and buffers.
    pub model: NamedTensors,
    /// The optimiser's state.
    pub optimizer: NamedTensors,
    /// Everything else.
    pub state: TrainState,
    /// The steps validated so far, the best first: what retention goes by.
    pub best: Vec<Step>,
}

/// What every checkpoint of a run says about the run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunIdentity {
    /// SHA-256 of the resolved configuration.
    pub config_sha256: String,
    /// SHA-256 of the dataset's manifest.
    pub dataset_sha256: String,
}

/// How a [`Writer`] writes.
#[derive(Debug, Clone)]
pub struct WriterOptions {
    /// Recorded in every manifest.
    pub identity: RunIdentity,
    /// Applied after every checkpoint; `None` keeps all.
    pub retention: Option<Retention>,
    /// Told of every checkpoint, on the writer's thread.
    pub written: fn(&Written),
}

/// A checkpoint that is committed.
#[derive(Debug, Clone)]
pub struct Written {
    /// Its manifest.
    pub manifest: Manifest,
    /// Whether it was read back, by its hashes.
    pub verified: bool,
    /// When its writer began with it.
    pub began: SystemTime,
    /// When its manifest was there.
    pub committed: SystemTime,
    /// The span that handed it over.
    pub cause: Past,
    /// How long whoever handed it over had been at it.
    pub held: Duration,
}

/// What became of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It is the checkpoint of its step.
    Written(Manifest),
    /// The step has a whole checkpoint already, which stays.
    AlreadyThere(Manifest),
}

/// Writes one checkpoint and returns once it is committed.
pub async fn write(
    run: &Store,
    identity: &RunIdentity,
    snapshot: &Snapshot,
) -> Result<Outcome, CheckpointError> {
    let step = snapshot.step;
    let files = encode(snapshot)?;
    let manifest = manifest_of(identity, snapshot, unique_id(), &files);
    let sealed = manifest.encode()?;
    let folder = manifest.attempt_folder();
    let uploads = files.into_iter().map(|(name, bytes)| {
        let path = format!("{folder}/{name}");
        async move { run.put_noted(&path, bytes).await }
    });
    futures::future::try_join_all(uploads).await?;
    let path = manifest_path(step);
    if run.create(&path, sealed.clone()).await? == Created::New {
        return Ok(Outcome::Written(manifest));
    }
    // Somebody committed this step before: an earlier life of this run, or a writer that was
    // given up too early. A whole checkpoint stays; a damaged one gives way, once.
    let existing = async {
        let existing = read_manifest(run, step).await?;
        verify(run, &existing).await?;
        Ok(existing)
    };
    match existing.await {
        Ok(existing) => {
            run.delete_prefix(&folder).await?;
            return Ok(Outcome::AlreadyThere(existing));
        }
        Err(error @ (CheckpointError::Damaged { .. } | CheckpointError::Missing { .. })) => {
            tracing::warn!(run = %run, %error, "replacing it");
            run.delete(&path).await?;
        }
        Err(error) => return Err(error),
    }
    match run.create(&path, sealed).await? {
        Created::New => Ok(Outcome::Written(manifest)),
        Created::Exists => Err(CheckpointError::Damaged {
            step,
            detail: format!("{path} is being written by someone else at the same time"),
        }),
    }
}

/// The three files, in the manifest's order.
fn encode(snapshot: &Snapshot) -> Result<Vec<(&'static str, Bytes)>, CheckpointError> {
    let invalid = |name: &str, error: String| CheckpointError::Invalid {
        step: snapshot.step,
        detail: format!("{name}: {error}"),
    };
    let tensors = |name: &'static str, tensors: &NamedTensors| {
        encode_tensors(tensors).map_err(|e| invalid(name, e.to_string()))
    };
    let state = serde_json::to_vec_pretty(&snapshot.state)
        .map_err(|e| invalid(STATE_FILE, e.to_string()))?;
    Ok(vec![
        (MODEL_FILE, tensors(MODEL_FILE, &snapshot.model)?),
        (OPTIMIZER_FILE, tensors(OPTIMIZER_FILE, &snapshot.optimizer)?),
        (STATE_FILE, Bytes::from(state)),
    ])
}

fn manifest_of(
    identity: &RunIdentity,
    snapshot: &Snapshot,
    attempt: String,
    files: &[(&'static str, Bytes)],
) -> Manifest {
    let folder = format!("{}/{attempt}", step_folder(snapshot.step));
    let objects: BTreeMap<_, _> = files
        .iter()
        .map(|(name, bytes)| {
            let path = format!("{folder}/{name}");
            ((*name).to_owned(), ObjectEntry { path, digest: ObjectDigest::of(bytes) })
        })
        .collect();
    Manifest {
        format: FORMAT,
        step: snapshot.step,
        attempt,
        world_size: snapshot.world_size,
        threads: snapshot.threads,
        position: snapshot.position,
        config_sha256: identity.config_sha256.clone(),
        dataset_sha256: identity.dataset_sha256.clone(),
        objects,
    }
}

/// Writes snapshots in the order in which they were submitted, on a thread of its own.
#[derive(Debug)]
pub struct Writer {
    orders: Option<SyncSender<Order>>,
    thread: Option<JoinHandle<()>>,
    /// Whether a write has failed of which nobody has been told yet.
    failed: Arc<AtomicBool>,
}

/// Makes a snapshot of what was copied when it was submitted.
type Make = Box<dyn FnOnce() -> Result<Snapshot, CheckpointError> + Send>;

/// Who handed a snapshot over, and how long that took.
struct Handed {
    cause: Past,
    held: Duration,
}

enum Order {
    Write(Step, Handed, Make),
    Flush(SyncSender<Result<Vec<Outcome>, CheckpointError>>),
}

impl Writer {
    /// Starts the thread. Its I/O runs on `runtime`, which must outlive the writer and have worker
    /// threads of its own: on a single-threaded one, a flush from within would wait for itself.
    pub fn start(runtime: Handle, run: Store, options: WriterOptions) -> std::io::Result<Self> {
        // One waits while one is being written: memory for at most three copies of the state.
        let (orders, queue) = sync_channel(1);
        let failed = Arc::new(AtomicBool::new(false));
        let thread = std::thread::Builder::new().name("checkpoint-writer".to_owned()).spawn({
            let failed = Arc::clone(&failed);
            move || serve(&runtime, &run, &options, &queue, &failed)
        })?;
        Ok(Self { orders: Some(orders), thread: Some(thread), failed })
    }

    /// Hands over the snapshot of `step`, at which the caller has been `since` then and which `make` makes on the writer's thread; waits only while another is waiting
    /// already.
    ///
    /// # Errors
    /// That of an earlier snapshot which could not be written: whoever goes on regardless would
    /// train without a net. It is told once.
    pub fn submit(
        &self,
        (step, since): (Step, Instant),
        make: impl FnOnce() -> Result<Snapshot, CheckpointError> + Send + 'static,
    ) -> Result<(), CheckpointError> {
        if self.failed.swap(false, Ordering::Acquire) {
            self.flush(|| {})?;
        }
        let handed = Handed { cause: Past::below(&Span::current()), held: since.elapsed() };
        self.order(Order::Write(step, handed, Box::new(make)))
    }

    /// Waits until everything submitted is committed, calling `waiting` about every second: what
    /// became of it since the last flush, newest first (the last few), or the first error since
    /// then.
    ///
    /// The wait is bounded by the store's own deadlines.
    pub fn flush(&self, mut waiting: impl FnMut()) -> Result<Vec<Outcome>, CheckpointError> {
        let (reply, answer) = sync_channel(1);
        self.order(Order::Flush(reply))?;
        loop {
            match answer.recv_timeout(Duration::from_secs(1)) {
                Ok(report) => {
                    self.failed.store(false, Ordering::Release);
                    return report;
                }
                Err(RecvTimeoutError::Timeout) => waiting(),
                Err(RecvTimeoutError::Disconnected) => return Err(CheckpointError::WriterStopped),
            }
        }
    }

    fn order(&self, order: Order) -> Result<(), CheckpointError> {
        let orders = self.orders.as_ref().ok_or(CheckpointError::WriterStopped)?;
        orders.send(order).map_err(|_| CheckpointError::WriterStopped)
    }
}

impl Drop for Writer {
    /// Lets what was submitted be written: a clean exit must not lose the last checkpoint.
    fn drop(&mut self) {
        self.orders = None;
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the checkpoint writer panicked");
        }
    }
}

/// The writer's thread, until the last sender is gone.
fn serve(
    runtime: &Handle,
    run: &Store,
    options: &WriterOptions,
    queue: &Receiver<Order>,
    failed: &AtomicBool,
) {
    let mut since_flush: Result<Vec<Outcome>, CheckpointError> = Ok(Vec::new());
    for order in queue {
        match order {
            Order::Write(step, handed, make) => {
                let write =
                    |snapshot| runtime.block_on(write_and_retain(run, options, &snapshot, handed));
                match make().and_then(write) {
                    Ok(outcome) => {
                        if let Ok(outcomes) = &mut since_flush {
                            outcomes.truncate(OUTCOMES_MAX - 1);
                            outcomes.insert(0, outcome);
                        }
                    }
                    Err(error) => {
                        tracing::error!(run = %run, %step, %error, "checkpoint not written");
                        if since_flush.is_ok() {
                            since_flush = Err(error);
                        }
                        failed.store(true, Ordering::Release);
                    }
                }
            }
            Order::Flush(reply) => {
                let report = std::mem::replace(&mut since_flush, Ok(Vec::new()));
                if reply.send(report).is_err() {
                    tracing::debug!("nobody waits for this flush any more");
                }
            }
        }
    }
}

async fn write_and_retain(
    run: &Store,
    options: &WriterOptions,
    snapshot: &Snapshot,
    Handed { cause, held }: Handed,
) -> Result<Outcome, CheckpointError> {
    let began = SystemTime::now();
    let outcome = write(run, &options.identity, snapshot).await?;
    let committed = SystemTime::now();
    let mut verified = false;
    if let Some(retention) = options.retention {
        match retain(run, retention, &snapshot.best).await {
            // It has read the newest one back before it removed any.
            Ok(retained) => verified = retained.verified == Some(snapshot.step),
            // The checkpoint is there; old ones are cleared after the next.
            Err(error) => tracing::warn!(run = %run, %error, "old checkpoints were not removed"),
        }
    }
    let (Outcome::Written(manifest) | Outcome::AlreadyThere(manifest)) = outcome.clone();
    (options.written)(&Written { manifest, verified, began, committed, cause, held });
    Ok(outcome)
}
