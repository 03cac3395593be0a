//! The device a trainer computes on, and how: the one place that turns a backend into hardware.

use tch::{Device, Tensor};

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

/// A tensor of the CPU on `device`; as it is where that is the CPU.
///
/// To a GPU it goes from pinned memory and without waiting, beside what the device is doing; what uses it there
/// is queued behind it. libtorch keeps the pinned memory until the copy is done.
///
/// # Errors
/// libtorch's, such as no memory left.
pub fn send(tensor: Tensor, device: Device) -> Result<Tensor, TrainerError> {
    if !device.is_cuda() || tensor.numel() == 0 {
        return Ok(tensor.f_to_device(device)?);
    }
    let kind = tensor.f_kind()?;
    Ok(tensor.f_pin_memory(device)?.f_to_device_(device, kind, true, false)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn on_the_cpu_nothing_is_copied() {
        let tensor = Tensor::from_slice(&[1.0_f32, 2.0]);
        let pointer = tensor.data_ptr();
        assert_eq!(send(tensor, Device::Cpu).unwrap().data_ptr(), pointer);
    }
}
