//! The sections of the configuration, each with the paper's values as defaults.
//!
//! Plain data: what the values may be is checked by [`super::RunConfig::validate`].

use std::ops::RangeInclusive;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Which training method; each is described where it is computed, in `method`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// CPCR, supervised part: Dice (the authors' code of 2025-03-30).
    #[default]
    Cpcr,
    /// CPCR, supervised part: Dice + Focal (the authors' code of 2025-05-11).
    CpcrFocal,
    /// The labelled stream alone: the lower bound.
    Supervised,
    /// Uncertainty rectified pyramid consistency.
    Urpc,
    /// Mutual consistency.
    Mcnet,
    /// Mean teacher; UA-MT with `loss.uncertainty_mask`.
    MeanTeacher,
    /// Cross pseudo supervision: two networks.
    Cps,
    /// Bidirectional copy-paste.
    Bcp,
}

impl Method {
    /// Its name in a configuration.
    #[must_use]
    pub fn name(self) -> String {
        let json = serde_json::to_value(self).ok();
        json.and_then(|json| Some(json.as_str()?.to_owned())).unwrap_or_default()
    }

    /// Every method, in the order in which they are told.
    pub const ALL: [Self; 8] = [
        Self::Supervised,
        Self::Cpcr,
        Self::CpcrFocal,
        Self::Urpc,
        Self::Mcnet,
        Self::MeanTeacher,
        Self::Cps,
        Self::Bcp,
    ];

    /// Whether it looks at unlabelled samples at all.
    #[must_use]
    pub fn uses_unlabelled(self) -> bool {
        self != Self::Supervised
    }

    /// How many labelled and unlabelled samples every worker must have in each step: a network's pass
    /// over no samples is none, and workers that sum their statistics would wait for it.
    #[must_use]
    pub fn smallest_share(self) -> (u32, u32) {
        match self {
            Self::Supervised => (1, 0),
            Self::MeanTeacher => (0, 1),
            Self::Bcp => (1, 1),
            Self::Cpcr | Self::CpcrFocal | Self::Urpc | Self::Mcnet | Self::Cps => (0, 0),
        }
    }
}

/// How the learning rate goes over a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LrSchedule {
    /// As it is.
    #[default]
    Constant,
    /// lr (1 - t / iterations)^0.9, set after each step from the t before it.
    Poly,
}

/// How a decoder doubles the size of its deep feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UpMode {
    /// `ConvTranspose2d`, kernel 2, stride 2.
    Transposed,
    /// 1x1 convolution, then bilinear x2, `align_corners = true`.
    Bilinear,
    /// 1x1 convolution, then nearest x2.
    Nearest,
    /// 1x1 convolution, then bicubic x2, `align_corners = true`.
    Bicubic,
}

/// Arithmetic of the training step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// float32, TF32 off: the golden one.
    #[default]
    F32,
    /// float32 with TF32 matrix products on GPUs.
    Tf32,
    /// bfloat16 activations and convolutions; float32 parameters, statistics and losses.
    Bf16,
    /// float64 throughout: slow, to tell an error from rounding.
    F64,
}

macro_rules! section {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $ty:ty = $value:expr,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct $name { $($(#[$field_doc])* pub $field: $ty,)* }

        impl Default for $name {
            fn default() -> Self {
                Self { $($field: $value,)* }
            }
        }
    };
}

section!(
    /// `[model]`: DBPNet.
    Model {
        /// Channels at strides 1, 2, 4, 8, 16.
        widths: [u32; 5] = [16, 32, 64, 128, 256],
        /// How decoder 1 and decoder 2 go up.
        up: [UpMode; 2] = [UpMode::Bilinear, UpMode::Transposed],
        /// Dropout inside the encoder's blocks, per level.
        dropout: [f64; 5] = [0.05, 0.1, 0.2, 0.3, 0.5],
        /// Dropout before the auxiliary head at stride 8.
        aux_dropout: f64 = 0.5,
        /// Batch-norm statistics over the whole batch, not over each worker's part of it.
        sync_batch_norm: bool = true,
    }
);

section!(
    /// `[data]`: what is read.
    Data {
        /// The dataset's folder in an object store; `--data` overrides it.
        url: Option<String> = None,
        /// How many labelled patients are used: the first ones in list order.
        labelled: u32 = 7,
    }
);

section!(
    /// `[batch]`: samples a step, over all workers.
    Batch {
        /// Labelled samples.
        labelled: u32 = 12,
        /// Unlabelled samples.
        unlabelled: u32 = 12,
        /// Scale both by the number of workers (weak scaling; the order then depends on it).
        per_worker: bool = false,
    }
);

section!(
    /// `[loss]`: METHOD, "CPCR: the training objective".
    Loss {
        /// Weight of the main-output distillation.
        distill_weight: f64 = 0.1,
        /// Weight of the entropy term.
        entropy_weight: f64 = 0.1,
        /// Ceiling of the cross-pyramid consistency's ramp-up.
        consistency_weight: f64 = 0.1,
        /// Labelled epochs in which only the supervised terms count (BCP: in which only labelled images are mixed).
        warmup_epochs: u64 = 90,
        /// Ramp-up length, in units of `rampup_every` iterations.
        rampup_epochs: u64 = 200,
        /// Iterations per unit of the ramp-up.
        rampup_every: u64 = 150,
        /// Distillation temperature.
        temperature: f64 = 10.0,
        /// Dice over the whole batch, not over each worker's part of it.
        global_dice: bool = true,
        /// How much of itself a teacher keeps in each step (mean-teacher, bcp).
        ema_decay: f64 = 0.99,
        /// mean-teacher: count only where the teacher is certain (UA-MT).
        uncertainty_mask: bool = false,
    }
);

section!(
    /// `[train]`: optimisation.
    Train {
        /// Optimiser steps in all.
        iterations: u64 = 50_000,
        /// Seed of every draw.
        seed: u64 = 1337,
        /// Arithmetic of the step.
        precision: Precision = Precision::F32,
        /// Learning rate.
        lr: f64 = 0.01,
        /// How it goes over the run.
        schedule: LrSchedule = LrSchedule::Constant,
        /// SGD momentum.
        momentum: f64 = 0.9,
        /// SGD weight decay, on every parameter that has a gradient.
        weight_decay: f64 = 1e-4,
        /// A safetensors file in an object store with weights to start from.
        init_from: Option<String> = None,
    }
);

section!(
    /// `[validate]`: during training.
    Validate {
        /// Steps between validations.
        every: u64 = 200,
    }
);

section!(
    /// `[checkpoint]`.
    Checkpoint {
        /// Steps between checkpoints.
        every: u64 = 500,
        /// How many of the newest are kept.
        keep_last: u32 = 3,
        /// Those whose step is a multiple of this are kept for good; 0: none is.
        keep_every: u64 = 0,
        /// How many of those that validated best are kept.
        keep_best: u32 = 1,
    }
);

section!(
    /// `[loader]`: the input pipeline of each trainer.
    Loader {
        /// Threads that decode, augment and batch.
        threads: u32 = 1,
        /// Blocks fetched from the store side by side.
        fetches: u32 = 16,
        /// Batches made ahead.
        prefetch: u32 = 4,
        /// Folder of the block cache, shared by the processes of a machine. By default, for datasets that come over a
        /// network, `cpcr/blocks` in the user's cache folder; none for others.
        cache_dir: Option<String> = None,
        /// GiB that it may take, over all runs; 0: no cache.
        cache_gib: u32 = 16,
    }
);

section!(
    /// `[telemetry]`: what a run shows of itself.
    Telemetry {
        /// Event files for TensorBoard, in the run's folder.
        tensorboard: bool = true,
        /// Pictures of each validation, prediction beside truth.
        pictures: u32 = 3,
        /// Where traces are exported: seconds between two steps that are traced; 0: all are.
        step_spans_s: f64 = 1.0,
    }
);

impl Telemetry {
    /// The time between two steps that are traced.
    #[must_use]
    pub fn step_spans(&self) -> Duration {
        Duration::try_from_secs_f64(self.step_spans_s).unwrap_or_default()
    }
}

section!(
    /// `[recovery]`: what happens after a loss.
    Recovery {
        /// How many losses without a step that none had taken before, until the run gives up.
        restarts: u32 = 3,
        /// Seconds that the run waits for missing members before it exits 75.
        wait_s: u64 = 25,
        /// Seconds within which training goes on after a process froze or a machine went dark; one that ends
        /// is noticed at once. How long anything may be silent is derived from it.
        target_s: u64 = 8,
    }
);

impl Recovery {
    /// What `target_s` may be: signs of life come every second, and must be allowed to be late.
    pub const TARGET_S: RangeInclusive<u64> = 4..=3600;

    /// How long an agent, or a trainer's pulse, may be silent: the rest of the time is for what follows.
    #[must_use]
    pub fn silence(&self) -> Duration {
        Duration::from_secs(self.target_s) * 3 / 4
    }

    /// How long a collective may make no progress: long enough for whoever is frozen to be killed first, so that
    /// this ends only what nobody else has noticed.
    #[must_use]
    pub fn collective(&self) -> Duration {
        Duration::from_secs(self.target_s) * 5 / 2
    }
}
