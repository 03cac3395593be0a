//! `cpcr`: semi-supervised medical segmentation, trained over many workers from object storage.
//!
//! `docs/architecture.md` is the map. Imports point one way, from top to bottom of this list;
//! `tests/architecture.rs` holds the table of what each module may use.
//!
//! Two groups of modules: those that know tensors (`bridge`, `model`, `loss`, `method`, `trainer`, and
//! parts of `collective`) end up in the `cpcr-engine` binary, which links libtorch; nothing that
//! the `cpcr` and `cpcr-launch` binaries reach does, so a coordinator starts in milliseconds.

pub mod types;

pub mod page;

pub mod config;

pub mod telemetry;

pub mod trust;

pub mod proto;

pub mod store;

pub mod data;

pub mod checkpoint;

pub mod ledger;

pub mod kv;

pub mod bridge;

pub mod collective;

pub mod model;

pub mod loss;

pub mod eval;

pub mod method;

pub mod coordinator;

pub mod worker;

pub mod trainer;

pub mod bench;

pub mod cli;
