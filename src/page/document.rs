//! What the page draws: plain data. Times are seconds since 1970, lengths of time seconds, shares `0..=1`.
//!
//! Numbers that are none (a loss that diverged) are null in JSON.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The whole of it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Document {
    /// 1.
    pub format: u32,
    /// Whether it comes from a coordinator, or is the report.
    pub live: bool,
    /// When it was made.
    pub now: f64,
    /// What does not change.
    pub run: Run,
    /// How it stands.
    pub state: State,
    /// Losses and Dice by step.
    pub curves: Curves,
    /// Who takes part, or did.
    pub workers: Vec<WorkerRow>,
    /// Who trained together, and when.
    pub generations: Vec<GenerationRow>,
    /// What came in between.
    pub interruptions: Vec<InterruptionRow>,
    /// Those that were committed, in order.
    pub checkpoints: Vec<CheckpointRow>,
    /// Where the time went.
    pub goodput: Option<Timeline>,
    /// Pictures, the newest validation's last.
    pub overlays: Vec<Overlay>,
    /// Why it is slow, if it is.
    pub hints: Vec<String>,
    /// What was said.
    pub notes: Vec<Note>,
    /// What only the report has.
    pub report: Option<Report>,
}

/// What does not change.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Run {
    /// Its name.
    pub name: String,
    /// Its folder.
    pub url: String,
    /// The dataset's.
    pub data: String,
    /// The training method.
    pub method: String,
    /// Foreground classes, class 1 first; none before the first validation.
    pub classes: Vec<String>,
    /// Steps in all.
    pub steps: u64,
    /// Of this program.
    pub version: String,
}

/// A validation's step and mean Dice.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Mark {
    /// Steps done.
    pub step: u64,
    /// Mean Dice.
    pub mean_dice: Option<f64>,
}

/// How the run stands.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct State {
    /// starting, waiting, training, validating, saving, recovering, joining, stopping or finished.
    pub phase: String,
    /// Steps done.
    pub step: u64,
    /// Which generation.
    pub generation: u64,
    /// Members that are there.
    pub workers: u32,
    /// Members that the run may have.
    pub wanted: u32,
    /// Over all workers.
    pub images_per_s: Option<f64>,
    /// Until the last step.
    pub eta_s: Option<f64>,
    /// Of the last validation.
    pub mean_dice: Option<f64>,
    /// The best validation.
    pub best: Option<Mark>,
    /// Loss terms of the last step.
    pub loss: BTreeMap<String, Option<f64>>,
    /// Share of the last step that rank 0 waited for data.
    pub data_wait: Option<f64>,
    /// How it ended.
    pub status: Option<i32>,
    /// Why.
    pub reason: String,
}

/// Values by step; all lists but `validations` are equally long.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Curves {
    /// Steps done.
    pub steps: Vec<u64>,
    /// Loss terms by name.
    pub losses: BTreeMap<String, Vec<Option<f64>>>,
    /// Learning rate.
    pub lr: Vec<Option<f64>>,
    /// Weight of the consistency terms.
    pub consistency: Vec<Option<f64>>,
    /// Images a second.
    pub images_per_s: Vec<Option<f64>>,
    /// Every validation.
    pub validations: Vec<ValidationPoint>,
}

/// A validation.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct ValidationPoint {
    /// Steps done.
    pub step: u64,
    /// Mean Dice.
    pub mean_dice: Option<f64>,
    /// Dice by class.
    pub classes: BTreeMap<String, Option<f64>>,
}

/// A node's agent and its trainer.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct WorkerRow {
    /// Which node.
    pub node: u32,
    /// Its address.
    pub host: String,
    /// training, standby, starting, stranded, lost or gone.
    pub state: String,
    /// In this generation.
    pub rank: Option<u32>,
    /// Steps done.
    pub step: Option<u64>,
    /// How long a step takes.
    pub step_s: Option<f64>,
    /// The part of it before it waits for others.
    pub own_s: Option<f64>,
    /// Whether that is much longer than others'.
    pub straggler: bool,
    /// When it was last heard.
    pub heard: f64,
    /// Share of its steps that it waits for data.
    pub data_wait: Option<f64>,
    /// Bytes of memory of its trainer.
    pub memory: Option<u64>,
    /// Bytes of its GPU's memory.
    pub gpu_memory: Option<u64>,
    /// Batches that are ready.
    pub queue: Option<u64>,
}

/// A generation.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct GenerationRow {
    /// Its number.
    pub generation: u64,
    /// How many trained.
    pub world: u32,
    /// When it began.
    pub from: f64,
    /// When it ended.
    pub to: Option<f64>,
    /// What of.
    pub end: Option<String>,
}

/// What ended a generation, and what became of it. The phases follow each other and sum to the outage.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct InterruptionRow {
    /// When it was noticed.
    pub at: f64,
    /// What it was: a verdict's kind.
    pub kind: String,
    /// Whether something was lost.
    pub loss: bool,
    /// The generation that ended.
    pub generation: u64,
    /// Steps done by then.
    pub step: Option<u64>,
    /// Where.
    pub node: Option<u32>,
    /// Which rank that was.
    pub rank: Option<u32>,
    /// In one line.
    pub text: String,
    /// From the last progress until it was noticed.
    pub detect_s: Option<f64>,
    /// Until all survivors had left it.
    pub fence_s: Option<f64>,
    /// Until the next generation was ordered.
    pub regroup_s: Option<f64>,
    /// Until that had agreed on a state.
    pub restore_s: Option<f64>,
    /// Until its first step.
    pub step_s: Option<f64>,
    /// All of it.
    pub outage_s: Option<f64>,
    /// Whether it still lasts.
    pub open: bool,
}

/// A checkpoint.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct CheckpointRow {
    /// Its step.
    pub step: u64,
    /// When its manifest was created.
    pub at: f64,
    /// Its size.
    pub bytes: Option<u64>,
    /// Whether it was read back, by its hashes.
    pub verified: bool,
    /// How long it held training up.
    pub hold_s: Option<f64>,
    /// How long it took to write.
    pub upload_s: Option<f64>,
}

/// An account of time.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Timeline {
    /// All of it.
    pub wall_s: f64,
    /// The share in which steps that count were done.
    pub goodput: f64,
    /// By part; they sum to the whole.
    pub parts_s: BTreeMap<String, f64>,
    /// Losses.
    pub losses: u32,
    /// Joins.
    pub joins: u32,
}

/// A picture of a slice: truth on the left, prediction on the right.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Overlay {
    /// Steps done.
    pub step: u64,
    /// Which, in words.
    pub caption: String,
    /// A relative address, or the picture itself.
    pub src: String,
}

/// Something that was said.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Note {
    /// When.
    pub at: f64,
    /// What.
    pub text: String,
}

/// What only the report has.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Report {
    /// The resolved configuration.
    pub config: String,
    /// Names and values.
    pub environment: Vec<(String, String)>,
    /// What they do, and commands.
    pub commands: Vec<(String, String)>,
    /// Of the closing evaluation.
    pub scores: Option<Scores>,
    /// By case.
    pub cases: Vec<Case>,
    /// The cases that came out best.
    pub best: Vec<Overlay>,
    /// And worst.
    pub worst: Vec<Overlay>,
    /// Lines of the history that could not be read.
    pub damaged_lines: usize,
}

/// Scores over all volumes of a split.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Scores {
    /// Of distances.
    pub unit: String,
    /// What an empty mask is worth, in words.
    pub policy: String,
    /// How many volumes.
    pub volumes: usize,
    /// By class.
    pub classes: Vec<ClassScore>,
    /// Over them.
    pub mean: ClassScore,
}

/// A row of scores.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct ClassScore {
    /// The class; none for the mean.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// Dice.
    pub dice: Option<f64>,
    /// Jaccard.
    pub jaccard: Option<f64>,
    /// The 95th percentile of surface distances.
    pub hd95: Option<f64>,
    /// Average surface distance.
    pub asd: Option<f64>,
    /// The symmetric one.
    pub assd: Option<f64>,
    /// Volumes in which it was not predicted at all.
    pub empty: usize,
}

/// A case of the closing evaluation.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Case {
    /// Its name.
    pub case: String,
    /// Mean Dice.
    pub mean: Option<f64>,
    /// By class.
    pub dice: BTreeMap<String, Option<f64>>,
}

/// Which of `count` points to draw so that there are at most `most`, the last one among them.
pub fn thin(count: usize, most: usize) -> impl Iterator<Item = usize> {
    let stride = count.div_ceil(most.max(1)).max(1);
    let last = count.wrapping_sub(1);
    (0..count).filter(move |at| (last - at).is_multiple_of(stride))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thinned_out_there_are_few_and_the_last() {
        assert_eq!(thin(0, 3).count(), 0);
        assert_eq!(thin(3, 3).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(thin(10, 3).collect::<Vec<_>>(), [1, 5, 9]);
        assert!(thin(50_001, 400).count() <= 400);
    }
}
