//! The networks: parameters under the reference's names, blocks, the network, perturbations, SGD, the
//! networks that a method trains together, and TorchScript for those who have no use for all this.
//!
//! Knows nothing of processes, storage or configuration, and computes no loss. Random draws are
//! keyed and come in from outside; batch-norm statistics change only when they are committed.

mod blocks;
mod copy;
mod ensemble;
mod export;
mod network;
mod params;
mod perturb;
mod sgd;

pub use blocks::{Layout, Precision, Statistics, UpMode};
pub use copy::StateCopy;
pub use ensemble::{Cast, Ensemble, main_state};
pub use export::torchscript;
pub use network::{Heads, Network, NetworkConfig, Outputs, Pyramid};
pub use params::{HostTensor, Params, Role};
pub use perturb::{
    DecoderDraws, Draws, Dropout, Noise, feature_dropout, feature_noise, input_noise, key_of,
};
pub use sgd::Sgd;

use crate::bridge::ops::OpError;

/// Why a model cannot do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A libtorch call failed.
    #[error(transparent)]
    Torch(#[from] tch::TchError),
    /// A call of the bridge failed.
    #[error(transparent)]
    Op(#[from] OpError),
    /// A state lacks a tensor that the model has.
    #[error("the state lacks '{0}'")]
    Missing(String),
    /// A state has a tensor that the model lacks.
    #[error("the state has '{0}', which this model does not")]
    Unknown(String),
    /// A state's tensor does not fit.
    #[error("'{name}' is {found} in the state, {wanted} in the model")]
    Unfit {
        /// Which tensor.
        name: String,
        /// What the state has.
        found: String,
        /// What the model wants.
        wanted: String,
    },
    /// An input or a setting that the network cannot take.
    #[error("{0}")]
    Input(String),
}
