//! How a store is found and entered: profiles, the machine's role, proxies, encryption headers, as a server sees them.
//!
//! Against listeners of a few lines on loopback; what needs an environment of its own runs in a child
//! process. The embedded server is for `tests/store.rs`.

// Helpers outside #[test] functions panic on purpose too.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use bytes::Bytes;
use cpcr::store::{S3ServerOptions, Store, StoreError, StoreOptions, serve};
use tempfile::TempDir;

/// Longest wait for a request that should come.
const PATIENCE: Duration = Duration::from_secs(20);

/// Answers every request with an empty 200 and hands on its head, in lower case.
fn listen() -> (SocketAddr, Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let (send, heads) = channel();
    // Ends with the process: it waits in accept.
    std::thread::spawn(move || {
        for socket in listener.incoming().map_while(Result::ok) {
            if let Some(head) = answer(socket)
                && send.send(head).is_err()
            {
                return;
            }
        }
    });
    (addr, heads)
}

fn answer(mut socket: TcpStream) -> Option<String> {
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut reader = BufReader::new(socket.try_clone().ok()?);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).ok()? == 0 {
            return None;
        }
    }
    let head = head.to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
    reader.take(length.unwrap_or(0)).read_to_end(&mut Vec::new()).ok()?;
    let answer = "HTTP/1.1 200 OK\r\nETag: \"a\"\r\nLast-Modified: Mon, 01 Jan 2024 00:00:00 GMT\r\n\
         Content-Length: 0\r\nConnection: close\r\n\r\n";
    socket.write_all(answer.as_bytes()).ok()?;
    Some(head)
}

/// The first request that `wanted` accepts.
fn wait_for(heads: &Receiver<String>, wanted: impl Fn(&str) -> bool) -> String {
    loop {
        let head = heads.recv_timeout(PATIENCE).expect("no such request came");
        if wanted(&head) {
            return head;
        }
    }
}

/// No profile of whoever runs the tests plays a part.
fn bare() -> StoreOptions {
    StoreOptions { first_contact: Duration::from_secs(4), ..StoreOptions::default() }
        .with("aws_shared_credentials_file", "/nonexistent/credentials")
        .with("aws_config_file", "/nonexistent/config")
        .with("aws_region", "us-east-1")
}

#[tokio::test]
async fn kms_encryption_goes_out_with_every_write() {
    let (addr, heads) = listen();
    let options = bare()
        .with("aws_endpoint_url", format!("http://{addr}"))
        .with("aws_access_key_id", "k")
        .with("aws_secret_access_key", "s")
        .with("aws_server_side_encryption", "aws:kms")
        .with("aws_sse_kms_key_id", "arn:aws:kms:eu:1:key/abc");
    let store = Store::open("s3://bucket/run", &options).unwrap();
    store.put("a", Bytes::from_static(b"x")).await.unwrap();
    let head = wait_for(&heads, |head| head.starts_with("put "));
    // Path style is what stores that are not AWS understand.
    assert!(head.starts_with("put /bucket/run/a http/1.1"), "{head}");
    assert!(head.contains("x-amz-server-side-encryption: aws:kms\r\n"), "{head}");
    let key = "x-amz-server-side-encryption-aws-kms-key-id: arn:aws:kms:eu:1:key/abc\r\n";
    assert!(head.contains(key), "{head}");
}

// The server must go on while the child is waited for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_profile_opens_a_store() {
    let dir = TempDir::new().unwrap();
    let server = S3ServerOptions::on_loopback(dir.path().join("s3"), "profile-key", "secret");
    let server = serve(server).await.unwrap();
    let (credentials, config) = (dir.path().join("credentials"), dir.path().join("config"));
    let keys = "[lab]\naws_access_key_id = profile-key\naws_secret_access_key = secret\n";
    std::fs::write(&credentials, keys).unwrap();
    let text = format!("[profile lab]\nregion = us-east-1\nendpoint_url = {}\n", server.endpoint());
    std::fs::write(&config, text).unwrap();
    let child = child("a_store_as_the_child_finds_it")
        .env("CPCR_TEST_URL", "s3://bucket/x")
        .env("AWS_SHARED_CREDENTIALS_FILE", &credentials)
        .env("AWS_CONFIG_FILE", &config)
        .env("AWS_PROFILE", "lab")
        .output()
        .unwrap();
    assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
    assert!(dir.path().join("s3/bucket/x/written").is_file());

    let missing = bare().with("aws_profile", "nobody");
    let error = Store::open("s3://bucket/x", &missing).unwrap_err();
    assert!(matches!(error, StoreError::BadUrl { .. }), "{error}");
    assert!(error.to_string().contains("'nobody'"), "{error}");
}

#[test]
fn the_machines_role_is_asked_for_only_without_other_credentials() {
    let (metadata, asked) = listen();
    let (addr, heads) = listen();
    let endpoint = format!("http://{addr}");
    let metadata = format!("http://{metadata}");
    let run = |with: &[(&str, &str)]| {
        child("a_store_as_the_child_finds_it")
            .env("CPCR_TEST_URL", "s3://bucket/x")
            .env("AWS_ENDPOINT_URL", &endpoint)
            .env("AWS_METADATA_ENDPOINT", &metadata)
            .envs(with.iter().copied())
            .output()
            .unwrap()
    };
    run(&[("AWS_ACCESS_KEY_ID", "k"), ("AWS_SECRET_ACCESS_KEY", "s")]);
    wait_for(&heads, |head| head.starts_with("put /bucket/x/written"));
    assert!(asked.try_recv().is_err(), "the role was asked for beside a key");
    run(&[]);
    let head = wait_for(&asked, |_| true);
    assert!(head.starts_with("put /latest/api/token"), "{head}");
}

#[test]
fn a_proxy_is_used_as_the_environment_says() {
    let (proxy, heads) = listen();
    let proxy = format!("http://{proxy}");
    let run = |endpoint: &str, with: &[(&str, &str)]| {
        child("a_store_as_the_child_finds_it")
            .env("CPCR_TEST_URL", "s3://bucket/x")
            .env("AWS_ENDPOINT_URL", endpoint)
            .env("AWS_ACCESS_KEY_ID", "k")
            .env("AWS_SECRET_ACCESS_KEY", "s")
            .envs(with.iter().copied())
            .output()
            .unwrap()
    };
    run("https://store.invalid", &[("HTTPS_PROXY", &proxy)]);
    let head = wait_for(&heads, |_| true);
    assert!(head.starts_with("connect store.invalid:443"), "{head}");
    while heads.try_recv().is_ok() {}
    run("http://store.invalid:9000", &[("HTTP_PROXY", &proxy)]);
    let head = wait_for(&heads, |_| true);
    assert!(head.contains("http://store.invalid:9000/bucket/x"), "{head}");
    while heads.try_recv().is_ok() {}
    let direct = [("HTTPS_PROXY", proxy.as_str()), ("NO_PROXY", "store.invalid")];
    let failed = run("https://store.invalid", &direct);
    assert!(!failed.status.success(), "a name that is nowhere was reached");
    assert!(heads.try_recv().is_err(), "NO_PROXY was ignored");
    // What runs on this machine is not looked for behind a proxy.
    let (server, requests) = listen();
    run(&format!("http://{server}"), &[("HTTP_PROXY", &proxy)]);
    wait_for(&requests, |head| head.starts_with("put /bucket/x/written"));
    assert!(heads.try_recv().is_err(), "the proxy was asked for a server on this machine");
}

/// This binary again, for one test, with next to nothing in its environment.
fn child(test: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).env_clear();
    command.env("AWS_REGION", "us-east-1").env("HOME", "/nonexistent");
    if let Some(path) = std::env::var_os("LD_LIBRARY_PATH") {
        command.env("LD_LIBRARY_PATH", path);
    }
    command
}

/// The child of the tests above: writes one object. Does nothing in an ordinary run.
#[test]
fn a_store_as_the_child_finds_it() {
    let Ok(url) = std::env::var("CPCR_TEST_URL") else { return };
    let mut options =
        StoreOptions { first_contact: Duration::from_secs(2), ..StoreOptions::default() };
    (options.deadline, options.timeout) = (Duration::from_secs(3), Duration::from_secs(2));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let store = Store::open(&url, &options).unwrap();
        store.put("written", Bytes::from_static(b"x")).await.unwrap();
    });
}
