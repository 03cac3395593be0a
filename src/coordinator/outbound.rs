//! What the state machine wants, on its way out: orders to agents, lines for watchers, records. No decision.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tonic::Status;

use super::board::shared::SharedBoard;
use super::chronicle::Chronicle;
use super::events::{Effect, Now};
use super::reports::note;
use super::service::Outcome;
use super::state::{Phase, State};
use super::traces::Traces;
use super::verdict::Goodput;
use crate::page;
use crate::proto::EXIT_RESUMABLE;
use crate::proto::wire::{self, order};
use crate::types::{Backend, NodeId};

/// The owner's side of one agent's stream.
pub(super) struct Agent {
    pub(super) connection: u64,
    pub(super) incarnation: String,
    pub(super) host: String,
    pub(super) orders: mpsc::Sender<Result<wire::Order, Status>>,
    /// What its trainer has said of its own failure: its process ends soon.
    pub(super) last_words: Option<String>,
}

/// Where effects go.
pub(super) struct Outbound {
    /// Of this coordinator.
    pub(super) epoch: String,
    /// How long a trainer may be without a pulse.
    pub(super) silence: Duration,
    pub(super) agents: BTreeMap<NodeId, Agent>,
    pub(super) chronicle: Chronicle,
    pub(super) status: watch::Sender<wire::RunStatus>,
    pub(super) board: SharedBoard,
    pub(super) traces: Traces,
}

impl Outbound {
    /// Carries out what the state machine wants.
    pub(super) fn execute(&mut self, effect: Effect) {
        let silence_ms = u64::try_from(self.silence.as_millis()).unwrap_or(u64::MAX);
        let agents = &self.agents;
        let send = |node: NodeId, kind: order::Kind| {
            if let Some(agent) = agents.get(&node)
                && agent.orders.try_send(Ok(wire::Order { kind: Some(kind) })).is_err()
            {
                tracing::warn!(%node, "an order could not be delivered; the heartbeat will tell");
            }
        };
        match effect {
            Effect::Start { node, generation, rank, world, kv_address, backend } => {
                let host = agents.get(&node).map(|agent| agent.host.clone()).unwrap_or_default();
                tracing::info!(%node, %generation, %rank, %world, %backend, "start trainer");
                self.board.change(|board, now| board.ordered(now, generation, world.0));
                let traceparent = self.traces.generation(generation, world.0);
                let start = wire::Start {
                    generation: generation.0,
                    rank: rank.0,
                    world: world.0,
                    kv_address,
                    host,
                    epoch: self.epoch.clone(),
                    nccl: backend == Backend::Nccl,
                    silence_ms,
                    traceparent,
                    run_traceparent: self.traces.run(),
                };
                send(node, order::Kind::Start(start));
            }
            Effect::Prepare { node, backend } => {
                let nccl = backend == Backend::Nccl;
                send(
                    node,
                    order::Kind::Prepare(wire::Prepare {
                        nccl,
                        silence_ms,
                        run_traceparent: self.traces.run(),
                    }),
                );
            }
            Effect::Finish { status: code, reason } => {
                for node in agents.keys() {
                    let finish = wire::Finish { status: code, reason: reason.clone() };
                    send(*node, order::Kind::Finish(finish));
                }
            }
            Effect::Note(text) => self.note(text),
            Effect::Verdict(verdict) => {
                self.traces.recovered(&verdict);
                self.board.change(|board, now| board.verdict(now, &verdict));
                self.chronicle.verdict(&verdict);
                self.keep_board();
            }
            order => {
                if let Some((node, kind)) = plain(order) {
                    send(node, kind);
                }
            }
        }
    }

    /// A line for the user.
    pub(super) fn note(&self, text: String) {
        self.board.change(|board, now| board.note(now, &text));
        note(&self.status, text);
    }

    /// Writes down what the board shows, for a coordinator after this one and for the report.
    pub(super) fn keep_board(&self) {
        let document = self.board.look(|board, now| board.document(now));
        self.chronicle.document(page::SEEN_PATH, &document);
    }

    /// Puts the state where watchers see it; at the end, how the run ended.
    pub(super) fn publish(&mut self, state: &State, clock: Now, end: Option<(&Outcome, &Goodput)>) {
        if !matches!(state.phase(), Phase::Training { .. } | Phase::Adopting { .. }) {
            self.traces.ended();
        }
        self.board.change(|board, now| {
            board.see(now, state, clock);
            if let Some((Outcome { status, reason }, goodput)) = end {
                board.account(goodput);
                board.ended(now, *status, reason);
            }
        });
        self.status.send_if_modified(|s| {
            let before = s.clone();
            s.members = state.members();
            s.generation = state.generation().0;
            match state.phase() {
                Phase::Gathering { recovering: None, .. } => {
                    s.phase = "waiting for workers".to_owned();
                }
                Phase::Gathering { .. } | Phase::Adopting { .. } => {
                    s.phase = "recovering".to_owned()
                }
                Phase::Training { stopping: None, .. } => s.phase = "training".to_owned(),
                Phase::Training { .. } => s.phase = "stopping".to_owned(),
                Phase::Finished { .. } => s.phase = "finished".to_owned(),
            }
            if let Some((Outcome { status, reason }, goodput)) = end {
                s.goodput = serde_json::to_string(goodput).unwrap_or_default();
                s.finished = true;
                s.status = *status;
                s.reason.clone_from(reason);
            }
            *s != before
        });
    }
}

/// The order that an effect is, if it is one that says no more than the effect does.
fn plain(effect: Effect) -> Option<(NodeId, order::Kind)> {
    Some(match effect {
        Effect::Leave { node, generation } => {
            (node, order::Kind::Leave(wire::Leave { generation: generation.0 }))
        }
        Effect::Attest { node, generation } => {
            (node, order::Kind::Attest(wire::Attest { generation: generation.0 }))
        }
        Effect::End { node, generation, reason } => {
            (node, order::Kind::End(wire::End { generation: generation.0, reason }))
        }
        Effect::CheckpointAndStop { node, generation } => {
            let checkpoint = wire::Checkpoint { generation: generation.0 };
            (node, order::Kind::CheckpointAndStop(checkpoint))
        }
        Effect::Recorded { node, recorded } => {
            let recorded = wire::Recorded {
                generation: recorded.generation.0,
                lineage: recorded.lineage.0,
                step: recorded.step.0,
            };
            (node, order::Kind::Recorded(recorded))
        }
        Effect::Release { node, reason } => {
            (node, order::Kind::Finish(wire::Finish { status: EXIT_RESUMABLE, reason }))
        }
        Effect::Start { .. }
        | Effect::Prepare { .. }
        | Effect::Finish { .. }
        | Effect::Note(_)
        | Effect::Verdict(_) => return None,
    })
}
