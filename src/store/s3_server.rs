//! The embedded S3 server: a folder on this machine that speaks S3 (`cpcr s3 --dir DIR`).
//!
//! For the demonstration, for tests, and for labs without object storage. One process on one
//! disk: no replication. Plain HTTP on loopback; beyond it HTTPS, by the run's join token. What is acknowledged survives the death of the process (files
//! are renamed into place whole), not that of the power supply.

use std::fs::{File, TryLockError};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::GracefulShutdown;
use s3s::auth::SimpleAuth;
use s3s::service::{S3Service, S3ServiceBuilder};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, oneshot};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

use super::s3_keyed::KeyedFs;
use crate::trust::{Incoming, Purpose, Trust, TrustError};

/// Connections at once; more wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 1024;
/// How long a connection may take to send a request's header.
const HEADER_S_MAX: Duration = Duration::from_secs(30);
/// How long a shutdown waits for requests under way.
const SHUTDOWN_S_MAX: Duration = Duration::from_secs(5);
/// Marks a folder as served; s3s-fs ignores names with a leading dot.
const LOCK_FILE: &str = ".cpcr-s3.lock";

/// What to serve, where, and to whom.
#[derive(Clone)]
pub struct S3ServerOptions {
    /// Buckets are the folders in here; made if missing.
    pub dir: PathBuf,
    /// Port 0 picks a free one.
    pub listen: SocketAddr,
    /// By which it proves itself beyond loopback. On loopback it speaks plain HTTP, whatever this is.
    pub trust: Trust,
    /// The one user's name.
    pub access_key: String,
    /// The one user's secret.
    pub secret_key: String,
    /// Whether writes to one key exclude each other. Only a test has reason to turn it off.
    #[doc(hidden)]
    pub exclusive_creates: bool,
}

impl S3ServerOptions {
    /// Serves `dir` on a free loopback port.
    #[must_use]
    pub fn on_loopback(
        dir: impl Into<PathBuf>,
        access_key: impl Into<String>,
        secret_key: impl Into<String>,
    ) -> Self {
        Self {
            dir: dir.into(),
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            trust: Trust::loopback(),
            access_key: access_key.into(),
            secret_key: secret_key.into(),
            exclusive_creates: true,
        }
    }
}

/// Why a server did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum S3ServerError {
    /// The folder cannot be made, read or locked.
    #[error("cannot serve the folder {}: {source}", dir.display())]
    Folder {
        /// The folder.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Two servers on one folder would overwrite each other's unfinished files.
    #[error("another S3 server already serves the folder {}", dir.display())]
    Served {
        /// The folder.
        dir: PathBuf,
    },
    /// The address is taken or not ours.
    #[error("cannot listen on {listen}: {source} (port 0 picks a free one)")]
    Listen {
        /// The address.
        listen: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// It would be open to other hosts, and there is no token.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// Credentials that no client could send.
    #[error("access key and secret key must not be empty")]
    Credentials,
}

/// A running server. Dropping it is a hard stop; [`S3Server::shutdown`] lets requests finish.
#[derive(Debug)]
pub struct S3Server {
    addr: SocketAddr,
    scheme: &'static str,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

impl S3Server {
    /// Where it listens.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// What belongs into `AWS_ENDPOINT_URL`.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("{}://{}", self.scheme, self.addr)
    }

    /// Takes no more connections, lets requests under way finish for some seconds, and stops.
    pub async fn shutdown(mut self) {
        // A closed channel means that the task has ended, which is what is asked for.
        if self.stop.take().is_some_and(|stop| stop.send(()).is_ok())
            && timeout(SHUTDOWN_S_MAX * 2, &mut self.task).await.is_err()
        {
            tracing::warn!(addr = %self.addr, "the S3 server did not stop in time");
        }
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Starts serving on the current tokio runtime; returns once the port accepts connections.
pub async fn serve(options: S3ServerOptions) -> Result<S3Server, S3ServerError> {
    if options.access_key.is_empty() || options.secret_key.is_empty() {
        return Err(S3ServerError::Credentials);
    }
    options.trust.may_listen(options.listen)?;
    let plain = options.listen.ip().to_canonical().is_loopback();
    let trust = if plain { Trust::loopback() } else { options.trust.clone() };
    let lock = lock_folder(&options.dir)?;
    let files = KeyedFs::new(options.dir.clone(), options.exclusive_creates).map_err(|error| {
        S3ServerError::Folder {
            dir: options.dir.clone(),
            source: io::Error::other(format!("{error:?}")),
        }
    })?;
    let mut service = S3ServiceBuilder::new(files);
    service.set_auth(SimpleAuth::from_single(options.access_key, options.secret_key));
    let listen = options.listen;
    let failed = |source| S3ServerError::Listen { listen, source };
    let listener = TcpListener::bind(listen).await.map_err(failed)?;
    let addr = listener.local_addr().map_err(failed)?;
    let scheme = if trust.certificate().is_some() { "https" } else { "http" };
    let incoming = trust.incoming(listener, Purpose::Objects)?;
    let (stop, stopped) = oneshot::channel();
    let task = tokio::spawn(accept(incoming, service.build(), stopped, lock));
    Ok(S3Server { addr, scheme, stop: Some(stop), task })
}

/// Makes the folder and locks it for as long as the returned file lives.
fn lock_folder(dir: &PathBuf) -> Result<File, S3ServerError> {
    let failed = |source| S3ServerError::Folder { dir: dir.clone(), source };
    std::fs::create_dir_all(dir).map_err(failed)?;
    let file = File::create(dir.join(LOCK_FILE)).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(S3ServerError::Served { dir: dir.clone() }),
        Err(TryLockError::Error(source)) => Err(failed(source)),
    }
}

/// Accepts until told to stop. The connections are this task's children and end with it.
async fn accept(
    mut incoming: Incoming,
    service: S3Service,
    mut stopped: oneshot::Receiver<()>,
    _lock: File,
) {
    let mut builder = Builder::new(TokioExecutor::new()).http1_only();
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_S_MAX);
    let graceful = GracefulShutdown::new();
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            _ = &mut stopped => break,
            Some(_) = connections.join_next() => continue,
            accepted = async {
                let slot = Arc::clone(&slots).acquire_owned().await;
                (slot, incoming.next().await)
            } => accepted,
        };
        let (Ok(slot), Some(stream)) = accepted else { break };
        let connection = builder.serve_connection(TokioIo::new(stream), service.clone());
        let connection = graceful.watch(connection.into_owned());
        connections.spawn(async move {
            let _slot = slot;
            if let Err(error) = connection.await {
                tracing::debug!(%error, "an S3 connection ended early");
            }
        });
    }
    drop(incoming);
    if timeout(SHUTDOWN_S_MAX, graceful.shutdown()).await.is_err() {
        tracing::warn!("S3 requests were cut off by the shutdown");
    }
}
