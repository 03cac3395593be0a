//! What a comparison is made of: every run's figures, and their means over seeds.
//!
//! Pure: numbers in, numbers out. Not here: where the figures come from (`shell`), and how they look
//! (`render`).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// One of the scores that a table shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Metric {
    /// Overlap, `0..=1`.
    Dice,
    /// Overlap, `0..=1`.
    Jaccard,
    /// 95th percentile of the surface distances.
    Hd95,
    /// Mean surface distance, prediction to truth.
    Asd,
    /// Mean surface distance, both ways.
    Assd,
}

impl Metric {
    /// All, in the order of the table's columns.
    pub const ALL: [Self; 5] = [Self::Dice, Self::Jaccard, Self::Hd95, Self::Asd, Self::Assd];

    /// As people write it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Dice => "Dice",
            Self::Jaccard => "Jaccard",
            Self::Hd95 => "HD95",
            Self::Asd => "ASD",
            Self::Assd => "ASSD",
        }
    }

    /// Overlaps are shown in per cent, as the literature does; distances as they are.
    #[must_use]
    pub fn is_overlap(self) -> bool {
        matches!(self, Self::Dice | Self::Jaccard)
    }
}

/// A value for each score.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[allow(missing_docs)] // named by `Metric`
pub struct PerMetric<T> {
    pub dice: T,
    pub jaccard: T,
    pub hd95: T,
    pub asd: T,
    pub assd: T,
}

impl<T> PerMetric<T> {
    /// Makes the value of every score.
    pub fn of(mut make: impl FnMut(Metric) -> T) -> Self {
        Self {
            dice: make(Metric::Dice),
            jaccard: make(Metric::Jaccard),
            hd95: make(Metric::Hd95),
            asd: make(Metric::Asd),
            assd: make(Metric::Assd),
        }
    }

    /// The value of one score.
    pub fn get(&self, metric: Metric) -> &T {
        match metric {
            Metric::Dice => &self.dice,
            Metric::Jaccard => &self.jaccard,
            Metric::Hd95 => &self.hd95,
            Metric::Asd => &self.asd,
            Metric::Assd => &self.assd,
        }
    }
}

/// Scores of a run, over all cases; `None` where nothing defined one.
pub type Scores = PerMetric<Option<f64>>;

/// What `cpcr eval --json` says, as far as a comparison wants it. Scores that it does not know are none.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Evaluation {
    /// Step of the checkpoint that was evaluated.
    pub step: u64,
    /// The figures.
    pub summary: EvaluationSummary,
}

/// Means over cases.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct EvaluationSummary {
    /// What distances are counted in: `voxel` or `mm`.
    pub unit: String,
    /// What an empty mask was worth.
    pub policy: String,
    /// Means over the classes.
    pub mean: Scores,
    /// Each foreground class.
    pub classes: Vec<ClassFigures>,
    /// Predicted masks without a voxel, over cases and classes.
    pub empty_predictions: u64,
    /// The cases; only their number is wanted.
    pub cases: Vec<serde::de::IgnoredAny>,
}

/// A class's figures in one run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClassFigures {
    /// Its name.
    pub name: String,
    /// Means over cases.
    #[serde(flatten)]
    pub scores: Scores,
    /// Predicted masks without a voxel.
    pub empty_predictions: u64,
}

/// One run: a method with a seed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RunFigures {
    /// Where it is.
    pub run: String,
    /// Its method.
    pub method: String,
    /// Its seed.
    pub seed: u64,
    /// Identity of its configuration, seed and method included.
    pub config_sha256: String,
    /// Steps trained.
    pub steps: u64,
    /// Step of the checkpoint that was evaluated.
    pub selected_step: u64,
    /// Seconds from start to end; none where the run was interrupted, or began before the comparison.
    pub wall_s: Option<f64>,
    /// Images per second, mean over the steps that its report holds.
    pub images_per_s: Option<f64>,
    /// Means over cases, then classes.
    pub mean: Scores,
    /// Each foreground class.
    pub classes: Vec<ClassFigures>,
    /// Predicted masks without a voxel, over cases and classes.
    pub empty_predictions: u64,
}

/// A mean over seeds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// The mean.
    pub mean: f64,
    /// Sample standard deviation; none for one seed.
    pub sd: Option<f64>,
}

/// Mean and sample standard deviation. None if a value is missing: a mean over fewer seeds than the
/// other methods have is no comparison.
#[must_use]
pub fn spread(values: impl IntoIterator<Item = Option<f64>>) -> Option<Spread> {
    let values: Vec<f64> = values.into_iter().collect::<Option<_>>()?;
    if values.is_empty() {
        return None;
    }
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    let sd = (values.len() > 1).then(|| (squares / (count - 1.0)).sqrt());
    Some(Spread { mean, sd })
}

/// A method's row.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MethodRow {
    /// The method.
    pub method: String,
    /// Over seeds, of the means over classes.
    pub mean: PerMetric<Option<Spread>>,
    /// This method minus the first one, seed by seed; none for the first itself.
    pub difference: Option<PerMetric<Option<Spread>>>,
    /// Over seeds, for each foreground class.
    pub classes: Vec<ClassRow>,
    /// Predicted masks without a voxel, over seeds, cases and classes.
    pub empty_predictions: u64,
    /// Steps of each run.
    pub steps: Vec<u64>,
    /// Seconds from start to end, over seeds.
    pub wall_s: Option<Spread>,
    /// Images per second, over seeds.
    pub images_per_s: Option<Spread>,
}

/// A class of a method.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ClassRow {
    /// Its name.
    pub name: String,
    /// Over seeds.
    pub scores: PerMetric<Option<Spread>>,
    /// Predicted masks without a voxel, over seeds and cases.
    pub empty_predictions: u64,
}

/// A row for each of `methods`, in that order. Every method has the same seeds.
#[must_use]
pub fn rows(methods: &[String], runs: &[RunFigures]) -> Vec<MethodRow> {
    let of = |method: &str| -> BTreeMap<u64, &RunFigures> {
        runs.iter().filter(|run| run.method == method).map(|run| (run.seed, run)).collect()
    };
    let first = methods.first().map(|method| of(method)).unwrap_or_default();
    let numbered = methods.iter().enumerate();
    numbered
        .map(|(place, method)| {
            let mine = of(method);
            row(method, &mine, (place > 0).then_some(&first))
        })
        .collect()
}

fn row(
    method: &str,
    runs: &BTreeMap<u64, &RunFigures>,
    first: Option<&BTreeMap<u64, &RunFigures>>,
) -> MethodRow {
    let over = |value: &dyn Fn(&RunFigures) -> Option<f64>| spread(runs.values().map(|r| value(r)));
    let difference = first.map(|first| {
        PerMetric::of(|metric| {
            spread(runs.iter().map(|(seed, run)| {
                Some((*run.mean.get(metric))? - (*first.get(seed)?.mean.get(metric))?)
            }))
        })
    });
    let names = runs.values().next().map(|run| run.classes.as_slice()).unwrap_or_default();
    let class = |place: usize, name: &str| ClassRow {
        name: name.to_owned(),
        scores: PerMetric::of(|m| over(&|run| *run.classes.get(place)?.scores.get(m))),
        empty_predictions: runs
            .values()
            .filter_map(|run| Some(run.classes.get(place)?.empty_predictions))
            .sum(),
    };
    MethodRow {
        method: method.to_owned(),
        mean: PerMetric::of(|metric| over(&|run| *run.mean.get(metric))),
        difference,
        classes: names.iter().enumerate().map(|(place, c)| class(place, &c.name)).collect(),
        empty_predictions: runs.values().map(|run| run.empty_predictions).sum(),
        steps: runs.values().map(|run| run.steps).collect(),
        wall_s: over(&|run| run.wall_s),
        images_per_s: over(&|run| run.images_per_s),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A run whose scores follow from its Dice; ASSD is unknown.
    pub fn run(method: &str, seed: u64, dice: f64) -> RunFigures {
        let scores = |dice: f64| Scores {
            dice: Some(dice),
            jaccard: Some(dice / 2.0),
            hd95: Some(10.0 * dice),
            asd: Some(2.0 * dice),
            assd: None,
        };
        let class = |name: &str, dice, empty_predictions| ClassFigures {
            name: name.to_owned(),
            scores: scores(dice),
            empty_predictions,
        };
        RunFigures {
            run: format!("out/runs/{method}-seed{seed}"),
            method: method.to_owned(),
            seed,
            config_sha256: "0123456789abcdef".to_owned(),
            steps: 300,
            selected_step: 200,
            wall_s: (seed != 3).then_some(60.0),
            images_per_s: Some(100.0),
            mean: scores(dice),
            classes: vec![class("RV", dice - 0.1, 2), class("LV", dice + 0.1, 0)],
            empty_predictions: 2,
        }
    }

    #[test]
    fn the_standard_deviation_is_the_samples() {
        let known = [2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0].map(Some);
        let found = spread(known).unwrap();
        assert_eq!(found.mean, 5.0);
        assert!((found.sd.unwrap() - (32.0_f64 / 7.0).sqrt()).abs() < 1e-12);
        assert_eq!(spread([Some(0.5)]), Some(Spread { mean: 0.5, sd: None }));
        assert_eq!(spread([Some(0.5), None]), None);
        assert_eq!(spread([]), None);
    }

    #[test]
    fn methods_keep_their_order_and_differences_are_paired_by_seed() {
        // In another order than the methods and seeds: pairing is by seed, not by place.
        let runs = [
            run("a", 2, 0.6),
            run("b", 1, 0.6),
            run("a", 1, 0.5),
            run("b", 2, 0.8),
            run("a", 3, 0.7),
            run("b", 3, 0.7),
        ];
        let rows = rows(&["b".to_owned(), "a".to_owned()], &runs);
        assert_eq!([&rows[0].method, &rows[1].method], ["b", "a"]);
        let (b, a) = (rows[0].mean.dice.unwrap(), rows[1].mean.dice.unwrap());
        assert!((b.mean - 0.7).abs() < 1e-12 && (b.sd.unwrap() - 0.1).abs() < 1e-12);
        assert!((a.mean - 0.6).abs() < 1e-12);
        assert_eq!(rows[0].difference, None);
        // -0.1, -0.2 and 0: their own deviation, not that of the two means.
        let dice = rows[1].difference.unwrap().dice.unwrap();
        assert!((dice.mean + 0.1).abs() < 1e-12, "{dice:?}");
        assert!((dice.sd.unwrap() - 0.1).abs() < 1e-12, "{dice:?}");
        assert_eq!(rows[1].difference.unwrap().assd, None);
        assert_eq!((rows[0].empty_predictions, rows[0].classes[0].empty_predictions), (6, 6));
        assert!((rows[1].classes[1].scores.dice.unwrap().mean - 0.7).abs() < 1e-12);
        // One of the three was interrupted.
        assert_eq!(rows[0].wall_s, None);
    }

    #[test]
    fn an_evaluation_is_read_with_and_without_scores_that_came_later() {
        let class = r#"{"class":1,"name":"RV","dice":0.5,"jaccard":0.4,"hd95":null,"asd":1.5,ASSD"empty_predictions":1,"empty_truths":0}"#;
        let read = |assd: &str| {
            let class = class.replace("ASSD", assd);
            let text = format!(
                r#"{{"run":"r","step":20,"split":"val","summary":{{"unit":"voxel","policy":"zero",
                "mean":{{"dice":0.5,"jaccard":0.4,"hd95":3.0,"asd":1.5}},
                "classes":[{class}],"empty_predictions":1,"cases":[{{"case":"a","classes":[]}}]}}}}"#
            );
            serde_json::from_str::<Evaluation>(&text).unwrap()
        };
        let without = read("");
        assert_eq!((without.step, without.summary.cases.len()), (20, 1));
        let scores = &without.summary.classes[0].scores;
        assert_eq!((scores.dice, scores.hd95, scores.assd), (Some(0.5), None, None));
        assert_eq!(read(r#""assd":2.5,"#).summary.classes[0].scores.assd, Some(2.5));
    }
}
