//! A campaign of `scripts/chaos.sh`, as short as can be: that it still runs, and finds nothing. Long ones, and what they
//! have found, are in `docs/reliability.md`.

#![allow(clippy::unwrap_used)] // The lint's exception for tests stops at their helpers.

mod support;

use std::path::Path;
use std::process::{Command, Output};

use support::{CPCR, skipped, succeed, text};

fn campaign(name: &str, what: &str, runs: &str, seed: &str) -> Option<Output> {
    let python = Command::new("python3").arg("--version").output();
    if !python.is_ok_and(|output| output.status.success()) {
        skipped(name, "no python3 here");
        return None;
    }
    let binaries = Path::new(CPCR).parent().unwrap();
    let campaign = Command::new("scripts/chaos.sh")
        .args([what, runs, "--seed", seed, "--bin"])
        .arg(binaries)
        .output()
        .unwrap();
    succeed(&campaign);
    Some(campaign)
}

#[test]
fn a_short_campaign_loses_nothing() {
    let Some(campaign) = campaign("a_short_campaign_loses_nothing", "--runs", "2", "7") else {
        return;
    };
    let told = text(&campaign.stdout);
    assert!(
        told.starts_with("2 runs, seeds 7 to 8, ") && told.contains(", 0 violations"),
        "{told}"
    );
    let told = text(&campaign.stderr);
    assert!(told.contains("storage that answers badly") && told.contains("a spare"), "of seed 8");
}

/// Every process on a host of its own, and packets between them lost for a while.
#[test]
fn a_partition_loses_nothing() {
    let Some(campaign) = campaign("a_partition_loses_nothing", "--partitions", "1", "3") else {
        return;
    };
    let told = text(&campaign.stderr);
    if let Some((_, reason)) = told.split_once("skipped: partitions: ") {
        skipped("a_partition_loses_nothing", reason.trim());
        return;
    }
    assert!(text(&campaign.stdout).contains(", 0 violations"), "{told}");
    assert!(told.contains("a worker and all others"), "of seed 3: {told}");
}
