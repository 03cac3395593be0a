//! The blocking client: c10d calls it from its own threads.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::frame::{Frame, answer, body_length, op};

/// Longest wait for a connection, and for an answer beyond what the request itself may take.
const GRACE: Duration = Duration::from_secs(5);
/// Connections kept for the next request.
const IDLE_MAX: usize = 8;

/// Why the service did not do as asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KvError {
    /// A key did not appear in time.
    #[error("no value within {} ms", waited.as_millis())]
    Timeout {
        /// How long was waited.
        waited: Duration,
    },
    /// The service cannot be reached, or broke off.
    #[error("the key-value service at {address} is gone: {source}")]
    Gone {
        /// Where it was.
        address: SocketAddr,
        /// What the socket said.
        source: io::Error,
    },
    /// The service refused the request.
    #[error("the key-value service refused: {0}")]
    Refused(String),
}

/// A client that any number of threads may share.
#[derive(Debug)]
pub struct KvClient {
    address: SocketAddr,
    idle: Mutex<Vec<TcpStream>>,
}

impl KvClient {
    /// A client of the service at `address`. Connects with the first request.
    #[must_use]
    pub fn new(address: SocketAddr) -> Self {
        Self { address, idle: Mutex::new(Vec::new()) }
    }

    /// Sets `key`.
    ///
    /// # Errors
    /// See [`KvError`].
    pub fn set(&self, key: &[u8], value: &[u8]) -> Result<(), KvError> {
        self.ask(&Frame::new(op::SET, &[key, value]), Duration::ZERO).map(|_| ())
    }

    /// The value of `key`, waiting for it.
    ///
    /// # Errors
    /// [`KvError::Timeout`] if it does not appear in time.
    pub fn get(&self, key: &[u8], timeout: Duration) -> Result<Vec<u8>, KvError> {
        let request = Frame::new(op::GET, &[key, &milliseconds(timeout)]);
        self.ask(&request, timeout).map(|reply| reply.field(0).to_vec())
    }

    /// Waits for `key`.
    ///
    /// # Errors
    /// [`KvError::Timeout`] if it does not appear in time.
    pub fn wait(&self, key: &[u8], timeout: Duration) -> Result<(), KvError> {
        self.ask(&Frame::new(op::WAIT, &[key, &milliseconds(timeout)]), timeout).map(|_| ())
    }

    /// Adds to a counter; the result is the sum.
    ///
    /// # Errors
    /// See [`KvError`].
    pub fn add(&self, key: &[u8], by: i64) -> Result<i64, KvError> {
        let request = Frame::new(op::ADD, &[key, &by.to_le_bytes()]);
        self.ask(&request, Duration::ZERO).map(|reply| reply.number(0))
    }

    /// Sets `key` to `desired` if it is `expected` (empty: absent); the result is what it is now.
    ///
    /// # Errors
    /// See [`KvError`].
    pub fn compare_set(
        &self,
        key: &[u8],
        expected: &[u8],
        desired: &[u8],
    ) -> Result<Vec<u8>, KvError> {
        let request = Frame::new(op::COMPARE_SET, &[key, expected, desired]);
        self.ask(&request, Duration::ZERO).map(|reply| reply.field(0).to_vec())
    }

    /// Whether `key` is there.
    ///
    /// # Errors
    /// See [`KvError`].
    pub fn check(&self, key: &[u8]) -> Result<bool, KvError> {
        self.ask(&Frame::new(op::CHECK, &[key]), Duration::ZERO).map(|reply| reply.field(0) == [1])
    }

    /// Removes `key`; the result tells whether it was there.
    ///
    /// # Errors
    /// See [`KvError`].
    pub fn delete(&self, key: &[u8]) -> Result<bool, KvError> {
        self.ask(&Frame::new(op::DELETE, &[key]), Duration::ZERO).map(|reply| reply.field(0) == [1])
    }

    /// How many keys there are.
    ///
    /// # Errors
    /// See [`KvError`].
    pub fn num_keys(&self) -> Result<i64, KvError> {
        self.ask(&Frame::new(op::COUNT, &[]), Duration::ZERO).map(|reply| reply.number(0))
    }

    /// Removes every key that starts with `prefix`: an ended generation's.
    ///
    /// # Errors
    /// See [`KvError`].
    pub fn forget(&self, prefix: &[u8]) -> Result<(), KvError> {
        self.ask(&Frame::new(op::FORGET, &[prefix]), Duration::ZERO).map(|_| ())
    }

    fn ask(&self, request: &Frame, patience: Duration) -> Result<Frame, KvError> {
        let gone = |source| KvError::Gone { address: self.address, source };
        let mut stream = match self.lock().pop() {
            Some(stream) => stream,
            None => TcpStream::connect_timeout(&self.address, GRACE).map_err(gone)?,
        };
        let reply = exchange(&mut stream, request, patience + GRACE).map_err(gone)?;
        let mut idle = self.lock();
        if idle.len() < IDLE_MAX {
            idle.push(stream);
        }
        drop(idle);
        match reply.code {
            answer::OK => Ok(reply),
            answer::TIMEOUT => Err(KvError::Timeout { waited: patience }),
            _ => Err(KvError::Refused(String::from_utf8_lossy(reply.field(0)).into_owned())),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<TcpStream>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn exchange(stream: &mut TcpStream, request: &Frame, timeout: Duration) -> io::Result<Frame> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(GRACE))?;
    stream.write_all(&request.encode())?;
    let mut head = [0; 4];
    stream.read_exact(&mut head)?;
    let mut body = vec![0; body_length(head)?];
    stream.read_exact(&mut body)?;
    Frame::decode(&body)
}

fn milliseconds(duration: Duration) -> [u8; 8] {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::super::KvServer;
    use super::*;

    fn with_server(test: impl FnOnce(&KvClient)) {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let server = runtime.block_on(KvServer::start(([127, 0, 0, 1], 0).into())).unwrap();
        test(&KvClient::new(server.local_addr()));
    }

    #[test]
    fn it_keeps_what_c10d_expects_of_a_store() {
        with_server(|kv| {
            kv.set(b"a", b"1").unwrap();
            assert_eq!(kv.get(b"a", Duration::ZERO).unwrap_or_default(), b"1");
            assert_eq!(kv.add(b"n", 2).unwrap(), 2);
            assert_eq!(kv.add(b"n", -5).unwrap(), -3);
            assert_eq!(kv.get(b"n", GRACE).unwrap(), b"-3");
            assert_eq!(kv.compare_set(b"c", b"", b"x").unwrap(), b"x");
            assert_eq!(kv.compare_set(b"c", b"y", b"z").unwrap(), b"x");
            assert_eq!(kv.compare_set(b"c", b"x", b"z").unwrap(), b"z");
            assert!(kv.check(b"c").unwrap() && !kv.check(b"d").unwrap());
            assert!(kv.delete(b"c").unwrap() && !kv.delete(b"c").unwrap());
            assert_eq!(kv.num_keys().unwrap(), 2);
            kv.forget(b"a").unwrap();
            assert_eq!(kv.num_keys().unwrap(), 1);
        });
    }

    #[test]
    fn a_waiter_is_woken_by_the_change_and_times_out_without_one() {
        with_server(|kv| {
            std::thread::scope(|scope| {
                let waiter = scope.spawn(|| kv.get(b"late", GRACE));
                kv.set(b"other", b"").unwrap();
                kv.set(b"late", b"here").unwrap();
                assert_eq!(waiter.join().unwrap().unwrap(), b"here");
            });
            let error = kv.wait(b"never", Duration::from_millis(30)).unwrap_err();
            assert!(matches!(error, KvError::Timeout { .. }), "{error}");
        });
    }

    #[test]
    fn a_dead_service_is_an_error_that_names_it() {
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let error = KvClient::new(address).set(b"a", b"").unwrap_err();
        assert!(error.to_string().contains(&address.to_string()), "{error}");
    }
}
