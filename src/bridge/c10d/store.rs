//! The table of callbacks through which c10d's store asks Rust.
//!
//! Mirrors `store.h`. No panic crosses into C++: each callback catches it and reports a failure.

use std::ffi::{c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use crate::bridge::error::Failure;

/// Why a key-value operation failed, in the bridge's terms.
#[derive(Debug, Clone)]
pub struct StoreError {
    /// The class that the waiting C++ code reports.
    pub failure: Failure,
    /// The message.
    pub message: String,
}

/// What a c10d store needs of whoever keeps the keys. Called from several threads at once.
pub trait Keys: Send + Sync {
    /// Sets `key`.
    ///
    /// # Errors
    /// When the keeper of the keys fails.
    fn set(&self, key: &[u8], value: &[u8]) -> Result<(), StoreError>;
    /// The value of `key`, waiting for it up to `timeout`.
    ///
    /// # Errors
    /// When the key does not appear in time.
    fn get(&self, key: &[u8], timeout: Duration) -> Result<Vec<u8>, StoreError>;
    /// Adds to the decimal number at `key` (0 if there is none) and returns the sum.
    ///
    /// # Errors
    /// When the value is no number.
    fn add(&self, key: &[u8], delta: i64) -> Result<i64, StoreError>;
    /// Sets `key` to `desired` if it is `expected` (empty: absent); returns what it is then.
    ///
    /// # Errors
    /// When the keeper of the keys fails.
    fn compare_set(
        &self,
        key: &[u8],
        expected: &[u8],
        desired: &[u8],
    ) -> Result<Vec<u8>, StoreError>;
    /// Waits until every key is there.
    ///
    /// # Errors
    /// When one does not appear in time.
    fn wait(&self, keys: &[&[u8]], timeout: Duration) -> Result<(), StoreError>;
    /// Whether every key is there now.
    ///
    /// # Errors
    /// When the keeper of the keys fails.
    fn check(&self, keys: &[&[u8]]) -> Result<bool, StoreError>;
    /// Removes `key`; whether it was there.
    ///
    /// # Errors
    /// When the keeper of the keys fails.
    fn remove(&self, key: &[u8]) -> Result<bool, StoreError>;
    /// How many keys there are.
    ///
    /// # Errors
    /// When the keeper of the keys fails.
    fn count(&self) -> Result<i64, StoreError>;
}

#[repr(C)]
pub(super) struct Sink {
    _opaque: [u8; 0],
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Slice {
    data: *const u8,
    len: usize,
}

unsafe extern "C" {
    fn cpcr_sink_value(sink: *mut Sink, data: *const u8, len: usize);
    fn cpcr_sink_error(sink: *mut Sink, data: *const c_char, len: usize);
}

type Context = *mut c_void;

/// `CpcrStoreTable`.
#[repr(C)]
pub(super) struct Table {
    context: Context,
    set: extern "C" fn(Context, Slice, Slice, *mut Sink) -> c_int,
    get: extern "C" fn(Context, Slice, i64, *mut Sink) -> c_int,
    add: extern "C" fn(Context, Slice, i64, *mut i64, *mut Sink) -> c_int,
    compare_set: extern "C" fn(Context, Slice, Slice, Slice, *mut Sink) -> c_int,
    wait: extern "C" fn(Context, *const Slice, usize, i64, *mut Sink) -> c_int,
    check: extern "C" fn(Context, *const Slice, usize, *mut i64, *mut Sink) -> c_int,
    remove: extern "C" fn(Context, Slice, *mut i64, *mut Sink) -> c_int,
    count: extern "C" fn(Context, *mut i64, *mut Sink) -> c_int,
    release: extern "C" fn(Context),
}

impl Table {
    /// A table whose context is a boxed `Arc`, given back by `release`.
    pub(super) fn new(keys: Arc<dyn Keys>) -> Self {
        Self {
            context: Box::into_raw(Box::new(keys)).cast(),
            set,
            get,
            add,
            compare_set,
            wait,
            check,
            remove,
            count,
            release,
        }
    }
}

/// Runs `body` on the keys behind `context`; leaves a failure's message in `sink`.
fn answer(
    context: Context,
    sink: *mut Sink,
    body: impl FnOnce(&dyn Keys) -> Result<(), StoreError>,
) -> c_int {
    // SAFETY: `context` is the box that `Table::new` made, alive until `release`, which C++ calls
    // when the last store is gone; it is only read here, and `Keys` is Sync.
    let keys = unsafe { &*context.cast::<Arc<dyn Keys>>() };
    let result = catch_unwind(AssertUnwindSafe(|| body(&**keys))).unwrap_or_else(|_| {
        Err(StoreError {
            failure: Failure::Generic,
            message: "the key-value client panicked".into(),
        })
    });
    match result {
        Ok(()) => 0,
        Err(error) => {
            let message = error.message.as_bytes();
            // SAFETY: `sink` is alive during the callback; the bytes are copied.
            unsafe { cpcr_sink_error(sink, message.as_ptr().cast(), message.len()) };
            error.failure.code()
        }
    }
}

impl Slice {
    fn bytes<'a>(self) -> &'a [u8] {
        if self.len == 0 {
            return &[];
        }
        // SAFETY: C++ passes a live buffer of `len` bytes that it does not change until the
        // callback returns, and no callback keeps the borrow beyond that.
        unsafe { std::slice::from_raw_parts(self.data, self.len) }
    }
}

fn list<'a>(keys: *const Slice, count: usize) -> Vec<&'a [u8]> {
    if count == 0 {
        return Vec::new();
    }
    // SAFETY: C++ passes `count` slices that live until the callback returns.
    unsafe { std::slice::from_raw_parts(keys, count) }.iter().map(|key| key.bytes()).collect()
}

fn give(sink: *mut Sink, value: &[u8]) {
    // SAFETY: `sink` is alive during the callback; the bytes are copied.
    unsafe { cpcr_sink_value(sink, value.as_ptr(), value.len()) };
}

fn put(place: *mut i64, value: i64) {
    // SAFETY: C++ passes a pointer to a local variable of its own.
    unsafe { place.write(value) };
}

fn duration(timeout_ms: i64) -> Duration {
    // c10d's zero is "no timeout"; the client bounds what it is given.
    if timeout_ms <= 0 { Duration::MAX } else { Duration::from_millis(timeout_ms.unsigned_abs()) }
}

extern "C" fn set(context: Context, key: Slice, value: Slice, sink: *mut Sink) -> c_int {
    answer(context, sink, |keys| keys.set(key.bytes(), value.bytes()))
}

extern "C" fn get(context: Context, key: Slice, timeout_ms: i64, sink: *mut Sink) -> c_int {
    answer(context, sink, |keys| {
        keys.get(key.bytes(), duration(timeout_ms)).map(|value| give(sink, &value))
    })
}

extern "C" fn add(
    context: Context,
    key: Slice,
    delta: i64,
    result: *mut i64,
    sink: *mut Sink,
) -> c_int {
    answer(context, sink, |keys| keys.add(key.bytes(), delta).map(|sum| put(result, sum)))
}

extern "C" fn compare_set(
    context: Context,
    key: Slice,
    expected: Slice,
    desired: Slice,
    sink: *mut Sink,
) -> c_int {
    answer(context, sink, |keys| {
        keys.compare_set(key.bytes(), expected.bytes(), desired.bytes())
            .map(|value| give(sink, &value))
    })
}

extern "C" fn wait(
    context: Context,
    keys: *const Slice,
    count: usize,
    timeout_ms: i64,
    sink: *mut Sink,
) -> c_int {
    answer(context, sink, |store| store.wait(&list(keys, count), duration(timeout_ms)))
}

extern "C" fn check(
    context: Context,
    keys: *const Slice,
    count: usize,
    result: *mut i64,
    sink: *mut Sink,
) -> c_int {
    answer(context, sink, |store| {
        store.check(&list(keys, count)).map(|there| put(result, i64::from(there)))
    })
}

extern "C" fn remove(context: Context, key: Slice, result: *mut i64, sink: *mut Sink) -> c_int {
    answer(context, sink, |keys| keys.remove(key.bytes()).map(|was| put(result, i64::from(was))))
}

extern "C" fn count(context: Context, result: *mut i64, sink: *mut Sink) -> c_int {
    answer(context, sink, |keys| keys.count().map(|number| put(result, number)))
}

extern "C" fn release(context: Context) {
    // SAFETY: the box of `Table::new`, given back once, by the C++ owner's destructor.
    drop(unsafe { Box::from_raw(context.cast::<Arc<dyn Keys>>()) });
}
