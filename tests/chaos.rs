//! A campaign of `scripts/chaos.sh`, as short as can be: that it still runs, and finds nothing. Long ones, and what they
//! have found, are in `docs/reliability.md`.

mod support;

use std::path::Path;
use std::process::Command;

use support::{CPCR, skipped, succeed, text};

#[test]
fn a_short_campaign_loses_nothing() {
    let python = Command::new("python3").arg("--version").output();
    if !python.is_ok_and(|output| output.status.success()) {
        skipped("a_short_campaign_loses_nothing", "no python3 here");
        return;
    }
    let binaries = Path::new(CPCR).parent().unwrap();
    let campaign = Command::new("scripts/chaos.sh")
        .args(["--runs", "2", "--seed", "7", "--bin"])
        .arg(binaries)
        .output()
        .unwrap();
    succeed(&campaign);
    let told = text(&campaign.stdout);
    assert!(
        told.starts_with("2 runs, seeds 7 to 8, ") && told.contains(", 0 violations"),
        "{told}"
    );
    assert!(text(&campaign.stderr).contains("storage that answers badly"), "of seed 8");
}
