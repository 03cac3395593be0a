//! Everything that reads bytes from outside, fed by libFuzzer. One binary; CPCR_FUZZ_TARGET names what it feeds.
//!
//! A target takes any bytes and must return: no panic, no endless loop, no memory beyond libFuzzer's limits. Where records are
//! sealed or hashed, the target seals what the fuzzer made, for whoever can write into the bucket can do so too.
#![no_main]

use std::sync::OnceLock;
use std::time::Duration;

use bytes::Bytes;
use cpcr::config::{self, ConfigSource};
use cpcr::coordinator::events::Limits;
use cpcr::coordinator::hear;
use cpcr::data::import::acdc_h5;
use cpcr::data::manifest::{ShardEntry, ShardIndex};
use cpcr::data::nifti;
use cpcr::data::shard::{Labels, ShardFooter};
use cpcr::data::Manifest;
use cpcr::types::Step;
use cpcr::{checkpoint, ledger};
use libfuzzer_sys::fuzz_target;

type Target = fn(&[u8]);

const TARGETS: [(&str, Target); 8] = [
    ("manifest", manifest),
    ("index", index),
    ("ledger", ledger_object),
    ("checkpoint", checkpoint_files),
    ("nifti", nifti_file),
    ("hdf5", hdf5_file),
    ("control", control_messages),
    ("config", configuration),
];

fn chosen() -> Target {
    let name = std::env::var("CPCR_FUZZ_TARGET").expect("CPCR_FUZZ_TARGET names the target");
    let found = TARGETS.iter().find(|(target, _)| *target == name);
    found.unwrap_or_else(|| panic!("no target {name}: {:?}", TARGETS.map(|(name, _)| name))).1
}

fuzz_target!(|bytes: &[u8]| {
    static CHOSEN: OnceLock<Target> = OnceLock::new();
    CHOSEN.get_or_init(chosen)(bytes);
});

fn manifest(bytes: &[u8]) {
    let Ok(manifest) = Manifest::parse(bytes) else { return };
    let again = Manifest::parse(&manifest.to_bytes().expect("it was read")).expect("it was written");
    assert_eq!(manifest, again);
    for patients in 0..=manifest.labelled_patients().len() as u32 + 1 {
        let _either = manifest.pools(patients);
    }
}

/// A shard's entry in the manifest, its index, its footer and a row group, with 0xFF (no part of UTF-8) in between.
fn index(bytes: &[u8]) {
    let mut parts = bytes.splitn(4, |byte| *byte == 0xff);
    let mut part = || parts.next().unwrap_or_default();
    let Ok(entry) = serde_json::from_slice::<ShardEntry>(part()) else { return };
    let Ok(index) = ShardIndex::parse(part(), &entry, 1) else { return };
    let bytes = part();
    // Its length and hash are checked before it is parsed.
    if bytes.len() as u64 != index.footer_digest.bytes {
        return;
    }
    let Ok(footer) = ShardFooter::parse(&index, Bytes::copy_from_slice(bytes)) else { return };
    let group = Bytes::copy_from_slice(part());
    for (number, entry) in index.groups.iter().enumerate().take(4) {
        let _either = footer.decode(number, entry, group.clone(), Labels::Decode);
    }
}

/// The bytes as they are, and sealed if they are JSON that could be; with the number that they say is theirs.
fn sealed(bytes: &[u8], field: &str, mut read: impl FnMut(u64, &[u8])) {
    read(0, bytes);
    if let Ok(value @ serde_json::Value::Object(_)) = serde_json::from_slice(bytes)
        && let Ok(file) = checkpoint::seal(&value)
    {
        read(value[field].as_u64().unwrap_or_default(), &file);
    }
}

fn ledger_object(bytes: &[u8]) {
    sealed(bytes, "number", |number, file| {
        let Ok(object) = ledger::Object::decode(number, file) else { return };
        let again = ledger::Object::decode(number, &object.encode().expect("it was read"));
        assert_eq!(again.expect("it was written"), object);
    });
}

fn checkpoint_files(bytes: &[u8]) {
    sealed(bytes, "step", |step, file| {
        let Ok(manifest) = checkpoint::Manifest::decode(Step(step), file) else { return };
        let again = checkpoint::Manifest::decode(Step(step), &manifest.encode().expect("it was read"));
        assert_eq!(again.expect("it was written"), manifest);
    });
    if let Ok(tensors) = checkpoint::decode_tensors(&Bytes::copy_from_slice(bytes)) {
        let again = checkpoint::encode_tensors(&tensors).expect("they were read");
        checkpoint::decode_tensors(&again).expect("they were written");
    }
}

fn nifti_file(bytes: &[u8]) {
    let _either = nifti::read(bytes, bytes.len() as u64);
}

/// The library that reads HDF5 panics over some damaged files; the import catches that, and so must this.
fn hdf5_file(bytes: &[u8]) {
    static QUIET: OnceLock<()> = OnceLock::new();
    QUIET.get_or_init(|| std::panic::set_hook(Box::new(|_| {})));
    let _either = acdc_h5::check(bytes.to_vec());
}

/// What agents may say, up to what the state machine makes of it.
fn control_messages(bytes: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    let second = Duration::from_secs(1);
    let limits = Limits {
        min: 1,
        max: 3,
        spares: 1,
        backend: None,
        restarts: 3,
        wait: second,
        heartbeat: second,
        start: second,
        progress: second,
        grace: second,
        drain: second,
    };
    runtime.block_on(hear::hear(limits, bytes));
    runtime.shutdown_timeout(Duration::ZERO);
}

fn configuration(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(config) = config::load(&ConfigSource::Text(text.to_owned()), &[]) {
        assert!(config.differences(&config).is_empty());
    }
}
