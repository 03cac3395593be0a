//! The way to the coordinator: connecting again and again, and when to give up. What is said on a connection is `agent`'s.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use tonic::transport::Channel;

use super::AgentOptions;
use super::completion::is_over;
use crate::proto::wire::coordinator_client::CoordinatorClient;
use crate::proto::{EXIT_DONE, EXIT_FAILED, EXIT_RESUMABLE};
use crate::trust::TrustError;

/// Pause between two tries to reach the coordinator.
const RETRY: Duration = Duration::from_millis(200);
/// So long a stranger at its address may be a mistake that passes: an address that was another pod's a moment ago.
const STRANGE_MAX: Duration = Duration::from_secs(3);

pub(super) type Client = CoordinatorClient<Channel>;

/// Tries until the coordinator answers; the caller bounds it.
///
/// # Errors
/// What trying again does not mend, as far as has been seen for some seconds.
pub(super) async fn connect(options: &AgentOptions) -> Result<Client, TrustError> {
    let mut told = String::new();
    let mut strange: Option<Instant> = None;
    loop {
        match options.trust.channel(&options.coordinator).await {
            Ok(channel) => return Ok(Client::new(channel)),
            Err(error @ (TrustError::Token(_) | TrustError::NoToken { .. })) => return Err(error),
            Err(error) => {
                if !error.wants_mending() {
                    strange = None;
                } else if strange.get_or_insert_with(Instant::now).elapsed() >= STRANGE_MAX {
                    return Err(error);
                }
                let why = error.to_string();
                if why != told {
                    tracing::info!("the coordinator is not there yet: {why}");
                    told = why;
                }
                // Nothing tells when a listener appears on another host: this is the poll.
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

/// The same for an agent that had a coordinator: whoever else has its address now may go again, and the trainer goes on.
pub(super) async fn reconnect(options: &AgentOptions) -> Client {
    loop {
        match connect(options).await {
            Ok(client) => return client,
            Err(error) => {
                tracing::warn!(%error, "not this run's coordinator");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

/// The exit status of an agent that has found no coordinator at all: 0 if the run is complete, else 1, which a platform
/// counts: a coordinator that cannot start will not come.
pub(super) async fn never_reached(options: &AgentOptions) -> i32 {
    if is_over(&options.run).await {
        tracing::info!("the run is complete");
        return EXIT_DONE;
    }
    given_up(options);
    EXIT_FAILED
}

pub(super) fn given_up(options: &AgentOptions) -> i32 {
    tracing::error!(
        "the coordinator at {} has been out of reach for {} s",
        options.coordinator,
        options.patience.as_secs()
    );
    EXIT_RESUMABLE
}

/// The address of the interface over which the coordinator is reached.
///
/// Not the host name's: Debian maps that to 127.0.1.1, where no other host can connect.
pub(super) async fn interface_towards(coordinator: &str) -> IpAddr {
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
