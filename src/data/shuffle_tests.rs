//! How far the block shuffle is from a full one, measured: the table in `docs/benchmarks.md`.
//!
//! A pool of 1200 slices, ten of each volume, dealt in batches of 12. What training wants to be rare is
//! slices of one volume beside each other: in one batch, where they make gradients alike, and in
//! batches that follow each other. A full shuffle is blocks of one row.

use std::collections::HashMap;

use super::*;

const POOL: u64 = 1200;
const VOLUME: u64 = 10;
const BATCH: u32 = 12;
const EPOCHS: u64 = 30;

#[derive(Debug)]
struct Quality {
    /// Probability that two samples of one batch are of one volume.
    in_batch: f64,
    /// Probability that a sample's volume is in the next batch as well.
    in_next: f64,
    /// Volumes in a batch, mean.
    volumes: f64,
    /// Spearman's correlation of the samples' places in an epoch and the next, root mean square.
    between_epochs: f64,
}

fn measure(block_rows: u64) -> Quality {
    let spec = DealSpec {
        seed: 1337,
        labelled: 0..0,
        unlabelled: 0..POOL,
        block_rows,
        batch_labelled: 0,
        batch_unlabelled: BATCH,
    };
    let deal = Deal::new(spec).unwrap();
    let share = deal.share(Rank(0), WorldSize(1)).unwrap();
    let steps = POOL / u64::from(BATCH) * EPOCHS;
    let batches: Vec<Vec<u64>> = (0..steps)
        .map(|step| deal.batch(Step(step), &share).iter().map(|draw| draw.sample).collect())
        .collect();
    let volumes: Vec<Vec<u64>> =
        batches.iter().map(|batch| batch.iter().map(|sample| sample / VOLUME).collect()).collect();
    let (mut alike, mut distinct, mut again) = (0, 0, 0);
    for batch in &volumes {
        for (at, volume) in batch.iter().enumerate() {
            alike += batch[..at].iter().filter(|other| *other == volume).count();
            distinct += usize::from(!batch[..at].contains(volume));
        }
    }
    for pair in volumes.windows(2) {
        again += pair[0].iter().filter(|volume| pair[1].contains(volume)).count();
    }
    let pairs = f64::from(BATCH * (BATCH - 1) / 2);
    let places: Vec<HashMap<u64, f64>> = batches
        .chunks((POOL / u64::from(BATCH)) as usize)
        .map(|epoch| {
            epoch.concat().into_iter().zip(0..).map(|(s, at)| (s, f64::from(at))).collect()
        })
        .collect();
    let squares: f64 = places.windows(2).map(|two| correlation(&two[0], &two[1]).powi(2)).sum();
    Quality {
        in_batch: alike as f64 / (steps as f64 * pairs),
        in_next: again as f64 / ((steps - 1) as f64 * f64::from(BATCH)),
        volumes: distinct as f64 / steps as f64,
        between_epochs: (squares / (EPOCHS - 1) as f64).sqrt(),
    }
}

/// Spearman's: both are ranks already.
fn correlation(a: &HashMap<u64, f64>, b: &HashMap<u64, f64>) -> f64 {
    let n = POOL as f64;
    let squares: f64 = a.iter().map(|(sample, at)| (at - b[sample]).powi(2)).sum();
    1.0 - 6.0 * squares / (n * (n * n - 1.0))
}

#[test]
#[allow(clippy::print_stderr, reason = "it makes the table of docs/benchmarks.md")]
fn a_batch_mixes_as_a_full_shuffle_would_and_its_successors_less_so() {
    let same_volume = (VOLUME - 1) as f64 / (POOL - 1) as f64;
    eprintln!("uniform: two samples of one volume with probability {same_volume:.5}");
    for block_rows in [1, 2, 4, 8, 16, 32, 64] {
        let quality = measure(block_rows);
        eprintln!("{block_rows:2} rows a block: {quality:.4?}");
        // Slots walk through different blocks: within a batch there is never more of one volume
        // than by chance (three deviations of a Poisson count for chance), nor fewer volumes.
        let pairs = (POOL * EPOCHS / 2 * u64::from(BATCH - 1)) as f64;
        let chance = 3.0 * (same_volume / pairs).sqrt();
        assert!(quality.in_batch < same_volume + chance, "{block_rows}: {quality:?}");
        assert!(quality.volumes > 11.4, "{block_rows}: {quality:?}");
        // One epoch says nothing of the next: what is left is what as many blocks have by chance.
        let blocks = POOL as f64 / block_rows as f64;
        assert!(quality.between_epochs < 2.0 / blocks.sqrt(), "{block_rows}: {quality:?}");
        // The price: a slot stays in its block, hence in a volume or two, for as many steps.
        let most = 1.0 - 1.0 / block_rows as f64 + 0.12;
        assert!(quality.in_next < most, "{block_rows}: {quality:?}");
    }
    let (full, stored) = (measure(1), measure(8));
    assert!(full.in_next < 0.15 && stored.in_next > 0.5, "{full:?}, {stored:?}");
}
