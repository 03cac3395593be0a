//! Tuning of the memory allocator, which is half of a CPU training step.
//!
//! mimalloc is linked in place of malloc for the whole process, libtorch included. By default it
//! returns freed pages to the system after a moment, and a step that allocates and frees
//! gigabytes then spends its time in page faults. It is not a global allocator declaration:
//! linking the crate is what replaces malloc.
#![allow(unsafe_code)]

use std::ffi::c_long;

/// `mi_option_purge_delay`: milliseconds until freed pages go back to the system; -1 is never.
const PURGE_DELAY: i32 = 15;

/// Keeps freed pages. Call it once, before the first tensor is made.
pub fn tune() {
    // SAFETY: mi_option_set writes one atomic word of mimalloc's option table and may be called
    // at any time from any thread; 15 is a valid index in the version this package pins.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1 as c_long) }
}

/// What purge delay is in force, in milliseconds; -1 is never.
#[must_use]
pub fn purge_delay_ms() -> i64 {
    // SAFETY: a read of one word of mimalloc's option table, valid at any time.
    unsafe { libmimalloc_sys::mi_option_get(PURGE_DELAY) }
}
