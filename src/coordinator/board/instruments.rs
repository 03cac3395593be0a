//! The metrics: what they are called, and their values on the board. One table for Prometheus' text and for OTLP.

use std::fmt::Write;

use super::Board;
use crate::proto::Vitals;

/// How a value behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// It only grows, until its process starts again.
    Counter,
    /// It goes up and down.
    Gauge,
}

/// A metric.
#[derive(Debug, Clone, Copy)]
pub(super) struct Instrument {
    /// Its name as Prometheus has it.
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    /// What it is.
    pub(super) help: &'static str,
}

/// One value of a metric.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Sample {
    pub(super) name: &'static str,
    pub(super) labels: Vec<(&'static str, String)>,
    pub(super) value: f64,
}

const fn counter(name: &'static str, help: &'static str) -> Instrument {
    Instrument { name, kind: Kind::Counter, help }
}

const fn gauge(name: &'static str, help: &'static str) -> Instrument {
    Instrument { name, kind: Kind::Gauge, help }
}

/// All of them.
pub(super) const INSTRUMENTS: [Instrument; 46] = [
    gauge("cpcr_run_info", "The run: its name, method and version; always 1."),
    gauge("cpcr_steps_done", "Optimiser steps done."),
    gauge("cpcr_steps_wanted", "Optimiser steps of the whole run."),
    gauge("cpcr_finished", "Whether the run has ended."),
    gauge("cpcr_images_per_second", "Images a second, over all workers."),
    gauge("cpcr_loss", "Loss terms of the last step; NaN for one that is no number."),
    gauge("cpcr_learning_rate", "Learning rate of the last step."),
    gauge("cpcr_consistency_weight", "Weight of the consistency terms in the last step."),
    gauge("cpcr_validation_dice", "Dice of the last validation, by class."),
    gauge("cpcr_validation_mean_dice", "Mean Dice of the last validation."),
    gauge("cpcr_validation_step", "Step of the last validation."),
    gauge("cpcr_workers", "Workers that are there."),
    gauge("cpcr_workers_wanted", "Workers that the run may have."),
    gauge("cpcr_generation", "The generation that trains."),
    gauge("cpcr_heartbeat_age_seconds", "Time since a worker was last heard."),
    gauge("cpcr_step_seconds", "How long a step takes."),
    gauge("cpcr_step_own_seconds", "The part of a step before it waits for other workers."),
    gauge("cpcr_step_own_seconds_median", "The median of that over the workers."),
    gauge("cpcr_straggler", "Whether a worker's own part of a step is far above the median."),
    gauge("cpcr_data_wait_ratio", "Share of step time spent waiting for data."),
    counter("cpcr_trainer_steps_total", "Steps that a trainer's process has done."),
    counter("cpcr_phase_seconds_total", "Time of a trainer's process by phase of its steps."),
    gauge("cpcr_loader_queue_batches", "Batches that are ready."),
    counter("cpcr_read_requests_total", "Read requests to the store, repeated ones included."),
    counter("cpcr_read_bytes_total", "Bytes that reads returned."),
    counter(
        "cpcr_read_retries_total",
        "Faults on the way to the data that a further request cured.",
    ),
    counter("cpcr_cache_hits_total", "Blocks found in the machine's cache."),
    counter("cpcr_cache_misses_total", "Blocks that were not there."),
    gauge("cpcr_checkpoint_step", "Step of the newest checkpoint."),
    gauge("cpcr_checkpoint_age_seconds", "Time since the newest checkpoint was committed."),
    gauge("cpcr_checkpoint_hold_seconds", "How long the newest checkpoint held training up."),
    gauge("cpcr_checkpoint_upload_seconds", "How long the newest checkpoint took to write."),
    gauge("cpcr_checkpoint_bytes", "Size of the newest checkpoint."),
    counter("cpcr_checkpoints_total", "Checkpoints committed."),
    counter("cpcr_interruptions_total", "Generations that ended early, by cause."),
    gauge(
        "cpcr_last_outage_seconds",
        "From the last step before an interruption to the first after.",
    ),
    counter("cpcr_time_seconds_total", "The coordinator's time by what the run did in it."),
    gauge("cpcr_goodput_ratio", "Share of time in which steps that count were done."),
    gauge("cpcr_process_memory_bytes", "Resident memory of a trainer."),
    gauge("cpcr_gpu_memory_bytes", "Memory in use of a trainer's GPU."),
    counter("cpcr_page_faults_total", "Page faults of a trainer that had to wait for a disk."),
    gauge("cpcr_eta_seconds", "Time to the last step, at the pace of late."),
    gauge("cpcr_start_time_seconds", "When the coordinator started, in seconds since 1970."),
    gauge("cpcr_notes", "Lines that the user was told, as far as they are kept."),
    gauge("cpcr_hints", "Hints that were given why the run is slow."),
    gauge("cpcr_validation_best_dice", "Mean Dice of the best validation."),
];

/// A trainer's counts.
type Count = (&'static str, fn(&Vitals) -> f64);
const COUNTS: [Count; 8] = [
    ("cpcr_trainer_steps_total", |v| v.steps as f64),
    ("cpcr_loader_queue_batches", |v| v.queue as f64),
    ("cpcr_read_requests_total", |v| v.requests as f64),
    ("cpcr_read_bytes_total", |v| v.bytes as f64),
    ("cpcr_cache_hits_total", |v| v.cache_hits as f64),
    ("cpcr_cache_misses_total", |v| v.cache_misses as f64),
    ("cpcr_process_memory_bytes", |v| v.memory as f64),
    ("cpcr_page_faults_total", |v| v.page_faults as f64),
];

/// Samples being collected.
#[derive(Default)]
struct Samples(Vec<Sample>);

impl Samples {
    fn add(&mut self, name: &'static str, labels: &[(&'static str, &str)], value: Option<f64>) {
        let Some(value) = value else { return };
        let labels = labels.iter().map(|(key, value)| (*key, (*value).to_owned())).collect();
        self.0.push(Sample { name, labels, value });
    }
}

/// The values at `now`. Those that there are none of yet are left out.
pub(super) fn samples(board: &Board, now: f64) -> Vec<Sample> {
    let mut samples = Samples::default();
    run(board, now, &mut samples);
    training(board, &mut samples);
    workers(board, now, &mut samples);
    checkpoints(board, now, &mut samples);
    time(board, &mut samples);
    samples.0
}

fn run(board: &Board, now: f64, samples: &mut Samples) {
    let (run, state) = (&board.shown.run, &board.shown.state);
    let labels =
        [("run", &*run.name), ("method", &*run.method), ("version", env!("CARGO_PKG_VERSION"))];
    samples.add("cpcr_run_info", &labels, Some(1.0));
    for (name, value) in [
        ("cpcr_steps_done", state.step as f64),
        ("cpcr_steps_wanted", run.steps as f64),
        ("cpcr_finished", f64::from(u8::from(state.status.is_some()))),
        ("cpcr_workers", f64::from(state.workers)),
        ("cpcr_workers_wanted", f64::from(state.wanted)),
        ("cpcr_generation", state.generation as f64),
        ("cpcr_start_time_seconds", board.began),
        ("cpcr_notes", board.shown.notes.len() as f64),
        ("cpcr_hints", board.shown.hints.len() as f64),
    ] {
        samples.add(name, &[], Some(value));
    }
    samples.add("cpcr_eta_seconds", &[], board.eta_s());
    for row in &board.shown.workers {
        if !["gone", "lost"].contains(&&*row.state) {
            let node = row.node.to_string();
            let age = (now - row.heard).max(0.0);
            samples.add("cpcr_heartbeat_age_seconds", &[("node", &node)], Some(age));
        }
    }
}

fn training(board: &Board, samples: &mut Samples) {
    let state = &board.shown.state;
    samples.add("cpcr_images_per_second", &[], state.images_per_s);
    for (term, value) in &state.loss {
        samples.add("cpcr_loss", &[("term", term)], Some(value.unwrap_or(f64::NAN)));
    }
    if let Some(point) = board.series.newest() {
        samples.add("cpcr_learning_rate", &[], point.lr);
        samples.add("cpcr_consistency_weight", &[], point.consistency);
    }
    if let Some(validation) = board.series.last_validation() {
        samples.add("cpcr_validation_mean_dice", &[], validation.mean_dice);
        samples.add("cpcr_validation_step", &[], Some(validation.step as f64));
        for (class, dice) in &validation.classes {
            samples.add("cpcr_validation_dice", &[("class", class)], *dice);
        }
    }
    let best = board.best().and_then(|best| best.mean_dice);
    samples.add("cpcr_validation_best_dice", &[], best);
}

fn workers(board: &Board, _now: f64, samples: &mut Samples) {
    let median = board.own_median();
    samples.add("cpcr_step_own_seconds_median", &[], median);
    let crowd = board.training().count() > 1;
    for (row, recent) in board.training() {
        let (node, rank) = (row.node.to_string(), row.rank.unwrap_or_default().to_string());
        let labels = [("node", &*node), ("rank", &*rank)];
        samples.add("cpcr_step_seconds", &labels, recent.step_s());
        samples.add("cpcr_step_own_seconds", &labels, recent.own_s());
        samples.add("cpcr_data_wait_ratio", &labels, recent.share("data_wait"));
        let lags = f64::from(u8::from(crowd && recent.lags(median)));
        samples.add("cpcr_straggler", &labels, Some(lags));
        let Some(vitals) = recent.newest() else { continue };
        for (name, value) in COUNTS {
            samples.add(name, &labels, Some(value(vitals)));
        }
        samples.add("cpcr_gpu_memory_bytes", &labels, vitals.gpu_memory.map(|bytes| bytes as f64));
        for (phase, seconds) in &vitals.phases_s {
            let labels = [("node", &*node), ("rank", &*rank), ("phase", &**phase)];
            samples.add("cpcr_phase_seconds_total", &labels, Some(*seconds));
        }
        for (kind, count) in &vitals.faults {
            let labels = [("node", &*node), ("rank", &*rank), ("kind", &**kind)];
            samples.add("cpcr_read_retries_total", &labels, Some(*count as f64));
        }
    }
}

fn checkpoints(board: &Board, now: f64, samples: &mut Samples) {
    samples.add("cpcr_checkpoints_total", &[], Some(board.checkpoints as f64));
    let Some(newest) = board.shown.checkpoints.last() else { return };
    samples.add("cpcr_checkpoint_step", &[], Some(newest.step as f64));
    samples.add("cpcr_checkpoint_age_seconds", &[], Some((now - newest.at).max(0.0)));
    samples.add("cpcr_checkpoint_hold_seconds", &[], newest.hold_s);
    samples.add("cpcr_checkpoint_upload_seconds", &[], newest.upload_s);
    samples.add("cpcr_checkpoint_bytes", &[], newest.bytes.map(|bytes| bytes as f64));
}

fn time(board: &Board, samples: &mut Samples) {
    for (kind, count) in &board.interruptions {
        samples.add("cpcr_interruptions_total", &[("kind", kind)], Some(*count as f64));
    }
    samples.add("cpcr_last_outage_seconds", &[], board.last_outage_s);
    let Some(goodput) = &board.shown.goodput else { return };
    samples.add("cpcr_goodput_ratio", &[], Some(goodput.goodput));
    for (part, seconds) in &goodput.parts_s {
        samples.add("cpcr_time_seconds_total", &[("part", part)], Some(*seconds));
    }
}

/// The board at `now` in Prometheus' text format.
#[must_use]
pub fn prometheus_text(board: &Board, now: f64) -> String {
    let samples = samples(board, now);
    let mut text = String::new();
    for Instrument { name, kind, help } in INSTRUMENTS {
        let mut own = samples.iter().filter(|sample| sample.name == name).peekable();
        if own.peek().is_none() {
            continue;
        }
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
        };
        // Writing to a string does not fail.
        write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n").ok();
        own.for_each(|sample| line(&mut text, sample));
    }
    text
}

fn line(text: &mut String, Sample { name, labels, value }: &Sample) {
    text.push_str(name);
    for (at, (key, value)) in labels.iter().enumerate() {
        let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        write!(text, "{}{key}=\"{value}\"", if at == 0 { '{' } else { ',' }).ok();
    }
    if !labels.is_empty() {
        text.push('}');
    }
    let written = match value {
        value if value.is_nan() => writeln!(text, " NaN"),
        value if value.is_infinite() => {
            writeln!(text, " {}Inf", if *value > 0.0 { '+' } else { '-' })
        }
        value => writeln!(text, " {value}"),
    };
    written.ok();
}
