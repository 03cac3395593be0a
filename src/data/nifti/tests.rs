//! Reading and writing on files that are made up here, byte by byte: sound, damaged and hostile.

use std::io::Write as _;

use proptest::prelude::*;

use super::*;
use crate::data::error::DataError;

/// A file in the making, with numbers in the byte order asked for.
struct Raw {
    bytes: Vec<u8>,
    big: bool,
}

impl Raw {
    /// `shape`: dimensions 1 to 4 and no more.
    fn new(kind: Kind, big: bool, shape: &[i16], values: &[f64]) -> Self {
        let mut raw = Self { bytes: vec![0; 352], big };
        raw.put(0, 348_u32.to_le_bytes());
        raw.i16(40, shape.len() as i16);
        for (at, side) in shape.iter().enumerate() {
            raw.i16(42 + 2 * at, *side);
        }
        raw.i16(70, kind.code());
        raw.i16(72, (kind.bytes() * 8) as i16);
        for (at, size) in [1.0, 0.5, 0.75, 8.0, 1.0].into_iter().enumerate() {
            raw.f32(76 + 4 * at, size);
        }
        raw.f32(108, 352.0);
        raw.bytes[344..348].copy_from_slice(b"n+1\0");
        for value in values {
            raw.push(kind, *value);
        }
        raw
    }

    fn put<const N: usize>(&mut self, at: usize, mut bytes: [u8; N]) {
        if self.big {
            bytes.reverse();
        }
        self.bytes[at..at + N].copy_from_slice(&bytes);
    }

    fn i16(&mut self, at: usize, value: i16) {
        self.put(at, value.to_le_bytes());
    }

    fn f32(&mut self, at: usize, value: f32) {
        self.put(at, value.to_le_bytes());
    }

    fn push(&mut self, kind: Kind, value: f64) {
        let mut bytes = match kind {
            Kind::U8 => (value as u8).to_le_bytes().to_vec(),
            Kind::I8 => (value as i8).to_le_bytes().to_vec(),
            Kind::U16 => (value as u16).to_le_bytes().to_vec(),
            Kind::I16 => (value as i16).to_le_bytes().to_vec(),
            Kind::U32 => (value as u32).to_le_bytes().to_vec(),
            Kind::I32 => (value as i32).to_le_bytes().to_vec(),
            Kind::F32 => (value as f32).to_le_bytes().to_vec(),
            Kind::F64 => value.to_le_bytes().to_vec(),
        };
        if self.big {
            bytes.reverse();
        }
        self.bytes.extend(bytes);
    }

    fn read(&self) -> Result<Nifti, NiftiError> {
        parse(&self.bytes)
    }

    fn gzipped(&self) -> Vec<u8> {
        gzip(&self.bytes)
    }
}

fn parse(bytes: &[u8]) -> Result<Nifti, NiftiError> {
    read(bytes, bytes.len() as u64)
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    packed.write_all(bytes).unwrap();
    packed.finish().unwrap()
}

/// A 2 x 3 x 2 image of 16-bit numbers with an sform.
fn small(big: bool) -> Raw {
    let values: Vec<f64> = (0..12).map(|at| f64::from(at * 37 - 100)).collect();
    let mut raw = Raw::new(Kind::I16, big, &[2, 3, 2], &values);
    raw.i16(254, 1);
    for (at, value) in
        [0.5, 0.0, 0.1, -9.0, 0.0, 0.75, 0.0, 7.0, 0.2, 0.0, 8.0, 3.5].into_iter().enumerate()
    {
        raw.f32(280 + 4 * at, value);
    }
    raw
}

fn refused(raw: &Raw) -> String {
    raw.read().unwrap_err().to_string()
}

#[test]
fn every_kind_and_byte_order_comes_back_exactly() {
    for kind in Kind::ALL {
        let (low, high) = match kind {
            Kind::U8 => (0.0, 255.0),
            Kind::I8 => (-128.0, 127.0),
            Kind::U16 => (0.0, 65535.0),
            Kind::I16 => (-32768.0, 32767.0),
            Kind::U32 => (0.0, f64::from(u32::MAX)),
            Kind::I32 => (f64::from(i32::MIN), f64::from(i32::MAX)),
            Kind::F32 => (f64::from(-1.5e30_f32), f64::from(f32::MAX)),
            Kind::F64 => (-1.0 / 3.0, f64::MAX),
        };
        let values = [low, high, 0.0, 1.0, 100.0, 7.0];
        for big in [false, true] {
            let raw = Raw::new(kind, big, &[3, 2], &values);
            for bytes in [raw.bytes.clone(), raw.gzipped()] {
                let image = parse(&bytes).unwrap();
                assert_eq!((image.header.kind, image.header.big_endian), (kind, big));
                assert_eq!(image.header.geometry.shape, [3, 2, 1, 1]);
                assert_eq!(image.frame(0, |value| value).unwrap(), values, "{kind:?} {big}");
                assert_eq!(image.frame(1, |value| value), None);
            }
        }
    }
}

#[test]
fn frames_scale_and_offset_are_followed() {
    for big in [false, true] {
        let values: Vec<f64> = (0..24).map(f64::from).collect();
        let mut raw = Raw::new(Kind::U8, big, &[2, 2, 2, 3], &values);
        raw.f32(112, 0.5);
        raw.f32(116, -10.0);
        raw.f32(108, 400.0);
        raw.bytes.splice(352..352, [0xAB; 48]);
        let image = raw.read().unwrap();
        assert_eq!(image.frames(), 3);
        let second: Vec<f64> = (8..16).map(|at| f64::from(at) * 0.5 - 10.0).collect();
        assert_eq!(image.frame(1, |value| value).unwrap(), second);
        assert_eq!(image.frame(usize::MAX, |value| value), None);
        raw.f32(112, f32::NAN); // "as stored"
        assert_eq!(raw.read().unwrap().frame(0, |value| value).unwrap(), values[..8]);
        raw.f32(112, 2.0);
        raw.f32(116, f32::INFINITY);
        assert!(matches!(raw.read(), Err(NiftiError::Damaged(_))));
    }
}

#[test]
fn trailing_dimensions_of_one_are_no_dimensions() {
    let raw = Raw::new(Kind::U8, false, &[2, 1, 1, 1, 1, 1, 1], &[1.0, 2.0]);
    assert_eq!(raw.read().unwrap().header.geometry.shape, [2, 1, 1, 1]);
    let raw = Raw::new(Kind::U8, false, &[1, 1, 1, 1, 2], &[1.0, 2.0]);
    assert!(refused(&raw).contains("2 to 4"));
}

#[test]
fn sform_comes_before_qform_and_neither_is_none() {
    let mut raw = small(true);
    let sform = raw.read().unwrap().header.geometry.affine.unwrap();
    assert_eq!(sform[1], [0.0, 0.75, 0.0, 7.0]);
    assert_eq!(sform[3], [0.0, 0.0, 0.0, 1.0]);
    // A quarter turn about z: x goes to y. `pixdim[0]` of -1 mirrors z.
    raw.i16(252, 1);
    raw.f32(264, std::f32::consts::FRAC_1_SQRT_2);
    raw.f32(76, -1.0);
    for (at, offset) in [11.0, 12.0, 13.0].into_iter().enumerate() {
        raw.f32(268 + 4 * at, offset);
    }
    assert_eq!(raw.read().unwrap().header.geometry.affine.unwrap(), sform);
    raw.i16(254, 0);
    let qform = raw.read().unwrap().header.geometry.affine.unwrap();
    let want = [
        [0.0, -0.75, 0.0, 11.0],
        [0.5, 0.0, 0.0, 12.0],
        [0.0, 0.0, -8.0, 13.0],
        [0.0, 0.0, 0.0, 1.0],
    ];
    for (found, want) in qform.iter().flatten().zip(want.iter().flatten()) {
        assert!((found - want).abs() < 1e-6, "{qform:?}");
    }
    // A half turn about x has a real part of zero.
    raw.f32(264, 0.0);
    raw.f32(256, 1.0);
    let half = raw.read().unwrap().header.geometry.affine.unwrap();
    assert_eq!((half[0][0], half[1][1], half[2][2]), (0.5, -0.75, 8.0));
    raw.f32(256, f32::NAN);
    assert!(refused(&raw).contains("no numbers"));
    raw.i16(252, 0);
    assert_eq!(raw.read().unwrap().header.geometry.affine, None);
}

#[test]
fn spacing_is_in_millimetres_or_absent() {
    let mut raw = small(false);
    let spacing = |raw: &Raw| raw.read().unwrap().header.geometry.spacing_mm;
    assert_eq!(spacing(&raw), Some([0.5, 0.75, 8.0]));
    raw.bytes[123] = 3; // micrometres
    let micro = raw.read().unwrap().header.geometry;
    assert!((micro.spacing_mm.unwrap()[2] - 0.008).abs() < 1e-12);
    assert!((micro.affine.unwrap()[1][3] - 0.007).abs() < 1e-12);
    raw.bytes[123] = 2 | 8;
    raw.f32(84, -0.75);
    assert_eq!(spacing(&raw), Some([0.5, 0.75, 8.0]));
    for none in [0.0, f32::NAN, f32::INFINITY] {
        raw.f32(84, none);
        assert_eq!(spacing(&raw), None);
    }
    raw.bytes[123] = 7;
    assert!(refused(&raw).contains("unit"));
}

#[test]
fn cut_anywhere_it_is_refused() {
    let raw = small(false);
    let image = raw.read().unwrap();
    for whole in [raw.bytes.clone(), raw.gzipped()] {
        for len in 0..whole.len() {
            let error = parse(&whole[..len]).unwrap_err();
            let named = matches!(error, NiftiError::Damaged(_) | NiftiError::NotNifti(_));
            assert!(named, "cut at {len}: {error}");
            // The length that the file system told before the file shrank.
            assert!(read(&whole[..len], whole.len() as u64).is_err(), "shrunk to {len}");
        }
        assert_eq!(parse(&whole).unwrap(), image);
    }
}

#[test]
fn hostile_sizes_are_refused_before_memory_is_taken() {
    let with = |sides: &[i16]| {
        let mut raw = Raw::new(Kind::F64, false, &[1, 1, 1, 1], &[0.0]);
        for (at, side) in sides.iter().enumerate() {
            raw.i16(40 + 2 * at, *side);
        }
        raw
    };
    for sides in [
        &[0_i16][..],
        &[-1],
        &[8],
        &[i16::MIN],
        &[3, 0],
        &[3, -1],
        &[3, i16::MIN],
        &[4, 1, 1, 1, 0],
        &[4, i16::MAX, i16::MAX, i16::MAX, i16::MAX],
        &[3, 2, 1, 1],
    ] {
        let raw = with(sides);
        for bytes in [raw.bytes.clone(), raw.gzipped()] {
            let error = parse(&bytes).unwrap_err();
            assert!(matches!(error, NiftiError::Damaged(_)), "{sides:?}: {error}");
        }
    }
    // More than is read, in a file that claims to be long enough.
    let error = read(&*with(&[4, 2000, 2000, 2000, 2]).bytes, u64::MAX).unwrap_err();
    assert!(matches!(error, NiftiError::TooLarge { .. }), "{error}");
    // A gzip that would inflate far beyond what its header tells of.
    let mut bomb = small(false);
    bomb.bytes.resize(8 << 20, 0);
    assert!(parse(&bomb.gzipped()).unwrap_err().to_string().contains("more follows"));
    bomb.bytes.truncate(1 << 20);
    assert!(parse(&bomb.gzipped()).is_ok());
}

#[test]
fn header_fields_that_contradict_are_refused() {
    type Change = fn(&mut Raw);
    let changes: [(Change, &str); 11] = [
        (|raw| raw.i16(72, 8), "16 voxels of 8 bits"),
        (|raw| raw.i16(70, 128), "datatype 128"),
        (|raw| raw.f32(108, 351.0), "byte 351"),
        (|raw| raw.f32(108, -1.0), "byte -1"),
        (|raw| raw.f32(108, 352.5), "byte 352.5"),
        (|raw| raw.f32(108, f32::NAN), "byte NaN"),
        (|raw| raw.f32(108, 1e9), "tells of"),
        (|raw| raw.f32(300, f32::INFINITY), "no numbers"),
        (|raw| raw.bytes[344..347].copy_from_slice(b"ni1"), ".img"),
        (|raw| raw.bytes[344] = 0, "n+1"),
        (|raw| raw.bytes[4..8].copy_from_slice(b"n+2\0"), "NIfTI-2"),
    ];
    for (change, words) in changes {
        for big in [false, true] {
            let mut raw = small(big);
            change(&mut raw);
            let error = refused(&raw);
            assert!(error.contains(words), "`{words}` is missing in `{error}`");
        }
    }
    // No offset is the usual one.
    let mut raw = small(false);
    raw.f32(108, 0.0);
    assert_eq!(raw.read().unwrap(), small(false).read().unwrap());
}

#[test]
fn other_formats_are_told_what_they_are() {
    let mut dicom = vec![0; 128];
    dicom.extend(b"DICM\x02\x00\x00\x00UL");
    for len in [132, 138, 4000] {
        dicom.resize(len, 0);
        let error = parse(&dicom).unwrap_err();
        assert!(matches!(error, NiftiError::Dicom) && error.to_string().contains("dcm2niix"));
        assert!(matches!(parse(&gzip(&dicom)), Err(NiftiError::Dicom)));
    }
    for other in [&b""[..], b"\x1f\x8b", b"\x89PNG\r\n\x1a\n", &[0; 400], b"\x89HDF\r\n\x1a\n"] {
        assert!(parse(other).is_err());
    }
    assert!(matches!(parse(&[0; 400]), Err(NiftiError::NotNifti(_))));
}

#[test]
fn damage_in_a_gzipped_file_does_not_pass() {
    let whole = small(false).gzipped();
    let image = parse(&whole).unwrap();
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 0xFF;
        // The gzip header's time and system are not under the checksum, and mean nothing.
        if let Ok(found) = parse(&bytes) {
            assert!(at < 10 && found == image, "a flip of byte {at} went unseen");
        }
    }
}

fn geometry() -> Geometry {
    Geometry {
        shape: [3, 2, 2, 1],
        spacing_mm: Some([0.5, 0.75, 8.0]),
        affine: Some([
            [-0.5, 0.0, 0.25, 90.0],
            [0.0, 0.75, 0.0, -126.0],
            [0.125, 0.0, 8.0, -72.5],
            [0.0, 0.0, 0.0, 1.0],
        ]),
    }
}

#[test]
fn what_is_written_reads_back_with_its_geometry() {
    let labels: Vec<u8> = (0..12).map(|at| at % 4).collect();
    let floats: Vec<f32> = (0..12).map(|at| at as f32 / 7.0 - 0.5).collect();
    for (frames, depth) in [(1, 2), (2, 1)] {
        let geometry = Geometry { shape: [3, 2, depth, frames], ..geometry() };
        for gzip in [false, true] {
            let bytes = encode(&geometry, Voxels::Labels(&labels), gzip).unwrap();
            let image = parse(&bytes).unwrap();
            assert_eq!((&image.header.geometry, image.header.kind), (&geometry, Kind::U8));
            let found: Vec<u8> =
                (0..frames).flat_map(|at| image.frame(at, |value| value as u8).unwrap()).collect();
            assert_eq!(found, labels);
            assert_eq!(bytes, encode(&geometry, Voxels::Labels(&labels), gzip).unwrap());
            let bytes = encode(&geometry, Voxels::Floats(&floats), gzip).unwrap();
            let image = parse(&bytes).unwrap();
            assert_eq!((&image.header.geometry, image.header.kind), (&geometry, Kind::F32));
            let found: Vec<f32> =
                (0..frames).flat_map(|at| image.frame(at, |value| value as f32).unwrap()).collect();
            assert_eq!(found, floats);
        }
    }
    let plain = Geometry { spacing_mm: None, affine: None, ..geometry() };
    let bytes = encode(&plain, Voxels::Labels(&labels), false).unwrap();
    assert_eq!(parse(&bytes).unwrap().header.geometry, plain);
}

#[test]
fn a_file_made_like_another_lies_where_that_one_does() {
    for big in [false, true] {
        let made = |big: bool| {
            let mut raw = Raw::new(Kind::I16, big, &[2, 3, 2, 1], &[5.0; 12]);
            raw.f32(76, -1.0);
            raw.i16(252, 1);
            raw.i16(254, 2);
            for at in 0..18 {
                raw.f32(256 + 4 * at, 0.05 * at as f32 + 0.01);
            }
            raw.f32(112, 2.0);
            raw.f32(116, -7.0);
            raw.bytes[39] = 0b11_10_01;
            raw.bytes[123] = 2 | 8; // millimetres, seconds
            raw
        };
        let (source, little) = (made(big).read().unwrap(), made(false).bytes);
        let bytes =
            encode_like(&source.header, Extent::Same, Voxels::Labels(&[3; 12]), false).unwrap();
        for (start, end) in [(39, 56), (76, 108), (123, 124), (136, 140), (252, 328)] {
            assert_eq!(bytes[start..end], little[start..end], "{start}, big endian: {big}");
        }
        assert_eq!(bytes[112..120], [0; 8], "no slope, no intercept");
        let mask = parse(&bytes).unwrap();
        assert_eq!(mask.header.geometry, source.header.geometry);
        assert_eq!(mask.frame(0, |value| value), Some(vec![3.0; 12]));
        // Probabilities of five classes.
        let floats = [0.5; 60];
        let channels = Extent::Channels(5);
        let bytes = encode_like(&source.header, channels, Voxels::Floats(&floats), true).unwrap();
        let many = parse(&bytes).unwrap();
        assert_eq!(many.header.geometry.shape, [2, 3, 2, 5]);
        assert_eq!(many.header.geometry.affine, source.header.geometry.affine);
        for (extent, voxels) in [(Extent::Same, 11), (Extent::Channels(40_000), 480_000)] {
            let voxels = vec![0; voxels];
            let error = encode_like(&source.header, extent, Voxels::Labels(&voxels), false);
            assert!(matches!(error, Err(NiftiError::Unwritable(_))), "{error:?}");
        }
    }
}

#[test]
fn what_does_not_fit_is_not_written() {
    let refused = |geometry: Geometry, voxels: usize| {
        let error = encode(&geometry, Voxels::Labels(&vec![0; voxels]), false).unwrap_err();
        assert!(matches!(error, NiftiError::Unwritable(_)), "{error}");
    };
    refused(geometry(), 11);
    refused(Geometry { shape: [0, 1, 1, 1], ..geometry() }, 0);
    refused(Geometry { shape: [40_000, 1, 1, 1], ..geometry() }, 40_000);
    refused(Geometry { shape: [usize::MAX, 2, 1, 1], ..geometry() }, 4);
    refused(Geometry { spacing_mm: Some([1.0, f64::NAN, 1.0]), ..geometry() }, 12);
    refused(Geometry { spacing_mm: Some([1.0, 1e300, 1.0]), ..geometry() }, 12);
}

#[test]
fn files_go_by_their_bytes_and_errors_name_them() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.nii.gz");
    write_file(&path, &geometry(), Voxels::Labels(&[1; 12])).unwrap();
    assert_eq!(std::fs::read(&path).unwrap()[..2], [0x1f, 0x8b]);
    assert_eq!(read_file(&path).unwrap().header.geometry, geometry());
    // Named like a gzipped file, and not gzipped: common, and harmless.
    std::fs::write(&path, &small(true).bytes).unwrap();
    assert!(read_file(&path).is_ok());
    std::fs::write(&path, &small(true).bytes[..360]).unwrap();
    for path in [path, folder.path().join("missing.nii"), folder.path().to_owned()] {
        let error = read_file(&path).unwrap_err();
        assert!(matches!(&error, DataError::Import { path: named, .. } if *named == path));
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    }
}

proptest! {
    /// Whatever stands in a header, the answer is an image of the bytes that are there, or an error.
    #[test]
    fn no_header_ends_the_process(
        at in 0_usize..348,
        noise in proptest::collection::vec(any::<u8>(), 1..64),
        big: bool,
        claimed in prop_oneof![Just(376_u64), any::<u64>()],
    ) {
        let mut bytes = small(big).bytes;
        let len = noise.len().min(348 - at);
        bytes[at..at + len].copy_from_slice(&noise[..len]);
        for bytes in [gzip(&bytes), bytes] {
            if let Ok(image) = read(&*bytes, claimed) {
                for frame in 0..image.frames() {
                    let voxels = image.frame(frame, |value| value).unwrap();
                    prop_assert_eq!(Some(voxels.len()), image.header.geometry.frame_voxels());
                }
            }
        }
    }
}
