//! The networks: one encoder, one or two decoders that go up by different means, each with a main
//! prediction and, where asked, a pyramid of auxiliary ones. DBPNet (arXiv 2511.08435) has two decoders
//! with pyramids, MC-Net two without, URPC's network one with, the plain U-Net one without. Names and order of parameters
//! are the reference implementations'.
//!
//! Auxiliary predictions come back coarse, as their heads make them: the reference upsamples
//! them by nearest neighbour, which changes no mean over pixels.

use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use super::ModelError;
use super::blocks::{
    Conv, ConvBlock, Layout, Mode, Precision, Statistics, Training, UpBlock, UpMode, pool, prepare,
};
use super::params::Params;
use super::perturb::{self, DecoderDraws, Draws, dropout};
use crate::bridge::ops::SumOverRanks;

/// What a network looks like; DBPNet by default.
#[derive(Debug, Clone, PartialEq)]
pub struct NetworkConfig {
    /// Channels of the input.
    pub in_channels: i64,
    /// Classes, background included.
    pub classes: i64,
    /// Channels at strides 1, 2, 4, 8, 16.
    pub widths: [i64; 5],
    /// How each decoder goes up: one decoder or two.
    pub up: Vec<UpMode>,
    /// Whether decoders have auxiliary heads.
    pub pyramid: bool,
    /// Dropout in each encoder block.
    pub dropout: [f64; 5],
    /// Dropout before the stride-8 head.
    pub aux_dropout: f64,
    /// Memory order.
    pub layout: Layout,
    /// Arithmetic in training; evaluation is in full precision.
    pub precision: Precision,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self {
            in_channels: 1,
            classes: 4,
            widths: [16, 32, 64, 128, 256],
            up: vec![UpMode::Bilinear, UpMode::Transposed],
            pyramid: true,
            dropout: [0.05, 0.1, 0.2, 0.3, 0.5],
            aux_dropout: 0.5,
            layout: Layout::default(),
            precision: Precision::default(),
        }
    }
}

/// Which heads a training pass computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heads {
    /// The main ones only: warm-up, where the others' loss has weight zero.
    Main,
    /// All four of each decoder.
    All,
}

/// One decoder's predictions: logits.
#[derive(Debug)]
pub struct Pyramid {
    /// `[N, C, H, W]`
    pub main: Tensor,
    /// Coarse, at strides 2, 4, 8: `[N, C, H/s, W/s]`; none with [`Heads::Main`] or without a pyramid.
    pub aux: Option<[Tensor; 3]>,
}

/// What a training pass gives.
#[derive(Debug)]
pub struct Outputs {
    /// One a decoder, decoder 1 first.
    pub decoders: Vec<Pyramid>,
    /// To be committed with the step.
    pub statistics: Statistics,
}

impl Outputs {
    /// Takes the statistics out, for a pass that goes on from them or to be committed.
    #[must_use]
    pub fn take_statistics(&mut self) -> Statistics {
        std::mem::take(&mut self.statistics)
    }
}

#[derive(Debug)]
struct Decoder {
    up: [UpBlock; 4],
    out: Conv,
    /// Heads at strides 2, 4, 8, if it has them. The reference's fourth is only ever stored.
    aux: Option<[Conv; 3]>,
}

impl Decoder {
    fn new(
        params: &mut Params,
        name: &str,
        config: &NetworkConfig,
        mode: UpMode,
    ) -> Result<Self, ModelError> {
        let w = config.widths;
        let mut up =
            |i: usize| UpBlock::new(params, &format!("{name}.up{i}"), [w[5 - i], w[4 - i]], mode);
        let up = [up(1)?, up(2)?, up(3)?, up(4)?];
        let mut head = |what: &str, width: i64| {
            Conv::new(params, &format!("{name}.{what}"), [width, config.classes, 3])
        };
        let out = head("out_conv", w[0])?;
        if !config.pyramid {
            return Ok(Self { up, out, aux: None });
        }
        let unused = head("out_conv_dp4", w[4])?;
        drop(unused);
        let third = head("out_conv_dp3", w[3])?;
        let second = head("out_conv_dp2", w[2])?;
        let first = head("out_conv_dp1", w[1])?;
        Ok(Self { up, out, aux: Some([first, second, third]) })
    }

    /// Features at strides 8, 4, 2, 1 from the encoder's `[x0, .., x4]`.
    fn features(&self, x: &[Tensor; 5], mode: &mut Mode) -> Result<[Tensor; 4], ModelError> {
        let a = self.up[0].forward(&x[4], &x[3], mode)?;
        let b = self.up[1].forward(&a, &x[2], mode)?;
        let c = self.up[2].forward(&b, &x[1], mode)?;
        let d = self.up[3].forward(&c, &x[0], mode)?;
        Ok([a, b, c, d])
    }

    fn train(
        &self,
        x: &[Tensor; 5],
        heads: Heads,
        draws: &DecoderDraws,
        training: &mut Training,
    ) -> Result<Pyramid, ModelError> {
        let [a, b, c, d] = self.features(x, &mut Mode::Train(training))?;
        // Heads work in full precision: logits keep their precision, and oneDNN's bfloat16 gradient of
        // so few output channels is ten times slower.
        let kind = training.precision.full_kind();
        let wide = |t: &Tensor| t.f_to_kind(kind);
        let main = self.out.forward(&wide(&d)?)?;
        // The key is drawn with or without heads: warm-up changes no other draw.
        let key = training.next_key();
        let aux = match (&self.aux, heads) {
            (None, _) | (_, Heads::Main) => None,
            (Some(head), Heads::All) => {
                let third = head[2].forward(&dropout(&wide(&a)?, training.aux_dropout, key)?)?;
                let second = perturb::feature_dropout(&wide(&b)?, draws.threshold)?;
                let first = perturb::feature_noise(&wide(&c)?, &draws.noise)?;
                Some([head[0].forward(&first)?, head[1].forward(&second)?, third])
            }
        };
        Ok(Pyramid { main, aux })
    }

    /// Its predictions at full size: the main one, then the auxiliary ones it has.
    fn all(&self, x: &[Tensor; 5]) -> Result<Vec<Tensor>, ModelError> {
        let [a, b, c, d] = self.features(x, &mut Mode::Eval)?;
        let size = [d.size()[2], d.size()[3]];
        let mut all = vec![self.out.forward(&d)?];
        for (head, feature) in self.aux.iter().flatten().zip([&c, &b, &a]) {
            // [N, C, H/s, W/s] -> [N, C, H, W]
            all.push(head.forward(feature)?.f_upsample_nearest2d(size, None, None)?);
        }
        Ok(all)
    }
}

/// The references' names: a lone decoder has no number.
fn decoder_name(decoder: usize, of: usize) -> &'static str {
    match (decoder, of) {
        (0, 1) => "decoder",
        (0, _) => "decoder1",
        _ => "decoder2",
    }
}

/// The network.
#[derive(Debug)]
pub struct Network {
    config: NetworkConfig,
    params: Params,
    encoder: [ConvBlock; 5],
    decoders: Vec<Decoder>,
}

impl Network {
    /// A fresh network, drawn from `seed` as PyTorch initialises by default.
    ///
    /// # Errors
    /// A configuration that makes no network.
    pub fn new(config: NetworkConfig, device: Device, seed: u64) -> Result<Self, ModelError> {
        let sizes = [config.in_channels, config.classes];
        if sizes.iter().chain(&config.widths).any(|&n| n < 1) || config.classes < 2 {
            return Err(ModelError::Input("channels, widths >= 1 and classes >= 2".into()));
        }
        if !(1..=2).contains(&config.up.len()) {
            return Err(ModelError::Input("a network has one decoder or two".into()));
        }
        if config.dropout.iter().chain([&config.aux_dropout]).any(|p| !(0.0..1.0).contains(p)) {
            return Err(ModelError::Input("dropout lies in [0, 1)".into()));
        }
        let kind = config.precision.full_kind();
        let mut params = Params::new(device, config.layout, kind, seed);
        let w = config.widths;
        let mut block = |name: String, input: i64, i: usize| {
            ConvBlock::new(&mut params, &name, input, w[i], config.dropout[i])
        };
        let down = |i: usize| format!("encoder.down{i}.maxpool_conv.1.conv_conv");
        let encoder = [
            block("encoder.in_conv.conv_conv".into(), config.in_channels, 0)?,
            block(down(1), w[0], 1)?,
            block(down(2), w[1], 2)?,
            block(down(3), w[2], 3)?,
            block(down(4), w[3], 4)?,
        ];
        let mut decoders = Vec::with_capacity(2);
        for (i, mode) in config.up.iter().enumerate() {
            let name = decoder_name(i, config.up.len());
            decoders.push(Decoder::new(&mut params, name, &config, *mode)?);
        }
        Ok(Self { config, params, encoder, decoders })
    }

    /// Its configuration.
    #[must_use]
    pub fn config(&self) -> &NetworkConfig {
        &self.config
    }

    /// What the names of the decoder begin with whose main output counts at inference.
    #[must_use]
    pub fn first_decoder(&self) -> &'static str {
        decoder_name(0, self.decoders.len())
    }

    /// Its parameters and buffers.
    #[must_use]
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The names of the parameters that get a gradient with these heads, in order: what a
    /// reducer is built over. `out_conv_dp4` never does.
    #[must_use]
    pub fn trained(&self, heads: Heads) -> Vec<String> {
        let idle = |name: &str| {
            name.contains(".out_conv_dp4.")
                || (heads == Heads::Main && name.contains(".out_conv_dp"))
        };
        self.params.parameters().map(|(n, _)| n.to_owned()).filter(|n| !idle(n)).collect()
    }

    fn check(&self, x: &Tensor) -> Result<(), ModelError> {
        let size = x.size();
        let fits = matches!(size.as_slice(), [n, c, h, w]
            if *n > 0 && *c == self.config.in_channels && *h > 0 && *w > 0 && h % 16 == 0 && w % 16 == 0);
        if fits {
            return Ok(());
        }
        Err(ModelError::Input(format!(
            "input {size:?}: wanted [N, {}, H, W] with H and W multiples of 16",
            self.config.in_channels
        )))
    }

    /// `[N, in, H, W]` -> features at strides 1, 2, 4, 8, 16.
    fn encode(
        &self,
        x: &Tensor,
        precision: Precision,
        mode: &mut Mode,
    ) -> Result<[Tensor; 5], ModelError> {
        let x = prepare(x, self.config.layout, precision)?;
        let x0 = self.encoder[0].forward_image(&x, precision, mode)?;
        let x1 = self.encoder[1].forward(&pool(&x0)?, mode)?;
        let x2 = self.encoder[2].forward(&pool(&x1)?, mode)?;
        let x3 = self.encoder[3].forward(&pool(&x2)?, mode)?;
        let x4 = self.encoder[4].forward(&pool(&x3)?, mode)?;
        Ok([x0, x1, x2, x3, x4])
    }

    /// A training pass: labelled samples first in `x` `[N, in, H, W]`. Batch-norm statistics are
    /// summed over ranks with `sync`, and stay out of force until committed.
    ///
    /// # Errors
    /// An input that does not fit; a failing sum over ranks.
    pub fn forward_train(
        &self,
        x: &Tensor,
        draws: &Draws,
        heads: Heads,
        sync: Option<&Arc<dyn SumOverRanks>>,
    ) -> Result<Outputs, ModelError> {
        self.forward_train_after(Statistics::default(), x, draws, heads, sync)
    }

    /// The same after another pass of the same step, whose statistics are not committed yet:
    /// running statistics go on from those.
    ///
    /// # Errors
    /// An input that does not fit; a failing sum over ranks.
    pub fn forward_train_after(
        &self,
        statistics: Statistics,
        x: &Tensor,
        draws: &Draws,
        heads: Heads,
        sync: Option<&Arc<dyn SumOverRanks>>,
    ) -> Result<Outputs, ModelError> {
        self.check(x)?;
        let mut training = Training {
            dropout: draws.dropout,
            aux_dropout: self.config.aux_dropout,
            precision: self.config.precision,
            sync,
            statistics,
            place: 0,
        };
        let features = self.encode(x, self.config.precision, &mut Mode::Train(&mut training))?;
        let mut decoders = Vec::with_capacity(2);
        for (decoder, draws) in self.decoders.iter().zip(&draws.decoders) {
            decoders.push(decoder.train(&features, heads, draws, &mut training)?);
        }
        Ok(Outputs { decoders, statistics: training.statistics })
    }

    /// Decoder 1's main logits `[N, C, H, W]` with the running statistics: all that inference
    /// needs.
    ///
    /// # Errors
    /// An input that does not fit.
    pub fn forward_eval(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        self.check(x)?;
        tch::no_grad(|| {
            let features = self.encode(x, self.config.precision.full(), &mut Mode::Eval)?;
            let [.., d] = self.decoders[0].features(&features, &mut Mode::Eval)?;
            self.decoders[0].out.forward(&d)
        })
    }

    /// The mean of all decoders' probabilities, `[N, C, H, W]`.
    ///
    /// # Errors
    /// An input that does not fit.
    pub fn forward_eval_mean(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        self.check(x)?;
        tch::no_grad(|| {
            let features = self.encode(x, self.config.precision.full(), &mut Mode::Eval)?;
            let mut all = Vec::with_capacity(2);
            for decoder in &self.decoders {
                let [.., d] = decoder.features(&features, &mut Mode::Eval)?;
                all.push(decoder.out.forward(&d)?.f_softmax(1, Kind::Float)?);
            }
            Ok(Tensor::f_stack(&all, 0)?.f_mean_dim([0i64].as_slice(), false, Kind::Float)?)
        })
    }

    /// All predictions at full size, in the reference's order: for checks against it.
    ///
    /// # Errors
    /// An input that does not fit.
    pub fn forward_eval_all(&self, x: &Tensor) -> Result<Vec<Tensor>, ModelError> {
        self.check(x)?;
        tch::no_grad(|| {
            let features = self.encode(x, self.config.precision.full(), &mut Mode::Eval)?;
            let mut all = Vec::with_capacity(8);
            for decoder in &self.decoders {
                all.extend(decoder.all(&features)?);
            }
            Ok(all)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_size_has_the_reference_count_of_parameters() {
        let net = Network::new(NetworkConfig::default(), Device::Cpu, 1).unwrap();
        assert_eq!(net.params().parameter_count(), 2_612_216);
        assert_eq!(net.trained(Heads::All).len() + 4, net.params().parameters().count());
        assert_eq!(net.trained(Heads::Main).len() + 16, net.params().parameters().count());
    }

    /// Parameter counts of the other networks, worked out by hand from the reference's layers.
    #[test]
    fn one_decoder_or_two_with_or_without_a_pyramid() {
        let count = |up: &[UpMode], pyramid| {
            let config = NetworkConfig { up: up.to_vec(), pyramid, ..NetworkConfig::default() };
            Network::new(config, Device::Cpu, 1).unwrap().params().parameter_count()
        };
        let heads = 4 * (9 * (32 + 64 + 128 + 256) + 4);
        let (one, two) = ([UpMode::Bilinear], [UpMode::Bilinear, UpMode::Transposed]);
        assert_eq!(count(&one, true), count(&one, false) + heads);
        assert_eq!(count(&two, false), 2_612_216 - 2 * heads);
        assert!(matches!(
            Network::new(NetworkConfig { up: vec![], ..Default::default() }, Device::Cpu, 1),
            Err(ModelError::Input(_))
        ));
    }

    /// Two passes of a step leave the running statistics that two steps would.
    #[test]
    fn a_second_pass_goes_on_from_the_first_ones_statistics() {
        let config = NetworkConfig { widths: [4, 8, 8, 8, 8], ..NetworkConfig::default() };
        let x = [1, 2].map(|seed| {
            tch::manual_seed(seed);
            Tensor::rand([2, 1, 32, 32], (Kind::Float, Device::Cpu))
        });
        let draws = Draws::keyed(1, 0, 0);
        let nets = [0, 1].map(|_| Network::new(config.clone(), Device::Cpu, 1).unwrap());
        for x in &x {
            let out = nets[0].forward_train(x, &draws, Heads::Main, None).unwrap();
            out.statistics.commit().unwrap();
        }
        let first = nets[1].forward_train(&x[0], &draws, Heads::Main, None).unwrap();
        let second = nets[1]
            .forward_train_after(first.statistics, &x[1], &draws, Heads::Main, None)
            .unwrap();
        second.statistics.commit().unwrap();
        assert_eq!(nets[0].params().to_host().unwrap(), nets[1].params().to_host().unwrap());
    }

    #[test]
    fn statistics_change_at_commit_and_not_before() {
        let config = NetworkConfig { widths: [4, 8, 8, 8, 8], ..NetworkConfig::default() };
        let net = Network::new(config, Device::Cpu, 1).unwrap();
        let x = Tensor::rand([2, 1, 32, 32], (Kind::Float, Device::Cpu));
        let before = net.params().to_host().unwrap();
        let out = net.forward_train(&x, &Draws::keyed(1, 0, 0), Heads::Main, None).unwrap();
        assert_eq!(net.params().to_host().unwrap(), before);
        out.statistics.commit().unwrap();
        let after = net.params().to_host().unwrap();
        let changed = after.iter().zip(&before).filter(|(a, b)| a != b).count();
        assert_eq!(changed, 26 * 3);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let net = Network::new(NetworkConfig::default(), Device::Cpu, 1).unwrap();
        for size in [[1, 1, 40, 32], [1, 2, 32, 32], [0, 1, 32, 32]] {
            let x = Tensor::zeros(size, (Kind::Float, Device::Cpu));
            assert!(matches!(net.forward_eval(&x), Err(ModelError::Input(_))), "{size:?}");
        }
        assert!(
            Network::new(NetworkConfig { classes: 1, ..Default::default() }, Device::Cpu, 1)
                .is_err()
        );
    }
}
