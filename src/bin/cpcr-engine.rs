//! `cpcr-engine`: what needs libtorch. Started by an agent or by `cpcr`, not by people.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use cpcr::bench::checkpoint::{self, CheckpointOptions};
use cpcr::bench::step::{self, StepOptions};
use cpcr::cli::{self, Failure};
use cpcr::data::Split;
use cpcr::data::import::nifti::SliceAxis;
use cpcr::eval::{DistanceUnit, EmptyPolicy, report};
use cpcr::proto::{Assignment, EXIT_DONE, TrainerEvent};
use cpcr::telemetry::{Guard, Process};
use cpcr::trainer::{
    EvaluateOptions, ExportFormat, ExportOptions, Pick, PredictOptions, TrainerError,
};
use cpcr::types::Step;

/// The part of cpcr that links libtorch; `cpcr` and its agents start it.
#[derive(Debug, Parser)]
#[command(name = "cpcr-engine", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// One rank of one generation.
    Trainer {
        /// What its agent wants, as JSON.
        #[arg(long)]
        assignment: String,
    },
    /// Prints how many GPUs libtorch can use.
    Devices,
    /// Scores a checkpoint of a run on the volumes of a split.
    Eval(Eval),
    /// Segments a folder of NIfTI files: a mask for each.
    Predict(Predict),
    /// Writes a checkpoint as safetensors or TorchScript, for other programs.
    Export(Export),
    /// Measurements that anybody can repeat.
    #[command(subcommand)]
    Bench(Bench),
}

/// Which checkpoint.
#[derive(Debug, clap::Args)]
struct Source {
    /// The run's folder.
    #[arg(long, required_unless_present = "checkpoint", conflicts_with = "checkpoint")]
    run: Option<String>,
    /// Which of the run's checkpoints: latest, best (by validation Dice), or a step's number.
    #[arg(long, default_value = "latest", value_parser = pick, conflicts_with = "checkpoint")]
    step: Pick,
    /// One checkpoint: RUN/checkpoints/step-00001200.
    #[arg(long)]
    checkpoint: Option<String>,
}

impl Source {
    /// The run's folder, and which of its checkpoints.
    fn resolve(self) -> Result<(String, Pick), Failure> {
        if let Some(run) = self.run {
            return Ok((run, self.step));
        }
        let url = self.checkpoint.as_deref().unwrap_or_default().trim_end_matches('/');
        let parts = url.rsplit_once("/checkpoints/step-");
        parts
            .and_then(|(run, step)| Some((run.to_owned(), Pick::At(Step(step.parse().ok()?)))))
            .ok_or_else(|| {
                Failure::usage(format!("--checkpoint {url}: RUN/checkpoints/step-N is wanted"))
            })
    }
}

#[derive(Debug, clap::Args)]
struct Eval {
    #[command(flatten)]
    source: Source,
    /// The dataset; default: the run's own.
    #[arg(long)]
    data: Option<String>,
    /// Which volumes.
    #[arg(long, default_value = "val", value_parser = ["val", "test"])]
    split: String,
    /// Distances in voxels, as the literature has them, or in millimetres.
    #[arg(long, default_value = "voxel", value_parser = ["voxel", "mm"])]
    spacing: String,
    /// What an empty mask is worth; how many there are is in every result.
    #[arg(long, default_value = "zero", value_parser = ["zero", "exclude", "penalise", "refuse"])]
    empty: String,
    /// Where the scores go: FILE.json, or FILE.csv.
    #[arg(long)]
    out: Option<PathBuf>,
    /// The scores as JSON on stdout instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
struct Predict {
    #[command(flatten)]
    source: Source,
    /// The dataset that says how images are prepared; default: the run's own.
    #[arg(long)]
    data: Option<String>,
    /// Folder of images, .nii or .nii.gz.
    #[arg(long = "in", value_name = "DIR")]
    input: PathBuf,
    /// Folder for masks, under the images' names.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Also write each class's probability: NAME_prob.nii.gz, for a 4-D image one per time point.
    #[arg(long)]
    probabilities: bool,
    /// Average the probabilities of both decoders.
    #[arg(long)]
    both_decoders: bool,
    /// Average the probabilities of mirrored slices, too; takes four times as long.
    #[arg(long)]
    flips: bool,
    /// Keep the largest component of each foreground class, in 3-D; probabilities stay as they are.
    #[arg(long)]
    largest_component: bool,
    /// Slices that go through the network together.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=1024))]
    batch: u16,
    /// Slices are cut across: auto (the largest spacing), 0, 1 or 2 [default: as in the dataset].
    #[arg(long)]
    slice_axis: Option<SliceAxis>,
    /// What came of it as JSON on stdout.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
struct Export {
    #[command(flatten)]
    source: Source,
    /// The dataset that names the classes; default: the run's own.
    #[arg(long)]
    data: Option<String>,
    /// safetensors: the state dict of both decoders; torchscript: decoder 1's evaluation pass.
    #[arg(long, value_parser = ["safetensors", "torchscript"])]
    format: String,
    /// The file; FILE.json beside it describes it.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// What was written as JSON on stdout.
    #[arg(long)]
    json: bool,
}

/// `latest`, `best` or a step.
fn pick(text: &str) -> Result<Pick, String> {
    match text {
        "latest" => Ok(Pick::Latest),
        "best" => Ok(Pick::Best),
        step => step
            .parse()
            .map(|step| Pick::At(Step(step)))
            .map_err(|_| "latest, best or a step's number is wanted".to_owned()),
    }
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// The training step against the same network in plain PyTorch.
    Step {
        /// One line of JSON on stdout instead of an indented report.
        #[arg(long)]
        json: bool,
        /// Samples a step, half of them labelled.
        #[arg(long, default_value_t = 24)]
        batch: i64,
        /// Side of the images in pixels.
        #[arg(long, default_value_t = 256)]
        side: i64,
        /// Threads, ours and the peer's.
        #[arg(long, default_value_t = 2)]
        threads: i32,
        /// Timed steps of each case.
        #[arg(long, default_value_t = 5)]
        steps: usize,
        /// Steps over which bf16's losses are compared with f32's; 0: not at all.
        #[arg(long, default_value_t = 0)]
        gap_steps: usize,
        /// A Python with PyTorch, for the peer; without one only ours is measured.
        #[arg(long, env = "CPCR_PEER_PYTHON")]
        peer_python: Option<PathBuf>,
    },
    /// How long a checkpoint holds training up, beside a plain copy of as many bytes.
    Checkpoint {
        /// One line of JSON on stdout instead of an indented report.
        #[arg(long)]
        json: bool,
        /// How many times the paper's widths the network has; its state grows with the square.
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(i64).range(1..=16))]
        widths_times: i64,
        /// Threads of the trainer, which copy.
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(i32).range(1..=1024))]
        threads: i32,
        /// Measured rounds; medians count.
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..))]
        rounds: u16,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    cpcr::bridge::alloc::tune();
    let telemetry = match cpcr::telemetry::init(&process(&arguments.command), || {
        tracing::info_span!("trainer")
    }) {
        Ok(guard) => guard,
        Err(error) => return cli::finish(Err(Failure::usage(error))),
    };
    if !cpcr::worker::die_with_parent() {
        return cli::finish(Err(Failure::failed("the agent that started this trainer is gone")));
    }
    match arguments.command {
        Command::Trainer { assignment } => train(&assignment, &telemetry),
        Command::Devices => {
            let count = format!("{}\n", cpcr::collective::usable_gpus());
            cli::finish(cli::print(&count).map(|()| EXIT_DONE))
        }
        Command::Eval(eval) => cli::finish(score(eval)),
        Command::Predict(predict) => cli::finish(segment(predict)),
        Command::Export(export) => cli::finish(write(export)),
        Command::Bench(bench) => cli::finish(measure(bench)),
    }
}

/// What this process is. The agent of a trainer hears of its warnings.
fn process(command: &Command) -> Process {
    let warned: fn(String) = |text| cpcr::trainer::emit(&TrainerEvent::Warning { text });
    match command {
        Command::Trainer { .. } => Process { warned: Some(warned), ..Process::new("trainer") },
        _ => Process::new("engine"),
    }
}

fn train(assignment: &str, telemetry: &Guard) -> ExitCode {
    let result = serde_json::from_str::<Assignment>(assignment).map_err(Failure::usage);
    cli::finish(
        result.and_then(|assignment| cpcr::trainer::run(&assignment, telemetry).map_err(failure)),
    )
}

fn failure(error: TrainerError) -> Failure {
    Failure { message: error.to_string(), status: error.exit_status() }
}

fn score(eval: Eval) -> Result<i32, Failure> {
    let (run, pick) = eval.source.resolve()?;
    let options = EvaluateOptions {
        run,
        pick,
        data: eval.data,
        split: if eval.split == "test" { Split::Test } else { Split::Val },
        unit: if eval.spacing == "mm" { DistanceUnit::Mm } else { DistanceUnit::Voxel },
        policy: match eval.empty.as_str() {
            "exclude" => EmptyPolicy::Exclude,
            "penalise" => EmptyPolicy::Penalise,
            "refuse" => EmptyPolicy::Refuse,
            _ => EmptyPolicy::Zero,
        },
    };
    let found = cpcr::trainer::evaluate(&options).map_err(failure)?;
    let json = serde_json::json!({
        "run": options.run, "step": found.step, "split": eval.split, "summary": found.summary,
    });
    if let Some(path) = &eval.out {
        let is_csv = path.extension().is_some_and(|extension| extension == "csv");
        let text = if is_csv { report::csv(&found.summary) } else { format!("{json:#}\n") };
        std::fs::write(path, text)
            .map_err(|error| Failure::failed(format!("write {}: {error}", path.display())))?;
    }
    if eval.json {
        cli::print(&format!("{json}\n"))?;
    } else {
        let what = format!("step {} of {}, {} split\n", found.step, options.run, eval.split);
        cli::print(&(what + &report::text_table(&found.summary)))?;
    }
    Ok(EXIT_DONE)
}

fn segment(predict: Predict) -> Result<i32, Failure> {
    let (run, pick) = predict.source.resolve()?;
    let options = PredictOptions {
        run,
        pick,
        data: predict.data,
        input: predict.input,
        out: predict.out,
        probabilities: predict.probabilities,
        both_decoders: predict.both_decoders,
        flips: predict.flips,
        largest_component: predict.largest_component,
        batch: predict.batch.into(),
        slice_axis: predict.slice_axis,
    };
    let found = cpcr::trainer::predict(&options, |done, of, path, outcome| match outcome {
        Ok(()) => cli::tell(&format!("{done} of {of} files: {}", path.display())),
        Err(why) => cli::tell(&format!("{done} of {of} files: FAILED: {why}")),
    })
    .map_err(failure)?;
    if predict.json {
        let json = serde_json::json!({
            "run": options.run, "step": found.step, "masks": found.masks, "failures": found.failures,
        });
        cli::print(&format!("{json}\n"))?;
    }
    match found.failures.as_slice() {
        [] => Ok(EXIT_DONE),
        [only] => Err(Failure::failed(only)),
        many => Err(Failure::failed(format!("{} files failed: {}", many.len(), many.join("; ")))),
    }
}

fn write(export: Export) -> Result<i32, Failure> {
    let (run, pick) = export.source.resolve()?;
    let format = match export.format.as_str() {
        "torchscript" => ExportFormat::TorchScript,
        _ => ExportFormat::Safetensors,
    };
    let options = ExportOptions { run, pick, data: export.data, format, out: export.out };
    let (step, description) = cpcr::trainer::export(&options).map_err(failure)?;
    if export.json {
        let json = serde_json::json!({
            "run": options.run, "step": step, "file": options.out, "description": description,
        });
        cli::print(&format!("{json}\n"))?;
    } else {
        cli::tell(&format!("step {step} of {}: {}", options.run, options.out.display()));
    }
    Ok(EXIT_DONE)
}

fn measure(bench: Bench) -> Result<i32, Failure> {
    match bench {
        Bench::Step { json, batch, side, threads, steps, gap_steps, peer_python } => {
            let options = StepOptions {
                batch,
                side,
                threads,
                steps,
                gap_steps,
                peer_python,
                ..Default::default()
            };
            say(json, &step::run(&options).map_err(Failure::failed)?)
        }
        Bench::Checkpoint { json, widths_times, threads, rounds } => {
            let options = CheckpointOptions { widths_times, threads, rounds: rounds.into() };
            say(json, &checkpoint::run(&options).map_err(Failure::failed)?)
        }
    }
}

fn say(json: bool, report: &impl serde::Serialize) -> Result<i32, Failure> {
    let text =
        if json { serde_json::to_string(report) } else { serde_json::to_string_pretty(report) };
    cli::print(&format!("{}\n", text.map_err(Failure::failed)?))?;
    Ok(EXIT_DONE)
}
