//! lambda(t), the weight of the cross-pyramid term over a run. Pure numbers.

/// A sigmoid-shaped ramp-up: lambda(t) = top exp(-5 (1 - min(e, length) / length)^2),
/// e = t div `every`. The defaults are the reference's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RampUp {
    /// Largest weight.
    pub top: f64,
    /// Units of `every` iterations until it is reached; 0: it is in force from the start.
    pub length: u64,
    /// Iterations in one unit; the weight rises in steps of this many.
    pub every: u64,
}

impl Default for RampUp {
    fn default() -> Self {
        Self { top: 0.1, length: 200, every: 150 }
    }
}

impl RampUp {
    /// The weight of the step that follows `done` iterations.
    #[must_use]
    pub fn at(&self, done: u64) -> f64 {
        if self.length == 0 {
            return self.top;
        }
        let phase = (done / self.every.max(1)).min(self.length);
        let left = 1.0 - phase as f64 / self.length as f64;
        self.top * (-5.0 * left * left).exp()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lambda_rises_in_steps_to_a_tenth_and_stays() {
        let lambda = RampUp::default();
        assert_eq!(lambda.at(0), lambda.at(149));
        assert!(lambda.at(150) > lambda.at(149));
        assert_eq!(lambda.at(30_000), 0.1);
        assert_eq!(lambda.at(49_999), 0.1);
        assert_eq!(RampUp { length: 0, ..lambda }.at(0), 0.1);
    }
}
