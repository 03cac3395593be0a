//! The trainer's two ends of the pipe to its agent: orders on stdin, events on stdout.

use std::io::{BufRead, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::proto::{TrainerEvent, TrainerOrder};

/// Orders that have come so far.
#[derive(Debug)]
pub struct Orders {
    stop: Arc<AtomicBool>,
}

impl Orders {
    /// Reads orders on a thread of its own; the thread ends with the pipe.
    #[must_use]
    pub fn listen() -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        std::thread::spawn(move || {
            for line in std::io::stdin().lock().lines().map_while(Result::ok) {
                match serde_json::from_str(&line) {
                    Ok(TrainerOrder::CheckpointAndStop) => seen.store(true, Ordering::Relaxed),
                    Err(error) => tracing::warn!(%error, "unreadable order"),
                }
            }
        });
        Self { stop }
    }

    /// Whether this rank votes for a stop.
    #[must_use]
    pub fn stop_wanted(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
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
