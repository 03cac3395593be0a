//! Traces: those of a step arrive at a collector, and a dead collector costs no time.
//!
//! The collector is a few lines of HTTP over a socket; the protobuf is read with just the fields
//! that matter here, by their numbers in opentelemetry-proto.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests: clippy only spares the tests

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use cpcr::coordinator::board::shared::SharedBoard;
use cpcr::coordinator::board::{Board, Facts, meter};
use cpcr::telemetry::{
    Otlp, OtlpMetrics, OtlpSettings, Phase, Process, StepTrace, continues, traceparent_of,
};
use cpcr::types::{Rank, Step};
use opentelemetry_otlp::Protocol;
use prost::Message;
use tracing_subscriber::layer::SubscriberExt;

#[derive(Clone, PartialEq, Message)]
struct Request {
    #[prost(message, repeated, tag = "1")]
    resource_spans: Vec<ResourceSpans>,
}

#[derive(Clone, PartialEq, Message)]
struct ResourceSpans {
    #[prost(message, repeated, tag = "2")]
    scope_spans: Vec<ScopeSpans>,
}

#[derive(Clone, PartialEq, Message)]
struct ScopeSpans {
    #[prost(message, repeated, tag = "2")]
    spans: Vec<Span>,
}

#[derive(Clone, PartialEq, Message)]
struct Span {
    #[prost(bytes = "vec", tag = "1")]
    trace_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    span_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    parent_span_id: Vec<u8>,
    #[prost(string, tag = "5")]
    name: String,
}

/// Answers one HTTP request after another with 200, and hands on the bodies.
fn answer(stream: TcpStream, bodies: &mpsc::Sender<Vec<u8>>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let (mut length, mut line) = (0, String::new());
        loop {
            line.clear();
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
            if line == "\r\n" {
                break;
            }
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        bodies.send(body).unwrap();
        reader.get_mut().write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")?;
    }
}

fn collector() -> (OtlpSettings, mpsc::Receiver<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}/v1/traces", listener.local_addr().unwrap());
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let sender = sender.clone();
            std::thread::spawn(move || answer(stream, &sender));
        }
    });
    let timeout = Duration::from_secs(2);
    (OtlpSettings { endpoint, protocol: Protocol::HttpBinary, timeout }, receiver)
}

fn train(parent: &tracing::Span, steps: u64) {
    for step in 0..steps {
        let mut trace = StepTrace::begin(parent, Step(step), Rank(0), true);
        for phase in Phase::ALL {
            trace.phase(phase, || tracing::info!("within the phase"));
        }
    }
}

#[test]
fn the_spans_of_a_step_arrive_as_children_of_the_launcher() {
    let (settings, bodies) = collector();
    let otlp = Otlp::start(&Process::new("trainer"), &settings).unwrap();
    let subscriber = tracing_subscriber::registry().with(otlp.layer());
    let handed_on = tracing::subscriber::with_default(subscriber, || {
        let traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let process =
            continues(tracing::info_span!(target: "cpcr::test", "trainer"), Some(traceparent));
        train(&process, 2);
        traceparent_of(&process).unwrap()
    });
    drop(otlp); // flushes
    let spans: Vec<Span> = bodies
        .try_iter()
        .flat_map(|body| Request::decode(body.as_slice()).unwrap().resource_spans)
        .flat_map(|resource| resource.scope_spans)
        .flat_map(|scope| scope.spans)
        .collect();
    let by_id: HashMap<&[u8], &Span> = spans.iter().map(|s| (s.span_id.as_slice(), s)).collect();
    assert_eq!(spans.len(), 2 * (1 + Phase::ALL.len()) + 1, "{spans:?}");
    for span in &spans {
        assert_eq!(hex::encode(&span.trace_id), "0af7651916cd43dd8448eb211c80319c");
        let parent = by_id.get(span.parent_span_id.as_slice()).map(|s| s.name.as_str());
        match span.name.as_str() {
            "trainer" => {
                assert_eq!(hex::encode(&span.parent_span_id), "b7ad6b7169203331");
                let expected =
                    format!("{}-{}", hex::encode(&span.trace_id), hex::encode(&span.span_id));
                assert_eq!(handed_on, format!("00-{expected}-01"));
            }
            "step" => assert_eq!(parent, Some("trainer")),
            phase => {
                assert!(Phase::ALL.iter().any(|p| p.name() == phase), "{phase}");
                assert_eq!(parent, Some("step"));
            }
        }
    }
}

/// The names of a request's metrics: as much of `ExportMetricsServiceRequest` as that takes.
mod metrics {
    use prost::Message;

    #[derive(Clone, PartialEq, Message)]
    pub struct Request {
        #[prost(message, repeated, tag = "1")]
        pub resource_metrics: Vec<ResourceMetrics>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct ResourceMetrics {
        #[prost(message, repeated, tag = "2")]
        pub scope_metrics: Vec<ScopeMetrics>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct ScopeMetrics {
        #[prost(message, repeated, tag = "2")]
        pub metrics: Vec<Metric>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct Metric {
        #[prost(string, tag = "1")]
        pub name: String,
    }
}

#[test]
fn the_boards_metrics_arrive_under_dotted_names() {
    let (settings, bodies) = collector();
    let endpoint = settings.endpoint.replace("/v1/traces", "/v1/metrics");
    let exporter =
        OtlpMetrics::start(&Process::new("coordinator"), &OtlpSettings { endpoint, ..settings });
    let exporter = exporter.unwrap();
    let board = SharedBoard::new(Board::new(Facts::default(), None, 1.0));
    meter::observe(&exporter.meter(), board.inner());
    drop(exporter); // flushes
    let names: Vec<String> = bodies
        .try_iter()
        .flat_map(|body| metrics::Request::decode(body.as_slice()).unwrap().resource_metrics)
        .flat_map(|resource| resource.scope_metrics)
        .flat_map(|scope| scope.metrics)
        .map(|metric| metric.name)
        .collect();
    for expected in ["cpcr.steps.done", "cpcr.run.info", "cpcr.checkpoints", "cpcr.interruptions"] {
        assert!(names.iter().any(|name| name == expected), "{expected}: {names:?}");
    }
}

/// Training and the end of the process are both bounded, whatever the collector does.
fn costs_no_time(settings: &OtlpSettings) {
    let otlp = Otlp::start(&Process::new("trainer"), settings).unwrap();
    let subscriber = tracing_subscriber::registry().with(otlp.layer());
    let started = Instant::now();
    tracing::subscriber::with_default(subscriber, || {
        train(&tracing::info_span!(target: "cpcr::test", "trainer"), 2_000); // 16,000 spans: the queue overflows
    });
    let trained = started.elapsed();
    assert!(trained < Duration::from_secs(2), "2,000 steps took {trained:?}");
    drop(otlp);
    assert!(started.elapsed() < Duration::from_secs(6), "{:?}", started.elapsed());
}

#[test]
fn a_collector_that_is_not_there_costs_no_time() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let timeout = Duration::from_secs(60);
    for protocol in [Protocol::HttpBinary, Protocol::Grpc] {
        let endpoint = format!("http://127.0.0.1:{port}");
        costs_no_time(&OtlpSettings { endpoint, protocol, timeout });
    }
}

#[test]
fn a_collector_that_never_answers_costs_no_time() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap(); // accepts by its backlog, says nothing
    let timeout = Duration::from_secs(60);
    for protocol in [Protocol::HttpBinary, Protocol::Grpc] {
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        costs_no_time(&OtlpSettings { endpoint, protocol, timeout });
    }
}
