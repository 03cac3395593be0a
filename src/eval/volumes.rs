//! One volume at a time: segment it slice by slice, and score what came out.
//!
//! The literature's protocol: each slice is zoomed to the patch size (order 0), segmented, and
//! zoomed back (order 0); scores are then taken in 3-D on the original grid. What segments is
//! behind [`Segmenter`], how slices are zoomed behind [`Zoom`]: this file knows neither tensors
//! nor files.

use serde::{Deserialize, Serialize};

use super::metrics::{ClassScores, EmptyPolicy, MetricError, score_masks};

/// Height and width, in pixels.
pub type Size = (usize, usize);

/// Anything that turns slices of the patch size into labels.
pub trait Segmenter {
    /// What can go wrong in it.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Channels of the images that it takes.
    fn channels(&self) -> usize {
        1
    }

    /// Labels `n` slices at once: `slices` is `[n, C, h, w]`, the result `[n, h, w]`.
    ///
    /// # Errors
    /// Whatever the model reports.
    fn segment(
        &mut self,
        slices: &[f32],
        n: usize,
        h: usize,
        w: usize,
    ) -> Result<Vec<u8>, Self::Error>;
}

/// Labels, and the probability of each class.
pub type LabelsAndProbabilities = (Vec<u8>, Vec<f32>);

/// A segmenter that also says how sure it is.
pub trait ProbabilitySegmenter: Segmenter {
    /// As [`Segmenter::segment`], with the probability of each class, `[n, classes, h, w]`.
    ///
    /// # Errors
    /// Whatever the model reports.
    fn segment_with_probabilities(
        &mut self,
        slices: &[f32],
        n: usize,
        h: usize,
        w: usize,
    ) -> Result<LabelsAndProbabilities, Self::Error>;
}

/// Zooms one slice `[h, w]` from the first size to the second.
pub type ZoomFn<'a, T> = dyn Fn(&[T], Size, Size) -> Vec<T> + 'a;

/// Nearest-neighbour zoom of one slice `[h, w]`, on the sampling grid of `scipy.ndimage.zoom`.
#[derive(Clone, Copy)]
pub struct Zoom<'a> {
    /// Zooms intensities.
    pub image: &'a ZoomFn<'a, f32>,
    /// Zooms labels.
    pub label: &'a ZoomFn<'a, u8>,
}

/// What distances are counted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DistanceUnit {
    /// Unit spacing, as in the literature's tables.
    #[default]
    Voxel,
    /// The file's own spacing, what a clinician reads.
    Mm,
}

impl DistanceUnit {
    /// The spacing to score with, for a file of spacing `file_mm` (depth, height, width).
    #[must_use]
    pub fn spacing(self, file_mm: [f64; 3]) -> [f64; 3] {
        match self {
            Self::Voxel => [1.0; 3],
            Self::Mm => file_mm,
        }
    }
}

/// A volume with its truth. Borrowed: volumes are large.
#[derive(Debug, Clone, Copy)]
pub struct Volume<'a> {
    /// Name of the case, unique within a split.
    pub case: &'a str,
    /// Intensities in `0..=1`, `[D, C, H, W]`.
    pub image: &'a [f32],
    /// True classes, `[D, H, W]`.
    pub label: &'a [u8],
    /// Depth, height, width.
    pub shape: [usize; 3],
    /// Millimetres between voxels along depth, height, width.
    pub spacing_mm: [f64; 3],
}

/// How volumes are segmented and scored.
#[derive(Debug, Clone, Copy)]
pub struct EvalSettings {
    /// The size the network sees.
    pub patch: Size,
    /// Number of classes, background (0) included.
    pub classes: u8,
    /// Slices per forward pass.
    pub batch: usize,
    /// What distances are counted in.
    pub unit: DistanceUnit,
    /// What an empty mask is worth.
    pub policy: EmptyPolicy,
}

/// The scores of one case: one entry per foreground class, class 1 first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CaseScores {
    /// Name of the case.
    pub case: String,
    /// Scores of classes `1..classes`.
    pub classes: Vec<ClassScores>,
}

impl CaseScores {
    /// The mean of its classes' Dice, as far as they have one.
    #[must_use]
    pub fn mean_dice(&self) -> Option<f64> {
        let dice: Vec<f64> = self.classes.iter().filter_map(|class| class.dice).collect();
        (!dice.is_empty()).then(|| dice.iter().sum::<f64>() / dice.len() as f64)
    }
}

/// Why a volume could not be scored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvalError<E: std::error::Error + Send + Sync + 'static> {
    /// The model failed.
    #[error("segment case {case}: {source}")]
    Segment {
        /// Name of the case.
        case: String,
        /// What the model said.
        source: E,
    },
    /// A buffer has the wrong number of elements.
    #[error("case {case}: {what} should have {expected} elements, has {actual}")]
    Length {
        /// Name of the case.
        case: String,
        /// Which buffer.
        what: &'static str,
        /// What its shape asks for.
        expected: usize,
        /// What it has.
        actual: usize,
    },
    /// No score for the masks.
    #[error("score class {class} of case {case}: {source}")]
    Metric {
        /// Name of the case.
        case: String,
        /// The class.
        class: u8,
        /// Why.
        source: MetricError,
    },
}

/// Segments a volume `[D, C, H, W]`: labels `[D, H, W]` on the volume's own grid.
///
/// # Errors
/// When the segmenter fails, or a buffer (its result and the zooms' included) has the wrong length.
pub fn segment_volume<S: Segmenter>(
    segmenter: &mut S,
    case: &str,
    image: &[f32],
    [d, h, w]: [usize; 3],
    settings: &EvalSettings,
    zoom: Zoom<'_>,
) -> Result<Vec<u8>, EvalError<S::Error>> {
    let mut labels = Vec::with_capacity(d * h * w);
    let (patch_h, patch_w) = settings.patch;
    let channels = segmenter.channels();
    by_patches((case, channels), image, [d, h, w], settings, zoom, |patches, n| {
        let predicted = segmenter
            .segment(patches, n, patch_h, patch_w)
            .map_err(|source| EvalError::Segment { case: case.to_owned(), source })?;
        check(case, "prediction", predicted.len(), n * patch_h * patch_w)?;
        for slice in predicted.chunks(patch_h * patch_w) {
            labels.extend((zoom.label)(slice, settings.patch, (h, w)));
        }
        Ok(())
    })?;
    check(case, "prediction zoomed back", labels.len(), d * h * w)?;
    Ok(labels)
}

/// As [`segment_volume`], with the probability of each class, `[D, classes, H, W]`, whose largest
/// the labels are.
///
/// # Errors
/// As [`segment_volume`].
pub fn segment_with_probabilities<S: ProbabilitySegmenter>(
    segmenter: &mut S,
    case: &str,
    image: &[f32],
    [d, h, w]: [usize; 3],
    settings: &EvalSettings,
    zoom: Zoom<'_>,
) -> Result<LabelsAndProbabilities, EvalError<S::Error>> {
    let classes = usize::from(settings.classes);
    let (patch_h, patch_w) = settings.patch;
    let pixels = patch_h * patch_w;
    let mut labels = Vec::with_capacity(d * h * w);
    let mut probabilities = Vec::with_capacity(d * classes * h * w);
    let channels = segmenter.channels();
    by_patches((case, channels), image, [d, h, w], settings, zoom, |patches, n| {
        let (predicted, each) = segmenter
            .segment_with_probabilities(patches, n, patch_h, patch_w)
            .map_err(|source| EvalError::Segment { case: case.to_owned(), source })?;
        check(case, "prediction", predicted.len(), n * pixels)?;
        check(case, "probabilities", each.len(), n * classes * pixels)?;
        for slice in predicted.chunks(pixels) {
            labels.extend((zoom.label)(slice, settings.patch, (h, w)));
        }
        for plane in each.chunks(pixels) {
            probabilities.extend((zoom.image)(plane, settings.patch, (h, w)));
        }
        Ok(())
    })?;
    check(case, "prediction zoomed back", labels.len(), d * h * w)?;
    check(case, "probabilities zoomed back", probabilities.len(), d * classes * h * w)?;
    Ok((labels, probabilities))
}

fn check<E: std::error::Error + Send + Sync + 'static>(
    case: &str,
    what: &'static str,
    actual: usize,
    expected: usize,
) -> Result<(), EvalError<E>> {
    match actual == expected {
        true => Ok(()),
        false => Err(EvalError::Length { case: case.to_owned(), what, expected, actual }),
    }
}

/// Zooms slices to the patch size and hands them to `work`, a batch `[n, channels, patch]` at a time.
fn by_patches<E: std::error::Error + Send + Sync + 'static>(
    (case, channels): (&str, usize),
    image: &[f32],
    [d, h, w]: [usize; 3],
    settings: &EvalSettings,
    zoom: Zoom<'_>,
    mut work: impl FnMut(&[f32], usize) -> Result<(), EvalError<E>>,
) -> Result<(), EvalError<E>> {
    check(case, "image", image.len(), d * channels * h * w)?;
    if image.is_empty() {
        return Ok(());
    }
    let patch_len = channels * settings.patch.0 * settings.patch.1;
    for slices in image.chunks(settings.batch.max(1) * channels * h * w) {
        let n = slices.len() / (channels * h * w);
        let mut patches = Vec::with_capacity(n * patch_len);
        for slice in slices.chunks(h * w) {
            patches.extend((zoom.image)(slice, (h, w), settings.patch));
        }
        check(case, "zoomed slices", patches.len(), n * patch_len)?;
        work(&patches, n)?;
    }
    Ok(())
}

/// Segments a volume and scores every foreground class in 3-D.
///
/// # Errors
/// As [`segment_volume`]; and when the policy refuses an empty mask.
pub fn evaluate_volume<S: Segmenter>(
    segmenter: &mut S,
    volume: Volume<'_>,
    settings: &EvalSettings,
    zoom: Zoom<'_>,
) -> Result<CaseScores, EvalError<S::Error>> {
    let predicted =
        segment_volume(segmenter, volume.case, volume.image, volume.shape, settings, zoom)?;
    score_labels(&predicted, volume, settings)
}

/// Scores labels that are there already, `[D, H, W]`, against the volume's truth.
///
/// # Errors
/// When lengths disagree, or the policy refuses an empty mask.
pub fn score_labels<E: std::error::Error + Send + Sync + 'static>(
    predicted: &[u8],
    volume: Volume<'_>,
    settings: &EvalSettings,
) -> Result<CaseScores, EvalError<E>> {
    let spacing = settings.unit.spacing(volume.spacing_mm);
    let classes = (1..settings.classes)
        .map(|class| {
            let predicted: Vec<bool> = predicted.iter().map(|l| *l == class).collect();
            let truth: Vec<bool> = volume.label.iter().map(|l| *l == class).collect();
            score_masks(&predicted, &truth, volume.shape, spacing, settings.policy)
                .map_err(|source| EvalError::Metric { case: volume.case.to_owned(), class, source })
        })
        .collect::<Result<_, _>>()?;
    Ok(CaseScores { case: volume.case.to_owned(), classes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    /// A "model" that reads the class off the intensity.
    struct Rounds {
        largest_batch: usize,
    }

    impl Segmenter for Rounds {
        type Error = Infallible;

        fn segment(
            &mut self,
            slices: &[f32],
            n: usize,
            h: usize,
            w: usize,
        ) -> Result<Vec<u8>, Infallible> {
            assert_eq!(slices.len(), n * h * w);
            self.largest_batch = self.largest_batch.max(n);
            Ok(slices.iter().map(|v| v.round() as u8).collect())
        }
    }

    fn nearest<T: Copy>(slice: &[T], (h, w): Size, (to_h, to_w): Size) -> Vec<T> {
        (0..to_h * to_w).map(|i| slice[(i / to_w * h / to_h) * w + (i % to_w) * w / to_w]).collect()
    }

    const ZOOM: Zoom<'static> =
        Zoom { image: &|s, a, b| nearest(s, a, b), label: &|s, a, b| nearest(s, a, b) };

    fn settings(batch: usize) -> EvalSettings {
        EvalSettings {
            patch: (8, 8),
            classes: 3,
            batch,
            unit: DistanceUnit::Voxel,
            policy: EmptyPolicy::Zero,
        }
    }

    #[test]
    fn a_perfect_model_scores_one_whatever_the_batch() {
        let label: Vec<u8> = (0..5 * 4 * 4).map(|i| (i / 7 % 3) as u8).collect();
        let image: Vec<f32> = label.iter().map(|l| f32::from(*l)).collect();
        let volume = Volume {
            case: "a",
            image: &image,
            label: &label,
            shape: [5, 4, 4],
            spacing_mm: [10.0, 1.25, 1.25],
        };
        for batch in [1, 2, 100] {
            let mut model = Rounds { largest_batch: 0 };
            let scores = evaluate_volume(&mut model, volume, &settings(batch), ZOOM).unwrap();
            assert_eq!(scores.classes.len(), 2);
            assert!(scores.classes.iter().all(|c| c.dice == Some(1.0) && c.hd95 == Some(0.0)));
            assert_eq!(model.largest_batch, batch.min(5));
        }
    }

    impl ProbabilitySegmenter for Rounds {
        fn segment_with_probabilities(
            &mut self,
            slices: &[f32],
            n: usize,
            h: usize,
            w: usize,
        ) -> Result<(Vec<u8>, Vec<f32>), Infallible> {
            let labels = self.segment(slices, n, h, w)?;
            let sure = |slice: &[u8]| -> Vec<f32> {
                (0..3)
                    .flat_map(|c| slice.iter().map(move |l| f32::from(u8::from(*l == c))))
                    .collect()
            };
            let probabilities = labels.chunks(h * w).flat_map(sure).collect();
            Ok((labels, probabilities))
        }
    }

    /// A "model" of two channels: the class is the first times two, plus the second.
    struct Sums;

    impl Segmenter for Sums {
        type Error = Infallible;

        fn channels(&self) -> usize {
            2
        }

        fn segment(
            &mut self,
            slices: &[f32],
            n: usize,
            h: usize,
            w: usize,
        ) -> Result<Vec<u8>, Infallible> {
            assert_eq!(slices.len(), n * 2 * h * w);
            let sum = |image: &[f32]| -> Vec<u8> {
                let (first, second) = image.split_at(h * w);
                first.iter().zip(second).map(|(a, b)| (a * 2.0 + b) as u8).collect()
            };
            Ok(slices.chunks(2 * h * w).flat_map(sum).collect())
        }
    }

    #[test]
    fn probabilities_come_slice_by_slice_then_class_by_class() {
        let label: Vec<u8> = (0..5 * 4 * 2).map(|i| (i / 7 % 3) as u8).collect();
        let image: Vec<f32> = label.iter().map(|l| f32::from(*l)).collect();
        for batch in [1, 2, 100] {
            let mut model = Rounds { largest_batch: 0 };
            let shape = [5, 4, 2];
            let (labels, probabilities) =
                segment_with_probabilities(&mut model, "a", &image, shape, &settings(batch), ZOOM)
                    .unwrap();
            assert_eq!(labels, label);
            assert_eq!(probabilities.len(), 3 * label.len());
            for (at, label) in label.iter().enumerate() {
                let (slice, pixel) = (at / 8, at % 8);
                for class in 0..3 {
                    let found = probabilities[(slice * 3 + class) * 8 + pixel];
                    assert_eq!(found, f32::from(u8::from(usize::from(*label) == class)));
                }
            }
        }
    }

    #[test]
    fn slices_keep_their_channels_whatever_the_batch() {
        // Slice 0 is class 1, slice 1 class 2, slice 2 class 3.
        let image: Vec<f32> =
            [0.0, 1.0, 1.0, 0.0, 1.0, 1.0].into_iter().flat_map(|v| [v; 16]).collect();
        for batch in [1, 2, 3] {
            let found =
                segment_volume(&mut Sums, "a", &image, [3, 4, 4], &settings(batch), ZOOM).unwrap();
            assert_eq!(found, [[1_u8; 16], [2; 16], [3; 16]].concat(), "batch {batch}");
        }
        let short = segment_volume(&mut Sums, "a", &image[..48], [3, 4, 4], &settings(1), ZOOM);
        assert!(short.unwrap_err().to_string().contains("96 elements, has 48"));
    }

    #[test]
    fn millimetres_come_from_the_file() {
        let mut label = vec![0_u8; 2 * 4 * 4];
        let mut predicted = label.clone();
        label[0] = 1;
        predicted[16] = 1; // one slice further
        let volume = Volume {
            case: "a",
            image: &[],
            label: &label,
            shape: [2, 4, 4],
            spacing_mm: [10.0, 1.25, 1.25],
        };
        let in_mm = EvalSettings { unit: DistanceUnit::Mm, ..settings(1) };
        for (settings, asd) in [(settings(1), 1.0), (in_mm, 10.0)] {
            let scores = score_labels::<Infallible>(&predicted, volume, &settings).unwrap();
            assert_eq!(scores.classes[0].asd, Some(asd));
        }
    }

    #[test]
    fn a_short_image_is_refused_by_name() {
        let mut model = Rounds { largest_batch: 0 };
        let error = segment_volume(&mut model, "p7", &[0.0; 15], [1, 4, 4], &settings(1), ZOOM);
        assert_eq!(
            error.unwrap_err().to_string(),
            "case p7: image should have 16 elements, has 15"
        );
    }
}
