//! Pictures: a slice with the truth beside the prediction, for whoever watches a run and for its report.
//!
//! Those of a validation are left in the run's folder, where the coordinator's page finds them. They name no case.

use super::TrainerError;
use super::orders::emit;
use super::setup::Trainer;
use super::validate::{ArgMax, settings, zoom};
use crate::data::{Split, Volume, VolumeId};
use crate::eval::report::ReportOverlay;
use crate::eval::{Summary, overlay, segment_volume};
use crate::page;
use crate::proto::{Doing, Picture, TrainerEvent};
use crate::store::StoreError;

/// Validations whose pictures stay.
const KEPT: u64 = 20;
/// Cases that the report shows of the best, and of the worst.
const EXTREMES: usize = 2;

/// The middle slice of a volume that was scored just now: kept, so that a picture asks no store for anything.
#[derive(Debug)]
pub struct Shot {
    /// Its volume's place in the split.
    place: usize,
    slice: usize,
    /// `[C, H, W]`.
    image: Vec<f32>,
    /// `[H, W]`.
    truth: Vec<u8>,
    size: (usize, usize),
}

impl Shot {
    /// None where the volume has no labels.
    pub fn of(place: usize, volume: &Volume) -> Option<Self> {
        let label = volume.labels.as_ref()?;
        let [d, h, w] = volume.shape;
        let slice = d / 2;
        let (values, pixels) = (volume.channels * h * w, h * w);
        Some(Self {
            place,
            slice,
            image: volume.slices.get(slice * values..(slice + 1) * values)?.to_vec(),
            truth: label.get(slice * pixels..(slice + 1) * pixels)?.to_vec(),
            size: (h, w),
        })
    }

    /// Truth beside what decoder 1 sees now, as PNG. Only that slice is segmented.
    fn draw(&self, t: &Trainer) -> Result<Vec<u8>, TrainerError> {
        let fail = |e: &dyn std::fmt::Display| TrainerError::Report(e.to_string());
        let (h, w) = self.size;
        let net = &mut ArgMax(t.nets.main());
        let prediction = segment_volume(net, "", &self.image, [1, h, w], &settings(t), zoom())
            .map_err(|e| fail(&e))?;
        emit(&TrainerEvent::Busy { step: t.step, doing: Doing::Validating });
        // Its first channel is what is seen.
        overlay::overlay_png(&self.image[..h * w], &self.truth, &prediction, self.size)
            .map_err(|e| fail(&e))
    }
}

/// Rank 0 leaves pictures of a validation in the run's folder; the result has them once more, as PNG. The others wait for it
/// in the next collective: so it waits for no store, and what fails is warned of.
pub fn leave(t: &mut Trainer, shots: Vec<Shot>) -> Vec<(Picture, Vec<u8>)> {
    let mut pictures = Vec::new();
    for (number, shot) in shots.iter().enumerate() {
        let path = format!("{}/{}", page::PICTURES, page::picture_name(t.step.0, number));
        let caption = format!("volume {}, slice {}", shot.place + 1, shot.slice);
        match shot.draw(t) {
            Ok(png) => pictures.push((Picture { path, caption }, png)),
            Err(error) => tracing::warn!(%error, "a picture is not made"),
        }
    }
    if t.writing_pictures.as_ref().is_some_and(|writing| !writing.is_finished()) {
        tracing::warn!("pictures are not written: the store is behind");
        return Vec::new();
    }
    if !pictures.is_empty() {
        let old = t.step.0.checked_sub(KEPT * t.config.validate.every);
        let old = old.map(|step| (0..pictures.len()).map(move |n| page::picture_name(step, n)));
        let (run, new) = (t.run.clone(), pictures.clone());
        t.writing_pictures = Some(t.runtime.spawn(async move {
            for (picture, png) in new {
                if let Err(error) = run.put(&picture.path, png.into()).await {
                    tracing::warn!(%error, "a picture is not written");
                    return;
                }
            }
            for name in old.into_iter().flatten() {
                match run.delete(&format!("{}/{name}", page::PICTURES)).await {
                    Ok(()) | Err(StoreError::NotFound { .. }) => {}
                    Err(error) => return tracing::debug!(%error, "an old picture is not removed"),
                }
            }
        }));
    }
    pictures
}

/// A volume's picture, and the name of its case.
fn middle(t: &Trainer, id: VolumeId) -> Result<Option<(Vec<u8>, String, usize)>, TrainerError> {
    let volume = t.dataset.load_volume(id)?;
    let Some(shot) = Shot::of(0, &volume) else { return Ok(None) };
    Ok(Some((shot.draw(t)?, volume.name, shot.slice)))
}

/// The report's: of the first validation volumes.
pub fn of_first(t: &Trainer) -> Result<Vec<ReportOverlay>, TrainerError> {
    let wanted = t.config.telemetry.pictures as usize;
    let volumes = t.dataset.volumes(Split::Val).into_iter().take(wanted);
    let pictures = volumes.map(|id| middle(t, id)).collect::<Result<Vec<_>, _>>()?;
    let overlay =
        |(png, case, slice)| ReportOverlay { caption: format!("{case}, slice {slice}"), png };
    Ok(pictures.into_iter().flatten().map(overlay).collect())
}

/// The report's: of the cases that came out best, and worst.
pub fn of_extremes(
    t: &Trainer,
    summary: &Summary,
) -> Result<[Vec<ReportOverlay>; 2], TrainerError> {
    let mut cases: Vec<(f64, &str)> = summary
        .cases
        .iter()
        .filter_map(|case| Some((case.mean_dice()?, case.case.as_str())))
        .collect();
    cases.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
    // No case is both.
    let count = EXTREMES.min(cases.len() / 2);
    let worst = cases.iter().rev().take(count);
    Ok([of_cases(t, cases.iter().take(count))?, of_cases(t, worst)?])
}

fn of_cases<'a>(
    t: &Trainer,
    cases: impl Iterator<Item = &'a (f64, &'a str)>,
) -> Result<Vec<ReportOverlay>, TrainerError> {
    let mut overlays = Vec::new();
    for (dice, case) in cases {
        for id in t.dataset.volumes(Split::Val) {
            if t.dataset.volume_entry(id)?.name == *case
                && let Some((png, _, slice)) = middle(t, id)?
            {
                let caption = format!("{case}, slice {slice}: Dice {:.1} %", 100.0 * dice);
                overlays.push(ReportOverlay { caption, png });
            }
        }
    }
    Ok(overlays)
}
