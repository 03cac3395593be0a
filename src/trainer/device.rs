//! The device a trainer computes on, and how: the one place that turns a backend into hardware.

use tch::Device;

use super::TrainerError;
use crate::bridge::{cuda, ops};
use crate::config::Precision;
use crate::types::Backend;

/// The device of a backend, ready for use.
///
/// An agent shows its trainer one GPU (`CUDA_VISIBLE_DEVICES`), so that is always the first.
/// TF32 is on only where the configuration asks for it: libtorch's default is on in convolutions.
///
/// # Errors
/// [`TrainerError::Device`] where libtorch finds no GPU.
pub fn open(backend: Backend, precision: Precision) -> Result<Device, TrainerError> {
    if backend == Backend::Gloo {
        return Ok(Device::Cpu);
    }
    cuda::open().map_err(|error| TrainerError::Device(error.message))?;
    if cuda::device_count() == 0 {
        return Err(TrainerError::Device("libtorch sees no GPU".to_owned()));
    }
    ops::allow_tf32(precision == Precision::Tf32)?;
    Ok(Device::Cuda(0))
}
