//! The board's server: the page, its document as server-sent events, pictures, and the metrics. It only reads, and on a
//! thread of its own: whoever looks, and however many they are, the coordinator's thread waits for the board at most.
//!
//! On loopback in plain text, for whoever is on this machine; beyond it by HTTPS with the run's authority, and only
//! to those who give the page's password. Requests, connections and streams are bounded.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use base64::prelude::{BASE64_STANDARD, Engine};
use futures::Stream;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::runtime::{self, Handle};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tokio::task::JoinSet;

use super::prometheus_text;
use super::shared::{PAUSE, SharedBoard, Told};
use crate::page;
use crate::store::{Store, StoreError};
use crate::trust::{Incoming, Purpose, Trust, TrustError};

/// Connections at once; more wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 256;
/// Pages that follow the run at once.
const STREAMS_MAX: usize = 64;
/// How long a connection may take to send a request's header.
const HEADER_MAX: Duration = Duration::from_secs(10);
/// Longest that the end of a run waits for pages to hear of it, and then for what is under way to be sent.
const END_MAX: Duration = Duration::from_secs(2);
const SENDING_MAX: Duration = Duration::from_secs(1);
/// A document comes after this time, whether or not anything has changed.
const AT_LEAST: Duration = Duration::from_secs(2);
/// What the page may do: nothing but draw, and ask this server.
const POLICY: &str = "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; \
     connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// What handlers need.
#[derive(Clone)]
struct Served {
    board: SharedBoard,
    run: Store,
    /// Where the store's connections are at home.
    home: Handle,
    /// The page's password, where one is wanted.
    password: Option<Arc<str>>,
    streams: Arc<Semaphore>,
}

/// Where the board is to be seen.
#[derive(Debug)]
pub struct BoardServer {
    /// The page's address.
    pub url: String,
    streams: Arc<Semaphore>,
    /// The server's thread ends when this is gone, and then the other end of that.
    stop: oneshot::Sender<()>,
    ended: oneshot::Receiver<()>,
}

/// Why there is no page.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The machine gives no socket or no thread.
    #[error(transparent)]
    Machine(#[from] io::Error),
    /// Nobody could be told from others.
    #[error(transparent)]
    Trust(#[from] TrustError),
}

impl BoardServer {
    /// Waits until every page that follows the run has been told how it ended; not for long.
    pub async fn end(self) {
        let all = self.streams.acquire_many(STREAMS_MAX as u32);
        if tokio::time::timeout(END_MAX, all).await.is_err() {
            tracing::debug!("a page was not told of the end");
        }
        drop(self.stop);
        // It ends without a word.
        tokio::time::timeout(2 * SENDING_MAX, self.ended).await.ok();
    }
}

/// Starts serving `board`, and the pictures in `run`, on `listener`.
///
/// # Errors
/// [`TrustError::NoToken`] beyond loopback without a token; what the machine says.
pub fn start(
    listener: TcpListener,
    trust: &Trust,
    board: SharedBoard,
    run: Store,
) -> Result<BoardServer, ServeError> {
    let address = listener.local_addr()?;
    let plain = address.ip().to_canonical().is_loopback();
    let (trust, scheme) =
        if plain { (Trust::loopback(), "http") } else { (trust.clone(), "https") };
    let password = trust.page_password().map(Arc::from);
    let streams = Arc::new(Semaphore::new(STREAMS_MAX));
    let home = Handle::current();
    let routes = routes(Served { board, run, home, password, streams: Arc::clone(&streams) });
    let listener = listener.into_std()?;
    let (stop, stopped) = oneshot::channel();
    let (ready, started) = std::sync::mpsc::channel();
    let (end, ended) = oneshot::channel();
    let serve = move || {
        let _end: oneshot::Sender<()> = end;
        let own = runtime::Builder::new_current_thread().enable_all().build();
        let accepting = own.map_err(ServeError::from).and_then(|own| {
            let within = own.enter();
            let incoming = trust.incoming(TcpListener::from_std(listener)?, Purpose::Page)?;
            drop(within);
            Ok((own, incoming))
        });
        let said = accepting.map(|(own, incoming)| {
            // Whoever started this waits for it.
            ready.send(Ok(())).ok();
            own.block_on(accept(incoming, routes, stopped));
        });
        if let Err(error) = said {
            ready.send(Err(error)).ok();
        }
    };
    std::thread::Builder::new().name("page".to_owned()).spawn(serve)?;
    started.recv().map_err(io::Error::other)??;
    Ok(BoardServer { url: format!("{scheme}://{address}/"), streams, stop, ended })
}

fn routes(served: Served) -> Router {
    Router::new()
        .route("/", get(|| async { Html(page::live()) }))
        .route("/events", get(events))
        .route("/data.json", get(data))
        .route("/overlays/{name}", get(picture))
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .layer(middleware::from_fn_with_state(served.clone(), guard))
        .with_state(served)
}

/// Lets in whom it should, and says to browsers what the page may do.
async fn guard(State(served): State<Served>, request: Request, next: Next) -> Response {
    let mut response = match &served.password {
        Some(password) if !gives(request.headers(), password) => {
            let realm = [(header::WWW_AUTHENTICATE, "Basic realm=\"cpcr\", charset=\"UTF-8\"")];
            (
                StatusCode::UNAUTHORIZED,
                realm,
                "the page's password is wanted: `cpcr page-password`\n",
            )
                .into_response()
        }
        // A page of somebody else's, whose name was made to mean this machine, is not to read it.
        None if !asks_loopback(request.headers()) => {
            (StatusCode::FORBIDDEN, "ask for localhost\n").into_response()
        }
        _ => next.run(request).await,
    };
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

/// Whether a request has the password: as a bearer's token, or as anybody's password.
fn gives(headers: &HeaderMap, password: &str) -> bool {
    let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let Some((scheme, value)) = given.and_then(|given| given.split_once(' ')) else { return false };
    let same = |text: &str| {
        aws_lc_rs::constant_time::verify_slices_are_equal(text.as_bytes(), password.as_bytes())
            .is_ok()
    };
    match scheme.to_ascii_lowercase().as_str() {
        "bearer" => same(value.trim()),
        "basic" => {
            let decoded = BASE64_STANDARD.decode(value.trim()).unwrap_or_default();
            let text = String::from_utf8_lossy(&decoded);
            text.split_once(':').is_some_and(|(_, given)| same(given))
        }
        _ => false,
    }
}

fn asks_loopback(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(header::HOST).and_then(|value| value.to_str().ok()) else {
        return false;
    };
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let name = name.trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost")
        || name.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback())
}

/// The document, now and whenever it has changed.
async fn events(State(served): State<Served>) -> Response {
    let Ok(place) = Arc::clone(&served.streams).try_acquire_owned() else {
        let why = "too many pages follow this run\n";
        return (StatusCode::SERVICE_UNAVAILABLE, why).into_response();
    };
    let keep_alive = KeepAlive::new().interval(Duration::from_secs(15));
    Sse::new(follow(served.board, place)).keep_alive(keep_alive).into_response()
}

fn follow(
    board: SharedBoard,
    place: OwnedSemaphorePermit,
) -> impl Stream<Item = Result<sse::Event, Infallible>> {
    let changes = board.changes();
    let begin = (board, changes, None::<Told>, place);
    futures::stream::unfold(begin, |(board, mut changes, seen, place)| async move {
        if let Some(seen) = &seen {
            if seen.last {
                return None;
            }
            tokio::time::sleep(PAUSE).await;
            // Time passes for a board that does not change, too.
            let newer = changes.wait_for(|version| *version > seen.version);
            tokio::time::timeout(AT_LEAST, newer).await.ok();
        }
        let told = board.told(seen.as_ref()).await.ok()?;
        let event = sse::Event::default().event("run").data(&*told.text);
        Some((Ok(event), (board, changes, Some(told), place)))
    })
}

/// The document, once.
async fn data(State(served): State<Served>) -> Response {
    match served.board.told(None).await {
        Ok(told) => {
            let json = [(header::CONTENT_TYPE, "application/json")];
            (json, told.text.to_string()).into_response()
        }
        Err(error) => {
            tracing::debug!(%error, "the page's document cannot be written");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

async fn metrics(State(served): State<Served>) -> Response {
    let text = served.board.look(prometheus_text);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}

/// A validation's picture, out of the run's folder.
async fn picture(State(served): State<Served>, Path(name): Path<String>) -> Response {
    if !page::is_picture_name(&name) {
        return StatusCode::NOT_FOUND.into_response();
    }
    let fetch = async move { served.run.get(&format!("{}/{name}", page::PICTURES)).await };
    // A set ends what is in it when it is dropped: when whoever asked has left.
    let mut fetching = JoinSet::new();
    fetching.spawn_on(fetch, &served.home);
    let Some(Ok(fetched)) = fetching.join_next().await else {
        return StatusCode::SERVICE_UNAVAILABLE.into_response(); // the run is at its end
    };
    match fetched {
        Ok(bytes) => ([(header::CONTENT_TYPE, "image/png")], Body::from(bytes)).into_response(),
        Err(StoreError::NotFound { .. }) => StatusCode::NOT_FOUND.into_response(),
        Err(error) => {
            tracing::debug!(%error, "a picture cannot be shown");
            StatusCode::BAD_GATEWAY.into_response()
        }
    }
}

/// Accepts until it is told to stop; then what is under way is sent. Connections are this task's children and end with it.
async fn accept(mut incoming: Incoming, routes: Router, mut stop: oneshot::Receiver<()>) {
    let mut builder = Builder::new(TokioExecutor::new()).http1_only();
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_MAX);
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let ending = watch::Sender::new(false);
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            _ = &mut stop => break,
            Some(_) = connections.join_next() => continue,
            accepted = async {
                let slot = Arc::clone(&slots).acquire_owned().await;
                (slot, incoming.next().await)
            } => accepted,
        };
        let (Ok(slot), Some(stream)) = accepted else { break };
        let service = TowerToHyperService::new(routes.clone());
        let connection = builder.serve_connection(TokioIo::new(stream), service).into_owned();
        let mut ending = ending.subscribe();
        let ended = async move { ending.wait_for(|ending| *ending).await.map(drop) };
        connections.spawn(async move {
            let _slot = slot;
            let mut connection = std::pin::pin!(connection);
            let result = tokio::select! {
                result = connection.as_mut() => result,
                _ = ended => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = result {
                tracing::debug!(%error, "a connection of the page ended early");
            }
        });
    }
    ending.send_replace(true);
    let all = async { while connections.join_next().await.is_some() {} };
    tokio::time::timeout(SENDING_MAX, all).await.ok();
}

#[cfg(test)]
#[path = "serve_tests.rs"]
mod tests;
