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

/// MedPy 0.5.2's `asd` of the five cases from truth to prediction, in voxels and with the spacing
/// below: the file has the other direction only.
const ASD_BACK: [[f64; 2]; 5] = [
    [0.5650604729966379, 1.1780437005406856],
    [4.393652302586294, 10.745563828747654],
    [7.577689967864522, 22.32641426175564],
    [0.0, 0.0],
    [0.0, 0.0],
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
    assert_eq!(cases, ASD_BACK.len(), "the golden file holds other cases");
    for (case, back) in ASD_BACK.into_iter().enumerate() {
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
        let there = [unit.asd, mm.asd].map(Option::unwrap);
        let both = [unit.assd, mm.assd].map(Option::unwrap);
        for ((assd, there), back) in both.into_iter().zip(there).zip(back) {
            let wanted = f64::midpoint(there, back);
            assert!((assd - wanted).abs() <= 1e-9 * wanted.max(1.0), "{assd} is not {wanted}");
        }
    }
}
