//! Signs of life for a platform's probes: two files in a folder, touched by a process's own loop.
//!
//! `alive` says that the loop turns, `ready` that it has what it needs (an agent: its coordinator). A probe is
//! another process, `cpcr probe`, which looks how old they are: no port, no server, nothing that could be asked by others.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// A process is taken for dead, or not ready, when its file is older: it touches it every second.
const OLD: Duration = Duration::from_secs(15);

/// What a file says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sign {
    /// The loop turns.
    Alive,
    /// It has what it needs.
    Ready,
}

impl Sign {
    fn file(self) -> &'static str {
        match self {
            Self::Alive => "alive",
            Self::Ready => "ready",
        }
    }
}

/// Where signs are left; nowhere, unless somebody asked for them.
#[derive(Debug, Clone, Default)]
pub struct Signs {
    folder: Option<PathBuf>,
}

impl Signs {
    /// In `folder`, which is made.
    ///
    /// # Errors
    /// Where it cannot be made, or nothing can be written to it.
    pub fn in_folder(folder: PathBuf) -> std::io::Result<Self> {
        std::fs::create_dir_all(&folder)?;
        let signs = Self { folder: Some(folder) };
        signs.write(Sign::Alive)?;
        Ok(signs)
    }

    /// Leaves a sign; the process is alive in either case. A full disk looks like a process that hangs, and is logged.
    pub fn give(&self, sign: Sign) {
        for sign in [Some(Sign::Alive), (sign == Sign::Ready).then_some(sign)].into_iter().flatten()
        {
            if let Err(error) = self.write(sign) {
                tracing::debug!(%error, ?sign, "no sign of life could be left");
            }
        }
    }

    fn write(&self, sign: Sign) -> std::io::Result<()> {
        match &self.folder {
            Some(folder) => std::fs::write(folder.join(sign.file()), "1"),
            None => Ok(()),
        }
    }
}

/// What a probe finds in a folder.
///
/// # Errors
/// In words: there is no such sign, or it is old.
pub fn look(folder: &Path, sign: Sign) -> Result<(), String> {
    let path = folder.join(sign.file());
    let said = |error: std::io::Error| format!("{}: {error}", path.display());
    let modified = std::fs::metadata(&path).and_then(|data| data.modified()).map_err(said)?;
    // One from the future: the clock was set back, and the next sign will be of now.
    let age = SystemTime::now().duration_since(modified).unwrap_or_default();
    if age > OLD {
        return Err(format!("{} is {} s old", path.display(), age.as_secs()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sign_is_seen_until_it_is_old() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("state");
        assert!(look(&folder, Sign::Alive).is_err());
        let signs = Signs::in_folder(folder.clone()).unwrap();
        assert_eq!(look(&folder, Sign::Alive), Ok(()));
        assert!(look(&folder, Sign::Ready).is_err());
        signs.give(Sign::Ready);
        assert_eq!(look(&folder, Sign::Ready), Ok(()));
        let old = SystemTime::now() - Duration::from_secs(60);
        std::fs::File::open(folder.join("ready")).unwrap().set_modified(old).unwrap();
        assert!(look(&folder, Sign::Ready).unwrap_err().contains("is 60 s old"));
        signs.give(Sign::Ready);
        assert_eq!(look(&folder, Sign::Ready), Ok(()), "it is touched again");
        Signs::default().give(Sign::Ready); // nobody asked
    }
}
