//! How fast slices come out of object storage: ours, a bare loop of GETs, and other people's loaders.
//!
//! One S3 server, in this process, serves all of them in one run; each contender is a process of
//! its own that starts with an empty cache. Where the machine has two cores or more the server has
//! all but one of them and each contender the one that is left, so that images a second *are* images
//! a second and core. Rounds are interleaved; medians count.
//!
//! Not a test: nothing here fails because it is slow. What is measured is in `docs/benchmarks.md`.

mod child;
mod cores;
mod peers;
mod pools;
mod proxied;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use child::{Task, perform};

use super::median;
use crate::data::DataError;
use crate::store::{S3Server, S3ServerError, S3ServerOptions, StoreError, serve};
use cores::Cores;

/// What the server calls its bucket.
const BUCKET: &str = "bench";
/// Folder of our disk cache.
const BLOCKS: &str = "blocks";
/// The one user of a server that lives for minutes, on loopback.
const USER: [&str; 2] = ["cpcr-bench", "cpcr-bench-secret"];
/// Longest that one contender may take.
const CHILD_S_MAX: Duration = Duration::from_secs(300);
/// Samples of a batch, all unlabelled: the method's.
const BATCH: u32 = 12;
/// Steps that the large pools are read for.
const POOL_STEPS: u64 = 200;
/// Slices in the pools whose memory and start are compared.
const POOL_SLICES: [u64; 4] = [10_000, 100_000, 1_000_000, 10_000_000];
/// Worker counts whose traffic is counted.
const WORLDS: [u32; 4] = [1, 2, 4, 8];

/// Why a measurement failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataBenchError {
    /// Data could not be made or read.
    #[error(transparent)]
    Data(#[from] DataError),
    /// Storage failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The server could not be started.
    #[error(transparent)]
    Server(#[from] S3ServerError),
    /// Files or processes failed.
    #[error("{what}: {source}")]
    Io {
        /// Verb and object.
        what: String,
        /// The cause.
        source: std::io::Error,
    },
    /// A contender ended badly or said nothing sensible.
    #[error("{who}: {why}")]
    Contender {
        /// Which.
        who: String,
        /// Its words.
        why: String,
    },
}

impl DataBenchError {
    fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

/// What to measure.
#[derive(Debug, Clone, Serialize)]
pub struct DataOptions {
    /// Patients of the pool: two volumes of ten slices each.
    pub patients: u32,
    /// Side of the square slices in pixels; ACDC's are about 216 x 256.
    pub side_px: u32,
    /// Rounds; medians count.
    pub rounds: usize,
    /// Where datasets and caches go for the time being.
    pub folder: PathBuf,
    /// A Python with the peers' packages (`benches/peers/requirements-data.txt`).
    pub peer_python: Option<PathBuf>,
}

/// What one contender did in one round.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Reading {
    /// Images that came.
    pub images: u64,
    /// From its first call to its last image.
    pub seconds: f64,
    /// Processor seconds of it and its children meanwhile.
    pub cpu_s: f64,
    /// From its first call to its first batch.
    pub first_batch_s: f64,
    /// Peak resident memory.
    pub peak_rss_mib: f64,
    /// Bytes asked of storage; ours only.
    #[serde(default)]
    pub bytes: u64,
    /// Requests sent to storage; ours only.
    #[serde(default)]
    pub requests: u64,
}

/// A contender's rounds.
#[derive(Debug, Clone, Serialize)]
pub struct Contender {
    /// Its name.
    pub who: String,
    /// Median images a second on its one core.
    pub images_per_second: f64,
    /// Median images a second of processor time: what a faster server or network would leave.
    pub images_per_cpu_second: f64,
    /// Median seconds to its first batch.
    pub first_batch_s: f64,
    /// Largest peak memory.
    pub peak_rss_mib: f64,
    /// Every round.
    pub rounds: Vec<Reading>,
}

/// What one worker of several fetched in an epoch.
#[derive(Debug, Clone, Serialize)]
pub struct Traffic {
    /// Workers.
    pub world: u32,
    /// Bytes that the worker with the largest share fetched.
    pub bytes: u64,
    /// ceil(B/W)/B of the pool, and two shards.
    pub bytes_max: u64,
}

/// What a pool's size costs.
#[derive(Debug, Clone, Serialize)]
pub struct PoolCost {
    /// Slices in it.
    pub slices: u64,
    /// Peak resident memory of the loader's process.
    pub peak_rss_mib: f64,
    /// Seconds from opening the dataset to the first batch in mid-epoch.
    pub first_batch_s: f64,
}

/// Everything that was measured.
#[derive(Debug, Clone, Serialize)]
pub struct DataReport {
    /// What was asked.
    pub options: DataOptions,
    /// Images and bytes of the pool as stored.
    pub pool: (u64, u64),
    /// Cores of the server and of each contender; equal where there was only one.
    pub cores: Cores,
    /// A cold epoch, by contender.
    pub cold: Vec<Contender>,
    /// The bare loop and ours, cold, behind a link that is slower than either.
    pub behind_link: Vec<Contender>,
    /// Ours through a proxy, without and with faults.
    pub faults: Vec<Contender>,
    /// How many faults the proxy injected, by kind, over all rounds.
    pub injected: Vec<(String, u64)>,
    /// What a worker fetches.
    pub traffic: Vec<Traffic>,
    /// What a pool's size costs.
    pub pools: Vec<PoolCost>,
    /// Ours over another contender's: images a second, and images a second of processor time.
    pub ratios: Vec<(String, f64, f64)>,
}

/// Measures everything; says on `progress` what it is at. Blocks, and moves the calling thread to
/// some of its cores: to be called on a thread that is good for nothing else.
///
/// # Errors
/// [`DataBenchError`]; a contender that fails fails the whole.
pub fn run(options: &DataOptions, progress: &dyn Fn(&str)) -> Result<DataReport, DataBenchError> {
    // First, so that the server's threads inherit its cores.
    let cores = Cores::divide();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(DataBenchError::io("start the server's threads"))?;
    runtime.block_on(measure(options, cores, progress))
}

async fn measure(
    options: &DataOptions,
    cores: Cores,
    progress: &dyn Fn(&str),
) -> Result<DataReport, DataBenchError> {
    let made = DataBenchError::io(format!("make a folder in {}", options.folder.display()));
    let folder = tempfile::tempdir_in(&options.folder).map_err(made)?;
    let site = Site::start(folder.path(), cores.clone()).await?;
    progress("making the pool");
    let pool = pools::phantoms(&site, options).await?;
    let ours = |who: &str, task: Task| (who.to_owned(), site.ours(task));
    let url = site.url("pool");
    let blocks = folder.path().join(BLOCKS);
    let mut commands = vec![
        ours("bare GET loop", Task::Get { url: url.clone() }),
        ours("cpcr", Task::epoch(&url, 1, 0).cached(&blocks)),
        ours("cpcr, warm disk cache", Task::epoch(&url, 1, 0).cached(&blocks)),
        ours("cpcr without disk cache", Task::epoch(&url, 1, 0)),
    ];
    if let Some(python) = &options.peer_python {
        commands.extend(peers::prepare(&site, options, python, progress).await?);
    }
    let cold = rounds(&site, commands, options.rounds, progress)?;

    let behind_link = proxied::behind_link(&site, options, &url, progress).await?;
    let (faults, injected) = proxied::through_faults(&site, options, &url, progress).await?;
    progress("counting traffic");
    let traffic = traffic(&site, &url, &pool)?;
    progress("growing the pool");
    let pools = costs(&site, &pool).await?;
    let ratios = ratios(&cold, &behind_link, &faults);
    let pool = (pool.slices, pool.bytes);
    Ok(DataReport {
        options: options.clone(),
        pool,
        cores,
        cold,
        behind_link,
        faults,
        injected,
        traffic,
        pools,
        ratios,
    })
}

/// The server and where it keeps its bucket.
struct Site {
    folder: PathBuf,
    server: S3Server,
    cores: Cores,
}

impl Site {
    async fn start(folder: &Path, cores: Cores) -> Result<Self, DataBenchError> {
        let [name, secret] = USER;
        let options = S3ServerOptions::on_loopback(folder.join("s3"), name, secret);
        let server = serve(options).await?;
        Ok(Self { folder: folder.to_owned(), server, cores })
    }

    fn url(&self, prefix: &str) -> String {
        format!("s3://{BUCKET}/{prefix}")
    }

    fn endpoint(&self) -> String {
        format!("http://{}", self.server.addr())
    }

    /// The environment in which every contender finds the server, at `endpoint`.
    fn environment(&self, endpoint: &str) -> Vec<(&'static str, String)> {
        vec![
            ("AWS_ENDPOINT_URL", endpoint.to_owned()),
            ("AWS_ACCESS_KEY_ID", USER[0].to_owned()),
            ("AWS_SECRET_ACCESS_KEY", USER[1].to_owned()),
            ("AWS_REGION", "us-east-1".to_owned()),
            ("AWS_DEFAULT_REGION", "us-east-1".to_owned()),
        ]
    }

    /// This program, doing `task`.
    fn ours(&self, task: Task) -> Command {
        Command { task: Some(task), endpoint: self.endpoint(), line: Vec::new() }
    }
}

/// How a contender is started.
struct Command {
    /// Ours: what it is to do.
    task: Option<Task>,
    endpoint: String,
    /// A peer's: program and arguments.
    line: Vec<String>,
}

impl Command {
    /// Runs it to its end and reads the one line that it prints.
    fn run(&self, who: &str, site: &Site) -> Result<Reading, DataBenchError> {
        let bad = |why: String| DataBenchError::Contender { who: who.to_owned(), why };
        let line = match &self.task {
            Some(task) => {
                let own =
                    std::env::current_exe().map_err(DataBenchError::io("find this program"))?;
                let task = serde_json::to_string(task).map_err(|e| bad(e.to_string()))?;
                vec![own.display().to_string(), "bench".into(), "data-child".into(), task]
            }
            None => self.line.clone(),
        };
        let output = site.cores.run(&line, &site.environment(&self.endpoint), CHILD_S_MAX);
        let output = output.map_err(DataBenchError::io(format!("run {who}")))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let last = text.lines().rfind(|line| line.starts_with('{'));
        match last.map(serde_json::from_str) {
            Some(Ok(reading)) if output.status.success() => Ok(reading),
            _ => {
                let words = String::from_utf8_lossy(&output.stderr);
                let words = words.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("");
                Err(bad(format!("{}, saying: {words}", output.status)))
            }
        }
    }
}

/// All contenders, one after the other, again and again.
fn rounds(
    site: &Site,
    commands: Vec<(String, Command)>,
    rounds: usize,
    progress: &dyn Fn(&str),
) -> Result<Vec<Contender>, DataBenchError> {
    let mut readings = vec![Vec::with_capacity(rounds); commands.len()];
    for round in 0..rounds {
        for ((who, command), readings) in commands.iter().zip(&mut readings) {
            progress(&format!("round {} of {rounds}: {who}", round + 1));
            readings.push(command.run(who, site)?);
        }
        // The next round is cold again. Removed at the end only: for some seconds after thousands of files
        // have gone, ext4 is slow to make new ones.
        let blocks = site.folder.join(BLOCKS);
        if blocks.exists() {
            let aside = tempfile::tempdir_in(&site.folder).map(tempfile::TempDir::keep);
            let moved = aside.and_then(|aside| std::fs::rename(&blocks, aside.join(BLOCKS)));
            moved.map_err(DataBenchError::io("empty the disk cache"))?;
        }
    }
    Ok(commands
        .into_iter()
        .zip(readings)
        .map(|((who, _), rounds)| contender(who, rounds))
        .collect())
}

fn contender(who: String, rounds: Vec<Reading>) -> Contender {
    let of = |value: &dyn Fn(&Reading) -> f64| median(rounds.iter().map(value).collect());
    Contender {
        who,
        images_per_second: of(&|r| r.images as f64 / r.seconds.max(1e-9)),
        images_per_cpu_second: of(&|r| r.images as f64 / r.cpu_s.max(1e-9)),
        first_batch_s: of(&|r| r.first_batch_s),
        peak_rss_mib: rounds.iter().map(|r| r.peak_rss_mib).fold(0.0, f64::max),
        rounds,
    }
}

/// What the worker with the largest share fetches in one epoch.
fn traffic(site: &Site, url: &str, pool: &pools::Pool) -> Result<Vec<Traffic>, DataBenchError> {
    let mut all = Vec::new();
    for world in WORLDS {
        // The last rank has the largest share of the unlabelled batch.
        let task = Task::epoch(url, world, world - 1);
        let reading = site.ours(task).run(&format!("worker of {world}"), site)?;
        let share = u64::from(BATCH.div_ceil(world));
        let bytes_max = pool.bytes * share / u64::from(BATCH) + 2 * pool.largest_shard_bytes();
        all.push(Traffic { world, bytes: reading.bytes, bytes_max });
    }
    Ok(all)
}

/// Memory and first batch in mid-epoch, for pools of growing size.
async fn costs(site: &Site, pool: &pools::Pool) -> Result<Vec<PoolCost>, DataBenchError> {
    let mut all = Vec::new();
    for slices in POOL_SLICES {
        let name = format!("pool-{slices}");
        pools::repeated(site, &name, pool, slices).await?;
        let middle = slices / u64::from(BATCH) / 2;
        let task = Task::Read {
            url: site.url(&name),
            world: 1,
            rank: 0,
            steps: Some(middle..middle + POOL_STEPS),
            cache: None,
        };
        let reading = site.ours(task).run(&name, site)?;
        let (peak_rss_mib, first_batch_s) = (reading.peak_rss_mib, reading.first_batch_s);
        all.push(PoolCost { slices, peak_rss_mib, first_batch_s });
    }
    Ok(all)
}

/// Ours over each other contender, behind the link as well, and under faults over without.
fn ratios(
    cold: &[Contender],
    behind_link: &[Contender],
    faults: &[Contender],
) -> Vec<(String, f64, f64)> {
    let over = |name: &str, a: &Contender, b: &Contender| {
        let per_cpu = a.images_per_cpu_second / b.images_per_cpu_second;
        (name.to_owned(), a.images_per_second / b.images_per_second, per_cpu)
    };
    let Some(ours) = cold.iter().find(|c| c.who == "cpcr") else { return Vec::new() };
    let others = cold.iter().filter(|c| c.who != "cpcr");
    let mut ratios: Vec<_> = others.map(|other| over(&other.who, ours, other)).collect();
    if let [bare, ours] = behind_link {
        ratios.push(over(&bare.who, ours, bare));
    }
    if let [clean, faulty] = faults {
        ratios.push(over("faults over none", faulty, clean));
    }
    ratios
}
