//! Which runs a comparison needs, resolved before the first of them starts.
//!
//! Whatever is wrong with the request is found here, with status 2: an unknown method must not come
//! to light after an hour of training. Not here: starting anything.

use std::collections::BTreeSet;

use clap::ValueEnum;
use serde::{Deserialize, Serialize, de::IntoDeserializer};

use crate::cli::Failure;
use crate::config::{self, ConfigSource, Method, RunConfig};

/// Which of a run's checkpoints is evaluated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Selection {
    /// The one with the best mean Dice in validation.
    Best,
    /// The one of the last step.
    Last,
}

/// What the methods have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// One configuration; only `method` and `train.seed` differ.
    IdenticalBudget,
    /// Each method with the preset of its own name.
    AsPublished,
}

/// What the runs are made from.
#[derive(Debug, Clone)]
pub struct Request {
    /// Methods, as typed.
    pub methods: Vec<String>,
    /// Seeds, as typed.
    pub seeds: Vec<u64>,
    /// A preset or file for all; none stands for the defaults.
    pub config: Option<String>,
    /// `KEY=VALUE` for all.
    pub set: Vec<String>,
    /// What the methods have in common.
    pub mode: Mode,
    /// Which checkpoint is evaluated.
    pub selection: Selection,
}

/// A run to be made.
#[derive(Debug, Clone)]
pub struct PlannedRun {
    /// `<method>-seed<seed>`: the run's name, and its folder's.
    pub name: String,
    /// Its method.
    pub method: String,
    /// Its seed.
    pub seed: u64,
    /// The launcher's `--config`; none stands for the defaults.
    pub source: Option<String>,
    /// The launcher's `--set`s.
    pub set: Vec<String>,
    /// What comes of both.
    pub config: RunConfig,
}

/// Keys that the comparison itself sets.
const OWN_KEYS: [&str; 3] = ["method", "train.seed", "name"];

/// The runs of a request, method by method.
///
/// # Errors
/// [`Failure`] with status 2: an unknown method, one twice, a configuration that does not load.
pub fn plan(request: &Request) -> Result<Vec<PlannedRun>, Failure> {
    let methods: Vec<&str> = request.methods.iter().map(|method| method.trim()).collect();
    for method in &methods {
        known(method)?;
    }
    once("--methods", &methods)?;
    once("--seeds", &request.seeds)?;
    for pair in &request.set {
        let key = pair.split('=').next().unwrap_or_default().trim();
        if OWN_KEYS.contains(&key) {
            return Err(Failure::usage(format!(
                "--set {pair}: `cpcr compare` sets {key} itself; see --methods and --seeds"
            )));
        }
    }
    let mut runs = Vec::new();
    for method in methods {
        let source = match request.mode {
            Mode::IdenticalBudget => request.config.clone(),
            Mode::AsPublished => Some(published(method)?),
        };
        for seed in &request.seeds {
            runs.push(planned(request, method, *seed, source.clone())?);
        }
    }
    Ok(runs)
}

fn planned(
    request: &Request,
    method: &str,
    seed: u64,
    source: Option<String>,
) -> Result<PlannedRun, Failure> {
    let name = format!("{method}-seed{seed}");
    let mut set = request.set.clone();
    set.extend([format!("method={method}"), format!("train.seed={seed}"), format!("name={name}")]);
    let load = |set: &[String]| {
        let named = source.clone().map_or(ConfigSource::Defaults, ConfigSource::Named);
        config::load(&named, set).map_err(Failure::usage)
    };
    let mut config = load(&set)?;
    // The best validation is of use only if its weights were kept.
    if request.selection == Selection::Best
        && !config.validate.every.is_multiple_of(config.checkpoint.every)
    {
        set.push(format!("checkpoint.every={}", config.validate.every));
        config = load(&set)?;
    }
    Ok(PlannedRun { name, method: method.to_owned(), seed, source, set, config })
}

/// Refuses what the configuration's own enumeration does not know; its error names what it does.
fn known(method: &str) -> Result<(), Failure> {
    let parsed: Result<Method, serde::de::value::Error> =
        Method::deserialize(method.into_deserializer());
    parsed.map(|_| ()).map_err(|error| Failure::usage(format!("--methods: {error}")))
}

/// The preset with a method's published settings: the one of its name; the paper's own for the
/// paper's own two.
fn published(method: &str) -> Result<String, Failure> {
    if config::preset(method).is_some() {
        return Ok(method.to_owned());
    }
    if matches!(method, "cpcr" | "cpcr-focal") {
        return Ok("acdc-7".to_owned());
    }
    Err(Failure::usage(format!("--as-published: there is no preset named {method}")))
}

fn once<T: Ord + std::fmt::Display>(flag: &str, values: &[T]) -> Result<(), Failure> {
    let mut seen = BTreeSet::new();
    match values.iter().find(|value| !seen.insert(*value)) {
        Some(twice) => Err(Failure::usage(format!("{flag}: {twice} is there twice"))),
        None if values.is_empty() => Err(Failure::usage(format!("{flag}: at least one is wanted"))),
        None => Ok(()),
    }
}

/// What keeps two runs from having the same budget, a line for each key; nothing if only method,
/// seed and name differ. Unlike on resume, length, validation and data count too.
#[must_use]
pub fn unequal(one: &RunConfig, other: &RunConfig) -> Vec<String> {
    let mut other = other.clone();
    other.method = one.method;
    other.train.seed = one.train.seed;
    let mut lines = other.differences(one);
    let mut line = |key: &str, a: &dyn std::fmt::Display, b: &dyn std::fmt::Display| {
        let (a, b) = (a.to_string(), b.to_string());
        if a != b {
            lines.push(format!("{key} = {a}  ->  {b}"));
        }
    };
    line("train.iterations", &one.train.iterations, &other.train.iterations);
    line("validate.every", &one.validate.every, &other.validate.every);
    let url = |config: &RunConfig| config.data.url.clone().unwrap_or_default();
    line("data.url", &url(one), &url(&other));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(methods: &[&str], seeds: &[u64]) -> Request {
        Request {
            methods: methods.iter().map(|method| (*method).to_owned()).collect(),
            seeds: seeds.to_vec(),
            config: Some("demo".to_owned()),
            set: Vec::new(),
            mode: Mode::IdenticalBudget,
            selection: Selection::Best,
        }
    }

    fn told(request: &Request) -> String {
        let failure = plan(request).unwrap_err();
        assert_eq!(failure.status, 2);
        failure.message
    }

    #[test]
    fn every_method_has_every_seed_and_nothing_else_differs() {
        let runs = plan(&request(&["cpcr-focal", " cpcr"], &[3, 1])).unwrap();
        let names: Vec<&str> = runs.iter().map(|run| run.name.as_str()).collect();
        assert_eq!(names, ["cpcr-focal-seed3", "cpcr-focal-seed1", "cpcr-seed3", "cpcr-seed1"]);
        for run in &runs {
            assert_eq!(unequal(&runs[0].config, &run.config), Vec::<String>::new());
            assert_eq!(run.config.train.seed, run.seed);
            assert_eq!(run.config.name, run.name);
        }
        assert_ne!(runs[0].config.method, runs[2].config.method);
    }

    #[test]
    fn the_configuration_of_few_phantoms_loads_and_keeps_its_best() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/phantoms-few.toml");
        let few = Request { config: Some(file.to_owned()), ..request(&["cpcr"], &[1]) };
        let runs = plan(&few).unwrap();
        assert_eq!(runs[0].config.data.labelled, 3);
        assert_eq!(runs[0].set.len(), 3, "its validations have checkpoints: {:?}", runs[0].set);
    }

    #[test]
    fn mistakes_are_found_before_anything_is_trained() {
        let error = told(&request(&["cpcr", "cpc"], &[1]));
        assert!(error.contains("`cpc`") && error.contains("cpcr-focal"), "{error}");
        assert!(told(&request(&["cpcr", "cpcr"], &[1])).contains("twice"));
        assert!(told(&request(&["cpcr"], &[1, 2, 1])).contains("1 is there twice"));
        assert!(told(&request(&["cpcr"], &[])).contains("--seeds"));
        for set in ["method=cpcr", "train.seed = 3"] {
            let own = Request { set: vec![set.to_owned()], ..request(&["cpcr"], &[1]) };
            assert!(told(&own).contains("--methods and --seeds"));
        }
        let mistyped = Request { set: vec!["lr=1".to_owned()], ..request(&["cpcr"], &[1]) };
        assert!(told(&mistyped).contains("lr"));
    }

    #[test]
    fn as_published_takes_each_methods_own_preset_and_the_users_settings_on_top() {
        let set = vec!["train.iterations=10".to_owned()];
        let published = Request {
            mode: Mode::AsPublished,
            config: None,
            set,
            ..request(&["cpcr", "cpcr-focal"], &[5])
        };
        let runs = plan(&published).unwrap();
        assert_eq!(runs[1].source.as_deref(), Some("acdc-7"));
        assert_eq!(runs[1].config.method, Method::CpcrFocal);
        assert_eq!((runs[1].config.train.iterations, runs[1].config.batch.labelled), (10, 12));
    }

    #[test]
    fn the_best_validations_weights_are_kept() {
        let cadence = |validate: u64, checkpoint: u64, selection| {
            let set = [("validate", validate), ("checkpoint", checkpoint)];
            let set = set.map(|(key, every)| format!("{key}.every={every}")).to_vec();
            let runs = plan(&Request { set, selection, ..request(&["cpcr"], &[1]) }).unwrap();
            (runs[0].config.validate.every, runs[0].config.checkpoint.every)
        };
        assert_eq!(cadence(200, 1000, Selection::Best), (200, 200));
        assert_eq!(cadence(100, 50, Selection::Best), (100, 50));
        assert_eq!(cadence(200, 1000, Selection::Last), (200, 1000));
    }

    #[test]
    fn a_different_budget_is_named() {
        let config = RunConfig::default();
        let differs = |change: &dyn Fn(&mut RunConfig)| {
            let mut other = config.clone();
            change(&mut other);
            unequal(&config, &other).join("; ")
        };
        assert_eq!(differs(&|c| c.train.seed = 7), "");
        assert_eq!(differs(&|c| c.loader.threads = 7), "");
        assert!(differs(&|c| c.batch.unlabelled = 7).contains("batch.unlabelled = 12  ->  7"));
        assert!(differs(&|c| c.train.iterations = 7).contains("train.iterations = 50000  ->  7"));
        assert!(differs(&|c| c.validate.every = 7).contains("validate.every"));
        assert!(differs(&|c| c.data.url = Some("x".to_owned())).contains("data.url"));
    }
}
