//! Log lines: text on stderr, or JSON in a file; never both, and never on stdout.
//!
//! Lines on stderr step around the progress line. The libraries that export traces are muted
//! unless asked for: a dead collector deserves the one warning that `otlp` gives, no more.

use std::fs::OpenOptions;
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::sync::Mutex;

use tracing::Subscriber;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{EnvFilter, Layer, fmt};

use super::{TelemetryError, progress};

/// Appended to a plain level: these speak of connections, not of training.
const MUTED: &str = "opentelemetry=off,opentelemetry_sdk=off,opentelemetry_otlp=off,opentelemetry_http=off,\
     h2=warn,hyper=warn,hyper_util=warn,tonic=warn,tower=warn,reqwest=warn,rustls=warn";

/// The layer that writes log lines. `override_filter` is the value of `RUST_LOG`.
pub(super) fn layer<S>(
    log_file: Option<&Path>,
    level: &str,
    override_filter: Option<&str>,
) -> Result<Box<dyn Layer<S> + Send + Sync>, TelemetryError>
where
    S: Subscriber + for<'a> LookupSpan<'a> + Send + Sync,
{
    let filter = filter(level, override_filter)?;
    let Some(path) = log_file else {
        let layer = fmt::layer()
            .with_writer(|| StderrAroundProgress)
            .with_ansi(io::stderr().is_terminal())
            .with_target(false);
        return Ok(layer.with_filter(filter).boxed());
    };
    let file =
        OpenOptions::new().create(true).append(true).open(path).map_err(|source| {
            TelemetryError::LogFile { path: path.display().to_string(), source }
        })?;
    let layer = fmt::layer().json().with_current_span(true).with_span_list(false);
    Ok(layer.with_writer(Mutex::new(file)).with_filter(filter).boxed())
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
    use super::*;
    use tracing_subscriber::layer::SubscriberExt;

    #[test]
    fn a_file_gets_one_json_object_per_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.jsonl");
        let layer = layer(Some(&path), "info", None).unwrap();
        let subscriber = tracing_subscriber::registry().with(layer);
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(step = 3, "hello");
            tracing::debug!("not asked for");
        });
        let text = std::fs::read_to_string(path).unwrap();
        let lines: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 1);
        assert_eq!(lines[0]["fields"]["message"], "hello");
        assert_eq!(lines[0]["fields"]["step"], 3);
    }

    #[test]
    fn a_mistyped_level_is_refused_and_rust_log_wins() {
        assert!(matches!(filter("cpcr=lots", None), Err(TelemetryError::Level { .. })));
        assert_eq!(filter("info", Some("debug")).unwrap().to_string(), "debug");
    }
}
