//! Traces and metrics to an OpenTelemetry collector, if the environment names one.
//!
//! The standard variables decide: without `OTEL_EXPORTER_OTLP_ENDPOINT` (or its `_TRACES_` and `_METRICS_` twins)
//! nothing is built and no thread started. Spans go into a bounded queue; a batch processor sends
//! them from threads of its own and drops what does not fit, so a dead or slow collector costs
//! memory up to that bound and a warning, never a step. Headers, sampling, queue size and batch
//! delay are the SDK's own variables.
//!
//! Both exporters are asynchronous and the SDK's batch thread has no runtime, hence
//! [`OnRuntime`]: a small runtime just for exporting, separate from any the program has.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::metrics::{Meter, MeterProvider};
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{
    ExporterBuildError, MetricExporter, Protocol, SpanExporter, WithExportConfig,
};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::metrics::data::ResourceMetrics;
use opentelemetry_sdk::metrics::exporter::PushMetricExporter;
use opentelemetry_sdk::metrics::{PeriodicReader, SdkMeterProvider, Temporality};
use opentelemetry_sdk::trace::{BatchSpanProcessor, SdkTracerProvider, SpanData};
use tokio::runtime::{Handle, Runtime};
use tracing::Subscriber;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::registry::LookupSpan;

use super::Process;

/// Longest a batch may take, retries included.
const EXPORT_TIMEOUT_DEFAULT: Duration = Duration::from_secs(5);
/// Longest that the end of the process waits for the last batch: a run's processes end one after the other, and a dead
/// collector is to hold none of them up for long.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(600);
/// The same where no batch has been sent yet.
const SHUTDOWN_UNKNOWN: Duration = Duration::from_millis(300);
/// The same where the collector did not take the batch before.
const SHUTDOWN_FAILING: Duration = Duration::from_millis(20);

/// Why the exporter could not be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OtlpError {
    /// A protocol that is not built in.
    #[error("OTEL_EXPORTER_OTLP_PROTOCOL '{0}' is neither grpc nor http/protobuf")]
    Protocol(String),
    /// A timeout that is no number of milliseconds.
    #[error("OTEL_EXPORTER_OTLP_TIMEOUT '{0}' is not a number of milliseconds")]
    Timeout(String),
    /// The exporter refused its settings.
    #[error("build the exporter for {endpoint}")]
    Exporter {
        /// Where it should have sent to.
        endpoint: String,
        /// Why.
        source: ExporterBuildError,
    },
    /// No threads for exporting.
    #[error("start the threads that export traces: {0}")]
    Runtime(#[source] std::io::Error),
}

/// What is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// Spans.
    Traces,
    /// Metrics.
    Metrics,
}

impl Signal {
    /// In the names of variables.
    fn variable(self) -> &'static str {
        match self {
            Self::Traces => "TRACES",
            Self::Metrics => "METRICS",
        }
    }

    /// Of a collector's HTTP endpoint.
    fn path(self) -> &'static str {
        match self {
            Self::Traces => "v1/traces",
            Self::Metrics => "v1/metrics",
        }
    }
}

/// Where to send a signal, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OtlpSettings {
    /// The URL as used: for HTTP it has the path `/v1/traces` already.
    pub endpoint: String,
    /// gRPC or HTTP with protobuf bodies.
    pub protocol: Protocol,
    /// Longest a batch may take, retries included.
    pub timeout: Duration,
}

impl OtlpSettings {
    /// Reads the standard variables through `lookup`; `None` if they name no collector.
    ///
    /// # Errors
    /// When the protocol or the timeout makes no sense.
    pub fn from_lookup(
        signal: Signal,
        lookup: &impl Fn(&str) -> Option<String>,
    ) -> Result<Option<Self>, OtlpError> {
        let get = |name: &str| lookup(name).filter(|value| !value.trim().is_empty());
        // Signal-specific variables win over general ones.
        let either = |name: &str| {
            get(&format!("OTEL_EXPORTER_OTLP_{}_{name}", signal.variable()))
                .or_else(|| get(&format!("OTEL_EXPORTER_OTLP_{name}")))
        };
        if get("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
            return Ok(None);
        }
        let protocol = match either("PROTOCOL").as_deref() {
            None | Some("http/protobuf") => Protocol::HttpBinary,
            Some("grpc") => Protocol::Grpc,
            Some(other) => return Err(OtlpError::Protocol(other.to_owned())),
        };
        let timeout = match either("TIMEOUT") {
            None => EXPORT_TIMEOUT_DEFAULT,
            Some(text) => Duration::from_millis(
                text.trim().parse().map_err(|_| OtlpError::Timeout(text.clone()))?,
            ),
        };
        // The standard's way to send one signal and not the other.
        let exporter = get(&format!("OTEL_{}_EXPORTER", signal.variable()));
        if exporter.is_some_and(|exporter| exporter == "none") {
            return Ok(None);
        }
        let exact = get(&format!("OTEL_EXPORTER_OTLP_{}_ENDPOINT", signal.variable()));
        let endpoint = match exact {
            Some(exact) => exact,
            None => match get("OTEL_EXPORTER_OTLP_ENDPOINT") {
                None => return Ok(None),
                Some(base) if protocol == Protocol::Grpc => base,
                Some(base) => format!("{}/{}", base.trim_end_matches('/'), signal.path()),
            },
        };
        Ok(Some(Self { endpoint, protocol, timeout }))
    }
}

/// Whether the collector took the last batch; each outage is reported once.
#[derive(Debug, Clone, Default)]
struct Health(Arc<AtomicU8>);

impl Health {
    const UNKNOWN: u8 = 0;
    const TAKES: u8 = 1;
    const FAILS: u8 = 2;

    /// What became of a batch; whether the one before failed.
    fn note(&self, taken: bool) -> bool {
        let now = if taken { Self::TAKES } else { Self::FAILS };
        self.0.swap(now, Ordering::Relaxed) == Self::FAILS
    }

    fn shutdown_timeout(&self) -> Duration {
        match self.0.load(Ordering::Relaxed) {
            Self::UNKNOWN => SHUTDOWN_UNKNOWN,
            Self::FAILS => SHUTDOWN_FAILING,
            _ => SHUTDOWN_TIMEOUT,
        }
    }
}

/// A running exporter. Dropping it sends what is left, for less than a second.
#[derive(Debug)]
pub struct Otlp {
    provider: SdkTracerProvider,
    health: Health,
    runtime: Option<Runtime>,
}

impl Otlp {
    /// Starts exporting. The collector need not be there.
    ///
    /// # Errors
    /// When the settings are unusable or threads cannot be started.
    pub fn start(process: &Process, settings: &OtlpSettings) -> Result<Self, OtlpError> {
        let (exporter, health, runtime) = on_runtime(settings, spans)?;
        let provider = SdkTracerProvider::builder()
            .with_span_processor(BatchSpanProcessor::builder(exporter).build())
            .with_resource(resource(process))
            .build();
        Ok(Self { provider, health, runtime: Some(runtime) })
    }

    /// Has [`super::past_span`] record in this process.
    pub(super) fn serve_past_spans(&self) {
        opentelemetry::global::set_tracer_provider(self.provider.clone());
    }

    /// The layer that turns this project's spans into OpenTelemetry's.
    ///
    /// Spans of other crates stay out: those of the exporter's own HTTP client would feed on
    /// themselves.
    #[must_use]
    pub fn layer<S>(&self) -> Box<dyn Layer<S> + Send + Sync>
    where
        S: Subscriber + for<'a> LookupSpan<'a> + Send + Sync,
    {
        tracing_opentelemetry::layer()
            .with_location(false)
            .with_target(false)
            .with_threads(false)
            .with_tracked_inactivity(false)
            .with_tracer(self.provider.tracer("cpcr"))
            .with_filter(Targets::new().with_target("cpcr", LevelFilter::INFO))
            .boxed()
    }
}

impl Drop for Otlp {
    fn drop(&mut self) {
        if let Err(error) = self.provider.shutdown_with_timeout(self.health.shutdown_timeout()) {
            tracing::debug!(%error, "the last traces were not delivered");
        }
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background(); // dropping it could block, and panics inside another
        }
    }
}

/// Metrics being exported, by the interval of `OTEL_METRIC_EXPORT_INTERVAL` (a minute). Dropping it sends them once more.
#[derive(Debug)]
pub struct OtlpMetrics {
    provider: SdkMeterProvider,
    health: Health,
    runtime: Option<Runtime>,
}

impl OtlpMetrics {
    /// Starts exporting. The collector need not be there.
    ///
    /// # Errors
    /// When the settings are unusable or threads cannot be started.
    pub fn start(process: &Process, settings: &OtlpSettings) -> Result<Self, OtlpError> {
        let (exporter, health, runtime) = on_runtime(settings, metrics)?;
        let provider = SdkMeterProvider::builder()
            .with_reader(PeriodicReader::builder(exporter).build())
            .with_resource(resource(process))
            .build();
        Ok(Self { provider, health, runtime: Some(runtime) })
    }

    /// Where instruments are made.
    #[must_use]
    pub fn meter(&self) -> Meter {
        self.provider.meter("cpcr")
    }
}

impl Drop for OtlpMetrics {
    fn drop(&mut self) {
        // The SDK's own reader does not heed a timeout: this one does not wait for it.
        let provider = self.provider.clone();
        let (done, ended) = std::sync::mpsc::channel();
        std::thread::spawn(move || done.send(provider.shutdown()));
        match ended.recv_timeout(self.health.shutdown_timeout()) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "the last metrics were not delivered"),
            Err(_) => tracing::debug!("the last metrics were not delivered in time"),
        }
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// An exporter on threads of its own: not those that a coordinator or a trainer works with.
fn on_runtime<E>(
    settings: &OtlpSettings,
    build: impl FnOnce(&OtlpSettings) -> Result<E, ExporterBuildError>,
) -> Result<(OnRuntime<E>, Health, Runtime), OtlpError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("otlp-export")
        .enable_all()
        .build()
        .map_err(OtlpError::Runtime)?;
    let built = {
        let _entered = runtime.enter(); // tonic's channel wants a runtime when it is made
        build(settings)
    };
    match built {
        Ok(exporter) => {
            let health = Health::default();
            let exporter = OnRuntime::new(exporter, &runtime, settings.timeout, &health);
            Ok((exporter, health, runtime))
        }
        Err(source) => {
            runtime.shutdown_background(); // dropping it panics inside another
            Err(OtlpError::Exporter { endpoint: settings.endpoint.clone(), source })
        }
    }
}

fn metrics(settings: &OtlpSettings) -> Result<MetricExporter, ExporterBuildError> {
    let builder = MetricExporter::builder();
    let (endpoint, timeout) = (&settings.endpoint, settings.timeout);
    match settings.protocol {
        Protocol::Grpc => {
            builder.with_tonic().with_endpoint(endpoint).with_timeout(timeout).build()
        }
        protocol => {
            let builder = builder.with_http().with_protocol(protocol);
            builder.with_endpoint(endpoint).with_timeout(timeout).build()
        }
    }
}

fn spans(settings: &OtlpSettings) -> Result<SpanExporter, ExporterBuildError> {
    match settings.protocol {
        Protocol::Grpc => SpanExporter::builder()
            .with_tonic()
            .with_endpoint(&settings.endpoint)
            .with_timeout(settings.timeout)
            .build(),
        protocol => SpanExporter::builder()
            .with_http()
            .with_protocol(protocol)
            .with_endpoint(&settings.endpoint)
            .with_timeout(settings.timeout)
            .build(),
    }
}

/// What all signals of this process say of it; `OTEL_RESOURCE_ATTRIBUTES` adds to it.
pub(super) fn resource(process: &Process) -> Resource {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let mut resource = Resource::builder()
        .with_attributes([
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
            KeyValue::new("service.instance.id", format!("{host}-{}", std::process::id())),
            KeyValue::new("cpcr.role", process.role),
            KeyValue::new("process.pid", i64::from(std::process::id())),
            KeyValue::new("host.name", host),
        ])
        .with_attributes(
            process.attributes.iter().map(|(key, value)| KeyValue::new(*key, value.clone())),
        );
    if let Ok(pod) = std::env::var("POD_NAME") {
        resource = resource.with_attribute(KeyValue::new("k8s.pod.name", pod));
    }
    if std::env::var_os("OTEL_SERVICE_NAME").is_none() {
        resource = resource.with_service_name("cpcr");
    }
    resource.build()
}

/// Polls another exporter's futures within a tokio runtime's context, and a time limit.
#[derive(Debug)]
struct OnRuntime<E> {
    exporter: E,
    runtime: Handle,
    timeout: Duration,
    health: Health,
}

impl<E> OnRuntime<E> {
    fn new(exporter: E, runtime: &Runtime, timeout: Duration, health: &Health) -> Self {
        let runtime = runtime.handle().clone();
        Self { exporter, runtime, timeout, health: health.clone() }
    }

    /// What becomes of a batch.
    async fn delivers(
        &self,
        what: &str,
        sending: impl Future<Output = OTelSdkResult> + Send,
    ) -> OTelSdkResult {
        let mut sending = std::pin::pin!(async {
            tokio::time::timeout(self.timeout, sending)
                .await
                .unwrap_or(Err(OTelSdkError::Timeout(self.timeout)))
        });
        let result = std::future::poll_fn(|context| {
            let _entered = self.runtime.enter();
            sending.as_mut().poll(context)
        });
        let result = result.await;
        let failed_before = self.health.note(result.is_ok());
        match &result {
            Err(error) if !failed_before => {
                tracing::warn!(%error, "{what} cannot be delivered; they are dropped until they can");
            }
            Ok(()) if failed_before => tracing::info!("{what} are delivered again"),
            _ => {}
        }
        result
    }
}

impl opentelemetry_sdk::trace::SpanExporter for OnRuntime<SpanExporter> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        self.delivers("traces", self.exporter.export(batch)).await
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

impl PushMetricExporter for OnRuntime<MetricExporter> {
    async fn export(&self, metrics: &ResourceMetrics) -> OTelSdkResult {
        self.delivers("metrics", self.exporter.export(metrics)).await
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn temporality(&self) -> Temporality {
        self.exporter.temporality()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(pairs: &[(&str, &str)]) -> Result<Option<OtlpSettings>, OtlpError> {
        OtlpSettings::from_lookup(Signal::Traces, &|name: &str| {
            pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn only_an_endpoint_switches_it_on() {
        assert_eq!(settings(&[("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")]).unwrap(), None);
        assert_eq!(settings(&[("OTEL_EXPORTER_OTLP_ENDPOINT", " ")]).unwrap(), None);
        let base = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4318/");
        let on = settings(&[base]).unwrap().unwrap();
        assert_eq!(on.endpoint, "http://c:4318/v1/traces");
        assert_eq!(on.protocol, Protocol::HttpBinary);
        assert_eq!(settings(&[base, ("OTEL_SDK_DISABLED", "true")]).unwrap(), None);
        let grpc = settings(&[base, ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")]).unwrap().unwrap();
        assert_eq!(grpc.endpoint, "http://c:4318/");
        let exact = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://t/x");
        assert_eq!(settings(&[base, exact]).unwrap().unwrap().endpoint, "http://t/x");
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(settings(&[("OTEL_EXPORTER_OTLP_PROTOCOL", "carrier-pigeon")]).is_err());
        assert!(settings(&[("OTEL_EXPORTER_OTLP_TIMEOUT", "soon")]).is_err());
    }
}
