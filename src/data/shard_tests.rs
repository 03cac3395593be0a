//! Shards in memory: what is encoded comes back, and what is no shard is refused. Storage is tested in `dataset`.

use super::*;

fn rows(count: u32, channels: usize) -> Vec<SliceRow> {
    (0..count)
        .map(|n| {
            let shape = (3 + n as usize % 4, 5);
            let pixels = shape.0 * shape.1;
            SliceRow {
                volume: n / 4,
                slice: n % 4,
                channels,
                shape,
                image: (0..channels * pixels).map(|p| (p as f32 + n as f32).sin()).collect(),
                label: (n % 3 != 0).then(|| vec![n as u8; pixels].into()),
            }
        })
        .collect()
}

#[test]
fn each_row_group_decodes_from_its_own_range_and_the_footer() {
    for (channels, format) in [(1, 1), (3, 2)] {
        let rows = rows(11, channels);
        let shard = encode("shards/x.parquet", &rows, 4, 1).unwrap();
        assert_eq!(shard.index.format, format);
        let sizes: Vec<u64> = shard.index.groups.iter().map(|group| group.rows).collect();
        assert_eq!(sizes, [4, 4, 3]);
        let footer = shard.bytes.slice(shard.index.footer_offset as usize..);
        let footer = ShardFooter::parse(&shard.index, footer).unwrap();
        for (number, group) in shard.index.groups.iter().enumerate() {
            let start = group.offset as usize;
            let bytes = shard.bytes.slice(start..start + group.digest.bytes as usize);
            assert!(group.digest.matches(&bytes));
            let decoded = footer.decode(number, group, bytes.clone(), Labels::Decode).unwrap();
            let mut expected = rows[number * 4..(number * 4 + 4).min(11)].to_vec();
            assert_eq!(decoded, expected);
            expected.iter_mut().for_each(|row| row.label = None);
            assert_eq!(footer.decode(number, group, bytes, Labels::Skip).unwrap(), expected);
        }
    }
}

#[test]
fn images_of_few_values_are_stored_as_a_palette_bit_for_bit() {
    for (channels, distinct) in [(1, 3), (1, 200), (1, 700), (2, 700)] {
        let mut plain = rows(1, channels).remove(0);
        plain.shape = (40, 100);
        plain.image = (0..channels * 4000).map(|at| (at as f32).sin()).collect();
        plain.label = None;
        let mut few = plain.clone();
        few.slice = 1;
        few.image = (0..channels * 4000).map(|at| (at % distinct) as f32 / 7.0 - 3.0).collect();
        let rows = [few.clone(), plain.clone(), few.clone(), few, plain.clone()];
        let shard = encode("shards/x.parquet", &rows, 2, 3).unwrap();
        assert!(shard.palettes);
        assert_eq!(shard.index.format, 4);
        assert_eq!(decoded(&shard, 2), rows);
        // Among themselves, the others are written as ever.
        let shard = encode("shards/x.parquet", &[plain.clone(), plain], 2, 3).unwrap();
        assert!(!shard.palettes);
        assert_eq!(shard.index.format, channels as u32);
    }
}

/// All rows of `shard`.
fn decoded(shard: &EncodedShard, block_rows: usize) -> Vec<SliceRow> {
    let footer = shard.bytes.slice(shard.index.footer_offset as usize..);
    let footer = ShardFooter::parse(&shard.index, footer).unwrap();
    let mut rows = Vec::new();
    for (number, group) in shard.index.groups.iter().enumerate() {
        let start = group.offset as usize;
        let bytes = shard.bytes.slice(start..start + group.digest.bytes as usize);
        let block = footer.decode(number, group, bytes, Labels::Decode).unwrap();
        assert!(block.len() <= block_rows);
        rows.extend(block);
    }
    rows
}

#[test]
fn an_image_that_is_not_its_channels_is_an_error() {
    for channels in [0, 2, 4, 1 << 31] {
        let mut rows = rows(2, 3);
        rows[1].channels = channels;
        let shard = encode("shards/x.parquet", &rows, 4, 1).unwrap();
        let footer = shard.bytes.slice(shard.index.footer_offset as usize..);
        let footer = ShardFooter::parse(&shard.index, footer).unwrap();
        let group = &shard.index.groups[0];
        let bytes = shard.bytes.slice(group.offset as usize..shard.index.footer_offset as usize);
        let error = footer.decode(0, group, bytes, Labels::Decode).unwrap_err().to_string();
        assert!(error.contains(&format!("{channels} channels")), "{error}");
    }
}

#[test]
fn a_foreign_footer_is_an_error() {
    let shard = encode("shards/x.parquet", &rows(4, 1), 4, 1).unwrap();
    let footer = shard.bytes.slice(shard.index.footer_offset as usize..);
    assert!(ShardFooter::parse(&shard.index, footer.slice(1..)).is_err());
    let mut index = shard.index.clone();
    index.groups.clear();
    assert!(ShardFooter::parse(&index, footer).is_err());
}

/// Found by fuzzing: the Parquet reader panics over places that are negative.
#[test]
fn columns_that_are_elsewhere_are_refused() {
    let shard = encode("shards/x.parquet", &rows(8, 1), 4, 1).unwrap();
    let footer = shard.bytes.slice(shard.index.footer_offset as usize..);
    let mut index = shard.index.clone();
    index.groups.swap(0, 1);
    let error = ShardFooter::parse(&index, footer.clone()).unwrap_err().to_string();
    assert!(error.contains("a column is not within its row group"), "{error}");
    // The first column's first page is at byte 4, zigzag 8: now at -1.
    let mut bytes = footer.to_vec();
    let at = bytes.windows(2).position(|pair| pair == [0x26, 0x08]).unwrap();
    bytes[at + 1] = 1;
    let error = ShardFooter::parse(&shard.index, bytes.into()).unwrap_err().to_string();
    assert!(error.contains("a column is not within its row group"), "{error}");
}

/// A shard of one row group, and its footer.
fn one_group() -> (EncodedShard, ShardFooter) {
    let shard = encode("shards/x.parquet", &rows(4, 1), 4, 1).unwrap();
    let footer = shard.bytes.slice(shard.index.footer_offset as usize..);
    let footer = ShardFooter::parse(&shard.index, footer).unwrap();
    (shard, footer)
}

/// Found by fuzzing: the Parquet reader counts through such lists, which take it hours.
#[test]
fn a_page_header_that_would_take_hours_is_refused() {
    let (shard, footer) = one_group();
    let group = &shard.index.groups[0];
    // Fields that are lists of 2^31 - 1 booleans each.
    let lists = [0x19, 0xf1, 0xff, 0xff, 0xff, 0xff, 0x07].repeat(10_000);
    let error = footer.decode(0, group, lists.into(), Labels::Decode).unwrap_err().to_string();
    assert!(error.contains("a page header that no shard has"), "{error}");
}

/// Found by fuzzing: the Parquet reader panics where values are numbers of a dictionary that was not given.
#[test]
fn values_of_a_dictionary_are_refused() {
    let (shard, footer) = one_group();
    let group = &shard.index.groups[0];
    let mut bytes = shard.bytes[group.offset as usize..][..group.digest.bytes as usize].to_vec();
    // A data page's header: four values, plain, levels as runs.
    let plain = [0x2c, 0x15, 8, 0x15, 0, 0x15, 6, 0x15, 6, 0];
    let at = bytes.windows(plain.len()).position(|window| window == plain).unwrap();
    bytes[at + 4] = 16;
    let error = footer.decode(0, group, bytes.into(), Labels::Decode).unwrap_err().to_string();
    assert!(error.contains("a page header that no shard has"), "{error}");
}
