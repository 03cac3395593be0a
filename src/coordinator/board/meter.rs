//! The same metrics to an OTLP collector: instruments that look at the board when they are asked.

use std::sync::{Arc, Mutex, PoisonError};

use opentelemetry::KeyValue;
use opentelemetry::metrics::{AsyncInstrument, Meter};

use super::instruments::{INSTRUMENTS, Instrument, Kind, Sample, samples};
use super::{Board, shared};

/// What a metric is called there: `cpcr.steps.done`.
#[must_use]
pub fn otlp_name(prometheus: &str) -> String {
    prometheus.trim_end_matches("_total").replace('_', ".")
}

/// The samples that all instruments of one collection share.
#[derive(Default)]
struct Newest {
    taken: f64,
    samples: Vec<Sample>,
}

impl Newest {
    fn of(&mut self, board: &Mutex<Board>) -> &[Sample] {
        let now = shared::unix_now();
        if (now - self.taken).abs() > 0.5 {
            let board = board.lock().unwrap_or_else(PoisonError::into_inner);
            (self.taken, self.samples) = (now, samples(&board, now));
        }
        &self.samples
    }
}

/// Has `meter` report the board. What is observed is as old as the reader's interval.
pub fn observe(meter: &Meter, board: &Arc<Mutex<Board>>) {
    let newest = Arc::new(Mutex::new(Newest::default()));
    for Instrument { name, kind, help } in INSTRUMENTS {
        let (board, newest) = (Arc::clone(board), Arc::clone(&newest));
        let look = move |observer: &dyn AsyncInstrument<f64>| {
            let mut newest = newest.lock().unwrap_or_else(PoisonError::into_inner);
            for sample in newest.of(&board).iter().filter(|sample| sample.name == name) {
                let labels: Vec<KeyValue> = sample
                    .labels
                    .iter()
                    .map(|(key, value)| KeyValue::new(*key, value.clone()))
                    .collect();
                observer.observe(sample.value, &labels);
            }
        };
        // A meter keeps its instruments.
        let name = otlp_name(name);
        match kind {
            Kind::Counter => {
                let builder = meter.f64_observable_counter(name).with_description(help);
                let _kept_by_the_meter = builder.with_callback(look).build();
            }
            Kind::Gauge => {
                let builder = meter.f64_observable_gauge(name).with_description(help);
                let _kept_by_the_meter = builder.with_callback(look).build();
            }
        }
    }
}
