//! One shard: Parquet bytes to slices and back. In memory only; nothing is fetched or verified.
//!
//! A row is a slice: `volume`, `slice`, `height`, `width`, `dtype`, `image` and `label` (bytes, row
//! by row, little-endian; `label` null where there is none). Images of several channels, one after
//! the other in `image`, have a last column `channels`. zstd, no dictionaries: pixels do not
//! repeat. A row group decodes from its own bytes and the footer, which is what `Parts` offers
//! to the Parquet reader in place of a file. Its pixels are copied once, out of the compressed bytes:
//! a decoded row is a view into its row group, and keeps it in memory.

use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::UInt32Type;
use arrow_array::{
    Array, ArrayRef, BinaryArray, BinaryViewArray, RecordBatch, StringArray, UInt32Array,
};
use arrow_buffer::{Buffer, ScalarBuffer};
use arrow_data::{ByteView, MAX_INLINE_VIEW_LEN};
use arrow_schema::{DataType, Field, Schema};
use bytes::{Buf, Bytes, buf::Reader};
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder,
};
use parquet::arrow::{ArrowWriter, ProjectionMask};
use parquet::basic::{Compression, ZstdLevel};
use parquet::errors::ParquetError;
use parquet::file::metadata::ParquetMetaData;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::file::reader::{ChunkReader, Length};

use super::augment::Shape;
use super::error::DataError;
use super::manifest::{CHANNELS_MAX, GroupEntry, ShardIndex, format_for};
use crate::types::ObjectDigest;

/// The only element type of stored images so far.
const DTYPE: &str = "f32";

/// No slice is larger: 64 Mi pixels, over all its channels.
pub(crate) const MAX_SLICE_PIXELS: usize = 1 << 26;

/// The labels' column.
const LABEL_COLUMN: usize = 6;

/// One slice as it is stored.
#[derive(Debug, Clone, PartialEq)]
pub struct SliceRow {
    /// Its volume's place in the manifest.
    pub volume: u32,
    /// Its place in the volume, from zero.
    pub slice: u32,
    /// Channels of its image, at least one.
    pub channels: usize,
    /// Height and width.
    pub shape: Shape,
    /// Intensities `[C, H, W]`.
    pub image: ScalarBuffer<f32>,
    /// Class of each pixel, where it is known and was asked for.
    pub label: Option<Buffer>,
}

impl SliceRow {
    /// Bytes of memory its pixels take.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.image.len() * size_of::<f32>() + self.label.as_ref().map_or(0, Buffer::len)
    }
}

/// A shard's bytes and the index that goes beside them.
#[derive(Debug)]
pub struct EncodedShard {
    /// The Parquet object.
    pub bytes: Bytes,
    /// Where its parts lie.
    pub index: ShardIndex,
}

/// Whether a row's label is decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Labels {
    /// Where it has one.
    Decode,
    /// It is `None`, whatever is stored.
    Skip,
}

/// The columns of a shard as they are written.
fn schema(channels: usize) -> Arc<Schema> {
    schema_of(channels, &DataType::Binary)
}

/// The columns of a shard, its pixels being of Arrow's type `pixels`.
fn schema_of(channels: usize, pixels: &DataType) -> Arc<Schema> {
    let mut columns = vec![
        Field::new("volume", DataType::UInt32, false),
        Field::new("slice", DataType::UInt32, false),
        Field::new("height", DataType::UInt32, false),
        Field::new("width", DataType::UInt32, false),
        Field::new("dtype", DataType::Utf8, false),
        Field::new("image", pixels.clone(), false),
        Field::new("label", pixels.clone(), true),
    ];
    if channels > 1 {
        columns.push(Field::new("channels", DataType::UInt32, false));
    }
    Arc::new(Schema::new(columns))
}

/// Encodes `rows` as the shard `object`, a row group for every `block_rows` of them. All rows have
/// as many channels as the first.
pub fn encode(
    object: &str,
    rows: &[SliceRow],
    block_rows: usize,
    zstd_level: i32,
) -> Result<EncodedShard, DataError> {
    let bad = |error: ParquetError| DataError::invalid(object, error);
    let channels = rows.first().map_or(1, |row| row.channels);
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::try_new(zstd_level).map_err(bad)?))
        .set_dictionary_enabled(false)
        .set_statistics_enabled(EnabledStatistics::None)
        .set_offset_index_disabled(true)
        .set_max_row_group_row_count(Some(block_rows))
        .build();
    let mut bytes = Vec::new();
    let mut writer =
        ArrowWriter::try_new(&mut bytes, schema(channels), Some(properties)).map_err(bad)?;
    for block in rows.chunks(block_rows) {
        // What Arrow's 32-bit offsets can tell apart; it would panic.
        let image_bytes: usize = block.iter().map(|row| row.image.len() * size_of::<f32>()).sum();
        if image_bytes > i32::MAX as usize {
            let why = format!(
                "{} slices of {image_bytes} bytes are no block: take fewer rows (--block-rows)",
                block.len()
            );
            return Err(DataError::invalid(object, why));
        }
        let batch = to_batch(block, channels).map_err(|error| DataError::invalid(object, error))?;
        writer.write(&batch).map_err(bad)?;
        writer.flush().map_err(bad)?;
    }
    let metadata = writer.close().map_err(bad)?;
    let bytes = Bytes::from(bytes);
    let index = index_of(object, &bytes, &metadata, format_for(channels))?;
    Ok(EncodedShard { bytes, index })
}

fn to_batch(rows: &[SliceRow], channels: usize) -> Result<RecordBatch, arrow_schema::ArrowError> {
    let numbers = |of: fn(&SliceRow) -> u32| -> ArrayRef {
        Arc::new(rows.iter().map(|row| Some(of(row))).collect::<UInt32Array>())
    };
    let images: Vec<Vec<u8>> = rows
        .iter()
        .map(|row| row.image.iter().flat_map(|value| value.to_le_bytes()).collect())
        .collect();
    let labels: Vec<Option<&[u8]>> = rows.iter().map(|row| row.label.as_deref()).collect();
    let mut columns: Vec<ArrayRef> = vec![
        numbers(|row| row.volume),
        numbers(|row| row.slice),
        numbers(|row| row.shape.0 as u32),
        numbers(|row| row.shape.1 as u32),
        Arc::new(StringArray::from(vec![DTYPE; rows.len()])),
        Arc::new(BinaryArray::from_iter_values(&images)),
        Arc::new(BinaryArray::from_opt_vec(labels)),
    ];
    if channels > 1 {
        columns.push(numbers(|row| row.channels as u32));
    }
    RecordBatch::try_new(schema(channels), columns)
}

/// The byte ranges of the row groups, from the metadata just written.
fn index_of(
    object: &str,
    bytes: &Bytes,
    metadata: &ParquetMetaData,
    format: u32,
) -> Result<ShardIndex, DataError> {
    let mut groups = Vec::with_capacity(metadata.num_row_groups());
    let mut end = 0;
    for group in metadata.row_groups() {
        let ranges = group.columns().iter().map(|column| column.byte_range());
        let start = ranges.clone().map(|(start, _)| start).min().unwrap_or(end);
        end = ranges.map(|(start, len)| start + len).max().unwrap_or(end);
        groups.push(GroupEntry {
            offset: start,
            rows: group.num_rows().unsigned_abs(),
            digest: ObjectDigest::of(&bytes[start as usize..end as usize]),
        });
    }
    Ok(ShardIndex {
        format,
        object: object.to_owned(),
        footer_offset: end,
        footer_digest: ObjectDigest::of(&bytes[end as usize..]),
        groups,
    })
}

/// A shard of which only some byte ranges are in memory.
#[derive(Debug, Clone)]
struct Parts {
    len: u64,
    parts: [(u64, Bytes); 2],
}

impl Parts {
    fn tail_of_part(&self, start: u64) -> Result<Bytes, ParquetError> {
        for (offset, bytes) in &self.parts {
            if start >= *offset && start - offset < bytes.len() as u64 {
                return Ok(bytes.slice((start - offset) as usize..));
            }
        }
        Err(ParquetError::EOF(format!("byte {start} is outside of what was fetched")))
    }
}

impl Length for Parts {
    fn len(&self) -> u64 {
        self.len
    }
}

impl ChunkReader for Parts {
    type T = Reader<Bytes>;

    fn get_read(&self, start: u64) -> Result<Self::T, ParquetError> {
        Ok(self.tail_of_part(start)?.reader())
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes, ParquetError> {
        let tail = self.tail_of_part(start)?;
        if tail.len() < length {
            return Err(ParquetError::EOF(format!("{length} bytes at {start} were not fetched")));
        }
        Ok(tail.slice(..length))
    }
}

/// A shard's footer, parsed once, from which any of its row groups can be decoded.
#[derive(Debug, Clone)]
pub struct ShardFooter {
    object: String,
    shard_bytes: u64,
    footer: (u64, Bytes),
    metadata: ArrowReaderMetadata,
}

impl ShardFooter {
    /// Parses the (verified) bytes of the footer that `index` describes.
    pub fn parse(index: &ShardIndex, footer: Bytes) -> Result<Self, DataError> {
        let shard_bytes = index.footer_offset + footer.len() as u64;
        let footer = (index.footer_offset, footer);
        let parts = Parts { len: shard_bytes, parts: [footer.clone(), (0, Bytes::new())] };
        let metadata = ArrowReaderMetadata::load(&parts, ArrowReaderOptions::new())
            .map_err(|error| DataError::invalid(&index.object, error))?;
        if metadata.metadata().num_row_groups() != index.groups.len() {
            return Err(DataError::invalid(&index.object, "its index has other row groups"));
        }
        let known = [1, 2].into_iter().find(|c| metadata.schema().fields() == schema(*c).fields());
        let channels = known.ok_or_else(|| {
            DataError::invalid(&index.object, "its columns are not those of a shard")
        })?;
        // Views into the decompressed pages: the other type would copy every pixel.
        let views = schema_of(channels, &DataType::BinaryView);
        let options = ArrowReaderOptions::new().with_schema(views);
        let metadata = ArrowReaderMetadata::try_new(Arc::clone(metadata.metadata()), options)
            .map_err(|error| DataError::invalid(&index.object, error))?;
        Ok(Self { object: index.object.clone(), shard_bytes, footer, metadata })
    }

    /// Decodes row group `number`, which `entry` describes, from its (verified) bytes.
    pub fn decode(
        &self,
        number: usize,
        entry: &GroupEntry,
        bytes: Bytes,
        labels: Labels,
    ) -> Result<Vec<SliceRow>, DataError> {
        let parts =
            Parts { len: self.shard_bytes, parts: [(entry.offset, bytes), self.footer.clone()] };
        let bad = |error: &dyn std::fmt::Display| DataError::invalid(&self.object, error);
        let columns = self.metadata.parquet_schema();
        let wanted = (0..columns.num_columns())
            .filter(|column| labels == Labels::Decode || *column != LABEL_COLUMN);
        let reader =
            ParquetRecordBatchReaderBuilder::new_with_metadata(parts, self.metadata.clone())
                .with_projection(ProjectionMask::leaves(columns, wanted))
                .with_row_groups(vec![number])
                .with_batch_size(entry.rows as usize)
                .build()
                .map_err(|error| bad(&error))?;
        let mut rows = Vec::with_capacity(entry.rows as usize);
        for batch in reader {
            let batch = batch.map_err(|error| bad(&error))?;
            for row in 0..batch.num_rows() {
                rows.push(row_of(&batch, row).map_err(|why| bad(&why))?);
            }
        }
        if rows.len() as u64 != entry.rows {
            return Err(bad(&"a row group does not have the rows its index says"));
        }
        Ok(rows)
    }
}

fn row_of(batch: &RecordBatch, row: usize) -> Result<SliceRow, String> {
    let number = |column: usize| batch.column(column).as_primitive::<UInt32Type>().value(row);
    let shape = (number(2) as usize, number(3) as usize);
    let dtype = batch.column(4).as_string::<i32>().value(row);
    if dtype != DTYPE {
        return Err(format!("images of type `{dtype}` are not known"));
    }
    let channels = batch.column_by_name("channels");
    let channels =
        channels.map_or(1, |column| column.as_primitive::<UInt32Type>().value(row) as usize);
    let pixels = shape.0.saturating_mul(shape.1);
    let values = pixels.saturating_mul(channels);
    let image = value_of(batch.column(5).as_binary_view(), row);
    if !(1..=CHANNELS_MAX).contains(&channels)
        || !(1..=MAX_SLICE_PIXELS).contains(&values)
        || image.len() != values * size_of::<f32>()
    {
        let bytes = image.len();
        return Err(format!("{bytes} bytes are no image of {channels} channels of {shape:?}"));
    }
    let labels = batch.column_by_name("label").filter(|labels| labels.is_valid(row));
    let label = labels.map(|labels| value_of(labels.as_binary_view(), row));
    if label.as_ref().is_some_and(|label| label.len() != pixels) {
        return Err(format!("a label is not of shape {shape:?}"));
    }
    let (volume, slice) = (number(0), number(1));
    Ok(SliceRow { volume, slice, channels, shape, image: floats(&image), label })
}

/// The bytes of `row`, without a copy unless they are few.
fn value_of(column: &BinaryViewArray, row: usize) -> Buffer {
    let view = ByteView::from(column.views()[row]);
    match column.data_buffers().get(view.buffer_index as usize) {
        Some(page) if view.length > MAX_INLINE_VIEW_LEN => {
            page.slice_with_length(view.offset as usize, view.length as usize)
        }
        _ => Buffer::from(column.value(row)),
    }
}

/// Little-endian floats as they lie there, if this machine can read them so.
fn floats(bytes: &Buffer) -> ScalarBuffer<f32> {
    if cfg!(target_endian = "little") && bytes.as_ptr().addr().is_multiple_of(align_of::<f32>()) {
        return ScalarBuffer::from(bytes.clone());
    }
    let (words, _) = bytes.as_chunks::<4>();
    words.iter().map(|word| f32::from_le_bytes(*word)).collect()
}

#[cfg(test)]
mod tests {
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
    fn an_image_that_is_not_its_channels_is_an_error() {
        for channels in [0, 2, 4, 1 << 31] {
            let mut rows = rows(2, 3);
            rows[1].channels = channels;
            let shard = encode("shards/x.parquet", &rows, 4, 1).unwrap();
            let footer = shard.bytes.slice(shard.index.footer_offset as usize..);
            let footer = ShardFooter::parse(&shard.index, footer).unwrap();
            let group = &shard.index.groups[0];
            let bytes =
                shard.bytes.slice(group.offset as usize..shard.index.footer_offset as usize);
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
}
