//! Writing under faults: cut short at every operation, overtaken, begun with something else.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::future::BoxFuture;
use object_store::memory::InMemory;

use super::*;
use crate::data::dataset::Dataset;
use crate::data::manifest::VolumeId;
use crate::data::report::{info, scan, verify};
use crate::data::source::{MemoryObjects, ObjectReader, SourceError};
use crate::data::statistics::Statistics;
use crate::store::{Fault, FaultyStore, Store};

/// A case: name, split, slices of each of its volumes, whether they have labels.
type Case = (String, Split, Vec<u32>, bool);

fn cases() -> Vec<Case> {
    let case = |at: u32| {
        let (split, labelled) = match at {
            0..4 => (Split::Train, true),
            4..14 => (Split::Train, false),
            14..16 => (Split::Val, true),
            _ => (Split::Test, true),
        };
        (format!("p{at:02}"), split, vec![1 + at % 4, 3], labelled)
    };
    (0..18).map(case).collect()
}

fn read_case((name, split, volumes, labelled): &Case) -> Vec<NewVolume> {
    let volume = |(number, slices): (usize, &u32)| {
        let slice = |n: u32| NewSlice {
            slice: n,
            shape: (4, 5),
            image: (0..20).map(|p| ((p + n) as f32 + name.len() as f32).sin()).collect(),
            label: labelled.then(|| (0..20).map(|p| u8::from(p > 9)).collect()),
        };
        // Fractions that this program's JSON parser gets wrong by a bit.
        let odd = 0.1 + 0.7 * f64::from(*slices) / 3.0;
        NewVolume {
            name: format!("{name}_{number}"),
            patient: name.clone(),
            split: *split,
            spacing_mm: Some([odd, 1.0 / 3.0, 2.0_f64.sqrt()]),
            affine: Some([[odd.sin(), odd.cos(), 1e-17 * odd, -7.3 * odd]; 4]),
            slices: (0..*slices).map(slice).collect(),
        }
    };
    volumes.iter().enumerate().map(volume).collect()
}

/// Shards of about three blocks of two rows; tables of three volumes after the first five.
fn options() -> WriteOptions {
    let mut options = WriteOptions::new("test", &["background", "heart"]);
    (options.block_rows, options.shard_blocks) = (2, 3);
    (options.listed_max, options.table_volumes) = (5, 3);
    options
}

async fn written(sink: Arc<dyn ObjectWriter>, seed: &str) -> Result<Manifest, DataError> {
    let plan = Plan::new([("seed", seed.to_owned())]);
    write(sink, &options(), plan, cases(), |case| Ok(read_case(case)), &Work::on(2)).await
}

async fn objects(store: &Store) -> BTreeMap<String, Bytes> {
    let mut all = BTreeMap::new();
    for object in store.list("").await.unwrap() {
        all.insert(object.path.clone(), store.get(&object.path).await.unwrap());
    }
    all
}

/// A store, and the names of what is put through it.
struct Logged {
    store: Store,
    puts: Mutex<Vec<String>>,
    /// Called once, before record 4 of the journal is created.
    before_record_4: AtomicBool,
}

impl Logged {
    fn new(store: Store) -> Arc<Self> {
        Arc::new(Self { store, puts: Mutex::default(), before_record_4: AtomicBool::new(false) })
    }

    fn shards_put(&self) -> usize {
        self.puts.lock().unwrap().iter().filter(|path| path.ends_with(".parquet")).count()
    }
}

impl ObjectReader for Logged {
    fn get<'a>(&'a self, path: &'a str) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        ObjectReader::get(&self.store, path)
    }

    fn get_range<'a>(
        &'a self,
        path: &'a str,
        range: std::ops::Range<u64>,
    ) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        ObjectReader::get_range(&self.store, path, range)
    }
}

impl ObjectWriter for Logged {
    fn put<'a>(&'a self, path: &'a str, bytes: Bytes) -> BoxFuture<'a, Result<(), SourceError>> {
        self.puts.lock().unwrap().push(path.to_owned());
        ObjectWriter::put(&self.store, path, bytes)
    }

    fn create<'a>(
        &'a self,
        path: &'a str,
        bytes: Bytes,
    ) -> BoxFuture<'a, Result<bool, SourceError>> {
        Box::pin(async move {
            let due = path == "import/00000004.json";
            if due && self.before_record_4.swap(false, Ordering::SeqCst) {
                // Another one goes on, and dies with its first shard.
                let dead = Arc::new(NoShards(self.store.clone()));
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                let other = move || runtime.unwrap().block_on(written(dead, "1")).unwrap_err();
                std::thread::spawn(other).join().unwrap();
            }
            ObjectWriter::create(&self.store, path, bytes).await
        })
    }

    fn list<'a>(&'a self, folder: &'a str) -> BoxFuture<'a, Result<Vec<String>, SourceError>> {
        ObjectWriter::list(&self.store, folder)
    }

    fn delete<'a>(&'a self, path: &'a str) -> BoxFuture<'a, Result<(), SourceError>> {
        ObjectWriter::delete(&self.store, path)
    }
}

/// A store that takes everything but what is put.
struct NoShards(Store);

impl ObjectReader for NoShards {
    fn get<'a>(&'a self, path: &'a str) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        ObjectReader::get(&self.0, path)
    }

    fn get_range<'a>(
        &'a self,
        path: &'a str,
        range: std::ops::Range<u64>,
    ) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        ObjectReader::get_range(&self.0, path, range)
    }
}

impl ObjectWriter for NoShards {
    fn put<'a>(&'a self, _: &'a str, _: Bytes) -> BoxFuture<'a, Result<(), SourceError>> {
        Box::pin(async { Err(SourceError::Other("a test's own".into())) })
    }

    fn create<'a>(
        &'a self,
        path: &'a str,
        bytes: Bytes,
    ) -> BoxFuture<'a, Result<bool, SourceError>> {
        ObjectWriter::create(&self.0, path, bytes)
    }

    fn list<'a>(&'a self, folder: &'a str) -> BoxFuture<'a, Result<Vec<String>, SourceError>> {
        ObjectWriter::list(&self.0, folder)
    }

    fn delete<'a>(&'a self, path: &'a str) -> BoxFuture<'a, Result<(), SourceError>> {
        ObjectWriter::delete(&self.0, path)
    }
}

fn memory() -> (Arc<InMemory>, Store) {
    let engine = Arc::new(InMemory::new());
    (Arc::clone(&engine), Store::from_engine(engine, "memory:///test"))
}

#[tokio::test]
async fn cut_short_at_any_operation_it_goes_on_to_the_same_bytes() {
    let (engine, store) = memory();
    let counted = FaultyStore::new(engine, Fault::Never);
    let through = Store::from_engine(Arc::clone(&counted) as Arc<_>, "memory:///test");
    let manifest = written(Arc::new(through), "1").await.unwrap();
    let wanted = objects(&store).await;
    assert!(!wanted.keys().any(|path| path.starts_with("import/")), "{:?}", wanted.keys());
    assert_eq!((manifest.tables.len(), manifest.format), (5, 3));
    let (shards, operations) = (manifest.shards.len(), counted.operations());
    assert!(shards >= 10 && operations > 50, "{shards} shards, {operations} operations");
    let mut resumed = 0;
    for at in 0..operations {
        for fault in [Fault::DeadFrom(at), Fault::AnswerLostAt(at)] {
            let (engine, store) = memory();
            let faulty = FaultyStore::new(engine, fault);
            let first = written(Arc::new(Store::from_engine(faulty, "memory:///test")), "1").await;
            let before = objects(&store).await;
            let recorded = before
                .values()
                .filter(|bytes| String::from_utf8_lossy(bytes).contains("\"event\":{\"stored\""));
            let left = if first.is_ok() { 0 } else { shards - recorded.count() };
            let logged = Logged::new(store.clone());
            let complete = before.contains_key("manifest.json");
            match written(logged.clone(), "1").await {
                Ok(again) => assert!(complete || again == manifest, "{fault:?}"),
                Err(DataError::DatasetExists) => assert!(complete, "{fault:?}"),
                Err(error) => panic!("{fault:?}: {error}"),
            }
            // What was recorded is not made again; where the manifest was there, nothing is.
            assert_eq!(logged.shards_put(), if complete { 0 } else { left }, "{fault:?}");
            resumed += usize::from(left > 0 && left < shards && !complete);
            assert_eq!(objects(&store).await, wanted, "{fault:?}");
        }
    }
    assert!(resumed > 10, "only {resumed} went on from the middle");
}

#[tokio::test]
async fn of_two_at_once_one_loses_by_name_and_the_dataset_is_whole() {
    let (_, store) = memory();
    let overtaken = Logged::new(store.clone());
    overtaken.before_record_4.store(true, Ordering::SeqCst);
    let error = written(overtaken, "1").await.unwrap_err();
    let DataError::AnotherImport(who) = &error else { panic!("{error}") };
    assert!(who.contains(&format!("process {}", std::process::id())), "{error}");
    assert!(who.contains("import/00000004.json"), "{error}");
    written(Arc::new(store.clone()), "1").await.unwrap();
    let dataset = Dataset::open(Arc::new(store)).unwrap();
    assert!(verify(&dataset, 2).is_sound());
}

#[tokio::test]
async fn another_plan_is_refused_with_the_difference() {
    let (engine, store) = memory();
    let dead = FaultyStore::new(engine, Fault::DeadFrom(30));
    written(Arc::new(Store::from_engine(dead, "memory:///test")), "1").await.unwrap_err();
    let before = objects(&store).await;
    let error = written(Arc::new(store.clone()), "2").await.unwrap_err();
    let DataError::ChangedImport(difference) = &error else { panic!("{error}") };
    assert_eq!(difference, "seed was `1` and is `2`");
    assert_eq!(objects(&store).await, before);
    written(Arc::new(store.clone()), "1").await.unwrap();
    let error = written(Arc::new(store), "1").await.unwrap_err();
    assert!(matches!(error, DataError::DatasetExists), "{error}");
}

#[test]
fn a_plan_tells_changed_files() {
    let folder = tempfile::tempdir().unwrap();
    let put = |name: &str, bytes: &str| std::fs::write(folder.path().join(name), bytes).unwrap();
    put("a.nii", "1234");
    put("b.nii", "12");
    let plan = |splits: [Split; 2]| {
        let cases = ["a.nii", "b.nii"].into_iter().zip(splits).map(|(name, split)| {
            Ok(PlannedCase { name, patient: name, split, files: vec![folder.path().join(name)] })
        });
        Plan::new([]).reading(folder.path(), cases).unwrap()
    };
    let begun = plan([Split::Train; 2]);
    assert_eq!(plan([Split::Train; 2]).difference(&begun), None);
    let divided = plan([Split::Train, Split::Val]).difference(&begun).unwrap();
    assert!(divided.contains("splits"), "{divided}");
    put("b.nii", "123");
    let grown = plan([Split::Train; 2]).difference(&begun).unwrap();
    assert!(grown.contains("2 files of 6 bytes and is 2 files of 7 bytes"), "{grown}");
    std::fs::remove_file(folder.path().join("a.nii")).unwrap();
    let cases = std::iter::once(Ok(PlannedCase {
        name: "a",
        patient: "a",
        split: Split::Train,
        files: vec![folder.path().join("a.nii")],
    }));
    let error = Plan::new([]).reading(folder.path(), cases).unwrap_err().to_string();
    assert!(error.contains("a.nii"), "{error}");
}

fn in_memory(cases: Vec<Case>, options: &WriteOptions) -> (Manifest, Arc<MemoryObjects>) {
    let sink = Arc::new(MemoryObjects::default());
    let plan = Plan::new([]);
    let read = |case: &Case| Ok(read_case(case));
    let work = Work::on(3);
    let written = write(sink.clone(), options, plan, cases, read, &work);
    (futures::executor::block_on(written).unwrap(), sink)
}

#[test]
fn shards_hold_whole_blocks_of_about_the_bytes_asked_for() {
    // A row of 4 x 5 pixels has 80 bytes, and counts half.
    let cases = |count: u32| -> Vec<Case> {
        (0..count).map(|at| (format!("p{at}"), Split::Train, vec![8], false)).collect()
    };
    let mut options = options();
    options.listed_max = usize::MAX;
    let rows = |manifest: &Manifest| -> Vec<u64> {
        manifest.shards.iter().map(|shard| shard.rows).collect()
    };
    (options.block_rows, options.shard_blocks, options.shard_bytes) = (4, u32::MAX, 400);
    let (manifest, _) = in_memory(cases(5), &options);
    assert_eq!(rows(&manifest), [12, 12, 12, 4]);
    // The first 64 shards are kept small.
    options.shard_blocks = 1;
    let (manifest, _) = in_memory(cases(40), &options);
    assert_eq!(rows(&manifest), [[4].repeat(64), vec![12; 5], vec![4]].concat());
}

#[test]
fn volumes_in_tables_are_found_verified_and_counted() {
    let (manifest, sink) = in_memory(cases(), &options());
    assert_eq!(manifest.tables.iter().map(|table| table.volumes).sum::<u32>(), 15);
    let pool = manifest.rows(Split::Train);
    let labelled = manifest.pools(4).unwrap().0.end;
    assert_eq!(manifest.pools(4).unwrap(), (0..labelled, labelled..pool));
    let dataset = Dataset::open(sink.clone()).unwrap();
    let ids = dataset.volumes(Split::Train);
    assert_eq!(ids.len(), 28);
    let names: Vec<String> = ids.iter().map(|id| dataset.load_volume(*id).unwrap().name).collect();
    let wanted = cases().into_iter().filter(|case| case.1 == Split::Train);
    let wanted = wanted.flat_map(|(name, ..)| [format!("{name}_0"), format!("{name}_1")]);
    assert_eq!(names, wanted.collect::<Vec<_>>());
    let beyond = VolumeId(VolumeId::TABLED_FIRST + 15);
    assert!(matches!(dataset.load_volume(beyond), Err(DataError::Unusable(_))));
    let verified = verify(&dataset, 2);
    assert!(verified.is_sound() && verified.tables == 5, "{verified:?}");

    let told = info(&dataset).unwrap();
    let train = &told.splits["train"];
    assert_eq!((train.patients, train.labelled_patients), (14, 4));
    assert_eq!((train.volumes, train.labelled_volumes, train.slices), (28, 8, pool));
    let [slice, row, _] = train.spacing_mm.unwrap();
    assert_eq!((row.min, row.max), (1.0 / 3.0, 1.0 / 3.0));
    assert!(slice.min < slice.median && slice.median < slice.max);
    let stored = told.statistics.clone().unwrap();
    assert_eq!((stored.labelled_volumes, stored.classes[1].volumes_without), (8, 0));
    assert_eq!(stored.shapes[&Split::Train].slices["4x5"], pool);
    // Stored in anatomical order: the same sums in the same order.
    let scanned = scan(&dataset, &Work::on(3)).unwrap().statistics.unwrap();
    let scanned = to_json(STATISTICS_PATH, &scanned).unwrap();
    assert_eq!(Statistics::parse(&scanned, dataset.digest()).unwrap(), stored);

    sink.replace(STATISTICS_PATH, Bytes::from_static(b"{\"format\": 1}"));
    let problems = verify(&dataset, 1).problems;
    assert_eq!(problems[0].object, STATISTICS_PATH);
    assert!(info(&dataset).is_err());
}

#[test]
fn verify_finds_what_tables_and_rows_do_not_agree_on() {
    let planted = |change: fn(&mut Manifest, &MemoryObjects)| {
        let (mut manifest, sink) = in_memory(cases(), &options());
        change(&mut manifest, &sink);
        sink.replace(MANIFEST_PATH, manifest.to_bytes().unwrap().into());
        sink.replace(STATISTICS_PATH, Bytes::from_static(b"{}"));
        let problems = verify(&Dataset::open(sink).unwrap(), 2).problems;
        let others = problems.into_iter().filter(|problem| problem.object != STATISTICS_PATH);
        others.map(|problem| format!("{}: {}", problem.object, problem.why)).collect::<Vec<_>>()
    };
    assert_eq!(planted(|_, _| ()), Vec::<String>::new());
    /// Seals table 1 again after a change to its volumes.
    fn resealed(
        manifest: &mut Manifest,
        sink: &MemoryObjects,
        change: impl FnOnce(&mut Vec<super::super::manifest::VolumeEntry>),
    ) {
        let bytes = sink.bytes(&manifest.tables[1].object).unwrap();
        let mut volumes = manifest.tables[1].parse(&bytes).unwrap();
        change(&mut volumes);
        let (table, bytes) = VolumeTable::seal(1, volumes).unwrap();
        sink.replace(&table.object, bytes);
        manifest.tables[1] = table;
    }
    let shared = planted(|manifest, sink| {
        resealed(manifest, sink, |volumes| volumes[2].patient = "p15".to_owned());
    });
    assert_eq!(shared, ["volumes/train-00001.json: patient `p15` is in train and in val"]);
    let twice = planted(|manifest, sink| {
        resealed(manifest, sink, |volumes| volumes[0].name = "p00_1".to_owned());
    });
    assert_eq!(twice, ["volumes/train-00001.json: two volumes are called `p00_1`"]);
    let moved = planted(|manifest, _| {
        let [a, b] = [0, 1].map(|at| manifest.volumes[at].slices);
        (manifest.volumes[0].slices, manifest.volumes[1].slices) = (a + 1, b - 1);
        manifest.volumes[1].first_row += 1;
    });
    assert!(moved.len() == 1 && moved[0].contains("row 1 is of volume 1, not 0"), "{moved:?}");
    let flipped = planted(|manifest, sink| {
        let object = &manifest.tables[3].object;
        let mut bytes = sink.bytes(object).unwrap().to_vec();
        bytes[40] ^= 1;
        sink.replace(object, bytes.into());
    });
    assert!(flipped.iter().any(|told| told.starts_with("volumes/train-00003.json")), "{flipped:?}");
}

#[tokio::test]
async fn a_case_that_fails_leaves_no_dataset_and_is_named() {
    let (_, store) = memory();
    let fails = |case: &Case| match case.0.as_str() {
        "p09" => Err(DataError::Unusable("p09 is broken".to_owned())),
        _ => Ok(read_case(case)),
    };
    let plan = Plan::new([("seed", "1".to_owned())]);
    let sink = Arc::new(store.clone());
    let error = write(sink, &options(), plan, cases(), fails, &Work::on(2)).await.unwrap_err();
    assert_eq!(error.to_string(), "p09 is broken");
    assert!(!store.exists(MANIFEST_PATH).await.unwrap());
    // Once it is mended, what was stored is not stored again.
    let logged = Logged::new(store);
    let manifest = written(logged.clone(), "1").await.unwrap();
    assert!(logged.shards_put() < manifest.shards.len());
}
