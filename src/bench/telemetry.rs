//! What instrumentation costs a training step: processor time of a process that does nothing but a step's spans, timers
//! and the pulse's line, exporter's threads included, with a collector that takes everything in another process.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tracing::info_span;

use crate::proto::{TrainerEvent, Vitals};
use crate::telemetry::{Phase, StepSampling, StepTrace};
use crate::types::{Rank, Step};

/// Why it could not be measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TelemetryBenchError {
    /// A process, a socket or its answer.
    #[error("{what}: {source}")]
    Io {
        /// Verb and object.
        what: &'static str,
        /// The cause.
        source: std::io::Error,
    },
    /// The process that is measured ended otherwise, or said something else.
    #[error("the measured process: {0}")]
    Child(String),
}

/// What one way costs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Arm {
    /// Which.
    pub name: String,
    /// Processor time a step, in microseconds: the median over the rounds.
    pub step_us: f64,
    /// Its share of a step of the assumed time.
    pub share: f64,
}

/// What was measured.
#[derive(Debug, Serialize)]
pub struct TelemetryReport {
    /// The time of a step that shares are of, in milliseconds.
    pub step_ms: f64,
    /// Steps of each round.
    pub steps: u64,
    /// Rounds.
    pub rounds: u32,
    /// All ways.
    pub arms: Vec<Arm>,
}

/// What the measured process is to do.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Task {
    /// So many steps.
    pub steps: u64,
    /// Each of which takes so long.
    pub step_ms: f64,
    /// Seconds between two that are traced.
    pub spans_s: f64,
}

/// The ways: whether there is a collector, and seconds between two steps that are traced.
const ARMS: [(&str, bool, f64); 3] = [
    ("no collector", false, 1.0),
    ("collector, a step a second traced", true, 1.0),
    ("collector, every step traced", true, 0.0),
];

/// Measures all ways in turn, `rounds` times; `program` is `cpcr`.
///
/// # Errors
/// [`TelemetryBenchError`].
pub fn run(
    program: &Path,
    (steps, step_ms): (u64, f64),
    rounds: u32,
) -> Result<TelemetryReport, TelemetryBenchError> {
    let io = |what| move |source| TelemetryBenchError::Io { what, source };
    let listener = TcpListener::bind("127.0.0.1:0").map_err(io("listen as a collector"))?;
    let address = listener.local_addr().map_err(io("listen as a collector"))?;
    // Ends with this process; what it costs is not counted.
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || swallow(stream));
        }
    });
    let mut found = vec![Vec::new(); ARMS.len()];
    for _ in 0..rounds {
        for (at, (_, collector, spans_s)) in ARMS.into_iter().enumerate() {
            let task = Task { steps, step_ms, spans_s };
            let text = serde_json::to_string(&task).map_err(|error| {
                TelemetryBenchError::Child(format!("its task cannot be written: {error}"))
            })?;
            let mut command = Command::new(program);
            command.args(["bench", "telemetry-child", "--task", &text]);
            command.env_remove("OTEL_EXPORTER_OTLP_ENDPOINT");
            if collector {
                command.env("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://{address}"));
            }
            let output = command.output().map_err(io("start the measured process"))?;
            let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
            let step_us: f64 = said.parse().map_err(|_| {
                let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
                TelemetryBenchError::Child(format!("it said {said:?} ({why})"))
            })?;
            found[at].push(step_us);
        }
    }
    let arms = ARMS.into_iter().zip(found).map(|((name, ..), values)| {
        let step_us = super::median(values);
        Arm { name: name.to_owned(), step_us, share: step_us / (1e3 * step_ms) }
    });
    Ok(TelemetryReport { step_ms, steps, rounds, arms: arms.collect() })
}

/// Answers every request with 200.
fn swallow(stream: TcpStream) -> Option<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let (mut length, mut line) = (0, String::new());
        loop {
            line.clear();
            if reader.read_line(&mut line).ok()? == 0 {
                return None;
            }
            if line == "\r\n" {
                break;
            }
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().ok()?;
            }
        }
        std::io::copy(&mut reader.by_ref().take(length), &mut std::io::sink()).ok()?;
        reader.get_mut().write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").ok()?;
    }
}

/// In the measured process: does what a trainer's loop does around its work, and gives the processor time a step in
/// microseconds.
#[must_use]
pub fn measure(task: Task) -> f64 {
    let member = info_span!("member");
    let mut sampling =
        StepSampling::new(Duration::try_from_secs_f64(task.spans_s).unwrap_or_default());
    let pause = Duration::try_from_secs_f64(task.step_ms / 1e3).unwrap_or_default();
    let mut vitals = Vitals::default();
    let mut said = Instant::now();
    let mut sink = std::io::sink();
    let before = cpu_s();
    for step in 0..task.steps {
        let traced = sampling.takes(Instant::now());
        let mut trace = StepTrace::begin(&member, Step(step), Rank(0), traced);
        for phase in Phase::ALL {
            trace.phase(phase, || ());
        }
        vitals.steps_s += trace.end().as_secs_f64();
        for phase in Phase::ALL {
            let spent = trace.spent(phase).as_secs_f64();
            *vitals.phases_s.entry(phase.name().to_owned()).or_default() += spent;
        }
        if said.elapsed() >= Duration::from_secs(1) {
            said = Instant::now();
            let line = serde_json::to_string(&TrainerEvent::Vitals(vitals.clone()));
            // Nothing fails that goes nowhere.
            line.map(|line| writeln!(sink, "{line}")).ok();
        }
        std::thread::sleep(pause);
    }
    1e6 * (cpu_s() - before) / task.steps.max(1) as f64
}

/// Processor time of all threads of this process so far.
fn cpu_s() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
