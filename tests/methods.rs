//! Every method as whole runs: what it saves is all it needs to go on, bit for bit, and its numbers do not depend on
//! how many workers share a batch.

// The lint's exception for tests stops at their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use std::path::Path;

use safetensors::{Dtype, SafeTensors};
use support::{checkpoint_file, dataset, launch, succeed, text};

const MODEL: &str = "model.safetensors";

/// Runs a method and gives the file of its last checkpoint.
fn run(folder: &Path, data: &Path, name: &str, nodes: u32, set: &[&str]) -> Vec<u8> {
    succeed(&launch(folder, data, name, nodes, set).output().unwrap());
    let steps = set.iter().find_map(|pair| pair.strip_prefix("train.iterations=")).unwrap();
    std::fs::read(checkpoint_file(&folder.join(name), steps.parse().unwrap(), MODEL)).unwrap()
}

/// Methods that train more than one network: the other's weights must be in the checkpoint, or a resumed run
/// would go another way.
#[test]
fn second_networks_and_teachers_survive_a_restart_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let data = dataset(folder.path());
    for (method, prefix) in [("cps", "second."), ("mean-teacher", "teacher."), ("bcp", "teacher.")]
    {
        let set = |steps: &'static str| -> Vec<String> {
            // 54 labelled slices: an epoch of 4 steps is BCP's first stage, over before the first run ends.
            let warm_up =
                if method == "bcp" { "loss.warmup_epochs=1" } else { "loss.rampup_epochs=0" };
            ["batch.labelled=12", "batch.unlabelled=3", "checkpoint.every=4", warm_up, steps]
                .iter()
                .map(|&pair| pair.to_owned())
                .chain([format!("method={method}")])
                .collect()
        };
        let (short, long) = (set("train.iterations=12"), set("train.iterations=24"));
        let (short, long): (Vec<&str>, Vec<&str>) =
            (short.iter().map(String::as_str).collect(), long.iter().map(String::as_str).collect());
        let whole = run(folder.path(), &data, &format!("{method}-whole"), 1, &long);
        let parts = format!("{method}-parts");
        let half = run(folder.path(), &data, &parts, 1, &short);
        let resumed = run(folder.path(), &data, &parts, 1, &long);
        // Each network has weights of its own: a teacher that merely copies would need no checkpoint.
        let tensors = SafeTensors::deserialize(&half).unwrap();
        let first = tensors.tensor("decoder.out_conv.weight").unwrap();
        let other = tensors.tensor(&format!("{prefix}decoder.out_conv.weight")).unwrap();
        assert_ne!(first.data(), other.data(), "{method}");
        assert_ne!(half, resumed, "{method} stood still");
        assert!(whole == resumed, "{method}: a resumed run ends with other weights");
    }
}

fn numbers(file: &[u8]) -> Vec<f64> {
    let tensors = SafeTensors::deserialize(file).unwrap();
    let mut names = tensors.names();
    names.sort();
    let mut all = Vec::new();
    for tensor in names.iter().map(|name| tensors.tensor(name).unwrap()) {
        if tensor.dtype() == Dtype::F64 {
            all.extend(tensor.data().chunks(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())));
        }
    }
    all
}

#[test]
fn every_method_gives_the_same_weights_on_one_worker_and_on_two() {
    let folder = tempfile::tempdir().unwrap();
    let data = dataset(folder.path());
    for method in ["supervised", "urpc", "mcnet", "mean-teacher", "ua-mt", "cps"] {
        let name = if method == "ua-mt" { "mean-teacher" } else { method };
        let (method_key, mask) =
            (format!("method={name}"), format!("loss.uncertainty_mask={}", method == "ua-mt"));
        // One labelled sample: the second worker has none, where the method can do with that.
        let labelled = if method == "supervised" { "batch.labelled=3" } else { "batch.labelled=1" };
        let set = [
            "train.iterations=5",
            labelled,
            "batch.unlabelled=3",
            "loss.rampup_epochs=0",
            "train.schedule=poly",
            "model.dropout=[0.0, 0.0, 0.0, 0.0, 0.0]",
            "model.aux_dropout=0.0",
            "model.sync_batch_norm=true",
            "train.precision=f64",
            &method_key,
            &mask,
        ];
        let [one, two] = [1, 2].map(|nodes| {
            numbers(&run(folder.path(), &data, &format!("{method}-{nodes}"), nodes, &set))
        });
        assert_eq!(one.len(), two.len());
        let norm =
            |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
        let off =
            norm(&mut one.iter().zip(&two).map(|(a, b)| a - b)) / norm(&mut one.iter().copied());
        assert!(off <= 1e-9, "{method}: one worker and two differ by {off:e}");
    }
}

/// Weights from a file: a run of no more than one tiny step stays near them; names that do not fit are told.
#[test]
fn a_run_starts_from_given_weights_or_says_what_does_not_fit() {
    let folder = tempfile::tempdir().unwrap();
    let data = dataset(folder.path());
    let first = run(folder.path(), &data, "first", 1, &["train.iterations=3", "method=mcnet"]);
    let path = folder.path().join("first.safetensors");
    std::fs::write(&path, &first).unwrap();
    let from = format!("train.init_from={}", path.display());
    let set = ["train.iterations=1", "train.lr=1e-30", "method=mcnet", &from];
    let second = run(folder.path(), &data, "second", 1, &set);
    let read = |file: &[u8]| {
        let tensors = SafeTensors::deserialize(file).unwrap();
        tensors.tensor("decoder1.out_conv.weight").unwrap().data().to_vec()
    };
    assert_eq!(read(&first), read(&second));

    let missing = format!("train.init_from={}", folder.path().join("none.safetensors").display());
    for (from, named) in [(&from, "decoder1."), (&missing, "none.safetensors")] {
        let refused =
            launch(folder.path(), &data, named, 1, &["method=urpc", from]).output().unwrap();
        let said = text(&refused.stderr);
        assert_eq!(refused.status.code(), Some(2), "{said}");
        assert!(said.contains("train.init_from") && said.contains(named), "{said}");
    }
}

#[test]
fn a_method_that_needs_more_samples_than_a_worker_has_says_which() {
    let folder = tempfile::tempdir().unwrap();
    let data = dataset(folder.path());
    let set = ["train.iterations=2", "method=mean-teacher", "batch.unlabelled=1"];
    let refused = launch(folder.path(), &data, "few", 2, &set).output().unwrap();
    let said = text(&refused.stderr);
    assert_eq!(refused.status.code(), Some(2), "{said}");
    assert!(said.contains("batch.unlabelled = 1"), "{said}");
}
