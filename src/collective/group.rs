//! Process groups: joined at a [`Rendezvous`], used by one thread, aborted from another.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use tch::{Device, Tensor};

use super::error::CollectiveError;
use crate::bridge::c10d::{self, ReduceOp};
use crate::bridge::cuda;
use crate::kv::KvClient;
use crate::trust::Trust;
use crate::types::{Rank, WorldSize};

/// How long a drop waits for the engine to tidy up before it leaves that to a thread: with Gloo, one of whose threads may
/// sit in a send until its timeout, which harms nobody; with NCCL, whose aborts take their time.
const TIDY_GLOO: Duration = Duration::from_millis(250);
const TIDY_NCCL: Duration = Duration::from_secs(5);

/// Where and as whom to join a group.
#[derive(Debug, Clone)]
pub struct Rendezvous {
    /// The generation's key-value service.
    pub store_addr: SocketAddr,
    /// What is shown to it.
    pub trust: Trust,
    /// Fresh for every group: keys of a dead generation must not be read again.
    pub prefix: String,
    /// This trainer's rank.
    pub rank: Rank,
    /// How many join.
    pub world: WorldSize,
    /// For joining and for every collective after it.
    pub timeout: Duration,
    /// The address that peers reach this trainer at. Never the host name's: Debian maps that to
    /// 127.0.1.1.
    pub interface: IpAddr,
}

impl Rendezvous {
    fn store(&self) -> Result<c10d::Store, CollectiveError> {
        if self.rank.0 >= self.world.0 {
            return Err(CollectiveError::Rendezvous(format!(
                "rank {} of a world of {}",
                self.rank, self.world
            )));
        }
        let client = KvClient::new(self.store_addr, self.timeout, self.trust.clone());
        Ok(c10d::Store::new(Arc::new(client), &self.prefix, self.timeout)?)
    }
}

/// The engine's group; shared by whoever must keep it alive.
pub(super) struct Inner {
    /// Taken by `drop` only.
    group: Option<c10d::Group>,
    /// How long `drop` waits.
    tidy: Duration,
}

impl Inner {
    pub(super) fn group(&self) -> Result<&c10d::Group, CollectiveError> {
        self.group.as_ref().ok_or_else(|| CollectiveError::Aborted("the group is gone".into()))
    }
}

impl Drop for Inner {
    /// Aborts first, so that no pending operation is waited for, and tidies up on a thread of its
    /// own: NCCL aborts have been seen to hang, and a stuck one must not take the caller along.
    fn drop(&mut self) {
        let Some(group) = self.group.take() else { return };
        let (done, finished) = mpsc::channel::<()>();
        let tidy = move || {
            if let Err(error) = group.abort() {
                tracing::debug!(%error, "abort process group");
            }
            drop(group);
            drop(done);
        };
        match std::thread::Builder::new().name("cpcr-group-drop".into()).spawn(tidy) {
            // The sender is dropped when done: a disconnect is the good end.
            Ok(_) => {
                if finished.recv_timeout(self.tidy) == Err(mpsc::RecvTimeoutError::Timeout) {
                    tracing::info!("a process group takes its time to end; left to a thread");
                }
            }
            Err(error) => tracing::warn!(%error, "start a thread to drop a process group"),
        }
    }
}

/// One rank's membership in a group of trainers.
///
/// Collectives must be issued in the same order on every rank, by one thread. Tensors must be
/// contiguous. With NCCL a call that returned has ordered the current stream after the
/// collective; its failure may only show in a later call.
#[derive(Clone)]
pub struct ProcessGroup {
    inner: Arc<Inner>,
    rank: Rank,
    world: WorldSize,
}

impl std::fmt::Debug for ProcessGroup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ProcessGroup({}/{})", self.rank, self.world)
    }
}

impl ProcessGroup {
    /// Joins a group over Gloo (CPU tensors); returns when every rank is there.
    ///
    /// # Errors
    /// [`CollectiveError::Timeout`] when a peer does not come; [`CollectiveError::Aborted`] when
    /// the prefix is forgotten meanwhile; [`CollectiveError::PeerLost`] when the key-value service
    /// or a peer breaks; else [`CollectiveError::Rendezvous`].
    pub fn gloo(rendezvous: &Rendezvous) -> Result<Self, CollectiveError> {
        let store = rendezvous.store()?;
        let (rank, size) = ranks(rendezvous)?;
        let address = rendezvous.interface.to_string();
        let group = c10d::Group::gloo(&store, rank, size, rendezvous.timeout, &address);
        Self::joined(group, rendezvous, TIDY_GLOO)
    }

    /// Joins a group over NCCL for tensors on `device`.
    ///
    /// # Errors
    /// [`CollectiveError::Unsupported`] where there is no GPU, no CUDA build of libtorch or no
    /// `libcpcr_nccl.so`; else as [`ProcessGroup::gloo`].
    pub fn nccl(rendezvous: &Rendezvous, device: Device) -> Result<Self, CollectiveError> {
        let Device::Cuda(index) = device else {
            return Err(CollectiveError::Unsupported(format!("NCCL on {device:?}")));
        };
        let library = c10d::NcclLibrary::open()
            .map_err(|error| CollectiveError::Unsupported(error.message))?;
        let store = rendezvous.store()?;
        let (rank, size) = ranks(rendezvous)?;
        let index = i32::try_from(index).unwrap_or(i32::MAX);
        let group = c10d::Group::nccl(library, &store, rank, size, rendezvous.timeout, index);
        Self::joined(group, rendezvous, TIDY_NCCL)
    }

    fn joined(
        group: Result<c10d::Group, crate::bridge::error::BridgeError>,
        rendezvous: &Rendezvous,
        tidy: Duration,
    ) -> Result<Self, CollectiveError> {
        let group = group.map_err(|error| CollectiveError::joining(error, rendezvous.timeout))?;
        let inner = Arc::new(Inner { group: Some(group), tidy });
        Ok(Self { inner, rank: rendezvous.rank, world: rendezvous.world })
    }

    /// This trainer's rank.
    #[must_use]
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// How many ranks there are.
    #[must_use]
    pub fn world(&self) -> WorldSize {
        self.world
    }

    /// Combines `tensor` over all ranks, in place; every rank gets the same bits.
    ///
    /// # Errors
    /// When a peer is lost, frozen, or asks for something else; when aborted.
    pub fn all_reduce(&self, tensor: &Tensor, op: ReduceOp) -> Result<(), CollectiveError> {
        self.start_all_reduce(tensor, op)?.wait()
    }

    /// Starts what [`ProcessGroup::all_reduce`] does; `tensor` is not to be touched until the
    /// work is waited for.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_all_reduce(&self, tensor: &Tensor, op: ReduceOp) -> Result<Work, CollectiveError> {
        let work = no_grad(|group| group.all_reduce(tensor, op), &self.inner)?;
        Ok(self.work(work))
    }

    /// Copies `root`'s `tensor` into every other rank's, in place.
    ///
    /// # Errors
    /// As [`ProcessGroup::all_reduce`].
    pub fn broadcast(&self, tensor: &Tensor, root: Rank) -> Result<(), CollectiveError> {
        let root = i32::try_from(root.0).unwrap_or(i32::MAX);
        let work = no_grad(|group| group.broadcast(tensor, root), &self.inner)?;
        self.work(work).wait()
    }

    /// Every rank's `tensor`, in rank order; shapes and types must agree.
    ///
    /// # Errors
    /// As [`ProcessGroup::all_reduce`].
    pub fn all_gather(&self, tensor: &Tensor) -> Result<Vec<Tensor>, CollectiveError> {
        let input = tensor.detach();
        let outputs =
            (0..self.world.0).map(|_| input.f_zeros_like()).collect::<Result<Vec<_>, _>>()?;
        let work = no_grad(|group| group.all_gather(&input, &outputs), &self.inner)?;
        self.work(work).wait()?;
        Ok(outputs)
    }

    /// Returns when every rank has called it.
    ///
    /// # Errors
    /// As [`ProcessGroup::all_reduce`].
    pub fn barrier(&self) -> Result<(), CollectiveError> {
        let work = self.inner.group()?.barrier()?;
        self.work(work).wait()
    }

    /// Fails everything pending here with [`CollectiveError::Aborted`], promptly, from any thread;
    /// peers see this rank as lost. The group is useless afterwards.
    ///
    /// # Errors
    /// When the engine refuses.
    pub fn abort(&self) -> Result<(), CollectiveError> {
        Ok(self.inner.group()?.abort()?)
    }

    pub(super) fn inner(&self) -> &Arc<Inner> {
        &self.inner
    }

    fn work(&self, work: c10d::Work) -> Work {
        Work { work, _group: self.inner.clone() }
    }
}

/// How many GPUs trainers of this machine can use: those that libtorch sees, if NCCL can be had.
#[must_use]
pub fn usable_gpus() -> u32 {
    let count = cuda::device_count();
    match c10d::NcclLibrary::open() {
        Err(error) if count > 0 => {
            tracing::warn!("{count} GPUs stay unused: {} (scripts/build-nccl.sh)", error.message);
            0
        }
        _ => count,
    }
}

/// In-place writes into a leaf that requires gradients are none of autograd's business.
fn no_grad(
    start: impl FnOnce(&c10d::Group) -> Result<c10d::Work, crate::bridge::error::BridgeError>,
    inner: &Inner,
) -> Result<c10d::Work, CollectiveError> {
    let group = inner.group()?;
    Ok(tch::no_grad(|| start(group))?)
}

fn ranks(rendezvous: &Rendezvous) -> Result<(i32, i32), CollectiveError> {
    let number = |value: u32| {
        i32::try_from(value).map_err(|_| CollectiveError::Rendezvous(format!("{value} ranks")))
    };
    Ok((number(rendezvous.rank.0)?, number(rendezvous.world.0)?))
}

/// A collective under way.
#[must_use = "a collective is over only when it was waited for"]
pub struct Work {
    work: c10d::Work,
    _group: Arc<Inner>,
}

impl Work {
    /// Waits until it is over.
    ///
    /// # Errors
    /// With the collective's failure.
    pub fn wait(self) -> Result<(), CollectiveError> {
        Ok(self.work.wait()?)
    }

    /// Whether it is over, well or badly.
    ///
    /// # Errors
    /// When the engine cannot tell.
    pub fn is_completed(&self) -> Result<bool, CollectiveError> {
        Ok(self.work.is_completed()?)
    }
}
