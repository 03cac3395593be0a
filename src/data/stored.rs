//! A dataset in an object store: [`Store`] as the reader and writer that datasets use.

use std::ops::Range;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;

use super::source::{ObjectReader, ObjectWriter, SourceError};
use crate::store::{Created, ReadFaults, Store, StoreError};

impl From<StoreError> for SourceError {
    fn from(error: StoreError) -> Self {
        if error.is_not_found() { Self::NotFound } else { Self::Other(Box::new(error)) }
    }
}

impl ObjectReader for Store {
    fn get<'a>(&'a self, path: &'a str) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        async move { Ok(Store::get(self, path).await?) }.boxed()
    }

    fn get_range<'a>(
        &'a self,
        path: &'a str,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        async move { Ok(Store::get_range(self, path, range).await?) }.boxed()
    }

    fn mismatch(&self, path: &str, offset: u64) {
        Store::mismatch(self, path, offset);
    }

    fn read_faults(&self) -> ReadFaults {
        Store::read_faults(self)
    }
}

impl ObjectWriter for Store {
    fn put<'a>(&'a self, path: &'a str, bytes: Bytes) -> BoxFuture<'a, Result<(), SourceError>> {
        async move { Ok(Store::put(self, path, bytes).await?) }.boxed()
    }

    fn create<'a>(
        &'a self,
        path: &'a str,
        bytes: Bytes,
    ) -> BoxFuture<'a, Result<bool, SourceError>> {
        async move { Ok(Store::create(self, path, bytes).await? == Created::New) }.boxed()
    }

    fn list<'a>(&'a self, folder: &'a str) -> BoxFuture<'a, Result<Vec<String>, SourceError>> {
        let paths = async move {
            let objects = Store::list(self, folder).await?;
            Ok(objects.into_iter().map(|object| object.path).collect())
        };
        paths.boxed()
    }

    fn delete<'a>(&'a self, path: &'a str) -> BoxFuture<'a, Result<(), SourceError>> {
        async move { Ok(Store::delete(self, path).await?) }.boxed()
    }
}
