//! A keyed pseudo-random permutation of `0..n`, evaluated one element at a time.
//!
//! The swap-or-not shuffle (Hoang, Morris, Rogaway, CRYPTO 2012): works for any `n` without cycle
//! walking, in a fixed number of rounds and constant memory, and each round undoes itself, so the
//! inverse is the rounds in reverse. Not a cipher: the mixing function is fast, not secret.

/// Golden-ratio increment of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// SplitMix64's finaliser: every input bit reaches every output bit.
pub(crate) fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// One number out of a few: what a permutation or a draw is keyed by.
pub(crate) fn key_of(parts: &[u64]) -> u64 {
    parts.iter().fold(GOLDEN, |key, part| mix(key.wrapping_add(GOLDEN) ^ mix(part ^ GOLDEN)))
}

/// A permutation of `0..len`, a pure function of its key.
#[derive(Debug, Clone, Copy)]
pub struct Permutation {
    len: u64,
    key: u64,
    rounds: u64,
}

impl Permutation {
    /// The permutation of `0..len` that `key` names.
    pub fn new(len: u64, key: u64) -> Self {
        // About six rounds per bit reach every order closely; the constant is for tiny domains.
        let bits = u64::from(u64::BITS - len.leading_zeros());
        Self { len, key, rounds: 24 + 6 * bits }
    }

    /// Where the element at `index` (below `len`) comes from.
    pub fn apply(&self, index: u64) -> u64 {
        debug_assert!(index < self.len);
        (0..self.rounds).fold(index, |at, round| self.round(at, round))
    }

    /// The index with `apply(index) == value`.
    pub fn invert(&self, value: u64) -> u64 {
        debug_assert!(value < self.len);
        (0..self.rounds).rev().fold(value, |at, round| self.round(at, round))
    }

    /// Pairs `at` with a partner and swaps the two, or not. Its own inverse.
    fn round(&self, at: u64, round: u64) -> u64 {
        let round_key = mix(self.key.wrapping_add(GOLDEN.wrapping_mul(round + 1)));
        let pivot = ((u128::from(round_key) * u128::from(self.len)) >> 64) as u64;
        let partner = if pivot >= at { pivot - at } else { pivot + (self.len - at) };
        let swap = mix(mix(round_key ^ self.key.rotate_left(32)) ^ at.max(partner)) >> 63;
        if swap == 1 { partner } else { at }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_a_permutation_and_its_inverse_undoes_it() {
        for len in (1..70).chain([127, 128, 1000, 4097]) {
            let permutation = Permutation::new(len, 7 * len);
            let mut seen = vec![false; len as usize];
            for index in 0..len {
                let value = permutation.apply(index);
                assert!(!std::mem::replace(&mut seen[value as usize], true));
                assert_eq!(permutation.invert(value), index);
            }
        }
    }

    #[test]
    fn all_orders_of_four_come_about_equally_often() {
        let mut counts = std::collections::BTreeMap::new();
        for key in 0..24_000_u64 {
            let permutation = Permutation::new(4, key_of(&[key]));
            let order: Vec<u64> = (0..4).map(|index| permutation.apply(index)).collect();
            *counts.entry(order).or_insert(0_i64) += 1;
        }
        assert_eq!(counts.len(), 24);
        // 23 degrees of freedom: chi squared stays below 49.7 with probability 0.999.
        let chi: f64 = counts.values().map(|n| ((n - 1000) * (n - 1000)) as f64 / 1000.0).sum();
        assert!(chi < 49.7, "chi squared {chi}");
    }

    #[test]
    fn the_largest_domain_does_not_overflow() {
        let permutation = Permutation::new(u64::MAX, 3);
        for value in [0, 1, u64::MAX / 2, u64::MAX - 1] {
            assert_eq!(permutation.apply(permutation.invert(value)), value);
        }
    }
}
