//! Nodes that their platform wants back: they go alone where the others can train on without them, else the whole run
//! writes a checkpoint and stops.
//!
//! A node that has a state goes in two moves: the others meet in a generation without it, and when that has made a step,
//! which proves that they have all that it has, it is told to go. Until then it is kept.

use std::time::Duration;

use super::super::events::{Effect, Now};
use super::super::members::Trainer;
use super::super::verdict::{Cause, CauseKind};
use super::{Phase, State};
use crate::types::NodeId;

/// Several are often wanted back at once, all of them even: it is decided when they have been heard.
const COLLECT: Duration = Duration::from_secs(1);

impl State {
    pub(super) fn release_requested(
        &mut self,
        now: Now,
        node: NodeId,
        reason: String,
        effects: &mut Vec<Effect>,
    ) {
        self.heard(now, node);
        if matches!(self.phase, Phase::Finished { .. }) || self.stop.is_some() {
            return; // it hears of the end
        }
        if !self.members.contains_key(&node) {
            effects.push(Effect::Release { node, reason });
            return;
        }
        self.leaving.entry(node).or_insert((now, reason.clone()));
        match &self.phase {
            Phase::Gathering { recovering: None, .. } => self.release(node, effects),
            Phase::Training { ranks, .. } if !ranks.contains_key(&node) => {
                self.release(node, effects);
            }
            Phase::Training { .. } if !self.can_do_without() => {
                self.stop_requested(now, reason, effects);
            }
            // What becomes of it is seen when there is a generation that trains.
            _ => {}
        }
    }

    /// Tells a node to go. If it says more, because that was lost on the way, it is told again.
    fn release(&mut self, node: NodeId, effects: &mut Vec<Effect>) {
        let Some((_, reason)) = self.leaving.remove(&node) else { return };
        if let Some(member) = self.members.remove(&node) {
            self.released.insert(node, member.incarnation);
        }
        effects.push(Effect::Release { node, reason });
    }

    /// Whether a node's agent has been told to go, and has not been started anew.
    pub(super) fn was_released(&self, node: NodeId, incarnation: &str) -> bool {
        self.released.get(&node).is_some_and(|released| released == incarnation)
    }

    /// Whether those who stay are enough, and on the same kind of device as all: else their states are of no use.
    fn can_do_without(&self) -> bool {
        let Phase::Training { ranks, .. } = &self.phase else { return false };
        let stays = |node: &NodeId| !self.leaving.contains_key(node);
        let usable = self.members.iter().filter(|(node, member)| {
            let ready = matches!(member.trainer, Trainer::In(_) | Trainer::Waiting { .. });
            stays(node) && member.away.is_none() && ready
        });
        let staying: Vec<NodeId> = ranks.keys().copied().filter(stays).collect();
        let all: Vec<NodeId> = ranks.keys().copied().collect();
        !staying.is_empty()
            && usable.count() >= self.limits.min as usize
            && self.backend_for(&staying) == self.backend_for(&all)
    }

    /// Has those who stay meet without the others, when it is time.
    pub(super) fn regroup_without_leaving(&mut self, now: Now, effects: &mut Vec<Effect>) {
        let Some((since, reason)) = self.leaving.values().min_by_key(|(since, _)| *since).cloned()
        else {
            return;
        };
        let Phase::Training { ranks, left, stopping: None } = &self.phase else { return };
        let (last, generation) = (self.last_step || self.complete, self.generation);
        let placed = ranks.iter().find(|(node, _)| self.leaving.contains_key(*node));
        let Some((&node, &rank)) = placed else { return };
        // Before its first step a generation's state may be with one of them alone.
        let agreed = left.is_empty() && self.broken.is_none() && self.longest_silence.is_some();
        if last || !agreed || now.saturating_sub(since) < COLLECT {
            return;
        }
        if !self.can_do_without() {
            self.stop_requested(now, reason, effects);
            return;
        }
        let going: Vec<NodeId> =
            ranks.keys().copied().filter(|node| self.leaving.contains_key(node)).collect();
        let cause = Cause::of_node(CauseKind::GivenBack, node, Some(rank));
        effects.push(Effect::Note(format!("{cause} ({reason})")));
        effects.extend(going.iter().map(|&node| Effect::Leave { node, generation }));
        self.interrupted(now, cause, effects);
        self.phase = Phase::Gathering { since: now, recovering: Some(now) };
    }

    /// A generation has made a step: whoever was kept beside it for its state may go.
    pub(super) fn release_kept(&mut self, effects: &mut Vec<Effect>) {
        let Phase::Training { ranks, .. } = &self.phase else { return };
        let kept: Vec<NodeId> =
            self.leaving.keys().copied().filter(|node| !ranks.contains_key(node)).collect();
        for node in kept {
            self.release(node, effects);
        }
    }

    /// Whether those who are to go may have the only state there is. Then they are needed once more.
    pub(super) fn only_leaving_have_state(&self, chosen: &[NodeId]) -> bool {
        let trainer = |node: &NodeId| self.members.get(node).map(|member| member.trainer);
        let has = |node: &NodeId| trainer(node).is_some_and(Trainer::has_state);
        let sure = |node: &NodeId| has(node) && self.proven.contains(node);
        self.leaving.keys().any(has) && !chosen.iter().any(sure)
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::events::Event;
    use super::super::super::state_tests::{
        elastic, joined, limits, progressed, started, stranded,
    };
    use super::*;
    use crate::coordinator::events::Limits;
    use crate::coordinator::state::State;

    fn at(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    fn wanted(node: u32) -> Event {
        Event::NodeWanted { node: NodeId(node), reason: "SIGTERM".to_owned() }
    }

    fn released(effects: &[Effect]) -> Vec<u32> {
        let nodes = effects.iter().filter_map(|effect| match effect {
            Effect::Release { node, .. } => Some(node.0),
            _ => None,
        });
        nodes.collect()
    }

    fn stops(effects: &[Effect]) -> usize {
        effects.iter().filter(|e| matches!(e, Effect::CheckpointAndStop { .. })).count()
    }

    /// A step of the newest generation, by whoever.
    fn step(state: &mut State, seconds: f64) -> Vec<Effect> {
        let generation = state.generation().0;
        for node in 0..4 {
            state.apply(at(seconds), Event::Heard { node: NodeId(node) });
        }
        state.apply(at(seconds), progressed(2, generation))
    }

    #[test]
    fn one_that_can_be_spared_is_kept_until_the_others_have_made_a_step_without_it() {
        let mut state = elastic(2, 4);
        step(&mut state, 1.0);
        assert!(state.apply(at(2.0), wanted(1)).is_empty(), "others may follow");
        assert!(state.apply(at(2.5), Event::Tick).is_empty());
        let before = state.generation();
        let effects = state.apply(at(3.0), Event::Tick);
        assert_eq!(started(&effects), [0, 2, 3]);
        assert!(effects.contains(&Effect::Leave { node: NodeId(1), generation: before }));
        assert!(released(&effects).is_empty() && state.has_or_rejects(NodeId(1)));
        assert_eq!(released(&step(&mut state, 4.0)), [1]);
        assert!(!state.has_or_rejects(NodeId(1)), "its connection ends");
        // What was said to it may have been lost: the same life is told again, another is welcome.
        assert_eq!(released(&state.apply(at(5.0), joined(1, 0))), [1]);
        assert_eq!(released(&state.apply(at(5.0), wanted(1))), [1]);
        assert!(released(&state.apply(at(6.0), joined(1, 1))).is_empty());
        assert_eq!(state.goodput(at(6.0)).losses, 0);
    }

    #[test]
    fn those_who_are_wanted_at_once_go_at_once_or_all_stop() {
        let mut state = elastic(2, 4);
        step(&mut state, 1.0);
        state.apply(at(2.0), wanted(0));
        state.apply(at(2.5), wanted(1));
        assert_eq!(started(&state.apply(at(3.0), Event::Tick)), [2, 3]);
        assert_eq!(released(&step(&mut state, 4.0)), [0, 1]);
        // All of them: the generation that trains stops, no other is formed before.
        let mut state = elastic(2, 4);
        step(&mut state, 1.0);
        state.apply(at(2.0), wanted(0));
        state.apply(at(2.1), wanted(1));
        let effects = state.apply(at(2.2), wanted(2));
        assert_eq!((stops(&effects), started(&effects).len()), (4, 0));
    }

    #[test]
    fn where_all_are_needed_all_stop_unless_a_spare_is_ready() {
        let mut state = elastic(2, 2);
        step(&mut state, 1.0);
        assert_eq!(stops(&state.apply(at(2.0), wanted(1))), 2);
        let mut state = State::new(Limits { min: 2, max: 2, spares: 1, ..limits() });
        for node in 0..3 {
            state.apply(at(0.0), joined(node, 0));
        }
        state.apply(at(0.5), Event::TrainerStandby { node: NodeId(2) });
        step(&mut state, 1.0);
        state.apply(at(2.0), wanted(1));
        assert_eq!(started(&state.apply(at(3.0), Event::Tick)), [0, 2]);
    }

    /// Its peers die before they have made a step without it: what it has is all there is.
    #[test]
    fn a_state_that_only_the_leaving_have_is_handed_on_first() {
        let mut state = elastic(1, 2);
        let generation = state.generation().0;
        state.apply(at(1.0), progressed(0, generation));
        state.apply(at(2.0), wanted(1));
        assert_eq!(started(&state.apply(at(3.0), Event::Tick)), [0]);
        state.apply(at(3.05), stranded(1, generation, 1));
        state.apply(at(3.1), Event::Left { node: NodeId(0), incarnation: "0.0".to_owned() });
        // Another agent comes in its place, with nothing.
        let effects = state.apply(at(3.2), joined(0, 1));
        assert_eq!((started(&effects), stops(&effects)), (vec![1], 0), "{effects:?}");
        let effects = state.apply(at(3.3), Event::TrainerStandby { node: NodeId(0) });
        assert_eq!(started(&effects), [0, 1]);
        let generation = state.generation().0;
        assert!(released(&state.apply(at(4.0), progressed(0, generation))).is_empty());
        assert_eq!(started(&state.apply(at(4.1), Event::Tick)), [0]);
        let generation = state.generation().0;
        assert_eq!(released(&state.apply(at(5.0), progressed(0, generation))), [1]);
    }
}
