//! TorchScript files from named tensors and source text. What the source says is the caller's.

use std::ffi::{CString, c_char, c_int};
use std::ptr::null_mut;

use tch::Tensor;

use super::{OpError, adopt, check, ffi, pointers};

/// A tensor of a module: its dotted name, itself, and whether it is a buffer.
pub type ScriptTensor<'a> = (&'a str, Tensor, bool);

/// The bytes of a TorchScript file whose module holds `tensors` under their dotted names and has
/// the methods that `source` defines.
///
/// # Errors
/// A source that does not compile, or names that contradict each other.
pub fn script_module(tensors: &[ScriptTensor<'_>], source: &str) -> Result<Vec<u8>, OpError> {
    let op = "script_module";
    let text =
        |text: &str| CString::new(text).map_err(|e| OpError::Failed { op, message: e.to_string() });
    let texts = tensors.iter().map(|(name, _, _)| text(name)).collect::<Result<Vec<_>, _>>()?;
    let names: Vec<*const c_char> = texts.iter().map(|name| name.as_ptr()).collect();
    let handles: Vec<Tensor> = tensors.iter().map(|(_, value, _)| value.shallow_clone()).collect();
    let values = pointers(&handles);
    let are_buffers: Vec<c_int> = tensors.iter().map(|(_, _, is)| c_int::from(*is)).collect();
    let source = text(source)?;
    let mut out: ffi::Out = null_mut();
    // SAFETY: the three arrays have one element for each tensor; names and source end in NUL and,
    // like the tensors, live through the call and are only read; `out` is a valid place for one
    // pointer, written only on success.
    check(op, unsafe {
        ffi::cpcr_ops_script(
            names.as_ptr(),
            values.as_ptr(),
            are_buffers.as_ptr(),
            values.len() as i64,
            source.as_ptr(),
            &raw mut out,
        )
    })?;
    Ok(Vec::<u8>::try_from(&adopt(op, out)?)?)
}
