//! What there is at a node of the simulated world: an agent, its trainer, what is on the way to and from them.

use std::collections::VecDeque;
use std::time::Duration;

use super::super::events::{Effect, Event};
use crate::types::{Generation, NodeId, Rank, Step, WorldSize};

/// Which start of a coordinator, and which generation of it.
pub(super) type Group = (u32, Generation);

/// A trainer process.
#[derive(Debug, Clone, Copy)]
pub(super) struct Trainer {
    /// What it was told to join last.
    pub(super) place: Option<(Group, Rank, WorldSize)>,
    /// What it has joined: the group that it believes in.
    pub(super) joined: Option<Group>,
    /// Whether it has left, or given up, the group of its place: it waits for another.
    pub(super) left: bool,
    /// Its state, if it has one.
    pub(super) done: Option<Step>,
    pub(super) frozen: bool,
}

/// Its platform wants it back.
pub(super) fn wanted(node: u32) -> Event {
    Event::NodeWanted { node: NodeId(node), reason: "SIGTERM".to_owned() }
}

/// An agent and its trainer.
#[derive(Debug, Default)]
pub(super) struct Node {
    pub(super) alive: bool,
    pub(super) connected: bool,
    /// On the way to it, and from it: in order, and lost with the connection.
    pub(super) orders: VecDeque<Effect>,
    pub(super) reports: VecDeque<Event>,
    /// Since when it is not.
    pub(super) away: Duration,
    /// Whether it was away for so long that the others may have gone on without it.
    pub(super) late: bool,
    pub(super) life: u32,
    /// Whether its platform wants it back.
    pub(super) wanted: bool,
    pub(super) trainer: Option<Trainer>,
}

impl Node {
    /// Its connection is closed, with all that was on the way.
    pub(super) fn disconnect(&mut self, now: Duration) {
        (self.connected, self.away) = (false, now);
        self.orders.clear();
        self.reports.clear();
    }
}

impl Trainer {
    /// One that has just been started.
    pub(super) fn fresh() -> Self {
        Self { place: None, joined: None, left: false, done: None, frozen: false }
    }
}
