//! Collectives: a process group, and the Reducer that averages gradients while backward runs.
//!
//! The engine is libtorch's c10d; its store is the small service in [`kv`], which lives with an
//! agent, outside the trainers. Not here: who is in a group (the coordinator decides) and what is
//! done after a loss (the trainer does).

pub mod kv;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tch::Tensor;

use crate::bridge::c10d::{GroupHandle, ReducerHandle, WorkHandle};
use crate::types::{Rank, WorldSize};
use kv::KvClient;

/// Size of the Reducer's first bucket: small, so that communication starts early.
const FIRST_BUCKET_BYTES: i64 = 256 << 10;

/// What went wrong in a collective, by what the caller can do about it.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum CollectiveError {
    /// No progress within the group's timeout: a peer is slow, frozen or gone. End the generation.
    #[error("a collective timed out: {0}")]
    Timeout(String),
    /// A peer (or the generation's store) is gone. End the generation.
    #[error("a peer was lost: {0}")]
    PeerLost(String),
    /// The group was aborted on purpose.
    #[error("the collective was aborted: {0}")]
    Aborted(String),
    /// libtorch refused: a wrong shape, an unsupported type. A bug, not a loss.
    #[error("c10d: {0}")]
    Engine(String),
}

/// How the ranks of a generation find each other.
#[derive(Debug, Clone)]
pub struct Rendezvous {
    /// The key-value service that hosts this generation's store.
    pub store: SocketAddr,
    /// Fresh for every generation, so that no stale key is ever read.
    pub prefix: String,
    /// This process.
    pub rank: Rank,
    /// How many there are.
    pub world: WorldSize,
    /// Longest time without progress, in rendezvous and in every collective.
    pub timeout: Duration,
    /// This machine's address on the network that connects the ranks.
    pub interface: IpAddr,
}

/// How values of several ranks become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReduceOp {
    /// Their sum.
    Sum,
    /// The largest.
    Max,
    /// The smallest.
    Min,
}

/// A fixed set of ranks that communicate. Every rank calls the same collectives in the same order.
#[derive(Debug)]
pub struct ProcessGroup {
    handle: GroupHandle,
    rank: Rank,
    world: WorldSize,
}

impl ProcessGroup {
    /// Forms a group over Gloo (CPU tensors); returns when every rank has come.
    ///
    /// # Errors
    /// [`CollectiveError::Timeout`] if a rank does not come in time, `PeerLost` if the store is gone.
    pub fn gloo(meeting: &Rendezvous) -> Result<Self, CollectiveError> {
        let client = Arc::new(KvClient::new(meeting.store));
        let handle = GroupHandle::gloo(
            client,
            &meeting.prefix,
            i32::try_from(meeting.rank.0).unwrap_or(i32::MAX),
            i32::try_from(meeting.world.0).unwrap_or(i32::MAX),
            i64::try_from(meeting.timeout.as_millis()).unwrap_or(i64::MAX),
            &meeting.interface.to_string(),
        )?;
        Ok(Self { handle, rank: meeting.rank, world: meeting.world })
    }

    /// This process's rank.
    #[must_use]
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// How many ranks there are.
    #[must_use]
    pub fn world(&self) -> WorldSize {
        self.world
    }

    /// Starts an all-reduce of `tensor`, in place.
    ///
    /// # Errors
    /// See [`CollectiveError`].
    pub fn start_all_reduce(&self, tensor: &Tensor, op: ReduceOp) -> Result<Work, CollectiveError> {
        let op = match op {
            ReduceOp::Sum => 0,
            ReduceOp::Max => 1,
            ReduceOp::Min => 2,
        };
        self.handle.all_reduce(tensor, op).map(Work)
    }

    /// All-reduces `tensor` in place.
    ///
    /// # Errors
    /// See [`CollectiveError`].
    pub fn all_reduce(&self, tensor: &Tensor, op: ReduceOp) -> Result<(), CollectiveError> {
        self.start_all_reduce(tensor, op)?.wait()
    }

    /// Overwrites `tensor` with the one of `root`.
    ///
    /// # Errors
    /// See [`CollectiveError`].
    pub fn broadcast(&self, tensor: &Tensor, root: Rank) -> Result<(), CollectiveError> {
        self.handle.broadcast(tensor, i32::try_from(root.0).unwrap_or(i32::MAX)).map(Work)?.wait()
    }

    /// Every rank's `tensor`, in rank order. All must have the same shape and type.
    ///
    /// # Errors
    /// See [`CollectiveError`].
    pub fn all_gather(&self, tensor: &Tensor) -> Result<Vec<Tensor>, CollectiveError> {
        let outputs: Vec<Tensor> = (0..self.world.0).map(|_| tensor.zeros_like()).collect();
        self.handle.all_gather(&outputs, tensor).map(Work)?.wait()?;
        Ok(outputs)
    }

    /// Returns when every rank has called it.
    ///
    /// # Errors
    /// See [`CollectiveError`].
    pub fn barrier(&self) -> Result<(), CollectiveError> {
        self.handle.barrier().map(Work)?.wait()
    }
}

/// A collective under way.
#[derive(Debug)]
#[must_use = "a collective that nobody waits for may still be writing"]
pub struct Work(WorkHandle);

impl Work {
    /// Waits for the collective to finish.
    ///
    /// # Errors
    /// See [`CollectiveError`].
    pub fn wait(self) -> Result<(), CollectiveError> {
        self.0.wait()
    }
}

/// Averages gradients over the ranks while backward is still running (`c10d::Reducer`).
///
/// Buckets depend on the parameter list alone, so that sums are made in the same order in every
/// life of a run. It must be made over exactly the parameters that get a gradient.
#[derive(Debug)]
pub struct Reducer(ReducerHandle);

impl Reducer {
    /// A reducer over `parameters`, which every rank lists in the same order.
    ///
    /// # Errors
    /// See [`CollectiveError`].
    pub fn new(
        parameters: &[Tensor],
        group: &ProcessGroup,
        bucket_bytes: usize,
    ) -> Result<Self, CollectiveError> {
        let bucket_bytes = i64::try_from(bucket_bytes).unwrap_or(i64::MAX);
        ReducerHandle::new(parameters, &group.handle, FIRST_BUCKET_BYTES, bucket_bytes).map(Self)
    }

    /// Must be called before every backward; gradients must be unset.
    ///
    /// # Errors
    /// [`CollectiveError::Engine`] if the last backward did not reach every parameter.
    pub fn prepare_for_backward(&mut self) -> Result<(), CollectiveError> {
        self.0.prepare()
    }
}
