//! The 348 bytes before the voxels: what they mean, and what they may claim. No voxel is read here.

use super::error::NiftiError;

/// Length of the header.
pub(super) const HEADER_BYTES: usize = 348;

/// Where voxels start at the earliest: after the header and the four bytes that announce extensions.
pub(super) const DATA_OFFSET_MIN: u64 = 352;

/// Fields that say where voxels lie: offset in the header, number of values, bytes of a value.
const PLACE: [(usize, usize, usize); 7] = [
    (39, 1, 1),   // dim_info
    (40, 8, 2),   // dim
    (76, 8, 4),   // pixdim, with the qform's handedness
    (123, 1, 1),  // xyzt_units
    (136, 1, 4),  // toffset
    (252, 2, 2),  // qform_code, sform_code
    (256, 18, 4), // quatern, qoffset, srow
];

/// How a voxel is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// 8-bit whole numbers from zero.
    U8,
    /// 8-bit whole numbers.
    I8,
    /// 16-bit whole numbers from zero.
    U16,
    /// 16-bit whole numbers.
    I16,
    /// 32-bit whole numbers from zero.
    U32,
    /// 32-bit whole numbers.
    I32,
    /// 32-bit floating point.
    F32,
    /// 64-bit floating point.
    F64,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 8] =
        [Self::U8, Self::I8, Self::U16, Self::I16, Self::U32, Self::I32, Self::F32, Self::F64];

    /// Bytes of a voxel.
    pub fn bytes(self) -> usize {
        match self {
            Self::U8 | Self::I8 => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::F64 => 8,
        }
    }

    /// The number that stands for it in a header (`DT_*` of `nifti1.h`).
    pub fn code(self) -> i16 {
        match self {
            Self::U8 => 2,
            Self::I16 => 4,
            Self::I32 => 8,
            Self::F32 => 16,
            Self::F64 => 64,
            Self::I8 => 256,
            Self::U16 => 512,
            Self::U32 => 768,
        }
    }

    fn from_code(code: i16) -> Result<Self, NiftiError> {
        Self::ALL.into_iter().find(|kind| kind.code() == code).ok_or_else(|| {
            NiftiError::unsupported(format!(
                "its voxels are of NIfTI datatype {code}, which is not read: convert them to \
                 float32"
            ))
        })
    }
}

/// Where an image's voxels lie.
#[derive(Debug, Clone, PartialEq)]
pub struct Geometry {
    /// Voxels along x, y, z and frames in time; 1 along what the file does not have.
    pub shape: [usize; 4],
    /// Millimetres between voxels along x, y, z; absent where the file gives none for a direction
    /// with more than one voxel.
    pub spacing_mm: Option<[f64; 3]>,
    /// Voxel index (x, y, z) to patient space (right, anterior, superior) in millimetres, rows of
    /// a 4 x 4 matrix: the sform, else the qform; absent where the file has neither.
    pub affine: Option<[[f64; 4]; 4]>,
}

impl Geometry {
    /// Voxels of one frame; `None` if that is no number.
    pub fn frame_voxels(&self) -> Option<usize> {
        self.shape[..3].iter().try_fold(1_usize, |all, side| all.checked_mul(*side))
    }
}

/// What a header says.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    /// Where the voxels lie in space.
    pub geometry: Geometry,
    /// How they are stored.
    pub kind: Kind,
    /// Stored value to meant value: times the first plus the second; absent where they are equal.
    pub scale: Option<(f64, f64)>,
    /// Whether numbers are stored with their high byte first.
    pub big_endian: bool,
    /// Where voxels start in the (inflated) file.
    pub data_offset: u64,
    /// The fields of [`PLACE`] where they stand, little-endian, and zeros elsewhere: for files
    /// that are to lie in the same place.
    pub(super) place: [u8; HEADER_BYTES],
}

impl Header {
    /// Reads the first bytes of a file, of which `start` holds up to [`HEADER_BYTES`].
    pub(super) fn parse(start: &[u8]) -> Result<Self, NiftiError> {
        if start.get(128..132) == Some(b"DICM") {
            return Err(NiftiError::Dicom);
        }
        if matches!(start.get(4..7), Some(b"n+2" | b"ni2")) {
            return Err(NiftiError::unsupported("it is NIfTI-2: convert it to NIfTI-1"));
        }
        let Some(bytes) = start.first_chunk::<HEADER_BYTES>() else {
            return Err(NiftiError::NotNifti("it is shorter than a header"));
        };
        let fields = Fields::new(bytes)?;
        let kind = Kind::from_code(fields.i16(70))?;
        if usize::try_from(fields.i16(72)) != Ok(kind.bytes() * 8) {
            let why = format!("{:?} voxels of {} bits", kind, fields.i16(72));
            return Err(NiftiError::damaged(why));
        }
        let shape = fields.shape()?;
        let unit_mm = fields.unit_mm()?;
        Ok(Self {
            geometry: Geometry {
                shape,
                spacing_mm: fields.spacing_mm(shape, unit_mm),
                affine: fields.affine(unit_mm)?,
            },
            kind,
            scale: fields.scale()?,
            big_endian: fields.big_endian,
            data_offset: fields.data_offset()?,
            place: fields.place(),
        })
    }

    /// Bytes of all voxels; `None` if that is no number.
    pub(super) fn data_bytes(&self) -> Option<u64> {
        let frames = u64::try_from(self.geometry.shape[3]).ok()?;
        let voxels = u64::try_from(self.geometry.frame_voxels()?).ok()?;
        voxels.checked_mul(frames)?.checked_mul(self.kind.bytes() as u64)
    }
}

/// Numbers out of a header in its byte order. Offsets are those of `nifti1.h`.
struct Fields<'a> {
    bytes: &'a [u8; HEADER_BYTES],
    big_endian: bool,
}

impl<'a> Fields<'a> {
    fn new(bytes: &'a [u8; HEADER_BYTES]) -> Result<Self, NiftiError> {
        let length = [bytes[0], bytes[1], bytes[2], bytes[3]];
        let length_is = |found: u32| found as usize == HEADER_BYTES;
        let big_endian = length_is(u32::from_be_bytes(length));
        if !big_endian && !length_is(u32::from_le_bytes(length)) {
            return Err(NiftiError::NotNifti("its first bytes are not a header's length"));
        }
        match &bytes[344..] {
            b"n+1\0" => Ok(Self { bytes, big_endian }),
            b"ni1\0" => Err(NiftiError::unsupported(
                "its voxels are in another file (.hdr and .img): convert the pair to one .nii",
            )),
            _ => Err(NiftiError::NotNifti("`n+1` is missing at the end of its header")),
        }
    }

    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut out = [0; N];
        out.copy_from_slice(&self.bytes[at..at + N]);
        if self.big_endian {
            out.reverse();
        }
        out
    }

    fn i16(&self, at: usize) -> i16 {
        i16::from_le_bytes(self.array(at))
    }

    fn f32(&self, at: usize) -> f64 {
        f64::from(f32::from_le_bytes(self.array(at)))
    }

    fn place(&self) -> [u8; HEADER_BYTES] {
        let mut place = [0; HEADER_BYTES];
        for (start, values, size) in PLACE {
            for at in (start..start + values * size).step_by(size) {
                let value = &mut place[at..at + size];
                value.copy_from_slice(&self.bytes[at..at + size]);
                if self.big_endian {
                    value.reverse();
                }
            }
        }
        place
    }

    fn shape(&self) -> Result<[usize; 4], NiftiError> {
        let count = self.i16(40);
        let used = match usize::try_from(count) {
            Ok(used @ 1..=7) => used,
            _ => return Err(NiftiError::damaged(format!("{count} dimensions"))),
        };
        let mut shape = [1; 4];
        for at in 0..used {
            let side = self.i16(42 + 2 * at);
            let Some(side) = usize::try_from(side).ok().filter(|side| *side > 0) else {
                return Err(NiftiError::damaged(format!("dimension {} is {side}", at + 1)));
            };
            match shape.get_mut(at) {
                Some(to) => *to = side,
                None if side == 1 => {}
                None => {
                    let why = format!("it has {used} dimensions: 2 to 4 are read");
                    return Err(NiftiError::unsupported(why));
                }
            }
        }
        if used < 2 {
            return Err(NiftiError::unsupported("it has one dimension: 2 to 4 are read"));
        }
        Ok(shape)
    }

    fn data_offset(&self) -> Result<u64, NiftiError> {
        let offset = self.f32(108);
        if offset == 0.0 {
            return Ok(DATA_OFFSET_MIN); // some programs leave it out
        }
        if !(DATA_OFFSET_MIN as f64..=u32::MAX.into()).contains(&offset) || offset.fract() != 0.0 {
            return Err(NiftiError::damaged(format!("its voxels start at byte {offset}")));
        }
        Ok(offset as u64)
    }

    /// `scl_slope` and `scl_inter`; a slope of zero means "as stored", and so does one that is no
    /// number, which some programs write.
    fn scale(&self) -> Result<Option<(f64, f64)>, NiftiError> {
        let (slope, intercept) = (self.f32(112), self.f32(116));
        if slope == 0.0 || !slope.is_finite() || (slope == 1.0 && intercept == 0.0) {
            return Ok(None);
        }
        if !intercept.is_finite() {
            return Err(NiftiError::damaged(format!("values are scaled by {slope} + {intercept}")));
        }
        Ok(Some((slope, intercept)))
    }

    /// Millimetres in the unit of length; files that name none mean millimetres.
    fn unit_mm(&self) -> Result<f64, NiftiError> {
        match self.bytes[123] & 7 {
            0 | 2 => Ok(1.0),
            1 => Ok(1e3),
            3 => Ok(1e-3),
            code => Err(NiftiError::unsupported(format!("unit of length {code} is unknown"))),
        }
    }

    /// `pixdim` along x, y, z. Its sign means nothing; nor does its size along a single voxel.
    fn spacing_mm(&self, shape: [usize; 4], unit_mm: f64) -> Option<[f64; 3]> {
        let size = |at: usize, side: usize| {
            let size = self.f32(80 + 4 * at).abs() * unit_mm;
            let usable = size.is_finite() && size > 0.0;
            if usable { Some(size) } else { (side == 1).then_some(1.0) }
        };
        Some([size(0, shape[0])?, size(1, shape[1])?, size(2, shape[2])?])
    }

    fn affine(&self, unit_mm: f64) -> Result<Option<[[f64; 4]; 4]>, NiftiError> {
        let mut affine = if self.i16(254) > 0 {
            let row = |at: usize| [0, 4, 8, 12].map(|column| self.f32(at + column));
            [row(280), row(296), row(312), [0.0, 0.0, 0.0, 1.0]]
        } else if self.i16(252) > 0 {
            self.qform()
        } else {
            return Ok(None);
        };
        for value in affine.iter_mut().take(3).flatten() {
            *value *= unit_mm;
            if !value.is_finite() {
                return Err(NiftiError::damaged(
                    "its orientation holds values that are no numbers",
                ));
            }
        }
        Ok(Some(affine))
    }

    /// The matrix of a unit quaternion, as `nifti_quatern_to_mat44` computes it.
    fn qform(&self) -> [[f64; 4]; 4] {
        let (mut b, mut c, mut d) = (self.f32(256), self.f32(260), self.f32(264));
        let square = b * b + c * c + d * d;
        let a = if 1.0 - square < 1e-7 {
            let length = square.sqrt();
            (b, c, d) = (b / length, c / length, d / length);
            0.0
        } else {
            (1.0 - square).sqrt()
        };
        let size = |at: usize| Some(self.f32(76 + 4 * at)).filter(|size| *size > 0.0);
        let hand = if self.f32(76) < 0.0 { -1.0 } else { 1.0 };
        let (x, y, z) =
            (size(1).unwrap_or(1.0), size(2).unwrap_or(1.0), size(3).unwrap_or(1.0) * hand);
        let row = |r: [f64; 3], offset: usize| [r[0] * x, r[1] * y, r[2] * z, self.f32(offset)];
        [
            row([a * a + b * b - c * c - d * d, 2.0 * (b * c - a * d), 2.0 * (b * d + a * c)], 268),
            row([2.0 * (b * c + a * d), a * a + c * c - b * b - d * d, 2.0 * (c * d - a * b)], 272),
            row([2.0 * (b * d - a * c), 2.0 * (c * d + a * b), a * a + d * d - c * c - b * b], 276),
            [0.0, 0.0, 0.0, 1.0],
        ]
    }
}
