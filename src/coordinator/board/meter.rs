//! The same metrics to an OTLP collector: instruments that look at the board when they are asked.

use std::sync::{Arc, Mutex, PoisonError};

use opentelemetry::KeyValue;
use opentelemetry::metrics::{AsyncInstrument, Meter};

use super::instruments::{INSTRUMENTS, Instrument, Kind, samples};
use super::{Board, serve};

/// What a metric is called there: `cpcr.steps.done`.
#[must_use]
pub fn otlp_name(prometheus: &str) -> String {
    prometheus.trim_end_matches("_total").replace('_', ".")
}

/// Has `meter` report the board. What is observed is as old as the reader's interval.
pub fn observe(meter: &Meter, board: &Arc<Mutex<Board>>) {
    for Instrument { name, kind, help } in INSTRUMENTS {
        let board = Arc::clone(board);
        let look = move |observer: &dyn AsyncInstrument<f64>| {
            let board = board.lock().unwrap_or_else(PoisonError::into_inner);
            let all = samples(&board, serve::unix_now());
            for sample in all.into_iter().filter(|sample| sample.name == name) {
                let labels: Vec<KeyValue> = sample
                    .labels
                    .into_iter()
                    .map(|(key, value)| KeyValue::new(key, value))
                    .collect();
                observer.observe(sample.value, &labels);
            }
        };
        // A meter keeps its instruments.
        let name = otlp_name(name);
        match kind {
            Kind::Counter => {
                let builder = meter.f64_observable_counter(name).with_description(help);
                drop(builder.with_callback(look).build());
            }
            Kind::Gauge => {
                let builder = meter.f64_observable_gauge(name).with_description(help);
                drop(builder.with_callback(look).build());
            }
        }
    }
}
