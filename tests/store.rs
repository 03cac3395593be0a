//! One conformance suite that every store runs: memory, folder, the embedded S3 server, moto.
//!
//! And what only some of them can show: the race of creators, a killed server, an endpoint that is
//! not there, a create whose answer was lost.

// Helpers outside #[test] functions panic on purpose too.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use cpcr::store::{
    Created, Fault, FaultyStore, S3Server, S3ServerOptions, Store, StoreError, StoreOptions, serve,
};
use cpcr::types::ObjectDigest;
use futures::StreamExt;
use object_store::memory::InMemory;
use support::{Moto, NO_MOTO, skipped};
use tempfile::TempDir;

const KEY: &str = "cpcr-test";
const SECRET: &str = "cpcr-test-secret";

fn s3_options(endpoint: &str) -> StoreOptions {
    StoreOptions::default()
        .with("aws_endpoint", endpoint)
        .with("aws_access_key_id", KEY)
        .with("aws_secret_access_key", SECRET)
        .with("aws_region", "us-east-1")
}

async fn embedded(dir: &TempDir, exclusive_creates: bool) -> S3Server {
    let mut options = S3ServerOptions::on_loopback(dir.path(), KEY, SECRET);
    options.exclusive_creates = exclusive_creates;
    serve(options).await.unwrap()
}

/// Bytes that repeat nowhere near a piece's length, so that swapped pieces show.
fn pattern(len: usize) -> Bytes {
    (0..len).map(|i| (i ^ (i >> 8) ^ (i >> 16)) as u8).collect::<Vec<u8>>().into()
}

/// What every store must do.
async fn conforms(root: Store) {
    root.probe().await.unwrap();
    assert_eq!(root.list("").await.unwrap(), vec![], "the probe leaves nothing behind");
    let store = root.child("run one").child("deep/er");
    assert!(store.get("a").await.unwrap_err().is_not_found());
    assert!(store.head("a").await.unwrap_err().is_not_found());
    assert!(!store.exists("a").await.unwrap());
    store.delete("a").await.unwrap();

    store.put("a", Bytes::from_static(b"first")).await.unwrap();
    store.put("a", Bytes::from_static(b"second!")).await.unwrap();
    assert_eq!(store.get("a").await.unwrap(), "second!");
    assert_eq!(store.head("a").await.unwrap().bytes, 7);
    assert_eq!(store.get_range("a", 2..5).await.unwrap(), "con");
    assert_eq!(store.get_range("a", 3..3).await.unwrap(), "");
    for range in [5..9, 7..9, 100..200] {
        let error = store.get_range("a", range).await.unwrap_err();
        assert!(matches!(error, StoreError::Corrupt { .. }), "{error}");
    }

    let made = |text: &'static str| store.create("b", Bytes::from_static(text.as_bytes()));
    assert_eq!(made("mine").await.unwrap(), Created::New);
    assert_eq!(made("yours").await.unwrap(), Created::Exists);
    assert_eq!(made("mine").await.unwrap(), Created::New, "one's own write is recognised");
    assert_eq!(store.get("b").await.unwrap(), "mine");

    store.put("empty", Bytes::new()).await.unwrap();
    assert_eq!(store.get("empty").await.unwrap(), "");
    let digest = ObjectDigest::of(b"mine");
    assert_eq!(store.get_verified("b", &digest).await.unwrap(), "mine");
    let error = store.get_verified("a", &digest).await.unwrap_err();
    assert!(matches!(&error, StoreError::Corrupt { path, .. } if path == "a"), "{error}");

    store.put("c/x y+é=1", Bytes::from_static(b"odd")).await.unwrap();
    assert_eq!(store.get("c/x y+é=1").await.unwrap(), "odd");
    store.put("cc", Bytes::from_static(b"not in c")).await.unwrap();
    let names = |list: Vec<cpcr::store::ObjectInfo>| -> Vec<String> {
        list.into_iter().map(|o| format!("{}:{}", o.path, o.bytes)).collect()
    };
    let all = names(store.list("").await.unwrap());
    assert_eq!(all, ["a:7", "b:4", "c/x y+é=1:3", "cc:8", "empty:0"]);
    assert_eq!(names(store.list("c").await.unwrap()), ["c/x y+é=1:3"]);
    assert_eq!(names(store.list("nothing").await.unwrap()), Vec::<String>::new());

    // Above the size at which network stores move pieces.
    let large = pattern((20 << 20) + 12345);
    store.put("large", large.clone()).await.unwrap();
    assert!(store.get("large").await.unwrap() == large);
    let at = (8 << 20) - 3..(8 << 20) + 5;
    assert_eq!(
        store.get_range("large", at.clone()).await.unwrap(),
        large.slice(at.start as usize..at.end as usize)
    );
    store.put_noted("large", large.slice(1..)).await.unwrap();
    assert!(store.get("large").await.unwrap() == large.slice(1..));
    assert!(!store.exists("large.upload").await.unwrap(), "it is no more on its way");
    assert_eq!(store.delete_prefix("c").await.unwrap(), 1);
    store.delete("a").await.unwrap();
    assert_eq!(names(store.list("").await.unwrap()).len(), 4);
    assert_eq!(root.delete_prefix("").await.unwrap(), 4);
    assert_eq!(root.list("").await.unwrap(), vec![]);
}

#[tokio::test]
async fn memory_conforms() {
    conforms(Store::open("memory:///", &StoreOptions::default()).unwrap()).await;
    conforms(Store::open("memory:///some/prefix", &StoreOptions::default()).unwrap()).await;
}

#[tokio::test]
async fn a_folder_conforms_by_path_and_by_url() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("new folder/é");
    let store = Store::open(path.to_str().unwrap(), &StoreOptions::default()).unwrap();
    assert!(store.url().starts_with("file:///"), "{store}");
    conforms(store.clone()).await;
    store.put("seen", Bytes::from_static(b"by both")).await.unwrap();
    let same = Store::open(store.url(), &StoreOptions::default().existing()).unwrap();
    assert_eq!(same.get("seen").await.unwrap(), "by both");
    same.delete("seen").await.unwrap();
    conforms(same).await;
}

#[tokio::test]
async fn the_embedded_server_conforms() {
    let dir = TempDir::new().unwrap();
    let server = embedded(&dir, true).await;
    let options = s3_options(&server.endpoint());
    conforms(Store::open("s3://bucket/prefix/", &options).unwrap()).await;
    conforms(Store::open("s3://another", &options).unwrap()).await;
    server.shutdown().await;
}

#[tokio::test]
async fn a_long_listing_is_complete() {
    let dir = TempDir::new().unwrap();
    let server = embedded(&dir, true).await;
    let store = Store::open("s3://bucket", &s3_options(&server.endpoint())).unwrap();
    // More than S3's page of 1000.
    let puts = (0..1100).map(|i| {
        let store = store.clone();
        async move { store.put(&format!("o/{i:05}"), Bytes::from_static(b"x")).await.unwrap() }
    });
    futures::stream::iter(puts).buffer_unordered(16).collect::<Vec<()>>().await;
    let paths: Vec<_> = store.list("o").await.unwrap().into_iter().map(|o| o.path).collect();
    assert_eq!(paths, (0..1100).map(|i| format!("o/{i:05}")).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn moto_conforms() {
    let Some(moto) = Moto::start() else {
        skipped("moto_conforms", NO_MOTO);
        return;
    };
    let options = s3_options(&moto.endpoint);
    let missing = Store::open("s3://nowhere", &options).unwrap();
    let error = missing.probe().await.unwrap_err();
    assert!(error.to_string().contains("bucket does not exist"), "{error}");
    conforms(Store::open("s3://bucket/prefix", &options).unwrap()).await;
}

/// Fifty keys, thirty-two creators each: how many keys had other than one winner?
async fn keys_with_other_than_one_winner(store: &Store) -> usize {
    let mut wrong = 0;
    for key in 0..50 {
        let creators = (0..32).map(|who| {
            let store = store.clone();
            tokio::spawn(async move {
                let body = Bytes::from(format!("creator {who}"));
                (store.create(&format!("race/{key}"), body.clone()).await.unwrap(), body)
            })
        });
        let answers = futures::future::join_all(creators).await;
        let winners: Vec<Bytes> = answers
            .into_iter()
            .map(Result::unwrap)
            .filter(|(created, _)| *created == Created::New)
            .map(|(_, body)| body)
            .collect();
        if winners.len() != 1 || store.get(&format!("race/{key}")).await.unwrap() != winners[0] {
            wrong += 1;
        }
    }
    wrong
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_many_creators_exactly_one_wins() {
    let memory = Store::open("memory:///", &StoreOptions::default()).unwrap();
    assert_eq!(keys_with_other_than_one_winner(&memory).await, 0, "memory");
    let dir = TempDir::new().unwrap();
    let folder = Store::open(dir.path().to_str().unwrap(), &StoreOptions::default()).unwrap();
    assert_eq!(keys_with_other_than_one_winner(&folder).await, 0, "folder");
    let dir = TempDir::new().unwrap();
    let server = embedded(&dir, true).await;
    let store = Store::open("s3://bucket", &s3_options(&server.endpoint())).unwrap();
    assert_eq!(keys_with_other_than_one_winner(&store).await, 0, "embedded S3");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn without_the_lock_the_race_is_lost() {
    let dir = TempDir::new().unwrap();
    let server = embedded(&dir, false).await;
    let store = Store::open("s3://bucket", &s3_options(&server.endpoint())).unwrap();
    let wrong = keys_with_other_than_one_winner(&store).await;
    assert!(wrong > 0, "s3s-fs has become safe by itself: the lock can go");
}

#[tokio::test]
async fn a_lost_answer_does_not_lose_the_create() {
    // Operation 0 is the put; its effect stays, its answer does not come.
    let engine = FaultyStore::new(Arc::new(InMemory::new()), Fault::AnswerLostAt(0));
    let store = Store::from_engine(engine, "memory:///");
    assert_eq!(store.create("a", Bytes::from_static(b"me")).await.unwrap(), Created::New);
    assert_eq!(store.create("a", Bytes::from_static(b"you")).await.unwrap(), Created::Exists);
    let engine = FaultyStore::new(Arc::new(InMemory::new()), Fault::FailsAt(0));
    let store = Store::from_engine(engine, "memory:///");
    assert_eq!(store.create("a", Bytes::from_static(b"me")).await.unwrap(), Created::New);
}

#[tokio::test]
async fn a_mismatch_is_fetched_again_once() {
    let inner = Arc::new(InMemory::new());
    let engine = FaultyStore::new(inner, Fault::Never);
    let store = Store::from_engine(engine.clone(), "memory:///");
    store.put("a", Bytes::from_static(b"rotten")).await.unwrap();
    let before = engine.operations();
    store.get_verified("a", &ObjectDigest::of(b"fresh")).await.unwrap_err();
    assert_eq!(engine.operations() - before, 2);
}

#[tokio::test]
async fn an_endpoint_that_is_not_there_is_told_in_seconds_in_one_line() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent_port = silent.local_addr().unwrap().port();
    for port in [port, silent_port] {
        let endpoint = format!("http://127.0.0.1:{port}");
        let store = Store::open("s3://bucket/run", &s3_options(&endpoint)).unwrap();
        let start = Instant::now();
        let many = futures::future::join_all((0..8).map(|_| store.get("a"))).await;
        assert!(start.elapsed() < Duration::from_secs(9), "{:?}", start.elapsed());
        for error in many.into_iter().map(Result::unwrap_err) {
            let line = error.to_string();
            assert!(matches!(error, StoreError::Unreachable { .. }), "{line}");
            assert!(line.contains("s3://bucket/run") && line.contains(&endpoint), "{line}");
            assert!(line.contains("AWS_ENDPOINT_URL") && !line.contains('\n'), "{line}");
        }
    }
}

#[tokio::test]
async fn wrong_credentials_are_denied() {
    let dir = TempDir::new().unwrap();
    let server = embedded(&dir, true).await;
    let options = s3_options(&server.endpoint()).with("aws_secret_access_key", "wrong");
    let store = Store::open("s3://bucket", &options).unwrap();
    let error = store.put("a", Bytes::new()).await.unwrap_err();
    assert!(matches!(error, StoreError::Denied { .. }), "{error}");
    assert!(!dir.path().join("bucket").exists(), "a stranger made a bucket");
}

#[tokio::test]
async fn a_folder_is_served_once() {
    let dir = TempDir::new().unwrap();
    let first = embedded(&dir, true).await;
    let again = S3ServerOptions::on_loopback(dir.path(), KEY, SECRET);
    let error = serve(again.clone()).await.unwrap_err();
    assert!(error.to_string().contains("another"), "{error}");
    first.shutdown().await;
    serve(again).await.unwrap();
}

/// The child of the next test: serves until killed. Does nothing in an ordinary run.
#[test]
fn serve_as_a_child() {
    let Ok(dir) = std::env::var("CPCR_TEST_SERVE") else { return };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let server = serve(S3ServerOptions::on_loopback(dir, KEY, SECRET)).await.unwrap();
        println!("\nserving {}", server.endpoint());
        tokio::time::sleep(Duration::from_secs(120)).await;
    });
}

fn spawn_server(dir: &TempDir) -> (Child, String) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "serve_as_a_child", "--nocapture"])
        .env("CPCR_TEST_SERVE", dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let endpoint = lines
        .map_while(Result::ok)
        .find_map(|line| line.strip_prefix("serving ").map(str::to_owned))
        .unwrap();
    (child, endpoint)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_server_shows_whole_objects_or_none() {
    let dir = TempDir::new().unwrap();
    let body = pattern(6 << 20);
    for round in 0..3 {
        let (mut child, endpoint) = spawn_server(&dir);
        let mut options = s3_options(&endpoint);
        (options.retries, options.deadline) = (0, Duration::from_secs(1));
        let store = Store::open("s3://bucket", &options).unwrap();
        store.put("before", Bytes::from_static(b"acknowledged")).await.unwrap();
        let writers: Vec<_> = (0..6)
            .map(|i| {
                let (store, body) = (store.clone(), body.clone());
                tokio::spawn(async move { store.put(&format!("half/{round}-{i}"), body).await })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(20 + 25 * round)).await;
        child.kill().unwrap();
        child.wait().unwrap();
        let acknowledged = futures::future::join_all(writers).await;
        let server = embedded(&dir, true).await;
        let store = Store::open("s3://bucket", &s3_options(&server.endpoint())).unwrap();
        assert_eq!(store.get("before").await.unwrap(), "acknowledged");
        for object in store.list("half").await.unwrap() {
            assert!(store.get(&object.path).await.unwrap() == body, "{} is half", object.path);
        }
        for (i, put) in acknowledged.into_iter().enumerate() {
            if put.unwrap().is_ok() {
                assert!(store.exists(&format!("half/{round}-{i}")).await.unwrap());
            }
        }
        server.shutdown().await;
    }
}

/// Needs a small file system of its own:
/// `mount -t tmpfs -o size=4m tmpfs DIR; CPCR_TEST_SMALL_DISK=DIR cargo test --test store full_disk`.
#[tokio::test]
async fn a_full_disk_is_told_as_such() {
    let Ok(disk) = std::env::var("CPCR_TEST_SMALL_DISK") else {
        skipped("a_full_disk_is_told_as_such", "CPCR_TEST_SMALL_DISK is not set");
        return;
    };
    let dir = TempDir::new_in(disk).unwrap();
    let folder = Store::open(dir.path().to_str().unwrap(), &StoreOptions::default()).unwrap();
    let server = embedded(&dir, true).await;
    let remote = Store::open("s3://bucket", &s3_options(&server.endpoint())).unwrap();
    for store in [folder, remote] {
        let error = store.put("big", pattern(8 << 20)).await.unwrap_err();
        assert!(matches!(error, StoreError::NoSpace { .. }), "{error}");
        store.put("small", Bytes::from_static(b"fits again")).await.unwrap();
        assert!(!store.exists("big").await.unwrap());
        store.delete("small").await.unwrap();
    }
}
