//! Random draws of the training forward pass, and the perturbations before auxiliary heads.
//!
//! Every draw is a function of a key, never of process state: feature noise and threshold of
//! (seed, step, decoder), the same on all ranks; elementwise dropout of (seed, step, rank).

use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use super::ModelError;
use super::params::uniform_values;
use crate::bridge::ops;

/// Half the width of feature noise: n ~ U(-0.3, 0.3).
const NOISE: f64 = 0.3;
/// The threshold of feature dropout: m ~ U(0.7, 0.9).
const THRESHOLD: (f64, f64) = (0.7, 0.9);

/// Elementwise dropout: in the convolution blocks and before the stride-8 head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dropout {
    /// None: what is multiplied is one.
    Off,
    /// Masks drawn from this key and the place in the network.
    Keyed(u64),
}

impl Dropout {
    /// The key for one place in the network.
    pub(super) fn at(self, place: u64) -> Option<u64> {
        match self {
            Self::Off => None,
            Self::Keyed(key) => Some(key_of("place", &[key, place])),
        }
    }
}

/// Feature noise n of shape `[C, H, W]`, shared over the batch.
#[derive(Debug)]
pub enum Noise {
    /// Drawn when its shape is known.
    Keyed(u64),
    /// Given: for checks against another implementation.
    Given(Tensor),
}

/// The draws of one decoder.
#[derive(Debug)]
pub struct DecoderDraws {
    /// Before the stride-2 head.
    pub noise: Noise,
    /// m of feature dropout, before the stride-4 head.
    pub threshold: f64,
}

/// All draws of one training forward pass.
#[derive(Debug)]
pub struct Draws {
    /// One set per decoder.
    pub decoders: [DecoderDraws; 2],
    /// Elementwise dropout.
    pub dropout: Dropout,
}

impl Draws {
    /// The draws of a step on a rank.
    #[must_use]
    pub fn keyed(seed: u64, step: u64, rank: u64) -> Self {
        let decoder = |d: u64| {
            let key = key_of("feature", &[seed, step, d]);
            let m = uniform_values(key, "threshold", 1, THRESHOLD.0, THRESHOLD.1);
            DecoderDraws { noise: Noise::Keyed(key), threshold: f64::from(m[0]) }
        };
        Self {
            decoders: [decoder(0), decoder(1)],
            dropout: Dropout::Keyed(key_of("dropout", &[seed, step, rank])),
        }
    }
}

/// A 64-bit key from a purpose and numbers.
#[must_use]
pub fn key_of(purpose: &str, numbers: &[u64]) -> u64 {
    let mut hash = Sha256::new();
    hash.update(purpose.as_bytes());
    for n in numbers {
        hash.update(n.to_le_bytes());
    }
    let digest: [u8; 32] = hash.finalize().into();
    digest.iter().take(8).fold(0, |key, &byte| (key << 8) | u64::from(byte))
}

/// y = x n + x, `[N, C, H, W]` with n `[C, H, W]`.
///
/// # Errors
/// Shapes that differ.
pub fn feature_noise(x: &Tensor, noise: &Noise) -> Result<Tensor, ModelError> {
    let n = match noise {
        Noise::Given(n) => n.shallow_clone(),
        Noise::Keyed(key) => {
            let shape = &x.size()[1..];
            let count = shape.iter().product::<i64>() as usize;
            Tensor::f_from_slice(&uniform_values(*key, "noise", count, -NOISE, NOISE))?
                .f_view(shape)?
                .f_to_device(x.device())?
        }
    };
    // [C, H, W] -> [1, C, H, W], in the memory order of x.
    let mut factor = n.f_add_scalar(1.0)?.f_unsqueeze(0)?.f_to_kind(x.f_kind()?)?;
    if ops::is_channels_last(x)? {
        factor = ops::channels_last(&factor)?;
    }
    Ok(x.f_mul(&factor)?)
}

/// Gaussian noise for input images, `[N, C, H, W]`, a key for each of the N: standard deviation `sigma`,
/// clipped at +- `limit`.
///
/// # Errors
/// Where libtorch fails.
pub fn input_noise(
    like: &Tensor,
    keys: &[u64],
    sigma: f64,
    limit: f64,
) -> Result<Tensor, ModelError> {
    let size = like.size();
    let count = size.iter().skip(1).product::<i64>() as usize;
    let mut values = Vec::with_capacity(keys.len() * count);
    for key in keys {
        // Box and Muller: two uniform numbers become two normal ones.
        let u = uniform_values(*key, "input noise", count.next_multiple_of(2), 0.0, 1.0);
        let normal = u.chunks_exact(2).flat_map(|pair| {
            let radius = (-2.0 * f64::from(1.0 - pair[0]).ln()).sqrt();
            let (sin, cos) = (std::f64::consts::TAU * f64::from(pair[1])).sin_cos();
            [radius * cos, radius * sin]
        });
        values.extend(normal.take(count).map(|z| (z * sigma).clamp(-limit, limit) as f32));
    }
    let noise = Tensor::f_from_slice(&values)?.f_view(size.as_slice())?;
    Ok(noise.f_to_device(like.device())?.f_to_kind(like.f_kind()?)?)
}

/// Keeps the places where the mean over channels is below `threshold` times its maximum over the
/// sample; the others become zero. No rescaling.
///
/// # Errors
/// A tensor that is not `[N, C, H, W]`.
pub fn feature_dropout(x: &Tensor, threshold: f64) -> Result<Tensor, ModelError> {
    let mask = tch::no_grad(|| -> Result<Tensor, ModelError> {
        // [N, C, H, W] -> [N, 1, H, W]
        let kind = if x.f_kind()? == Kind::Double { Kind::Double } else { Kind::Float };
        let a = x.f_mean_dim([1i64].as_slice(), true, kind)?;
        // [N, 1, H, W] -> [N, 1, 1, 1]
        let limit = a.f_amax([1i64, 2, 3].as_slice(), true)?.f_mul_scalar(threshold)?;
        Ok(a.f_less_tensor(&limit)?.f_to_kind(x.f_kind()?)?)
    })?;
    Ok(x.f_mul(&mask)?)
}

/// Elementwise dropout with the mask of `key`; none without a key.
pub(super) fn dropout(x: &Tensor, p: f64, key: Option<u64>) -> Result<Tensor, ModelError> {
    let Some(key) = key else { return Ok(x.shallow_clone()) };
    if p <= 0.0 {
        return Ok(x.shallow_clone());
    }
    if x.device() == Device::Cpu {
        return Ok(x.f_mul(&ops::dropout_mask(x, p, key)?)?);
    }
    // On a GPU the generator is seeded for this one draw, which makes it keyed too.
    tch::manual_seed(key as i64);
    Ok(x.f_dropout(p, true)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_shared_where_they_must_be() {
        let (a, b) = (Draws::keyed(1, 2, 0), Draws::keyed(1, 2, 1));
        assert_eq!(a.decoders[0].threshold, b.decoders[0].threshold);
        assert_ne!(a.decoders[0].threshold, a.decoders[1].threshold);
        assert_ne!(a.dropout, b.dropout);
        assert_ne!(a.dropout, Draws::keyed(1, 3, 0).dropout);
        assert!((0.7..=0.9).contains(&a.decoders[1].threshold));
        let x = Tensor::ones([2, 3, 4, 5], (Kind::Float, Device::Cpu));
        let (p, q) = (&a.decoders[0].noise, &b.decoders[0].noise);
        let (y, z) = (feature_noise(&x, p).unwrap(), feature_noise(&x, q).unwrap());
        assert_eq!(y, z);
        assert_eq!(y.get(0), y.get(1));
        assert!((&y - 1.0).abs().max().double_value(&[]) <= 0.3);
        assert_ne!(y, feature_noise(&x, &a.decoders[1].noise).unwrap());
    }

    #[test]
    fn input_noise_is_its_keys_and_normal_up_to_the_limit() {
        let x = Tensor::zeros([2, 1, 101, 99], (Kind::Float, Device::Cpu));
        let noise = input_noise(&x, &[3, 4], 0.1, 0.2).unwrap();
        assert_eq!(noise.get(1), input_noise(&x.narrow(0, 0, 1), &[4], 0.1, 0.2).unwrap().get(0));
        assert_ne!(noise.get(0), noise.get(1));
        let share = |limit: f64| {
            noise.abs().le(limit).to_kind(Kind::Double).mean(Kind::Double).double_value(&[])
        };
        assert_eq!(share(0.2 + 1e-6), 1.0);
        // Within one and just below two standard deviations.
        assert!((share(0.1) - 0.6827).abs() < 0.01, "{}", share(0.1));
        assert!((share(0.1999) - 0.9545).abs() < 0.01, "{}", share(0.1999));
        assert!(noise.mean(Kind::Double).double_value(&[]).abs() < 0.003);
    }

    #[test]
    fn a_mask_is_its_key_and_drops_its_share() {
        let x = Tensor::ones([4, 8, 64, 64], (Kind::Float, Device::Cpu));
        for p in [0.05, 0.5] {
            let y = dropout(&x, p, Some(7)).unwrap();
            assert_eq!(y, dropout(&x, p, Some(7)).unwrap());
            assert_ne!(y, dropout(&x, p, Some(8)).unwrap());
            let dropped = y.eq(0.0).to_kind(Kind::Float).mean(Kind::Float).double_value(&[]);
            assert!((dropped - p).abs() < 0.005, "{dropped} for {p}");
            assert!((y.max().double_value(&[]) - 1.0 / (1.0 - p)).abs() < 1e-6);
        }
        assert_eq!(dropout(&x, 0.5, None).unwrap(), x);
    }
}
