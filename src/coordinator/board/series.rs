//! Values by step, thinned out while they come: however long the run, there are few points, and the newest.

use std::collections::BTreeMap;

use super::finite;
use crate::page::{Curves, Mark, ValidationPoint};
use crate::proto::TrainerEvent;

/// Points that are kept: when there are more, every other one goes.
const POINTS: usize = 400;
/// Validations that are kept.
const VALIDATIONS: usize = 4000;

/// One step.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Point {
    pub(super) step: u64,
    pub(super) losses: BTreeMap<String, Option<f64>>,
    pub(super) lr: Option<f64>,
    pub(super) consistency: Option<f64>,
    pub(super) images_per_s: Option<f64>,
}

/// Losses and Dice so far.
#[derive(Debug, Default)]
pub(super) struct Series {
    /// Only steps that are multiples of it are kept.
    stride: u64,
    points: Vec<Point>,
    newest: Option<Point>,
    validations: Vec<ValidationPoint>,
}

impl From<Curves> for Series {
    fn from(curves: Curves) -> Self {
        let at = |values: &[Option<f64>], at: usize| values.get(at).copied().flatten();
        let point = |(index, step): (usize, &u64)| Point {
            step: *step,
            losses: curves.losses.iter().map(|(name, v)| (name.clone(), at(v, index))).collect(),
            lr: at(&curves.lr, index),
            consistency: at(&curves.consistency, index),
            images_per_s: at(&curves.images_per_s, index),
        };
        let mut series = Self::default();
        for point in curves.steps.iter().enumerate().map(point).take(2 * POINTS) {
            series.push(point);
        }
        series.validations = curves.validations;
        series.validations.truncate(VALIDATIONS);
        series
    }
}

impl Series {
    /// A step; one that was done before supersedes what came after it then.
    pub(super) fn step(&mut self, event: &TrainerEvent) {
        let TrainerEvent::Step { step, terms, images_per_s, lr, consistency, .. } = event else {
            return;
        };
        self.push(Point {
            step: step.0,
            losses: terms.iter().map(|(name, value)| (name.clone(), finite(*value))).collect(),
            lr: finite(*lr),
            consistency: finite(*consistency),
            images_per_s: finite(*images_per_s),
        });
    }

    fn push(&mut self, point: Point) {
        let keep = self.points.partition_point(|earlier| earlier.step < point.step);
        self.points.truncate(keep);
        self.validations.retain(|validation| validation.step <= point.step);
        if point.step.is_multiple_of(self.stride.max(1)) || self.points.is_empty() {
            self.points.push(point.clone());
        }
        self.newest = Some(point);
        while self.points.len() > POINTS {
            self.stride = self.stride.max(1) * 2;
            let stride = self.stride;
            self.points.retain(|point| point.step.is_multiple_of(stride));
        }
    }

    pub(super) fn validation(&mut self, validation: ValidationPoint) {
        let keep = self.validations.partition_point(|earlier| earlier.step < validation.step);
        self.validations.truncate(keep);
        self.validations.push(validation);
        super::keep_last(&mut self.validations, VALIDATIONS);
    }

    pub(super) fn newest(&self) -> Option<&Point> {
        self.newest.as_ref()
    }

    pub(super) fn last_validation(&self) -> Option<&ValidationPoint> {
        self.validations.last()
    }

    /// The best validation, the first of equals.
    pub(super) fn best(&self) -> Option<Mark> {
        let dice = |validation: &ValidationPoint| validation.mean_dice.unwrap_or(-1.0);
        let best = self.validations.iter().rev().max_by(|a, b| dice(a).total_cmp(&dice(b)))?;
        Some(Mark { step: best.step, mean_dice: best.mean_dice })
    }

    pub(super) fn curves(&self) -> Curves {
        let newest = self
            .newest
            .iter()
            .filter(|newest| self.points.last().is_none_or(|last| last.step < newest.step));
        let points: Vec<&Point> = self.points.iter().chain(newest).collect();
        let mut losses: BTreeMap<String, Vec<Option<f64>>> = BTreeMap::new();
        for name in points.iter().flat_map(|point| point.losses.keys()) {
            if !losses.contains_key(name) {
                let values = points.iter().map(|point| point.losses.get(name).copied().flatten());
                losses.insert(name.clone(), values.collect());
            }
        }
        Curves {
            steps: points.iter().map(|point| point.step).collect(),
            losses,
            lr: points.iter().map(|point| point.lr).collect(),
            consistency: points.iter().map(|point| point.consistency).collect(),
            images_per_s: points.iter().map(|point| point.images_per_s).collect(),
            validations: self.validations.clone(),
        }
    }
}
