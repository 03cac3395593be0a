//! The parameter store: tensors in the reference's order, under the reference's names.
//!
//! Not a layer library: layers hold handles to the tensors kept here, so that importing a state
//! writes into the very tensors the layers use. Values are initialised as PyTorch does by
//! default, from a seed and the parameter's own name: adding a layer changes no other.

use std::collections::HashMap;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use super::ModelError;
use super::blocks::Layout;
use crate::bridge::ops;

/// What a stored tensor is to training.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Trained by gradients.
    Parameter,
    /// Running statistics and counters.
    Buffer,
}

/// A tensor as bytes: little-endian, row-major, dtype by its safetensors name (`F32`, `F64`, `I64`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostTensor {
    /// The state-dict name.
    pub name: String,
    /// `F32`, `F64` or `I64`.
    pub dtype: String,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// The elements.
    pub bytes: Vec<u8>,
}

#[derive(Debug)]
struct Entry {
    name: String,
    tensor: Tensor,
    role: Role,
}

/// Named tensors in order.
#[derive(Debug)]
pub struct Params {
    entries: Vec<Entry>,
    index: HashMap<String, usize>,
    device: Device,
    layout: Layout,
    kind: Kind,
    seed: u64,
}

impl Params {
    /// An empty store whose tensors, of type `kind`, are drawn from `seed`.
    #[must_use]
    pub fn new(device: Device, layout: Layout, kind: Kind, seed: u64) -> Self {
        Self { entries: Vec::new(), index: HashMap::new(), device, layout, kind, seed }
    }

    /// Where the tensors live.
    #[must_use]
    pub fn device(&self) -> Device {
        self.device
    }

    /// Adds a parameter drawn from U(-bound, bound), bound = 1 / sqrt(fan_in): PyTorch's default
    /// for weights and biases of convolutions alike.
    pub(super) fn uniform(
        &mut self,
        name: String,
        shape: &[i64],
        fan_in: i64,
    ) -> Result<Tensor, ModelError> {
        let bound = 1.0 / (fan_in as f64).sqrt();
        let count: i64 = shape.iter().product();
        let values = uniform_values(self.seed, &name, count as usize, -bound, bound);
        let tensor = Tensor::f_from_slice(&values)?.f_view(shape)?.f_to_kind(self.kind)?;
        let tensor = tensor.f_to_device(self.device)?;
        self.add(name, tensor, Role::Parameter)
    }

    /// Adds a vector of `length` equal values.
    pub(super) fn constant(
        &mut self,
        name: String,
        length: i64,
        value: f64,
        role: Role,
    ) -> Result<Tensor, ModelError> {
        let tensor = Tensor::f_full(length, value, (self.kind, self.device))?;
        self.add(name, tensor, role)
    }

    /// Adds an int64 zero: `num_batches_tracked`.
    pub(super) fn counter(&mut self, name: String) -> Result<Tensor, ModelError> {
        let none: [i64; 0] = [];
        let tensor = Tensor::f_zeros(none, (Kind::Int64, Device::Cpu))?;
        self.add(name, tensor, Role::Buffer)
    }

    fn add(&mut self, name: String, tensor: Tensor, role: Role) -> Result<Tensor, ModelError> {
        let mut tensor = tensor;
        if self.layout == Layout::ChannelsLast && tensor.dim() == 4 {
            tensor = ops::channels_last(&tensor)?;
        }
        if role == Role::Parameter {
            tensor = tensor.f_set_requires_grad(true)?;
        }
        let handle = tensor.shallow_clone();
        let earlier = self.index.insert(name.clone(), self.entries.len());
        if earlier.is_some() {
            return Err(ModelError::Input(format!("two tensors are named '{name}'")));
        }
        self.entries.push(Entry { name, tensor, role });
        Ok(handle)
    }

    /// The tensor of that name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.index.get(name).map(|&i| &self.entries[i].tensor)
    }

    /// Parameters in order: what an optimiser and a reducer go over.
    pub fn parameters(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.with_role(Role::Parameter)
    }

    /// Buffers in order.
    pub fn buffers(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.with_role(Role::Buffer)
    }

    /// Parameters and buffers in order.
    pub(super) fn all(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.entries.iter().map(|e| (e.name.as_str(), &e.tensor))
    }

    fn with_role(&self, role: Role) -> impl Iterator<Item = (&str, &Tensor)> {
        self.entries.iter().filter(move |e| e.role == role).map(|e| (e.name.as_str(), &e.tensor))
    }

    /// How many numbers are trained.
    #[must_use]
    pub fn parameter_count(&self) -> usize {
        self.parameters().map(|(_, t)| t.numel()).sum()
    }

    /// The whole state as bytes, in order. The copy is complete when this returns.
    ///
    /// # Errors
    /// Where a tensor cannot be copied to the host.
    pub fn to_host(&self) -> Result<Vec<HostTensor>, ModelError> {
        self.entries.iter().map(|e| to_host(&e.name, &e.tensor)).collect()
    }

    /// Takes over a state: every tensor of this model must be there and fit, and nothing else.
    /// Nothing is changed unless everything fits.
    ///
    /// # Errors
    /// A tensor that is missing, unknown or of another shape or type.
    pub fn load_host(&self, state: &[HostTensor]) -> Result<(), ModelError> {
        let mut pairs = Vec::with_capacity(state.len());
        let mut seen = vec![false; self.entries.len()];
        for host in state {
            let Some(&i) = self.index.get(&host.name) else {
                return Err(ModelError::Unknown(host.name.clone()));
            };
            pairs.push((&self.entries[i].tensor, fitting(host, &self.entries[i].tensor)?));
            seen[i] = true;
        }
        if let Some(missing) = seen.iter().position(|s| !s) {
            return Err(ModelError::Missing(self.entries[missing].name.clone()));
        }
        tch::no_grad(|| {
            for (tensor, value) in pairs {
                tensor.shallow_clone().f_copy_(&value)?;
            }
            Ok(())
        })
    }
}

/// `count` numbers from U(low, high): a function of the seed and the name alone.
pub(super) fn uniform_values(seed: u64, name: &str, count: usize, low: f64, high: f64) -> Vec<f32> {
    let mut hash = Sha256::new();
    hash.update(seed.to_le_bytes());
    hash.update(name.as_bytes());
    let mut rng = ChaCha8Rng::from_seed(hash.finalize().into());
    let unit = 1.0 / f64::from(1u32 << 24);
    (0..count)
        .map(|_| (low + (high - low) * f64::from(rng.next_u32() >> 8) * unit) as f32)
        .collect()
}

/// Copies a tensor to the host as bytes.
pub(super) fn to_host(name: &str, tensor: &Tensor) -> Result<HostTensor, ModelError> {
    let dtype = match tensor.f_kind()? {
        Kind::Float => "F32",
        Kind::Double => "F64",
        Kind::Int64 => "I64",
        other => return Err(ModelError::Input(format!("'{name}' is {other:?}"))),
    };
    let flat = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous()?;
    let mut bytes = vec![0; flat.numel() * flat.f_kind()?.elt_size_in_bytes()];
    flat.f_copy_data_u8(&mut bytes, flat.numel())?;
    let shape = tensor.size().iter().map(|&d| d as usize).collect();
    Ok(HostTensor { name: name.into(), dtype: dtype.into(), shape, bytes })
}

/// The host tensor as one that can be copied into `like`.
pub(super) fn fitting(host: &HostTensor, like: &Tensor) -> Result<Tensor, ModelError> {
    let shape: Vec<i64> = host.shape.iter().map(|&d| d as i64).collect();
    let kind = match host.dtype.as_str() {
        "F32" => Some(Kind::Float),
        "F64" => Some(Kind::Double),
        "I64" => Some(Kind::Int64),
        _ => None,
    };
    let wanted_kind = like.f_kind()?;
    let bytes = like.numel() * wanted_kind.elt_size_in_bytes();
    if kind != Some(wanted_kind) || shape != like.size() || bytes != host.bytes.len() {
        return Err(ModelError::Unfit {
            name: host.name.clone(),
            found: format!("{} {:?} ({} bytes)", host.dtype, host.shape, host.bytes.len()),
            wanted: format!("{wanted_kind:?} {:?}", like.size()),
        });
    }
    Ok(Tensor::f_from_data_size(&host.bytes, &shape, wanted_kind)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_depend_on_seed_and_name_and_fill_the_interval() {
        let a = uniform_values(1, "a", 10_000, -0.5, 0.5);
        assert_eq!(a, uniform_values(1, "a", 10_000, -0.5, 0.5));
        assert_ne!(a, uniform_values(2, "a", 10_000, -0.5, 0.5));
        assert_ne!(a, uniform_values(1, "b", 10_000, -0.5, 0.5));
        let mean = a.iter().sum::<f32>() / a.len() as f32;
        let var = a.iter().map(|v| v * v).sum::<f32>() / a.len() as f32;
        assert!(mean.abs() < 0.01 && (var - 1.0 / 12.0).abs() < 0.003, "{mean} {var}");
        assert!(a.iter().all(|v| (-0.5..=0.5).contains(v)));
    }

    #[test]
    fn a_state_that_does_not_fit_is_refused_and_changes_nothing() {
        let mut params = Params::new(Device::Cpu, Layout::ChannelsLast, Kind::Float, 3);
        let _w = params.uniform("w".into(), &[2, 3, 3, 3], 27).unwrap();
        let _n = params.counter("n".into()).unwrap();
        let good = params.to_host().unwrap();
        params.load_host(&good).unwrap();
        let mut other = good.clone();
        other[0].bytes.fill(0);
        other[1].dtype = "F32".into();
        assert!(matches!(params.load_host(&other), Err(ModelError::Unfit { .. })));
        assert!(matches!(params.load_host(&good[..1]), Err(ModelError::Missing(_))));
        other[1].name = "m".into();
        assert!(matches!(params.load_host(&other), Err(ModelError::Unknown(_))));
        assert_eq!(params.to_host().unwrap(), good);
        other = good.clone();
        other[0].bytes.fill(0);
        params.load_host(&other).unwrap();
        assert_eq!(params.to_host().unwrap(), other);
    }
}
