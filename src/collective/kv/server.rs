//! The service: one task per connection over one map. Waiters are woken by the change itself.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore};

use super::frame::{Frame, answer, body_length, op};

/// Connections at a time: a few per rank of one generation.
const CONNECTIONS_MAX: usize = 4096;
/// Keys in all; a generation of 1,000 ranks uses a few thousand.
const KEYS_MAX: usize = 1 << 20;
/// Longest key in bytes.
const KEY_BYTES_MAX: usize = 4096;

/// A running service; it ends when dropped.
#[derive(Debug)]
pub struct KvServer {
    address: SocketAddr,
    task: tokio::task::JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Shared {
    map: Mutex<BTreeMap<Vec<u8>, Vec<u8>>>,
    changed: Notify,
}

impl KvServer {
    /// Listens on `address` (port 0: any) and serves.
    ///
    /// # Errors
    /// When the address cannot be bound.
    pub async fn start(address: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let task = tokio::spawn(accept(listener));
        Ok(Self { address, task })
    }

    /// Where it listens.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for KvServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept(listener: TcpListener) {
    let shared = Arc::new(Shared::default());
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    let shared = Arc::clone(&shared);
                    connections.spawn(async move {
                        if let Err(error) = serve(stream, &shared).await
                            && error.kind() != io::ErrorKind::UnexpectedEof
                        {
                            tracing::debug!(%error, "a connection of the key-value service ended");
                        }
                        drop(place);
                    });
                }
                Err(error) => tracing::warn!(%error, "the key-value service cannot accept"),
            },
            // Reaps ended connections; resolves only while there are some.
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn serve(mut stream: TcpStream, shared: &Shared) -> io::Result<()> {
    stream.set_nodelay(true)?;
    loop {
        let mut head = [0; 4];
        stream.read_exact(&mut head).await?;
        let mut body = vec![0; body_length(head)?];
        stream.read_exact(&mut body).await?;
        let reply = react(&Frame::decode(&body)?, shared).await;
        stream.write_all(&reply.encode()).await?;
    }
}

async fn react(request: &Frame, shared: &Shared) -> Frame {
    let key = request.field(0);
    if key.len() > KEY_BYTES_MAX {
        return Frame::new(answer::REFUSED, &[b"the key is too long"]);
    }
    match request.code {
        op::GET | op::WAIT => {
            let patience = Duration::from_millis(u64::try_from(request.number(1)).unwrap_or(0));
            match tokio::time::timeout(patience, shared.wait_for(key)).await {
                Ok(_) if request.code == op::WAIT => Frame::new(answer::OK, &[]),
                Ok(value) => Frame::new(answer::OK, &[&value]),
                Err(_) => Frame::new(answer::TIMEOUT, &[]),
            }
        }
        _ => shared.at_once(request, key),
    }
}

impl Shared {
    /// The value of `key`, as soon as it has one.
    async fn wait_for(&self, key: &[u8]) -> Vec<u8> {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // Registered before the look, so that a change between the two is not missed.
            changed.as_mut().enable();
            if let Some(value) = self.lock().get(key) {
                return value.clone();
            }
            changed.await;
        }
    }

    fn at_once(&self, request: &Frame, key: &[u8]) -> Frame {
        let mut map = self.lock();
        if map.len() >= KEYS_MAX && matches!(request.code, op::SET | op::ADD | op::COMPARE_SET) {
            return Frame::new(answer::REFUSED, &[b"too many keys"]);
        }
        let flag = |yes: bool| Frame::new(answer::OK, &[&[u8::from(yes)]]);
        let reply = match request.code {
            op::SET => {
                map.insert(key.to_vec(), request.field(1).to_vec());
                Frame::new(answer::OK, &[])
            }
            op::ADD => {
                let old: i64 = map
                    .get(key)
                    .and_then(|value| std::str::from_utf8(value).ok())
                    .and_then(|text| text.parse().ok())
                    .unwrap_or(0);
                let sum = old.saturating_add(request.number(1));
                // Decimal text, as c10d's own stores keep counters.
                map.insert(key.to_vec(), sum.to_string().into_bytes());
                Frame::new(answer::OK, &[&sum.to_le_bytes()])
            }
            op::COMPARE_SET => {
                let (expected, desired) = (request.field(1), request.field(2));
                let now = match map.get(key) {
                    // An absent key matches the empty expectation, as in c10d's TCPStore.
                    None if expected.is_empty() => None,
                    None => return Frame::new(answer::OK, &[expected]),
                    Some(value) if value == expected => None,
                    Some(value) => Some(value.clone()),
                };
                match now {
                    Some(value) => return Frame::new(answer::OK, &[&value]),
                    None => {
                        map.insert(key.to_vec(), desired.to_vec());
                        Frame::new(answer::OK, &[desired])
                    }
                }
            }
            op::CHECK => return flag(map.contains_key(key)),
            op::DELETE => return flag(map.remove(key).is_some()),
            op::COUNT => {
                let count = i64::try_from(map.len()).unwrap_or(i64::MAX);
                return Frame::new(answer::OK, &[&count.to_le_bytes()]);
            }
            op::FORGET => {
                map.retain(|known, _| !known.starts_with(key));
                return Frame::new(answer::OK, &[]);
            }
            _ => return Frame::new(answer::REFUSED, &[b"unknown request"]),
        };
        drop(map);
        self.changed.notify_waiters();
        reply
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<Vec<u8>, Vec<u8>>> {
        // No code panics while holding it, and a map is sound after any interrupted call.
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
