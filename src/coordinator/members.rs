//! Who is there, and who of them trains next: pure.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::time::Duration;

use super::events::{Limits, Now, Running};
use crate::types::{Generation, NodeId, Step};

/// What a member's trainer is at, as far as its agent has said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trainer {
    /// There is none.
    Absent,
    /// It was told to start; `Start` will do that too.
    Preparing,
    /// It waits for a generation, perhaps with a state in memory.
    Waiting { done: Option<Step> },
    /// It was told to join this generation, and has not been heard to leave it.
    In(Generation),
}

impl Trainer {
    /// Of one that its agent has brought along.
    pub(super) fn of(running: Option<&Running>) -> Self {
        match running {
            None => Self::Absent,
            Some(r) if r.stranded => Self::Waiting { done: r.done },
            Some(r) => Self::In(r.generation),
        }
    }

    /// Whether it can join a generation at once.
    fn is_usable(self) -> bool {
        matches!(self, Self::Waiting { .. } | Self::In(_))
    }

    /// Whether it has a state in memory, or may have.
    pub(super) fn has_state(self) -> bool {
        matches!(self, Self::Waiting { done: Some(_) } | Self::In(_))
    }
}

/// One agent, as the coordinator knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Member {
    pub(super) incarnation: String,
    pub(super) kv_address: String,
    pub(super) gpus: u32,
    pub(super) last_seen: Now,
    pub(super) trainer: Trainer,
    /// Steps that its trainer's state has behind it, as far as it has said; [`FRONT`] in the generation that trains.
    pub(super) done: Option<Step>,
    /// How often its trainer could not be prepared.
    pub(super) failures: u32,
    /// Since when its connection has been closed: a moment later it may have another.
    pub(super) away: Option<Now>,
}

impl Member {
    /// Whom to have rather: those with a state first, the most advanced one before others, then those that need not be
    /// started.
    fn preference(&self) -> (u8, Reverse<Option<Step>>) {
        match self.trainer {
            trainer if trainer.has_state() => (0, Reverse(self.done)),
            trainer if trainer.is_usable() => (1, Reverse(None)),
            _ => (2, Reverse(None)),
        }
    }
}

/// As far as anybody: of those who train together.
pub(super) const FRONT: Step = Step(u64::MAX);

pub(super) type Members = BTreeMap<NodeId, Member>;

/// Who makes up the next generation, if it can begin. One that follows another begins at once with those who are
/// there, if they are enough. The first one waits for all, with the spares for `grace` (one of them may bring a trainer
/// of another coordinator's, and with it the newest state), and for the most that the run may have for half the `wait`.
pub(super) fn choose(
    members: &Members,
    limits: &Limits,
    recovering: bool,
    waited: Duration,
) -> Option<Vec<NodeId>> {
    let (min, max, spares) = (limits.min as usize, limits.max as usize, limits.spares as usize);
    let here = members.iter().filter(|(_, member)| member.away.is_none());
    let mut nodes: Vec<NodeId> = here.map(|(node, _)| *node).collect();
    nodes.sort_by_key(|node| (members[node].preference(), *node));
    let usable = nodes.iter().filter(|node| members[node].trainer.is_usable()).count();
    let count = if recovering && usable >= min {
        usable.min(max)
    } else if nodes.len() >= max + spares || nodes.len() >= max && waited > limits.grace {
        max
    } else if nodes.len() >= min && (recovering || waited > limits.wait / 2) {
        nodes.len()
    } else {
        return None;
    };
    nodes.truncate(count);
    // Whoever is away may come back with the only state there is, or is soon given up.
    let has_state = |member: &Member| member.trainer.has_state();
    let lacking = !nodes.iter().any(|node| has_state(&members[node]));
    if lacking && members.values().any(|member| member.away.is_some() && has_state(member)) {
        return None;
    }
    nodes.sort_unstable();
    Some(nodes)
}

/// Whose state is the most advanced, as far as is known; none where nobody has any.
pub(super) fn most_advanced(members: &Members) -> Option<NodeId> {
    let steps = members.iter().filter_map(|(node, member)| match member.trainer {
        Trainer::Waiting { done: Some(step) } => Some((Some(step), *node)),
        Trainer::In(_) => Some((None, *node)),
        _ => None,
    });
    steps.max_by_key(|(step, node)| (*step, std::cmp::Reverse(*node))).map(|(_, node)| node)
}
