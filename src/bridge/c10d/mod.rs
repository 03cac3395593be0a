//! The C entries of `c10d.cpp` and the callbacks it makes, wrapped so that nothing unsafe leaks.
//!
//! Not a public interface: `collective` gives these handles their meaning.
#![allow(unsafe_code)]

mod callbacks;

use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use tch::Tensor;

use crate::collective::CollectiveError;
use crate::collective::kv::KvClient;
use callbacks::Kv;

type Handle = *mut c_void;

unsafe extern "C" {
    fn cpcr_c10d_last_error() -> *const c_char;
    fn cpcr_group_gloo(
        kv: Kv,
        prefix: *const c_char,
        rank: i32,
        world: i32,
        timeout_ms: i64,
        interface: *const c_char,
        out: *mut Handle,
    ) -> i32;
    fn cpcr_group_free(group: Handle) -> i32;
    fn cpcr_all_reduce(group: Handle, tensor: *const c_void, op: i32, out: *mut Handle) -> i32;
    fn cpcr_broadcast(group: Handle, tensor: *const c_void, root: i32, out: *mut Handle) -> i32;
    fn cpcr_all_gather(
        group: Handle,
        outputs: *const *const c_void,
        n: usize,
        input: *const c_void,
        out: *mut Handle,
    ) -> i32;
    fn cpcr_barrier(group: Handle, out: *mut Handle) -> i32;
    fn cpcr_work_wait(work: Handle) -> i32;
    fn cpcr_work_free(work: Handle);
    fn cpcr_reducer_new(
        parameters: *const *const c_void,
        n: usize,
        group: Handle,
        first_bytes: i64,
        bucket_bytes: i64,
        out: *mut Handle,
    ) -> i32;
    fn cpcr_reducer_prepare(reducer: Handle) -> i32;
    fn cpcr_reducer_free(reducer: Handle) -> i32;
}

/// Turns an entry's code into a result.
fn check(code: i32) -> Result<(), CollectiveError> {
    if code == 0 {
        return Ok(());
    }
    // SAFETY: the entry returns this thread's NUL-terminated message, valid until the next failing
    // call on this thread; it is copied here and now.
    let message = unsafe { CStr::from_ptr(cpcr_c10d_last_error()) }.to_string_lossy().into_owned();
    Err(match code {
        2 => CollectiveError::Timeout(message),
        3 => CollectiveError::PeerLost(message),
        4 => CollectiveError::Aborted(message),
        _ => CollectiveError::Engine(message),
    })
}

fn adopt(code: i32, made: Handle) -> Result<NonNull<c_void>, CollectiveError> {
    check(code)?;
    NonNull::new(made).ok_or_else(|| CollectiveError::Engine("no object came back".to_owned()))
}

fn text(value: &str) -> Result<CString, CollectiveError> {
    CString::new(value).map_err(|_| CollectiveError::Engine(format!("'{value}' holds a NUL")))
}

/// A `c10d::ProcessGroup`.
#[derive(Debug)]
pub(crate) struct GroupHandle(NonNull<c_void>);

// SAFETY: c10d::ProcessGroup is an intrusive_ptr with atomic counts, and its collectives may be
// issued from any thread; PyTorch itself does so.
unsafe impl Send for GroupHandle {}
// SAFETY: as above; concurrent collectives on one group are serialised by the queue's own mutex.
unsafe impl Sync for GroupHandle {}

impl GroupHandle {
    pub(crate) fn gloo(
        kv: Arc<KvClient>,
        prefix: &str,
        rank: i32,
        world: i32,
        timeout_ms: i64,
        interface: &str,
    ) -> Result<Self, CollectiveError> {
        let (prefix, interface) = (text(prefix)?, text(interface)?);
        let mut made: Handle = ptr::null_mut();
        // SAFETY: both strings outlive the call; `made` is a valid place to write to; the callback
        // table is passed by value and its context is released by the C++ side exactly once.
        let code = unsafe {
            cpcr_group_gloo(
                Kv::new(kv),
                prefix.as_ptr(),
                rank,
                world,
                timeout_ms,
                interface.as_ptr(),
                &raw mut made,
            )
        };
        adopt(code, made).map(Self)
    }

    pub(crate) fn all_reduce(&self, tensor: &Tensor, op: i32) -> Result<WorkHandle, CollectiveError> {
        let mut made: Handle = ptr::null_mut();
        // SAFETY: the group is alive as long as `self`; `as_ptr` is a live at::Tensor, which the
        // entry copies (a new reference) before it returns.
        let code = unsafe {
            cpcr_all_reduce(self.0.as_ptr(), tensor.as_ptr().cast(), op, &raw mut made)
        };
        adopt(code, made).map(WorkHandle)
    }

    pub(crate) fn broadcast(&self, tensor: &Tensor, root: i32) -> Result<WorkHandle, CollectiveError> {
        let mut made: Handle = ptr::null_mut();
        // SAFETY: as in `all_reduce`.
        let code = unsafe {
            cpcr_broadcast(self.0.as_ptr(), tensor.as_ptr().cast(), root, &raw mut made)
        };
        adopt(code, made).map(WorkHandle)
    }

    pub(crate) fn all_gather(
        &self,
        outputs: &[Tensor],
        input: &Tensor,
    ) -> Result<WorkHandle, CollectiveError> {
        let pointers = pointers(outputs);
        let mut made: Handle = ptr::null_mut();
        // SAFETY: `pointers` holds `len` live tensors, copied by the entry before it returns.
        let code = unsafe {
            cpcr_all_gather(
                self.0.as_ptr(),
                pointers.as_ptr(),
                pointers.len(),
                input.as_ptr().cast(),
                &raw mut made,
            )
        };
        adopt(code, made).map(WorkHandle)
    }

    pub(crate) fn barrier(&self) -> Result<WorkHandle, CollectiveError> {
        let mut made: Handle = ptr::null_mut();
        // SAFETY: the group is alive as long as `self`.
        let code = unsafe { cpcr_barrier(self.0.as_ptr(), &raw mut made) };
        adopt(code, made).map(WorkHandle)
    }
}

impl Drop for GroupHandle {
    fn drop(&mut self) {
        // SAFETY: made by `gloo`, freed once, here; works and reducers hold references of their own.
        if let Err(error) = check(unsafe { cpcr_group_free(self.0.as_ptr()) }) {
            tracing::warn!(%error, "a process group did not end cleanly");
        }
    }
}

/// A `c10d::Work`.
#[derive(Debug)]
pub(crate) struct WorkHandle(NonNull<c_void>);

// SAFETY: c10d::Work may be waited for from any thread; it is never shared.
unsafe impl Send for WorkHandle {}

impl WorkHandle {
    pub(crate) fn wait(&self) -> Result<(), CollectiveError> {
        // SAFETY: the work is alive as long as `self`.
        check(unsafe { cpcr_work_wait(self.0.as_ptr()) })
    }
}

impl Drop for WorkHandle {
    fn drop(&mut self) {
        // SAFETY: made by a collective above, freed once, here.
        unsafe { cpcr_work_free(self.0.as_ptr()) };
    }
}

/// A `c10d::Reducer`.
#[derive(Debug)]
pub(crate) struct ReducerHandle(NonNull<c_void>);

// SAFETY: a Reducer is used by one thread at a time, whichever it is; its own state is guarded by
// its mutex because autograd hooks may run on other threads.
unsafe impl Send for ReducerHandle {}

impl ReducerHandle {
    pub(crate) fn new(
        parameters: &[Tensor],
        group: &GroupHandle,
        first_bytes: i64,
        bucket_bytes: i64,
    ) -> Result<Self, CollectiveError> {
        let pointers = pointers(parameters);
        let mut made: Handle = ptr::null_mut();
        // SAFETY: `pointers` holds `len` live tensors, copied by the entry; the group is alive, and
        // the Reducer takes a reference of its own.
        let code = unsafe {
            cpcr_reducer_new(
                pointers.as_ptr(),
                pointers.len(),
                group.0.as_ptr(),
                first_bytes,
                bucket_bytes,
                &raw mut made,
            )
        };
        adopt(code, made).map(Self)
    }

    pub(crate) fn prepare(&mut self) -> Result<(), CollectiveError> {
        // SAFETY: the reducer is alive as long as `self`.
        check(unsafe { cpcr_reducer_prepare(self.0.as_ptr()) })
    }
}

impl Drop for ReducerHandle {
    fn drop(&mut self) {
        // SAFETY: made by `new`, freed once, here; its destructor removes its autograd hooks.
        if let Err(error) = check(unsafe { cpcr_reducer_free(self.0.as_ptr()) }) {
            tracing::warn!(%error, "a reducer did not end cleanly");
        }
    }
}

/// Borrowed tensor pointers, for entries that take a list.
fn pointers(tensors: &[Tensor]) -> Vec<*const c_void> {
    tensors.iter().map(|t| t.as_ptr().cast()).collect()
}
