//! Log lines on stderr: text for people, or JSON, one object a line; never on stdout.
//!
//! Text steps around the progress line. The libraries that export traces are muted
//! unless asked for: a dead collector deserves the one warning that `otlp` gives, no more.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{EnvFilter, Layer, fmt};

use super::{TelemetryError, progress};

/// The variable that asks for JSON: an agent sets it for its trainer.
pub const LOG_FORMAT: &str = "CPCR_LOG_FORMAT";

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// For programs.
    Json,
}

impl LogFormat {
    /// What the environment asks for.
    #[must_use]
    pub fn from_environment() -> Self {
        match std::env::var(LOG_FORMAT) {
            Ok(format) if format.eq_ignore_ascii_case("json") => Self::Json,
            _ => Self::Text,
        }
    }
}

/// Appended to a plain level: these speak of connections, not of training.
const MUTED: &str = "opentelemetry=off,opentelemetry_sdk=off,opentelemetry_otlp=off,opentelemetry_http=off,\
     h2=warn,hyper=warn,hyper_util=warn,tonic=warn,tower=warn,reqwest=warn,rustls=warn";

/// The layer that writes log lines. `override_filter` is the value of `RUST_LOG`.
pub(super) fn layer<S>(
    format: LogFormat,
    level: &str,
    override_filter: Option<&str>,
) -> Result<Box<dyn Layer<S> + Send + Sync>, TelemetryError>
where
    S: Subscriber + for<'a> LookupSpan<'a> + Send + Sync,
{
    let filter = filter(level, override_filter)?;
    Ok(match format {
        LogFormat::Text => fmt::layer()
            .with_writer(|| StderrAroundProgress)
            .with_ansi(io::stderr().is_terminal())
            .with_target(false)
            .with_filter(filter)
            .boxed(),
        LogFormat::Json => json(io::stderr).with_filter(filter).boxed(),
    })
}

/// One object a line, with the fields of the spans around it: a trainer's rank and generation.
fn json<S, W>(writer: W) -> impl Layer<S> + Send + Sync
where
    S: Subscriber + for<'a> LookupSpan<'a> + Send + Sync,
    W: for<'a> fmt::MakeWriter<'a> + Send + Sync + 'static,
{
    fmt::layer().json().with_current_span(true).with_span_list(false).with_writer(writer)
}

/// Hands on warnings and errors, in one line each and not more than one a second: the log has them all.
pub(super) struct Warnings {
    tell: fn(String),
    last: Mutex<Option<Instant>>,
}

/// Between two that are handed on.
const QUIET: Duration = Duration::from_secs(1);

impl Warnings {
    pub(super) fn told_to(tell: fn(String)) -> Self {
        Self { tell, last: Mutex::new(None) }
    }
}

impl<S: Subscriber> Layer<S> for Warnings {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if *event.metadata().level() > Level::WARN || !event.metadata().target().starts_with("cpcr")
        {
            return;
        }
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_some_and(|last| last.elapsed() < QUIET) {
            return;
        }
        *last = Some(Instant::now());
        drop(last);
        let mut line = Line::default();
        event.record(&mut line);
        (self.tell)(format!("{}{}", line.message, line.fields));
    }
}

/// An event in one line: its message, then its fields.
#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        // Writing to a string does not fail.
        if field.name() == "message" {
            write!(self.message, "{value:?}").ok();
        } else {
            write!(self.fields, " {}={value:?}", field.name()).ok();
        }
    }
}

fn filter(level: &str, override_filter: Option<&str>) -> Result<EnvFilter, TelemetryError> {
    let directives = match override_filter.filter(|text| !text.trim().is_empty()) {
        Some(text) => text.to_owned(),
        None => format!("{level},{MUTED}"),
    };
    EnvFilter::try_new(directives)
        .map_err(|source| TelemetryError::Level { level: level.to_owned(), source })
}

/// Stderr, with the progress line taken away while a log line is written.
struct StderrAroundProgress;

impl Write for StderrAroundProgress {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        progress::above(|| io::stderr().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use tracing_subscriber::layer::SubscriberExt;

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn json_is_one_object_per_line_and_says_whose_it_is() {
        let written = Shared::default();
        let writer = written.clone();
        let layer = json(move || writer.clone()).with_filter(filter("info", None).unwrap());
        let subscriber = tracing_subscriber::registry().with(layer);
        tracing::subscriber::with_default(subscriber, || {
            let _member = tracing::info_span!("member", rank = 2).entered();
            tracing::info!(step = 3, "hello");
            tracing::debug!("not asked for");
        });
        let text = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
        let lines: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 1);
        assert_eq!(lines[0]["fields"]["message"], "hello");
        assert_eq!(lines[0]["fields"]["step"], 3);
        assert_eq!(lines[0]["span"]["rank"], 2);
    }

    #[test]
    fn warnings_are_handed_on_and_not_too_many() {
        static HEARD: Mutex<Vec<String>> = Mutex::new(Vec::new());
        let layer = Warnings::told_to(|line| HEARD.lock().unwrap().push(line));
        let subscriber = tracing_subscriber::registry().with(layer);
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!("fine");
            tracing::warn!(rank = 1, "the disk is {}", "full");
            tracing::error!("again");
        });
        assert_eq!(*HEARD.lock().unwrap(), ["the disk is full rank=1"]);
    }

    #[test]
    fn a_mistyped_level_is_refused_and_rust_log_wins() {
        assert!(matches!(filter("cpcr=lots", None), Err(TelemetryError::Level { .. })));
        assert_eq!(filter("info", Some("debug")).unwrap().to_string(), "debug");
    }
}
