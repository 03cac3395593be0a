//! The board: what a run shows of itself, folded from everything that the coordinator hears. Pure: times come with
//! every event, in seconds since 1970.
//!
//! It fills the page's document and the metrics' samples, and tells hints. Nothing is decided by it; a coordinator that
//! follows another takes up what that one wrote down. [`shared`] and [`serve`] are its shells.

mod hints;
mod instruments;
pub mod meter;
pub mod report;
mod series;
pub mod serve;
pub mod shared;
mod vitals;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};

use super::events::Now;
use super::state::{Phase, State};
use super::verdict::{CauseKind, Goodput, Part, Verdict};
use crate::page::{
    CheckpointRow, Document, GenerationRow, InterruptionRow, Mark, Note, Overlay, Run, Timeline,
    ValidationPoint, WorkerRow,
};
use crate::proto::{Doing, TrainerEvent};
use crate::types::{Generation, NodeId};
use hints::Hints;
use series::Series;
use vitals::{Recent, median};

pub use instruments::prometheus_text;

/// Rows of each list that are kept.
const ROWS_MAX: usize = 200;
/// Steps that the pace is taken over.
const PACE: usize = 64;

/// What a generation ended of, as far as the coordinator knows that follows.
const COORDINATOR_ENDED: &str = "its coordinator ended";

/// What the board is told of the run's configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// What does not change.
    pub run: Run,
    /// `loader.threads`, for a hint.
    pub loader_threads: u32,
    /// `checkpoint.every`, for another.
    pub checkpoint_every: u64,
}

/// What one coordinator knows of its run.
#[derive(Debug)]
pub struct Board {
    /// All of the document that is not taken from below when it is asked for.
    shown: Document,
    series: Series,
    recent: BTreeMap<NodeId, Recent>,
    hints: Hints,
    /// When which step was done, lately.
    pace: VecDeque<(f64, u64)>,
    /// What rank 0 is at beside steps.
    doing: Option<Doing>,
    /// Whether this generation has taken a step.
    stepped: bool,
    /// Interruptions by kind, all of them.
    interruptions: BTreeMap<String, u64>,
    checkpoints: u64,
    last_outage_s: Option<f64>,
    /// When the coordinator's own time began.
    began: f64,
    /// The time of coordinators before this one.
    earlier: Option<Timeline>,
}

impl Board {
    /// Of a run, at `now`; `before` is what an earlier coordinator wrote down.
    #[must_use]
    pub fn new(facts: Facts, before: Option<Document>, now: f64) -> Self {
        let mut shown = before.unwrap_or_default();
        let series = Series::from(std::mem::take(&mut shown.curves));
        shown.format = 1;
        shown.live = true;
        shown.report = None;
        let classes = std::mem::take(&mut shown.run.classes);
        shown.run = facts.run.clone();
        if shown.run.classes.is_empty() {
            shown.run.classes = classes;
        }
        shown.state.status = None;
        shown.state.reason.clear();
        let shown_before = shown.goodput.clone();
        shown.workers.clear();
        shown.hints.clear();
        shown.interruptions.retain(|row| !row.open);
        for generation in shown.generations.iter_mut().filter(|g| g.to.is_none()) {
            generation.to = Some(now);
            generation.end = Some(COORDINATOR_ENDED.to_owned());
        }
        Self {
            hints: Hints::new(facts.loader_threads, facts.checkpoint_every),
            shown,
            series,
            recent: BTreeMap::new(),
            pace: VecDeque::new(),
            doing: None,
            stepped: false,
            interruptions: CauseKind::ALL.map(|kind| (kind.name(), 0)).into(),
            checkpoints: 0,
            last_outage_s: None,
            began: now,
            earlier: shown_before,
        }
    }

    /// What a trainer said. Returns what is worth a line for the user.
    pub fn heard(&mut self, now: f64, node: NodeId, event: &TrainerEvent) -> Vec<String> {
        if !is_modest(event) {
            return Vec::new();
        }
        match event {
            TrainerEvent::Step { step, total, .. } => {
                self.series.step(event);
                self.stepped(now, step.0);
                self.shown.run.steps = total.0;
                self.take_step(event);
            }
            TrainerEvent::Busy { doing, .. } => self.doing = Some(*doing),
            TrainerEvent::Validation { step, dice, mean_dice, pictures } => {
                self.doing = None;
                self.validated(step.0, dice, *mean_dice);
                let overlay = |picture: &crate::proto::Picture| Overlay {
                    step: step.0,
                    caption: picture.caption.clone(),
                    src: picture.path.replacen(crate::page::PICTURES, "overlays", 1),
                };
                self.shown.overlays.extend(pictures.iter().map(overlay));
                keep_last(&mut self.shown.overlays, 4 * pictures.len().max(1));
            }
            TrainerEvent::Checkpoint { step, bytes, verified, upload_s, hold_s } => {
                self.shown.checkpoints.retain(|row| row.step < step.0);
                self.shown.checkpoints.push(CheckpointRow {
                    step: step.0,
                    at: now,
                    bytes: Some(*bytes),
                    verified: *verified,
                    hold_s: *hold_s,
                    upload_s: Some(*upload_s),
                });
                self.checkpoints += 1;
                keep_last(&mut self.shown.checkpoints, ROWS_MAX);
            }
            TrainerEvent::Vitals(vitals) => {
                self.recent.entry(node).or_default().push(now, vitals.clone());
                return self.hint(now);
            }
            TrainerEvent::Warning { text } => {
                let rank = self.row(node).and_then(|row| row.rank);
                let rank = rank.map(|rank| format!("rank {rank}, ")).unwrap_or_default();
                return vec![format!("{rank}node {node}: {text}")];
            }
            _ => {}
        }
        Vec::new()
    }

    fn take_step(&mut self, event: &TrainerEvent) {
        let TrainerEvent::Step { terms, images_per_s, data_wait, .. } = event else { return };
        let state = &mut self.shown.state;
        state.loss = terms.iter().map(|(name, value)| (name.clone(), finite(*value))).collect();
        state.images_per_s = finite(*images_per_s);
        state.data_wait = finite(*data_wait);
    }

    fn stepped(&mut self, now: f64, step: u64) {
        self.doing = None;
        self.stepped = true;
        self.shown.state.step = step;
        if self.pace.back().is_some_and(|(_, last)| *last >= step) {
            self.pace.clear(); // it went back
        }
        self.pace.push_back((now, step));
        if self.pace.len() > PACE {
            self.pace.pop_front();
        }
    }

    fn validated(&mut self, step: u64, dice: &[(String, f64)], mean_dice: f64) {
        let point = ValidationPoint {
            step,
            mean_dice: finite(mean_dice),
            classes: dice.iter().map(|(name, dice)| (name.clone(), finite(*dice))).collect(),
        };
        self.shown.run.classes = dice.iter().map(|(name, _)| name.clone()).collect();
        self.shown.state.mean_dice = point.mean_dice;
        self.series.validation(point);
        self.shown.state.best = self.series.best();
    }

    /// What the state machine holds now, `clock` being its time.
    pub(super) fn see(&mut self, now: f64, state: &State, clock: Now) {
        self.shown.state.phase = self.phase(state).to_owned();
        self.shown.state.generation = state.generation().0;
        self.shown.state.workers = state.members();
        self.shown.state.wanted = state.wanted();
        for row in &mut self.shown.workers {
            if row.state != "gone" {
                row.state = "lost".to_owned();
            }
            row.rank = None;
        }
        for standing in state.standings() {
            let node = standing.node.0;
            let at = match self.shown.workers.binary_search_by_key(&node, |row| row.node) {
                Ok(at) => at,
                Err(at) => {
                    self.shown.workers.insert(at, WorkerRow { node, ..WorkerRow::default() });
                    at
                }
            };
            let row = &mut self.shown.workers[at];
            row.state = standing.doing.to_owned();
            row.rank = standing.rank.map(|rank| rank.0);
            standing.host.clone_into(&mut row.host);
            row.heard = now - clock.saturating_sub(standing.heard).as_secs_f64();
            if !standing.has_trainer {
                self.recent.remove(&standing.node);
            }
        }
        self.see_generation(now, state);
        self.see_interruption(now, state, clock);
    }

    fn phase(&self, state: &State) -> &'static str {
        let joining = state.interruption().is_some_and(|interruption| !interruption.is_loss());
        match state.phase() {
            Phase::Finished { .. } => "finished",
            Phase::Training { stopping: Some(_), .. } => "stopping",
            _ if joining => "joining",
            _ if state.interruption().is_some() => "recovering",
            Phase::Gathering { .. } => "waiting",
            Phase::Adopting { .. } => "recovering",
            Phase::Training { .. } => match self.doing {
                Some(Doing::Validating) => "validating",
                Some(Doing::Saving) => "saving",
                None if self.stepped => "training",
                None => "starting",
            },
        }
    }

    /// A generation that trains without having been ordered here is one that was taken over.
    fn see_generation(&mut self, now: f64, state: &State) {
        let Phase::Training { ranks, .. } = state.phase() else { return };
        let generation = state.generation().0;
        let world = u32::try_from(ranks.len()).unwrap_or(u32::MAX);
        let rows = &mut self.shown.generations;
        match rows.iter_mut().rev().find(|row| row.generation == generation) {
            Some(row) if row.end.as_deref() == Some(COORDINATOR_ENDED) => {
                (row.to, row.end) = (None, None);
            }
            Some(_) => {}
            None => rows.push(GenerationRow { generation, world, from: now, to: None, end: None }),
        }
    }

    /// The interruption that lasts is shown while it does.
    fn see_interruption(&mut self, now: f64, state: &State, clock: Now) {
        self.shown.interruptions.retain(|row| !row.open);
        let Some(interruption) = state.interruption() else { return };
        let ago = |moment: Now| now - clock.saturating_sub(moment).as_secs_f64();
        let cause = &interruption.cause;
        let detect_s = interruption.ended.saturating_sub(interruption.last_progress);
        self.shown.interruptions.push(InterruptionRow {
            at: ago(interruption.ended),
            kind: cause.kind.name(),
            loss: interruption.is_loss(),
            generation: interruption.generation.0,
            step: interruption.step.map(|step| step.0),
            node: cause.node.map(|node| node.0),
            rank: cause.rank.map(|rank| rank.0),
            text: cause.to_string(),
            detect_s: Some(detect_s.as_secs_f64()),
            open: true,
            ..InterruptionRow::default()
        });
        let ended = ago(interruption.ended);
        let (generation, cause) = (interruption.generation.0, cause.to_string());
        let rows = &mut self.shown.generations;
        if let Some(row) = rows.iter_mut().rev().find(|row| row.generation == generation)
            && row.end.is_none()
        {
            (row.to, row.end) = (Some(ended), Some(cause));
        }
    }

    /// A generation was ordered.
    pub fn ordered(&mut self, now: f64, generation: Generation, world: u32) {
        self.stepped = false;
        let rows = &mut self.shown.generations;
        if rows.last().is_some_and(|row| row.generation == generation.0 && row.to.is_none()) {
            return;
        }
        for row in rows.iter_mut().filter(|row| row.to.is_none()) {
            row.to = Some(now);
        }
        rows.push(GenerationRow {
            generation: generation.0,
            world,
            from: now,
            to: None,
            end: None,
        });
        keep_last(rows, ROWS_MAX);
    }

    /// What became of an interruption.
    pub fn verdict(&mut self, now: f64, verdict: &Verdict) {
        let outage_s = verdict.outage_s();
        self.last_outage_s = outage_s.or(self.last_outage_s);
        let kind = verdict.cause.kind.name();
        *self.interruptions.entry(kind.clone()).or_default() += 1;
        self.shown.interruptions.retain(|row| !row.open);
        let ended = self
            .shown
            .generations
            .iter_mut()
            .rev()
            .find(|row| row.generation == verdict.generation.0);
        if let Some(row) = ended {
            row.end.get_or_insert_with(|| verdict.cause.to_string());
        }
        if let (CauseKind::GivenBack, Some(node)) = (verdict.cause.kind, verdict.cause.node) {
            let rows = self.shown.workers.iter_mut().filter(|row| row.node == node.0);
            rows.for_each(|row| row.state = "gone".to_owned());
        }
        let phases = verdict.phases;
        self.shown.interruptions.push(InterruptionRow {
            at: now - outage_s.unwrap_or_default() + verdict.detect_s,
            kind,
            loss: verdict.is_loss(),
            generation: verdict.generation.0,
            step: verdict.step.map(|step| step.0),
            node: verdict.cause.node.map(|node| node.0),
            rank: verdict.cause.rank.map(|rank| rank.0),
            text: verdict.line(),
            detect_s: Some(phases.map_or(verdict.detect_s, |phases| phases.detect_s)),
            fence_s: phases.map(|phases| phases.fence_s),
            regroup_s: phases.map(|phases| phases.regroup_s),
            restore_s: phases.map(|phases| phases.restore_s),
            step_s: phases.map(|phases| phases.first_step_s),
            outage_s,
            open: false,
        });
        keep_last(&mut self.shown.interruptions, ROWS_MAX);
    }

    /// A line for the user.
    pub fn note(&mut self, now: f64, text: &str) {
        self.shown.notes.push(Note { at: now, text: text.to_owned() });
        keep_last(&mut self.shown.notes, ROWS_MAX);
    }

    /// Where the time of this coordinator went so far.
    pub fn account(&mut self, goodput: &Goodput) {
        let mut all = self.earlier.clone().unwrap_or_default();
        all.wall_s += goodput.wall_s;
        all.losses += goodput.losses;
        all.joins += goodput.joins;
        for (part, s) in &goodput.parts_s {
            *all.parts_s.entry(part.name()).or_default() += s;
        }
        let training = all.parts_s.get(&Part::Training.name()).copied().unwrap_or_default();
        all.goodput = if all.wall_s > 0.0 { training / all.wall_s } else { 0.0 };
        self.shown.goodput = Some(all);
    }

    /// The run has ended.
    pub fn ended(&mut self, now: f64, status: i32, reason: &str) {
        self.shown.state.phase = "finished".to_owned();
        self.shown.state.status = Some(status);
        reason.clone_into(&mut self.shown.state.reason);
        for row in &mut self.shown.workers {
            row.state = "gone".to_owned();
        }
        for row in self.shown.generations.iter_mut().filter(|row| row.to.is_none()) {
            (row.to, row.end) = (Some(now), Some(reason.to_owned()));
        }
    }

    fn row(&self, node: NodeId) -> Option<&WorkerRow> {
        let rows = &self.shown.workers;
        rows.binary_search_by_key(&node.0, |row| row.node).ok().map(|at| &rows[at])
    }

    /// Those who train now, with how they did lately.
    fn training(&self) -> impl Iterator<Item = (&WorkerRow, &Recent)> {
        training(&self.shown.workers, &self.recent)
    }

    fn own_median(&self) -> Option<f64> {
        median(self.training().filter_map(|(_, recent)| recent.own_s()).collect())
    }

    fn hint(&mut self, now: f64) -> Vec<String> {
        let training: Vec<(u32, Option<u32>, &Recent)> =
            training(&self.shown.workers, &self.recent)
                .map(|(row, recent)| (row.node, row.rank, recent))
                .collect();
        let hints = self.hints.of(now, &training);
        self.shown.hints.extend(hints.iter().cloned());
        hints
    }

    /// The document, as it is at `now`.
    #[must_use]
    pub fn document(&self, now: f64) -> Document {
        let mut document = self.shown.clone();
        document.now = now;
        document.curves = self.series.curves();
        document.state.eta_s = self.eta_s();
        let own = self.own_median();
        let crowd = self.training().count() > 1;
        for row in &mut document.workers {
            let Some(recent) = self.recent.get(&NodeId(row.node)) else { continue };
            let Some(vitals) = recent.newest() else { continue };
            row.step = Some(vitals.step.0);
            row.step_s = recent.step_s();
            row.own_s = recent.own_s();
            row.straggler = crowd && row.rank.is_some() && recent.lags(own);
            row.data_wait = recent.share("data_wait");
            row.memory = Some(vitals.memory);
            row.gpu_memory = vitals.gpu_memory;
            row.queue = Some(vitals.queue);
        }
        document
    }

    fn eta_s(&self) -> Option<f64> {
        if self.shown.state.status.is_some() {
            return None;
        }
        let ((from, first), (to, last)) = (self.pace.front()?, self.pace.back()?);
        let done = last.checked_sub(*first).filter(|steps| *steps > 0)?;
        let left = self.shown.run.steps.saturating_sub(*last);
        Some((to - from) / done as f64 * left as f64)
    }

    /// The best validation.
    #[must_use]
    pub fn best(&self) -> Option<Mark> {
        self.series.best()
    }
}

/// Names, or entries, of one event that are taken.
const ENTRIES_MAX: usize = 64;
/// Bytes of a text or a name.
const TEXT_MAX: usize = 2000;

/// Whether an event is of a size that trainers send: what the board keeps of one that is not has no bound.
fn is_modest(event: &TrainerEvent) -> bool {
    fn few<'a>(mut names: impl ExactSizeIterator<Item = &'a String>) -> bool {
        names.len() <= ENTRIES_MAX && names.all(|name| name.len() <= TEXT_MAX)
    }
    match event {
        TrainerEvent::Step { terms, .. } => few(terms.keys()),
        TrainerEvent::Validation { dice, pictures, .. } => {
            few(dice.iter().map(|(name, _)| name))
                && few(pictures.iter().map(|picture| &picture.path))
                && few(pictures.iter().map(|picture| &picture.caption))
        }
        TrainerEvent::Vitals(vitals) => few(vitals.phases_s.keys()) && few(vitals.faults.keys()),
        TrainerEvent::Warning { text } => text.len() <= TEXT_MAX,
        _ => true,
    }
}

/// Of `workers`, those that train now.
fn training<'a>(
    workers: &'a [WorkerRow],
    recent: &'a BTreeMap<NodeId, Recent>,
) -> impl Iterator<Item = (&'a WorkerRow, &'a Recent)> {
    let rows = workers.iter().filter(|row| row.rank.is_some());
    rows.filter_map(|row| Some((row, recent.get(&NodeId(row.node))?)))
}

fn finite(value: f64) -> Option<f64> {
    value.is_finite().then_some(value)
}

fn keep_last<T>(rows: &mut Vec<T>, most: usize) {
    let surplus = rows.len().saturating_sub(most);
    rows.drain(..surplus);
}
