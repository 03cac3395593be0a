//! `cpcr data import`: arguments as typed, one importer chosen, one call. The importers are in
//! `data::import`; what they refuse is told in their words.

use std::path::PathBuf;
use std::sync::Arc;

use clap::ValueEnum;

use super::{Failure, threads_each};
use crate::data::import::Pattern;
use crate::data::import::acdc_h5::{self, AcdcSource};
use crate::data::import::nifti::{self, LabelMap, NiftiSource, SplitRule};
use crate::proto::EXIT_DONE;
use crate::store::{Store, StoreOptions};

/// The forms in which datasets come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Form {
    /// ACDC in the SSL4MIS preparation.
    AcdcH5,
    /// Folders of NIfTI-1 files, images and labels paired by name.
    Nifti,
}

/// What `cpcr data import` takes.
#[derive(Debug, clap::Args)]
pub struct ImportArguments {
    /// The dataset's form.
    #[arg(long, value_enum)]
    from: Form,
    /// Folder of the files.
    #[arg(long = "in", value_name = "DIR")]
    input: PathBuf,
    /// Where the dataset goes.
    #[arg(long, value_name = "URL")]
    out: String,
    /// acdc-h5: folder of the lists, if it is another one.
    #[arg(long)]
    lists: Option<PathBuf>,
    #[command(flatten)]
    nifti: NiftiArguments,
}

/// What is for `--from nifti` alone. Absent means the importer's own default.
#[derive(Debug, Default, PartialEq, clap::Args)]
#[command(next_help_heading = "With --from nifti")]
struct NiftiArguments {
    /// Images below DIR, e.g. `images/{case}_img.nii.gz`; `*` stands for what does not matter.
    #[arg(long, value_name = "PATTERN")]
    images: Option<String>,
    /// Labels below DIR, e.g. `labels/{case}.nii.gz`; cases without one are unlabelled.
    #[arg(long, value_name = "PATTERN", requires = "classes")]
    labels: Option<String>,
    /// Where the patient stands in a case's name [default: before the first `_`, or all of it].
    #[arg(long, value_name = "PATTERN")]
    patient: Option<String>,
    /// Class names by label value, background first, or how many there are.
    #[arg(long, value_name = "A,B,C")]
    classes: Option<String>,
    /// A label value that means another class, counted from zero; may be repeated.
    #[arg(long, value_name = "FROM=TO", requires = "labels", allow_hyphen_values = true)]
    map: Vec<String>,
    /// Slices are cut across: auto (the largest spacing), 0, 1 or 2 [default: auto].
    #[arg(long)]
    axis: Option<String>,
    /// minmax, zscore or window:LOW:HIGH [default: minmax].
    #[arg(long)]
    intensity: Option<String>,
    /// Part of the labelled patients for validation [default: 0.1].
    #[arg(long, value_name = "F", conflicts_with_all = ["val_patients", "test_patients"])]
    val: Option<f64>,
    /// Part of the labelled patients for test [default: 0.2].
    #[arg(long, value_name = "F", conflicts_with_all = ["val_patients", "test_patients"])]
    test: Option<f64>,
    /// Another seed draws other patients [default: 1].
    #[arg(long, value_name = "N", conflicts_with_all = ["val_patients", "test_patients"])]
    seed: Option<u64>,
    /// The patients for validation, instead of a draw.
    #[arg(long, value_name = "A,B,C", value_delimiter = ',')]
    val_patients: Vec<String>,
    /// The patients for test, instead of a draw.
    #[arg(long, value_name = "A,B,C", value_delimiter = ',')]
    test_patients: Vec<String>,
}

/// Imports a dataset; the result is the exit status.
///
/// # Errors
/// [`Failure`]: choices that do not go together, files that cannot be used, or storage.
pub async fn import(arguments: ImportArguments) -> Result<i32, Failure> {
    let threads = threads_each(1) as usize;
    match arguments.from {
        Form::AcdcH5 => {
            if arguments.nifti != NiftiArguments::default() {
                return Err(Failure::usage("--from acdc-h5 takes --in, --lists and --out only"));
            }
            let source = AcdcSource { files: arguments.input, lists: arguments.lists };
            let store = open(&arguments.out)?;
            acdc_h5::import(&source, store, threads).await.map_err(Failure::failed)?;
        }
        Form::Nifti => {
            if arguments.lists.is_some() {
                return Err(Failure::usage("--lists is for --from acdc-h5 alone"));
            }
            let source = arguments.nifti.source(arguments.input)?;
            let store = open(&arguments.out)?;
            nifti::import(&source, store, threads).await.map_err(Failure::failed)?;
        }
    }
    Ok(EXIT_DONE)
}

fn open(url: &str) -> Result<Arc<Store>, Failure> {
    Store::open(url, &StoreOptions::default()).map(Arc::new).map_err(Failure::usage)
}

impl NiftiArguments {
    fn source(self, folder: PathBuf) -> Result<NiftiSource, Failure> {
        let pattern = Pattern::new;
        let images = self
            .images
            .as_deref()
            .ok_or_else(|| Failure::usage("--from nifti needs --images, e.g. '{case}.nii.gz'"))?;
        let resolved = || {
            let mut source = NiftiSource::new(folder, pattern(images, "{case}")?);
            source.labels = self.labels.map(|text| pattern(&text, "{case}")).transpose()?;
            source.patient = self.patient.map(|text| pattern(&text, "{patient}")).transpose()?;
            if let Some(classes) = self.classes {
                source.classes = nifti::class_names(&classes)?;
            }
            source.map = LabelMap::parse(&self.map)?;
            source.axis = self.axis.map_or(Ok(source.axis), |text| text.parse())?;
            source.intensity = self.intensity.map_or(Ok(source.intensity), |text| text.parse())?;
            if !(self.val_patients.is_empty() && self.test_patients.is_empty()) {
                source.split =
                    SplitRule::Patients { val: self.val_patients, test: self.test_patients };
            } else if let SplitRule::Fractions { val, test, seed } = &mut source.split {
                *val = self.val.unwrap_or(*val);
                *test = self.test.unwrap_or(*test);
                *seed = self.seed.unwrap_or(*seed);
            }
            Ok::<_, crate::data::DataError>(source)
        };
        resolved().map_err(Failure::usage)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::data::import::nifti::{Intensity, SliceAxis};

    #[derive(Debug, Parser)]
    struct Typed {
        #[command(flatten)]
        import: ImportArguments,
    }

    fn typed(line: &str) -> Result<ImportArguments, clap::Error> {
        let words = ["import", "--in", "/data/heart", "--out", "memory:///"];
        Typed::try_parse_from(words.into_iter().chain(line.split_whitespace()))
            .map(|typed| typed.import)
    }

    fn source(line: &str) -> Result<NiftiSource, Failure> {
        typed(line).unwrap().nifti.source("/data/heart".into())
    }

    #[test]
    fn what_is_left_out_is_the_importers_default() {
        let images = Pattern::new("{case}.nii.gz", "{case}").unwrap();
        let found = source("--from nifti --images {case}.nii.gz").unwrap();
        assert_eq!(found, NiftiSource::new("/data/heart", images));
        assert_eq!(found.name, "heart");
    }

    #[test]
    fn every_option_arrives() {
        let found = source(
            "--from nifti --images i/{case}.nii --labels l/{case}.nii --patient {patient}-* \
             --classes background,liver --map -1=0 --map 7=1 --axis 1 --intensity window:-100:240 \
             --val 0.25 --test 0 --seed 9",
        )
        .unwrap();
        assert_eq!(found.labels.unwrap().text(), "l/{case}.nii");
        assert_eq!(found.patient.unwrap().text(), "{patient}-*");
        assert_eq!(found.classes, ["background", "liver"]);
        assert_eq!(found.map, LabelMap::parse(&["-1=0", "7=1"]).unwrap());
        assert_eq!(found.axis, SliceAxis::Given(1));
        assert_eq!(found.intensity, Intensity::Window { low: -100.0, high: 240.0 });
        assert_eq!(found.split, SplitRule::Fractions { val: 0.25, test: 0.0, seed: 9 });
        let found = source("--from nifti --images {case}.nii --val-patients a,b --test-patients c")
            .unwrap();
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let lists = SplitRule::Patients { val: owned(&["a", "b"]), test: owned(&["c"]) };
        assert_eq!(found.split, lists);
    }

    #[test]
    fn what_does_not_go_together_is_bad_usage() {
        for line in [
            "--from dicom",
            "--from nifti --images {case}.nii --labels l/{case}.nii",
            "--from nifti --images {case}.nii --map 1=0",
            "--from nifti --images {case}.nii --val 0.1 --val-patients a",
        ] {
            assert!(typed(line).is_err(), "{line}");
        }
        for line in [
            "--from nifti",
            "--from nifti --images x.nii",
            "--from nifti --images {case}.nii --axis 3",
            "--from nifti --images {case}.nii --intensity window:5",
        ] {
            assert_eq!(source(line).unwrap_err().status, crate::proto::EXIT_USAGE, "{line}");
        }
        for line in ["--from acdc-h5 --axis 1", "--from nifti --images {case}.nii --lists x"] {
            let failure = futures::executor::block_on(import(typed(line).unwrap())).unwrap_err();
            assert_eq!(failure.status, crate::proto::EXIT_USAGE, "{line}");
        }
    }
}
