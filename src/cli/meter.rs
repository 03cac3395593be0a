//! The line that says how far a long work on a dataset is: redrawn on a terminal, elsewhere a line of plain
//! text every few seconds, on stderr. It shows a [`Meter`] and measures nothing but the pace.

use std::io::IsTerminal;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::tell;
use crate::data::write::Meter;

const PLAIN_INTERVAL: Duration = Duration::from_secs(5);
const DRAWN_INTERVAL: Duration = Duration::from_millis(250);

/// Shows a meter until it is dropped.
pub(super) struct Watch {
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// Shows `meter`, whose parts are called `parts`, as the progress of `what`.
pub(super) fn watch(what: &'static str, parts: &'static str, meter: &Arc<Meter>) -> Watch {
    let (stop, stopped) = mpsc::channel::<()>();
    let meter = Arc::clone(meter);
    let started = Instant::now();
    let show = move || {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{msg}");
            ProgressBar::new_spinner()
                .with_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()))
        });
        let interval = if bar.is_some() { DRAWN_INTERVAL } else { PLAIN_INTERVAL };
        while stopped.recv_timeout(interval) == Err(mpsc::RecvTimeoutError::Timeout) {
            let text = line(what, parts, meter.read(), started.elapsed());
            match &bar {
                Some(bar) => {
                    bar.set_message(text);
                    bar.tick();
                }
                None => tell(&text),
            }
        }
        if let Some(bar) = bar {
            bar.finish_and_clear();
        }
    };
    let thread = std::thread::Builder::new().name("cpcr-meter".to_owned()).spawn(show);
    // Without a thread to show it the work goes on unseen.
    Watch { stop: Some(stop), thread: thread.ok() }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

fn line(
    what: &str,
    parts: &str,
    (done, total, bytes): (u64, u64, u64),
    elapsed: Duration,
) -> String {
    let rate = bytes as f64 / 1e6 / elapsed.as_secs_f64().max(1e-3);
    match total {
        0 => format!("{what}: looking at what there is"),
        _ => {
            let percent = 100 * done / total;
            format!("{what}: {done} of {total} {parts} ({percent} %), {rate:.1} MB/s")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_says_how_far_and_how_fast() {
        let text = line("import", "cases", (30, 120, 50_000_000), Duration::from_secs(4));
        assert_eq!(text, "import: 30 of 120 cases (25 %), 12.5 MB/s");
        assert!(line("import", "cases", (0, 0, 0), Duration::ZERO).contains("looking"));
    }
}
