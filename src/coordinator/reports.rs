//! What trainers report: where it goes (watchers, the ledger), and what it means to the run. No decision.

use tokio::sync::watch;

use super::board::shared::SharedBoard;
use super::events::{Milestone, Progress};
use super::records::Records;
use crate::proto::{Doing, TrainerEvent, wire};
use crate::types::{Generation, NodeId, Step};

/// Notes kept in the status that watchers read.
const NOTES: usize = 200;

/// What a trainer's event means to the run.
pub(super) enum Said {
    /// It lives.
    Nothing,
    /// Its generation has got so far. Being ready is no progress: the first step may take longest of all.
    Arrived(Milestone),
    /// It waits for a generation.
    Standby,
    /// It has lost one.
    Stranded { generation: Generation, done: Option<Step>, evidence: String },
    /// It gets on.
    Progress(Progress),
    /// It has done all there is to do.
    Completed { generation: Generation },
    /// More than the ledger's queue takes.
    TooMuch,
    /// Why it fails.
    LastWords { text: String, status: i32, curable: bool },
}

/// Puts a trainer's event where watchers see it, and what it says for the ledger there. Step events
/// are rank 0's only.
pub(super) fn relay(
    report: &wire::TrainerReport,
    node: NodeId,
    records: &Records,
    (status, board): (&watch::Sender<wire::RunStatus>, &SharedBoard),
) -> Said {
    let event = serde_json::from_str::<TrainerEvent>(&report.event);
    // Curves, Dice and checkpoints are rank 0's to tell.
    let of_rank_0 = matches!(
        event,
        Ok(TrainerEvent::Step { .. }
            | TrainerEvent::Validation { .. }
            | TrainerEvent::Checkpoint { .. })
    );
    if let Ok(event) = &event
        && (report.rank == 0 || !of_rank_0)
    {
        for line in board.change(|board, now| board.heard(now, node, event)) {
            board.change(|board, now| board.note(now, &line));
            note(status, line);
        }
    }
    if let Ok(event) = &event
        && report.rank == 0
        && !records.note(Generation(report.generation), event)
    {
        return Said::TooMuch;
    }
    match event {
        Ok(TrainerEvent::Step { step, total, .. }) if report.rank == 0 => {
            status.send_modify(|s| s.progress.clone_from(&report.event));
            Said::Progress(Progress::Step { done: step, last: step >= total })
        }
        Ok(TrainerEvent::Validation { .. }) if report.rank == 0 => {
            status.send_modify(|s| s.validation.clone_from(&report.event));
            Said::Progress(Progress::Validating)
        }
        // Other ranks may be done already: the line says what the slowest part is.
        Ok(TrainerEvent::Busy { doing, .. }) => {
            status.send_modify(|s| s.progress.clone_from(&report.event));
            Said::Progress(match doing {
                Doing::Validating => Progress::Validating,
                Doing::Saving => Progress::Saving,
            })
        }
        Ok(TrainerEvent::Grouped(_)) => Said::Arrived(Milestone::Grouped),
        Ok(TrainerEvent::Ready { step, restored, .. }) if report.rank == 0 => {
            if restored {
                let line = format!("resumed at step {step}");
                board.change(|board, now| board.note(now, &line));
                note(status, line);
            }
            Said::Arrived(Milestone::Restored)
        }
        Ok(TrainerEvent::Standby) => Said::Standby,
        Ok(TrainerEvent::Stranded { generation, done, text }) => {
            Said::Stranded { generation, done, evidence: text }
        }
        Ok(TrainerEvent::Complete { generation }) => Said::Completed { generation },
        Ok(TrainerEvent::Failed { text, status, curable }) => {
            Said::LastWords { text, status, curable }
        }
        Ok(_) => Said::Nothing,
        Err(error) => {
            tracing::warn!(rank = report.rank, %error, "unreadable trainer event");
            Said::Nothing
        }
    }
}

pub(super) fn note(status: &watch::Sender<wire::RunStatus>, text: String) {
    tracing::info!("{text}");
    status.send_modify(|s| {
        s.notes.push(text);
        let surplus = s.notes.len().saturating_sub(NOTES);
        s.notes.drain(..surplus);
    });
}
