//! The keys and those who wait for them: a plain state machine without sockets or clocks.
//!
//! A waiter is woken by the event it waits for (the last of its keys set, or its prefix
//! forgotten); nobody polls.

use std::collections::HashMap;

use tokio::sync::oneshot;

use super::TOTAL_BYTES_MAX;
use super::protocol::Reply;

/// How a wait ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Woken {
    /// Every key is there.
    Present,
    /// A key's prefix was forgotten.
    Forgotten,
}

struct Waiter {
    keys: Vec<Vec<u8>>,
    wake: oneshot::Sender<Woken>,
}

/// All state of a server.
#[derive(Default)]
pub(super) struct Memory {
    values: HashMap<Vec<u8>, Vec<u8>>,
    bytes: usize,
    waiters: HashMap<u64, Waiter>,
    next_waiter: u64,
}

impl Memory {
    pub(super) fn set(&mut self, key: Vec<u8>, value: Vec<u8>) -> Reply {
        let old = self.values.get(&key).map_or(0, |old| key.len() + old.len());
        let bytes = self.bytes - old + key.len() + value.len();
        if bytes > TOTAL_BYTES_MAX {
            return Reply::Refused(format!(
                "the store would hold more than {TOTAL_BYTES_MAX} bytes"
            ));
        }
        self.bytes = bytes;
        let wakes = self.waiters.values().any(|waiter| waiter.keys.contains(&key));
        self.values.insert(key, value);
        if wakes {
            self.wake_complete();
        }
        Reply::Done
    }

    pub(super) fn get(&self, key: &[u8]) -> Option<&Vec<u8>> {
        self.values.get(key)
    }

    pub(super) fn has_all(&self, keys: &[Vec<u8>]) -> bool {
        keys.iter().all(|key| self.values.contains_key(key))
    }

    pub(super) fn add(&mut self, key: Vec<u8>, delta: i64) -> Reply {
        let old = match self.values.get(&key) {
            None => Some(0),
            Some(text) => std::str::from_utf8(text).ok().and_then(|text| text.parse::<i64>().ok()),
        };
        let Some(sum) = old.and_then(|old| old.checked_add(delta)) else {
            return Reply::Refused("add to a value that is no number, or past its range".into());
        };
        match self.set(key, sum.to_string().into_bytes()) {
            Reply::Done => Reply::Number(sum),
            refused => refused,
        }
    }

    /// c10d's rule: an absent key is set if `expected` is empty; the answer is the value then.
    pub(super) fn compare_set(
        &mut self,
        key: Vec<u8>,
        expected: Vec<u8>,
        desired: Vec<u8>,
    ) -> Reply {
        let matches = match self.values.get(&key) {
            None if expected.is_empty() => true,
            None => return Reply::Value(expected),
            Some(value) => *value == expected,
        };
        if !matches {
            return Reply::Value(self.values.get(&key).cloned().unwrap_or_default());
        }
        match self.set(key, desired.clone()) {
            Reply::Done => Reply::Value(desired),
            refused => refused,
        }
    }

    pub(super) fn delete(&mut self, key: &[u8]) -> bool {
        let old = self.values.remove(key);
        self.bytes -= old.as_ref().map_or(0, |old| key.len() + old.len());
        old.is_some()
    }

    pub(super) fn len(&self) -> usize {
        self.values.len()
    }

    /// Registers a wait for `keys`, of which one is missing.
    pub(super) fn wait(&mut self, keys: Vec<Vec<u8>>) -> (u64, oneshot::Receiver<Woken>) {
        let (wake, woken) = oneshot::channel();
        let id = self.next_waiter;
        self.next_waiter += 1;
        self.waiters.insert(id, Waiter { keys, wake });
        (id, woken)
    }

    /// Drops a wait that timed out or whose client went away.
    pub(super) fn stop_waiting(&mut self, id: u64) {
        self.waiters.remove(&id);
    }

    /// Removes every key under `prefix` and wakes who waits for one.
    pub(super) fn forget(&mut self, prefix: &[u8]) {
        let bytes = &mut self.bytes;
        self.values.retain(|key, value| {
            let keep = !key.starts_with(prefix);
            if !keep {
                *bytes -= key.len() + value.len();
            }
            keep
        });
        self.values.shrink_to_fit();
        let gone = |waiter: &Waiter| waiter.keys.iter().any(|key| key.starts_with(prefix));
        self.wake(Woken::Forgotten, gone);
    }

    fn wake_complete(&mut self) {
        let values = std::mem::take(&mut self.values);
        self.wake(Woken::Present, |waiter| waiter.keys.iter().all(|key| values.contains_key(key)));
        self.values = values;
    }

    fn wake(&mut self, how: Woken, which: impl Fn(&Waiter) -> bool) {
        for (_, waiter) in self.waiters.extract_if(|_, waiter| which(waiter)) {
            if waiter.wake.send(how).is_err() {
                tracing::trace!("a wait ended as its waiter went away");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compare_set_follows_c10d() {
        let mut memory = Memory::default();
        let key = || b"k".to_vec();
        assert_eq!(
            memory.compare_set(key(), b"x".to_vec(), b"1".to_vec()),
            Reply::Value(b"x".to_vec())
        );
        assert_eq!(memory.compare_set(key(), vec![], b"1".to_vec()), Reply::Value(b"1".to_vec()));
        assert_eq!(
            memory.compare_set(key(), b"2".to_vec(), b"3".to_vec()),
            Reply::Value(b"1".to_vec())
        );
        assert_eq!(
            memory.compare_set(key(), b"1".to_vec(), b"3".to_vec()),
            Reply::Value(b"3".to_vec())
        );
    }

    #[test]
    fn forget_frees_the_bytes_of_its_prefix_only_and_wakes_its_waiters() {
        let mut memory = Memory::default();
        memory.set(b"g1/a".to_vec(), vec![0; 100]);
        memory.set(b"g2/a".to_vec(), vec![0; 10]);
        let (_, mut gone) = memory.wait(vec![b"g1/b".to_vec()]);
        let (_, mut stays) = memory.wait(vec![b"g2/b".to_vec()]);
        memory.forget(b"g1/");
        assert_eq!((memory.len(), memory.bytes), (1, 14));
        assert_eq!(gone.try_recv(), Ok(Woken::Forgotten));
        assert!(stays.try_recv().is_err());
        memory.set(b"g2/b".to_vec(), vec![]);
        assert_eq!(stays.try_recv(), Ok(Woken::Present));
        assert!(memory.waiters.is_empty());
    }

    #[test]
    fn a_full_store_refuses_and_keeps_what_it_has() {
        let mut memory = Memory { bytes: TOTAL_BYTES_MAX - 1, ..Memory::default() };
        assert!(matches!(memory.set(b"k".to_vec(), vec![1]), Reply::Refused(_)));
        assert_eq!(memory.len(), 0);
    }

    #[test]
    fn add_counts_and_refuses_what_is_no_number() {
        let mut memory = Memory::default();
        assert_eq!(memory.add(b"n".to_vec(), 2), Reply::Number(2));
        assert_eq!(memory.add(b"n".to_vec(), -5), Reply::Number(-3));
        memory.set(b"n".to_vec(), b"x".to_vec());
        assert!(matches!(memory.add(b"n".to_vec(), 1), Reply::Refused(_)));
    }
}
