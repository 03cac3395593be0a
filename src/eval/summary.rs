//! Means over cases and classes, and the joining of what several workers measured.
//!
//! First the mean over volumes, then over classes: the order the literature uses, which matters
//! once an undefined score is left out. Cases are sorted by name, so a summary does not depend on
//! which worker scored what.

use serde::{Deserialize, Serialize};

use super::metrics::EmptyPolicy;
use super::volumes::{CaseScores, DistanceUnit, EvalSettings};

/// Means of the five scores; `None` where no case defined one.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Means {
    /// Mean Dice, `0..=1`.
    pub dice: Option<f64>,
    /// Mean Jaccard, `0..=1`.
    pub jaccard: Option<f64>,
    /// Mean HD95, in the summary's unit.
    pub hd95: Option<f64>,
    /// Mean ASD, in the summary's unit.
    pub asd: Option<f64>,
    /// Mean ASSD, in the summary's unit.
    #[serde(default)]
    pub assd: Option<f64>,
}

/// One row of the per-class table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClassSummary {
    /// Its number in the label maps.
    pub class: u8,
    /// Its name.
    pub name: String,
    /// Means over the cases.
    #[serde(flatten)]
    pub means: Means,
    /// In how many cases nothing of this class was predicted.
    pub empty_predictions: usize,
    /// In how many cases there was nothing of this class.
    pub empty_truths: usize,
}

/// Everything that an evaluation found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// What distances are counted in.
    pub unit: DistanceUnit,
    /// What empty masks were worth.
    pub policy: EmptyPolicy,
    /// Means over the classes below.
    pub mean: Means,
    /// One row per foreground class.
    pub classes: Vec<ClassSummary>,
    /// Empty predictions, over all cases and classes.
    pub empty_predictions: usize,
    /// The cases, sorted by name.
    pub cases: Vec<CaseScores>,
}

/// Why scores could not be joined.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SummaryError {
    /// Two parts hold the same case.
    #[error("case {0} was scored twice")]
    DuplicateCase(String),
    /// A case has scores for another number of classes.
    #[error("case {case} has scores of {actual} classes, expected {expected}")]
    Classes {
        /// Name of the case.
        case: String,
        /// Foreground classes named.
        expected: usize,
        /// Foreground classes scored.
        actual: usize,
    },
}

impl Summary {
    /// Joins the disjoint cases that workers scored; `names` are those of the foreground classes.
    ///
    /// # Errors
    /// When a case occurs twice, or its scores don't fit the names.
    pub fn of(
        parts: impl IntoIterator<Item = Vec<CaseScores>>,
        names: &[String],
        settings: &EvalSettings,
    ) -> Result<Self, SummaryError> {
        let mut cases: Vec<CaseScores> = parts.into_iter().flatten().collect();
        cases.sort_by(|a, b| a.case.cmp(&b.case));
        if let Some(pair) = cases.windows(2).find(|pair| pair[0].case == pair[1].case) {
            return Err(SummaryError::DuplicateCase(pair[0].case.clone()));
        }
        if let Some(odd) = cases.iter().find(|case| case.classes.len() != names.len()) {
            return Err(SummaryError::Classes {
                case: odd.case.clone(),
                expected: names.len(),
                actual: odd.classes.len(),
            });
        }
        let classes: Vec<ClassSummary> =
            names.iter().enumerate().map(|(i, name)| class_summary(&cases, i, name)).collect();
        Ok(Self {
            unit: settings.unit,
            policy: settings.policy,
            mean: Means {
                dice: mean(classes.iter().map(|c| c.means.dice)),
                jaccard: mean(classes.iter().map(|c| c.means.jaccard)),
                hd95: mean(classes.iter().map(|c| c.means.hd95)),
                asd: mean(classes.iter().map(|c| c.means.asd)),
                assd: mean(classes.iter().map(|c| c.means.assd)),
            },
            empty_predictions: classes.iter().map(|c| c.empty_predictions).sum(),
            classes,
            cases,
        })
    }
}

fn class_summary(cases: &[CaseScores], index: usize, name: &str) -> ClassSummary {
    let scores = || cases.iter().map(|case| &case.classes[index]);
    ClassSummary {
        class: u8::try_from(index + 1).unwrap_or(u8::MAX),
        name: name.to_owned(),
        means: Means {
            dice: mean(scores().map(|s| s.dice)),
            jaccard: mean(scores().map(|s| s.jaccard)),
            hd95: mean(scores().map(|s| s.hd95)),
            asd: mean(scores().map(|s| s.asd)),
            assd: mean(scores().map(|s| s.assd)),
        },
        empty_predictions: scores().filter(|s| s.empty.prediction_is_empty()).count(),
        empty_truths: scores().filter(|s| s.empty.truth_is_empty()).count(),
    }
}

/// The mean of what is defined; `None` if nothing is.
fn mean(values: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    let (sum, count) =
        values.flatten().fold((0.0, 0_u32), |(sum, count), value| (sum + value, count + 1));
    (count > 0).then(|| sum / f64::from(count))
}

#[cfg(test)]
mod tests {
    use super::super::metrics::{ClassScores, Emptiness};
    use super::*;

    fn case(name: &str, dices: [Option<f64>; 2]) -> CaseScores {
        let classes = dices
            .map(|dice| ClassScores {
                dice,
                jaccard: dice,
                hd95: dice,
                asd: dice,
                assd: dice,
                empty: if dice.is_some() { Emptiness::Neither } else { Emptiness::Both },
            })
            .to_vec();
        CaseScores { case: name.into(), classes }
    }

    fn settings() -> EvalSettings {
        EvalSettings {
            patch: (8, 8),
            classes: 3,
            batch: 1,
            unit: DistanceUnit::Voxel,
            policy: EmptyPolicy::Exclude,
        }
    }

    #[test]
    fn volumes_come_first_then_classes_whoever_scored_them() {
        let names = ["RV".to_owned(), "MYO".to_owned()];
        let (a, b, c) = (
            case("a", [Some(1.0), Some(0.5)]),
            case("b", [Some(0.0), None]),
            case("c", [Some(0.5), None]),
        );
        let one = Summary::of([vec![a.clone(), b.clone(), c.clone()]], &names, &settings());
        let two = Summary::of([vec![c], vec![], vec![b, a]], &names, &settings());
        assert_eq!(one, two);
        let summary = one.unwrap();
        assert_eq!(summary.classes[0].means.dice, Some(0.5));
        assert_eq!(summary.classes[1].means.dice, Some(0.5));
        assert_eq!(summary.mean.dice, Some(0.5));
        assert_eq!((summary.empty_predictions, summary.classes[1].empty_truths), (2, 2));
    }

    #[test]
    fn the_same_case_from_two_workers_is_refused() {
        let names = ["RV".to_owned(), "MYO".to_owned()];
        let again = || vec![case("a", [None, None])];
        assert_eq!(
            Summary::of([again(), again()], &names, &settings()),
            Err(SummaryError::DuplicateCase("a".into()))
        );
    }
}
