//! c10d: process groups, asynchronous work and the gradient Reducer, as owned handles.
//!
//! Every handle is freed exactly once, by `Drop`. Blocking calls block the calling thread: keep
//! them off an async executor. Not here: which interface, how long, what an error means.

use std::ffi::{CString, c_char, c_int};
use std::ptr;
use std::sync::Arc;
use std::time::Duration;

use tch::Tensor;

use super::error::{BridgeError, Failure, check};

mod nccl;
mod store;
pub use nccl::NcclLibrary;
pub use store::{Keys, StoreError};

/// A C++ `at::Tensor`, as `Tensor::as_ptr` points to it.
type RawTensor = *const torch_sys::C_tensor;

/// The C++ side's opaque types.
macro_rules! opaque {
    ($($name:ident)*) => { $(
        #[repr(C)]
        struct $name {
            _opaque: [u8; 0],
        }
    )* };
}
opaque!(RawStore RawGroup RawWork RawReducer);

unsafe extern "C" {
    fn cpcr_store_new(
        table: *const store::Table,
        timeout_ms: i64,
        prefix: *const c_char,
        out: *mut *mut RawStore,
    ) -> c_int;
    fn cpcr_store_free(store: *mut RawStore);
    fn cpcr_gloo_new(
        store: *mut RawStore,
        rank: c_int,
        size: c_int,
        timeout_ms: i64,
        address: *const c_char,
        out: *mut *mut RawGroup,
    ) -> c_int;
    fn cpcr_group_abort(group: *mut RawGroup) -> c_int;
    fn cpcr_group_free(group: *mut RawGroup);
    fn cpcr_all_reduce(
        group: *mut RawGroup,
        tensor: RawTensor,
        op: c_int,
        out: *mut *mut RawWork,
    ) -> c_int;
    fn cpcr_broadcast(
        group: *mut RawGroup,
        tensor: RawTensor,
        root: c_int,
        out: *mut *mut RawWork,
    ) -> c_int;
    fn cpcr_all_gather(
        group: *mut RawGroup,
        tensor: RawTensor,
        outputs: *const RawTensor,
        count: usize,
        out: *mut *mut RawWork,
    ) -> c_int;
    fn cpcr_barrier(group: *mut RawGroup, out: *mut *mut RawWork) -> c_int;
    fn cpcr_work_wait(work: *mut RawWork) -> c_int;
    fn cpcr_work_completed(work: *mut RawWork, out: *mut c_int) -> c_int;
    fn cpcr_work_free(work: *mut RawWork);
    fn cpcr_reducer_new(
        group: *mut RawGroup,
        params: *const RawTensor,
        param_count: usize,
        buckets: *const usize,
        sizes: *const usize,
        bucket_count: usize,
        bucket_bytes: i64,
        out: *mut *mut RawReducer,
    ) -> c_int;
    fn cpcr_reducer_prepare(
        reducer: *mut RawReducer,
        outputs: *const RawTensor,
        count: usize,
    ) -> c_int;
    fn cpcr_reducer_free(reducer: *mut RawReducer);
    fn cpcr_clear_gradients(params: *const RawTensor, count: usize) -> c_int;
}

/// How an all-reduce combines; the numbers are c10d's `ReduceOp::RedOpType`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum ReduceOp {
    /// Elementwise sum.
    Sum = 0,
    /// Elementwise product.
    Product = 2,
    /// Elementwise minimum.
    Min = 3,
    /// Elementwise maximum.
    Max = 4,
}

fn text(value: &str) -> Result<CString, BridgeError> {
    CString::new(value).map_err(|_| BridgeError {
        failure: Failure::Generic,
        message: format!("a zero byte in {value:?}"),
    })
}

fn millis(timeout: Duration) -> i64 {
    // Zero would mean "for ever" to c10d.
    i64::try_from(timeout.as_millis()).unwrap_or(i64::MAX).clamp(1, i64::from(i32::MAX))
}

fn pointers(tensors: &[Tensor]) -> Vec<RawTensor> {
    tensors.iter().map(Tensor::as_ptr).collect()
}

/// A c10d store over [`Keys`], under a prefix of its own.
pub struct Store(ptr::NonNull<RawStore>);

// SAFETY: an owned, atomically counted reference; the C++ object is used from any thread by c10d.
unsafe impl Send for Store {}

impl Store {
    /// A store whose keys all begin with `prefix/`; `timeout` bounds its waits.
    ///
    /// # Errors
    /// When `prefix` has a zero byte in it, or memory is out.
    pub fn new(keys: Arc<dyn Keys>, prefix: &str, timeout: Duration) -> Result<Self, BridgeError> {
        let prefix = text(prefix)?;
        let mut out = ptr::null_mut();
        let table = store::Table::new(keys);
        // SAFETY: `table` and `prefix` outlive the call; C++ copies the table and takes its context
        // over. `out` is written only on success.
        check(unsafe { cpcr_store_new(&table, millis(timeout), prefix.as_ptr(), &mut out) })?;
        Ok(Self(non_null(out)?))
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: made by `cpcr_store_new`, freed only here; groups hold references of their own.
        unsafe { cpcr_store_free(self.0.as_ptr()) }
    }
}

fn non_null<T>(pointer: *mut T) -> Result<ptr::NonNull<T>, BridgeError> {
    ptr::NonNull::new(pointer).ok_or_else(|| BridgeError {
        failure: Failure::Generic,
        message: "the bridge made no object".into(),
    })
}

/// One rank's membership in a process group.
pub struct Group(ptr::NonNull<RawGroup>);

// SAFETY: a c10d backend may be used from any thread.
unsafe impl Send for Group {}
// SAFETY: c10d asks for collectives to be *issued* from one thread at a time; issuing is what
// `&self` methods do, and Gloo's queue and NCCL's work list are behind mutexes, so two threads
// get an unspecified order (a mismatch between ranks, caught by the timeout), not a data race.
// `abort` is meant for another thread than the one that waits.
unsafe impl Sync for Group {}

impl Group {
    /// Joins a Gloo group; returns when every rank is connected.
    ///
    /// # Errors
    /// When a peer does not come within `timeout`, or cannot be reached from `address`.
    pub fn gloo(
        store: &Store,
        rank: i32,
        size: i32,
        timeout: Duration,
        address: &str,
    ) -> Result<Self, BridgeError> {
        let address = text(address)?;
        let mut out = ptr::null_mut();
        // SAFETY: the store lives (the group takes a reference of its own), `address` outlives the
        // call, `out` is written only on success.
        check(unsafe {
            cpcr_gloo_new(store.0.as_ptr(), rank, size, millis(timeout), address.as_ptr(), &mut out)
        })?;
        Ok(Self(non_null(out)?))
    }

    /// Fails everything pending in this group; it is useless afterwards.
    ///
    /// # Errors
    /// When the engine refuses.
    pub fn abort(&self) -> Result<(), BridgeError> {
        // SAFETY: the handle is alive; `abort` of a backend may come from any thread.
        check(unsafe { cpcr_group_abort(self.0.as_ptr()) })
    }

    /// Starts an all-reduce of `tensor` in place.
    ///
    /// # Errors
    /// When the engine cannot start it.
    pub fn all_reduce(&self, tensor: &Tensor, op: ReduceOp) -> Result<Work, BridgeError> {
        let mut out = ptr::null_mut();
        // SAFETY: handle and tensor are alive during the call; C++ keeps a reference to the
        // tensor's storage for as long as the work runs.
        check(unsafe { cpcr_all_reduce(self.0.as_ptr(), tensor.as_ptr(), op as c_int, &mut out) })?;
        Ok(Work(non_null(out)?))
    }

    /// Starts a broadcast of `tensor`, in place everywhere but on `root`.
    ///
    /// # Errors
    /// When the engine cannot start it.
    pub fn broadcast(&self, tensor: &Tensor, root: i32) -> Result<Work, BridgeError> {
        let mut out = ptr::null_mut();
        // SAFETY: as in `all_reduce`.
        check(unsafe { cpcr_broadcast(self.0.as_ptr(), tensor.as_ptr(), root, &mut out) })?;
        Ok(Work(non_null(out)?))
    }

    /// Starts to gather every rank's `tensor` into `outputs`, in rank order.
    ///
    /// # Errors
    /// When the engine cannot start it.
    pub fn all_gather(&self, tensor: &Tensor, outputs: &[Tensor]) -> Result<Work, BridgeError> {
        let outputs = pointers(outputs);
        let mut out = ptr::null_mut();
        // SAFETY: as in `all_reduce`; `outputs` is a list of `count` live tensors that C++ copies
        // (by reference count) before it returns.
        check(unsafe {
            cpcr_all_gather(
                self.0.as_ptr(),
                tensor.as_ptr(),
                outputs.as_ptr(),
                outputs.len(),
                &mut out,
            )
        })?;
        Ok(Work(non_null(out)?))
    }

    /// Starts a barrier.
    ///
    /// # Errors
    /// When the engine cannot start it.
    pub fn barrier(&self) -> Result<Work, BridgeError> {
        let mut out = ptr::null_mut();
        // SAFETY: the handle is alive; `out` is written only on success.
        check(unsafe { cpcr_barrier(self.0.as_ptr(), &mut out) })?;
        Ok(Work(non_null(out)?))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // SAFETY: made by a constructor, freed only here.
        unsafe { cpcr_group_free(self.0.as_ptr()) }
    }
}

/// A collective under way.
pub struct Work(ptr::NonNull<RawWork>);

// SAFETY: c10d's Work guards its state by a mutex and may be waited for from any thread.
unsafe impl Send for Work {}

impl Work {
    /// Blocks until it is done (for CUDA tensors: orders the current stream after it).
    ///
    /// # Errors
    /// With the operation's own failure.
    pub fn wait(&self) -> Result<(), BridgeError> {
        // SAFETY: the handle is alive.
        check(unsafe { cpcr_work_wait(self.0.as_ptr()) })
    }

    /// Whether it is over, well or badly.
    ///
    /// # Errors
    /// When the engine cannot tell.
    pub fn is_completed(&self) -> Result<bool, BridgeError> {
        let mut out = 0;
        // SAFETY: the handle is alive, `out` is a valid place.
        check(unsafe { cpcr_work_completed(self.0.as_ptr(), &mut out) })?;
        Ok(out != 0)
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // SAFETY: made by a collective, freed only here; work in flight keeps a reference of its own.
        unsafe { cpcr_work_free(self.0.as_ptr()) }
    }
}

/// c10d's gradient reducer over a list of parameters.
pub struct Reducer(ptr::NonNull<RawReducer>);

// SAFETY: owned; its state is behind a mutex, and autograd may call its hooks from its own threads.
unsafe impl Send for Reducer {}

impl Reducer {
    /// A reducer of `params` in the given buckets of parameter indices.
    ///
    /// # Errors
    /// When buckets and parameters don't fit each other.
    pub fn new(
        group: &Group,
        params: &[Tensor],
        buckets: &[Vec<usize>],
        bucket_bytes: i64,
    ) -> Result<Self, BridgeError> {
        let params = pointers(params);
        let indices: Vec<usize> = buckets.iter().flatten().copied().collect();
        let sizes: Vec<usize> = buckets.iter().map(Vec::len).collect();
        let mut out = ptr::null_mut();
        // SAFETY: every list outlives the call and has the length that is passed with it; `indices`
        // has the sum of `sizes`. C++ copies them; group and tensors are held by reference count.
        check(unsafe {
            cpcr_reducer_new(
                group.0.as_ptr(),
                params.as_ptr(),
                params.len(),
                indices.as_ptr(),
                sizes.as_ptr(),
                sizes.len(),
                bucket_bytes,
                &mut out,
            )
        })?;
        Ok(Self(non_null(out)?))
    }

    /// To be called after forward and before each backward.
    ///
    /// # Errors
    /// When the reduction before is unfinished.
    pub fn prepare_for_backward(&mut self, outputs: &[Tensor]) -> Result<(), BridgeError> {
        let outputs = pointers(outputs);
        // SAFETY: the handle is alive and borrowed alone; `outputs` outlives the call.
        check(unsafe { cpcr_reducer_prepare(self.0.as_ptr(), outputs.as_ptr(), outputs.len()) })
    }
}

impl Drop for Reducer {
    fn drop(&mut self) {
        // SAFETY: made by `cpcr_reducer_new`, freed only here.
        unsafe { cpcr_reducer_free(self.0.as_ptr()) }
    }
}

/// Sets the gradients of `params` to none (tch's `zero_grad` refuses gradients that are views).
///
/// # Errors
/// When a tensor is no leaf.
pub fn clear_gradients(params: &[Tensor]) -> Result<(), BridgeError> {
    let params = pointers(params);
    // SAFETY: `params` is a list of live tensors that outlives the call.
    check(unsafe { cpcr_clear_gradients(params.as_ptr(), params.len()) })
}
