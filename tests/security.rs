//! Who gets into a run, and what becomes of its secrets: real processes, told apart by their join tokens.

// A test that cannot go on is a test that fails.
#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use cpcr::proto::wire::coordinator_client::CoordinatorClient;
use cpcr::proto::wire::{StopRequest, WatchRequest};
use cpcr::trust::{JoinToken, TOKEN_FILE_VARIABLE, TOKEN_VARIABLE, Trust, TrustError};
use support::{CPCR, dataset, launch, processes, text, wait_for_a_step};

const TOKEN: &str = "planted-join-token-5f0c3b9a7e1d4826";
const OTHER: &str = "another-join-token-a94e17c2d85b3f60";
const SECRET: &str = "planted-s3-secret-0b8e6d41f7a29c35";

/// A process that does not know the token of whoever runs the tests.
fn cpcr(arguments: &[&str], token: Option<&str>) -> Command {
    let mut command = Command::new(CPCR);
    command.args(arguments).env_remove(TOKEN_VARIABLE).env_remove(TOKEN_FILE_VARIABLE);
    command.envs(token.map(|token| (TOKEN_VARIABLE, token)));
    command.stdin(Stdio::null());
    command
}

fn refused(output: &Output, status: i32, parts: &[&str]) {
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{said}");
    let last = said.lines().last().unwrap_or_default();
    for part in parts {
        assert!(last.contains(part), "{part:?} is not in: {said}");
    }
    assert!(!said.contains(TOKEN) && !said.contains(OTHER), "{said}");
}

/// A coordinator on loopback that holds `TOKEN`; killed when dropped.
struct Coordinator {
    child: Child,
    address: String,
}

impl Coordinator {
    fn start(folder: &Path) -> Self {
        let (data, run) = (dataset(folder), folder.join("run"));
        let (data, run) = (data.to_str().unwrap(), run.to_str().unwrap());
        let arguments = [
            "coordinator",
            "--config",
            "demo",
            "--nodes=1",
            "--backend=gloo",
            "--data",
            data,
            "--run",
            run,
        ];
        let mut command = cpcr(&arguments, Some(TOKEN));
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut address = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut address).unwrap();
        assert!(!address.is_empty());
        Self { child, address: address.trim().to_owned() }
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

#[test]
fn beyond_loopback_nothing_listens_or_connects_without_a_token() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run").display().to_string();
    let coordinator = ["coordinator", "--listen=0.0.0.0:0", "--nodes=1", "--run", &run];
    let output = cpcr(&coordinator, None).output().unwrap();
    refused(&output, 2, &["0.0.0.0:0", TOKEN_VARIABLE, "openssl rand"]);
    let bucket = folder.path().join("s3").display().to_string();
    let s3 = ["s3", "--listen=0.0.0.0:0", "--access-key=name", "--dir", &bucket];
    let output = cpcr(&s3, None).env("AWS_SECRET_ACCESS_KEY", SECRET).output().unwrap();
    refused(&output, 2, &["0.0.0.0:0", TOKEN_VARIABLE]);
    // TEST-NET-1: an address that is nobody's. Nothing is sent there.
    let worker = ["worker", "--coordinator=192.0.2.1:7070", "--node=0", "--gpus=0", "--run", &run];
    let began = Instant::now();
    let output = cpcr(&worker, None).output().unwrap();
    refused(&output, 2, &["192.0.2.1:7070", TOKEN_VARIABLE]);
    assert!(began.elapsed() < Duration::from_secs(10));
    // A token that is none is refused everywhere, loopback or not.
    let output = cpcr(&worker, Some("guess me")).output().unwrap();
    refused(&output, 2, &[TOKEN_VARIABLE, "32"]);
    let file = folder.path().join("missing");
    let output = cpcr(&worker, None).env(TOKEN_FILE_VARIABLE, &file).output().unwrap();
    refused(&output, 2, &[TOKEN_FILE_VARIABLE, "missing"]);
    let output = cpcr(&worker, Some(TOKEN)).env(TOKEN_FILE_VARIABLE, &file).output().unwrap();
    refused(&output, 2, &["both"]);
}

/// More than may shake hands at once: who is turned away comes again.
#[test]
fn many_from_one_address_all_get_in() {
    let arguments = ["bench", "coordinator", "--members", "200", "--seconds", "1", "--json"];
    let output = cpcr(&arguments, None).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["members"], 200, "{report}");
}

#[test]
fn whoever_does_not_hold_the_token_does_not_get_in() {
    let folder = tempfile::tempdir().unwrap();
    let coordinator = Coordinator::start(folder.path());
    let run = folder.path().join("run").display().to_string();
    let at = format!("--coordinator={}", coordinator.address);
    let patient = ["worker", &at, "--node=0", "--gpus=0", "--patience-s=20", "--run", &run];
    let worker = ["worker", &at, "--node=0", "--gpus=0", "--patience-s=1", "--run", &run];
    let began = Instant::now();
    // Another token: both sides see it, and when it stays so waiting does not help.
    let output = cpcr(&patient, Some(OTHER)).output().unwrap();
    refused(&output, 2, &[&coordinator.address, TOKEN_VARIABLE]);
    // No token: plain text, which is not answered.
    let output = cpcr(&worker, None).output().unwrap();
    refused(&output, 1, &["coordinator", "out of reach"]);
    assert!(began.elapsed() < Duration::from_secs(20));
    // Plain gRPC's first bytes: an alert of TLS and the end.
    let mut plain = TcpStream::connect(&coordinator.address).unwrap();
    plain.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    plain.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").unwrap();
    let mut answer = Vec::new();
    // A reset is an end too.
    plain.read_to_end(&mut answer).ok();
    assert!(answer.is_empty() || answer[0] == 21, "{answer:?}");

    // It was there all the time, for those who hold it; the same from a file.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let trust = |token| Trust::holding(&JoinToken::new(token, "test").unwrap()).unwrap();
    runtime.block_on(async {
        let error = trust(OTHER).channel(&coordinator.address).await.unwrap_err();
        assert!(matches!(error, TrustError::Stranger { .. }), "{error}");
        let channel = trust(TOKEN).channel(&coordinator.address).await.unwrap();
        let mut client = CoordinatorClient::new(channel);
        let mut statuses = client.watch(WatchRequest {}).await.unwrap().into_inner();
        let status = statuses.message().await.unwrap().unwrap();
        assert_eq!((status.members, status.wanted), (0, 1), "somebody got in");
        client.stop(StopRequest { reason: "test".to_owned() }).await.unwrap();
    });
    let file = folder.path().join("token");
    std::fs::write(&file, format!("{TOKEN}\n")).unwrap();
    let output = cpcr(&worker, None).env(TOKEN_FILE_VARIABLE, &file).output().unwrap();
    let said = text(&output.stderr);
    assert!(!said.contains("another") && output.status.code() != Some(2), "{said}");
}

/// Where a planted secret was found, in the files under `folder`.
fn found_in(folder: &Path, secret: &str, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found_in(&path, secret, found);
        } else {
            let bytes = std::fs::read(&path).unwrap();
            if bytes.windows(secret.len()).any(|window| window == secret.as_bytes()) {
                found.push(path.display().to_string());
            }
        }
    }
}

/// A run whose bucket is behind an S3 server, both secrets planted and all logs at their most talkative: neither shows
/// in a file, in what was printed, or in a process list.
#[test]
fn no_secret_is_logged_stored_or_listed() {
    let folder = tempfile::tempdir().unwrap();
    let data = dataset(folder.path());
    let bucket = folder.path().join("s3/bucket");
    std::fs::create_dir_all(&bucket).unwrap();
    let environment = [
        ("AWS_ACCESS_KEY_ID", "name"),
        ("AWS_SECRET_ACCESS_KEY", SECRET),
        ("AWS_REGION", "us-east-1"),
        (TOKEN_VARIABLE, TOKEN),
        ("RUST_LOG", "trace"),
    ];
    let served = folder.path().join("s3").display().to_string();
    let mut s3 = cpcr(&["s3", "--listen=127.0.0.1:0", "--dir", &served], None);
    let log = std::fs::File::create(folder.path().join("s3.log")).unwrap();
    let mut s3 = s3.envs(environment).stdout(Stdio::piped()).stderr(log).spawn().unwrap();
    let mut address = String::new();
    BufReader::new(s3.stdout.take().unwrap()).read_line(&mut address).unwrap();
    let sets = ["train.iterations=6", "checkpoint.every=3"];
    let mut run = launch(folder.path(), &data, "s3://bucket/run", 2, &sets);
    run.envs(environment).env_remove(TOKEN_FILE_VARIABLE);
    run.env("AWS_ENDPOINT", format!("http://{}", address.trim()));
    let mut run = run.spawn().unwrap();
    wait_for_a_step(&mut run);
    let mut listed = Vec::new();
    for pid in processes("cpcr") {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        listed.push(text(&line));
    }
    assert!(listed.iter().any(|line| line.contains("s3://bucket/run")), "{listed:?}");
    let output = run.wait_with_output().unwrap();
    s3.kill().unwrap();
    s3.wait().unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    for secret in [TOKEN, SECRET] {
        assert!(!said.contains(secret), "on the terminal");
        assert!(!listed.iter().any(|line| line.contains(secret)), "in a process list");
        let mut found = Vec::new();
        found_in(folder.path(), secret, &mut found);
        assert!(found.is_empty(), "{found:?}");
    }
    // The search itself finds what is there.
    std::fs::write(bucket.join("planted"), [b"x", TOKEN.as_bytes()].concat()).unwrap();
    let mut found = Vec::new();
    found_in(folder.path(), TOKEN, &mut found);
    assert_eq!(found.len(), 1);
}
