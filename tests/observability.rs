//! What a run shows of itself, by real processes: its page while it lives, its report and logs afterwards, its event files
//! through TensorBoard's own reader, and all of it in a browser where there is one.

#![allow(clippy::unwrap_used, clippy::panic)] // The lint's exception for tests stops at their helpers.

mod support;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use support::{CPCR, dataset, launch, processes, signal, skipped, succeed, text};

/// Longest wait for what a run must do by itself.
const PATIENCE: Duration = Duration::from_secs(90);

/// The runs of this file are timed: one at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    // Another test's failure is its own.
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The address of the page, from the launcher's own line; the rest of what it says is read on and kept by a thread.
fn dashboard(child: &mut Child) -> (String, std::thread::JoinHandle<String>) {
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut seen = String::new();
    let address = loop {
        let line = lines.next().unwrap_or_else(|| panic!("no dashboard:\n{seen}")).unwrap();
        if let Some(url) = line.strip_prefix("dashboard: http://") {
            break url.trim_end_matches('/').to_owned();
        }
        seen += &(line + "\n");
    };
    let rest = std::thread::spawn(move || {
        lines.map_while(Result::ok).map(|line| line + "\n").collect::<String>()
    });
    (address, rest)
}

fn get(address: &str, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = answer.split_once("\r\n\r\n")?;
    assert!(head.starts_with("HTTP/1.1 200"), "{path}: {head}");
    Some(body.to_owned())
}

/// Follows the run's events until a document is as wanted.
fn follow(address: &str, mut wanted: impl FnMut(&Value) -> bool) -> Value {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let request = format!("GET /events HTTP/1.1\r\nhost: {address}\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let until = Instant::now() + PATIENCE;
    let mut last = Value::Null;
    for line in BufReader::new(stream).lines() {
        let line = line.unwrap();
        if let Some(data) = line.strip_prefix("data: ") {
            last = serde_json::from_str(data).unwrap();
            if wanted(&last) {
                return last;
            }
        }
        assert!(Instant::now() < until, "not so within {PATIENCE:?}: {last:#}");
    }
    panic!("the events ended: {last:#}");
}

fn step_of(document: &Value) -> u64 {
    document["state"]["step"].as_u64().unwrap()
}

/// The values of a metric, by what stands between its name and its value.
fn metric(text: &str, name: &str) -> BTreeMap<String, f64> {
    let own = text.lines().filter_map(|line| line.strip_prefix(name));
    let pairs = own.filter_map(|rest| rest.rsplit_once(' '));
    let pairs = pairs.filter(|(labels, _)| labels.is_empty() || labels.starts_with('{'));
    pairs.map(|(labels, value)| (labels.to_owned(), value.parse().unwrap())).collect()
}

#[test]
fn the_page_shows_a_killed_worker_and_the_report_keeps_it() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let data = dataset(folder.path());
    let set = ["train.iterations=100000", "checkpoint.every=40", "validate.every=40"];
    let mut child = launch(folder.path(), &data, "run", "1:2", &set).spawn().unwrap();
    let (address, words) = dashboard(&mut child);
    assert!(get(&address, "/").unwrap().contains("<!DOCTYPE html>"));
    follow(&address, |document| {
        let checkpoints = document["checkpoints"].as_array().unwrap();
        document["state"]["workers"] == 2 && !checkpoints.is_empty() && step_of(document) > 45
    });
    let metrics = get(&address, "/metrics").unwrap();
    assert!(metric(&metrics, "cpcr_steps_done")[""] > 40.0, "{metrics}");
    assert_eq!(metric(&metrics, "cpcr_trainer_steps_total").len(), 2, "{metrics}");
    let overlays = get(&address, "/data.json").unwrap();
    let overlays: Value = serde_json::from_str(&overlays).unwrap();
    let picture = overlays["overlays"][0]["src"].as_str().unwrap();
    assert!(get(&address, &format!("/{picture}")).unwrap().contains("PNG"), "{picture}");

    let here = folder.path().display().to_string();
    let trainers: Vec<i32> = processes("cpcr-engine trainer")
        .into_iter()
        .filter(|pid| {
            std::fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == folder.path())
        })
        .collect();
    assert_eq!(trainers.len(), 2, "trainers in {here}");
    signal(trainers[0], Signal::KILL);
    let killed = Instant::now();
    let seen = follow(&address, |document| {
        document["interruptions"]
            .as_array()
            .unwrap()
            .iter()
            .any(|row| row["kind"] == "trainer-killed")
    });
    let took = killed.elapsed();
    assert!(took < Duration::from_secs(2), "shown after {took:?}");
    let before = step_of(&seen);
    let after = follow(&address, |document| {
        let rows = document["interruptions"].as_array().unwrap();
        let over = rows.iter().find(|row| row["kind"] == "trainer-killed" && row["open"] == false);
        over.is_some() && step_of(document) > before
    });
    let rows = after["interruptions"].as_array().unwrap();
    let row = rows.iter().find(|row| row["kind"] == "trainer-killed").unwrap();
    let phases = ["detect_s", "fence_s", "regroup_s", "restore_s", "step_s"];
    let sum: f64 = phases.iter().map(|phase| row[phase].as_f64().unwrap()).sum();
    assert!((sum - row["outage_s"].as_f64().unwrap()).abs() < 1e-6, "{row}");

    signal(i32::try_from(child.id()).unwrap(), Signal::INT);
    assert_eq!(child.wait().unwrap().code(), Some(75), "{}", words.join().unwrap());

    // The same run, resumed and brought to its end by a coordinator that knows what the one before saw.
    let total = format!("train.iterations={}", step_of(&after) + 200);
    let output = launch(folder.path(), &data, "run", "1:2", &[&total]).output().unwrap();
    succeed(&output);
    let run = folder.path().join("run");
    let page = std::fs::read_to_string(run.join("report/index.html")).unwrap();
    let document: Value =
        serde_json::from_slice(&std::fs::read(run.join("report/page.json")).unwrap()).unwrap();
    assert!(page.contains("trainer-killed"));
    assert_eq!(
        (document["live"].as_bool(), document["state"]["status"].as_i64()),
        (Some(false), Some(0))
    );
    assert!(document["goodput"]["parts_s"]["training"].as_f64().unwrap() > 0.0, "{document}");
    assert!(document["generations"].as_array().unwrap().len() >= 3, "{document}");
    assert!(document["report"]["scores"]["volumes"].as_u64().unwrap() > 0);
    logs_are_structured(&run);
}

/// Those of trainers are JSON, say whose they are, and are in the run's folder too.
fn logs_are_structured(run: &Path) {
    let copies = run.join("logs/node-0000");
    let mut lines = Vec::new();
    for entry in std::fs::read_dir(&copies).unwrap_or_else(|error| panic!("{copies:?}: {error}")) {
        let text = std::fs::read_to_string(entry.unwrap().path()).unwrap();
        lines.extend(text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()));
    }
    assert!(!lines.is_empty());
    let ranks = lines.iter().filter(|line| line["span"]["cpcr.rank"].is_u64());
    assert!(ranks.count() > 0, "{lines:?}");
}

#[test]
fn beyond_loopback_there_is_no_page_without_a_token() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let mut command = Command::new(CPCR);
    command.env_remove("CPCR_JOIN_TOKEN").args([
        "coordinator",
        "--nodes=1",
        "--dashboard=0.0.0.0:0",
    ]);
    let output = command.arg("--run").arg(&run).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("CPCR_JOIN_TOKEN"), "{}", text(&output.stderr));
    let nonsense =
        Command::new(CPCR).args(["coordinator", "--nodes=1", "--dashboard=here"]).output();
    let nonsense = nonsense.unwrap();
    assert_eq!(nonsense.status.code(), Some(2));
    assert!(text(&nonsense.stderr).contains("127.0.0.1:8080"), "{}", text(&nonsense.stderr));
}

/// What TensorBoard's reader finds, as JSON: step and value of every point, the number of pictures.
const READER: &str = r#"
import json, sys
from tensorboard.backend.event_processing import event_accumulator
events = event_accumulator.EventAccumulator(
    sys.argv[1], size_guidance={event_accumulator.SCALARS: 0, event_accumulator.IMAGES: 0})
events.Reload()
tags = events.Tags()
print(json.dumps({
    "scalars": {tag: [[e.step, e.value] for e in events.Scalars(tag)] for tag in tags["scalars"]},
    "images": {tag: [[e.step, e.height, e.width] for e in events.Images(tag)] for tag in tags["images"]},
}))
"#;

#[test]
fn tensorboard_reads_what_a_run_writes_and_what_it_did_again_once() {
    let _alone = alone();
    let python = std::env::var("CPCR_PEER_PYTHON").unwrap_or("python3".to_owned());
    let folder = tempfile::tempdir().unwrap();
    let data = dataset(folder.path());
    let run = |set: &[&str]| launch(folder.path(), &data, "run", 1, set).output().unwrap();
    succeed(&run(&["train.iterations=12", "checkpoint.every=5", "validate.every=6"]));
    // A checkpoint at 12, the last; what follows is another process's.
    succeed(&run(&["train.iterations=23", "checkpoint.every=5", "validate.every=6"]));
    succeed(&run(&["train.iterations=25", "telemetry.tensorboard=false"]));
    let files = folder.path().join("run/tensorboard");
    let count = std::fs::read_dir(&files).unwrap().count();
    assert_eq!(count, 3 + 1 + 4, "5 6 10 12, then 15 18 20 23, then none");

    let probe = Command::new(&python)
        .args(["-c", "from tensorboard.backend.event_processing import event_accumulator"])
        .output();
    if !probe.is_ok_and(|probe| probe.status.success()) {
        let why = "no tensorboard here: `scripts/setup.sh --peers` prints a Python that has it, for CPCR_PEER_PYTHON";
        return skipped("tensorboard_reads_what_a_run_writes_and_what_it_did_again_once", why);
    }
    let read = Command::new(&python).args(["-c", READER]).arg(&files).output().unwrap();
    succeed(&read);
    let found: Value = serde_json::from_slice(&read.stdout).unwrap();
    let csv = std::fs::read_to_string(folder.path().join("run/report/metrics.csv")).unwrap();
    let mut rows = csv.lines().map(|line| line.split(',').collect::<Vec<_>>());
    let head = rows.next().unwrap();
    let column =
        |name: &str| head.iter().position(|column| column.trim_matches('"') == name).unwrap();
    let rows: Vec<Vec<&str>> = rows.filter(|row| row[0].parse::<u64>().unwrap() <= 23).collect();
    assert_eq!(rows.len(), 23);
    for (tag, name) in [
        ("loss/total", "loss.total"),
        ("loss/dice", "loss.dice"),
        ("train/learning_rate", "lr"),
        ("speed/images_per_s", "images_per_s"),
    ] {
        let points = found["scalars"][tag].as_array().unwrap_or_else(|| panic!("{tag}: {found}"));
        let expected: Vec<(u64, f64)> = rows
            .iter()
            .map(|row| (row[0].parse().unwrap(), row[column(name)].parse().unwrap()))
            .collect();
        assert_eq!(points.len(), expected.len(), "{tag}");
        for (point, (step, value)) in points.iter().zip(expected) {
            assert_eq!(point[0], step, "{tag}");
            assert_eq!(point[1].as_f64().unwrap() as f32, value as f32, "{tag} at step {step}");
        }
    }
    let dice = found["scalars"]["dice/mean"].as_array().unwrap();
    let steps: Vec<u64> = dice.iter().map(|point| point[0].as_u64().unwrap()).collect();
    assert_eq!(steps, [6, 12, 18, 23]);
    assert_eq!(found["images"]["validation/0"].as_array().unwrap().len(), 4, "{found}");
}

/// The script drives Chromium; where there is none it says that it skips.
#[test]
fn the_page_and_the_report_work_in_a_browser() {
    let _alone = alone();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/test-dashboard.py");
    let bin = Path::new(CPCR).parent().unwrap();
    for arguments in
        [vec!["page".into()], vec!["run".into(), "--bin".into(), bin.as_os_str().to_owned()]]
    {
        let output = Command::new("python3").arg(&script).args(&arguments).output();
        let Ok(output) = output else {
            return skipped("the_page_and_the_report_work_in_a_browser", "no python3 here");
        };
        let said = text(&output.stdout) + &text(&output.stderr);
        if let Some(line) = said.lines().find(|line| line.starts_with("SKIPPED")) {
            return skipped("the_page_and_the_report_work_in_a_browser", line);
        }
        assert!(output.status.success(), "{said}");
    }
}
