//! Who comes, and with what: fresh agents, agents whose connection broke, trainers of a coordinator that is gone.

use std::collections::{BTreeMap, BTreeSet};

use super::super::events::{Effect, Now, Running};
use super::super::members::{FRONT, Member, Trainer};
use super::super::verdict::{Cause, CauseKind, Part};
use super::{Phase, State};
use crate::types::{NodeId, Rank};

impl State {
    pub(super) fn joined(
        &mut self,
        now: Now,
        node: NodeId,
        member: Member,
        running: Option<Running>,
        effects: &mut Vec<Effect>,
    ) {
        if let Phase::Finished { status, reason } = &self.phase {
            effects.push(Effect::Finish { status: *status, reason: reason.clone() });
            return;
        }
        let most = self.limits.max + self.limits.spares;
        if node.0 >= most {
            effects.push(Effect::Note(format!(
                "node {node} is not wanted: the run has nodes 0 to {}",
                most.saturating_sub(1)
            )));
            return;
        }
        if self.was_released(node, &member.incarnation) {
            effects.push(Effect::Release { node, reason: "it was given back".to_owned() });
            return;
        }
        self.released.remove(&node);
        let in_place = |phase: &Phase, generation| {
            matches!(phase, Phase::Training { ranks, .. } if ranks.contains_key(&node))
                && member.trainer == Trainer::In(generation)
        };
        if let Some(before) = self.members.get(&node) {
            let same = before.incarnation == member.incarnation;
            if same && in_place(&self.phase, self.generation) {
                // Its connection was made anew; its trainer has not noticed.
                self.members.insert(node, Member { done: Some(FRONT), ..member });
                let leads = matches!(&self.phase, Phase::Training { ranks, .. }
                    if ranks.get(&node) == Some(&Rank(0)));
                if leads {
                    // What it said in between may be lost.
                    self.attest(self.generation, effects);
                }
                return;
            }
            let kind = if same { CauseKind::AgentLost } else { CauseKind::AgentReplaced };
            self.lose(now, node, kind, effects);
        }
        if let Phase::Gathering { since, recovering: None } = &mut self.phase
            && self.members.is_empty()
        {
            *since = now;
        }
        let usable = matches!(member.trainer, Trainer::Waiting { .. } | Trainer::In(_));
        self.members.insert(node, member);
        if let Some(running) = running {
            self.adopt(now, node, &running, effects);
        }
        if usable {
            self.trainer_is_there(now, node, effects);
        }
    }

    /// A member has brought a trainer of a generation that this coordinator has not started.
    fn adopt(&mut self, now: Now, node: NodeId, running: &Running, effects: &mut Vec<Effect>) {
        self.newest = self.newest.max(running.generation);
        if let Phase::Gathering { recovering: None, .. } = self.phase
            && running.generation > self.generation
        {
            self.generation = running.generation;
            let (since, world) = (now, running.world);
            self.phase = Phase::Adopting { since, world, ranks: BTreeMap::new() };
        }
        if running.generation < self.generation {
            if !running.stranded {
                // It has been cut off, and goes on beside the others: what it has is welcome, its group is over.
                effects.push(Effect::Leave { node, generation: running.generation });
            }
            return;
        }
        if running.generation > self.generation && !running.stranded {
            self.newer_lives(now, node, running, effects);
        }
        let Phase::Adopting { world, ranks, .. } = &mut self.phase else { return };
        if running.stranded || running.generation != self.generation || running.world != *world {
            let why = format!("node {node} has left its generation");
            self.lose_generation(now, Cause::of_all(CauseKind::NotAdopted, why), effects);
            return;
        }
        ranks.insert(node, running.rank);
        self.furthest = self.furthest.max(running.done);
        if ranks.values().collect::<BTreeSet<_>>().len() < world.0 as usize {
            return;
        }
        let (ranks, world) = (ranks.clone(), *world);
        effects.push(Effect::Note(format!(
            "took over {world} workers in the midst of training: nothing was interrupted"
        )));
        for node in ranks.keys() {
            if let Some(member) = self.members.get_mut(node) {
                member.done = Some(FRONT);
            }
        }
        self.account.mark(now, Part::Training);
        self.last_progress = now;
        self.longest_silence = None;
        self.phase = Phase::Training { ranks, left: BTreeMap::new(), stopping: None };
        self.attest(self.generation, effects);
        if let Some(reason) = self.stop.take() {
            self.stop_requested(now, reason, effects);
        }
    }

    /// A generation lives that is newer than the one that is being taken over, or has been: those of the older one were cut
    /// off from it.
    fn newer_lives(
        &mut self,
        now: Now,
        node: NodeId,
        running: &Running,
        effects: &mut Vec<Effect>,
    ) {
        match &self.phase {
            Phase::Adopting { since, ranks, .. } => {
                let generation = self.generation;
                effects.extend(ranks.keys().map(|&node| Effect::Leave { node, generation }));
                let (since, world) = (*since, running.world);
                self.generation = running.generation;
                self.phase = Phase::Adopting { since, world, ranks: BTreeMap::new() };
            }
            Phase::Training { stopping: None, .. } => {
                let generation = running.generation;
                effects.push(Effect::Leave { node, generation });
                let why = format!("node {node} is in a newer generation, {generation}");
                self.lose_generation(now, Cause::of_all(CauseKind::NotAdopted, why), effects);
            }
            _ => {}
        }
    }

    /// A trainer that could be used is there: one more, if the generation has room.
    pub(super) fn trainer_is_there(&mut self, now: Now, node: NodeId, effects: &mut Vec<Effect>) {
        let Some(member) = self.members.get_mut(&node) else { return };
        if matches!(member.trainer, Trainer::Absent | Trainer::Preparing) {
            member.trainer = Trainer::Waiting { done: None };
        }
        if let Phase::Training { ranks, left, stopping: None } = &self.phase
            && left.is_empty()
            && !self.last_step
            && !self.complete
            && !ranks.contains_key(&node)
            && !self.leaving.contains_key(&node)
            && ranks.len() < self.limits.max as usize
        {
            let cause = Cause::of_node(CauseKind::Joined, node, None);
            effects.push(Effect::Note(cause.to_string()));
            self.interrupted(now, cause, effects);
            self.phase = Phase::Gathering { since: now, recovering: Some(now) };
        }
    }
}
