//! Other people's files into datasets. One file or folder per source format.

pub mod acdc;
pub mod acdc_h5;
pub mod nifti;
pub mod nnunet;
mod pattern;

use std::path::Path;

use super::error::DataError;

pub use pattern::Pattern;

/// Does `work` with every one of `plans`, side by side on up to `threads` threads; results in order.
fn side_by_side<P: Sync, T: Send>(
    plans: &[P],
    threads: usize,
    work: impl Fn(&P) -> Result<T, DataError> + Sync,
) -> Vec<Result<T, DataError>> {
    let per_thread = plans.len().div_ceil(threads.max(1)).max(1);
    let work = &work;
    std::thread::scope(|scope| {
        let parts: Vec<_> = plans
            .chunks(per_thread)
            .map(|part| scope.spawn(move || part.iter().map(work).collect()))
            .collect();
        let failed = |_| vec![Err(DataError::Thread("an import thread panicked".to_owned()))];
        let joined = parts.into_iter().map(|part| part.join().unwrap_or_else(failed));
        joined.collect::<Vec<Vec<_>>>().into_iter().flatten().collect()
    })
}

/// All of a file that may have up to `bytes_max` bytes.
fn read_small(path: &Path, bytes_max: u64) -> Result<Vec<u8>, DataError> {
    let bad = |why: String| DataError::Import { path: path.to_owned(), why };
    let len = std::fs::metadata(path).map_err(|error| bad(error.to_string()))?.len();
    if len > bytes_max {
        return Err(bad(format!("{len} bytes are more than the {bytes_max} allowed")));
    }
    std::fs::read(path).map_err(|error| bad(error.to_string()))
}
