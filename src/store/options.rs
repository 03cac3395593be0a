//! How long to wait, how often to try, and the settings that are not in the URL.

use std::time::Duration;

/// What opening a folder that is not there does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MissingFolder {
    /// Make it: for what will be written.
    Create,
    /// Answer `NotFound`: for what should be there already, so that a mistyped path stays a typo.
    Refuse,
}

/// Bounds and settings of a [`Store`](super::Store). Every wait is bounded by one of these.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// One request that is no read, from its first byte to its last.
    pub timeout: Duration,
    /// The first byte of the answer to a read; the rest of it may take as long, and then
    /// [`Self::throughput_min_bytes_per_s`] holds.
    pub first_byte: Duration,
    /// A read slower than this is given up and begun anew.
    pub throughput_min_bytes_per_s: u64,
    /// One connection attempt.
    pub connect_timeout: Duration,
    /// How often a request is sent again after its first failure. By default the deadline comes
    /// first, so that a running job rides out an outage as long as that.
    pub retries: usize,
    /// One request with all its retries, once the store has answered anything at all.
    pub deadline: Duration,
    /// The first answer of a store: a wrong endpoint is told in seconds, while a running job
    /// rides out an outage of `deadline`.
    pub first_contact: Duration,
    /// `file://` only: what to do when the folder is missing.
    pub missing_folder: MissingFolder,
    /// Settings that win over the environment, by the engine's names: `("aws_endpoint", "http://…")`.
    pub settings: Vec<(String, String)>,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(30),
            connect_timeout: Duration::from_secs(2),
            first_byte: Duration::from_secs(10),
            throughput_min_bytes_per_s: 256 << 10,
            retries: 10_000,
            deadline: Duration::from_secs(75),
            first_contact: Duration::from_secs(5),
            missing_folder: MissingFolder::Create,
            settings: Vec::new(),
        }
    }
}

impl StoreOptions {
    /// The same options with one more setting.
    #[must_use]
    pub fn with(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.settings.push((key.into(), value.into()));
        self
    }

    /// The same options, refusing a folder that is not there.
    #[must_use]
    pub fn existing(mut self) -> Self {
        self.missing_folder = MissingFolder::Refuse;
        self
    }
}
