//! The importer on trees that are made up here, and on damaged ones.

use super::*;
use crate::data::dataset::Dataset;
use crate::data::import::nifti::tests::{class, geometry, image, imported, label, volume};

/// A patient of five frames; ED is 1, ES is 4.
fn patient(folder: &Path, name: &str, labelled: bool) {
    let info = "ED: 1\nES: 4\nGroup: DCM\nHeight: 184.0\nNbFrame: 5\nWeight: 95.0\n";
    let path = |file: &str| format!("{name}/{name}_{file}.nii.gz");
    image(folder, &path("4d"), &geometry(5), |at| at as f32);
    std::fs::write(folder.join(name).join("Info.cfg"), info).unwrap();
    for frame in [1, 4] {
        let first = (frame - 1) * 24;
        image(folder, &path(&format!("frame0{frame}")), &geometry(1), |at| (first + at) as f32);
        if labelled {
            label(folder, &path(&format!("frame0{frame}_gt")), &geometry(1), class);
        }
    }
}

/// Six labelled patients and one without labels.
fn training(folder: &Path) {
    for number in 1..=6 {
        patient(folder, &format!("patient00{number}"), true);
    }
    patient(folder, "patient007", false);
}

fn tree() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    training(&folder.path().join("training"));
    folder
}

fn import_from(tree: &AcdcTree) -> Result<(Manifest, Dataset), DataError> {
    imported(|sink| futures::executor::block_on(import(tree, sink, &Work::on(2))))
}

/// The import after `change` to a file of the tree must fail; what it says.
fn refused(change: impl FnOnce(&Path)) -> String {
    let folder = tree();
    change(&folder.path().join("training"));
    let mut tree = AcdcTree::new(folder.path());
    tree.all_frames = true;
    // Not by draw: the other frames of patients who judge are not looked at.
    tree.split.val_patients = vec!["patient001".to_owned()];
    tree.split.test_patients = vec!["patient002".to_owned()];
    import_from(&tree).unwrap_err().to_string()
}

fn patients(manifest: &Manifest, split: Split) -> Vec<String> {
    let mut names: Vec<String> =
        manifest.volumes_of(split).map(|(_, volume)| volume.patient.clone()).collect();
    names.dedup();
    names
}

#[test]
fn ed_and_es_come_in_split_by_patient() {
    let folder = tree();
    let (manifest, dataset) = import_from(&AcdcTree::new(folder.path())).unwrap();
    assert_eq!((manifest.name.as_str(), manifest.classes.len()), ("ACDC", 4));
    assert_eq!(manifest.classes[1], "right ventricle");
    assert_eq!(manifest.volumes.len(), 14);
    let counts = Split::ALL.map(|split| patients(&manifest, split).len());
    assert_eq!(counts, [5, 1, 1]);
    assert_eq!(manifest.labelled_patients().len(), 4);
    assert_eq!(patients(&manifest, Split::Train).last().unwrap(), "patient007");
    let es = volume(&dataset, "patient002_frame04");
    assert_eq!((es.shape, es.labels.is_some()), ([4, 3, 2], true));
    // The folder given directly, and again, are the same.
    let direct = AcdcTree::new(folder.path().join("training"));
    assert_eq!(import_from(&direct).unwrap().0, manifest);
}

#[test]
fn other_frames_come_unlabelled_and_of_training_patients_only() {
    let folder = tree();
    let mut tree = AcdcTree::new(folder.path());
    tree.all_frames = true;
    tree.split.val_patients = vec!["patient001".to_owned()];
    tree.split.test_patients = vec!["patient002".to_owned()];
    let (manifest, dataset) = import_from(&tree).unwrap();
    assert_eq!(manifest.volumes.len(), 14 + 5 * 3);
    assert_eq!(
        manifest.labelled_patients(),
        ["patient003", "patient004", "patient005", "patient006"]
    );
    let of = |patient: &str| {
        let all = manifest.volumes.iter().filter(|volume| volume.patient == patient);
        all.map(|volume| (volume.name[11..].to_owned(), volume.labelled)).collect::<Vec<_>>()
    };
    let frame = |number, labelled| (format!("frame0{number}"), labelled);
    assert_eq!(of("patient001"), [frame(1, true), frame(4, true)]);
    let want = [(1, true), (4, true), (2, false), (3, false), (5, false)];
    assert_eq!(of("patient003"), want.map(|(number, labelled)| frame(number, labelled)));
    assert_eq!(volume(&dataset, "patient003_frame05").slices.len(), 24);
}

#[test]
fn labelled_patients_of_testing_are_the_test_split() {
    let folder = tree();
    let testing = folder.path().join("testing");
    patient(&testing, "patient101", true);
    patient(&testing, "patient102", false);
    let mut tree = AcdcTree::new(folder.path());
    let (manifest, _) = import_from(&tree).unwrap();
    assert_eq!(patients(&manifest, Split::Test), ["patient101"]);
    assert_eq!(patients(&manifest, Split::Val).len(), 1);
    assert_eq!(manifest.labelled_patients().len(), 5);
    assert!(patients(&manifest, Split::Train).contains(&"patient102".to_owned()));
    tree.split.test = Some(0.2);
    let error = import_from(&tree).unwrap_err().to_string();
    assert!(error.contains("`testing`") && error.contains("--test"), "{error}");
    tree.split.test = None;
    patient(&testing, "patient001", true);
    let error = import_from(&tree).unwrap_err().to_string();
    assert!(error.contains("`patient001` is in training, too"), "{error}");
    // Without the other folder it is a folder like any other.
    let mut only = AcdcTree::new(&testing);
    only.split.val_patients = vec!["patient101".to_owned()];
    assert_eq!(patients(&import_from(&only).unwrap().0, Split::Val), ["patient101"]);
}

#[test]
fn label_values_are_mapped_or_refused_by_name() {
    let folder = tree();
    let name = "training/patient003/patient003_frame01_gt.nii.gz";
    label(folder.path(), name, &geometry(1), |at| if at == 3 { 85 } else { 2 });
    let mut tree = AcdcTree::new(folder.path());
    let error = import_from(&tree).unwrap_err().to_string();
    for words in [name, "label 85", "--map"] {
        assert!(error.contains(words), "{error}");
    }
    // Several values to one class; one to the background.
    tree.map = LabelMap::parse(&["85=1", "2=1", "1=0", "3=0"]).unwrap();
    tree.classes = vec!["background".to_owned(), "heart".to_owned()];
    let labels = volume(&import_from(&tree).unwrap().1, "patient003_frame01").labels.unwrap();
    assert_eq!(labels, [1; 24]);
    tree.map = LabelMap::parse(&["85=2"]).unwrap();
    assert!(import_from(&tree).unwrap_err().to_string().contains("class 2 of 2"));
}

#[test]
fn what_is_missing_or_odd_is_named() {
    let write = |text: &'static str| {
        move |folder: &Path| std::fs::write(folder.join("patient003/Info.cfg"), text).unwrap()
    };
    for (text, words) in [
        ("", "`ED: FRAME` is missing"),
        ("ED: 1\nNbFrame: 5", "`ES: FRAME` is missing"),
        ("ED: one\nES: 4", "`ED: one`"),
        ("ED: 0\nES: 4", "`ED: 0`"),
        ("ED: 1\nES: -4", "`ES: -4`"),
        ("ED: ../1\nES: 4", "`ED: ../1`"),
        ("ED: 1\nES: 99999999999999999999", "`ES: 9"),
        ("ED: 1\nED: 2\nES: 4", "twice"),
        ("ED: 4\nES: 4", "both frame 4"),
        ("ED: 1\nES: 9\nNbFrame: 5", "frame 9 is none of its 5"),
        ("ED: 1\nES: 4\nNbFrame: 6", "it has 5 frames, Info.cfg says 6"),
        ("ED: 1\nES: 3\nNbFrame: 5", "patient003_frame03.nii.gz"),
    ] {
        let error = refused(write(text));
        assert!(error.contains("patient003") && error.contains(words), "{words}: {error}");
    }
    for file in [
        "Info.cfg",
        "patient003_frame04.nii.gz",
        "patient003_frame04_gt.nii.gz",
        "patient003_4d.nii.gz",
    ] {
        let error = refused(|folder| {
            std::fs::remove_file(folder.join("patient003").join(file)).unwrap();
        });
        assert!(error.contains(file) && error.contains("missing"), "{error}");
    }
    let large = |folder: &Path| {
        std::fs::write(folder.join("patient003/Info.cfg"), vec![b'a'; 1 << 17]).unwrap();
    };
    assert!(refused(large).contains("Info.cfg"));
    let binary =
        |folder: &Path| std::fs::write(folder.join("patient003/Info.cfg"), b"\xff\xfe").unwrap();
    assert!(refused(binary).contains("no text"));
}

#[test]
fn files_of_another_shape_are_named() {
    let mut other = geometry(1);
    other.shape = [3, 2, 4, 1];
    let name = "patient003/patient003_frame04_gt.nii.gz";
    let error = refused(|folder| label(folder, name, &other, class));
    for words in ["patient003_frame04_gt.nii.gz", "patient003_frame04.nii.gz", "shape"] {
        assert!(error.contains(words), "{error}");
    }
    let folder = tempfile::tempdir().unwrap();
    let error = import_from(&AcdcTree::new(folder.path())).unwrap_err().to_string();
    assert!(error.contains("no folder `patientNNN`"), "{error}");
    let mut dicom = vec![0; 128];
    dicom.extend(b"DICM");
    std::fs::write(folder.path().join("IM0001"), dicom).unwrap();
    let error = import_from(&AcdcTree::new(folder.path())).unwrap_err().to_string();
    assert!(error.contains("dcm2niix"), "{error}");
    let error = import_from(&AcdcTree::new(folder.path().join("no"))).unwrap_err().to_string();
    assert!(error.contains("/no`"), "{error}");
}
