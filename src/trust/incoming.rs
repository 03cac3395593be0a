//! A listener's connections that have passed their handshakes, as a stream; and who may be in one at the same time.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::{Purpose, Stream, Trust};

/// Handshakes at a time; who comes then is turned away, and may come again.
const HANDSHAKES_MAX: u32 = 512;
/// The same from one address: a host that says nothing keeps no other out.
const PER_PEER_MAX: u32 = 64;
/// Accepted connections that may wait for the server.
const QUEUE: usize = 64;
/// Between two lines in the log about whom was refused.
const QUIET: Duration = Duration::from_secs(1);

/// Who is shaking hands, by address.
#[derive(Debug, Clone, Default)]
struct Handshakes(Arc<Mutex<BTreeMap<IpAddr, u32>>>);

/// A place among them; given back when dropped.
struct Place {
    all: Handshakes,
    peer: IpAddr,
}

impl Handshakes {
    fn enter(&self, peer: IpAddr) -> io::Result<Place> {
        // Whole numbers: nothing panics while it is held.
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.values().sum::<u32>() >= HANDSHAKES_MAX {
            return Err(io::Error::other("too many connections are being made"));
        }
        let count = all.entry(peer).or_default();
        if *count >= PER_PEER_MAX {
            return Err(io::Error::other("too many connections are being made from this address"));
        }
        *count += 1;
        Ok(Place { all: self.clone(), peer })
    }

    /// [`Trust::accept`], unless too many are at it.
    ///
    /// # Errors
    /// The same, or that.
    async fn accept(
        &self,
        trust: &Trust,
        (stream, peer): (TcpStream, SocketAddr),
        purpose: Purpose,
    ) -> io::Result<Stream> {
        let _place = self.enter(peer.ip())?;
        trust.accept(stream, purpose).await
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut all = self.all.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = all.get_mut(&self.peer) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                all.remove(&self.peer);
            }
        }
    }
}

/// The connections of a listener that have passed their handshakes; the listener closes with it.
#[derive(Debug)]
pub struct Incoming {
    accepted: mpsc::Receiver<io::Result<Stream>>,
    _task: AbortOnDrop,
}

#[derive(Debug)]
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Incoming {
    pub(super) fn start(listener: TcpListener, trust: Trust, purpose: Purpose) -> Self {
        let (sender, accepted) = mpsc::channel(QUEUE);
        let task = AbortOnDrop(tokio::spawn(accept(listener, trust, purpose, sender)));
        Self { accepted, _task: task }
    }

    /// The next connection; none when there can be no more.
    pub async fn next(&mut self) -> Option<Stream> {
        loop {
            if let Ok(stream) = self.accepted.recv().await? {
                return Some(stream);
            }
        }
    }
}

impl futures::Stream for Incoming {
    type Item = io::Result<Stream>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.accepted.poll_recv(context)
    }
}

async fn accept(
    listener: TcpListener,
    trust: Trust,
    purpose: Purpose,
    accepted: mpsc::Sender<io::Result<Stream>>,
) {
    let shaking = Handshakes::default();
    let mut handshakes = JoinSet::new();
    let mut refusals = Refusals::default();
    loop {
        let next = tokio::select! {
            next = listener.accept() => next,
            Some(ended) = handshakes.join_next(), if !handshakes.is_empty() => {
                if let Ok(Some((peer, error))) = ended {
                    refusals.tell(peer, &error);
                }
                continue;
            }
        };
        match next {
            Ok((stream, peer)) => {
                let (trust, accepted, shaking) = (trust.clone(), accepted.clone(), shaking.clone());
                handshakes.spawn(async move {
                    match shaking.accept(&trust, (stream, peer), purpose).await {
                        // A server that has gone takes no more.
                        Ok(stream) => accepted.send(Ok(stream)).await.err().and(None),
                        Err(error) => Some((peer, error)),
                    }
                });
            }
            Err(error) => {
                // Out of descriptors, say: don't spin on it.
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Who was refused, for the log: a line a second at most, however many try.
#[derive(Default)]
struct Refusals {
    told: Option<Instant>,
    unsaid: u64,
}

impl Refusals {
    fn tell(&mut self, peer: SocketAddr, error: &io::Error) {
        self.unsaid += 1;
        if self.told.is_some_and(|told| told.elapsed() < QUIET) {
            return;
        }
        tracing::warn!(%peer, %error, connections = self.unsaid, "a connection was refused");
        self.told = Some(Instant::now());
        self.unsaid = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_takes_its_share_and_gives_it_back() {
        let all = Handshakes::default();
        let peer = |last| IpAddr::from([10, 0, 0, last]);
        let mut places: Vec<_> = (0..PER_PEER_MAX).map(|_| all.enter(peer(1)).unwrap()).collect();
        assert!(all.enter(peer(1)).is_err());
        let other = all.enter(peer(2)).unwrap();
        places.pop();
        assert!(all.enter(peer(1)).is_ok());
        drop((places, other));
        assert!(all.0.lock().unwrap().is_empty());
        let crowd: Vec<_> =
            (0..=255).flat_map(|last| [all.enter(peer(last)), all.enter(peer(last))]).collect();
        assert!(crowd.iter().all(Result::is_ok) && all.enter(peer(1)).is_err());
    }
}
