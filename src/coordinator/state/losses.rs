//! What is lost, and what that means to those who are left.

use std::time::Duration;

use super::super::events::{Effect, Now};
use super::super::members::Trainer;
use super::super::verdict::{Cause, CauseKind};
use super::{Phase, State};
use crate::proto::{EXIT_DONE, EXIT_FAILED, EXIT_RESUMABLE, EXIT_USAGE};
use crate::types::{Generation, NodeId, Step};

impl State {
    /// Its connection is closed. If it has a place, and nobody misses it yet, it may come back to it.
    pub(super) fn went_away(&mut self, now: Now, node: NodeId, effects: &mut Vec<Effect>) {
        let misses = matches!(&self.phase, Phase::Training { ranks, stopping, .. }
            if ranks.contains_key(&node) && (self.broken.is_some() || stopping.is_some()));
        if let Phase::Adopting { ranks, .. } = &mut self.phase {
            ranks.remove(&node);
        }
        match self.members.get_mut(&node) {
            Some(member) if member.trainer.has_state() && !misses => member.away = Some(now),
            _ => self.lose(now, node, CauseKind::AgentLost, effects),
        }
    }

    /// Those who have been away for longer than `grace`.
    pub(super) fn away_for(&self, now: Now, grace: Duration) -> Vec<NodeId> {
        let is_over = |away: Option<Now>| away.is_some_and(|away| now.saturating_sub(away) > grace);
        let gone = self.members.iter().filter(|(_, member)| is_over(member.away));
        gone.map(|(node, _)| *node).collect()
    }

    pub(super) fn lose(
        &mut self,
        now: Now,
        node: NodeId,
        kind: CauseKind,
        effects: &mut Vec<Effect>,
    ) {
        let member = self.members.remove(&node);
        self.leaving.remove(&node);
        self.proven.remove(&node);
        if member.is_some_and(|m| m.trainer.has_state()) && kind != CauseKind::AgentReplaced {
            self.strayed = Some(now);
        }
        if let (Phase::Gathering { .. }, Some(interruption)) = (&self.phase, &mut self.interruption)
        {
            interruption.lost_too(Cause::of_node(kind, node, None));
        }
        match &mut self.phase {
            Phase::Training { ranks, left, .. }
                if ranks.contains_key(&node) && !left.contains_key(&node) =>
            {
                let cause = Cause::of_node(kind, node, ranks.get(&node).copied());
                self.lose_generation(now, cause, effects);
            }
            Phase::Adopting { ranks, .. } => drop(ranks.remove(&node)),
            _ => {}
        }
    }

    pub(super) fn stranded(
        &mut self,
        now: Now,
        node: NodeId,
        generation: Generation,
        done: Option<Step>,
        evidence: String,
        effects: &mut Vec<Effect>,
    ) {
        if let Some(interruption) = &mut self.interruption
            && interruption.generation == generation
        {
            interruption.saw(now, node, &evidence);
        }
        let Some(member) = self.members.get_mut(&node) else { return };
        if member.trainer != Trainer::In(generation) {
            return; // it has been told to join another one since
        }
        member.trainer = Trainer::Waiting { done };
        member.done = done;
        if done.is_some() {
            self.proven.insert(node);
        } else {
            self.proven.remove(&node);
        }
        if generation == self.generation {
            self.strandings.insert(node, evidence.clone());
        }
        if matches!(&self.phase, Phase::Adopting { ranks, .. } if ranks.contains_key(&node)) {
            self.lose_generation(now, Cause::of_all(CauseKind::GroupBroke, evidence), effects);
            return;
        }
        let Phase::Training { ranks, left, .. } = &self.phase else { return };
        if !ranks.contains_key(&node) {
            self.trainer_is_there(now, node, effects);
            return;
        }
        if generation != self.generation {
            return;
        }
        let away =
            self.members.iter().find(|(node, m)| m.away.is_some() && ranks.contains_key(node));
        if let Some(away) = away.map(|(node, _)| *node) {
            self.lose(now, away, CauseKind::AgentLost, effects);
            return;
        }
        // Whoever is to blame will show: by its exit, its silence, its closed connection.
        let text = self.broken.get_or_insert((now, evidence)).1.clone();
        let waits = |node: &NodeId| {
            let trainer = self.members.get(node).map(|member| member.trainer);
            matches!(trainer, Some(Trainer::Waiting { .. }))
        };
        if ranks.keys().all(|node| left.contains_key(node) || waits(node)) {
            self.lose_generation(now, Cause::of_all(CauseKind::GroupBroke, text), effects);
        }
    }

    pub(super) fn trainer_exited(
        &mut self,
        now: Now,
        node: NodeId,
        generation: Generation,
        status: i32,
        mut cause: Cause,
        effects: &mut Vec<Effect>,
    ) {
        if matches!(self.phase, Phase::Finished { .. }) {
            return;
        }
        let Some(member) = self.members.get_mut(&node) else { return };
        member.last_seen = now;
        let stopping = matches!(self.phase, Phase::Training { stopping: Some(_), .. });
        let unplaced = matches!(member.trainer, Trainer::Preparing | Trainer::Waiting { .. });
        let current = generation == self.generation || (generation == Generation(0) && unplaced);
        if !current && !stopping && member.trainer != Trainer::In(generation) {
            return; // another one has been started since
        }
        if member.trainer == Trainer::Preparing {
            member.failures += 1;
        }
        member.trainer = Trainer::Absent;
        if status == EXIT_USAGE {
            self.finish(EXIT_USAGE, cause.evidence, effects);
            return;
        }
        if let Phase::Adopting { ranks, .. } = &self.phase
            && let Some(rank) = ranks.get(&node)
        {
            cause.rank = Some(*rank);
            self.lose_generation(now, cause, effects);
            return;
        }
        if let (Phase::Gathering { .. }, Some(interruption)) = (&self.phase, &mut self.interruption)
        {
            interruption.lost_too(cause);
            return;
        }
        let Phase::Training { ranks, left, .. } = &mut self.phase else { return };
        let Some(rank) = ranks.get(&node).copied() else { return };
        if !matches!(status, EXIT_DONE | EXIT_RESUMABLE) {
            cause.rank = Some(rank);
            self.lose_generation(now, cause, effects);
            return;
        }
        left.insert(node, status);
        self.maybe_over(effects);
    }

    /// The end, if every trainer has left in good order.
    fn maybe_over(&mut self, effects: &mut Vec<Effect>) {
        let Phase::Training { ranks, left, .. } = &self.phase else { return };
        if left.len() < ranks.len() {
            return;
        }
        if left.is_empty() {
            let reason = "stopped; the last checkpoint counts".to_owned();
            self.finish(EXIT_RESUMABLE, reason, effects);
        } else if left.values().any(|&status| status == EXIT_RESUMABLE) {
            let why = self.stop.as_deref().map(|why| format!(": {why}")).unwrap_or_default();
            self.finish(EXIT_RESUMABLE, format!("stopped after a checkpoint{why}"), effects);
        } else {
            self.finish(EXIT_DONE, "complete".to_owned(), effects);
        }
    }

    /// The generation is over; whoever is left of it waits for the next with its state.
    pub(super) fn lose_generation(&mut self, now: Now, cause: Cause, effects: &mut Vec<Effect>) {
        if self.complete {
            self.finish(EXIT_DONE, "complete".to_owned(), effects);
            return;
        }
        let why = cause.to_string();
        let (ranks, from) = match &self.phase {
            Phase::Training { ranks, .. } => (ranks.clone(), now),
            // Others are still on their way here, perhaps with the newest state.
            Phase::Adopting { ranks, since, .. } => (ranks.clone(), *since + self.limits.grace),
            _ => return,
        };
        let generation = self.generation;
        let lives =
            |node: &NodeId| self.members.get(node).is_some_and(|member| member.trainer.has_state());
        let living: Vec<NodeId> = ranks.keys().copied().filter(lives).collect();
        effects.extend(living.iter().map(|&node| Effect::Leave { node, generation }));
        // One that ended before, and whose last trainer was to write a checkpoint, has its verdict.
        if self.interruption.as_ref().is_none_or(|before| before.generation != generation) {
            self.interrupted(now, cause, effects);
        }
        if let Phase::Training { ranks, left, stopping: Some(_) } = &mut self.phase {
            // Each of those who are left stops by itself.
            effects.push(Effect::Note(why));
            ranks.retain(|node, _| living.contains(node) || left.contains_key(node));
            self.maybe_over(effects);
            return;
        }
        // What strikes several processes is one misfortune, though it ends several generations.
        if self.fruitless == 0 || now.saturating_sub(self.struck) > self.limits.grace {
            self.fruitless += 1;
            self.struck = now;
        }
        if self.fruitless > self.limits.restarts {
            let reason =
                format!("{why}; {} restarts without a step are used up", self.limits.restarts);
            self.finish(EXIT_FAILED, reason, effects);
            return;
        }
        effects.push(Effect::Note(format!(
            "{why}; going on (restart {} of {} without a step)",
            self.fruitless, self.limits.restarts
        )));
        self.phase = Phase::Gathering { since: now, recovering: Some(from) };
    }

    pub(super) fn tick_training(&mut self, now: Now, effects: &mut Vec<Effect>) {
        if now.saturating_sub(self.last_progress) > self.silence_max() {
            let why = format!("no progress for {} s", self.silence_max().as_secs());
            self.end_those_who_hang(effects);
            self.lose_generation(now, Cause::of_all(CauseKind::NoProgress, why), effects);
            return;
        }
        let Some((since, text)) = self.broken.clone() else { return };
        if now.saturating_sub(since) > self.limits.grace {
            self.end_those_who_hang(effects);
            self.lose_generation(now, Cause::of_all(CauseKind::GroupBroke, text), effects);
        }
    }

    /// Has those killed who had only to join this generation, and neither did nor said why not. Where it has
    /// got on before, its end may free them.
    fn end_those_who_hang(&mut self, effects: &mut Vec<Effect>) {
        let Phase::Training { ranks, .. } = &self.phase else { return };
        if self.longest_silence.is_some() {
            return;
        }
        let generation = self.generation;
        for node in ranks.keys() {
            if let Some(member) = self.members.get_mut(node)
                && member.trainer == Trainer::In(generation)
                && (self.veterans.contains(node) || self.broken.is_none())
            {
                member.trainer = Trainer::Absent;
                effects.push(Effect::End {
                    node: *node,
                    generation,
                    reason: "it hangs".to_owned(),
                });
            }
        }
    }

    /// How long this generation's trainers may be silent.
    fn silence_max(&self) -> Duration {
        match self.longest_silence {
            None => self.limits.start,
            Some(longest) => self.limits.progress.max(longest * 3),
        }
    }
}
