//! Volume tables: where a large pool's volumes are listed, so that the manifest does not grow with them.
//!
//! The first 10,000 unlabelled training volumes stand in the manifest like all others; those after
//! them are listed in objects of 10,000 each, sealed by digests in the manifest. Trainers and
//! evaluation need none of them: the pool is a range of rows. `info`, `verify` and whoever asks for one of
//! these volumes read the table that has it.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::error::DataError;
use super::manifest::{
    FORMAT, FORMAT_TABLES, Manifest, Split, VolumeEntry, VolumeId, check_format,
};
use crate::types::ObjectDigest;

/// Unlabelled training volumes that the manifest itself lists.
pub const LISTED_MAX: usize = 10_000;

/// Volumes in a table, but the last.
pub const TABLE_VOLUMES: usize = 10_000;

/// The first half of a name's hash: a million names are compared by these.
pub(super) type NameKey = [u8; 16];

pub(super) fn name_key(name: &str) -> NameKey {
    let hash = Sha256::digest(name);
    let mut key = NameKey::default();
    key.copy_from_slice(&hash[..16]);
    key
}

/// The most volumes in a table that is read.
const TABLE_VOLUMES_MAX: u32 = 1 << 20;

/// One object that lists unlabelled training volumes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeTable {
    /// Path of the object.
    pub object: String,
    /// Length and hash of it.
    pub digest: ObjectDigest,
    /// Row, within the training split, of its first volume's first slice.
    pub first_row: u64,
    /// Slices of its volumes.
    pub rows: u64,
    /// How many volumes it lists.
    pub volumes: u32,
}

/// What such an object holds.
#[derive(Debug, Serialize, Deserialize)]
struct TableFile {
    format: u32,
    volumes: Vec<VolumeEntry>,
}

impl VolumeTable {
    /// Table number `number`, and its bytes.
    pub(crate) fn seal(
        number: usize,
        volumes: Vec<VolumeEntry>,
    ) -> Result<(Self, Bytes), DataError> {
        let object = format!("volumes/train-{number:05}.json");
        let first_row = volumes.first().map_or(0, |volume| volume.first_row);
        let rows = volumes.iter().map(|volume| u64::from(volume.slices)).sum();
        let count = volumes.len() as u32;
        let file = TableFile { format: FORMAT_TABLES, volumes };
        // A line each would double its size; nobody reads ten thousand of them.
        let mut bytes =
            serde_json::to_vec(&file).map_err(|error| DataError::invalid(&object, error))?;
        bytes.push(b'\n');
        let digest = ObjectDigest::of(&bytes);
        Ok((Self { object, digest, first_row, rows, volumes: count }, bytes.into()))
    }

    /// The volumes that its (verified) bytes list, checked against what the manifest says.
    pub(crate) fn parse(&self, bytes: &[u8]) -> Result<Vec<VolumeEntry>, DataError> {
        let invalid = |why: String| Err(DataError::invalid(&self.object, why));
        check_format(&self.object, bytes, FORMAT)?;
        let file: TableFile = serde_json::from_slice(bytes)
            .map_err(|error| DataError::invalid(&self.object, error))?;
        if file.volumes.len() != self.volumes as usize {
            return invalid(format!("{} volumes, not {}", file.volumes.len(), self.volumes));
        }
        let mut next = self.first_row;
        for volume in &file.volumes {
            if volume.split != Split::Train || volume.labelled {
                return invalid(format!("`{}` is not for training without labels", volume.name));
            }
            if volume.first_row != next || volume.slices == 0 {
                return invalid(format!("the rows of `{}` are not next in line", volume.name));
            }
            next += u64::from(volume.slices);
        }
        if next != self.first_row + self.rows {
            return invalid(format!("its volumes end at row {next}, not where the manifest says"));
        }
        Ok(file.volumes)
    }
}

/// Where the manifest's tables lead from row `first_row` of the training split on: to which row. Says what is
/// wrong with them.
pub(super) fn check(tables: &[VolumeTable], first_row: u64) -> Result<u64, String> {
    let mut next = first_row;
    let mut volumes = 0_u32;
    for table in tables {
        let fits = (1..=TABLE_VOLUMES_MAX).contains(&table.volumes)
            && table.rows >= u64::from(table.volumes);
        if !fits || table.first_row != next {
            return Err(format!("the rows of `{}` are not next in line", table.object));
        }
        next = next.saturating_add(table.rows);
        let all = volumes.checked_add(table.volumes).filter(|all| *all < VolumeId::TABLED_FIRST);
        volumes = all.ok_or("more volumes than can be numbered")?;
    }
    Ok(next)
}

impl Manifest {
    /// How many volumes of `split` are in tables.
    pub(super) fn tabled_count(&self, split: Split) -> usize {
        match split {
            Split::Train => self.tables.iter().map(|table| table.volumes as usize).sum(),
            Split::Val | Split::Test => 0,
        }
    }

    /// The table that has the volume, and its place there; `None` for one that is not in a table.
    pub(super) fn tabled(&self, id: VolumeId) -> Option<(usize, usize)> {
        let mut place = id.0.checked_sub(VolumeId::TABLED_FIRST)?;
        for (number, table) in self.tables.iter().enumerate() {
            if place < table.volumes {
                return Some((number, place as usize));
            }
            place -= table.volumes;
        }
        None
    }

    /// The number of the first volume of a table.
    pub(super) fn first_of_table(&self, number: usize) -> VolumeId {
        let before: u32 = self.tables[..number].iter().map(|table| table.volumes).sum();
        VolumeId(VolumeId::TABLED_FIRST + before)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volumes() -> Vec<VolumeEntry> {
        let volume = |at: u64| VolumeEntry {
            name: format!("v{at}"),
            patient: format!("p{at}"),
            split: Split::Train,
            labelled: false,
            spacing_mm: Some([1.0, 2.0, 0.1]),
            affine: None,
            first_row: 7 + 3 * at,
            slices: 3,
        };
        (0..4).map(volume).collect()
    }

    #[test]
    fn a_table_lists_what_it_was_made_of() {
        let (table, bytes) = VolumeTable::seal(2, volumes()).unwrap();
        assert_eq!((table.first_row, table.rows, table.volumes), (7, 12, 4));
        assert_eq!(table.object, "volumes/train-00002.json");
        assert_eq!(table.parse(&bytes).unwrap(), volumes());
    }

    #[test]
    fn what_does_not_add_up_is_refused() {
        type Change = fn(&mut Vec<VolumeEntry>);
        for (change, words) in [
            ((|v| v[1].labelled = true) as Change, "`v1` is not for training"),
            (|v| v[2].split = Split::Val, "`v2` is not for training"),
            (|v| v[3].first_row = 17, "`v3` are not next"),
            (|v| v[3].slices = 4, "end at row 20"),
            (|v| drop(v.pop()), "3 volumes, not 4"),
        ] {
            let (table, _) = VolumeTable::seal(0, volumes()).unwrap();
            let mut changed = volumes();
            change(&mut changed);
            let (_, bytes) = VolumeTable::seal(0, changed).unwrap();
            let error = table.parse(&bytes).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
        let (table, _) = VolumeTable::seal(0, volumes()).unwrap();
        let newer = br#"{"format": 9, "volumes": "otherwise"}"#;
        assert!(matches!(table.parse(newer), Err(DataError::NewerFormat { found: 9, .. })));
        assert_eq!(check(std::slice::from_ref(&table), 7), Ok(19));
        assert!(check(std::slice::from_ref(&table), 6).unwrap_err().contains("next in line"));
    }
}
