//! Synthetic cardiac phantoms: short-axis slices with RV, myocardium and LV, and their labels.
//!
//! For demonstrations and tests, never for a claim about medicine. Shapes follow anatomy loosely:
//! two frames per patient (filled and contracted), slices from base to apex, a right ventricle
//! that wraps around the left one and ends before the apex. What makes the task worth learning is
//! what differs between patients: size, place, orientation, contrast, blur, bias field and noise,
//! and bright or ring-like things that are no heart. A patient is a pure function of (seed,
//! number); patients are drawn on several threads.

mod draw;

use std::sync::Arc;

use super::error::DataError;
use super::manifest::{Manifest, Split};
use super::source::ObjectWriter;
use super::write::{self, NewVolume, Plan, Work, WriteOptions};

/// What to make. The default is the built-in demonstration: made in a second or two.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SynthOptions {
    /// What everything is drawn from.
    pub seed: u64,
    /// Patients to train on; the first ones are "labelled" as far as a run wants.
    pub train_patients: u32,
    /// Patients to choose checkpoints by.
    pub val_patients: u32,
    /// Patients to report on.
    pub test_patients: u32,
    /// Height and width of a patient's slices lie in this range, ends included.
    pub side_px: (u32, u32),
    /// A volume has a number of slices in this range, ends included.
    pub slices: (u32, u32),
    /// Training patients whose labels are kept; the others get none at all.
    pub labelled_patients: Option<u32>,
    /// Steps between the darkest and the brightest pixel of a volume, if intensities are to be whole numbers as a scanner's
    /// are (ACDC's have 240 to 490) and compress like them. The demonstration's are not: pooling meets ties among
    /// them, which rounding then decides.
    pub intensity_steps: Option<u32>,
    /// Rows in a block.
    pub block_rows: u32,
}

impl Default for SynthOptions {
    fn default() -> Self {
        Self {
            seed: 1337,
            train_patients: 30,
            val_patients: 5,
            test_patients: 10,
            side_px: (72, 112),
            slices: (6, 9),
            labelled_patients: None,
            intensity_steps: None,
            block_rows: 8,
        }
    }
}

/// Class names by label value, as in ACDC.
pub const CLASSES: [&str; 4] = ["background", "right ventricle", "myocardium", "left ventricle"];

impl SynthOptions {
    fn check(&self) -> Result<(), DataError> {
        let bad = |why: &str| Err(DataError::Unusable(format!("phantoms: {why}")));
        let total = u64::from(self.train_patients)
            + u64::from(self.val_patients)
            + u64::from(self.test_patients);
        if self.train_patients == 0 || total > 1_000_000 {
            return bad("between one training patient and a million patients in all");
        }
        if self.side_px.0 < 32 || self.side_px.0 > self.side_px.1 || self.side_px.1 > 1024 {
            return bad("slices have sides of 32 to 1024 pixels, the smaller bound first");
        }
        if self.slices.0 < 2 || self.slices.0 > self.slices.1 || self.slices.1 > 64 {
            return bad("volumes have 2 to 64 slices, the smaller bound first");
        }
        Ok(())
    }

    fn split(&self, patient: u32) -> Split {
        if patient < self.train_patients {
            Split::Train
        } else if patient < self.train_patients + self.val_patients {
            Split::Val
        } else {
            Split::Test
        }
    }
}

/// Both frames of patient number `patient`, end-diastole first.
pub fn patient(options: &SynthOptions, patient: u32) -> [NewVolume; 2] {
    let split = options.split(patient);
    let keep = options.labelled_patients.is_none_or(|labelled| patient < labelled);
    let heart = draw::Heart::draw(options, patient);
    [draw::Frame::Diastole, draw::Frame::Systole].map(|frame| {
        let mut slices = heart.slices(frame);
        if split == Split::Train && !keep {
            for slice in &mut slices {
                slice.label = None;
            }
        }
        NewVolume {
            name: format!("phantom{patient:04}_{}", frame.name()),
            patient: format!("phantom{patient:04}"),
            split,
            spacing_mm: Some(heart.spacing_mm()),
            affine: None,
            slices,
        }
    })
}

/// Makes a dataset of phantoms; goes on with one that was begun with the same options.
pub async fn write(
    sink: Arc<dyn ObjectWriter>,
    options: &SynthOptions,
    work: &Work,
) -> Result<Manifest, DataError> {
    options.check()?;
    let mut layout = WriteOptions::new("cardiac phantoms", &CLASSES);
    layout.block_rows = options.block_rows;
    layout.zstd_level = 1;
    let patients = options.train_patients + options.val_patients + options.test_patients;
    let plan = Plan::new([("phantoms", format!("{options:?}"))]);
    let options = options.clone();
    let draw = move |number: &u32| Ok(patient(&options, *number).to_vec());
    write::write(sink, &layout.sized(work), plan, (0..patients).collect(), draw, work).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::source::MemoryObjects;

    fn small() -> SynthOptions {
        SynthOptions { train_patients: 4, val_patients: 1, test_patients: 1, ..Default::default() }
    }

    #[test]
    fn patients_are_whole_plausible_and_different() {
        let options = small();
        let volumes = patient(&options, 0);
        assert_eq!(volumes, patient(&options, 0));
        assert_ne!(volumes[0].slices, patient(&options, 1)[0].slices);
        let areas = volumes.each_ref().map(|volume| {
            let mut areas = [0_usize; 4];
            for slice in &volume.slices {
                assert!(slice.image.iter().all(|value| (0.0..=1.0).contains(value)));
                for class in slice.label.as_ref().unwrap() {
                    areas[usize::from(*class)] += 1;
                }
            }
            areas
        });
        assert!(areas.iter().flatten().all(|area| *area > 50), "{areas:?}");
        assert!(areas[0][3] > areas[1][3], "the left ventricle contracts: {areas:?}");
    }

    #[test]
    fn datasets_do_not_depend_on_threads() {
        let made = [1, 3].map(|threads| {
            let sink = Arc::new(MemoryObjects::default());
            let options = SynthOptions { labelled_patients: Some(2), ..small() };
            let work = Work::on(threads);
            let write = write(sink.clone(), &options, &work);
            (futures::executor::block_on(write).unwrap(), sink)
        });
        assert_eq!(made[0].0, made[1].0);
        for path in made[0].1.paths() {
            assert_eq!(made[0].1.bytes(&path), made[1].1.bytes(&path));
        }
        assert_eq!(made[0].0.labelled_patients(), ["phantom0000", "phantom0001"]);
    }
}
