//! `cpcr data`: makes, imports, checks and describes datasets. What is said for people is made here; the
//! facts come from `data::report`.

use std::fmt::Write;
use std::sync::Arc;

use clap::Subcommand;

use super::bench::{OrderArguments, order};
use super::import::{ImportArguments, LayoutArguments, import, made};
use super::{Failure, meter, threads_each};
use crate::data::report::{self, Info, SplitInfo, Spread, Verified};
use crate::data::statistics::{Fingerprint, STATISTICS_PATH, Statistics};
use crate::data::synth::{self, SynthOptions};
use crate::data::write::Work;
use crate::data::{DataError, Dataset};
use crate::proto::{EXIT_DONE, EXIT_FAILED};
use crate::store::{Store, StoreOptions};

/// What is done with a dataset.
#[derive(Debug, Subcommand)]
pub enum Data {
    /// Makes cardiac phantoms.
    Synth {
        /// Where the dataset goes.
        #[arg(long)]
        out: String,
        /// Seed of every draw.
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Training patients.
        #[arg(long)]
        patients: Option<u32>,
        /// Of these, how many have labels [default: all].
        #[arg(long)]
        labelled: Option<u32>,
        /// How it is stored.
        #[command(flatten)]
        layout: LayoutArguments,
    },
    /// Imports a dataset. An import that was interrupted goes on with the same command.
    Import(Box<ImportArguments>),
    /// Re-reads everything: every hash, every row's volume, every patient's split.
    Verify {
        /// The dataset.
        url: String,
        /// JSON on stdout.
        #[arg(long)]
        json: bool,
    },
    /// Hashes the order of samples for several numbers of workers: one hash.
    Order(OrderArguments),
    /// Says what a dataset holds.
    Info {
        /// The dataset.
        url: String,
        /// Counts pixels anew, for a dataset without statistics.
        #[arg(long)]
        scan: bool,
        /// JSON on stdout.
        #[arg(long)]
        json: bool,
    },
}

/// Does it; the result is the exit status.
///
/// # Errors
/// [`Failure`]: one line and an exit status.
pub async fn run(command: Data) -> Result<i32, Failure> {
    match command {
        Data::Synth { out, seed, patients, labelled, layout } => {
            let store = Store::open(&out, &StoreOptions::default()).map_err(Failure::usage)?;
            let mut options =
                SynthOptions { seed, labelled_patients: labelled, ..Default::default() };
            options.train_patients = patients.unwrap_or(options.train_patients);
            let work = layout.work();
            let _watch = meter::watch("synth", "patients", &work.meter);
            let written = synth::write(Arc::new(store), &options, &work).await;
            written.map_err(|error| made(error, &out))?;
            Ok(EXIT_DONE)
        }
        Data::Import(arguments) => import(*arguments).await,
        Data::Verify { url, json } => {
            let work = Work::on(threads_each(1) as usize);
            let dataset = open(&url)?;
            let watch = meter::watch("verify", "objects", &work.meter);
            let verified = report::verify_watched(&dataset, &work);
            drop(watch);
            let text = if json { to_json(&verified)? } else { verified_text(&verified) };
            super::print(&text)?;
            Ok(if verified.is_sound() { EXIT_DONE } else { EXIT_FAILED })
        }
        Data::Order(arguments) => order(&arguments),
        Data::Info { url, scan, json } => {
            let dataset = open(&url)?;
            let info = if scan {
                let work = Work::on(threads_each(1) as usize);
                let _watch = meter::watch("scan", "volumes", &work.meter);
                report::scan(&dataset, &work)
            } else {
                report::info(&dataset)
            };
            let info = info.map_err(|error| match error {
                DataError::Invalid { ref object, .. } if object == STATISTICS_PATH => {
                    Failure::failed(format!("{error}: --scan counts anew"))
                }
                error => Failure::failed(error),
            })?;
            super::print(&if json { to_json(&info)? } else { info_text(&info) })?;
            Ok(EXIT_DONE)
        }
    }
}

fn open(url: &str) -> Result<Dataset, Failure> {
    let store = Store::open(url, &StoreOptions::default().existing()).map_err(Failure::usage)?;
    Dataset::open(Arc::new(store)).map_err(Failure::usage)
}

fn to_json(value: &impl serde::Serialize) -> Result<String, Failure> {
    Ok(format!("{}\n", serde_json::to_string(value).map_err(Failure::failed)?))
}

fn verified_text(verified: &Verified) -> String {
    let Verified { shards, tables, bytes, problems, .. } = verified;
    let mut text = String::new();
    for problem in problems {
        line(&mut text, &format!("{}: {}", problem.object, problem.why));
    }
    let outcome = match problems.len() {
        0 => "sound".to_owned(),
        1 => "1 problem".to_owned(),
        count => format!("{count} problems"),
    };
    let megabytes = *bytes as f64 / 1e6;
    line(&mut text, &format!("{outcome}: {shards} shards ({megabytes:.1} MB), {tables} tables"));
    text
}

fn line(text: &mut String, line: &str) {
    // Writing to a string cannot fail.
    let _infallible = writeln!(text, "{line}");
}

fn info_text(info: &Info) -> String {
    let mut text = String::new();
    let mut say = |words: String| line(&mut text, &words);
    say(format!("{} (format {}, manifest {})", info.name, info.format, &info.manifest.sha256));
    say(format!("classes: {}", info.classes.join(", ")));
    match info.channel_names.as_slice() {
        [] => say("channels: 1".to_owned()),
        names => say(format!("channels: {}", names.join(", "))),
    }
    say(format!("rows in a block: {}", info.block_rows));
    for split in ["train", "val", "test"] {
        if let Some(found) = info.splits.get(split).filter(|found| found.volumes > 0) {
            split_text(split, found, &mut say);
        }
    }
    match &info.statistics {
        Some(statistics) => statistics_text(statistics, &mut say),
        None => say("statistics: none stored; --scan counts them (reads everything)".to_owned()),
    }
    text
}

fn split_text(name: &str, split: &SplitInfo, say: &mut impl FnMut(String)) {
    say(format!(
        "{name}: {} patients ({} labelled), {} volumes ({} labelled), {} slices, {} shards, {:.1} MB",
        split.patients,
        split.labelled_patients,
        split.volumes,
        split.labelled_volumes,
        split.slices,
        split.shards,
        split.bytes as f64 / 1e6
    ));
    if let Some(axes) = &split.spacing_mm {
        let spread =
            |Spread { min, median, max }: &Spread| format!("{min:.3} / {median:.3} / {max:.3}");
        let [slice, row, column] = axes.each_ref().map(spread);
        say(format!(
            "  spacing in mm, least / median / greatest: slices {slice}, rows {row}, columns {column}"
        ));
    }
    if split.volumes_without_spacing > 0 {
        say(format!("  volumes without a spacing: {}", split.volumes_without_spacing));
    }
}

/// Shapes that are named in text.
const SHAPES_NAMED: usize = 5;

fn statistics_text(statistics: &Statistics, say: &mut impl FnMut(String)) {
    for (split, shapes) in &statistics.shapes {
        let mut all: Vec<(&String, &u64)> = shapes.slices.iter().collect();
        all.sort_by(|a, b| b.1.cmp(a.1).then(a.0.cmp(b.0)));
        let named =
            all.iter().take(SHAPES_NAMED).map(|(shape, count)| format!("{shape} ({count})"));
        let named: Vec<String> = named.collect();
        let more = match all.len().saturating_sub(SHAPES_NAMED) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        say(format!(
            "slice shapes in {split}, height x width (slices): {}{more}",
            named.join(", ")
        ));
    }
    for (at, channel) in statistics.intensity.iter().enumerate() {
        let name = channel.name.clone().unwrap_or_else(|| format!("channel {at}"));
        for (pixels, found) in [("all", &channel.all), ("foreground", &channel.foreground)] {
            if let Some(Fingerprint { min, p0_5, mean, std, p99_5, max, .. }) = found {
                say(format!(
                    "intensity of {name} in train, {pixels} pixels: least {min:.4}, 0.5 % {p0_5:.4}, mean \
                     {mean:.4}, deviation {std:.4}, 99.5 % {p99_5:.4}, greatest {max:.4}"
                ));
            }
        }
    }
    for class in &statistics.classes {
        say(format!(
            "class {} in {} labelled training volumes: {:.3} % of pixels, {} slices, {} volumes without it",
            class.name,
            statistics.labelled_volumes,
            100.0 * class.share,
            class.slices,
            class.volumes_without
        ));
    }
}
