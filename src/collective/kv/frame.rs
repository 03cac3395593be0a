//! The wire format: `length u32 | code u8 | (length u32 | bytes)*`, little-endian, both ways.

use std::io;

/// Largest frame that either side takes. c10d's values are addresses: hundreds of bytes.
pub(super) const FRAME_BYTES_MAX: usize = 1 << 20;

/// Request codes.
pub(super) mod op {
    pub const SET: u8 = 1;
    pub const GET: u8 = 2;
    pub const WAIT: u8 = 3;
    pub const ADD: u8 = 4;
    pub const COMPARE_SET: u8 = 5;
    pub const CHECK: u8 = 6;
    pub const DELETE: u8 = 7;
    pub const COUNT: u8 = 8;
    pub const FORGET: u8 = 9;
}

/// Answer codes.
pub(super) mod answer {
    pub const OK: u8 = 0;
    pub const TIMEOUT: u8 = 2;
    pub const REFUSED: u8 = 3;
}

/// One request or answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Frame {
    pub code: u8,
    pub fields: Vec<Vec<u8>>,
}

impl Frame {
    pub(super) fn new(code: u8, fields: &[&[u8]]) -> Self {
        Self { code, fields: fields.iter().map(|field| field.to_vec()).collect() }
    }

    /// The frame with its leading length.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut body = vec![self.code];
        for field in &self.fields {
            body.extend_from_slice(&length(field.len()));
            body.extend_from_slice(field);
        }
        let mut bytes = length(body.len()).to_vec();
        bytes.extend_from_slice(&body);
        bytes
    }

    /// A frame from its body (without the leading length). Hostile input gives an error.
    pub(super) fn decode(body: &[u8]) -> io::Result<Self> {
        let bad = || io::Error::new(io::ErrorKind::InvalidData, "malformed frame");
        let (&code, mut rest) = body.split_first().ok_or_else(bad)?;
        let mut fields = Vec::new();
        while !rest.is_empty() {
            let (head, tail) = rest.split_first_chunk::<4>().ok_or_else(bad)?;
            let length = u32::from_le_bytes(*head) as usize;
            let (field, tail) = tail.split_at_checked(length).ok_or_else(bad)?;
            fields.push(field.to_vec());
            rest = tail;
        }
        Ok(Self { code, fields })
    }

    /// A field, or an empty one.
    pub(super) fn field(&self, index: usize) -> &[u8] {
        self.fields.get(index).map_or(&[], Vec::as_slice)
    }

    /// A field as a number; 0 if it is not one.
    pub(super) fn number(&self, index: usize) -> i64 {
        self.field(index).try_into().map_or(0, i64::from_le_bytes)
    }
}

/// Checks a leading length.
pub(super) fn body_length(head: [u8; 4]) -> io::Result<usize> {
    let length = u32::from_le_bytes(head) as usize;
    if length == 0 || length > FRAME_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a frame of {length} bytes")));
    }
    Ok(length)
}

fn length(n: usize) -> [u8; 4] {
    u32::try_from(n).unwrap_or(u32::MAX).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_the_wire_and_cut_ones_are_refused() {
        let frame = Frame::new(op::SET, &[b"key", b"", b"value"]);
        let bytes = frame.encode();
        assert_eq!(Frame::decode(&bytes[4..]).unwrap(), frame);
        for cut in [5, 7, 9, bytes.len() - 1] {
            let decoded = Frame::decode(&bytes[4..cut]);
            assert!(decoded.is_err() || decoded.unwrap() != frame, "{cut}");
        }
        assert!(Frame::decode(&[]).is_err());
        assert!(body_length(u32::MAX.to_le_bytes()).is_err());
    }
}
