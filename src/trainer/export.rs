//! `cpcr export`: a checkpoint as a file for other programs, and a description beside it.
//!
//! The description has what the file alone does not say and an image needs on its way through the
//! network. Not here: TorchScript itself (`model`).

use std::path::{Path, PathBuf};

use serde_json::json;

use super::evaluate::{Pick, open_dataset, open_run, trained};
use super::{TrainerError, files, snapshot};
use crate::checkpoint::{Checkpoint, encode_tensors};
use crate::config::RunConfig;
use crate::data::Dataset;
use crate::model::{Network, torchscript};
use crate::types::Step;

/// The newest format of the description.
const FORMAT: u32 = 1;

/// What for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExportFormat {
    /// The state dict of both decoders, for the reference's `load_state_dict(strict=True)`.
    Safetensors,
    /// The evaluation pass with its weights, for `torch.jit.load`.
    TorchScript,
}

/// What to export, and where.
#[derive(Debug, Clone)]
pub struct ExportOptions {
    /// The run's folder.
    pub run: String,
    /// Which of its checkpoints.
    pub pick: Pick,
    /// The dataset that names the classes; the run's own by default.
    pub data: Option<String>,
    /// What for.
    pub format: ExportFormat,
    /// The file; the description goes beside it, with `.json` after its name.
    pub out: PathBuf,
}

/// Writes the file, then its description. The result is the checkpoint's step and where the
/// description is.
///
/// # Errors
/// [`TrainerError`]: no such checkpoint or dataset, or no place to write.
pub fn export(options: &ExportOptions) -> Result<(Step, PathBuf), TrainerError> {
    let (config, checkpoint) = open_run(&options.run, options.pick)?;
    let dataset = open_dataset(options.data.as_ref(), &config, &checkpoint)?;
    let net = trained(&config, &checkpoint, &dataset)?;
    let bytes = match options.format {
        ExportFormat::Safetensors => {
            encode_tensors(&snapshot::named(net.params().to_host()?)?)?.to_vec()
        }
        ExportFormat::TorchScript => torchscript(&net)?,
    };
    let description = describe(options, &config, &checkpoint, &dataset, &net);
    let beside = described_by(&options.out);
    let written = |path: &Path, bytes: &[u8]| {
        files::put(path, bytes)
            .map_err(|error| TrainerError::Report(format!("write {}: {error}", path.display())))
    };
    written(&options.out, &bytes)?;
    written(&beside, format!("{description:#}\n").as_bytes())?;
    Ok((checkpoint.manifest.step, beside))
}

/// `FILE.json` for FILE.
fn described_by(out: &Path) -> PathBuf {
    let mut name = out.as_os_str().to_owned();
    name.push(".json");
    name.into()
}

fn describe(
    options: &ExportOptions,
    config: &RunConfig,
    checkpoint: &Checkpoint,
    dataset: &Dataset,
    net: &Network,
) -> serde_json::Value {
    let manifest = dataset.manifest();
    let (format, output) = match options.format {
        ExportFormat::Safetensors => ("safetensors", "the state dict of the whole network"),
        ExportFormat::TorchScript => {
            ("torchscript", "logits of the first decoder, float32 [N, C, H, W]")
        }
    };
    json!({
        "format": FORMAT,
        "cpcr": env!("CARGO_PKG_VERSION"),
        "source": {
            "run": options.run,
            "step": checkpoint.manifest.step,
            "config_sha256": checkpoint.manifest.config_sha256,
            "dataset_sha256": checkpoint.manifest.dataset_sha256,
        },
        "file": options.out.file_name().map(|name| name.to_string_lossy()),
        "kind": format,
        "input": "float32 [N, in_channels, H, W], H and W multiples of 16",
        "output": output,
        "classes": manifest.classes,
        "preprocessing": {
            "slice_axis": manifest.preprocessing.slice_axis,
            "intensity": manifest.preprocessing.intensity,
            "patch_size": config.patch_size,
            "resize": "each slice to patch_size x patch_size as scipy.ndimage.zoom(order=0), labels back the same way",
        },
        "network": {
            "name": "one encoder, a decoder for each entry of up",
            "up": net.config().up.iter().map(|up| format!("{up:?}").to_lowercase()).collect::<Vec<_>>(),
            "auxiliary_heads": net.config().pyramid,
            "method": config.method,
            "in_channels": net.config().in_channels,
            "classes": net.config().classes,
            "settings": config.model,
        },
    })
}
