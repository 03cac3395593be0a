//! `splits_final.json`: a list of folds, each two lists of cases. Names are only ever looked up
//! among the cases that were found; no path is made of one.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use crate::data::error::DataError;
use crate::data::import::nifti::cases::Case;
use crate::data::import::read_small;
use crate::data::manifest::Split;

/// The largest list of folds that is read: five of a hundred thousand cases each.
const FOLDS_BYTES_MAX: u64 = 64 << 20;

#[derive(Debug, Deserialize)]
struct Fold {
    train: Vec<String>,
    val: Vec<String>,
}

/// Divides `cases` as fold `number` of the file at `path` does. Cases that it does not name are left
/// out, as nnU-Net leaves them; how many these are is returned.
pub(super) fn divide(
    cases: &mut Vec<Case>,
    path: &Path,
    number: usize,
) -> Result<usize, DataError> {
    let bad = |why: String| DataError::Import { path: path.to_owned(), why };
    let bytes = read_small(path, FOLDS_BYTES_MAX)?;
    let mut folds: Vec<Fold> = serde_json::from_slice(&bytes)
        .map_err(|error| bad(format!("it is no list of folds with `train` and `val`: {error}")))?;
    if number >= folds.len() {
        let count = folds.len();
        return Err(bad(format!("fold {number} is not in it: it has {count}, counted from 0")));
    }
    let fold = folds.swap_remove(number);
    let mut places = BTreeMap::new();
    for (names, split) in [(&fold.train, Split::Train), (&fold.val, Split::Val)] {
        for name in names {
            if let Some(other) = places.insert(name.as_str(), split) {
                let lists = if other == split { "twice" } else { "in `train` and in `val`" };
                return Err(bad(format!("fold {number} has case `{name}` {lists}")));
            }
        }
    }
    let mut patients: BTreeMap<&str, (&str, Split)> = BTreeMap::new();
    for case in cases.iter_mut() {
        let Some(split) = places.remove(case.name.as_str()) else { continue };
        case.split = split;
        let first = patients.entry(&case.patient).or_insert((&case.name, split));
        if first.1 != split {
            return Err(bad(format!(
                "fold {number} has patient `{}` in {} (case `{}`) and in {split} (case `{}`): \
                 divide by patient, or say with --patient what of a case's name is the patient",
                case.patient, first.1, first.0, case.name
            )));
        }
        if split == Split::Val && case.label.is_none() {
            let why =
                format!("fold {number} validates on case `{}`, which has no label", case.name);
            return Err(bad(why));
        }
    }
    if let Some((name, split)) = places.into_iter().next() {
        return Err(bad(format!(
            "fold {number} has case `{name}` in {split}, and imagesTr has no such case"
        )));
    }
    let named: Vec<bool> = {
        let lists = [&fold.train, &fold.val];
        let names: std::collections::BTreeSet<&String> = lists.into_iter().flatten().collect();
        cases.iter().map(|case| names.contains(&case.name)).collect()
    };
    let before = cases.len();
    let mut keep = named.into_iter();
    cases.retain(|_| keep.next() == Some(true));
    Ok(before - cases.len())
}
