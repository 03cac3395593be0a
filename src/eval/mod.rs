//! What a trained model is worth: segmentation of volumes, scores, pictures and the report.
//!
//! Tensors are absent: a model comes in as a [`volumes::Segmenter`]. So are files and buckets:
//! everything here goes from values to values, or to bytes that someone else stores.

pub mod components;
pub mod metrics;
pub mod overlay;
pub mod report;
pub mod summary;
pub mod volumes;

pub use metrics::{ClassScores, Emptiness, EmptyPolicy, MetricError, score_masks};
pub use summary::{ClassSummary, Means, Summary, SummaryError};
pub use volumes::{
    CaseScores, DistanceUnit, EvalError, EvalSettings, ProbabilitySegmenter, Segmenter, Volume,
    Zoom, evaluate_volume, score_labels, segment_volume, segment_with_probabilities,
};
