//! Reading back what was written, through readers that damage bytes.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures::future::BoxFuture;

use super::*;
use crate::data::report::{info, verify};
use crate::data::source::{FolderObjects, MemoryObjects, SourceError};
use crate::data::synth::SynthOptions;
use crate::data::write::{DatasetWriter, NewSlice, NewVolume, Work, WriteOptions};

fn volume(name: &str, split: Split, slices: u32, labelled: bool) -> NewVolume {
    let slice = |n: u32| NewSlice {
        slice: n,
        shape: (6, 5),
        image: (0..30).map(|p| (n * 30 + p) as f32 / 4096.0).collect(),
        label: labelled.then(|| vec![(n % 2) as u8; 30]),
    };
    NewVolume {
        name: name.to_owned(),
        patient: name[..1].to_owned(),
        split,
        spacing_mm: Some([10.0, 1.25, 1.5]),
        affine: None,
        // Stored back to front: list order need not be anatomical order.
        slices: (0..slices).rev().map(slice).collect(),
    }
}

/// Three shards of training rows, blocks of 4, and a validation volume.
fn stored() -> Arc<MemoryObjects> {
    let objects = Arc::new(MemoryObjects::default());
    let mut options = WriteOptions::new("test", &["background", "heart"]);
    (options.block_rows, options.shard_blocks) = (4, 2);
    let mut writer = DatasetWriter::new(objects.clone(), options).unwrap();
    futures::executor::block_on(async {
        for volume in [
            volume("a1", Split::Train, 7, true),
            volume("d1", Split::Val, 5, true),
            volume("a2", Split::Train, 3, true),
            volume("b1", Split::Train, 11, false),
        ] {
            writer.add(volume).await.unwrap();
        }
        writer.finish().await.unwrap();
    });
    objects
}

/// Damages the first `times` answers that `pick` chooses.
struct Damaging {
    objects: Arc<MemoryObjects>,
    times: AtomicUsize,
    pick: fn(&str, Option<&Range<u64>>) -> bool,
}

impl Damaging {
    fn answer(&self, path: &str, range: Option<&Range<u64>>, bytes: Bytes) -> Bytes {
        let left = |n: usize| n.checked_sub(1);
        let order = Ordering::SeqCst;
        let due = (self.pick)(path, range) && self.times.fetch_update(order, order, left).is_ok();
        if !due {
            return bytes;
        }
        let mut bytes = bytes.to_vec();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x10;
        bytes.into()
    }
}

impl ObjectReader for Damaging {
    fn get<'a>(&'a self, path: &'a str) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        Box::pin(async move { Ok(self.answer(path, None, self.objects.get(path).await?)) })
    }

    fn get_range<'a>(
        &'a self,
        path: &'a str,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        Box::pin(async move {
            let bytes = self.objects.get_range(path, range.clone()).await?;
            Ok(self.answer(path, Some(&range), bytes))
        })
    }
}

fn damaging(
    times: usize,
    pick: fn(&str, Option<&Range<u64>>) -> bool,
) -> Result<Dataset, DataError> {
    Dataset::open(Arc::new(Damaging { objects: stored(), times: AtomicUsize::new(times), pick }))
}

#[test]
fn volumes_come_back_in_anatomical_order() {
    let dataset = Dataset::open(stored()).unwrap();
    assert_eq!(dataset.volumes(Split::Train).len(), 3);
    let b = dataset.load_volume(dataset.volumes(Split::Train)[2]).unwrap();
    assert_eq!((b.name.as_str(), b.shape, b.labels), ("b1", [11, 6, 5], None));
    assert!(b.slices.is_sorted());
    let d = dataset.load_volume(dataset.volumes(Split::Val)[0]).unwrap();
    assert_eq!(d.shape, [5, 6, 5]);
    assert_eq!(d.labels.unwrap().iter().filter(|class| **class == 1).count(), 2 * 30);
    assert_eq!(d.spacing_mm, Some([10.0, 1.25, 1.5]));
    assert!(matches!(dataset.load_volume(VolumeId(9)), Err(DataError::Unusable(_))));
}

/// Two slices of `channels` channels, each pixel saying its slice, its channel and its place.
fn with_channels(channels: &[&str]) -> (Manifest, Arc<MemoryObjects>) {
    let objects = Arc::new(MemoryObjects::default());
    let mut options = WriteOptions::new("test", &["background", "heart"]);
    options.channels = channels.iter().map(|name| (*name).to_owned()).collect();
    let mut writer = DatasetWriter::new(objects.clone(), options).unwrap();
    let slice = |n: u32| NewSlice {
        slice: n,
        shape: (3, 2),
        image: (0..channels.len().max(1) * 6)
            .map(|at| (n * 10) as f32 + (at / 6) as f32 + (at % 6) as f32 / 10.0)
            .collect(),
        label: None,
    };
    let mut volume = volume("a1", Split::Train, 2, false);
    volume.slices = (0..2).map(slice).collect();
    let manifest = futures::executor::block_on(async {
        writer.add(volume).await.unwrap();
        writer.finish().await.unwrap()
    });
    (manifest, objects)
}

#[test]
fn channels_come_back_in_their_order_and_one_is_format_1_still() {
    let (manifest, objects) = with_channels(&["T1", "T2", "FLAIR"]);
    assert_eq!((manifest.format, manifest.channel_count()), (2, 3));
    let dataset = Dataset::open(objects).unwrap();
    let volume = dataset.load_volume(VolumeId(0)).unwrap();
    assert_eq!((volume.shape, volume.channels), ([2, 3, 2], 3));
    let pixels = |first: f32| [0.0, 1.0, 2.0, 3.0, 4.0, 5.0].map(|pixel: f32| first + pixel / 10.0);
    let want = [0.0, 1.0, 2.0, 10.0, 11.0, 12.0].map(pixels).concat();
    assert_eq!(volume.slices, want);
    assert_eq!(info(&dataset).unwrap().channel_names, ["T1", "T2", "FLAIR"]);
    for (names, field) in [(&[][..], false), (&["T1"], true)] {
        let (manifest, objects) = with_channels(names);
        assert_eq!((manifest.format, manifest.channel_count()), (1, 1));
        let text = String::from_utf8(objects.bytes(MANIFEST_PATH).unwrap().to_vec()).unwrap();
        assert_eq!(text.contains("channels"), field, "{text}");
    }
}

#[test]
fn shards_of_other_channels_than_the_manifests_are_refused() {
    let (mut manifest, objects) = with_channels(&["T1", "T2"]);
    manifest.channels.push("FLAIR".to_owned());
    objects.replace(MANIFEST_PATH, manifest.to_bytes().unwrap().into());
    let dataset = Dataset::open(objects.clone()).unwrap();
    let error = dataset.load_volume(VolumeId(0)).unwrap_err().to_string();
    assert!(error.contains("train-00000") && error.contains("2 channels, not 3"), "{error}");
    assert!(!verify(&dataset, 1).is_sound());
    // An older program would read the first channel and call it the image.
    manifest.format = 1;
    objects.replace(MANIFEST_PATH, manifest.to_bytes().unwrap().into());
    let error = Dataset::open(objects).unwrap_err().to_string();
    assert!(error.contains("3 channels in format 1"), "{error}");
}

#[test]
fn one_damaged_answer_is_fetched_again() {
    for pick in [
        (|path, range| path.ends_with(".parquet") && range.is_some_and(|r| r.start < 100))
            as fn(&str, Option<&Range<u64>>) -> bool,
        |path, range| path.ends_with(".parquet") && range.is_some_and(|r| r.start > 100),
        |path, _| path.ends_with(".index.json"),
    ] {
        let dataset = damaging(1, pick).unwrap();
        assert_eq!(dataset.load_volume(VolumeId(0)).unwrap().shape, [7, 6, 5]);
        let dataset = damaging(usize::MAX, pick).unwrap();
        let error = dataset.load_volume(VolumeId(0)).unwrap_err();
        let DataError::Damaged { object, .. } = &error else { panic!("{error}") };
        assert!(object.starts_with("shards/train-00000"), "{error}");
        let words = error.to_string();
        assert!(words.contains("bytes ") && words.contains("fetched 6 times"), "{words}");
    }
}

#[test]
fn a_damaged_manifest_is_read_until_two_agree() {
    let manifest: fn(&str, Option<&Range<u64>>) -> bool = |path, _| path == MANIFEST_PATH;
    assert_eq!(damaging(1, manifest).unwrap().manifest().name, "test");
}

#[test]
fn a_missing_shard_is_named() {
    let objects = stored();
    let dataset = Dataset::open(objects.clone()).unwrap();
    let empty = Dataset::open(Arc::new(MemoryObjects::default())).unwrap_err();
    assert!(matches!(empty, DataError::NotFound { object } if object == "manifest.json"));
    objects.replace("shards/train-00001.parquet", Bytes::from_static(b"short"));
    let error = dataset.load_volume(VolumeId(3)).unwrap_err();
    assert!(error.to_string().contains("shards/train-00001.parquet"), "{error}");
}

#[test]
fn verify_finds_a_flipped_bit_anywhere() {
    let objects = stored();
    let dataset = Dataset::open(objects.clone()).unwrap();
    let sound = verify(&dataset, 2);
    assert!(sound.is_sound() && sound.shards == 4, "{sound:?}");
    for path in objects.paths().iter().filter(|path| path.starts_with("shards/")) {
        let before = objects.bytes(path).unwrap();
        for at in [0, before.len() / 2, before.len() - 1] {
            let mut bytes = before.to_vec();
            bytes[at] ^= 1;
            objects.replace(path, bytes.into());
            let dataset = Dataset::open(objects.clone()).unwrap();
            let found = verify(&dataset, 1);
            assert_eq!(found.problems.len(), 1, "{path} at {at}: {found:?}");
            assert!(found.problems[0].why.contains(path.as_str()), "{found:?}");
        }
        objects.replace(path, before);
    }
}

#[test]
fn info_counts() {
    let info = info(&Dataset::open(stored()).unwrap()).unwrap();
    let train = &info.splits["train"];
    assert_eq!((train.patients, train.labelled_patients, train.volumes), (2, 1, 3));
    assert_eq!((train.slices, train.shards), (21, 3));
    assert_eq!(info.labelled_slices, [10]);
}

#[test]
fn a_folder_serves_what_memory_serves_also_from_within_a_runtime() {
    let folder = tempfile::tempdir().unwrap();
    let objects = Arc::new(FolderObjects::new(folder.path().join("set")));
    let options =
        SynthOptions { train_patients: 2, val_patients: 1, test_patients: 1, ..Default::default() };
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        crate::data::synth::write(objects.clone(), &options, &Work::on(2)).await.unwrap();
        let dataset = Dataset::open(objects).unwrap();
        let test = dataset.volumes(Split::Test);
        assert_eq!(test.len(), 2);
        assert!(dataset.load_volume(test[1]).unwrap().labels.is_some());
    });
    let outside = FolderObjects::new(folder.path().join("set"));
    let read = futures::executor::block_on(outside.get("../set/manifest.json"));
    assert!(read.is_err(), "a path does not leave its folder");
}

#[test]
fn the_writer_refuses_what_would_not_open() {
    let bad = |change: fn(&mut NewVolume)| {
        let sink = Arc::new(MemoryObjects::default());
        let options = WriteOptions::new("test", &["background", "heart"]);
        let mut writer = DatasetWriter::new(sink.clone(), options).unwrap();
        let mut second = volume("b1", Split::Val, 3, true);
        change(&mut second);
        let written = futures::executor::block_on(async {
            writer.add(volume("a1", Split::Train, 3, true)).await?;
            writer.add(second).await?;
            writer.finish().await
        });
        assert!(written.is_err() != sink.paths().contains(&"manifest.json".to_owned()));
        written.map(|_| ()).map_err(|error| error.to_string())
    };
    assert_eq!(bad(|_| ()), Ok(()));
    assert!(bad(|v| v.patient = "a".into()).unwrap_err().contains("patient `a`"));
    assert!(bad(|v| v.slices[0].image[3] = f32::NAN).unwrap_err().contains("no numbers"));
    assert!(bad(|v| v.slices[0].label = None).unwrap_err().contains("2 of 3"));
    assert!(bad(|v| v.slices[0].label = Some(vec![2; 30])).unwrap_err().contains("class 2"));
    assert!(bad(|v| v.slices[0].slice = 1).unwrap_err().contains("twice"));
    assert!(bad(|v| v.slices.clear()).unwrap_err().contains("no slices"));
}
