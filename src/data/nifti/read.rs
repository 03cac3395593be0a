//! Bytes to voxels. Memory grows with the bytes that are there, never with what a header claims.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use flate2::bufread::MultiGzDecoder;

use super::error::NiftiError;
use super::header::{HEADER_BYTES, Header, Kind};
use crate::data::error::DataError;

/// The most bytes of voxels that are read from one file: 2 GiB, a CT of 1000 slices twice over.
const DATA_BYTES_MAX: u64 = 1 << 31;

/// Deflate shrinks nothing more than 1032 times: a claim beyond that is a lie about memory.
const DEFLATE_RATIO_MAX: u64 = 1032;

/// What may follow the voxels in a gzipped file, which is inflated to reach the checksum.
const TRAILING_BYTES_MAX: u64 = 1 << 20;

/// An image in memory, as stored. Of its voxels x moves fastest, then y, z and time.
#[derive(Debug, Clone, PartialEq)]
pub struct Nifti {
    /// What the header says.
    pub header: Header,
    /// As many bytes as the header's shape and kind ask for.
    data: Vec<u8>,
}

impl Nifti {
    /// How many frames there are, at least one.
    pub fn frames(&self) -> usize {
        self.header.geometry.shape[3]
    }

    /// The voxels of one frame, scaled as the header says and then converted; `[z, y, x]`, x
    /// fastest. Every whole number a file can hold here is exact in `f64`. `None` for a frame that
    /// is not there.
    pub fn frame<T>(&self, frame: usize, convert: impl Fn(f64) -> T) -> Option<Vec<T>> {
        let kind = self.header.kind;
        let bytes = self.header.geometry.frame_voxels()?.checked_mul(kind.bytes())?;
        let start = frame.checked_mul(bytes)?;
        let bytes = self.data.get(start..start.checked_add(bytes)?)?;
        let big = self.header.big_endian;
        let scaled = |value: f64| match self.header.scale {
            None => convert(value),
            Some((slope, intercept)) => convert(value * slope + intercept),
        };
        Some(match kind {
            Kind::U8 => decode(bytes, big, |b| scaled(u8::from_le_bytes(b).into())),
            Kind::I8 => decode(bytes, big, |b| scaled(i8::from_le_bytes(b).into())),
            Kind::U16 => decode(bytes, big, |b| scaled(u16::from_le_bytes(b).into())),
            Kind::I16 => decode(bytes, big, |b| scaled(i16::from_le_bytes(b).into())),
            Kind::U32 => decode(bytes, big, |b| scaled(u32::from_le_bytes(b).into())),
            Kind::I32 => decode(bytes, big, |b| scaled(i32::from_le_bytes(b).into())),
            Kind::F32 => decode(bytes, big, |b| scaled(f32::from_le_bytes(b).into())),
            Kind::F64 => decode(bytes, big, |b| scaled(f64::from_le_bytes(b))),
        })
    }
}

fn decode<const N: usize, T>(bytes: &[u8], big: bool, value: impl Fn([u8; N]) -> T) -> Vec<T> {
    let (voxels, _) = bytes.as_chunks::<N>();
    let each = voxels.iter().map(|voxel| {
        let mut voxel = *voxel;
        if big {
            voxel.reverse();
        }
        value(voxel)
    });
    each.collect()
}

/// Reads the file at `path`.
///
/// # Errors
/// [`DataError::Import`], with the file's name: it is not there, no NIfTI-1, damaged or too large.
pub fn read_file(path: &Path) -> Result<Nifti, DataError> {
    let attempt = || {
        // A pipe or a device has no length to compare a header's claim with, and opening one may wait for ever.
        if !std::fs::metadata(path)?.is_file() {
            return Err(NiftiError::NotNifti("it is not a regular file"));
        }
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        read(file, length)
    };
    attempt().map_err(|error| DataError::Import { path: path.to_owned(), why: error.to_string() })
}

/// Reads a file of `source_bytes` bytes from its start, gzipped or not.
///
/// # Errors
/// [`NiftiError`]: what is wrong with it.
pub fn read(source: impl Read, source_bytes: u64) -> Result<Nifti, NiftiError> {
    let mut source = BufReader::new(source);
    if !source.fill_buf()?.starts_with(&[0x1f, 0x8b]) {
        return read_plain(&mut source, source_bytes);
    }
    let mut inflated = MultiGzDecoder::new(source);
    let nifti = read_plain(&mut inflated, source_bytes.saturating_mul(DEFLATE_RATIO_MAX))?;
    // The checksum is behind the last byte: without reaching it, damage would pass.
    let rest = io::copy(&mut inflated.take(TRAILING_BYTES_MAX + 1), &mut io::sink())?;
    if rest > TRAILING_BYTES_MAX {
        return Err(NiftiError::damaged("more follows its voxels than its header tells of"));
    }
    Ok(nifti)
}

/// `bytes_max`: how many bytes `source` can hold at most.
fn read_plain(source: &mut impl Read, bytes_max: u64) -> Result<Nifti, NiftiError> {
    let mut start = Vec::with_capacity(HEADER_BYTES);
    source.by_ref().take(HEADER_BYTES as u64).read_to_end(&mut start)?;
    let header = Header::parse(&start)?;
    let overflow = || NiftiError::damaged("its dimensions multiply to no number");
    let data_bytes = header.data_bytes().ok_or_else(overflow)?;
    let end = header.data_offset.checked_add(data_bytes).ok_or_else(overflow)?;
    if end > bytes_max {
        return Err(NiftiError::damaged(format!(
            "its header tells of {end} bytes, the file holds {bytes_max} at most"
        )));
    }
    if data_bytes > DATA_BYTES_MAX {
        return Err(NiftiError::TooLarge { bytes: data_bytes, bytes_max: DATA_BYTES_MAX });
    }
    let extensions = header.data_offset - HEADER_BYTES as u64;
    let skipped = io::copy(&mut source.by_ref().take(extensions), &mut io::sink())?;
    let mut data = Vec::new();
    source.by_ref().take(data_bytes).read_to_end(&mut data)?;
    if skipped != extensions || data.len() as u64 != data_bytes {
        return Err(NiftiError::damaged(format!(
            "{} of {data_bytes} bytes of voxels are there",
            data.len()
        )));
    }
    Ok(Nifti { header, data })
}
