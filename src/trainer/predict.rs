//! `cpcr predict`: a folder of NIfTI files in, a mask for each out.
//!
//! Images become slices as they did when the run's dataset was imported, and slices become labels
//! as they do in `eval`; both by the same code. Masks lie exactly where their images do. Not here:
//! NIfTI itself (`data::nifti`), scores (there is no truth to compare with).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use tch::{Kind, Tensor};

use super::evaluate::{Pick, open_dataset, open_run, trained};
use super::validate::{ArgMax, zoom};
use super::{TrainerError, files};
use crate::data::DataError;
use crate::data::import::nifti::SliceAxis;
use crate::data::nifti::{Extent, Nifti, Voxels, encode_like, read_file};
use crate::data::preprocess::{Grid, Preprocessing, frame_name};
use crate::eval::components::keep_largest;
use crate::eval::{
    DistanceUnit, EmptyPolicy, EvalSettings, ProbabilitySegmenter, Segmenter, segment_volume,
    segment_with_probabilities,
};
use crate::model::{ModelError, Network};
use crate::types::Step;

/// The most bytes of probabilities that are held for one time point: 4 GiB.
const PROBABILITY_BYTES_MAX: usize = 1 << 32;

/// What to predict, and how.
#[derive(Debug, Clone)]
pub struct PredictOptions {
    /// The run's folder.
    pub run: String,
    /// Which of its checkpoints.
    pub pick: Pick,
    /// The dataset that says how images are prepared; the run's own by default.
    pub data: Option<String>,
    /// The folder of images.
    pub input: PathBuf,
    /// The folder for masks, made if it is not there.
    pub out: PathBuf,
    /// Also write each class's probability.
    pub probabilities: bool,
    /// Average both decoders' probabilities.
    pub both_decoders: bool,
    /// Average the probabilities of the mirrored slices, too.
    pub flips: bool,
    /// Keep only the largest component of each foreground class.
    pub largest_component: bool,
    /// Slices in a forward pass.
    pub batch: usize,
    /// Across which axis slices are cut, if not as in the dataset.
    pub slice_axis: Option<SliceAxis>,
}

/// What came of it.
#[derive(Debug)]
pub struct Predicted {
    /// The checkpoint's step.
    pub step: Step,
    /// The masks that were written.
    pub masks: Vec<PathBuf>,
    /// What failed: a line for each image, with its name.
    pub failures: Vec<String>,
}

/// Segments every `.nii` and `.nii.gz` file of a folder; `done` is called after each with how many
/// are done, of how many, and what became of it. A file that cannot be used is told of at the end
/// and keeps no other from being done.
///
/// # Errors
/// [`TrainerError`]: no such checkpoint or dataset, no file to segment, or no place for masks.
pub fn predict(
    options: &PredictOptions,
    mut done: impl FnMut(usize, usize, &Path, Result<(), &str>),
) -> Result<Predicted, TrainerError> {
    let names = image_names(&options.input)?;
    prepare_folders(options, &names)?;
    let (config, checkpoint) = open_run(&options.run, options.pick)?;
    let dataset = open_dataset(options.data.as_ref(), &config, &checkpoint)?;
    let net = trained(&config, &checkpoint, &dataset)?;
    if net.config().in_channels != 1 {
        let why = "images of one channel are predicted, and this run was trained on more";
        return Err(TrainerError::Unusable(why.to_owned()));
    }
    let mut preprocessing = dataset.manifest().preprocessing;
    preprocessing.slice_axis = options.slice_axis.unwrap_or(preprocessing.slice_axis);
    let patch = config.patch_size as usize;
    let mut work = Work {
        options,
        written: BTreeSet::new(),
        preprocessing,
        model: Model { net: &net, both_decoders: options.both_decoders, flips: options.flips },
        settings: EvalSettings {
            patch: (patch, patch),
            classes: u8::try_from(net.config().classes).unwrap_or(u8::MAX),
            batch: options.batch,
            unit: DistanceUnit::Voxel,
            policy: EmptyPolicy::default(),
        },
    };
    let step = checkpoint.manifest.step;
    let mut predicted = Predicted { step, masks: Vec::new(), failures: Vec::new() };
    for (at, name) in names.iter().enumerate() {
        let path = options.input.join(name);
        let outcome = work.image(&path, name).map_err(|why| format!("{}: {why}", path.display()));
        done(at + 1, names.len(), &path, outcome.as_ref().copied().map_err(String::as_str));
        match outcome {
            Ok(()) => predicted.masks.push(options.out.join(name)),
            Err(why) => predicted.failures.push(why),
        }
    }
    Ok(predicted)
}

/// The part of a file's name before `.nii` or `.nii.gz`; none of those is no image.
fn stem(name: &str) -> Option<&str> {
    name.strip_suffix(".nii").or_else(|| name.strip_suffix(".nii.gz"))
}

/// The images of a folder in the order of their names. Hidden files are passed over, as an import
/// does.
fn image_names(folder: &Path) -> Result<Vec<String>, TrainerError> {
    let bad =
        |why: &dyn std::fmt::Display| TrainerError::Report(format!("{}: {why}", folder.display()));
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|error| bad(&error))? {
        let entry = entry.map_err(|error| bad(&error))?;
        let Ok(name) = entry.file_name().into_string() else {
            let name = entry.file_name();
            return Err(bad(&format!("the name {name:?} is not UTF-8: rename the file")));
        };
        if stem(&name).is_some_and(|stem| !stem.is_empty() && !stem.starts_with('.'))
            && !entry.path().is_dir()
        {
            names.push(name);
        }
    }
    names.sort();
    if names.is_empty() {
        return Err(bad(&"it holds no .nii or .nii.gz file to predict"));
    }
    Ok(names)
}

/// Makes the folder for masks; refuses what would overwrite an image, or one result with another.
fn prepare_folders(options: &PredictOptions, names: &[String]) -> Result<(), TrainerError> {
    let out = &options.out;
    std::fs::create_dir_all(out)
        .map_err(|error| TrainerError::Report(format!("{}: {error}", out.display())))?;
    if out.canonicalize()? == options.input.canonicalize()? {
        let why = format!("--in and --out are both {}: masks would replace images", out.display());
        return Err(TrainerError::Unusable(why));
    }
    if !options.probabilities {
        return Ok(());
    }
    for name in names {
        let clash = stem(name).and_then(|stem| {
            let zipped = format!("{stem}.nii.gz");
            let twin = (*name != zipped && names.contains(&zipped)).then_some(zipped);
            twin.or_else(|| Some(probability_name(stem)).filter(|other| names.contains(other)))
        });
        if let Some(other) = clash {
            let folder = options.input.display();
            return Err(TrainerError::Unusable(format!(
                "{folder}: with --probabilities the results of {name} and {other} would have the \
                 same name: rename one"
            )));
        }
    }
    Ok(())
}

fn probability_name(stem: &str) -> String {
    format!("{stem}_prob.nii.gz")
}

/// What is the same for every image.
struct Work<'a> {
    options: &'a PredictOptions,
    /// Names of the results so far.
    written: BTreeSet<String>,
    preprocessing: Preprocessing,
    model: Model<'a>,
    settings: EvalSettings,
}

impl Work<'_> {
    /// Segments the image at `path`; says why not.
    fn image(&mut self, path: &Path, name: &str) -> Result<(), String> {
        let plain = |error: DataError| match error {
            DataError::Import { why, .. } => why, // the caller names the file
            other => other.to_string(),
        };
        let image = read_file(path).map_err(plain)?;
        let grid = self.preprocessing.grid(path, &image.header.geometry).map_err(plain)?;
        let frames = image.frames();
        let mut mask = Vec::new();
        for frame in 0..frames {
            let values = self.preprocessing.intensities(path, &image, frame).map_err(plain)?;
            let volume = grid.cut(&values);
            let mut labels = if self.options.probabilities {
                let stem = stem(name).unwrap_or(name);
                let stem = match frames {
                    1 => stem.to_owned(),
                    _ => frame_name(stem, frame, frames),
                };
                self.with_probabilities(&image, &grid, &volume, &stem)?
            } else {
                segment_volume(&mut self.model, name, &volume, grid.shape(), &self.settings, zoom())
                    .map_err(|error| error.to_string())?
            };
            if self.options.largest_component {
                keep_largest(&mut labels, grid.shape());
            }
            mask.extend(grid.uncut(&labels));
        }
        // Last: a mask that is there has everything else beside it.
        self.write(&image, name, Extent::Same, Voxels::Labels(&mask))
    }

    /// Labels `[slice, row, column]` of one frame, whose probabilities are written.
    fn with_probabilities(
        &mut self,
        image: &Nifti,
        grid: &Grid,
        volume: &[f32],
        stem: &str,
    ) -> Result<Vec<u8>, String> {
        let classes = usize::from(self.settings.classes);
        let bytes = volume.len().saturating_mul(classes).saturating_mul(size_of::<f32>());
        if bytes > PROBABILITY_BYTES_MAX {
            return Err(format!(
                "probabilities of {bytes} bytes are more than the {PROBABILITY_BYTES_MAX} allowed: \
                 leave out --probabilities, or crop the image"
            ));
        }
        let shape = grid.shape();
        let (labels, by_slice) = segment_with_probabilities(
            &mut self.model,
            stem,
            volume,
            shape,
            &self.settings,
            zoom(),
        )
        .map_err(|error| error.to_string())?;
        // [slice, class, row, column] -> [class, z, y, x]
        let pixels = shape[1] * shape[2];
        let mut by_class = Vec::with_capacity(by_slice.len());
        for class in 0..classes {
            let planes = by_slice.chunks(pixels.max(1)).skip(class).step_by(classes);
            by_class.extend(grid.uncut(&planes.flatten().copied().collect::<Vec<f32>>()));
        }
        let extent = Extent::Channels(classes);
        self.write(image, &probability_name(stem), extent, Voxels::Floats(&by_class))?;
        Ok(labels)
    }

    /// Writes a result; two of one name would hide one of them.
    fn write(
        &mut self,
        image: &Nifti,
        name: &str,
        extent: Extent,
        voxels: Voxels<'_>,
    ) -> Result<(), String> {
        let path = self.options.out.join(name);
        if !self.written.insert(name.to_owned()) {
            return Err(format!("{} is another image's result: rename one", path.display()));
        }
        let bytes = encode_like(&image.header, extent, voxels, name.ends_with(".gz"));
        let bytes = bytes.map_err(|error| error.to_string())?;
        files::put(&path, &bytes).map_err(|error| format!("write {}: {error}", path.display()))
    }
}

/// The network with what is averaged over it.
struct Model<'a> {
    net: &'a Network,
    both_decoders: bool,
    flips: bool,
}

impl Model<'_> {
    fn averages(&self) -> bool {
        self.both_decoders || self.flips
    }

    /// Probabilities `[n, C, h, w]` of `x` `[n, 1, h, w]`.
    fn probabilities(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        if self.both_decoders {
            return self.net.forward_eval_mean(x);
        }
        Ok(self.net.forward_eval(x)?.f_softmax(1, Kind::Float)?)
    }

    /// The mean over the mirror images, if they are wanted.
    fn mean_probabilities(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        let mut sum = self.probabilities(x)?;
        if !self.flips {
            return Ok(sum);
        }
        let mirrors: [&[i64]; 3] = [&[2], &[3], &[2, 3]];
        for axes in mirrors {
            let mirrored = self.probabilities(&x.f_flip(axes)?)?;
            sum = sum.f_add(&mirrored.f_flip(axes)?)?;
        }
        Ok(sum.f_mul_scalar(0.25)?)
    }

    fn input(&self, slices: &[f32], [n, h, w]: [usize; 3]) -> Result<Tensor, ModelError> {
        let x = Tensor::f_from_slice(slices)?.f_view([n as i64, 1, h as i64, w as i64])?;
        Ok(x.f_to_device(self.net.params().device())?)
    }
}

/// The class of each pixel with the largest score `[n, C, h, w]`.
fn classes_of(scores: &Tensor) -> Result<Vec<u8>, ModelError> {
    let classes = scores.f_argmax(1, false)?.f_to_kind(Kind::Uint8)?;
    Ok(Vec::<u8>::try_from(&classes.f_to_device(tch::Device::Cpu)?.f_contiguous()?.f_view([-1])?)?)
}

impl Segmenter for Model<'_> {
    type Error = ModelError;

    fn segment(
        &mut self,
        slices: &[f32],
        n: usize,
        h: usize,
        w: usize,
    ) -> Result<Vec<u8>, ModelError> {
        if !self.averages() {
            return ArgMax(self.net).segment(slices, n, h, w);
        }
        classes_of(&self.mean_probabilities(&self.input(slices, [n, h, w])?)?)
    }
}

impl ProbabilitySegmenter for Model<'_> {
    fn segment_with_probabilities(
        &mut self,
        slices: &[f32],
        n: usize,
        h: usize,
        w: usize,
    ) -> Result<(Vec<u8>, Vec<f32>), ModelError> {
        let x = self.input(slices, [n, h, w])?;
        let (labels, probabilities) = if self.averages() {
            let mean = self.mean_probabilities(&x)?;
            (classes_of(&mean)?, mean)
        } else {
            // By the logits, as without probabilities: rounding may make equals of two of these.
            let logits = self.net.forward_eval(&x)?;
            (classes_of(&logits)?, logits.f_softmax(1, Kind::Float)?)
        };
        let flat = probabilities.f_to_device(tch::Device::Cpu)?.f_contiguous()?.f_view([-1])?;
        Ok((labels, Vec::<f32>::try_from(&flat)?))
    }
}
