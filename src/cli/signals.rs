//! SIGINT and SIGTERM as something to wait for.

use tokio::signal::unix::{SignalKind, signal};

/// Resolves with the signal's name. Later ones are ignored: the first already ends the run.
pub async fn interrupted() -> String {
    let (Ok(mut int), Ok(mut term)) =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        tracing::warn!("signals cannot be caught here");
        return std::future::pending().await;
    };
    tokio::select! {
        _ = int.recv() => "SIGINT".to_owned(),
        _ = term.recv() => "SIGTERM".to_owned(),
    }
}
