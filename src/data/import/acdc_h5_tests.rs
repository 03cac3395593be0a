//! The importer on tiny made-up files (`tests/data/acdc_tiny`), on damaged ones, and on the real
//! data where `CPCR_ACDC_DIR` (and `CPCR_ACDC_LISTS`) say where it lies.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::*;
use crate::data::dataset::Dataset;
use crate::data::report::verify;
use crate::data::source::{FolderObjects, MemoryObjects};

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/acdc_tiny")
}

fn import_from(files: PathBuf) -> Result<(Manifest, Arc<MemoryObjects>), DataError> {
    let sink = Arc::new(MemoryObjects::default());
    let source = AcdcSource { files, lists: None };
    let manifest = futures::executor::block_on(import(&source, sink.clone(), &Work::on(2)))?;
    Ok((manifest, sink))
}

/// What `tests/data/acdc_tiny` was made with.
fn pixel(n: usize, y: usize, x: usize) -> (f32, u8) {
    (((x + 2 * y + 3 * n) % 17) as f32 / 16.0, ((x / 4 + y / 4 + n) % 4) as u8)
}

#[test]
fn lists_order_rows_and_volumes_come_back_whole() {
    // The folder above `data`, and `data` itself with the lists above it.
    let (manifest, _) = import_from(tiny()).unwrap();
    let (same, sink) = import_from(tiny().join("data")).unwrap();
    assert_eq!(manifest, same);
    assert_eq!(manifest.labelled_patients(), ["patient002", "patient001"]);
    assert_eq!(manifest.pools(1).unwrap(), (0..6, 6..10));
    let dataset = Dataset::open(sink).unwrap();
    for (split, volume, numbers) in [
        (Split::Train, 0, [211, 212, 213].as_slice()),
        (Split::Train, 3, &[121, 122]),
        (Split::Val, 0, &[0, 1, 2, 3]),
    ] {
        let volume = dataset.load_volume(dataset.volumes(split)[volume]).unwrap();
        let [depth, h, w] = volume.shape;
        assert_eq!(depth, numbers.len());
        let labels = volume.labels.unwrap();
        for (at, value) in volume.slices.iter().enumerate() {
            let (z, y, x) = (at / (h * w), at / w % h, at % w);
            assert_eq!((*value, labels[at]), pixel(numbers[z], y, x), "{}", volume.name);
        }
    }
}

fn copy_of_tiny() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("data")).unwrap();
    for part in ["", "data"] {
        for entry in std::fs::read_dir(tiny().join(part)).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_file() {
                let to = folder.path().join(part).join(entry.file_name());
                std::fs::copy(entry.path(), to).unwrap();
            }
        }
    }
    folder
}

#[test]
fn every_truncation_and_flipped_byte_ends_as_an_answer() {
    let name = tiny().join("data/patient002_frame01_slice_1.h5");
    let whole = std::fs::read(&name).unwrap();
    let sound = parse(whole.clone()).unwrap();
    let attempt = |bytes: Vec<u8>| catch_unwind(AssertUnwindSafe(|| parse(bytes)));
    for len in 0..whole.len() {
        // Padding at the end may be missing; pixels may not.
        if let Ok(Ok(arrays)) = attempt(whole[..len].to_vec()) {
            assert_eq!((arrays.image, arrays.shape), (sound.image.clone(), sound.shape.clone()));
        }
    }
    let mut named = 0;
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 0xFF;
        // Files of this kind carry no checksums: a flip in the pixels may go unseen, but nothing
        // may end the process or take memory that the file cannot fill.
        named += usize::from(!matches!(attempt(bytes), Ok(Ok(_))));
    }
    assert!(named > 100, "{named} flips were noticed");
}

#[test]
fn errors_name_the_file() {
    let folder = copy_of_tiny();
    let file = "patient002_frame01_slice_3.h5";
    let path = folder.path().join("data").join(file);
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    let error = import_from(folder.path().to_owned()).unwrap_err();
    assert!(error.to_string().contains(file), "{error}");
    std::fs::remove_file(&path).unwrap();
    let error = import_from(folder.path().to_owned()).unwrap_err();
    assert!(error.to_string().contains(file), "{error}");
    std::fs::write(folder.path().join("train_slices.list"), "../../etc/passwd\n").unwrap();
    let error = import_from(folder.path().to_owned()).unwrap_err();
    assert!(error.to_string().contains("train_slices.list"), "{error}");
    std::fs::remove_file(folder.path().join("train_slices.list")).unwrap();
    let error = import_from(folder.path().to_owned()).unwrap_err();
    assert!(matches!(error, DataError::NotFound { .. }), "{error}");
}

#[test]
fn the_real_data_keeps_the_literatures_counts() {
    let Some(files) = std::env::var_os("CPCR_ACDC_DIR") else {
        eprintln!("SKIPPED: set CPCR_ACDC_DIR to the folder with ACDC's .h5 files to run this");
        return;
    };
    let lists = std::env::var_os("CPCR_ACDC_LISTS").map(PathBuf::from);
    let source = AcdcSource { files: files.into(), lists };
    let folder = tempfile::tempdir().unwrap();
    let sink = Arc::new(FolderObjects::new(folder.path()));
    let started = std::time::Instant::now();
    let manifest =
        futures::executor::block_on(import(&source, sink.clone(), &Work::on(2))).unwrap();
    eprintln!("import: {:?}", started.elapsed());
    for (patients, slices) in
        [(3, 68), (7, 136), (14, 256), (21, 396), (28, 512), (35, 664), (70, 1312)]
    {
        assert_eq!(manifest.pools(patients).unwrap(), (0..slices, slices..1312));
    }
    let first = &manifest.volumes[0];
    assert_eq!((first.name.as_str(), first.slices), ("patient099_frame01", 16));
    let dataset = Dataset::open(sink).unwrap();
    assert_eq!(dataset.volumes(Split::Val).len(), 20);
    let volume = dataset.load_volume(dataset.volumes(Split::Val)[0]).unwrap();
    assert_eq!(volume.name, "patient028_frame01");
    assert!(volume.slices.iter().all(|value| (0.0..=1.0).contains(value)));
    let started = std::time::Instant::now();
    let report = verify(&dataset, 2);
    eprintln!("verify: {:?}, {} bytes", started.elapsed(), report.bytes);
    assert!(report.is_sound(), "{report:?}");
}
