//! The comparison as Markdown for people and as CSV for spreadsheets; its JSON is the type itself.
//!
//! Pure. Dice and Jaccard are shown in per cent, as the literature has them; the JSON has fractions.

use serde::Serialize;

use super::plan::{Mode, Selection};
use super::scores::{MethodRow, Metric, PerMetric, RunFigures, Spread};
use crate::config::RunConfig;

/// Everything that a comparison found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// Format number.
    pub format: u32,
    /// What the methods have in common.
    pub mode: Mode,
    /// Which checkpoint of each run was evaluated.
    pub selection: Selection,
    /// On which volumes: `val` or `test`.
    pub split: String,
    /// How many they are.
    pub cases: usize,
    /// What distances are counted in.
    pub unit: String,
    /// What an empty mask was worth.
    pub policy: String,
    /// The dataset.
    pub data: String,
    /// SHA-256 of its manifest.
    pub dataset_sha256: String,
    /// The seeds, as given.
    pub seeds: Vec<u64>,
    /// Of each method, as given.
    pub budgets: Vec<Budget>,
    /// A row for each method, as given.
    pub methods: Vec<MethodRow>,
    /// Every single run.
    pub runs: Vec<RunFigures>,
}

/// What a method was given to train with.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Budget {
    /// The method.
    pub method: String,
    /// The preset or file that the settings are from; `defaults` without one.
    pub config: String,
    /// Optimiser steps.
    pub iterations: u64,
    /// Labelled samples a step.
    pub batch_labelled: u32,
    /// Unlabelled samples a step.
    pub batch_unlabelled: u32,
    /// Labelled patients at most.
    pub labelled_patients: u32,
    /// Side of the images in pixels.
    pub patch_size: u32,
    /// Steps between validations, among which the best is chosen.
    pub validate_every: u64,
    /// Workers.
    pub nodes: u32,
}

impl Budget {
    /// What a configuration grants.
    #[must_use]
    pub fn of(method: &str, source: Option<&str>, nodes: u32, config: &RunConfig) -> Self {
        Self {
            method: method.to_owned(),
            config: source.unwrap_or("defaults").to_owned(),
            iterations: config.train.iterations,
            batch_labelled: config.batch.labelled,
            batch_unlabelled: config.batch.unlabelled,
            labelled_patients: config.data.labelled,
            patch_size: config.patch_size,
            validate_every: config.validate.every,
            nodes,
        }
    }

    fn sentence(&self) -> String {
        format!(
            "`{}`: {} iterations of {} labelled + {} unlabelled images of {} pixels, {} labelled patients, validation every {} iterations, {} workers",
            self.config,
            self.iterations,
            self.batch_labelled,
            self.batch_unlabelled,
            self.patch_size,
            self.labelled_patients,
            self.validate_every,
            self.nodes,
        )
    }
}

impl Comparison {
    /// Whether the volumes that chose the checkpoints are those that scored them.
    #[must_use]
    pub fn judges_its_own_choice(&self) -> bool {
        self.split == "val" && self.selection == Selection::Best
    }

    /// The scores that any run has: an older evaluation knows no ASSD.
    fn metrics(&self) -> Vec<Metric> {
        let known = |metric: &Metric| self.runs.iter().any(|run| run.mean.get(*metric).is_some());
        Metric::ALL.into_iter().filter(known).collect()
    }

    fn heading(&self, metric: Metric) -> String {
        let unit = if metric.is_overlap() { "%" } else { &self.unit };
        format!("{} {unit}", metric.name())
    }
}

/// The warning of [`Comparison::judges_its_own_choice`].
pub const SHARED_SPLIT: &str = "selection and evaluation share the val split: these figures flatter every method; give a dataset with labelled \
     test volumes, or --select last";

/// The comparison as a page of Markdown.
#[must_use]
pub fn markdown(c: &Comparison) -> String {
    let metrics = c.metrics();
    let sections = [
        format!("# Comparison of {} methods, {} seeds\n\n", c.methods.len(), c.seeds.len()),
        caption(c),
        "\n## Mean over classes\n\n".to_owned(),
        overall(c, &metrics),
        differences(c, &metrics),
        "\n## By class\n\n".to_owned(),
        by_class(c, &metrics),
        "\n## Every run\n\n".to_owned(),
        every_run(c, &metrics),
    ];
    sections.concat()
}

/// What the figures mean.
fn caption(c: &Comparison) -> String {
    let mut lines = match c.mode {
        Mode::IdenticalBudget => vec![
            "Identical budget: one configuration for all, only `method` and `train.seed` differ.\n"
                .to_owned(),
        ],
        Mode::AsPublished => vec![
            "As published: each method with its own preset; the budgets below need not be equal.\n"
                .to_owned(),
        ],
    };
    lines.extend(match c.mode {
        Mode::IdenticalBudget => {
            c.budgets.iter().take(1).map(|b| format!("- {}", b.sentence())).collect::<Vec<_>>()
        }
        Mode::AsPublished => {
            c.budgets.iter().map(|b| format!("- {}: {}", b.method, b.sentence())).collect()
        }
    });
    let seeds: Vec<String> = c.seeds.iter().map(u64::to_string).collect();
    let checkpoint = match c.selection {
        Selection::Best => "the checkpoint of the best mean Dice in validation",
        Selection::Last => "the last checkpoint",
    };
    let manifest = c.dataset_sha256.get(..12).unwrap_or_default();
    lines.extend([
        format!("- seeds {}; mean ± sample standard deviation over them", seeds.join(", ")),
        format!(
            "- {checkpoint} of each run, scored on the {} volumes of the {} split",
            c.cases, c.split
        ),
        format!("- distances in {}; what an empty mask is worth: {}", c.unit, c.policy),
        format!("- data: {} (manifest {manifest})", c.data),
    ]);
    if c.judges_its_own_choice() {
        lines.push(format!("\n**Note: {SHARED_SPLIT}.**"));
    }
    lines.join("\n") + "\n"
}

fn heads(c: &Comparison, metrics: &[Metric]) -> Vec<String> {
    metrics.iter().map(|metric| c.heading(*metric)).collect()
}

fn overall(c: &Comparison, metrics: &[Metric]) -> String {
    let tail = ["empty masks", "steps", "wall s", "images/s"];
    let mut rows = vec![row("method", heads(c, metrics), tail.map(str::to_owned))];
    rows.extend(c.methods.iter().map(|m| {
        let speed = [m.wall_s, m.images_per_s];
        let [wall, images] = speed.map(|value| whole(value.map(|spread| spread.mean)));
        let tail = [m.empty_predictions.to_string(), steps(&m.steps), wall, images];
        row(&m.method, cells(metrics, &m.mean, false), tail)
    }));
    table(&rows)
}

/// Nothing where there is one method.
fn differences(c: &Comparison, metrics: &[Metric]) -> String {
    let Some(first) = c.methods.first().filter(|_| c.methods.len() > 1) else {
        return String::new();
    };
    let mut rows = vec![row("method", heads(c, metrics), [])];
    rows.extend(
        c.methods
            .iter()
            .filter_map(|m| Some(row(&m.method, cells(metrics, m.difference.as_ref()?, true), []))),
    );
    format!("\n## Difference to {}, paired by seed\n\n{}", first.method, table(&rows))
}

fn by_class(c: &Comparison, metrics: &[Metric]) -> String {
    let mut rows = vec![row("method, class", heads(c, metrics), ["empty masks".to_owned()])];
    for m in &c.methods {
        rows.extend(m.classes.iter().map(|class| {
            let name = format!("{}, {}", m.method, class.name);
            let empty = class.empty_predictions.to_string();
            row(&name, cells(metrics, &class.scores, false), [empty])
        }));
    }
    table(&rows)
}

fn every_run(c: &Comparison, metrics: &[Metric]) -> String {
    let tail = ["empty masks", "checkpoint", "steps", "wall s", "configuration"];
    let mut rows = vec![row("run", heads(c, metrics), tail.map(str::to_owned))];
    rows.extend(c.runs.iter().map(|run| {
        let scores = metrics.iter().map(|m| number(*m, *run.mean.get(*m), false)).collect();
        let tail = [
            run.empty_predictions.to_string(),
            run.selected_step.to_string(),
            run.steps.to_string(),
            whole(run.wall_s),
            run.config_sha256.chars().take(12).collect(),
        ];
        row(&format!("{}, seed {}", run.method, run.seed), scores, tail)
    }));
    table(&rows)
}

/// Steps that all runs share, or from the fewest to the most.
fn steps(steps: &[u64]) -> String {
    match (steps.iter().min(), steps.iter().max()) {
        (Some(min), Some(max)) if min == max => min.to_string(),
        (Some(min), Some(max)) => format!("{min} to {max}"),
        _ => "-".to_owned(),
    }
}

fn row<const N: usize>(name: &str, scores: Vec<String>, tail: [String; N]) -> Vec<String> {
    std::iter::once(name.to_owned()).chain(scores).chain(tail).collect()
}

fn cells(metrics: &[Metric], of: &PerMetric<Option<Spread>>, signed: bool) -> Vec<String> {
    let cell = |metric: &Metric| {
        let Some(spread) = of.get(*metric) else { return "-".to_owned() };
        let sd = spread.sd.map_or_else(|| "-".to_owned(), |sd| number(*metric, Some(sd), false));
        format!("{} ± {sd}", number(*metric, Some(spread.mean), signed))
    };
    metrics.iter().map(cell).collect()
}

/// A score for people: two decimals, overlaps in per cent.
fn number(metric: Metric, value: Option<f64>, signed: bool) -> String {
    let Some(value) = value else { return "-".to_owned() };
    let shown = if metric.is_overlap() { value * 100.0 } else { value };
    if signed { format!("{shown:+.2}") } else { format!("{shown:.2}") }
}

fn whole(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.0}"))
}

/// A table whose columns line up in plain text too; the first row is the head.
fn table(rows: &[Vec<String>]) -> String {
    let mut page = String::new();
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0).max(3)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    for (place, row) in rows.iter().enumerate() {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, width))| {
            // `|` would end the cell.
            let cell = cell.replace('|', "/");
            if column == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
        });
        page.push_str(&format!("| {} |\n", cells.collect::<Vec<_>>().join(" | ")));
        if place == 0 {
            let rule = widths.iter().enumerate().map(|(column, width)| {
                if column == 0 { "-".repeat(*width) } else { format!("{}:", "-".repeat(width - 1)) }
            });
            page.push_str(&format!("| {} |\n", rule.collect::<Vec<_>>().join(" | ")));
        }
    }
    page
}

/// A line for each method and class, then the mean over classes; the same again for the differences.
#[must_use]
pub fn csv(c: &Comparison) -> String {
    let quoted = |text: &str| format!("\"{}\"", text.replace('"', "\"\""));
    let mut head =
        vec!["method".to_owned(), "class".to_owned(), "what".to_owned(), "runs".to_owned()];
    for metric in Metric::ALL {
        let unit = if metric.is_overlap() { "percent" } else { &c.unit };
        let name = format!("{}_{unit}", metric.name().to_lowercase());
        head.extend([format!("{name}_mean"), format!("{name}_sd")]);
    }
    head.push("empty_masks".to_owned());
    let mut text = head.join(",") + "\n";
    let mut line = |m: &MethodRow,
                    class: &str,
                    what: &str,
                    of: &PerMetric<Option<Spread>>,
                    empty: Option<u64>| {
        let mut cells =
            vec![quoted(&m.method), quoted(class), what.to_owned(), m.steps.len().to_string()];
        for metric in Metric::ALL {
            let scale = if metric.is_overlap() { 100.0 } else { 1.0 };
            let shown =
                |value: Option<f64>| value.map_or_else(String::new, |v| (v * scale).to_string());
            cells.extend([
                shown(of.get(metric).map(|s| s.mean)),
                shown(of.get(metric).and_then(|s| s.sd)),
            ]);
        }
        cells.push(empty.map_or_else(String::new, |empty| empty.to_string()));
        text.push_str(&(cells.join(",") + "\n"));
    };
    for m in &c.methods {
        for class in &m.classes {
            line(m, &class.name, "score", &class.scores, Some(class.empty_predictions));
        }
        line(m, "mean", "score", &m.mean, Some(m.empty_predictions));
    }
    for m in &c.methods {
        if let Some(difference) = &m.difference {
            line(m, "mean", "difference", difference, None);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::scores::{rows, tests::run};
    use super::*;

    fn comparison(seeds: &[u64]) -> Comparison {
        let methods = ["cpcr", "urpc"].map(str::to_owned);
        let runs: Vec<RunFigures> = seeds
            .iter()
            .flat_map(|seed| {
                let shift = *seed as f64 / 100.0;
                [run("cpcr", *seed, 0.8 + shift), run("urpc", *seed, 0.7 - shift)]
            })
            .collect();
        let config = RunConfig::default();
        Comparison {
            format: 1,
            mode: Mode::IdenticalBudget,
            selection: Selection::Best,
            split: "test".to_owned(),
            cases: 20,
            unit: "voxel".to_owned(),
            policy: "zero".to_owned(),
            data: "s3://bucket/data".to_owned(),
            dataset_sha256: "fedcba9876543210".to_owned(),
            seeds: seeds.to_vec(),
            budgets: methods.each_ref().map(|m| Budget::of(m, Some("demo"), 2, &config)).to_vec(),
            methods: rows(&methods, &runs),
            runs,
        }
    }

    #[test]
    fn the_table_has_known_numbers_in_columns() {
        let page = markdown(&comparison(&[1, 2]));
        for line in [
            "| method |       Dice % |    Jaccard % |  HD95 voxel |   ASD voxel | empty masks | steps | wall s | images/s |",
            "| cpcr   | 81.50 ± 0.71 | 40.75 ± 0.35 | 8.15 ± 0.07 | 1.63 ± 0.01 |           4 |   300 |     60 |      100 |",
            "| urpc   | 68.50 ± 0.71 | 34.25 ± 0.35 | 6.85 ± 0.07 | 1.37 ± 0.01 |           4 |   300 |     60 |      100 |",
            // -12 and -14 points.
            "| urpc   | -13.00 ± 1.41 | -6.50 ± 0.71 | -1.30 ± 0.14 | -0.26 ± 0.03 |",
            "| cpcr, RV      | 71.50 ± 0.71 | 35.75 ± 0.35 | 7.15 ± 0.07 | 1.43 ± 0.01 |           4 |",
            "| cpcr, seed 1 |  81.00 |     40.50 |       8.10 |      1.62 |           2 |        200 |   300 |     60 |  0123456789ab |",
            "- `demo`: 50000 iterations of 12 labelled + 12 unlabelled images of 256 pixels, 7 labelled patients, validation every 200 iterations, 2 workers",
        ] {
            assert!(page.contains(&format!("{line}\n")), "{line}\nis missing of\n{page}");
        }
        assert!(!page.contains("ASSD") && !page.contains("Note"), "{page}");
    }

    #[test]
    fn one_seed_has_no_deviation_and_an_interrupted_run_no_time() {
        let page = markdown(&comparison(&[3]));
        assert!(page.contains("| cpcr   | 83.00 ± - |"), "{page}");
        assert!(page.contains("|   300 |      - |      100 |"), "{page}");
    }

    #[test]
    fn a_page_says_which_mode_and_when_it_judges_its_own_choice() {
        let mut c = comparison(&[1]);
        c.split = "val".to_owned();
        assert!(markdown(&c).contains("**Note: selection and evaluation share the val split"));
        c.selection = Selection::Last;
        assert!(!markdown(&c).contains("Note"));
        assert!(markdown(&c).contains("Identical budget"));
        c.mode = Mode::AsPublished;
        let page = markdown(&c);
        assert!(page.contains("As published") && page.contains("- urpc: `demo`: 50000"), "{page}");
    }

    #[test]
    fn a_spreadsheet_has_a_line_for_each_method_class_and_difference() {
        let text = csv(&comparison(&[1, 2]));
        assert_eq!(text.lines().count(), 1 + 2 * 3 + 1);
        assert!(text.starts_with(
            "method,class,what,runs,dice_percent_mean,dice_percent_sd,jaccard_percent_mean,"
        ));
        assert!(text.lines().all(|line| line.split(',').count() == 15), "{text}");
        let last = text.lines().last().unwrap();
        assert!(
            last.starts_with("\"urpc\",\"mean\",difference,2,-1") && last.ends_with(",,,"),
            "{last}"
        );
    }
}
