//! `cpcr compare`: trains every method with every seed, evaluates all alike, writes one table.
//!
//! `plan` is what has to run, `shell` the processes, `scores` and `render` the table; this file is the
//! order of things. Each run is an ordinary one of `cpcr-launch` under OUT/runs, so a comparison that
//! was killed goes on when it is started again. Not here: training, and how a checkpoint is scored.

mod plan;
mod render;
mod scores;
mod shell;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use self::plan::{Mode, PlannedRun, Request, Selection};
use self::render::{Budget, Comparison, SHARED_SPLIT};
use self::scores::{Evaluation, RunFigures};
use self::shell::{Ended, Interrupt};
use super::run::{self, BackendArgument, absolute};
use super::{Failure, signals, tell};
use crate::checkpoint;
use crate::config::RunConfig;
use crate::data::{Dataset, Split, report};
use crate::proto::{EXIT_DONE, EXIT_RESUMABLE};
use crate::store::{Store, StoreOptions};

/// Format of the records that a comparison writes.
const FORMAT: u32 = 1;
/// What a comparison keeps in a run's folder.
const RECORD: &str = "comparison.json";

/// Trains every method with every seed and writes one table: OUT/compare.md, .csv and .json.
#[derive(Debug, clap::Args)]
pub struct CompareArguments {
    /// Values of the configuration's `method`, the one to compare with first.
    #[arg(long, value_delimiter = ',', required = true, value_name = "A,B")]
    methods: Vec<String>,
    /// Seeds; each method is trained with each.
    #[arg(long, value_delimiter = ',', required = true, value_name = "1,2,3")]
    seeds: Vec<u64>,
    /// A preset or a TOML file for all methods; without it and --data, the built-in demonstration.
    #[arg(long, conflicts_with = "as_published")]
    config: Option<String>,
    /// One configuration key for all methods, e.g. `train.iterations=100`; may be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// The dataset's folder.
    #[arg(long, value_name = "URL")]
    data: Option<String>,
    /// How many workers a run has.
    #[arg(long, default_value = "1", value_parser = clap::value_parser!(u32).range(1..=1024))]
    nodes: u32,
    /// Where the runs and the table go: a folder or an object store's URL.
    #[arg(long, value_name = "URL")]
    out: String,
    /// Volumes to score; default: test if the dataset has labelled test volumes, else val.
    #[arg(long, value_parser = ["val", "test"])]
    split: Option<String>,
    /// Which checkpoint of each run: of the best mean Dice in validation, or the last.
    #[arg(long, default_value = "best", value_enum)]
    select: Selection,
    /// Each method with the preset of its own name (cpcr and cpcr-focal: acdc-7) instead of one
    /// configuration for all.
    #[arg(long, requires = "data")]
    as_published: bool,
    /// Distances in voxels, as the literature has them, or in millimetres.
    #[arg(long, default_value = "voxel", value_parser = ["voxel", "mm"])]
    spacing: String,
    /// Which collectives; `auto` takes NCCL if every trainer has a GPU of its own, else Gloo.
    #[arg(long, default_value = "auto", value_enum)]
    backend: BackendArgument,
    /// The comparison as JSON on stdout instead of Markdown.
    #[arg(long)]
    json: bool,
}

/// Where everything is.
struct Places {
    /// Without a slash at its end.
    out: String,
    store: Store,
    data: String,
    dataset_sha256: String,
    split: String,
}

impl Places {
    /// A run's folder within OUT.
    fn folder(run: &PlannedRun) -> String {
        format!("runs/{}", run.name)
    }

    fn url(&self, run: &PlannedRun) -> String {
        format!("{}/{}", self.out, Self::folder(run))
    }

    fn store(&self, run: &PlannedRun) -> Store {
        self.store.child(&Self::folder(run))
    }
}

/// What a comparison knows of a run that the run itself does not.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    format: u32,
    /// Seconds from start to end, in one go.
    wall_s: f64,
}

/// Runs `cpcr compare`; the result is the exit status.
///
/// # Errors
/// [`Failure`]: one line and an exit status.
pub async fn compare(mut a: CompareArguments) -> Result<i32, Failure> {
    let demonstration = a.config.is_none() && a.data.is_none() && !a.as_published;
    if demonstration {
        a.config = Some("demo".to_owned());
    }
    let mut runs = plan::plan(&request(&a))?;
    let places = places(&a, &runs, demonstration).await?;
    for run in &mut runs {
        run.config.data.url = Some(places.data.clone());
        run::scale(&mut run.config, a.nodes);
    }
    refuse_strangers(&places, &runs).await?;
    if places.split == "val" && a.select == Selection::Best {
        tell(&format!("NOTE: {SHARED_SPLIT}"));
    }

    let mut interrupt: Interrupt = Box::pin(signals::interrupted());
    for (place, run) in runs.iter().enumerate() {
        tell(&format!("run {} of {}: {}, seed {}", place + 1, runs.len(), run.method, run.seed));
        if train(&a, &places, run, &mut interrupt).await? == Ended::Interrupted {
            return Ok(interrupted(&places));
        }
    }
    let mut figures = Vec::new();
    let mut evaluations = Vec::new();
    for run in &runs {
        tell(&format!("evaluating {}", run.name));
        let url = places.url(run);
        match shell::evaluate(&run.name, &url, &places.split, &a.spacing, a.select, &mut interrupt)
            .await?
        {
            Ended::Done(found) => {
                figures.push(self::figures(&places, run, &found).await?);
                evaluations.push(found);
            }
            Ended::Interrupted => return Ok(interrupted(&places)),
        }
    }
    let comparison = join(&a, &places, &runs, figures, &evaluations).await?;
    publish(&places, &comparison, a.json).await?;
    Ok(EXIT_DONE)
}

fn request(a: &CompareArguments) -> Request {
    Request {
        methods: a.methods.clone(),
        seeds: a.seeds.clone(),
        config: a.config.clone(),
        set: a.set.clone(),
        mode: if a.as_published { Mode::AsPublished } else { Mode::IdenticalBudget },
        selection: a.select,
    }
}

fn interrupted(places: &Places) -> i32 {
    tell(&format!("interrupted: the same command goes on with {}", places.out));
    EXIT_RESUMABLE
}

/// Opens OUT and the dataset, which the demonstration makes first, and chooses the split.
async fn places(
    a: &CompareArguments,
    runs: &[PlannedRun],
    demonstration: bool,
) -> Result<Places, Failure> {
    let out = absolute(&a.out).trim_end_matches('/').to_owned();
    let configured = || runs.first().and_then(|run| run.config.data.url.clone());
    let data = match a.data.as_deref().map(absolute).or_else(configured) {
        Some(data) => data,
        None if demonstration => {
            let data = format!("{out}/data");
            let store = Store::open(&data, &StoreOptions::default()).map_err(Failure::usage)?;
            run::phantoms(store).await?;
            data
        }
        None => {
            return Err(Failure::usage(
                "no dataset: give --data URL, or neither --config nor --data",
            ));
        }
    };
    let options = StoreOptions::default().existing();
    let dataset = Store::open(&data, &options).map_err(Failure::usage)?;
    let dataset = Dataset::open(Arc::new(dataset)).map_err(Failure::usage)?;
    let info = report::info(&dataset).map_err(Failure::usage)?;
    let labelled = |split: Split| info.splits.get(split.name()).map_or(0, |s| s.labelled_volumes);
    let split = match &a.split {
        Some(split) => split.clone(),
        None if labelled(Split::Test) > 0 => "test".to_owned(),
        None => "val".to_owned(),
    };
    let chosen = if split == "test" { Split::Test } else { Split::Val };
    if labelled(chosen) == 0 {
        return Err(Failure::usage(format!("{data} has no labelled volume in the {split} split")));
    }
    // Last: it makes the folder.
    let store = Store::open(&out, &StoreOptions::default()).map_err(Failure::usage)?;
    Ok(Places { out, store, data, dataset_sha256: info.manifest.sha256, split })
}

/// Finds before the first hour of training that a folder holds another run.
async fn refuse_strangers(places: &Places, runs: &[PlannedRun]) -> Result<(), Failure> {
    for run in runs {
        let Some(earlier) = run::read(&places.store(run)).await? else { continue };
        // Also what a resumed run may change: one budget is what the table claims.
        let mut asked = run.config.clone();
        // The dataset is given beside it; that it is the same one, its hash in the checkpoints shows.
        asked.data.url.clone_from(&earlier.data.url);
        let mut differences = asked.differences(&earlier);
        for line in plan::unequal(&earlier, &asked) {
            if !differences.contains(&line) {
                differences.push(line);
            }
        }
        if !differences.is_empty() {
            return Err(Failure::usage(format!(
                "{} holds a run with other settings: {}; use another --out",
                places.url(run),
                differences.join("; ")
            )));
        }
    }
    Ok(())
}

/// Trains one run. How long that takes is kept only of a run that began here and was not interrupted.
async fn train(
    a: &CompareArguments,
    places: &Places,
    run: &PlannedRun,
    interrupt: &mut Interrupt,
) -> Result<Ended<()>, Failure> {
    let folder = places.store(run);
    let fresh = run::read(&folder).await?.is_none();
    let start = Instant::now();
    let ended =
        shell::train(run, &places.url(run), &places.data, a.nodes, a.backend, interrupt).await?;
    if fresh && ended == Ended::Done(()) {
        let record = Record { format: FORMAT, wall_s: start.elapsed().as_secs_f64() };
        let text = serde_json::to_vec(&record).map_err(Failure::failed)?;
        folder.put(RECORD, text.into()).await.map_err(Failure::failed)?;
    }
    Ok(ended)
}

/// A run's scores, and what its folder says about how they came about.
async fn figures(
    places: &Places,
    run: &PlannedRun,
    found: &Evaluation,
) -> Result<RunFigures, Failure> {
    let (folder, url) = (places.store(run), places.url(run));
    let newest = checkpoint::latest(&folder).await.map_err(Failure::failed)?;
    let newest = newest.ok_or_else(|| Failure::failed(format!("{url} has no whole checkpoint")))?;
    if newest.step.0 != run.config.train.iterations {
        return Err(Failure::usage(format!(
            "{url} was trained for {} steps, {} are asked for; use another --out",
            newest.step, run.config.train.iterations
        )));
    }
    let report = optional(&folder, "report/metrics.json").await?;
    let record: Option<Record> =
        optional(&folder, RECORD).await?.and_then(|record| serde_json::from_value(record).ok());
    Ok(RunFigures {
        run: url,
        method: run.method.clone(),
        seed: run.seed,
        config_sha256: newest.config_sha256,
        steps: newest.step.0,
        selected_step: found.step,
        wall_s: record.filter(|record| record.format <= FORMAT).map(|record| record.wall_s),
        images_per_s: report.and_then(|r| r["throughput"]["images_per_s"].as_f64()),
        mean: found.summary.mean,
        classes: found.summary.classes.clone(),
        empty_predictions: found.summary.empty_predictions,
    })
}

/// A JSON object of a run that says nothing which the table needs: one that is damaged is none.
async fn optional(folder: &Store, path: &str) -> Result<Option<serde_json::Value>, Failure> {
    match folder.get(path).await {
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(Failure::failed(error)),
    }
}

/// The comparison, once the runs have turned out comparable.
async fn join(
    a: &CompareArguments,
    places: &Places,
    runs: &[PlannedRun],
    figures: Vec<RunFigures>,
    evaluations: &[Evaluation],
) -> Result<Comparison, Failure> {
    let mode = request(a).mode;
    let mut budgets: Vec<Budget> = Vec::new();
    let mut first: Option<RunConfig> = None;
    for run in runs {
        // What the run was trained with, not what was asked for.
        let trained = run::configuration(&places.url(run), &StoreOptions::default()).await?;
        let first = first.get_or_insert_with(|| trained.clone());
        let differences = plan::unequal(first, &trained);
        if mode == Mode::IdenticalBudget && !differences.is_empty() {
            return Err(Failure::usage(format!(
                "{} and {} have different budgets: {}; use another --out, or --as-published",
                runs[0].name,
                run.name,
                differences.join("; ")
            )));
        }
        if budgets.last().is_none_or(|last| last.method != run.method) {
            budgets.push(Budget::of(&run.method, run.source.as_deref(), a.nodes, &trained));
        }
    }
    let Some(one) = evaluations.first().map(|found| &found.summary) else {
        return Err(Failure::failed("there is no run to compare"));
    };
    let methods: Vec<String> = budgets.iter().map(|budget| budget.method.clone()).collect();
    Ok(Comparison {
        format: FORMAT,
        mode,
        selection: a.select,
        split: places.split.clone(),
        cases: one.cases.len(),
        unit: one.unit.clone(),
        policy: one.policy.clone(),
        data: places.data.clone(),
        dataset_sha256: places.dataset_sha256.clone(),
        seeds: a.seeds.clone(),
        methods: scores::rows(&methods, &figures),
        budgets,
        runs: figures,
    })
}

/// Writes the three files and prints one of them.
async fn publish(places: &Places, comparison: &Comparison, json: bool) -> Result<(), Failure> {
    let page = render::markdown(comparison);
    let text = serde_json::to_string_pretty(comparison).map_err(Failure::failed)? + "\n";
    let files = [
        ("compare.md", page.clone()),
        ("compare.csv", render::csv(comparison)),
        ("compare.json", text.clone()),
    ];
    for (name, text) in files {
        places.store.put(name, text.into_bytes().into()).await.map_err(Failure::failed)?;
    }
    super::print(if json { &text } else { &page })?;
    let local = places.out.strip_prefix("file://").unwrap_or(&places.out);
    tell(&format!("comparison: {}", PathBuf::from(local).join("compare.md").display()));
    Ok(())
}
