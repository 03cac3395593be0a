//! An agent without a coordinator asks the run's folder whether there is anything left to do.

use std::time::Duration;

use crate::config::{self, ConfigSource};
use crate::ledger;
use crate::proto::EXIT_DONE;
use crate::store::{Store, StoreOptions};
use crate::types::Step;

/// How often: nothing tells when an object appears.
const EVERY: Duration = Duration::from_secs(5);

/// Whether the run's folder says that there is nothing left to do. What cannot be read says nothing.
pub(super) async fn is_over(run: &str) -> bool {
    let told = async || -> Result<bool, String> {
        let store = Store::open(run, &StoreOptions::default().existing());
        let store = store.map_err(|error| error.to_string())?;
        let text = store.get_agreed("config.toml").await.map_err(|error| error.to_string())?;
        let text = String::from_utf8_lossy(&text).into_owned();
        let config = config::load(&ConfigSource::Text(text), &[]);
        let steps = Step(config.map_err(|error| error.to_string())?.train.iterations);
        ledger::is_complete(&store, steps).await.map_err(|error| error.to_string())
    };
    told().await.unwrap_or_else(|error| {
        tracing::debug!(error, "whether the run is complete is not to be read");
        false
    })
}

/// Resolves, with the exit status, when there is nothing left to do: a coordinator that has finished is not there any
/// more. For an agent that has been in the run: one that has not may be earlier than the coordinator that extends it.
pub(super) async fn nothing_left(run: &str) -> i32 {
    loop {
        tokio::time::sleep(EVERY).await;
        if is_over(run).await {
            tracing::info!("the run is complete");
            return EXIT_DONE;
        }
    }
}
