//! What a dataset that is being made depends on, so that a write goes on only with what it was begun with.
//!
//! Files count by name, size and time of change: their bytes are not read twice.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::WriteOptions;
use crate::data::error::DataError;
use crate::data::manifest::Split;

/// Settings by name, and the files that are read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    settings: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    files: Option<Files>,
}

/// The source files together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Files {
    count: u64,
    bytes: u64,
    newest_ns: u64,
    /// Of all names, sizes and times, in order.
    sha256: String,
    /// Of all cases' names, patients and splits, in order.
    division_sha256: String,
}

/// A case as far as a plan is concerned.
#[derive(Debug)]
pub(in crate::data) struct PlannedCase<'a> {
    pub name: &'a str,
    pub patient: &'a str,
    pub split: Split,
    pub files: Vec<PathBuf>,
}

impl Plan {
    /// A plan of these settings.
    pub fn new<const N: usize>(settings: [(&str, String); N]) -> Self {
        let settings = settings.map(|(name, value)| (name.to_owned(), value));
        Self { settings: settings.into(), files: None }
    }

    /// With the files of `cases`, below `folder`.
    pub(in crate::data) fn reading<'a>(
        mut self,
        folder: &Path,
        cases: impl Iterator<Item = Result<PlannedCase<'a>, DataError>>,
    ) -> Result<Self, DataError> {
        let (mut files, mut division) = (Sha256::new(), Sha256::new());
        let (mut count, mut bytes, mut newest_ns) = (0, 0, 0);
        for case in cases {
            let case = case?;
            division.update(format!("{}\0{}\0{}\n", case.name, case.patient, case.split));
            for path in &case.files {
                let bad = |error| DataError::Import { path: path.clone(), why: format!("{error}") };
                let (size, changed_ns) = stat(path).map_err(bad)?;
                let name = path.strip_prefix(folder).unwrap_or(path).display();
                files.update(format!("{name}\0{size}\0{changed_ns}\n"));
                (count, bytes) = (count + 1, bytes + size);
                newest_ns = changed_ns.max(newest_ns);
            }
        }
        self.files = Some(Files {
            count,
            bytes,
            newest_ns,
            sha256: hex::encode(files.finalize()),
            division_sha256: hex::encode(division.finalize()),
        });
        Ok(self)
    }

    /// What the layout and the program add.
    pub(super) fn add_layout(&mut self, options: &WriteOptions) {
        let all = [
            ("program", env!("CARGO_PKG_VERSION").to_owned()),
            ("name", options.name.clone()),
            ("classes", options.classes.join(", ")),
            ("channels", options.channels.join(", ")),
            ("preprocessing", format!("{:?}", options.preprocessing)),
            ("rows in a block", options.block_rows.to_string()),
            ("bytes in a shard", options.shard_bytes.to_string()),
            ("blocks in a small shard", options.shard_blocks.to_string()),
            ("zstd level", options.zstd_level.to_string()),
        ];
        self.settings.extend(all.map(|(name, value)| (name.to_owned(), value)));
    }

    /// How this plan differs from the one that was begun with; `None` if it does not.
    pub(super) fn difference(&self, begun: &Self) -> Option<String> {
        let none = "nothing".to_owned();
        let names = self.settings.keys().chain(begun.settings.keys());
        let mut found: Vec<String> = Vec::new();
        for name in names.collect::<std::collections::BTreeSet<_>>() {
            let value = |plan: &Self| plan.settings.get(name).unwrap_or(&none).clone();
            let (was, is) = (value(begun), value(self));
            if was != is {
                found.push(format!("{name} was `{was}` and is `{is}`"));
            }
        }
        match (&begun.files, &self.files) {
            (Some(was), Some(is)) => found.extend(is.difference(was)),
            (was, is) if was != is => found.push("the source is another one".to_owned()),
            _ => {}
        }
        (!found.is_empty()).then(|| found.join("; "))
    }
}

impl Files {
    fn difference(&self, was: &Self) -> Option<String> {
        let mut why = Vec::new();
        if self.sha256 != was.sha256 {
            why.push(match (self.count == was.count, self.bytes == was.bytes) {
                (true, true) if self.newest_ns != was.newest_ns => {
                    "a source file was changed meanwhile (its time of change is another)".to_owned()
                }
                (true, true) => "a source file has another name or time of change".to_owned(),
                _ => format!(
                    "the source was {} files of {} bytes and is {} files of {} bytes",
                    was.count, was.bytes, self.count, self.bytes
                ),
            });
        }
        if self.division_sha256 != was.division_sha256 {
            why.push("cases, their patients or their splits are others".to_owned());
        }
        (!why.is_empty()).then(|| why.join("; "))
    }
}

/// Size, and time of change in nanoseconds since 1970.
fn stat(path: &Path) -> std::io::Result<(u64, u64)> {
    let found = std::fs::metadata(path)?;
    let changed = found.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok((found.len(), u64::try_from(changed.as_nanos()).unwrap_or(u64::MAX)))
}
