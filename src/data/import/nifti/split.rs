//! Patients to splits: by share, drawn from their names, or by list. Never by slice or by volume.

use std::collections::BTreeMap;

use super::options::SplitRule;
use crate::data::error::DataError;
use crate::data::manifest::Split;
use crate::data::permutation::key_of;

/// Where validation and test patients go; who is not in it is trained on. `patients`: whether all
/// cases of each have labels.
pub(super) fn assign(
    rule: &SplitRule,
    patients: &BTreeMap<String, bool>,
) -> Result<BTreeMap<String, Split>, DataError> {
    match rule {
        SplitRule::Fractions { val, test, seed } => by_share(*val, *test, *seed, patients),
        SplitRule::Patients { val, test } => by_list(val, test, patients),
    }
}

fn by_share(
    val: f64,
    test: f64,
    seed: u64,
    patients: &BTreeMap<String, bool>,
) -> Result<BTreeMap<String, Split>, DataError> {
    let part = 0.0..1.0;
    if !part.contains(&val) || !part.contains(&test) || !part.contains(&(val + test)) {
        return Err(DataError::Unusable(format!(
            "shares of {val} for validation and {test} for test leave nothing to train on"
        )));
    }
    let mut labelled: Vec<&String> =
        patients.iter().filter(|(_, labelled)| **labelled).map(|(patient, _)| patient).collect();
    labelled.sort_by_key(|patient| (rank(seed, patient), *patient));
    let count = |share: f64| match (share * labelled.len() as f64).round() as usize {
        0 if share > 0.0 && !labelled.is_empty() => 1,
        count => count,
    };
    let (val, test) = (count(val), count(test));
    if !labelled.is_empty() && val + test >= labelled.len() {
        return Err(DataError::Unusable(format!(
            "{} labelled patients are too few for {val} in validation, {test} in test and one to \
             train on: ask for a share of 0",
            labelled.len()
        )));
    }
    let splits = [Split::Val].repeat(val).into_iter().chain([Split::Test].repeat(test));
    Ok(labelled.into_iter().cloned().zip(splits).collect())
}

/// A patient's place in the draw depends on the name and the seed alone.
fn rank(seed: u64, patient: &str) -> u64 {
    const DOMAIN: u64 = 0x6e69_6674_6920_7370; // "nifti sp"
    let bytes = patient.bytes().map(u64::from);
    key_of(&[DOMAIN, seed].into_iter().chain(bytes).collect::<Vec<_>>())
}

fn by_list(
    val: &[String],
    test: &[String],
    patients: &BTreeMap<String, bool>,
) -> Result<BTreeMap<String, Split>, DataError> {
    let mut splits = BTreeMap::new();
    let lists = val.iter().map(|patient| (patient, Split::Val));
    for (patient, split) in lists.chain(test.iter().map(|patient| (patient, Split::Test))) {
        let bad = |why: &str| DataError::Unusable(format!("{split} patient `{patient}`: {why}"));
        match patients.get(patient) {
            None => return Err(bad("no case is of that patient")),
            Some(false) => return Err(bad("not every case has a label to judge by")),
            Some(true) => {}
        }
        if splits.insert(patient.clone(), split).is_some_and(|other| other != split) {
            return Err(bad("the other list has it too"));
        }
    }
    Ok(splits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patients(labelled: usize, unlabelled: usize) -> BTreeMap<String, bool> {
        (0..labelled + unlabelled).map(|at| (format!("p{at:03}"), at < labelled)).collect()
    }

    fn shares(val: f64, test: f64, seed: u64, of: &BTreeMap<String, bool>) -> (usize, usize) {
        let splits = assign(&SplitRule::Fractions { val, test, seed }, of).unwrap();
        assert!(splits.keys().all(|patient| of[patient]), "an unlabelled patient is to judge");
        let count = |split| splits.values().filter(|found| **found == split).count();
        (count(Split::Val), count(Split::Test))
    }

    #[test]
    fn shares_are_of_labelled_patients_and_drawn_by_seed() {
        let all = patients(50, 25);
        assert_eq!(shares(0.1, 0.2, 1, &all), (5, 10));
        assert_eq!(shares(0.0, 0.0, 1, &all), (0, 0));
        assert_eq!(shares(0.001, 0.2, 1, &all), (1, 10));
        assert_eq!(shares(0.1, 0.2, 1, &patients(0, 5)), (0, 0));
        let split =
            |seed, of: &_| assign(&SplitRule::Fractions { val: 0.1, test: 0.2, seed }, of).unwrap();
        assert_eq!(split(1, &all), split(1, &all));
        assert_ne!(split(1, &all), split(2, &all));
        // One patient more moves few others.
        let (before, after) = (split(1, &all), split(1, &patients(51, 24)));
        let moved = before.iter().filter(|(name, split)| after.get(*name) != Some(split)).count();
        assert!(moved <= 2, "{moved} moved");
    }

    #[test]
    fn shares_that_leave_nothing_to_train_on_are_refused() {
        for (val, test, labelled) in
            [(0.5, 0.5, 9), (-0.1, 0.2, 9), (0.1, f64::NAN, 9), (1.0, 0.0, 9), (0.1, 0.2, 2)]
        {
            let rule = SplitRule::Fractions { val, test, seed: 1 };
            let error = assign(&rule, &patients(labelled, 3)).unwrap_err();
            assert!(matches!(error, DataError::Unusable(_)), "{error}");
        }
    }

    #[test]
    fn lists_must_name_labelled_patients_once() {
        let lists = |val: &[&str], test: &[&str]| {
            let owned = |list: &[&str]| list.iter().map(|name| (*name).to_owned()).collect();
            assign(&SplitRule::Patients { val: owned(val), test: owned(test) }, &patients(3, 1))
        };
        let splits = lists(&["p001"], &["p002"]).unwrap();
        let want = [("p001".to_owned(), Split::Val), ("p002".to_owned(), Split::Test)];
        assert_eq!(splits, want.into());
        for (val, test, words) in [
            (&["p009"], &["p001"], "`p009`: no case"),
            (&["p003"], &["p001"], "`p003`: not every"),
            (&["p001"], &["p001"], "`p001`: the other"),
        ] {
            let error = lists(val, test).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
