//! Manifests that add up, and those that do not.

use super::*;

fn volume(name: &str, patient: &str, split: Split, labelled: bool, first: u64) -> VolumeEntry {
    VolumeEntry {
        name: name.to_owned(),
        patient: patient.to_owned(),
        split,
        labelled,
        spacing_mm: None,
        affine: None,
        first_row: first,
        slices: 2,
    }
}

fn shard(split: Split, rows: u64) -> ShardEntry {
    let digest = ObjectDigest::of(b"x");
    ShardEntry {
        split,
        object: format!("shards/{split}-00000.parquet"),
        digest: digest.clone(),
        rows,
        index: format!("shards/{split}-00000.index.json"),
        index_digest: digest,
        palettes: false,
    }
}

fn manifest() -> Manifest {
    Manifest {
        format: FORMAT,
        name: "test".to_owned(),
        classes: vec!["background".to_owned(), "heart".to_owned()],
        preprocessing: Preprocessing::default(),
        channels: Vec::new(),
        block_rows: 4,
        shards: vec![shard(Split::Train, 8), shard(Split::Val, 2)],
        volumes: vec![
            volume("a1", "a", Split::Train, true, 0),
            volume("b1", "b", Split::Train, true, 2),
            volume("a2", "a", Split::Train, false, 4),
            volume("c1", "c", Split::Train, false, 6),
            volume("d1", "d", Split::Val, true, 0),
        ],
        tables: Vec::new(),
    }
}

fn refused(change: impl Fn(&mut Manifest)) -> String {
    let mut manifest = manifest();
    change(&mut manifest);
    Manifest::parse(&manifest.to_bytes().unwrap()).unwrap_err().to_string()
}

#[test]
fn it_survives_a_round_trip_and_names_its_pools() {
    let manifest = Manifest::parse(&manifest().to_bytes().unwrap()).unwrap();
    assert_eq!(manifest, self::manifest());
    assert_eq!(manifest.labelled_patients(), ["a", "b"]);
    assert_eq!(manifest.pools(0).unwrap(), (0..0, 0..8));
    assert_eq!(manifest.pools(1).unwrap(), (0..2, 2..8));
    assert_eq!(manifest.pools(2).unwrap(), (0..4, 4..8));
    assert!(matches!(manifest.pools(3), Err(DataError::Unusable(_))));
}

#[test]
fn a_newer_format_is_refused_by_name_even_if_it_does_not_parse() {
    let error = Manifest::parse(br#"{"format": 5, "fields": "unknown"}"#).unwrap_err();
    assert!(matches!(error, DataError::NewerFormat { found: 5, supported: 4, .. }), "{error}");
}

#[test]
fn what_does_not_add_up_is_refused() {
    assert!(refused(|m| m.volumes[4].patient = "a".into()).contains("patient `a`"));
    assert!(refused(|m| m.volumes[1].first_row = 3).contains("next in line"));
    assert!(refused(|m| m.volumes[0].labelled = false).contains("has labels"));
    assert!(refused(|m| m.volumes[1].name = "a1".into()).contains("two volumes"));
    assert!(refused(|m| m.shards[0].rows = 9).contains("rows"));
    assert!(refused(|m| m.block_rows = 0).contains("block_rows"));
    let older = |m: &mut Manifest| (m.format, m.shards[0].palettes) = (3, true);
    assert!(refused(older).contains("palettes in format 3"));
    assert!(Manifest::parse(b"[]").is_err());
}

/// What the fuzzer found: the JSON library's quick reader of numbers takes this spacing for its neighbour.
#[test]
fn numbers_are_read_as_they_were_written() {
    let written = "1.3616256713867185";
    let read: f64 = serde_json::from_str(written).unwrap();
    assert_eq!(read.to_bits(), written.parse::<f64>().unwrap().to_bits());
}
