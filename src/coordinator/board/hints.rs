//! Why a run is slow, in one line, once: rules over what its trainers say. Pure.

use std::collections::BTreeSet;

use super::vitals::{Recent, median};

/// Seconds of sayings that a judgement needs.
const WINDOW_S: f64 = 8.0;
/// Seconds that something has to last before it is told.
const LASTS_S: f64 = 10.0;
/// Shares of a step's time from which on a phase is worth a word.
const DATA_WAIT: f64 = 0.25;
const ALL_REDUCE: f64 = 0.25;
const CHECKPOINTS: f64 = 0.05;
/// Page faults a step that wait for the disk.
const FAULTS: f64 = 10.0;

/// What has been told, and what is being watched.
#[derive(Debug)]
pub(super) struct Hints {
    loader_threads: u32,
    checkpoint_every: u64,
    told: BTreeSet<&'static str>,
    /// Since when, of what holds now.
    since: Vec<(&'static str, f64)>,
}

/// Someone who trains: node, rank, and how it did lately.
pub(super) type Worker<'a> = (u32, Option<u32>, &'a Recent);

impl Hints {
    pub(super) fn new(loader_threads: u32, checkpoint_every: u64) -> Self {
        let (told, since) = (BTreeSet::new(), Vec::new());
        Self { loader_threads, checkpoint_every, told, since }
    }

    /// The lines that are due at `now`.
    pub(super) fn of(&mut self, now: f64, training: &[Worker<'_>]) -> Vec<String> {
        let ripe: Vec<Worker<'_>> =
            training.iter().copied().filter(|(.., recent)| recent.window_s() >= WINDOW_S).collect();
        if ripe.len() < training.len() || ripe.is_empty() {
            return Vec::new();
        }
        let found = self.found(&ripe);
        self.since.retain(|(key, _)| found.iter().any(|(found, _)| found == key));
        let mut lines = Vec::new();
        for (key, line) in found {
            let since = match self.since.iter().find(|(seen, _)| *seen == key) {
                Some((_, since)) => *since,
                None => {
                    self.since.push((key, now));
                    now
                }
            };
            if now - since >= LASTS_S && self.told.insert(key) {
                lines.push(line);
            }
        }
        lines
    }

    /// What holds now.
    fn found(&self, training: &[Worker<'_>]) -> Vec<(&'static str, String)> {
        let mean = |phase| {
            let shares: Vec<f64> =
                training.iter().filter_map(|(.., recent)| recent.share(phase)).collect();
            shares.iter().sum::<f64>() / shares.len().max(1) as f64
        };
        let percent = |share: f64| format!("{:.0} %", 100.0 * share);
        let mut found = Vec::new();
        let data = mean("data_wait");
        if data > DATA_WAIT {
            let threads = self.loader_threads;
            found.push((
                "data wait",
                format!(
                    "data wait is {} of step time: raise loader.threads (now {threads}) or loader.fetches, or put \
                     loader.cache_dir on a fast disk",
                    percent(data)
                ),
            ));
        }
        let others = mean("all_reduce_wait");
        if others > ALL_REDUCE && training.len() > 1 {
            found.push((
                "all-reduce",
                format!(
                    "waiting for other workers' gradients is {} of step time: take fewer workers, a larger batch, or a \
                     faster network between them",
                    percent(others)
                ),
            ));
        }
        let holds = mean("checkpoint_hold");
        if holds > CHECKPOINTS {
            let every = self.checkpoint_every;
            found.push((
                "checkpoints",
                format!(
                    "checkpoints hold training up for {} of its time: raise checkpoint.every (now {every})",
                    percent(holds)
                ),
            ));
        }
        found.extend(straggler(training));
        found.extend(training.iter().find_map(faults));
        found
    }
}

fn straggler(training: &[Worker<'_>]) -> Option<(&'static str, String)> {
    if training.len() < 2 {
        return None;
    }
    let usual = median(training.iter().filter_map(|(.., recent)| recent.own_s()).collect())?;
    let (node, rank, own) = training
        .iter()
        .filter(|(.., recent)| recent.lags(Some(usual)))
        .filter_map(|(node, rank, recent)| Some((node, rank.unwrap_or_default(), recent.own_s()?)))
        .max_by(|a, b| a.2.total_cmp(&b.2))?;
    let line = format!(
        "node {node} (rank {rank}) is a straggler: its own part of a step takes {:.0} ms, the others' {:.0} ms; look at \
         its load, its disk and its network",
        1e3 * own,
        1e3 * usual
    );
    Some(("straggler", line))
}

fn faults((node, rank, recent): &Worker<'_>) -> Option<(&'static str, String)> {
    let (first, last, steps) = recent.span()?;
    let per_step = last.page_faults.saturating_sub(first.page_faults) as f64 / steps as f64;
    (per_step > FAULTS).then(|| {
        let rank = rank.unwrap_or_default();
        let line = format!(
            "node {node} (rank {rank}) waits for its disk as for memory, {per_step:.0} page faults a step: its memory is \
             too small for what runs there"
        );
        ("page faults", line)
    })
}
