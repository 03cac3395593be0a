//! The same numbers at any number of workers: whole runs of 10 steps on 1 to 5 workers, which see
//! the same global batches, agree to rounding, in float64 and in float32.
//!
//! Elementwise dropout is off: its draws are a rank's own. Batches of 3 + 4 samples divide among no
//! number of workers but one, and with 5 of them some have no labelled sample.

// The lint's exception for tests stops at their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::{Dtype, SafeTensors};
use support::{checkpoint_file, dataset, launch, succeed};

const STEPS: u64 = 10;

/// What a run left: losses by step and name, and every number of the model.
struct Left {
    losses: BTreeMap<(u64, String), f64>,
    model: Vec<f64>,
}

fn run(folder: &Path, data: &Path, nodes: u32, precision: &str, set: &[&str]) -> Left {
    let name = format!("{precision}-{nodes}-{}", set.concat());
    let precision = format!("train.precision={precision}");
    let always = [
        "train.iterations=10",
        "batch.labelled=3",
        "batch.unlabelled=4",
        "model.dropout=[0.0, 0.0, 0.0, 0.0, 0.0]",
        "model.aux_dropout=0.0",
        "model.sync_batch_norm=true",
        &precision,
    ];
    let set: Vec<&str> = always.iter().chain(set).copied().collect();
    succeed(&launch(folder, data, &name, nodes, &set).output().unwrap());
    let run = folder.join(name);
    let state = std::fs::read(checkpoint_file(&run, STEPS, "state.json")).unwrap();
    let state: serde_json::Value = serde_json::from_slice(&state).unwrap();
    let mut losses = BTreeMap::new();
    for line in state["history"].as_str().unwrap().lines() {
        let record: serde_json::Value = serde_json::from_str(line).unwrap();
        let Some(terms) = record["losses"].as_object() else { continue };
        for (name, value) in terms {
            losses
                .insert((record["step"].as_u64().unwrap(), name.clone()), value.as_f64().unwrap());
        }
    }
    let model = std::fs::read(checkpoint_file(&run, STEPS, "model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&model).unwrap();
    let mut names = tensors.names();
    names.sort();
    let model = names.iter().flat_map(|name| numbers(&tensors.tensor(name).unwrap())).collect();
    Left { losses, model }
}

fn numbers(tensor: &safetensors::tensor::TensorView) -> Vec<f64> {
    let bytes = tensor.data();
    match tensor.dtype() {
        Dtype::F32 => {
            bytes.chunks(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect()
        }
        Dtype::F64 => bytes.chunks(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect(),
        Dtype::I64 => {
            bytes.chunks(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f64).collect()
        }
        other => panic!("{other:?}"),
    }
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|v| v * v).sum::<f64>().sqrt()
}

/// Largest relative difference of a loss term by name, and that of the models by norm.
fn apart(a: &Left, b: &Left) -> (BTreeMap<String, f64>, f64) {
    assert_eq!(a.losses.len(), 6 * STEPS as usize);
    assert_eq!(a.model.len(), b.model.len());
    let mut terms = BTreeMap::new();
    for (key, x) in &a.losses {
        let y = b.losses[key];
        let off = if *x == y { 0.0 } else { (x - y).abs() / x.abs() };
        let worst: &mut f64 = terms.entry(key.1.clone()).or_default();
        *worst = if off > *worst || off.is_nan() { off } else { *worst };
    }
    let difference = norm(a.model.iter().zip(&b.model).map(|(x, y)| x - y));
    (terms, difference / norm(a.model.iter().copied()))
}

#[test]
fn one_to_five_workers_agree() {
    let folder = tempfile::tempdir().unwrap();
    let data = dataset(folder.path());
    // Precision, and what total, terms and weights may differ by.
    for (precision, total_max, term_max, model_max) in
        [("f64", 1e-10, 1e-10, 1e-9), ("f32", 5e-5, 5e-4, 1e-4)]
    {
        let one = run(folder.path(), &data, 1, precision, &[]);
        for nodes in 2..=5 {
            let (terms, model) = apart(&one, &run(folder.path(), &data, nodes, precision, &[]));
            let each: Vec<String> = terms.iter().map(|(n, off)| format!("{n} {off:.1e}")).collect();
            println!("{precision}, {nodes} workers: weights {model:.1e}, {}", each.join(", "));
            for (name, off) in &terms {
                let limit = if name == "total" { total_max } else { term_max };
                assert!(*off <= limit, "{precision}, {nodes} workers: {name} differs by {off:e}");
            }
            assert!(model <= model_max, "{precision}, {nodes} workers: models differ by {model:e}");
        }
    }
    // Each switch matters, or the agreement above would show nothing.
    let whole = run(folder.path(), &data, 1, "f64", &[]);
    for switch in ["model.sync_batch_norm=false", "loss.global_dice=false"] {
        let (_, model) = apart(&whole, &run(folder.path(), &data, 2, "f64", &[switch]));
        assert!(model > 1e-6, "{switch} changes nothing: {model:e}");
    }
}
