//! `cpcr compare` as a user starts it, with runs of a few steps: killed in the middle and started
//! again, stopped, refused.

#![allow(clippy::unwrap_used, clippy::panic)] // The lint's exception for tests stops at their helpers.

mod support;

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use support::{
    CPCR, SMALL, checkpoint_file, dataset, processes, signal, succeed, text, wait_for_a_step,
};

/// Two methods and two seeds over a dataset; `more` comes last.
fn compare(folder: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(CPCR);
    command.current_dir(folder).args(["compare", "--methods", "cpcr,cpcr-focal", "--seeds", "2,1"]);
    command.args(["--out", "out", "--backend", "gloo"]);
    for pair in SMALL.iter().chain(&["validate.every=20"]) {
        command.args(["--set", pair]);
    }
    command.args(more).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

const STEPS: [&str; 6] = ["--config", "demo", "--data", "data", "--set", "train.iterations=40"];

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Waits until a file is there.
fn wait_for(path: &Path) {
    let start = Instant::now();
    while !path.is_file() {
        assert!(start.elapsed() < Duration::from_secs(90), "{} did not come", path.display());
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn failed(output: &Output, status: i32) -> String {
    let told = text(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{told}");
    assert!(!told.contains("panicked"), "{told}");
    told.trim_end().lines().last().unwrap_or_default().to_owned()
}

#[test]
fn a_comparison_killed_in_the_middle_goes_on_and_ends_with_every_run_in_its_table() {
    let folder = tempfile::tempdir().unwrap();
    dataset(folder.path());
    let out = folder.path().join("out");
    let mut child = compare(folder.path(), &STEPS).spawn().unwrap();
    // Killed while the second run trains.
    wait_for(&out.join("runs/cpcr-seed1/checkpoints/step-00000010/manifest.json"));
    child.kill().unwrap();
    child.wait().unwrap();
    let start = Instant::now();
    let trains = format!("--run {}", out.join("runs").display());
    while !processes(&trains).is_empty() {
        assert!(start.elapsed() < Duration::from_secs(10), "a launcher outlives the comparison");
        std::thread::sleep(Duration::from_millis(50));
    }
    let second = out.join("runs/cpcr-seed1/checkpoints/step-00000040");
    assert!(!second.exists(), "the launcher went on without the comparison");
    let first = checkpoint_file(&out.join("runs/cpcr-seed2"), 40, "model.safetensors");
    let written = || std::fs::metadata(&first).unwrap().modified().unwrap();
    let before = written();
    assert!(!out.join("compare.md").exists());

    let mut command = compare(folder.path(), &STEPS);
    let output = command.output().unwrap();
    succeed(&output);
    assert_eq!(written(), before, "a complete run was trained again");

    let found = json(&out.join("compare.json"));
    let runs = found["runs"].as_array().unwrap();
    let named = |run: &Value| format!("{} {}", run["method"].as_str().unwrap(), run["seed"]);
    let names: Vec<String> = runs.iter().map(named).collect();
    assert_eq!(names, ["cpcr 2", "cpcr 1", "cpcr-focal 2", "cpcr-focal 1"]);
    for run in runs {
        assert_eq!(run["steps"], 40);
        let selected = run["selected_step"].as_u64().unwrap();
        assert!([20, 40].contains(&selected), "{run}");
        // Only the second run was interrupted.
        let interrupted = named(run) == "cpcr 1";
        assert_eq!(run["wall_s"].is_null(), interrupted, "{run}");
        // The hash is the checkpoint's own, so a table can be traced to its runs.
        let path = Path::new(run["run"].as_str().unwrap()).join("checkpoints/step-00000040");
        let manifest = text(&std::fs::read(path.join("manifest.json")).unwrap());
        assert!(manifest.contains(run["config_sha256"].as_str().unwrap()), "{manifest}");
    }
    assert_ne!(runs[0]["config_sha256"], runs[1]["config_sha256"]);
    assert_eq!((found["split"].as_str(), found["cases"].as_u64()), (Some("test"), Some(20)));
    assert_eq!(found["mode"], "identical-budget");

    // The table's mean is that of `cpcr eval` over the seeds.
    let dice = |seed: u64| {
        let run = format!("out/runs/cpcr-seed{seed}");
        let mut eval = Command::new(CPCR);
        eval.current_dir(folder.path()).args(["eval", "--run", &run, "--step", "best", "--json"]);
        let output = eval.args(["--split", "test"]).output().unwrap();
        succeed(&output);
        let scores: Value = serde_json::from_slice(&output.stdout).unwrap();
        scores["summary"]["mean"]["dice"].as_f64().unwrap()
    };
    let mean = f64::midpoint(dice(1), dice(2));
    let row = &found["methods"][0];
    assert_eq!(row["method"], "cpcr");
    assert!((row["mean"]["dice"]["mean"].as_f64().unwrap() - mean).abs() < 1e-9, "{row}");

    let page = std::fs::read_to_string(out.join("compare.md")).unwrap();
    assert_eq!(text(&output.stdout), page);
    assert!(page.contains(&format!("| cpcr       | {:.2} ± ", mean * 100.0)), "{page}");
    assert!(page.contains("Difference to cpcr") && page.contains("Identical budget"), "{page}");
    let table = std::fs::read_to_string(out.join("compare.csv")).unwrap();
    assert_eq!(table.lines().count(), 1 + 2 * 4 + 1, "{table}");

    // Another budget in the same place is refused before anything is trained.
    let mut other = compare(folder.path(), &STEPS);
    let told = failed(&other.args(["--set", "batch.unlabelled=4"]).output().unwrap(), 2);
    assert!(told.contains("batch.unlabelled = 2  ->  4") && told.contains("--out"), "{told}");
    // Also one that a resumed run might have: the table would claim it for runs made with another.
    let mut other = compare(folder.path(), &STEPS);
    let told = failed(&other.args(["--set", "validate.every=3"]).output().unwrap(), 2);
    assert!(told.contains("validate.every"), "{told}");
}

#[test]
fn a_stop_is_passed_on_and_leaves_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    dataset(folder.path());
    let endless = ["--config", "demo", "--data", "data", "--set", "train.iterations=100000"];
    let mut child = compare(folder.path(), &endless).spawn().unwrap();
    wait_for_a_step(&mut child);
    signal(i32::try_from(child.id()).unwrap(), Signal::TERM);
    let told = failed(&child.wait_with_output().unwrap(), 75);
    assert!(told.contains("the same command goes on"), "{told}");
    let listed = Command::new(CPCR)
        .args(["checkpoints", "verify", "--json"])
        .arg(folder.path().join("out/runs/cpcr-seed2"))
        .output()
        .unwrap();
    succeed(&listed);
    let rows: Value = serde_json::from_slice(&listed.stdout).unwrap();
    assert!(rows[0]["step"].as_u64().unwrap() >= 1, "{rows}");
    assert!(processes(&folder.path().display().to_string()).is_empty());
}

#[test]
fn a_run_that_fails_ends_the_comparison_with_its_name_and_status() {
    let folder = tempfile::tempdir().unwrap();
    dataset(folder.path());
    // More workers than a batch has samples: the launcher refuses it.
    let mut command = compare(folder.path(), &STEPS);
    let told = failed(&command.args(["--nodes", "9"]).output().unwrap(), 2);
    assert!(told.contains("cpcr-seed2 ended with status 2"), "{told}");
}

#[test]
fn mistakes_are_told_with_status_2_before_anything_is_made() {
    let folder = tempfile::tempdir().unwrap();
    let told = |arguments: &[&str]| {
        let mut command = Command::new(CPCR);
        command.current_dir(folder.path()).args(["compare", "--out", "out"]).args(arguments);
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
        text(&output.stderr)
    };
    let error = told(&["--methods", "cpcr,cpc", "--seeds", "1"]);
    assert!(error.contains("`cpc`") && error.contains("`cpcr-focal`"), "{error}");
    told(&["--methods", "cpcr", "--seeds", "1,one"]);
    let published = ["--methods", "cpcr", "--seeds", "1", "--as-published"];
    assert!(told(&published).contains("--data"));
    let error = told(&[&published[..], &["--data", "d", "--config", "demo"]].concat());
    assert!(error.contains("cannot be used with"), "{error}");
    assert!(told(&["--methods", "cpcr", "--seeds", "1", "--config", "demo"]).contains("--data"));
    assert!(!folder.path().join("out").exists());
}
