//! The key-value client as the keeper of a c10d store's keys.

use std::time::Duration;

use crate::bridge::c10d::{Keys, StoreError};
use crate::bridge::error::Failure;
use crate::kv::{KvClient, KvError};

impl From<KvError> for StoreError {
    fn from(error: KvError) -> Self {
        let failure = match &error {
            KvError::Timeout(_) => Failure::Timeout,
            KvError::Forgotten => Failure::Aborted,
            KvError::Lost { .. } => Failure::PeerLost,
            KvError::Refused(_) => Failure::Generic,
        };
        let message = match &error {
            KvError::Lost { source, .. } => format!("{error}: {source}"),
            _ => error.to_string(),
        };
        Self { failure, message }
    }
}

impl Keys for KvClient {
    fn set(&self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        Ok(Self::set(self, key, value)?)
    }

    fn get(&self, key: &[u8], timeout: Duration) -> Result<Vec<u8>, StoreError> {
        Ok(Self::get(self, key, timeout)?)
    }

    fn add(&self, key: &[u8], delta: i64) -> Result<i64, StoreError> {
        Ok(Self::add(self, key, delta)?)
    }

    fn compare_set(
        &self,
        key: &[u8],
        expected: &[u8],
        desired: &[u8],
    ) -> Result<Vec<u8>, StoreError> {
        Ok(Self::compare_set(self, key, expected, desired)?)
    }

    fn wait(&self, keys: &[&[u8]], timeout: Duration) -> Result<(), StoreError> {
        Ok(Self::wait(self, keys, timeout)?)
    }

    fn check(&self, keys: &[&[u8]]) -> Result<bool, StoreError> {
        Ok(Self::check(self, keys)?)
    }

    fn remove(&self, key: &[u8]) -> Result<bool, StoreError> {
        Ok(Self::delete(self, key)?)
    }

    fn count(&self) -> Result<i64, StoreError> {
        Ok(Self::num_keys(self)?)
    }
}
