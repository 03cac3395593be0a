//! The reference's augmentation of one slice: exact sampling grids, keyed draws.
//!
//! Everything is order 0 (nearest), so pixels are copied and never computed: labels stay labels
//! and results are the same on every machine. The grids are `scipy.ndimage`'s, its habit of
//! reading zero where rounding puts the last sample just outside the image included. What is
//! drawn depends on (seed, the stream's epoch, sample) alone.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::permutation::key_of;
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
    pub fn apply<T: Copy + Default>(self, pixels: &[T], shape: Shape) -> (Vec<T>, Shape) {
        match self {
            Self::None => (pixels.to_vec(), shape),
            Self::RotFlip { quarter_turns, flip_axis } => {
                rot_flip(pixels, shape, quarter_turns, flip_axis)
            }
            Self::Rotate { degrees } => (rotate(pixels, shape, degrees), shape),
        }
    }
}

/// `numpy.flip(numpy.rot90(pixels, quarter_turns), flip_axis)`.
pub fn rot_flip<T: Copy + Default>(
    pixels: &[T],
    (h, w): Shape,
    quarter_turns: u8,
    flip_axis: u8,
) -> (Vec<T>, Shape) {
    let turns = quarter_turns % 4;
    let (oh, ow) = if turns.is_multiple_of(2) { (h, w) } else { (w, h) };
    let mut out = Vec::with_capacity(oh * ow);
    for row in 0..oh {
        for column in 0..ow {
            let (i, j) =
                if flip_axis == 0 { (oh - 1 - row, column) } else { (row, ow - 1 - column) };
            let (y, x) = match turns {
                0 => (i, j),
                1 => (j, w - 1 - i),
                2 => (h - 1 - i, w - 1 - j),
                _ => (h - 1 - j, i),
            };
            out.push(pixels[y * w + x]);
        }
    }
    (out, (oh, ow))
}

/// `scipy.ndimage.rotate(pixels, degrees, order=0, reshape=False)`.
pub fn rotate<T: Copy + Default>(pixels: &[T], (h, w): Shape, degrees: i8) -> Vec<T> {
    let (sine, cosine) = sin_cos_degrees(degrees);
    let half = ((h as f64 - 1.0) / 2.0, (w as f64 - 1.0) / 2.0);
    let offset_y = half.0 - (cosine * half.0 + sine * half.1);
    let offset_x = half.1 - (-sine * half.0 + cosine * half.1);
    let mut out = Vec::with_capacity(h * w);
    for i in 0..h {
        for j in 0..w {
            let (fi, fj) = (i as f64, j as f64);
            let y = nearest(fi * cosine + fj * sine + offset_y, h);
            let x = nearest(fi * -sine + fj * cosine + offset_x, w);
            out.push(match (y, x) {
                (Some(y), Some(x)) => pixels[y * w + x],
                _ => T::default(),
            });
        }
    }
    out
}

/// `scipy.ndimage.zoom(pixels, out / in, order=0)`.
pub fn zoom<T: Copy + Default>(pixels: &[T], (h, w): Shape, (oh, ow): Shape) -> Vec<T> {
    let grid = |from: usize, to: usize| -> Vec<Option<usize>> {
        let step = if to > 1 { (from as f64 - 1.0) / (to as f64 - 1.0) } else { 1.0 };
        (0..to).map(|k| nearest(k as f64 * step, from)).collect()
    };
    let (rows, columns) = (grid(h, oh), grid(w, ow));
    let mut out = Vec::with_capacity(oh * ow);
    for y in &rows {
        for x in &columns {
            out.push(match (y, x) {
                (Some(y), Some(x)) => pixels[y * w + x],
                _ => T::default(),
            });
        }
    }
    out
}

/// `ndimage`'s mode `constant` at order 0: outside `[0, len - 1]` there is nothing.
fn nearest(at: f64, len: usize) -> Option<usize> {
    (at >= 0.0 && at <= len as f64 - 1.0).then(|| (at + 0.5).floor() as usize)
}

/// Cephes' `sindg` and `cosdg` for less than 45 degrees, which is what `scipy.ndimage.rotate`
/// calls: one last bit decides which of two pixels a tie reads.
fn sin_cos_degrees(degrees: i8) -> (f64, f64) {
    const SIN: [f64; 6] = [
        1.589_623_015_722_184_5e-10,
        -2.505_074_776_285_035_4e-8,
        2.755_731_362_138_567_6e-6,
        -1.984_126_982_958_954e-4,
        8.333_333_333_322_118e-3,
        -1.666_666_666_666_663e-1,
    ];
    const COS: [f64; 7] = [
        1.136_781_713_820_445_5e-11,
        -2.087_588_337_576_836_4e-9,
        2.755_731_554_298_166_3e-7,
        -2.480_158_729_361_863e-5,
        1.388_888_888_888_066_7e-3,
        -4.166_666_666_666_664e-2,
        5e-1,
    ];
    let polynomial = |zz: f64, by: &[f64]| by.iter().fold(0.0, |sum, c| sum * zz + c);
    let z = f64::from(degrees.unsigned_abs()) * 1.745_329_251_994_329_6e-2;
    let zz = z * z;
    let sine = z + z * (zz * polynomial(zz, &SIN));
    let cosine = 1.0 - zz * polynomial(zz, &COS);
    (if degrees < 0 { -sine } else { sine }, cosine)
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
