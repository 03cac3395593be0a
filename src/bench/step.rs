//! How long a training step takes, and how much memory: ours, and plain PyTorch's beside it.
//!
//! A step is forward, losses, backward and SGD on one batch that stays in memory; no data is
//! loaded and nothing is communicated. The peer (`benches/peers/step.py`) runs in a process of
//! its own, after ours; before it is timed, its losses on our weights and batch must be ours.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::{cpu_seconds, peak_rss_mib};
use crate::bridge::{alloc, ops};
use crate::loss::{Alone, Counts, Objective, StepLoss, TermWeights};
use crate::model::{
    DecoderDraws, Draws, Dropout, Heads, ModelError, Network, NetworkConfig, Noise, Precision, Sgd,
};

/// The peer, so that an installed binary has it too.
const PEER: &str = include_str!("../../benches/peers/step.py");
/// How far the peer's losses may be from ours, relative.
const AGREEMENT: f64 = 1e-4;

/// Why a measurement failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StepBenchError {
    /// The model failed.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A loss failed.
    #[error(transparent)]
    Loss(#[from] crate::loss::LossError),
    /// The bridge failed.
    #[error(transparent)]
    Op(#[from] ops::OpError),
    /// libtorch failed.
    #[error(transparent)]
    Torch(#[from] tch::TchError),
    /// Files or processes failed.
    #[error("{what}: {source}")]
    Io {
        /// Verb and object.
        what: String,
        /// The cause.
        source: std::io::Error,
    },
    /// The peer does something else than we do, or said nothing sensible.
    #[error("peer: {0}")]
    Peer(String),
}

/// What to measure.
#[derive(Debug, Clone, Serialize)]
pub struct StepOptions {
    /// Samples, the first half of them labelled.
    pub batch: i64,
    /// Side of the square input in pixels.
    pub side: i64,
    /// Channels at strides 1 to 16.
    pub widths: [i64; 5],
    /// Classes.
    pub classes: i64,
    /// Threads, ours and the peer's.
    pub threads: i32,
    /// Steps before the clock starts.
    pub settle: usize,
    /// Timed steps; the median counts.
    pub steps: usize,
    /// Steps over which bf16's losses are compared with f32's; 0 leaves it out.
    pub gap_steps: usize,
    /// A Python with PyTorch, for the peer.
    pub peer_python: Option<PathBuf>,
}

impl Default for StepOptions {
    fn default() -> Self {
        Self {
            batch: 24,
            side: 256,
            widths: [16, 32, 64, 128, 256],
            classes: 4,
            threads: 2,
            settle: 2,
            steps: 5,
            gap_steps: 0,
            peer_python: None,
        }
    }
}

/// One measured case.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StepCase {
    /// `cpcr` or `pytorch`.
    pub who: String,
    /// `warm-up` or `full`.
    pub objective: String,
    /// `f32` or `bf16`.
    pub precision: String,
    /// Median seconds a step.
    pub seconds_per_step: f64,
    /// Fastest step, in seconds.
    pub seconds_best: f64,
    /// Processor seconds a step, all threads together: what another process's load disturbs less.
    pub cpu_seconds_per_step: f64,
    /// Images a second, by the median.
    pub images_per_second: f64,
    /// Peak resident memory, in MiB. Ours: cases run in one process, the small ones first.
    pub peak_rss_mib: f64,
}

/// All cases, and how they compare.
#[derive(Debug, Clone, Serialize)]
pub struct StepReport {
    /// What was asked.
    pub options: StepOptions,
    /// What was measured.
    pub cases: Vec<StepCase>,
    /// Largest relative difference of the total between bf16 and f32 over `gap_steps`.
    pub bf16_loss_gap: Option<f64>,
    /// Largest relative difference between our losses and the peer's, same weights and batch.
    pub peer_loss_gap: Option<f64>,
    /// Why there is no peer, if there is none.
    pub notice: Option<String>,
}

/// Measures every case, in rising order of memory.
///
/// # Errors
/// A failing step; a peer that fails or whose losses are not ours.
pub fn run(options: &StepOptions) -> Result<StepReport, StepBenchError> {
    alloc::tune();
    tch::set_num_threads(options.threads);
    let mut cases = Vec::new();
    for precision in [Precision::Bf16, Precision::F32] {
        for full in [false, true] {
            cases.push(case(options, precision, full)?);
        }
    }
    let bf16_loss_gap = if options.gap_steps > 0 { Some(precision_gap(options)?) } else { None };
    let mut report = StepReport {
        options: options.clone(),
        cases,
        bf16_loss_gap,
        peer_loss_gap: None,
        notice: None,
    };
    match &options.peer_python {
        None => report.notice = Some("no peer: CPCR_PEER_PYTHON names no Python".into()),
        Some(python) => {
            let (gap, cases) = peer(options, python)?;
            report.peer_loss_gap = Some(gap);
            report.cases.extend(cases);
        }
    }
    Ok(report)
}

/// A network, its optimiser and a batch.
struct Trainer {
    net: Network,
    sgd: Sgd,
    all: Vec<Tensor>,
    x: Tensor,
    labels: Tensor,
    counts: Counts,
}

impl Trainer {
    fn new(options: &StepOptions, precision: Precision) -> Result<Self, StepBenchError> {
        let config = NetworkConfig {
            classes: options.classes,
            widths: options.widths,
            precision,
            ..NetworkConfig::default()
        };
        let net = Network::new(config, Device::Cpu, 1337)?;
        let all = net.params().parameters().map(|(_, t)| t.shallow_clone()).collect();
        let (n, side, labelled) = (options.batch, options.side, options.batch / 2);
        tch::manual_seed(1337);
        let x = Tensor::f_rand([n, 1, side, side], (Kind::Float, Device::Cpu))?;
        // Classes by brightness of a smoothed image: something that can be learnt.
        let smooth = x.f_avg_pool2d([17i64, 17], [1i64, 1], [8i64, 8], false, true, None::<i64>)?;
        let labels = smooth.f_narrow(0, 0, labelled)?.f_squeeze_dim(1)?;
        let spread = labels.f_sub_scalar(0.45)?.f_mul_scalar(10.0 * options.classes as f64)?;
        let labels = spread.f_clamp(0.0, (options.classes - 1) as f64)?.f_to_kind(Kind::Uint8)?;
        let counts = Counts { world: 1, labelled: labelled as u64, samples: n as u64 };
        Ok(Self { net, sgd: Sgd::new(0.01, 0.9, 1e-4), all, x, labels, counts })
    }

    fn step(&mut self, t: u64, full: bool) -> Result<StepLoss, StepBenchError> {
        let (heads, weights) = if full {
            (Heads::All, FULL)
        } else {
            (Heads::Main, TermWeights { kd_main: 0.0, entropy: 0.0, kd_aux: 0.0, ..FULL })
        };
        let out = self.net.forward_train(&self.x, &Draws::keyed(1337, t, 0), heads, None)?;
        let loss = Objective::default().step(&out, &self.labels, &weights, &self.counts, &Alone)?;
        ops::grads_to_none(&self.all)?;
        ops::backward(&loss.roots, &loss.grads)?;
        self.sgd.step(self.net.params())?;
        out.statistics.commit()?;
        Ok(loss)
    }
}

/// The full objective at the end of its ramp-up.
const FULL: TermWeights =
    TermWeights { dice: 1.0, focal: 0.0, kd_main: 0.1, entropy: 0.1, kd_aux: 0.1 };

fn case(
    options: &StepOptions,
    precision: Precision,
    full: bool,
) -> Result<StepCase, StepBenchError> {
    let mut trainer = Trainer::new(options, precision)?;
    reset_peak();
    let mut seconds = Vec::with_capacity(options.steps);
    let steps = options.steps.max(1);
    let mut cpu = cpu_seconds("self");
    for t in 0..options.settle + steps {
        if t == options.settle {
            cpu = cpu_seconds("self");
        }
        let start = Instant::now();
        let loss = trainer.step(t as u64, full)?;
        drop(loss);
        if t >= options.settle {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    seconds.sort_by(f64::total_cmp);
    let median = seconds[seconds.len() / 2];
    Ok(StepCase {
        who: "cpcr".into(),
        objective: if full { "full" } else { "warm-up" }.into(),
        precision: if precision == Precision::F32 { "f32" } else { "bf16" }.into(),
        seconds_per_step: median,
        seconds_best: seconds[0],
        cpu_seconds_per_step: (cpu_seconds("self") - cpu) / steps as f64,
        images_per_second: options.batch as f64 / median,
        peak_rss_mib: peak_rss_mib("self"),
    })
}

/// Trains twice from the same weights with the same draws, in f32 and in bf16.
fn precision_gap(options: &StepOptions) -> Result<f64, StepBenchError> {
    let mut totals = [Vec::new(), Vec::new()];
    for (precision, list) in [Precision::F32, Precision::Bf16].into_iter().zip(&mut totals) {
        let mut trainer = Trainer::new(options, precision)?;
        for t in 0..options.gap_steps {
            let loss = trainer.step(t as u64, true)?;
            list.push(loss.values()?.last().map_or(f64::NAN, |(_, v)| *v));
        }
    }
    let [a, b] = totals;
    // fold with a comparison that keeps a NaN visible.
    Ok(a.iter()
        .zip(&b)
        .map(|(a, b)| (a - b).abs() / a.abs())
        .fold(0.0, |m, d| if d.is_nan() || d > m { d } else { m }))
}

/// Forgets the process's peak of resident memory; where that is not allowed the peak stays.
fn reset_peak() {
    if let Err(error) = std::fs::write("/proc/self/clear_refs", "5") {
        tracing::debug!(%error, "reset peak memory");
    }
}

/// What the peer prints.
#[derive(Debug, Deserialize)]
struct PeerReport {
    losses: std::collections::BTreeMap<String, f64>,
    cases: Vec<StepCase>,
}

fn peer(options: &StepOptions, python: &Path) -> Result<(f64, Vec<StepCase>), StepBenchError> {
    let io = |what: &str| {
        let what = what.to_owned();
        move |source| StepBenchError::Io { what, source }
    };
    let folder = tempfile::tempdir().map_err(io("make a folder for the peer"))?;
    let (script, state) = (folder.path().join("step.py"), folder.path().join("state.safetensors"));
    std::fs::write(&script, PEER).map_err(io("write the peer's script"))?;
    let ours = write_state(options, &state)?;
    let run = Command::new(python)
        .arg(&script)
        .arg(&state)
        .args(["--threads", &options.threads.to_string()])
        .args(["--settle", &options.settle.to_string()])
        .args(["--steps", &options.steps.to_string()])
        .output()
        .map_err(io("start the peer"))?;
    if !run.status.success() {
        let said = String::from_utf8_lossy(&run.stderr);
        return Err(StepBenchError::Peer(format!("{}: {said}", run.status)));
    }
    let theirs: PeerReport = serde_json::from_slice(&run.stdout)
        .map_err(|e| StepBenchError::Peer(format!("no report: {e}")))?;
    let mut gap = 0.0f64;
    for (name, value) in ours {
        let Some(other) = theirs.losses.get(name) else { continue };
        let off = (value - other).abs() / value.abs().max(1e-12);
        if off.is_nan() || off > AGREEMENT {
            return Err(StepBenchError::Peer(format!("{name} is {other}, ours {value}")));
        }
        gap = gap.max(off);
    }
    if theirs.losses.len() < 5 {
        return Err(StepBenchError::Peer("fewer than five losses to compare".into()));
    }
    Ok((gap, theirs.cases))
}

/// Writes weights, batch and frozen draws for the peer; gives our losses on them.
fn write_state(
    options: &StepOptions,
    file: &Path,
) -> Result<Vec<(&'static str, f64)>, StepBenchError> {
    let trainer = Trainer::new(options, Precision::F32)?;
    let half = options.side / 2;
    let noise = |key: u64| {
        let base = Tensor::f_ones([1, options.widths[1], half, half], (Kind::Float, Device::Cpu))?;
        // y = x n + x on ones gives 1 + n.
        let y = crate::model::feature_noise(&base, &Noise::Keyed(key))?;
        Ok::<_, StepBenchError>(y.f_get(0)?.f_sub_scalar(1.0)?)
    };
    let noises = [noise(1)?, noise(2)?];
    let decoder =
        |i: usize| DecoderDraws { noise: Noise::Given(noises[i].shallow_clone()), threshold: 0.8 };
    let draws = Draws { decoders: [decoder(0), decoder(1)], dropout: Dropout::Off };
    let loss = tch::no_grad(|| -> Result<StepLoss, StepBenchError> {
        let out = trainer.net.forward_train(&trainer.x, &draws, Heads::All, None)?;
        Ok(Objective::default().step(&out, &trainer.labels, &FULL, &trainer.counts, &Alone)?)
    })?;
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for host in trainer.net.params().to_host()? {
        let dtype = if host.dtype == "I64" { Dtype::I64 } else { Dtype::F32 };
        tensors.push((format!("w.{}", host.name), dtype, host.shape, host.bytes));
    }
    let extra = [
        ("x", &trainer.x),
        ("label", &trainer.labels),
        ("noise.d1", &noises[0]),
        ("noise.d2", &noises[1]),
    ];
    for (name, tensor) in extra {
        let flat = tensor.f_contiguous()?;
        let dtype = if flat.f_kind()? == Kind::Uint8 { Dtype::U8 } else { Dtype::F32 };
        let mut bytes = vec![0; flat.numel() * flat.f_kind()?.elt_size_in_bytes()];
        flat.f_copy_data_u8(&mut bytes, flat.numel())?;
        let shape = flat.size().iter().map(|&d| d as usize).collect();
        tensors.push((name.into(), dtype, shape, bytes));
    }
    let broken =
        |e: safetensors::SafeTensorError| StepBenchError::Peer(format!("write state: {e}"));
    let views: Result<Vec<_>, _> = tensors
        .iter()
        .map(|(n, d, s, b)| TensorView::new(*d, s.clone(), b).map(|v| (n.as_str(), v)))
        .collect();
    let bytes = safetensors::serialize(views.map_err(broken)?, None).map_err(broken)?;
    std::fs::write(file, bytes)
        .map_err(|source| StepBenchError::Io { what: "write state".into(), source })?;
    Ok(loss.values()?)
}
