//! Defects that a coordinator could have, put between it and the world: the simulation must find each of them.

use super::super::events::{Effect, Event};
use crate::types::Generation;

/// What is wrong with the coordinator, for the simulation to find.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Defect {
    None,
    /// It takes members for new that have brought a trainer along.
    ForgetsWhoComesBack,
    /// It does not hear that a trainer's process has ended.
    MissesExits,
    /// It does not notice closed connections, nor silence.
    MissesLosses,
    /// It has a trainer join the generation that it was in.
    RepeatsGenerations,
    /// It tells nobody to leave a generation, and lets those who hang live.
    KillsNobody,
    /// It gives every verdict twice.
    JudgesTwice,
}

impl Defect {
    /// What it hears of an event.
    pub(super) fn hears(self, event: Event) -> Option<Event> {
        let missed = matches!(
            (self, &event),
            (Self::MissesExits, Event::TrainerExited { .. })
                | (Self::MissesLosses, Event::Left { .. } | Event::Tick)
        );
        match event {
            _ if missed => None,
            Event::Joined { node, incarnation, kv_address, gpus, .. }
                if self == Self::ForgetsWhoComesBack =>
            {
                Some(Event::Joined { node, incarnation, kv_address, gpus, running: None })
            }
            event => Some(event),
        }
    }

    /// What it says instead of an effect.
    pub(super) fn says(self, effect: Effect) -> Vec<Effect> {
        match (self, effect) {
            (Self::KillsNobody, Effect::Leave { .. } | Effect::End { .. }) => Vec::new(),
            (Self::JudgesTwice, Effect::Verdict(verdict)) => {
                vec![Effect::Verdict(verdict.clone()), Effect::Verdict(verdict)]
            }
            (
                Self::RepeatsGenerations,
                Effect::Start { node, generation, rank, world, kv_address, backend },
            ) => {
                let generation = Generation(generation.0.div_ceil(2));
                vec![Effect::Start { node, generation, rank, world, kv_address, backend }]
            }
            (_, effect) => vec![effect],
        }
    }
}
