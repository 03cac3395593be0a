//! `cpcr data import`: arguments as typed, one importer chosen, one call. The importers are in
//! `data::import`; what they refuse is told in their words.

use std::path::PathBuf;
use std::sync::Arc;

use clap::ValueEnum;

use super::{Failure, meter, threads_each};
use crate::data::DataError;
use crate::data::import::Pattern;
use crate::data::import::acdc::{self, AcdcTree};
use crate::data::import::acdc_h5::{self, AcdcSource};
use crate::data::import::nifti::{self, LabelMap, NiftiSource, SplitWishes};
use crate::data::import::nnunet::{self, NnunetSource, NnunetSplit};
use crate::data::write::Work;
use crate::proto::EXIT_DONE;
use crate::store::{Store, StoreOptions};

/// The forms in which datasets come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Form {
    /// The ACDC challenge's own tree of patients.
    Acdc,
    /// ACDC in the SSL4MIS preparation.
    AcdcH5,
    /// Folders of NIfTI-1 files, images and labels paired by name.
    Nifti,
    /// An nnU-Net raw dataset, v2 or v1.
    Nnunet,
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
    volumes: VolumeArguments,
    #[command(flatten)]
    split: SplitArguments,
    #[command(flatten)]
    layout: LayoutArguments,
}

/// How a dataset is stored.
#[derive(Debug, Default, PartialEq, clap::Args)]
#[command(next_help_heading = "Layout")]
pub struct LayoutArguments {
    /// Slices in a block, which is what is fetched at once [default: 8].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    block_rows: Option<u32>,
    /// About how large a shard is, in MiB [default: 64; the first shards are smaller].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1024))]
    shard_mib: Option<u64>,
}

/// What is for NIfTI files, in whatever layout. Absent means the importer's own default.
#[derive(Debug, Default, PartialEq, clap::Args)]
#[command(next_help_heading = "With --from nifti, nnunet or acdc")]
struct VolumeArguments {
    /// nifti: images below DIR, e.g. `images/{case}_img.nii.gz`; `*` stands for what does not matter.
    #[arg(long, value_name = "PATTERN")]
    images: Option<String>,
    /// nifti: labels below DIR, e.g. `labels/{case}.nii.gz`; cases without one are unlabelled.
    #[arg(long, value_name = "PATTERN", requires = "classes")]
    labels: Option<String>,
    /// nifti, nnunet: where the patient stands in a case's name [default: before the first `_`, or
    /// all of it].
    #[arg(long, value_name = "PATTERN")]
    patient: Option<String>,
    /// Class names by label value, background first, or how many there are; instead of those of
    /// dataset.json or ACDC.
    #[arg(long, value_name = "A,B,C")]
    classes: Option<String>,
    /// A label value that means another class, counted from zero; may be repeated.
    #[arg(long, value_name = "FROM=TO", allow_hyphen_values = true)]
    map: Vec<String>,
    /// Slices are cut across: auto (the largest spacing), 0, 1 or 2 [default: auto].
    #[arg(long)]
    axis: Option<String>,
    /// minmax, zscore or window:LOW:HIGH, for each channel [default: minmax].
    #[arg(long)]
    intensity: Option<String>,
    /// acdc: the other frames of training patients too, unlabelled, from the 4d files.
    #[arg(long)]
    all_frames: bool,
}

/// Who is trained on and who judges.
#[derive(Debug, Default, PartialEq, clap::Args)]
#[command(next_help_heading = "Split, with --from nifti, nnunet or acdc")]
struct SplitArguments {
    /// Part of the labelled patients for validation [default: 0.1].
    #[arg(long, value_name = "F", conflicts_with_all = ["val_patients", "test_patients"])]
    val: Option<f64>,
    /// Part of the labelled patients for test [default: 0.2; 0 beside a labelled test folder].
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
    /// nnunet: which fold of splits_final.json is for validation [default: 0, if there is that file].
    #[arg(long, value_name = "N", conflicts_with_all = WISHES)]
    fold: Option<usize>,
    /// nnunet: the splits_final.json, if it is not in DIR.
    #[arg(long, value_name = "FILE", conflicts_with_all = WISHES)]
    splits: Option<PathBuf>,
}

/// The options that divide by patient.
const WISHES: [&str; 5] = ["val", "test", "seed", "val_patients", "test_patients"];

/// Imports a dataset; the result is the exit status.
///
/// # Errors
/// [`Failure`]: choices that do not go together, files that cannot be used, or storage.
pub async fn import(arguments: ImportArguments) -> Result<i32, Failure> {
    arguments.check()?;
    let ImportArguments { from, input, out, lists, volumes, split, layout } = arguments;
    let work = layout.work();
    let place = || {
        let store = Store::open(&out, &StoreOptions::default()).map_err(Failure::usage)?;
        Ok::<_, Failure>(Arc::new(store))
    };
    let _watch = meter::watch("import", "cases", &work.meter);
    match from {
        Form::AcdcH5 => {
            let source = AcdcSource { files: input, lists };
            acdc_h5::import(&source, place()?, &work).await
        }
        Form::Acdc => {
            let tree = volumes.acdc(split, input).map_err(Failure::usage)?;
            acdc::import(&tree, place()?, &work).await
        }
        Form::Nifti => {
            let source = volumes.nifti(split, input).map_err(Failure::usage)?;
            nifti::import(&source, place()?, &work).await
        }
        Form::Nnunet => {
            let source = volumes.nnunet(split, input).map_err(Failure::usage)?;
            nnunet::import(&source, place()?, &work).await
        }
    }
    .map_err(|error| made(error, &out))?;
    Ok(EXIT_DONE)
}

/// A dataset that could not be made at `out`: nothing is written over what is there (status 2).
pub(super) fn made(error: DataError, out: &str) -> Failure {
    match error {
        DataError::DatasetExists | DataError::ChangedImport(_) => {
            Failure::usage(format!("{out}: {error}"))
        }
        other => Failure::failed(other),
    }
}

impl LayoutArguments {
    /// On all of this machine's cores.
    pub(super) fn work(&self) -> Work {
        Work {
            block_rows: self.block_rows,
            shard_bytes: self.shard_mib.map(|mib| mib << 20),
            ..Work::on(threads_each(1) as usize)
        }
    }
}

impl ImportArguments {
    /// Refuses an option that would do nothing with this form.
    fn check(&self) -> Result<(), Failure> {
        let (volumes, split) = (&self.volumes, &self.split);
        let given = [
            ("--lists", self.lists.is_some(), "acdc-h5"),
            ("--images", volumes.images.is_some(), "nifti"),
            ("--labels", volumes.labels.is_some(), "nifti"),
            ("--patient", volumes.patient.is_some(), "nifti nnunet"),
            ("--all-frames", volumes.all_frames, "acdc"),
            ("--fold", split.fold.is_some(), "nnunet"),
            ("--splits", split.splits.is_some(), "nnunet"),
        ];
        let from = self.from.to_possible_value();
        let from = from.as_ref().map_or("", |value| value.get_name());
        for (option, given, forms) in given {
            if given && !forms.split(' ').any(|form| form == from) {
                let forms = forms.replace(' ', " and --from ");
                return Err(Failure::usage(format!("{option} is for --from {forms} alone")));
            }
        }
        let nothing = *volumes == VolumeArguments::default() && *split == SplitArguments::default();
        match self.from {
            Form::AcdcH5 if !nothing => {
                Err(Failure::usage("--from acdc-h5 takes --in, --lists, --out and the layout only"))
            }
            Form::Nifti if volumes.labels.is_none() && !volumes.map.is_empty() => {
                Err(Failure::usage("--map needs --labels"))
            }
            _ => Ok(()),
        }
    }
}

impl SplitArguments {
    fn wishes(self) -> SplitWishes {
        let Self { val, test, seed, val_patients, test_patients, .. } = self;
        SplitWishes { val, test, seed, val_patients, test_patients }
    }

    fn nnunet(self) -> NnunetSplit {
        if self.fold.is_some() || self.splits.is_some() {
            return NnunetSplit::Fold { file: self.splits, number: self.fold.unwrap_or(0) };
        }
        match self.wishes() {
            wishes if wishes == SplitWishes::default() => NnunetSplit::Usual,
            wishes => NnunetSplit::Wishes(wishes),
        }
    }
}

impl VolumeArguments {
    fn class_names(&self) -> Result<Vec<String>, DataError> {
        self.classes.as_deref().map_or(Ok(Vec::new()), nifti::class_names)
    }

    fn patient(&self) -> Result<Option<Pattern>, DataError> {
        self.patient.as_deref().map(|text| Pattern::new(text, "{patient}")).transpose()
    }

    fn nifti(self, split: SplitArguments, folder: PathBuf) -> Result<NiftiSource, DataError> {
        let pattern = |text: &str| Pattern::new(text, "{case}");
        let Some(images) = &self.images else {
            let why = "--from nifti needs --images, e.g. '{case}.nii.gz'";
            return Err(DataError::Unusable(why.to_owned()));
        };
        let mut source = NiftiSource::new(folder, pattern(images)?);
        source.labels = self.labels.as_deref().map(pattern).transpose()?;
        source.patient = self.patient()?;
        source.classes = self.class_names()?;
        source.map = LabelMap::parse(&self.map)?;
        source.axis = self.axis.map_or(Ok(source.axis), |text| text.parse())?;
        source.intensity = self.intensity.map_or(Ok(source.intensity), |text| text.parse())?;
        source.split = split.wishes().rule();
        Ok(source)
    }

    fn acdc(self, split: SplitArguments, folder: PathBuf) -> Result<AcdcTree, DataError> {
        let mut tree = AcdcTree::new(folder);
        tree.all_frames = self.all_frames;
        tree.classes = self.class_names()?;
        tree.map = LabelMap::parse(&self.map)?;
        tree.axis = self.axis.map_or(Ok(tree.axis), |text| text.parse())?;
        tree.intensity = self.intensity.map_or(Ok(tree.intensity), |text| text.parse())?;
        tree.split = split.wishes();
        Ok(tree)
    }

    fn nnunet(self, split: SplitArguments, folder: PathBuf) -> Result<NnunetSource, DataError> {
        let mut source = NnunetSource::new(folder);
        source.patient = self.patient()?;
        source.classes = self.class_names()?;
        source.map = LabelMap::parse(&self.map)?;
        source.axis = self.axis.map_or(Ok(source.axis), |text| text.parse())?;
        source.intensity = self.intensity.map_or(Ok(source.intensity), |text| text.parse())?;
        source.split = split.nnunet();
        Ok(source)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::data::import::nifti::{Intensity, SliceAxis, SplitRule};

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

    fn source(line: &str) -> Result<NiftiSource, DataError> {
        let typed = typed(line).unwrap();
        typed.volumes.nifti(typed.split, "/data/heart".into())
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
            "--from nifti --images {case}.nii --val 0.1 --val-patients a",
            "--from nnunet --fold 1 --val 0.1",
            "--from nnunet --splits a.json --test-patients a",
            "--from nnunet --fold -1",
        ] {
            assert!(typed(line).is_err(), "{line}");
        }
        for line in [
            "--from nifti",
            "--from nifti --images x.nii",
            "--from nifti --images {case}.nii --map 1=0",
            "--from nifti --images {case}.nii --axis 3",
            "--from nifti --images {case}.nii --intensity window:5",
            "--from nifti --images {case}.nii --lists x",
            "--from nifti --images {case}.nii --fold 1",
            "--from nifti --images {case}.nii --all-frames",
            "--from acdc-h5 --axis 1",
            "--from acdc-h5 --val 0.1",
            "--from acdc --patient {patient}",
            "--from acdc --map 1",
            "--from nnunet --images {case}.nii",
            "--from nnunet --classes 1",
        ] {
            let failure = futures::executor::block_on(import(typed(line).unwrap())).unwrap_err();
            assert_eq!(failure.status, crate::proto::EXIT_USAGE, "{line}: {failure}");
        }
    }

    #[test]
    fn the_other_layouts_take_their_options() {
        let acdc = typed("--from acdc --all-frames --map 4=0 --val 0.2").unwrap();
        let tree = acdc.volumes.acdc(acdc.split, "/data/heart".into()).unwrap();
        assert!(tree.all_frames && tree.classes.is_empty());
        assert_eq!((tree.split.val, tree.split.test), (Some(0.2), None));
        let nnunet = |line: &str| {
            let typed = typed(line).unwrap();
            typed.volumes.nnunet(typed.split, "/data/heart".into()).unwrap()
        };
        let plain = nnunet("--from nnunet");
        assert_eq!(plain, NnunetSource::new("/data/heart"));
        let fold =
            |file: Option<&str>, number| NnunetSplit::Fold { file: file.map(Into::into), number };
        assert_eq!(nnunet("--from nnunet --fold 3").split, fold(None, 3));
        assert_eq!(nnunet("--from nnunet --splits s.json").split, fold(Some("s.json"), 0));
        let NnunetSplit::Wishes(wishes) = nnunet("--from nnunet --seed 4").split else { panic!() };
        assert_eq!(wishes.seed, Some(4));
    }
}
