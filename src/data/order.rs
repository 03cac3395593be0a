//! One hash of the whole order, as some number of workers would see it: equal for all numbers.
//!
//! It goes the workers' way, share by share, and not the deal's own: what it proves is that the
//! shares put together are the one order.

use sha2::{Digest, Sha256};

use super::sampler::{Deal, DealError, Draw};
use crate::types::{Rank, Step, WorldSize};

/// SHA-256 of every draw of both streams, slot by slot, over the steps that touch the first `epochs`
/// passes over the unlabelled pool (or the labelled one, where nothing is unlabelled), dealt to
/// `world` workers. Each draw counts as (step, slot, sample, epoch), little-endian.
///
/// # Errors
/// [`DealError::WorldTooLarge`].
pub fn order_digest(deal: &Deal, world: WorldSize, epochs: u64) -> Result<String, DealError> {
    let shares =
        (0..world.0).map(|rank| deal.share(Rank(rank), world)).collect::<Result<Vec<_>, _>>()?;
    let mut hash = Sha256::new();
    for step in (0..steps(deal, epochs)).map(Step) {
        let batches: Vec<Vec<Draw>> = shares.iter().map(|share| deal.batch(step, share)).collect();
        for labelled in [true, false] {
            for (share, draws) in shares.iter().zip(&batches) {
                let (first, second) = draws.split_at(share.labelled.len());
                let (slots, draws) = if labelled {
                    (share.labelled.clone(), first)
                } else {
                    (share.unlabelled.clone(), second)
                };
                for (slot, draw) in slots.zip(draws) {
                    hash.update([u8::from(labelled)]);
                    for number in [step.0, u64::from(slot), draw.sample, draw.epoch.0] {
                        hash.update(number.to_le_bytes());
                    }
                }
            }
        }
    }
    Ok(hex::encode(hash.finalize()))
}

/// Steps that touch the first `epochs` passes.
fn steps(deal: &Deal, epochs: u64) -> u64 {
    let spec = deal.spec();
    let pool = spec.unlabelled.end.saturating_sub(spec.unlabelled.start);
    if pool == 0 || spec.batch_unlabelled == 0 {
        return epochs.saturating_mul(deal.labelled_epoch_steps());
    }
    epochs.saturating_mul(pool).div_ceil(u64::from(spec.batch_unlabelled))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::DealSpec;

    fn deal(seed: u64, unlabelled: u64) -> Deal {
        Deal::new(DealSpec {
            seed,
            labelled: 0..30,
            unlabelled: 30..30 + unlabelled,
            block_rows: 8,
            batch_labelled: 5,
            batch_unlabelled: 7,
        })
        .unwrap()
    }

    #[test]
    fn every_number_of_workers_sees_one_order_and_every_seed_another() {
        let digest = |seed, pool, world| order_digest(&deal(seed, pool), WorldSize(world), 3);
        for pool in [0, 1, 6, 100] {
            let one = digest(1, pool, 1).unwrap();
            // A pool of none deals the labelled batch of 5 alone.
            for world in 2..=if pool == 0 { 5 } else { 12 } {
                assert_eq!(digest(1, pool, world).unwrap(), one, "{world} workers, pool of {pool}");
            }
            assert_ne!(digest(2, pool, 1).unwrap(), one);
        }
        assert_eq!(digest(1, 100, 13), Err(DealError::WorldTooLarge { world: 13, batch: 12 }));
    }

    #[test]
    fn it_covers_the_epochs_it_says() {
        assert_eq!(steps(&deal(1, 100), 3), 43);
        assert_eq!(steps(&deal(1, 0), 3), 18);
    }
}
