//! The losses: Dice, cross-entropy, distillation, entropy, focal, the ramp-up, and the CPCR objective over
//! them. The other objectives are in `method`, each beside its forward pass.
//!
//! Each formula stands here in plain tensor operations; on the CPU the objective takes the fused
//! kernels of `bridge::ops` instead, and tests hold the two against each other. Knows nothing of
//! processes: sums over ranks are a trait, global counts a struct.

mod batch;
mod cpcr;
pub mod cross_entropy;
pub mod dice;
pub mod distill;
pub mod entropy;
pub mod focal;
pub mod rampup;

pub use batch::{Alone, Counts, Spread, StepLoss};
pub use cpcr::{Objective, Path, TERMS, TermWeights};

use crate::bridge::ops::OpError;

/// Why a loss cannot be computed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LossError {
    /// A libtorch call failed.
    #[error(transparent)]
    Torch(#[from] tch::TchError),
    /// A call of the bridge failed.
    #[error(transparent)]
    Op(#[from] OpError),
    /// Inputs that do not belong together.
    #[error("{0}")]
    Input(String),
    /// A sum over ranks failed.
    #[error("sum over ranks: {0}")]
    Ranks(String),
}

/// The type that losses of such logits are computed in: float64 stays, all else is float32.
fn precise(logits: &tch::Tensor) -> Result<tch::Kind, LossError> {
    Ok(match logits.f_kind()? {
        tch::Kind::Double => tch::Kind::Double,
        _ => tch::Kind::Float,
    })
}
