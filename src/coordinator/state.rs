//! The coordinator's state machine: no clock, randomness, socket or await.
//!
//! ```text
//!              all members here              a member or trainer lost, budget left
//!  Gathering ───────────────────► Training ──────────────────────────► Draining
//!      ▲   │                        │    │                                │
//!      │   │ waited too long, stop  │    │ all trainers left with 0 or 75 │ all trainers gone
//!      │   ▼                        │    ▼                                │
//!      │  Finished(75) ◄── no budget┘  Finished(0 | 75)                   │
//!      └──────────────────────────────────────────────────────────────────┘
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::events::{Effect, Event, Limits, Now};
use crate::proto::{EXIT_DONE, EXIT_FAILED, EXIT_RESUMABLE, EXIT_USAGE};
use crate::types::{Backend, Generation, NodeId, Rank, WorldSize};

/// One agent, as the coordinator knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Member {
    incarnation: String,
    kv_address: String,
    gpus: u32,
    last_seen: Now,
}

/// Where the run stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Phase {
    /// Waiting for members.
    Gathering {
        /// Since when.
        since: Now,
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
    /// A generation was lost; its trainers are being ended.
    Draining {
        /// Nodes whose trainer has not left yet.
        waiting_for: BTreeSet<NodeId>,
        /// Since when.
        since: Now,
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
    members: BTreeMap<NodeId, Member>,
    phase: Phase,
    generation: Generation,
    lost_generations: u32,
    stop: Option<String>,
    last_progress: Now,
    /// Longest silence of this generation so far; none before its first sign of progress.
    longest_silence: Option<Duration>,
}

impl State {
    /// A run that waits for its members.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            members: BTreeMap::new(),
            phase: Phase::Gathering { since: Duration::ZERO },
            generation: Generation(0),
            lost_generations: 0,
            stop: None,
            last_progress: Duration::ZERO,
            longest_silence: None,
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

    /// The one way in: what `event` at `now` changes, and what is to be done about it.
    pub fn apply(&mut self, now: Now, event: Event) -> Vec<Effect> {
        let mut effects = Vec::new();
        match event {
            Event::Joined { node, incarnation, kv_address, gpus } => {
                let member = Member { incarnation, kv_address, gpus, last_seen: now };
                self.joined(now, node, member, &mut effects);
            }
            Event::Left { node, incarnation } => {
                if self.members.get(&node).is_some_and(|m| m.incarnation == incarnation) {
                    self.lose(now, node, "its connection closed", &mut effects);
                }
            }
            Event::Progressed { node } => {
                let silence = now.saturating_sub(self.last_progress);
                self.longest_silence = Some(self.longest_silence.unwrap_or_default().max(silence));
                self.last_progress = now;
                if let Some(member) = self.members.get_mut(&node) {
                    member.last_seen = now;
                }
            }
            Event::Heard { node } => {
                if let Some(member) = self.members.get_mut(&node) {
                    member.last_seen = now;
                }
            }
            Event::TrainerExited { node, generation, status, evidence } => {
                if generation == self.generation {
                    self.trainer_exited(now, node, status, &evidence, &mut effects);
                }
            }
            // Its peers, who will miss it, may leave first: what no restart cures ends the run now.
            // Anything else waits for the end of the process.
            Event::TrainerFailed { node, generation, evidence, status, curable } => {
                let ended = matches!(self.phase, Phase::Finished { .. } | Phase::Gathering { .. });
                if generation == self.generation && !curable && !ended {
                    let reason = format!("the trainer of node {node} failed: {evidence}");
                    self.finish(status, reason, &mut effects);
                }
            }
            Event::Recorded(recorded) => {
                if let Phase::Training { ranks, .. } = &self.phase
                    && recorded.generation == self.generation
                {
                    let nodes = ranks.keys();
                    effects.extend(nodes.map(|&node| Effect::Recorded { node, recorded }));
                }
            }
            Event::LedgerLost { status, reason } => {
                if !matches!(self.phase, Phase::Finished { .. }) {
                    self.finish(status, reason, &mut effects);
                }
            }
            Event::StopRequested { reason } => self.stop_requested(now, reason, &mut effects),
            Event::Tick => self.tick(now, &mut effects),
        }
        self.maybe_start(now, &mut effects);
        effects
    }

    fn joined(&mut self, now: Now, node: NodeId, member: Member, effects: &mut Vec<Effect>) {
        if let Phase::Finished { status, reason } = &self.phase {
            effects.push(Effect::Finish { status: *status, reason: reason.clone() });
            return;
        }
        if node.0 >= self.limits.nodes {
            effects.push(Effect::Note(format!(
                "node {node} is not wanted: the run has nodes 0 to {}",
                self.limits.nodes.saturating_sub(1)
            )));
            return;
        }
        if self.members.contains_key(&node) {
            self.lose(now, node, "a new agent took its place", effects);
        }
        self.members.insert(node, member);
    }

    /// Starts a generation when everyone is here.
    fn maybe_start(&mut self, now: Now, effects: &mut Vec<Effect>) {
        if !matches!(self.phase, Phase::Gathering { .. }) {
            return;
        }
        if let Some(reason) = self.stop.clone() {
            self.finish(EXIT_RESUMABLE, reason, effects);
            return;
        }
        if self.members() < self.limits.nodes {
            return;
        }
        let Some(backend) = self.choose_backend(effects) else { return };
        let Some(first) = self.members.values().next() else { return };
        let kv_address = first.kv_address.clone();
        self.generation = Generation(self.generation.0 + 1);
        let mut ranks = BTreeMap::new();
        for (rank, node) in (0..).zip(self.members.keys()) {
            ranks.insert(*node, Rank(rank));
            effects.push(Effect::Start {
                node: *node,
                generation: self.generation,
                rank: Rank(rank),
                world: WorldSize(self.limits.nodes),
                kv_address: kv_address.clone(),
                backend,
            });
        }
        for member in self.members.values_mut() {
            member.last_seen = now;
        }
        self.last_progress = now;
        self.longest_silence = None;
        self.phase = Phase::Training { ranks, left: BTreeMap::new(), stopping: None };
    }

    /// The collectives of the next generation; none if the run had to end over it.
    fn choose_backend(&mut self, effects: &mut Vec<Effect>) -> Option<Backend> {
        let without = self.members.iter().find(|(_, member)| member.gpus == 0);
        match (self.limits.backend, without) {
            (Some(Backend::Nccl), Some((node, _))) => {
                let reason = format!(
                    "--backend nccl: node {node} has no GPU of its own that libtorch can use; see `cpcr doctor`"
                );
                self.finish(EXIT_USAGE, reason, effects);
                None
            }
            (Some(backend), _) => Some(backend),
            (None, None) => Some(Backend::Nccl),
            (None, Some(_)) => {
                let with = self.members.values().filter(|member| member.gpus > 0).count();
                if with > 0 {
                    effects.push(Effect::Note(format!(
                        "{with} of {} workers have a GPU of their own: training on CPUs with Gloo",
                        self.members()
                    )));
                }
                Some(Backend::Gloo)
            }
        }
    }

    fn lose(&mut self, now: Now, node: NodeId, why: &str, effects: &mut Vec<Effect>) {
        self.members.remove(&node);
        match &mut self.phase {
            Phase::Training { ranks, left, .. }
                if ranks.contains_key(&node) && !left.contains_key(&node) =>
            {
                self.lose_generation(now, format!("node {node} was lost: {why}"), effects);
            }
            Phase::Draining { waiting_for, .. } => {
                waiting_for.remove(&node);
            }
            _ => {}
        }
        self.drained(now);
    }

    fn trainer_exited(
        &mut self,
        now: Now,
        node: NodeId,
        status: i32,
        evidence: &str,
        effects: &mut Vec<Effect>,
    ) {
        match &mut self.phase {
            Phase::Training { ranks, left, .. } => {
                let Some(rank) = ranks.get(&node).copied() else { return };
                match status {
                    EXIT_DONE | EXIT_RESUMABLE => {
                        left.insert(node, status);
                        if left.len() == ranks.len() {
                            let stopped = left.values().any(|&s| s == EXIT_RESUMABLE);
                            let (status, reason) = if stopped {
                                (EXIT_RESUMABLE, "stopped after a checkpoint")
                            } else {
                                (EXIT_DONE, "complete")
                            };
                            self.finish(status, reason.to_owned(), effects);
                        }
                    }
                    EXIT_USAGE => self.finish(EXIT_USAGE, evidence.to_owned(), effects),
                    _ => {
                        let why = format!("the trainer of node {node} (rank {rank}) {evidence}");
                        self.lose_generation(now, why, effects);
                        if let Phase::Draining { waiting_for, .. } = &mut self.phase {
                            waiting_for.remove(&node);
                        }
                    }
                }
            }
            Phase::Draining { waiting_for, .. } => {
                waiting_for.remove(&node);
            }
            _ => {}
        }
        self.drained(now);
    }

    fn lose_generation(&mut self, now: Now, why: String, effects: &mut Vec<Effect>) {
        self.lost_generations += 1;
        let Phase::Training { ranks, left, .. } = &self.phase else { return };
        let waiting_for: BTreeSet<NodeId> = ranks
            .keys()
            .filter(|node| !left.contains_key(node) && self.members.contains_key(node))
            .copied()
            .collect();
        for node in &waiting_for {
            effects.push(Effect::End {
                node: *node,
                generation: self.generation,
                reason: why.clone(),
            });
        }
        if self.lost_generations > self.limits.restarts {
            let reason = format!("{why}; {} restarts are used up", self.limits.restarts);
            self.finish(EXIT_FAILED, reason, effects);
            return;
        }
        effects.push(Effect::Note(format!(
            "{why}; going on from the last checkpoint (restart {} of {})",
            self.lost_generations, self.limits.restarts
        )));
        self.phase = Phase::Draining { waiting_for, since: now };
    }

    /// Leaves `Draining` once nobody is waited for.
    fn drained(&mut self, now: Now) {
        if let Phase::Draining { waiting_for, .. } = &self.phase
            && waiting_for.is_empty()
        {
            self.phase = Phase::Gathering { since: now };
        }
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
            self.lose(now, node, "no sign of life", effects);
        }
        match &self.phase {
            Phase::Gathering { since } if now.saturating_sub(*since) > self.limits.wait => {
                let reason = format!(
                    "{} of {} workers came within {} s",
                    self.members(),
                    self.limits.nodes,
                    self.limits.wait.as_secs()
                );
                self.finish(EXIT_RESUMABLE, reason, effects);
            }
            Phase::Draining { waiting_for, since }
                if now.saturating_sub(*since) > self.limits.drain =>
            {
                for node in waiting_for.clone() {
                    self.lose(now, node, "its trainer would not end", effects);
                }
            }
            // A step and the last checkpoint take their time: progress earns more of it.
            Phase::Training { stopping: Some(since), .. }
                if now.saturating_sub(*since) > self.limits.drain
                    && now.saturating_sub(self.last_progress)
                        > self.limits.drain.max(self.longest_silence.unwrap_or_default() * 2) =>
            {
                self.finish(
                    EXIT_RESUMABLE,
                    "the trainers did not stop in time".to_owned(),
                    effects,
                );
            }
            Phase::Training { .. }
                if now.saturating_sub(self.last_progress) > self.silence_max() =>
            {
                let why = format!("no progress for {} s", self.silence_max().as_secs());
                self.lose_generation(now, why, effects);
            }
            _ => {}
        }
    }

    /// How long this generation's trainers may be silent.
    fn silence_max(&self) -> Duration {
        match self.longest_silence {
            None => self.limits.start,
            Some(longest) => self.limits.progress.max(longest * 3),
        }
    }

    fn finish(&mut self, status: i32, reason: String, effects: &mut Vec<Effect>) {
        effects.push(Effect::Finish { status, reason: reason.clone() });
        self.phase = Phase::Finished { status, reason };
    }
}
