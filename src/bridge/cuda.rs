//! CUDA's half of libtorch, opened at run time where there is a GPU.
//!
//! The linker leaves `libtorch_cuda.so` out of every binary, so that a process on a CPU starts
//! fast and small. It must be opened before anything asks torch about CUDA: an earlier question
//! caches "no CUDA library" for good. Shared objects opened here are never closed: CUDA's do not
//! survive that.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::OnceLock;

use super::error::{BridgeError, Failure};

unsafe extern "C" {
    fn dlopen(path: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, symbol: *const c_char) -> *mut c_void;
    fn dlerror() -> *const c_char;
}

const RTLD_NOW: c_int = 2;
const RTLD_GLOBAL: c_int = 0x100;

/// Opens the driver's library, then `libtorch_cuda.so`. Asked once a process.
///
/// # Errors
/// With the loader's words when one is missing: no driver, or a libtorch for CPUs only.
pub fn open() -> Result<(), BridgeError> {
    static OPENED: OnceLock<Result<(), BridgeError>> = OnceLock::new();
    OPENED
        .get_or_init(|| {
            // Without a driver libtorch_cuda opens, but nothing works.
            open_library("libcuda.so.1")?;
            open_library("libtorch_cuda.so")?;
            Ok(())
        })
        .clone()
}

/// How many GPUs libtorch can use in this process; 0 where there is no driver or no CUDA set.
#[must_use]
pub fn device_count() -> u32 {
    match open() {
        Ok(()) => u32::try_from(tch::Cuda::device_count()).unwrap_or(0),
        Err(error) => {
            tracing::debug!(%error, "no GPUs");
            0
        }
    }
}

/// Bytes of the current GPU's memory that are in use, by whichever process; none where the driver does not say, or the
/// calling thread has used no GPU.
#[must_use]
pub fn memory_used() -> Option<u64> {
    type MemGetInfo = unsafe extern "C" fn(*mut usize, *mut usize) -> c_int;
    static ASK: OnceLock<Option<MemGetInfo>> = OnceLock::new();
    let ask = ASK.get_or_init(|| {
        let symbol = open_library("libcuda.so.1").ok()?.symbol(c"cuMemGetInfo_v2")?;
        // SAFETY: that is the driver's function of this signature, stable since CUDA 3.2; its library stays open.
        Some(unsafe { std::mem::transmute::<*mut c_void, MemGetInfo>(symbol) })
    });
    let (mut free, mut total) = (0_usize, 0_usize);
    // SAFETY: both pointers are valid for the call; without a context it answers with an error.
    let status = unsafe { (*ask)?(&raw mut free, &raw mut total) };
    (status == 0).then(|| total.saturating_sub(free) as u64)
}

/// A shared object that stays open.
#[derive(Clone, Copy)]
pub(super) struct Library(*mut c_void);

pub(super) fn open_library(path: &str) -> Result<Library, BridgeError> {
    let name = CString::new(path).map_err(|_| failed(format!("a zero byte in {path:?}")))?;
    // SAFETY: the name outlives the call. Running the library's initialisers is what is asked for.
    let library = unsafe { dlopen(name.as_ptr(), RTLD_NOW | RTLD_GLOBAL) };
    if !library.is_null() {
        return Ok(Library(library));
    }
    // SAFETY: after a failed dlopen on this thread dlerror gives a string, valid until the
    // thread's next dl call; null is checked.
    let message = unsafe {
        let message = dlerror();
        if message.is_null() {
            format!("open {path}")
        } else {
            CStr::from_ptr(message).to_string_lossy().into_owned()
        }
    };
    Err(failed(message))
}

impl Library {
    /// The address of a symbol; none where the object lacks it.
    pub(super) fn symbol(self, name: &CStr) -> Option<*mut c_void> {
        // SAFETY: the object is open for good, the name ends in a zero byte.
        let symbol = unsafe { dlsym(self.0, name.as_ptr()) };
        (!symbol.is_null()).then_some(symbol)
    }
}

fn failed(message: String) -> BridgeError {
    BridgeError { failure: Failure::Generic, message }
}
