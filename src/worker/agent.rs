//! The agent's loop: select, then one small reaction.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::child::{ChildEvent, ChildOptions, TrainerChild};
use crate::kv::KvServer;
use crate::proto::wire::coordinator_client::CoordinatorClient;
use crate::proto::wire::{self, agent_message, order};
use crate::proto::{Assignment, EXIT_FAILED, EXIT_RESUMABLE, TrainerOrder};
use crate::types::{Backend, Generation, Lineage, NodeId, Rank, Step, WorldSize};

/// How often an agent gives a sign of life.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Messages that may wait for the coordinator.
const QUEUE: usize = 256;
/// Pause between two tries to reach the coordinator.
const RETRY: Duration = Duration::from_millis(200);

/// What an agent needs to know.
#[derive(Debug, Clone)]
pub struct AgentOptions {
    /// The coordinator, `HOST:PORT`.
    pub coordinator: String,
    /// Which node this agent serves.
    pub node: NodeId,
    /// The run's folder in its object store.
    pub run: String,
    /// CPU threads for the trainer.
    pub threads: u32,
    /// GPUs that the trainer could use.
    pub gpus: u32,
    /// How the trainer is started.
    pub child: ChildOptions,
    /// How long a coordinator may be out of reach before the agent gives up (75).
    pub patience: Duration,
}

/// How one connection to the coordinator ended.
enum Ended {
    /// The run is over, with this status.
    Run(i32),
    /// The connection is gone; the coordinator may come back.
    Connection,
}

/// Serves one node until the run ends; the result is the exit status.
///
/// `stop` resolves when the platform wants this node back: the whole run then checkpoints.
///
/// # Errors
/// When the agent's own listening socket cannot be opened.
pub async fn run_agent(
    options: &AgentOptions,
    stop: impl Future<Output = String>,
) -> std::io::Result<i32> {
    tokio::pin!(stop);
    // Its name may not resolve before it is there, and then no route to it is known either.
    let Some(client) = reach(options).await else { return Ok(EXIT_RESUMABLE) };
    let mut connected = Some(client);
    let interface = interface_towards(&options.coordinator).await;
    let kv = KvServer::bind(SocketAddr::new(interface, 0)).await?;
    let incarnation = format!("{}-{}", std::process::id(), crate::store::unique_id());
    let mut stopping = None;
    loop {
        let client = match connected.take() {
            Some(client) => client,
            None => match reach(options).await {
                Some(client) => client,
                None => return Ok(EXIT_RESUMABLE),
            },
        };
        let hello = wire::Hello {
            node: options.node.0,
            incarnation: incarnation.clone(),
            kv_address: kv.local_addr().to_string(),
            gpus: options.gpus,
        };
        match session(options, client, hello, interface, &mut stopping, &mut stop).await {
            Ended::Run(status) => return Ok(status),
            Ended::Connection if stopping.is_some() => return Ok(EXIT_RESUMABLE),
            Ended::Connection => tracing::warn!("lost the coordinator; looking for it"),
        }
    }
}

/// A connection to the coordinator; none if it is out of reach for too long.
async fn reach(options: &AgentOptions) -> Option<CoordinatorClient<tonic::transport::Channel>> {
    let connected = tokio::time::timeout(options.patience, connect(&options.coordinator)).await;
    if connected.is_err() {
        tracing::error!(
            "the coordinator at {} has been out of reach for {} s",
            options.coordinator,
            options.patience.as_secs()
        );
    }
    connected.ok()
}

/// Tries until the coordinator answers; the caller bounds it.
async fn connect(address: &str) -> CoordinatorClient<tonic::transport::Channel> {
    loop {
        match CoordinatorClient::connect(format!("http://{address}")).await {
            Ok(client) => return client,
            Err(error) => {
                tracing::debug!(%error, "coordinator not there yet");
                // Nothing tells when a listener appears on another host: this is the poll.
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

/// One connection: from hello to the end of the stream. The trainer does not outlive it.
async fn session(
    options: &AgentOptions,
    mut client: CoordinatorClient<tonic::transport::Channel>,
    hello: wire::Hello,
    interface: IpAddr,
    stopping: &mut Option<String>,
    stop: &mut (impl Future<Output = String> + Unpin),
) -> Ended {
    let (outbox, messages) = mpsc::channel(QUEUE);
    let say = async |kind| outbox.send(wire::AgentMessage { kind: Some(kind) }).await.is_ok();
    say(agent_message::Kind::Hello(hello)).await;
    let mut orders = match client.join(ReceiverStream::new(messages)).await {
        Ok(response) => response.into_inner(),
        Err(error) => {
            tracing::warn!(%error, "the coordinator does not take this agent");
            tokio::time::sleep(RETRY).await;
            return Ended::Connection;
        }
    };
    let mut heartbeat = tokio::time::interval(HEARTBEAT);
    let mut trainer: Option<TrainerChild> = None;
    loop {
        let alive = tokio::select! {
            order = orders.message() => match order {
                Ok(Some(wire::Order { kind: Some(kind) })) => match kind {
                    order::Kind::Finish(finish) => return Ended::Run(finish.status),
                    kind => obey(options, kind, interface, &mut trainer, &outbox).await,
                },
                Ok(Some(_)) => true,
                Ok(None) | Err(_) => return Ended::Connection,
            },
            event = next_event(&mut trainer) => {
                let (generation, rank, event) = event;
                match event {
                    // libtorch prints lines of its own to stdout; events are JSON objects.
                    ChildEvent::Line(line) if !line.starts_with('{') => {
                        tracing::info!(rank, "{line}");
                        true
                    }
                    ChildEvent::Line(event) => say(agent_message::Kind::Report(
                        wire::TrainerReport { generation, rank, event },
                    )).await,
                    ChildEvent::Exited(status, evidence) => {
                        trainer = None;
                        say(agent_message::Kind::Exit(
                            wire::TrainerExit { generation, status, evidence },
                        )).await
                    }
                }
            },
            _ = heartbeat.tick() => say(agent_message::Kind::Heartbeat(wire::Heartbeat {})).await,
            reason = &mut *stop, if stopping.is_none() => {
                *stopping = Some(reason.clone());
                say(agent_message::Kind::Stop(wire::StopRequest { reason })).await
            },
        };
        if !alive {
            return Ended::Connection;
        }
    }
}

/// The trainer's next event; never resolves while there is no trainer.
async fn next_event(trainer: &mut Option<TrainerChild>) -> (u64, u32, ChildEvent) {
    match trainer {
        Some(child) => {
            let (generation, rank) = (child.generation.0, child.rank);
            (generation, rank, child.next().await)
        }
        None => std::future::pending().await,
    }
}

/// Carries out an order; `false` when the coordinator can no longer be told.
async fn obey(
    options: &AgentOptions,
    kind: order::Kind,
    interface: IpAddr,
    trainer: &mut Option<TrainerChild>,
    outbox: &mpsc::Sender<wire::AgentMessage>,
) -> bool {
    match kind {
        order::Kind::Start(start) => {
            let generation = start.generation;
            match start_trainer(options, start, interface) {
                Ok(child) => *trainer = Some(child),
                Err(error) => {
                    let evidence = format!("could not be started: {error}");
                    let exit = wire::TrainerExit { generation, status: EXIT_FAILED, evidence };
                    let kind = Some(agent_message::Kind::Exit(exit));
                    return outbox.send(wire::AgentMessage { kind }).await.is_ok();
                }
            }
        }
        order::Kind::End(end) => match trainer {
            Some(child) if child.generation == Generation(end.generation) => child.kill(),
            _ => tracing::debug!(generation = end.generation, "no such trainer to end"),
        },
        order::Kind::CheckpointAndStop(_) => {
            if let Some(child) = trainer {
                child.order(&TrainerOrder::CheckpointAndStop).await;
            }
        }
        order::Kind::Recorded(recorded) => match trainer {
            Some(child) if child.generation == Generation(recorded.generation) => {
                let (lineage, step) = (Lineage(recorded.lineage), Step(recorded.step));
                child.order(&TrainerOrder::Recorded { lineage, step }).await;
            }
            _ => tracing::debug!(generation = recorded.generation, "no such trainer to tell"),
        },
        order::Kind::Finish(_) => {}
    }
    true
}

fn start_trainer(
    options: &AgentOptions,
    start: wire::Start,
    interface: IpAddr,
) -> std::io::Result<TrainerChild> {
    let kv_address = start.kv_address.parse().map_err(std::io::Error::other)?;
    let assignment = Assignment {
        generation: Generation(start.generation),
        epoch: start.epoch,
        rank: Rank(start.rank),
        world: WorldSize(start.world),
        backend: if start.nccl { Backend::Nccl } else { Backend::Gloo },
        kv_address,
        interface,
        run: options.run.clone(),
        threads: options.threads,
    };
    TrainerChild::spawn(&options.child, &assignment)
}

/// The address of the interface over which the coordinator is reached.
///
/// Not the host name's: Debian maps that to 127.0.1.1, where no other host can connect.
async fn interface_towards(coordinator: &str) -> IpAddr {
    let fallback = IpAddr::from([127, 0, 0, 1]);
    let Ok(socket) = tokio::net::UdpSocket::bind("0.0.0.0:0").await else { return fallback };
    match socket.connect(coordinator).await {
        Ok(()) => socket.local_addr().map_or(fallback, |address| address.ip()),
        Err(error) => {
            tracing::warn!(%error, "no route to {coordinator}; collectives use loopback");
            fallback
        }
    }
}
