//! Connections, plain or TLS, as one type; and a listener's accepted ones as a stream of them.

use std::io::{self, Read, Write};
use std::net::TcpStream as StdStream;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_rustls::TlsStream;
use tonic::transport::server::{Connected, TcpConnectInfo};

use super::{Purpose, Trust};

/// Handshakes at a time; who comes then waits to be accepted.
const HANDSHAKES_MAX: usize = 256;
/// Accepted connections that may wait for the server.
const QUEUE: usize = 64;
/// Between two lines in the log about whom was refused.
const QUIET: Duration = Duration::from_secs(1);

/// A connection of tokio's.
#[derive(Debug)]
pub enum Stream {
    /// On loopback, without a token.
    Plain(TcpStream),
    /// With a holder of the token.
    Tls(Box<TlsStream<TcpStream>>),
}

trait Duplex: AsyncRead + AsyncWrite + Unpin {}
impl<T: AsyncRead + AsyncWrite + Unpin> Duplex for T {}

impl Stream {
    fn inner(self: Pin<&mut Self>) -> Pin<&mut dyn Duplex> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream),
            Self::Tls(stream) => Pin::new(stream.as_mut()),
        }
    }

    fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(stream) => stream,
            Self::Tls(stream) => stream.get_ref().0,
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.inner().poll_read(context, buffer)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.inner().poll_write(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.inner().poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.inner().poll_shutdown(context)
    }
}

impl Connected for Stream {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.socket().connect_info()
    }
}

/// A connection for threads.
#[derive(Debug)]
pub enum BlockingStream {
    /// On loopback, without a token.
    Plain(StdStream),
    /// With a holder of the token.
    Tls(Box<rustls::StreamOwned<rustls::ClientConnection, StdStream>>),
}

impl BlockingStream {
    /// The socket, for its timeouts.
    #[must_use]
    pub fn socket(&self) -> &StdStream {
        match self {
            Self::Plain(stream) => stream,
            Self::Tls(stream) => &stream.sock,
        }
    }
}

impl Read for BlockingStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.read(buffer),
            Self::Tls(stream) => stream.read(buffer),
        }
    }
}

impl Write for BlockingStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.write(bytes),
            Self::Tls(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(stream) => stream.flush(),
            Self::Tls(stream) => stream.flush(),
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
    let places = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    let mut handshakes = JoinSet::new();
    let mut refusals = Refusals::default();
    loop {
        while let Some(ended) = handshakes.try_join_next() {
            if let Ok(Some((peer, error))) = ended {
                refusals.tell(peer, &error);
            }
        }
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let next = tokio::select! {
            next = listener.accept() => next,
            // Whoever was refused last is told of too.
            Some(ended) = handshakes.join_next(), if !handshakes.is_empty() => {
                if let Ok(Some((peer, error))) = ended {
                    refusals.tell(peer, &error);
                }
                continue;
            }
        };
        match next {
            Ok((stream, peer)) => {
                let (trust, accepted) = (trust.clone(), accepted.clone());
                handshakes.spawn(async move {
                    let outcome = trust.accept(stream, purpose).await;
                    drop(place);
                    match outcome {
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
    fn tell(&mut self, peer: std::net::SocketAddr, error: &io::Error) {
        self.unsaid += 1;
        if self.told.is_some_and(|told| told.elapsed() < QUIET) {
            return;
        }
        tracing::warn!(%peer, %error, connections = self.unsaid, "refused: no holder of the join token");
        self.told = Some(Instant::now());
        self.unsaid = 0;
    }
}
