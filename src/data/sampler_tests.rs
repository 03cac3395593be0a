//! The deal against a slow oracle that writes every sequence out.

use std::collections::HashMap;

use proptest::prelude::*;
use sha2::{Digest, Sha256};

use super::*;

fn deal(seed: u64, unlabelled: Range<u64>, block_rows: u64, batch: u32) -> Deal {
    let spec = DealSpec {
        seed,
        labelled: 0..unlabelled.start.max(1),
        unlabelled,
        block_rows,
        batch_labelled: 0,
        batch_unlabelled: batch,
    };
    Deal::new(spec).unwrap()
}

/// One epoch's permuted sequence, written out block by block.
fn permuted(deal: &Deal, epoch: u64) -> Vec<u64> {
    let spec = deal.spec();
    let mut blocks: Vec<Vec<u64>> = Vec::new();
    for row in spec.unlabelled.clone() {
        match blocks.last_mut() {
            Some(block) if block[0] / spec.block_rows == row / spec.block_rows => block.push(row),
            _ => blocks.push(vec![row]),
        }
    }
    let key = key_of(&[spec.seed, Domain::Blocks as u64, epoch]);
    let order = Permutation::new(blocks.len() as u64, key);
    let mut sequence = Vec::new();
    for place in 0..blocks.len() as u64 {
        let block = &blocks[order.apply(place) as usize];
        let key = key_of(&[spec.seed, Domain::WithinBlock as u64, epoch, block[0]]);
        let within = Permutation::new(block.len() as u64, key);
        sequence.extend((0..block.len() as u64).map(|i| block[within.apply(i) as usize]));
    }
    sequence
}

/// All draws of the first `epochs` epochs, by walking positions one after the other.
fn oracle(deal: &Deal, epochs: u64) -> Vec<Draw> {
    let pool = range_len(&deal.spec().unlabelled);
    let batch = u64::from(deal.spec().batch_unlabelled);
    let mut draws = Vec::new();
    for epoch in 0..epochs {
        let positions = epoch * pool..(epoch + 1) * pool;
        let mut rest = permuted(deal, epoch);
        let mut stretches = HashMap::new();
        for slot in 0..batch {
            let len = positions.clone().filter(|p| p % batch == slot).count();
            let tail = rest.split_off(len);
            stretches.insert(slot, std::mem::replace(&mut rest, tail).into_iter());
        }
        for p in positions {
            let sample = stretches.get_mut(&(p % batch)).unwrap().next().unwrap();
            draws.push(Draw { sample, epoch: Epoch(epoch) });
        }
    }
    draws
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_deal_is_the_oracles(
        seed in any::<u64>(), start in 0_u64..40, pool in 1_u64..90, block in 1_u64..20, batch in 1_u32..30,
    ) {
        let deal = deal(seed, start..start + pool, block, batch);
        let expected = oracle(&deal, 4);
        for (p, expected) in expected.iter().enumerate() {
            let (step, slot) = (p as u64 / u64::from(batch), p as u32 % batch);
            prop_assert_eq!(deal.unlabelled(Step(step), slot), *expected);
        }
        for epoch in expected.chunks(pool as usize) {
            let mut rows: Vec<u64> = epoch.iter().map(|draw| draw.sample).collect();
            rows.sort_unstable();
            prop_assert_eq!(rows, (start..start + pool).collect::<Vec<_>>());
        }
    }

    #[test]
    fn shares_cover_the_batch_and_differ_by_at_most_one(
        labelled in 0_u32..30, unlabelled in 0_u32..30, world in 1_u32..12,
    ) {
        prop_assume!(labelled + unlabelled > 0);
        let spec = DealSpec {
            seed: 1, labelled: 0..50, unlabelled: 50..150, block_rows: 8,
            batch_labelled: labelled, batch_unlabelled: unlabelled,
        };
        let deal = Deal::new(spec).unwrap();
        if world > labelled + unlabelled {
            let refused = DealError::WorldTooLarge { world, batch: labelled + unlabelled };
            prop_assert_eq!(deal.share(Rank(0), WorldSize(world)), Err(refused));
            return Ok(());
        }
        let (mut l, mut u, mut sizes) = (0, 0, Vec::new());
        for rank in 0..world {
            let share = deal.share(Rank(rank), WorldSize(world)).unwrap();
            prop_assert_eq!((share.labelled.start, share.unlabelled.start), (l, u));
            (l, u) = (share.labelled.end, share.unlabelled.end);
            sizes.push(share.labelled.len() + share.unlabelled.len());
        }
        prop_assert_eq!((l, u), (labelled, unlabelled));
        let (least, most) = (sizes.iter().min().unwrap(), sizes.iter().max().unwrap());
        prop_assert!(*least >= 1 && most - least <= 1);
        prop_assert!(deal.share(Rank(world), WorldSize(world)).is_err());
    }
}

#[test]
fn three_epochs_hash_the_same_for_every_world_size() {
    let spec = DealSpec {
        seed: 1337,
        labelled: 0..68,
        unlabelled: 68..1312,
        block_rows: 16,
        batch_labelled: 12,
        batch_unlabelled: 12,
    };
    let deal = Deal::new(spec).unwrap();
    let hash = |world: u32| {
        let mut hash = Sha256::new();
        for step in 0..3 * 1244_u64.div_ceil(12) {
            let shares = (0..world).map(|r| deal.share(Rank(r), WorldSize(world)).unwrap());
            let (mut labelled, mut unlabelled) = (Vec::new(), Vec::new());
            for share in shares {
                let draws = deal.batch(Step(step), &share);
                labelled.extend_from_slice(&draws[..share.labelled.len()]);
                unlabelled.extend_from_slice(&draws[share.labelled.len()..]);
            }
            for draw in labelled.iter().chain(&unlabelled) {
                hash.update(draw.sample.to_le_bytes());
                hash.update(draw.epoch.0.to_le_bytes());
            }
        }
        hex::encode(hash.finalize())
    };
    let alone = hash(1);
    // Runs resume under this order: another value here orphans every run in progress.
    assert_eq!(alone, "d6787f03599d395d398afdd1f1173a460e1728b8cfed9b17c6f32c3cbcacc812");
    for world in [2, 3, 4, 5, 7, 8] {
        assert_eq!(hash(world), alone, "world {world}");
    }
}

#[test]
fn a_rank_reads_only_its_stretches() {
    let deal = deal(5, 0..6400, 16, 12);
    for world in [2_u32, 3, 5] {
        let share = deal.share(Rank(1), WorldSize(world)).unwrap();
        let mut blocks: Vec<u64> = (0..6400 / 12)
            .flat_map(|t| deal.batch(Step(t), &share))
            .filter(|draw| draw.epoch == Epoch(0))
            .map(|draw| draw.sample / 16)
            .collect();
        blocks.sort_unstable();
        blocks.dedup();
        let slots = u64::from(12_u32.div_ceil(world));
        assert!(blocks.len() as u64 <= 400 * slots / 12 + 2, "{} blocks, {world}", blocks.len());
    }
}

/// Any step of any slot costs the same: nothing is written out, skipped through or kept.
#[test]
fn a_pool_of_a_thousand_million_is_dealt_from_anywhere_at_once() {
    let pool = 1_000_000_000_u64;
    let deal = deal(9, 3..3 + pool, 16, 12);
    let places = Permutation::new(pool - 12, 5);
    let started = std::time::Instant::now();
    let mut rows: Vec<u64> = (0..20_000)
        .map(|n| (n, places.apply(n)))
        .map(|(n, place)| {
            let draw = deal.unlabelled(Step(place / 12), (place % 12) as u32);
            let late = deal.unlabelled(Step(place / 12 + (n + 1) * (pool / 12)), 11);
            assert!(draw.epoch == Epoch(0) && late.epoch >= Epoch(n));
            assert!((3..3 + pool).contains(&draw.sample) && (3..3 + pool).contains(&late.sample));
            draw.sample
        })
        .collect();
    // 40,000 draws: a millisecond each would be 40 s, and writing one epoch out takes longer.
    assert!(started.elapsed().as_secs() < 40, "{:?}", started.elapsed());
    rows.sort_unstable();
    rows.dedup();
    assert_eq!(rows.len(), 20_000, "distinct places hold distinct samples");
    let share = deal.share(Rank(2), WorldSize(5)).unwrap();
    let block = |step: u64| deal.batch(Step(40_000_000 + step), &share)[0].sample / 16;
    let walked: std::collections::BTreeSet<u64> = (0..160).map(block).collect();
    assert!((10..=12).contains(&walked.len()), "a slot walks block by block: {walked:?}");
}

#[test]
fn a_labelled_epoch_is_fresh_and_drops_its_remainder() {
    let spec = DealSpec {
        seed: 3,
        labelled: 0..136,
        unlabelled: 136..1312,
        block_rows: 16,
        batch_labelled: 12,
        batch_unlabelled: 12,
    };
    let deal = Deal::new(spec).unwrap();
    assert_eq!(deal.labelled_epoch_steps(), 11);
    assert_eq!(deal.labelled_epoch(Step(989)), Epoch(89));
    assert_eq!(deal.labelled_epoch(Step(990)), Epoch(90));
    let epoch = |e: u64| -> Vec<u64> {
        let draws = (0..132).map(|i| deal.labelled(Step(e * 11 + i / 12), (i % 12) as u32));
        draws.inspect(|draw| assert_eq!(draw.epoch, Epoch(e))).map(|draw| draw.sample).collect()
    };
    let (first, second) = (epoch(0), epoch(1));
    assert_ne!(first, second);
    for mut rows in [first, second] {
        rows.sort_unstable();
        rows.dedup();
        assert_eq!(rows.len(), 132);
        assert!(rows.iter().all(|row| *row < 136));
    }
}

#[test]
fn a_labelled_pool_smaller_than_its_batch_is_chained() {
    let spec = DealSpec {
        seed: 3,
        labelled: 0..5,
        unlabelled: 5..5,
        block_rows: 4,
        batch_labelled: 12,
        batch_unlabelled: 12,
    };
    let deal = Deal::new(spec).unwrap();
    assert_eq!(deal.spec().batch_unlabelled, 0, "an empty pool deals nothing");
    assert_eq!(deal.labelled_epoch_steps(), 1);
    assert_eq!(deal.labelled_epoch(Step(7)), Epoch(7));
    let draws: Vec<Draw> = (0..60).map(|p| deal.labelled(Step(p / 12), (p % 12) as u32)).collect();
    for (pass, draws) in draws.chunks(5).enumerate() {
        let mut rows: Vec<u64> = draws.iter().map(|draw| draw.sample).collect();
        rows.sort_unstable();
        assert_eq!(rows, [0, 1, 2, 3, 4]);
        assert!(draws.iter().all(|draw| draw.epoch == Epoch(pass as u64)));
    }
}

#[test]
fn what_cannot_be_dealt_is_refused_by_name() {
    let spec = DealSpec {
        seed: 0,
        labelled: 0..0,
        unlabelled: 0..9,
        block_rows: 4,
        batch_labelled: 1,
        batch_unlabelled: 1,
    };
    let with = |change: fn(&mut DealSpec)| {
        let mut spec = spec.clone();
        change(&mut spec);
        Deal::new(spec).map(|_| ())
    };
    assert_eq!(with(|_| ()), Err(DealError::NothingLabelled { batch: 1 }));
    assert_eq!(with(|s| s.block_rows = 0), Err(DealError::EmptyBlocks));
    assert_eq!(
        with(|s| (s.batch_labelled, s.batch_unlabelled) = (0, 0)),
        Err(DealError::EmptyBatch)
    );
    assert_eq!(with(|s| s.batch_labelled = 0), Ok(()));
}
