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
    Batch, Checkpoint, Data, Loader, Loss, Method, Model, Precision, Recovery, Train, UpMode,
    Validate,
};

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
        }
    }
}

impl RunConfig {
    /// Checks every value against what the method can do.
    ///
    /// # Errors
    /// [`ConfigError::OutOfRange`] for the first value that is out of range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let fail = |key, value: String, reason: &str| {
            Err(ConfigError::OutOfRange { key, value, reason: reason.to_owned() })
        };
        if self.name.is_empty()
            || !self.name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        {
            return fail("name", self.name.clone(), "letters, digits, '-', '_' and '.' only");
        }
        if self.patch_size == 0 || !self.patch_size.is_multiple_of(16) {
            return fail(
                "patch_size",
                self.patch_size.to_string(),
                "a positive multiple of 16 (four halvings)",
            );
        }
        if self.model.widths.contains(&0) {
            return fail(
                "model.widths",
                format!("{:?}", self.model.widths),
                "every width at least 1",
            );
        }
        if self.model.dropout.iter().any(|p| !(0.0..1.0).contains(p)) {
            return fail(
                "model.dropout",
                format!("{:?}", self.model.dropout),
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
        Ok(())
    }

    /// SHA-256 over what a resumed run may not change: method, model, seed, batch, data, loss.
    ///
    /// Nodes, iterations, loader, validation, retention and recovery may change (DESIGN).
    #[must_use]
    pub fn identity(&self) -> String {
        hex::encode(Sha256::digest(self.identity_text().as_bytes()))
    }

    /// The text that [`Self::identity`] hashes; two of them compared line by line tell what changed.
    #[must_use]
    pub fn identity_text(&self) -> String {
        format!(
            "method = {:?}\npatch_size = {}\nmodel = {:?}\ndata.labelled = {}\nbatch = {:?}\nloss = {:?}\n\
             train.seed = {}\ntrain.lr = {}\ntrain.momentum = {}\ntrain.weight_decay = {}\ntrain.precision = {:?}\n",
            self.method,
            self.patch_size,
            self.model,
            self.data.labelled,
            self.batch,
            self.loss,
            self.train.seed,
            self.train.lr,
            self.train.momentum,
            self.train.weight_decay,
            self.train.precision,
        )
    }

    /// The lines in which `self` and `earlier` differ in what may not change.
    #[must_use]
    pub fn differences(&self, earlier: &Self) -> Vec<String> {
        let (now, before) = (self.identity_text(), earlier.identity_text());
        now.lines()
            .zip(before.lines())
            .filter(|(a, b)| a != b)
            .map(|(a, b)| format!("{b}  ->  {a}"))
            .collect()
    }
}

#[cfg(test)]
mod tests {
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
    fn what_may_change_on_resume_does_not_change_the_identity() {
        let config = RunConfig::default();
        let mut other = config.clone();
        other.train.iterations = 7;
        other.loader.threads = 9;
        other.checkpoint.keep_last = 9;
        assert_eq!(config.identity(), other.identity());
        other.train.seed = 1;
        assert_ne!(config.identity(), other.identity());
        assert_eq!(other.differences(&config), ["train.seed = 1337  ->  train.seed = 1"]);
    }
}
