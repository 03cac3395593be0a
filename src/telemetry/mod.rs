//! What a run says about itself while it runs: logs, traces, and the one progress line.
//!
//! [`init`] is called once per process, first thing. Logs go to stderr (or, as JSON, to a file);
//! traces go to an OTLP collector, and only if the standard variables name one. Nothing here may
//! ever slow or stop training: exporting is bounded, and drops rather than waits.
//!
//! Not here: the run's history and report (`eval::report`), and anything that decides.

pub mod logging;
pub mod otlp;
pub mod probe;
pub mod progress;
pub mod spans;

use std::path::Path;

use tracing::Span;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

pub use otlp::{Otlp, OtlpError, OtlpSettings};
pub use progress::{Progress, ProgressState, RunStatus};
pub use spans::{Phase, StepTrace, TRACEPARENT, process_span, traceparent_of};

/// Why telemetry could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TelemetryError {
    /// The level is no filter that `tracing` understands.
    #[error("'{level}' is not a log level or filter")]
    Level {
        /// As given.
        level: String,
        /// What is wrong with it.
        source: tracing_subscriber::filter::ParseError,
    },
    /// The log file could not be opened.
    #[error("open log file {path}")]
    LogFile {
        /// The path.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The exporter's settings are wrong.
    #[error(transparent)]
    Otlp(#[from] OtlpError),
    /// [`init`] was called before.
    #[error("telemetry was set up already")]
    AlreadySet,
}

/// Holds telemetry open. Dropping it flushes what is left, for a bounded time.
#[derive(Debug)]
#[must_use = "dropping the guard ends tracing"]
pub struct Guard {
    span: Span,
    otlp: Option<Otlp>,
}

impl Guard {
    /// The span of this process: the parent of whatever it traces.
    #[must_use]
    pub fn span(&self) -> &Span {
        &self.span
    }

    /// Whether traces are exported.
    #[must_use]
    pub fn exports_traces(&self) -> bool {
        self.otlp.is_some()
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // The process's span must have ended before the exporter goes, or it is never exported.
        self.span = Span::none();
        self.otlp = None;
    }
}

/// Sets up logs and traces for this process; `role` names it ("coordinator", "worker", "trainer").
///
/// `level` is a level or a `tracing` filter; `RUST_LOG` wins over it. The trace context of the
/// parent process is taken from the environment ([`TRACEPARENT`]).
///
/// # Errors
/// When the level, the log file or the exporter's variables are wrong, or it was called before. A
/// collector that cannot be reached is no error.
pub fn init(role: &str, log_file: Option<&Path>, level: &str) -> Result<Guard, TelemetryError> {
    let environment = |name: &str| std::env::var(name).ok();
    let otlp = match OtlpSettings::from_lookup(&environment)? {
        Some(settings) => Some(Otlp::start(role, &settings)?),
        None => None,
    };
    let logs = logging::layer(log_file, level, environment("RUST_LOG").as_deref())?;
    tracing_subscriber::registry()
        .with(logs)
        .with(otlp.as_ref().map(Otlp::layer))
        .try_init()
        .map_err(|_| TelemetryError::AlreadySet)?;
    let span = process_span(role, environment(TRACEPARENT).as_deref());
    Ok(Guard { span, otlp })
}
