//! One shard: Parquet bytes to slices and back. In memory only; nothing is fetched or verified.
//!
//! A row is a slice: `volume`, `slice`, `height`, `width`, `dtype`, `image` and `label` (bytes, row
//! by row, little-endian; `label` null where there is none). Images of several channels, one after
//! the other in `image`, have a column `channels`. A shard in which images have few distinct values has a
//! last column `palette`: of those rows the values, `image` being places among them. zstd, no dictionaries of
//! Parquet's: whole images do not repeat. A row group decodes from its own bytes and the footer, which is
//! what `Parts` offers to the Parquet reader in place of a file. Its pixels are copied once, out of the
//! compressed bytes or by their palette: a decoded row is a view into its row group, and keeps it in memory.

use std::ops::Range;
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
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::file::reader::{ChunkReader, Length};

use super::augment::Shape;
use super::error::{DataError, caught};
use super::manifest::{CHANNELS_MAX, GroupEntry, ShardIndex, format_for};
use super::palette::{self, Palette};
use super::thrift;
use crate::types::ObjectDigest;

/// What `dtype` says of an image that is floats.
const FLOATS: &str = "f32";

/// What it says of places in a palette, of one byte and of two.
const PLACES: [&str; 2] = ["p8", "p16"];

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
    /// Whether it has the column `palette`.
    pub palettes: bool,
}

/// Whether a row's label is decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Labels {
    /// Where it has one.
    Decode,
    /// It is `None`, whatever is stored.
    Skip,
}

/// The columns of a shard of images of `channels` channels, all bytes being of Arrow's type `bytes`.
fn schema(channels: usize, palettes: bool, bytes: &DataType) -> Arc<Schema> {
    let mut columns = vec![
        Field::new("volume", DataType::UInt32, false),
        Field::new("slice", DataType::UInt32, false),
        Field::new("height", DataType::UInt32, false),
        Field::new("width", DataType::UInt32, false),
        Field::new("dtype", DataType::Utf8, false),
        Field::new("image", bytes.clone(), false),
        Field::new("label", bytes.clone(), true),
    ];
    if channels > 1 {
        columns.push(Field::new("channels", DataType::UInt32, false));
    }
    if palettes {
        columns.push(Field::new("palette", bytes.clone(), true));
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
    let found: Vec<Option<Palette>> = rows.iter().map(|row| Palette::of(&row.image)).collect();
    let palettes = found.iter().any(Option::is_some);
    let columns = schema(channels, palettes, &DataType::Binary);
    let mut bytes = Vec::new();
    let mut writer =
        ArrowWriter::try_new(&mut bytes, Arc::clone(&columns), Some(properties)).map_err(bad)?;
    for (block, found) in rows.chunks(block_rows).zip(found.chunks(block_rows)) {
        let images: Vec<StoredImage> =
            block.iter().zip(found).map(|(row, found)| StoredImage::of(row, found)).collect();
        // What Arrow's 32-bit offsets can tell apart; it would panic.
        let image_bytes: usize = images.iter().map(|image| image.bytes.len()).sum();
        if image_bytes > i32::MAX as usize {
            let why = format!(
                "{} slices of {image_bytes} bytes are no block: take fewer rows (--block-rows)",
                block.len()
            );
            return Err(DataError::invalid(object, why));
        }
        let batch = to_batch(block, &images, Arc::clone(&columns))
            .map_err(|error| DataError::invalid(object, error))?;
        writer.write(&batch).map_err(bad)?;
        writer.flush().map_err(bad)?;
    }
    let metadata = writer.close().map_err(bad)?;
    let bytes = Bytes::from(bytes);
    let index = index_of(object, &bytes, &metadata, format_for(channels, palettes))?;
    Ok(EncodedShard { bytes, index, palettes })
}

/// An image as its columns hold it.
struct StoredImage {
    dtype: &'static str,
    bytes: Vec<u8>,
    palette: Option<Vec<u8>>,
}

impl StoredImage {
    fn of(row: &SliceRow, palette: &Option<Palette>) -> Self {
        let bytes_of =
            |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect();
        match palette {
            Some(Palette { values, planes }) => {
                let dtype = PLACES[usize::from(values.len() > 256)];
                Self { dtype, bytes: planes.clone(), palette: Some(bytes_of(values)) }
            }
            None => Self { dtype: FLOATS, bytes: bytes_of(&row.image), palette: None },
        }
    }
}

fn to_batch(
    rows: &[SliceRow],
    images: &[StoredImage],
    columns: Arc<Schema>,
) -> Result<RecordBatch, arrow_schema::ArrowError> {
    let numbers = |of: fn(&SliceRow) -> u32| -> ArrayRef {
        Arc::new(rows.iter().map(|row| Some(of(row))).collect::<UInt32Array>())
    };
    let of_column = |field: &Arc<Field>| -> ArrayRef {
        match field.name().as_str() {
            "volume" => numbers(|row| row.volume),
            "slice" => numbers(|row| row.slice),
            "height" => numbers(|row| row.shape.0 as u32),
            "width" => numbers(|row| row.shape.1 as u32),
            "channels" => numbers(|row| row.channels as u32),
            "dtype" => Arc::new(StringArray::from_iter_values(images.iter().map(|i| i.dtype))),
            "image" => Arc::new(BinaryArray::from_iter_values(images.iter().map(|i| &i.bytes))),
            "label" => {
                Arc::new(rows.iter().map(|row| row.label.as_deref()).collect::<BinaryArray>())
            }
            _ => Arc::new(images.iter().map(|i| i.palette.as_deref()).collect::<BinaryArray>()),
        }
    };
    let arrays = columns.fields().iter().map(of_column).collect();
    RecordBatch::try_new(columns, arrays)
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

    /// What the Parquet reader reads byte by byte is a page's header.
    fn get_read(&self, start: u64) -> Result<Self::T, ParquetError> {
        let tail = self.tail_of_part(start)?;
        thrift::check_page_header(&tail).map_err(ParquetError::General)?;
        Ok(tail.reader())
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
        let damaged = |why: &str| DataError::invalid(&index.object, why);
        caught(damaged, || Self::parse_uncaught(index, footer))
    }

    fn parse_uncaught(index: &ShardIndex, footer: Bytes) -> Result<Self, DataError> {
        let shard_bytes = index.footer_offset + footer.len() as u64;
        let metadata =
            metadata_of(&footer).map_err(|error| DataError::invalid(&index.object, error))?;
        let metadata = ArrowReaderMetadata::try_new(Arc::new(metadata), ArrowReaderOptions::new())
            .map_err(|error| DataError::invalid(&index.object, error))?;
        let footer = (index.footer_offset, footer);
        check_places(metadata.metadata(), index)
            .map_err(|why| DataError::invalid(&index.object, why))?;
        let found = metadata.schema().fields();
        let known = [(1, false), (2, false), (1, true), (2, true)]
            .into_iter()
            .find(|(channels, p)| found == schema(*channels, *p, &DataType::Binary).fields());
        let (channels, palettes) = known.ok_or_else(|| {
            DataError::invalid(&index.object, "its columns are not those of a shard")
        })?;
        // Views into the decompressed pages: the other type would copy every pixel.
        let views = schema(channels, palettes, &DataType::BinaryView);
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
        let damaged = |why: &str| DataError::invalid(&self.object, why);
        caught(damaged, || self.decode_uncaught(number, entry, bytes, labels))
    }

    fn decode_uncaught(
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
            rows.extend(rows_of(&batch).map_err(|why| bad(&why))?);
        }
        if rows.len() as u64 != entry.rows {
            return Err(bad(&"a row group does not have the rows its index says"));
        }
        Ok(rows)
    }
}

/// What `footer` says: metadata, their length in four bytes, and the four that end every Parquet file.
fn metadata_of(footer: &[u8]) -> Result<ParquetMetaData, ParquetError> {
    let ends_otherwise = || ParquetError::General("it does not end as a Parquet file does".into());
    let (metadata, magic) = footer.split_last_chunk::<4>().ok_or_else(ends_otherwise)?;
    let (metadata, length) = metadata.split_last_chunk::<4>().ok_or_else(ends_otherwise)?;
    if magic != b"PAR1" || u32::from_le_bytes(*length) as usize != metadata.len() {
        return Err(ends_otherwise());
    }
    thrift::check_metadata(metadata).map_err(ParquetError::General)?;
    ParquetMetaDataReader::decode_metadata(metadata)
}

/// Whether every column is where the index has its row group: the Parquet reader panics over a place that is none.
fn check_places(metadata: &ParquetMetaData, index: &ShardIndex) -> Result<(), &'static str> {
    if metadata.num_row_groups() != index.groups.len() {
        return Err("its index has other row groups");
    }
    for (group, entry) in metadata.row_groups().iter().zip(&index.groups) {
        let end = entry.offset.saturating_add(entry.digest.bytes);
        let lies_within = group.columns().iter().all(|column| {
            // Shards have no dictionaries.
            let place = u64::try_from(column.data_page_offset()).ok();
            let past = u64::try_from(column.compressed_size()).ok();
            let past = place.zip(past).and_then(|(place, size)| place.checked_add(size));
            column.dictionary_page_offset().is_none()
                && place.is_some_and(|place| place >= entry.offset)
                && past.is_some_and(|past| past <= end)
        });
        if !lies_within {
            return Err("a column is not within its row group");
        }
    }
    Ok(())
}

fn rows_of(batch: &RecordBatch) -> Result<Vec<SliceRow>, String> {
    let frames = (0..batch.num_rows()).map(|row| frame_of(batch, row));
    let frames = frames.collect::<Result<Vec<_>, String>>()?;
    let images = images_of(batch, &frames)?;
    let labels = batch.column_by_name("label").map(|labels| labels.as_binary_view());
    let number = |column: usize, row| batch.column(column).as_primitive::<UInt32Type>().value(row);
    let row_of = |(row, ((channels, shape), image)): (usize, ((usize, Shape), _))| {
        let labels = labels.filter(|labels| labels.is_valid(row));
        let label = labels.map(|labels| value_of(labels, row));
        if label.as_ref().is_some_and(|label| label.len() != shape.0 * shape.1) {
            return Err(format!("a label is not of shape {shape:?}"));
        }
        let (volume, slice) = (number(0, row), number(1, row));
        Ok(SliceRow { volume, slice, channels, shape, image, label })
    };
    frames.into_iter().zip(images).enumerate().map(row_of).collect()
}

/// Channels and shape of `row`'s image, of no more values than an image has.
fn frame_of(batch: &RecordBatch, row: usize) -> Result<(usize, Shape), String> {
    let number = |column: &ArrayRef| column.as_primitive::<UInt32Type>().value(row) as usize;
    let shape = (number(batch.column(2)), number(batch.column(3)));
    let channels = batch.column_by_name("channels").map_or(1, number);
    let values = shape.0.saturating_mul(shape.1).saturating_mul(channels);
    if !(1..=CHANNELS_MAX).contains(&channels) || !(1..=MAX_SLICE_PIXELS).contains(&values) {
        return Err(format!("an image has {channels} channels of {shape:?}"));
    }
    Ok((channels, shape))
}

/// The images of `batch`: views into it, or into memory of their own, together, where they are places in a palette.
fn images_of(
    batch: &RecordBatch,
    frames: &[(usize, Shape)],
) -> Result<Vec<ScalarBuffer<f32>>, String> {
    /// Where an image's values are.
    enum Values {
        There(ScalarBuffer<f32>),
        Placed(Range<usize>),
    }
    let (dtypes, images) = (batch.column(4).as_string::<i32>(), batch.column(5).as_binary_view());
    let palettes = batch.column_by_name("palette").map(|palettes| palettes.as_binary_view());
    let palette_of = |row| palettes.filter(|palettes| palettes.is_valid(row));
    // A pixel has at least a byte, so that this is no more than four times what is in memory already.
    let values = |row| images.value(row).len() / if dtypes.value(row) == PLACES[1] { 2 } else { 1 };
    let placed = (0..frames.len()).filter(|row| palette_of(*row).is_some()).map(values).sum();
    let mut placed = Vec::with_capacity(placed);
    let mut found = Vec::with_capacity(frames.len());
    for (row, (channels, shape)) in frames.iter().enumerate() {
        let bytes = value_of(images, row);
        let values = channels * shape.0 * shape.1;
        found.push(match (dtypes.value(row), palette_of(row)) {
            (FLOATS, None) if bytes.len() == values * size_of::<f32>() => {
                Values::There(floats(&bytes))
            }
            (dtype, Some(palettes)) if PLACES.contains(&dtype) => {
                let start = placed.len();
                palette::append(&mut placed, palettes.value(row), &bytes, values)?;
                Values::Placed(start..placed.len())
            }
            (dtype, palette) => {
                let (bytes, with) = (bytes.len(), if palette.is_some() { "with" } else { "without" });
                return Err(format!(
                    "{bytes} bytes of `{dtype}`, {with} palette, are no image of {channels} channels of {shape:?}"
                ));
            }
        });
    }
    let placed = ScalarBuffer::from(placed);
    let whole = |values| match values {
        Values::There(image) => image,
        Values::Placed(range) => placed.slice(range.start, range.len()),
    };
    Ok(found.into_iter().map(whole).collect())
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
#[path = "shard_tests.rs"]
mod tests;
