//! An agent hosts the key-value service and must start in milliseconds: what reaches only that
//! part of the crate must not load libtorch. This binary does just that, and looks.

// A test that cannot go on is a test that fails.
#![allow(clippy::unwrap_used)]

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use cpcr::kv::{KvClient, KvServer};
use cpcr::trust::{JoinToken, Trust};

#[test]
fn the_key_value_service_works_in_a_process_without_libtorch() {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let trust = Trust::holding(&JoinToken::random().unwrap()).unwrap();
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let server = runtime.block_on(KvServer::bind(address, &trust)).unwrap();
    let client = KvClient::new(server.local_addr(), Duration::from_secs(5), trust);
    client.set(b"g1/rank-0", b"here").unwrap();
    assert_eq!(client.get(b"g1/rank-0", Duration::from_secs(5)).unwrap(), b"here");
    server.forget("g1/");
    assert_eq!(server.num_keys(), 0);

    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let torch: Vec<_> = maps.lines().filter(|line| line.contains("libtorch")).collect();
    assert!(torch.is_empty(), "{torch:#?}");
}
