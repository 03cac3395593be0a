//! The trainer's two ends of the pipe to its agent: orders on stdin, events on stdout.

use std::io::{BufRead, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::proto::{TrainerEvent, TrainerOrder};
use crate::types::{Lineage, Step};

/// Orders that have come so far.
#[derive(Debug)]
pub struct Orders {
    seen: Arc<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    stop: AtomicBool,
    /// The newest only: it says all that those before it said.
    recorded: Mutex<Option<(Lineage, Step)>>,
}

impl Orders {
    /// Reads orders on a thread of its own; the thread ends with the pipe.
    #[must_use]
    pub fn listen() -> Self {
        let orders = Self { seen: Arc::default() };
        let seen = Arc::clone(&orders.seen);
        std::thread::spawn(move || {
            for line in std::io::stdin().lock().lines().map_while(Result::ok) {
                match serde_json::from_str(&line) {
                    Ok(TrainerOrder::CheckpointAndStop) => seen.stop.store(true, Ordering::Relaxed),
                    Ok(TrainerOrder::Recorded { lineage, step }) => {
                        let mut recorded =
                            seen.recorded.lock().unwrap_or_else(PoisonError::into_inner);
                        *recorded = Some((lineage, step));
                    }
                    Err(error) => tracing::warn!(%error, "unreadable order"),
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
