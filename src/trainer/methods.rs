//! From a configuration to a method, its network and its learning rate.

use crate::config::{self, LrSchedule, RunConfig, UpMode};
use crate::data::{Manifest, Share};
use crate::loss::{Objective, rampup::RampUp};
use crate::method::{Bcp, Consistency, Cpcr, Cps, McNet, MeanTeacher, Method, Supervised, Urpc};
use crate::model::{self, Layout, NetworkConfig};
use crate::types::Step;

/// The method that a configuration asks for; an epoch of the labelled stream has `epoch_steps` steps.
pub(super) fn method(config: &RunConfig, epoch_steps: u64) -> Box<dyn Method> {
    let loss = &config.loss;
    let consistency = Consistency {
        warm_up: loss.warmup_epochs.saturating_mul(epoch_steps),
        ramp: RampUp {
            top: loss.consistency_weight,
            length: loss.rampup_epochs,
            every: loss.rampup_every,
        },
    };
    let objective = Objective { temperature: loss.temperature, ..Objective::default() };
    match config.method {
        config::Method::Cpcr | config::Method::CpcrFocal => Box::new(Cpcr {
            objective,
            focal: config.method == config::Method::CpcrFocal,
            distill_weight: loss.distill_weight,
            entropy_weight: loss.entropy_weight,
            consistency,
        }),
        config::Method::Supervised => Box::new(Supervised { objective }),
        config::Method::Urpc => Box::new(Urpc { consistency }),
        config::Method::Mcnet => Box::new(McNet { consistency }),
        config::Method::MeanTeacher => Box::new(MeanTeacher {
            consistency,
            decay: loss.ema_decay,
            uncertainty: loss.uncertainty_mask.then_some(config.train.iterations),
        }),
        config::Method::Cps => Box::new(Cps { consistency }),
        config::Method::Bcp => {
            Box::new(Bcp { warm_up: consistency.warm_up, decay: loss.ema_decay })
        }
    }
}

/// The network that a configuration asks for, for a dataset's classes and channels.
pub(super) fn network(config: &RunConfig, manifest: &Manifest) -> NetworkConfig {
    let up = |mode: &UpMode| match mode {
        UpMode::Transposed => model::UpMode::Transposed,
        UpMode::Bilinear => model::UpMode::Bilinear,
        UpMode::Nearest => model::UpMode::Nearest,
        UpMode::Bicubic => model::UpMode::Bicubic,
    };
    let sizes = NetworkConfig {
        in_channels: manifest.channel_count() as i64,
        classes: manifest.classes.len() as i64,
        widths: config.model.widths.map(i64::from),
        up: config.model.up.iter().map(up).collect(),
        pyramid: true,
        dropout: config.model.dropout,
        aux_dropout: config.model.aux_dropout,
        layout: Layout::ChannelsLast,
        precision: match config.train.precision {
            config::Precision::Bf16 => model::Precision::Bf16,
            config::Precision::F64 => model::Precision::F64,
            config::Precision::F32 | config::Precision::Tf32 => model::Precision::F32,
        },
    };
    method(config, 0).network(sizes)
}

/// The learning rate of the step that follows `done` steps.
pub(super) fn learning_rate(config: &RunConfig, done: Step) -> f64 {
    let train = &config.train;
    match train.schedule {
        LrSchedule::Constant => train.lr,
        // What the step before this one left behind, from the count before it.
        LrSchedule::Poly => {
            let before = done.0.saturating_sub(1).min(train.iterations) as f64;
            train.lr * (1.0 - before / train.iterations.max(1) as f64).powf(0.9)
        }
    }
}

/// Refuses a rank whose share of a batch is smaller than the method can work with: that of a pool without
/// unlabelled samples, which a configuration alone does not show.
pub(super) fn check_share(config: &RunConfig, share: &Share) -> Result<(), config::ConfigError> {
    let (labelled, unlabelled) = config.method.smallest_share();
    let parts = [
        ("batch.labelled", share.labelled.len(), labelled, config.batch.labelled),
        ("batch.unlabelled", share.unlabelled.len(), unlabelled, config.batch.unlabelled),
    ];
    for (key, has, needs, value) in parts {
        if has < needs as usize {
            return Err(config::ConfigError::OutOfRange {
                key,
                value: value.to_string(),
                reason: format!(
                    "this method needs {needs} of them on every worker, and a worker has {has}: is \
                     there anything unlabelled in the dataset?"
                ),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Method as Name, Train};

    #[test]
    fn every_method_is_built_and_ends_its_terms_with_the_total() {
        for name in Name::ALL {
            let config = RunConfig { method: name, ..RunConfig::default() };
            let method = method(&config, 11);
            assert_eq!(method.terms().last(), Some(&"total"), "{name:?}");
            assert!(!method.cast().teacher || method.teacher_decay(100_000) == 0.99, "{name:?}");
            let heads = method.network(NetworkConfig::default());
            let pyramid = [Name::Supervised, Name::Cpcr, Name::CpcrFocal, Name::Urpc];
            assert_eq!(heads.pyramid, pyramid.contains(&name), "{name:?}");
        }
    }

    #[test]
    fn the_polynomial_rate_lags_one_step_and_ends_above_zero() {
        let train =
            Train { lr: 0.01, iterations: 100, schedule: LrSchedule::Poly, ..Train::default() };
        let config = RunConfig { train, ..RunConfig::default() };
        assert_eq!(learning_rate(&config, Step(0)), 0.01);
        assert_eq!(learning_rate(&config, Step(1)), 0.01);
        assert!((learning_rate(&config, Step(51)) - 0.01 * 0.5f64.powf(0.9)).abs() < 1e-15);
        assert!(learning_rate(&config, Step(99)) > 0.0);
    }

    #[test]
    fn a_share_that_is_too_small_is_refused_by_key() {
        let share = Share { labelled: 0..1, unlabelled: 4..4 };
        let config = RunConfig { method: Name::MeanTeacher, ..RunConfig::default() };
        let error = check_share(&config, &share).unwrap_err();
        assert!(error.to_string().contains("batch.unlabelled"), "{error}");
        check_share(&RunConfig::default(), &share).unwrap();
    }
}
