//! Finds files by pattern and pairs images with labels. Reads names, and of files only enough to
//! say that they are DICOM.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::options::NiftiSource;
use crate::data::error::DataError;
use crate::data::import::Pattern;

/// The most files and folders that are looked at.
pub(in crate::data::import) const ENTRIES_MAX: usize = 1 << 20;

/// A case's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pair {
    pub case: String,
    pub image: PathBuf,
    pub label: Option<PathBuf>,
}

/// Cases by name. A label without an image is an error: one of the patterns is mistaken.
pub(super) fn pairs(source: &NiftiSource) -> Result<Vec<Pair>, DataError> {
    let depth =
        source.labels.iter().map(Pattern::folders).fold(source.images.folders(), usize::max);
    let mut files = Vec::new();
    let mut left = ENTRIES_MAX;
    walk(&source.folder, "", depth, &mut left, &mut files)?;
    let (mut images, mut labels) = (BTreeMap::new(), BTreeMap::new());
    for file in &files {
        if let Some((case, role)) = role_of(source, file)? {
            let cases = if role == Role::Image { &mut images } else { &mut labels };
            if let Some(other) = cases.insert(case, file) {
                let why = format!("case `{case}` is in `{other}`, too");
                return Err(bad(&source.folder.join(file), why));
            }
        }
    }
    if images.is_empty() {
        return Err(nothing_found(source, &source.images, &files));
    }
    if let Some(pattern) = source.labels.as_ref().filter(|_| labels.is_empty()) {
        return Err(nothing_found(source, pattern, &[]));
    }
    let pairs = images.into_iter().map(|(case, image)| Pair {
        case: case.to_owned(),
        image: source.folder.join(image),
        label: labels.remove(case).map(|label| source.folder.join(label)),
    });
    let pairs = pairs.collect();
    match labels.into_iter().next() {
        Some((case, label)) => {
            let why = format!("it is a label, and no image is called `{case}`");
            Err(bad(&source.folder.join(label), why))
        }
        None => Ok(pairs),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Image,
    Label,
}

/// What `file` is, and of which case. Where both patterns fit (`{case}.nii.gz` fits what
/// `{case}_gt.nii.gz` does), the one with more fixed text means it.
fn role_of<'a>(source: &NiftiSource, file: &'a str) -> Result<Option<(&'a str, Role)>, DataError> {
    let image = source.images.name_in(file).map(|case| (case, Role::Image));
    let Some(labels) = &source.labels else { return Ok(image) };
    let label = labels.name_in(file).map(|case| (case, Role::Label));
    if image.is_none() || label.is_none() {
        return Ok(image.or(label));
    }
    match source.images.fixed_bytes().cmp(&labels.fixed_bytes()) {
        std::cmp::Ordering::Greater => Ok(image),
        std::cmp::Ordering::Less => Ok(label),
        std::cmp::Ordering::Equal => {
            let why = "the patterns for images and for labels both fit it";
            Err(bad(&source.folder.join(file), why))
        }
    }
}

/// Paths of files up to `depth` folders down, `/` between parts. Hidden ones are passed over, as a
/// shell's `*` does: archives made on a Mac hold a `._x.nii.gz` beside each `x.nii.gz`.
pub(in crate::data::import) fn walk(
    folder: &Path,
    prefix: &str,
    depth: usize,
    left: &mut usize,
    into: &mut Vec<String>,
) -> Result<(), DataError> {
    let entries = std::fs::read_dir(folder).map_err(|error| bad(folder, error))?;
    for entry in entries {
        let entry = entry.map_err(|error| bad(folder, error))?;
        *left = left
            .checked_sub(1)
            .ok_or_else(|| bad(folder, format!("more than {ENTRIES_MAX} files")))?;
        // A name that is no text fits no pattern.
        let Ok(name) = entry.file_name().into_string() else { continue };
        if name.starts_with('.') {
            continue;
        }
        let (name, path) = (format!("{prefix}{name}"), entry.path());
        if !path.is_dir() {
            into.push(name);
        } else if depth > 0 {
            walk(&path, &format!("{name}/"), depth - 1, left, into)?;
        }
    }
    Ok(())
}

fn nothing_found(source: &NiftiSource, pattern: &Pattern, files: &[String]) -> DataError {
    let mut why = format!("no file in it fits `{}`", pattern.text());
    if let Some(hint) = dicom_hint(files.iter().map(|file| source.folder.join(file))) {
        why += hint;
    }
    bad(&source.folder, why)
}

/// What to add to a refusal where one of the first few files is DICOM.
pub(in crate::data::import) fn dicom_hint(
    files: impl Iterator<Item = PathBuf>,
) -> Option<&'static str> {
    let hint = "; it holds DICOM: convert that with dcm2niix first and import what it makes";
    files.take(16).any(|path| is_dicom(&path)).then_some(hint)
}

fn is_dicom(path: &Path) -> bool {
    let mut start = Vec::new();
    let read = File::open(path).and_then(|file| file.take(132).read_to_end(&mut start));
    read.is_ok() && start.ends_with(b"DICM") && start.len() == 132
}

fn bad(path: &Path, why: impl ToString) -> DataError {
    DataError::Import { path: path.to_owned(), why: why.to_string() }
}
