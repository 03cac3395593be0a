//! Messages of agents as bytes, through everything that a coordinator does with them, without sockets and clock: for fuzzing.

use std::collections::BTreeMap;
use std::time::Duration;

use prost::Message;
use tokio::sync::{mpsc, watch};

use super::board::shared::SharedBoard;
use super::board::{Board, Facts, prometheus_text};
use super::events::Limits;
use super::records::{self, LedgerPlace};
use super::service::{Input, event_of};
use super::state::State;
use crate::proto::wire::{self, agent_message};
use crate::store::{Store, StoreOptions};
use crate::types::{NodeId, Step};

/// Takes length-delimited messages to a coordinator with `limits`, each from the node that said hello last.
pub async fn hear(limits: Limits, mut messages: &[u8]) {
    let Ok(run) = Store::open("memory:///", &StoreOptions::default()) else {
        unreachable!("a store in memory");
    };
    let place = LedgerPlace { run, checkpoint_every: 10, steps: Step(100) };
    let Ok((records, _task)) = records::start(place, "epoch").await else {
        unreachable!("its ledger");
    };
    let mut state = State::new(limits);
    let (status, _watched) = watch::channel(wire::RunStatus::default());
    let board = SharedBoard::new(Board::new(Facts::default(), None, 0.0));
    let mut agents = BTreeMap::new();
    let (mut node, mut connection) = (NodeId(0), 0);
    let mut now = Duration::ZERO;
    while !messages.is_empty() {
        let Ok(message) = wire::AgentMessage::decode_length_delimited(&mut messages) else {
            return;
        };
        let Some(kind) = message.kind else { continue };
        let input = match kind {
            agent_message::Kind::Hello(hello) => {
                (node, connection) = (NodeId(hello.node), connection + 1);
                let (orders, _queue) = mpsc::channel(1);
                Input::Joined { connection, hello, orders, host: String::new() }
            }
            kind => Input::Message { node, kind },
        };
        now += Duration::from_millis(100);
        if let Some(event) = event_of(input, &mut agents, &records, (&status, &board)) {
            let _effects = state.apply(now, event);
            board.change(|board, now_unix| {
                board.see(now_unix, &state, now);
                drop((board.document(now_unix), prometheus_text(board, now_unix)));
            });
        }
    }
}
