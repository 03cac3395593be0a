//! Server and client together, over loopback.

use std::net::Ipv4Addr;
use std::time::Instant;

use super::super::{KvClient, KvError, VALUE_BYTES_MAX};
use super::*;
use crate::trust::JoinToken;

const SECOND: Duration = Duration::from_secs(1);

/// A runtime for the server (its threads serve while the test blocks) and a client.
fn start() -> (tokio::runtime::Runtime, KvServer, Arc<KvClient>) {
    start_with(Trust::holding(&JoinToken::random().unwrap()).unwrap())
}

fn start_with(trust: Trust) -> (tokio::runtime::Runtime, KvServer, Arc<KvClient>) {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let address = (Ipv4Addr::LOCALHOST, 0).into();
    let server = runtime.block_on(KvServer::bind(address, &trust)).unwrap();
    let client = Arc::new(KvClient::new(server.local_addr(), SECOND, trust));
    (runtime, server, client)
}

#[test]
fn every_operation_does_what_c10d_expects() {
    let (_runtime, server, client) = start();
    client.set(b"a", b"1").unwrap();
    assert_eq!(client.get(b"a", SECOND).unwrap(), b"1");
    assert_eq!(client.add(b"a", 4).unwrap(), 5);
    assert_eq!(client.compare_set(b"b", b"", b"x").unwrap(), b"x");
    assert!(client.check(&[b"a", b"b"]).unwrap());
    assert!(!client.check(&[b"a", b"c"]).unwrap());
    assert_eq!(client.num_keys().unwrap(), 2);
    assert!(client.delete(b"b").unwrap());
    assert!(!client.delete(b"b").unwrap());
    client.wait(&[b"a"], SECOND).unwrap();
    assert_eq!(server.num_keys(), 1);
}

#[test]
fn a_wait_ends_with_the_key_and_holds_nobody_up() {
    let (_runtime, _server, client) = start();
    let waiting = {
        let client = client.clone();
        std::thread::spawn(move || client.get(b"late", 20 * SECOND))
    };
    std::thread::sleep(Duration::from_millis(50));
    let begun = Instant::now();
    client.set(b"late", b"here").unwrap();
    assert_eq!(waiting.join().unwrap().unwrap(), b"here");
    assert!(begun.elapsed() < 5 * SECOND);
}

#[test]
fn a_wait_without_its_key_times_out() {
    let (_runtime, _server, client) = start();
    let begun = Instant::now();
    let error = client.wait(&[b"never"], Duration::from_millis(100)).unwrap_err();
    assert!(matches!(error, KvError::Timeout(_)), "{error}");
    assert!(begun.elapsed() >= Duration::from_millis(100));
}

#[test]
fn forgetting_a_prefix_tells_who_waits_under_it() {
    let (_runtime, server, client) = start();
    let waiting = {
        let client = client.clone();
        std::thread::spawn(move || client.get(b"g1/x", 20 * SECOND))
    };
    std::thread::sleep(Duration::from_millis(100));
    server.forget("g1/");
    assert!(matches!(waiting.join().unwrap(), Err(KvError::Forgotten)));
}

#[test]
fn a_server_that_goes_away_is_lost_to_who_waits() {
    let (runtime, server, client) = start();
    let waiting = {
        let client = client.clone();
        std::thread::spawn(move || client.get(b"x", 20 * SECOND))
    };
    std::thread::sleep(Duration::from_millis(100));
    drop(server);
    assert!(matches!(waiting.join().unwrap(), Err(KvError::Lost { .. })));
    drop(runtime);
    assert!(matches!(client.set(b"x", b""), Err(KvError::Lost { .. })));
}

#[test]
fn what_is_too_long_is_refused_and_a_malformed_frame_costs_only_its_connection() {
    let (_runtime, _server, client) = start_with(Trust::loopback());
    let long = vec![0; VALUE_BYTES_MAX + 1];
    assert!(matches!(client.set(b"k", &long), Err(KvError::Refused(_))));
    let mut raw = std::net::TcpStream::connect(_server.local_addr()).unwrap();
    std::io::Write::write_all(&mut raw, &u32::MAX.to_le_bytes()).unwrap();
    raw.set_read_timeout(Some(5 * SECOND)).unwrap();
    assert!(matches!(std::io::Read::read(&mut raw, &mut [0]), Ok(0) | Err(_)));
    client.set(b"k", &long[1..]).unwrap();
}
