//! NIfTI-1: files to voxels in memory, label maps and images back to files.
//!
//! One file, plain or gzipped, told by its first bytes and not by its name; 2 to 4 dimensions, of
//! whole and floating-point numbers of up to 64 bits, in either byte order. Refused by name are
//! NIfTI-2, pairs of `.hdr` and `.img`, colours, complex and 64-bit whole numbers, and DICOM.
//! Nothing is resampled or turned here.
//!
//! Files come from outside and may be damaged or made to harm: what a header claims is compared
//! with the bytes that are there before memory is taken, gzip is inflated no further than the
//! header says, and no input ends the process. (The crate `nifti` 0.18 reserves what a header
//! claims before it looks for voxels, and never reaches the checksum of a gzipped file: that is
//! why this is written by hand.)
//!
//! The layout is that of `nifti1.h` (<https://nifti.nimh.nih.gov/nifti-1>).

mod error;
mod header;
mod read;
mod write;

pub use error::NiftiError;
pub use header::{Geometry, Header, Kind};
pub use read::{Nifti, read, read_file};
pub use write::{Extent, Voxels, encode, encode_like, write_file};

#[cfg(test)]
mod tests;
