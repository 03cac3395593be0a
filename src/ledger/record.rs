//! The ledger's records: what an object holds, and how it is written and read.
//!
//! Pure: bytes in, values out. An object is a sealed JSON record (`checkpoint::seal`): a claim, or receipts
//! of one lineage, its opening first.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::error::LedgerError;
use super::receipts::Carried;
use crate::checkpoint::{seal, unseal};
use crate::data::DealSpec;
use crate::proto::LedgerStart;
use crate::types::{Generation, Lineage, Receipt, Step, WorldSize};

/// The format that this program writes, and the newest that it reads.
pub const FORMAT: u32 = 1;
/// Receipts in one object at most: a megabyte of text.
pub const OBJECT_RECEIPTS_MAX: usize = 65_536;
/// Anything much larger is no object of a ledger.
const OBJECT_BYTES_MAX: usize = 8 << 20;
/// Digits of a fingerprint.
const DIGITS: usize = 16;

/// Where a lineage comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// The run's start, step 0.
    Start,
    /// A checkpoint of a release that kept no receipts.
    Unrecorded,
    /// An earlier lineage, which is recorded up to where this one leaves it.
    Lineage(Lineage),
}

/// How a lineage begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Opening {
    /// What it goes on from.
    pub origin: Origin,
    /// Its first step: it supersedes every record of its ancestors from here on.
    pub first: Step,
    /// Steps of the checkpoint that it was resumed from, which carried the receipts before this.
    pub resumed: Step,
    /// The generation, counted by the coordinator that wrote this.
    pub generation: Generation,
    /// How many ranks.
    pub world: WorldSize,
    /// SHA-256 of the dataset's manifest.
    pub dataset_sha256: String,
    /// What the order of samples is a function of.
    pub deal: DealSpec,
}

/// Consecutive steps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// The first of them.
    pub first: Step,
    /// Unlabelled samples in each.
    pub samples: u32,
    /// Their fingerprints; in JSON one text, 16 hexadecimal digits each.
    #[serde(with = "as_text")]
    pub fingerprints: Vec<u64>,
}

/// One object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Object {
    /// [`FORMAT`] of the program that wrote it.
    pub format: u32,
    /// Its number, from 1 on without a gap.
    pub number: u64,
    /// The coordinator that wrote it; fresh with every start of one.
    pub writer: String,
    /// Whose receipts these are; a claim has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lineage: Option<Lineage>,
    /// In the first object of a lineage, whose number is this object's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub opening: Option<Opening>,
    /// In the order of steps.
    pub receipts: Vec<Run>,
}

/// What rank 0 says when its generation is ready: all that an [`Opening`] needs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Attestation {
    /// How many ranks.
    pub world: WorldSize,
    /// SHA-256 of the dataset's manifest.
    pub dataset_sha256: String,
    /// The deal behind its batches.
    pub deal: DealSpec,
    /// What the checkpoint knows of the steps before.
    pub carried: Carried,
}

impl Attestation {
    /// As it crosses process borders.
    ///
    /// # Errors
    /// Never for values of this type; JSON's own error otherwise.
    pub fn to_wire(&self) -> Result<LedgerStart, LedgerError> {
        let value = serde_json::to_value(self).map_err(|e| LedgerError::Invalid(e.to_string()))?;
        Ok(LedgerStart(value))
    }

    /// # Errors
    /// [`LedgerError::Invalid`] for anything else.
    pub fn from_wire(wire: LedgerStart) -> Result<Self, LedgerError> {
        serde_json::from_value(wire.0).map_err(|e| LedgerError::Invalid(e.to_string()))
    }
}

/// The name of an object, relative to the run.
#[must_use]
pub fn object_path(number: u64) -> String {
    format!("ledger/{number:08}.json")
}

/// The number of an object that is named as [`object_path`] names it.
#[must_use]
pub fn parse_number(path: &str) -> Option<u64> {
    let number = path.strip_prefix("ledger/")?.strip_suffix(".json")?.parse().ok()?;
    (object_path(number) == path).then_some(number)
}

#[derive(Deserialize)]
struct FormatOnly {
    format: u32,
}

impl Object {
    /// The object's bytes, sealed. Deterministic.
    ///
    /// # Errors
    /// [`LedgerError::Invalid`] for what [`Self::decode`] would not take.
    pub fn encode(&self) -> Result<Bytes, LedgerError> {
        let invalid = |detail: String| {
            LedgerError::Invalid(format!("{}: {detail}", object_path(self.number)))
        };
        self.validate().map_err(invalid)?;
        seal(self).map_err(|e| invalid(e.to_string()))
    }

    /// The object of `number` in `file`: first whole, then of a known format, then sensible.
    ///
    /// # Errors
    /// [`LedgerError::Damaged`] or [`LedgerError::NewerFormat`].
    pub fn decode(number: u64, file: &[u8]) -> Result<Self, LedgerError> {
        let object = object_path(number);
        let damaged = |detail: String| LedgerError::Damaged { object: object_path(number), detail };
        if file.len() > OBJECT_BYTES_MAX {
            return Err(damaged(format!("{} bytes are too many", file.len())));
        }
        let text =
            unseal(file).ok_or_else(|| damaged("it does not hash to its own seal".to_owned()))?;
        let FormatOnly { format } =
            serde_json::from_slice(&text).map_err(|e| damaged(e.to_string()))?;
        if format > FORMAT {
            return Err(LedgerError::NewerFormat { object, found: format, known: FORMAT });
        }
        // Format 1 is the first: there is none older yet. A change of layout adds an arm here.
        let found: Self = serde_json::from_slice(&text).map_err(|e| damaged(e.to_string()))?;
        found.validate().map_err(damaged)?;
        if found.number != number {
            return Err(damaged(format!("it is {} by its own word", object_path(found.number))));
        }
        Ok(found)
    }

    /// What is wrong with it by itself, if anything.
    fn validate(&self) -> Result<(), String> {
        if self.format == 0 || self.number == 0 || self.writer.is_empty() {
            return Err("format, number and writer must be there".to_owned());
        }
        if self.opening.is_some() && self.lineage != Some(Lineage(self.number)) {
            return Err("a lineage has the number of the object that opens it".to_owned());
        }
        if self.lineage.is_none() && !self.receipts.is_empty() {
            return Err("receipts of no lineage".to_owned());
        }
        let count: usize = self.receipts.iter().map(|run| run.fingerprints.len()).sum();
        if count > OBJECT_RECEIPTS_MAX || self.receipts.iter().any(|run| run.next().is_none()) {
            return Err(format!("{count} receipts in {} runs", self.receipts.len()));
        }
        Ok(())
    }

    /// All receipts, in their order.
    pub fn receipts(&self) -> impl Iterator<Item = Receipt> + '_ {
        self.receipts.iter().flat_map(Run::receipts)
    }
}

impl Run {
    /// The step after its last; none if it is empty or ends beyond all numbers.
    #[must_use]
    pub fn next(&self) -> Option<Step> {
        let count = u64::try_from(self.fingerprints.len()).ok().filter(|count| *count > 0)?;
        self.first.0.checked_add(count).map(Step)
    }

    /// The receipts, one by one.
    pub fn receipts(&self) -> impl Iterator<Item = Receipt> + '_ {
        (self.first.0..).zip(&self.fingerprints).map(|(step, &fingerprint)| Receipt {
            step: Step(step),
            fingerprint,
            samples: self.samples,
        })
    }

    /// Receipts as few runs.
    #[must_use]
    pub fn pack<'a>(receipts: impl IntoIterator<Item = &'a Receipt>) -> Vec<Self> {
        let mut runs: Vec<Self> = Vec::new();
        for receipt in receipts {
            match runs.last_mut() {
                Some(run) if run.next() == Some(receipt.step) && run.samples == receipt.samples => {
                    run.fingerprints.push(receipt.fingerprint);
                }
                _ => runs.push(Self {
                    first: receipt.step,
                    samples: receipt.samples,
                    fingerprints: vec![receipt.fingerprint],
                }),
            }
        }
        runs
    }
}

/// Numbers as one text.
mod as_text {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    use super::DIGITS;

    pub fn serialize<S: Serializer>(numbers: &[u64], to: S) -> Result<S::Ok, S::Error> {
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_be_bytes()).collect();
        to.serialize_str(&hex::encode(bytes))
    }

    pub fn deserialize<'a, D: Deserializer<'a>>(from: D) -> Result<Vec<u64>, D::Error> {
        let text = String::deserialize(from)?;
        if !text.len().is_multiple_of(DIGITS) {
            return Err(D::Error::custom(format!("{} digits are no fingerprints", text.len())));
        }
        let bytes = hex::decode(text).map_err(D::Error::custom)?;
        let (numbers, _) = bytes.as_chunks::<8>();
        Ok(numbers.iter().map(|number| u64::from_be_bytes(*number)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object() -> Object {
        let runs = vec![
            Run { first: Step(15), samples: 12, fingerprints: vec![1, u64::MAX] },
            Run { first: Step(17), samples: 11, fingerprints: vec![3] },
        ];
        let deal = DealSpec {
            seed: 1,
            labelled: 0..10,
            unlabelled: 10..50,
            block_rows: 4,
            batch_labelled: 4,
            batch_unlabelled: 12,
        };
        let opening = Opening {
            origin: Origin::Lineage(Lineage(2)),
            first: Step(15),
            resumed: Step(16),
            generation: Generation(1),
            world: WorldSize(4),
            dataset_sha256: "f".repeat(64),
            deal,
        };
        Object {
            format: FORMAT,
            number: 7,
            writer: "abc".to_owned(),
            lineage: Some(Lineage(7)),
            opening: Some(opening),
            receipts: runs,
        }
    }

    #[test]
    fn it_comes_back_and_is_plain_json() {
        let file = object().encode().unwrap();
        assert_eq!(Object::decode(7, &file).unwrap(), object());
        let json: serde_json::Value = serde_json::from_slice(&file).unwrap();
        assert_eq!(json["receipts"][0]["fingerprints"], "0000000000000001ffffffffffffffff");
        assert_eq!(json["opening"]["origin"]["lineage"], 2);
        let packed = Run::pack(&object().receipts().collect::<Vec<_>>());
        assert_eq!(packed, object().receipts);
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_damage() {
        let file = object().encode().unwrap();
        let is_damage = |file: &[u8]| {
            matches!(Object::decode(7, file), Err(LedgerError::Damaged { object, .. })
                if object == "ledger/00000007.json")
        };
        for at in 0..file.len() {
            let mut flipped = file.to_vec();
            flipped[at] ^= 1 << (at % 8);
            assert!(is_damage(&flipped), "byte {at}");
            assert!(is_damage(&file[..at]), "cut at {at}");
        }
        assert!(matches!(Object::decode(8, &file), Err(LedgerError::Damaged { .. })), "renamed");
    }

    #[test]
    fn a_newer_format_is_refused_by_name_even_if_its_fields_are_unknown() {
        let newer = seal(&serde_json::json!({ "format": 2, "pages": [] })).unwrap();
        let error = Object::decode(7, &newer).unwrap_err();
        assert!(matches!(error, LedgerError::NewerFormat { found: 2, .. }), "{error}");
    }

    #[test]
    fn what_makes_no_sense_is_not_written() {
        let broken = |change: fn(&mut Object)| {
            let mut object = object();
            change(&mut object);
            object.encode().is_err()
        };
        assert!(broken(|o| o.lineage = Some(Lineage(6))));
        assert!(broken(|o| o.receipts[0].fingerprints.clear()));
        assert!(broken(|o| o.receipts[0].first = Step(u64::MAX)));
        assert!(broken(|o| {
            o.opening = None;
            o.lineage = None;
        }));
        assert!(broken(|o| o.number = 0));
    }

    #[test]
    fn numbers_are_read_from_names_as_they_are_written() {
        for number in [1, 99_999_999, 123_456_789_012] {
            assert_eq!(parse_number(&object_path(number)), Some(number));
        }
        for path in ["ledger/1.json", "ledger/00000001.json.part", "logs/00000001.json"] {
            assert_eq!(parse_number(path), None, "{path}");
        }
    }
}
