//! A gRPC channel over a connection with a holder of the token.

use std::io;
use std::sync::Mutex;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint};

use super::{Purpose, Trust, TrustError};

/// A connection over which nothing comes back for so long, though asked, is none.
const ANSWER_MAX: Duration = Duration::from_secs(4);

impl Trust {
    /// A channel to the coordinator at `address` (`HOST:PORT`), over one connection: when that is lost, so is the channel.
    ///
    /// # Errors
    /// As [`Trust::dial`]; [`TrustError::Unreachable`] too when it takes longer than 4 s.
    pub async fn channel(&self, address: &str) -> Result<Channel, TrustError> {
        let unreachable = |source| TrustError::Unreachable { address: address.to_owned(), source };
        let dialled = tokio::time::timeout(ANSWER_MAX, self.dial(address, Purpose::Control)).await;
        let stream = dialled.map_err(|late| unreachable(late.into()))??;
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|error| unreachable(io::Error::other(error)))?
            .connect_timeout(ANSWER_MAX)
            .http2_keep_alive_interval(ANSWER_MAX / 2)
            .keep_alive_timeout(ANSWER_MAX);
        let once = Mutex::new(Some(TokioIo::new(stream)));
        let connector = tower::service_fn(move |_| {
            // Nothing panics while it is held.
            let stream = once.lock().map(|mut stream| stream.take()).ok().flatten();
            std::future::ready(stream.ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected)))
        });
        let connected = endpoint.connect_with_connector(connector).await;
        connected.map_err(|error| unreachable(io::Error::other(error)))
    }
}
