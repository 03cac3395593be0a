//! What `RustStore` in `c10d.cpp` calls: one function per operation, over a [`KvClient`].
//!
//! A panic must not cross into C++. None is possible in the bodies below short of a failing
//! allocation, and `extern "C"` aborts the process should one happen after all.

use std::ffi::c_void;
use std::slice;
use std::sync::Arc;
use std::time::Duration;

use crate::collective::kv::{KvClient, KvError};

type Sink = unsafe extern "C" fn(*mut c_void, *const u8, usize);

/// The table that `c10d.cpp` knows as `CpcrKv`.
#[repr(C)]
pub(super) struct Kv {
    context: *mut c_void,
    set: unsafe extern "C" fn(*mut c_void, *const u8, usize, *const u8, usize) -> i32,
    get: unsafe extern "C" fn(*mut c_void, *const u8, usize, i64, Sink, *mut c_void) -> i32,
    wait: unsafe extern "C" fn(*mut c_void, *const u8, usize, i64) -> i32,
    add: unsafe extern "C" fn(*mut c_void, *const u8, usize, i64, *mut i64) -> i32,
    compare_set: unsafe extern "C" fn(
        *mut c_void,
        *const u8,
        usize,
        *const u8,
        usize,
        *const u8,
        usize,
        Sink,
        *mut c_void,
    ) -> i32,
    check: unsafe extern "C" fn(*mut c_void, *const u8, usize, *mut i32) -> i32,
    remove: unsafe extern "C" fn(*mut c_void, *const u8, usize, *mut i32) -> i32,
    count: unsafe extern "C" fn(*mut c_void, *mut i64) -> i32,
    release: unsafe extern "C" fn(*mut c_void),
}

impl Kv {
    /// A table over `client`, whose reference `release` gives back.
    pub(super) fn new(client: Arc<KvClient>) -> Self {
        let context = Arc::into_raw(client).cast_mut().cast();
        Self { context, set, get, wait, add, compare_set, check, remove, count, release }
    }
}

fn code<T>(result: Result<T, KvError>, use_value: impl FnOnce(T)) -> i32 {
    match result {
        Ok(value) => {
            use_value(value);
            0
        }
        Err(KvError::Timeout { .. }) => 2,
        Err(error) => {
            tracing::warn!(%error, "key-value service");
            3
        }
    }
}

/// Borrows the client behind a context.
///
/// # Safety
/// `context` is the pointer of [`Kv::new`] and has not been released.
unsafe fn client<'a>(context: *mut c_void) -> &'a KvClient {
    // SAFETY: by this function's contract it points to a live KvClient, which is Sync.
    unsafe { &*context.cast::<KvClient>() }
}

/// Borrows `length` bytes; an empty C++ container may pass null.
///
/// # Safety
/// `data` points to `length` readable bytes that live through the calling callback.
unsafe fn bytes<'a>(data: *const u8, length: usize) -> &'a [u8] {
    if length == 0 {
        return &[];
    }
    // SAFETY: by this function's contract.
    unsafe { slice::from_raw_parts(data, length) }
}

fn timeout(ms: i64) -> Duration {
    Duration::from_millis(u64::try_from(ms).unwrap_or(0))
}

unsafe extern "C" fn set(c: *mut c_void, k: *const u8, kn: usize, v: *const u8, vn: usize) -> i32 {
    // SAFETY: C++ passes its own context and the data of live std::strings and vectors.
    let (client, key, value) = unsafe { (client(c), bytes(k, kn), bytes(v, vn)) };
    code(client.set(key, value), |()| {})
}

unsafe extern "C" fn get(
    c: *mut c_void,
    k: *const u8,
    kn: usize,
    ms: i64,
    sink: Sink,
    out: *mut c_void,
) -> i32 {
    // SAFETY: as in `set`.
    let (client, key) = unsafe { (client(c), bytes(k, kn)) };
    // SAFETY: `sink` copies the bytes into the vector at `out`, both of which C++ passed for that.
    code(client.get(key, timeout(ms)), |value| unsafe { sink(out, value.as_ptr(), value.len()) })
}

unsafe extern "C" fn wait(c: *mut c_void, k: *const u8, kn: usize, ms: i64) -> i32 {
    // SAFETY: as in `set`.
    let (client, key) = unsafe { (client(c), bytes(k, kn)) };
    code(client.wait(key, timeout(ms)), |()| {})
}

unsafe extern "C" fn add(c: *mut c_void, k: *const u8, kn: usize, by: i64, sum: *mut i64) -> i32 {
    // SAFETY: as in `set`.
    let (client, key) = unsafe { (client(c), bytes(k, kn)) };
    // SAFETY: `sum` is a live int64_t on the caller's stack.
    code(client.add(key, by), |value| unsafe { *sum = value })
}

unsafe extern "C" fn compare_set(
    c: *mut c_void,
    k: *const u8,
    kn: usize,
    e: *const u8,
    en: usize,
    d: *const u8,
    dn: usize,
    sink: Sink,
    out: *mut c_void,
) -> i32 {
    // SAFETY: as in `set`.
    let (client, key) = unsafe { (client(c), bytes(k, kn)) };
    // SAFETY: as in `set`.
    let (expected, desired) = unsafe { (bytes(e, en), bytes(d, dn)) };
    code(client.compare_set(key, expected, desired), |value| {
        // SAFETY: as in `get`.
        unsafe { sink(out, value.as_ptr(), value.len()) }
    })
}

unsafe extern "C" fn check(c: *mut c_void, k: *const u8, kn: usize, present: *mut i32) -> i32 {
    // SAFETY: as in `set`.
    let (client, key) = unsafe { (client(c), bytes(k, kn)) };
    // SAFETY: `present` is a live int32_t on the caller's stack.
    code(client.check(key), |value| unsafe { *present = i32::from(value) })
}

unsafe extern "C" fn remove(c: *mut c_void, k: *const u8, kn: usize, removed: *mut i32) -> i32 {
    // SAFETY: as in `set`.
    let (client, key) = unsafe { (client(c), bytes(k, kn)) };
    // SAFETY: `removed` is a live int32_t on the caller's stack.
    code(client.delete(key), |value| unsafe { *removed = i32::from(value) })
}

unsafe extern "C" fn count(c: *mut c_void, count: *mut i64) -> i32 {
    // SAFETY: C++ passes its own context.
    let client = unsafe { client(c) };
    // SAFETY: `count` is a live int64_t on the caller's stack.
    code(client.num_keys(), |value| unsafe { *count = value })
}

unsafe extern "C" fn release(c: *mut c_void) {
    // SAFETY: `c` came from Arc::into_raw in `Kv::new`; C++ calls this once, when the last store
    // that shares the table is gone.
    drop(unsafe { Arc::from_raw(c.cast_const().cast::<KvClient>()) });
}
