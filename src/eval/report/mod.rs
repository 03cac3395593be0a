//! The report of a run: a page to read, and numbers to work with.
//!
//! [`render`] is a pure function from what was recorded to files; the caller stores them under
//! the run. It reads no clock, so the same run gives the same report.
//!
//! `report/metrics.json` holds:
//!
//! | key | is |
//! |---|---|
//! | `format` | 1 |
//! | `run` | name of the run |
//! | `val.mean_dice` | mean Dice over volumes, then classes: of `final` if there is one, else of the last validation; null without either |
//! | `val.step`, `val.per_class` | of the last validation: its step, Dice by class name |
//! | `val.best` | step and mean Dice of the best validation |
//! | `final` | the closing evaluation, case by case ([`Summary`]) |
//! | `loss.steps`, `loss.terms` | losses by name, thinned out: means over equal stretches |
//! | `validation.steps`, `.mean_dice`, `.per_class` | every validation |
//! | `throughput` | `images_per_s`, `data_wait_share`: means over all steps |
//! | `steps` | steps that count |
//! | `events` | resumes, lost processes, notes |
//! | `damaged_lines` | lines of the history that could not be read |
//! | `environment`, `config` | as given |
//!
//! `report/metrics.csv` has every step that counts, unthinned; `report/page.json` is what `report/index.html` draws.

mod curves;
mod document;
mod history;
mod table;
mod text;

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

pub use curves::{Curve, Scale, draw, thin_out};
pub use history::{Record, RunEvent, RunHistory, StepRecord, ValidationRecord};
pub use table::{csv, text_table};

use super::summary::Summary;
use crate::page::{self, Document};

/// Why no report could be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReportError {
    /// The plotting library failed.
    #[error("draw the curves: {0}")]
    Plot(String),
    /// The numbers could not be written as JSON.
    #[error("write metrics.json")]
    Json(#[from] serde_json::Error),
}

/// A picture of a slice, for the page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReportOverlay {
    /// Which case and slice, in words.
    pub caption: String,
    /// The picture ([`super::overlay::overlay_png`]).
    pub png: Vec<u8>,
}

/// Everything that a report is made of.
#[derive(Debug, Clone, Copy)]
pub struct ReportInputs<'a> {
    /// Name of the run.
    pub name: &'a str,
    /// Where the run is, as the commands in the report take it.
    pub run_url: &'a str,
    /// Where the dataset is, as the commands in the report take it.
    pub data_url: &'a str,
    /// What happened.
    pub history: &'a RunHistory,
    /// The closing evaluation, if there was one.
    pub summary: Option<&'a Summary>,
    /// Names of the foreground classes, class 1 first.
    pub class_names: &'a [String],
    /// The resolved configuration.
    pub config: &'a str,
    /// Machine, versions, backend: names and values, in the order to show.
    pub environment: &'a [(String, String)],
    /// Pictures.
    pub overlays: &'a [ReportOverlay],
    /// Pictures of the cases that came out best.
    pub best: &'a [ReportOverlay],
    /// And worst.
    pub worst: &'a [ReportOverlay],
    /// The training method.
    pub method: &'a str,
    /// Steps in all.
    pub steps: u64,
    /// What the coordinator has seen of the run, if it has said so.
    pub seen: Option<&'a Document>,
}

/// Makes the report: paths relative to the run, and bytes.
///
/// # Errors
/// When the plotting library fails.
pub fn render(inputs: &ReportInputs<'_>) -> Result<Vec<(String, Vec<u8>)>, ReportError> {
    let loss = draw("Loss terms by step", &loss_curves(inputs.history), Scale::Logarithmic)?;
    let dice = draw("Validation Dice by step", &dice_curves(inputs.history), Scale::Unit)?;
    let document = document::document(inputs);
    let page_html = page::embedded(&document)?;
    let mut json = serde_json::to_vec_pretty(&metrics_json(inputs)?)?;
    json.push(b'\n');
    let mut files = vec![
        ("report/metrics.json".to_owned(), json),
        ("report/metrics.csv".to_owned(), metrics_csv(inputs.history).into_bytes()),
        ("report/curves-loss.svg".to_owned(), loss.into_bytes()),
        ("report/curves-dice.svg".to_owned(), dice.into_bytes()),
        (page::REPORT_HTML_PATH.to_owned(), page_html.into_bytes()),
        (page::REPORT_PATH.to_owned(), serde_json::to_vec(&document)?),
    ];
    let pictures = inputs.overlays.iter().enumerate();
    files.extend(
        pictures.map(|(i, o)| (format!("report/overlays/{:03}.png", i + 1), o.png.clone())),
    );
    Ok(files)
}

fn loss_names(history: &RunHistory) -> BTreeSet<&str> {
    history.steps.iter().flat_map(|s| s.losses.keys()).map(String::as_str).collect()
}

/// Totals first, then the terms by name.
fn loss_curves(history: &RunHistory) -> Vec<Curve> {
    let mut names: Vec<&str> = loss_names(history).into_iter().collect();
    names.sort_by_key(|name| *name != "total");
    let points = |name: &str| {
        let values = history.steps.iter().map(|s| (s.step as f64, s.losses.get(name)));
        values.filter_map(|(step, value)| Some((step, *value?))).collect()
    };
    names.iter().map(|name| Curve { name: (*name).to_owned(), points: points(name) }).collect()
}

fn dice_curves(history: &RunHistory) -> Vec<Curve> {
    let validations = &history.validations;
    let mean = validations.iter().map(|v| (v.step as f64, v.mean_dice)).collect();
    let mut curves = vec![Curve { name: "mean".to_owned(), points: mean }];
    let names: BTreeSet<&String> = validations.iter().flat_map(|v| v.class_dice.keys()).collect();
    for name in names {
        let values = validations.iter().map(|v| (v.step as f64, v.class_dice.get(name)));
        let points = values.filter_map(|(step, value)| Some((step, *value?))).collect();
        curves.push(Curve { name: name.clone(), points });
    }
    curves
}

/// The number that a run is judged by: see the table above.
fn headline_dice(inputs: &ReportInputs<'_>) -> Option<f64> {
    let last = inputs.history.validations.last().map(|v| v.mean_dice);
    inputs.summary.map_or(last, |summary| summary.mean.dice)
}

fn mean_of(history: &RunHistory, what: impl Fn(&StepRecord) -> f64) -> Option<f64> {
    let values: Vec<f64> = history.steps.iter().map(what).filter(|v| v.is_finite()).collect();
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

fn metrics_json(inputs: &ReportInputs<'_>) -> Result<Value, ReportError> {
    let history = inputs.history;
    let last = history.validations.last();
    let mut terms = BTreeMap::new();
    let mut loss_steps = Vec::new();
    for name in loss_names(history) {
        // A term that a step lacks is NaN there, so that all terms share the list of steps.
        let value = |s: &StepRecord| s.losses.get(name).copied().unwrap_or(f64::NAN);
        let points: Vec<_> = history.steps.iter().map(|s| (s.step as f64, value(s))).collect();
        let thin = thin_out(&points, curves::POINTS_MAX);
        loss_steps = thin.iter().map(|p| p.0).collect();
        terms.insert(name, thin.iter().map(|p| p.1).collect::<Vec<f64>>());
    }
    let classes: BTreeSet<&String> =
        history.validations.iter().flat_map(|v| v.class_dice.keys()).collect();
    let by_class: BTreeMap<&String, Vec<Option<f64>>> = classes
        .into_iter()
        .map(|c| (c, history.validations.iter().map(|v| v.class_dice.get(c).copied()).collect()))
        .collect();
    let best = history.best();
    Ok(json!({
        "format": 1,
        "run": inputs.name,
        "val": {
            "mean_dice": headline_dice(inputs),
            "step": last.map(|v| v.step),
            "per_class": last.map(|v| &v.class_dice),
            "best": best.map(|v| json!({ "step": v.step, "mean_dice": v.mean_dice })),
        },
        "final": serde_json::to_value(inputs.summary)?,
        "loss": { "steps": loss_steps, "terms": terms },
        "validation": {
            "steps": history.validations.iter().map(|v| v.step).collect::<Vec<_>>(),
            "mean_dice": history.validations.iter().map(|v| v.mean_dice).collect::<Vec<_>>(),
            "per_class": by_class,
        },
        "throughput": {
            "images_per_s": mean_of(history, |s| s.images_per_s),
            "data_wait_share": mean_of(history, |s| s.data_wait_share),
        },
        "steps": history.steps.len(),
        "events": serde_json::to_value(&history.events)?,
        "damaged_lines": history.damaged_lines,
        "environment": inputs.environment.iter().cloned().collect::<BTreeMap<_, _>>(),
        "config": inputs.config,
    }))
}

fn metrics_csv(history: &RunHistory) -> String {
    let names = loss_names(history);
    let quoted = |name: &&str| format!("\"loss.{}\"", name.replace('"', "\"\""));
    let mut csv = String::from("step,lr,consistency_weight,images_per_s,data_wait_share");
    names.iter().for_each(|name| csv.push_str(&format!(",{}", quoted(name))));
    csv.push_str(",val.mean_dice\n");
    let validated: BTreeMap<u64, f64> =
        history.validations.iter().map(|v| (v.step, v.mean_dice)).collect();
    for s in &history.steps {
        let fixed = [s.lr, s.consistency_weight, s.images_per_s, s.data_wait_share].map(Some);
        let terms = names.iter().map(|name| s.losses.get(*name).copied());
        let dice = validated.get(&s.step).copied();
        csv.push_str(&s.step.to_string());
        for value in fixed.into_iter().chain(terms).chain([dice]) {
            csv.push(',');
            if let Some(value) = value {
                csv.push_str(&value.to_string());
            }
        }
        csv.push('\n');
    }
    csv
}

#[cfg(test)]
mod tests;
