//! The run's configuration: one validated, immutable struct.
//!
//! Layers, later ones win: defaults (the paper's) < preset < file < environment
//! `CPCR__SECTION__KEY` < `--set KEY=VALUE`. An unknown key is an error, so a mistyped one never
//! trains. Not here: command-line flags that are not configuration (see `cli`), and what a run
//! finds out by itself (devices, addresses).

mod load;
mod sections;

pub use load::{ConfigSource, PRESETS, load, preset};
pub use sections::{
    Batch, Checkpoint, Data, Loader, Loss, LrSchedule, Method, Model, Precision, Recovery,
    Telemetry, Train, UpMode, Validate,
};

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// What can be wrong with a configuration; every variant is the user's to mend (exit status 2).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A file or preset that cannot be read.
    #[error("configuration '{name}' cannot be read: {reason}")]
    Unreadable {
        /// File or preset as the user named it.
        name: String,
        /// Why.
        reason: String,
    },
    /// An unknown key, or a value of the wrong type.
    #[error("configuration: {0}")]
    Invalid(String),
    /// A value outside what the method or the machine can do.
    #[error("configuration: {key} = {value}: {reason}")]
    OutOfRange {
        /// Dotted key.
        key: &'static str,
        /// The value as given.
        value: String,
        /// What would be accepted.
        reason: String,
    },
}

/// The whole configuration of a run. Defaults are the paper's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RunConfig {
    /// The run's name; `./runs/<name>` is where it lives unless `--run` says otherwise.
    pub name: String,
    /// Which training objective.
    pub method: Method,
    /// Side of the square patch that a slice is zoomed to, in pixels; a multiple of 16.
    pub patch_size: u32,
    /// The network.
    pub model: Model,
    /// What is read.
    pub data: Data,
    /// Batch sizes.
    pub batch: Batch,
    /// The objective's weights and schedules.
    pub loss: Loss,
    /// Optimisation.
    pub train: Train,
    /// Validation during training.
    pub validate: Validate,
    /// Checkpoints.
    pub checkpoint: Checkpoint,
    /// The input pipeline.
    pub loader: Loader,
    /// What happens after a loss.
    pub recovery: Recovery,
    /// What it shows of itself.
    pub telemetry: Telemetry,
}

impl Default for RunConfig {
    fn default() -> Self {
        Self {
            name: "run".to_owned(),
            method: Method::default(),
            patch_size: 256,
            model: Model::default(),
            data: Data::default(),
            batch: Batch::default(),
            loss: Loss::default(),
            train: Train::default(),
            validate: Validate::default(),
            checkpoint: Checkpoint::default(),
            loader: Loader::default(),
            recovery: Recovery::default(),
            telemetry: Telemetry::default(),
        }
    }
}

fn fail(key: &'static str, value: String, reason: &str) -> Result<(), ConfigError> {
    Err(ConfigError::OutOfRange { key, value, reason: reason.to_owned() })
}

impl RunConfig {
    /// Checks every value against what the method can do.
    ///
    /// # Errors
    /// [`ConfigError::OutOfRange`] for the first value that is out of range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.name.is_empty()
            || !self.name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        {
            return fail("name", self.name.clone(), "letters, digits, '-', '_' and '.' only");
        }
        // 16 would leave one pixel at the deepest level, whose variance over one image is no number.
        if self.patch_size < 32 || !self.patch_size.is_multiple_of(16) {
            return fail(
                "patch_size",
                self.patch_size.to_string(),
                "a multiple of 16 (four halvings), at least 32",
            );
        }
        if self.model.widths.contains(&0) {
            return fail(
                "model.widths",
                format!("{:?}", self.model.widths),
                "every width at least 1",
            );
        }
        if self
            .model
            .dropout
            .iter()
            .chain([&self.model.aux_dropout])
            .any(|p| !(0.0..1.0).contains(p))
        {
            return fail(
                "model.dropout, model.aux_dropout",
                format!("{:?}, {}", self.model.dropout, self.model.aux_dropout),
                "probabilities in [0, 1)",
            );
        }
        if self.batch.labelled == 0 {
            return fail("batch.labelled", "0".to_owned(), "at least 1 labelled sample a step");
        }
        if self.data.labelled == 0 {
            return fail("data.labelled", "0".to_owned(), "at least 1 labelled patient");
        }
        if self.train.iterations == 0 {
            return fail("train.iterations", "0".to_owned(), "at least 1");
        }
        if !(self.train.lr > 0.0 && self.train.lr.is_finite()) {
            return fail("train.lr", self.train.lr.to_string(), "a positive number");
        }
        if self.loss.temperature <= 0.0 || self.loss.temperature.is_nan() {
            return fail(
                "loss.temperature",
                self.loss.temperature.to_string(),
                "a positive number",
            );
        }
        if !(0.0..1.0).contains(&self.loss.ema_decay) {
            return fail("loss.ema_decay", self.loss.ema_decay.to_string(), "a number in [0, 1)");
        }
        self.validate_checkpoint()?;
        self.validate_telemetry()?;
        self.validate_recovery()?;
        self.validate_loader()
    }

    fn validate_checkpoint(&self) -> Result<(), ConfigError> {
        if self.validate.every == 0 || self.checkpoint.every == 0 {
            return fail("validate.every, checkpoint.every", "0".to_owned(), "at least 1 (steps)");
        }
        if self.checkpoint.keep_last == 0 {
            return fail(
                "checkpoint.keep_last",
                "0".to_owned(),
                "at least 1, or nothing could be resumed",
            );
        }
        let (every, landmark) = (self.checkpoint.every, self.checkpoint.keep_every);
        if !landmark.is_multiple_of(every) {
            let why =
                format!("a multiple of checkpoint.every, {every}, or no checkpoint is made there");
            return fail("checkpoint.keep_every", landmark.to_string(), &why);
        }
        Ok(())
    }

    fn validate_telemetry(&self) -> Result<(), ConfigError> {
        let Telemetry { step_spans_s, pictures, .. } = self.telemetry;
        if !(0.0..=86_400.0).contains(&step_spans_s) {
            return fail(
                "telemetry.step_spans_s",
                step_spans_s.to_string(),
                "0 to 86400 (seconds)",
            );
        }
        if pictures > 16 {
            return fail("telemetry.pictures", pictures.to_string(), "at most 16");
        }
        Ok(())
    }

    fn validate_recovery(&self) -> Result<(), ConfigError> {
        let (range, target_s) = (Recovery::TARGET_S, self.recovery.target_s);
        if range.contains(&target_s) {
            return Ok(());
        }
        let (least, most) = range.into_inner();
        let why = format!("{least} to {most}: signs of life come every second, and may be late");
        fail("recovery.target_s", target_s.to_string(), &why)
    }

    fn validate_loader(&self) -> Result<(), ConfigError> {
        let loader = [
            ("loader.threads", self.loader.threads),
            ("loader.fetches", self.loader.fetches),
            ("loader.prefetch", self.loader.prefetch),
        ];
        if let Some((key, value)) = loader.into_iter().find(|(_, n)| !(1..=1024).contains(n)) {
            return fail(key, value.to_string(), "1 to 1024");
        }
        if let Some(dir) = &self.loader.cache_dir
            && !std::path::Path::new(dir).is_absolute()
        {
            // The processes of a machine start in different folders.
            return fail(
                "loader.cache_dir",
                dir.clone(),
                "an absolute path ('~' is not known here)",
            );
        }
        Ok(())
    }

    /// Unlabelled samples in a global batch: none where the method does not look at them.
    #[must_use]
    pub fn unlabelled_batch(&self) -> u32 {
        if self.method.uses_unlabelled() { self.batch.unlabelled } else { 0 }
    }

    /// Checks that each of `workers` has what the method needs in every step.
    ///
    /// # Errors
    /// [`ConfigError::OutOfRange`] for the batch size that is too small.
    pub fn check_shares(&self, workers: u32) -> Result<(), ConfigError> {
        let (labelled, unlabelled) = self.method.smallest_share();
        let parts = [
            ("batch.labelled", self.batch.labelled, labelled),
            ("batch.unlabelled", self.unlabelled_batch(), unlabelled),
        ];
        for (key, has, needs) in parts {
            if has / workers.max(1) < needs {
                return Err(ConfigError::OutOfRange {
                    key,
                    value: has.to_string(),
                    reason: format!(
                        "this method needs {needs} of them on each of {workers} workers: raise it, \
                         or use fewer workers"
                    ),
                });
            }
        }
        Ok(())
    }

    /// SHA-256 over what a resumed run may not change: method, model, seed, batch, data, loss.
    ///
    /// Only what differs from the defaults is hashed, so that a key which a later release adds, with
    /// the old behaviour as its default, makes no old run a stranger.
    #[must_use]
    pub fn identity(&self) -> String {
        let defaults = Self::default().fixed();
        let own: Vec<String> = self
            .fixed()
            .into_iter()
            .filter(|(key, value)| defaults.get(key) != Some(value))
            .map(|(key, value)| format!("{key} = {value}\n"))
            .collect();
        hex::encode(Sha256::digest(own.concat().as_bytes()))
    }

    /// The keys that a resumed run may not change, with their values.
    fn fixed(&self) -> BTreeMap<String, String> {
        let mut keys = BTreeMap::new();
        // Every configuration came from TOML or can go there: `cpcr-launch` writes it so.
        if let Ok(toml::Value::Table(table)) = toml::Value::try_from(self) {
            flatten("", &table, &mut keys);
        }
        keys.retain(|key, _| !CHANGEABLE.iter().any(|prefix| key.starts_with(prefix)));
        keys
    }

    /// What differs between `self` and `earlier` in what may not change, a line for each key.
    #[must_use]
    pub fn differences(&self, earlier: &Self) -> Vec<String> {
        let (now, before) = (self.fixed(), earlier.fixed());
        now.iter()
            .filter(|(key, value)| before.get(*key) != Some(value))
            .map(|(key, value)| {
                let old = before.get(key).map_or("none", String::as_str);
                format!("{key} = {old}  ->  {value}")
            })
            .collect()
    }
}

/// Keys, or the beginnings of keys, that a resumed run may change (DESIGN, "A run in the bucket").
const CHANGEABLE: [&str; 8] = [
    "name",
    "data.url",
    "train.iterations",
    "validate.",
    "checkpoint.",
    "loader.",
    "recovery.",
    "telemetry.",
];

/// Dotted keys and their values as TOML.
fn flatten(prefix: &str, table: &toml::Table, keys: &mut BTreeMap<String, String>) {
    for (key, value) in table {
        match value {
            toml::Value::Table(inner) => flatten(&format!("{prefix}{key}."), inner, keys),
            value => {
                keys.insert(format!("{prefix}{key}"), value.to_string());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_defaults_are_valid_and_the_papers() {
        let config = RunConfig::default();
        config.validate().unwrap();
        assert_eq!((config.batch.labelled, config.batch.unlabelled), (12, 12));
        assert_eq!(config.train.iterations, 50_000);
        assert_eq!(config.train.seed, 1337);
    }

    #[test]
    fn a_loader_without_threads_or_with_too_many_is_refused() {
        for threads in [0, 1025] {
            let mut config = RunConfig::default();
            config.loader.threads = threads;
            let told = config.validate().unwrap_err().to_string();
            assert!(told.contains("loader.threads"), "{told}");
        }
    }

    #[test]
    fn one_number_says_how_patient_all_are_and_may_not_be_too_small() {
        let mut config = RunConfig::default();
        let recovery = &config.recovery;
        assert!(recovery.silence() < Duration::from_secs(recovery.target_s));
        assert!(recovery.collective() > Duration::from_secs(recovery.target_s));
        config.recovery.target_s = 3;
        let told = config.validate().unwrap_err().to_string();
        assert!(told.contains("recovery.target_s = 3: 4 to 3600"), "{told}");
    }

    #[test]
    fn a_cache_folder_that_depends_on_where_a_process_starts_is_refused() {
        let mut config = RunConfig::default();
        config.loader.cache_dir = Some("~/blocks".to_owned());
        let told = config.validate().unwrap_err().to_string();
        assert!(told.contains("loader.cache_dir = ~/blocks: an absolute path"), "{told}");
    }

    #[test]
    fn a_method_has_what_it_needs_on_every_worker() {
        let config = |method, labelled, unlabelled| RunConfig {
            method,
            batch: Batch { labelled, unlabelled, ..Batch::default() },
            ..RunConfig::default()
        };
        config(Method::Cpcr, 1, 0).check_shares(9).unwrap();
        config(Method::MeanTeacher, 1, 4).check_shares(4).unwrap();
        let told = |method, labelled, unlabelled, workers| {
            config(method, labelled, unlabelled).check_shares(workers).unwrap_err().to_string()
        };
        assert!(told(Method::MeanTeacher, 9, 4, 5).contains("batch.unlabelled = 4"));
        assert!(told(Method::Bcp, 3, 9, 4).contains("batch.labelled = 3"));
        assert!(told(Method::Supervised, 3, 9, 4).contains("batch.labelled = 3"));
        assert_eq!(config(Method::Supervised, 3, 9).unlabelled_batch(), 0);
    }

    #[test]
    fn what_may_change_on_resume_does_not_change_the_identity() {
        let config = RunConfig::default();
        let mut other = config.clone();
        other.train.iterations = 7;
        other.loader.threads = 9;
        other.loader.cache_dir = Some("/scratch/blocks".to_owned());
        other.loader.cache_gib = 0;
        other.validate().unwrap();
        other.checkpoint.keep_last = 9;
        assert_eq!(config.identity(), other.identity());
        other.train.seed = 1;
        assert_ne!(config.identity(), other.identity());
        assert_eq!(other.differences(&config), ["train.seed = 1337  ->  1"]);
    }
}
