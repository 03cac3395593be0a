//! The ledger in the bucket: claimed, appended to, read. Numbers are only ever created.
//!
//! **Fencing.** A coordinator begins by creating the next number as a *claim*. From then on every number that
//! it finds taken was taken by a coordinator that claimed later: it stops. The newest is obeyed, and what a dead
//! one still had on the wire either came before the claim or fails. `Store::create` knows its own
//! object again when an answer was lost, by the writer's name in it.

use super::error::LedgerError;
use super::record::{FORMAT, Object, object_path, parse_number};
use crate::checkpoint::unseal;
use crate::store::{Created, Store};

/// Claims that may be lost to other coordinators, one after the other.
const CLAIMS_MAX: u32 = 16;

/// The numbers there are, in order.
///
/// # Errors
/// That of the store.
pub async fn numbers(run: &Store) -> Result<Vec<u64>, LedgerError> {
    let objects = run.list("ledger").await?;
    let mut numbers: Vec<u64> =
        objects.iter().filter_map(|object| parse_number(&object.path)).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

/// The object of `number`.
///
/// # Errors
/// [`LedgerError`]; one that is not there is damage.
pub async fn read(run: &Store, number: u64) -> Result<Object, LedgerError> {
    let object = object_path(number);
    match run.get_sound(&object, |file| unseal(file).is_some()).await {
        Ok(file) => Object::decode(number, &file),
        Err(error) if error.is_not_found() => {
            Err(LedgerError::Damaged { object, detail: "it is gone".to_owned() })
        }
        Err(error) => Err(error.into()),
    }
}

/// Makes `writer` the one that writes; the result is the number of its first object.
///
/// # Errors
/// [`LedgerError`]: a newer format, or others that claim all the time.
pub async fn claim(run: &Store, writer: &str) -> Result<u64, LedgerError> {
    let mut number = 0;
    for _ in 0..CLAIMS_MAX {
        let newest = numbers(run).await?.last().copied().unwrap_or(0);
        if newest > 0 {
            match read(run, newest).await {
                // What it says is for the audit: nothing here builds on it.
                Err(error @ LedgerError::Damaged { .. }) => tracing::warn!(run = %run, %error),
                other => drop(other?),
            }
        }
        number = newest + 1;
        let claim = Object {
            format: FORMAT,
            number,
            writer: writer.to_owned(),
            lineage: None,
            opening: None,
            receipts: Vec::new(),
        };
        if run.create(&object_path(number), claim.encode()?).await? == Created::New {
            return Ok(number + 1);
        }
    }
    Err(LedgerError::Fenced { object: object_path(number) })
}

/// Creates `object`.
///
/// # Errors
/// [`LedgerError::Fenced`] if its number is another writer's.
pub async fn create(run: &Store, object: &Object) -> Result<(), LedgerError> {
    let path = object_path(object.number);
    match run.create(&path, object.encode()?).await? {
        Created::New => Ok(()),
        Created::Exists => Err(LedgerError::Fenced { object: path }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::StoreOptions;

    fn memory() -> Store {
        Store::open("memory:///", &StoreOptions::default()).unwrap()
    }

    fn object(number: u64, writer: &str) -> Object {
        Object {
            format: FORMAT,
            number,
            writer: writer.to_owned(),
            lineage: None,
            opening: None,
            receipts: Vec::new(),
        }
    }

    #[tokio::test]
    async fn the_later_claim_wins_and_the_earlier_writer_is_told_at_its_next_object() {
        let run = memory();
        let first = claim(&run, "first").await.unwrap();
        create(&run, &object(first, "first")).await.unwrap();
        create(&run, &object(first, "first")).await.unwrap(); // its own, the answer was lost
        let second = claim(&run, "second").await.unwrap();
        assert_eq!((first, second), (2, 4));
        let error = create(&run, &object(3, "first")).await.unwrap_err();
        assert!(error.to_string().contains("another coordinator serves this run"), "{error}");
        create(&run, &object(4, "second")).await.unwrap();
        assert_eq!(numbers(&run).await.unwrap(), [1, 2, 3, 4]);
    }

    #[tokio::test]
    async fn a_damaged_newest_object_stops_nobody_and_a_newer_format_does() {
        let run = memory();
        run.put("ledger/00000001.json", "{".into()).await.unwrap();
        assert_eq!(claim(&run, "w").await.unwrap(), 3);
        let newer = crate::checkpoint::seal(&serde_json::json!({ "format": 9 })).unwrap();
        run.put("ledger/00000003.json", newer).await.unwrap();
        let error = claim(&run, "v").await.unwrap_err();
        assert!(matches!(error, LedgerError::NewerFormat { found: 9, .. }), "{error}");
        assert!(matches!(read(&run, 7).await, Err(LedgerError::Damaged { .. })));
    }
}
