//! The GPUs that trainers of this machine can use, found without libtorch in this process.
//!
//! Device files say whether it is worth asking; the answer is that of `cpcr-engine devices`, which
//! opens the libtorch that trainers will use. A driver that is too old, or a libtorch for CPUs,
//! then counts as no GPU.

use std::path::Path;

use tokio::process::Command;

use super::{Failure, sibling};
use crate::worker::PARENT_VARIABLE;

/// The driver's control device, and that of Windows' Linux subsystem.
const DEVICE_FILES: [&str; 2] = ["/dev/nvidiactl", "/dev/dxg"];

/// The GPUs as `CUDA_VISIBLE_DEVICES` names them; empty on most machines without a question asked.
///
/// # Errors
/// [`Failure`] when the engine cannot be started.
pub async fn visible() -> Result<Vec<String>, Failure> {
    if !DEVICE_FILES.iter().any(|file| Path::new(file).exists()) {
        return Ok(Vec::new());
    }
    let output = Command::new(sibling("cpcr-engine")?)
        .arg("devices")
        // Not the parent of this process, which its environment may name.
        .env(PARENT_VARIABLE, std::process::id().to_string())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|error| Failure::failed(format!("cpcr-engine devices: {error}")))?;
    let said = String::from_utf8_lossy(&output.stdout);
    let Ok(count) = said.trim().parse() else {
        let why = String::from_utf8_lossy(&output.stderr);
        tracing::warn!("the GPUs of this machine could not be counted: {}", why.trim());
        return Ok(Vec::new());
    };
    Ok(names(std::env::var("CUDA_VISIBLE_DEVICES").ok().as_deref(), count))
}

/// The first `count` names of the user's own list, or the numbers from 0.
fn names(own: Option<&str>, count: usize) -> Vec<String> {
    match own {
        Some(list) => list.split(',').map(|name| name.trim().to_owned()).take(count).collect(),
        None => (0..count).map(|number| number.to_string()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_users_own_choice_of_gpus_is_kept() {
        assert_eq!(names(None, 2), ["0", "1"]);
        assert_eq!(names(Some("3, GPU-ab"), 2), ["3", "GPU-ab"]);
        assert!(names(Some(""), 0).is_empty());
    }
}
