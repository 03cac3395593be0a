//! The client: blocking, over `std::net`, for c10d's threads.
//!
//! Each request in flight has a connection of its own (idle ones are kept), so a wait never
//! holds up a set. Every call ends: by its timeout plus a grace for the network.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::protocol::{FRAME_BYTES_MAX, Reply, Request};
use super::{KEY_BYTES_MAX, KEYS_PER_REQUEST_MAX, VALUE_BYTES_MAX};
use crate::trust::{BlockingStream, Purpose, Trust};

/// What the network may take beyond the wait itself.
const GRACE: Duration = Duration::from_secs(5);
/// The longest wait.
const WAIT_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// Idle connections kept.
const IDLE_MAX: usize = 8;

/// Why an operation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KvError {
    /// The keys did not appear in time.
    #[error("timed out after {0:?} waiting for a key of the key-value service")]
    Timeout(Duration),
    /// The keys were forgotten: the generation that they belong to is over.
    #[error("the keys were forgotten: their generation is over")]
    Forgotten,
    /// The service cannot be reached, or does not answer.
    #[error("the key-value service at {address} is lost")]
    Lost {
        /// Where it was.
        address: SocketAddr,
        /// What the network said.
        source: io::Error,
    },
    /// The service refused: a limit, or a value that does not fit the operation.
    #[error("the key-value service refused: {0}")]
    Refused(String),
}

/// A client of one service; share it freely.
#[derive(Debug)]
pub struct KvClient {
    address: SocketAddr,
    connect_timeout: Duration,
    trust: Trust,
    idle: Mutex<Vec<BlockingStream>>,
}

impl KvClient {
    /// A client of the service at `address`; connects when first used.
    #[must_use]
    pub fn new(address: SocketAddr, connect_timeout: Duration, trust: Trust) -> Self {
        Self {
            address,
            connect_timeout: connect_timeout.max(Duration::from_millis(1)),
            trust,
            idle: Mutex::default(),
        }
    }

    /// Sets `key`.
    ///
    /// # Errors
    /// [`KvError::Refused`] over a limit; [`KvError::Lost`].
    pub fn set(&self, key: &[u8], value: &[u8]) -> Result<(), KvError> {
        bounded(&[key], &[value])?;
        self.done(&Request::Set { key: key.to_vec(), value: value.to_vec() }, Duration::ZERO)
    }

    /// The value of `key`, waiting for it up to `timeout`.
    ///
    /// # Errors
    /// [`KvError::Timeout`], [`KvError::Forgotten`], [`KvError::Lost`].
    pub fn get(&self, key: &[u8], timeout: Duration) -> Result<Vec<u8>, KvError> {
        bounded(&[key], &[])?;
        let request = Request::Get { key: key.to_vec(), timeout_ms: millis(timeout) };
        match self.call(&request, timeout)? {
            Reply::Value(value) => Ok(value),
            other => Err(self.unexpected(other, timeout)),
        }
    }

    /// Waits up to `timeout` until every key is there.
    ///
    /// # Errors
    /// [`KvError::Timeout`], [`KvError::Forgotten`], [`KvError::Lost`].
    pub fn wait(&self, keys: &[&[u8]], timeout: Duration) -> Result<(), KvError> {
        bounded(keys, &[])?;
        self.done(&Request::Wait { keys: owned(keys), timeout_ms: millis(timeout) }, timeout)
    }

    /// Adds to the decimal number at `key` (0 if absent); the sum. Not repeated on a lost answer.
    ///
    /// # Errors
    /// [`KvError::Refused`] if the value is no number; [`KvError::Lost`].
    pub fn add(&self, key: &[u8], delta: i64) -> Result<i64, KvError> {
        bounded(&[key], &[])?;
        self.number(&Request::Add { key: key.to_vec(), delta })
    }

    /// Sets `key` to `desired` if it is `expected` (empty: absent); what it is then.
    ///
    /// # Errors
    /// [`KvError::Refused`] over a limit; [`KvError::Lost`].
    pub fn compare_set(
        &self,
        key: &[u8],
        expected: &[u8],
        desired: &[u8],
    ) -> Result<Vec<u8>, KvError> {
        bounded(&[key], &[expected, desired])?;
        let request = Request::CompareSet {
            key: key.to_vec(),
            expected: expected.to_vec(),
            desired: desired.to_vec(),
        };
        match self.call(&request, Duration::ZERO)? {
            Reply::Value(value) => Ok(value),
            other => Err(self.unexpected(other, Duration::ZERO)),
        }
    }

    /// Whether every key is there now.
    ///
    /// # Errors
    /// [`KvError::Lost`].
    pub fn check(&self, keys: &[&[u8]]) -> Result<bool, KvError> {
        bounded(keys, &[])?;
        Ok(self.number(&Request::Check { keys: owned(keys) })? != 0)
    }

    /// Removes `key`; whether it was there.
    ///
    /// # Errors
    /// [`KvError::Lost`].
    pub fn delete(&self, key: &[u8]) -> Result<bool, KvError> {
        bounded(&[key], &[])?;
        Ok(self.number(&Request::Delete { key: key.to_vec() })? != 0)
    }

    /// How many keys there are, under every prefix.
    ///
    /// # Errors
    /// [`KvError::Lost`].
    pub fn num_keys(&self) -> Result<i64, KvError> {
        self.number(&Request::NumKeys)
    }

    fn done(&self, request: &Request, timeout: Duration) -> Result<(), KvError> {
        match self.call(request, timeout)? {
            Reply::Done => Ok(()),
            other => Err(self.unexpected(other, timeout)),
        }
    }

    fn number(&self, request: &Request) -> Result<i64, KvError> {
        match self.call(request, Duration::ZERO)? {
            Reply::Number(number) => Ok(number),
            other => Err(self.unexpected(other, Duration::ZERO)),
        }
    }

    fn unexpected(&self, reply: Reply, timeout: Duration) -> KvError {
        match reply {
            Reply::TimedOut => KvError::Timeout(timeout),
            Reply::Forgotten => KvError::Forgotten,
            Reply::Refused(why) => KvError::Refused(why),
            Reply::Done | Reply::Value(_) | Reply::Number(_) => self
                .lost(io::Error::new(io::ErrorKind::InvalidData, "an answer to another question")),
        }
    }

    fn lost(&self, source: io::Error) -> KvError {
        KvError::Lost { address: self.address, source }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<BlockingStream>> {
        // Nothing panics while it is held: pushes and pops only.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn call(&self, request: &Request, wait: Duration) -> Result<Reply, KvError> {
        // A connection that fails is dropped, not returned: its next answer would be this one's.
        let kept = self.idle().pop();
        let mut stream = match kept {
            Some(stream) => stream,
            None => self.connect().map_err(|error| self.lost(error))?,
        };
        let reply = exchange(&mut stream, request, wait.min(WAIT_MAX) + GRACE)
            .map_err(|error| self.lost(error))?;
        let mut idle = self.idle();
        if idle.len() < IDLE_MAX {
            idle.push(stream);
        }
        Ok(reply)
    }

    fn connect(&self) -> io::Result<BlockingStream> {
        let dialled = self.trust.dial_blocking(self.address, self.connect_timeout, Purpose::Keys);
        let stream = dialled.map_err(io::Error::other)?;
        stream.socket().set_write_timeout(Some(GRACE))?;
        Ok(stream)
    }
}

fn exchange(stream: &mut BlockingStream, request: &Request, limit: Duration) -> io::Result<Reply> {
    stream.socket().set_read_timeout(Some(limit))?;
    stream.write_all(&request.to_frame())?;
    stream.flush()?;
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > FRAME_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "frame too long"));
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    Reply::from_body(&body)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "malformed reply"))
}

fn owned(keys: &[&[u8]]) -> Vec<Vec<u8>> {
    keys.iter().map(|key| key.to_vec()).collect()
}

fn millis(timeout: Duration) -> u64 {
    u64::try_from(timeout.min(WAIT_MAX).as_millis()).unwrap_or(u64::MAX)
}

/// The server drops who passes its limits: say so before sending.
fn bounded(keys: &[&[u8]], values: &[&[u8]]) -> Result<(), KvError> {
    if keys.len() > KEYS_PER_REQUEST_MAX
        || keys.iter().any(|key| key.len() > KEY_BYTES_MAX)
        || values.iter().any(|value| value.len() > VALUE_BYTES_MAX)
    {
        return Err(KvError::Refused("too many keys, or a key or value too long".into()));
    }
    Ok(())
}
