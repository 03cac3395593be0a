//! What the launcher sees of a run, through restarts of its coordinator, and shows in the progress line.

use std::net::SocketAddr;

use super::serve::Dashboard;
use crate::proto::wire::coordinator_client::CoordinatorClient;
use crate::proto::wire::{RunStatus, StopRequest, WatchRequest};
use crate::proto::{Doing, TrainerEvent};
use crate::telemetry::progress::RunStatus as Shown;
use crate::telemetry::progress::{Progress, ProgressState};
use crate::trust::Trust;

/// Asks the coordinator to end the run in good order.
pub(super) async fn ask_to_stop(trust: &Trust, address: SocketAddr, reason: String) {
    let asked = async {
        let channel = trust.channel(&address.to_string()).await.ok()?;
        CoordinatorClient::new(channel).stop(StopRequest { reason }).await.ok()
    };
    if asked.await.is_none() {
        tracing::warn!("the coordinator could not be asked to stop; its own signal will do");
    }
}

/// Keeps the newest status at hand, through restarts of the coordinator.
pub(super) async fn follow(
    (trust, address): (Trust, SocketAddr),
    statuses: tokio::sync::watch::Sender<RunStatus>,
) {
    loop {
        if let Ok(channel) = trust.channel(&address.to_string()).await
            && let Ok(stream) = CoordinatorClient::new(channel).watch(WatchRequest {}).await
        {
            let mut stream = stream.into_inner();
            while let Ok(Some(status)) = stream.message().await {
                statuses.send_replace(status);
            }
        }
        // Nothing tells when a coordinator listens again: this is the poll.
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
}

/// What the progress line shows.
#[derive(Default)]
pub(super) struct View {
    pub(super) state: ProgressState,
    notes: usize,
    pub(super) reason: String,
    /// Where the run's page is.
    dashboard: String,
    /// Where the time went, as JSON.
    pub(super) goodput: String,
    /// The last validation's Dice by class, the mean last.
    pub(super) dice: Vec<(String, f64)>,
}

impl View {
    /// The address of the run's page, once it is known.
    pub(super) fn dashboard(&self) -> Option<Dashboard> {
        let address = self.dashboard.split_once("://")?.1.trim_end_matches('/');
        address.parse().ok().map(|address| Dashboard(Some(address)))
    }

    /// Takes up what the coordinator says.
    pub(super) fn show(&mut self, status: &RunStatus, progress: &mut Progress) {
        if status.notes.len() < self.notes {
            self.notes = 0; // another coordinator
        }
        if status.dashboard != self.dashboard {
            self.dashboard.clone_from(&status.dashboard);
            if !self.dashboard.is_empty() {
                progress.note(&format!("dashboard: {}", self.dashboard));
            }
        }
        for note in &status.notes[self.notes..] {
            progress.note(note);
        }
        self.notes = status.notes.len();
        self.reason.clone_from(&status.reason);
        self.goodput.clone_from(&status.goodput);
        let newest = serde_json::from_str(&status.progress);
        if let Ok(TrainerEvent::Step { step, terms, images_per_s, .. }) = &newest {
            self.state.step = step.0;
            self.state.losses = terms.iter().map(|(name, value)| (name.clone(), *value)).collect();
            // The sum of them comes first.
            self.state.losses.sort_by_key(|(name, _)| name != "total");
            self.state.images_per_s = *images_per_s;
        }
        if let Ok(TrainerEvent::Validation { dice, mean_dice, .. }) =
            serde_json::from_str(&status.validation)
        {
            self.state.val_dice = Some(mean_dice);
            self.dice = dice;
            self.dice.push(("mean".to_owned(), mean_dice));
        }
        self.state.world = status.members;
        self.state.status = match status.phase.as_str() {
            "waiting for workers" => {
                Shown::Waiting { present: status.members, wanted: status.wanted }
            }
            "training" if self.state.step == 0 => Shown::Starting,
            "training" => match newest {
                Ok(TrainerEvent::Busy { doing: Doing::Validating, .. }) => Shown::Validating,
                Ok(TrainerEvent::Busy { doing: Doing::Saving, .. }) => Shown::Stopping,
                _ => Shown::Training,
            },
            "stopping" => Shown::Stopping,
            "recovering" => Shown::Recovering,
            _ => self.state.status,
        };
        progress.update(&self.state);
    }
}
