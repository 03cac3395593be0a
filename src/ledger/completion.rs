//! The record that a run is complete: `RUN/complete.json`. Whoever starts late, or was cut off at the end, reads it and has
//! nothing left to do.
//!
//! It says how many steps the run had. A run that is to have more is not complete any more, whatever stands there. It
//! proves nothing: that is the ledger's part.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::error::LedgerError;
use crate::checkpoint::{seal, unseal};
use crate::store::Store;
use crate::types::Step;

/// Where it is, in the run's folder.
pub const COMPLETION_PATH: &str = "complete.json";
/// The format written here.
const FORMAT: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
struct Completion {
    format: u32,
    /// Steps that the run had.
    steps: Step,
    /// The coordinator that says so.
    writer: String,
    /// Seconds since 1970.
    at_unix_s: u64,
}

/// Says that the run of `steps` steps is complete; its ledger is written.
///
/// # Errors
/// That of the store.
pub async fn complete(run: &Store, steps: Step, writer: &str) -> Result<(), LedgerError> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let at_unix_s = now.as_secs();
    let record = Completion { format: FORMAT, steps, writer: writer.to_owned(), at_unix_s };
    let file = seal(&record).map_err(|error| LedgerError::Invalid(error.to_string()))?;
    Ok(run.put(COMPLETION_PATH, file).await?)
}

/// Whether the run of `steps` steps is complete. What stands there and cannot be read says nothing.
///
/// # Errors
/// That of the store.
pub async fn is_complete(run: &Store, steps: Step) -> Result<bool, LedgerError> {
    let file = match run.get_sound(COMPLETION_PATH, |file| unseal(file).is_some()).await {
        Ok(file) => file,
        Err(error) if error.is_not_found() => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    let record = unseal(&file).and_then(|json| serde_json::from_slice::<Completion>(&json).ok());
    Ok(record.is_some_and(|record| record.format == FORMAT && record.steps == steps))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::StoreOptions;

    #[tokio::test]
    async fn a_run_is_complete_for_as_many_steps_as_it_had() {
        let run = Store::open("memory:///", &StoreOptions::default()).unwrap();
        assert!(!is_complete(&run, Step(40)).await.unwrap());
        complete(&run, Step(40), "w").await.unwrap();
        assert!(is_complete(&run, Step(40)).await.unwrap());
        assert!(!is_complete(&run, Step(80)).await.unwrap(), "it is to have more");
        run.put(COMPLETION_PATH, "{".into()).await.unwrap();
        assert!(!is_complete(&run, Step(40)).await.unwrap(), "damage says nothing");
    }
}
