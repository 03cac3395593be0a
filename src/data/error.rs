//! The one error of this module, its variants named by what the caller can do about them.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use super::sampler::DealError;
use super::source::SourceError;

/// Why data could not be read, written, imported or dealt.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// Nothing is stored under that name: the URL or the manifest is wrong.
    #[error("no object `{object}` in the dataset")]
    NotFound {
        /// Path of the object within the dataset.
        object: String,
    },
    /// Storage failed, after its own retries; trying later may help.
    #[error("read `{object}`: {source}")]
    Read {
        /// Path of the object within the dataset.
        object: String,
        /// What the store said.
        #[source]
        source: SourceError,
    },
    /// Storage refused what was written.
    #[error("write `{object}`: {source}")]
    Write {
        /// Path of the object within the dataset.
        object: String,
        /// What the store said.
        #[source]
        source: SourceError,
    },
    /// The bytes are not the ones that were written, however often they are fetched: restore the object.
    #[error("`{object}` is damaged: {what} (fetched {tries} times)")]
    Damaged {
        /// Path of the object within the dataset.
        object: String,
        /// Which bytes of it; expected and found.
        what: String,
        /// How often they were fetched.
        tries: u32,
    },
    /// A newer program wrote this: update `cpcr`.
    #[error("`{object}` has format {found}; this program reads up to {supported}: update it")]
    NewerFormat {
        /// Path of the object within the dataset.
        object: String,
        /// The format number found.
        found: u32,
        /// The newest one known here.
        supported: u32,
    },
    /// Intact, but not something this program can mean: the dataset was not made by `cpcr data`.
    #[error("`{object}` is not valid: {why}")]
    Invalid {
        /// Path of the object within the dataset.
        object: String,
        /// What is wrong with it.
        why: String,
    },
    /// A source file of an import cannot be used: repair or remove it.
    #[error("cannot import `{}`: {why}", path.display())]
    Import {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// What was asked for does not exist in this dataset: change the settings.
    #[error("{0}")]
    Unusable(String),
    /// Nothing is written over a dataset: choose another place, or remove it first.
    #[error(
        "the destination holds a dataset already: give another --out, or remove that one first"
    )]
    DatasetExists,
    /// The destination holds the beginning of another dataset: undo the change, or begin anew elsewhere.
    #[error(
        "the destination holds a part of an import of something else: {0}. Undo that, give another --out, or \
         remove the destination to begin anew"
    )]
    ChangedImport(String),
    /// Somebody else writes the same dataset to the same place, and was faster.
    #[error("another import writes to the same destination: {0}. This one stops")]
    AnotherImport(String),
    /// The batch cannot be dealt that way: change batch sizes or the number of workers.
    #[error(transparent)]
    Deal(#[from] DealError),
    /// The loader has been stopped, by an earlier error or by being dropped.
    #[error("the loader has stopped")]
    Stopped,
    /// A thread of the loader panicked: a bug in this program.
    #[error("a data thread failed: {0}")]
    Thread(String),
}

impl DataError {
    /// An [`DataError::Invalid`] about `object`.
    pub(crate) fn invalid(object: impl Into<String>, why: impl ToString) -> Self {
        Self::Invalid { object: object.into(), why: why.to_string() }
    }

    /// A read of `object` that failed with `source`.
    pub(crate) fn read(object: impl Into<String>, source: SourceError) -> Self {
        let object = object.into();
        match source {
            SourceError::NotFound => Self::NotFound { object },
            source => Self::Read { object, source },
        }
    }
}

/// What `read` finds. Libraries that panic over bytes that no writer makes have found damage, which `damaged` words.
pub(crate) fn caught<T, E>(
    damaged: impl FnOnce(&str) -> E,
    read: impl FnOnce() -> Result<T, E>,
) -> Result<T, E> {
    catch_unwind(AssertUnwindSafe(read))
        .unwrap_or_else(|_| Err(damaged("its structure is damaged")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_of_a_library_is_damage() {
        let of_a_library = |bytes: &[u8]| Ok::<u8, String>(bytes[7]);
        let read = |bytes: &[u8]| caught(str::to_owned, || of_a_library(bytes));
        assert_eq!(read(&[3; 8]), Ok(3));
        assert_eq!(read(&[3; 7]), Err("its structure is damaged".to_owned()));
    }
}
