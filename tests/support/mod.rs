//! What tests of whole processes share: the binaries, a small run, other people's S3 server.
//!
//! Each test binary uses a part of it.
#![allow(dead_code, clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

pub const LAUNCH: &str = env!("CARGO_BIN_EXE_cpcr-launch");
pub const CPCR: &str = env!("CARGO_BIN_EXE_cpcr");
/// Built together with the others; the agents look for it beside `cpcr`.
pub const ENGINE: &str = env!("CARGO_BIN_EXE_cpcr-engine");

/// A small network on small phantoms, some tens of steps.
pub const SMALL: [&str; 6] = [
    "patch_size=32",
    "batch.labelled=2",
    "batch.unlabelled=2",
    "validate.every=1000",
    "loss.warmup_epochs=0",
    "checkpoint.every=10",
];

pub fn dataset(folder: &Path) -> PathBuf {
    let data = folder.join("data");
    let made = Command::new(CPCR)
        .args(["data", "synth", "--patients", "8", "--out"])
        .arg(&data)
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", text(&made.stderr));
    data
}

pub fn launch(
    folder: &Path,
    data: &Path,
    run: &str,
    nodes: impl std::fmt::Display,
    set: &[&str],
) -> Command {
    assert!(Path::new(ENGINE).is_file());
    let mut command = Command::new(LAUNCH);
    command.current_dir(folder).args(["--config", "demo", "--run", run, "--data"]).arg(data);
    // The promises that these tests hold are the CPU's.
    command.args(["--backend", "gloo", "--nodes", &nodes.to_string()]);
    for pair in SMALL.iter().chain(set) {
        command.args(["--set", pair]);
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

/// Says that a test did not run, past the harness, which swallows what passing tests print.
pub fn skipped(test: &str, why: &str) {
    let aloud = format!("SKIPPED: {test} ({why})\n");
    std::io::stderr().write_all(aloud.as_bytes()).unwrap();
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub fn succeed(output: &Output) {
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
}

/// What `cpcr audit` says of a run that must be sound.
pub fn audited(run: &Path) -> serde_json::Value {
    let output = Command::new(CPCR).args(["audit", "--json"]).arg(run).output().unwrap();
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["sound"], true, "{report}");
    assert_eq!(report["dataset_checked"], true, "{report}");
    report
}

/// A file of the checkpoint of `step`.
pub fn checkpoint_file(run: &Path, step: u64, file: &str) -> PathBuf {
    let folder = run.join(format!("checkpoints/step-{step:08}"));
    // The manifest is JSON with a seal after it; the attempt's folder is what is wanted of it.
    let sealed = std::fs::read(folder.join("manifest.json")).unwrap();
    let mut values = serde_json::Deserializer::from_slice(&sealed).into_iter();
    let manifest: serde_json::Value = values.next().unwrap().unwrap();
    folder.join(manifest["attempt"].as_str().unwrap()).join(file)
}

/// Longest wait for a line of a run.
const PATIENCE: Duration = Duration::from_secs(90);

/// Reads the launcher's lines until the first step was taken; kills it if that takes too long.
pub fn wait_for_a_step(child: &mut Child) {
    let (found, waiting) = std::sync::mpsc::channel::<()>();
    let pid = i32::try_from(child.id()).unwrap();
    let watchdog = std::thread::spawn(move || {
        if waiting.recv_timeout(PATIENCE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            signal(pid, rustix::process::Signal::KILL);
        }
    });
    let mut seen = String::new();
    let mut lines = BufReader::new(child.stderr.take().unwrap());
    loop {
        let mut line = String::new();
        let read = lines.read_line(&mut line).unwrap();
        assert!(read > 0, "no step was taken:\n{seen}");
        seen.push_str(&line);
        if line.starts_with("step ") {
            break;
        }
    }
    child.stderr = Some(lines.into_inner());
    drop(found);
    watchdog.join().unwrap();
}

/// The processes whose command line holds `part`.
pub fn processes(part: &str) -> Vec<i32> {
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

pub fn signal(pid: i32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

/// What a process needs to find an S3 server that takes any credentials.
pub fn s3_environment(endpoint: &str) -> Vec<(&'static str, String)> {
    vec![
        ("AWS_ENDPOINT", endpoint.to_owned()),
        ("AWS_ACCESS_KEY_ID", "cpcr-test".to_owned()),
        ("AWS_SECRET_ACCESS_KEY", "cpcr-test-secret".to_owned()),
        ("AWS_REGION", "us-east-1".to_owned()),
        ("AWS_ALLOW_HTTP", "true".to_owned()),
    ]
}

/// Why there is no moto.
pub const NO_MOTO: &str =
    "no moto here: `scripts/setup.sh --peers` prints a Python that has it, for CPCR_PEER_PYTHON";

/// A moto server, killed when dropped.
pub struct Moto {
    child: Child,
    pub endpoint: String,
}

impl Moto {
    pub fn start() -> Option<Self> {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let endpoint = format!("http://127.0.0.1:{port}");
        let script = "import sys, boto3; from moto.server import ThreadedMotoServer as S; \
             S('127.0.0.1', int(sys.argv[1])).start(); \
             boto3.client('s3', endpoint_url=sys.argv[2], region_name='us-east-1', \
             aws_access_key_id='a', aws_secret_access_key='b').create_bucket(Bucket='bucket'); \
             print('ready', flush=True); sys.stdin.read()";
        let mut child =
            Command::new(std::env::var("CPCR_PEER_PYTHON").unwrap_or("python3".to_owned()))
                .args(["-c", script, &port.to_string(), &endpoint])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .spawn()
                .ok()?;
        // It says more than that; and nothing, if it cannot be imported.
        let mut lines = BufReader::new(child.stdout.take()?).lines().map_while(Result::ok);
        if !lines.any(|line| line == "ready") {
            child.kill().ok();
            child.wait().ok();
            return None;
        }
        Some(Self { child, endpoint })
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
