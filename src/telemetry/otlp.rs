//! Traces to an OpenTelemetry collector, if the environment names one.
//!
//! The standard variables decide: without `OTEL_EXPORTER_OTLP_ENDPOINT` (or its `_TRACES_` twin)
//! nothing is built and no thread started. Spans go into a bounded queue; a batch processor sends
//! them from threads of its own and drops what does not fit, so a dead or slow collector costs
//! memory up to that bound and a warning, never a step. Headers, sampling, queue size and batch
//! delay are the SDK's own variables.
//!
//! Both exporters are asynchronous and the SDK's batch thread has no runtime, hence
//! [`OnRuntime`]: a small runtime just for exporting, separate from any the program has.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::trace::{BatchSpanProcessor, SdkTracerProvider, SpanData};
use tokio::runtime::{Handle, Runtime};
use tracing::Subscriber;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::registry::LookupSpan;

/// Longest a batch may take, retries included.
const EXPORT_TIMEOUT_DEFAULT: Duration = Duration::from_secs(5);
/// Longest that the end of the process waits for the last batch.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);

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
        source: opentelemetry_otlp::ExporterBuildError,
    },
    /// No threads for exporting.
    #[error("start the threads that export traces: {0}")]
    Runtime(#[source] std::io::Error),
}

/// Where to send spans, and how.
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
        lookup: &impl Fn(&str) -> Option<String>,
    ) -> Result<Option<Self>, OtlpError> {
        let get = |name: &str| lookup(name).filter(|value| !value.trim().is_empty());
        // Signal-specific variables win over general ones.
        let either = |name: &str| {
            get(&format!("OTEL_EXPORTER_OTLP_TRACES_{name}"))
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
        let endpoint = match get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") {
            Some(exact) => exact,
            None => match get("OTEL_EXPORTER_OTLP_ENDPOINT") {
                None => return Ok(None),
                Some(base) if protocol == Protocol::Grpc => base,
                Some(base) => format!("{}/v1/traces", base.trim_end_matches('/')),
            },
        };
        Ok(Some(Self { endpoint, protocol, timeout }))
    }
}

/// A running exporter. Dropping it sends what is left, for at most two seconds.
#[derive(Debug)]
pub struct Otlp {
    provider: SdkTracerProvider,
    runtime: Option<Runtime>,
}

impl Otlp {
    /// Starts exporting. The collector need not be there.
    ///
    /// # Errors
    /// When the settings are unusable or threads cannot be started.
    pub fn start(role: &str, settings: &OtlpSettings) -> Result<Self, OtlpError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("otlp-export")
            .enable_all()
            .build()
            .map_err(OtlpError::Runtime)?;
        let exporter = {
            let _entered = runtime.enter(); // tonic's channel wants a runtime when it is made
            build(settings)
        }
        .map_err(|source| OtlpError::Exporter { endpoint: settings.endpoint.clone(), source })?;
        let exporter = OnRuntime {
            exporter: Arc::new(exporter),
            runtime: runtime.handle().clone(),
            timeout: settings.timeout,
            failing: AtomicBool::new(false),
        };
        let provider = SdkTracerProvider::builder()
            .with_span_processor(BatchSpanProcessor::builder(exporter).build())
            .with_resource(resource(role))
            .build();
        Ok(Self { provider, runtime: Some(runtime) })
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
            .with_threads(false)
            .with_tracked_inactivity(false)
            .with_tracer(self.provider.tracer("cpcr"))
            .with_filter(Targets::new().with_target("cpcr", LevelFilter::INFO))
            .boxed()
    }
}

impl Drop for Otlp {
    fn drop(&mut self) {
        if let Err(error) = self.provider.shutdown_with_timeout(SHUTDOWN_TIMEOUT) {
            tracing::debug!(%error, "the last traces were not delivered");
        }
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background(); // dropping it could block, and panics inside another
        }
    }
}

fn build(settings: &OtlpSettings) -> Result<SpanExporter, opentelemetry_otlp::ExporterBuildError> {
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

fn resource(role: &str) -> Resource {
    let mut resource = Resource::builder().with_attributes([
        KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
        KeyValue::new("cpcr.role", role.to_owned()),
        KeyValue::new("process.pid", i64::from(std::process::id())),
    ]);
    if std::env::var_os("OTEL_SERVICE_NAME").is_none() {
        resource = resource.with_service_name("cpcr");
    }
    resource.build()
}

/// Runs another exporter's futures on a tokio runtime, within a time limit.
#[derive(Debug)]
struct OnRuntime {
    exporter: Arc<SpanExporter>,
    runtime: Handle,
    timeout: Duration,
    /// Whether the last batch failed: each outage is reported once.
    failing: AtomicBool,
}

impl opentelemetry_sdk::trace::SpanExporter for OnRuntime {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let (exporter, timeout) = (Arc::clone(&self.exporter), self.timeout);
        let task = self
            .runtime
            .spawn(async move { tokio::time::timeout(timeout, exporter.export(batch)).await });
        let result = match task.await {
            Ok(Ok(result)) => result,
            Ok(Err(_elapsed)) => Err(OTelSdkError::Timeout(timeout)),
            Err(error) => Err(OTelSdkError::InternalFailure(error.to_string())),
        };
        let failed_before = self.failing.swap(result.is_err(), Ordering::Relaxed);
        match &result {
            Err(error) if !failed_before => {
                tracing::warn!(%error, "traces cannot be delivered; they are dropped until they can");
            }
            Ok(()) if failed_before => tracing::info!("traces are delivered again"),
            _ => {}
        }
        result
    }

    fn set_resource(&mut self, resource: &Resource) {
        // No batch is under way yet, so nobody shares the exporter.
        if let Some(exporter) = Arc::get_mut(&mut self.exporter) {
            exporter.set_resource(resource);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(pairs: &[(&str, &str)]) -> Result<Option<OtlpSettings>, OtlpError> {
        OtlpSettings::from_lookup(&|name: &str| {
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
