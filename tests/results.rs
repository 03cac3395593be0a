//! What leaves a run: masks and exported weights, by the commands that a user types.
//!
//! One test asks nibabel whether masks lie where their images do, one asks PyTorch whether it
//! computes what we do; both need the Python that `CPCR_PEER_PYTHON` names.

#![allow(clippy::unwrap_used, clippy::panic)] // The lint's exception for tests stops at their helpers.

mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use cpcr::data::nifti::{Geometry, Nifti, Voxels, read_file, write_file};
use cpcr::model::{Draws, Heads, Network, NetworkConfig, UpMode, torchscript};
use serde_json::Value;
use support::{CPCR, checkpoint_file, launch, skipped, succeed, text};
use tch::{CModule, Device, Kind, Tensor};

const STEPS: u64 = 80;

/// Threads that wait don't spin: on a machine with other work the tests would take ten times as long.
const OMP: [&str; 2] = ["OMP_WAIT_POLICY", "PASSIVE"];

/// Runs `cpcr` in `folder`.
fn cpcr(folder: &Path, line: &str) -> Output {
    let mut command = Command::new(CPCR);
    command.current_dir(folder).env(OMP[0], OMP[1]).args(line.split_whitespace());
    command.output().unwrap()
}

/// Trains on `folder/data` into `folder/run`: enough to find something bright.
fn train(folder: &Path, labelled: u32) {
    let set = [
        &format!("train.iterations={STEPS}"),
        &format!("data.labelled={labelled}"),
        "checkpoint.every=1000",
        "model.widths=[8,8,16,16,16]",
        "model.dropout=[0.0,0.0,0.0,0.0,0.0]",
    ];
    let mut command = launch(folder, &folder.join("data"), "run", 1, &set);
    succeed(&command.env(OMP[0], OMP[1]).output().unwrap());
}

/// Columns, slices, rows: what is imported with `--axis 1`.
const SHAPE: [usize; 3] = [36, 4, 28];

fn geometry(frames: usize) -> Geometry {
    Geometry {
        shape: [SHAPE[0], SHAPE[1], SHAPE[2], frames],
        // The largest spacing is along another axis than the one that slices are cut across.
        spacing_mm: Some([1.5, 2.0, 9.0]),
        affine: Some([
            [-1.5, 0.0, 0.0, 10.0],
            [0.0, 2.0, 0.0, 20.0],
            [0.0, 0.0, 9.0, 30.0],
            [0.0, 0.0, 0.0, 1.0],
        ]),
    }
}

/// `[z, y, x]` intensities and classes of one patient: a bright brick, and beyond the window that is
/// imported a glare which a scaling by the extremes would go by.
fn phantom(patient: usize) -> (Vec<f32>, Vec<u8>) {
    let [columns, slices, rows] = SHAPE;
    let left = 4 + patient % 5;
    let (mut image, mut label) = (Vec::new(), Vec::new());
    for at in 0..columns * slices * rows {
        let (x, y, z) = (at % columns, at / columns % slices, at / columns / slices);
        let inside = (left..left + 14).contains(&x) && (6..15).contains(&z) && y > 0;
        let noise = (at * 7919 + patient * 104_729) % 101;
        let glare = if at == patient { 50_000.0 } else { 0.0 };
        image.push(noise as f32 + if inside { 600.0 } else { 0.0 } + glare);
        label.push(u8::from(inside));
    }
    (image, label)
}

fn nifti(folder: &Path, name: &str, frames: usize, voxels: Voxels<'_>) -> PathBuf {
    let path = folder.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    write_file(&path, &geometry(frames), voxels).unwrap();
    path
}

fn mask(path: &Path) -> (Nifti, Vec<u8>) {
    let nifti = read_file(path).unwrap();
    let labels = nifti.frame(0, |value| value as u8).unwrap();
    (nifti, labels)
}

fn dice(a: &[u8], b: &[u8]) -> f64 {
    let both = a.iter().zip(b).filter(|(a, b)| (**a, **b) == (1, 1)).count();
    let each = a.iter().chain(b).filter(|label| **label == 1).count();
    2.0 * both as f64 / each as f64
}

/// A dataset of eight patients, and a run on it.
fn trained() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for patient in 0..8 {
        let (image, label) = phantom(patient);
        nifti(folder.path(), &format!("images/p{patient}.nii.gz"), 1, Voxels::Floats(&image));
        nifti(folder.path(), &format!("labels/p{patient}.nii.gz"), 1, Voxels::Labels(&label));
    }
    succeed(&cpcr(
        folder.path(),
        "data import --from nifti --in . --out data --images images/{case}.nii.gz \
         --labels labels/{case}.nii.gz --classes background,brick --axis 1 \
         --intensity window:0:1000 --val 0.25 --test 0",
    ));
    train(folder.path(), 4);
    folder
}

#[test]
fn masks_and_weights_leave_a_run() {
    let folder = trained();
    masks_score_as_eval_says(folder.path());
    every_frame_is_an_image_of_its_own(folder.path());
    options_change_what_they_say(folder.path());
    one_bad_file_keeps_no_other_from_being_done(folder.path());
    what_cannot_be_predicted_is_refused(folder.path());
    weights_go_out_with_a_description(folder.path());
}

/// The same network on the same slices: the Dice of what `predict` wrote is `eval`'s, to the digit.
fn masks_score_as_eval_says(folder: &Path) {
    let output = cpcr(folder, "eval --run run --split val --json");
    succeed(&output);
    let scores: Value = serde_json::from_slice(&output.stdout).unwrap();
    let cases = scores["summary"]["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 2);
    let output = cpcr(folder, "predict --run run --in images --out masks");
    succeed(&output);
    assert!(text(&output.stderr).contains("8 of 8 files"), "{}", text(&output.stderr));
    for case in cases {
        let name = case["case"].as_str().unwrap();
        let (found, labels) = mask(&folder.join(format!("masks/{name}.nii.gz")));
        let (truth, wanted) = mask(&folder.join(format!("labels/{name}.nii.gz")));
        assert_eq!(found.header.geometry, truth.header.geometry);
        assert_eq!(found.header.scale, None);
        let (ours, evals) = (dice(&labels, &wanted), case["classes"][0]["dice"].as_f64().unwrap());
        assert!((ours - evals).abs() < 1e-12, "{name}: {ours} is not {evals}");
        assert!(ours > 0.8, "{name}: {ours}");
    }
}

fn every_frame_is_an_image_of_its_own(folder: &Path) {
    let frames = [phantom(1).0, phantom(2).0].concat();
    nifti(folder, "films/film.nii", 2, Voxels::Floats(&frames));
    let checkpoint = format!("--checkpoint run/checkpoints/step-{STEPS:08}");
    let line =
        format!("predict {checkpoint} --in films --out films/masks --probabilities --batch 3");
    succeed(&cpcr(folder, &line));
    let film = read_file(&folder.join("films/masks/film.nii")).unwrap();
    assert_eq!(film.header.geometry, geometry(2));
    for frame in 0..2 {
        let labels = film.frame(frame, |value| value as u8).unwrap();
        let alone = mask(&folder.join(format!("masks/p{}.nii.gz", frame + 1))).1;
        assert_eq!(labels, alone);
        let name = format!("films/masks/film_frame{:02}_prob.nii.gz", frame + 1);
        let sure = read_file(&folder.join(name)).unwrap();
        assert_eq!(sure.header.geometry.shape, [SHAPE[0], SHAPE[1], SHAPE[2], 2]);
        let classes = [0, 1].map(|class| sure.frame(class, |value| value).unwrap());
        for (at, label) in labels.iter().enumerate() {
            let [background, brick] = [classes[0][at], classes[1][at]];
            assert!((background + brick - 1.0).abs() < 1e-5);
            assert_eq!(*label == 1, brick > background);
        }
    }
}

fn options_change_what_they_say(folder: &Path) {
    let plain = mask(&folder.join("masks/p1.nii.gz")).1;
    let truth = phantom(1).1;
    std::fs::create_dir(folder.join("one")).unwrap();
    std::fs::copy(folder.join("images/p1.nii.gz"), folder.join("one/p1.nii.gz")).unwrap();
    let mut seen = vec![probability(folder, "")];
    for options in ["--both-decoders", "--flips", "--both-decoders --flips"] {
        let sure = probability(folder, options);
        assert!(!seen.contains(&sure), "{options} changes nothing");
        seen.push(sure);
        assert!(dice(&mask(&folder.join("out/p1.nii.gz")).1, &truth) > 0.7, "{options}");
    }
    // A second, smaller bright thing far from the brick: found, and left out as asked for.
    let [columns, slices, _] = SHAPE;
    let apart = |at: usize| (27..34).contains(&(at % columns)) && at / columns / slices >= 20;
    let (mut image, _) = phantom(1);
    let lit = image.iter_mut().enumerate().filter(|(at, _)| apart(*at));
    lit.for_each(|(_, value)| *value += 600.0);
    nifti(folder, "two/p1.nii.gz", 1, Voxels::Floats(&image));
    let voxels = |options: &str| {
        succeed(&cpcr(folder, &format!("predict --run run --in two --out out {options}")));
        let labels = mask(&folder.join("out/p1.nii.gz")).1;
        let found = (0..labels.len()).filter(|at| labels[*at] == 1);
        let (second, brick): (Vec<usize>, Vec<usize>) = found.partition(|at| apart(*at));
        (second.len(), brick.len())
    };
    let (second, brick) = voxels("");
    assert!(0 < second && second < brick, "{second} and {brick}");
    assert_eq!(voxels("--largest-component"), (0, brick));
    // Cut the other way, the same image is other slices.
    succeed(&cpcr(folder, "predict --run run --in one --out out --slice-axis auto"));
    assert_ne!(mask(&folder.join("out/p1.nii.gz")).1, plain);
}

/// The brick's probability in `one/p1.nii.gz`.
fn probability(folder: &Path, options: &str) -> Vec<f32> {
    let line = format!("predict --run run --in one --out out --probabilities {options}");
    succeed(&cpcr(folder, &line));
    let sure = read_file(&folder.join("out/p1_prob.nii.gz")).unwrap();
    sure.frame(1, |value| value as f32).unwrap()
}

fn one_bad_file_keeps_no_other_from_being_done(folder: &Path) {
    let mixed = folder.join("mixed");
    std::fs::create_dir(&mixed).unwrap();
    std::fs::write(mixed.join("a.nii.gz"), "no image").unwrap();
    std::fs::write(mixed.join("notes.txt"), "passed over").unwrap();
    std::fs::copy(folder.join("images/p2.nii.gz"), mixed.join("b.nii.gz")).unwrap();
    std::fs::create_dir(folder.join("results")).unwrap();
    std::fs::write(folder.join("results/b.nii.gz"), "an old result").unwrap();
    let output = cpcr(folder, "predict --run run --in mixed --out results --json");
    assert_eq!(output.status.code(), Some(1));
    let told = text(&output.stderr);
    assert!(told.lines().last().unwrap().contains("mixed/a.nii.gz"), "{told}");
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["masks"], serde_json::json!(["results/b.nii.gz"]));
    assert_eq!(json["failures"].as_array().unwrap().len(), 1);
    let (_, labels) = mask(&folder.join("results/b.nii.gz"));
    assert_eq!(labels, mask(&folder.join("masks/p2.nii.gz")).1);
    let left: Vec<_> = std::fs::read_dir(folder.join("results")).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
}

fn what_cannot_be_predicted_is_refused(folder: &Path) {
    std::fs::create_dir(folder.join("empty")).unwrap();
    let names = ["clash/a.nii", "clash/a.nii.gz"];
    let image = phantom(0).0;
    for name in names {
        nifti(folder, name, 1, Voxels::Floats(&image));
    }
    for (line, status, words) in [
        ("--run run --in empty --out out", 1, "empty: it holds no .nii"),
        ("--run run --in nowhere --out out", 1, "nowhere"),
        ("--run run --in images --out ./images", 2, "--in and --out"),
        ("--run run --in clash --out out --probabilities", 2, "a.nii.gz"),
        ("--run run --in images --out out --step 7", 1, "7"),
        ("--run run --in images --out out --data elsewhere", 1, "--data"),
        ("--checkpoint run --in images --out out", 2, "RUN/checkpoints/step-N"),
        ("--run run --in images --out out --slice-axis 3", 2, "axis"),
        ("--run run --in images --out out --batch 0", 2, "batch"),
    ] {
        let output = cpcr(folder, &format!("predict {line}"));
        let told = text(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{line}: {told}");
        assert!(told.contains(words), "{line}: {told}");
    }
    assert_eq!(std::fs::read_dir(folder.join("images")).unwrap().count(), 8);
}

fn weights_go_out_with_a_description(folder: &Path) {
    succeed(&cpcr(folder, "export --run run --format safetensors --out net.safetensors"));
    let bytes = std::fs::read(folder.join("net.safetensors")).unwrap();
    let stored = std::fs::read(checkpoint_file(&folder.join("run"), STEPS, "model.safetensors"));
    assert_eq!(bytes, stored.unwrap());
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    for name in ["decoder2.out_conv_dp4.weight", "encoder.in_conv.conv_conv.1.num_batches_tracked"]
    {
        assert!(file.tensor(name).is_ok(), "{name}");
    }
    let output =
        cpcr(folder, "export --run run --step best --format torchscript --out n.pt --json");
    succeed(&output);
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["step"], STEPS);
    let module = CModule::load(folder.join("n.pt")).unwrap();
    let x = Tensor::zeros([2, 1, 32, 32], (Kind::Float, Device::Cpu));
    assert_eq!(module.forward_ts(&[x]).unwrap().size(), [2, 2, 32, 32]);
    let read = |name: &str| -> Value {
        serde_json::from_slice(&std::fs::read(folder.join(name)).unwrap()).unwrap()
    };
    for (name, kind) in [("net.safetensors.json", "safetensors"), ("n.pt.json", "torchscript")] {
        let said = read(name);
        assert_eq!(said["kind"], kind);
        assert_eq!(said["classes"], serde_json::json!(["background", "brick"]));
        assert_eq!(said["preprocessing"]["intensity"], "window:0:1000");
        assert_eq!(said["preprocessing"]["slice_axis"], "1");
        assert_eq!(said["preprocessing"]["patch_size"], 32);
        assert_eq!(said["source"]["step"], STEPS);
        assert_eq!(said["network"]["in_channels"], 1);
    }
    let output = cpcr(folder, "export --run run --format onnx --out net.onnx");
    assert_eq!(output.status.code(), Some(2));
    let output = cpcr(folder, "export --run run --format torchscript --out nowhere/n.pt");
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("nowhere/n.pt"), "{}", text(&output.stderr));
}

/// The Python of the peers, if it has the module.
fn python_with(module: &str) -> Option<String> {
    let python = std::env::var("CPCR_PEER_PYTHON").ok()?;
    let found = Command::new(&python).args(["-c", &format!("import {module}")]).output().ok()?;
    found.status.success().then_some(python)
}

#[test]
fn masks_lie_where_nibabel_says_their_images_do() {
    let Some(python) = python_with("nibabel") else {
        let why = "no nibabel: `scripts/setup.sh --peers` prints a Python that has it, for CPCR_PEER_PYTHON";
        return skipped("masks_lie_where_nibabel_says_their_images_do", why);
    };
    let folder = tempfile::tempdir().unwrap();
    let peer = |command: &str, more: &[&str]| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/nifti_peer.py");
        let mut python = Command::new(&python);
        let output = python.arg(script).arg(command).arg(folder.path()).args(more);
        let output = output.output().unwrap();
        assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    };
    peer("make", &[]);
    succeed(&cpcr(
        folder.path(),
        "data import --from nifti --in . --out data --images images/{case}.nii.gz \
         --labels labels/{case}.nii.gz --classes background,brick --val 0.1 --test 0",
    ));
    train(folder.path(), 7);
    succeed(&cpcr(folder.path(), "predict --run run --in new --out masks --probabilities"));
    peer("judge", &[folder.path().join("masks").to_str().unwrap()]);
}

/// Loads `N.pt`, runs it on `N.x` and compares with `N.y`: float32, little-endian.
const COMPARE: &str = "
import sys, numpy, torch
for name in sys.argv[2:]:
    at = lambda end: f'{sys.argv[1]}/{name}.{end}'
    module = torch.jit.load(at('pt')).eval()
    x = torch.from_numpy(numpy.fromfile(at('x'), '<f4').reshape(2, 1, 48, 32))
    y = torch.from_numpy(numpy.fromfile(at('y'), '<f4').reshape(2, 4, 48, 32))
    with torch.no_grad():
        far = (module(x) - y).abs().max().item()
    assert far <= 1e-5 * max(1.0, y.abs().max().item()), (name, far)
    assert 'encoder.down1.maxpool_conv.1.conv_conv.4.weight' in module.state_dict(), name
";

#[test]
fn pytorch_computes_what_we_do() {
    let Some(python) = python_with("torch") else {
        let why = "no torch: `scripts/setup.sh --peers-torch` prints a Python that has it, for CPCR_PEER_PYTHON";
        return skipped("pytorch_computes_what_we_do", why);
    };
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, tensor: &Tensor| {
        let values = Vec::<f32>::try_from(&tensor.contiguous().view([-1])).unwrap();
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        std::fs::write(folder.path().join(name), bytes).unwrap();
    };
    let modes = [UpMode::Bilinear, UpMode::Transposed, UpMode::Nearest, UpMode::Bicubic];
    for mode in modes {
        let config = NetworkConfig { up: vec![mode, mode], ..NetworkConfig::default() };
        let net = Network::new(config, Device::Cpu, 3).unwrap();
        let x = Tensor::rand([2, 1, 48, 32], (Kind::Float, Device::Cpu));
        let out = net.forward_train(&x, &Draws::keyed(1, 0, 0), Heads::Main, None).unwrap();
        out.statistics.commit().unwrap();
        write(&format!("{mode:?}.x"), &x);
        write(&format!("{mode:?}.y"), &net.forward_eval(&x).unwrap());
        let file = folder.path().join(format!("{mode:?}.pt"));
        std::fs::write(file, torchscript(&net).unwrap()).unwrap();
    }
    let names = modes.map(|mode| format!("{mode:?}"));
    let mut command = Command::new(python);
    let output = command.args(["-c", COMPARE]).arg(folder.path()).args(names).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
}

/// `cpcr … | head` ends early; the command has nothing to complain of then.
#[test]
fn a_reader_that_is_gone_is_no_panic() {
    let folder = tempfile::tempdir().unwrap();
    let data = support::dataset(folder.path());
    for arguments in [vec!["data", "info", "--json"], vec!["data", "info"], vec!["doctor"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = Command::new(CPCR);
        command.args(&arguments).stdout(writer);
        if arguments[0] == "data" {
            command.arg(&data);
        }
        let out = command.output().unwrap();
        assert_ne!(out.status.code(), Some(101), "{arguments:?}: {}", text(&out.stderr));
        assert!(!text(&out.stderr).contains("panicked"), "{}", text(&out.stderr));
    }
}
