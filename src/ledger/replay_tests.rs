//! The replay and the shape it walks over: sound ledgers pass, each planted fault is named.

use std::collections::HashSet;

use proptest::prelude::*;

use super::*;
use crate::data::DealSpec;
use crate::ledger::{Branches, Carried, FORMAT, Opening, Origin, Run};
use crate::types::{Epoch, Generation, Lineage, WorldSize};

fn spec(pool: u64, batch: u32) -> DealSpec {
    DealSpec {
        seed: 5,
        labelled: 0..10,
        unlabelled: 10..10 + pool,
        block_rows: 4,
        batch_labelled: 2,
        batch_unlabelled: batch,
    }
}

fn receipts(deal: &Deal, steps: Range<u64>) -> Vec<Receipt> {
    steps.map(|step| Part::planned(deal, Step(step)).receipt(Step(step))).collect()
}

fn claim(number: u64, writer: &str) -> Object {
    Object {
        format: FORMAT,
        number,
        writer: writer.to_owned(),
        lineage: None,
        opening: None,
        receipts: Vec::new(),
    }
}

/// The first object of lineage `number`.
fn opens(number: u64, origin: Origin, deal: &Deal, steps: Range<u64>) -> Object {
    let opening = Opening {
        origin,
        first: Step(steps.start),
        resumed: Step(steps.start),
        generation: Generation(1),
        world: WorldSize(2),
        dataset_sha256: "f".repeat(64),
        deal: deal.spec().clone(),
    };
    Object {
        lineage: Some(Lineage(number)),
        opening: Some(opening),
        receipts: Run::pack(&receipts(deal, steps)),
        ..claim(number, "w")
    }
}

fn goes_on(number: u64, lineage: u64, deal: &Deal, steps: Range<u64>) -> Object {
    Object {
        lineage: Some(Lineage(lineage)),
        receipts: Run::pack(&receipts(deal, steps)),
        ..claim(number, "w")
    }
}

fn deal() -> Deal {
    Deal::new(spec(41, 6)).unwrap()
}

/// Steps 0 to 30 in lineage 2; from step 20 on superseded by lineage 4, to step 40.
fn ledger() -> Vec<Object> {
    let deal = deal();
    vec![
        claim(1, "w"),
        opens(2, Origin::Start, &deal, 0..13),
        goes_on(3, 2, &deal, 13..30),
        opens(4, Origin::Lineage(Lineage(2)), &deal, 20..25),
        goes_on(5, 4, &deal, 25..40),
    ]
}

fn audit(
    objects: &[Object],
    checkpoint: Option<(Step, &Carried)>,
    deal: &Deal,
) -> Result<Counts, Violation> {
    let mut branches = Branches::default();
    objects.iter().try_for_each(|object| branches.add(object))?;
    let path = branches.path(checkpoint)?;
    let mut replay = Replay::new(&path, deal);
    objects.iter().try_for_each(|object| replay.object(object))?;
    replay.finish()
}

/// What an audit says of [`ledger`] after `change`.
fn told(change: impl Fn(&mut Vec<Object>)) -> String {
    let mut objects = ledger();
    change(&mut objects);
    audit(&objects, None, &deal()).unwrap_err().to_string()
}

fn planned(step: u64) -> u64 {
    Part::planned(&deal(), Step(step)).fingerprint
}

#[test]
fn a_sound_ledger_is_counted() {
    let counts = audit(&ledger(), None, &deal()).unwrap();
    // 40 steps of 6 from a pool of 41: 5 whole epochs and 35 of the sixth.
    assert_eq!((counts.steps, counts.samples, counts.pool), (40, 240, 41));
    assert_eq!((counts.epochs_complete, counts.epochs_partial), (5, 1));
}

#[test]
fn steps_that_only_the_checkpoint_has_count_too() {
    let deal = deal();
    let carried = Carried {
        origin: Origin::Lineage(Lineage(2)),
        first: Step(28),
        receipts: Run::pack(&receipts(&deal, 28..50)),
    };
    let counts = audit(&ledger(), Some((Step(50), &carried)), &deal).unwrap();
    assert_eq!(counts.steps, 50);
    // One that is behind the ledger changes nothing, one that goes on from what is not there does.
    let early = Carried { receipts: Run::pack(&receipts(&deal, 28..29)), ..carried.clone() };
    assert_eq!(audit(&ledger(), Some((Step(29), &early)), &deal).unwrap().steps, 40);
    let lost = Carried { first: Step(31), receipts: Vec::new(), ..carried };
    let error = audit(&ledger(), Some((Step(31), &lost)), &deal).unwrap_err();
    assert_eq!(error.step, Some(Step(30)));
    assert!(error.object.contains("checkpoint of step 31"), "{error}");
    let headless = Carried { origin: Origin::Start, first: Step(31), receipts: Vec::new() };
    let error = audit(&[], Some((Step(31), &headless)), &deal).unwrap_err();
    assert!(error.what.contains("do not lead to it"), "{error}");
}

#[test]
fn a_dropped_step_is_named() {
    let gap = told(|objects| {
        objects[2].receipts = Run::pack(
            &receipts(&deal(), 13..17)
                .into_iter()
                .chain(receipts(&deal(), 18..30))
                .collect::<Vec<_>>(),
        );
    });
    assert!(gap.starts_with("ledger/00000003.json, step 17: it is missing"), "{gap}");
    // Taken out of a run, so that all that follow move up.
    let moved = told(|objects| objects[1].receipts[0].fingerprints.retain(|f| *f != planned(4)));
    assert!(moved.contains("00000003.json, step 12"), "the shape first: {moved}");
    let end = told(|objects| objects[4].receipts[0].fingerprints.retain(|f| *f != planned(29)));
    assert!(end.contains("00000005.json, step 29: what is recorded is what step 30 used"), "{end}");
}

#[test]
fn a_doubled_step_is_named() {
    let twice = told(|objects| objects[2].receipts[0].first = Step(12));
    assert!(twice.starts_with("ledger/00000003.json, step 12: it is recorded twice"), "{twice}");
    let within = told(|objects| {
        let fingerprints = &mut objects[4].receipts[0].fingerprints;
        fingerprints[3] = fingerprints[2];
    });
    assert!(within.contains("step 28: what is recorded is what step 27 used"), "{within}");
}

/// The fingerprint of a step whose draws were changed.
fn altered(step: u64, change: impl Fn(&mut Vec<Draw>)) -> u64 {
    let deal = deal();
    let mut draws: Vec<Draw> = (0..6).map(|slot| deal.unlabelled(Step(step), slot)).collect();
    change(&mut draws);
    Part::of(Step(step), &(0..6), &draws).fingerprint
}

#[test]
fn a_swapped_sample_is_named_with_its_slot() {
    let planned = deal().unlabelled(Step(14), 3).sample;
    let other = if planned == 33 { 34 } else { 33 };
    let swapped = told(|objects| {
        objects[2].receipts[0].fingerprints[1] = altered(14, |draws| draws[3].sample = other);
    });
    let wanted =
        format!("step 14: sample {other} stands in slot 3, where sample {planned} was planned");
    assert!(swapped.contains(&wanted), "{swapped}");
    let exchanged = told(|objects| {
        objects[2].receipts[0].fingerprints[1] = altered(14, |draws| draws.swap(1, 4));
    });
    assert!(exchanged.contains("in slot 1") && exchanged.contains("in slot 4"), "{exchanged}");
    let else_where = told(|objects| objects[2].receipts[0].fingerprints[1] ^= 1);
    assert!(else_where.contains("not the planned ones"), "{else_where}");
    let fewer = told(|objects| objects[2].receipts[0].samples = 5);
    assert!(fewer.contains("step 13: 5 unlabelled samples are recorded, 6"), "{fewer}");
}

#[test]
fn a_broken_shape_is_named() {
    let missing = told(|objects| drop(objects.remove(2)));
    assert_eq!(missing, "ledger/00000003.json: it is missing");
    let orphan = told(|objects| {
        objects[3].opening.as_mut().unwrap().origin = Origin::Lineage(Lineage(9));
    });
    assert!(orphan.contains("00000004.json: it goes on from lineage 9, which is not there"));
    let ahead = told(|objects| objects[2].receipts[0].fingerprints.truncate(2));
    assert!(ahead.contains("00000004.json, step 15: it is missing"), "{ahead}");
    let stolen = told(|objects| objects[4].writer = "other".to_owned());
    assert!(stolen.contains("00000005.json: coordinator other wrote it"), "{stolen}");
    let late = told(|objects| objects[4] = goes_on(5, 2, &deal(), 30..31));
    assert!(late.contains("lineage 2, which is not open any more"), "{late}");
    let unknown = told(|objects| objects[4].lineage = Some(Lineage(3)));
    assert!(unknown.contains("lineage 3, which no object opens"), "{unknown}");
    let begins = told(|objects| objects[1].opening.as_mut().unwrap().first = Step(1));
    assert!(begins.contains("begin the run, at step 1"), "{begins}");
    let seed = told(|objects| objects[3].opening.as_mut().unwrap().deal.seed += 1);
    assert!(seed.contains("deals other samples than lineage 2"), "{seed}");
    // Nobody may go on after another coordinator's claim without a lineage of its own.
    let after = told(|objects| objects.insert(4, claim(5, "v")));
    assert_eq!(after, "ledger/00000006.json: it is missing");
}

#[test]
fn a_run_that_an_older_release_began_is_followed_from_where_recording_did() {
    let deal = deal();
    // Step 9 begins at position 54, within the second epoch.
    let objects = [claim(1, "w"), opens(2, Origin::Unrecorded, &deal, 9..40)];
    let counts = audit(&objects, None, &deal).unwrap();
    assert_eq!((counts.first_step, counts.steps), (Step(9), 31));
    assert_eq!((counts.epochs_complete, counts.epochs_partial), (3, 2));
}

#[test]
fn the_bitmaps_refuse_what_a_wrong_deal_would_do() {
    let draw = |sample, epoch| Draw { sample, epoch: Epoch(epoch) };
    let mut epochs = Epochs::new(10..13, 0);
    epochs.count(draw(10, 0)).unwrap();
    assert!(epochs.count(draw(10, 0)).unwrap_err().contains("dealt twice in epoch 0"));
    assert!(epochs.count(draw(13, 0)).unwrap_err().contains("none of the unlabelled pool"));
    epochs.count(draw(11, 0)).unwrap();
    assert!(epochs.close(3, Step(2)).unwrap_err().to_string().contains("2 of 3 samples"));
    let mut epochs = Epochs::new(10..13, 0);
    (10..13).for_each(|sample| epochs.count(draw(sample, 0)).unwrap());
    epochs.close(3, Step(2)).unwrap();
    assert!(epochs.count(draw(10, 0)).unwrap_err().contains("which is over"));
}

proptest! {
    /// Against a naive oracle: sets of samples by epoch, over all positions.
    #[test]
    fn counts_are_those_of_the_naive_oracle(
        pool in 1_u64..40,
        batch in 1_u32..30,
        first in 0_u64..20,
        steps in 1_u64..30,
    ) {
        let deal = Deal::new(spec(pool, batch)).unwrap();
        let origin = if first == 0 { Origin::Start } else { Origin::Unrecorded };
        let objects = [claim(1, "w"), opens(2, origin, &deal, first..first + steps)];
        let counts = audit(&objects, None, &deal).unwrap();
        let mut seen: BTreeMap<u64, HashSet<u64>> = BTreeMap::new();
        for step in first..first + steps {
            for slot in 0..batch {
                let draw = deal.unlabelled(Step(step), slot);
                prop_assert!(seen.entry(draw.epoch.0).or_default().insert(draw.sample));
            }
        }
        let complete = seen.values().filter(|samples| samples.len() as u64 == pool).count() as u64;
        prop_assert_eq!(counts.epochs_complete, complete);
        prop_assert_eq!(counts.epochs_partial, seen.len() as u64 - complete);
        prop_assert_eq!(counts.samples, steps * u64::from(batch));
    }
}
