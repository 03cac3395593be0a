//! Tallies against naive oracles: sorting all values, counting all labels.

use proptest::prelude::*;

use super::*;

fn row(image: Vec<f32>, label: Option<Vec<u8>>) -> SliceRow {
    SliceRow {
        volume: 0,
        slice: 0,
        channels: 1,
        shape: (1, image.len()),
        image: image.into(),
        label: label.map(Into::into),
    }
}

#[test]
fn bins_are_in_order_and_as_narrow_as_promised() {
    let mut last = None;
    for value in [-1e30, -7.5, -1.0, -1e-20, -0.0, 0.0, 1e-20, 0.1, 0.5, 1.0, 1.5, 3e38_f32] {
        let bin = bin_of(value);
        let (low, high) = (edge(bin as u32), edge(bin as u32 + 1));
        let value = f64::from(value);
        assert!(low <= value && (value < high || value == 0.0 || high.is_nan()), "{value}");
        if value.abs() > 1e-30 && value.abs() < 1e38 {
            assert!((high - low).abs() <= value.abs() / 31.0, "{value}: {low} to {high}");
        }
        assert!(last.is_none_or(|last| last <= bin), "{value}");
        last = Some(bin);
    }
}

proptest! {
    #[test]
    fn fingerprints_agree_with_sorting(
        values in prop::collection::vec(-3.0_f32..5.0, 1..400),
        cut in 0_usize..400,
    ) {
        let (a, b) = values.split_at(cut.min(values.len()));
        let mut merged = Histogram::of(a.iter().copied());
        merged.merge(&Histogram::of(b.iter().copied()));
        let whole = Histogram::of(values.iter().copied());
        prop_assert_eq!(&merged.bins, &whole.bins);
        let found = merged.fingerprint().unwrap();
        let mut sorted = values;
        sorted.sort_by(f32::total_cmp);
        let count = sorted.len() as f64;
        let wide = || sorted.iter().map(|value| f64::from(*value));
        let mean = wide().sum::<f64>() / count;
        let deviation = (wide().map(|value| (value - mean).powi(2)).sum::<f64>() / count).sqrt();
        prop_assert_eq!((found.pixels, found.min), (sorted.len() as u64, f64::from(sorted[0])));
        prop_assert_eq!(found.max, f64::from(sorted[sorted.len() - 1]));
        prop_assert!((found.mean - mean).abs() < 1e-9 && (found.std - deviation).abs() < 1e-6);
        for (share, quantile) in [(0.005, found.p0_5), (0.995, found.p99_5)] {
            // The value that the share falls on lies in the same bin.
            let at = ((share * count).ceil() as usize).clamp(1, sorted.len()) - 1;
            let exact = f64::from(sorted[at]);
            prop_assert!((quantile - exact).abs() <= exact.abs() / 31.0 + 1e-9, "{quantile} {exact}");
        }
        let json = serde_json::to_vec(&merged).unwrap();
        prop_assert_eq!(serde_json::from_slice::<Histogram>(&json).unwrap(), merged);
    }
}

#[test]
fn classes_and_foreground_are_counted_in_labelled_training_volumes_alone() {
    let labelled = [
        row(vec![0.0, 0.25, 0.5, 1.0], Some(vec![0, 1, 1, 0])),
        row(vec![0.0, 0.0, 0.0, 0.0], Some(vec![0, 0, 0, 0])),
    ];
    let mut tally = Tally::of(Split::Train, &labelled, 1, 3);
    tally.merge(&Tally::of(Split::Train, &[row(vec![2.0, 2.0], None)], 1, 3));
    tally.merge(&Tally::of(Split::Val, &[row(vec![9.0], Some(vec![2]))], 1, 3));
    assert_eq!(tally.labelled_volumes, 1);
    let counts = |class: &ClassTally| (class.pixels, class.slices, class.volumes);
    assert_eq!(
        tally.classes.iter().map(counts).collect::<Vec<_>>(),
        [(6, 2, 1), (2, 1, 1), (0, 0, 0)]
    );
    let all = tally.channels[0].all.fingerprint().unwrap();
    assert_eq!((all.pixels, all.max), (10, 2.0));
    let foreground = tally.channels[0].foreground.fingerprint().unwrap();
    assert_eq!((foreground.pixels, foreground.min, foreground.max), (2, 0.25, 0.5));
    let shapes = |split| tally.shapes[&split].slices.clone().into_iter().collect::<Vec<_>>();
    assert_eq!(shapes(Split::Train), [("1x2".to_owned(), 1), ("1x4".to_owned(), 2)]);
    assert_eq!(shapes(Split::Val), [("1x1".to_owned(), 1)]);
}

#[test]
fn channels_are_counted_apart_and_shapes_are_bounded() {
    let two = SliceRow { channels: 2, shape: (1, 2), ..row(vec![0.0, 0.5, 7.0, 9.0], None) };
    let tally = Tally::of(Split::Train, &[two], 2, 2);
    let ranges = tally.channels.iter().map(|channel| (channel.all.min, channel.all.max));
    assert_eq!(ranges.collect::<Vec<_>>(), [(0.0, 0.5), (7.0, 9.0)]);
    let mut shapes = Shapes::default();
    for side in 0..SHAPES_MAX + 9 {
        shapes.add(format!("{side}x1"), 2);
    }
    assert_eq!((shapes.slices.len(), shapes.others), (SHAPES_MAX, 18));
}
