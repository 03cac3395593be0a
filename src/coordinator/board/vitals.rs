//! What a trainer says of itself every second, and what follows from two such sayings: how long its steps take, and on
//! what. Pure.

use std::collections::VecDeque;

use crate::proto::Vitals;

/// Sayings that rates are taken over.
const WINDOW: usize = 12;
/// The phases of a step before it waits for other ranks.
const OWN: [&str; 4] = ["data_wait", "copy_to_device", "forward", "loss"];
/// Whose own part of a step is so much longer than the median, and by so many seconds, is a straggler.
const LAG: f64 = 1.5;
const LAG_S: f64 = 0.02;

/// The last few of one trainer.
#[derive(Debug, Default)]
pub(super) struct Recent {
    said: VecDeque<(f64, Vitals)>,
}

impl Recent {
    /// The trainer says how it does; another process's counts begin anew.
    pub(super) fn push(&mut self, now: f64, vitals: Vitals) {
        if self.newest().is_some_and(|before| before.steps > vitals.steps) {
            self.said.clear();
        }
        self.said.push_back((now, vitals));
        if self.said.len() > WINDOW {
            self.said.pop_front();
        }
    }

    pub(super) fn newest(&self) -> Option<&Vitals> {
        self.said.back().map(|(_, vitals)| vitals)
    }

    /// The oldest and the newest, if steps were taken between them; the first saying alone counts from the start.
    pub(super) fn span(&self) -> Option<(&Vitals, &Vitals, u64)> {
        let (first, last) = (&self.said.front()?.1, &self.said.back()?.1);
        let steps = last.steps.checked_sub(first.steps).filter(|steps| *steps > 0)?;
        Some((first, last, steps))
    }

    /// Seconds that the sayings lie apart.
    pub(super) fn window_s(&self) -> f64 {
        match (self.said.front(), self.said.back()) {
            (Some((from, _)), Some((to, _))) => to - from,
            _ => 0.0,
        }
    }

    /// How long a step takes.
    pub(super) fn step_s(&self) -> Option<f64> {
        let (first, last, steps) = self.span()?;
        Some((last.steps_s - first.steps_s) / steps as f64)
    }

    fn phase_s(&self, phase: &str) -> Option<f64> {
        let (first, last, steps) = self.span()?;
        let of = |vitals: &Vitals| vitals.phases_s.get(phase).copied().unwrap_or_default();
        Some((of(last) - of(first)) / steps as f64)
    }

    /// The part of a step before it waits for others.
    pub(super) fn own_s(&self) -> Option<f64> {
        OWN.iter().map(|phase| self.phase_s(phase)).sum()
    }

    /// A phase's share of a step's time.
    pub(super) fn share(&self, phase: &str) -> Option<f64> {
        let step_s = self.step_s().filter(|s| *s > 0.0)?;
        Some((self.phase_s(phase)? / step_s).clamp(0.0, 1.0))
    }

    /// Whether it holds others up, whose own part is `median`.
    pub(super) fn lags(&self, median: Option<f64>) -> bool {
        let pair = self.own_s().zip(median);
        pair.is_some_and(|(own, median)| own > LAG * median && own - median > LAG_S)
    }
}

/// The middle one; of two, the smaller.
pub(super) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len().checked_sub(1)? / 2).copied()
}
