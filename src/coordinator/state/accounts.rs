//! What interrupts generations, and where the time goes: kept beside the decisions, and deciding nothing but when all is over.

use std::collections::BTreeMap;

use super::super::events::{Effect, Milestone, Now, Progress};
use super::super::members::Trainer;
use super::super::verdict::{Cause, Goodput, Interruption, Part, Victim};
use super::{Phase, State};
use crate::proto::EXIT_DONE;
use crate::types::{Generation, NodeId, Rank, WorldSize};

/// A member as others see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing<'a> {
    /// Which.
    pub node: NodeId,
    /// In the generation that trains.
    pub rank: Option<Rank>,
    /// What its trainer is at; "gone" when it has done its part.
    pub doing: &'static str,
    /// Whether it has one that has started.
    pub has_trainer: bool,
    /// When it was last heard.
    pub heard: Now,
    /// The address of its host, as other nodes reach it.
    pub host: &'a str,
}

impl State {
    /// Nothing is left to do. Its generation's trainers leave by themselves; those who were told to meet in another
    /// one meanwhile, because a member joined in the last moment, would wait for peers that are gone.
    pub(super) fn completed(&mut self, generation: Generation, effects: &mut Vec<Effect>) {
        self.complete = true;
        let leaving = matches!(self.phase, Phase::Training { .. }) && generation == self.generation;
        if !leaving && !matches!(self.phase, Phase::Finished { .. }) {
            self.finish(EXIT_DONE, "complete".to_owned(), effects);
        }
    }

    /// What the time until a sign of progress was spent on.
    pub(super) fn part_of(&self, progress: Progress) -> Part {
        let stopping = matches!(self.phase, Phase::Training { stopping: Some(_), .. });
        match (&self.interruption, progress) {
            _ if stopping => Part::Stopping,
            (Some(interruption), _) => interruption.part(),
            (None, _) if self.longest_silence.is_none() && self.furthest.is_none() => {
                Part::Starting
            }
            (None, Progress::Step { done, .. }) if Some(done) <= self.furthest => Part::Rework,
            (None, Progress::Step { .. }) => Part::Training,
            (None, Progress::Validating) => Part::Validation,
            (None, Progress::Saving) => Part::Saving,
        }
    }

    /// What the time since the last mark is spent on while nothing gets on.
    pub(super) fn part_now(&self) -> Part {
        match (&self.phase, &self.interruption) {
            (Phase::Training { stopping: Some(_), .. } | Phase::Finished { .. }, _) => {
                Part::Stopping
            }
            (_, Some(interruption)) => interruption.part(),
            (Phase::Training { .. }, None) if self.longest_silence.is_some() => Part::Training,
            (Phase::Training { .. }, None) => Part::Starting,
            _ => Part::Waiting,
        }
    }

    /// The account of the time until `now`.
    pub fn goodput(&mut self, now: Now) -> Goodput {
        self.account.mark(now, self.part_now());
        self.account.goodput()
    }

    /// The account as far as it is settled: what the time since then was spent on shows only with what comes next.
    #[must_use]
    pub fn settled(&self) -> Goodput {
        self.account.goodput()
    }

    /// A generation ended of this.
    pub(super) fn interrupted(&mut self, now: Now, cause: Cause, effects: &mut Vec<Effect>) {
        if let Some(before) = self.interruption.take() {
            self.close(before, None, effects);
        }
        let none = BTreeMap::new();
        let ranks = match &self.phase {
            Phase::Training { ranks, .. } | Phase::Adopting { ranks, .. } => ranks,
            _ => &none,
        };
        let victim = |(node, rank): (&NodeId, &Rank)| {
            let evidence = self.strandings.get(node).cloned();
            (Some(*node) != cause.node).then_some(Victim { node: *node, rank: *rank, evidence })
        };
        let interruption = Interruption {
            generation: self.generation,
            world: WorldSize(u32::try_from(ranks.len()).unwrap_or(u32::MAX)),
            step: self.furthest,
            victims: ranks.iter().filter_map(victim).collect(),
            also: Vec::new(),
            last_progress: self.last_progress,
            ended: now,
            fenced: now,
            followed: None,
            grouped: None,
            restored: None,
            cause,
        };
        self.account.count(interruption.is_loss());
        self.account.mark(now, interruption.part());
        self.interruption = Some(interruption);
    }

    /// The generation that followed has got so far.
    pub(super) fn arrived(&mut self, now: Now, generation: Generation, milestone: Milestone) {
        let Some(interruption) = &mut self.interruption else { return };
        if interruption.followed.is_some_and(|(_, next, _)| next == generation) {
            let mark = match milestone {
                Milestone::Grouped => &mut interruption.grouped,
                Milestone::Restored => &mut interruption.restored,
            };
            mark.get_or_insert(now);
        }
    }

    /// How many members the run may have.
    #[must_use]
    pub fn wanted(&self) -> u32 {
        self.limits.max
    }

    /// Who is here, and at what.
    pub fn standings(&self) -> impl Iterator<Item = Standing<'_>> {
        let ranks = match &self.phase {
            Phase::Training { ranks, .. } | Phase::Adopting { ranks, .. } => Some(ranks),
            _ => None,
        };
        let left = match &self.phase {
            Phase::Training { left, .. } => Some(left),
            _ => None,
        };
        self.members.iter().map(move |(node, member)| Standing {
            node: *node,
            rank: ranks.and_then(|ranks| ranks.get(node)).copied(),
            has_trainer: !matches!(member.trainer, Trainer::Absent | Trainer::Preparing),
            doing: match member.trainer {
                _ if left.is_some_and(|left| left.contains_key(node)) => "gone",
                _ if member.away.is_some() => "lost",
                Trainer::Absent => "lost",
                Trainer::Preparing => "starting",
                Trainer::Waiting { done: Some(_) } => "stranded",
                Trainer::Waiting { done: None } => "standby",
                Trainer::In(_) => "training",
            },
            heard: member.last_seen,
            host: member.kv_address.rsplit_once(':').map_or("", |(host, _)| host),
        })
    }

    /// What interrupts the run now, if anything does.
    pub(in super::super) fn interruption(&self) -> Option<&Interruption> {
        self.interruption.as_ref()
    }

    pub(super) fn close(
        &self,
        interruption: Interruption,
        step: Option<Now>,
        effects: &mut Vec<Effect>,
    ) {
        let verdict = interruption.over(step);
        effects.push(Effect::Note(verdict.line()));
        effects.push(Effect::Verdict(Box::new(verdict)));
    }
}
