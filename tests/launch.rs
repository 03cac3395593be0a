//! The whole, as a user starts it: `cpcr-launch` with its coordinator, agents, trainers and S3
//! server as real processes, small and short. Each test has a folder of its own.

#![allow(clippy::unwrap_used)] // The lint's exception for tests stops at their helpers.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use sha2::{Digest, Sha256};

const LAUNCH: &str = env!("CARGO_BIN_EXE_cpcr-launch");
const CPCR: &str = env!("CARGO_BIN_EXE_cpcr");
/// Built together with the others; the agents look for it beside `cpcr`.
const ENGINE: &str = env!("CARGO_BIN_EXE_cpcr-engine");

/// A small network on small phantoms, some tens of steps.
const SMALL: [&str; 6] = [
    "patch_size=32",
    "batch.labelled=2",
    "batch.unlabelled=2",
    "validate.every=1000",
    "loss.warmup_epochs=0",
    "checkpoint.every=10",
];

fn dataset(folder: &Path) -> PathBuf {
    let data = folder.join("data");
    let made = Command::new(CPCR)
        .args(["data", "synth", "--patients", "8", "--out"])
        .arg(&data)
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", text(&made.stderr));
    data
}

fn launch(folder: &Path, data: &Path, run: &str, nodes: u32, set: &[&str]) -> Command {
    assert!(Path::new(ENGINE).is_file());
    let mut command = Command::new(LAUNCH);
    command.current_dir(folder).args(["--config", "demo", "--run", run, "--data"]).arg(data);
    command.args(["--nodes", &nodes.to_string()]);
    for pair in SMALL.iter().chain(set) {
        command.args(["--set", pair]);
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn succeed(output: &Output) {
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
}

fn hash(run: &Path, step: u64, file: &str) -> String {
    let folder = run.join(format!("checkpoints/step-{step:08}"));
    // The manifest is JSON with a seal after it; the attempt's folder is what is wanted of it.
    let sealed = std::fs::read(folder.join("manifest.json")).unwrap();
    let mut values = serde_json::Deserializer::from_slice(&sealed).into_iter();
    let manifest: serde_json::Value = values.next().unwrap().unwrap();
    let attempt = manifest["attempt"].as_str().unwrap();
    hex::encode(Sha256::digest(std::fs::read(folder.join(attempt).join(file)).unwrap()))
}

/// Reads the launcher's lines until one contains `what`.
fn wait_for(child: &mut Child, what: &str) -> String {
    let mut seen = String::new();
    let mut lines = BufReader::new(child.stderr.take().unwrap());
    loop {
        let mut line = String::new();
        let read = lines.read_line(&mut line).unwrap();
        assert!(read > 0, "'{what}' never came:\n{seen}");
        seen.push_str(&line);
        if line.contains(what) {
            child.stderr = Some(lines.into_inner());
            return seen;
        }
    }
}

/// The processes whose command line holds `part`.
fn processes(part: &str) -> Vec<i32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&line).replace('\0', " ").contains(part) {
            found.push(pid);
        }
    }
    found
}

fn signal(pid: i32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

#[test]
fn a_run_killed_and_resumed_on_one_worker_ends_with_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let data = dataset(folder.path());
    let set = ["train.iterations=30"];
    succeed(&launch(folder.path(), &data, "whole", 1, &set).output().unwrap());

    // SIGKILL in the midst of it: the launcher takes everything with it.
    let slow = ["train.iterations=30", "checkpoint.every=5"];
    let mut child = launch(folder.path(), &data, "killed", 1, &slow).spawn().unwrap();
    wait_for(&mut child, "step 1/");
    child.kill().unwrap();
    child.wait().unwrap();
    succeed(&launch(folder.path(), &data, "killed", 1, &slow).output().unwrap());
    for file in ["model.safetensors", "optimizer.safetensors"] {
        let whole = hash(&folder.path().join("whole"), 30, file);
        assert_eq!(whole, hash(&folder.path().join("killed"), 30, file), "{file}");
    }
}

#[test]
fn a_stop_checkpoints_exits_75_and_the_same_command_goes_on_with_fewer_workers_too() {
    let folder = tempfile::tempdir().unwrap();
    let data = dataset(folder.path());
    let many = ["train.iterations=100000", "checkpoint.every=100000"];
    let mut child = launch(folder.path(), &data, "run", 2, &many).spawn().unwrap();
    wait_for(&mut child, "step 1/");
    signal(i32::try_from(child.id()).unwrap(), rustix::process::Signal::INT);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(75), "{}", text(&output.stderr));

    let listed = Command::new(CPCR)
        .args(["checkpoints", "verify", "--json"])
        .arg(folder.path().join("run"))
        .output()
        .unwrap();
    succeed(&listed);
    let rows: serde_json::Value = serde_json::from_slice(&listed.stdout).unwrap();
    let step = rows[0]["step"].as_u64().unwrap();
    assert!(step >= 1);

    let total = format!("train.iterations={}", step + 5);
    let output = launch(folder.path(), &data, "run", 1, &[&total]).output().unwrap();
    succeed(&output);
    assert!(text(&output.stderr).contains(&format!("resumed at step {step}")));
    let metrics = folder.path().join("run/report/metrics.json");
    let metrics: serde_json::Value =
        serde_json::from_slice(&std::fs::read(metrics).unwrap()).unwrap();
    assert!(metrics["val"]["mean_dice"].is_number());
}

/// Kills one process of a two-worker run; the run must come through.
fn survives_the_death_of(victims: impl Fn(&Path, u32) -> Vec<i32>) {
    let folder = tempfile::tempdir().unwrap();
    let data = dataset(folder.path());
    let set = ["train.iterations=60"];
    let mut child = launch(folder.path(), &data, "run", 2, &set).spawn().unwrap();
    wait_for(&mut child, "step 1/");
    let victims = victims(folder.path(), child.id());
    assert!(!victims.is_empty());
    signal(victims[0], rustix::process::Signal::KILL);
    let output = child.wait_with_output().unwrap();
    succeed(&output);
    assert!(folder.path().join("run/checkpoints/step-00000060/manifest.json").is_file());
    let left = processes(&folder.path().display().to_string());
    assert!(left.is_empty(), "left behind: {left:?}");
}

#[test]
fn a_killed_trainer_costs_no_more_than_the_steps_since_the_checkpoint() {
    survives_the_death_of(|folder, _| {
        processes(&format!("\"run\":\"{}", folder.join("run").display()))
    });
}

#[test]
fn a_killed_agent_is_started_again() {
    survives_the_death_of(|folder, _| {
        processes(&format!("--node=1 --run={}", folder.join("run").display()))
    });
}

#[test]
fn a_killed_coordinator_is_started_again_and_its_generations_read_no_stale_key() {
    survives_the_death_of(|_, launcher| {
        let parent = format!("PPid:\t{launcher}\n");
        let mut found = processes(" coordinator --listen");
        found.retain(|pid| {
            std::fs::read_to_string(format!("/proc/{pid}/status"))
                .is_ok_and(|s| s.contains(&parent))
        });
        found
    });
}

#[test]
fn mistakes_are_told_in_one_line_with_status_2() {
    let folder = tempfile::tempdir().unwrap();
    let told = |arguments: &[&str], part: &str| {
        let output =
            Command::new(LAUNCH).current_dir(folder.path()).args(arguments).output().unwrap();
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(error.contains(part) && error.trim_end().lines().count() == 1, "{error}");
    };
    told(&["--set", "train.iteration=5"], "iteration");
    told(&["--config", "no-such-preset"], "no-such-preset");
    told(&["--config", "acdc-7"], "--data");
    told(&["--config", "demo", "--data", "no/such/folder"], "no/such/folder");
    told(&["--backend", "nccl"], "nccl");
}
