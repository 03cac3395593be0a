//! The commit protocol under failure at every point, and damage of every kind.

// Helpers outside #[test] functions panic on purpose too.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use cpcr::checkpoint::{
    CheckpointError, HostTensor, MODEL_FILE, Manifest, NamedTensors, OPTIMIZER_FILE, Outcome,
    Position, Retention, RunIdentity, STATE_FILE, Snapshot, Status, TrainState, Writer,
    WriterOptions, latest, list_rows, load, load_latest, manifest_path, read_manifest, retain,
    step_folder, verify, verify_rows, write,
};
use cpcr::store::{Fault, FaultyStore, S3Server, S3ServerOptions, Store, StoreOptions, serve};
use cpcr::types::{ObjectDigest, Step, WorldSize};
use object_store::ObjectStore;
use object_store::memory::InMemory;
use safetensors::Dtype;

fn tensors(seed: u8) -> NamedTensors {
    ["b.weight", "a.bias"]
        .into_iter()
        .enumerate()
        .map(|(i, name)| {
            let bytes: Vec<u8> = (0..24).map(|b| b ^ seed ^ (i as u8)).collect();
            let tensor = HostTensor { dtype: Dtype::F32, shape: vec![2, 3], bytes: bytes.into() };
            (name.to_owned(), tensor)
        })
        .collect()
}

fn keeping(keep_last: usize) -> Retention {
    Retention { keep_last, keep_every: 0, keep_best: 1 }
}

fn snapshot(step: u64) -> Snapshot {
    Snapshot {
        step: Step(step),
        world_size: WorldSize(2),
        threads: 1,
        position: Position { labelled: step * 12, unlabelled: step * 12 },
        model: tensors(step as u8),
        optimizer: tensors((step as u8).wrapping_add(100)),
        state: TrainState(serde_json::json!({"best": {"step": step, "dice": 0.5}})),
        best: Vec::new(),
    }
}

fn identity() -> RunIdentity {
    let of = |text: &str| ObjectDigest::of(text.as_bytes()).sha256;
    RunIdentity { config_sha256: of("config"), dataset_sha256: of("dataset") }
}

fn memory() -> Store {
    Store::open("memory:///", &StoreOptions::default()).unwrap()
}

async fn written(run: &Store, step: u64) -> Manifest {
    match write(run, &identity(), &snapshot(step)).await.unwrap() {
        Outcome::Written(manifest) => manifest,
        Outcome::AlreadyThere(_) => panic!("step {step} was there"),
    }
}

async fn latest_step(run: &Store) -> Option<u64> {
    latest(run).await.unwrap().map(|manifest| manifest.step.0)
}

/// Every manifest that can be seen points to objects that are there and match.
async fn assert_whole(run: &Store) {
    for object in run.list("checkpoints").await.unwrap() {
        if object.path.ends_with("/manifest.json") {
            let step = cpcr::checkpoint::parse_step(&object.path).unwrap();
            let manifest = read_manifest(run, step).await.unwrap();
            verify(run, &manifest).await.unwrap();
        }
    }
}

#[tokio::test]
async fn what_is_written_comes_back() {
    let run = memory();
    assert_eq!(latest_step(&run).await, None);
    assert!(matches!(load(&run, Step(1)).await, Err(CheckpointError::Missing { .. })));
    let manifest = written(&run, 1200).await;
    written(&run, 300).await;
    let loaded = load_latest(&run).await.unwrap().unwrap();
    assert_eq!(loaded.manifest, manifest);
    assert_eq!(loaded.state, snapshot(1200).state);
    let mut expected = snapshot(1200).model;
    expected.sort_by(|l, r| l.0.cmp(&r.0));
    assert_eq!(loaded.model, expected);
    let names: Vec<_> =
        run.list(&step_folder(Step(1200))).await.unwrap().into_iter().map(|o| o.path).collect();
    let folder = format!("checkpoints/step-00001200/{}", manifest.attempt);
    assert_eq!(names.len(), 4);
    for name in [MODEL_FILE, OPTIMIZER_FILE, STATE_FILE] {
        assert!(names.contains(&format!("{folder}/{name}")), "{names:?}");
    }
}

#[tokio::test]
async fn the_same_state_gives_the_same_bytes() {
    let (one, two) = (memory(), memory());
    let mut shuffled = snapshot(5);
    shuffled.model.reverse();
    let first = written(&one, 5).await;
    let Outcome::Written(second) = write(&two, &identity(), &shuffled).await.unwrap() else {
        panic!("it was there");
    };
    assert_ne!(first.attempt, second.attempt);
    let digests = |manifest: &Manifest| -> Vec<ObjectDigest> {
        manifest.objects.values().map(|object| object.digest.clone()).collect()
    };
    assert_eq!(digests(&first), digests(&second));
}

#[tokio::test]
async fn failing_at_any_operation_never_commits_a_broken_checkpoint() {
    let faults: [fn(u64) -> Fault; 3] = [Fault::DeadFrom, Fault::AnswerLostAt, Fault::FailsAt];
    for fault in faults {
        let mut finished = false;
        for n in 0..200 {
            let inner: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
            let sound = Store::from_engine(Arc::clone(&inner), "memory:///");
            for step in [100, 200, 300] {
                written(&sound, step).await;
            }
            let faulty = FaultyStore::new(Arc::clone(&inner), fault(n));
            let run = Store::from_engine(Arc::clone(&faulty) as Arc<dyn ObjectStore>, "faulty:///");
            let outcome = write(&run, &identity(), &snapshot(400)).await;
            let retained = retain(&run, keeping(2), &[Step(100)]).await;

            assert_whole(&sound).await;
            let newest = latest_step(&sound).await.unwrap();
            assert!(newest == 400 || (newest == 300 && outcome.is_err()), "{:?}", fault(n));
            // The next life of the run finishes the job whatever was left behind.
            write(&sound, &identity(), &snapshot(400)).await.unwrap();
            retain(&sound, keeping(2), &[Step(100)]).await.unwrap();
            assert_whole(&sound).await;
            let objects = sound.list("checkpoints").await.unwrap();
            assert_eq!(objects.len(), 3 * 4, "{:?} left orphans: {objects:?}", fault(n));
            if faulty.operations() <= n {
                assert!(outcome.is_ok() && retained.is_ok());
                finished = true;
                break;
            }
        }
        assert!(finished, "the protocol does not end");
    }
}

#[tokio::test]
async fn every_flipped_bit_in_every_object_is_found() {
    let run = memory();
    written(&run, 1).await;
    let manifest = written(&run, 2).await;
    let mut paths = vec![manifest_path(Step(2))];
    paths.extend(manifest.objects.values().map(|object| object.path.clone()));
    for path in paths {
        let good = run.get(&path).await.unwrap();
        for at in 0..good.len() {
            let mut flipped = good.to_vec();
            flipped[at] ^= 1 << (at % 8);
            run.put(&path, flipped.into()).await.unwrap();
            assert_eq!(latest_step(&run).await, Some(1), "{path} byte {at}");
        }
        for cut in [Bytes::new(), good.slice(..good.len() - 1)] {
            run.put(&path, cut).await.unwrap();
            assert_eq!(latest_step(&run).await, Some(1), "{path} cut");
        }
        run.delete(&path).await.unwrap();
        assert_eq!(latest_step(&run).await, Some(1), "{path} gone");
        assert_eq!(load_latest(&run).await.unwrap().unwrap().manifest.step, Step(1));
        run.put(&path, good).await.unwrap();
        assert_eq!(latest_step(&run).await, Some(2));
    }
}

#[tokio::test]
async fn a_store_that_is_down_is_not_damage() {
    let inner: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let sound = Store::from_engine(Arc::clone(&inner), "memory:///");
    written(&sound, 1).await;
    written(&sound, 2).await;
    for n in 0..5 {
        let engine = FaultyStore::new(Arc::clone(&inner), Fault::FailsAt(n));
        let error = latest(&Store::from_engine(engine, "faulty:///")).await.unwrap_err();
        assert!(matches!(error, CheckpointError::Store(_)), "{error}");
    }
}

#[tokio::test]
async fn a_step_is_committed_once_and_a_damaged_one_is_replaced() {
    let run = memory();
    let first = written(&run, 7).await;
    let again = write(&run, &identity(), &snapshot(7)).await.unwrap();
    assert_eq!(again, Outcome::AlreadyThere(first.clone()));
    assert_eq!(run.list("checkpoints").await.unwrap().len(), 4, "the second attempt is cleared");
    run.delete(&first.objects[MODEL_FILE].path).await.unwrap();
    assert_ne!(written(&run, 7).await.attempt, first.attempt);
    assert_eq!(latest_step(&run).await, Some(7));
}

#[tokio::test]
async fn retention_keeps_the_last_the_best_and_everything_if_the_newest_is_damaged() {
    let run = memory();
    for step in 1..=6 {
        written(&run, step).await;
    }
    let damaged = read_manifest(&run, Step(6)).await.unwrap();
    run.put(&damaged.objects[STATE_FILE].path, Bytes::from_static(b"{}")).await.unwrap();
    run.put("checkpoints/step-00000004/dead/model.safetensors", Bytes::new()).await.unwrap();
    run.put("checkpoints/step-00000003-not-ours", Bytes::new()).await.unwrap();
    run.put("checkpoints/step-00000009/live/model.safetensors", Bytes::new()).await.unwrap();
    let retained = retain(&run, keeping(2), &[Step(2)]).await.unwrap();
    assert_eq!(retained.removed, [Step(1), Step(3)]);
    assert_eq!(retained.verified, Some(Step(5)));
    let steps: Vec<_> = list_rows(&run).await.unwrap().iter().map(|row| row.step.0).collect();
    assert_eq!(steps, [6, 5, 4, 2]);
    assert!(!run.exists("checkpoints/step-00000004/dead/model.safetensors").await.unwrap());
    assert!(run.exists("checkpoints/step-00000003-not-ours").await.unwrap());
    assert!(run.exists("checkpoints/step-00000009/live/model.safetensors").await.unwrap());
}

#[tokio::test]
async fn rows_say_what_is_known() {
    let run = memory();
    written(&run, 1).await;
    let manifest = written(&run, 2).await;
    run.delete(&manifest.objects[OPTIMIZER_FILE].path).await.unwrap();
    let listed = list_rows(&run).await.unwrap();
    assert_eq!((listed[0].status, listed[0].latest), (Status::Listed, true));
    let rows = verify_rows(&run).await.unwrap();
    assert_eq!((rows[0].status, rows[0].latest), (Status::Damaged, false));
    assert!(rows[0].problem.as_ref().unwrap().contains(OPTIMIZER_FILE), "{:?}", rows[0]);
    assert_eq!((rows[1].status, rows[1].latest), (Status::Verified, true));
    let json = serde_json::to_value(&rows[1]).unwrap();
    assert_eq!((&json["step"], &json["status"]), (&1.into(), &"verified".into()));
}

#[test]
fn the_writer_serves_a_plain_thread() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let run = memory();
    let options =
        WriterOptions { identity: identity(), retention: Some(keeping(2)), written: |_| {} };
    let writer = Writer::start(runtime.handle().clone(), run.clone(), options).unwrap();
    for step in 1..=4 {
        writer.submit((Step(step), Instant::now()), move || Ok(snapshot(step))).unwrap();
    }
    assert_eq!(writer.flush(|| {}).unwrap().len(), 4);
    assert_eq!(runtime.block_on(latest_step(&run)), Some(4));
    assert_eq!(runtime.block_on(list_rows(&run)).unwrap().len(), 2);

    let mut broken = snapshot(5);
    broken.model[0].1.shape = vec![7];
    writer.submit((Step(5), Instant::now()), || Ok(broken)).unwrap();
    let error = writer.flush(|| {}).unwrap_err();
    assert!(error.to_string().contains("step 5"), "{error}");
    assert_eq!(writer.flush(|| {}).unwrap(), vec![], "an error is told once");

    // Nobody flushes during a long run: the next snapshot's owner is told.
    let mut broken = snapshot(5);
    broken.model[0].1.shape = vec![7];
    writer.submit((Step(5), Instant::now()), || Ok(broken)).unwrap();
    let told = (0..100_000)
        .find_map(|_| writer.submit((Step(4), Instant::now()), move || Ok(snapshot(4))).err());
    assert!(told.unwrap().to_string().contains("step 5"));
    writer.submit((Step(6), Instant::now()), move || Ok(snapshot(6))).unwrap();
    drop(writer);
    assert_eq!(runtime.block_on(latest_step(&run)), Some(6), "dropping lets the last one finish");
}

/// A process that was killed in the midst of a large object leaves pieces that no listing shows.
#[tokio::test]
async fn an_upload_that_was_cut_off_is_ended_when_a_later_checkpoint_is_whole() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("bucket")).unwrap();
    let (server, run) = served(folder.path()).await;
    let path = format!("{}/one/{MODEL_FILE}", step_folder(Step(5)));
    let note = format!("{path}.upload");
    run.probe().await.unwrap();
    let bytes: Bytes = vec![7; 30 << 20].into();
    let mut cut_off = Box::pin(run.put_noted(&path, bytes));
    while pieces_in(folder.path()) == 0 {
        assert!(futures::poll!(&mut cut_off).is_pending(), "it was to be cut off");
        // What it sends arrives meanwhile.
        run.exists(&note).await.unwrap();
    }
    drop(cut_off);
    // What had reached the server is done before the next one begins.
    server.shutdown().await;
    let (_server, run) = served(folder.path()).await;
    assert!(run.exists(&note).await.unwrap(), "the note was there before the first piece");
    assert!(!run.exists(&path).await.unwrap() && pieces_in(folder.path()) > 0);
    // And of one that reached its end before its note was removed.
    let over = format!("{path}-2.upload");
    run.put(&over, Bytes::from_static(b"d4b1a1f0-3c1a-4b6e-9a0e-0f1e2d3c4b5a")).await.unwrap();
    written(&run, 7).await;
    retain(&run, keeping(2), &[]).await.unwrap();
    assert!(!run.exists(&note).await.unwrap() && !run.exists(&over).await.unwrap());
    assert_eq!(pieces_in(folder.path()), 0);
    assert_whole(&run).await;
}

/// An S3 server of `folder`, and a run in its bucket.
async fn served(folder: &std::path::Path) -> (S3Server, Store) {
    let server = serve(S3ServerOptions::on_loopback(folder, "key", "secret-of-the-key"));
    let server = server.await.unwrap();
    let options = StoreOptions::default()
        .with("aws_endpoint", server.endpoint())
        .with("aws_access_key_id", "key")
        .with("aws_secret_access_key", "secret-of-the-key")
        .with("aws_region", "us-east-1");
    (server, Store::open("s3://bucket/run", &options).unwrap())
}

/// Files of unfinished uploads in the folder of an S3 server.
fn pieces_in(folder: &std::path::Path) -> usize {
    let names = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
    names.filter(|name| name.to_string_lossy().starts_with(".upload_id-")).count()
}
