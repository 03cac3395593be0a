//! How well one binary volume covers another: Dice, Jaccard, HD95 and ASD in three dimensions.
//!
//! The definitions are MedPy's, so that numbers compare with the literature's: a surface voxel is
//! a voxel of the mask with a face neighbour outside it (outside the volume counts as outside);
//! HD95 is the 95th percentile (linear interpolation) of the surface distances of both directions
//! pooled; ASD is one-way, from the prediction's surface to the truth's. Distances come from an
//! exact Euclidean distance transform (Felzenszwalb and Huttenlocher 2012: lower envelopes of
//! parabolas, one pass per axis, linear in the number of voxels).
//!
//! What happens when a mask is empty is no detail, since published code disagrees: it is the
//! caller's choice, [`EmptyPolicy`], and which masks were empty is part of every result.
//!
//! Not here: volumes with several classes (`volumes`), means over cases (`summary`).

use serde::{Deserialize, Serialize};

/// The distance reported by [`EmptyPolicy::Penalise`] for a class found in one mask only.
pub const PENALTY_DISTANCE: f64 = 100.0;

/// What a mask without a single voxel is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EmptyPolicy {
    /// All five numbers are 0 where either mask is empty: the SSL4MIS protocol, the default. It
    /// flatters distances, so the count of empty cases must be read with them.
    #[default]
    Zero,
    /// What is undefined stays out of the means: distances where either mask is empty, Dice and
    /// Jaccard where both are.
    Exclude,
    /// Dice 0 and distances of [`PENALTY_DISTANCE`] where one mask is empty; perfect where both are.
    Penalise,
    /// An empty mask is an error, as in MedPy itself.
    Refuse,
}

/// Which of the two masks had no voxel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Emptiness {
    /// Both masks have voxels.
    Neither,
    /// Nothing was predicted, though there was something to find.
    Prediction,
    /// Something was predicted where there is nothing.
    Truth,
    /// Nothing predicted, nothing there.
    Both,
}

impl Emptiness {
    /// Whether the prediction had no voxel.
    #[must_use]
    pub fn prediction_is_empty(self) -> bool {
        matches!(self, Self::Prediction | Self::Both)
    }

    /// Whether the truth had no voxel.
    #[must_use]
    pub fn truth_is_empty(self) -> bool {
        matches!(self, Self::Truth | Self::Both)
    }
}

/// The five numbers for one class of one case; `None` where the policy leaves one undefined.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClassScores {
    /// 2|P n T| / (|P| + |T|), in `0..=1`.
    pub dice: Option<f64>,
    /// |P n T| / |P u T|, in `0..=1`.
    pub jaccard: Option<f64>,
    /// 95th percentile of the pooled surface distances, in the spacing's unit.
    pub hd95: Option<f64>,
    /// Mean distance from the prediction's surface to the truth's, in the spacing's unit.
    pub asd: Option<f64>,
    /// Mean over the distances of both directions together, in the spacing's unit: the literature's
    /// and MedPy 0.5's (MedPy 0.4 took the mean of both directions' means). Absent in what older
    /// versions wrote.
    #[serde(default)]
    pub assd: Option<f64>,
    /// Which masks were empty.
    pub empty: Emptiness,
}

/// Why no score could be given.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MetricError {
    /// The two masks are not of the same, stated shape.
    #[error(
        "a mask of shape {shape:?} has {expected} voxels, got {prediction} predicted and {truth} true ones"
    )]
    Shape {
        /// Depth, height, width.
        shape: [usize; 3],
        /// Their product.
        expected: usize,
        /// Length of the prediction.
        prediction: usize,
        /// Length of the truth.
        truth: usize,
    },
    /// A spacing that is zero, negative or no number.
    #[error("voxel spacing must be positive and finite, got {0}")]
    Spacing(String),
    /// An empty mask under [`EmptyPolicy::Refuse`].
    #[error("a mask is empty ({0:?}) and the policy refuses that")]
    Empty(Emptiness),
}

/// Scores a predicted mask against the true one. Both are `[D, H, W]`, row-major.
///
/// # Errors
/// When lengths and shape disagree, the spacing is not positive, or the policy refuses a mask.
pub fn score_masks(
    prediction: &[bool],
    truth: &[bool],
    shape: [usize; 3],
    spacing: [f64; 3],
    policy: EmptyPolicy,
) -> Result<ClassScores, MetricError> {
    check(prediction, truth, shape, spacing)?;
    let (mut predicted, mut real, mut both) = (0_u64, 0_u64, 0_u64);
    for (&p, &t) in prediction.iter().zip(truth) {
        predicted += u64::from(p);
        real += u64::from(t);
        both += u64::from(p && t);
    }
    let empty = match (predicted, real) {
        (0, 0) => Emptiness::Both,
        (0, _) => Emptiness::Prediction,
        (_, 0) => Emptiness::Truth,
        _ => Emptiness::Neither,
    };
    if empty != Emptiness::Neither {
        return scores_of_empty(empty, policy);
    }
    let distances = SurfaceDistances::between(prediction, truth, shape, spacing);
    Ok(ClassScores {
        dice: Some(2.0 * both as f64 / (predicted + real) as f64),
        jaccard: Some(both as f64 / (predicted + real - both) as f64),
        hd95: Some(distances.hd95()),
        asd: Some(distances.asd()),
        assd: Some(distances.assd()),
        empty,
    })
}

fn check(
    prediction: &[bool],
    truth: &[bool],
    shape: [usize; 3],
    spacing: [f64; 3],
) -> Result<(), MetricError> {
    let expected = shape.iter().product();
    if prediction.len() != expected || truth.len() != expected {
        return Err(MetricError::Shape {
            shape,
            expected,
            prediction: prediction.len(),
            truth: truth.len(),
        });
    }
    match spacing.iter().find(|s| !(s.is_finite() && **s > 0.0)) {
        Some(bad) => Err(MetricError::Spacing(bad.to_string())),
        None => Ok(()),
    }
}

fn scores_of_empty(empty: Emptiness, policy: EmptyPolicy) -> Result<ClassScores, MetricError> {
    let both = empty == Emptiness::Both;
    let (overlap, distance) = match policy {
        EmptyPolicy::Zero => (Some(0.0), Some(0.0)),
        EmptyPolicy::Exclude => ((!both).then_some(0.0), None),
        EmptyPolicy::Penalise if both => (Some(1.0), Some(0.0)),
        EmptyPolicy::Penalise => (Some(0.0), Some(PENALTY_DISTANCE)),
        EmptyPolicy::Refuse => return Err(MetricError::Empty(empty)),
    };
    let [hd95, asd, assd] = [distance; 3];
    Ok(ClassScores { dice: overlap, jaccard: overlap, hd95, asd, assd, empty })
}

/// Distances between the surfaces of two masks that both have voxels.
struct SurfaceDistances {
    to_truth: Vec<f64>,
    to_prediction: Vec<f64>,
}

impl SurfaceDistances {
    fn between(prediction: &[bool], truth: &[bool], shape: [usize; 3], spacing: [f64; 3]) -> Self {
        // Outside the box that holds both masks is background, just as outside the volume is, and
        // every site of the transform lies inside: cropping changes no number and saves most work.
        let bounds = BoundingBox::around(prediction, truth, shape);
        let prediction = surface(&bounds.crop(prediction, shape), bounds.shape());
        let truth = surface(&bounds.crop(truth, shape), bounds.shape());
        Self {
            to_truth: gather(&prediction, &distance_to(&truth, bounds.shape(), spacing)),
            to_prediction: gather(&truth, &distance_to(&prediction, bounds.shape(), spacing)),
        }
    }

    fn asd(&self) -> f64 {
        mean(&self.to_truth)
    }

    /// The mean over both surfaces' voxels, not the mean of both means.
    fn assd(&self) -> f64 {
        let sum = self.to_truth.iter().chain(&self.to_prediction).sum::<f64>();
        sum / (self.to_truth.len() + self.to_prediction.len()) as f64
    }

    fn hd95(&self) -> f64 {
        let mut pooled = [self.to_truth.as_slice(), &self.to_prediction].concat();
        percentile(&mut pooled, 95.0)
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// NumPy's default percentile: linear interpolation between the two nearest order statistics.
fn percentile(values: &mut [f64], percent: f64) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let place = percent / 100.0 * (values.len() - 1) as f64;
    let below = place.floor() as usize;
    let above = (below + 1).min(values.len() - 1);
    values[below] + (values[above] - values[below]) * (place - below as f64)
}

fn gather(mask: &[bool], values: &[f64]) -> Vec<f64> {
    mask.iter().zip(values).filter(|(m, _)| **m).map(|(_, v)| *v).collect()
}

/// Half-open ranges on the three axes.
struct BoundingBox {
    low: [usize; 3],
    high: [usize; 3],
}

impl BoundingBox {
    fn around(a: &[bool], b: &[bool], [_, h, w]: [usize; 3]) -> Self {
        let (mut low, mut high) = ([usize::MAX; 3], [0; 3]);
        for (i, (&a, &b)) in a.iter().zip(b).enumerate() {
            if a || b {
                let at = [i / (h * w), i / w % h, i % w];
                for axis in 0..3 {
                    low[axis] = low[axis].min(at[axis]);
                    high[axis] = high[axis].max(at[axis] + 1);
                }
            }
        }
        Self { low, high }
    }

    fn shape(&self) -> [usize; 3] {
        std::array::from_fn(|axis| self.high[axis] - self.low[axis])
    }

    fn crop(&self, mask: &[bool], [_, h, w]: [usize; 3]) -> Vec<bool> {
        let mut out = Vec::with_capacity(self.shape().iter().product());
        for z in self.low[0]..self.high[0] {
            for y in self.low[1]..self.high[1] {
                let row = (z * h + y) * w;
                out.extend_from_slice(&mask[row + self.low[2]..row + self.high[2]]);
            }
        }
        out
    }
}

/// The voxels of `mask` with at least one of their six face neighbours outside it.
fn surface(mask: &[bool], [d, h, w]: [usize; 3]) -> Vec<bool> {
    let inside = |z: usize, y: usize, x: usize| mask[(z * h + y) * w + x];
    let interior = |z: usize, y: usize, x: usize| {
        z > 0
            && z + 1 < d
            && y > 0
            && y + 1 < h
            && x > 0
            && x + 1 < w
            && inside(z - 1, y, x)
            && inside(z + 1, y, x)
            && inside(z, y - 1, x)
            && inside(z, y + 1, x)
            && inside(z, y, x - 1)
            && inside(z, y, x + 1)
    };
    (0..mask.len()).map(|i| mask[i] && !interior(i / (h * w), i / w % h, i % w)).collect()
}

/// For every voxel the Euclidean distance to the nearest voxel of `sites`, in the spacing's unit.
///
/// Infinite everywhere if there is no site. `sites` is `[D, H, W]`; the result has its shape.
#[must_use]
pub fn distance_to(sites: &[bool], shape: [usize; 3], spacing: [f64; 3]) -> Vec<f64> {
    let mut squared: Vec<f64> =
        sites.iter().map(|s| if *s { 0.0 } else { f64::INFINITY }).collect();
    let strides = [shape[1] * shape[2], shape[2], 1];
    let mut envelope = Envelope::default();
    for axis in [2, 1, 0] {
        let (length, stride) = (shape[axis], strides[axis]);
        let mut line = vec![0.0; length];
        for start in 0..squared.len() {
            if start / stride % length != 0 {
                continue;
            }
            for (i, value) in line.iter_mut().enumerate() {
                *value = squared[start + i * stride];
            }
            envelope.build(&line, spacing[axis]);
            envelope.read(&line, spacing[axis], |i, value| squared[start + i * stride] = value);
        }
    }
    squared.iter_mut().for_each(|v| *v = v.sqrt());
    squared
}

/// The lower envelope of the parabolas `(x - v)^2 + f(v)` over one line, reused between lines.
#[derive(Default)]
struct Envelope {
    /// Indices of the parabolas in the envelope, from left to right.
    vertices: Vec<usize>,
    /// Where the parabola of the same place takes over from the one before it.
    starts: Vec<f64>,
}

impl Envelope {
    fn build(&mut self, line: &[f64], spacing: f64) {
        self.vertices.clear();
        self.starts.clear();
        for (q, &height) in line.iter().enumerate() {
            if height.is_infinite() {
                continue; // no parabola: it would lie above every other one
            }
            let x = q as f64 * spacing;
            let mut start = f64::NEG_INFINITY;
            while let (Some(&v), Some(&taken_over)) = (self.vertices.last(), self.starts.last()) {
                let u = v as f64 * spacing;
                start = ((height + x * x) - (line[v] + u * u)) / (2.0 * (x - u));
                if start > taken_over {
                    break;
                }
                self.vertices.pop();
                self.starts.pop();
                start = f64::NEG_INFINITY;
            }
            self.vertices.push(q);
            self.starts.push(start);
        }
    }

    fn read(&self, line: &[f64], spacing: f64, mut write: impl FnMut(usize, f64)) {
        let mut k = 0;
        if self.vertices.is_empty() {
            return; // the line stays infinite
        }
        for i in 0..line.len() {
            let x = i as f64 * spacing;
            while k + 1 < self.vertices.len() && self.starts[k + 1] < x {
                k += 1;
            }
            let v = self.vertices[k];
            let offset = x - v as f64 * spacing;
            write(i, offset * offset + line[v]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn naive_distance(sites: &[bool], [_, h, w]: [usize; 3], spacing: [f64; 3]) -> Vec<f64> {
        let at = |i: usize| [i / (h * w), i / w % h, i % w].map(|v| v as f64);
        let squared = |i: usize, j: usize| -> f64 {
            (0..3).map(|a| ((at(i)[a] - at(j)[a]) * spacing[a]).powi(2)).sum()
        };
        (0..sites.len())
            .map(|i| {
                (0..sites.len())
                    .filter(|j| sites[*j])
                    .map(|j| squared(i, j))
                    .fold(f64::INFINITY, f64::min)
                    .sqrt()
            })
            .collect()
    }

    proptest! {
        #[test]
        fn the_transform_agrees_with_looking_at_every_pair(
            sites in proptest::collection::vec(proptest::bool::weighted(0.1), 4 * 5 * 6),
            spacing in [0.3_f64..12.0, 0.3_f64..3.0, 0.3_f64..3.0],
        ) {
            let shape = [4, 5, 6];
            let fast = distance_to(&sites, shape, spacing);
            for (a, b) in fast.iter().zip(naive_distance(&sites, shape, spacing)) {
                prop_assert!(a == &b || (a - b).abs() < 1e-9, "{a} is not {b}");
            }
        }
    }

    #[test]
    fn each_policy_says_something_else_about_an_empty_prediction() {
        let (none, some) = ([false; 8], [true; 8]);
        let score = |p, t, policy| score_masks(p, t, [2, 2, 2], [1.0; 3], policy);
        let zero = score(&none, &some, EmptyPolicy::Zero).unwrap();
        assert_eq!((zero.dice, zero.hd95), (Some(0.0), Some(0.0)));
        assert!(zero.empty.prediction_is_empty());
        let left_out = score(&none, &some, EmptyPolicy::Exclude).unwrap();
        assert_eq!((left_out.dice, left_out.hd95), (Some(0.0), None));
        assert_eq!(score(&none, &none, EmptyPolicy::Exclude).unwrap().dice, None);
        let penalty = score(&some, &none, EmptyPolicy::Penalise).unwrap();
        let far = Some(PENALTY_DISTANCE);
        assert_eq!((penalty.dice, penalty.asd, penalty.assd), (Some(0.0), far, far));
        assert_eq!(score(&none, &none, EmptyPolicy::Penalise).unwrap().dice, Some(1.0));
        assert_eq!(
            score(&none, &some, EmptyPolicy::Refuse),
            Err(MetricError::Empty(Emptiness::Prediction))
        );
    }

    /// One voxel against a row of four: distances 0 one way, 0, 1, 2 and 3 the other.
    #[test]
    fn the_symmetric_distance_is_over_both_surfaces_together() {
        let (one, row) = ([true, false, false, false, false], [true, true, true, true, false]);
        let score =
            |p, t| score_masks(p, t, [1, 1, 5], [1.0, 1.0, 2.0], EmptyPolicy::Zero).unwrap();
        let (there, back) = (score(&one, &row), score(&row, &one));
        assert_eq!((there.asd, back.asd), (Some(0.0), Some(3.0)));
        assert_eq!((there.assd, back.assd), (Some(2.0 * 6.0 / 5.0), Some(2.0 * 6.0 / 5.0)));
    }

    #[test]
    fn wrong_lengths_and_spacings_are_refused() {
        let mask = [true; 8];
        let policy = EmptyPolicy::Zero;
        assert!(matches!(
            score_masks(&mask, &mask[..7], [2, 2, 2], [1.0; 3], policy),
            Err(MetricError::Shape { .. })
        ));
        for bad in [0.0, -1.0, f64::NAN] {
            assert!(matches!(
                score_masks(&mask, &mask, [2, 2, 2], [1.0, bad, 1.0], policy),
                Err(MetricError::Spacing(_))
            ));
        }
    }
}
