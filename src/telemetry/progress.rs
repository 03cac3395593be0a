//! The one line that says how a run is doing.
//!
//! On a terminal it stays at the bottom and is redrawn, with messages and log lines above it;
//! elsewhere it is a line of plain text at most every ten seconds, and whenever the run's state
//! changes. It shows what it is told and measures nothing but the pace.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

const PLAIN_INTERVAL: Duration = Duration::from_secs(10);
/// Updates that the pace is taken over.
const PACE_WINDOW: usize = 64;

/// The bar on the terminal, if there is one: log lines must step around it.
static ON_TERMINAL: Mutex<Option<ProgressBar>> = Mutex::new(None);

/// Runs `write` with the terminal's progress line out of the way.
pub(super) fn above<T>(write: impl FnOnce() -> T) -> T {
    let bar = ON_TERMINAL.lock().unwrap_or_else(PoisonError::into_inner).clone();
    match bar {
        Some(bar) => bar.suspend(write),
        None => write(),
    }
}

/// What the run is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RunStatus {
    /// Not under way yet.
    #[default]
    Starting,
    /// Fewer workers than the run wants.
    Waiting {
        /// Workers that have joined.
        present: u32,
        /// Workers wanted.
        wanted: u32,
    },
    /// Taking steps.
    Training,
    /// Scoring the validation volumes.
    Validating,
    /// A process was lost; the survivors agree on where to go on.
    Recovering,
    /// Writing the last checkpoint.
    Stopping,
}

impl fmt::Display for RunStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Starting => f.write_str("starting"),
            Self::Waiting { present, wanted } => {
                write!(f, "waiting for {} of {wanted} workers", wanted.saturating_sub(*present))
            }
            Self::Training => f.write_str("training"),
            Self::Validating => f.write_str("validating"),
            Self::Recovering => f.write_str("recovering"),
            Self::Stopping => f.write_str("stopping"),
        }
    }
}

/// Everything that the line shows.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ProgressState {
    /// Steps done.
    pub step: u64,
    /// Loss terms by name, the total first.
    pub losses: Vec<(String, f64)>,
    /// Images per second, over all workers.
    pub images_per_s: f64,
    /// Mean Dice of the last validation.
    pub val_dice: Option<f64>,
    /// Trainers at work.
    pub world: u32,
    /// What the run is doing.
    pub status: RunStatus,
}

/// How a run ended, for the last line.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// All steps done.
    Complete,
    /// Stopped, and can be resumed.
    Interrupted,
    /// Failed, and why.
    Failed(String),
}

/// The line, on a terminal or not.
pub struct Progress {
    total: u64,
    pace: Pace,
    output: Output,
}

enum Output {
    Terminal(ProgressBar),
    Plain { writer: Box<dyn Write + Send>, shown: Option<(Instant, RunStatus)> },
}

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let on_terminal = matches!(self.output, Output::Terminal(_));
        f.debug_struct("Progress")
            .field("total", &self.total)
            .field("on_terminal", &on_terminal)
            .finish_non_exhaustive()
    }
}

impl Progress {
    /// A line for a run of `total_steps`, on stderr.
    #[must_use]
    pub fn new(total_steps: u64, is_terminal: bool) -> Self {
        if !is_terminal {
            return Self::plain(total_steps, Box::new(io::stderr()));
        }
        let bar = ProgressBar::with_draw_target(Some(total_steps), ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template("{spinner} {bar:16} {wide_msg}") {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.enable_steady_tick(Duration::from_millis(250));
        *ON_TERMINAL.lock().unwrap_or_else(PoisonError::into_inner) = Some(bar.clone());
        Self { total: total_steps, pace: Pace::default(), output: Output::Terminal(bar) }
    }

    /// Plain lines to `writer`.
    #[must_use]
    pub fn plain(total_steps: u64, writer: Box<dyn Write + Send>) -> Self {
        let output = Output::Plain { writer, shown: None };
        Self { total: total_steps, pace: Pace::default(), output }
    }

    /// Shows a new state.
    pub fn update(&mut self, state: &ProgressState) {
        self.update_at(Instant::now(), state);
    }

    fn update_at(&mut self, now: Instant, state: &ProgressState) {
        self.pace.note(now, state.step);
        let text = line(state, self.total, self.pace.eta(self.total.saturating_sub(state.step)));
        match &mut self.output {
            Output::Terminal(bar) => {
                bar.set_position(state.step);
                bar.set_message(text);
            }
            Output::Plain { writer, shown } => {
                let due = shown.is_none_or(|(at, status)| {
                    status != state.status || now.duration_since(at) >= PLAIN_INTERVAL
                });
                if due {
                    *shown = Some((now, state.status));
                    write_line(writer, &text);
                }
            }
        }
    }

    /// A message that stays, above the line.
    pub fn note(&mut self, message: &str) {
        match &mut self.output {
            Output::Terminal(bar) => bar.suspend(|| write_line(&mut io::stderr(), message)),
            Output::Plain { writer, .. } => write_line(writer, message),
        }
    }

    /// Ends the line, with one that says how the run ended.
    pub fn finish(mut self, outcome: &Outcome, state: &ProgressState) {
        let (how, why) = match outcome {
            Outcome::Complete => ("done", String::new()),
            Outcome::Interrupted => ("interrupted, can be resumed", String::new()),
            Outcome::Failed(why) => ("failed", format!(": {why}")),
        };
        let dice = state.val_dice.map_or_else(String::new, |d| format!(", validation Dice {d:.4}"));
        if let Output::Terminal(bar) = &self.output {
            bar.finish_and_clear();
        }
        self.note(&format!("{how} after step {} of {}{dice}{why}", state.step, self.total));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Output::Terminal(bar) = &self.output {
            bar.finish_and_clear();
            *ON_TERMINAL.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
    }
}

/// Whoever closed our stderr does not want the line: that must not end a run.
fn write_line(writer: &mut dyn Write, text: &str) {
    if writeln!(writer, "{text}").and_then(|()| writer.flush()).is_err() {
        tracing::trace!("nobody reads the progress line");
    }
}

fn line(state: &ProgressState, total: u64, eta: Option<Duration>) -> String {
    let mut parts = vec![format!("step {}/{total}", state.step)];
    if state.status != RunStatus::Training {
        parts.insert(0, state.status.to_string());
    }
    if let Some(eta) = eta {
        parts.push(format!("ETA {}", hours(eta)));
    }
    if !state.losses.is_empty() {
        let terms: Vec<String> =
            state.losses.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
        parts.push(terms.join(" "));
    }
    if state.images_per_s > 0.0 {
        parts.push(format!("{:.1} images/s", state.images_per_s));
    }
    if let Some(dice) = state.val_dice {
        parts.push(format!("val Dice {dice:.4}"));
    }
    if state.world > 0 {
        parts.push(format!("world {}", state.world));
    }
    parts.join(" | ")
}

fn hours(duration: Duration) -> String {
    let s = duration.as_secs();
    match (s / 3600, s / 60 % 60, s % 60) {
        (0, minutes, seconds) => format!("{minutes}:{seconds:02}"),
        (hours, minutes, seconds) => format!("{hours}:{minutes:02}:{seconds:02}"),
    }
}

/// Steps against time, over the last updates.
#[derive(Debug, Default)]
struct Pace {
    seen: VecDeque<(Instant, u64)>,
}

impl Pace {
    fn note(&mut self, now: Instant, step: u64) {
        match self.seen.back() {
            Some((_, last)) if step == *last => return,
            // A resumed or recovered run goes back: what was seen says nothing any more.
            Some((_, last)) if step < *last => self.seen.clear(),
            _ => {}
        }
        if self.seen.len() == PACE_WINDOW {
            self.seen.pop_front();
        }
        self.seen.push_back((now, step));
    }

    fn eta(&self, steps_left: u64) -> Option<Duration> {
        let ((from, first), (to, last)) = (self.seen.front()?, self.seen.back()?);
        let steps = last.checked_sub(*first).filter(|steps| *steps > 0)?;
        let s = to.duration_since(*from).as_secs_f64() / steps as f64 * steps_left as f64;
        Duration::try_from_secs_f64(s).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Shared {
        fn lines(&self) -> Vec<String> {
            let bytes = self.0.lock().unwrap().clone();
            String::from_utf8(bytes).unwrap().lines().map(str::to_owned).collect()
        }
    }

    fn training(step: u64) -> ProgressState {
        ProgressState {
            step,
            losses: vec![("total".into(), 1.25)],
            images_per_s: 96.0,
            val_dice: Some(0.8),
            world: 4,
            status: RunStatus::Training,
        }
    }

    #[test]
    fn plain_lines_come_every_ten_seconds_and_on_a_change_of_state() {
        let shared = Shared::default();
        let mut progress = Progress::plain(100, Box::new(shared.clone()));
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let waiting = RunStatus::Waiting { present: 2, wanted: 4 };
        progress.update_at(at(0), &ProgressState { status: waiting, ..Default::default() });
        for s in 1..=21 {
            progress.update_at(at(s), &training(s));
        }
        progress.note("worker 3 was lost");
        progress.finish(&Outcome::Interrupted, &training(21));
        assert_eq!(
            shared.lines(),
            [
                "waiting for 2 of 4 workers | step 0/100",
                "step 1/100 | ETA 1:39 | total 1.2500 | 96.0 images/s | val Dice 0.8000 | world 4",
                "step 11/100 | ETA 1:29 | total 1.2500 | 96.0 images/s | val Dice 0.8000 | world 4",
                "step 21/100 | ETA 1:19 | total 1.2500 | 96.0 images/s | val Dice 0.8000 | world 4",
                "worker 3 was lost",
                "interrupted, can be resumed after step 21 of 100, validation Dice 0.8000",
            ]
        );
    }

    #[test]
    fn a_run_that_goes_back_forgets_its_pace() {
        let mut pace = Pace::default();
        let now = Instant::now();
        pace.note(now, 10);
        pace.note(now + Duration::from_secs(10), 20);
        assert_eq!(pace.eta(5), Some(Duration::from_secs(5)));
        pace.note(now + Duration::from_secs(11), 12);
        assert_eq!(pace.eta(5), None);
    }

    #[test]
    fn long_times_have_hours() {
        assert_eq!(hours(Duration::from_secs(3_725)), "1:02:05");
    }
}
