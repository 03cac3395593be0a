//! A copy of an ensemble's state, taken between two steps and made into bytes elsewhere.
//!
//! Training waits for one copy of memory: [`Ensemble::copy_state`] copies each tensor as it lies, into host tensors that
//! are used again. What files hold (row-major bytes) is made by [`StateCopy::to_host`], on whatever thread writes them.
//! Not here: files, queues and threads (the `checkpoint` module).

use tch::{Device, Tensor};

use super::ModelError;
use super::ensemble::Ensemble;
use super::params::{HostTensor, to_host};

/// Networks' states and optimisers' states, on the host.
#[derive(Debug, Default)]
pub struct StateCopy {
    state: Vec<Copied>,
    momentum: Vec<Copied>,
}

#[derive(Debug)]
struct Copied {
    name: String,
    tensor: Tensor,
}

impl Copied {
    fn take(name: String, source: &Tensor) -> Result<Self, ModelError> {
        let source = source.detach();
        // What comes from a device is new already.
        let tensor = if source.device() == Device::Cpu {
            let mut tensor = source.f_empty_like()?;
            tensor.f_copy_(&source)?;
            tensor
        } else {
            source.f_to_device(Device::Cpu)?
        };
        Ok(Self { name, tensor })
    }

    /// Whether `source` can be copied here as it lies.
    fn fits(&self, name: &str, source: &Tensor) -> bool {
        self.name == name
            && self.tensor.kind() == source.kind()
            && self.tensor.size() == source.size()
            && self.tensor.stride() == source.stride()
    }
}

fn copy<'a>(
    into: &mut Vec<Copied>,
    tensors: impl Iterator<Item = (String, &'a Tensor)>,
) -> Result<(), ModelError> {
    let mut count = 0;
    for (name, source) in tensors {
        match into.get_mut(count) {
            Some(place) if place.fits(&name, source) => place.tensor.f_copy_(&source.detach())?,
            Some(place) => *place = Copied::take(name, source)?,
            None => into.push(Copied::take(name, source)?),
        }
        count += 1;
    }
    into.truncate(count);
    Ok(())
}

impl Ensemble {
    /// Copies the whole state into `copy`, which is complete when this returns. What `copy` held before gives its
    /// memory where it fits, so that a copy which comes back costs no page faults.
    ///
    /// # Errors
    /// Where a tensor cannot be copied to the host; `copy` is then of no use.
    pub fn copy_state(&self, copy_to: &mut StateCopy) -> Result<(), ModelError> {
        copy(&mut copy_to.state, self.state())?;
        copy(&mut copy_to.momentum, self.momentum())
    }
}

impl StateCopy {
    /// What [`Ensemble::to_host`] and [`Ensemble::momentum_to_host`] would have given when it was taken.
    ///
    /// # Errors
    /// A type of numbers that files do not hold.
    pub fn to_host(&self) -> Result<(Vec<HostTensor>, Vec<HostTensor>), ModelError> {
        let all = |part: &[Copied]| -> Result<Vec<_>, ModelError> {
            part.iter().map(|c| to_host(&c.name, &c.tensor)).collect()
        };
        Ok((all(&self.state)?, all(&self.momentum)?))
    }

    /// Bytes of all tensors together.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let all = self.state.iter().chain(&self.momentum);
        all.map(|c| c.tensor.numel() * c.tensor.kind().elt_size_in_bytes()).sum()
    }
}
