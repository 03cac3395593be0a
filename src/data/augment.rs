//! The reference's augmentation of one slice: exact sampling grids, keyed draws.
//!
//! Everything is order 0 (nearest), so pixels are copied and never computed: labels stay labels
//! and results are the same on every machine. The grids are `scipy.ndimage`'s, its habit of
//! reading zero where rounding puts the last sample just outside the image included. What is
//! drawn depends on (seed, the stream's epoch, sample) alone. Where the pixels come from is worked
//! out in `resample`.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::permutation::key_of;
use super::resample::Resampling;
use crate::types::Epoch;

/// Height and width of a slice, in pixels.
pub type Shape = (usize, usize);

/// What is done to a slice before it is brought to the patch size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Augmentation {
    /// Nothing.
    None,
    /// Quarter turns (0..4), then a flip of axis 0 or 1.
    RotFlip {
        /// Quarter turns, counter-clockwise.
        quarter_turns: u8,
        /// 0 flips rows, 1 flips columns.
        flip_axis: u8,
    },
    /// A rotation by whole degrees, zeros outside.
    Rotate {
        /// -20..20.
        degrees: i8,
    },
}

impl Augmentation {
    /// What `sample` gets in `epoch` of its stream: with probability 1/2 a turn and a flip, else
    /// with probability 1/2 a rotation.
    pub fn draw(seed: u64, epoch: Epoch, sample: u64) -> Self {
        const DOMAIN: u64 = 0x0061_7567_6d65_6e74; // "augment"
        let key = [0, 1, 2, 3].map(|word| key_of(&[DOMAIN, seed, epoch.0, sample, word]));
        let mut bytes = [0; 32];
        for (to, word) in bytes.chunks_exact_mut(8).zip(key) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        let mut rng = ChaCha8Rng::from_seed(bytes);
        // Below 2^-31 off uniform: `range` divides no power of two only for the 40 angles.
        let mut below = |range: u64| ((u64::from(rng.next_u32()) * range) >> 32) as u8;
        if below(2) == 1 {
            Self::RotFlip { quarter_turns: below(4), flip_axis: below(2) }
        } else if below(2) == 1 {
            Self::Rotate { degrees: below(40) as i8 - 20 }
        } else {
            Self::None
        }
    }

    /// The slice after this, with its new shape.
    pub fn apply<T: Copy + Default>(self, pixels: &[T], (h, w): Shape) -> (Vec<T>, Shape) {
        let turned = matches!(self, Self::RotFlip { quarter_turns, .. } if quarter_turns % 2 == 1);
        let shape = if turned { (w, h) } else { (h, w) };
        let mut out = Vec::new();
        Resampling::new(self, (h, w), shape).append(pixels, &mut out);
        (out, shape)
    }
}

/// `numpy.flip(numpy.rot90(pixels, quarter_turns), flip_axis)`.
pub fn rot_flip<T: Copy + Default>(
    pixels: &[T],
    shape: Shape,
    quarter_turns: u8,
    flip_axis: u8,
) -> (Vec<T>, Shape) {
    Augmentation::RotFlip { quarter_turns, flip_axis }.apply(pixels, shape)
}

/// `scipy.ndimage.rotate(pixels, degrees, order=0, reshape=False)`.
pub fn rotate<T: Copy + Default>(pixels: &[T], shape: Shape, degrees: i8) -> Vec<T> {
    Augmentation::Rotate { degrees }.apply(pixels, shape).0
}

/// `scipy.ndimage.zoom(pixels, out / in, order=0)`.
pub fn zoom<T: Copy + Default>(pixels: &[T], from: Shape, to: Shape) -> Vec<T> {
    let mut out = Vec::new();
    Resampling::new(Augmentation::None, from, to).append(pixels, &mut out);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_have_the_references_proportions_and_depend_on_every_key() {
        let draw = |epoch, sample| Augmentation::draw(1337, Epoch(epoch), sample);
        let (mut flips, mut turns, mut nothing) = (0, 0, 0);
        for sample in 0..4000 {
            match draw(0, sample) {
                Augmentation::None => nothing += 1,
                Augmentation::RotFlip { quarter_turns, flip_axis } => {
                    assert!(quarter_turns < 4 && flip_axis < 2);
                    flips += 1;
                }
                Augmentation::Rotate { degrees } => {
                    assert!((-20..20).contains(&degrees));
                    turns += 1;
                }
            }
        }
        assert!((1850..2150).contains(&flips), "{flips}");
        assert!((880..1120).contains(&turns), "{turns}");
        assert!((880..1120).contains(&nothing), "{nothing}");
        assert_eq!(draw(1, 2), draw(1, 2));
        assert!((0..50).any(|sample| draw(0, sample) != draw(1, sample)));
        assert!((0..50).any(|sample| draw(0, sample) != Augmentation::draw(1, Epoch(0), sample)));
    }
}
