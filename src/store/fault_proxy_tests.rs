//! The proxy against a server of a few lines, as a client sees it byte by byte. What the engine and
//! the reader make of it is tested in `tests/faults.rs`.

use std::time::Instant;

use super::*;

const BODY: &[u8] = b"0123456789";

/// Answers every request on every connection: writes with 200 and nothing, reads with [`BODY`].
async fn server() -> (SocketAddr, Arc<Mutex<Vec<String>>>, JoinHandle<()>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let addr = listener.local_addr().unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&seen);
    let task = tokio::spawn(async move {
        let mut connections = JoinSet::new();
        loop {
            let (socket, _) = listener.accept().await.unwrap();
            let log = Arc::clone(&log);
            connections.spawn(async move {
                let mut wire = Wire::new(socket, None).unwrap();
                while let Ok(Some(request)) = wire.head().await {
                    wire.discard(request.request_framing()).await.unwrap();
                    log.lock().unwrap().push(request.word(0).to_owned());
                    wire.send(&answer_to(&request)).await.unwrap();
                }
            });
        }
    });
    (addr, seen, task)
}

fn answer_to(request: &Head) -> Vec<u8> {
    let head = match (request.word(0), request.field("range")) {
        ("GET", None) if request.word(1).contains("chunked") => {
            return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
                .to_vec();
        }
        ("GET", None) => "HTTP/1.1 200 OK\r\nETag: \"a\"\r\nContent-Length: 10\r\n\r\n",
        ("GET", Some(_)) => {
            "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 2-11/20\r\nContent-Length: 10\r\n\r\n"
        }
        _ => return b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n".to_vec(),
    };
    [head.as_bytes(), BODY].concat()
}

async fn connect(proxy: &FaultProxy) -> Wire {
    Wire::new(TcpStream::connect(proxy.addr()).await.unwrap(), None).unwrap()
}

/// Status, head and as much of the body as comes; `None` where no answer comes.
async fn ask(wire: &mut Wire, request: &str) -> Option<(Head, Vec<u8>)> {
    wire.send(request.as_bytes()).await.ok()?;
    let head = wire.head().await.ok()??;
    let Framing::Length(length) = head.answer_framing(request.split(' ').next().unwrap()) else {
        panic!("an answer without a length");
    };
    let mut body = Vec::new();
    while (body.len() as u64) < length {
        let Ok(byte) = wire.take(1).await else { break };
        body.extend(byte);
    }
    Some((head, body))
}

const GET: &str = "GET /bucket/key HTTP/1.1\r\nHost: h\r\n\r\n";
const RANGED: &str = "GET /bucket/key HTTP/1.1\r\nHost: h\r\nRange: bytes=2-11\r\n\r\n";
const PUT: &str = "PUT /bucket/key HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc";

#[tokio::test]
async fn healthy_requests_share_a_connection_and_pass_unchanged() {
    let (upstream, seen, _task) = server().await;
    let proxy = FaultProxy::start(upstream, FaultPlan::none()).await.unwrap();
    let mut wire = connect(&proxy).await;
    for _ in 0..3 {
        let (head, body) = ask(&mut wire, GET).await.unwrap();
        assert_eq!((head.status(), &body[..]), (200, BODY));
        assert_eq!(ask(&mut wire, PUT).await.unwrap().0.status(), 200);
    }
    wire.send(GET.replace("key", "chunked").as_bytes()).await.unwrap();
    wire.head().await.unwrap().unwrap();
    assert_eq!(wire.take(13).await.unwrap(), b"3\r\nabc\r\n0\r\n\r\n");
    assert_eq!(ask(&mut wire, RANGED).await.unwrap().0.status(), 206);
    assert_eq!(seen.lock().unwrap().len(), 8);
    assert_eq!(proxy.counts(), InjectedCounts { requests: 8, faults: BTreeMap::new() });
}

#[tokio::test]
async fn each_fault_looks_like_itself() {
    let (upstream, _seen, _task) = server().await;
    let proxy = FaultProxy::start(upstream, FaultPlan::none()).await.unwrap();

    let cases = [
        (InjectedFault::Unavailable, 503, false),
        (InjectedFault::ServerError, 500, false),
        (InjectedFault::Throttled, 429, false),
        (InjectedFault::Truncated, 206, false),
        (InjectedFault::EmptyOk, 200, false),
        (InjectedFault::WrongRange, 206, false),
        (InjectedFault::MislabelledRange, 206, false),
        (InjectedFault::BitFlip, 206, false),
        (InjectedFault::Trickle, 206, true),
        (InjectedFault::Changed, 206, false),
    ];
    for (fault, status, same) in cases {
        proxy.set_plan(FaultPlan::none().at(0, fault));
        let mut wire = connect(&proxy).await;
        let (head, body) = ask(&mut wire, RANGED).await.unwrap();
        assert_eq!(head.status(), status, "{fault:?}");
        assert_eq!(body == BODY, same, "{fault:?}: {body:?}");
        assert_eq!(proxy.counts().of(fault), 1, "{fault:?}");
        let labelled = head.field("content-range");
        match fault {
            InjectedFault::WrongRange => assert_eq!(labelled, Some("bytes 3-12/20")),
            InjectedFault::EmptyOk => assert_eq!((labelled, body.len()), (None, 0)),
            InjectedFault::Truncated => assert_eq!(body, BODY[..5]),
            InjectedFault::Changed => assert!(head.field("etag").unwrap().contains("changed")),
            InjectedFault::MislabelledRange | InjectedFault::BitFlip => {
                assert_eq!((labelled, body.len()), (Some("bytes 2-11/20"), 10));
            }
            _ => {}
        }
    }
    proxy.set_plan(FaultPlan::none().at(0, InjectedFault::WrongRange));
    let (head, body) = ask(&mut connect(&proxy).await, GET).await.unwrap();
    assert_eq!((head.status(), &body[..]), (206, &BODY[5..]));
}

#[tokio::test]
async fn a_lost_answer_is_a_write_carried_out_and_a_reset_is_none() {
    let (upstream, seen, _task) = server().await;
    let plan = FaultPlan::none().at(0, InjectedFault::AnswerLost).at(1, InjectedFault::Reset);
    let proxy = FaultProxy::start(upstream, plan).await.unwrap();
    assert!(ask(&mut connect(&proxy).await, PUT).await.is_none());
    assert_eq!(*seen.lock().unwrap(), ["PUT"]);
    assert!(ask(&mut connect(&proxy).await, PUT).await.is_none());
    assert_eq!(seen.lock().unwrap().len(), 1, "the reset came first");
    // What does not fit its request is not injected: a read's answer is no write's.
    proxy.set_plan(FaultPlan::none().at(0, InjectedFault::AnswerLost));
    assert_eq!(ask(&mut connect(&proxy).await, GET).await.unwrap().1, BODY);
    assert_eq!(proxy.counts().total(), 0);
}

#[tokio::test]
async fn a_stall_ends_when_the_client_leaves() {
    let (upstream, _seen, _task) = server().await;
    let plan = FaultPlan::seeded(3).rate(InjectedFault::Stall, 1.0).only("/bucket/");
    let proxy = FaultProxy::start(upstream, plan).await.unwrap();
    let mut open = proxy.shared.connections.subscribe();
    let mut wire = connect(&proxy).await;
    wire.send(GET.as_bytes()).await.unwrap();
    assert!(!wire.leaves_within(Duration::from_millis(50)).await, "it answered");
    open.wait_for(|open| *open == 1).await.unwrap();
    drop(wire);
    let none_left = open.wait_for(|open| *open == 0);
    tokio::time::timeout(Duration::from_secs(10), none_left).await.unwrap().unwrap();
    assert_eq!(proxy.counts().of(InjectedFault::Stall), 1);
    let elsewhere = GET.replace("/bucket/", "/other/");
    assert_eq!(ask(&mut connect(&proxy).await, &elsewhere).await.unwrap().1, BODY);
}

#[tokio::test]
async fn a_link_takes_its_time_and_all_connections_share_it() {
    let (upstream, _seen, _task) = server().await;
    // Ten bytes and a head of some 50 take half a second.
    let proxy = FaultProxy::start(upstream, FaultPlan::none().link(200)).await.unwrap();
    let (mut one, mut other) = (connect(&proxy).await, connect(&proxy).await);
    let began = Instant::now();
    let (first, second) = tokio::join!(ask(&mut one, GET), ask(&mut other, GET));
    assert_eq!((first.unwrap().1, second.unwrap().1), (BODY.to_vec(), BODY.to_vec()));
    let both =
        2 * (BODY.len() + "HTTP/1.1 200 OK\r\nETag: \"a\"\r\nContent-Length: 10\r\n\r\n".len());
    assert!(began.elapsed() >= Duration::from_secs_f64(both as f64 / 200.0));
}
