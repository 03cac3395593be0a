//! A store engine that fails on command: what a killed process or a lost answer looks like.
//!
//! For tests of every commit protocol in this crate. It stands over a real engine and counts
//! operations; nothing in production code makes one.

use std::fmt;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

/// How operation `n` and its successors go wrong. Operations count from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// None does.
    Never,
    /// Operation `n` and all later ones do nothing: the process died, or the network did.
    DeadFrom(u64),
    /// Operation `n` takes effect but its answer is lost; later ones work.
    AnswerLostAt(u64),
    /// Operation `n` does nothing; later ones work.
    FailsAt(u64),
}

/// An engine that passes everything on, except what its [`Fault`] says.
#[derive(Debug)]
pub struct FaultyStore {
    inner: Arc<dyn ObjectStore>,
    fault: Fault,
    operations: AtomicU64,
}

/// What becomes of one operation.
enum Fate {
    Works,
    Fails,
    AnswerLost,
}

impl FaultyStore {
    /// Over `inner`.
    #[must_use]
    pub fn new(inner: Arc<dyn ObjectStore>, fault: Fault) -> Arc<Self> {
        Arc::new(Self { inner, fault, operations: AtomicU64::new(0) })
    }

    /// How many operations were asked for.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.operations.load(Ordering::SeqCst)
    }

    fn next(&self) -> Fate {
        let n = self.operations.fetch_add(1, Ordering::SeqCst);
        match self.fault {
            Fault::DeadFrom(from) if n >= from => Fate::Fails,
            Fault::FailsAt(at) if n == at => Fate::Fails,
            Fault::AnswerLostAt(at) if n == at => Fate::AnswerLost,
            _ => Fate::Works,
        }
    }

    async fn run<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        match self.next() {
            Fate::Works => work.await,
            Fate::Fails => Err(injected()),
            Fate::AnswerLost => work.await.and(Err(injected())),
        }
    }
}

fn injected() -> Error {
    // Read as a server error, so that it counts as transient.
    Error::Generic { store: "faulty", source: "injected: status code: 503".into() }
}

impl fmt::Display for FaultyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FaultyStore({}, {:?})", self.inner, self.fault)
    }
}

/// What `#[async_trait]`, which the engine's trait is written in, makes of an `async fn`.
type Boxed<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

#[allow(clippy::type_complexity)]
impl ObjectStore for FaultyStore {
    fn put_opts<'s, 'p, 'a>(
        &'s self,
        location: &'p Path,
        payload: PutPayload,
        opts: PutOptions,
    ) -> Boxed<'a, Result<PutResult>>
    where
        's: 'a,
        'p: 'a,
    {
        Box::pin(self.run(self.inner.put_opts(location, payload, opts)))
    }

    fn put_multipart_opts<'s, 'p, 'a>(
        &'s self,
        location: &'p Path,
        opts: PutMultipartOptions,
    ) -> Boxed<'a, Result<Box<dyn MultipartUpload>>>
    where
        's: 'a,
        'p: 'a,
    {
        Box::pin(self.run(self.inner.put_multipart_opts(location, opts)))
    }

    fn get_opts<'s, 'p, 'a>(
        &'s self,
        location: &'p Path,
        options: GetOptions,
    ) -> Boxed<'a, Result<GetResult>>
    where
        's: 'a,
        'p: 'a,
    {
        Box::pin(self.run(self.inner.get_opts(location, options)))
    }

    fn get_ranges<'s, 'p, 'r, 'a>(
        &'s self,
        location: &'p Path,
        ranges: &'r [Range<u64>],
    ) -> Boxed<'a, Result<Vec<Bytes>>>
    where
        's: 'a,
        'p: 'a,
        'r: 'a,
    {
        Box::pin(self.run(self.inner.get_ranges(location, ranges)))
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        let failed = || futures::stream::once(async { Err(injected()) });
        match self.next() {
            Fate::Works => self.inner.delete_stream(locations),
            Fate::Fails => failed().boxed(),
            Fate::AnswerLost => self
                .inner
                .delete_stream(locations)
                .map(|deleted| deleted.and(Err(injected())))
                .boxed(),
        }
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        match self.next() {
            Fate::Works => self.inner.list(prefix),
            _ => futures::stream::once(async { Err(injected()) }).boxed(),
        }
    }

    fn list_with_delimiter<'s, 'p, 'a>(
        &'s self,
        prefix: Option<&'p Path>,
    ) -> Boxed<'a, Result<ListResult>>
    where
        's: 'a,
        'p: 'a,
    {
        Box::pin(self.run(self.inner.list_with_delimiter(prefix)))
    }

    fn copy_opts<'s, 'f, 't, 'a>(
        &'s self,
        from: &'f Path,
        to: &'t Path,
        options: CopyOptions,
    ) -> Boxed<'a, Result<()>>
    where
        's: 'a,
        'f: 'a,
        't: 'a,
    {
        Box::pin(self.run(self.inner.copy_opts(from, to, options)))
    }
}
