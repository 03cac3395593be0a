//! The loader against the deal: order, content, refusals. How it goes about it: `flow_tests.rs`.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures::future::BoxFuture;

use super::*;
use crate::data::manifest::VolumeId;
use crate::data::source::{MemoryObjects, ObjectReader, SourceError};
use crate::data::synth::{self, SynthOptions};
use crate::types::Epoch;

fn stored() -> Arc<MemoryObjects> {
    let objects = Arc::new(MemoryObjects::default());
    let options = SynthOptions {
        train_patients: 6,
        val_patients: 1,
        test_patients: 0,
        side_px: (32, 48),
        slices: (4, 6),
        ..SynthOptions::default()
    };
    futures::executor::block_on(synth::write(
        objects.clone(),
        &options,
        &crate::data::write::Work::on(2),
    ))
    .unwrap();
    objects
}

fn plan() -> LoaderPlan {
    LoaderPlan {
        seed: 7,
        rank: Rank(0),
        world: WorldSize(1),
        start: Step(0),
        end: Step(20),
        batch_labelled: 3,
        batch_unlabelled: 5,
        labelled_patients: 2,
        patch: (32, 40),
        prefetch: 3,
        threads: 2,
        fetches: 4,
        cache_bytes: LoaderPlan::CACHE_BYTES,
        augment: true,
    }
}

fn load(reader: Arc<dyn ObjectReader>, plan: LoaderPlan) -> Vec<Batch> {
    let mut loader = Loader::start(Dataset::open(reader).unwrap(), plan).unwrap();
    std::iter::from_fn(|| loader.next().unwrap())
        .map(|batch| Batch { waited: Duration::ZERO, ..batch })
        .collect()
}

/// A reader that counts row-group fetches and delays each by `delay`, the first ones longest.
struct Slow {
    objects: Arc<MemoryObjects>,
    fetches: AtomicU64,
    delay: Duration,
}

impl Slow {
    fn new(delay: Duration) -> Arc<Self> {
        Arc::new(Self { objects: stored(), fetches: AtomicU64::new(0), delay })
    }
}

impl ObjectReader for Slow {
    fn get<'a>(&'a self, path: &'a str) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        self.objects.get(path)
    }

    fn get_range<'a>(
        &'a self,
        path: &'a str,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        Box::pin(async move {
            let before = self.fetches.fetch_add(1, Ordering::SeqCst);
            tokio::time::sleep(self.delay / (before as u32 % 5 + 1)).await;
            self.objects.get_range(path, range).await
        })
    }
}

#[test]
fn batches_are_the_deals_whatever_threads_and_caches_do() {
    let objects = stored();
    let batches = load(objects.clone(), plan());
    assert_eq!(batches.len(), 20);
    let deal = plan().deal(&Dataset::open(objects.clone()).unwrap()).unwrap();
    let share = deal.share(Rank(0), WorldSize(1)).unwrap();
    for (step, batch) in (0..).zip(&batches) {
        assert_eq!((batch.step, &batch.draws), (Step(step), &deal.batch(Step(step), &share)));
        assert_eq!((batch.n_labelled, batch.n_unlabelled), (3, 5));
        assert_eq!((batch.images.len(), batch.labels.len()), (8 * 32 * 40, 3 * 32 * 40));
    }
    let many = LoaderPlan { threads: 5, prefetch: 7, ..plan() };
    assert_eq!(load(objects.clone(), many), batches);
    let starved = LoaderPlan { threads: 3, cache_bytes: 1, ..plan() };
    assert_eq!(load(objects.clone(), starved), batches);
    assert_eq!(load(Slow::new(Duration::from_millis(5)), plan()), batches);
    let late = LoaderPlan { start: Step(13), ..plan() };
    assert_eq!(load(objects, late), batches[13..]);
}

#[test]
fn two_ranks_see_what_one_would() {
    let objects = stored();
    let whole = load(objects.clone(), plan());
    let parts: Vec<Vec<Batch>> = (0..3)
        .map(|rank| {
            load(objects.clone(), LoaderPlan { rank: Rank(rank), world: WorldSize(3), ..plan() })
        })
        .collect();
    let pixels = 32 * 40;
    for (step, whole) in whole.iter().enumerate() {
        let (mut labelled, mut unlabelled, mut labels) = (Vec::new(), Vec::new(), Vec::new());
        for part in parts.iter().map(|part| &part[step]) {
            let (l, u) = part.images.split_at(part.n_labelled * pixels);
            labelled.extend_from_slice(l);
            unlabelled.extend_from_slice(u);
            labels.extend_from_slice(&part.labels);
        }
        labelled.append(&mut unlabelled);
        assert!(labelled == whole.images && labels == whole.labels, "step {step}");
    }
}

#[test]
fn without_augmentation_a_batch_holds_the_stored_pixels() {
    let dataset = Dataset::open(stored()).unwrap();
    let first = dataset.load_volume(VolumeId(0)).unwrap();
    let [slices, h, w] = first.shape;
    let plan = LoaderPlan { patch: (h, w), augment: false, ..plan() };
    let mut loader = Loader::start(dataset, plan).unwrap();
    let mut compared = 0;
    while let Some(batch) = loader.next().unwrap() {
        for (slot, draw) in batch.draws.iter().enumerate().take(batch.n_labelled) {
            if draw.sample < slices as u64 {
                let (from, to) = (draw.sample as usize * h * w, slot * h * w);
                assert_eq!(batch.images[to..to + h * w], first.slices[from..from + h * w]);
                let labels = first.labels.as_ref().unwrap();
                assert_eq!(batch.labels[to..to + h * w], labels[from..from + h * w]);
                compared += 1;
            }
        }
    }
    assert!(compared > 5);
}

#[test]
fn channels_are_augmented_alike_and_stay_in_order() {
    use crate::data::manifest::Split;
    use crate::data::write::{DatasetWriter, NewSlice, NewVolume, WriteOptions};
    let objects = Arc::new(MemoryObjects::default());
    let mut options = WriteOptions::new("two", &["background", "heart"]);
    options.channels = vec!["plain".to_owned(), "doubled".to_owned()];
    let mut writer = DatasetWriter::new(objects.clone(), options).unwrap();
    // A pixel's own number; its double; and which of them are below 60.
    let slice = |slice| NewSlice {
        slice,
        shape: (12, 10),
        image: (0..240_u8).map(|at| f32::from(at % 120) * (1.0 + f32::from(at / 120))).collect(),
        label: Some((0..120).map(|at| u8::from(at >= 60)).collect()),
    };
    futures::executor::block_on(async {
        for (patient, split) in [("a", Split::Train), ("b", Split::Train), ("c", Split::Val)] {
            let (name, patient) = (patient.to_owned(), patient.to_owned());
            let slices = (0..6).map(slice).collect();
            let volume = NewVolume { name, patient, split, spacing_mm: None, affine: None, slices };
            writer.add(volume).await.unwrap();
        }
        writer.finish().await.unwrap();
    });
    let plan = LoaderPlan { labelled_patients: 1, patch: (16, 20), ..plan() };
    let batches = load(objects, plan);
    let (pixels, mut changed) = (16 * 20, 0);
    for batch in &batches {
        assert_eq!((batch.channels, batch.images.len()), (2, 8 * 2 * pixels));
        for (slot, image) in batch.images.chunks(2 * pixels).enumerate() {
            let (plain, doubled) = image.split_at(pixels);
            assert!(plain.iter().zip(doubled).all(|(a, b)| a * 2.0 == *b), "step {:?}", batch.step);
            changed += usize::from(!plain.is_sorted());
            if slot < batch.n_labelled {
                let labels = &batch.labels[slot * pixels..(slot + 1) * pixels];
                assert!(plain.iter().zip(labels).all(|(a, label)| (*a >= 60.0) == (*label == 1)));
            }
        }
    }
    assert!(changed > 20, "{changed} of 160 were augmented");
}

#[test]
fn an_epoch_fetches_each_block_about_once() {
    let reader = Slow::new(Duration::ZERO);
    let dataset = Dataset::open(reader.clone()).unwrap();
    let blocks = dataset.manifest().rows(crate::data::Split::Train).div_ceil(8);
    let batches = load(reader.clone(), LoaderPlan { threads: 4, ..plan() });
    assert!(batches.last().unwrap().draws.last().unwrap().epoch > Epoch(0), "more than one epoch");
    let fetches = reader.fetches.load(Ordering::SeqCst);
    assert!(fetches <= blocks + 8, "{fetches} fetches of {blocks} blocks");
}

#[test]
fn plans_that_cannot_be_are_refused() {
    let start = |plan| Loader::start(Dataset::open(stored()).unwrap(), plan).map(|_| ());
    let error = start(LoaderPlan { world: WorldSize(9), ..plan() }).unwrap_err();
    assert!(matches!(error, DataError::Deal(_)), "{error}");
    let error = start(LoaderPlan { labelled_patients: 7, ..plan() }).unwrap_err();
    assert!(error.to_string().contains("6 labelled training patients"), "{error}");
    assert!(start(LoaderPlan { labelled_patients: 0, ..plan() }).is_err());
    assert!(start(LoaderPlan { prefetch: 0, ..plan() }).is_err());
    assert!(start(LoaderPlan { fetches: 0, ..plan() }).is_err());
    // All patients labelled: the unlabelled pool is empty, and nothing is dealt from it.
    let all = load(stored(), LoaderPlan { labelled_patients: 6, ..plan() });
    assert!(all.iter().all(|batch| batch.n_unlabelled == 0 && batch.n_labelled == 3));
}
