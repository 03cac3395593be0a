//! From somebody else's files to a trained and scored network, as a user goes: an nnU-Net dataset of
//! two channels, and the ACDC challenge's tree. Real processes, small and short.

#![allow(clippy::unwrap_used, clippy::panic)] // The lint's exception for tests stops at their helpers.

mod support;

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use cpcr::data::nifti::{Geometry, Voxels, write_file};
use support::{CPCR, checkpoint_file, dataset, launch, succeed, text};

const SIDE: usize = 32;
const SLICES: usize = 3;

fn put(path: &Path, frames: usize, voxels: Voxels<'_>) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let spacing_mm = Some([1.5, 1.5, 8.0]);
    let geometry = Geometry { shape: [SIDE, SIDE, SLICES, frames], spacing_mm, affine: None };
    write_file(path, &geometry, voxels).unwrap();
}

/// Two rectangles, by case: which voxels are in the first, and in the second.
fn anatomy(case: usize) -> (Vec<f32>, Vec<f32>) {
    let inside = |row: usize, column: usize| {
        let at = |voxel: usize| (voxel / SIDE % SIDE, voxel % SIDE);
        let hit = move |voxel: usize| {
            let (y, x) = at(voxel);
            f32::from(u8::from((row..row + 12).contains(&y) && (column..column + 9).contains(&x)))
        };
        (0..SIDE * SIDE * SLICES).map(hit).collect()
    };
    (inside(2 + case, 3), inside(12 + case % 5, 18))
}

/// Each class shows in one channel alone.
fn nnunet(folder: &Path) {
    let description = r#"{"channel_names": {"0": "T1", "1": "T2"}, "file_ending": ".nii.gz",
        "labels": {"background": 0, "left": 1, "right": 2}, "numTraining": 8}"#;
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("dataset.json"), description).unwrap();
    let folds =
        r#"[{"train": ["c0_a", "c1_a", "c2_a", "c3_a", "c4_a", "c5_a"], "val": ["c6_a", "c7_a"]}]"#;
    std::fs::write(folder.join("splits_final.json"), folds).unwrap();
    for case in 0..8 {
        let (left, right) = anatomy(case);
        let name = format!("c{case}_a");
        for (channel, voxels) in [&left, &right].into_iter().enumerate() {
            let path = folder.join(format!("imagesTr/{name}_000{channel}.nii.gz"));
            put(&path, 1, Voxels::Floats(voxels));
        }
        let label: Vec<u8> = left.iter().zip(&right).map(|(l, r)| (l + 2.0 * r) as u8).collect();
        put(&folder.join(format!("labelsTr/{name}.nii.gz")), 1, Voxels::Labels(&label));
    }
}

fn cpcr(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(CPCR).current_dir(folder).args(arguments).output().unwrap()
}

fn json(output: &Output) -> serde_json::Value {
    succeed(output);
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn two_channels_are_imported_trained_on_and_scored() {
    let folder = tempfile::tempdir().unwrap();
    nnunet(&folder.path().join("Dataset900_Two"));
    let import = ["data", "import", "--from", "nnunet", "--in", "Dataset900_Two", "--out", "data"];
    succeed(&cpcr(folder.path(), &import));
    succeed(&cpcr(folder.path(), &["data", "verify", "data"]));
    let info = json(&cpcr(folder.path(), &["data", "info", "--json", "data"]));
    assert_eq!((info["format"].as_u64(), info["channels"].as_u64()), (Some(4), Some(2)));
    assert_eq!(info["channel_names"], serde_json::json!(["T1", "T2"]));

    let set = ["train.iterations=10", "data.labelled=3"];
    let data = folder.path().join("data");
    succeed(&launch(folder.path(), &data, "run", 1, &set).output().unwrap());
    let model = std::fs::read(checkpoint_file(&folder.path().join("run"), 10, "model.safetensors"));
    let model = model.unwrap();
    let model = safetensors::SafeTensors::deserialize(&model).unwrap();
    let first = model.tensor("encoder.in_conv.conv_conv.0.weight").unwrap();
    assert_eq!(first.shape()[1..], [2, 3, 3]);

    let scores = json(&cpcr(folder.path(), &["eval", "--run", "run", "--split", "val", "--json"]));
    // What ten steps have learnt is no matter: that both classes of both cases are scored is.
    assert_eq!(scores["step"].as_u64(), Some(10));
    assert_eq!(scores["summary"]["classes"].as_array().unwrap().len(), 2);
    let cases = scores["summary"]["cases"].as_array().unwrap();
    let names: Vec<&str> = cases.iter().filter_map(|case| case["case"].as_str()).collect();
    assert_eq!(names, ["c6_a", "c7_a"]);
}

/// A second import must not damage the first, and a label is never lost in silence.
#[test]
fn a_dataset_is_not_written_over_and_labels_of_another_ending_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("Dataset901_Two");
    nnunet(&source);
    let import = ["data", "import", "--from", "nnunet", "--in", "Dataset901_Two", "--out"];
    let refused = |out: &str, status: i32, says: &str| {
        let output = cpcr(folder.path(), &[&import[..], &[out]].concat());
        let told = text(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{told}");
        assert!(told.contains(says), "{told}");
    };
    succeed(&cpcr(folder.path(), &[&import[..], &["data"]].concat()));
    refused("data", 2, "holds a dataset already");
    let synth = cpcr(folder.path(), &["data", "synth", "--patients", "2", "--out", "data"]);
    assert_eq!(synth.status.code(), Some(2), "{}", text(&synth.stderr));
    succeed(&cpcr(folder.path(), &["data", "verify", "data"]));

    for entry in std::fs::read_dir(source.join("labelsTr")).unwrap() {
        let path = entry.unwrap().path();
        let (_, label) = anatomy(0);
        put(&path.with_extension(""), 1, Voxels::Floats(&label));
        std::fs::remove_file(path).unwrap();
    }
    refused("other", 1, "no label ends in `.nii.gz`");
}

/// The way from the challenge's archive to a dataset, on the command line.
#[test]
fn an_acdc_tree_is_imported_and_mistakes_are_told_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    for patient in 1..=4 {
        let name = format!("patient00{patient}");
        let base = folder.path().join("ACDC/training").join(&name);
        let (left, right) = anatomy(patient);
        let label: Vec<u8> = left.iter().zip(&right).map(|(l, r)| (l + 3.0 * r) as u8).collect();
        for frame in ["frame01", "frame02"] {
            put(&base.join(format!("{name}_{frame}.nii.gz")), 1, Voxels::Floats(&left));
            put(&base.join(format!("{name}_{frame}_gt.nii.gz")), 1, Voxels::Labels(&label));
        }
        put(&base.join(format!("{name}_4d.nii.gz")), 3, Voxels::Floats(&left.repeat(3)));
        std::fs::write(base.join("Info.cfg"), "ED: 1\nES: 2\nGroup: NOR\nNbFrame: 3\n").unwrap();
    }
    let import = ["data", "import", "--from", "acdc", "--in", "ACDC", "--all-frames", "--out"];
    succeed(&cpcr(folder.path(), &[&import[..], &["data"]].concat()));
    let info = json(&cpcr(folder.path(), &["data", "info", "--json", "data"]));
    assert_eq!((info["format"].as_u64(), info["channels"].as_u64()), (Some(4), Some(1)));
    let train = &info["splits"]["train"];
    assert_eq!((train["volumes"].as_u64(), train["labelled_volumes"].as_u64()), (Some(6), Some(4)));

    std::fs::remove_file(folder.path().join("ACDC/training/patient003/Info.cfg")).unwrap();
    let output = cpcr(folder.path(), &[&import[..], &["again"]].concat());
    let told = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains("patient003/Info.cfg") && told.trim_end().lines().count() == 1, "{told}");
    assert!(!folder.path().join("again/manifest.json").exists());
}

/// All files below `folder`, by path.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let name = path.strip_prefix(folder).unwrap().display().to_string();
            // What the storage engine was writing when it was killed; it lists no such file.
            if !name.contains('#') {
                found.insert(name, std::fs::read(path).unwrap());
            }
        }
    }
    found
}

/// Images of noise, 26 MB: a dozen shards of a MiB, as they are estimated.
fn many_cases(folder: &Path) {
    let mut state = 1_u32;
    let noise = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32
    };
    let image: Vec<f32> = (0..SIDE * SIDE * SLICES + 96).map(noise).collect();
    for case in 0..96 {
        let voxels: Vec<f32> = image[case..].iter().take(SIDE * SIDE * SLICES).copied().collect();
        let tall: Vec<f32> = voxels.repeat(22);
        let path = folder.join(format!("images/c{case:03}.nii"));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let geometry = Geometry {
            shape: [SIDE, SIDE, SLICES * 22, 1],
            spacing_mm: Some([1.5, 1.5, 8.1]),
            affine: None,
        };
        write_file(&path, &geometry, Voxels::Floats(&tall)).unwrap();
    }
}

/// The process is killed outright, and the same command ends what it began: to the same bytes, without storing
/// a shard twice. With another option it does not go on.
#[test]
fn an_import_that_is_killed_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    many_cases(folder.path());
    let import = |out: &str| -> Vec<String> {
        let words =
            "data import --from nifti --in . --images images/{case}.nii --shard-mib 1 --out";
        words.split(' ').chain([out]).map(str::to_owned).collect()
    };
    let run = |arguments: &[String]| {
        Command::new(CPCR).current_dir(folder.path()).args(arguments).output().unwrap()
    };
    succeed(&run(&import("whole")));

    let mut command = Command::new(CPCR);
    let mut killed = command
        .current_dir(folder.path())
        .args(import("cut"))
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let third = folder.path().join("cut/import/00000003.json");
    let begun = Instant::now();
    while !third.exists() {
        assert!(begun.elapsed() < Duration::from_secs(60), "no shard was stored");
        assert!(killed.try_wait().unwrap().is_none(), "it ended before it could be killed");
        std::thread::yield_now();
    }
    killed.kill().unwrap();
    let mut told = String::new();
    killed.stderr.take().unwrap().read_to_string(&mut told).unwrap();
    assert_eq!(killed.wait().unwrap().code(), None, "{told}");
    let cut = files(&folder.path().join("cut"));
    assert!(!cut.contains_key("manifest.json"), "it was killed too late");
    let stored = |path: &&String| {
        let record = String::from_utf8_lossy(&cut[*path]);
        path.starts_with("import/") && record.contains("\"stored\"")
    };
    let records: Vec<&String> = cut.keys().filter(stored).collect();
    let shard = folder.path().join("cut/shards/train-00000.parquet");
    let changed = || std::fs::metadata(&shard).unwrap().modified().unwrap();
    let (records, first) = (records.len(), changed());

    let refused = run(&[import("cut"), vec!["--block-rows".to_owned(), "4".to_owned()]].concat());
    let told = text(&refused.stderr);
    assert_eq!(refused.status.code(), Some(2), "{told}");
    assert!(told.contains("rows in a block was `8` and is `4`"), "{told}");
    assert!(told.contains("another --out"), "{told}");

    succeed(&run(&import("cut")));
    assert!(records >= 2 && changed() == first, "{records} shards were recorded");
    let (whole, cut) = (files(&folder.path().join("whole")), files(&folder.path().join("cut")));
    assert_eq!(whole.keys().collect::<Vec<_>>(), cut.keys().collect::<Vec<_>>());
    assert!(whole == cut, "the bytes differ");
    assert!(whole.keys().filter(|path| path.ends_with(".parquet")).count() > 8);
}

/// What `info` and `verify` tell people, and programs.
#[test]
fn a_dataset_is_described_and_verified() {
    let folder = tempfile::tempdir().unwrap();
    nnunet(&folder.path().join("Dataset902_Two"));
    let import = ["data", "import", "--from", "nnunet", "--in", "Dataset902_Two", "--out", "data"];
    succeed(&cpcr(folder.path(), &import));
    let told = text(&cpcr(folder.path(), &["data", "info", "data"]).stdout);
    for part in [
        "classes: background, left, right",
        "channels: T1, T2",
        "train: 6 patients (6 labelled), 6 volumes (6 labelled), 18 slices",
        "slices 8.000 / 8.000 / 8.000, rows 1.500",
        "slice shapes in train, height x width (slices): 32x32 (18)",
        "intensity of T1 in train, all pixels: least 0.0000",
        "class left in 6 labelled training volumes: 10.547 % of pixels, 18 slices, 0 volumes without it",
    ] {
        assert!(told.contains(part), "`{part}` is not in\n{told}");
    }
    let info = json(&cpcr(folder.path(), &["data", "info", "--json", "data"]));
    let left = &info["statistics"]["classes"][1];
    // A rectangle of 12 x 9 pixels in each of 18 slices of 32 x 32.
    assert_eq!(left["pixels"].as_u64(), Some(12 * 9 * 18));
    assert_eq!(info["statistics"]["intensity"][0]["foreground"]["max"].as_f64(), Some(1.0));
    std::fs::remove_file(folder.path().join("data/statistics.json")).unwrap();
    let told = text(&cpcr(folder.path(), &["data", "info", "data"]).stdout);
    assert!(told.contains("--scan"), "{told}");
    let scanned = json(&cpcr(folder.path(), &["data", "info", "--scan", "--json", "data"]));
    assert_eq!(scanned["statistics"]["classes"][1]["pixels"], left["pixels"]);
    let mean =
        |info: &serde_json::Value| info["statistics"]["intensity"][1]["all"]["mean"].as_f64();
    assert!((mean(&scanned).unwrap() - mean(&info).unwrap()).abs() < 1e-12);

    let verified = json(&cpcr(folder.path(), &["data", "verify", "--json", "data"]));
    assert_eq!(verified["problems"].as_array().map(Vec::len), Some(0));
    let path = folder.path().join("data/shards/val-00000.parquet");
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(path, bytes).unwrap();
    let output = cpcr(folder.path(), &["data", "verify", "data"]);
    assert_eq!(output.status.code(), Some(1));
    let told = text(&output.stdout);
    assert!(told.contains("shards/val-00000.parquet") && told.contains("1 problem"), "{told}");
}

/// The global order of three epochs, as 1 to 8 workers deal it among them, has one hash.
#[test]
fn every_number_of_workers_sees_one_order() {
    let folder = tempfile::tempdir().unwrap();
    let data = dataset(folder.path());
    let data = data.to_str().unwrap();
    let batches = ["--labelled", "2", "--batch-labelled", "5", "--batch-unlabelled", "7"];
    let order = |more: &[&str]| {
        let arguments = [&["data", "order", data, "--json"], &batches[..], more].concat();
        json(&cpcr(folder.path(), &arguments))
    };
    let rows = order(&[]);
    let hashes: Vec<&str> =
        rows.as_array().unwrap().iter().map(|row| row["sha256"].as_str().unwrap()).collect();
    let workers: Vec<u64> =
        rows.as_array().unwrap().iter().map(|row| row["workers"].as_u64().unwrap()).collect();
    assert_eq!(workers, [1, 2, 3, 4, 5, 7, 8]);
    assert!(hashes.iter().all(|hash| *hash == hashes[0]), "{hashes:?}");
    assert_ne!(order(&["--seed", "2"])[0]["sha256"], hashes[0]);
    let refused = cpcr(
        folder.path(),
        &["data", "order", data, "--workers", "13", "--batch-unlabelled", "12"],
    );
    assert_eq!(refused.status.code(), Some(2), "{}", text(&refused.stderr));
}
