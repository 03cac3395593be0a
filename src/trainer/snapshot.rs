//! From a trainer's state to its checkpoint writer: training waits while memory is copied, and for nothing else.
//!
//! Not here: when a checkpoint is due (the loop), what becomes of a snapshot (`checkpoint`).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use safetensors::Dtype;
use serde_json::json;

use super::TrainerError;
use crate::checkpoint::{
    self, CheckpointError, NamedTensors, Position, Snapshot, TrainState, Writer,
};
use crate::eval::report::{Record, RunHistory};
use crate::ledger::{self, Carried};
use crate::model::{Ensemble, HostTensor, ModelError, StateCopy};
use crate::types::{Step, WorldSize};

/// Copies whose memory is kept for the next checkpoint: as many as can be with the writer, and one.
const COPIES_MAX: usize = 3;

/// Copies that are written, whose memory is to be used again.
#[derive(Debug, Clone, Default)]
pub(crate) struct Copies(Arc<Mutex<Vec<StateCopy>>>);

impl Copies {
    fn take(&self) -> StateCopy {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    fn give_back(&self, copy: StateCopy) {
        let mut copies = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if copies.len() < COPIES_MAX {
            copies.push(copy);
        }
    }
}

/// What a checkpoint says beside the tensors.
#[derive(Debug, Clone)]
pub(crate) struct Circumstances {
    /// Steps done.
    pub step: Step,
    /// Who took them.
    pub world_size: WorldSize,
    /// Threads of each.
    pub threads: u32,
    /// Where the streams stand.
    pub position: Position,
    /// What the report is made of.
    pub history: RunHistory,
    /// Receipts that the ledger is not known to hold.
    pub carried: Carried,
}

/// Copies the state and hands it to the writer; what makes files of it, and their upload, runs beside training.
pub(crate) fn hand_over(
    writer: &Writer,
    nets: &Ensemble,
    copies: &Copies,
    of: Circumstances,
) -> Result<(), TrainerError> {
    let since = Instant::now();
    let mut copy = copies.take();
    nets.copy_state(&mut copy)?;
    let (copies, step) = (copies.clone(), of.step);
    Ok(writer.submit((step, since), move || {
        snapshot(copy, &copies, of)
            .map_err(|error| CheckpointError::Invalid { step, detail: error.to_string() })
    })?)
}

/// On the writer's thread.
fn snapshot(copy: StateCopy, copies: &Copies, of: Circumstances) -> Result<Snapshot, TrainerError> {
    let (model, optimizer) = copy.to_host()?;
    copies.give_back(copy);
    let history = history_lines(&of.history)?;
    Ok(Snapshot {
        step: of.step,
        world_size: of.world_size,
        threads: of.threads,
        position: of.position,
        model: named(model)?,
        optimizer: named(optimizer)?,
        state: TrainState(json!({
            "history": String::from_utf8_lossy(&history),
            ledger::STATE_KEY: of.carried,
        })),
        best: of.history.ranked().iter().map(|validated| Step(validated.step)).collect(),
    })
}

/// A history as it is kept in checkpoints.
pub(super) fn history_lines(history: &RunHistory) -> Result<Vec<u8>, TrainerError> {
    let mut lines = Vec::new();
    let records = (history.steps.iter().cloned().map(Record::Step))
        .chain(history.validations.iter().cloned().map(Record::Validation))
        .chain(history.events.iter().cloned().map(Record::Event));
    for record in records {
        let line = record.to_line().map_err(|e| TrainerError::Report(e.to_string()))?;
        lines.extend_from_slice(&line);
    }
    Ok(lines)
}

const DTYPES: [(&str, Dtype); 3] = [("F32", Dtype::F32), ("F64", Dtype::F64), ("I64", Dtype::I64)];

pub(super) fn named(tensors: Vec<HostTensor>) -> Result<NamedTensors, TrainerError> {
    let dtypes = BTreeMap::from(DTYPES);
    tensors
        .into_iter()
        .map(|t| {
            let dtype = *dtypes
                .get(t.dtype.as_str())
                .ok_or_else(|| ModelError::Input(format!("{}: dtype {}", t.name, t.dtype)))?;
            let host = checkpoint::HostTensor { dtype, shape: t.shape, bytes: t.bytes.into() };
            Ok((t.name, host))
        })
        .collect()
}

pub(super) fn unnamed(tensors: &NamedTensors) -> Result<Vec<HostTensor>, TrainerError> {
    tensors
        .iter()
        .map(|(name, t)| {
            let (dtype, _) = DTYPES
                .iter()
                .find(|(_, dtype)| *dtype == t.dtype)
                .ok_or_else(|| ModelError::Input(format!("{name}: dtype {:?}", t.dtype)))?;
            Ok(HostTensor {
                name: name.clone(),
                dtype: (*dtype).to_owned(),
                shape: t.shape.clone(),
                bytes: t.bytes.to_vec(),
            })
        })
        .collect()
}
