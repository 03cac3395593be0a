//! The scores against those that MedPy computed, to 1e-9.
//!
//! The file is read from `CPCR_GOLDEN_DIR` if that is set, else from `tests/golden`.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests: clippy only spares the tests

use std::path::PathBuf;

use cpcr::eval::{EmptyPolicy, score_masks};
use safetensors::SafeTensors;

fn numbers(file: &SafeTensors<'_>, name: &str) -> Vec<f64> {
    let view = file.tensor(name).unwrap();
    view.data().chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
}

fn mask(file: &SafeTensors<'_>, name: &str) -> (Vec<bool>, [usize; 3]) {
    let view = file.tensor(name).unwrap();
    let mask = view.data().iter().map(|b| *b != 0).collect();
    (mask, view.shape().try_into().unwrap())
}

/// MedPy 0.5.2's `assd` of the five cases, in voxels and with the spacing below. The file has no ASSD.
const ASSD: [[f64; 2]; 5] = [
    [0.7010665576846925, 1.3456758581321875],
    [3.445695800724429, 8.443232977963412],
    [7.493068683780981, 22.133583195540396],
    [0.0, 0.0],
    [5.489159664264888, 9.656031261986874],
];

#[test]
fn scores_agree_with_medpy() {
    let folder = std::env::var_os("CPCR_GOLDEN_DIR").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden"),
        PathBuf::from,
    );
    let bytes = std::fs::read(folder.join("metrics.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let cases = file.names().iter().filter(|name| name.ends_with(".pred")).count();
    assert!(cases > 0, "the golden file holds no case");
    for case in 0..cases {
        let (pred, shape) = mask(&file, &format!("{case}.pred"));
        let (gt, _) = mask(&file, &format!("{case}.gt"));
        let close = |name: &str, ours: &[Option<f64>]| {
            let theirs = numbers(&file, name);
            assert_eq!(ours.len(), theirs.len());
            for (a, b) in ours.iter().map(|v| v.unwrap()).zip(theirs) {
                assert!((a - b).abs() <= 1e-9 * b.abs().max(1.0), "{name}: {a} is not {b}");
            }
        };
        let unit = score_masks(&pred, &gt, shape, [1.0; 3], EmptyPolicy::Refuse).unwrap();
        close(&format!("{case}.dc_jc_hd95_asd"), &[unit.dice, unit.jaccard, unit.hd95, unit.asd]);
        let mm = score_masks(&pred, &gt, shape, [10.0, 1.25, 1.25], EmptyPolicy::Refuse).unwrap();
        close(&format!("{case}.hd95_asd_spacing_10_1.25_1.25"), &[mm.hd95, mm.asd]);
        for (ours, theirs) in [unit.assd, mm.assd].into_iter().zip(ASSD[case]) {
            let ours = ours.unwrap();
            assert!((ours - theirs).abs() <= 1e-9 * theirs.max(1.0), "{ours} is not {theirs}");
        }
    }
}
