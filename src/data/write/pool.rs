//! The threads that read and encode, how a write is to be done, and how far it is.
//!
//! What is under way is bounded by who hands work in, not here. A job that panics is an error of that job.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};

use futures::channel::oneshot;

use crate::data::error::DataError;

/// How a dataset is made, beside what goes into it.
#[derive(Debug, Clone, Default)]
pub struct Work {
    /// Threads that read and encode.
    pub threads: usize,
    /// Rows in a block, instead of the usual number.
    pub block_rows: Option<u32>,
    /// About how many bytes a shard has, instead of the usual number.
    pub shard_bytes: Option<u64>,
    /// Where the progress is told.
    pub meter: Arc<Meter>,
}

impl Work {
    /// On so many threads, all else as usual.
    pub fn on(threads: usize) -> Self {
        Self { threads, ..Self::default() }
    }
}

/// How far a long work is. Written by those who work, read by whoever shows it.
#[derive(Debug, Default)]
pub struct Meter {
    total: AtomicU64,
    done: AtomicU64,
    bytes: AtomicU64,
}

impl Meter {
    /// There are `total` parts to do.
    pub fn start(&self, total: u64) {
        self.total.store(total, Ordering::Relaxed);
    }

    /// One more of the parts is done.
    pub fn add_case(&self) {
        self.done.fetch_add(1, Ordering::Relaxed);
    }

    /// So many bytes were worked through.
    pub fn add_bytes(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Parts done, parts in all (zero before anything is known), bytes worked through.
    pub fn read(&self) -> (u64, u64, u64) {
        let load = |number: &AtomicU64| number.load(Ordering::Relaxed);
        (load(&self.done), load(&self.total), load(&self.bytes))
    }
}

type Job = Box<dyn FnOnce() + Send>;

/// Some threads, and the queue before them. They end when it is dropped, each after the job it has.
pub(super) struct Pool {
    queue: mpsc::Sender<Job>,
}

impl Pool {
    pub(super) fn start(threads: usize) -> Result<Self, DataError> {
        let (queue, jobs) = mpsc::channel::<Job>();
        let jobs = Arc::new(Mutex::new(jobs));
        for _ in 0..threads.max(1) {
            let jobs = Arc::clone(&jobs);
            let work = move || {
                loop {
                    let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok(job) = job else { return };
                    // Whoever waits for the job sees that its answer never comes.
                    catch_unwind(AssertUnwindSafe(job)).ok();
                }
            };
            std::thread::Builder::new()
                .name("cpcr-write".to_owned())
                .spawn(work)
                .map_err(|error| DataError::Thread(format!("start a thread: {error}")))?;
        }
        Ok(Self { queue })
    }

    /// Does `work` on one of the threads, as soon as one is free.
    pub(super) fn run<T: Send + 'static, W: FnOnce() -> T + Send + 'static>(
        &self,
        work: W,
    ) -> impl Future<Output = Result<T, DataError>> + use<T, W> {
        let (send, receive) = oneshot::channel();
        let job = Box::new(move || drop(send.send(work())));
        let queued = self.queue.send(job);
        async move {
            let failed = || DataError::Thread("it panicked over a case or a shard".to_owned());
            queued.map_err(|_| failed())?;
            receive.await.map_err(|_| failed())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_that_panics_is_an_error_and_the_thread_goes_on() {
        let pool = Pool::start(1).unwrap();
        let answer = futures::executor::block_on(pool.run(|| -> u32 { panic!("a test's own") }));
        assert!(matches!(answer, Err(DataError::Thread(_))));
        assert_eq!(futures::executor::block_on(pool.run(|| 7)).unwrap(), 7);
    }
}
