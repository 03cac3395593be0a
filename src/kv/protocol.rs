//! The wire: length-prefixed binary frames, one request, one reply, in turn.
//!
//! `u32 length, body`, all integers little-endian. A body is an operation (or a status) byte and
//! its fields; byte strings are `u32 length, bytes`. Input is hostile: every length is checked
//! against what is left and against the limits before anything is allocated.

use super::{KEY_BYTES_MAX, KEYS_PER_REQUEST_MAX, VALUE_BYTES_MAX};

/// Longest frame: a request of the most keys, or a compare-and-set of two values.
pub(super) const FRAME_BYTES_MAX: usize =
    2 * VALUE_BYTES_MAX + KEYS_PER_REQUEST_MAX * (KEY_BYTES_MAX + 4) + 64;

/// A request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Request {
    Set {
        key: Vec<u8>,
        value: Vec<u8>,
    },
    /// Waits, then answers with the value.
    Get {
        key: Vec<u8>,
        timeout_ms: u64,
    },
    Wait {
        keys: Vec<Vec<u8>>,
        timeout_ms: u64,
    },
    Add {
        key: Vec<u8>,
        delta: i64,
    },
    CompareSet {
        key: Vec<u8>,
        expected: Vec<u8>,
        desired: Vec<u8>,
    },
    Check {
        keys: Vec<Vec<u8>>,
    },
    Delete {
        key: Vec<u8>,
    },
    NumKeys,
}

/// A reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Reply {
    Done,
    Value(Vec<u8>),
    Number(i64),
    /// The keys did not appear in time.
    TimedOut,
    /// The keys' prefix was forgotten: their generation is over.
    Forgotten,
    /// A limit was passed or a value is not what the operation needs.
    Refused(String),
}

/// A frame that means nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Malformed;

struct Writer(Vec<u8>);

impl Writer {
    fn new(tag: u8) -> Self {
        // Room for the length, filled in by `frame`.
        Self(vec![0, 0, 0, 0, tag])
    }
    fn number(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }
    fn bytes(mut self, value: &[u8]) -> Self {
        self.0.extend(u32::try_from(value.len()).unwrap_or(u32::MAX).to_le_bytes());
        self.0.extend(value);
        self
    }
    fn list(mut self, values: &[Vec<u8>]) -> Self {
        self.0.extend(u32::try_from(values.len()).unwrap_or(u32::MAX).to_le_bytes());
        values.iter().fold(self, |writer, value| writer.bytes(value))
    }
    fn frame(mut self) -> Vec<u8> {
        let length = u32::try_from(self.0.len() - 4).unwrap_or(u32::MAX);
        self.0[..4].copy_from_slice(&length.to_le_bytes());
        self.0
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let (head, rest) = self.0.split_at_checked(count).ok_or(Malformed)?;
        self.0 = rest;
        Ok(head)
    }
    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        self.take(N)?.try_into().map_err(|_| Malformed)
    }
    fn tag(&mut self) -> Result<u8, Malformed> {
        Ok(self.array::<1>()?[0])
    }
    fn number(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from_le_bytes(self.array()?))
    }
    fn length(&mut self, max: usize) -> Result<usize, Malformed> {
        let length = u32::from_le_bytes(self.array()?) as usize;
        if length > max { Err(Malformed) } else { Ok(length) }
    }
    fn bytes(&mut self, max: usize) -> Result<Vec<u8>, Malformed> {
        let length = self.length(max)?;
        Ok(self.take(length)?.to_vec())
    }
    fn key(&mut self) -> Result<Vec<u8>, Malformed> {
        self.bytes(KEY_BYTES_MAX)
    }
    fn keys(&mut self) -> Result<Vec<Vec<u8>>, Malformed> {
        (0..self.length(KEYS_PER_REQUEST_MAX)?).map(|_| self.key()).collect()
    }
    fn end<T>(self, value: T) -> Result<T, Malformed> {
        if self.0.is_empty() { Ok(value) } else { Err(Malformed) }
    }
}

impl Request {
    /// The whole frame, length and all.
    pub(super) fn to_frame(&self) -> Vec<u8> {
        match self {
            Self::Set { key, value } => Writer::new(1).bytes(key).bytes(value),
            Self::Get { key, timeout_ms } => Writer::new(2).bytes(key).number(*timeout_ms),
            Self::Wait { keys, timeout_ms } => Writer::new(3).list(keys).number(*timeout_ms),
            Self::Add { key, delta } => Writer::new(4).bytes(key).number(delta.cast_unsigned()),
            Self::CompareSet { key, expected, desired } => {
                Writer::new(5).bytes(key).bytes(expected).bytes(desired)
            }
            Self::Check { keys } => Writer::new(6).list(keys),
            Self::Delete { key } => Writer::new(7).bytes(key),
            Self::NumKeys => Writer::new(8),
        }
        .frame()
    }

    /// Reads a frame's body.
    pub(super) fn from_body(body: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader(body);
        let request = match reader.tag()? {
            1 => Self::Set { key: reader.key()?, value: reader.bytes(VALUE_BYTES_MAX)? },
            2 => Self::Get { key: reader.key()?, timeout_ms: reader.number()? },
            3 => Self::Wait { keys: reader.keys()?, timeout_ms: reader.number()? },
            4 => Self::Add { key: reader.key()?, delta: reader.number()?.cast_signed() },
            5 => Self::CompareSet {
                key: reader.key()?,
                expected: reader.bytes(VALUE_BYTES_MAX)?,
                desired: reader.bytes(VALUE_BYTES_MAX)?,
            },
            6 => Self::Check { keys: reader.keys()? },
            7 => Self::Delete { key: reader.key()? },
            8 => Self::NumKeys,
            _ => return Err(Malformed),
        };
        reader.end(request)
    }
}

impl Reply {
    /// The whole frame, length and all.
    pub(super) fn to_frame(&self) -> Vec<u8> {
        match self {
            Self::Done => Writer::new(0),
            Self::Value(value) => Writer::new(1).bytes(value),
            Self::Number(value) => Writer::new(2).number(value.cast_unsigned()),
            Self::TimedOut => Writer::new(3),
            Self::Forgotten => Writer::new(4),
            Self::Refused(why) => Writer::new(5).bytes(why.as_bytes()),
        }
        .frame()
    }

    /// Reads a frame's body.
    pub(super) fn from_body(body: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader(body);
        let reply = match reader.tag()? {
            0 => Self::Done,
            1 => Self::Value(reader.bytes(VALUE_BYTES_MAX)?),
            2 => Self::Number(reader.number()?.cast_signed()),
            3 => Self::TimedOut,
            4 => Self::Forgotten,
            5 => {
                Self::Refused(String::from_utf8_lossy(&reader.bytes(VALUE_BYTES_MAX)?).into_owned())
            }
            _ => return Err(Malformed),
        };
        reader.end(reply)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_replies_come_back_as_sent() {
        let key = b"g7/0".to_vec();
        for request in [
            Request::Set { key: key.clone(), value: vec![0, 1, 255] },
            Request::Get { key: key.clone(), timeout_ms: 7 },
            Request::Wait { keys: vec![key.clone(), vec![]], timeout_ms: u64::MAX },
            Request::Add { key: key.clone(), delta: -3 },
            Request::CompareSet { key: key.clone(), expected: vec![], desired: vec![9] },
            Request::Check { keys: vec![] },
            Request::Delete { key },
            Request::NumKeys,
        ] {
            assert_eq!(Request::from_body(&request.to_frame()[4..]), Ok(request));
        }
        for reply in [
            Reply::Done,
            Reply::Value(vec![1, 2]),
            Reply::Number(-1),
            Reply::TimedOut,
            Reply::Forgotten,
            Reply::Refused("full".into()),
        ] {
            assert_eq!(Reply::from_body(&reply.to_frame()[4..]), Ok(reply));
        }
    }

    #[test]
    fn hostile_bodies_are_malformed_and_allocate_nothing() {
        let huge = [&[3u8][..], &u32::MAX.to_le_bytes()].concat();
        for body in [&[][..], &[99], &[1, 255, 255, 255, 255], &[8, 0], &huge] {
            assert_eq!(Request::from_body(body), Err(Malformed));
        }
    }
}
