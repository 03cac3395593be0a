//! What a run says about itself while it runs: logs, traces, and the one progress line.
//!
//! [`init`] is called once per process, first thing. Logs go to stderr, for people or as JSON;
//! traces go to an OTLP collector, and only if the standard variables name one. Nothing here may
//! ever slow or stop training: exporting is bounded, and drops rather than waits.
//!
//! Not here: the run's history and report (`eval::report`), and anything that decides.

pub mod logging;
pub mod otlp;
pub mod probe;
pub mod progress;
pub mod spans;
pub mod tensorboard;

use tracing::Span;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

pub use logging::LogFormat;
pub use otlp::{Otlp, OtlpError, OtlpMetrics, OtlpSettings, Signal};
pub use progress::{Progress, ProgressState, RunStatus};
pub use spans::{
    Past, Phase, StepSampling, StepTrace, TRACEPARENT, continues, number, past_span, traceparent_of,
};

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
    /// The exporter's settings are wrong.
    #[error(transparent)]
    Otlp(#[from] OtlpError),
    /// [`init`] was called before.
    #[error("telemetry was set up already")]
    AlreadySet,
}

/// What a process is.
#[derive(Debug, Clone)]
pub struct Process {
    /// Its role: "coordinator", "worker", "trainer".
    pub role: &'static str,
    /// What else its signals say of it: resource attributes.
    pub attributes: Vec<(&'static str, String)>,
    /// The level of its logs, or a `tracing` filter; `RUST_LOG` wins over it.
    pub level: &'static str,
    /// How logs are written.
    pub format: LogFormat,
    /// Who else hears of warnings and errors, one a second at most.
    pub warned: Option<fn(String)>,
}

impl Process {
    /// One that says nothing else of itself.
    #[must_use]
    pub fn new(role: &'static str) -> Self {
        let format = LogFormat::from_environment();
        Self { role, attributes: Vec::new(), level: "info", format, warned: None }
    }
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

/// Metrics to the collector that the environment names, if it names one.
///
/// # Errors
/// When the exporter's variables are wrong.
pub fn metrics(process: &Process) -> Result<Option<OtlpMetrics>, TelemetryError> {
    let environment = |name: &str| std::env::var(name).ok();
    let settings = OtlpSettings::from_lookup(Signal::Metrics, &environment)?;
    Ok(settings.map(|settings| OtlpMetrics::start(process, &settings)).transpose()?)
}

/// Sets up logs and traces for this process. The trace context of the parent process is taken from the environment
/// ([`TRACEPARENT`]); `span` makes the process's span.
///
/// # Errors
/// When the level or the exporter's variables are wrong, or it was called before. A
/// collector that cannot be reached is no error.
pub fn init(process: &Process, span: fn() -> Span) -> Result<Guard, TelemetryError> {
    let environment = |name: &str| std::env::var(name).ok();
    let otlp = match OtlpSettings::from_lookup(Signal::Traces, &environment)? {
        Some(settings) => Some(Otlp::start(process, &settings)?),
        None => None,
    };
    let logs = logging::layer(process.format, process.level, environment("RUST_LOG").as_deref())?;
    tracing_subscriber::registry()
        .with(logs)
        .with(process.warned.map(logging::Warnings::told_to))
        .with(otlp.as_ref().map(Otlp::layer))
        .try_init()
        .map_err(|_| TelemetryError::AlreadySet)?;
    if let Some(otlp) = &otlp {
        otlp.serve_past_spans();
    }
    let span = continues(span(), environment(TRACEPARENT).as_deref());
    Ok(Guard { span, otlp })
}
