//! What the methods' tests share: a small batch on one rank, and passes made of given logits.

use tch::{Device, Kind, Tensor};

use super::{Consistency, Method, StepInput};
use crate::loss::{Alone, Counts, rampup::RampUp};
use crate::model::{Ensemble, NetworkConfig, Outputs, Pyramid, Sgd, Statistics};

/// A weight that is in force from the start.
pub fn always(weight: f64) -> Consistency {
    Consistency { warm_up: 0, ramp: RampUp { top: weight, length: 0, every: 1 } }
}

/// A pass with one decoder's main logits.
pub fn outputs(main: &Tensor) -> Outputs {
    Outputs {
        decoders: vec![Pyramid { main: main.shallow_clone(), aux: None }],
        statistics: Statistics::default(),
    }
}

/// A batch with two classes.
pub struct Case {
    pub images: Tensor,
    pub labels: Tensor,
    samples: Vec<u64>,
    counts: Counts,
}

impl Case {
    /// Random images, labels by brightness; labels are 0 where an image has a pixel or two only.
    pub fn new(labelled: i64, unlabelled: i64, [height, width]: [i64; 2]) -> Self {
        tch::manual_seed(11);
        let n = labelled + unlabelled;
        let images = Tensor::rand([n, 1, height, width], (Kind::Float, Device::Cpu));
        let labels = images.narrow(0, 0, labelled).squeeze_dim(1).gt(0.6);
        let labels = if height * width > 2 { labels } else { labels.zeros_like() };
        Self {
            images,
            labels: labels.to_kind(Kind::Uint8),
            samples: (0..n as u64).collect(),
            counts: Counts { world: 1, labelled: labelled as u64, samples: n as u64 },
        }
    }

    pub fn ensemble(&self, method: &dyn Method) -> Ensemble {
        let sizes =
            NetworkConfig { classes: 2, widths: [4, 4, 4, 4, 4], ..NetworkConfig::default() };
        let sgd = Sgd::new(0.01, 0.9, 0.0);
        Ensemble::new(&method.network(sizes), method.cast(), Device::Cpu, 3, &sgd).unwrap()
    }

    pub fn step(&self, done: u64) -> StepInput<'_> {
        StepInput {
            images: &self.images,
            labels: &self.labels,
            samples: &self.samples,
            counts: self.counts,
            done,
            seed: 1,
            rank: 0,
            sync: None,
            ranks: &Alone,
            global_dice: true,
        }
    }
}
