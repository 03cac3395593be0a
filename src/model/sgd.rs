//! SGD with momentum and weight decay, as `torch.optim.SGD` has it, with a state that can be
//! kept: bit for bit the same arithmetic, buffers by parameter name.
//!
//! A parameter without a gradient is left alone entirely: no decay, no buffer.

use std::collections::BTreeMap;

use tch::Tensor;

use super::ModelError;
use super::params::{HostTensor, Params, fitting, to_host};
use crate::bridge::ops;

/// The optimiser.
#[derive(Debug)]
pub struct Sgd {
    /// Learning rate.
    pub lr: f64,
    momentum: f64,
    weight_decay: f64,
    buffers: BTreeMap<String, Tensor>,
}

impl Sgd {
    /// An optimiser without any momentum yet.
    #[must_use]
    pub fn new(lr: f64, momentum: f64, weight_decay: f64) -> Self {
        Self { lr, momentum, weight_decay, buffers: BTreeMap::new() }
    }

    /// One with the same settings and no momentum yet.
    #[must_use]
    pub fn fresh(&self) -> Self {
        Self::new(self.lr, self.momentum, self.weight_decay)
    }

    /// One step over the parameters that have a gradient.
    ///
    /// # Errors
    /// Where libtorch fails; parameters are then in an undefined state between two steps.
    pub fn step(&mut self, params: &Params) -> Result<(), ModelError> {
        // Those with a buffer already, and those whose first step this is.
        let mut known: (Vec<Tensor>, Vec<Tensor>) = (Vec::new(), Vec::new());
        let mut fresh: (Vec<Tensor>, Vec<Tensor>) = (Vec::new(), Vec::new());
        for (name, p) in params.parameters() {
            if !p.f_grad()?.defined() {
                continue;
            }
            if let Some(buffer) = self.buffers.get(name) {
                known.0.push(p.shallow_clone());
                known.1.push(buffer.shallow_clone());
            } else {
                let buffer = p.f_detach()?.f_zeros_like()?;
                fresh.0.push(p.shallow_clone());
                fresh.1.push(buffer.shallow_clone());
                self.buffers.insert(name.to_owned(), buffer);
            }
        }
        let (lr, mu, wd) = (self.lr, self.momentum, self.weight_decay);
        ops::sgd(&known.0, &known.1, lr, mu, wd, false)?;
        ops::sgd(&fresh.0, &fresh.1, lr, mu, wd, true)?;
        Ok(())
    }

    /// The momentum buffers, by parameter name: what a recovery broadcasts.
    pub fn buffers(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.buffers.iter().map(|(name, t)| (name.as_str(), t))
    }

    /// Gives every parameter named a buffer (of zeros where it has none), so that ranks that
    /// joined can receive the others'. A zero buffer is the same as none: momentum times zero
    /// plus the gradient is the gradient.
    ///
    /// # Errors
    /// A name that is no parameter.
    pub fn ensure(&mut self, params: &Params, names: &[String]) -> Result<(), ModelError> {
        for name in names {
            let like = params.get(name).ok_or_else(|| ModelError::Unknown(name.clone()))?;
            if !self.buffers.contains_key(name) {
                self.buffers.insert(name.clone(), like.f_detach()?.f_zeros_like()?);
            }
        }
        Ok(())
    }

    /// The state as bytes, ordered by name; complete when this returns.
    ///
    /// # Errors
    /// Where a tensor cannot be copied to the host.
    pub fn to_host(&self) -> Result<Vec<HostTensor>, ModelError> {
        self.buffers.iter().map(|(name, t)| to_host(name, t)).collect()
    }

    /// Replaces the state. Parameters that are not named have no momentum afterwards.
    ///
    /// # Errors
    /// A buffer whose parameter does not exist or has another shape.
    pub fn load_host(&mut self, params: &Params, state: &[HostTensor]) -> Result<(), ModelError> {
        let mut buffers = BTreeMap::new();
        for host in state {
            let like =
                params.get(&host.name).ok_or_else(|| ModelError::Unknown(host.name.clone()))?;
            let mut buffer = like.f_detach()?.f_zeros_like()?;
            buffer.f_copy_(&fitting(host, like)?)?;
            buffers.insert(host.name.clone(), buffer);
        }
        self.buffers = buffers;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::blocks::Layout;
    use tch::{Device, Kind};

    /// The plain formula, one operation at a time as torch.optim.SGD writes it.
    #[test]
    fn steps_are_the_formula_and_skip_what_has_no_gradient() {
        let mut params = Params::new(Device::Cpu, Layout::Planar, Kind::Float, 1);
        let w = params.uniform("w".into(), &[5, 7], 7).unwrap();
        let idle = params.uniform("idle".into(), &[3], 3).unwrap();
        let idle_before = idle.copy();
        let mut sgd = Sgd::new(0.01, 0.9, 1e-4);
        let (mut p, mut buffer) = (w.detach().copy(), None::<Tensor>);
        for step in 0..4 {
            ops::grads_to_none(&[w.shallow_clone()]).unwrap();
            tch::manual_seed(step);
            let g = Tensor::randn([5, 7], (Kind::Float, Device::Cpu));
            ops::backward(&[&w * 1.0], &[g.shallow_clone()]).unwrap();
            sgd.step(&params).unwrap();
            let d = g.f_add(&(&p * 1e-4)).unwrap();
            let b = buffer.take().map_or_else(|| d.copy(), |b: Tensor| b * 0.9 + &d);
            p -= &b * 0.01;
            buffer = Some(b);
            let off = (w.detach() - &p).abs().max().double_value(&[]);
            assert!(off < 1e-7, "step {step}: {off}");
            // A state that is saved and loaded goes on the same way.
            let saved = sgd.to_host().unwrap();
            assert_eq!(saved.len(), 1);
            sgd = Sgd::new(0.01, 0.9, 1e-4);
            sgd.load_host(&params, &saved).unwrap();
        }
        assert_eq!(idle.detach(), idle_before.detach());
    }
}
