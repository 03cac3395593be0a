//! How long a checkpoint holds training up, beside a plain copy of as many bytes.
//!
//! What holds it up: the state is copied and handed to the writer. To make files of it and to store them is the writer's
//! part, whose store is this process's memory here. Rounds alternate with the plain copy; medians count.

use std::collections::BTreeMap;
use std::time::Instant;

use serde::Serialize;
use tch::{Device, Kind, Tensor};

use super::median;
use crate::bridge::ops;
use crate::checkpoint::{CheckpointError, Position, RunIdentity, Writer, WriterOptions};
use crate::eval::report::{Record, RunHistory, StepRecord};
use crate::ledger::Carried;
use crate::model::{Cast, Ensemble, ModelError, NetworkConfig, Sgd};
use crate::store::{Store, StoreError, StoreOptions};
use crate::trainer::{Circumstances, Copies, TrainerError, hand_over};
use crate::types::{ObjectDigest, Step, WorldSize};

/// Steps in the history that goes along: as many as a trainer keeps.
const HISTORY_STEPS: u64 = 2000;

/// Why it could not be measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointBenchError {
    /// The model failed.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The bridge failed.
    #[error(transparent)]
    Op(#[from] ops::OpError),
    /// libtorch failed.
    #[error(transparent)]
    Torch(#[from] tch::TchError),
    /// The copy failed.
    #[error(transparent)]
    Trainer(#[from] TrainerError),
    /// The writer failed.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The store in memory failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// No thread, or no runtime.
    #[error("start the writer: {0}")]
    Io(#[from] std::io::Error),
}

/// What to measure.
#[derive(Debug, Clone, Serialize)]
pub struct CheckpointOptions {
    /// How many times the paper's widths the network has.
    pub widths_times: i64,
    /// Threads of the trainer, which copy; the plain copy has one.
    pub threads: i32,
    /// Measured rounds.
    pub rounds: usize,
}

/// What was measured, in milliseconds, medians.
#[derive(Debug, Clone, Serialize)]
pub struct CheckpointReport {
    /// What was asked.
    pub options: CheckpointOptions,
    /// Weights, running statistics and momentum, in 10^6 bytes.
    pub state_mb: f64,
    /// A copy of as many bytes, between two pieces of memory that are in use already.
    pub plain_copy_ms: f64,
    /// How long a checkpoint holds training up.
    pub held_ms: f64,
    /// That over the plain copy.
    pub ratio: f64,
    /// The first one, whose memory is new.
    pub first_held_ms: f64,
    /// From then on until it is written, beside training.
    pub written_ms: f64,
}

/// Measures.
///
/// # Errors
/// [`CheckpointBenchError`].
pub fn run(options: &CheckpointOptions) -> Result<CheckpointReport, CheckpointBenchError> {
    tch::set_num_threads(options.threads);
    let nets = network_in_training(options.widths_times)?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let store = Store::open("memory:///", &StoreOptions::default())?;
    let nothing = ObjectDigest::of(b"").sha256;
    let identity = RunIdentity { config_sha256: nothing.clone(), dataset_sha256: nothing };
    let retention =
        Some(crate::checkpoint::Retention { keep_last: 1, keep_every: 0, keep_best: 0 });
    let writer = Writer::start(
        runtime.handle().clone(),
        store,
        WriterOptions { identity, retention, written: |_| {} },
    )?;
    let copies = Copies::default();
    let state: Vec<_> = nets.to_host()?.into_iter().chain(nets.momentum_to_host()?).collect();
    let from: Vec<u8> = state.into_iter().flat_map(|tensor| tensor.bytes).collect();
    let mut to = from.clone();
    let history = history();
    let (mut held, mut plain, mut written) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..=options.rounds as u64 {
        let began = Instant::now();
        to.copy_from_slice(std::hint::black_box(&from));
        std::hint::black_box(&mut to);
        plain.push(milliseconds(began));
        let began = Instant::now();
        let of = Circumstances {
            step: Step(round + 1),
            world_size: WorldSize(1),
            threads: 1,
            position: Position { labelled: 0, unlabelled: 0 },
            history: history.clone(),
            carried: Carried::unrecorded(Step(round + 1)),
        };
        hand_over(&writer, &nets, &copies, of)?;
        held.push(milliseconds(began));
        writer.flush(|| {})?;
        written.push(milliseconds(began));
    }
    let first_held_ms = held.remove(0);
    let (plain_copy_ms, held_ms) = (median(plain.split_off(1)), median(held));
    Ok(CheckpointReport {
        options: options.clone(),
        state_mb: from.len() as f64 / 1e6,
        plain_copy_ms,
        held_ms,
        ratio: held_ms / plain_copy_ms,
        first_held_ms,
        written_ms: median(written.split_off(1)),
    })
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// A network that has taken a step, so that every parameter has its momentum.
fn network_in_training(times: i64) -> Result<Ensemble, CheckpointBenchError> {
    let config = NetworkConfig::default();
    let config = NetworkConfig { widths: config.widths.map(|width| width * times), ..config };
    let sgd = Sgd::new(0.01, 0.9, 1e-4);
    let mut nets = Ensemble::new(&config, Cast::default(), Device::Cpu, 1, &sgd)?;
    let parameters = nets.main().params().parameters();
    let sums = parameters.map(|(_, tensor)| tensor.f_sum(Kind::Float));
    let loss = Tensor::f_stack(&sums.collect::<Result<Vec<_>, _>>()?, 0)?.f_sum(Kind::Float)?;
    ops::backward(&[loss.shallow_clone()], &[loss.f_ones_like()?])?;
    nets.step(0.01, Vec::new())?;
    nets.clear_gradients()?;
    Ok(nets)
}

fn history() -> RunHistory {
    let mut history = RunHistory::default();
    for step in 0..HISTORY_STEPS {
        let names = ["supervised", "consistency", "pyramid", "total"];
        let losses: BTreeMap<_, _> =
            names.into_iter().map(|name| (name.to_owned(), 1.0 / (step + 2) as f64)).collect();
        history.push(Record::Step(StepRecord { step, losses, ..Default::default() }));
    }
    history
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_measures_a_state_with_its_momentum() {
        let options = CheckpointOptions { widths_times: 1, threads: 1, rounds: 2 };
        let report = run(&options).unwrap();
        let nets = network_in_training(1).unwrap();
        let parameters = nets.main().params().parameter_count() as f64 * 4e-6;
        assert!(report.state_mb > 2.0 * parameters && report.state_mb < 2.1 * parameters);
        assert!(report.held_ms > 0.0 && report.written_ms > report.held_ms, "{report:?}");
    }
}
