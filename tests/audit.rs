//! `cpcr audit` on runs as users make them: sound ones pass, each fault that is planted is named.
//!
//! Faults are planted in copies of one run's ledger by the library that wrote it: decoded, altered, sealed again.

#![allow(clippy::unwrap_used, clippy::panic)] // The lint's exception for tests stops at their helpers.

mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use cpcr::checkpoint::{
    HostTensor, NamedTensors, Position, RunIdentity, Snapshot, TrainState, seal, write,
};
use cpcr::data::{Deal, Draw};
use cpcr::ledger::{Object, Origin, Part, object_path};
use cpcr::store::{Store, StoreOptions};
use cpcr::types::{Lineage, Step, WorldSize};
use cpcr::worker::PARENT_VARIABLE;
use support::{CPCR, audited, dataset, launch, succeed, text};

fn audit(run: &Path) -> Output {
    Command::new(CPCR).arg("audit").arg(run).output().unwrap()
}

/// Waits for an object of a run in a folder: nothing tells when one appears.
fn wait_for(file: &Path) {
    let started = Instant::now();
    while !file.is_file() {
        assert!(started.elapsed() < Duration::from_secs(90), "{} never came", file.display());
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn read(run: &Path, number: u64) -> Object {
    Object::decode(number, &std::fs::read(run.join(object_path(number))).unwrap()).unwrap()
}

fn put(run: &Path, object: &Object) {
    std::fs::write(run.join(object_path(object.number)), object.encode().unwrap()).unwrap();
}

/// The fullest object of the newest lineage, but not the one that opens it.
fn fullest(run: &Path) -> Object {
    let there = |number: &u64| run.join(object_path(*number)).is_file();
    let objects: Vec<Object> = (1..).take_while(there).map(|number| read(run, number)).collect();
    let newest = objects.iter().filter_map(|object| object.lineage).max();
    objects
        .into_iter()
        .filter(|object| object.lineage == newest && object.opening.is_none())
        .max_by_key(|object| object.receipts().count())
        .unwrap()
}

/// A copy of a run without its tensors' siblings: configuration, ledger and checkpoints.
fn copy(run: &Path, name: &str) -> PathBuf {
    let copy = run.with_file_name(name);
    let copied = Command::new("cp").arg("-r").arg(run).arg(&copy).status().unwrap();
    assert!(copied.success());
    copy
}

/// A run that was killed as a whole after its first checkpoint and then went on to step 200.
#[test]
fn a_killed_and_resumed_run_is_sound_and_every_planted_fault_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let data = dataset(folder.path());
    let run = folder.path().join("run");
    let mut child =
        launch(folder.path(), &data, "run", 2, &["train.iterations=100000"]).spawn().unwrap();
    wait_for(&run.join("checkpoints/step-00000010/manifest.json"));
    child.kill().unwrap();
    child.wait().unwrap();
    // What is there right after the kill is sound: what the ledger lacks, the checkpoint carries.
    assert!(audited(&run)["steps"].as_u64() >= Some(10));

    succeed(&launch(folder.path(), &data, "run", 2, &["train.iterations=200"]).output().unwrap());
    let report = audited(&run);
    assert_eq!((&report["steps"], &report["samples"]), (&200.into(), &400.into()), "{report}");
    assert_eq!(report["lineages"], 2, "{report}");
    let pool = report["pool"].as_u64().unwrap();
    assert_eq!(report["epochs_complete"], 400 / pool, "{report}");
    let said = audit(&run);
    succeed(&said);
    assert!(text(&said.stdout).starts_with("sound: 200 steps"), "{}", text(&said.stdout));
    plant(&run);
}

/// Plants each fault in a copy of a sound run; the audit must name it.
fn plant(run: &Path) {
    let victim = fullest(run);
    let (name, first) = (object_path(victim.number), victim.receipts[0].first.0);
    assert!(victim.receipts[0].fingerprints.len() > 4, "{victim:?}");
    let deal = (1..=victim.number).rev().find_map(|number| read(run, number).opening).unwrap().deal;
    let deal = Deal::new(deal).unwrap();
    let told = |fault: &str, parts: &[&str], damage: &dyn Fn(&Path, Object)| {
        let copy = copy(run, fault);
        damage(&copy, victim.clone());
        let output = audit(&copy);
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{fault}: {error}");
        for part in parts {
            assert!(error.contains(part), "{fault}: {part}: {error}");
        }
        assert_eq!(error.trim_end().lines().count(), 1, "{fault}: {error}");
        let json = Command::new(CPCR).args(["audit", "--json"]).arg(&copy).output().unwrap();
        let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
        assert_eq!(json["sound"], false, "{fault}: {json}");
    };

    let at = format!("{name}, step {}", first + 2);
    told("a dropped step", &[&at, "missing"], &|run, mut object| {
        let mut rest = object.receipts[0].clone();
        rest.first = Step(first + 3);
        rest.fingerprints.drain(..3);
        object.receipts[0].fingerprints.truncate(2);
        object.receipts.insert(1, rest);
        put(run, &object);
    });
    told("a doubled step", &[&name, "is recorded twice"], &|run, mut object| {
        let mut again = object.receipts[0].clone();
        again.fingerprints.truncate(1);
        object.receipts.insert(1, again);
        put(run, &object);
    });
    let step = Step(first + 2);
    let draws: Vec<Draw> = (0..2).map(|slot| deal.unlabelled(step, slot)).collect();
    let pool = &deal.spec().unlabelled;
    let other = pool.clone().find(|sample| draws.iter().all(|d| d.sample != *sample)).unwrap();
    let story =
        format!("sample {other} stands in slot 1, where sample {} was planned", draws[1].sample);
    told("a swapped sample", &[&at, &story], &|run, mut object| {
        let mut swapped = draws.clone();
        swapped[1].sample = other;
        let part = Part::of(step, &(0..2), &swapped);
        object.receipts[0].fingerprints[2] = part.fingerprint;
        put(run, &object);
    });
    told("a truncated object", &[&name, "seal"], &|run, _| {
        let path = run.join(&name);
        let length = std::fs::metadata(&path).unwrap().len();
        std::fs::File::options().write(true).open(&path).unwrap().set_len(length / 2).unwrap();
    });
    told("a changed object", &[&name, "seal"], &|run, _| {
        let path = run.join(&name);
        let changed =
            std::fs::read_to_string(&path).unwrap().replacen("\"samples\": 2", "\"samples\": 3", 1);
        std::fs::write(path, changed).unwrap();
    });
    told("a missing object", &["ledger/00000002.json: it is missing"], &|run, _| {
        std::fs::remove_file(run.join(object_path(2))).unwrap();
    });
    told("a newer format", &[&name, "format 2", "release"], &|run, _| {
        let newer = seal(&serde_json::json!({ "format": 2, "pages": [] })).unwrap();
        std::fs::write(run.join(&name), newer).unwrap();
    });
    told("an orphan", &["lineage 99, which is not there"], &|run, _| {
        let numbers = (1..=victim.number).rev();
        let mut opens =
            numbers.map(|n| read(run, n)).find(|object| object.opening.is_some()).unwrap();
        opens.opening.as_mut().unwrap().origin = Origin::Lineage(Lineage(99));
        put(run, &opens);
    });
    told("another seed", &["seed: 1338"], &|run, _| {
        let path = run.join("config.toml");
        let config = std::fs::read_to_string(&path).unwrap();
        let seed = config.lines().find(|line| line.starts_with("seed = ")).unwrap();
        std::fs::write(&path, config.replace(seed, "seed = 1338")).unwrap();
    });
}

#[test]
fn of_two_coordinators_the_later_is_obeyed_and_the_run_stays_sound() {
    let folder = tempfile::tempdir().unwrap();
    let data = dataset(folder.path());
    let run = folder.path().join("run");
    let first = launch(folder.path(), &data, "run", 1, &["train.iterations=3000"]).spawn().unwrap();
    wait_for(&run.join("checkpoints/step-00000010/manifest.json"));
    let mut second = Command::new(CPCR)
        .env(PARENT_VARIABLE, std::process::id().to_string())
        .args(["coordinator", "--nodes", "1", "--run"])
        .arg(&run)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // At the next checkpoint the first one finds its number taken, and everything of it leaves.
    let output = first.wait_with_output().unwrap();
    second.kill().unwrap();
    second.wait().unwrap();
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("another coordinator serves this run"), "{error}");
    assert!(audited(&run)["steps"].as_u64() >= Some(10));
}

#[test]
fn a_run_without_unlabelled_samples_is_said_to_be_one() {
    let folder = tempfile::tempdir().unwrap();
    let data = dataset(folder.path());
    let set = ["train.iterations=6", "method=supervised"];
    succeed(&launch(folder.path(), &data, "run", 1, &set).output().unwrap());
    let output = audit(&folder.path().join("run"));
    succeed(&output);
    let said = text(&output.stdout);
    assert!(said.contains("sound: 6 steps") && said.contains("no unlabelled samples"), "{said}");
}

#[test]
fn what_is_no_run_and_what_has_no_ledger_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let no_run = audit(folder.path());
    assert_eq!(no_run.status.code(), Some(2), "{}", text(&no_run.stderr));
    std::fs::write(folder.path().join("config.toml"), "name = \"old\"\n").unwrap();
    let fresh = audit(folder.path());
    succeed(&fresh);
    assert!(text(&fresh.stdout).contains("no step was taken yet"));
    // As an older release left it: a checkpoint that says nothing of receipts.
    let one =
        HostTensor { dtype: safetensors::Dtype::F32, shape: vec![1], bytes: vec![0; 4].into() };
    let tensors = || NamedTensors::from_iter([("a".to_owned(), one.clone())]);
    let snapshot = Snapshot {
        step: Step(30),
        world_size: WorldSize(2),
        threads: 1,
        position: Position::default(),
        model: tensors(),
        optimizer: tensors(),
        state: TrainState(serde_json::json!({ "history": "" })),
        best: Vec::new(),
    };
    let identity = RunIdentity { config_sha256: "0".repeat(64), dataset_sha256: "0".repeat(64) };
    let url = folder.path().display().to_string();
    let store = Store::open(&url, &StoreOptions::default()).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(write(&store, &identity, &snapshot)).unwrap();
    let old = audit(folder.path());
    let error = text(&old.stderr);
    assert_eq!(old.status.code(), Some(1), "{error}");
    assert!(error.contains("no ledger, but a checkpoint of step 30"), "{error}");
}
