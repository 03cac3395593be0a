//! The importer on folders that are made up here, and on damaged ones.

use std::path::Path;

use super::*;
use crate::data::dataset::{Dataset, Volume};
use crate::data::nifti::{Geometry, Voxels, write_file};
use crate::data::report::verify;
use crate::data::source::MemoryObjects;

use super::super::Pattern;

/// 2 x 3 x 4 voxels, thick along z, the axes of the grid turned a little.
pub(in crate::data::import) fn geometry(frames: usize) -> Geometry {
    Geometry {
        shape: [2, 3, 4, frames],
        spacing_mm: Some([0.5, 0.75, 8.0]),
        affine: Some([
            [0.5, 0.01, 0.02, -10.0],
            [0.03, 0.75, 0.04, -20.0],
            [0.05, 0.06, 8.0, -30.0],
            [0.0, 0.0, 0.0, 1.0],
        ]),
    }
}

pub(in crate::data::import) fn image(
    folder: &Path,
    name: &str,
    geometry: &Geometry,
    value: impl Fn(usize) -> f32,
) {
    let count = geometry.shape.iter().product();
    let voxels: Vec<f32> = (0..count).map(value).collect();
    put(folder, name, geometry, Voxels::Floats(&voxels));
}

pub(in crate::data::import) fn label(
    folder: &Path,
    name: &str,
    geometry: &Geometry,
    value: impl Fn(usize) -> u8,
) {
    let count = geometry.shape.iter().product();
    let voxels: Vec<u8> = (0..count).map(value).collect();
    put(folder, name, geometry, Voxels::Labels(&voxels));
}

fn put(folder: &Path, name: &str, geometry: &Geometry, voxels: Voxels<'_>) {
    let path = folder.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    write_file(&path, geometry, voxels).unwrap();
}

pub(in crate::data::import) fn class(at: usize) -> u8 {
    (at % 3) as u8
}

/// Ten patients with two cases each, labelled, and two without labels.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for patient in 0..12 {
        for case in ["a", "b"] {
            let name = format!("p{patient:02}_{case}");
            let path = format!("images/{name}_img.nii.gz");
            image(folder.path(), &path, &geometry(1), |at| (at * (patient + 1)) as f32);
            if patient % 6 != 0 {
                label(folder.path(), &format!("labels/{name}.nii.gz"), &geometry(1), class);
            }
        }
    }
    folder
}

fn source(folder: &Path) -> NiftiSource {
    let images = Pattern::new("images/{case}_img.nii.gz", "{case}").unwrap();
    NiftiSource {
        labels: Some(Pattern::new("labels/{case}.nii.gz", "{case}").unwrap()),
        classes: class_names("3").unwrap(),
        ..NiftiSource::new(folder, images)
    }
}

fn import_from(source: &NiftiSource) -> Result<(Manifest, Dataset), DataError> {
    imported(|sink| futures::executor::block_on(import(source, sink, &Work::on(2))))
}

/// What an import makes, opened and verified.
pub(in crate::data::import) fn imported(
    import: impl FnOnce(Arc<dyn ObjectWriter>) -> Result<Manifest, DataError>,
) -> Result<(Manifest, Dataset), DataError> {
    let sink = Arc::new(MemoryObjects::default());
    let manifest = import(sink.clone())?;
    let dataset = Dataset::open(sink)?;
    assert!(verify(&dataset, 1).is_sound());
    Ok((manifest, dataset))
}

pub(in crate::data::import) fn volume(dataset: &Dataset, name: &str) -> Volume {
    let all = Split::ALL.into_iter().flat_map(|split| dataset.volumes(split));
    let found = all.map(|id| dataset.load_volume(id).unwrap()).find(|volume| volume.name == name);
    found.unwrap_or_else(|| panic!("no volume {name}"))
}

/// An import of `folder` with a change to the usual choices.
fn refused(folder: &Path, change: impl FnOnce(&mut NiftiSource)) -> String {
    let mut source = source(folder);
    change(&mut source);
    import_from(&source).unwrap_err().to_string()
}

#[test]
fn cases_come_in_whole_and_patients_stay_together() {
    let folder = folder();
    let (manifest, dataset) = import_from(&source(folder.path())).unwrap();
    assert_eq!(manifest.classes, ["background", "class 1", "class 2"]);
    assert_eq!(manifest.volumes.len(), 24);
    let patients = |split| {
        let names = manifest.volumes_of(split).map(|(_, volume)| volume.patient.clone());
        names.collect::<std::collections::BTreeSet<_>>()
    };
    assert_eq!((patients(Split::Val).len(), patients(Split::Test).len()), (1, 2));
    assert_eq!(patients(Split::Train).len(), 9);
    assert!(patients(Split::Train).contains("p00") && patients(Split::Train).contains("p06"));
    assert_eq!(manifest.labelled_patients().len(), 7);
    assert!(manifest.labelled_patients().is_sorted());
    assert_eq!(manifest.pools(7).unwrap(), (0..7 * 8, 7 * 8..9 * 8));
    // Again is the same; another seed divides otherwise.
    let (again, _) = import_from(&source(folder.path())).unwrap();
    assert_eq!(again, manifest);
    let mut other = source(folder.path());
    other.split = SplitRule::Fractions { val: 0.3, test: 0.3, seed: 2 };
    assert_ne!(import_from(&other).unwrap().0.volumes, manifest.volumes);

    let volume = volume(&dataset, "p01_b");
    assert_eq!((volume.shape, volume.spacing_mm), ([4, 3, 2], Some([8.0, 0.75, 0.5])));
    let want: Vec<f32> = (0..24).map(|at| (f64::from(at) / 23.0) as f32).collect();
    assert_eq!(volume.slices, want);
    assert_eq!(volume.labels.unwrap(), (0..24).map(class).collect::<Vec<_>>());
}

#[test]
fn lists_decide_where_patients_go() {
    let folder = folder();
    let mut source = source(folder.path());
    source.split = SplitRule::Patients { val: vec!["p03".into()], test: vec!["p01".into()] };
    let (manifest, _) = import_from(&source).unwrap();
    for (split, patient) in [(Split::Val, "p03"), (Split::Test, "p01")] {
        let mut of = manifest.volumes_of(split).map(|(_, volume)| volume.patient.as_str());
        assert!(of.by_ref().all(|name| name == patient));
        assert_eq!(manifest.volumes_of(split).count(), 2);
    }
    source.split = SplitRule::Patients { val: vec!["p06".into()], test: Vec::new() };
    assert!(import_from(&source).unwrap_err().to_string().contains("p06"));
}

/// The value of voxel (x, y, z) of [`geometry`] as an index.
fn at(x: usize, y: usize, z: usize) -> usize {
    x + 2 * (y + 3 * z)
}

#[test]
fn slices_are_cut_across_the_axis_asked_for() {
    let folder = folder();
    for (axis, order) in [("auto", [2, 1, 0]), ("2", [2, 1, 0]), ("1", [1, 2, 0]), ("0", [0, 2, 1])]
    {
        let mut source = source(folder.path());
        source.axis = axis.parse().unwrap();
        let volume = volume(&import_from(&source).unwrap().1, "p00_a");
        let grid = geometry(1);
        assert_eq!(volume.shape, order.map(|axis| grid.shape[axis]));
        assert_eq!(volume.spacing_mm, Some(order.map(|axis| grid.spacing_mm.unwrap()[axis])));
        let [_, h, w] = volume.shape;
        for (index, value) in volume.slices.iter().enumerate() {
            let place = [index / (h * w), index / w % h, index % w];
            let mut xyz = [0; 3];
            for (axis, at) in order.into_iter().zip(place) {
                xyz[axis] = at;
            }
            assert_eq!(*value, (at(xyz[0], xyz[1], xyz[2]) as f64 / 23.0) as f32, "{axis}");
            // Both indices lead to the same place in the patient.
            let (ours, theirs) = (volume.affine.unwrap(), grid.affine.unwrap());
            for row in 0..3 {
                let place_of = |affine: [[f64; 4]; 4], index: [usize; 3]| {
                    let sum: f64 = (0..3).map(|at| affine[row][at] * index[at] as f64).sum();
                    sum + affine[row][3]
                };
                let gap = place_of(ours, place) - place_of(theirs, xyz);
                assert!(gap.abs() < 1e-5, "{gap}");
            }
        }
    }
}

#[test]
fn the_automatic_axis_is_the_thick_one() {
    let order = |spacing: Option<[f64; 3]>, shape: [usize; 4]| {
        SliceAxis::Auto.order(&Geometry { shape, spacing_mm: spacing, affine: None })
    };
    let shape = [9, 9, 9, 1];
    assert_eq!(order(Some([5.0, 1.0, 1.0]), shape), Ok([0, 2, 1]));
    assert_eq!(order(Some([1.0, 5.0, 1.0]), shape), Ok([1, 2, 0]));
    assert_eq!(order(Some([1.0, 1.0, 1.0]), shape), Ok([2, 1, 0]));
    assert_eq!(order(Some([1.000_01, 1.0, 1.0]), shape), Ok([2, 1, 0]));
    assert_eq!(order(Some([5.0, 1.0, 1.0]), [9, 9, 1, 1]), Ok([2, 1, 0]));
    assert!(order(None, shape).is_err());
    assert_eq!(SliceAxis::Given(1).order(&geometry(1)), Ok([1, 2, 0]));
    assert!("3".parse::<SliceAxis>().is_err() && SliceAxis::Given(3).order(&geometry(1)).is_err());
}

#[test]
fn every_frame_is_a_volume() {
    let folder = tempfile::tempdir().unwrap();
    for patient in ["p1", "p2", "p3"] {
        image(folder.path(), &format!("{patient}_4d.nii"), &geometry(3), |at| at as f32);
        label(folder.path(), &format!("{patient}_4d_gt.nii"), &geometry(3), |at| {
            u8::from(at >= 24)
        });
    }
    let images = Pattern::new("{case}.nii", "{case}").unwrap();
    let source = NiftiSource {
        // Fits a part of what the other pattern fits, and means it.
        labels: Some(Pattern::new("{case}_gt.nii", "{case}").unwrap()),
        classes: class_names("background,heart").unwrap(),
        ..NiftiSource::new(folder.path(), images)
    };
    let (manifest, dataset) = import_from(&source).unwrap();
    assert_eq!(manifest.volumes.len(), 9);
    for (name, class) in [("p2_4d_frame01", 0), ("p2_4d_frame02", 1), ("p2_4d_frame03", 1)] {
        let volume = volume(&dataset, name);
        assert_eq!(volume.shape, [4, 3, 2]);
        assert_eq!((volume.slices[0], volume.slices[23]), (0.0, 1.0), "scaled by frame");
        assert_eq!(volume.labels.unwrap(), [class; 24]);
    }
    assert!(manifest.volumes.iter().all(|volume| volume.patient.len() == 2));
}

#[test]
fn intensities_are_scaled_as_asked_for() {
    let scaled = |text: &str, values: &[f32]| {
        let mut values = values.to_vec();
        text.parse::<Intensity>().unwrap().apply(&mut values);
        values
    };
    assert_eq!(scaled("minmax", &[-100.0, 0.0, 300.0]), [0.0, 0.25, 1.0]);
    assert_eq!(scaled("minmax", &[f32::MIN, 0.0, f32::MAX]), [0.0, 0.5, 1.0]);
    assert_eq!(scaled("window:-100:300", &[-500.0, 0.0, 100.0, 301.0]), [0.0, 0.25, 0.5, 1.0]);
    assert_eq!(scaled("zscore", &[1.0, 3.0]), [-1.0, 1.0]);
    for constant in ["minmax", "zscore"] {
        assert_eq!(scaled(constant, &[7.0, 7.0]), [0.0, 0.0]);
    }
    for text in ["window", "window:1", "window:2:1", "window:1:1", "window:a:b", "window:0:inf"] {
        assert!(text.parse::<Intensity>().is_err(), "{text}");
    }
    let folder = folder();
    let mut source = source(folder.path());
    source.intensity = Intensity::Window { low: 1.0, high: 11.0 };
    let volume = volume(&import_from(&source).unwrap().1, "p00_a");
    assert_eq!((volume.slices[0], volume.slices[6], volume.slices[20]), (0.0, 0.5, 1.0));
}

#[test]
fn label_values_are_mapped_or_refused_by_name() {
    let folder = folder();
    let odd = |at: usize| if at == 5 { -1.0 } else { f32::from(class(at)) };
    image(folder.path(), "labels/p02_a.nii.gz", &geometry(1), odd);
    let error = refused(folder.path(), |_| {});
    assert!(error.contains("p02_a.nii.gz") && error.contains("label -1"), "{error}");
    let mut mapped = source(folder.path());
    mapped.map = LabelMap::parse(&["-1=1", "2=0"]).unwrap();
    let labels = volume(&import_from(&mapped).unwrap().1, "p02_a").labels.unwrap();
    let want = |at: usize| if at == 5 { 1 } else { [0, 1, 0][usize::from(class(at))] };
    assert_eq!(labels, (0..24).map(want).collect::<Vec<u8>>());
    for value in [0.5, f32::NAN, 3.0, 256.0, 1e30] {
        image(folder.path(), "labels/p02_a.nii.gz", &geometry(1), |_| value);
        let error = refused(folder.path(), |_| {});
        assert!(error.contains("p02_a.nii.gz") && error.contains("label "), "{error}");
    }
    assert!(refused(folder.path(), |s| s.map = LabelMap::parse(&["9=3"]).unwrap()).contains("9"));
    for pair in ["1", "1=", "=1", "a=1", "1=256", "1=-1", "0.5=1"] {
        assert!(LabelMap::parse(&[pair]).is_err(), "{pair}");
    }
    assert!(LabelMap::parse(&["1=1", "1=2"]).unwrap_err().to_string().contains("twice"));
    let error = LabelMap::parse(&["255=ignore"]).unwrap_err().to_string();
    assert!(error.contains("no ignore label"), "{error}");
}

#[test]
fn a_label_that_lies_elsewhere_is_refused_with_both_names() {
    let folder = folder();
    type Change = fn(&mut Geometry);
    let changes: [(Change, &str); 4] = [
        (|g| g.shape = [3, 2, 4, 1], "shape [3, 2, 4, 1]"),
        (|g| g.shape = [2, 3, 2, 2], "shape [2, 3, 2, 2]"),
        (|g| g.spacing_mm = Some([0.5, 0.75, 8.01]), "spacing"),
        (|g| g.affine.as_mut().unwrap()[1][3] += 0.5, "row 1, column 3"),
    ];
    for (change, words) in changes {
        let mut other = geometry(1);
        change(&mut other);
        label(folder.path(), "labels/p02_a.nii.gz", &other, class);
        let error = refused(folder.path(), |_| {});
        for words in [words, "labels/p02_a.nii.gz", "images/p02_a_img.nii.gz"] {
            assert!(error.contains(words), "`{words}` is missing in `{error}`");
        }
    }
    // What rounding does to a header is no difference; what a file leaves out is none either.
    let close: [Change; 2] = [|g| g.affine.as_mut().unwrap()[1][3] += 0.0005, |g| g.affine = None];
    for change in close {
        let mut other = geometry(1);
        change(&mut other);
        label(folder.path(), "labels/p02_a.nii.gz", &other, class);
        import_from(&source(folder.path())).unwrap();
    }
}

/// ACDC's files have an affine of unit spacing, which says nothing.
#[test]
fn an_orientation_that_the_files_own_spacing_contradicts_is_passed_over() {
    let folder = folder();
    let mut other = geometry(1);
    other.affine =
        Some([0, 1, 2, 3].map(|at| [0, 1, 2, 3].map(|to| f64::from(u8::from(at == to)))));
    label(folder.path(), "labels/p02_a.nii.gz", &other, class);
    let dataset = import_from(&source(folder.path())).unwrap().1;
    assert!(volume(&dataset, "p02_a").affine.is_some());
    image(folder.path(), "images/p02_a_img.nii.gz", &other, |at| at as f32);
    let dataset = import_from(&source(folder.path())).unwrap().1;
    assert_eq!(volume(&dataset, "p02_a").affine, None);
}

#[test]
fn damaged_files_end_as_errors_that_name_them() {
    let folder = folder();
    for name in ["images/p04_b_img.nii.gz", "labels/p04_b.nii.gz"] {
        let path = folder.path().join(name);
        let whole = std::fs::read(&path).unwrap();
        let mut dicom = vec![0; 128];
        dicom.extend(b"DICM and more");
        for (bytes, words) in
            [(&whole[..whole.len() - 3], "damaged"), (&dicom, "dcm2niix"), (&b"x"[..], "no NIfTI")]
        {
            std::fs::write(&path, bytes).unwrap();
            let error = refused(folder.path(), |_| {});
            assert!(error.contains(name) && error.contains(words), "{error}");
        }
        std::fs::write(&path, whole).unwrap();
    }
    let nan = |at| if at == 3 { f32::NAN } else { 1.0 };
    image(folder.path(), "images/p04_b_img.nii.gz", &geometry(1), nan);
    let error = refused(folder.path(), |_| {});
    assert!(error.contains("p04_b_img.nii.gz") && error.contains("NaN"), "{error}");
}

#[test]
fn patterns_that_do_not_fit_the_folder_are_refused() {
    let folder = folder();
    let pattern = |text: &str| Pattern::new(text, "{case}").unwrap();
    let error = refused(folder.path(), |s| s.images = pattern("imgs/{case}.nii"));
    assert!(error.contains("imgs/{case}.nii"), "{error}");
    let error = refused(folder.path(), |s| s.labels = Some(pattern("{case}/label.nii")));
    assert!(error.contains("{case}/label.nii"), "{error}");
    let error = refused(folder.path(), |s| s.labels = Some(pattern("images/{case}_img.nii.gz")));
    assert!(error.contains("both"), "{error}");
    assert!(refused(folder.path(), |s| s.classes.clear()).contains("classes"));
    assert!(refused(folder.path(), |s| s.folder.push("none")).contains("none"));
    // A label without an image, and two images of one case.
    label(folder.path(), "labels/p99_a.nii.gz", &geometry(1), class);
    assert!(refused(folder.path(), |_| {}).contains("p99_a"));
    std::fs::remove_file(folder.path().join("labels/p99_a.nii.gz")).unwrap();
    image(folder.path(), "images/p01_a_img.nii", &geometry(1), |_| 0.0);
    let error = refused(folder.path(), |s| s.images = pattern("images/{case}_img.nii*"));
    assert!(error.contains("`p01_a`"), "{error}");
    // A folder as it comes from the scanner.
    let mut dicom = vec![0; 128];
    dicom.extend(b"DICM");
    let scans = tempfile::tempdir().unwrap();
    std::fs::write(scans.path().join("IM0001"), dicom).unwrap();
    let error = refused(scans.path(), |s| s.images = pattern("{case}.nii"));
    assert!(error.contains("dcm2niix"), "{error}");
}

#[test]
fn the_patient_is_in_the_name() {
    let folder = tempfile::tempdir().unwrap();
    for case in ["BRATS_001", "BRATS_002", "._BRATS_002"] {
        image(folder.path(), &format!("{case}.nii"), &geometry(1), |at| at as f32);
    }
    let images = Pattern::new("{case}.nii", "{case}").unwrap();
    let mut source = NiftiSource::new(folder.path(), images);
    let error = import_from(&source).unwrap_err().to_string();
    assert!(error.contains("one patient, `BRATS`"), "{error}");
    source.patient = Some(Pattern::new("{patient}", "{patient}").unwrap());
    let (manifest, _) = import_from(&source).unwrap();
    let patients: Vec<_> = manifest.volumes.iter().map(|volume| &volume.patient).collect();
    assert_eq!(patients, ["BRATS_001", "BRATS_002"]);
    assert!(manifest.volumes.iter().all(|volume| !volume.labelled && volume.split == Split::Train));
    assert_eq!(manifest.classes, ["background", "class 1"]);
    source.patient = Some(Pattern::new("{patient}-*", "{patient}").unwrap());
    assert!(import_from(&source).unwrap_err().to_string().contains("BRATS_001"));
}

#[test]
fn class_names_are_names_or_a_number() {
    assert_eq!(class_names("background, liver").unwrap(), ["background", "liver"]);
    assert_eq!(class_names("3").unwrap(), ["background", "class 1", "class 2"]);
    for text in ["", "a,,b", "a,b,a", "1", "257"] {
        assert!(class_names(text).is_err(), "{text}");
    }
}
