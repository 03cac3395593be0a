//! The fingerprint of a batch: a sum over its unlabelled slots, so that ranks can add up theirs.
//!
//! Each slot gives a 64-bit mix of (step, slot, sample, epoch), and the sum wraps. It does not depend on
//! how slots are spread over ranks; a sample in another's place, a missing or a doubled one
//! changes it, but for a chance of 2^-64. It guards against mistakes, not against forgery.

use std::ops::Range;

use crate::data::permutation::key_of;
use crate::data::{Deal, Draw};
use crate::types::{Receipt, Step};

/// Keeps these keys apart from those of the deal and of augmentation.
const DOMAIN: u64 = 0x6C65_6467_6572; // "ledger"

/// Numbers that a [`Part`] travels as.
pub const PIECES: usize = 5;
/// Bits of the fingerprint in each of the first four pieces.
const PIECE_BITS: u32 = 16;

/// What some ranks fed to the network in one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Part {
    /// Wrapping sum of [`slot_key`] over their unlabelled slots.
    pub fingerprint: u64,
    /// How many there were.
    pub samples: u32,
}

/// What one sample in one slot adds to a fingerprint.
pub(super) fn slot_key(step: Step, slot: u32, draw: Draw) -> u64 {
    key_of(&[DOMAIN, step.0, u64::from(slot), draw.sample, draw.epoch.0])
}

impl Part {
    /// What a rank fed: `draws` in the slots from `slots.start` on.
    ///
    /// The draws are those of the batch, not of the deal; where they are fewer or more than the slots, the
    /// count says so.
    #[must_use]
    pub fn of(step: Step, slots: &Range<u32>, draws: &[Draw]) -> Self {
        let mut part = Self::default();
        for (slot, draw) in (slots.start..).zip(draws) {
            part.fingerprint = part.fingerprint.wrapping_add(slot_key(step, slot, *draw));
            part.samples += 1;
        }
        part
    }

    /// What the deal plans for a whole batch.
    #[must_use]
    pub fn planned(deal: &Deal, step: Step) -> Self {
        let slots = 0..deal.spec().batch_unlabelled;
        let draws: Vec<Draw> = slots.clone().map(|slot| deal.unlabelled(step, slot)).collect();
        Self::of(step, &slots, &draws)
    }

    /// As numbers that ranks may add up in f64: four times 16 bits of the fingerprint, lowest first,
    /// and the count.
    ///
    /// Exact: over 1024 ranks a piece stays below 2^16 * 2^10 = 2^26, and every whole number up to 2^53 is
    /// an f64. Carries between the pieces are left to [`Self::from_pieces`].
    #[must_use]
    pub fn pieces(self) -> [f64; PIECES] {
        let piece = |index: u32| ((self.fingerprint >> (PIECE_BITS * index)) & 0xFFFF) as f64;
        [piece(0), piece(1), piece(2), piece(3), f64::from(self.samples)]
    }

    /// The wrapping sum of all parts, from the sums of their pieces.
    ///
    /// Right because the sum of `p << 16 i` over parts and pieces is the sum of the fingerprints, and
    /// what a shift or an addition loses is a multiple of 2^64.
    #[must_use]
    pub fn from_pieces(sums: [f64; PIECES]) -> Self {
        let fingerprint = (0..4).fold(0_u64, |sum, index| {
            sum.wrapping_add((sums[index] as u64) << (PIECE_BITS as usize * index))
        });
        Self { fingerprint, samples: sums[4] as u32 }
    }

    /// The receipt of a step that all parts together were.
    #[must_use]
    pub fn receipt(self, step: Step) -> Receipt {
        Receipt { step, fingerprint: self.fingerprint, samples: self.samples }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::data::DealSpec;
    use crate::types::{Epoch, Rank, WorldSize};

    /// Adds pieces up as an all-reduce does.
    fn all_reduce(parts: &[Part]) -> Part {
        let mut sums = [0.0; PIECES];
        for part in parts {
            for (sum, piece) in sums.iter_mut().zip(part.pieces()) {
                *sum += piece;
            }
        }
        Part::from_pieces(sums)
    }

    #[test]
    fn over_1024_ranks_with_the_largest_parts_the_sum_wraps_and_is_exact() {
        let part = Part { fingerprint: u64::MAX, samples: 7 };
        // 1024 * (2^64 - 1) = -1024 modulo 2^64.
        let wanted = Part { fingerprint: 1024_u64.wrapping_neg(), samples: 7 * 1024 };
        assert_eq!(all_reduce(&vec![part; 1024]), wanted);
    }

    proptest! {
        #[test]
        fn the_sum_of_pieces_is_the_wrapping_sum(
            fingerprints in proptest::collection::vec(any::<u64>(), 1..1024),
        ) {
            let parts: Vec<Part> =
                fingerprints.iter().map(|&fingerprint| Part { fingerprint, samples: 1 }).collect();
            let wanted = fingerprints.iter().fold(0_u64, |sum, part| sum.wrapping_add(*part));
            let samples = parts.len() as u32;
            prop_assert_eq!(all_reduce(&parts), Part { fingerprint: wanted, samples });
        }

        #[test]
        fn it_is_the_same_for_every_number_of_ranks(step in 0_u64..1000, batch in 1_u32..20) {
            let spec = DealSpec {
                seed: 3,
                labelled: 0..9,
                unlabelled: 9..50,
                block_rows: 4,
                batch_labelled: 4,
                batch_unlabelled: batch,
            };
            let (deal, step) = (Deal::new(spec).unwrap(), Step(step));
            for world in 1..=(batch + 4).min(7) {
                let parts: Vec<Part> = (0..world)
                    .map(|rank| {
                        let share = deal.share(Rank(rank), WorldSize(world)).unwrap();
                        let draws = deal.batch(step, &share);
                        Part::of(step, &share.unlabelled, &draws[share.labelled.len()..])
                    })
                    .collect();
                prop_assert_eq!(all_reduce(&parts), Part::planned(&deal, step));
            }
        }
    }

    #[test]
    fn every_coordinate_counts() {
        let draw = Draw { sample: 5, epoch: Epoch(2) };
        let key = slot_key(Step(1), 3, draw);
        assert_ne!(key, slot_key(Step(2), 3, draw));
        assert_ne!(key, slot_key(Step(1), 4, draw));
        assert_ne!(key, slot_key(Step(1), 3, Draw { sample: 6, ..draw }));
        assert_ne!(key, slot_key(Step(1), 3, Draw { epoch: Epoch(3), ..draw }));
    }
}
