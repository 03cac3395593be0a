//! The seal of a record in the bucket: JSON that ends in a SHA-256 of itself.
//!
//! One rule for every record and every format: the file's last 64 hexadecimal digits, taken as zeros,
//! hash to themselves. So damage is told from a newer format even by a program that cannot read the
//! latter. It guards against accidents; it is no signature.

use bytes::Bytes;
use serde::Serialize;
use sha2::{Digest, Sha256};

const SEAL_DIGITS: usize = 64;
const SEAL_BEFORE: &str = ",\n  \"sha256\": \"";
const SEAL_AFTER: &str = "\"\n}\n";

/// The bytes of `record`, which must be a struct with fields, the seal as one more. Deterministic.
///
/// # Errors
/// When it cannot be written as JSON.
pub fn seal(record: &impl Serialize) -> Result<Bytes, serde_json::Error> {
    let mut text = serde_json::to_string_pretty(record)?;
    // Without its last brace: the seal becomes the last field.
    text.truncate(text.strip_suffix("\n}").map_or(0, str::len));
    let seal = hash_of_zeroed(text.as_bytes());
    text.push_str(SEAL_BEFORE);
    text.push_str(&seal);
    text.push_str(SEAL_AFTER);
    Ok(Bytes::from(text))
}

/// The record's JSON without its seal; none if the seal is not right.
#[must_use]
pub fn unseal(file: &[u8]) -> Option<Vec<u8>> {
    let rest = file.strip_suffix(SEAL_AFTER.as_bytes())?;
    let (rest, seal) = rest.split_at_checked(rest.len().checked_sub(SEAL_DIGITS)?)?;
    let body = rest.strip_suffix(SEAL_BEFORE.as_bytes())?;
    (hash_of_zeroed(body).as_bytes() == seal).then(|| [body, b"\n}"].concat())
}

fn hash_of_zeroed(body: &[u8]) -> String {
    let mut hash = Sha256::new();
    hash.update(body);
    hash.update(SEAL_BEFORE);
    hash.update("0".repeat(SEAL_DIGITS));
    hash.update(SEAL_AFTER);
    hex::encode(hash.finalize())
}
