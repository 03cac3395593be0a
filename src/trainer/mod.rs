//! The trainer: one process per device, and the training loop, readable top to bottom in [`train`].
//!
//! It does what its assignment says and reports to its agent by JSON lines on stdout. Not here:
//! who trains with whom (the coordinator), what a sample is (`data`), what a loss is (`loss`).

mod device;
mod error;
mod evaluate;
mod export;
mod files;
mod join;
mod methods;
mod orders;
mod pace;
mod persist;
mod pictures;
mod predict;
mod ranks;
mod setup;
mod snapshot;
mod tensorboard;
mod traces;
mod validate;
mod vitals;

pub use error::TrainerError;
pub use evaluate::{EvaluateOptions, Evaluated, Pick, evaluate};
pub use export::{ExportFormat, ExportOptions, export};
pub use orders::emit;
pub use predict::{PredictOptions, Predicted, predict};
pub(crate) use snapshot::{Circumstances, Copies, hand_over};

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};
use tracing::Span;

use crate::bridge::ops;
use crate::data::{Batch, DealSpec, Loader};
use crate::eval::report::{Record, StepRecord};
use crate::ledger::Part;
use crate::loss::{Counts, StepLoss};
use crate::method::StepInput;
use crate::model::{Outputs, Statistics};
use crate::proto::{Assignment, EXIT_DONE, EXIT_RESUMABLE, Place, TrainerEvent};
use crate::store::ReadFaults;
use crate::telemetry::{Guard, Phase, StepSampling, StepTrace};
use crate::types::{Step, WorldSize};
use orders::{Next, Orders};
use ranks::Tail;
use setup::Trainer;

/// Trains, in one generation after the other, until the run is complete (0) or a stop was ordered (75).
///
/// # Errors
/// [`TrainerError`]; what can be done about it is its variant.
pub fn run(assignment: &Assignment, telemetry: &Guard) -> Result<i32, TrainerError> {
    let orders = Orders::listen();
    // Said before anything is tidied up: that takes its time, and peers are already waiting.
    let mut t = Trainer::prepare(assignment).inspect_err(say_why)?;
    emit(&TrainerEvent::Standby);
    let status = live(&mut t, &orders, telemetry).inspect_err(say_why);
    if let Some(counts) = t.dataset.cache_counts() {
        tracing::info!(%counts, "block cache");
    }
    log_read_faults(&t.dataset.read_faults());
    status
}

/// From generation to generation: the loss of a peer costs the step in flight, and no process.
fn live(t: &mut Trainer, orders: &Orders, telemetry: &Guard) -> Result<i32, TrainerError> {
    loop {
        let membership = match orders.next() {
            Next::Join(membership) => membership,
            Next::Stop => {
                persist::checkpoint_alone(t)?;
                return Ok(EXIT_RESUMABLE);
            }
        };
        let span = traces::member(&membership, telemetry);
        let trained = span.in_scope(|| {
            t.join(&membership, orders).and_then(|restored| train(t, restored, orders, &span))
        });
        match trained {
            Err(error) if error.is_lost_peer() => {
                let (generation, step) = (membership.generation, t.step);
                // No warning: the coordinator says what it was.
                tracing::info!(%generation, %step, %error, "the group is gone");
                t.leave(orders)?;
                let done = t.live.then_some(step);
                emit(&TrainerEvent::Stranded { generation, done, text: error.to_string() });
            }
            Ok(EXIT_DONE) if t.rank.0 == 0 => {
                emit(&TrainerEvent::Complete { generation: membership.generation });
                return Ok(EXIT_DONE);
            }
            ended => return ended,
        }
    }
}

/// Said once, and only if there is something to say: a run that lives on second requests.
fn log_read_faults(faults: &ReadFaults) {
    if faults.total() > 0 {
        let ReadFaults { requests, bytes, retries, hedges_sent, hedges_won, .. } = *faults;
        let kinds = faults.to_string();
        tracing::info!(
            requests,
            bytes,
            retries,
            hedges_sent,
            hedges_won,
            kinds,
            "faults on the way to the data"
        );
    }
}

fn say_why(error: &TrainerError) {
    emit(&TrainerEvent::Failed {
        text: error.to_string(),
        status: error.exit_status(),
        curable: error.is_curable(),
    });
}

/// The training loop.
fn train(
    t: &mut Trainer,
    restored: bool,
    orders: &Orders,
    member: &Span,
) -> Result<i32, TrainerError> {
    emit(&t.ready(restored)?);
    let mut sampling = StepSampling::new(t.config.telemetry.step_spans());
    let mut epoch = traces::EpochSpan::default();
    catch_up(t, restored, orders)?;

    while t.step < t.total {
        orders.still_in()?;
        if orders.attest_wanted() {
            emit(&t.ready(false)?);
        }
        let started = Instant::now();
        let traced = sampling.takes(started);
        let mut trace = StepTrace::begin(epoch.of(t, member), t.step, t.rank, traced);
        let next = trace.phase(Phase::DataWait, || t.loader.as_mut().map(Loader::next));
        let Some(batch) = next.transpose()?.flatten() else { break };
        t.reduce_over(t.method.heads(t.step.0))?;

        let (images, labels) =
            trace.phase(Phase::CopyToDevice, || tensors(&batch, t.patch, t.device))?;
        let samples: Vec<u64> = batch.draws.iter().map(|draw| draw.sample).collect();
        let counts = counts(t.loader()?.deal().spec(), t.world);
        let input = t.input(&images, &labels, &samples, counts);
        let mut passes = trace.phase(Phase::Forward, || t.method.forward(&t.nets, &input))?;
        let loss = trace.phase(Phase::Loss, || t.method.loss(&passes, &input))?;
        // Loss terms, what was fed and votes travel while the gradients do.
        let fed =
            Part::of(batch.step, &t.loader()?.share().unlabelled, &batch.draws[batch.n_labelled..]);
        let tail = Tail::start(&loss, fed, orders.stop_wanted(), &t.ranks)?;
        trace.phase(Phase::Backward, || t.backward(&loss))?;
        let tail = trace.phase(Phase::AllReduceWait, || tail.wait())?;
        let statistics = passes.outputs.iter_mut().map(Outputs::take_statistics).collect();
        trace.phase(Phase::Optimiser, || t.apply(statistics))?;

        t.receipts.push(tail.fed.receipt(t.step))?;
        if let Some((lineage, step)) = orders.recorded() {
            t.receipts.acknowledge(lineage, step);
        }
        t.step = t.step.next();
        let waited = trace.spent(Phase::DataWait).as_secs_f64();
        let took = trace.end().as_secs_f64().max(1e-9);
        report(t, &loss, &tail, &counts, took, waited / took)?;
        t.keep_pace(started.elapsed().saturating_sub(trace.spent(Phase::DataWait)))?;
        if t.validates_here() {
            validate::validate(t, orders)?;
        }
        if t.checkpoints_here() || tail.stop {
            trace.phase(Phase::CheckpointHold, || persist::checkpoint(t))?;
        }
        tensorboard::write(t)?;
        vitals::stepped(t, &orders.vitals, &trace, took);
        if tail.stop && t.step < t.total {
            t.flush()?;
            return Ok(EXIT_RESUMABLE);
        }
    }
    t.flush()?;
    // A step that was lost on the way is missed only when a later one comes: now none does.
    emit(&t.ready(false)?);
    persist::final_report(t, orders)?;
    Ok(EXIT_DONE)
}

/// What the generation before did not get to.
fn catch_up(t: &mut Trainer, restored: bool, orders: &Orders) -> Result<(), TrainerError> {
    if t.validation_due {
        validate::validate(t, orders)?;
    }
    if t.checkpoints_here() && !restored && t.submitted != Some(t.step) {
        persist::checkpoint(t)?;
    }
    Ok(())
}

impl Trainer {
    /// Refuses a run whose first steps, of which one `took` so long, are too slow for its `recovery.target_s`.
    fn keep_pace(&mut self, took: Duration) -> Result<(), TrainerError> {
        if self.world.0 > 1 && self.step.0 <= pace::RUN_STEPS {
            self.pace.step(took, &self.config.recovery)?;
        }
        Ok(())
    }

    /// Which rank of which generation this is.
    fn place(&self) -> Place {
        Place { generation: self.generation, rank: self.rank }
    }

    /// It trains from here on.
    fn ready(&self, restored: bool) -> Result<TrainerEvent, TrainerError> {
        let ledger = self.attestation()?;
        Ok(TrainerEvent::Ready { place: self.place(), step: self.step, restored, ledger })
    }

    /// The step as the method sees it.
    fn input<'a>(
        &'a self,
        images: &'a Tensor,
        labels: &'a Tensor,
        samples: &'a [u64],
        counts: Counts,
    ) -> StepInput<'a> {
        StepInput {
            images,
            labels,
            samples,
            counts,
            done: self.step.0,
            seed: self.seed,
            rank: u64::from(self.rank.0),
            sync: self.sync.as_ref(),
            ranks: self.ranks.as_ref(),
            global_dice: self.config.loss.global_dice,
        }
    }

    /// Gradients of every parameter, averaged over the ranks when this returns.
    fn backward(&mut self, loss: &StepLoss) -> Result<(), TrainerError> {
        if let Some(reducer) = &mut self.reducer {
            reducer.prepare_for_backward(&[])?;
        }
        Ok(ops::backward(&loss.roots, &loss.grads)?)
    }

    /// Commits the step: parameters, momentum, running statistics and the teacher change here and nowhere else.
    fn apply(&mut self, statistics: Vec<Statistics>) -> Result<(), TrainerError> {
        // An error on the way leaves something between two steps: nobody is to go on from that.
        (self.live, self.pristine) = (false, false);
        self.nets.step(methods::learning_rate(&self.config, self.step), statistics)?;
        self.nets.follow(self.method.teacher_decay(self.step.0))?;
        self.live = true;
        self.clear_gradients()
    }
}

/// What all ranks have in a batch together. The deal knows: there may be nothing unlabelled.
fn counts(deal: &DealSpec, world: WorldSize) -> Counts {
    let (labelled, unlabelled) = (deal.batch_labelled, deal.batch_unlabelled);
    Counts {
        world: world.0,
        labelled: u64::from(labelled),
        samples: u64::from(labelled) + u64::from(unlabelled),
    }
}

/// `[N, C, H, W]` float32 images and `[N_l, H, W]` uint8 labels of a batch, on the device.
fn tensors(
    batch: &Batch,
    (h, w): (usize, usize),
    device: Device,
) -> Result<(Tensor, Tensor), TrainerError> {
    let n = (batch.n_labelled + batch.n_unlabelled) as i64;
    let (c, h, w) = (batch.channels as i64, h as i64, w as i64);
    let images = Tensor::f_from_slice(&batch.images)?.f_view([n, c, h, w])?;
    let labels = if batch.n_labelled == 0 {
        Tensor::f_zeros([0, h, w], (Kind::Uint8, Device::Cpu))?
    } else {
        Tensor::f_from_slice(&batch.labels)?.f_view([batch.n_labelled as i64, h, w])?
    };
    Ok((device::send(images, device)?, device::send(labels, device)?))
}

/// Tells the agent, and remembers for the report.
fn report(
    t: &mut Trainer,
    loss: &StepLoss,
    tail: &ranks::TailSums,
    counts: &Counts,
    took_s: f64,
    data_wait: f64,
) -> Result<(), TrainerError> {
    let terms: BTreeMap<String, f64> = loss
        .names
        .iter()
        .zip(&tail.terms)
        .map(|(name, value)| ((*name).to_owned(), *value))
        .collect();
    let total = terms.get("total").copied().unwrap_or(f64::NAN);
    if !total.is_finite() {
        return Err(TrainerError::Diverged { step: t.step, total });
    }
    let images_per_s = counts.samples as f64 / took_s;
    tracing::debug!(step = t.step.0, took_s, "stepped");
    let done = Step(t.step.0 - 1);
    if t.rank.0 == 0 {
        emit(&TrainerEvent::Step {
            step: t.step,
            total: t.total,
            terms: terms.clone(),
            images_per_s,
            data_wait,
            lr: methods::learning_rate(&t.config, done),
            consistency: t.method.consistency_weight(done.0),
            receipt: Some(tail.fed.receipt(done)),
        });
    }
    // Every rank remembers: any of them may be rank 0 next.
    if t.step.0.is_multiple_of(t.record_every) || t.step == Step(1) || t.step == t.total {
        t.history.push(Record::Step(StepRecord {
            step: t.step.0,
            losses: terms,
            lr: methods::learning_rate(&t.config, done),
            consistency_weight: t.method.consistency_weight(done.0),
            images_per_s,
            data_wait_share: data_wait,
        }));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Deal;

    /// Distillation and entropy are means over the samples there are.
    #[test]
    fn a_pool_without_unlabelled_samples_does_not_count_them() {
        let spec = DealSpec {
            seed: 1,
            labelled: 0..10,
            unlabelled: 10..10,
            block_rows: 4,
            batch_labelled: 4,
            batch_unlabelled: 4,
        };
        let deal = Deal::new(spec).unwrap();
        let counts = counts(deal.spec(), WorldSize(2));
        assert_eq!((counts.labelled, counts.samples, counts.world), (4, 4, 2));
    }
}
