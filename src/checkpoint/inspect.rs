//! What `cpcr checkpoints ls|verify RUN` shows: a row for each checkpoint, newest first.

use serde::Serialize;

use super::error::CheckpointError;
use super::reader::{read_manifest, steps_down, verify};
use crate::store::Store;
use crate::types::{Step, WorldSize};

/// How much is known about a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Its manifest is whole; the objects were not fetched.
    Listed,
    /// Every object was fetched and matches.
    Verified,
    /// Something is missing or wrong.
    Damaged,
    /// A newer release wrote it.
    NewerFormat,
}

/// One checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CheckpointRow {
    /// Optimiser steps.
    pub step: Step,
    /// How much is known.
    pub status: Status,
    /// Length of all objects; 0 if the manifest cannot be read.
    pub bytes: u64,
    /// Trainers at the time, if the manifest can be read.
    pub world_size: Option<WorldSize>,
    /// Whether a resume would start here, as far as is known.
    pub latest: bool,
    /// What is wrong, if something is.
    pub problem: Option<String>,
}

/// Reads the manifests only.
pub async fn list_rows(run: &Store) -> Result<Vec<CheckpointRow>, CheckpointError> {
    rows(run, Status::Listed).await
}

/// Fetches every object of every checkpoint.
pub async fn verify_rows(run: &Store) -> Result<Vec<CheckpointRow>, CheckpointError> {
    rows(run, Status::Verified).await
}

async fn rows(run: &Store, goal: Status) -> Result<Vec<CheckpointRow>, CheckpointError> {
    let mut rows = Vec::new();
    let mut found_latest = false;
    for step in steps_down(run).await? {
        let mut row = CheckpointRow {
            step,
            status: goal,
            bytes: 0,
            world_size: None,
            latest: false,
            problem: None,
        };
        let checked = async {
            let manifest = read_manifest(run, step).await?;
            row.bytes = manifest.bytes();
            row.world_size = Some(manifest.world_size);
            if goal == Status::Verified {
                verify(run, &manifest).await?;
            }
            Ok(())
        };
        match checked.await {
            Ok(()) => {
                row.latest = !found_latest;
                found_latest = true;
            }
            Err(CheckpointError::Store(error)) => return Err(error.into()),
            // Removed since it was listed.
            Err(CheckpointError::Missing { .. }) => continue,
            Err(error) => {
                row.status = match error {
                    CheckpointError::NewerFormat { .. } => Status::NewerFormat,
                    _ => Status::Damaged,
                };
                row.problem = Some(error.to_string());
            }
        }
        rows.push(row);
    }
    Ok(rows)
}
