//! What the coordinator writes down, in which order: pure.
//!
//! It turns openings and receipts into numbered objects. [`Recorder::object`] is the next one to
//! create, [`Recorder::created`] says that it exists, and only then is anything acknowledged. A receipt that comes
//! again is not taken again. One that comes too early is not taken either: something before it was lost on the way,
//! and whoever keeps all receipts is asked ([`Recorder::wanted`]) to open its generation once more.

use std::collections::VecDeque;

use super::error::LedgerError;
use super::receipts::Carried;
use super::record::{Attestation, FORMAT, OBJECT_RECEIPTS_MAX, Object, Opening, Run, object_path};
use crate::types::{Generation, Lineage, Receipt, Step};

/// Receipts that are worth an object of their own.
const RECEIPTS_DUE: usize = 4096;

/// What the ledger holds now, for the trainers of a generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recorded {
    /// Whose steps.
    pub generation: Generation,
    /// In which lineage.
    pub lineage: Lineage,
    /// All steps before this one.
    pub step: Step,
}

/// What is yet to be written of one generation.
#[derive(Debug, Clone)]
struct Draft {
    generation: Generation,
    opening: Option<Opening>,
    receipts: VecDeque<Receipt>,
}

/// The coordinator's side of the ledger.
#[derive(Debug, Clone)]
pub struct Recorder {
    writer: String,
    next_number: u64,
    /// Steps between checkpoints: at each of them it is time to write.
    checkpoint_every: u64,
    /// The generation whose receipts are taken, and the step that comes next.
    open: Option<(Generation, Step)>,
    /// The lineage that was opened last in the store.
    lineage: Option<Lineage>,
    /// In order; only the last one grows.
    drafts: VecDeque<Draft>,
    due: bool,
    /// A generation that has said more than was understood.
    missing: Option<Generation>,
    /// Whether its trainer has been asked since the last flush.
    asked: bool,
}

impl Recorder {
    /// For a `writer` that has claimed the ledger up to `next_number`, which it creates next.
    #[must_use]
    pub fn new(writer: String, next_number: u64, checkpoint_every: u64) -> Self {
        Self {
            writer,
            next_number,
            checkpoint_every: checkpoint_every.max(1),
            open: None,
            lineage: None,
            drafts: VecDeque::new(),
            due: false,
            missing: None,
            asked: false,
        }
    }

    /// A generation is ready to go on from `step`: a lineage opens. Said again, it fills in what was missed.
    ///
    /// # Errors
    /// [`LedgerError::Invalid`] for receipts that do not lead to that step, [`LedgerError::Gap`] if they leave out some
    /// that nobody has recorded.
    pub fn open(
        &mut self,
        generation: Generation,
        step: Step,
        attested: Attestation,
    ) -> Result<(), LedgerError> {
        if let Some((newest, next)) = self.open {
            if generation < newest {
                return Ok(()); // it has ended
            }
            if generation == newest {
                return self.fill_in(generation, next, &attested.carried, step);
            }
        }
        let receipts = attested.carried.up_to(step)?.into();
        let opening = Opening {
            origin: attested.carried.origin,
            first: attested.carried.first,
            resumed: step,
            generation,
            world: attested.world,
            dataset_sha256: attested.dataset_sha256,
            deal: attested.deal,
        };
        self.drafts.push_back(Draft { generation, opening: Some(opening), receipts });
        self.open = Some((generation, step));
        self.missing = None;
        Ok(())
    }

    /// What a generation that is open says again: taken from `next` on.
    fn fill_in(
        &mut self,
        generation: Generation,
        next: Step,
        carried: &Carried,
        step: Step,
    ) -> Result<(), LedgerError> {
        let receipts = carried.up_to(step)?;
        if carried.first > next {
            return Err(LedgerError::Gap { wanted: next, found: carried.first });
        }
        self.missing = None;
        for receipt in receipts {
            self.add(generation, receipt);
        }
        Ok(())
    }

    /// A rank of `generation` has applied a step.
    pub fn add(&mut self, generation: Generation, receipt: Receipt) {
        let newest = self.open.map(|(newest, _)| newest);
        if newest.is_some_and(|newest| generation < newest) {
            return; // of a generation that has ended: whoever resumed has its own
        }
        let Some((_, next)) =
            self.open.filter(|(open, next)| *open == generation && receipt.step <= *next)
        else {
            self.misses(generation);
            return;
        };
        if receipt.step < next {
            return;
        }
        match self.drafts.back_mut() {
            Some(draft) => draft.receipts.push_back(receipt),
            None => {
                let receipts = [receipt].into();
                self.drafts.push_back(Draft { generation, opening: None, receipts });
            }
        }
        let next = next.next();
        self.open = Some((generation, next));
        self.due |= next.0.is_multiple_of(self.checkpoint_every);
    }

    fn misses(&mut self, generation: Generation) {
        if self.missing != Some(generation) {
            (self.missing, self.asked) = (Some(generation), false);
        }
    }

    /// The generation whose rank 0 is to say once more where it goes on: something that it said was lost. Said
    /// once, and after a flush again, until that helps.
    pub fn wanted(&mut self) -> Option<Generation> {
        let asked = std::mem::replace(&mut self.asked, true);
        self.missing.filter(|_| !asked)
    }

    /// Whether all is there that is known of.
    ///
    /// # Errors
    /// [`LedgerError::Unheard`].
    pub fn is_whole(&self) -> Result<(), LedgerError> {
        self.missing.map_or(Ok(()), |generation| Err(LedgerError::Unheard { generation }))
    }

    /// Time has passed, or the run ends: what there is should be written.
    pub fn flush(&mut self) {
        self.due = true;
        self.asked = false;
    }

    /// The object to create next, if it is time to. The same until [`Self::created`].
    #[must_use]
    pub fn object(&self) -> Option<Object> {
        let draft = self.drafts.front()?;
        let waiting = draft.opening.is_some()
            || self.drafts.len() > 1
            || draft.receipts.len() >= RECEIPTS_DUE;
        (self.due || waiting).then(|| Object {
            format: FORMAT,
            number: self.next_number,
            writer: self.writer.clone(),
            lineage: match draft.opening {
                Some(_) => Some(Lineage(self.next_number)),
                None => self.lineage,
            },
            opening: draft.opening.clone(),
            receipts: Run::pack(draft.receipts.iter().take(OBJECT_RECEIPTS_MAX)),
        })
    }

    /// The name of the object to create next.
    #[must_use]
    pub fn next_path(&self) -> String {
        object_path(self.next_number)
    }

    /// `object` exists now: what of it is to be acknowledged.
    pub fn created(&mut self, object: &Object) -> Option<Recorded> {
        let draft = self.drafts.front_mut()?;
        self.next_number += 1;
        self.lineage = object.lineage;
        let opening = draft.opening.take();
        let written: usize = object.receipts.iter().map(|run| run.fingerprints.len()).sum();
        draft.receipts.drain(..written.min(draft.receipts.len()));
        let generation = draft.generation;
        if draft.receipts.is_empty() {
            self.drafts.pop_front();
        }
        self.due &= !self.drafts.is_empty();
        let step = object.receipts.last().and_then(Run::next).or(opening.map(|o| o.first))?;
        Some(Recorded { generation, lineage: object.lineage?, step })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::DealSpec;
    use crate::ledger::{Carried, Origin};
    use crate::types::WorldSize;

    fn attested(carried: Carried) -> Attestation {
        let deal = DealSpec {
            seed: 1,
            labelled: 0..10,
            unlabelled: 10..50,
            block_rows: 4,
            batch_labelled: 4,
            batch_unlabelled: 12,
        };
        let dataset_sha256 = "f".repeat(64);
        Attestation { world: WorldSize(4), dataset_sha256, deal, carried }
    }

    fn receipt(step: u64) -> Receipt {
        Receipt { step: Step(step), fingerprint: step, samples: 12 }
    }

    fn written(recorder: &mut Recorder) -> Option<(Object, Option<Recorded>)> {
        let object = recorder.object()?;
        let recorded = recorder.created(&object);
        Some((object, recorded))
    }

    #[test]
    fn a_lineage_opens_at_once_and_receipts_wait_for_company() {
        let mut recorder = Recorder::new("w".to_owned(), 2, 100);
        let generation = Generation(1);
        recorder.open(generation, Step(0), attested(Carried::unrecorded(Step(0)))).unwrap();
        let (object, recorded) = written(&mut recorder).unwrap();
        assert_eq!((object.number, object.lineage), (2, Some(Lineage(2))));
        let told = Recorded { generation, lineage: Lineage(2), step: Step(0) };
        assert_eq!(recorded, Some(told));
        for step in 0..100 {
            assert_eq!(recorder.object(), None, "step {step}");
            recorder.add(generation, receipt(step));
        }
        let (object, recorded) = written(&mut recorder).unwrap(); // a checkpoint is due
        assert_eq!((object.number, object.opening.is_none()), (3, true));
        assert_eq!(object.receipts().count(), 100);
        assert_eq!(recorded, Some(Recorded { step: Step(100), ..told }));
        recorder.flush();
        assert_eq!(recorder.object(), None, "there is nothing");
        recorder.add(generation, receipt(100));
        assert!(recorder.object().is_some());
    }

    #[test]
    fn a_receipt_is_taken_once_in_order_and_from_the_newest_generation() {
        let mut recorder = Recorder::new("w".to_owned(), 2, 1);
        recorder.add(Generation(1), receipt(0)); // before anything opened
        recorder.open(Generation(2), Step(0), attested(Carried::unrecorded(Step(0)))).unwrap();
        recorder.add(Generation(2), receipt(0));
        recorder.add(Generation(2), receipt(0));
        recorder.add(Generation(1), receipt(1));
        let (object, _) = written(&mut recorder).unwrap();
        assert_eq!(object.receipts().collect::<Vec<_>>(), [receipt(0)]);
    }

    #[test]
    fn what_was_lost_on_the_way_is_asked_for_and_filled_in() {
        let mut recorder = Recorder::new("w".to_owned(), 2, 1);
        let carried = |steps: u64| {
            let kept: Vec<Receipt> = (0..steps).map(receipt).collect();
            let (origin, first) = (Origin::Start, Step(0));
            attested(Carried { origin, first, receipts: Run::pack(&kept) })
        };
        assert_eq!(recorder.wanted(), None);
        // Where it opens is lost first.
        recorder.add(Generation(3), receipt(1));
        assert_eq!((recorder.wanted(), recorder.wanted()), (Some(Generation(3)), None));
        assert!(matches!(recorder.is_whole(), Err(LedgerError::Unheard { .. })));
        recorder.flush();
        assert_eq!(recorder.wanted(), Some(Generation(3)), "it is asked again");
        recorder.open(Generation(3), Step(2), carried(2)).unwrap();
        assert_eq!(recorder.wanted(), None);
        // Then a step.
        recorder.add(Generation(3), receipt(2));
        recorder.add(Generation(3), receipt(4));
        recorder.add(Generation(3), receipt(5));
        assert_eq!(recorder.wanted(), Some(Generation(3)));
        recorder.open(Generation(3), Step(6), carried(6)).unwrap();
        recorder.add(Generation(3), receipt(6));
        recorder.flush();
        assert_eq!(recorder.wanted(), None, "nothing is missing");
        recorder.is_whole().unwrap();
        let (object, _) = written(&mut recorder).unwrap();
        assert_eq!(object.receipts().collect::<Vec<_>>(), (0..7).map(receipt).collect::<Vec<_>>());
        // What nobody has any more.
        let (origin, first) = (Origin::Lineage(Lineage(2)), Step(9));
        let late = Carried { origin, first, receipts: Run::pack(&[receipt(9)]) };
        let gap = recorder.open(Generation(3), Step(10), attested(late)).unwrap_err();
        assert!(matches!(gap, LedgerError::Gap { wanted: Step(7), found: Step(9) }));
    }

    #[test]
    fn the_next_generation_waits_for_what_the_one_before_left() {
        let mut recorder = Recorder::new("w".to_owned(), 2, 100);
        recorder.open(Generation(1), Step(0), attested(Carried::unrecorded(Step(0)))).unwrap();
        recorder.add(Generation(1), receipt(0));
        let kept = [receipt(0), receipt(1)];
        let carried = Carried { origin: Origin::Start, first: Step(0), receipts: Run::pack(&kept) };
        assert!(recorder.open(Generation(2), Step(3), attested(carried.clone())).is_err());
        recorder.open(Generation(2), Step(2), attested(carried)).unwrap();
        recorder.add(Generation(2), receipt(2));
        let (first, told) = written(&mut recorder).unwrap();
        assert_eq!(told.map(|told| (told.generation, told.step)), Some((Generation(1), Step(1))));
        let (second, told) = written(&mut recorder).unwrap();
        assert_eq!((first.lineage, second.lineage), (Some(Lineage(2)), Some(Lineage(3))));
        assert_eq!(second.receipts().map(|r| r.step.0).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(told.map(|told| (told.generation, told.step)), Some((Generation(2), Step(3))));
    }

    #[test]
    fn more_than_an_object_holds_goes_into_several() {
        let mut recorder = Recorder::new("w".to_owned(), 2, 1 << 40);
        recorder.open(Generation(1), Step(0), attested(Carried::unrecorded(Step(0)))).unwrap();
        let count = OBJECT_RECEIPTS_MAX as u64 + 5000;
        for step in 0..count {
            recorder.add(Generation(1), receipt(step));
        }
        let mut sizes = Vec::new();
        recorder.flush();
        while let Some((object, _)) = written(&mut recorder) {
            object.encode().unwrap();
            sizes.push(object.receipts().count());
        }
        assert_eq!(sizes, [OBJECT_RECEIPTS_MAX, 5000]);
    }
}
