//! Why a NIfTI file could not be read or made, named by what the caller can do. No paths: who
//! opened the file knows its name.

/// Why a file is no image for this program.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NiftiError {
    /// Another format, for which there is a converter.
    #[error("it is DICOM: convert the series with dcm2niix first and import the .nii.gz it makes")]
    Dicom,
    /// Another format altogether: the wrong file.
    #[error("it is no NIfTI-1 file: {0}")]
    NotNifti(&'static str),
    /// NIfTI, of a kind that is not read here: convert it.
    #[error("{0}")]
    Unsupported(String),
    /// It contradicts itself or is cut short: fetch or make it again.
    #[error("it is damaged: {0}")]
    Damaged(String),
    /// Larger than this program reads: crop or split it.
    #[error("{bytes} bytes of voxels are more than the {bytes_max} that are read")]
    TooLarge {
        /// What the header claims.
        bytes: u64,
        /// The most that is read.
        bytes_max: u64,
    },
    /// What was to be written is no NIfTI-1 image: a mistake of the caller's.
    #[error("it cannot be written as NIfTI-1: {0}")]
    Unwritable(String),
    /// The file system failed.
    #[error(transparent)]
    Io(std::io::Error),
}

impl NiftiError {
    pub(super) fn damaged(why: impl Into<String>) -> Self {
        Self::Damaged(why.into())
    }

    pub(super) fn unsupported(what: impl Into<String>) -> Self {
        Self::Unsupported(what.into())
    }
}

impl From<std::io::Error> for NiftiError {
    /// What the gzip decoder has against its input is damage; the rest is the file system's.
    fn from(error: std::io::Error) -> Self {
        use std::io::ErrorKind::{InvalidData, InvalidInput, UnexpectedEof};
        match error.kind() {
            InvalidData | InvalidInput | UnexpectedEof => Self::Damaged(error.to_string()),
            _ => Self::Io(error),
        }
    }
}
