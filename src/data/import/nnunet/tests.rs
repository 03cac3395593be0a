//! The importer on datasets that are made up here, and on damaged ones.

use super::*;
use crate::data::dataset::Dataset;
use crate::data::import::nifti::tests::{class, geometry, image, imported, label, volume};

const DESCRIPTION: &str = r#"{"channel_names": {"0": "T1", "1": "T2"},
    "labels": {"background": 0, "RV": 1, "LV": 2}, "numTraining": 8, "file_ending": ".nii.gz"}"#;

/// A case of two channels, the second upside down.
fn case(folder: &Path, images: &str, name: &str) {
    image(folder, &format!("{images}/{name}_0000.nii.gz"), &geometry(1), |at| at as f32);
    image(folder, &format!("{images}/{name}_0001.nii.gz"), &geometry(1), |at| 50.0 - at as f32);
}

fn labelled(folder: &Path, set: &str, name: &str) {
    case(folder, &format!("images{set}"), name);
    label(folder, &format!("labels{set}/{name}.nii.gz"), &geometry(1), class);
}

/// Four patients of two cases.
fn dataset() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("dataset.json"), DESCRIPTION).unwrap();
    for patient in ["p1", "p2", "p3", "p4"] {
        for frame in ["a", "b"] {
            labelled(folder.path(), "Tr", &format!("{patient}_{frame}"));
        }
    }
    folder
}

fn import_from(source: &NnunetSource) -> Result<(Manifest, Dataset), DataError> {
    imported(|sink| futures::executor::block_on(import(source, sink, &Work::on(2))))
}

/// The import after `change` to the folder must fail; what it says.
fn refused(change: impl FnOnce(&Path)) -> String {
    let folder = dataset();
    change(folder.path());
    import_from(&NnunetSource::new(folder.path())).unwrap_err().to_string()
}

fn patients(manifest: &Manifest, split: Split) -> BTreeSet<&str> {
    manifest.volumes_of(split).map(|(_, volume)| volume.patient.as_str()).collect()
}

#[test]
fn channels_arrive_in_order_each_scaled_by_itself() {
    let folder = dataset();
    let (manifest, dataset) = import_from(&NnunetSource::new(folder.path())).unwrap();
    assert_eq!((manifest.format, manifest.channels.join(" ")), (2, "T1 T2".to_owned()));
    assert_eq!(manifest.classes, ["background", "RV", "LV"]);
    assert_eq!(Split::ALL.map(|split| patients(&manifest, split).len()), [2, 1, 1]);
    let found = volume(&dataset, "p3_b");
    assert_eq!((found.shape, found.channels), ([4, 3, 2], 2));
    // [D, C, H, W]: a slice's first channel rises by voxel number, its second falls.
    for (slice, pixels) in found.slices.chunks(12).enumerate() {
        for at in 0..6 {
            let rising = ((slice * 6 + at) as f64 / 23.0) as f32;
            assert_eq!(pixels[at], rising, "slice {slice}, pixel {at}");
            assert!((pixels[6 + at] - (1.0 - rising)).abs() < 1e-6);
        }
    }
    assert_eq!(found.labels.unwrap(), (0..24).map(class).collect::<Vec<u8>>());
}

#[test]
fn one_channel_keeps_format_1_and_version_1_is_read() {
    let folder = dataset();
    let v1 = r#"{"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "RV", "2": "LV"}}"#;
    std::fs::write(folder.path().join("dataset.json"), v1).unwrap();
    for entry in std::fs::read_dir(folder.path().join("imagesTr")).unwrap() {
        let path = entry.unwrap().path();
        if path.to_string_lossy().contains("_0001") {
            std::fs::remove_file(path).unwrap();
        }
    }
    let (manifest, _) = import_from(&NnunetSource::new(folder.path())).unwrap();
    assert_eq!((manifest.format, manifest.channel_count()), (1, 1));
    assert_eq!((manifest.channels.join(" "), manifest.classes.len()), ("MRI".to_owned(), 3));
}

#[test]
fn images_ts_are_the_test_split_or_train_unlabelled() {
    let folder = dataset();
    case(folder.path(), "imagesTs", "p5_a");
    let mut source = NnunetSource::new(folder.path());
    let (manifest, _) = import_from(&source).unwrap();
    assert!(patients(&manifest, Split::Train).contains("p5"));
    assert_eq!(manifest.labelled_patients().len(), 2);
    labelled(folder.path(), "Ts", "p6_a");
    let (manifest, _) = import_from(&source).unwrap();
    assert_eq!(patients(&manifest, Split::Test), BTreeSet::from(["p6"]));
    assert_eq!(manifest.labelled_patients().len(), 3);
    source.split = NnunetSplit::Wishes(SplitWishes { test: Some(0.5), ..SplitWishes::default() });
    assert!(import_from(&source).unwrap_err().to_string().contains("`imagesTs`"));
    source.split = NnunetSplit::Usual;
    labelled(folder.path(), "Ts", "p1_c");
    let error = import_from(&source).unwrap_err().to_string();
    assert!(error.contains("patient `p1`") && error.contains("p1_c"), "{error}");
    labelled(folder.path(), "Ts", "p1_a");
    source.patient = Some(Pattern::new("{patient}", "{patient}").unwrap());
    let error = import_from(&source).unwrap_err().to_string();
    assert!(error.contains("`p1_a`"), "{error}");
}

#[test]
fn a_fold_says_who_validates() {
    let folder = dataset();
    let splits = folder.path().join("splits_final.json");
    let folds = r#"[{"train": ["p1_a", "p1_b", "p2_a", "p2_b", "p3_a", "p3_b"], "val": ["p4_a", "p4_b"]},
        {"train": ["p4_a"], "val": ["p1_a", "p1_b"]}]"#;
    std::fs::write(&splits, folds).unwrap();
    let mut source = NnunetSource::new(folder.path());
    let (manifest, _) = import_from(&source).unwrap();
    assert_eq!(patients(&manifest, Split::Val), BTreeSet::from(["p4"]));
    assert_eq!((patients(&manifest, Split::Train).len(), manifest.volumes.len()), (3, 8));
    // Who is in neither list is left out, as nnU-Net does.
    source.split = NnunetSplit::Fold { file: None, number: 1 };
    let (manifest, _) = import_from(&source).unwrap();
    assert_eq!(
        (patients(&manifest, Split::Val), manifest.volumes.len()),
        (BTreeSet::from(["p1"]), 3)
    );
    let elsewhere = tempfile::tempdir().unwrap();
    let file = elsewhere.path().join("s.json");
    std::fs::rename(&splits, &file).unwrap();
    source.split = NnunetSplit::Fold { file: Some(file), number: 1 };
    assert_eq!(import_from(&source).unwrap().0, manifest);
    source.split = NnunetSplit::Fold { file: None, number: 0 };
    assert!(import_from(&source).unwrap_err().to_string().contains("splits_final.json"));
}

#[test]
fn folds_that_cannot_be_are_refused_by_name() {
    for (folds, words) in [
        ("[", "no list of folds"),
        ("{}", "no list of folds"),
        ("[]", "fold 0 is not in it"),
        (r#"[{"train": ["p1_a"]}]"#, "`val`"),
        (r#"[{"train": ["p1_a"], "val": [1]}]"#, "no list of folds"),
        (r#"[{"train": ["p1_a", "p9_a"], "val": []}]"#, "`p9_a` in train, and imagesTr has no"),
        (r#"[{"train": ["../../etc/passwd"], "val": []}]"#, "`../../etc/passwd`"),
        (r#"[{"train": ["p1_a", "p1_a"], "val": []}]"#, "`p1_a` twice"),
        (r#"[{"train": ["p1_a"], "val": ["p1_a"]}]"#, "`p1_a` in `train` and in `val`"),
        (r#"[{"train": ["p1_a"], "val": ["p1_b"]}]"#, "patient `p1`"),
    ] {
        let error = refused(|folder| {
            std::fs::write(folder.join("splits_final.json"), folds).unwrap();
        });
        assert!(error.contains("splits_final.json") && error.contains(words), "{words}: {error}");
    }
    let error = refused(|folder| {
        std::fs::remove_file(folder.join("labelsTr/p4_a.nii.gz")).unwrap();
        let folds = r#"[{"train": ["p1_a"], "val": ["p4_a"]}]"#;
        std::fs::write(folder.join("splits_final.json"), folds).unwrap();
    });
    assert!(error.contains("`p4_a`, which has no label"), "{error}");
}

#[test]
fn labels_that_mean_no_class_are_refused_with_file_and_value() {
    let folder = dataset();
    let describe = |labels: &str| {
        let all = r#"{"background": 0, "RV": 1, "LV": 2}"#;
        let text = DESCRIPTION.replace(all, labels);
        std::fs::write(folder.path().join("dataset.json"), text).unwrap();
    };
    label(folder.path(), "labelsTr/p3_a.nii.gz", &geometry(1), |at| [0, 1, 5][at % 3]);
    let mut source = NnunetSource::new(folder.path());
    let told = |source: &NnunetSource, all: &[&str]| {
        let error = import_from(source).unwrap_err().to_string();
        for words in all {
            assert!(error.contains(words), "`{words}` is missing in `{error}`");
        }
    };
    told(&source, &["labelsTr/p3_a.nii.gz", "label 5", "--map 5=0"]);
    describe(r#"{"background": 0, "RV": 1, "LV": 2, "ignore": 5}"#);
    told(&source, &["labelsTr/p3_a.nii.gz", "label 5 is `ignore`", "--map 5=0"]);
    source.map = LabelMap::parse(&["5=2"]).unwrap();
    let labels = |source: &_| volume(&import_from(source).unwrap().1, "p3_a").labels.unwrap();
    assert_eq!(labels(&source), (0..24).map(class).collect::<Vec<u8>>());
    // Values with a gap are classes in their order; 2 is then none of them.
    source.map = LabelMap::default();
    describe(r#"{"background": 0, "RV": 1, "LV": 5}"#);
    told(&source, &["label 2"]);
    source.map = LabelMap::parse(&["2=0"]).unwrap();
    assert_eq!(labels(&source), (0..24).map(class).collect::<Vec<u8>>());
    // Regions need to be made classes of.
    describe(r#"{"background": 0, "heart": [1, 2], "LV": 2}"#);
    told(&source, &["dataset.json", "`heart` is a region", "--classes"]);
    source.classes = vec!["background".to_owned(), "heart".to_owned()];
    source.map = LabelMap::parse(&["2=1", "5=1"]).unwrap();
    assert_eq!(labels(&source), [0, 1, 1].repeat(8));
    source.classes.pop();
    told(&source, &["1 classes"]);
}

#[test]
fn files_that_do_not_fit_are_refused_by_name() {
    let remove =
        |name: &'static str| move |folder: &Path| std::fs::remove_file(folder.join(name)).unwrap();
    let error = refused(remove("imagesTr/p2_a_0001.nii.gz"));
    assert!(error.contains("p2_a_0001.nii.gz") && error.contains("2 channels"), "{error}");
    let error = refused(remove("imagesTr/p2_a_0000.nii.gz"));
    assert!(error.contains("p2_a_0000.nii.gz"), "{error}");
    let error = refused(remove("dataset.json"));
    assert!(error.contains("dataset.json") && error.contains("DatasetNNN"), "{error}");
    let add =
        |name: &'static str| move |folder: &Path| image(folder, name, &geometry(1), |at| at as f32);
    for (name, words) in [
        ("imagesTr/p2_a_0002.nii.gz", "channel 2"),
        ("imagesTr/p2_a.nii.gz", "convert_MSD"),
        ("imagesTr/_0000.nii.gz", "CASE_0000"),
        ("imagesTr/p2_c_0000.nii.gz", "p2_c_0001"),
        ("labelsTr/p2_c.nii.gz", "no image of case `p2_c`"),
        ("labelsTr/p2_a_0000.nii.gz", "no image of case `p2_a_0000`"),
    ] {
        let error = refused(add(name));
        assert!(error.contains("p2_") || error.contains(name), "{error}");
        assert!(error.contains(words), "{words}: {error}");
    }
    for (folder, words) in [("imagesTr", "imagesTr"), ("labelsTr", "labelsTr")] {
        let error = refused(|root| std::fs::remove_dir_all(root.join(folder)).unwrap());
        assert!(error.contains(words), "{error}");
    }
    let error = refused(|root| {
        std::fs::remove_dir_all(root.join("imagesTr")).unwrap();
        std::fs::create_dir(root.join("imagesTr")).unwrap();
        let dicom = [&[0; 128][..], b"DICM"].concat();
        std::fs::write(root.join("imagesTr/IM0001"), dicom).unwrap();
    });
    assert!(error.contains("imagesTr") && error.contains("dcm2niix"), "{error}");
}

#[test]
fn channels_must_lie_on_each_other() {
    let mut other = geometry(1);
    other.shape = [3, 2, 4, 1];
    let second = "imagesTr/p2_a_0001.nii.gz";
    let error = refused(|folder| image(folder, second, &other, |_| 0.0));
    for words in [second, "p2_a_0000.nii.gz", "first channel", "shape"] {
        assert!(error.contains(words), "{error}");
    }
    let damage =
        |bytes: Vec<u8>| refused(|folder| std::fs::write(folder.join(second), bytes).unwrap());
    // A header that tells of 60 GiB in a file of 400 bytes.
    let mut huge = crate::data::nifti::encode(
        &geometry(1),
        crate::data::nifti::Voxels::Floats(&[0.0; 24]),
        false,
    )
    .unwrap();
    for at in 0..3 {
        huge[42 + 2 * at..44 + 2 * at].copy_from_slice(&2500_i16.to_le_bytes());
    }
    for (bytes, words) in [
        (huge, "the file holds"),
        (b"not an image".to_vec(), "no NIfTI"),
        ([&[0; 128][..], b"DICM", &[0; 400]].concat(), "dcm2niix"),
    ] {
        let error = damage(bytes);
        assert!(error.contains(second) && error.contains(words), "{words}: {error}");
    }
}

#[test]
fn one_patient_for_all_is_asked_about() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("dataset.json"), DESCRIPTION).unwrap();
    for case in 0..6 {
        labelled(folder.path(), "Tr", &format!("BRATS_{case:03}"));
    }
    let mut source = NnunetSource::new(folder.path());
    let error = import_from(&source).unwrap_err().to_string();
    assert!(error.contains("one patient, `BRATS`"), "{error}");
    source.patient = Some(Pattern::new("{patient}", "{patient}").unwrap());
    assert_eq!(import_from(&source).unwrap().0.volumes.len(), 6);
}
