//! NCCL groups, from a shared object that is opened only where there is a GPU.
//!
//! The main binary stays free of CUDA: `libtorch_cuda.so` ([`cuda`]) and `libcpcr_nccl.so` are
//! opened at run time, in this order.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;
use std::time::Duration;
use std::{env, ptr};

use super::{BridgeError, Failure, Group, RawGroup, RawStore, Store, millis, non_null};
use crate::bridge::cuda;

/// Longest message of a failed start.
const MESSAGE_BYTES: usize = 4096;

/// `cpcr_nccl_new` of `src/bridge/nccl/nccl.cpp`.
type New = unsafe extern "C" fn(
    store: *mut RawStore,
    rank: c_int,
    size: c_int,
    timeout_ms: i64,
    device: c_int,
    message: *mut c_char,
    message_bytes: usize,
    out: *mut *mut RawGroup,
) -> c_int;

/// The opened shared object; never closed, CUDA's libraries do not survive that.
#[derive(Clone, Copy)]
pub struct NcclLibrary {
    new: New,
}

impl NcclLibrary {
    /// Opens `libtorch_cuda.so`, then `libcpcr_nccl.so`: the one named by the environment's
    /// `CPCR_NCCL_LIBRARY`, the one beside the executable, or wherever the loader finds it.
    ///
    /// # Errors
    /// With the loader's words when one is missing or does not fit. Asked once a process.
    pub fn open() -> Result<Self, BridgeError> {
        static OPENED: OnceLock<Result<NcclLibrary, BridgeError>> = OnceLock::new();
        OPENED.get_or_init(Self::load).clone()
    }

    fn load() -> Result<Self, BridgeError> {
        cuda::open()?;
        let name = "libcpcr_nccl.so";
        let beside = env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join(name)));
        let path = match (env::var("CPCR_NCCL_LIBRARY"), beside) {
            (Ok(path), _) => path,
            (Err(_), Some(path)) if path.exists() => path.to_string_lossy().into_owned(),
            _ => name.to_owned(),
        };
        let Some(symbol) = cuda::open_library(&path)?.symbol(c"cpcr_nccl_new") else {
            let message = format!("{path} has no cpcr_nccl_new");
            return Err(BridgeError { failure: Failure::Generic, message });
        };
        // SAFETY: the object is built from this repository's source, whose function of this name
        // has this type; it stays loaded for the life of the process.
        let new = unsafe { std::mem::transmute::<*mut c_void, New>(symbol) };
        Ok(Self { new })
    }
}

impl Group {
    /// Joins an NCCL group with the GPU `device`.
    ///
    /// # Errors
    /// When a peer does not come within `timeout`, or NCCL cannot start.
    pub fn nccl(
        library: NcclLibrary,
        store: &Store,
        rank: i32,
        size: i32,
        timeout: Duration,
        device: i32,
    ) -> Result<Self, BridgeError> {
        let mut out = ptr::null_mut();
        let mut message = [0 as c_char; MESSAGE_BYTES];
        // SAFETY: the store lives (the group takes a reference of its own), `message` has the
        // length that is passed and comes back with a zero byte in it; `out` is written only on success.
        let code = unsafe {
            (library.new)(
                store.0.as_ptr(),
                rank,
                size,
                millis(timeout),
                device,
                message.as_mut_ptr(),
                MESSAGE_BYTES,
                &mut out,
            )
        };
        if code != 0 {
            // SAFETY: as above; the buffer began as zeros and C++ leaves its last byte alone.
            let message =
                unsafe { CStr::from_ptr(message.as_ptr()) }.to_string_lossy().into_owned();
            return Err(BridgeError { failure: Failure::of_code(code, &message), message });
        }
        Ok(Self(non_null(out)?))
    }
}
