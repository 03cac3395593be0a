//! Finding the newest whole checkpoint, and reading one: nothing unverified leaves this file.
//!
//! Damage is a reason to take an older checkpoint. A store that is down, or a newer format, is not.

use std::collections::BTreeSet;

use bytes::Bytes;

use super::error::CheckpointError;
use super::host_tensor::{NamedTensors, decode_tensors};
use super::manifest::{
    MODEL_FILE, Manifest, OPTIMIZER_FILE, STATE_FILE, TrainState, manifest_path, parse_step,
};
use super::seal::unseal;
use crate::store::{Store, StoreError};
use crate::types::Step;

/// A verified checkpoint in host memory.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// What it is made of.
    pub manifest: Manifest,
    /// The network.
    pub model: NamedTensors,
    /// The optimiser.
    pub optimizer: NamedTensors,
    /// The trainer's record.
    pub state: TrainState,
}

/// The highest step whose manifest and objects verify, or `None` if there is no such.
///
/// Damaged ones above it are reported as warnings. Errors are only those that say nothing about
/// the checkpoints: a store that fails, a format that is newer.
pub async fn latest(run: &Store) -> Result<Option<Manifest>, CheckpointError> {
    for step in steps_down(run).await? {
        let found = async {
            let manifest = read_manifest(run, step).await?;
            verify(run, &manifest).await?;
            Ok(manifest)
        };
        if let Some(manifest) = unless_damaged(run, found.await)? {
            return Ok(Some(manifest));
        }
    }
    Ok(None)
}

/// As [`latest`], with its contents, each object fetched once.
pub async fn load_latest(run: &Store) -> Result<Option<Checkpoint>, CheckpointError> {
    for step in steps_down(run).await? {
        if let Some(checkpoint) = unless_damaged(run, load(run, step).await)? {
            return Ok(Some(checkpoint));
        }
    }
    Ok(None)
}

/// Manifest and record of the highest step where both verify; the tensors are not looked at.
pub async fn latest_state(run: &Store) -> Result<Option<(Manifest, TrainState)>, CheckpointError> {
    for step in steps_down(run).await? {
        let found = async {
            let manifest = read_manifest(run, step).await?;
            let state = read_state(run, &manifest).await?;
            Ok((manifest, state))
        };
        if let Some(found) = unless_damaged(run, found.await)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// The checkpoint of `step`, verified.
pub async fn load(run: &Store, step: Step) -> Result<Checkpoint, CheckpointError> {
    let manifest = read_manifest(run, step).await?;
    let tensors = |name: &'static str, file: &Bytes| {
        decode_tensors(file).map_err(|e| damaged(step, format!("{name}: {e}")))
    };
    let model = tensors(MODEL_FILE, &fetch(run, &manifest, MODEL_FILE).await?)?;
    let optimizer = tensors(OPTIMIZER_FILE, &fetch(run, &manifest, OPTIMIZER_FILE).await?)?;
    let state = read_state(run, &manifest).await?;
    Ok(Checkpoint { manifest, model, optimizer, state })
}

async fn read_state(run: &Store, manifest: &Manifest) -> Result<TrainState, CheckpointError> {
    serde_json::from_slice(&fetch(run, manifest, STATE_FILE).await?)
        .map_err(|e| damaged(manifest.step, format!("{STATE_FILE}: {e}")))
}

/// The manifest of `step`: whole, of a known format, sensible. Its objects are not looked at.
pub async fn read_manifest(run: &Store, step: Step) -> Result<Manifest, CheckpointError> {
    match run.get_sound(&manifest_path(step), |file| unseal(file).is_some()).await {
        Ok(file) => Manifest::decode(step, &file),
        Err(StoreError::NotFound { .. }) => {
            Err(CheckpointError::Missing { step, url: run.url().to_owned() })
        }
        Err(error) => Err(as_damage(step, error)),
    }
}

/// Fetches every object of `manifest` and compares it with its digest.
pub async fn verify(run: &Store, manifest: &Manifest) -> Result<(), CheckpointError> {
    for name in manifest.objects.keys() {
        fetch(run, manifest, name).await?;
    }
    Ok(())
}

/// All steps with a manifest, highest first.
pub(super) async fn steps_down(run: &Store) -> Result<Vec<Step>, CheckpointError> {
    let objects = run.list("checkpoints").await?;
    let steps: BTreeSet<Step> = objects
        .iter()
        .filter_map(|object| {
            let step = parse_step(&object.path)?;
            (object.path == manifest_path(step)).then_some(step)
        })
        .collect();
    Ok(steps.into_iter().rev().collect())
}

async fn fetch(run: &Store, manifest: &Manifest, name: &str) -> Result<Bytes, CheckpointError> {
    let step = manifest.step;
    let object = manifest
        .objects
        .get(name)
        .ok_or_else(|| damaged(step, format!("its manifest does not list {name}")))?;
    run.get_verified(&object.path, &object.digest).await.map_err(|error| as_damage(step, error))
}

/// Missing and wrong bytes are damage; everything else is the store's trouble.
fn as_damage(step: Step, error: StoreError) -> CheckpointError {
    match error {
        StoreError::NotFound { .. } | StoreError::Corrupt { .. } => {
            damaged(step, error.to_string())
        }
        other => CheckpointError::Store(other),
    }
}

fn damaged(step: Step, detail: String) -> CheckpointError {
    CheckpointError::Damaged { step, detail }
}

/// `None`, with a warning, for a checkpoint that is damaged or was removed since it was listed.
fn unless_damaged<T>(
    run: &Store,
    found: Result<T, CheckpointError>,
) -> Result<Option<T>, CheckpointError> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error @ (CheckpointError::Damaged { .. } | CheckpointError::Missing { .. })) => {
            tracing::warn!(run = %run, %error, "taking the checkpoint before it");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}
