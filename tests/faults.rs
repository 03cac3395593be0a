//! The loader behind a network that fails in every way there is: what reaches a trainer is right, or an error.
//!
//! The embedded S3 server, the fault proxy in front of it, a small dataset. Every test takes its draws from a seed that
//! its assertions print. The long form injects as many corruptions as are asked for, in place of some hundreds:
//! `CPCR_TEST_CORRUPTIONS=10000 cargo test --test faults corruptions` (seven minutes, mostly pauses between attempts).

// Helpers outside #[test] functions panic on purpose too.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use cpcr::data::synth::{self, SynthOptions};
use cpcr::data::write::Work;
use cpcr::data::{Batch, DataError, Dataset, Loader, LoaderPlan, VolumeId};
use cpcr::ledger;
use cpcr::store::{
    Created, FaultKind, FaultPlan, FaultProxy, InjectedFault, ReadFaults, S3Server,
    S3ServerOptions, Store, StoreError, StoreOptions, serve,
};
use cpcr::types::{Rank, Step, WorldSize};
use tempfile::TempDir;
use tokio::runtime::Runtime;

const KEY: &str = "cpcr-test";
const SECRET: &str = "cpcr-test-secret";

/// A server with a dataset, and a proxy in front of it that does no harm yet.
struct World {
    proxy: FaultProxy,
    server: S3Server,
    dir: TempDir,
    runtime: Runtime,
}

fn options(endpoint: &str) -> StoreOptions {
    StoreOptions {
        first_byte: Duration::from_secs(1),
        throughput_min_bytes_per_s: 64 << 10,
        deadline: Duration::from_secs(20),
        ..StoreOptions::default()
    }
    .with("aws_endpoint", endpoint)
    .with("aws_access_key_id", KEY)
    .with("aws_secret_access_key", SECRET)
    .with("aws_region", "us-east-1")
}

impl World {
    fn new() -> Self {
        let runtime = Runtime::new().unwrap();
        let dir = TempDir::new().unwrap();
        let (server, proxy) = runtime.block_on(async {
            let server = S3ServerOptions::on_loopback(dir.path(), KEY, SECRET);
            let server = serve(server).await.unwrap();
            let direct = Store::open("s3://bucket/set", &options(&server.endpoint())).unwrap();
            let phantoms = SynthOptions {
                train_patients: 6,
                val_patients: 1,
                test_patients: 0,
                side_px: (32, 48),
                slices: (4, 6),
                ..SynthOptions::default()
            };
            synth::write(Arc::new(direct), &phantoms, &Work::on(2)).await.unwrap();
            let proxy = FaultProxy::start(server.addr(), FaultPlan::none()).await.unwrap();
            (server, proxy)
        });
        Self { proxy, server, dir, runtime }
    }

    /// A store of its own behind the proxy, with counters at zero.
    fn store(&self) -> Store {
        Store::open("s3://bucket/set", &options(&self.proxy.endpoint())).unwrap()
    }

    /// What a loader without a cache brings under `plan`, and what went wrong meanwhile.
    fn load(&self, plan: FaultPlan) -> (Result<Vec<Batch>, DataError>, ReadFaults) {
        self.proxy.set_plan(plan);
        let store = self.store();
        (load(store.clone()), store.read_faults())
    }
}

fn load(store: Store) -> Result<Vec<Batch>, DataError> {
    let plan = LoaderPlan {
        seed: 7,
        rank: Rank(0),
        world: WorldSize(1),
        start: Step(0),
        end: Step(10),
        batch_labelled: 3,
        batch_unlabelled: 5,
        labelled_patients: 2,
        patch: (32, 40),
        prefetch: 3,
        threads: 3,
        fetches: 4,
        cache_bytes: 1,
        augment: false,
    };
    let mut loader = Loader::start(Dataset::open(Arc::new(store))?, plan)?;
    let mut batches = Vec::new();
    while let Some(batch) = loader.next()? {
        batches.push(Batch { waited: Duration::ZERO, ..batch });
    }
    Ok(batches)
}

#[test]
fn each_refusal_and_break_alone_is_cured_counted_and_named() {
    cured(&[
        (InjectedFault::Unavailable, 0.1, FaultKind::Unavailable),
        (InjectedFault::ServerError, 0.25, FaultKind::ServerError),
        (InjectedFault::Throttled, 0.25, FaultKind::Throttled),
        (InjectedFault::Reset, 0.25, FaultKind::Reset),
        (InjectedFault::Stall, 0.1, FaultKind::Stall),
        (InjectedFault::Trickle, 0.1, FaultKind::Trickle),
    ]);
}

#[test]
fn each_corruption_alone_is_cured_counted_and_named() {
    cured(&[
        (InjectedFault::Truncated, 0.25, FaultKind::Truncated),
        (InjectedFault::EmptyOk, 0.25, FaultKind::Empty),
        (InjectedFault::WrongRange, 0.25, FaultKind::WrongRange),
        (InjectedFault::MislabelledRange, 0.15, FaultKind::Corrupt),
        (InjectedFault::BitFlip, 0.15, FaultKind::Corrupt),
        (InjectedFault::Changed, 0.15, FaultKind::Changed),
    ]);
}

/// Under each of `cases` (what is injected, how often, what it is called) the batches are the healthy ones.
fn cured(cases: &[(InjectedFault, f64, FaultKind)]) {
    let world = World::new();
    let (healthy, faults) = world.load(FaultPlan::none());
    let healthy = healthy.unwrap();
    // A busy machine is late by itself.
    let late = faults.of(FaultKind::Stall) + faults.of(FaultKind::Trickle);
    assert_eq!(faults.total(), late, "healthy: {faults}");
    for (seed, &(injected, rate, named)) in (100..).zip(cases) {
        let started = Instant::now();
        let plan = FaultPlan::seeded(seed).rate(injected, rate).only("shards/");
        let (batches, faults) = world.load(plan);
        let counts = world.proxy.counts();
        let case = format!("{injected:?}, seed {seed}: {faults}; {counts:?}");
        assert!(batches.unwrap_or_else(|error| panic!("{case}: {error}")) == healthy, "{case}");
        assert!(started.elapsed() < Duration::from_secs(20), "{case}");
        assert!(counts.of(injected) > 0 && faults.of(named) > 0, "{case}");
        // An object that was changed when it was first seen is merely corrupt.
        let alias = if named == FaultKind::Changed { FaultKind::Corrupt } else { named };
        let beside = [named, alias, FaultKind::Stall, FaultKind::Trickle];
        let others = FaultKind::ALL.into_iter().filter(|kind| !beside.contains(kind));
        assert_eq!(others.map(|kind| faults.of(kind)).sum::<u64>(), 0, "{case}");
        if faults.hedges_sent == 0 {
            assert_eq!(faults.total(), counts.of(injected), "{case}");
        }
    }
}

#[test]
fn corruptions_never_reach_a_batch() {
    let wanted: u64 =
        std::env::var("CPCR_TEST_CORRUPTIONS").map_or(200, |count| count.parse().unwrap());
    let world = World::new();
    let healthy = world.load(FaultPlan::none()).0.unwrap();
    let (mut injected, mut noticed, mut refused) = (0, 0, 0);
    let started = Instant::now();
    // Some twenty in a pass; a pass that injects nothing must not go on for ever.
    for seed in 1000..1000 + wanted.max(10) {
        let plan = FaultPlan::seeded(seed)
            .rate(InjectedFault::BitFlip, 0.06)
            .rate(InjectedFault::Changed, 0.04)
            .rate(InjectedFault::MislabelledRange, 0.04)
            .rate(InjectedFault::WrongRange, 0.04)
            .rate(InjectedFault::Truncated, 0.04)
            .rate(InjectedFault::EmptyOk, 0.04)
            .only("shards/");
        let (batches, faults) = world.load(plan);
        injected += world.proxy.counts().total();
        noticed += faults.total() - faults.of(FaultKind::Stall) - faults.of(FaultKind::Trickle);
        match batches {
            Ok(batches) => assert!(batches == healthy, "seed {seed}: other pixels"),
            // So many in a row happen; then it is an error, and never other bytes.
            Err(DataError::Damaged { .. }) => refused += 1,
            Err(error) => panic!("seed {seed}: {error}"),
        }
        if injected >= wanted {
            break;
        }
    }
    eprintln!("{injected} injected, {noticed} noticed, {refused} refused, {:?}", started.elapsed());
    assert!(injected >= wanted, "only {injected} injected");
    // An answer that was overtaken is dropped unseen; all others are noticed.
    assert!(noticed * 100 >= injected * 95, "{noticed} noticed of {injected}");
    assert!(refused * 20 <= injected, "{refused} passes were given up");
}

#[test]
fn a_manifest_is_not_believed_the_first_time() {
    let world = World::new();
    let name = |store: Store| Dataset::open(Arc::new(store)).unwrap().manifest().clone();
    let right = name(world.store());
    for fault in [InjectedFault::BitFlip, InjectedFault::MislabelledRange, InjectedFault::EmptyOk] {
        world.proxy.set_plan(FaultPlan::seeded(5).at(0, fault).only("manifest.json"));
        assert_eq!(name(world.store()), right, "{fault:?}");
        assert_eq!(world.proxy.counts().of(fault), 1);
    }
}

#[test]
fn what_lies_damaged_is_an_error_that_names_object_and_place() {
    let world = World::new();
    let shard = world.dir.path().join("bucket/set/shards/train-00000.parquet");
    let mut bytes = std::fs::read(&shard).unwrap();
    bytes[100] ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    let store = world.store();
    let dataset = Dataset::open(Arc::new(store.clone())).unwrap();
    let error = dataset.load_volume(VolumeId(0)).unwrap_err();
    let DataError::Damaged { object, what, tries } = &error else { panic!("{error}") };
    assert_eq!((object.as_str(), *tries), ("shards/train-00000.parquet", 6));
    assert!(what.contains("bytes 4..") && what.contains("expected SHA-256"), "{what}");
    assert!(store.read_faults().of(FaultKind::Corrupt) >= 6, "{}", store.read_faults());
}

#[test]
fn a_write_whose_answer_was_lost_was_ones_own() {
    let world = World::new();
    world.proxy.set_plan(FaultPlan::none().at(0, InjectedFault::AnswerLost).only("claims/"));
    let store = world.store();
    world.runtime.block_on(async {
        let made = store.create("claims/a", Bytes::from_static(b"mine")).await.unwrap();
        assert_eq!(made, Created::New);
        assert_eq!(world.proxy.counts().of(InjectedFault::AnswerLost), 1);
        assert_eq!(store.read_faults().of(FaultKind::AnswerLost), 1);
        let other = store.create("claims/a", Bytes::from_static(b"yours")).await.unwrap();
        assert_eq!(other, Created::Exists);
        assert_eq!(store.get("claims/a").await.unwrap(), "mine");
    });
}

#[test]
fn an_outage_is_ridden_out_and_the_deadline_kept() {
    let world = World::new();
    world.runtime.block_on(async {
        let shard = "shards/train-00000.parquet";
        let store = world.store();
        let right = store.get_range(shard, 4..60).await.unwrap();
        let sick = FaultPlan::none().only("shards/");
        let sick = (0..6).fold(sick, |plan, n| plan.at(n, InjectedFault::Unavailable));
        world.proxy.set_plan(sick);
        assert_eq!(store.get_range(shard, 4..60).await.unwrap(), right);
        assert_eq!(store.read_faults().of(FaultKind::Unavailable), 6);

        let wait = FaultPlan { retry_after_s: Some(1), ..FaultPlan::none().only("shards/") };
        world.proxy.set_plan(wait.at(0, InjectedFault::Throttled));
        let started = Instant::now();
        assert_eq!(store.get_range(shard, 4..60).await.unwrap(), right);
        assert!(started.elapsed() >= Duration::from_secs(1), "it did not wait as it was told");

        let mut short = options(&world.proxy.endpoint());
        short.deadline = Duration::from_secs(1);
        let store = Store::open("s3://bucket/set", &short).unwrap();
        store.head(shard).await.unwrap();
        world.proxy.set_plan(FaultPlan::none().rate(InjectedFault::ServerError, 1.0));
        let started = Instant::now();
        let error = store.get_range(shard, 4..60).await.unwrap_err();
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
        let line = error.to_string();
        assert!(matches!(error, StoreError::Unreachable { .. }), "{line}");
        assert!(line.contains(shard) && line.contains("server_error"), "{line}");
        assert!(line.contains("bytes 4..60") && !line.contains('\n'), "{line}");
    });
}

#[test]
fn what_is_not_there_or_not_allowed_is_asked_for_once() {
    let world = World::new();
    world.runtime.block_on(async {
        let store = world.store();
        assert!(store.get("nothing").await.unwrap_err().is_not_found());
        assert!(store.get_range("nothing", 0..4).await.unwrap_err().is_not_found());
        assert_eq!(store.read_faults().requests, 2);
        let options = options(&world.server.endpoint()).with("aws_secret_access_key", "wrong");
        let store = Store::open("s3://bucket/set", &options).unwrap();
        let error = store.get("manifest.json").await.unwrap_err();
        assert!(matches!(error, StoreError::Denied { .. }), "{error}");
        assert_eq!((store.read_faults().requests, store.read_faults().total()), (1, 0));
    });
}

/// What was seen of 24 reads, one after the other, by a client that would wait for a first byte for 15 s.
fn patient_reads(plan: FaultPlan) -> ReadFaults {
    let world = World::new();
    let stalls = plan.at.iter().filter(|(_, fault)| *fault == InjectedFault::Stall).count();
    world.runtime.block_on(async {
        let mut patient = options(&world.proxy.endpoint());
        patient.first_byte = Duration::from_secs(15);
        let store = Store::open("s3://bucket/set", &patient).unwrap();
        world.proxy.set_plan(plan.only("shards/"));
        let started = Instant::now();
        for _ in 0..24 {
            store.get_range("shards/train-00000.parquet", 4..60).await.unwrap();
        }
        assert!(started.elapsed() < Duration::from_secs(12), "{:?}", started.elapsed());
        let faults = store.read_faults();
        assert!(faults.hedges_won >= 1 && faults.of(FaultKind::Stall) >= 1, "{faults:?}");
        assert_eq!(world.proxy.counts().of(InjectedFault::Stall), stalls as u64);
        faults
    })
}

#[test]
fn a_stall_is_overtaken_by_a_second_request() {
    let plan = FaultPlan::none().at(3, InjectedFault::Stall).at(17, InjectedFault::Stall);
    assert!(patient_reads(plan).hedges_won >= 2);
}

/// The second request is refused, and a third one asked: waiting for the stalled one would take 15 s.
#[test]
fn a_stall_is_overtaken_though_the_second_request_fails() {
    let plan = FaultPlan::none().at(3, InjectedFault::Stall).at(4, InjectedFault::Unavailable);
    assert!(patient_reads(plan).of(FaultKind::Unavailable) >= 1);
}

/// A campaign found an audit that called a sound ledger damaged: one answer had been.
#[test]
fn records_that_come_damaged_are_asked_for_again() {
    let world = World::new();
    world.runtime.block_on(async {
        let store = world.store();
        let number = ledger::claim(&store, "somebody").await.unwrap() - 1;
        store.put("config.toml", Bytes::from_static(b"name = \"a\"")).await.unwrap();
        for (seed, fault) in [(1, InjectedFault::BitFlip), (2, InjectedFault::Changed)] {
            world.proxy.set_plan(FaultPlan::seeded(seed).rate(fault, 0.1));
            for _ in 0..60 {
                assert_eq!(ledger::read(&store, number).await.unwrap().writer, "somebody");
                // That which says everything the other way round says it alike each time.
                if fault == InjectedFault::BitFlip {
                    assert_eq!(store.get_agreed("config.toml").await.unwrap(), "name = \"a\"");
                }
            }
            assert!(world.proxy.counts().of(fault) >= 3);
        }
        assert!(store.read_faults().of(FaultKind::Corrupt) >= 5, "{}", store.read_faults());
    });
}

#[test]
fn a_lost_first_answer_is_asked_for_again() {
    let world = World::new();
    let plan = FaultPlan::none().at(0, InjectedFault::Stall).at(1, InjectedFault::Reset);
    world.proxy.set_plan(plan.only(".contact"));
    world.runtime.block_on(async { world.store().get("manifest.json").await.unwrap() });
    assert_eq!(world.proxy.counts().total(), 2);
}
