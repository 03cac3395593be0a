//! Other people's files into datasets. One file per source format.

pub mod acdc_h5;
