//! Hundreds of seeded lives of a run: trainers, coordinators and their store die, lose answers and come back
//! at random, and an audit of what is in the store succeeds whenever one looks. A failing seed is printed and
//! can be replayed.

use std::collections::BTreeMap;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::fingerprint::Part;
use super::{
    Attestation, Branches, Carried, FORMAT, Object, Origin, Receipts, Recorded, Recorder, Replay,
    Run,
};
use crate::data::{Deal, DealSpec};
use crate::types::{Generation, Step, WorldSize};

/// What outlives everybody: objects that are only created, and checkpoints, of which some are kept.
#[derive(Default)]
struct Bucket {
    objects: BTreeMap<u64, Object>,
    checkpoints: BTreeMap<Step, Carried>,
}

impl Bucket {
    /// As `Store::create` does it: one's own bytes count as new.
    fn create(&mut self, object: &Object) -> bool {
        object.encode().unwrap();
        self.objects.entry(object.number).or_insert_with(|| object.clone()) == object
    }

    fn claim(&mut self, writer: &str) -> u64 {
        let number = self.objects.keys().next_back().map_or(1, |newest| newest + 1);
        let claim = Object {
            format: FORMAT,
            number,
            writer: writer.to_owned(),
            lineage: None,
            opening: None,
            receipts: Vec::new(),
        };
        assert!(self.create(&claim));
        number + 1
    }

    /// The newest checkpoint that a resume finds whole: mostly the newest there is.
    fn newest(&self, rng: &mut ChaCha8Rng) -> (Step, Carried) {
        let damaged = usize::from(rng.next_u32().is_multiple_of(8));
        match self.checkpoints.iter().rev().nth(damaged).or(self.checkpoints.iter().next()) {
            Some((step, carried)) => (*step, carried.clone()),
            None => (Step(0), Carried::unrecorded(Step(0))),
        }
    }

    /// Steps proven, which must be all up to the newest checkpoint or the newest record.
    fn audit(&self, deal: &Deal) -> Result<u64, super::Violation> {
        let mut branches = Branches::default();
        self.objects.values().try_for_each(|object| branches.add(object))?;
        let newest = self.checkpoints.iter().next_back().map(|(step, carried)| (*step, carried));
        let path = branches.path(newest)?;
        let mut replay = Replay::new(&path, deal);
        self.objects.values().try_for_each(|object| replay.object(object))?;
        let counts = replay.finish()?;
        assert_eq!(counts.first_step, Step(0), "from the start");
        assert!(newest.is_none_or(|(step, _)| counts.steps >= step.0), "to the checkpoint");
        Ok(counts.steps)
    }
}

/// A generation's rank 0.
struct Trainer {
    generation: Generation,
    step: Step,
    receipts: Receipts,
}

impl Trainer {
    fn resume(generation: Generation, bucket: &Bucket, rng: &mut ChaCha8Rng) -> Self {
        let (step, carried) = bucket.newest(rng);
        Self { generation, step, receipts: Receipts::resume(&carried, step).unwrap() }
    }

    fn attested(&self, deal: &Deal) -> Attestation {
        let attested = Attestation {
            world: WorldSize(2),
            dataset_sha256: "f".repeat(64),
            deal: deal.spec().clone(),
            carried: self.receipts.carried(),
        };
        Attestation::from_wire(attested.to_wire().unwrap()).unwrap()
    }
}

/// A coordinator; a superseded one may go on for a while, with its trainer.
struct Coordinator {
    recorder: Recorder,
    generations: u64,
    trainer: Trainer,
    /// Written, but no answer came: tried again with the same bytes.
    in_flight: Option<Object>,
    /// Whether what rank 0 says is lost on the way just now.
    cut_off: bool,
}

impl Coordinator {
    fn start(bucket: &mut Bucket, name: String, deal: &Deal, rng: &mut ChaCha8Rng) -> Self {
        let number = bucket.claim(&name);
        let recorder = Recorder::new(name, number, 7);
        let trainer = Trainer::resume(Generation(1), bucket, rng);
        let (in_flight, cut_off) = (None, false);
        let mut new = Self { recorder, generations: 1, trainer, in_flight, cut_off };
        new.attest(deal);
        new
    }

    /// Rank 0 says where the ledger goes on.
    fn attest(&mut self, deal: &Deal) {
        let trainer = &self.trainer;
        if !self.cut_off {
            self.recorder.open(trainer.generation, trainer.step, trainer.attested(deal)).unwrap();
        }
    }

    /// Rank 0 is asked, if something of its generation is missing.
    fn ask(&mut self, deal: &Deal) {
        if self.recorder.wanted() == Some(self.trainer.generation) {
            self.attest(deal);
        }
    }

    /// The trainer died: the next generation.
    fn restart(&mut self, bucket: &Bucket, deal: &Deal, rng: &mut ChaCha8Rng) {
        self.generations += 1;
        self.trainer = Trainer::resume(Generation(self.generations), bucket, rng);
        self.attest(deal);
    }

    /// Whether everything that rank 0 has done is known, once it can be heard again.
    fn catches_up(&mut self, bucket: &mut Bucket, deal: &Deal, rng: &mut ChaCha8Rng) -> bool {
        self.cut_off = false;
        self.step(bucket, deal, Checkpoints::Carry);
        self.recorder.flush();
        self.ask(deal);
        while self.recorder.object().is_some() || self.in_flight.is_some() {
            assert!(self.write(bucket, rng), "it is obeyed");
        }
        let newest = bucket.objects.values().rev().find_map(|object| object.receipts.last());
        newest.and_then(Run::next) == Some(self.trainer.step)
    }

    fn step(&mut self, bucket: &mut Bucket, deal: &Deal, checkpoints: Checkpoints) {
        let trainer = &mut self.trainer;
        let receipt = Part::planned(deal, trainer.step).receipt(trainer.step);
        trainer.receipts.push(receipt).unwrap();
        trainer.step = trainer.step.next();
        if !self.cut_off {
            self.recorder.add(trainer.generation, receipt);
        }
        if trainer.step.0.is_multiple_of(7) {
            // What stands there already stays.
            let mut carried = trainer.receipts.carried();
            if checkpoints == Checkpoints::CarryNothing && carried.origin != Origin::Start {
                carried = Carried { first: trainer.step, receipts: Vec::new(), ..carried };
            }
            bucket.checkpoints.entry(trainer.step).or_insert(carried);
            while bucket.checkpoints.len() > 3 {
                bucket.checkpoints.pop_first();
            }
        }
    }

    /// Writes the next object; `false` when another coordinator has its number.
    fn write(&mut self, bucket: &mut Bucket, rng: &mut ChaCha8Rng) -> bool {
        let Some(object) = self.in_flight.take().or_else(|| self.recorder.object()) else {
            return true;
        };
        match rng.next_u32() % 10 {
            0 => self.in_flight = Some(object), // it never arrived
            1 => {
                // The answer is lost.
                let created = bucket.create(&object);
                self.in_flight = Some(object);
                return created;
            }
            _ => {
                if !bucket.create(&object) {
                    return false;
                }
                if let Some(Recorded { generation, lineage, step }) = self.recorder.created(&object)
                    && generation == self.trainer.generation
                    && !rng.next_u32().is_multiple_of(4)
                {
                    // One in four acknowledgements is lost.
                    self.trainer.receipts.acknowledge(lineage, step);
                }
            }
        }
        true
    }
}

fn deal() -> Deal {
    Deal::new(DealSpec {
        seed: 11,
        labelled: 0..6,
        unlabelled: 6..43,
        block_rows: 5,
        batch_labelled: 2,
        batch_unlabelled: 4,
    })
    .unwrap()
}

/// What a checkpoint says of receipts that the ledger is not known to hold.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Checkpoints {
    /// All of them, as it should.
    Carry,
    /// Nothing: a defect, for the simulation to find.
    CarryNothing,
}

/// What a life came to.
#[derive(Default)]
struct Life {
    coordinators: u32,
    fenced: u32,
    furthest: u64,
}

/// One life by its seed; the error is what an audit found.
fn live(seed: u64, deal: &Deal, checkpoints: Checkpoints) -> Result<Life, String> {
    let rng = &mut ChaCha8Rng::seed_from_u64(seed);
    let bucket = &mut Bucket::default();
    let mut life = Life::default();
    let begin = |bucket: &mut Bucket, life: &mut Life, rng: &mut ChaCha8Rng| {
        life.coordinators += 1;
        Coordinator::start(bucket, format!("c{}", life.coordinators), deal, rng)
    };
    let mut newest = begin(bucket, &mut life, rng);
    let mut older: Option<Coordinator> = None;
    for event in 0..250 {
        match rng.next_u32() % 40 {
            // Killed, perhaps with everything else, and started again.
            0 => newest = begin(bucket, &mut life, rng),
            // A second one is started; the first does not know.
            1 => older = Some(std::mem::replace(&mut newest, begin(bucket, &mut life, rng))),
            2 => newest.restart(bucket, deal, rng),
            3 => newest.cut_off = !newest.cut_off,
            4..=6 => newest.recorder.flush(),
            7..=12 => assert!(newest.write(bucket, rng), "seed {seed}: it is obeyed"),
            13..=15 => {
                if let Some(coordinator) = &mut older {
                    coordinator.recorder.flush();
                    if !coordinator.write(bucket, rng) {
                        older = None; // it was told, and stops
                        life.fenced += 1;
                    }
                }
            }
            16 => {
                if let Some(coordinator) = &mut older {
                    coordinator.step(bucket, deal, checkpoints);
                }
            }
            _ => newest.step(bucket, deal, checkpoints),
        }
        newest.ask(deal);
        if rng.next_u32().is_multiple_of(16) {
            let steps = bucket.audit(deal).map_err(|found| format!("event {event}: {found}"))?;
            life.furthest = life.furthest.max(steps);
        }
    }
    if !newest.catches_up(bucket, deal, rng) {
        return Err("what was lost on the way stays lost".to_owned());
    }
    Ok(life)
}

#[test]
fn whatever_dies_every_step_up_to_the_newest_checkpoint_is_proven_once() {
    let deal = deal();
    let (mut coordinators, mut fenced, mut furthest) = (0, 0, 0);
    for seed in 0..600 {
        let life = live(seed, &deal, Checkpoints::Carry)
            .unwrap_or_else(|found| panic!("seed {seed}, {found}"));
        coordinators += life.coordinators;
        fenced += life.fenced;
        furthest = furthest.max(life.furthest);
    }
    // The simulation reaches what it is for.
    let reached = coordinators > 2000 && fenced > 100 && furthest > 100;
    assert!(reached, "{coordinators} coordinators, {fenced} fenced, step {furthest}");
}

#[test]
fn the_simulation_finds_checkpoints_that_carry_nothing() {
    let deal = deal();
    let found = (0..50).filter(|seed| live(*seed, &deal, Checkpoints::CarryNothing).is_err());
    assert!(found.count() > 10);
}
