//! Label maps and images to bytes: little-endian, no extensions; with one sform, or lying exactly
//! where another file lies. The same input makes the same bytes, gzipped or not.

use std::io::Write;
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;

use super::error::NiftiError;
use super::header::{DATA_OFFSET_MIN, Geometry, HEADER_BYTES, Header, Kind};
use crate::data::error::DataError;

/// `NIFTI_XFORM_SCANNER_ANAT`: the affine leads to the patient's space.
const SCANNER: i16 = 1;

/// `NIFTI_UNITS_MM`.
const MILLIMETRES: u8 = 2;

/// What to write, `[frame, z, y, x]`, x fastest.
#[derive(Debug, Clone, Copy)]
pub enum Voxels<'a> {
    /// Classes, stored as they are.
    Labels(&'a [u8]),
    /// Intensities or probabilities.
    Floats(&'a [f32]),
}

impl Voxels<'_> {
    fn kind(self) -> Kind {
        match self {
            Self::Labels(_) => Kind::U8,
            Self::Floats(_) => Kind::F32,
        }
    }

    fn len(self) -> usize {
        match self {
            Self::Labels(voxels) => voxels.len(),
            Self::Floats(voxels) => voxels.len(),
        }
    }
}

/// Writes `voxels` to `path`, gzipped if its name ends in `.gz`. The geometry is usually that of
/// the file which the voxels were computed from.
///
/// # Errors
/// [`DataError::Invalid`] for voxels that do not fit the geometry, [`DataError::Write`] for what
/// the file system refuses.
pub fn write_file(path: &Path, geometry: &Geometry, voxels: Voxels<'_>) -> Result<(), DataError> {
    let gzip = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gz"));
    let bytes = encode(geometry, voxels, gzip)
        .map_err(|error| DataError::invalid(path.display().to_string(), error))?;
    std::fs::write(path, bytes).map_err(|error| DataError::Write {
        object: path.display().to_string(),
        source: error.into(),
    })
}

/// The bytes of a `.nii` file, or with `gzip` of a `.nii.gz`.
///
/// # Errors
/// [`NiftiError::Unwritable`]: the voxels do not fit the geometry, or NIfTI-1 cannot express it.
pub fn encode(geometry: &Geometry, voxels: Voxels<'_>, gzip: bool) -> Result<Vec<u8>, NiftiError> {
    let count = geometry.shape.iter().try_fold(1_usize, |all, side| all.checked_mul(*side));
    if count != Some(voxels.len()) {
        let why = format!("{} voxels for a shape of {:?}", voxels.len(), geometry.shape);
        return Err(NiftiError::Unwritable(why));
    }
    packed(&header(geometry, voxels.kind())?, voxels, gzip)
}

/// How far a file reaches that lies where another one does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// As far as that one: a value for each of its voxels.
    Same,
    /// That one's x, y and z, and so many values for each voxel along the fourth dimension.
    Channels(usize),
}

/// The bytes of a file that lies where the one with the header `like` does: the same shape,
/// spacing, units, sform and qform with their codes. Voxels mean what is stored: no slope.
///
/// # Errors
/// [`NiftiError::Unwritable`]: the voxels do not fit the shape.
pub fn encode_like(
    like: &Header,
    extent: Extent,
    voxels: Voxels<'_>,
    gzip: bool,
) -> Result<Vec<u8>, NiftiError> {
    let mut shape = like.geometry.shape;
    if let Extent::Channels(channels) = extent {
        shape[3] = channels;
    }
    let count = shape.iter().try_fold(1_usize, |all, side| all.checked_mul(*side));
    if count != Some(voxels.len()) {
        let why = format!("{} voxels for a shape of {shape:?}", voxels.len());
        return Err(NiftiError::Unwritable(why));
    }
    packed(&header_like(like, extent, voxels.kind())?, voxels, gzip)
}

fn header_like(like: &Header, extent: Extent, kind: Kind) -> Result<Vec<u8>, NiftiError> {
    let mut header = vec![0; DATA_OFFSET_MIN as usize];
    header[..HEADER_BYTES].copy_from_slice(&like.place);
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    if let Extent::Channels(channels) = extent {
        let channels = i16::try_from(channels).map_err(|_| {
            NiftiError::Unwritable(format!("{channels} values for each voxel are too many"))
        })?;
        // An image of fewer dimensions may have anything in the sides that it has not.
        let mut sides = [1_i16; 3];
        for (side, length) in sides.iter_mut().zip(like.geometry.shape) {
            *side = i16::try_from(length)
                .map_err(|_| NiftiError::Unwritable(format!("a side of {length} is too long")))?;
        }
        let [x, y, z] = sides;
        for (at, side) in
            [(40, 4), (42, x), (44, y), (46, z), (48, channels), (50, 1), (52, 1), (54, 1)]
        {
            put(at, &side.to_le_bytes());
        }
        put(92, &1_f32.to_le_bytes()); // pixdim[4]: was seconds, if anything
        put(123, &[like.place[123] & 7]); // the unit of space without that of time
    }
    put(0, &(HEADER_BYTES as u32).to_le_bytes());
    put(38, b"r");
    put(70, &kind.code().to_le_bytes());
    put(72, &((kind.bytes() * 8) as i16).to_le_bytes());
    put(108, &(DATA_OFFSET_MIN as f32).to_le_bytes());
    put(148, b"cpcr");
    put(344, b"n+1\0");
    Ok(header)
}

/// Header and voxels, gzipped or not.
fn packed(header: &[u8], voxels: Voxels<'_>, gzip: bool) -> Result<Vec<u8>, NiftiError> {
    let mut bytes = Vec::new();
    if gzip {
        let mut packed = GzEncoder::new(&mut bytes, Compression::default());
        write(&mut packed, header, voxels)?;
        packed.finish()?;
    } else {
        write(&mut bytes, header, voxels)?;
    }
    Ok(bytes)
}

fn write(to: &mut impl Write, header: &[u8], voxels: Voxels<'_>) -> Result<(), NiftiError> {
    to.write_all(header)?;
    match voxels {
        Voxels::Labels(voxels) => to.write_all(voxels)?,
        Voxels::Floats(voxels) => {
            for part in voxels.chunks(1 << 14) {
                let part: Vec<u8> = part.iter().flat_map(|value| value.to_le_bytes()).collect();
                to.write_all(&part)?;
            }
        }
    }
    Ok(())
}

fn header(geometry: &Geometry, kind: Kind) -> Result<Vec<u8>, NiftiError> {
    let mut header = vec![0; DATA_OFFSET_MIN as usize];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    let single = |value: f64| {
        let single = value as f32;
        let why = || NiftiError::Unwritable(format!("{value} is no 32-bit number"));
        single.is_finite().then_some(single.to_le_bytes()).ok_or_else(why)
    };
    put(0, &(HEADER_BYTES as u32).to_le_bytes());
    put(38, b"r"); // Analyze's `regular`, which some programs still look for
    let used = if geometry.shape[3] > 1 { 4_i16 } else { 3 };
    put(40, &used.to_le_bytes());
    for at in 0..7 {
        let side = geometry.shape.get(at).copied().unwrap_or(1);
        let side = i16::try_from(side).ok().filter(|side| *side > 0).ok_or_else(|| {
            NiftiError::Unwritable(format!("a side of {side} voxels is not 1..={}", i16::MAX))
        })?;
        put(42 + 2 * at, &side.to_le_bytes());
    }
    put(70, &kind.code().to_le_bytes());
    put(72, &((kind.bytes() * 8) as i16).to_le_bytes());
    put(76, &single(1.0)?);
    for (at, size) in geometry.spacing_mm.unwrap_or_default().into_iter().enumerate() {
        put(80 + 4 * at, &single(size)?);
    }
    put(108, &single(DATA_OFFSET_MIN as f64)?);
    put(112, &single(1.0)?);
    put(123, &[MILLIMETRES]);
    put(148, b"cpcr");
    if let Some(affine) = geometry.affine {
        put(254, &SCANNER.to_le_bytes());
        for (at, value) in affine[..3].iter().flatten().enumerate() {
            put(280 + 4 * at, &single(*value)?);
        }
    }
    put(344, b"n+1\0");
    Ok(header)
}
