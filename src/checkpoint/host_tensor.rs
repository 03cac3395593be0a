//! Tensors as host bytes, and safetensors files of them.
//!
//! Encoding is deterministic: the same tensors give the same bytes, whatever their order, with no
//! clock, id or unordered metadata. Decoding treats its input as hostile: every offset, shape and
//! length is checked by the `safetensors` parser before a byte is used, and nothing is allocated
//! beyond the input's size.

use std::borrow::Cow;
use std::collections::BTreeSet;

use bytes::Bytes;
use safetensors::tensor::{Dtype, SafeTensors, View};

use super::error::CheckpointError;

/// A tensor in host memory: row-major, little-endian.
#[derive(Debug, Clone, PartialEq)]
pub struct HostTensor {
    /// Element type.
    pub dtype: Dtype,
    /// Sizes, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
    /// The elements; shared, not copied, by clones.
    pub bytes: Bytes,
}

/// Tensors with their names; each name once.
pub type NamedTensors = Vec<(String, HostTensor)>;

impl View for &HostTensor {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

impl HostTensor {
    /// Whether the length is what dtype and shape say.
    fn check(&self, name: &str) -> Result<(), CheckpointError> {
        let elements = self.shape.iter().try_fold(1usize, |product, &n| product.checked_mul(n));
        let bits = elements.and_then(|n| n.checked_mul(self.dtype.bitsize()));
        if bits == self.bytes.len().checked_mul(8) && bits.is_some() {
            return Ok(());
        }
        Err(CheckpointError::Tensors {
            detail: format!(
                "'{name}' has {} bytes, which is not {:?} of shape {:?}",
                self.bytes.len(),
                self.dtype,
                self.shape
            ),
        })
    }
}

/// The safetensors file of `tensors`.
pub fn encode_tensors(tensors: &NamedTensors) -> Result<Bytes, CheckpointError> {
    let mut names = BTreeSet::new();
    for (name, tensor) in tensors {
        tensor.check(name)?;
        if !names.insert(name.as_str()) || name == "__metadata__" {
            let detail = format!("the name '{name}' is taken");
            return Err(CheckpointError::Tensors { detail });
        }
    }
    // The engine sorts by dtype and then by name, so the order given does not matter.
    let views = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
    let bytes = safetensors::serialize(views, None)
        .map_err(|e| CheckpointError::Tensors { detail: e.to_string() })?;
    Ok(Bytes::from(bytes))
}

/// The tensors of a safetensors file, by name; they share the file's memory.
pub fn decode_tensors(file: &Bytes) -> Result<NamedTensors, CheckpointError> {
    let parsed = SafeTensors::deserialize(file)
        .map_err(|e| CheckpointError::Tensors { detail: e.to_string() })?;
    let mut tensors: NamedTensors = parsed
        .iter()
        .map(|(name, view)| {
            let bytes = file.slice_ref(view.data());
            let tensor = HostTensor { dtype: view.dtype(), shape: view.shape().to_vec(), bytes };
            (name.to_owned(), tensor)
        })
        .collect();
    tensors.sort_by(|(left, _), (right, _)| left.cmp(right));
    Ok(tensors)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tensor(values: &[f32]) -> HostTensor {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        HostTensor { dtype: Dtype::F32, shape: vec![values.len()], bytes: bytes.into() }
    }

    fn some() -> NamedTensors {
        let count = HostTensor {
            dtype: Dtype::I64,
            shape: vec![],
            bytes: vec![7, 0, 0, 0, 0, 0, 0, 0].into(),
        };
        let empty = HostTensor { dtype: Dtype::F32, shape: vec![0, 3], bytes: Bytes::new() };
        vec![
            ("b.weight".into(), tensor(&[1.0, -2.5])),
            ("a.count".into(), count),
            ("c.empty".into(), empty),
        ]
    }

    #[test]
    fn what_is_encoded_comes_back_and_the_order_does_not_matter() {
        let mut tensors = some();
        let file = encode_tensors(&tensors).unwrap();
        tensors.reverse();
        assert_eq!(file, encode_tensors(&tensors).unwrap());
        tensors.sort_by(|l, r| l.0.cmp(&r.0));
        assert_eq!(decode_tensors(&file).unwrap(), tensors);
        // SHA-256 of the file as put together by hand from the format's description.
        // The bytes themselves are part of the promise: a change here breaks bit-exact resumes.
        assert_eq!(
            crate::types::ObjectDigest::of(
                &encode_tensors(&vec![("w".into(), tensor(&[1.0]))]).unwrap()
            )
            .sha256,
            "d7e1133cd341e7d3cc71b7b59792f107c0584c2c03448dd4eb743acb5fd85371"
        );
    }

    #[test]
    fn a_wrong_length_and_a_repeated_name_are_refused() {
        let mut tensors = some();
        tensors[0].1.shape = vec![3];
        assert!(encode_tensors(&tensors).is_err());
        let mut huge = some();
        huge[0].1.shape = vec![usize::MAX, 2];
        assert!(encode_tensors(&huge).is_err());
        let twice = vec![("a".to_owned(), tensor(&[1.0])), ("a".to_owned(), tensor(&[2.0]))];
        assert!(encode_tensors(&twice).is_err());
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..300), header in 0u64..400) {
            decode_tensors(&Bytes::from(bytes.clone())).ok();
            if bytes.len() >= 8 {
                bytes[..8].copy_from_slice(&header.to_le_bytes());
                decode_tensors(&Bytes::from(bytes)).ok();
            }
        }

        #[test]
        fn flips_and_cuts_of_a_real_file_never_panic(at in 0usize..300, bit in 0u8..8, cut in 0usize..300) {
            let mut file = encode_tensors(&some()).unwrap().to_vec();
            let at = at % file.len();
            file[at] ^= 1 << bit;
            decode_tensors(&Bytes::from(file.clone())).ok();
            file.truncate(cut);
            decode_tensors(&Bytes::from(file)).ok();
        }
    }
}
