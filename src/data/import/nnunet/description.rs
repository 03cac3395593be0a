//! `dataset.json`: channels, labels and file ending, as nnU-Net v2 writes them and as v1 did. What
//! it says is checked here; no other file is looked at.

use std::collections::BTreeSet;
use std::fmt;

use serde::Deserialize;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde_json::Value;

use crate::data::manifest::CHANNELS_MAX;

/// nnU-Net's name of the value that means "not annotated".
const IGNORE: &str = "ignore";

/// What a dataset says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Description {
    /// Channel names, `_0000` first.
    pub channels: Vec<String>,
    pub labels: Labels,
    /// `.nii.gz` or `.nii`.
    pub ending: String,
    /// How many cases there should be to train on.
    pub cases: Option<u64>,
}

/// Classes by label value, or why there are none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Labels {
    /// (value, name), the background first.
    Classes {
        values: Vec<(i64, String)>,
        /// The value of `ignore`.
        ignored: Option<i64>,
    },
    /// Classes cannot be read from it, which matters only if nobody names others.
    Unclear(String),
}

#[derive(Deserialize)]
struct Typed {
    channel_names: Option<Pairs>,
    modality: Option<Pairs>,
    labels: Pairs,
    file_ending: Option<String>,
    #[serde(rename = "numTraining")]
    cases: Option<Value>,
    dataset: Option<IgnoredAny>,
}

/// An object's members in their order, those that stand twice included.
struct Pairs(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Pairs;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Members)
    }
}

impl Description {
    /// Reads the bytes of `dataset.json`; `Err` says what is wrong and what to do.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let typed: Typed = serde_json::from_slice(bytes)
            .map_err(|error| format!("it is no nnU-Net dataset.json: {error}"))?;
        if typed.dataset.is_some() {
            return Err("it lists its files under `dataset`, which is not read: lay them out as \
                        imagesTr/CASE_0000.nii.gz and labelsTr/CASE.nii.gz"
                .to_owned());
        }
        let channels = typed
            .channel_names
            .or(typed.modality)
            .ok_or("it has neither `channel_names` nor `modality`")?;
        let ending = typed.file_ending.unwrap_or_else(|| ".nii.gz".to_owned());
        if ![".nii.gz", ".nii"].contains(&ending.as_str()) {
            return Err(format!(
                "its file_ending is `{ending}`; .nii.gz and .nii are read: convert the files to \
                 NIfTI"
            ));
        }
        Ok(Self {
            channels: channel_names(channels)?,
            labels: labels(typed.labels).unwrap_or_else(Labels::Unclear),
            ending,
            cases: typed.cases.and_then(|cases| cases.as_u64()),
        })
    }
}

/// `{"0": "T1", "1": "T2"}`: numbers from zero, each once.
fn channel_names(pairs: Pairs) -> Result<Vec<String>, String> {
    let count = pairs.0.len();
    if !(1..=CHANNELS_MAX).contains(&count) {
        return Err(format!("it has {count} channels: 1 to {CHANNELS_MAX} are read"));
    }
    let mut names = vec![None; count];
    for (number, name) in pairs.0 {
        let place = number.parse::<usize>().ok().and_then(|number| names.get_mut(number));
        let name = name.as_str().filter(|name| !name.is_empty());
        match (place, name) {
            (Some(place @ None), Some(name)) => *place = Some(name.to_owned()),
            (Some(Some(_)), _) => return Err(format!("channel `{number}` stands in it twice")),
            (None, _) => return Err(format!("channel `{number}` is not 0 to {}", count - 1)),
            (_, None) => return Err(format!("channel `{number}` has no name")),
        }
    }
    Ok(names.into_iter().flatten().collect())
}

fn labels(pairs: Pairs) -> Result<Labels, String> {
    let mut values = Vec::with_capacity(pairs.0.len());
    let mut ignored = None;
    for (key, value) in pairs.0 {
        let (number, name) = label(&key, &value)?;
        if name == IGNORE {
            ignored = Some(number);
        } else {
            values.push((number, name));
        }
    }
    values.sort();
    if !(2..=255).contains(&values.len()) {
        return Err(format!("it has {} classes, not 2 to 255", values.len()));
    }
    if values[0].0 != 0 {
        return Err(format!("its least label is {}: the background is 0", values[0].0));
    }
    let (mut numbers, mut names) = (BTreeSet::from_iter(ignored), BTreeSet::new());
    for (number, name) in &values {
        if !numbers.insert(*number) {
            return Err(format!("label {number} stands in it twice"));
        }
        if name.is_empty() || !names.insert(name) {
            return Err(format!("the name of label {number}, `{name}`, is empty or stands twice"));
        }
    }
    Ok(Labels::Classes { values, ignored })
}

/// v2 has `"RV": 1`, v1 `"1": "RV"`.
fn label(key: &str, value: &Value) -> Result<(i64, String), String> {
    match value {
        Value::Number(number) => {
            let number = number.as_i64().ok_or_else(|| format!("label `{key}` is {number}"))?;
            Ok((number, key.to_owned()))
        }
        Value::String(name) => {
            let number = key.parse().map_err(|_| format!("label `{key}` has no number"))?;
            Ok((number, name.clone()))
        }
        Value::Array(_) => Err(format!("label `{key}` is a region, a list of values")),
        _ => Err(format!("label `{key}` is neither a number nor a name")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V2: &str = r#"{"channel_names": {"1": "T2", "0": "T1"}, "numTraining": 3,
        "labels": {"background": 0, "LV": 3, "RV": 1, "ignore": 4}, "file_ending": ".nii"}"#;

    fn refused(from: &str, to: &str) -> String {
        assert!(V2.contains(from), "{from}");
        match Description::parse(V2.replace(from, to).as_bytes()) {
            Ok(Description { labels: Labels::Unclear(why), .. }) | Err(why) => why,
            Ok(read) => panic!("{read:?}"),
        }
    }

    #[test]
    fn both_versions_are_read() {
        let v2 = Description::parse(V2.as_bytes()).unwrap();
        assert_eq!(
            (v2.channels.join(" "), v2.ending.as_str(), v2.cases),
            ("T1 T2".into(), ".nii", Some(3))
        );
        let named = |pairs: &[(i64, &str)]| {
            pairs.iter().map(|(value, name)| (*value, (*name).to_owned())).collect()
        };
        let values = named(&[(0, "background"), (1, "RV"), (3, "LV")]);
        assert_eq!(v2.labels, Labels::Classes { values, ignored: Some(4) });
        let v1 = br#"{"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "heart"},
            "training": [{"image": "../../x.nii.gz", "label": "y"}], "tensorImageSize": "4D"}"#;
        let v1 = Description::parse(v1).unwrap();
        assert_eq!(
            (v1.channels, v1.ending.as_str(), v1.cases),
            (vec!["MRI".into()], ".nii.gz", None)
        );
        let values = named(&[(0, "background"), (1, "heart")]);
        assert_eq!(v1.labels, Labels::Classes { values, ignored: None });
    }

    #[test]
    fn what_means_nothing_is_refused_by_name() {
        for (from, to, words) in [
            ("{\"chan", "{chan", "line 1 column"),
            (r#""labels": {"#, r#""dataset": {"a": 1}, "labels": {"#, "`dataset`"),
            ("channel_names", "channels", "channel_names"),
            (r#""1": "T2""#, r#""0": "T2""#, "`0` stands in it twice"),
            (r#""1": "T2""#, r#""2": "T2""#, "`2` is not 0 to 1"),
            (r#""1": "T2""#, r#""../1": "T2""#, "`../1`"),
            (r#""T2""#, "7", "`1` has no name"),
            (r#"{"1": "T2", "0": "T1"}"#, "{}", "0 channels"),
            (".nii", ".png", "`.png`"),
            (r#""RV": 1"#, r#""RV": [1, 2]"#, "`RV` is a region"),
            (r#""RV": 1"#, r#""RV": 1.5"#, "`RV` is 1.5"),
            (r#""RV": 1"#, r#""RV": null"#, "`RV` is neither"),
            (r#""RV": 1"#, r#""RV": "x""#, "`RV` has no number"),
            (r#""RV": 1"#, r#""RV": 3"#, "label 3 stands in it twice"),
            (r#""RV": 1"#, r#""RV": 4"#, "label 4 stands in it twice"),
            (r#""RV": 1"#, r#""LV": 1"#, "`LV`"),
            (r#""background": 0, "#, "", "background is 0"),
        ] {
            let why = refused(from, to);
            assert!(why.contains(words), "{to}: `{words}` is missing in `{why}`");
        }
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(Description::parse(deep.as_bytes()).is_err());
        let many: Vec<String> = (0..65).map(|n| format!(r#""{n}": "c""#)).collect();
        let many = format!("{{{}}}", many.join(","));
        assert!(refused(r#"{"1": "T2", "0": "T1"}"#, &many).contains("65 channels"));
    }
}
