//! Which checkpoints stay: a pure plan, and its careful execution.
//!
//! Order is everything: nothing is removed before a newer checkpoint has been read back and
//! verified, and a manifest goes before its objects, so that at every instant each manifest that
//! can be seen points to objects that are there.

use std::collections::BTreeSet;

use super::error::CheckpointError;
use super::manifest::{Manifest, manifest_path, parse_step, step_folder};
use super::reader::{latest, read_manifest, steps_down};
use crate::store::{Store, is_upload_note};
use crate::types::Step;

/// How many checkpoints stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// The newest so many; at least one stays whatever this says.
    pub keep_last: usize,
    /// Those whose step is a multiple of this; none where it is 0.
    pub keep_every: u64,
    /// So many of those that validated best.
    pub keep_best: usize,
}

/// The steps to remove, oldest first.
///
/// `verified` is the newest step known to be whole. It and everything newer stay (the newer are
/// damaged, or just being written), and of the others those that `retention` says. `best` has the steps that were
/// validated, the best first; those without a checkpoint do not count.
#[must_use]
pub fn plan(
    steps: &BTreeSet<Step>,
    verified: Step,
    best: &[Step],
    retention: Retention,
) -> Vec<Step> {
    let there = best.iter().filter(|step| steps.contains(step));
    let best: BTreeSet<&Step> = there.take(retention.keep_best).collect();
    let is_landmark =
        |step: Step| retention.keep_every > 0 && step.0.is_multiple_of(retention.keep_every);
    let mut kept = 0;
    let mut remove: Vec<Step> = steps
        .range(..=verified)
        .rev()
        .filter(|&&step| {
            kept += 1;
            kept > retention.keep_last.max(1) && !best.contains(&step) && !is_landmark(step)
        })
        .copied()
        .collect();
    remove.reverse();
    remove
}

/// What [`retain`] has done.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Retained {
    /// The newest whole checkpoint, read back.
    pub verified: Option<Step>,
    /// Those that are gone.
    pub removed: Vec<Step>,
}

/// Carries out the plan and clears what unfinished attempts left behind; says what was removed.
///
/// For the run's one writer: an attempt of a step older than the newest whole checkpoint is taken
/// for abandoned, and a second live writer could lose its objects (its manifest would then be
/// reported as damaged, not obeyed).
pub async fn retain(
    run: &Store,
    retention: Retention,
    best: &[Step],
) -> Result<Retained, CheckpointError> {
    let Some(newest) = latest(run).await? else { return Ok(Retained::default()) };
    let steps: BTreeSet<Step> = steps_down(run).await?.into_iter().collect();
    let removed = plan(&steps, newest.step, best, retention);
    for &step in &removed {
        run.delete(&manifest_path(step)).await?;
        for object in run.list(&step_folder(step)).await? {
            clear(run, &object.path).await?;
        }
    }
    clear_orphans(run, &newest).await?;
    Ok(Retained { verified: Some(newest.step), removed })
}

/// Removes objects that no manifest names, in folders of steps up to `newest`.
async fn clear_orphans(run: &Store, newest: &Manifest) -> Result<(), CheckpointError> {
    // Manifests are listed with the objects, so an object seen here is older than that answer.
    let objects = run.list("checkpoints").await?;
    let mut attempt_of = std::collections::BTreeMap::new();
    for object in &objects {
        let Some(step) = parse_step(&object.path) else { continue };
        if step > newest.step || object.path != manifest_path(step) {
            continue;
        }
        // A manifest that cannot be read names nothing, but its objects are evidence: they stay.
        let attempt = match read_manifest(run, step).await {
            Ok(manifest) => Some(manifest.attempt_folder()),
            Err(CheckpointError::Store(error)) => return Err(error.into()),
            Err(_) => None,
        };
        attempt_of.insert(step, attempt);
    }
    for object in objects {
        let Some(step) = parse_step(&object.path) else { continue };
        let orphan = match attempt_of.get(&step) {
            Some(Some(attempt)) => {
                object.path != manifest_path(step)
                    && !object.path.starts_with(&format!("{attempt}/"))
            }
            Some(None) => false,
            None => step < newest.step,
        };
        if orphan {
            tracing::debug!(path = %object.path, "removing what an unfinished attempt left");
            clear(run, &object.path).await?;
        }
    }
    Ok(())
}

/// Removes an object; of a note on an upload, what it is about. One that cannot be ended is tried again with the next.
async fn clear(run: &Store, path: &str) -> Result<(), CheckpointError> {
    if !is_upload_note(path) {
        return Ok(run.delete(path).await?);
    }
    if let Err(error) = run.clear_upload(path).await {
        tracing::debug!(%error, path, "an unfinished upload cannot be ended yet");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_must_stay_stays_and_nothing_else(
            steps in proptest::collection::btree_set(0u64..60, 1..20),
            verified_index in 0usize..20,
            best in proptest::collection::vec(0u64..60, 0..8),
            keep_last in 0usize..6,
            keep_every in 0u64..9,
            keep_best in 0usize..4,
        ) {
            let steps: BTreeSet<Step> = steps.into_iter().map(Step).collect();
            let verified = *steps.iter().nth(verified_index % steps.len()).unwrap();
            let best: Vec<Step> = best.into_iter().map(Step).collect();
            let retention = Retention { keep_last, keep_every, keep_best };
            let removed: BTreeSet<Step> =
                plan(&steps, verified, &best, retention).into_iter().collect();
            for &step in &steps {
                // The naive oracle: how many whole-or-older checkpoints are at least as new, how many are better.
                let newer = steps.iter().filter(|&&s| s >= step && s <= verified).count();
                let better = best.iter().take_while(|&&s| s != step).filter(|s| steps.contains(s));
                let among_best = best.contains(&step) && better.count() < keep_best;
                let landmark = keep_every != 0 && step.0 % keep_every == 0;
                let stays = step >= verified || among_best || landmark || newer <= keep_last;
                prop_assert_eq!(!removed.contains(&step), stays, "{}", step);
            }
            prop_assert!(removed.is_subset(&steps));
        }
    }
}
