//! How this trainer does, in numbers: kept by the loop after every step, said by the pulse once a second.
//!
//! Counts only ever grow, from the process's start: what is lost on the way to the coordinator costs nothing. Nothing is
//! decided here.

use std::sync::{Arc, Mutex, PoisonError};

use super::setup::Trainer;
use crate::bridge::cuda;
use crate::data::Loader;
use crate::proto::Vitals;
use crate::store::FaultKind;
use crate::telemetry::{Phase, StepTrace};

/// The newest, shared with the thread that says it; none before the first step.
pub type Shared = Arc<Mutex<Option<Vitals>>>;

/// The step that `trace` timed has been done, in `took_s`.
pub fn stepped(t: &Trainer, shared: &Shared, trace: &StepTrace, took_s: f64) {
    let stats = t.loader.as_ref().map(Loader::stats).unwrap_or_default();
    let faults = t.dataset.read_faults();
    let cache = t.dataset.cache_counts().unwrap_or_default();
    let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
    let vitals = shared.get_or_insert_default();
    vitals.step = t.step;
    vitals.steps += 1;
    vitals.steps_s += took_s;
    for phase in Phase::ALL {
        let spent = trace.spent(phase).as_secs_f64();
        // A key is allocated once.
        match vitals.phases_s.get_mut(phase.name()) {
            Some(sum) => *sum += spent,
            None => drop(vitals.phases_s.insert(phase.name().to_owned(), spent)),
        }
    }
    vitals.queue = stats.ready as u64;
    (vitals.requests, vitals.bytes) = (faults.requests, faults.bytes);
    if faults.total() > 0 {
        let seen = FaultKind::ALL.into_iter().filter(|kind| faults.of(*kind) > 0);
        vitals.faults = seen.map(|kind| (kind.name().to_owned(), faults.of(kind))).collect();
    }
    (vitals.cache_hits, vitals.cache_misses) = (cache.hits, cache.misses);
    // The driver is asked once for each time that it is said, not in every step.
    if vitals.gpu_memory.is_none() && t.device.is_cuda() {
        vitals.gpu_memory = cuda::memory_used();
    }
}

/// What is to be said now: the loop's newest, with what the kernel says of this process.
pub fn taken(shared: &Shared) -> Option<Vitals> {
    let newest = {
        let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
        let newest = shared.clone()?;
        shared.as_mut()?.gpu_memory = None;
        newest
    };
    let (memory, page_faults) = of_this_process();
    Some(Vitals { memory, page_faults, ..newest })
}

/// Resident bytes and major page faults; zeros where the kernel does not say.
fn of_this_process() -> (u64, u64) {
    let read = |file| std::fs::read_to_string(file).unwrap_or_default();
    let statm = read("/proc/self/statm");
    let pages: u64 = statm.split(' ').nth(1).and_then(|n| n.parse().ok()).unwrap_or_default();
    let stat = read("/proc/self/stat");
    // The name, which may hold anything, ends at the last parenthesis; the tenth field after it is meant.
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    let faults = fields.split_whitespace().nth(9).and_then(|n| n.parse().ok());
    (pages * rustix::param::page_size() as u64, faults.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_said_before_the_first_step_and_then_what_the_kernel_says_too() {
        let shared = Shared::default();
        assert_eq!(taken(&shared), None);
        *shared.lock().unwrap() = Some(Vitals { steps: 3, ..Vitals::default() });
        let vitals = taken(&shared).unwrap();
        assert_eq!(vitals.steps, 3);
        assert!(vitals.memory > 1 << 20, "{vitals:?}");
    }
}
