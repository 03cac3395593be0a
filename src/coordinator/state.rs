//! The coordinator's state machine: no clock, randomness, socket or await.
//!
//! ```text
//!                 enough members here            a member or trainer lost, a member more
//!  Gathering ───────────────────────► Training ─────────────────────────────────► Gathering
//!   │   │  ▲                            │   ▲    (those who are left keep their state: at once, if enough)
//!   │   │  └── not all came back ─┐     │   │
//!   │   └─ agents with trainers ─► Adopting ┘ all ranks are here: nothing was interrupted
//!   │      of a coordinator        │
//!   │      that is gone            │ all trainers left with 0 or 75
//!   ▼                              ▼
//!  Finished(75): waited too long  Finished(0 | 75), Finished(1): nothing gets on any more
//! ```
//!
//! Who comes is in `state/joins.rs`, what is lost in `state/losses.rs`, who is given back in `state/releases.rs`.

mod accounts;
mod joins;
mod losses;
mod releases;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::events::{Effect, Event, Limits, Now, Progress};
use super::members::{FRONT, Member, Members, Trainer, choose, most_advanced};
use super::verdict::{Account, Cause, CauseKind, Interruption};
use crate::ledger::Recorded;
use crate::proto::{EXIT_RESUMABLE, EXIT_USAGE};
use crate::types::{Backend, Generation, NodeId, Rank, Step, WorldSize};

/// Where the run stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Phase {
    /// Waiting for members.
    Gathering {
        /// Since when.
        since: Now,
        /// Whether a generation has been before this: then whoever is there is enough, from a moment on.
        recovering: Option<Now>,
    },
    /// A generation of an earlier coordinator lives, and its agents come back one by one.
    Adopting {
        /// Since when.
        since: Now,
        /// How many ranks it has.
        world: WorldSize,
        /// Those that are here.
        ranks: BTreeMap<NodeId, Rank>,
    },
    /// A generation trains.
    Training {
        /// Rank of each node.
        ranks: BTreeMap<NodeId, Rank>,
        /// Exit status of the trainers that have left in good order.
        left: BTreeMap<NodeId, i32>,
        /// When a stop was asked for.
        stopping: Option<Now>,
    },
    /// The run has ended.
    Finished {
        /// Exit status.
        status: i32,
        /// Why, in one line.
        reason: String,
    },
}

/// The whole state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    limits: Limits,
    members: Members,
    phase: Phase,
    generation: Generation,
    /// The newest that any trainer has been told of, perhaps by another coordinator.
    newest: Generation,
    /// Steps that any generation has done.
    furthest: Option<Step>,
    /// Losses since then; those within `grace` of one that counts are the same.
    fruitless: u32,
    /// When the last one that counts was.
    struck: Now,
    /// Whether this generation has done the last step: nobody joins it any more.
    last_step: bool,
    /// Whether all is done and written down.
    complete: bool,
    stop: Option<String>,
    last_progress: Now,
    /// Longest silence of this generation so far; none before its first sign of progress.
    longest_silence: Option<Duration>,
    /// Since when a rank says that this generation's group is gone, and what it saw.
    broken: Option<(Now, String)>,
    /// Of this generation: those that had a state when it began, and so should have joined quickly.
    veterans: BTreeSet<NodeId>,
    /// When somebody was lost last who had a state, and may live.
    strayed: Option<Now>,
    /// What those of this generation saw who have lost their group.
    strandings: BTreeMap<NodeId, String>,
    /// Those whose trainers have a state for sure: their generation has made a step, or they have said so.
    proven: BTreeSet<NodeId>,
    /// Those whose platforms want them back, since when and why.
    leaving: BTreeMap<NodeId, (Now, String)>,
    /// Those who have been told to go, by their incarnations.
    released: BTreeMap<NodeId, String>,
    /// What ended the generation before, until there is a step again.
    interruption: Option<Interruption>,
    account: Account,
}

impl State {
    /// A run that waits for its members.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            members: BTreeMap::new(),
            phase: Phase::Gathering { since: Duration::ZERO, recovering: None },
            generation: Generation(0),
            newest: Generation(0),
            furthest: None,
            fruitless: 0,
            struck: Duration::ZERO,
            last_step: false,
            complete: false,
            stop: None,
            last_progress: Duration::ZERO,
            longest_silence: None,
            broken: None,
            veterans: BTreeSet::new(),
            strayed: None,
            strandings: BTreeMap::new(),
            proven: BTreeSet::new(),
            leaving: BTreeMap::new(),
            released: BTreeMap::new(),
            interruption: None,
            account: Account::default(),
        }
    }

    /// Where the run stands.
    #[must_use]
    pub fn phase(&self) -> &Phase {
        &self.phase
    }

    /// The newest generation; 0 before the first.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// How many members are here.
    #[must_use]
    pub fn members(&self) -> u32 {
        u32::try_from(self.members.len()).unwrap_or(u32::MAX)
    }

    /// Whether a node that has a connection may keep it: as a member, or as one that is not wanted and has been told so.
    #[must_use]
    pub fn has_or_rejects(&self, node: NodeId) -> bool {
        let wanted = node.0 < self.limits.max + self.limits.spares;
        !wanted
            || matches!(self.phase, Phase::Finished { .. })
            || self.members.get(&node).is_some_and(|member| member.away.is_none())
    }

    /// The one way in: what `event` at `now` changes, and what is to be done about it.
    pub fn apply(&mut self, now: Now, event: Event) -> Vec<Effect> {
        let mut effects = Vec::new();
        match event {
            Event::Joined { node, incarnation, kv_address, gpus, running } => {
                let trainer = Trainer::of(running.as_ref());
                let member = Member {
                    incarnation,
                    kv_address,
                    gpus,
                    last_seen: now,
                    trainer,
                    done: running.and_then(|running| running.done),
                    failures: 0,
                    away: None,
                };
                self.joined(now, node, member, running, &mut effects);
            }
            Event::Left { node, incarnation } => {
                if self.members.get(&node).is_some_and(|m| m.incarnation == incarnation) {
                    self.went_away(now, node, &mut effects);
                }
            }
            Event::Progressed { node, generation, progress } => {
                self.heard(now, node);
                if generation == self.generation {
                    self.progressed(now, progress, &mut effects);
                }
            }
            Event::Completed { node, generation } => {
                self.heard(now, node);
                self.completed(generation, &mut effects);
            }
            Event::Heard { node } => self.heard(now, node),
            Event::Arrived { node, generation, milestone } => {
                self.heard(now, node);
                self.arrived(now, generation, milestone);
            }
            Event::TrainerStandby { node } => {
                self.heard(now, node);
                self.trainer_is_there(now, node, &mut effects);
            }
            Event::TrainerStranded { node, generation, done, evidence } => {
                self.heard(now, node);
                self.stranded(now, node, generation, done, evidence, &mut effects);
            }
            Event::TrainerExited { node, generation, status, evidence, kind, doing } => {
                let (node_of, status_of) = (Some(node), Some(status));
                let cause =
                    Cause { kind, node: node_of, rank: None, status: status_of, evidence, doing };
                self.trainer_exited(now, node, generation, status, cause, &mut effects);
            }
            // Its peers, who will miss it, may leave first: what no restart cures ends the run now.
            // Anything else waits for the end of the process.
            Event::TrainerFailed { node, generation, evidence, status, curable } => {
                let ended = matches!(self.phase, Phase::Finished { .. });
                let current = generation == self.generation || generation == Generation(0);
                if current && !curable && !ended {
                    let reason = format!("the trainer of node {node} failed: {evidence}");
                    self.finish(status, reason, &mut effects);
                }
            }
            Event::Recorded(recorded) => self.recorded(recorded, &mut effects),
            Event::ReceiptsMissing { generation } => self.attest(generation, &mut effects),
            Event::LedgerLost { status, reason } => self.ledger_lost(status, reason, &mut effects),
            Event::NodeWanted { node, reason } => {
                self.release_requested(now, node, reason, &mut effects);
            }
            Event::StopRequested { reason } => self.stop_requested(now, reason, &mut effects),
            Event::Tick => self.tick(now, &mut effects),
        }
        self.maybe_start(now, &mut effects);
        self.prepare_idle(&mut effects);
        effects
    }

    fn ledger_lost(&mut self, status: i32, reason: String, effects: &mut Vec<Effect>) {
        if !matches!(self.phase, Phase::Finished { .. }) {
            self.finish(status, reason, effects);
        }
    }

    /// Tells the trainers of this generation what the ledger holds of it.
    fn recorded(&self, recorded: Recorded, effects: &mut Vec<Effect>) {
        if let Phase::Training { ranks, .. } = &self.phase
            && recorded.generation == self.generation
        {
            effects.extend(ranks.keys().map(|&node| Effect::Recorded { node, recorded }));
        }
    }

    /// Has rank 0 of this generation say once more where the ledger goes on.
    fn attest(&self, generation: Generation, effects: &mut Vec<Effect>) {
        let Phase::Training { ranks, .. } = &self.phase else { return };
        let first = ranks.iter().find(|(_, rank)| **rank == Rank(0));
        if let Some((&node, _)) = first.filter(|_| generation == self.generation) {
            effects.push(Effect::Attest { node, generation });
        }
    }

    fn progressed(&mut self, now: Now, progress: Progress, effects: &mut Vec<Effect>) {
        self.account.mark(now, self.part_of(progress));
        if matches!(progress, Progress::Step { .. })
            && let Some(interruption) = self.interruption.take_if(|i| i.followed.is_some())
        {
            self.close(interruption, Some(now), effects);
        }
        let silence = now.saturating_sub(self.last_progress);
        self.longest_silence = Some(self.longest_silence.unwrap_or_default().max(silence));
        self.last_progress = now;
        // What is done again after all have died proves nothing.
        if let Progress::Step { done, last } = progress {
            self.last_step |= last;
            if Some(done) > self.furthest {
                (self.furthest, self.fruitless) = (Some(done), 0);
            }
            if let Phase::Training { ranks, .. } = &self.phase {
                self.proven.extend(ranks.keys());
            }
            self.release_kept(effects);
        }
    }

    fn heard(&mut self, now: Now, node: NodeId) {
        if let Some(member) = self.members.get_mut(&node) {
            member.last_seen = now;
        }
    }

    /// Starts a generation when enough are here.
    fn maybe_start(&mut self, now: Now, effects: &mut Vec<Effect>) {
        let Phase::Gathering { since, recovering } = self.phase else { return };
        if let Some(reason) = self.stop.clone() {
            self.save_and_finish(now, reason, effects);
            return;
        }
        let waited = now.saturating_sub(since);
        let recovering =
            recovering.is_some_and(|from| now >= from) && !self.awaits_who_strayed(now);
        let mut staying = self.members.clone();
        staying.retain(|node, _| !self.leaving.contains_key(node));
        let chosen = choose(&staying, &self.limits, recovering, waited);
        let Some(mut nodes) = chosen else { return };
        if self.only_leaving_have_state(&nodes) {
            let all = choose(&self.members, &self.limits, recovering, waited);
            let Some(all) = all else { return };
            nodes = all;
        }
        let Some(backend) = self.choose_backend(&nodes, effects) else { return };
        let Some(first) = nodes.first().and_then(|node| self.members.get(node)) else { return };
        let kv_address = first.kv_address.clone();
        let world = WorldSize(u32::try_from(nodes.len()).unwrap_or(u32::MAX));
        self.newest = Generation(self.newest.0.max(self.generation.0) + 1);
        self.generation = self.newest;
        let mut ranks = BTreeMap::new();
        self.veterans.clear();
        for (rank, node) in (0..).map(Rank).zip(nodes) {
            let (generation, kv_address) = (self.generation, kv_address.clone());
            ranks.insert(node, rank);
            effects.push(Effect::Start { node, generation, rank, world, kv_address, backend });
            if let Some(member) = self.members.get_mut(&node) {
                if member.trainer.has_state() {
                    self.veterans.insert(node);
                } else {
                    self.proven.remove(&node);
                }
                member.trainer = Trainer::In(generation);
                member.done = Some(FRONT);
                member.last_seen = now;
            }
        }
        self.account.mark(now, self.part_now());
        if let Some(interruption) = &mut self.interruption {
            interruption.followed = Some((now, self.generation, world));
        }
        self.strandings.clear();
        self.last_step = false;
        self.last_progress = now;
        self.longest_silence = None;
        self.broken = None;
        self.phase = Phase::Training { ranks, left: BTreeMap::new(), stopping: None };
    }

    /// Whether a member that was lost a moment ago may have the only state there is: it may come back.
    fn awaits_who_strayed(&self, now: Now) -> bool {
        let lately = |at: Now| now.saturating_sub(at) < self.limits.grace;
        self.strayed.is_some_and(lately) && !self.members.values().any(|m| m.trainer.has_state())
    }

    /// Has those who are here without a place start a trainer that waits for one.
    fn prepare_idle(&mut self, effects: &mut Vec<Effect>) {
        let Phase::Training { ranks, stopping: None, left } = &self.phase else { return };
        if !left.is_empty() {
            return;
        }
        let all: Vec<NodeId> = ranks.keys().copied().collect();
        let backend = self.backend_for(&all);
        for (node, member) in &mut self.members {
            if member.trainer == Trainer::Absent
                && !ranks.contains_key(node)
                && member.failures <= self.limits.restarts
            {
                member.trainer = Trainer::Preparing;
                effects.push(Effect::Prepare { node: *node, backend });
            }
        }
    }

    /// The collectives of the next generation; none if the run had to end over it.
    fn choose_backend(&mut self, nodes: &[NodeId], effects: &mut Vec<Effect>) -> Option<Backend> {
        let gpus = |node: &&NodeId| self.members.get(node).map_or(0, |member| member.gpus);
        let without = nodes.iter().find(|node| gpus(node) == 0);
        if let (Some(Backend::Nccl), Some(node)) = (self.limits.backend, without) {
            let reason = format!(
                "--backend nccl: node {node} has no GPU of its own that libtorch can use; see `cpcr doctor`"
            );
            self.finish(EXIT_USAGE, reason, effects);
            return None;
        }
        let with = nodes.iter().filter(|node| gpus(node) > 0).count();
        if self.limits.backend.is_none() && without.is_some() && with > 0 {
            effects.push(Effect::Note(format!(
                "{with} of {} workers have a GPU of their own: training on CPUs with Gloo",
                nodes.len()
            )));
        }
        Some(self.backend_for(nodes))
    }

    fn backend_for(&self, nodes: &[NodeId]) -> Backend {
        let has_gpu = |node| self.members.get(node).is_some_and(|member| member.gpus > 0);
        let all = nodes.iter().all(has_gpu);
        self.limits.backend.unwrap_or(if all { Backend::Nccl } else { Backend::Gloo })
    }

    fn stop_requested(&mut self, now: Now, reason: String, effects: &mut Vec<Effect>) {
        if self.stop.is_some() || matches!(self.phase, Phase::Finished { .. }) {
            return;
        }
        self.stop = Some(reason);
        if let Phase::Training { ranks, stopping, .. } = &mut self.phase {
            *stopping = Some(now);
            for node in ranks.keys() {
                let generation = self.generation;
                effects.push(Effect::CheckpointAndStop { node: *node, generation });
            }
        }
    }

    /// Ends the run without a generation: whoever is the most advanced writes a checkpoint first.
    fn save_and_finish(&mut self, now: Now, reason: String, effects: &mut Vec<Effect>) {
        let Some(node) = most_advanced(&self.members) else {
            self.finish(EXIT_RESUMABLE, reason, effects);
            return;
        };
        self.stop = Some(reason);
        self.last_progress = now;
        let ranks = BTreeMap::from([(node, Rank(0))]);
        self.phase = Phase::Training { ranks, left: BTreeMap::new(), stopping: Some(now) };
        effects.push(Effect::CheckpointAndStop { node, generation: self.generation });
    }

    fn tick(&mut self, now: Now, effects: &mut Vec<Effect>) {
        if matches!(self.phase, Phase::Finished { .. }) {
            return;
        }
        let silent: Vec<NodeId> = self
            .members
            .iter()
            .filter(|(_, m)| now.saturating_sub(m.last_seen) > self.limits.heartbeat)
            .map(|(node, _)| *node)
            .collect();
        for node in silent {
            self.lose(now, node, CauseKind::AgentSilent, effects);
        }
        let gone: Vec<NodeId> = self.away_for(now, self.limits.grace);
        for node in gone {
            self.lose(now, node, CauseKind::AgentLost, effects);
        }
        let last_progress = now.saturating_sub(self.last_progress);
        match &self.phase {
            Phase::Gathering { since, .. } if now.saturating_sub(*since) > self.limits.wait => {
                let reason = format!(
                    "{} of {} workers came within {} s",
                    self.members(),
                    self.limits.min,
                    self.limits.wait.as_secs()
                );
                self.save_and_finish(now, reason, effects);
            }
            Phase::Adopting { since, world, ranks }
                if now.saturating_sub(*since) > self.limits.heartbeat =>
            {
                let why = format!("{} of {world} workers came back", ranks.len());
                self.lose_generation(now, Cause::of_all(CauseKind::NotAdopted, why), effects);
            }
            // A step and the last checkpoint take their time: progress earns more of it.
            Phase::Training { stopping: Some(since), .. }
                if now.saturating_sub(*since) > self.limits.drain
                    && last_progress
                        > self.limits.drain.max(match self.longest_silence {
                            Some(silence) => silence * 2,
                            // It has not begun, and needs a step to stop at.
                            None => self.limits.start / 2,
                        }) =>
            {
                let reason = "the trainers did not stop in time".to_owned();
                self.finish(EXIT_RESUMABLE, reason, effects);
            }
            Phase::Training { stopping: None, .. } => self.tick_training(now, effects),
            _ => {}
        }
        self.regroup_without_leaving(now, effects);
    }

    fn finish(&mut self, status: i32, reason: String, effects: &mut Vec<Effect>) {
        if let Some(interruption) = self.interruption.take() {
            self.close(interruption, None, effects);
        }
        effects.push(Effect::Finish { status, reason: reason.clone() });
        self.phase = Phase::Finished { status, reason };
    }
}
