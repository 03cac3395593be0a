//! Over real sockets on loopback: who gets in, who does not, and what both are told.

use std::net::Ipv4Addr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn holding(token: &str) -> Trust {
    Trust::holding(&JoinToken::new(token, "test").unwrap()).unwrap()
}

fn ours() -> Trust {
    holding("our-token-0123456789-0123456789-x")
}

fn theirs() -> Trust {
    holding("their-token-0123456789-0123456789")
}

/// A server that echoes one byte to whoever gets in; its address, and what each handshake came to.
async fn echo(
    trust: Trust,
    purpose: Purpose,
) -> (String, tokio::sync::mpsc::Receiver<io::Result<()>>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (told, outcomes) = tokio::sync::mpsc::channel(8);
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let one = async {
                let mut stream = trust.accept(stream, purpose).await?;
                let byte = stream.read_u8().await?;
                stream.write_u8(byte).await?;
                stream.flush().await
            };
            if told.send(one.await).await.is_err() {
                return;
            }
        }
    });
    (address, outcomes)
}

async fn ping(stream: &mut Stream) -> io::Result<u8> {
    stream.write_u8(7).await?;
    stream.flush().await?;
    stream.read_u8().await
}

#[tokio::test]
async fn holders_of_one_token_talk_and_plain_loopback_does_too() {
    for trust in [ours(), Trust::loopback()] {
        let (address, mut outcomes) = echo(trust.clone(), Purpose::Keys).await;
        let mut stream = trust.dial(&address, Purpose::Keys).await.unwrap();
        assert_eq!(ping(&mut stream).await.unwrap(), 7);
        outcomes.recv().await.unwrap().unwrap();
        let blocking = tokio::task::spawn_blocking(move || {
            use std::io::{Read, Write};
            let address = address.parse().unwrap();
            let mut stream = trust.dial_blocking(address, SECOND, Purpose::Keys).unwrap();
            stream.write_all(&[9]).unwrap();
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            byte[0]
        });
        assert_eq!(blocking.await.unwrap(), 9);
        outcomes.recv().await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn another_token_is_told_apart_by_both_sides() {
    let (address, mut outcomes) = echo(ours(), Purpose::Control).await;
    let refused = theirs().dial(&address, Purpose::Control).await.unwrap_err();
    assert!(matches!(&refused, TrustError::Stranger { .. }), "{refused:?}");
    assert!(refused.wants_mending() && refused.to_string().contains(&address), "{refused}");
    assert!(outcomes.recv().await.unwrap().is_err());
    let address = address.parse().unwrap();
    let blocking = move || theirs().dial_blocking(address, SECOND, Purpose::Control).unwrap_err();
    let refused = tokio::task::spawn_blocking(blocking).await.unwrap();
    assert!(matches!(refused, TrustError::Stranger { .. }), "{refused:?}");
}

#[derive(Debug)]
struct Nothing;

impl rustls::client::ResolvesClientCert for Nothing {
    fn resolve(
        &self,
        _: &[&[u8]],
        _: &[rustls::SignatureScheme],
    ) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

/// A client that does not check the server: only the server's own check keeps it out.
#[tokio::test]
async fn a_server_asks_for_the_certificate_itself() {
    let (address, mut outcomes) = echo(ours(), Purpose::Keys).await;
    for shown in [Some(theirs()), None] {
        let ours = ours();
        let (own, other) = (ours.0.as_ref().unwrap(), shown.as_ref().and_then(|s| s.0.clone()));
        // It trusts our authority, and shows another's certificate or none.
        let config = own.client(Purpose::Keys).unwrap();
        let mut config = rustls::ClientConfig::clone(&config);
        config.client_auth_cert_resolver = match &other {
            Some(other) => other.client(Purpose::Keys).unwrap().client_auth_cert_resolver.clone(),
            None => Arc::new(Nothing),
        };
        let stream = TcpStream::connect(&address).await.unwrap();
        let connector = TlsConnector::from(Arc::new(config));
        // Its own half of the handshake is over before the server has judged.
        let stream = connector.connect(authority::member_name().unwrap(), stream).await.unwrap();
        let mut stream = Stream::Tls(Box::new(stream.into()));
        assert!(ping(&mut stream).await.is_err());
        assert!(outcomes.recv().await.unwrap().is_err());
    }
}

#[tokio::test]
async fn plain_text_gets_nowhere_and_is_told_as_such() {
    let (address, mut outcomes) = echo(ours(), Purpose::Control).await;
    let mut plain = Trust::loopback().dial(&address, Purpose::Control).await.unwrap();
    plain.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    assert!(outcomes.recv().await.unwrap().is_err());
    // The other way round: who has a token does not speak without.
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        std::future::pending::<()>().await;
    });
    let refused = ours().dial(&address, Purpose::Control).await.unwrap_err();
    assert!(matches!(refused, TrustError::PlainText { .. }), "{refused:?}");
}

#[tokio::test]
async fn a_connection_for_one_purpose_is_refused_where_another_is_served() {
    let (address, mut outcomes) = echo(ours(), Purpose::Keys).await;
    let refused = ours().dial(&address, Purpose::Control).await;
    assert!(refused.is_err(), "{refused:?}");
    assert!(outcomes.recv().await.unwrap().is_err());
}

/// Whoever says nothing does not keep the others out.
#[tokio::test]
async fn silent_connections_hold_nobody_up() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let mut incoming = ours().incoming(listener, Purpose::Control).unwrap();
    let mut silent = Vec::new();
    for _ in 0..32 {
        silent.push(TcpStream::connect(&address).await.unwrap());
    }
    let ours = ours();
    let dialled = ours.dial(&address, Purpose::Control);
    let (dialled, accepted) = tokio::join!(dialled, futures::StreamExt::next(&mut incoming));
    assert!(dialled.is_ok() && accepted.unwrap().is_ok());
}

#[tokio::test]
async fn beyond_loopback_a_token_is_needed_to_listen_and_to_connect() {
    let trust = Trust::loopback();
    for address in ["0.0.0.0:1", "10.0.0.1:1", "[::]:1"] {
        let address: SocketAddr = address.parse().unwrap();
        let refused = trust.may_listen(address).unwrap_err();
        assert!(refused.to_string().contains(&address.to_string()), "{refused}");
        ours().may_listen(address).unwrap();
        let refused = trust.dial(&address.to_string(), Purpose::Control).await.unwrap_err();
        assert!(matches!(refused, TrustError::NoToken { .. }), "{refused:?}");
        let refused = trust.dial_blocking(address, SECOND, Purpose::Keys).unwrap_err();
        assert!(refused.wants_mending(), "{refused:?}");
    }
    for address in ["127.0.0.1:0", "[::1]:0", "[::ffff:127.0.0.1]:0"] {
        trust.may_listen(address.parse().unwrap()).unwrap();
    }
}

#[test]
fn tokens_that_could_be_guessed_are_refused_without_being_shown() {
    for bad in [
        "",
        "short-but-secret",
        "changemechangemechangemechangeme",
        "0123456789abcdef 0123456789abcdef",
    ] {
        let why = JoinToken::new(bad, "CPCR_JOIN_TOKEN").unwrap_err().to_string();
        assert!(why.starts_with("CPCR_JOIN_TOKEN: ") && why.contains("openssl rand"), "{why}");
        assert!(bad.is_empty() || !why.contains(bad), "{why}");
    }
    let good = JoinToken::new(" 0123456789abcdef0123456789abcdef\n", "test").unwrap();
    assert_eq!(good.expose(), "0123456789abcdef0123456789abcdef");
    assert!(!format!("{good:?} {:?} {:?}", ours(), ours().0).contains("0123"));
    let random = [(); 2].map(|()| JoinToken::random().unwrap());
    assert_ne!(random[0].expose(), random[1].expose());
    JoinToken::new(random[0].expose(), "test").unwrap();
}
