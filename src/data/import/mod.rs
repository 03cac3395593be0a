//! Other people's files into datasets. One file or folder per source format.

pub mod acdc;
pub mod acdc_h5;
pub mod nifti;
pub mod nnunet;
mod pattern;

use std::path::Path;

use super::error::DataError;

pub use pattern::Pattern;

/// All of a file that may have up to `bytes_max` bytes.
fn read_small(path: &Path, bytes_max: u64) -> Result<Vec<u8>, DataError> {
    let bad = |why: String| DataError::Import { path: path.to_owned(), why };
    let len = std::fs::metadata(path).map_err(|error| bad(error.to_string()))?.len();
    if len > bytes_max {
        return Err(bad(format!("{len} bytes are more than the {bytes_max} allowed")));
    }
    std::fs::read(path).map_err(|error| bad(error.to_string()))
}
