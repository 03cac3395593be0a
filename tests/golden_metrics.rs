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

#[test]
fn scores_agree_with_medpy() {
    let folder = std::env::var_os("CPCR_GOLDEN_DIR").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden"),
        PathBuf::from,
    );
    let bytes = std::fs::read(folder.join("metrics.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let cases = file.names().iter().filter(|name| name.ends_with(".pred")).count();
    assert!(cases > 0, "the golden file holds no cases");
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
        // The file has no ASSD: it lies between the ASDs of both directions, and has none itself.
        let back = score_masks(&gt, &pred, shape, [1.0; 3], EmptyPolicy::Refuse).unwrap();
        let [there, back_asd, assd] = [unit.asd, back.asd, unit.assd].map(Option::unwrap);
        assert!(there.min(back_asd) <= assd && assd <= there.max(back_asd), "{assd}");
        assert!((assd - back.assd.unwrap()).abs() <= 1e-12 * assd.max(1.0));
    }
}
