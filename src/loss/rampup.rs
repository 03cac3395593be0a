//! lambda(t), the weight of the cross-pyramid term, and the length of the warm-up. Pure numbers.

/// Largest weight.
const TOP: f64 = 0.1;
/// Epochs of 150 iterations until it is reached.
const LENGTH: f64 = 200.0;
/// Iterations in one of its epochs.
const ITERATIONS: u64 = 150;
/// Warm-up in passes over the labelled stream.
const WARM_UP_EPOCHS: u64 = 90;

/// lambda(t) = 0.1 exp(-5 (1 - min(e, 200) / 200)^2), e = t div 150, for the step that follows
/// `done` iterations.
#[must_use]
pub fn lambda(done: u64) -> f64 {
    let phase = 1.0 - ((done / ITERATIONS) as f64).min(LENGTH) / LENGTH;
    TOP * (-5.0 * phase * phase).exp()
}

/// Iterations of supervised terms alone: 90 passes over the labelled stream, remainders dropped;
/// a stream shorter than its batch counts one iteration as a pass.
#[must_use]
pub fn warm_up_iterations(labelled_slices: u64, labelled_batch: u64) -> u64 {
    WARM_UP_EPOCHS * labelled_slices.checked_div(labelled_batch).unwrap_or(0).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warm_up_has_the_lengths_of_the_method() {
        assert_eq!(warm_up_iterations(136, 12), 990);
        assert_eq!(warm_up_iterations(256, 12), 1890);
        assert_eq!(warm_up_iterations(5, 12), 90);
    }

    #[test]
    fn lambda_rises_in_steps_to_a_tenth_and_stays() {
        assert_eq!(lambda(0), lambda(149));
        assert!(lambda(150) > lambda(149));
        assert_eq!(lambda(30_000), 0.1);
        assert_eq!(lambda(49_999), 0.1);
    }
}
