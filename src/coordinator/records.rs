//! The ledger's task: it writes down what trainers report, beside the owner task, which never waits for storage.
//!
//! One object at a time; what comes meanwhile waits in a queue as long as what trainers may keep, so that
//! a slow store is the trainers' bound and nobody else's. What to write is `ledger::Recorder`'s decision.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::ledger::{
    Attestation, LedgerError, Object, RECEIPTS_MAX, Recorded, Recorder, claim, create,
};
use crate::proto::{EXIT_FAILED, EXIT_RESUMABLE, LedgerStart, TrainerEvent};
use crate::store::Store;
use crate::types::{Generation, Receipt, Step};

/// Entries that may wait: all that trainers may keep, and some openings.
const QUEUE: usize = RECEIPTS_MAX + 1024;
/// Acknowledgements that may wait for the owner.
const TOLD: usize = 16;
/// How long a receipt waits for company at most.
const FLUSH: Duration = Duration::from_secs(15);
/// How often an object is tried; each time may take as long as the store's deadline.
const TRIES_MAX: u32 = 5;
/// Between two tries.
const PAUSE: Duration = Duration::from_secs(1);

/// Where a run's ledger is kept, and how.
#[derive(Debug, Clone)]
pub struct LedgerPlace {
    /// The run's folder.
    pub run: Store,
    /// Steps between checkpoints: at each of them the ledger is written.
    pub checkpoint_every: u64,
    /// Steps of the whole run.
    pub steps: Step,
}

/// What goes into the ledger.
enum Entry {
    Ready { generation: Generation, step: Step, start: LedgerStart },
    Step { generation: Generation, receipt: Receipt },
}

/// What the owner hears of it.
pub(super) enum Told {
    /// This much is recorded.
    Recorded(Recorded),
    /// Something that this generation has said was lost on the way.
    Missing(Generation),
    /// No more can be.
    Lost { status: i32, reason: String },
}

/// The owner's end of the task.
pub(super) struct Records {
    entries: mpsc::Sender<Entry>,
    pub(super) told: mpsc::Receiver<Told>,
}

/// The task that writes the ledger; it ends when its [`Records`] is dropped, with how that went.
pub(super) type Recording = JoinHandle<Result<(), LedgerError>>;

/// Claims the ledger for `writer` and starts the task. The task ends, everything written, when its
/// [`Records`] are dropped.
pub(super) async fn start(
    place: LedgerPlace,
    writer: &str,
) -> Result<(Records, Recording), LedgerError> {
    let number = claim(&place.run, writer).await?;
    let recorder = Recorder::new(writer.to_owned(), number, place.checkpoint_every);
    let (entries, queue) = mpsc::channel(QUEUE);
    let (tell, told) = mpsc::channel(TOLD);
    let task = tokio::spawn(async move {
        let result = keep(&place.run, recorder, queue, &tell).await;
        if let Err(error) = &result {
            let (status, reason) = (status_of(error), error.to_string());
            // Nobody listens any more where the run has ended: then the result says it.
            tell.send(Told::Lost { status, reason }).await.ok();
        }
        result
    });
    Ok((Records { entries, told }, task))
}

/// The exit status of a coordinator that cannot go on.
pub(super) fn status_of(error: &LedgerError) -> i32 {
    match error {
        LedgerError::Store(error) if error.is_transient() => EXIT_RESUMABLE,
        LedgerError::Unheard { .. } => EXIT_RESUMABLE,
        _ => EXIT_FAILED,
    }
}

impl Records {
    /// Takes what an event of rank 0 says for the ledger; `false` when the queue is full.
    pub(super) fn note(&self, generation: Generation, event: &TrainerEvent) -> bool {
        let entry = match event {
            TrainerEvent::Ready { step, ledger: Some(start), .. } => {
                Entry::Ready { generation, step: *step, start: start.clone() }
            }
            TrainerEvent::Step { receipt: Some(receipt), .. } => {
                Entry::Step { generation, receipt: *receipt }
            }
            _ => return true,
        };
        // A task that is gone has said why.
        !matches!(self.entries.try_send(entry), Err(mpsc::error::TrySendError::Full(_)))
    }
}

async fn keep(
    run: &Store,
    mut recorder: Recorder,
    mut queue: mpsc::Receiver<Entry>,
    tell: &mpsc::Sender<Told>,
) -> Result<(), LedgerError> {
    let mut tick = tokio::time::interval(FLUSH);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut going_on = true;
    while going_on {
        tokio::select! {
            entry = queue.recv() => match entry {
                Some(Entry::Ready { generation, step, start }) => {
                    recorder.open(generation, step, Attestation::from_wire(start)?)?;
                }
                Some(Entry::Step { generation, receipt }) => recorder.add(generation, receipt),
                None => {
                    recorder.flush();
                    going_on = false;
                }
            },
            _ = tick.tick() => recorder.flush(),
        }
        if let Some(generation) = recorder.wanted() {
            // At the end nobody listens, here and below: what is not acknowledged is carried.
            tell.send(Told::Missing(generation)).await.ok();
        }
        while let Some(object) = recorder.object() {
            write(run, &object).await?;
            if let Some(recorded) = recorder.created(&object) {
                tell.send(Told::Recorded(recorded)).await.ok();
            }
        }
    }
    recorder.is_whole()
}

/// Creates one object, the same bytes each time: so it is known again if an answer was lost.
async fn write(run: &Store, object: &Object) -> Result<(), LedgerError> {
    let mut tries = 0;
    loop {
        tries += 1;
        match create(run, object).await {
            Err(LedgerError::Store(error)) if error.is_transient() && tries < TRIES_MAX => {
                tracing::warn!(%error, tries, "the ledger waits for the store");
                tokio::time::sleep(PAUSE).await;
            }
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::DealSpec;
    use crate::ledger::{Carried, numbers, read};
    use crate::proto::Place;
    use crate::store::StoreOptions;
    use crate::types::{Lineage, WorldSize};

    fn place() -> LedgerPlace {
        let run = Store::open("memory:///", &StoreOptions::default()).unwrap();
        LedgerPlace { run, checkpoint_every: 3, steps: Step(100) }
    }

    fn ready() -> TrainerEvent {
        let attested = Attestation {
            world: WorldSize(1),
            dataset_sha256: "f".repeat(64),
            deal: DealSpec {
                seed: 1,
                labelled: 0..4,
                unlabelled: 4..9,
                block_rows: 4,
                batch_labelled: 1,
                batch_unlabelled: 1,
            },
            carried: Carried::unrecorded(Step(0)),
        };
        TrainerEvent::Ready {
            place: Place::default(),
            step: Step(0),
            restored: false,
            ledger: Some(attested.to_wire().unwrap()),
        }
    }

    fn step(step: u64) -> TrainerEvent {
        TrainerEvent::Step {
            step: Step(step + 1),
            total: Step(100),
            terms: std::collections::BTreeMap::new(),
            images_per_s: 1.0,
            data_wait: 0.0,
            lr: 0.0,
            consistency: 0.0,
            receipt: Some(Receipt { step: Step(step), fingerprint: step, samples: 1 }),
        }
    }

    async fn recorded(records: &mut Records) -> (Lineage, Step) {
        match records.told.recv().await {
            Some(Told::Recorded(told)) => (told.lineage, told.step),
            Some(Told::Missing(generation)) => panic!("nothing of {generation} was lost"),
            Some(Told::Lost { reason, .. }) => panic!("{reason}"),
            None => panic!("the task has ended"),
        }
    }

    #[tokio::test]
    async fn what_is_reported_is_acknowledged_and_the_rest_written_at_the_end() {
        let place = place();
        let (mut records, task) = start(place.clone(), "w").await.unwrap();
        let events = [ready(), step(0), step(1), step(2), step(3)];
        assert!(events.iter().all(|event| records.note(Generation(1), event)));
        let mut newest = Step(0);
        while newest < Step(3) {
            newest = recorded(&mut records).await.1; // as few objects as the task pleases
        }
        drop(records);
        task.await.unwrap().unwrap();
        let mut steps = Vec::new();
        for number in numbers(&place.run).await.unwrap() {
            let object = read(&place.run, number).await.unwrap();
            steps.extend(object.receipts().map(|receipt| receipt.step.0));
        }
        assert_eq!(steps, [0, 1, 2, 3]);
    }

    #[tokio::test]
    async fn a_coordinator_that_another_has_followed_is_told_to_stop() {
        let place = place();
        let (mut records, task) = start(place.clone(), "first").await.unwrap();
        let (_second, _) = start(place, "second").await.unwrap();
        assert!(records.note(Generation(1), &ready()));
        let Some(Told::Lost { status, reason }) = records.told.recv().await else {
            panic!("it was not told");
        };
        assert!(status == EXIT_FAILED && reason.contains("another coordinator"), "{reason}");
        assert!(records.note(Generation(1), &step(0)), "what nobody takes is no overflow");
        assert!(matches!(task.await.unwrap(), Err(LedgerError::Fenced { .. })));
    }

    #[tokio::test]
    async fn a_report_that_is_missing_is_asked_for() {
        let (mut records, _task) = start(place(), "w").await.unwrap();
        assert!([ready(), step(1)].iter().all(|event| records.note(Generation(1), event)));
        let mut told = records.told.recv().await;
        while let Some(Told::Recorded(_)) = told {
            told = records.told.recv().await;
        }
        assert!(matches!(told, Some(Told::Missing(Generation(1)))));
    }
}
