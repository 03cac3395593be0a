//! The server: runs on an agent's tokio runtime, without torch.
//!
//! One task a connection, one request at a time on it; a wait ends by its event, its timeout or
//! its client's going away. State survives every connection and dies with the server.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, ReadHalf, WriteHalf};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};

use super::memory::{Memory, Woken};
use super::protocol::{FRAME_BYTES_MAX, Reply, Request};
use crate::trust::{Incoming, Purpose, Stream, Trust};

/// Connections at a time; one more waits to be accepted.
const CONNECTIONS_MAX: usize = 4096;
/// A frame that has begun must be whole by then, and a reply taken.
const FRAME_TIMEOUT: Duration = Duration::from_secs(30);
/// The longest wait that a client may ask for.
const WAIT_MAX: Duration = Duration::from_secs(24 * 60 * 60);

type Shared = Arc<Mutex<Memory>>;

/// A running key-value service; dropping it closes every connection.
#[derive(Debug)]
pub struct KvServer {
    local_addr: SocketAddr,
    shared: SharedDebug,
    task: JoinHandle<()>,
}

/// [`Memory`] holds values that no log should show.
struct SharedDebug(Shared);

impl std::fmt::Debug for SharedDebug {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Memory")
    }
}

impl KvServer {
    /// Listens on `address` (port 0: any free one) and serves whom `trust` lets in, from a task of the current runtime.
    ///
    /// # Errors
    /// When the address cannot be bound, or is not loopback and there is no token.
    pub async fn bind(address: SocketAddr, trust: &Trust) -> io::Result<Self> {
        trust.may_listen(address).map_err(io::Error::other)?;
        let listener = TcpListener::bind(address).await?;
        let local_addr = listener.local_addr()?;
        let shared = Shared::default();
        let incoming = trust.incoming(listener, Purpose::Keys).map_err(io::Error::other)?;
        let task = tokio::spawn(accept(incoming, shared.clone()));
        Ok(Self { local_addr, shared: SharedDebug(shared), task })
    }

    /// Where it listens.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Frees every key under `prefix`; whoever waits for one of them is told that it is over.
    pub fn forget(&self, prefix: &str) {
        lock(&self.shared.0).forget(prefix.as_bytes());
    }

    /// How many keys it holds.
    #[must_use]
    pub fn num_keys(&self) -> usize {
        lock(&self.shared.0).len()
    }
}

impl Drop for KvServer {
    fn drop(&mut self) {
        // The connections' tasks are in a JoinSet inside this one and end with it.
        self.task.abort();
    }
}

/// No code panics while it holds the lock, so a poisoned one still guards whole data.
fn lock(shared: &Shared) -> MutexGuard<'_, Memory> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn accept(mut incoming: Incoming, shared: Shared) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let Some(stream) = incoming.next().await else { return };
        let shared = shared.clone();
        connections.spawn(async move {
            if let Err(error) = serve(stream, shared).await {
                tracing::debug!(%error, "key-value connection ended");
            }
            drop(place);
        });
    }
}

async fn serve(stream: Stream, shared: Shared) -> io::Result<()> {
    let (reader, mut writer) = tokio::io::split(stream);
    let mut reader = BufReader::new(reader);
    while let Some(request) = receive(&mut reader).await? {
        let Some(reply) = answer(request, &shared, &mut reader).await else { return Ok(()) };
        send(&mut writer, &reply).await?;
    }
    Ok(())
}

async fn send(writer: &mut WriteHalf<Stream>, reply: &Reply) -> io::Result<()> {
    let sent = async {
        writer.write_all(&reply.to_frame()).await?;
        writer.flush().await
    };
    tokio::time::timeout(FRAME_TIMEOUT, sent).await?
}

/// The next request; none when the client has closed between two.
async fn receive(reader: &mut BufReader<ReadHalf<Stream>>) -> io::Result<Option<Request>> {
    if reader.fill_buf().await?.is_empty() {
        return Ok(None);
    }
    let body = tokio::time::timeout(FRAME_TIMEOUT, async {
        let length = reader.read_u32_le().await? as usize;
        if length > FRAME_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "frame too long"));
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).await?;
        Ok(body)
    })
    .await??;
    Request::from_body(&body)
        .map(Some)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "malformed request"))
}

/// The reply; none when the client went away while it waited.
async fn answer(
    request: Request,
    shared: &Shared,
    reader: &mut BufReader<ReadHalf<Stream>>,
) -> Option<Reply> {
    Some(match request {
        Request::Get { key, timeout_ms } => {
            let reply = wait(vec![key.clone()], timeout_ms, shared, reader).await?;
            match (reply, lock(shared).get(&key)) {
                (Reply::Done, Some(value)) => Reply::Value(value.clone()),
                // Deleted between the wake and this line.
                (Reply::Done, None) => Reply::Forgotten,
                (other, _) => other,
            }
        }
        Request::Wait { keys, timeout_ms } => wait(keys, timeout_ms, shared, reader).await?,
        Request::Set { key, value } => lock(shared).set(key, value),
        Request::Add { key, delta } => lock(shared).add(key, delta),
        Request::CompareSet { key, expected, desired } => {
            lock(shared).compare_set(key, expected, desired)
        }
        Request::Check { keys } => Reply::Number(i64::from(lock(shared).has_all(&keys))),
        Request::Delete { key } => Reply::Number(i64::from(lock(shared).delete(&key))),
        Request::NumKeys => Reply::Number(i64::try_from(lock(shared).len()).unwrap_or(i64::MAX)),
    })
}

/// Takes a waiter off the list however the wait ends, cancellation included.
struct Waiting<'a>(&'a Shared, u64);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        lock(self.0).stop_waiting(self.1);
    }
}

async fn wait(
    keys: Vec<Vec<u8>>,
    timeout_ms: u64,
    shared: &Shared,
    reader: &mut BufReader<ReadHalf<Stream>>,
) -> Option<Reply> {
    let (id, woken) = {
        let mut memory = lock(shared);
        if memory.has_all(&keys) {
            return Some(Reply::Done);
        }
        memory.wait(keys)
    };
    let _waiting = Waiting(shared, id);
    tokio::select! {
        biased;
        how = woken => Some(match how {
            Ok(Woken::Present) => Reply::Done,
            Ok(Woken::Forgotten) | Err(_) => Reply::Forgotten,
        }),
        () = tokio::time::sleep(Duration::from_millis(timeout_ms).min(WAIT_MAX)) => Some(Reply::TimedOut),
        () = gone(reader) => None,
    }
}

/// Returns when the client has closed; never if it sends instead (that is its next request).
async fn gone(reader: &mut BufReader<ReadHalf<Stream>>) {
    match reader.fill_buf().await {
        Ok(bytes) if !bytes.is_empty() => std::future::pending().await,
        _ => (),
    }
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
