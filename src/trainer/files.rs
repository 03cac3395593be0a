//! Results on the user's own disk: whole or not at all.

use std::fs::Permissions;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Writes beside `path` and renames: whoever reads it sees the old file, or the whole new one.
pub(super) fn put(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    // What a plain file has, of which the process's mask is taken.
    let mut partial = tempfile::Builder::new()
        .prefix(".cpcr-")
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(folder.unwrap_or_else(|| Path::new(".")))?;
    partial.write_all(bytes)?;
    partial.persist(path)?;
    Ok(())
}
