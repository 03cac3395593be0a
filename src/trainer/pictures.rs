//! Pictures: a slice with the truth beside the prediction, for whoever watches a run and for its report.
//!
//! Those of a validation are left in the run's folder, where the coordinator's page finds them. They name no case.

use super::TrainerError;
use super::orders::emit;
use super::setup::Trainer;
use super::validate::{ArgMax, settings, zoom};
use crate::data::{Split, VolumeId};
use crate::eval::report::ReportOverlay;
use crate::eval::{Summary, overlay, segment_volume};
use crate::page;
use crate::proto::{Doing, Picture, TrainerEvent};
use crate::store::StoreError;

/// Validations whose pictures stay.
const KEPT: u64 = 20;
/// Cases that the report shows of the best, and of the worst.
const EXTREMES: usize = 2;

/// The middle slice of a volume, as decoder 1 sees it now; none where it has no labels. Only that slice is segmented.
fn middle(t: &Trainer, id: VolumeId) -> Result<Option<(Vec<u8>, String, usize)>, TrainerError> {
    let fail = |e: &dyn std::fmt::Display| TrainerError::Report(e.to_string());
    let volume = t.dataset.load_volume(id)?;
    let Some(label) = &volume.labels else { return Ok(None) };
    let [d, h, w] = volume.shape;
    let slice = d / 2;
    let values = slice * volume.channels * h * w;
    let image = &volume.slices[values..values + volume.channels * h * w];
    let net = &mut ArgMax(t.nets.main());
    let prediction = segment_volume(net, &volume.name, image, [1, h, w], &settings(t), zoom())
        .map_err(|e| fail(&e))?;
    emit(&TrainerEvent::Busy { step: t.step, doing: Doing::Validating });
    let truth = &label[slice * h * w..(slice + 1) * h * w];
    // Its first channel is what is seen.
    let png = overlay::overlay_png(&image[..h * w], truth, &prediction, (h, w));
    Ok(Some((png.map_err(|e| fail(&e))?, volume.name, slice)))
}

/// Rank 0 leaves pictures of a validation in the run's folder; the result has them once more, as PNG. They are not worth a failure: what cannot be written is
/// warned of.
pub fn leave(t: &Trainer) -> Result<Vec<(Picture, Vec<u8>)>, TrainerError> {
    let wanted = t.config.telemetry.pictures as usize;
    let mut pictures = Vec::new();
    if t.rank.0 != 0 {
        return Ok(pictures);
    }
    for (number, id) in t.dataset.volumes(Split::Val).into_iter().take(wanted).enumerate() {
        let Some((png, _, slice)) = middle(t, id)? else { continue };
        let path = format!("{}/{}", page::PICTURES, page::picture_name(t.step.0, number));
        if let Err(error) = t.runtime.block_on(t.run.put(&path, png.clone().into())) {
            tracing::warn!(%error, "a picture is not written");
            break;
        }
        let caption = format!("volume {}, slice {slice}", number + 1);
        pictures.push((Picture { path, caption }, png));
    }
    forget_old(t, wanted);
    Ok(pictures)
}

/// Removes the pictures of a validation long ago.
fn forget_old(t: &Trainer, count: usize) {
    let Some(old) = t.step.0.checked_sub(KEPT * t.config.validate.every) else { return };
    for number in 0..count {
        let path = format!("{}/{}", page::PICTURES, page::picture_name(old, number));
        match t.runtime.block_on(t.run.delete(&path)) {
            Ok(()) | Err(StoreError::NotFound { .. }) => {}
            Err(error) => tracing::debug!(%error, "an old picture is not removed"),
        }
    }
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
