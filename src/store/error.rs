//! What can go wrong with a store, named by what the caller decides.
//!
//! Every message is one line, names the URL or object, and says the way out where there is one.

use std::error::Error as StdError;
use std::io;

use object_store::client::{HttpError, HttpErrorKind};

/// Longest quotation of a server's own words in a message.
const DETAIL_CHARS_MAX: usize = 240;

/// A failed store operation.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Nothing is stored under that name.
    #[error("no object '{path}' in {url}")]
    NotFound {
        /// The store.
        url: String,
        /// The object, relative to the store.
        path: String,
    },
    /// A name that must be created is taken.
    #[error("'{path}' exists already in {url}")]
    AlreadyExists {
        /// The store.
        url: String,
        /// The object.
        path: String,
    },
    /// The bytes that came are not the bytes that were recorded, twice in a row.
    #[error("object '{path}' in {url} is damaged: {detail}")]
    Corrupt {
        /// The store.
        url: String,
        /// The object.
        path: String,
        /// Expected and found.
        detail: String,
    },
    /// Nobody answered, or only with server errors, until the deadline.
    #[error("cannot reach {url}: {detail}")]
    Unreachable {
        /// The store.
        url: String,
        /// What was tried, and what to check.
        detail: String,
    },
    /// The credentials or the file permissions do not allow it.
    #[error("access to '{path}' in {url} is denied: {detail}")]
    Denied {
        /// The store.
        url: String,
        /// The object.
        path: String,
        /// The server's words.
        detail: String,
    },
    /// The disk or quota is full.
    #[error(
        "no space left for '{path}' in {url}: free some and start again, nothing committed is lost"
    )]
    NoSpace {
        /// The store.
        url: String,
        /// The object.
        path: String,
    },
    /// The URL names no store.
    #[error("'{url}' is no usable store: {detail}")]
    BadUrl {
        /// As given.
        url: String,
        /// Why, and what would do.
        detail: String,
    },
    /// The store lets a name be created twice, so nothing committed there would be safe.
    #[error(
        "{url} does not honour create-if-absent ({detail}), so two coordinators could both win: use a store that does (AWS S3, GCS, Azure, MinIO, `cpcr s3`, a local folder)"
    )]
    Unsafe {
        /// The store.
        url: String,
        /// What the probe saw.
        detail: String,
    },
    /// Anything that retrying or asking differently will not cure.
    #[error("{operation} '{path}' in {url} failed: {detail}")]
    Other {
        /// The store.
        url: String,
        /// Verb: "read", "write".
        operation: &'static str,
        /// The object.
        path: String,
        /// The engine's words.
        detail: String,
    },
}

impl StoreError {
    /// Whether the object is simply not there.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }

    /// Whether waiting may cure it: the network or the server, not the request.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unreachable { .. })
    }

    /// Translates the engine's error for `operation` on `path`.
    pub(super) fn from_engine(
        url: &str,
        operation: &'static str,
        path: &str,
        error: &object_store::Error,
    ) -> Self {
        let (url, path) = (url.to_owned(), path.to_owned());
        let words = error.to_string();
        let detail = one_line(&words);
        if words.contains("NoSuchBucket") || words.contains("ContainerNotFound") {
            let detail = "the bucket does not exist: create it, or correct the URL".to_owned();
            return Self::BadUrl { url, detail };
        }
        // The embedded server's word for it.
        if words.contains("StorageFull") {
            return Self::NoSpace { url, path };
        }
        match io_kind(error) {
            Some(io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
                return Self::NoSpace { url, path };
            }
            Some(io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem) => {
                return Self::Denied { url, path, detail };
            }
            _ => {}
        }
        match error {
            object_store::Error::NotFound { .. } => Self::NotFound { url, path },
            object_store::Error::AlreadyExists { .. }
            | object_store::Error::Precondition { .. } => Self::AlreadyExists { url, path },
            object_store::Error::PermissionDenied { .. }
            | object_store::Error::Unauthenticated { .. } => Self::Denied { url, path, detail },
            object_store::Error::NotImplemented { .. } => Self::Unsafe { url, detail },
            _ if is_network(error) || words.contains("status code: 5") => {
                Self::Unreachable { url, detail }
            }
            _ => Self::Other { url, operation, path, detail },
        }
    }
}

/// The kind of the innermost `io::Error` in the chain, if it says more than "other".
fn io_kind(error: &(dyn StdError + 'static)) -> Option<io::ErrorKind> {
    chain(error).find_map(|cause| cause.downcast_ref::<io::Error>().map(io::Error::kind))
}

/// Whether the request never got an answer.
fn is_network(error: &(dyn StdError + 'static)) -> bool {
    http_kind(error).is_some_and(|kind| kind != HttpErrorKind::Decode)
}

/// How the HTTP client failed, if it did.
pub(super) fn http_kind(error: &(dyn StdError + 'static)) -> Option<HttpErrorKind> {
    chain(error).find_map(|cause| cause.downcast_ref::<HttpError>().map(HttpError::kind))
}

/// The error and its causes; bounded, because a chain comes from code that is not ours.
pub(super) fn chain<'a>(
    error: &'a (dyn StdError + 'static),
) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |cause: &&'a (dyn StdError + 'static)| (*cause).source())
        .take(16)
}

/// Whitespace squeezed, length bounded: servers answer with pages of XML.
pub(super) fn one_line(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(DETAIL_CHARS_MAX) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generic(source: io::Error) -> object_store::Error {
        object_store::Error::Generic { store: "test", source: Box::new(source) }
    }

    #[test]
    fn a_full_disk_is_told_from_a_broken_one() {
        let full = StoreError::from_engine(
            "file:///x",
            "write",
            "a",
            &generic(io::Error::from_raw_os_error(28)),
        );
        assert!(matches!(full, StoreError::NoSpace { .. }), "{full}");
        let broken = StoreError::from_engine(
            "file:///x",
            "write",
            "a",
            &generic(io::Error::from_raw_os_error(5)),
        );
        assert!(matches!(broken, StoreError::Other { .. }), "{broken}");
    }

    #[test]
    fn messages_are_one_bounded_line() {
        let line = one_line(&"<Error>\n  <Code>é</Code>\n".repeat(100));
        assert!(!line.contains('\n'));
        assert!(line.chars().count() <= DETAIL_CHARS_MAX + 1);
    }
}
