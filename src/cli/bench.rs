//! `cpcr bench data` and `cpcr data order`: arguments as typed, and what people read.

use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;

use super::{Failure, print, tell};
use crate::bench::data::{self, DataOptions, DataReport, Task};
use crate::bench::{coordinator, telemetry};
use crate::data::order::order_digest;
use crate::data::{Dataset, Deal, DealSpec};
use crate::proto::EXIT_DONE;
use crate::store::{Store, StoreOptions, unique_id};
use crate::types::WorldSize;

/// What `cpcr bench data` takes.
#[derive(Debug, clap::Args)]
pub struct DataArguments {
    /// Patients of the pool: 20 slices each.
    #[arg(long, default_value_t = 480, value_parser = clap::value_parser!(u32).range(2..=5000))]
    patients: u32,
    /// Side of the square slices in pixels.
    #[arg(long, default_value_t = 240, value_parser = clap::value_parser!(u32).range(32..=1024))]
    side: u32,
    /// Rounds; medians count.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Where the pool goes for the time being: some gigabytes.
    #[arg(long, value_name = "DIR")]
    folder: Option<PathBuf>,
    /// A Python with the packages of benches/peers/requirements-data.txt; without it only ours.
    #[arg(long, value_name = "PYTHON", env = "CPCR_PEER_DATA_PYTHON")]
    peer_python: Option<PathBuf>,
    /// JSON on stdout.
    #[arg(long)]
    json: bool,
}

/// What `cpcr bench coordinator` takes.
#[derive(Debug, clap::Args)]
pub struct CoordinatorArguments {
    /// Members, each with a connection of its own.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1024))]
    members: u32,
    /// How long it is measured.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=120))]
    seconds: u64,
    /// JSON on stdout.
    #[arg(long)]
    json: bool,
}

/// What `cpcr bench telemetry` takes.
#[derive(Debug, clap::Args)]
pub struct TelemetryArguments {
    /// The time of a step that shares are of, in milliseconds; it is slept through.
    #[arg(long, default_value_t = 20.0)]
    step_ms: f64,
    /// Steps of each round.
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(10..=100_000))]
    steps: u64,
    /// Rounds; medians count.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// JSON on stdout.
    #[arg(long)]
    json: bool,
}

/// `cpcr bench telemetry`.
///
/// # Errors
/// [`Failure`]: one line and an exit status.
pub fn telemetry(a: TelemetryArguments) -> Result<i32, Failure> {
    if !(0.1..=60_000.0).contains(&a.step_ms) {
        return Err(Failure::usage("--step-ms: 0.1 to 60000 milliseconds are wanted"));
    }
    let program = std::env::current_exe().map_err(Failure::failed)?;
    let report =
        telemetry::run(&program, (a.steps, a.step_ms), a.rounds).map_err(Failure::failed)?;
    if a.json {
        print(&format!("{}\n", serde_json::to_string(&report).map_err(Failure::failed)?))?;
        return Ok(EXIT_DONE);
    }
    tell(&format!(
        "processor time of instrumentation, and its share of a step of {} ms",
        a.step_ms
    ));
    for arm in report.arms {
        print(&format!(
            "{:<36} {:>8.1} us a step  {:.3} %\n",
            arm.name,
            arm.step_us,
            100.0 * arm.share
        ))?;
    }
    Ok(EXIT_DONE)
}

/// What the process that `cpcr bench telemetry` measures does.
///
/// # Errors
/// [`Failure`] for a task that is none.
pub fn telemetry_child(task: &str) -> Result<i32, Failure> {
    let task = serde_json::from_str(task).map_err(Failure::usage)?;
    print(&format!("{}\n", telemetry::measure(task)))?;
    Ok(EXIT_DONE)
}

/// What `cpcr data order` takes.
#[derive(Debug, clap::Args)]
pub struct OrderArguments {
    /// The dataset.
    url: String,
    /// `train.seed`.
    #[arg(long, default_value_t = 1337)]
    seed: u64,
    /// `data.labelled`: patients used with their labels.
    #[arg(long, default_value_t = 0)]
    labelled: u32,
    /// `batch.labelled`; without labelled patients there is none.
    #[arg(long, default_value_t = 12)]
    batch_labelled: u32,
    /// `batch.unlabelled`.
    #[arg(long, default_value_t = 12)]
    batch_unlabelled: u32,
    /// Passes over the unlabelled pool.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
    epochs: u64,
    /// Numbers of workers.
    #[arg(long, value_delimiter = ',', default_value = "1,2,3,4,5,7,8",
          value_parser = clap::value_parser!(u32).range(1..=4096))]
    workers: Vec<u32>,
    /// JSON on stdout.
    #[arg(long)]
    json: bool,
}

/// One line of `cpcr data order`.
#[derive(Debug, Serialize)]
struct OrderRow {
    workers: u32,
    sha256: String,
}

/// Measures; the result is the exit status.
///
/// # Errors
/// [`Failure`]: a contender that failed, or storage.
pub fn measure(arguments: DataArguments) -> Result<i32, Failure> {
    let DataArguments { patients, side, rounds, folder, peer_python, json } = arguments;
    let folder = folder.unwrap_or_else(std::env::temp_dir);
    let rounds = rounds as usize;
    let options = DataOptions { patients, side_px: side, rounds, folder, peer_python };
    // It moves its thread to other cores.
    let measured = std::thread::spawn(move || data::run(&options, &tell)).join();
    let report = measured
        .map_err(|_| Failure::failed("the measurement panicked"))?
        .map_err(Failure::failed)?;
    if json {
        print(&format!("{}\n", serde_json::to_string(&report).map_err(Failure::failed)?))?;
    } else {
        print(&table(&report))?;
    }
    Ok(EXIT_DONE)
}

/// Measures a coordinator; the result is the exit status.
///
/// # Errors
/// [`Failure`]: its files, or a coordinator that does not do what it should.
pub async fn coordinator(arguments: CoordinatorArguments) -> Result<i32, Failure> {
    let CoordinatorArguments { members, seconds, json } = arguments;
    let folder = std::env::temp_dir().join(format!("cpcr-bench-{}", unique_id()));
    let data = folder.join("data");
    let store = Store::open(&data.display().to_string(), &StoreOptions::default())
        .map_err(Failure::failed)?;
    let measured = async {
        super::run::phantoms(store).await?;
        let program = std::env::current_exe().map_err(Failure::failed)?;
        let asked = (members, seconds);
        let report = coordinator::run(&program, &data, &folder.join("run"), asked).await;
        report.map_err(Failure::failed)
    };
    let report = measured.await;
    std::fs::remove_dir_all(&folder).map_err(Failure::failed)?;
    let report = report?;
    if json {
        print(&format!("{}\n", serde_json::to_string(&report).map_err(Failure::failed)?))?;
    } else {
        print(&format!(
            "{} members joined within {:.1} s; then {:.3} of a core, {:.0} MiB at most\n",
            report.members, report.joined_s, report.cores, report.peak_rss_mib
        ))?;
    }
    Ok(EXIT_DONE)
}

/// Does what the measuring process wants of this one.
///
/// # Errors
/// [`Failure`]: no such task, or its data cannot be read.
pub fn child(task: &str) -> Result<i32, Failure> {
    let task: Task = serde_json::from_str(task).map_err(Failure::usage)?;
    // It blocks, and brings a runtime of its own.
    let reading = std::thread::spawn(move || data::perform(&task)).join();
    let reading =
        reading.map_err(|_| Failure::failed("the task panicked"))?.map_err(Failure::failed)?;
    print(&format!("{}\n", serde_json::to_string(&reading).map_err(Failure::failed)?))?;
    Ok(EXIT_DONE)
}

/// Tables in Markdown, as in `docs/benchmarks.md`.
fn table(report: &DataReport) -> String {
    let mut lines = vec![
        format!(
            "{} slices, {} MB stored; server on cores {:?}, each contender on {:?}; medians of {}",
            report.pool.0,
            report.pool.1 / 1_000_000,
            report.cores.server,
            report.cores.contender,
            report.options.rounds,
        ),
        String::new(),
        "| who | images/s on a core | images a CPU second | first batch, s | peak MiB |".to_owned(),
        "|---|---|---|---|---|".to_owned(),
    ];
    for c in report.cold.iter().chain(&report.behind_link).chain(&report.faults) {
        lines.push(format!(
            "| {} | {:.0} | {:.0} | {:.2} | {:.0} |",
            c.who, c.images_per_second, c.images_per_cpu_second, c.first_batch_s, c.peak_rss_mib
        ));
    }
    lines.extend([String::new(), "| cpcr over | images/s | images a CPU second |".to_owned()]);
    lines.push("|---|---|---|".to_owned());
    lines.extend(report.ratios.iter().map(|(who, a, b)| format!("| {who} | {a:.2} | {b:.2} |")));
    lines.extend([String::new(), "| workers | MB fetched | at most |".to_owned()]);
    lines.push("|---|---|---|".to_owned());
    lines.extend(report.traffic.iter().map(|t| {
        format!("| {} | {:.1} | {:.1} |", t.world, t.bytes as f64 / 1e6, t.bytes_max as f64 / 1e6)
    }));
    lines.extend([String::new(), "| pool | peak MiB | first batch in mid-epoch, s |".to_owned()]);
    lines.push("|---|---|---|".to_owned());
    lines.extend(
        report
            .pools
            .iter()
            .map(|p| format!("| {} | {:.0} | {:.2} |", p.slices, p.peak_rss_mib, p.first_batch_s)),
    );
    let injected = report.injected.iter().map(|(kind, count)| format!("{kind} {count}"));
    lines.push(format!("\nfaults injected: {}", injected.collect::<Vec<_>>().join(", ")));
    format!("{}\n", lines.join("\n"))
}

/// Prints the order's hash for each number of workers; the result is the exit status.
///
/// # Errors
/// [`Failure`]: a dataset that cannot be opened, or batches that cannot be dealt from it.
pub fn order(arguments: &OrderArguments) -> Result<i32, Failure> {
    let a = arguments;
    let store = Store::open(&a.url, &StoreOptions::default().existing()).map_err(Failure::usage)?;
    let dataset = Dataset::open(Arc::new(store)).map_err(Failure::failed)?;
    let (labelled, unlabelled) = dataset.manifest().pools(a.labelled).map_err(Failure::usage)?;
    let deal = Deal::new(DealSpec {
        seed: a.seed,
        batch_labelled: if labelled.is_empty() { 0 } else { a.batch_labelled },
        labelled,
        unlabelled,
        block_rows: dataset.manifest().block_rows,
        batch_unlabelled: a.batch_unlabelled,
    })
    .map_err(Failure::usage)?;
    let mut rows = Vec::with_capacity(a.workers.len());
    for &workers in &a.workers {
        let sha256 = order_digest(&deal, WorldSize(workers), a.epochs).map_err(Failure::usage)?;
        if !a.json {
            print(&format!("{workers} workers: {sha256}\n"))?;
        }
        rows.push(OrderRow { workers, sha256 });
    }
    if a.json {
        print(&format!("{}\n", serde_json::to_string(&rows).map_err(Failure::failed)?))?;
    }
    Ok(EXIT_DONE)
}
