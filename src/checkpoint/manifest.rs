//! The manifest: what a checkpoint is made of, and how to know that it is whole.
//!
//! Pure: bytes in, values out. The file is a sealed record (`seal`), so damage is told from a newer
//! format even by a program that cannot read the latter.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::error::CheckpointError;
use super::seal::{seal, unseal};
use crate::types::{ObjectDigest, Step, WorldSize};

/// The format that this program writes, and the newest that it reads.
pub const FORMAT: u32 = 1;
/// The network's parameters and buffers.
pub const MODEL_FILE: &str = "model.safetensors";
/// The optimiser's state.
pub const OPTIMIZER_FILE: &str = "optimizer.safetensors";
/// Everything else: schedules, best score, counters.
pub const STATE_FILE: &str = "state.json";

const FILES: [&str; 3] = [MODEL_FILE, OPTIMIZER_FILE, STATE_FILE];
/// A manifest is a few kilobytes; anything much larger is not one.
const MANIFEST_BYTES_MAX: usize = 1 << 20;

/// Where in the two streams of samples training stands: positions, not epochs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// Samples drawn from the labelled stream.
    pub labelled: u64,
    /// Samples drawn from the unlabelled stream.
    pub unlabelled: u64,
}

/// The trainer's own record; this module does not look into it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TrainState(pub serde_json::Value);

/// One object of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ObjectEntry {
    /// Name relative to the run.
    pub path: String,
    /// Length and hash.
    pub digest: ObjectDigest,
}

/// What a checkpoint is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`FORMAT`] of the program that wrote it.
    pub format: u32,
    /// Optimiser steps done.
    pub step: Step,
    /// The folder of this attempt at the step.
    pub attempt: String,
    /// Trainers that took the last step.
    pub world_size: WorldSize,
    /// Threads per trainer; with the world size, what a bit-exact resume needs.
    pub threads: u32,
    /// Where the streams stand.
    pub position: Position,
    /// SHA-256 of the resolved configuration.
    pub config_sha256: String,
    /// SHA-256 of the dataset's manifest.
    pub dataset_sha256: String,
    /// File name to object: exactly the three files.
    pub objects: BTreeMap<String, ObjectEntry>,
}

/// The folder of a step, relative to the run.
#[must_use]
pub fn step_folder(step: Step) -> String {
    format!("checkpoints/step-{:08}", step.0)
}

/// The manifest of a step, relative to the run.
#[must_use]
pub fn manifest_path(step: Step) -> String {
    format!("{}/manifest.json", step_folder(step))
}

/// The step in whose folder `path` lies, if it is named as [`step_folder`] names it.
#[must_use]
pub fn parse_step(path: &str) -> Option<Step> {
    let digits = path.strip_prefix("checkpoints/step-")?.split('/').next()?;
    let step = Step(digits.parse().ok()?);
    (digits == format!("{:08}", step.0)).then_some(step)
}

#[derive(Deserialize)]
struct FormatOnly {
    format: u32,
}

impl Manifest {
    /// The file's bytes, sealed. Deterministic.
    pub fn encode(&self) -> Result<Bytes, CheckpointError> {
        self.validate().map_err(|detail| CheckpointError::Invalid { step: self.step, detail })?;
        seal(self).map_err(|e| CheckpointError::Invalid { step: self.step, detail: e.to_string() })
    }

    /// The manifest of `step` in `file`: first whole, then of a known format, then sensible.
    pub fn decode(step: Step, file: &[u8]) -> Result<Self, CheckpointError> {
        let damaged = |detail: &str| CheckpointError::Damaged {
            step,
            detail: format!("{}: {detail}", manifest_path(step)),
        };
        if file.len() > MANIFEST_BYTES_MAX {
            return Err(damaged("too large for a manifest"));
        }
        let text = unseal(file).ok_or_else(|| damaged("it does not hash to its own seal"))?;
        let FormatOnly { format } =
            serde_json::from_slice(&text).map_err(|e| damaged(&e.to_string()))?;
        if format > FORMAT {
            return Err(CheckpointError::NewerFormat { step, found: format, known: FORMAT });
        }
        // Format 1 is the first: there is none older yet. A change of layout adds an arm here.
        let manifest: Self = serde_json::from_slice(&text).map_err(|e| damaged(&e.to_string()))?;
        manifest.validate().map_err(|detail| damaged(&detail))?;
        if manifest.step != step {
            return Err(damaged(&format!("it is of step {}", manifest.step)));
        }
        Ok(manifest)
    }

    /// The folder that holds this checkpoint's objects, relative to the run.
    #[must_use]
    pub fn attempt_folder(&self) -> String {
        format!("{}/{}", step_folder(self.step), self.attempt)
    }

    /// Bytes in all objects.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.objects.values().map(|object| object.digest.bytes).fold(0, u64::saturating_add)
    }

    /// What is wrong with it, if anything.
    pub fn validate(&self) -> Result<(), String> {
        let hex = |text: &str| {
            text.len() == 64
                && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        };
        if self.format == 0 || self.world_size.0 == 0 || self.threads == 0 {
            return Err("format, world_size and threads must be at least 1".to_owned());
        }
        let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
        if self.attempt.is_empty() || !self.attempt.bytes().all(plain) {
            return Err(format!("'{}' is no attempt's name", self.attempt));
        }
        if !hex(&self.config_sha256) || !hex(&self.dataset_sha256) {
            return Err("config_sha256 and dataset_sha256 must be SHA-256".to_owned());
        }
        if !self.objects.keys().map(String::as_str).eq(FILES) {
            return Err(format!("its objects must be {FILES:?}"));
        }
        for (name, object) in &self.objects {
            if object.path != format!("{}/{name}", self.attempt_folder()) {
                return Err(format!("'{}' does not lie in its attempt's folder", object.path));
            }
            if !hex(&object.digest.sha256) {
                return Err(format!("'{}' has no SHA-256", object.path));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        let step = Step(1200);
        let folder = format!("{}/abc123", step_folder(step));
        let objects = FILES
            .map(|name| {
                let digest = ObjectDigest::of(name.as_bytes());
                (name.to_owned(), ObjectEntry { path: format!("{folder}/{name}"), digest })
            })
            .into();
        Manifest {
            format: FORMAT,
            step,
            attempt: "abc123".into(),
            world_size: WorldSize(4),
            threads: 2,
            position: Position { labelled: 14_400, unlabelled: 14_400 },
            config_sha256: "0".repeat(64),
            dataset_sha256: "f".repeat(64),
            objects,
        }
    }

    #[test]
    fn it_comes_back_and_is_plain_json() {
        let file = manifest().encode().unwrap();
        assert_eq!(Manifest::decode(Step(1200), &file).unwrap(), manifest());
        let json: serde_json::Value = serde_json::from_slice(&file).unwrap();
        assert_eq!(json["world_size"], 4);
        assert_eq!(file, manifest().encode().unwrap());
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_damage() {
        let file = manifest().encode().unwrap();
        for at in 0..file.len() {
            for bit in 0..8 {
                let mut flipped = file.to_vec();
                flipped[at] ^= 1 << bit;
                let error = Manifest::decode(Step(1200), &flipped).unwrap_err();
                assert!(error.is_damage(), "byte {at} bit {bit}: {error}");
            }
            assert!(Manifest::decode(Step(1200), &file[..at]).unwrap_err().is_damage());
        }
    }

    #[test]
    fn a_newer_format_is_refused_by_name_even_if_its_fields_are_unknown() {
        let newer = serde_json::json!({ "format": 2, "shape_of_things": [] });
        let error = Manifest::decode(Step(1200), &seal(&newer).unwrap()).unwrap_err();
        assert!(matches!(error, CheckpointError::NewerFormat { found: 2, .. }), "{error}");
    }

    #[test]
    fn a_manifest_may_not_point_outside_its_attempt() {
        let mut outside = manifest();
        outside.objects.get_mut(MODEL_FILE).unwrap().path = "config.toml".into();
        assert!(outside.encode().is_err());
        let mut climbing = manifest();
        climbing.attempt = "../x".into();
        assert!(climbing.encode().is_err());
        assert!(Manifest::decode(Step(7), &manifest().encode().unwrap()).unwrap_err().is_damage());
    }

    #[test]
    fn steps_are_read_from_folders_as_they_are_written() {
        for step in [Step(0), Step(1200), Step(123_456_789_012)] {
            assert_eq!(parse_step(&manifest_path(step)), Some(step));
        }
        for path in ["checkpoints/step-12/x", "checkpoints/step-+0000012/x", "logs/step-00000012"] {
            assert_eq!(parse_step(path), None, "{path}");
        }
    }
}
