//! The agent's loop: select, then one small reaction.
//!
//! The trainer outlives generations, and the connection to the coordinator too: while no coordinator is
//! there it goes on stepping, and the next one is told of it.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tracing::Span;

use super::child::{ChildEvent, ChildOptions, TrainerChild};
use super::completion::nothing_left;
use super::logs::LogShip;
use super::reach::{Client, connect, given_up, interface_towards, never_reached, reconnect};
use crate::config::Recovery;
use crate::kv::KvServer;
use crate::proto::wire::{self, agent_message, order};
use crate::proto::{Assignment, EXIT_FAILED, EXIT_RESUMABLE, Membership, TrainerOrder};
use crate::telemetry::probe::{Sign, Signs};
use crate::telemetry::{continues, traceparent_of};
use crate::trust::{Trust, TrustError};
use crate::types::{Backend, Generation, Lineage, NodeId, Rank, Step, WorldSize};

/// How often an agent gives a sign of life.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// How often it looks for its trainer's.
const WATCH: Duration = Duration::from_millis(250);
/// Messages that may wait for the coordinator.
const QUEUE: usize = 256;
/// What is said of a trainer that gave no sign of life.
const HUNG: &str = "hung, and its agent killed it";
/// Pause after a coordinator that did not take this agent.
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
    /// How long a coordinator may be out of reach before the agent gives up (75). A trainer that goes on stepping
    /// is not given up.
    pub patience: Duration,
    /// For probes.
    pub signs: Signs,
    /// What is shown to the coordinator and to other nodes, and asked of them.
    pub trust: Trust,
}

/// Why an agent could not serve.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// The coordinator and this agent do not hold the same token: somebody has to mend it.
    #[error("the coordinator: {0}")]
    Trust(#[from] TrustError),
    /// The agent's own listening socket cannot be opened.
    #[error("the agent's key-value service cannot listen: {0}")]
    Listen(#[from] std::io::Error),
}

/// How one connection to the coordinator ended.
enum Ended {
    /// The run is over, with this status.
    Run(i32),
    /// The connection is gone; the coordinator may come back.
    Connection,
    /// It did not take this agent.
    Refused,
}

/// Serves one node until the run ends; the result is the exit status.
///
/// `stop` resolves when the platform wants this node back: the whole run then checkpoints.
///
/// # Errors
/// [`AgentError`].
pub async fn run_agent(
    options: &AgentOptions,
    stop: impl Future<Output = String>,
) -> Result<i32, AgentError> {
    tokio::pin!(stop);
    // Its name may not resolve before it is there, and then no route to it is known either.
    let (connecting, patience) = (connect(options), tokio::time::sleep(options.patience));
    let mut alive = tokio::time::interval(HEARTBEAT);
    tokio::pin!(connecting, patience);
    let client = loop {
        tokio::select! {
            client = &mut connecting => break client?,
            () = &mut patience => return Ok(never_reached(options).await),
            _ = &mut stop => return Ok(EXIT_RESUMABLE),
            _ = alive.tick() => options.signs.give(Sign::Alive),
        }
    };
    let interface = interface_towards(&options.coordinator).await;
    let kv = KvServer::bind(SocketAddr::new(interface, 0), &options.trust).await?;
    let incarnation = format!("{}-{}", std::process::id(), crate::store::unique_id());
    let mut agent = Agent {
        options,
        incarnation,
        interface,
        kv,
        trainer: None,
        met: None,
        stopping: None,
        silence: Recovery::default().silence(),
        taken: None,
        began: Instant::now(),
        span: Span::none(),
    };
    let ship = LogShip::start(options, &agent.incarnation);
    let status = agent.live(client, &mut stop).await;
    drop(agent); // and its trainer with it, whatever becomes of the log
    if let Some(ship) = ship {
        ship.end().await;
    }
    Ok(status)
}

/// One node's agent.
struct Agent<'a> {
    options: &'a AgentOptions,
    incarnation: String,
    interface: IpAddr,
    kv: KvServer,
    trainer: Option<TrainerChild>,
    /// The generation whose keys this agent may be keeping.
    met: Option<(String, Generation)>,
    /// Why this node is to be given back.
    stopping: Option<String>,
    /// How long a trainer may be without its pulse, by its coordinator's word: then it is frozen, and killed.
    silence: Duration,
    /// When a coordinator last had this agent.
    taken: Option<Instant>,
    began: Instant,
    /// Its life, in the run's trace.
    span: Span,
}

/// The agent's way to say something; `false` when nobody listens any more.
#[derive(Clone)]
struct Outbox(mpsc::Sender<wire::AgentMessage>);

impl Outbox {
    async fn say(&self, kind: agent_message::Kind) -> bool {
        self.0.send(wire::AgentMessage { kind: Some(kind) }).await.is_ok()
    }
}

impl Agent<'_> {
    /// From one connection to the next; the result is the exit status.
    async fn live(
        &mut self,
        client: Client,
        stop: &mut (impl Future<Output = String> + Unpin),
    ) -> i32 {
        let mut client = Some(client);
        loop {
            let connected = match client.take() {
                Some(client) => client,
                None => match self.reach(stop).await {
                    Ok(client) => client,
                    Err(status) => return status,
                },
            };
            match self.session(connected, stop).await {
                Ended::Run(status) => return status,
                Ended::Connection => tracing::warn!("lost the coordinator; looking for it"),
                Ended::Refused => tokio::time::sleep(RETRY).await,
            }
        }
    }

    /// Looks for the coordinator, while the trainer goes on; else an exit status.
    async fn reach(
        &mut self,
        stop: &mut (impl Future<Output = String> + Unpin),
    ) -> Result<Client, i32> {
        // A coordinator that is there and takes nobody in is as good as none.
        let mut deadline = self.taken.unwrap_or(self.began) + self.options.patience;
        let (connecting, over) = (reconnect(self.options), nothing_left(&self.options.run));
        tokio::pin!(connecting, over);
        let mut watch = tokio::time::interval(WATCH);
        loop {
            tokio::select! {
                biased;
                client = &mut connecting => return Ok(client),
                // A trainer that goes on regardless was cut off, and has been replaced.
                status = &mut over => return Err(status),
                event = next_event(&mut self.trainer) => match event {
                    ChildEvent::Line { stepped: true, .. } => {
                        deadline = Instant::now() + self.options.patience;
                    }
                    ChildEvent::Line { .. } | ChildEvent::Alive => {}
                    ChildEvent::Noise(line) => tracing::info!("{line}"),
                    ChildEvent::Exited(status, evidence) => {
                        tracing::warn!(status, "the trainer {evidence}");
                        self.trainer = None;
                        if self.stopping.is_some() {
                            return Err(EXIT_RESUMABLE);
                        }
                    }
                },
                _ = watch.tick() => {
                    self.options.signs.give(Sign::Alive);
                    self.watch_trainer();
                }
                reason = &mut *stop, if self.stopping.is_none() => {
                    self.stopping = Some(reason);
                    match &mut self.trainer {
                        // All ranks stop with it, after a checkpoint.
                        Some(child) => child.order(&TrainerOrder::CheckpointAndStop).await,
                        None => return Err(EXIT_RESUMABLE),
                    }
                },
                () = tokio::time::sleep_until(deadline) => return Err(match self.taken {
                    Some(_) => given_up(self.options),
                    None => never_reached(self.options).await,
                }),
            }
        }
    }

    fn hello(&self) -> wire::Hello {
        let running = self.trainer.as_ref().filter(|child| child.is_sound()).and_then(|child| {
            let place = child.place.as_ref()?;
            Some(wire::Running {
                generation: place.generation.0,
                rank: place.rank.0,
                world: place.world.0,
                stranded: child.stranded,
                step: child.done.unwrap_or_default().0,
                has_state: child.done.is_some(),
            })
        });
        wire::Hello {
            node: self.options.node.0,
            incarnation: self.incarnation.clone(),
            kv_address: self.kv.local_addr().to_string(),
            gpus: self.options.gpus,
            running,
        }
    }

    /// One connection: from hello to the end of the stream.
    async fn session(
        &mut self,
        mut client: Client,
        stop: &mut (impl Future<Output = String> + Unpin),
    ) -> Ended {
        let (sender, messages) = mpsc::channel(QUEUE);
        let outbox = Outbox(sender);
        outbox.say(agent_message::Kind::Hello(self.hello())).await;
        if let Some(reason) = self.stopping.clone() {
            outbox.say(agent_message::Kind::Stop(wire::StopRequest { reason })).await;
        }
        let mut orders = match client.join(ReceiverStream::new(messages)).await {
            Ok(response) => response.into_inner(),
            Err(error) => {
                tracing::warn!(%error, "the coordinator does not take this agent; has it the same token, or none?");
                return Ended::Refused;
            }
        };
        let ended = self.serve(&mut orders, &outbox, stop).await;
        self.taken = Some(Instant::now());
        ended
    }

    /// The loop of a connection.
    async fn serve(
        &mut self,
        orders: &mut tonic::Streaming<wire::Order>,
        outbox: &Outbox,
        stop: &mut (impl Future<Output = String> + Unpin),
    ) -> Ended {
        let mut heartbeat = tokio::time::interval(HEARTBEAT);
        let mut watch = tokio::time::interval(WATCH);
        loop {
            let alive = tokio::select! {
                // What the trainer has said is heard before its silence is judged.
                biased;
                event = next_event(&mut self.trainer) => self.relay(event, outbox).await,
                order = orders.message() => match order {
                    Ok(Some(wire::Order { kind: Some(kind) })) => match kind {
                        order::Kind::Finish(finish) => return Ended::Run(finish.status),
                        kind => self.obey(kind, outbox).await,
                    },
                    Ok(Some(_)) => true,
                    Ok(None) | Err(_) => return Ended::Connection,
                },
                reason = &mut *stop, if self.stopping.is_none() => {
                    self.stopping = Some(reason.clone());
                    outbox.say(agent_message::Kind::Stop(wire::StopRequest { reason })).await
                },
                _ = heartbeat.tick() => {
                    self.options.signs.give(Sign::Ready);
                    outbox.say(agent_message::Kind::Heartbeat(wire::Heartbeat {})).await
                }
                _ = watch.tick() => {
                    self.watch_trainer();
                    true
                }
            };
            if !alive {
                return Ended::Connection;
            }
        }
    }

    /// Kills a trainer whose pulse has stopped.
    fn watch_trainer(&mut self) {
        let silence = self.silence;
        if let Some(child) = &mut self.trainer
            && !child.killed
            && child.is_silent(silence)
        {
            tracing::warn!("the trainer has no pulse for {} s: killing it", silence.as_secs());
            child.kill();
        }
    }

    /// Tells the coordinator what the trainer did; `false` when it can no longer be told.
    async fn relay(&mut self, event: ChildEvent, outbox: &Outbox) -> bool {
        let about = self.trainer.as_ref().map(|child| child.subject(&event)).unwrap_or_default();
        let (generation, rank) = (about.generation.0, about.rank.0);
        match event {
            ChildEvent::Alive => true,
            ChildEvent::Noise(line) => {
                tracing::info!(rank, "{line}");
                true
            }
            ChildEvent::Line { line: event, .. } => {
                let report = wire::TrainerReport { generation, rank, event };
                outbox.say(agent_message::Kind::Report(report)).await
            }
            ChildEvent::Exited(status, evidence) => {
                let child = self.trainer.take();
                let frozen = child.as_ref().is_some_and(|child| child.killed);
                let evidence = if frozen { HUNG.to_owned() } else { evidence };
                let out_of_memory = child.as_ref().is_some_and(TrainerChild::memory_ran_out);
                let doing = child.map(|child| child.doing().to_owned()).unwrap_or_default();
                let exit = wire::TrainerExit {
                    generation,
                    status,
                    evidence,
                    frozen,
                    out_of_memory,
                    doing,
                };
                outbox.say(agent_message::Kind::Exit(exit)).await
            }
        }
    }

    /// Carries out an order; `false` when the coordinator can no longer be told.
    async fn obey(&mut self, kind: order::Kind, outbox: &Outbox) -> bool {
        match kind {
            order::Kind::Start(start) => {
                self.silence = Duration::from_millis(start.silence_ms);
                let generation = start.generation;
                if let Err(error) = self.start(start).await {
                    return self.not_started(generation, &error, outbox).await;
                }
            }
            order::Kind::Prepare(prepare) => {
                self.silence = Duration::from_millis(prepare.silence_ms);
                self.belong(&prepare.run_traceparent);
                if let Err(error) = self.have_trainer(backend(prepare.nccl)) {
                    return self.not_started(0, &error, outbox).await;
                }
            }
            order::Kind::Leave(leave) => {
                let generation = Generation(leave.generation);
                self.forget(None);
                if let Some(child) = &mut self.trainer {
                    child.order(&TrainerOrder::Leave { generation }).await;
                }
            }
            order::Kind::End(end) => match self.child_of(end.generation) {
                Some(child) => child.kill(),
                None => tracing::debug!(generation = end.generation, "no such trainer to end"),
            },
            order::Kind::CheckpointAndStop(_) => {
                if let Some(child) = &mut self.trainer {
                    child.order(&TrainerOrder::CheckpointAndStop).await;
                }
            }
            order::Kind::Recorded(recorded) => {
                if let Some(child) = self.child_of(recorded.generation) {
                    let (lineage, step) = (Lineage(recorded.lineage), Step(recorded.step));
                    child.order(&TrainerOrder::Recorded { lineage, step }).await;
                }
            }
            order::Kind::Attest(attest) => {
                if let Some(child) = self.child_of(attest.generation) {
                    child.order(&TrainerOrder::Attest).await;
                }
            }
            order::Kind::Finish(_) => {}
        }
        true
    }

    /// This agent's life is part of the run's trace, from the first order on.
    fn belong(&mut self, run: &str) {
        if self.span.is_none() && !run.is_empty() {
            let span = tracing::info_span!(parent: None, "agent", cpcr.node = i64::from(self.options.node.0));
            self.span = continues(span, Some(run));
        }
    }

    fn child_of(&mut self, generation: u64) -> Option<&mut TrainerChild> {
        self.trainer.as_mut().filter(|child| child.generation() == Some(Generation(generation)))
    }

    async fn not_started(&self, generation: u64, error: &std::io::Error, outbox: &Outbox) -> bool {
        let evidence = format!("could not be started: {error}");
        let exit = wire::TrainerExit {
            generation,
            status: EXIT_FAILED,
            evidence,
            ..wire::TrainerExit::default()
        };
        outbox.say(agent_message::Kind::Exit(exit)).await
    }

    /// Has the trainer join a generation: the one that is there, else a new one.
    async fn start(&mut self, start: wire::Start) -> std::io::Result<()> {
        let membership = Membership {
            generation: Generation(start.generation),
            epoch: start.epoch,
            rank: Rank(start.rank),
            world: WorldSize(start.world),
            kv_address: start.kv_address.parse().map_err(std::io::Error::other)?,
            traceparent: Some(start.traceparent).filter(|context| !context.is_empty()),
        };
        self.belong(&start.run_traceparent);
        self.forget(Some((membership.epoch.clone(), membership.generation)));
        self.have_trainer(backend(start.nccl))?;
        if let Some(child) = &mut self.trainer {
            child.join(membership).await;
        }
        Ok(())
    }

    /// Whoever still waits under the keys of the generation before learns that it is over.
    fn forget(&mut self, next: Option<(String, Generation)>) {
        if let Some((epoch, generation)) = std::mem::replace(&mut self.met, next) {
            self.kv.forget(&Membership::key_prefix(&epoch, generation));
        }
    }

    /// A trainer on `backend`, started if need be.
    fn have_trainer(&mut self, backend: Backend) -> std::io::Result<()> {
        if self.trainer.as_ref().is_some_and(|child| child.backend == backend && child.is_sound()) {
            return Ok(());
        }
        // One that is ending, or of the other kind, goes first; dropping it kills it.
        self.trainer = None;
        let assignment = Assignment {
            backend,
            interface: self.interface,
            run: self.options.run.clone(),
            threads: self.options.threads,
        };
        let traceparent = traceparent_of(&self.span);
        let child = TrainerChild::spawn(
            &self.options.child,
            self.options.node,
            &assignment,
            traceparent.as_deref(),
        )?;
        self.trainer = Some(child);
        Ok(())
    }
}

fn backend(nccl: bool) -> Backend {
    if nccl { Backend::Nccl } else { Backend::Gloo }
}

/// The trainer's next event; never resolves while there is no trainer.
async fn next_event(trainer: &mut Option<TrainerChild>) -> ChildEvent {
    match trainer {
        Some(child) => child.next().await,
        None => std::future::pending().await,
    }
}
