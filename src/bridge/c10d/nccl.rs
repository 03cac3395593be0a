//! NCCL groups, from a shared object that is opened only where there is a GPU.
//!
//! The main binary stays free of CUDA: `libtorch_cuda.so` and `libcpcr_nccl.so` are opened at
//! run time, in this order, before anything asks torch about CUDA (an earlier question would
//! cache "no CUDA library").

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::OnceLock;
use std::time::Duration;
use std::{env, ptr};

use super::{BridgeError, Failure, Group, RawGroup, RawStore, Store, millis, non_null};

unsafe extern "C" {
    fn dlopen(path: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, symbol: *const c_char) -> *mut c_void;
    fn dlerror() -> *const c_char;
}

const RTLD_NOW: c_int = 2;
const RTLD_GLOBAL: c_int = 0x100;
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
        // Without a driver libtorch_cuda opens, but nothing works.
        open("libcuda.so.1")?;
        open("libtorch_cuda.so")?;
        let name = "libcpcr_nccl.so";
        let beside = env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join(name)));
        let path = match (env::var("CPCR_NCCL_LIBRARY"), beside) {
            (Ok(path), _) => path,
            (Err(_), Some(path)) if path.exists() => path.to_string_lossy().into_owned(),
            _ => name.to_owned(),
        };
        let library = open(&path)?;
        // SAFETY: `library` is open for good, the symbol's name ends in a zero byte.
        let symbol = unsafe { dlsym(library, c"cpcr_nccl_new".as_ptr()) };
        if symbol.is_null() {
            return Err(failed(format!("{path} has no cpcr_nccl_new")));
        }
        // SAFETY: the object is built from this repository's source, whose function of this name
        // has this type; it stays loaded for the life of the process.
        let new = unsafe { std::mem::transmute::<*mut c_void, New>(symbol) };
        Ok(Self { new })
    }
}

fn failed(message: String) -> BridgeError {
    BridgeError { failure: Failure::Generic, message }
}

fn open(path: &str) -> Result<*mut c_void, BridgeError> {
    let name = CString::new(path).map_err(|_| failed(format!("a zero byte in {path:?}")))?;
    // SAFETY: the name outlives the call. Running the library's initialisers is what is asked for.
    let library = unsafe { dlopen(name.as_ptr(), RTLD_NOW | RTLD_GLOBAL) };
    if !library.is_null() {
        return Ok(library);
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
