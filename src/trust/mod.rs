//! Who may take part in a run: whoever holds its join token, and nobody else.
//!
//! From the token every process derives the same certificate authority and issues itself a certificate, in memory
//! ([`authority`]); every connection of the control plane and of the key-value service is then TLS 1.3, and both sides
//! prove theirs. The token is never sent, written or compared. Without one, nothing listens and nothing connects beyond
//! loopback.
//!
//! What it is not: a distinction of roles (a holder can play any), and no cover for the collectives, which are clear text
//! (docs/security.md).

pub mod authority;
mod channel;
mod incoming;
mod stream;
mod token;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

pub use authority::{Authority, Purpose};
pub use incoming::Incoming;
use stream::Timely;
pub use stream::{BlockingStream, Stream};
pub use token::{JoinToken, TOKEN_FILE_VARIABLE, TOKEN_VARIABLE};

/// What a handshake may take: less than clients wait, so that silent ones make room for them.
const HANDSHAKE_MAX: Duration = Duration::from_secs(2);
/// What connecting to one of a name's addresses may take.
const CONNECT_MAX: Duration = Duration::from_secs(1);

/// Why there is no connection, or no listening.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrustError {
    /// The token cannot be used: it is to be mended.
    #[error("{0}")]
    Token(String),
    /// It is about another host, and there is no token.
    #[error(
        "{what} {address}: beyond loopback every process needs the run's token, in {TOKEN_VARIABLE} or in the file that \
         {TOKEN_FILE_VARIABLE} names (make one with `openssl rand -hex 32`)"
    )]
    NoToken {
        /// "listen on", "connect to".
        what: &'static str,
        /// Where.
        address: String,
    },
    /// The other side does not hold the same token.
    #[error("{address} has another {TOKEN_VARIABLE} than this process")]
    Stranger {
        /// Where.
        address: String,
    },
    /// The other side speaks plain text, and this one has a token.
    #[error("{address} speaks plain text: it has no {TOKEN_VARIABLE}, or is something else")]
    PlainText {
        /// Where.
        address: String,
    },
    /// It may be there later.
    #[error("cannot connect to {address}: {source}")]
    Unreachable {
        /// Where.
        address: String,
        /// What the network, or the other side, said.
        source: io::Error,
    },
}

impl TrustError {
    /// Whether somebody has to mend it: trying again does not help.
    #[must_use]
    pub fn wants_mending(&self) -> bool {
        !matches!(self, Self::Unreachable { .. })
    }

    /// What a failed handshake with `address` means.
    fn of_handshake(address: &dyn ToString, source: io::Error) -> Self {
        use rustls::{CertificateError as Certificate, Error};
        let address = address.to_string();
        match source.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
            Some(Error::InvalidCertificate(
                Certificate::UnknownIssuer | Certificate::BadSignature,
            )) => Self::Stranger { address },
            Some(Error::InvalidMessage(_)) => Self::PlainText { address },
            _ => Self::Unreachable { address, source },
        }
    }
}

/// What a process has to show, and asks of others.
#[derive(Clone, Default)]
pub struct Trust(Option<Arc<Authority>>);

impl std::fmt::Debug for Trust {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_some() { "Trust(token)" } else { "Trust(loopback)" })
    }
}

impl Trust {
    /// No token: plain text on loopback, nothing beyond.
    #[must_use]
    pub fn loopback() -> Self {
        Self(None)
    }

    /// Holders of `token`.
    ///
    /// # Errors
    /// [`TrustError::Token`].
    pub fn holding(token: &JoinToken) -> Result<Self, TrustError> {
        Ok(Self(Some(Arc::new(Authority::derive(token)?))))
    }

    /// By what this process's environment says.
    ///
    /// # Errors
    /// [`TrustError::Token`] for one that cannot be used.
    pub fn from_environment() -> Result<Self, TrustError> {
        match JoinToken::from_environment()? {
            Some(token) => Self::holding(&token),
            None => Ok(Self::loopback()),
        }
    }

    /// # Errors
    /// [`TrustError::NoToken`] beyond loopback without a token.
    fn allow(
        &self,
        what: &'static str,
        address: &dyn ToString,
        ip: IpAddr,
    ) -> Result<(), TrustError> {
        if self.0.is_some() || ip.to_canonical().is_loopback() {
            return Ok(());
        }
        Err(TrustError::NoToken { what, address: address.to_string() })
    }

    /// # Errors
    /// [`TrustError::NoToken`] beyond loopback without a token.
    pub fn may_listen(&self, address: SocketAddr) -> Result<(), TrustError> {
        self.allow("listen on", &address, address.ip())
    }

    /// The certificate, in DER, by which clients of other libraries tell a holder's server; none without a token.
    #[must_use]
    pub fn certificate(&self) -> Option<&[u8]> {
        self.0.as_deref().map(|authority| authority.certificate().as_ref())
    }

    /// The certificate, in DER, by which browsers and scrapers tell the run's page; none without a token.
    #[must_use]
    pub fn page_certificate(&self) -> Option<&[u8]> {
        self.0.as_deref().map(|authority| authority.page_certificate().as_ref())
    }

    /// What browsers and scrapers have to give for the run's page beyond loopback; none without a token. Nobody can make
    /// the token of it.
    #[must_use]
    pub fn page_password(&self) -> Option<&str> {
        self.0.as_deref().map(Authority::page_password)
    }

    /// Makes what a listener for `purpose` accepted a connection with a holder of the token.
    ///
    /// # Errors
    /// When the other side is none, or dawdles.
    pub async fn accept(&self, stream: TcpStream, purpose: Purpose) -> io::Result<Stream> {
        stream.set_nodelay(true)?;
        let Some(authority) = &self.0 else { return Ok(Stream::Plain(stream)) };
        let local = stream.local_addr()?.ip().to_canonical();
        let config = authority.server(purpose, local).map_err(io::Error::other)?;
        let handshake = TlsAcceptor::from(config).accept(stream);
        let stream = tokio::time::timeout(HANDSHAKE_MAX, handshake).await??;
        Ok(Stream::Tls(Box::new(stream.into())))
    }

    /// Connections with holders of the token, for a gRPC server; whoever is none is refused and told in the log.
    ///
    /// # Errors
    /// [`TrustError::NoToken`] beyond loopback without a token.
    pub fn incoming(
        &self,
        listener: TcpListener,
        purpose: Purpose,
    ) -> Result<Incoming, TrustError> {
        if let Ok(address) = listener.local_addr() {
            self.may_listen(address)?;
        }
        Ok(Incoming::start(listener, self.clone(), purpose))
    }

    /// A connection with the holder of the token at `address` (`HOST:PORT`), for `purpose`.
    ///
    /// # Errors
    /// [`TrustError`]; trying again helps unless it [wants mending](TrustError::wants_mending).
    pub async fn dial(&self, address: &str, purpose: Purpose) -> Result<Stream, TrustError> {
        let unreachable = |source| TrustError::Unreachable { address: address.to_owned(), source };
        let mut failure = unreachable(io::Error::other("its name has no address"));
        // One of them may be that of a host that is gone: the others are asked too.
        for candidate in tokio::net::lookup_host(address).await.map_err(unreachable)? {
            self.allow("connect to", &address, candidate.ip())?;
            let connecting = TcpStream::connect(candidate);
            let connected = tokio::time::timeout(CONNECT_MAX, connecting).await;
            let greeted = match connected.map_err(io::Error::from).and_then(|stream| stream) {
                Ok(stream) => self.greet(stream, address, purpose).await,
                Err(source) => Err(unreachable(source)),
            };
            match greeted {
                Ok(stream) => return Ok(stream),
                // What wants mending is said only if no address is better.
                Err(error) if failure.wants_mending() && !error.wants_mending() => {}
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    async fn greet(
        &self,
        stream: TcpStream,
        address: &str,
        purpose: Purpose,
    ) -> Result<Stream, TrustError> {
        let unreachable = |source| TrustError::Unreachable { address: address.to_owned(), source };
        stream.set_nodelay(true).map_err(unreachable)?;
        let Some(authority) = &self.0 else { return Ok(Stream::Plain(stream)) };
        let connector = TlsConnector::from(authority.client(purpose)?);
        let handshake = connector.connect(authority::member_name()?, stream);
        match tokio::time::timeout(HANDSHAKE_MAX, handshake).await {
            Ok(Ok(stream)) => Ok(Stream::Tls(Box::new(stream.into()))),
            Ok(Err(error)) => Err(TrustError::of_handshake(&address, error)),
            Err(late) => Err(unreachable(late.into())),
        }
    }

    /// The same for threads: connecting and the handshake take at most `timeout` each.
    ///
    /// # Errors
    /// As [`Trust::dial`].
    pub fn dial_blocking(
        &self,
        address: SocketAddr,
        timeout: Duration,
        purpose: Purpose,
    ) -> Result<BlockingStream, TrustError> {
        let unreachable = |source| TrustError::Unreachable { address: address.to_string(), source };
        self.allow("connect to", &address, address.ip())?;
        let open = || {
            let stream = std::net::TcpStream::connect_timeout(&address, timeout)?;
            stream.set_nodelay(true)?;
            Ok(stream)
        };
        let stream = open().map_err(unreachable)?;
        let Some(authority) = &self.0 else { return Ok(BlockingStream::Plain(stream)) };
        let name = authority::member_name()?;
        let mut connection = rustls::ClientConnection::new(authority.client(purpose)?, name)
            .map_err(|error| unreachable(io::Error::other(error)))?;
        let mut timely = Timely { stream: &stream, until: Instant::now() + timeout };
        while connection.is_handshaking() {
            connection
                .complete_io(&mut timely)
                .map_err(|error| TrustError::of_handshake(&address, error))?;
        }
        Ok(BlockingStream::Tls(Box::new(rustls::StreamOwned::new(connection, stream))))
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
