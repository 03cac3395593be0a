//! Where each pixel of an augmented and zoomed slice comes from, worked out once for all its channels.
//!
//! Turning, flipping, rotating and zooming copy pixels and compute none, so one after the other they are one
//! table of places, and a slice is read once. The grids are `scipy.ndimage`'s of order 0 (see
//! [`super::augment`], which says what is drawn and is the public way in).

use super::augment::{Augmentation, Shape};

/// A place that no slice has: such a pixel is zero.
const OUTSIDE: u32 = u32::MAX;

/// The way from a slice of one shape to one of another.
#[derive(Debug, Clone)]
pub(crate) struct Resampling {
    from: Shape,
    to: Shape,
    places: Places,
}

/// What is beyond the ends of `ys` and `xs` is outside of the slice.
#[derive(Debug, Clone)]
enum Places {
    /// Pixel (i, j) is the slice's (ys\[i\], xs\[j\]).
    Upright { ys: Vec<u32>, xs: Vec<u32> },
    /// Pixel (i, j) is the slice's (ys\[j\], xs\[i\]): a quarter turn is in it.
    Turned { ys: Vec<u32>, xs: Vec<u32> },
    /// Pixel by pixel, the place in the slice read row by row.
    Each(Vec<u32>),
}

impl Resampling {
    /// `augmentation` of a slice of shape `from`, then a zoom to the shape `to`.
    ///
    /// A slice has less than 2^31 pixels: a shard's have at most 2^26.
    pub(crate) fn new(augmentation: Augmentation, from: Shape, to: Shape) -> Self {
        let places = match augmentation {
            Augmentation::None => turned_and_flipped(0, None, from, to),
            Augmentation::RotFlip { quarter_turns, flip_axis } => {
                turned_and_flipped(quarter_turns % 4, Some(flip_axis), from, to)
            }
            Augmentation::Rotate { degrees } => Places::Each(rotated(degrees, from, to)),
        };
        Self { from, to, places }
    }

    /// Appends what becomes of `pixels` (`from`, row by row) to `out` (`to`, row by row).
    pub(crate) fn append<T: Copy + Default>(&self, pixels: &[T], out: &mut Vec<T>) {
        let (width, (_, out_width)) = (self.from.1, self.to);
        let end = out.len() + self.to.0 * self.to.1;
        out.reserve(end - out.len());
        match &self.places {
            Places::Upright { ys, xs } => {
                let whole = xs.len() == width && xs.iter().zip(0..).all(|(x, at)| *x == at);
                for y in ys {
                    let row = &pixels[*y as usize * width..][..width];
                    if whole {
                        out.extend_from_slice(row);
                    } else {
                        out.extend(xs.iter().map(|x| row[*x as usize]));
                    }
                    out.resize(out.len() + out_width - xs.len(), T::default());
                }
            }
            Places::Turned { ys, xs } => {
                for x in xs {
                    let column = &pixels[*x as usize..];
                    out.extend(ys.iter().map(|y| column[*y as usize * width]));
                    out.resize(out.len() + out_width - ys.len(), T::default());
                }
            }
            Places::Each(places) => out.extend(
                places.iter().map(|at| pixels.get(*at as usize).copied().unwrap_or_default()),
            ),
        }
        out.resize(end, T::default());
    }
}

/// `numpy.flip(numpy.rot90(slice, turns), flip)`, zoomed.
fn turned_and_flipped(turns: u8, flip: Option<u8>, (h, w): Shape, to: Shape) -> Places {
    let upright = turns.is_multiple_of(2);
    let (turned_h, turned_w) = if upright { (h, w) } else { (w, h) };
    let mut rows = zoom_grid(turned_h, to.0);
    let mut columns = zoom_grid(turned_w, to.1);
    let reverse = |places: &mut Vec<u32>, len: usize| {
        for place in places {
            *place = len as u32 - 1 - *place;
        }
    };
    match flip {
        Some(0) => reverse(&mut rows, turned_h),
        Some(_) => reverse(&mut columns, turned_w),
        None => {}
    }
    // Of the turned slice's (i, j): 1 turn is the slice's (j, w-1-i), 2 (h-1-i, w-1-j), 3 (h-1-j, i).
    if matches!(turns, 1 | 2) {
        let places = if upright { &mut columns } else { &mut rows };
        reverse(places, w);
    }
    if matches!(turns, 2 | 3) {
        let places = if upright { &mut rows } else { &mut columns };
        reverse(places, h);
    }
    if upright {
        Places::Upright { ys: rows, xs: columns }
    } else {
        Places::Turned { ys: columns, xs: rows }
    }
}

/// `scipy.ndimage.rotate(slice, degrees, order=0, reshape=False)`, zoomed.
fn rotated(degrees: i8, (h, w): Shape, to: Shape) -> Vec<u32> {
    let (sine, cosine) = sin_cos_degrees(degrees);
    let last = (h as f64 - 1.0, w as f64 - 1.0);
    let half = (last.0 / 2.0, last.1 / 2.0);
    let offset_y = half.0 - (cosine * half.0 + sine * half.1);
    let offset_x = half.1 - (-sine * half.0 + cosine * half.1);
    // The products of a column are the same in every row, to the last bit.
    let columns: Vec<(f64, f64)> = zoom_grid(w, to.1)
        .into_iter()
        .map(|j| (f64::from(j) * sine, f64::from(j) * cosine))
        .collect();
    let mut places = Vec::with_capacity(to.0 * to.1);
    for i in zoom_grid(h, to.0) {
        let (row_y, row_x) = (f64::from(i) * cosine, f64::from(i) * -sine);
        places.extend(columns.iter().map(|(column_y, column_x)| {
            let y = row_y + column_y + offset_y;
            let x = row_x + column_x + offset_x;
            let inside = (y >= 0.0) & (y <= last.0) & (x >= 0.0) & (x <= last.1);
            // Rounded as in `nearest`: towards zero is down, for there is nothing below it.
            let at = ((y + 0.5) as i32).wrapping_mul(w as i32).wrapping_add((x + 0.5) as i32);
            if inside { at as u32 } else { OUTSIDE }
        }));
        places.resize(places.len() + to.1 - columns.len(), OUTSIDE);
    }
    places
}

/// One axis of `scipy.ndimage.zoom(slice, to / from, order=0)`, as far as it stays inside.
fn zoom_grid(from: usize, to: usize) -> Vec<u32> {
    let step = if to > 1 { (from as f64 - 1.0) / (to as f64 - 1.0) } else { 1.0 };
    (0..to).map_while(|k| nearest(k as f64 * step, from)).collect()
}

/// `ndimage`'s mode `constant` at order 0: outside `[0, len - 1]` there is nothing.
fn nearest(at: f64, len: usize) -> Option<u32> {
    (at >= 0.0 && at <= len as f64 - 1.0).then(|| (at + 0.5).floor() as u32)
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
#[path = "resample_tests.rs"]
mod tests;
