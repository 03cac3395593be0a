//! `cpcr audit RUN`: what the ledger of a run proves, in numbers, or the first thing that is wrong with it.
//!
//! Thin: the proof is `ledger::audit`'s.

use std::sync::Arc;

use serde::Serialize;

use super::{Failure, print, run, tell};
use crate::config::RunConfig;
use crate::data::Dataset;
use crate::ledger::{self, AuditError, Report, Violation};
use crate::proto::{EXIT_DONE, EXIT_FAILED};
use crate::store::{Store, StoreOptions};

/// The outcome for programs.
#[derive(Debug, Serialize)]
struct Outcome {
    run: String,
    sound: bool,
    #[serde(flatten)]
    report: Option<Report>,
    violation: Option<Violation>,
    /// Why the deal was not compared with the dataset itself.
    dataset_unseen: Option<String>,
}

/// Audits a run; the result is the exit status: 0 sound, 1 not.
///
/// # Errors
/// [`Failure`] with status 2 where there is no run, 1 where nothing can be said.
pub async fn audit(url: &str, json: bool) -> Result<i32, Failure> {
    let config = run::configuration(url, &StoreOptions::default()).await?;
    let store = Store::open(url, &StoreOptions::default().existing()).map_err(Failure::usage)?;
    let (dataset, dataset_unseen) = match dataset(&config) {
        Ok(dataset) => (Some(dataset), None),
        Err(why) => (None, Some(why)),
    };
    let (report, violation) = match ledger::audit(&store, &config, dataset.as_ref()).await {
        Ok(report) => (Some(report), None),
        Err(AuditError::Violation(violation)) => (None, Some(violation)),
        Err(error) => return Err(Failure::failed(format!("{url}: {error}"))),
    };
    if let (false, Some(why)) = (json, &dataset_unseen) {
        tell(&format!("the dataset was not looked at: {why}"));
    }
    let outcome = Outcome {
        run: url.to_owned(),
        sound: violation.is_none(),
        report,
        violation,
        dataset_unseen,
    };
    if json {
        let text = serde_json::to_string(&outcome).map_err(Failure::failed)?;
        print(&format!("{text}\n"))?;
    } else if let Some(report) = &outcome.report {
        print(&text(report))?;
    } else if let Some(violation) = &outcome.violation {
        return Err(Failure::failed(format!("{url} is not sound: {violation}")));
    }
    Ok(if outcome.sound { EXIT_DONE } else { EXIT_FAILED })
}

/// The run's dataset, or why it cannot be opened.
fn dataset(config: &RunConfig) -> Result<Dataset, String> {
    let Some(url) = config.data.url.as_deref() else {
        return Err("config.toml names none".to_owned());
    };
    let store = Store::open(url, &StoreOptions::default().existing()).map_err(|e| e.to_string())?;
    Dataset::open(Arc::new(store)).map_err(|e| format!("{url}: {e}"))
}

/// The numbers in words.
fn text(report: &Report) -> String {
    let counts = &report.counts;
    if counts.steps == 0 {
        return "sound: no step was taken yet\n".to_owned();
    }
    let mut lines = vec![format!("sound: {} steps", counts.steps)];
    if report.steps_in_checkpoint_only > 0 {
        lines.push(format!(
            "the newest checkpoint alone holds the last {} of them: a resume records them",
            report.steps_in_checkpoint_only
        ));
    }
    if counts.first_step.0 > 0 {
        lines.push(format!(
            "steps before {} were taken by a release that kept no ledger: nothing is known of them",
            counts.first_step
        ));
    }
    lines.push(format!(
        "lineages: {}, {} followed; superseded steps: {}; objects: {}",
        report.lineages, report.lineages_followed, report.superseded_steps, report.objects
    ));
    lines.push(if counts.samples == 0 {
        "no unlabelled samples were used: there is nothing to count".to_owned()
    } else {
        format!(
            "samples: {}, from a pool of {}; epochs complete, each sample exactly once: {}; in part, none twice: {}",
            counts.samples, counts.pool, counts.epochs_complete, counts.epochs_partial
        )
    });
    let of = if report.dataset_checked { "config.toml and the dataset" } else { "config.toml" };
    lines.push(format!("the deal is that of {of}"));
    lines.join("\n") + "\n"
}
