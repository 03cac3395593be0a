//! What an HTTP answer said that the engine keeps to itself: its status, `Retry-After`, its length, when it came.
//!
//! A [`Note`] travels with a request as an extension and is filled in on the way back. Without it a
//! 503 could not be told from a 500, nor a part (206) that came for a whole object from the object.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpRequest, HttpResponse, HttpService, ReqwestConnector,
};

/// More than anybody waits; a header may say anything.
const RETRY_AFTER_S_MAX: u64 = 3600;

/// What is noted about one request.
#[derive(Debug)]
pub(super) struct Note {
    sent: Instant,
    answer: OnceLock<Answer>,
    /// Microseconds from the request to the answer's head.
    answered_us: AtomicU64,
}

/// The head of an answer.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Answer {
    pub status: u16,
    pub retry_after: Option<Duration>,
    pub length: Option<u64>,
}

impl Note {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            sent: Instant::now(),
            answer: OnceLock::new(),
            answered_us: AtomicU64::new(0),
        })
    }

    /// The answer's head, once it is there.
    pub fn answer(&self) -> Option<Answer> {
        self.answer.get().copied()
    }

    /// The time that the answer's head took.
    pub fn answered_after(&self) -> Duration {
        Duration::from_micros(self.answered_us.load(Ordering::Relaxed))
    }

    fn take(&self, response: &HttpResponse) {
        let number = |name: &str| response.headers().get(name)?.to_str().ok()?.trim().parse().ok();
        let took = u64::try_from(self.sent.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.answered_us.store(took, Ordering::Relaxed);
        let answer = Answer {
            status: response.status().as_u16(),
            // The form with a date is not worth a parser: no object store sends it.
            retry_after: number("retry-after")
                .map(|s: u64| Duration::from_secs(s.min(RETRY_AFTER_S_MAX))),
            length: number("content-length"),
        };
        // Taken already: a redirect's first half, which says less.
        self.answer.set(answer).ok();
    }
}

/// Connects like the engine does by itself, and notes what comes back.
#[derive(Debug, Default)]
pub(super) struct NotingConnector(ReqwestConnector);

#[derive(Debug)]
struct NotingService(HttpClient);

impl HttpConnector for NotingConnector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(NotingService(self.0.connect(options)?)))
    }
}

impl HttpService for NotingService {
    fn call<'s, 'a>(
        &'s self,
        request: HttpRequest,
    ) -> Pin<Box<dyn Future<Output = Result<HttpResponse, HttpError>> + Send + 'a>>
    where
        's: 'a,
    {
        Box::pin(async move {
            let note = request.extensions().get::<Arc<Note>>().cloned();
            let response = self.0.execute(request).await?;
            if let Some(note) = note {
                note.take(&response);
            }
            Ok(response)
        })
    }
}
