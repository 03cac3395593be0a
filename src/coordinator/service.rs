//! The gRPC shell around the state machine: sockets, timers and channels, no decision.
//!
//! One task owns [`State`]. Every stream turns its messages into [`Input`]s on one bounded queue;
//! the owner applies them in order and sends the effects to the agents' bounded queues. A full
//! queue means a dead agent, which the heartbeat finds.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::{Stream, StreamExt};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, WatchStream};
use tonic::{Request, Response, Status, Streaming};

use super::board::report;
use super::board::shared::SharedBoard;
use super::chronicle::{ACCOUNT_EVERY, Chronicle};
use super::events::{Effect, Event, Limits, Progress, Running};
use super::outbound::{Agent, Outbound};
use super::records::{self, LedgerPlace, Recording, Records, Told};
use super::reports::{Said, relay};
use super::state::{Phase, State};
use super::traces::Traces;
use super::verdict::kind_of_exit;
use crate::ledger::{COMPLETION_PATH, LedgerError, RECEIPTS_MAX, complete};
use crate::proto::wire::coordinator_server::{Coordinator, CoordinatorServer};
use crate::proto::wire::{self, agent_message};
use crate::proto::{EXIT_DONE, EXIT_FAILED, EXIT_RESUMABLE};
use crate::store::Store;
use crate::telemetry::probe::{Sign, Signs};
use crate::trust::{Purpose, Trust, TrustError};
use crate::types::{Generation, NodeId, Rank, Step, WorldSize};

/// Inputs that may wait for the owner task.
const QUEUE: usize = 1024;
/// Orders that may wait for one agent.
const ORDERS: usize = 64;
/// How often time passes for the state machine.
const TICK: Duration = Duration::from_millis(250);
/// How long the service stays up after the end, so that everyone hears of it.
const LINGER: Duration = Duration::from_secs(3);
/// Bytes of a message: a trainer that starts may say all receipts that it keeps, 16 digits each.
const MESSAGE_BYTES_MAX: usize = RECEIPTS_MAX * 16 + (4 << 20);
/// Longest that the end of a run waits for the ledger: after an end in good order, and for a run that
/// has failed anyway.
const RECORDING_MAX: [Duration; 2] = [Duration::from_secs(75), Duration::from_secs(5)];

/// Longest that everybody waits for the record of the end.
const COMPLETION_MAX: Duration = Duration::from_secs(15);

/// How the run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Exit status.
    pub status: i32,
    /// Why, in one line.
    pub reason: String,
}

/// Why the service could not run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServiceError {
    /// The listening socket failed.
    #[error("the coordinator's socket failed: {0}")]
    Transport(#[from] tonic::transport::Error),
    /// The address is open to others and there is no token: the user's to mend.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// The task that owns the state ended without an outcome.
    #[error("the coordinator's task ended early")]
    Gone,
    /// The ledger could not be taken up.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

/// What reaches the owner task.
pub(super) enum Input {
    Joined {
        connection: u64,
        hello: wire::Hello,
        orders: mpsc::Sender<Result<wire::Order, Status>>,
        host: String,
    },
    Message {
        node: NodeId,
        kind: agent_message::Kind,
    },
    Left {
        connection: u64,
        node: NodeId,
    },
    Stop(String),
}

/// Serves a run to those whom `trust` lets in until it ends, leaving `signs` of life and keeping its `board`, which is to be seen at `dashboard`. `stop` ends it in good order (75) when it resolves.
///
/// # Errors
/// [`ServiceError`] if the socket fails, or the ledger is not to be had.
pub async fn serve(
    (listener, trust): (TcpListener, Trust),
    limits: Limits,
    ledger: LedgerPlace,
    (signs, board, dashboard): (Signs, SharedBoard, String),
    stop: impl Future<Output = String> + Send + 'static,
) -> Result<Outcome, ServiceError> {
    let incoming = trust.incoming(listener, Purpose::Control)?;
    let wanted = limits.max;
    let epoch = crate::store::unique_id();
    let chronicle = Chronicle::start(ledger.run.clone(), &epoch);
    let (records, recording) = records::start(ledger.clone(), &epoch).await?;
    let (inputs, queue) = mpsc::channel(QUEUE);
    let (status, watched) =
        watch::channel(wire::RunStatus { wanted, dashboard, ..Default::default() });
    let stopper = inputs.clone();
    tokio::spawn(async move {
        let reason = stop.await;
        // The owner is gone only if the run has ended: nothing is left to stop.
        drop(stopper.send(Input::Stop(reason)).await);
    });
    let silence = limits.heartbeat;
    let traces = Traces::of(tracing::Span::current());
    let outbound =
        Outbound { epoch, silence, agents: BTreeMap::new(), chronicle, status, board, traces };
    let owner = tokio::spawn(own(
        State::new(limits),
        (records, recording),
        outbound,
        queue,
        (ledger, signs),
    ));
    let (over, ended) = tokio::sync::oneshot::channel::<()>();
    let service =
        CoordinatorServer::new(Service { inputs, connections: AtomicU64::new(0), watched })
            .max_decoding_message_size(MESSAGE_BYTES_MAX);
    let server = tonic::transport::Server::builder()
        .add_service(service)
        .serve_with_incoming_shutdown(incoming, async {
            ended.await.ok();
        });
    let server = tokio::spawn(server);
    let outcome = owner.await.map_err(|_| ServiceError::Gone)?;
    over.send(()).ok();
    match tokio::time::timeout(LINGER, server).await {
        Ok(Ok(result)) => result?,
        Ok(Err(_)) | Err(_) => tracing::debug!("some streams were still open at the end"),
    }
    Ok(outcome)
}

/// A run is complete, or stopped in good order, only with its ledger. Nothing is lost where that
/// could not be finished: the checkpoint carries the rest.
async fn recorded(
    outcome: Outcome,
    (records, recording): (Records, Recording),
    [bound, bound_failed]: [Duration; 2],
) -> Outcome {
    // The task writes what it has when nobody can tell it more.
    drop(records);
    let good = matches!(outcome.status, EXIT_DONE | EXIT_RESUMABLE);
    let bound = if good { bound } else { bound_failed };
    let (status, why) = match tokio::time::timeout(bound, recording).await {
        Ok(Ok(Ok(()))) => return outcome,
        Ok(Ok(Err(error))) => (records::status_of(&error), error.to_string()),
        Ok(Err(error)) => (EXIT_FAILED, error.to_string()),
        Err(_) => (EXIT_RESUMABLE, format!("not written within {} s", bound.as_secs())),
    };
    if !good {
        return outcome;
    }
    Outcome { status, reason: format!("{}, but its ledger is not: {why}", outcome.reason) }
}

/// Says so in the bucket, for whoever hears of the end nowhere else. A warning is all that can be done otherwise: those
/// wait until their patience ends.
async fn say_if_complete(outcome: &Outcome, place: &LedgerPlace, epoch: &str) {
    if outcome.status != EXIT_DONE {
        return;
    }
    let written = complete(&place.run, place.steps, epoch);
    match tokio::time::timeout(COMPLETION_MAX, written).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "`{COMPLETION_PATH}` is not written"),
        Err(_) => tracing::warn!("`{COMPLETION_PATH}` is not written: the store does not answer"),
    }
}

/// The report says how the run ended, too. Not worth a failure, should the store not answer now.
async fn report_end(status: i32, run: &Store, board: &SharedBoard) {
    let seen = board.look(|board, now| board.document(now));
    let writing = async {
        match status {
            EXIT_DONE => report::complete(run, seen).await,
            EXIT_RESUMABLE => report::interim(run, seen).await,
            _ => Ok(()),
        }
    };
    match tokio::time::timeout(COMPLETION_MAX, writing).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "the report does not say how the run ended"),
        Err(_) => tracing::warn!("the report does not say how the run ended: the store is slow"),
    }
}

/// The one task that owns the state: input, event, apply, execute.
async fn own(
    mut state: State,
    (mut records, recording): (Records, Recording),
    mut outbound: Outbound,
    mut queue: mpsc::Receiver<Input>,
    (place, signs): (LedgerPlace, Signs),
) -> Outcome {
    let start = Instant::now();
    let mut tick = tokio::time::interval(TICK);
    let mut account = tokio::time::interval(ACCOUNT_EVERY);
    loop {
        let event = tokio::select! {
            Some(input) = queue.recv() => {
                event_of(input, &mut outbound.agents, &records, (&outbound.status, &outbound.board))
            }
            Some(told) = records.told.recv() => Some(match told {
                Told::Recorded(recorded) => Event::Recorded(recorded),
                Told::Missing(generation) => Event::ReceiptsMissing { generation },
                Told::Lost { status, reason } => Event::LedgerLost { status, reason },
            }),
            _ = account.tick() => {
                let goodput = state.goodput(start.elapsed());
                outbound.board.change(|board, _| board.account(&goodput));
                outbound.chronicle.account(&goodput);
                outbound.keep_board();
                None
            }
            _ = tick.tick() => {
                signs.give(Sign::Ready);
                outbound.board.change(|board, _| board.account(&state.settled()));
                Some(Event::Tick)
            }
        };
        let Some(event) = event else { continue };
        let last =
            matches!(&event, Event::Progressed { progress: Progress::Step { last: true, .. }, .. });
        for effect in state.apply(start.elapsed(), event) {
            // The end is told with the ledger written: a coordinator that died in between needs its workers.
            if !matches!(effect, Effect::Finish { .. }) {
                outbound.execute(effect);
            }
        }
        // Whoever was given up, and lives, sees its stream end and comes again.
        outbound.agents.retain(|node, _| state.has_or_rejects(*node));
        if let Phase::Finished { status: code, reason } = state.phase() {
            let outcome = Outcome { status: *code, reason: reason.clone() };
            let outcome = recorded(outcome, (records, recording), RECORDING_MAX).await;
            say_if_complete(&outcome, &place, &outbound.epoch).await;
            let Outcome { status: code, reason } = outcome.clone();
            outbound.execute(Effect::Finish { status: code, reason });
            let goodput = state.goodput(start.elapsed());
            outbound.chronicle.account(&goodput);
            outbound.publish(&state, start.elapsed(), Some((&outcome, &goodput)));
            outbound.keep_board();
            report_end(outcome.status, &place.run, &outbound.board).await;
            outbound.chronicle.end().await;
            return outcome;
        }
        outbound.publish(&state, start.elapsed(), None);
        if last {
            // The report, which comes next, has it too.
            let goodput = state.goodput(start.elapsed());
            outbound.board.change(|board, _| board.account(&goodput));
            outbound.keep_board();
        }
    }
}

/// What an input means to the state machine; nothing, if it is about a connection that another has replaced.
pub(super) fn event_of(
    input: Input,
    agents: &mut BTreeMap<NodeId, Agent>,
    records: &Records,
    shown: (&watch::Sender<wire::RunStatus>, &SharedBoard),
) -> Option<Event> {
    match input {
        Input::Joined { connection, hello, orders, host } => {
            let node = NodeId(hello.node);
            let incarnation = hello.incarnation.clone();
            agents.insert(node, Agent { connection, incarnation, host, orders, last_words: None });
            Some(joined(hello))
        }
        Input::Left { connection, node } => {
            let agent = agents.get(&node).filter(|agent| agent.connection == connection)?;
            Some(Event::Left { node, incarnation: agent.incarnation.clone() })
        }
        Input::Stop(reason) => Some(Event::StopRequested { reason }),
        Input::Message { node, kind } => match kind {
            agent_message::Kind::Hello(_) | agent_message::Kind::Heartbeat(_) => {
                Some(Event::Heard { node })
            }
            agent_message::Kind::Stop(stop) => {
                Some(Event::NodeWanted { node, reason: stop.reason })
            }
            agent_message::Kind::Exit(exit) => {
                let words = agents.get_mut(&node).and_then(|agent| agent.last_words.take());
                let evidence = match words {
                    Some(text) => format!("failed: {text}"),
                    None => exit.evidence,
                };
                let generation = Generation(exit.generation);
                let kind = kind_of_exit(exit.status, exit.frozen, exit.out_of_memory);
                let (status, doing) = (exit.status, exit.doing);
                Some(Event::TrainerExited { node, generation, status, evidence, kind, doing })
            }
            agent_message::Kind::Report(report) => {
                let said = relay(&report, node, records, shown);
                let agent = agents.get_mut(&node);
                Some(reported(node, Generation(report.generation), said, agent))
            }
        },
    }
}

fn joined(hello: wire::Hello) -> Event {
    let running = hello.running.map(|running| Running {
        generation: Generation(running.generation),
        rank: Rank(running.rank),
        world: WorldSize(running.world),
        stranded: running.stranded,
        done: running.has_state.then_some(Step(running.step)),
    });
    Event::Joined {
        node: NodeId(hello.node),
        incarnation: hello.incarnation,
        kv_address: hello.kv_address,
        gpus: hello.gpus,
        running,
    }
}

/// What a trainer's report means; what it says of its own failure is kept for when its process ends.
fn reported(node: NodeId, generation: Generation, said: Said, agent: Option<&mut Agent>) -> Event {
    match said {
        Said::TooMuch => Event::LedgerLost {
            status: EXIT_FAILED,
            reason: "more receipts wait for the ledger than there is room for".to_owned(),
        },
        Said::Nothing => Event::Heard { node },
        Said::Arrived(milestone) => Event::Arrived { node, generation, milestone },
        Said::Standby => {
            // Another process: what the one before said is not about it.
            if let Some(agent) = agent {
                agent.last_words = None;
            }
            Event::TrainerStandby { node }
        }
        Said::Stranded { generation, done, evidence } => {
            Event::TrainerStranded { node, generation, done, evidence }
        }
        Said::Completed { generation } => Event::Completed { node, generation },
        Said::Progress(progress) => Event::Progressed { node, generation, progress },
        Said::LastWords { text, status, curable } => {
            if let Some(agent) = agent {
                agent.last_words = Some(text.clone());
            }
            Event::TrainerFailed { node, generation, evidence: text, status, curable }
        }
    }
}

/// The gRPC handlers: they translate, nothing else.
struct Service {
    inputs: mpsc::Sender<Input>,
    /// Connections so far.
    connections: AtomicU64,
    watched: watch::Receiver<wire::RunStatus>,
}

type Boxed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Coordinator for Service {
    type JoinStream = Boxed<wire::Order>;
    type WatchStream = Boxed<wire::RunStatus>;

    async fn join(
        &self,
        request: Request<Streaming<wire::AgentMessage>>,
    ) -> Result<Response<Self::JoinStream>, Status> {
        let host = request.local_addr().map(|a: SocketAddr| a.ip().to_string()).unwrap_or_default();
        let mut messages = request.into_inner();
        let first = messages.message().await?.and_then(|message| message.kind);
        let Some(agent_message::Kind::Hello(hello)) = first else {
            return Err(Status::invalid_argument("the first message must be a hello"));
        };
        let (orders, queue) = mpsc::channel(ORDERS);
        let node = NodeId(hello.node);
        let connection = self.connections.fetch_add(1, Ordering::Relaxed);
        let gone = |_| Status::unavailable("the run has ended");
        self.inputs.send(Input::Joined { connection, hello, orders, host }).await.map_err(gone)?;
        let inputs = self.inputs.clone();
        tokio::spawn(async move {
            while let Ok(Some(message)) = messages.message().await {
                let Some(kind) = message.kind else { continue };
                if inputs.send(Input::Message { node, kind }).await.is_err() {
                    return;
                }
            }
            // The owner is gone only when the run has ended; then nobody needs to know.
            inputs.send(Input::Left { connection, node }).await.ok();
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(queue))))
    }

    async fn watch(
        &self,
        _: Request<wire::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let stream = WatchStream::new(self.watched.clone()).map(Ok);
        Ok(Response::new(Box::pin(stream)))
    }

    async fn stop(
        &self,
        request: Request<wire::StopRequest>,
    ) -> Result<Response<wire::StopReply>, Status> {
        let reason = request.into_inner().reason;
        let gone = |_| Status::unavailable("the run has ended");
        self.inputs.send(Input::Stop(reason)).await.map_err(gone)?;
        Ok(Response::new(wire::StopReply {}))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coordinator::board::{Board, Facts};
    use crate::store::StoreOptions;

    /// What becomes of an end of `status` if the ledger's task ends like `recording`.
    async fn ends(
        status: i32,
        recording: impl Future<Output = Result<(), LedgerError>> + Send + 'static,
    ) -> Outcome {
        let run = Store::open("memory:///", &StoreOptions::default()).unwrap();
        let place = LedgerPlace { run, checkpoint_every: 1, steps: Step(1) };
        let (records, _task) = records::start(place, "epoch").await.unwrap();
        let outcome = Outcome { status, reason: "over".to_owned() };
        let bounds = [Duration::from_millis(50); 2];
        recorded(outcome, (records, tokio::spawn(recording)), bounds).await
    }

    /// An agent may have another connection before the end of the one before is noticed.
    #[tokio::test]
    async fn a_connection_that_was_replaced_takes_nobody_along() {
        let run = Store::open("memory:///", &StoreOptions::default()).unwrap();
        let place = LedgerPlace { run, checkpoint_every: 1, steps: Step(1) };
        let (records, _task) = records::start(place, "epoch").await.unwrap();
        let (status, _watched) = watch::channel(wire::RunStatus::default());
        let board = SharedBoard::new(Board::new(Facts::default(), None, 0.0));
        let mut agents = BTreeMap::new();
        for connection in [1, 2] {
            let hello = wire::Hello { incarnation: "a".to_owned(), ..Default::default() };
            let (orders, _queue) = mpsc::channel(1);
            let input = Input::Joined { connection, hello, orders, host: String::new() };
            assert!(event_of(input, &mut agents, &records, (&status, &board)).is_some());
        }
        let mut left = |connection| {
            event_of(
                Input::Left { connection, node: NodeId(0) },
                &mut agents,
                &records,
                (&status, &board),
            )
        };
        assert_eq!(left(1), None);
        assert!(matches!(left(2), Some(Event::Left { node: NodeId(0), .. })));
    }

    #[tokio::test]
    async fn a_run_is_complete_only_with_its_ledger_and_waits_for_it_within_a_bound() {
        let damaged = || LedgerError::Invalid("full".to_owned());
        assert_eq!(ends(EXIT_DONE, async { Ok(()) }).await.status, EXIT_DONE);
        let failed = ends(EXIT_DONE, async move { Err(damaged()) }).await;
        assert_eq!(failed.status, EXIT_FAILED);
        assert!(failed.reason.starts_with("over, but its ledger is not: "), "{}", failed.reason);
        // What is not written is carried by the checkpoint: the same command goes on.
        let hung = ends(EXIT_DONE, std::future::pending()).await;
        assert_eq!(hung.status, EXIT_RESUMABLE);
        assert!(hung.reason.contains("not written within"), "{}", hung.reason);
        assert_eq!(ends(EXIT_FAILED, std::future::pending()).await.reason, "over");
    }
}
