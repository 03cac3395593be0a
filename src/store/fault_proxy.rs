//! An HTTP proxy in front of an S3 server that does to requests what a network does, on purpose.
//!
//! For tests and for `cpcr bench data`: what [`FaultyStore`](super::FaultyStore) is for commit protocols, this is for
//! everything between the engine and the server: status codes, broken connections, wrong bytes, silence. Heads pass
//! unchanged, so that signatures verify behind it; connections are kept alive and bodies stream, so that healthy requests
//! cost little. What it is not: a proxy for anybody else (no TLS, no CONNECT, loopback only).

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use super::fault_plan::{Asked, FaultPlan, InjectedFault};
use super::fault_wire::{Framing, Head, Link, Wire};

/// Connections at once; more wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 1024;
/// A stall ends when the client leaves, and at the latest after this.
const STALL_S_MAX: Duration = Duration::from_secs(600);
/// Between two bytes of a trickle.
const TRICKLE_PAUSE: Duration = Duration::from_millis(50);

/// What a proxy has done since its plan was set.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InjectedCounts {
    /// Requests that came.
    pub requests: u64,
    /// Faults that were injected, by kind. Planned ones that did not fit their request are not in here.
    pub faults: BTreeMap<InjectedFault, u64>,
}

impl InjectedCounts {
    /// How often `fault` was injected.
    #[must_use]
    pub fn of(&self, fault: InjectedFault) -> u64 {
        self.faults.get(&fault).copied().unwrap_or(0)
    }

    /// Faults of all kinds.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.faults.values().sum()
    }
}

/// A running proxy. Dropping it cuts all its connections.
#[derive(Debug)]
pub struct FaultProxy {
    addr: SocketAddr,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    upstream: SocketAddr,
    state: Mutex<State>,
    /// How many are open.
    connections: watch::Sender<usize>,
}

#[derive(Debug)]
struct State {
    plan: FaultPlan,
    link: Option<Arc<Link>>,
    next: u64,
    counts: InjectedCounts,
}

impl State {
    fn new(plan: FaultPlan) -> Self {
        let link = plan.link_bytes_per_s.map(|bytes_per_s| Arc::new(Link::new(bytes_per_s)));
        Self { plan, link, next: 0, counts: InjectedCounts::default() }
    }
}

/// What is planned for a request, and the random bits that go with it.
struct Fate {
    fault: Option<InjectedFault>,
    bits: u64,
    retry_after_s: Option<u32>,
}

/// Whether the connection can carry another request.
#[derive(PartialEq)]
enum After {
    Goes,
    Closes,
}

impl FaultProxy {
    /// Starts a proxy on a free loopback port, on the current tokio runtime, in front of `upstream`.
    pub async fn start(upstream: SocketAddr, plan: FaultPlan) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let addr = listener.local_addr()?;
        let shared = Arc::new(Shared {
            upstream,
            state: Mutex::new(State::new(plan)),
            connections: watch::Sender::new(0),
        });
        let task = tokio::spawn(accept(listener, Arc::clone(&shared)));
        Ok(Self { addr, shared, task })
    }

    /// Where it listens.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// What belongs into `AWS_ENDPOINT_URL`.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// What it has done under the present plan.
    #[must_use]
    pub fn counts(&self) -> InjectedCounts {
        self.shared.state().counts.clone()
    }

    /// From now on `plan` holds; requests are numbered and faults counted from 0 again.
    pub fn set_plan(&self, plan: FaultPlan) {
        *self.shared.state() = State::new(plan);
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Shared {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fate(&self, request: &Head) -> Fate {
        let mut state = self.state();
        state.counts.requests += 1;
        let retry_after_s = state.plan.retry_after_s;
        let selected = state.plan.only.as_ref().is_none_or(|part| request.word(1).contains(part));
        if !selected {
            return Fate { fault: None, bits: 0, retry_after_s };
        }
        let number = state.next;
        state.next += 1;
        let asked = asked(request);
        let fault = state.plan.draw(number).filter(|fault| fault.applies(asked));
        Fate { fault, bits: state.plan.bits(number), retry_after_s }
    }

    fn count(&self, fault: InjectedFault) {
        *self.state().counts.faults.entry(fault).or_default() += 1;
    }
}

fn asked(request: &Head) -> Asked {
    let (path, query) = request.word(1).split_once('?').unwrap_or((request.word(1), ""));
    let has_key =
        path.trim_start_matches('/').split_once('/').is_some_and(|(_, key)| !key.is_empty());
    match request.word(0) {
        // Python's SDK names the operation in the query; every other query asks about an object.
        "GET" if has_key && matches!(query, "" | "x-id=GetObject") => Asked::Object,
        "PUT" | "POST" | "DELETE" => Asked::Write,
        _ => Asked::Other,
    }
}

/// Accepts for ever. The connections are this task's children and end with it.
async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        shared.connections.send_replace(connections.len());
        tokio::select! {
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < CONNECTIONS_MAX => {
                let Ok((socket, _)) = accepted else {
                    // Out of descriptors, or a client that left: pause so as not to spin.
                    tokio::time::sleep(TRICKLE_PAUSE).await;
                    continue;
                };
                let shared = Arc::clone(&shared);
                connections.spawn(async move {
                    if let Err(error) = converse(&shared, socket).await {
                        tracing::debug!(%error, "a connection through the fault proxy ended early");
                    }
                });
            }
        }
    }
}

/// Serves one connection, with one behind it that is kept as long as it lives.
async fn converse(shared: &Shared, socket: TcpStream) -> io::Result<()> {
    let link = shared.state().link.clone();
    let mut client = Wire::new(socket, link)?;
    let mut upstream: Option<Wire> = None;
    while let Some(request) = client.head().await? {
        let fate = shared.fate(&request);
        match fate.fault {
            Some(InjectedFault::Reset) => {
                shared.count(InjectedFault::Reset);
                client.reset();
                return Ok(());
            }
            Some(InjectedFault::Stall) => {
                shared.count(InjectedFault::Stall);
                client.leaves_within(STALL_S_MAX).await;
                return Ok(());
            }
            _ => {}
        }
        if let Some((fault, answer)) = refusal(&fate) {
            shared.count(fault);
            client.discard(request.request_framing()).await?;
            client.send(&answer).await?;
            continue;
        }
        let mut server = match upstream.take() {
            Some(kept) if !kept.is_stale() => kept,
            _ => Wire::new(TcpStream::connect(shared.upstream).await?, None)?,
        };
        let answer = forward(&mut client, &mut server, &request).await?;
        if fate.fault == Some(InjectedFault::AnswerLost) {
            server.discard(answer.answer_framing(request.word(0))).await?;
            shared.count(InjectedFault::AnswerLost);
            client.reset();
            return Ok(());
        }
        if deliver(shared, &fate, &request, &answer, &mut client, &mut server).await?
            == After::Closes
        {
            return Ok(());
        }
        upstream = Some(server);
    }
    Ok(())
}

/// The answer of a server that refuses, if that is planned.
fn refusal(fate: &Fate) -> Option<(InjectedFault, Vec<u8>)> {
    let fault = fate.fault?;
    let (status, code) = match fault {
        InjectedFault::Unavailable => ("503 Service Unavailable", "SlowDown"),
        InjectedFault::ServerError => ("500 Internal Server Error", "InternalError"),
        InjectedFault::Throttled => ("429 Too Many Requests", "SlowDown"),
        _ => return None,
    };
    let body = format!("<Error><Code>{code}</Code><Message>injected</Message></Error>");
    let mut head = format!("HTTP/1.1 {status}\r\nContent-Type: application/xml\r\n");
    if let Some(seconds) = fate.retry_after_s {
        head.push_str(&format!("Retry-After: {seconds}\r\n"));
    }
    head.push_str(&format!("Content-Length: {}\r\n\r\n", body.len()));
    Some((fault, (head + &body).into_bytes()))
}

/// Sends the request on, and returns the head of the answer.
async fn forward(client: &mut Wire, server: &mut Wire, request: &Head) -> io::Result<Head> {
    if request.field("expect").is_some() {
        client.send(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
    }
    server.send(request.bytes()).await?;
    client.pass(request.request_framing(), server).await?;
    loop {
        let answer = server.head().await?.ok_or(io::ErrorKind::UnexpectedEof)?;
        // "100 Continue" has been said already.
        if answer.status() >= 200 {
            return Ok(answer);
        }
    }
}

/// Hands the answer to the client, after doing to it what is planned.
async fn deliver(
    shared: &Shared,
    fate: &Fate,
    request: &Head,
    answer: &Head,
    client: &mut Wire,
    server: &mut Wire,
) -> io::Result<After> {
    let framing = answer.answer_framing(request.word(0));
    let (fault, length) = match (fate.fault, framing) {
        (Some(fault), Framing::Length(length))
            if length > 0 && matches!(answer.status(), 200 | 206) =>
        {
            (fault, length)
        }
        // Nothing there that could be spoilt.
        _ => {
            client.send(answer.bytes()).await?;
            server.pass(framing, client).await?;
            let closes = framing == Framing::UntilClosed;
            return Ok(if closes { After::Closes } else { After::Goes });
        }
    };
    shared.count(fault);
    match fault {
        InjectedFault::Truncated => {
            client.send(answer.bytes()).await?;
            server.pass(Framing::Length(length / 2), client).await?;
            return Ok(After::Closes);
        }
        InjectedFault::Trickle => {
            client.send(answer.bytes()).await?;
            for byte in server.take(length).await? {
                client.send(&[byte]).await?;
                if client.leaves_within(TRICKLE_PAUSE).await {
                    return Ok(After::Closes);
                }
            }
        }
        InjectedFault::EmptyOk => {
            server.discard(framing).await?;
            let fields = [("Content-Range", String::new()), ("Content-Length", "0".to_owned())];
            client.send(&answer.rewritten("HTTP/1.1 200 OK", &fields)).await?;
        }
        _ => {
            let body = server.take(length).await?;
            let (head, body) = tampered(fault, answer, body, fate.bits);
            client.send(&head).await?;
            client.send(&body).await?;
        }
    }
    Ok(After::Goes)
}

/// An answer whose bytes are certainly other ones.
fn tampered(
    fault: InjectedFault,
    answer: &Head,
    mut body: Vec<u8>,
    bits: u64,
) -> (Vec<u8>, Vec<u8>) {
    let length = body.len() as u64;
    let same_head = || answer.bytes().to_vec();
    match fault {
        InjectedFault::BitFlip => {
            // The high bits decided whether there is a fault at all; these did not.
            let at = (bits >> 3) % length;
            body[at as usize] ^= 1 << (bits & 7);
            (same_head(), body)
        }
        InjectedFault::Changed => {
            body.iter_mut().for_each(|byte| *byte = !*byte);
            (answer.rewritten("", &[("ETag", format!("\"changed-{bits:016x}\""))]), body)
        }
        InjectedFault::WrongRange if answer.status() == 200 && length > 1 => {
            // The later half of what was to be the whole.
            let from = length / 2;
            let fields = [
                ("Content-Range", format!("bytes {from}-{}/{length}", length - 1)),
                ("Content-Length", (length - from).to_string()),
            ];
            let head = answer.rewritten("HTTP/1.1 206 Partial Content", &fields);
            (head, body.split_off(from as usize))
        }
        InjectedFault::WrongRange => {
            shift(&mut body);
            (answer.rewritten("", &[("Content-Range", shifted_range(answer))]), body)
        }
        _ => {
            shift(&mut body);
            (same_head(), body)
        }
    }
}

/// The bytes that begin one later, as far as they are here; never the same ones.
fn shift(body: &mut [u8]) {
    let all_alike = body.windows(2).all(|two| two[0] == two[1]);
    body.rotate_left(1);
    if all_alike {
        body.iter_mut().for_each(|byte| *byte = !*byte);
    }
}

fn shifted_range(answer: &Head) -> String {
    let range = answer.field("content-range").unwrap_or_default();
    let parts: Vec<u64> =
        range.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect();
    match parts[..] {
        [start, end, size] => format!("bytes {}-{}/{}", start + 1, end + 1, size.max(end + 2)),
        _ => "bytes 1-1/2".to_owned(),
    }
}

#[cfg(test)]
#[path = "fault_proxy_tests.rs"]
mod tests;
