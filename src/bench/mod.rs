//! Measurements that users can repeat: each is a function from options to a serialisable report.

pub mod data;
pub mod step;
