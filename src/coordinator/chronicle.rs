//! Verdicts, the account of time and what the board shows, in the run's folder: `interruptions/`, `goodput/`, `page.json`. Beside the owner task, which
//! never waits for storage; what cannot be written is warned of, and stops nothing.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use serde::Serialize;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::verdict::{Goodput, Verdict};
use crate::store::Store;

/// Records that may wait.
const QUEUE: usize = 64;
/// How often the account is written.
pub(super) const ACCOUNT_EVERY: Duration = Duration::from_secs(20);
/// How long the end of a run waits for what is not written yet.
const END_MAX: Duration = Duration::from_secs(5);

/// The owner's end.
pub(super) struct Chronicle {
    entries: mpsc::Sender<(String, Bytes)>,
    task: JoinHandle<()>,
    epoch: String,
    verdicts: u32,
}

/// A record with the time of its writing.
#[derive(Serialize)]
struct Dated<'a, T> {
    /// Seconds since 1970.
    at_unix_s: f64,
    #[serde(flatten)]
    record: &'a T,
}

impl Chronicle {
    /// Starts the task; `epoch` names this coordinator's records.
    pub(super) fn start(run: Store, epoch: &str) -> Self {
        let (entries, mut queue) = mpsc::channel::<(String, Bytes)>(QUEUE);
        let task = tokio::spawn(async move {
            while let Some((path, bytes)) = queue.recv().await {
                if let Err(error) = run.put(&path, bytes).await {
                    tracing::warn!(%error, "`{path}` is not written");
                }
            }
        });
        Self { entries, task, epoch: epoch.to_owned(), verdicts: 0 }
    }

    /// Writes down a verdict.
    pub(super) fn verdict(&mut self, verdict: &Verdict) {
        self.verdicts += 1;
        let path = format!("interruptions/{}-{:04}.json", self.epoch, self.verdicts);
        self.put(path, verdict);
    }

    /// Writes down the account, over the one before.
    pub(super) fn account(&self, goodput: &Goodput) {
        self.put(format!("goodput/{}.json", self.epoch), goodput);
    }

    /// Writes down a document as it is, over the one before.
    pub(super) fn document(&self, path: &str, document: &impl Serialize) {
        match serde_json::to_vec(document) {
            Ok(bytes) => self.send(path.to_owned(), bytes.into()),
            Err(error) => tracing::warn!(%error, "`{path}` is not written"),
        }
    }

    fn put(&self, path: String, record: &impl Serialize) {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let dated = Dated { at_unix_s: now.unwrap_or_default().as_secs_f64(), record };
        let bytes = match serde_json::to_vec_pretty(&dated) {
            Ok(bytes) => Bytes::from(bytes),
            Err(error) => return tracing::warn!(%error, "`{path}` is not written"),
        };
        self.send(path, bytes);
    }

    fn send(&self, path: String, bytes: Bytes) {
        if let Err(error) = self.entries.try_send((path, bytes)) {
            let (mpsc::error::TrySendError::Full((path, _))
            | mpsc::error::TrySendError::Closed((path, _))) = error;
            tracing::warn!("`{path}` is not written: the store is behind");
        }
    }

    /// Waits for what is left, not for long.
    pub(super) async fn end(self) {
        drop(self.entries);
        if tokio::time::timeout(END_MAX, self.task).await.is_err() {
            tracing::warn!("the last records of interruptions and goodput are not written");
        }
    }
}
