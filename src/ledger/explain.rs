//! What may have happened where a fingerprint is not the planned one: a bounded search for a simple story.
//!
//! A sum cannot be undone, but the likely faults are few enough to try: a step in another's place, a sample in
//! another's place, two samples in each other's. Pure.

use super::fingerprint::{Part, slot_key};
use crate::data::{Deal, Draw};
use crate::types::Step;

/// Steps before and after that are tried.
const STEPS: u64 = 64;
/// Slots times samples that are tried.
const TRIES_MAX: u64 = 1 << 24;

/// In words.
pub fn explain(deal: &Deal, step: Step, found: u64) -> String {
    let planned = Part::planned(deal, step).fingerprint;
    if let Some(other) = other_step(deal, step, found) {
        return format!("what is recorded is what step {other} used");
    }
    let draws: Vec<Draw> =
        (0..deal.spec().batch_unlabelled).map(|slot| deal.unlabelled(step, slot)).collect();
    let differs_by = found.wrapping_sub(planned);
    if let Some((slot, stands, wanted)) = replaced(deal, step, &draws, differs_by) {
        return format!("sample {stands} stands in slot {slot}, where sample {wanted} was planned");
    }
    if let Some((a, b)) = exchanged(step, &draws, differs_by) {
        return format!(
            "sample {} in slot {a} and sample {} in slot {b} stand in each other's place",
            draws[b as usize].sample, draws[a as usize].sample
        );
    }
    format!("its samples are not the planned ones: fingerprint {found:016x}, not {planned:016x}")
}

fn other_step(deal: &Deal, step: Step, found: u64) -> Option<Step> {
    let steps = step.0.saturating_sub(STEPS)..=step.0.saturating_add(STEPS);
    // The nearest first: that is the likelier story.
    let mut steps: Vec<u64> = steps.filter(|other| *other != step.0).collect();
    steps.sort_by_key(|other| other.abs_diff(step.0));
    steps.into_iter().map(Step).find(|other| Part::planned(deal, *other).fingerprint == found)
}

/// (slot, what stands there, what was planned).
fn replaced(deal: &Deal, step: Step, draws: &[Draw], differs_by: u64) -> Option<(u32, u64, u64)> {
    let pool = deal.spec().unlabelled.clone();
    let tries = (pool.end - pool.start).saturating_mul(draws.len() as u64);
    if tries > TRIES_MAX {
        return None;
    }
    for (slot, draw) in (0_u32..).zip(draws) {
        let wanted = slot_key(step, slot, *draw).wrapping_add(differs_by);
        let stands =
            pool.clone().find(|&sample| slot_key(step, slot, Draw { sample, ..*draw }) == wanted);
        if let Some(stands) = stands {
            return Some((slot, stands, draw.sample));
        }
    }
    None
}

/// Two slots whose draws were exchanged.
fn exchanged(step: Step, draws: &[Draw], differs_by: u64) -> Option<(u32, u32)> {
    let key = |slot: u32, of: u32| slot_key(step, slot, draws[of as usize]);
    let slots = 0..u32::try_from(draws.len()).ok()?;
    for a in slots.clone() {
        for b in a + 1..slots.end {
            let is = key(a, b).wrapping_add(key(b, a));
            let was = key(a, a).wrapping_add(key(b, b));
            if is.wrapping_sub(was) == differs_by {
                return Some((a, b));
            }
        }
    }
    None
}
