//! The trainer's two ends of the pipe to its agent: orders on stdin, events on stdout.
//!
//! Orders are read by a thread of their own, for the training thread may be stuck in a collective whose
//! peer is gone: an order to join another generation breaks the groups of the one before.

use std::io::{BufRead, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::vitals;
use crate::collective::{CollectiveError, ProcessGroup};
use crate::proto::{Membership, TrainerEvent, TrainerOrder};
use crate::types::{Generation, Lineage, Step};

/// How often a trainer says that it lives, and how it does.
const PULSE: Duration = Duration::from_secs(1);

/// Orders that have come so far.
#[derive(Debug)]
pub struct Orders {
    seen: Arc<Seen>,
    /// What the pulse says; the loop keeps it.
    pub vitals: vitals::Shared,
}

/// What a trainer that belongs to no generation does next.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// It joins one.
    Join(Membership),
    /// It stops, with a checkpoint if it has anything to keep.
    Stop,
}

#[derive(Debug, Default)]
struct Seen {
    stop: AtomicBool,
    attest: AtomicBool,
    /// The newest only: it says all that those before it said.
    recorded: Mutex<Option<(Lineage, Step)>>,
    meeting: Mutex<Meeting>,
    changed: Condvar,
}

/// Which generation this trainer is in, and which it shall join.
#[derive(Debug, Default)]
struct Meeting {
    wanted: Option<Membership>,
    joined: Option<Generation>,
    /// Whether `joined` is to be left.
    leave: bool,
    /// The groups of `joined`: breaking them frees the training thread.
    groups: Vec<ProcessGroup>,
}

impl Meeting {
    fn check(&self) -> Result<(), CollectiveError> {
        if self.leave || self.wanted.is_some() {
            return Err(CollectiveError::Aborted("the generation is over".to_owned()));
        }
        Ok(())
    }
}

impl Orders {
    /// Reads orders on a thread of its own, which ends with the pipe, and says on another that this process lives.
    #[must_use]
    pub fn listen() -> Self {
        let orders = Self { seen: Arc::default(), vitals: vitals::Shared::default() };
        let (seen, newest) = (Arc::clone(&orders.seen), Arc::clone(&orders.vitals));
        std::thread::spawn(move || {
            for line in std::io::stdin().lock().lines().map_while(Result::ok) {
                match serde_json::from_str(&line) {
                    Ok(order) => seen.take(order),
                    Err(error) => tracing::warn!(%error, "unreadable order"),
                }
            }
        });
        std::thread::spawn(move || {
            let mut said = None;
            loop {
                std::thread::sleep(PULSE);
                emit(&TrainerEvent::Alive);
                let vitals = vitals::taken(&newest);
                if vitals.as_ref().map(|v| v.steps) != said {
                    said = vitals.as_ref().map(|v| v.steps);
                    vitals.map(TrainerEvent::Vitals).iter().for_each(emit);
                }
            }
        });
        orders
    }

    /// What the ledger has come to hold since this was asked: all steps before one, in a lineage.
    pub fn recorded(&self) -> Option<(Lineage, Step)> {
        self.seen.recorded.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Whether this rank votes for a stop.
    #[must_use]
    pub fn stop_wanted(&self) -> bool {
        self.seen.stop.load(Ordering::Relaxed)
    }

    /// Whether a new coordinator wants to know where the ledger has to go on; it is told once.
    #[must_use]
    pub fn attest_wanted(&self) -> bool {
        self.seen.attest.swap(false, Ordering::Relaxed)
    }

    /// Waits for a generation to join, or for the order to stop.
    #[must_use]
    pub fn next(&self) -> Next {
        let mut meeting = self.seen.meeting();
        loop {
            if let Some(membership) = meeting.wanted.take() {
                meeting.joined = Some(membership.generation);
                meeting.leave = false;
                return Next::Join(membership);
            }
            if self.stop_wanted() {
                return Next::Stop;
            }
            let waited = self.seen.changed.wait(meeting);
            meeting = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The groups of the generation that was joined have formed: from now on an order breaks them.
    ///
    /// # Errors
    /// [`CollectiveError::Aborted`] if that order has come already.
    pub fn enter(&self, groups: Vec<ProcessGroup>) -> Result<(), CollectiveError> {
        let mut meeting = self.seen.meeting();
        meeting.check()?;
        meeting.groups = groups;
        Ok(())
    }

    /// For a rank that is alone, which has no group that could break.
    ///
    /// # Errors
    /// [`CollectiveError::Aborted`] if the generation is over.
    pub fn still_in(&self) -> Result<(), CollectiveError> {
        self.seen.meeting().check()
    }

    /// The training thread is out of its groups.
    pub fn released(&self) {
        let groups = std::mem::take(&mut self.seen.meeting().groups);
        // Not under the lock: ending a group may take seconds.
        drop(groups);
    }
}

impl Seen {
    fn meeting(&self) -> MutexGuard<'_, Meeting> {
        self.meeting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, order: TrainerOrder) {
        match order {
            TrainerOrder::Join(membership) => {
                self.part(|meeting| {
                    meeting.wanted = Some(membership);
                    true
                });
            }
            TrainerOrder::Leave { generation } => {
                self.part(|meeting| {
                    let applies = meeting.joined == Some(generation);
                    meeting.leave |= applies;
                    applies
                });
            }
            TrainerOrder::Attest => self.attest.store(true, Ordering::Relaxed),
            TrainerOrder::CheckpointAndStop => {
                self.stop.store(true, Ordering::Relaxed);
                // Under the lock, or it could fall between a look and a wait.
                let _meeting = self.meeting();
                self.changed.notify_all();
            }
            TrainerOrder::Recorded { lineage, step } => {
                let mut recorded = self.recorded.lock().unwrap_or_else(PoisonError::into_inner);
                *recorded = Some((lineage, step));
            }
        }
    }

    /// Changes the meeting, and if that ends the generation breaks its groups.
    fn part(&self, change: impl FnOnce(&mut Meeting) -> bool) {
        let mut meeting = self.meeting();
        let groups = if change(&mut meeting) { meeting.groups.clone() } else { Vec::new() };
        drop(meeting);
        self.changed.notify_all();
        for group in groups {
            if let Err(error) = group.abort() {
                tracing::debug!(%error, "break a group");
            }
        }
    }
}

/// Tells the agent. An agent that is gone takes this process with it, so a failure needs no answer.
pub fn emit(event: &TrainerEvent) {
    match serde_json::to_string(event) {
        Ok(line) => {
            let mut out = std::io::stdout().lock();
            if let Err(error) = writeln!(out, "{line}").and_then(|()| out.flush()) {
                tracing::warn!(%error, "the agent does not listen");
            }
        }
        Err(error) => tracing::warn!(%error, "an event could not be written"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Rank, WorldSize};

    fn membership(generation: u64) -> Membership {
        Membership {
            generation: Generation(generation),
            epoch: "e".to_owned(),
            rank: Rank(0),
            world: WorldSize(1),
            kv_address: ([127, 0, 0, 1], 1).into(),
            traceparent: None,
        }
    }

    #[test]
    fn a_generation_is_joined_once_and_the_newest_counts() {
        let orders = Orders { seen: Arc::default(), vitals: vitals::Shared::default() };
        orders.seen.take(TrainerOrder::Join(membership(1)));
        orders.seen.take(TrainerOrder::Join(membership(2)));
        assert_eq!(orders.next(), Next::Join(membership(2)));
        orders.seen.take(TrainerOrder::CheckpointAndStop);
        assert_eq!(orders.next(), Next::Stop);
        // Whoever has a place takes part in the vote.
        orders.seen.take(TrainerOrder::Join(membership(3)));
        assert_eq!(orders.next(), Next::Join(membership(3)));
    }

    #[test]
    fn what_is_over_before_its_groups_have_formed_is_not_entered() {
        let orders = Orders { seen: Arc::default(), vitals: vitals::Shared::default() };
        orders.seen.take(TrainerOrder::Join(membership(1)));
        assert_eq!(orders.next(), Next::Join(membership(1)));
        orders.seen.take(TrainerOrder::Leave { generation: Generation(7) });
        orders.enter(Vec::new()).unwrap();
        orders.seen.take(TrainerOrder::Leave { generation: Generation(1) });
        assert!(matches!(orders.enter(Vec::new()), Err(CollectiveError::Aborted(_))));
        orders.seen.take(TrainerOrder::Join(membership(2)));
        assert_eq!(orders.next(), Next::Join(membership(2)));
        orders.enter(Vec::new()).unwrap();
        orders.seen.take(TrainerOrder::Join(membership(3)));
        assert!(orders.enter(Vec::new()).is_err());
    }
}
