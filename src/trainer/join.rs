//! Joining a generation, and leaving it with the state.
//!
//! When its group has formed, a generation agrees on the most advanced step that any of its ranks has applied: at
//! most one more than the others have, for no step is applied that not every rank has contributed to.
//! Whoever lacks that state gets it from a rank that has it. Only where nobody has anything in
//! memory does rank 0 read the newest checkpoint. Not here: who joins whom (the coordinator).

use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::TrainerError;
use super::methods::check_share;
use super::orders::Orders;
use super::ranks::Ranks;
use super::setup::{self, Trainer};
use super::{persist, snapshot};
use crate::bridge::ops::SumOverRanks;
use crate::checkpoint::{decode_tensors, encode_tensors, load_latest};
use crate::collective::{ProcessGroup, Rendezvous};
use crate::data::Loader;
use crate::eval::report::{Record, RunEvent, RunHistory};
use crate::ledger::{Attestation, Carried, Receipts};
use crate::proto::{LedgerStart, Membership, TrainerEvent};
use crate::types::{Backend, Rank, Step};

/// What a rank comes with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Standing {
    /// The steps that its state has behind it, if it has a whole one.
    done: Option<Step>,
    /// Whether its networks are as they were drawn.
    pristine: bool,
}

/// What comes with the agreed state, and what everyone has to know of it.
#[derive(Debug, Serialize, Deserialize)]
struct Agreed {
    step: Step,
    /// It is that of a checkpoint.
    restored: bool,
    /// Nobody has trained yet: the networks are as they were drawn.
    pristine: bool,
    /// Whether the validation that is due at this step has been made.
    validated: bool,
    receipts: Carried,
    /// In JSON lines.
    history: String,
}

/// The rank whose state counts: the lowest of the most advanced ones.
fn most_advanced(all: &[Standing]) -> Option<Rank> {
    let steps = (0..).zip(all).filter_map(|(rank, standing)| Some((standing.done?, rank)));
    steps.max_by_key(|(step, rank)| (*step, std::cmp::Reverse(*rank))).map(|(_, rank)| Rank(rank))
}

impl Trainer {
    /// Forms the generation's groups and brings this rank to its state. Returns whether that is a checkpoint's.
    ///
    /// # Errors
    /// [`TrainerError::is_lost_peer`] says whether another generation may be joined after it.
    pub(super) fn join(
        &mut self,
        membership: &Membership,
        orders: &Orders,
    ) -> Result<bool, TrainerError> {
        (self.rank, self.world) = (membership.rank, membership.world);
        self.generation = membership.generation;
        let (gradients, ranks) = self.groups(membership)?;
        let groups = [&gradients, &ranks.host, &ranks.device];
        orders.enter(groups.into_iter().flatten().cloned().collect())?;
        let ranks = Arc::new(ranks);
        self.sync = (self.config.model.sync_batch_norm && self.world.0 > 1)
            .then(|| Arc::clone(&ranks) as Arc<dyn SumOverRanks>);
        (self.ranks, self.gradients) = (ranks, gradients);
        if self.rank == Rank(0) {
            super::emit(&TrainerEvent::Grouped(self.place()));
        }
        let restored = self.agree()?;
        let plan = setup::loader_plan(&self.config, self.rank, self.world, self.step, self.total);
        let loader = Loader::start(self.dataset.clone(), plan)?;
        check_share(&self.config, loader.share())?;
        self.loader = Some(loader);
        if self.rank == Rank(0) && self.writer.is_none() {
            self.writer = Some(setup::start_writer(self)?);
        }
        Ok(restored)
    }

    /// Out of the generation, if in any: what is kept is the state.
    pub(super) fn leave(&mut self, orders: &Orders) -> Result<(), TrainerError> {
        self.loader = None;
        self.reducer = None;
        self.reduced = None;
        self.sync = None;
        self.gradients = None;
        self.ranks = Arc::default();
        self.summary = None;
        // Another rank may write the next file: then this process begins anew.
        self.tensorboard = None;
        orders.released();
        self.clear_gradients()
    }

    /// What the ledger needs to know of this start; rank 0 says it.
    pub(super) fn attestation(&self) -> Result<Option<LedgerStart>, TrainerError> {
        if self.rank != Rank(0) {
            return Ok(None);
        }
        let attested = Attestation {
            world: self.world,
            dataset_sha256: self.dataset.digest().sha256.clone(),
            deal: self.loader()?.deal().spec().clone(),
            carried: self.receipts.carried(),
        };
        Ok(Some(attested.to_wire()?))
    }

    /// The gradients' group, and those for everything else; none for one rank.
    fn groups(&self, m: &Membership) -> Result<(Option<ProcessGroup>, Ranks), TrainerError> {
        if m.world.0 == 1 {
            return Ok((None, Ranks::default()));
        }
        let meet = |purpose: &str| Rendezvous {
            store_addr: m.kv_address,
            trust: self.trust.clone(),
            prefix: Membership::key_prefix(&m.epoch, m.generation) + purpose,
            rank: m.rank,
            world: m.world,
            timeout: self.config.recovery.collective(),
            interface: self.assignment.interface,
        };
        let on_device = |purpose: &str| match self.assignment.backend {
            Backend::Gloo => ProcessGroup::gloo(&meet(purpose)),
            Backend::Nccl => ProcessGroup::nccl(&meet(purpose), self.device),
        };
        let gradients = on_device("gradients")?;
        let host = Some(ProcessGroup::gloo(&meet("side"))?);
        let device = match self.assignment.backend {
            Backend::Gloo => None,
            Backend::Nccl => Some(on_device("side-device")?),
        };
        Ok((Some(gradients), Ranks { host, device }))
    }

    /// Brings all ranks to one state.
    fn agree(&mut self) -> Result<bool, TrainerError> {
        let mine = Standing { done: self.live.then_some(self.step), pristine: self.pristine };
        let mut all: Vec<Standing> = Vec::new();
        for part in self.ranks.gather(&json(&mine)?)? {
            all.push(serde_json::from_slice(&part).map_err(unreadable)?);
        }
        let found = most_advanced(&all);
        let from = found.unwrap_or(Rank(0));
        let told = if self.rank == from {
            let restored = if found.is_none() { self.restore_newest()? } else { false };
            Some(json(&self.agreed(restored)?)?)
        } else {
            None
        };
        let told = self.ranks.bytes_from(from, told)?;
        let agreed: Agreed = serde_json::from_slice(&told).map_err(unreadable)?;
        let lacks = |(rank, standing): (u32, &Standing)| {
            rank != from.0
                && standing.done != Some(agreed.step)
                && !(agreed.pristine && standing.pristine)
        };
        let i_lack = lacks((self.rank.0, &mine));
        if (0..).zip(&all).any(lacks) {
            self.transfer(from, i_lack)?;
        }
        if self.rank != from && mine.done != Some(agreed.step) {
            self.receipts = Receipts::resume(&agreed.receipts, agreed.step)?;
            self.history = RunHistory::from_json_lines(agreed.history.as_bytes());
        }
        self.pristine = agreed.pristine;
        self.step = agreed.step;
        self.live = true;
        self.validation_due = self.validates_here() && !agreed.validated;
        if agreed.restored {
            let (step, world) = (self.step.0, self.world.0);
            self.history.push(Record::Event(RunEvent::Resumed { step, world }));
        }
        Ok(agreed.restored)
    }

    /// Everyone takes part, and whoever lacks it keeps it: networks and momentum.
    fn transfer(&mut self, from: Rank, i_lack: bool) -> Result<(), TrainerError> {
        let (mut model, mut momentum) = (None, None);
        if self.rank == from {
            model = Some(encode_tensors(&snapshot::named(self.nets.to_host()?)?)?.to_vec());
            let host = self.nets.momentum_to_host()?;
            momentum = Some(encode_tensors(&snapshot::named(host)?)?.to_vec());
        }
        let model = self.ranks.bytes_from(from, model)?;
        let momentum = self.ranks.bytes_from(from, momentum)?;
        if i_lack {
            (self.live, self.pristine) = (false, false);
            let model = snapshot::unnamed(&decode_tensors(&Bytes::from(model))?)?;
            let momentum = snapshot::unnamed(&decode_tensors(&Bytes::from(momentum))?)?;
            self.nets.load_host(model, momentum)?;
        }
        Ok(())
    }

    /// What this rank, whose state counts, says of it.
    fn agreed(&self, restored: bool) -> Result<Agreed, TrainerError> {
        let validated = self.history.validations.iter().any(|v| v.step == self.step.0);
        Ok(Agreed {
            step: self.step,
            restored,
            pristine: self.pristine,
            validated,
            receipts: self.receipts.carried(),
            history: String::from_utf8_lossy(&snapshot::history_lines(&self.history)?).into_owned(),
        })
    }

    /// The newest checkpoint's state, or the one that a run begins with; whether it is the former.
    fn restore_newest(&mut self) -> Result<bool, TrainerError> {
        let checkpoint = self.runtime.block_on(load_latest(&self.run))?;
        if let Some(checkpoint) = checkpoint {
            setup::check_identity(&checkpoint.manifest, &self.config, &self.dataset)?;
            self.pristine = false;
            self.receipts = persist::restore(&checkpoint, &mut self.nets, &mut self.history)?;
            self.step = checkpoint.manifest.step;
            // If its peers do not wait for so long, it need not be read again.
            self.live = true;
            return Ok(true);
        }
        if !self.pristine {
            self.nets = setup::ensemble(&self.config, &self.dataset, self.device)?;
        }
        (self.step, self.pristine) = (Step(0), true);
        (self.receipts, self.history) = (Receipts::new(), RunHistory::default());
        if let Some(url) = self.config.train.init_from.clone() {
            let state = persist::given_weights(&self.runtime, &url)?;
            self.pristine = false;
            self.nets
                .start_from(&state)
                .map_err(|e| TrainerError::InitialWeights { url, reason: e.to_string() })?;
        }
        Ok(false)
    }
}

fn json(value: &impl Serialize) -> Result<Vec<u8>, TrainerError> {
    serde_json::to_vec(value).map_err(unreadable)
}

fn unreadable(error: serde_json::Error) -> TrainerError {
    TrainerError::Report(format!("what ranks tell each other: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_advanced_state_counts_and_of_equals_the_first() {
        let standing =
            |done: Option<u64>| Standing { done: done.map(Step), pristine: done.is_none() };
        let of = |steps: &[Option<u64>]| {
            most_advanced(&steps.iter().copied().map(standing).collect::<Vec<_>>()).map(|r| r.0)
        };
        assert_eq!(of(&[None, None]), None);
        assert_eq!(of(&[None, Some(4), Some(5), Some(5)]), Some(2));
        assert_eq!(of(&[Some(0), None]), Some(0));
    }
}
