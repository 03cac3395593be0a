//! What crosses process borders: the gRPC messages of the control plane, and the JSON lines
//! between an agent and its trainer.
//!
//! Not here: any decision. The wire types become the coordinator's events at the edge, in
//! `coordinator::service`.

pub mod codec;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Deserializer, Serialize};

use crate::types::{Backend, Generation, Lineage, Rank, Receipt, Step, WorldSize};

/// The generated gRPC types.
#[allow(missing_docs, clippy::all)]
pub mod wire {
    tonic::include_proto!("cpcr.v1");
}

/// Exit status of every binary: all done.
pub const EXIT_DONE: i32 = 0;
/// Exit status: failed.
pub const EXIT_FAILED: i32 = 1;
/// Exit status: bad usage or configuration; trying again unchanged is no use.
pub const EXIT_USAGE: i32 = 2;
/// Exit status: interrupted, the same command goes on from the last checkpoint.
pub const EXIT_RESUMABLE: i32 = 75;

/// What an agent tells a trainer at its start (one argument, JSON). With whom it trains comes later, by
/// [`TrainerOrder::Join`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assignment {
    /// Its collectives, and whether it trains on the CPU or on the first GPU that it sees.
    pub backend: Backend,
    /// The interface that collectives use.
    pub interface: IpAddr,
    /// The run's folder in its object store; `config.toml` is read from there.
    pub run: String,
    /// CPU threads for libtorch.
    pub threads: u32,
}

/// A trainer's place in a generation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// The generation.
    pub generation: Generation,
    /// Fresh with every start of a coordinator, whose generations may count from 1 again.
    pub epoch: String,
    /// Its rank.
    pub rank: Rank,
    /// How many ranks there are.
    pub world: WorldSize,
    /// The key-value service that hosts this generation's c10d store.
    pub kv_address: SocketAddr,
    /// The trace that it belongs to, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
}

impl Membership {
    /// What the names of this generation's keys begin with, in whichever service.
    #[must_use]
    pub fn key_prefix(epoch: &str, generation: Generation) -> String {
        format!("{epoch}/generation-{generation}/")
    }
}

/// What a trainer tells its agent (stdout, one JSON object a line).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum TrainerEvent {
    /// It is prepared, and waits for a generation.
    Standby,
    /// It lives: said every second, by a thread of its own, whatever else the trainer is at.
    Alive,
    /// Rank 0's: the group has formed; it agrees on the state next.
    Grouped(Place),
    /// The group has formed and agreed on the state; training goes on from `step`.
    Ready {
        /// What it belongs to from now on: all that it says of steps is about that.
        #[serde(flatten)]
        place: Place,
        /// Steps done before.
        step: Step,
        /// Whether the state is a checkpoint's, for nobody had a newer one in memory.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        restored: bool,
        /// Rank 0's: what the ledger needs to know of this start.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        ledger: Option<LedgerStart>,
    },
    /// A step was applied.
    Step {
        /// Steps done, this one included.
        step: Step,
        /// Steps in all.
        total: Step,
        /// Loss terms by name, averaged over the workers.
        #[serde(deserialize_with = "nulls_are_nan")]
        terms: BTreeMap<String, f64>,
        /// Images a second, over all workers.
        images_per_s: f64,
        /// Share of the step's time spent waiting for data, `0..=1`.
        data_wait: f64,
        /// Learning rate of this step.
        #[serde(default)]
        lr: f64,
        /// The ramp-up's weight, lambda(t).
        #[serde(default)]
        consistency: f64,
        /// Which unlabelled samples it was, for the ledger.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        receipt: Option<Receipt>,
    },
    /// Its group is gone. It keeps its state, and waits for the next generation.
    Stranded {
        /// The generation that is over for it.
        generation: Generation,
        /// Steps done, if it has a state.
        #[serde(default)]
        done: Option<Step>,
        /// What it saw.
        text: String,
    },
    /// It does something else than stepping, and gets on with it.
    Busy {
        /// Steps done.
        step: Step,
        /// What.
        doing: Doing,
    },
    /// A validation finished.
    Validation {
        /// Steps done.
        step: Step,
        /// Dice of each foreground class by its name, in class order.
        #[serde(deserialize_with = "null_pairs_are_nan")]
        dice: Vec<(String, f64)>,
        /// Their mean.
        #[serde(deserialize_with = "null_is_nan")]
        mean_dice: f64,
        /// Pictures in the run's folder, and what is on them.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        pictures: Vec<Picture>,
    },
    /// A checkpoint was committed.
    Checkpoint {
        /// Its step.
        step: Step,
        /// Bytes of its objects.
        bytes: u64,
        /// Whether it was read back.
        verified: bool,
        /// Seconds from the copy in memory to its manifest.
        upload_s: f64,
        /// Seconds that training waited for the copy.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        hold_s: Option<f64>,
    },
    /// How it does: said every second while it trains.
    Vitals(Vitals),
    /// Something is wrong, and training goes on.
    Warning {
        /// What, in one line.
        text: String,
    },
    /// All is done, and rank 0 has written it down; its process ends next.
    Complete {
        /// The generation that did it: by now it may have been told to join another.
        generation: Generation,
    },
    /// It fails, and its process ends next.
    Failed {
        /// Why, in one line.
        text: String,
        /// The exit status that is coming.
        status: i32,
        /// Whether another generation may do better: a lost peer, a store that was out of reach.
        /// A damaged object or a loss that is no number will be the same again.
        curable: bool,
    },
}

/// JSON has no NaN: it is written as null.
fn null_is_nan<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(f64::NAN))
}

fn nulls_are_nan<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<String, f64>, D::Error> {
    let values = BTreeMap::<String, Option<f64>>::deserialize(from)?;
    Ok(values.into_iter().map(|(name, value)| (name, value.unwrap_or(f64::NAN))).collect())
}

fn null_pairs_are_nan<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<(String, f64)>, D::Error> {
    let values = Vec::<(String, Option<f64>)>::deserialize(from)?;
    Ok(values.into_iter().map(|(name, value)| (name, value.unwrap_or(f64::NAN))).collect())
}

/// A rank of a generation. A trainer says itself which it is: when it is told to join another, it may have said more that
/// its agent has not read yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Place {
    /// The generation.
    pub generation: Generation,
    /// Its rank there.
    pub rank: Rank,
}

/// A picture that a validation has left in the run's folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Picture {
    /// Its path there.
    pub path: String,
    /// What is on it.
    pub caption: String,
}

/// How a trainer does. Counts are since its process began, so that what is lost on the way costs nothing.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Vitals {
    /// Steps done, of the run.
    pub step: Step,
    /// Steps that this process has done.
    pub steps: u64,
    /// Seconds of them.
    pub steps_s: f64,
    /// Seconds by phase of a step (`telemetry::Phase`).
    pub phases_s: BTreeMap<String, f64>,
    /// Batches that are ready.
    pub queue: u64,
    /// Read requests.
    pub requests: u64,
    /// Bytes that they returned.
    pub bytes: u64,
    /// Faults on the way, by kind.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub faults: BTreeMap<String, u64>,
    /// Blocks found in this machine's cache.
    pub cache_hits: u64,
    /// Blocks that were not there.
    pub cache_misses: u64,
    /// Bytes of memory that are resident.
    pub memory: u64,
    /// Bytes of its GPU's memory in use, by whomever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_memory: Option<u64>,
    /// Page faults that had to wait for a disk.
    pub page_faults: u64,
}

/// The ledger's own record of where a generation starts (`ledger::Attestation`); not looked into here.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LedgerStart(pub serde_json::Value);

/// What a trainer does between steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Doing {
    /// It has scored another validation volume.
    Validating,
    /// It waits until its last checkpoint is committed.
    Saving,
}

/// What an agent tells a running trainer (stdin, one JSON object a line).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "snake_case")]
pub enum TrainerOrder {
    /// Join a generation; leave the one before, if there is one.
    Join(Membership),
    /// Leave a generation and wait for the next.
    Leave {
        /// Which; another one is not left.
        generation: Generation,
    },
    /// Say once more where the ledger has to go on: a coordinator has adopted the generation.
    Attest,
    /// Write a checkpoint after the step in flight, then exit 75.
    CheckpointAndStop,
    /// The ledger holds all steps before this one: their receipts need not be kept.
    Recorded {
        /// In which lineage.
        lineage: Lineage,
        /// The first step that it lacks.
        step: Step,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_one_json_line_each() {
        let event = TrainerEvent::Step {
            step: Step(3),
            total: Step(10),
            terms: BTreeMap::from([("dice".to_owned(), 1.5)]),
            images_per_s: 12.0,
            data_wait: 0.01,
            lr: 0.1,
            consistency: 0.0,
            receipt: Some(Receipt { step: Step(2), fingerprint: u64::MAX - 1, samples: 12 }),
        };
        let line = serde_json::to_string(&event).unwrap();
        assert!(!line.contains('\n') && line.contains("\"event\":\"step\""));
        assert_eq!(serde_json::from_str::<TrainerEvent>(&line).unwrap(), event);
    }

    /// A class without a score, or a term that is no number, took the whole event with it.
    #[test]
    fn what_is_no_number_survives_the_line() {
        let dice = vec![("LV".to_owned(), f64::NAN), ("RV".to_owned(), 0.5)];
        let event = TrainerEvent::Validation {
            step: Step(3),
            dice,
            mean_dice: f64::NAN,
            pictures: Vec::new(),
        };
        let line = serde_json::to_string(&event).unwrap();
        let TrainerEvent::Validation { dice, mean_dice, .. } = serde_json::from_str(&line).unwrap()
        else {
            panic!("{line}");
        };
        assert!(mean_dice.is_nan() && dice[0].1.is_nan() && dice[1].1 == 0.5);
        let line = line.replace("validation", "step").replace("\"dice\"", "\"unread\"");
        assert!(serde_json::from_str::<TrainerEvent>(&line).is_err(), "no terms");
    }
}
