//! Validation during training: volumes spread over the ranks, scored by `eval`'s own code.

use std::cell::RefCell;
use std::collections::BTreeMap;

use tch::Tensor;

use super::TrainerError;
use super::orders::{Orders, emit};
use super::pictures::{self, Shot};
use super::setup::Trainer;
use crate::data::{Dataset, Split, Volume as DataVolume, augment};
use crate::eval::report::{Record, ValidationRecord};
use crate::eval::{
    CaseScores, DistanceUnit, EmptyPolicy, EvalSettings, Segmenter, Summary, Volume, Zoom,
    evaluate_volume,
};
use crate::model::{ModelError, Network};
use crate::proto::{Doing, TrainerEvent};

/// Slices of a volume that go through the network together.
pub(super) const BATCH: usize = 8;

/// The network as `eval` sees it: decoder 1's main output, arg-max over classes.
pub(super) struct ArgMax<'a>(pub(super) &'a Network);

impl Segmenter for ArgMax<'_> {
    type Error = ModelError;

    fn channels(&self) -> usize {
        self.0.config().in_channels as usize
    }

    /// `[n, C, h, w]` intensities -> `[n, h, w]` classes.
    fn segment(
        &mut self,
        slices: &[f32],
        n: usize,
        h: usize,
        w: usize,
    ) -> Result<Vec<u8>, ModelError> {
        let x = Tensor::f_from_slice(slices)?.f_view([
            n as i64,
            self.0.config().in_channels,
            h as i64,
            w as i64,
        ])?;
        let x = x.f_to_device(self.0.params().device())?;
        let classes = self.0.forward_eval(&x)?.f_argmax(1, false)?;
        let classes = classes.f_to_kind(tch::Kind::Uint8)?.f_to_device(tch::Device::Cpu)?;
        Ok(Vec::<u8>::try_from(&classes.f_contiguous()?.f_view([-1])?)?)
    }
}

pub(super) fn zoom() -> Zoom<'static> {
    Zoom { image: &augment::zoom::<f32>, label: &augment::zoom::<u8> }
}

pub(super) fn settings(t: &Trainer) -> EvalSettings {
    EvalSettings {
        patch: t.patch,
        classes: u8::try_from(t.nets.main().config().classes).unwrap_or(u8::MAX),
        batch: BATCH,
        unit: DistanceUnit::Voxel,
        policy: EmptyPolicy::default(),
    }
}

/// The foreground classes, class 1 first.
pub fn class_names(t: &Trainer) -> Vec<String> {
    t.dataset.manifest().classes.iter().skip(1).cloned().collect()
}

/// Scores the labelled volumes of a split whose place in it is `wanted`; `scored` is called after
/// each with that place, and may end it.
pub(super) fn score_volumes(
    net: &Network,
    dataset: &Dataset,
    split: Split,
    settings: &EvalSettings,
    wanted: impl Fn(usize) -> bool,
    scored: impl Fn(usize, &DataVolume) -> Result<(), TrainerError>,
) -> Result<Vec<CaseScores>, TrainerError> {
    let mut cases = Vec::new();
    for (place, id) in dataset.volumes(split).into_iter().enumerate().filter(|(i, _)| wanted(*i)) {
        let volume = dataset.load_volume(id)?;
        let Some(label) = &volume.labels else { continue };
        let scores = evaluate_volume(&mut ArgMax(net), seen(&volume, label), settings, zoom())
            .map_err(|e| TrainerError::Report(e.to_string()))?;
        cases.push(scores);
        scored(place, &volume)?;
    }
    Ok(cases)
}

/// Scores every validation volume, each on one rank; every rank ends with the same summary.
pub fn validate(t: &mut Trainer, orders: &Orders) -> Result<(), TrainerError> {
    let _validating =
        tracing::info_span!("validation", step = crate::telemetry::number(t.step.0)).entered();
    // The running statistics that count are rank 0's (per-rank batch norm).
    for (_, buffer) in t.nets.main().params().buffers() {
        t.ranks.copy_from_first(buffer)?;
    }
    let settings = settings(t);
    let shots = RefCell::new(Vec::new());
    let mine = score_volumes(
        t.nets.main(),
        &t.dataset,
        Split::Val,
        &settings,
        |i| i % t.world.0 as usize == t.rank.0 as usize,
        |place, volume| {
            if t.rank.0 == 0 && shots.borrow().len() < t.config.telemetry.pictures as usize {
                shots.borrow_mut().extend(Shot::of(place, volume));
            }
            emit(&TrainerEvent::Busy { step: t.step, doing: Doing::Validating });
            Ok(orders.still_in()?)
        },
    )?;
    let bytes = serde_json::to_vec(&mine).map_err(|e| TrainerError::Report(e.to_string()))?;
    let mut parts: Vec<Vec<CaseScores>> = Vec::new();
    for part in t.ranks.gather(&bytes)? {
        parts.push(serde_json::from_slice(&part).map_err(|e| TrainerError::Report(e.to_string()))?);
    }
    let names = class_names(t);
    let (pictures, bytes) = pictures::leave(t, shots.into_inner()).into_iter().unzip();
    t.pictures = bytes;
    let summary =
        Summary::of(parts, &names, &settings).map_err(|e| TrainerError::Report(e.to_string()))?;
    let dice: Vec<f64> = summary.classes.iter().map(|c| c.means.dice.unwrap_or(f64::NAN)).collect();
    let mean_dice = summary.mean.dice.unwrap_or(f64::NAN);
    let dice: Vec<(String, f64)> = names.into_iter().zip(dice).collect();
    let class_dice: BTreeMap<String, f64> = dice.iter().cloned().collect();
    t.history.push(Record::Validation(ValidationRecord { step: t.step.0, mean_dice, class_dice }));
    if t.rank.0 == 0 {
        emit(&TrainerEvent::Validation { step: t.step, dice, mean_dice, pictures });
    }
    t.summary = Some(summary);
    Ok(())
}

fn seen<'a>(volume: &'a DataVolume, label: &'a [u8]) -> Volume<'a> {
    Volume {
        case: &volume.name,
        image: &volume.slices,
        label,
        shape: volume.shape,
        spacing_mm: volume.spacing_mm.unwrap_or([1.0; 3]),
    }
}
