//! The joined table against a slow oracle: one operation after the other, pixel by pixel.
//!
//! That each operation is the reference's, `tests/golden_augment.rs` holds.

use proptest::prelude::*;

use super::*;

fn oracle_rot_flip(pixels: &[u32], (h, w): Shape, turns: u8, axis: u8) -> (Vec<u32>, Shape) {
    let (oh, ow) = if turns.is_multiple_of(2) { (h, w) } else { (w, h) };
    let mut out = Vec::new();
    for row in 0..oh {
        for column in 0..ow {
            let (i, j) = if axis == 0 { (oh - 1 - row, column) } else { (row, ow - 1 - column) };
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

fn oracle_rotate(pixels: &[u32], (h, w): Shape, degrees: i8) -> Vec<u32> {
    let (sine, cosine) = sin_cos_degrees(degrees);
    let half = ((h as f64 - 1.0) / 2.0, (w as f64 - 1.0) / 2.0);
    let offset_y = half.0 - (cosine * half.0 + sine * half.1);
    let offset_x = half.1 - (-sine * half.0 + cosine * half.1);
    let mut out = Vec::new();
    for (i, j) in (0..h).flat_map(|i| (0..w).map(move |j| (i as f64, j as f64))) {
        let y = nearest(i * cosine + j * sine + offset_y, h);
        let x = nearest(i * -sine + j * cosine + offset_x, w);
        let at = y.zip(x).map(|(y, x)| y as usize * w + x as usize);
        out.push(at.map_or(0, |at| pixels[at]));
    }
    out
}

fn oracle_zoom(pixels: &[u32], (h, w): Shape, (oh, ow): Shape) -> Vec<u32> {
    let place = |k: usize, from: usize, to: usize| {
        let step = if to > 1 { (from as f64 - 1.0) / (to as f64 - 1.0) } else { 1.0 };
        nearest(k as f64 * step, from)
    };
    let mut out = Vec::new();
    for (i, j) in (0..oh).flat_map(|i| (0..ow).map(move |j| (i, j))) {
        let at = place(i, h, oh).zip(place(j, w, ow));
        out.push(at.map_or(0, |(y, x)| pixels[y as usize * w + x as usize]));
    }
    out
}

fn oracle(augmentation: Augmentation, pixels: &[u32], from: Shape, to: Shape) -> Vec<u32> {
    let (pixels, shape) = match augmentation {
        Augmentation::None => (pixels.to_vec(), from),
        Augmentation::RotFlip { quarter_turns, flip_axis } => {
            oracle_rot_flip(pixels, from, quarter_turns, flip_axis)
        }
        Augmentation::Rotate { degrees } => (oracle_rotate(pixels, from, degrees), from),
    };
    oracle_zoom(&pixels, shape, to)
}

fn augmentations() -> impl Strategy<Value = Augmentation> {
    prop_oneof![
        Just(Augmentation::None),
        (0_u8..4, 0_u8..2).prop_map(|(quarter_turns, flip_axis)| Augmentation::RotFlip {
            quarter_turns,
            flip_axis
        }),
        (-20_i8..20).prop_map(|degrees| Augmentation::Rotate { degrees }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn one_table_does_what_one_operation_after_the_other_does(
        augmentation in augmentations(),
        from in (1_usize..60, 1_usize..60), to in (1_usize..70, 1_usize..70), same in any::<bool>(),
    ) {
        let to = if same { from } else { to };
        // From 1, so that an outside pixel is told from every inside one.
        let pixels: Vec<u32> = (1..=(from.0 * from.1) as u32).collect();
        let mut out = vec![7];
        Resampling::new(augmentation, from, to).append(&pixels, &mut out);
        prop_assert_eq!(&out[1..], oracle(augmentation, &pixels, from, to));
    }
}

/// Rounding puts the last sample of some zooms just outside the slice, and `ndimage` reads zero there.
#[test]
fn a_zoom_whose_last_sample_falls_outside_ends_in_zeros() {
    let short = (2..300).flat_map(|from| (2..300).map(move |to| (from, to)));
    let (from, to) = short.into_iter().find(|(f, t)| zoom_grid(*f, *t).len() < *t).unwrap();
    let pixels = vec![1_u8; from * from];
    let mut out = Vec::new();
    Resampling::new(Augmentation::None, (from, from), (to, to)).append(&pixels, &mut out);
    assert_eq!(out.len(), to * to);
    assert!(out[(to - 1) * to..].iter().all(|pixel| *pixel == 0));
    assert!(out.chunks(to).all(|row| row[to - 1] == 0) && out[0] == 1);
}
