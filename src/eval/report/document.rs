//! From what was recorded to the page's document: the report is the live page, with this inside.

use std::collections::{BTreeMap, BTreeSet};

use base64::prelude::{BASE64_STANDARD, Engine};

use super::table::{policy, unit};
use super::{ReportInputs, ReportOverlay, RunEvent, RunHistory, headline_dice, mean_of};
use crate::eval::summary::{Means, Summary};
use crate::page::{
    Case, ClassScore, Curves, Document, Mark, Note, Overlay, Report, Run, Scores, ValidationPoint,
    thin,
};

/// Most points of a curve.
const POINTS_MAX: usize = 400;

/// The report's document: what the coordinator knew of the run, with what only a trainer knows.
pub(super) fn document(inputs: &ReportInputs<'_>) -> Document {
    let history = inputs.history;
    let mut document = inputs.seen.cloned().unwrap_or_default();
    document.format = 1;
    document.live = false;
    document.run = Run {
        name: inputs.name.to_owned(),
        url: inputs.run_url.to_owned(),
        data: inputs.data_url.to_owned(),
        method: inputs.method.to_owned(),
        classes: inputs.class_names.to_vec(),
        steps: inputs.steps,
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    document.state.phase = "finished".to_owned();
    document.state.step = history.steps.last().map_or(0, |step| step.step);
    document.state.mean_dice = finite(headline_dice(inputs));
    document.state.best =
        history.best().map(|v| Mark { step: v.step, mean_dice: finite(Some(v.mean_dice)) });
    document.state.images_per_s = mean_of(history, |s| s.images_per_s);
    document.state.data_wait = mean_of(history, |s| s.data_wait_share);
    document.state.eta_s = None;
    document.curves = curves(history);
    document.overlays = pictures(inputs.overlays, document.state.step);
    // Those of a run that no coordinator has told of.
    if document.notes.is_empty() {
        document.notes = history.events.iter().map(note).collect();
    }
    document.report = Some(Report {
        config: inputs.config.to_owned(),
        environment: inputs.environment.to_vec(),
        commands: commands(inputs.run_url, inputs.data_url),
        scores: inputs.summary.map(|summary| scores(summary, document.state.step)),
        cases: inputs.summary.map(cases).unwrap_or_default(),
        best: pictures(inputs.best, document.state.step),
        worst: pictures(inputs.worst, document.state.step),
        damaged_lines: history.damaged_lines,
    });
    document
}

fn finite(value: Option<f64>) -> Option<f64> {
    value.filter(|value| value.is_finite())
}

/// Thinned out; what a page draws. `metrics.csv` has every step.
pub(super) fn curves(history: &RunHistory) -> Curves {
    let steps = &history.steps;
    let kept: Vec<usize> = thin(steps.len(), POINTS_MAX).collect();
    let of = |what: &dyn Fn(usize) -> Option<f64>| -> Vec<Option<f64>> {
        kept.iter().map(|at| finite(what(*at))).collect()
    };
    let names: BTreeSet<&String> = steps.iter().flat_map(|s| s.losses.keys()).collect();
    let loss = |name: &String| of(&|at| steps[at].losses.get(name).copied());
    Curves {
        steps: kept.iter().map(|at| steps[*at].step).collect(),
        losses: names.into_iter().map(|name| (name.clone(), loss(name))).collect(),
        lr: of(&|at| Some(steps[at].lr)),
        consistency: of(&|at| Some(steps[at].consistency_weight)),
        images_per_s: of(&|at| Some(steps[at].images_per_s)),
        validations: history
            .validations
            .iter()
            .map(|v| ValidationPoint {
                step: v.step,
                mean_dice: finite(Some(v.mean_dice)),
                classes: by_name(v.class_dice.iter().map(|(name, dice)| (name, Some(*dice)))),
            })
            .collect(),
    }
}

fn by_name<'a>(
    values: impl Iterator<Item = (&'a String, Option<f64>)>,
) -> BTreeMap<String, Option<f64>> {
    values.map(|(name, value)| (name.clone(), finite(value))).collect()
}

fn pictures(overlays: &[ReportOverlay], step: u64) -> Vec<Overlay> {
    let picture = |overlay: &ReportOverlay| Overlay {
        step,
        caption: overlay.caption.clone(),
        src: format!("data:image/png;base64,{}", BASE64_STANDARD.encode(&overlay.png)),
    };
    overlays.iter().map(picture).collect()
}

fn note(event: &RunEvent) -> Note {
    let what = match event {
        RunEvent::Resumed { world, .. } => format!("resumed with {world} trainers"),
        RunEvent::ProcessLost { detail, .. } => format!("process lost: {detail}"),
        RunEvent::Note { detail, .. } => detail.clone(),
    };
    Note { at: 0.0, text: format!("step {}: {what}", event.step()) }
}

fn row(name: &str, means: &Means, empty: usize) -> ClassScore {
    ClassScore {
        name: name.to_owned(),
        dice: finite(means.dice),
        jaccard: finite(means.jaccard),
        hd95: finite(means.hd95),
        asd: finite(means.asd),
        assd: finite(means.assd),
        empty,
    }
}

fn scores(summary: &Summary, step: u64) -> Scores {
    Scores {
        unit: unit(summary).to_owned(),
        policy: format!("the validation split at step {step}; {}", policy(summary)),
        volumes: summary.cases.len(),
        classes: summary
            .classes
            .iter()
            .map(|c| row(&c.name, &c.means, c.empty_predictions))
            .collect(),
        mean: row("", &summary.mean, summary.empty_predictions),
    }
}

fn cases(summary: &Summary) -> Vec<Case> {
    let names = || summary.classes.iter().map(|class| &class.name);
    let case = |case: &crate::eval::CaseScores| Case {
        case: case.case.clone(),
        mean: case.mean_dice(),
        dice: by_name(names().zip(case.classes.iter().map(|class| class.dice))),
    };
    summary.cases.iter().map(case).collect()
}

/// A word of a shell command, quoted if it must be.
fn shell(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:@%+=,".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

fn commands(run: &str, data: &str) -> Vec<(String, String)> {
    let (run, data) = (shell(run), shell(data));
    [
        ("Resume it", format!("cpcr-launch --run {run} --data {data} --resume auto")),
        (
            "Evaluate it",
            format!("cpcr eval --run {run} --data {data} --split test --out scores.json"),
        ),
        ("See its checkpoints", format!("cpcr checkpoints ls {run}")),
        (
            "Segment new images",
            format!("cpcr predict --run {run} --data {data} --step best --in IMAGES --out LABELS"),
        ),
    ]
    .map(|(what, command)| (what.to_owned(), command))
    .to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_can_be_pasted() {
        assert_eq!(shell("s3://bucket/run-1"), "s3://bucket/run-1");
        assert_eq!(shell("./my runs/it's"), "'./my runs/it'\\''s'");
    }
}
