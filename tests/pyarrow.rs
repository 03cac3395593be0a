//! Other people's Parquet reader reads what this program writes, by nothing but what `docs/data.md` says: the
//! snippet of that page is run as it stands, and its arrays are compared with this program's own.

#![allow(clippy::unwrap_used, clippy::panic)] // The lint's exception for tests stops at their helpers.

mod support;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use cpcr::data::source::FolderObjects;
use cpcr::data::write::{DatasetWriter, NewSlice, NewVolume, WriteOptions};
use cpcr::data::{Dataset, Split};
use cpcr::types::ObjectDigest;
use support::{CPCR, skipped, succeed, text};

/// What follows the snippet: a line for each volume, its shapes and hashes.
const JUDGE: &str = r#"
import hashlib, sys
for root in sys.argv[1:]:
    manifest = json.load(open(f"{root}/manifest.json"))
    for _, entry in volumes(root, manifest):
        image, label = read_volume(root, entry["name"])
        assert image.dtype == np.float32, image.dtype
        told = [entry["name"], *image.shape, hashlib.sha256(image.tobytes()).hexdigest()]
        if label is not None:
            assert label.shape == (image.shape[0], *image.shape[2:]), label.shape
            told.append(hashlib.sha256(label.tobytes()).hexdigest())
        print(*told)
"#;

/// Volumes of three channels and several shapes, some without labels, slices from back to front; the last
/// ones in volume tables, over several shards. Volumes 2 and 3 have few distinct values, the latter more than 256.
fn three_channels(folder: &Path) {
    let mut options = WriteOptions::new("three", &["background", "one", "two"]);
    options.channels = ["T1", "T2", "FLAIR"].map(str::to_owned).to_vec();
    (options.block_rows, options.shard_blocks) = (2, 2);
    (options.listed_max, options.table_volumes) = (1, 2);
    let sink = Arc::new(FolderObjects::new(folder));
    let mut writer = DatasetWriter::new(sink, options).unwrap();
    futures::executor::block_on(async {
        for number in 0..7_u32 {
            let labelled = number < 2 || number == 6;
            let (shape, steps) = match number {
                2 => ((5, 5), Some(4.0)),
                3 => ((40, 30), Some(200.0)),
                _ => ((3 + number as usize, 5), None),
            };
            let rounded = |value: f32| steps.map_or(value, |steps: f32| (value * steps).round());
            let pixels = shape.0 * shape.1;
            let slice = |slice: u32| NewSlice {
                slice,
                shape,
                image: (0..3 * pixels)
                    .map(|at| rounded((at as f32 + 0.3 * slice as f32).cos()))
                    .collect(),
                label: labelled.then(|| (0..pixels).map(|at| (at % 3) as u8).collect()),
            };
            let volume = NewVolume {
                name: format!("v{number}"),
                patient: format!("p{number}"),
                split: if number == 6 { Split::Val } else { Split::Train },
                spacing_mm: None,
                affine: None,
                slices: (0..3).rev().map(slice).collect(),
            };
            writer.add(volume).await.unwrap();
        }
        let manifest = writer.finish().await.unwrap();
        assert_eq!((manifest.tables.len(), manifest.shards.len()), (2, 6));
        assert_eq!(
            (manifest.format, manifest.shards.iter().filter(|s| s.palettes).count()),
            (4, 2)
        );
    });
}

/// What [`JUDGE`] must print of the dataset in `folder`.
fn own_lines(folder: &Path) -> Vec<String> {
    let dataset = Dataset::open(Arc::new(FolderObjects::new(folder))).unwrap();
    let listed = dataset.manifest().volumes.len();
    let mut ids = Split::ALL.map(|split| dataset.volumes(split)).concat();
    ids.sort();
    assert!(ids.len() >= listed);
    let line = |id| {
        let volume = dataset.load_volume(id).unwrap();
        let [depth, height, width] = volume.shape;
        let bytes: Vec<u8> = volume.slices.iter().flat_map(|value| value.to_le_bytes()).collect();
        let image = ObjectDigest::of(&bytes).sha256;
        let channels = volume.channels;
        let mut line = format!("{} {depth} {channels} {height} {width} {image}", volume.name);
        if let Some(labels) = &volume.labels {
            line += &format!(" {}", ObjectDigest::of(labels).sha256);
        }
        line
    };
    ids.into_iter().map(line).collect()
}

#[test]
fn the_documented_snippet_reads_every_pixel() {
    let python = std::env::var("CPCR_PEER_PYTHON").unwrap_or("python3".to_owned());
    let page = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/data.md"));
    let page = page.unwrap();
    let (_, after) = page.split_once("```python\n").unwrap();
    let (snippet, _) = after.split_once("```").unwrap();
    let folder = tempfile::tempdir().unwrap();
    three_channels(&folder.path().join("three"));
    let synth = ["data", "synth", "--patients", "4", "--labelled", "2", "--out", "phantoms"];
    succeed(&Command::new(CPCR).current_dir(folder.path()).args(synth).output().unwrap());
    let own = ["phantoms", "three"].map(|set| own_lines(&folder.path().join(set))).concat();
    let columns = |count| own.iter().filter(|line| line.split(' ').count() == count).count();
    assert!(columns(7) > 10 && columns(6) == 4 + 4, "labelled and not: {own:?}");

    let probe = Command::new(&python).args(["-c", "import pyarrow, numpy"]).output();
    if !probe.is_ok_and(|probe| probe.status.success()) {
        let why = "no pyarrow here: `scripts/setup.sh --peers` prints a Python that has it, for CPCR_PEER_PYTHON";
        return skipped("the_documented_snippet_reads_every_pixel", why);
    }
    let script = format!("{snippet}{JUDGE}");
    let mut read = Command::new(&python);
    let read = read.current_dir(folder.path()).args(["-c", &script, "phantoms", "three"]);
    let read = read.output().unwrap();
    succeed(&read);
    assert_eq!(text(&read.stdout).lines().collect::<Vec<_>>(), own);
}
