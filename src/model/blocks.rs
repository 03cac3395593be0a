//! The blocks a U-shaped network is made of: convolution, batch norm with activation and
//! dropout, the convolution block, the four ways up.
//!
//! They hold handles to tensors of [`Params`]. In training a block reads its running statistics
//! and writes new ones into a [`Statistics`], which the trainer commits with the step.

use std::sync::Arc;

use tch::{Kind, Tensor};

use super::ModelError;
use super::params::{Params, Role};
use super::perturb::{self, Dropout};
use crate::bridge::ops::{self, SumOverRanks};

/// Slope of the leaky ReLU below zero, epsilon and momentum of batch norm: PyTorch's defaults.
pub(super) const SLOPE: f64 = 0.01;
pub(super) const EPS: f64 = 1e-5;
const MOMENTUM: f64 = 0.1;

/// Memory order of weights and activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Layout {
    /// NCHW strides, PyTorch's default.
    Planar,
    /// NHWC strides: what oneDNN and the fused kernels are fast on.
    #[default]
    ChannelsLast,
}

/// Arithmetic of activations and convolutions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// float32.
    #[default]
    F32,
    /// bfloat16 activations and convolutions; float32 parameters, statistics, losses and updates.
    Bf16,
    /// float64 throughout, parameters too: to tell an error from rounding.
    F64,
}

impl Precision {
    fn kind(self) -> Kind {
        match self {
            Self::F32 => Kind::Float,
            Self::Bf16 => Kind::BFloat16,
            Self::F64 => Kind::Double,
        }
    }

    /// The same without bfloat16: of parameters, heads, losses and evaluation.
    pub(super) fn full(self) -> Self {
        match self {
            Self::F32 | Self::Bf16 => Self::F32,
            Self::F64 => Self::F64,
        }
    }

    /// The type of tensors in [`Precision::full`].
    pub(super) fn full_kind(self) -> Kind {
        self.full().kind()
    }
}

/// How a decoder brings a feature to twice its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UpMode {
    /// ConvTranspose2d, kernel and stride 2.
    Transposed,
    /// Conv1x1, then bilinear with aligned corners.
    Bilinear,
    /// Conv1x1, then nearest neighbour.
    Nearest,
    /// Conv1x1, then bicubic with aligned corners.
    Bicubic,
}

#[derive(Debug)]
struct Update {
    buffers: [Tensor; 2],
    values: [Tensor; 2],
    counter: Tensor,
}

/// New running statistics of one training forward pass, not yet in force.
#[derive(Debug, Default)]
pub struct Statistics(Vec<Update>);

impl Statistics {
    /// The value of a running statistic as it is with what is pending here, in storage of its own.
    fn current(&self, buffer: &Tensor) -> Result<Tensor, ModelError> {
        let pending = self.0.iter().rev().find_map(|update| {
            let place = update.buffers.iter().position(|b| b.data_ptr() == buffer.data_ptr())?;
            update.values.get(place)
        });
        copy_of(pending.unwrap_or(buffer))
    }

    /// Puts the statistics in force: once, when the step they belong to has been applied.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn commit(self) -> Result<(), ModelError> {
        tch::no_grad(|| {
            for update in self.0 {
                for (mut buffer, value) in update.buffers.into_iter().zip(&update.values) {
                    buffer.f_copy_(value)?;
                }
                let mut counter = update.counter;
                let _same = counter.f_add_scalar_(1)?;
            }
            Ok(())
        })
    }
}

/// What a training pass carries from block to block.
pub(super) struct Training<'a> {
    pub(super) dropout: Dropout,
    pub(super) aux_dropout: f64,
    pub(super) precision: Precision,
    pub(super) sync: Option<&'a Arc<dyn SumOverRanks>>,
    pub(super) statistics: Statistics,
    /// Counts the places where dropout draws, so that each has a key of its own.
    pub(super) place: u64,
}

impl Training<'_> {
    /// The key of the next place.
    pub(super) fn next_key(&mut self) -> Option<u64> {
        self.place += 1;
        self.dropout.at(self.place)
    }
}

/// A pass is for training, with its state, or for evaluation.
pub(super) enum Mode<'m, 't> {
    Train(&'m mut Training<'t>),
    Eval,
}

/// A convolution with bias, stride 1, same size.
#[derive(Debug)]
pub(super) struct Conv {
    weight: Tensor,
    bias: Tensor,
    pad: i64,
}

impl Conv {
    pub(super) fn new(
        params: &mut Params,
        name: &str,
        [input, output, kernel]: [i64; 3],
    ) -> Result<Self, ModelError> {
        let fan_in = input * kernel * kernel;
        let weight =
            params.uniform(format!("{name}.weight"), &[output, input, kernel, kernel], fan_in)?;
        let bias = params.uniform(format!("{name}.bias"), &[output], fan_in)?;
        Ok(Self { weight, bias, pad: kernel / 2 })
    }

    /// `[N, input, H, W] -> [N, output, H, W]`
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        let kind = x.f_kind()?;
        let (w, b) = (self.weight.f_to_kind(kind)?, self.bias.f_to_kind(kind)?);
        if self.pad == 1 {
            return Ok(ops::conv3x3(x, &w, &b)?);
        }
        Ok(x.f_conv2d(&w, Some(&b), [1i64, 1], [self.pad, self.pad], [1i64, 1], 1)?)
    }

    /// A 3 x 3 convolution of two inputs joined on channels, `[N, A, H, W]` and
    /// `[N, input - A, H, W]` to `[N, output, H, W]`.
    fn forward_pair(&self, inputs: [&Tensor; 2]) -> Result<Tensor, ModelError> {
        let kind = inputs[0].f_kind()?;
        let (w, b) = (self.weight.f_to_kind(kind)?, self.bias.f_to_kind(kind)?);
        Ok(ops::conv3x3_pair(inputs, &w, &b)?)
    }
}

/// Batch norm, leaky ReLU, dropout.
#[derive(Debug)]
struct NormAct {
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    counter: Tensor,
}

impl NormAct {
    fn new(params: &mut Params, name: &str, channels: i64) -> Result<Self, ModelError> {
        let mut vector = |what: &str, value: f64, role: Role| {
            params.constant(format!("{name}.{what}"), channels, value, role)
        };
        Ok(Self {
            weight: vector("weight", 1.0, Role::Parameter)?,
            bias: vector("bias", 0.0, Role::Parameter)?,
            mean: vector("running_mean", 0.0, Role::Buffer)?,
            var: vector("running_var", 1.0, Role::Buffer)?,
            counter: params.counter(format!("{name}.num_batches_tracked"))?,
        })
    }

    /// `[N, C, H, W]` to the same.
    fn forward(&self, x: &Tensor, dropout: f64, mode: &mut Mode) -> Result<Tensor, ModelError> {
        let Mode::Train(training) = mode else {
            let (mean, var) = (self.mean.shallow_clone(), self.var.shallow_clone());
            return Ok(self.plain(x, &mean, &var, false)?.f_leaky_relu_()?);
        };
        let key = if dropout > 0.0 { training.next_key() } else { None };
        let statistics = &training.statistics;
        let (mean, var) = (statistics.current(&self.mean)?, statistics.current(&self.var)?);
        let sync = training.sync.cloned();
        // Dropout is part of the kernel for the CPU's channels-last tensors, a step of its own else.
        let fused = x.device() == tch::Device::Cpu
            && x.f_kind()? != Kind::Double
            && ops::is_channels_last(x)?;
        let y = if fused || sync.is_some() {
            let args = ops::NormAct {
                weight: &self.weight,
                bias: &self.bias,
                running_mean: &mean,
                running_var: &var,
                momentum: MOMENTUM,
                eps: EPS,
                slope: SLOPE,
                dropout: if fused && key.is_some() { dropout } else { 0.0 },
                key: key.unwrap_or(0),
                sync,
            };
            ops::norm_act(x, &args)?
        } else {
            self.plain(x, &mean, &var, true)?.f_leaky_relu_()?
        };
        let y = if fused { y } else { perturb::dropout(&y, dropout, key)? };
        training.statistics.0.push(Update {
            buffers: [self.mean.shallow_clone(), self.var.shallow_clone()],
            values: [mean, var],
            counter: self.counter.shallow_clone(),
        });
        Ok(y)
    }

    fn plain(
        &self,
        x: &Tensor,
        mean: &Tensor,
        var: &Tensor,
        train: bool,
    ) -> Result<Tensor, ModelError> {
        let (w, b) = (&self.weight, &self.bias);
        Ok(x.f_batch_norm(Some(w), Some(b), Some(mean), Some(var), train, MOMENTUM, EPS, true)?)
    }
}

/// Conv3x3, norm, activation, dropout, Conv3x3, norm, activation.
#[derive(Debug)]
pub(super) struct ConvBlock {
    conv: [Conv; 2],
    norm: [NormAct; 2],
    dropout: f64,
}

impl ConvBlock {
    /// `name` is that of the reference's sequence; its places 0, 1, 4 and 5 hold parameters.
    pub(super) fn new(
        params: &mut Params,
        name: &str,
        input: i64,
        output: i64,
        dropout: f64,
    ) -> Result<Self, ModelError> {
        let first = Conv::new(params, &format!("{name}.0"), [input, output, 3])?;
        let norm = NormAct::new(params, &format!("{name}.1"), output)?;
        let second = Conv::new(params, &format!("{name}.4"), [output, output, 3])?;
        let last = NormAct::new(params, &format!("{name}.5"), output)?;
        Ok(Self { conv: [first, second], norm: [norm, last], dropout })
    }

    /// `[N, input, H, W] -> [N, output, H, W]`
    pub(super) fn forward(&self, x: &Tensor, mode: &mut Mode) -> Result<Tensor, ModelError> {
        self.after(&self.conv[0].forward(x)?, mode)
    }

    /// The network's first block: its first convolution works in full precision always.
    /// It has too few channels to gain from bfloat16, and the image keeps its digits.
    pub(super) fn forward_image(
        &self,
        x: &Tensor,
        precision: Precision,
        mode: &mut Mode,
    ) -> Result<Tensor, ModelError> {
        self.after(&self.conv[0].forward(x)?.f_to_kind(precision.kind())?, mode)
    }

    /// Two inputs joined on channels: `[N, A, H, W]` and `[N, input - A, H, W] -> [N, output, H, W]`
    fn forward_pair(&self, inputs: [&Tensor; 2], mode: &mut Mode) -> Result<Tensor, ModelError> {
        self.after(&self.conv[0].forward_pair(inputs)?, mode)
    }

    /// What follows the first convolution.
    fn after(&self, first: &Tensor, mode: &mut Mode) -> Result<Tensor, ModelError> {
        let y = self.norm[0].forward(first, self.dropout, mode)?;
        self.norm[1].forward(&self.conv[1].forward(&y)?, 0.0, mode)
    }
}

#[derive(Debug)]
enum Up {
    Transposed { weight: Tensor, bias: Tensor },
    Resized { conv: Conv, mode: UpMode },
}

/// Brings a deep feature to the skip's channels and size, joins the two, convolves.
#[derive(Debug)]
pub(super) struct UpBlock {
    up: Up,
    block: ConvBlock,
}

impl UpBlock {
    pub(super) fn new(
        params: &mut Params,
        name: &str,
        [deep, skip]: [i64; 2],
        mode: UpMode,
    ) -> Result<Self, ModelError> {
        let up = if mode == UpMode::Transposed {
            // PyTorch counts fan-in on the second axis: output channels times kernel area.
            let fan_in = skip * 4;
            Up::Transposed {
                weight: params.uniform(format!("{name}.up.weight"), &[deep, skip, 2, 2], fan_in)?,
                bias: params.uniform(format!("{name}.up.bias"), &[skip], fan_in)?,
            }
        } else {
            Up::Resized {
                conv: Conv::new(params, &format!("{name}.conv1x1"), [deep, skip, 1])?,
                mode,
            }
        };
        let block = ConvBlock::new(params, &format!("{name}.conv.conv_conv"), 2 * skip, skip, 0.0)?;
        Ok(Self { up, block })
    }

    /// deep `[N, D, H/2, W/2]`, skip `[N, S, H, W]` -> `[N, S, H, W]`
    pub(super) fn forward(
        &self,
        deep: &Tensor,
        skip: &Tensor,
        mode: &mut Mode,
    ) -> Result<Tensor, ModelError> {
        let up = match &self.up {
            Up::Transposed { weight, bias } => transposed(deep, weight, bias)?,
            Up::Resized { conv, mode } => {
                let low = conv.forward(deep)?;
                let size = [skip.size()[2], skip.size()[3]];
                match mode {
                    UpMode::Nearest => low.f_upsample_nearest2d(size, None, None)?,
                    UpMode::Bicubic => low.f_upsample_bicubic2d(size, true, None, None)?,
                    _ => low.f_upsample_bilinear2d(size, true, None, None)?,
                }
            }
        };
        // [N, S, H, W] twice
        self.block.forward_pair([skip, &up], mode)
    }
}

/// ConvTranspose2d with kernel and stride 2: `[N, D, H, W] -> [N, S, 2H, 2W]`.
fn transposed(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor, ModelError> {
    let kind = x.f_kind()?;
    let (w, b) = (weight.f_to_kind(kind)?, bias.f_to_kind(kind)?);
    let (one, two, zero) = ([1i64, 1], [2i64, 2], [0i64, 0]);
    if x.device() != tch::Device::Cpu {
        return Ok(x.f_conv_transpose2d(&w, Some(&b), two, zero, zero, 1, one)?);
    }
    // Its windows don't overlap, so it is a 1 x 1 convolution to the four places of each output
    // square, then a shuffle. oneDNN's own gradient of the weights is four times slower in
    // bfloat16, and that of the bias not vectorised at all.
    let [d, s] = [w.size()[0], w.size()[1]];
    // [D, S, 2, 2] -> [S, 2, 2, D] -> [4S, D, 1, 1]
    let w = w.f_permute([1i64, 2, 3, 0])?.f_reshape([4 * s, d, 1, 1])?;
    // [S] -> [S, 4] -> [4S]
    let b = b.f_unsqueeze(1)?.f_expand([s, 4], false)?.f_reshape([4 * s])?;
    // [N, 4S, H, W] -> [N, S, 2H, 2W]
    Ok(x.f_conv2d(&w, Some(&b), one, zero, one, 1)?.f_pixel_shuffle(2)?)
}

/// A copy with storage of its own, which tch's clone of a CPU tensor has not.
fn copy_of(tensor: &Tensor) -> Result<Tensor, ModelError> {
    let mut copy = tensor.f_empty_like()?;
    copy.f_copy_(tensor)?;
    Ok(copy)
}

/// The input as the network wants it: in full precision and its layout.
pub(super) fn prepare(
    x: &Tensor,
    layout: Layout,
    precision: Precision,
) -> Result<Tensor, ModelError> {
    let x = x.f_to_kind(precision.full_kind())?;
    Ok(match layout {
        Layout::Planar => x,
        Layout::ChannelsLast => ops::channels_last(&x)?,
    })
}

/// Halves the size: `[N, C, H, W] -> [N, C, H/2, W/2]`.
pub(super) fn pool(x: &Tensor) -> Result<Tensor, ModelError> {
    Ok(x.f_max_pool2d([2i64, 2], [2i64, 2], [0i64, 0], [1i64, 1], false)?)
}
