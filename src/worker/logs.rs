//! The trainer's log in the run's folder: `logs/node-0003/LIFE-000001.jsonl` and so on, one object for what was new.
//!
//! A copy of what is in the agent's own folder, some seconds late. It never holds anything up: what cannot be written is
//! tried again with what comes after it, and what is too much is left out, which is said.

use std::io::SeekFrom;
use std::path::PathBuf;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::store::{Store, StoreOptions};
use crate::types::NodeId;

/// How often the log is looked at.
const EVERY: Duration = Duration::from_secs(10);
/// The most of it that one object takes; what is more is left out.
const BYTES_MAX: u64 = 4 << 20;
/// How long an agent that ends waits for the rest.
const END_MAX: Duration = Duration::from_secs(3);

/// The copying, beside the agent.
pub(super) struct LogShip {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

/// A log being copied.
struct Tail {
    file: PathBuf,
    run: Store,
    /// What its objects' names begin with.
    stem: String,
    read: u64,
    parts: u32,
}

impl LogShip {
    /// Copies what is appended to `file` from now on into the run at `url`; `life` tells this agent's from others'.
    pub(super) fn start(url: &str, file: PathBuf, node: NodeId, life: &str) -> Option<Self> {
        let run = Store::open(url, &StoreOptions::default())
            .inspect_err(|error| tracing::warn!(%error, "logs are not copied into the run"))
            .ok()?;
        let stem = format!("logs/node-{:04}/{life}", node.0);
        let read = std::fs::metadata(&file).map_or(0, |data| data.len());
        let mut tail = Tail { file, run, stem, read, parts: 0 };
        let (stop, mut stopped) = oneshot::channel();
        let task = tokio::spawn(async move {
            loop {
                let going = tokio::select! {
                    _ = &mut stopped => false,
                    () = tokio::time::sleep(EVERY) => true,
                };
                if let Err(error) = tail.ship().await {
                    tracing::debug!(%error, "the log is not copied yet");
                }
                if !going {
                    return;
                }
            }
        });
        Some(Self { stop, task })
    }

    /// Copies the rest, if that is quick.
    pub(super) async fn end(self) {
        // A task that is gone has nothing to be told.
        self.stop.send(()).ok();
        if tokio::time::timeout(END_MAX, self.task).await.is_err() {
            tracing::debug!("the end of the log is not copied");
        }
    }
}

impl Tail {
    /// Writes what is new, whole lines of it.
    async fn ship(&mut self) -> std::io::Result<()> {
        let mut file = match tokio::fs::File::open(&self.file).await {
            Ok(file) => file,
            // No trainer has been started yet.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        let length = file.metadata().await?.len();
        let mut bytes = Vec::new();
        if length < self.read {
            self.read = 0; // another file took its place
        }
        let new = length.saturating_sub(self.read);
        if new > BYTES_MAX {
            let left_out = new - BYTES_MAX;
            self.read += left_out;
            bytes = format!("{{\"left_out_bytes\":{left_out}}}\n").into_bytes();
        }
        file.seek(SeekFrom::Start(self.read)).await?;
        let head = bytes.len();
        file.take(BYTES_MAX).read_to_end(&mut bytes).await?;
        let Some(end) = bytes[head..].iter().rposition(|byte| *byte == b'\n') else {
            return Ok(());
        };
        bytes.truncate(head + end + 1);
        let path = format!("{}-{:06}.jsonl", self.stem, self.parts);
        self.run.put(&path, bytes.into()).await.map_err(std::io::Error::other)?;
        self.read += end as u64 + 1;
        self.parts += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn whole_lines_are_copied_once_and_too_many_are_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("trainer-3.jsonl");
        let run = Store::open("memory:///", &StoreOptions::default()).unwrap();
        let mut tail =
            Tail { file: file.clone(), run: run.clone(), stem: "logs/x".into(), read: 0, parts: 0 };
        tail.ship().await.unwrap();
        std::fs::write(&file, "one\ntwo\nhalf").unwrap();
        tail.ship().await.unwrap();
        tail.ship().await.unwrap();
        assert_eq!(&*run.get("logs/x-000000.jsonl").await.unwrap(), b"one\ntwo\n");
        assert!(!run.exists("logs/x-000001.jsonl").await.unwrap(), "nothing was new");
        let long = "x".repeat(BYTES_MAX as usize);
        std::fs::write(&file, format!("one\ntwo\nhalf\n{long}\nend\n")).unwrap();
        tail.ship().await.unwrap();
        let copied = run.get("logs/x-000001.jsonl").await.unwrap();
        let text = String::from_utf8_lossy(&copied);
        assert!(text.starts_with("{\"left_out_bytes\":") && text.ends_with("x\nend\n"));
    }
}
