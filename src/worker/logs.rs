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

use super::AgentOptions;
use crate::store::{Store, StoreOptions};

/// How often the log is looked at.
const EVERY: Duration = Duration::from_secs(10);
/// After so many objects the next ones come half as often, again and again: a run of weeks does not fill its bucket.
const PARTS_PER_PACE: u32 = 100;
/// Looks between two objects, at most (5 minutes), where nothing is amiss.
const LOOKS_MAX: u32 = 30;
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
    /// Looks since the last object.
    looks: u32,
}

/// What a look found.
struct New {
    /// Whole lines, after a word on what was left out before them.
    bytes: Vec<u8>,
    /// How far the log is read with them.
    to: u64,
}

impl LogShip {
    /// Copies what is appended to the trainer's log from now on into the run; `life` tells this agent's from others'.
    pub(super) fn start(options: &AgentOptions, life: &str) -> Option<Self> {
        let (file, node) = (options.child.log(options.node), options.node);
        let run = Store::open(&options.run, &StoreOptions::default())
            .inspect_err(|error| tracing::warn!(%error, "logs are not copied into the run"))
            .ok()?;
        let stem = format!("logs/node-{:04}/{life}", node.0);
        let read = std::fs::metadata(&file).map_or(0, |data| data.len());
        let mut tail = Tail { file, run, stem, read, parts: 0, looks: 0 };
        let (stop, mut stopped) = oneshot::channel();
        let task = tokio::spawn(async move {
            loop {
                let going = tokio::select! {
                    _ = &mut stopped => false,
                    () = tokio::time::sleep(EVERY) => true,
                };
                if let Err(error) = tail.look(!going).await {
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
    /// Writes what is new, if it is time for it, or a line of it is a warning.
    async fn look(&mut self, at_once: bool) -> std::io::Result<()> {
        self.looks = self.looks.saturating_add(1);
        let Some(new) = self.news().await? else { return Ok(()) };
        let waits = self.looks < looks_between(self.parts)
            && (new.bytes.len() as u64) < BYTES_MAX / 2
            && !is_urgent(&new.bytes);
        if waits && !at_once {
            return Ok(());
        }
        let path = format!("{}-{:06}.jsonl", self.stem, self.parts);
        self.run.put(&path, new.bytes.into()).await.map_err(std::io::Error::other)?;
        (self.read, self.looks) = (new.to, 0);
        self.parts += 1;
        Ok(())
    }

    /// What came since the last object, if it has an end.
    async fn news(&mut self) -> std::io::Result<Option<New>> {
        let mut file = match tokio::fs::File::open(&self.file).await {
            Ok(file) => file,
            // No trainer has been started yet.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let length = file.metadata().await?.len();
        if length < self.read {
            self.read = 0; // another file took its place
        }
        let mut from = self.read;
        let mut bytes = Vec::new();
        let left_out = length.saturating_sub(from).saturating_sub(BYTES_MAX);
        if left_out > 0 {
            from += left_out;
            bytes = format!("{{\"left_out_bytes\":{left_out}}}\n").into_bytes();
        }
        file.seek(SeekFrom::Start(from)).await?;
        let head = bytes.len();
        file.take(BYTES_MAX).read_to_end(&mut bytes).await?;
        let Some(end) = bytes[head..].iter().rposition(|byte| *byte == b'\n') else {
            return Ok(None);
        };
        bytes.truncate(head + end + 1);
        Ok(Some(New { bytes, to: from + end as u64 + 1 }))
    }
}

/// How many looks there are from one object to the next, after `parts` of them.
fn looks_between(parts: u32) -> u32 {
    1_u32.checked_shl(parts / PARTS_PER_PACE).map_or(LOOKS_MAX, |looks| looks.min(LOOKS_MAX))
}

/// Whether a line is a warning or an error, or a library's last words, which are no JSON: whoever looks for what went
/// wrong wants it soon.
fn is_urgent(lines: &[u8]) -> bool {
    let text = String::from_utf8_lossy(lines);
    let is_warning = |level: &&str| text.contains(&format!("\"level\":\"{level}\""));
    ["WARN", "ERROR"].iter().any(is_warning) || text.lines().any(|line| !line.starts_with('{'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tail(folder: &std::path::Path, run: &Store) -> Tail {
        let file = folder.join("trainer-3.jsonl");
        Tail { file, run: run.clone(), stem: "logs/x".into(), read: 0, parts: 0, looks: 0 }
    }

    #[tokio::test]
    async fn whole_lines_are_copied_once_and_too_many_are_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let run = Store::open("memory:///", &StoreOptions::default()).unwrap();
        let mut tail = tail(folder.path(), &run);
        tail.look(false).await.unwrap();
        std::fs::write(&tail.file, "one\ntwo\nhalf").unwrap();
        tail.look(false).await.unwrap();
        tail.look(false).await.unwrap();
        assert_eq!(&*run.get("logs/x-000000.jsonl").await.unwrap(), b"one\ntwo\n");
        assert!(!run.exists("logs/x-000001.jsonl").await.unwrap(), "nothing was new");
        let long = "x".repeat(BYTES_MAX as usize);
        std::fs::write(&tail.file, format!("one\ntwo\nhalf\n{long}\nend\n")).unwrap();
        tail.look(false).await.unwrap();
        let copied = run.get("logs/x-000001.jsonl").await.unwrap();
        let text = String::from_utf8_lossy(&copied);
        assert!(text.starts_with("{\"left_out_bytes\":") && text.ends_with("x\nend\n"));
    }

    #[tokio::test]
    async fn what_a_store_did_not_take_is_still_said_to_be_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let gone = folder.path().join("run");
        let broken = Store::open(&gone.display().to_string(), &StoreOptions::default()).unwrap();
        std::fs::remove_dir(&gone).unwrap();
        std::fs::write(&gone, "no folder any more").unwrap();
        let run = Store::open("memory:///", &StoreOptions::default()).unwrap();
        let mut tail = tail(folder.path(), &run);
        let long = "x".repeat(BYTES_MAX as usize);
        std::fs::write(&tail.file, format!("one\n{long}\nend\n")).unwrap();
        tail.run = broken;
        tail.look(false).await.unwrap_err();
        tail.run = run.clone();
        tail.look(false).await.unwrap();
        let copied = run.get("logs/x-000000.jsonl").await.unwrap();
        assert!(copied.starts_with(b"{\"left_out_bytes\":9}\n"), "{copied:?}");
    }

    #[tokio::test]
    async fn a_long_run_writes_seldom_but_warnings_soon() {
        let folder = tempfile::tempdir().unwrap();
        let run = Store::open("memory:///", &StoreOptions::default()).unwrap();
        let mut tail = tail(folder.path(), &run);
        tail.parts = 2 * PARTS_PER_PACE;
        let mut log = String::new();
        let mut written = Vec::new();
        for look in 0..10 {
            log += match look {
                5 => "{\"level\":\"WARN\"}\n",
                6 => "terminate called after throwing\n",
                _ => "{\"level\":\"INFO\"}\n",
            };
            std::fs::write(&tail.file, &log).unwrap();
            let parts = tail.parts;
            tail.look(false).await.unwrap();
            written.extend((tail.parts > parts).then_some(look));
        }
        assert_eq!(written, [3, 5, 6], "every fourth look, the warning, the last words");
        log += &format!("{{{}\n", "x".repeat(BYTES_MAX as usize / 2));
        std::fs::write(&tail.file, &log).unwrap();
        let parts = tail.parts;
        tail.look(false).await.unwrap();
        assert_eq!((tail.parts, tail.read), (parts + 1, log.len() as u64), "it is much");
        log += "{}\n";
        std::fs::write(&tail.file, &log).unwrap();
        tail.look(true).await.unwrap();
        assert_eq!(tail.read, log.len() as u64);
        assert!(looks_between(u32::MAX) == LOOKS_MAX && looks_between(0) == 1);
    }
}
