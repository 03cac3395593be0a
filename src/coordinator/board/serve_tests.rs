//! The server of the page over sockets: who may see it, and what.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::*;
use crate::coordinator::board::{Board, Facts};
use crate::store::StoreOptions;
use crate::trust::JoinToken;

/// A board on loopback, with a picture in its run's folder.
async fn served() -> (BoardServer, SharedBoard, SocketAddr) {
    let run = Store::open("memory:///", &StoreOptions::default()).unwrap();
    run.put("validations/00000007-0.png", b"a picture".as_slice().into()).await.unwrap();
    run.put("config.toml", b"secret".as_slice().into()).await.unwrap();
    let board = SharedBoard::new(Board::new(Facts::default(), None, 0.0));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = start(listener, &Trust::loopback(), board.clone(), run).unwrap();
    (server, board, address)
}

async fn ask(address: SocketAddr, method: &str, path: &str, host: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("{method} {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn the_page_its_data_metrics_and_pictures_are_there_and_nothing_else() {
    let (server, board, address) = served().await;
    assert_eq!(server.url, format!("http://{address}/"));
    board.change(|board, now| board.note(now, "hello"));
    for (path, expected) in [
        ("/", "<!DOCTYPE html>"),
        ("/data.json", "\"text\":\"hello\""),
        ("/metrics", "# TYPE cpcr_steps_done gauge"),
        ("/overlays/00000007-0.png", "a picture"),
        ("/healthz", "ok"),
    ] {
        let answer = ask(address, "GET", path, "localhost:1").await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{path}: {answer}");
        assert!(answer.to_lowercase().contains(&expected.to_lowercase()), "{path}: {answer}");
        assert!(answer.contains("content-security-policy: default-src 'none'"), "{path}: {answer}");
    }
    for path in
        ["/overlays/..%2fconfig.toml", "/overlays/00000008-0.png", "/config.toml", "/overlays/"]
    {
        let answer = ask(address, "GET", path, "127.0.0.1").await;
        assert!(answer.starts_with("HTTP/1.1 404 "), "{path}: {answer}");
    }
    let answer = ask(address, "POST", "/data.json", "localhost").await;
    assert!(answer.starts_with("HTTP/1.1 405 "), "it only reads: {answer}");
}

#[tokio::test]
async fn a_name_of_somebody_elses_that_means_this_machine_is_refused() {
    let (_server, _board, address) = served().await;
    for (host, status) in [
        ("evil.example", 403),
        ("evil.example:80", 403),
        ("localhost.evil.example", 403),
        ("LocalHost:8080", 200),
        ("[::1]:8080", 200),
        ("127.0.0.1", 200),
    ] {
        let answer = ask(address, "GET", "/data.json", host).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{host}: {answer}");
    }
}

#[tokio::test]
async fn changes_come_by_themselves_and_the_end_is_told_before_the_server_goes() {
    let (server, board, address) = served().await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(b"GET /events HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    let mut heard = String::new();
    let mut buffer = [0; 4096];
    while !heard.contains("event: run") {
        let n = stream.read(&mut buffer).await.unwrap();
        heard.push_str(&String::from_utf8_lossy(&buffer[..n]));
    }
    assert!(!heard.contains("something new"));
    board.change(|board, now| board.note(now, "something new"));
    while !heard.contains("something new") {
        let n = stream.read(&mut buffer).await.unwrap();
        assert!(n > 0, "{heard}");
        heard.push_str(&String::from_utf8_lossy(&buffer[..n]));
    }
    board.change(|board, now| board.ended(now, 0, "all is done"));
    let reading = async {
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).await.unwrap();
        String::from_utf8_lossy(&rest).into_owned()
    };
    let (rest, ()) = tokio::join!(reading, server.end());
    assert!(rest.contains("all is done"), "{rest}");
}

#[test]
fn beyond_loopback_the_password_is_wanted_which_is_not_the_token() {
    let token = JoinToken::new("0123456789abcdef0123456789abcdef", "test").unwrap();
    let trust = Trust::holding(&token).unwrap();
    let password = trust.page_password().unwrap();
    // By Python's hmac: HKDF by RFC 5869.
    assert_eq!(password, "525fdc27d2c3c5af6aeb73535aad21ec");
    assert!(!token.expose().contains(password));
    let with = |value: &str| {
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, value.parse().unwrap());
        gives(&headers, password)
    };
    let basic = |pair: &str| format!("Basic {}", BASE64_STANDARD.encode(pair));
    assert!(with(&format!("Bearer {password}")) && with(&basic(&format!("anybody:{password}"))));
    for wrong in ["", "Bearer", "Bearer ", "Basic !!!", password, &format!("Digest {password}")] {
        assert!(!with(wrong), "{wrong}");
    }
    assert!(!with(&format!("Bearer {}", token.expose())) && !with(&basic(password)));
    assert!(!gives(&HeaderMap::new(), password));
}
