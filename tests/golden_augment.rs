//! Augmentation against arrays that the authors' implementation made, exactly.
//!
//! The arrays lie in `tests/golden/`, or in the folder that `CPCR_GOLDEN_DIR` names.

#![allow(clippy::unwrap_used, reason = "a test that cannot read its input has failed")]

use std::path::PathBuf;

use cpcr::data::augment::{Augmentation, Shape, rot_flip, rotate, zoom};
use safetensors::SafeTensors;

fn golden() -> Vec<u8> {
    let folder = std::env::var_os("CPCR_GOLDEN_DIR").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden"),
        PathBuf::from,
    );
    std::fs::read(folder.join("augment.safetensors")).unwrap()
}

fn floats(tensors: &SafeTensors<'_>, name: &str) -> (Vec<f32>, Shape) {
    let tensor = tensors.tensor(name).unwrap();
    let (words, _) = tensor.data().as_chunks::<4>();
    let shape = (tensor.shape()[0], tensor.shape()[1]);
    (words.iter().map(|word| f32::from_le_bytes(*word)).collect(), shape)
}

fn bytes(tensors: &SafeTensors<'_>, name: &str) -> (Vec<u8>, Shape) {
    let tensor = tensors.tensor(name).unwrap();
    (tensor.data().to_vec(), (tensor.shape()[0], tensor.shape()[1]))
}

#[test]
fn every_golden_array_comes_out_exactly() {
    let file = golden();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let mut checked = 0;
    for name in tensors.names() {
        let parts: Vec<&str> = name.split('.').collect();
        let image = || floats(&tensors, &format!("{}.image", parts[0]));
        match parts[1] {
            "image" | "label" => continue,
            "zoom" => {
                let (expected, to) = floats(&tensors, name);
                let (image, shape) = image();
                assert!(zoom(&image, shape, to) == expected, "{name}");
            }
            "label_zoom_back" => {
                let (_, side) = floats(&tensors, &format!("{}.zoom", parts[0]));
                let (label, shape) = bytes(&tensors, &format!("{}.label", parts[0]));
                let there = zoom(&label, shape, side);
                assert!(zoom(&there, side, shape) == bytes(&tensors, name).0, "{name}");
            }
            "rotate" => {
                let degrees: i8 = parts[2].parse().unwrap();
                let (expected, _) = floats(&tensors, name);
                let (image, shape) = image();
                assert!(rotate(&image, shape, degrees) == expected, "{name}");
                let same = Augmentation::Rotate { degrees }.apply(&image, shape);
                assert!(same == (expected, shape), "{name}");
            }
            "rotflip" => {
                let (turns, axis) = (parts[2].parse().unwrap(), parts[3].parse().unwrap());
                let (image, shape) = image();
                let got = rot_flip(&image, shape, turns, axis);
                assert!(got == floats(&tensors, name), "{name}");
            }
            other => panic!("the golden file has `{other}`, which nothing here checks"),
        }
        checked += 1;
    }
    assert!(checked >= 56, "only {checked} arrays were checked");
}
