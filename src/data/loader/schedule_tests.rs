//! The schedule under simulated threads and stores, by seed: whatever the order in which things end, batches
//! come in the deal's order with the blocks they need, within the bounds, and nothing gets stuck.

use proptest::prelude::*;

use super::*;
use crate::data::permutation::key_of;
use crate::data::sampler::DealSpec;
use crate::types::{Rank, WorldSize};

/// Bytes of every simulated block.
const BLOCK_BYTES: usize = 100;

fn spec(labelled: u64, unlabelled: u64, batch: (u32, u32)) -> DealSpec {
    DealSpec {
        seed: 3,
        labelled: 0..labelled,
        unlabelled: labelled..labelled + unlabelled,
        block_rows: 8,
        batch_labelled: batch.0,
        batch_unlabelled: batch.1,
    }
}

fn bounds(end: u64, prefetch: usize, fetches: usize, budget_blocks: usize) -> Bounds {
    Bounds { end: Step(end), prefetch, fetches, budget_bytes: budget_blocks * BLOCK_BYTES }
}

/// What a simulation has going on.
struct Simulation {
    schedule: Schedule<u64, u64>,
    deal: Deal,
    share: Share,
    bounds: Bounds,
    seed: u64,
    ticks: u64,
    running: Vec<Running>,
    ready: BTreeSet<u64>,
    taken: u64,
    fetches: Vec<u64>,
    /// A block that cannot be fetched.
    damaged: Option<u64>,
    kept_max: usize,
}

enum Running {
    Fetch(u64),
    Decode(u64),
    Batch(u64),
}

impl Simulation {
    fn new(seed: u64, spec: DealSpec, bounds: Bounds) -> Self {
        let deal = Deal::new(spec).unwrap();
        let share = deal.share(Rank(0), WorldSize(1)).unwrap();
        let schedule = Schedule::new(deal.clone(), share.clone(), Step(0), bounds);
        let (running, ready, fetches) = (Vec::new(), BTreeSet::new(), Vec::new());
        Self {
            schedule,
            deal,
            share,
            bounds,
            seed,
            ticks: 0,
            running,
            ready,
            taken: 0,
            fetches,
            damaged: None,
            kept_max: 0,
        }
    }

    fn random(&mut self, below: usize) -> usize {
        self.ticks += 1;
        key_of(&[self.seed, self.ticks]) as usize % below
    }

    /// Starts what may be started; something that runs ends, or the trainer takes a batch.
    fn tick(&mut self) {
        while let Some(block) = self.schedule.next_fetch() {
            self.fetches.push(block);
            self.running.push(Running::Fetch(block));
        }
        assert!(self.schedule.fetching() <= self.bounds.fetches);
        if let Some(job) = self.schedule.next_job() {
            self.start(job);
        }
        self.kept_max = self.kept_max.max(self.schedule.kept_bytes());
        let given = self.schedule.next_given();
        let gives = given.is_some_and(|step| self.ready.contains(&step.0));
        assert!(gives || !self.running.is_empty(), "seed {}: stuck at {given:?}", self.seed);
        if gives && (self.running.is_empty() || self.random(3) == 0) {
            self.schedule.give();
        } else {
            let at = self.random(self.running.len());
            self.end(at);
        }
    }

    fn start(&mut self, job: Job<u64, u64>) {
        match job {
            Job::Decode { block, fetched, .. } => {
                assert_eq!(block, fetched);
                self.running.push(Running::Decode(block));
            }
            Job::Batch { step, draws, blocks } => {
                assert_eq!(step, Step(self.taken));
                assert_eq!(draws, self.deal.batch(step, &self.share));
                assert!(draws.iter().all(|d| blocks[&(d.sample / 8)] == d.sample / 8));
                let given = self.schedule.next_given().map_or(u64::MAX, |step| step.0);
                assert!(self.taken < given + self.bounds.prefetch as u64);
                self.taken += 1;
                self.running.push(Running::Batch(step.0));
            }
        }
    }

    fn end(&mut self, at: usize) {
        match self.running.swap_remove(at) {
            Running::Fetch(block) if self.damaged == Some(block) => {
                self.schedule.fetched(block, Err(DataError::Unusable("damaged".to_owned())));
            }
            Running::Fetch(block) => self.schedule.fetched(block, Ok(block)),
            Running::Decode(block) => self.schedule.decoded(block, Ok((block, BLOCK_BYTES))),
            Running::Batch(step) => drop(self.ready.insert(step)),
        }
    }

    fn run(&mut self) {
        while self.schedule.next_given().is_some() {
            self.tick();
        }
    }

    /// Distinct blocks that the first step of them needs.
    fn blocks_of(&self, step: u64) -> BTreeSet<u64> {
        self.deal.batch(Step(step), &self.share).iter().map(|draw| draw.sample / 8).collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_batch_comes_in_order_within_the_bounds(
        seed in any::<u64>(), labelled in 1_u64..60, unlabelled in 0_u64..300, batch in (0_u32..6, 1_u32..7),
        prefetch in 1_usize..5, fetches in 1_usize..9, budget in 0_usize..60,
    ) {
        let spec = spec(labelled, unlabelled, batch);
        prop_assume!(batch.0 > 0 || unlabelled > 0);
        let mut simulation = Simulation::new(seed, spec, bounds(60, prefetch, fetches, budget));
        simulation.run();
        prop_assert_eq!(simulation.taken, 60);
        // What one step needs may exceed the budget; then it is all that does.
        let slots = (batch.0 + batch.1) as usize;
        let most = BLOCK_BYTES * budget.max(slots + fetches);
        prop_assert!(simulation.kept_max <= most, "{} bytes", simulation.kept_max);
    }

    #[test]
    fn a_failure_comes_at_the_first_step_that_needs_the_block(
        seed in any::<u64>(), budget in 0_usize..60, damaged in 0_u64..30, fetches in 1_usize..9,
    ) {
        let mut simulation =
            Simulation::new(seed, spec(40, 200, (3, 4)), bounds(50, 3, fetches, budget));
        simulation.damaged = Some(damaged);
        let failing = (0..50).find(|step| simulation.blocks_of(*step).contains(&damaged));
        let end = failing.unwrap_or(50);
        while simulation.schedule.next_given().is_some_and(|step| step.0 < end) {
            prop_assert!(simulation.schedule.take_failure().is_none());
            simulation.tick();
        }
        while failing.is_some() && simulation.schedule.failed.is_none() {
            simulation.tick();
        }
        prop_assert_eq!(simulation.schedule.take_failure().is_some(), failing.is_some());
        prop_assert_eq!(simulation.taken, end);
    }
}

#[test]
fn with_room_for_all_each_block_is_fetched_once() {
    for seed in 0..20 {
        let mut simulation = Simulation::new(seed, spec(40, 200, (3, 4)), bounds(150, 3, 6, 1000));
        simulation.run();
        let distinct: BTreeSet<u64> = simulation.fetches.iter().copied().collect();
        assert_eq!(simulation.fetches.len(), distinct.len());
        assert_eq!(distinct.len(), 30, "more than an epoch");
    }
}

/// 13 labelled blocks, 4 in use by slots, and for what comes a quarter of the budget and a step's blocks.
#[test]
fn labelled_blocks_stay_and_unlabelled_ones_go_when_they_are_done() {
    let mut simulation = Simulation::new(1, spec(104, 4000, (3, 4)), bounds(900, 3, 6, 32));
    simulation.run();
    let labelled = simulation.fetches.iter().filter(|block| **block < 13).count();
    assert_eq!(labelled, 13, "each labelled block once");
    let unlabelled = simulation.fetches.len() - labelled;
    // 900 steps of 4 slots, 8 rows a block; each stretch may begin and end within one.
    assert!((450..=454).contains(&unlabelled), "{unlabelled} unlabelled blocks");
}

/// Memory is what comes and what is in use, not the budget; a pool that the budget nearly holds is kept.
#[test]
fn of_a_large_pool_nothing_is_kept_that_no_slot_needs() {
    for (pool_blocks, kept_max) in [(3000, 2 * (6 + 4) + 2 * 4), (1900, 1000)] {
        let spec = spec(0, pool_blocks * 8, (0, 4));
        let mut simulation = Simulation::new(1, spec, bounds(8 * 600, 3, 6, 1000));
        simulation.run();
        let kept = simulation.kept_max / BLOCK_BYTES;
        assert!((kept_max / 4..=kept_max).contains(&kept), "{kept} of {pool_blocks} blocks");
    }
}

#[test]
fn what_is_needed_first_is_fetched_first() {
    let mut simulation = Simulation::new(1, spec(16, 800, (2, 4)), bounds(200, 3, 64, 1000));
    let mut first = BTreeSet::new();
    while let Some(block) = simulation.schedule.next_fetch() {
        first.insert(block);
    }
    // How large blocks are is not known yet: no more than must be.
    assert_eq!(first, simulation.blocks_of(0));
    let block = *first.first().unwrap();
    simulation.schedule.fetched(block, Ok(block));
    let job = simulation.schedule.next_job().unwrap();
    simulation.start(job);
    simulation.schedule.decoded(block, Ok((block, BLOCK_BYTES)));
    let mut needed_at = 0;
    while let Some(block) = simulation.schedule.next_fetch() {
        let at = (0..200).find(|step| simulation.blocks_of(*step).contains(&block)).unwrap();
        assert!(at >= needed_at, "block {block} of step {at} after one of step {needed_at}");
        needed_at = at;
        first.insert(block);
    }
    assert!((40..=65).contains(&first.len()), "{} at once", first.len());
}
