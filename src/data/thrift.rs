//! What a shard's thrift may look like, checked before the Parquet reader sees it: that one walks lists of things that take no
//! bytes for as long as they say they are, which a few bytes can make hours. No reader of thrift: nothing is kept of it.

/// Types of fields, in the compact protocol.
mod kind {
    pub const STOP: u8 = 0;
    pub const TRUE: u8 = 1;
    pub const FALSE: u8 = 2;
    pub const BYTE: u8 = 3;
    pub const I16: u8 = 4;
    pub const I32: u8 = 5;
    pub const I64: u8 = 6;
    pub const DOUBLE: u8 = 7;
    pub const BINARY: u8 = 8;
    pub const LIST: u8 = 9;
    pub const STRUCT: u8 = 12;
}

/// The Parquet format nests half as deep.
const DEPTH_MAX: u8 = 16;

/// Encodings, as the compact protocol has them (twice the format's numbers): of values, and of levels.
const PLAIN: u64 = 0;
const RLE: u64 = 2 * 3;

/// A page's header as shards have it, and no other: type, sizes and checksum, then the data page's own four numbers. Its
/// values are plain: the reader panics over those that want a dictionary where there was none.
pub(super) fn check_page_header(bytes: &[u8]) -> Result<(), String> {
    let mut walk = Walk { bytes };
    let why = "a page header that no shard has";
    walk.fields(|walk, id, found| match (id, found) {
        (1..=4, kind::I32) => walk.varint(),
        (5, kind::STRUCT) => walk.fields(|walk, id, found| match (id, found) {
            (1, kind::I32) => walk.varint(),
            (2, kind::I32) => walk.one(PLAIN),
            (3 | 4, kind::I32) => walk.one(RLE),
            _ => None,
        }),
        _ => None,
    })
    .ok_or_else(|| why.to_owned())
}

/// A footer's metadata: any thrift, but that every value of it takes a byte or more, and that it ends where its bytes do.
pub(super) fn check_metadata(bytes: &[u8]) -> Result<(), String> {
    Walk { bytes }.value(kind::STRUCT, DEPTH_MAX).ok_or_else(|| "a footer that no shard has".into())
}

/// What is left to walk over; `None` from any step is bytes that are refused.
struct Walk<'a> {
    bytes: &'a [u8],
}

impl Walk<'_> {
    fn skip(&mut self, count: usize) -> Option<()> {
        self.bytes = self.bytes.get(count..)?;
        Some(())
    }

    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.bytes.split_first()?;
        self.bytes = rest;
        Some(*first)
    }

    fn number(&mut self) -> Option<u64> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            number |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(number);
            }
        }
        None
    }

    fn varint(&mut self) -> Option<()> {
        self.number().map(drop)
    }

    /// This number and no other.
    fn one(&mut self, wanted: u64) -> Option<()> {
        (self.number()? == wanted).then_some(())
    }

    /// The fields of a struct, each told with its id and type, to its end.
    fn fields(&mut self, mut field: impl FnMut(&mut Self, i64, u8) -> Option<()>) -> Option<()> {
        let mut id = 0_i64;
        loop {
            let head = self.byte()?;
            let (step, found) = (head >> 4, head & 0xf);
            if found == kind::STOP {
                return Some(());
            }
            id = match step {
                0 => {
                    let zigzag = self.number()?;
                    (zigzag >> 1) as i64 ^ -((zigzag & 1) as i64)
                }
                step => id.checked_add(i64::from(step))?,
            };
            field(self, id, found)?;
        }
    }

    fn value(&mut self, found: u8, depth: u8) -> Option<()> {
        let depth = depth.checked_sub(1)?;
        match found {
            kind::TRUE | kind::FALSE => Some(()),
            kind::BYTE => self.skip(1),
            kind::I16 | kind::I32 | kind::I64 => self.varint(),
            kind::DOUBLE => self.skip(8),
            kind::BINARY => {
                let length = usize::try_from(self.number()?).ok()?;
                self.skip(length)
            }
            kind::LIST => self.list(depth),
            kind::STRUCT => self.fields(|walk, _, found| walk.value(found, depth)),
            _ => None,
        }
    }

    fn list(&mut self, depth: u8) -> Option<()> {
        let head = self.byte()?;
        let elements = match head >> 4 {
            0xf => self.number()?,
            short => u64::from(short),
        };
        let element = head & 0xf;
        if matches!(element, kind::TRUE | kind::FALSE) || elements > self.bytes.len() as u64 {
            return None;
        }
        (0..elements).try_for_each(|_| self.value(element, depth))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Type 0, sizes 5 and 5, a data page of 3 values.
    const HEADER: [u8; 16] =
        [0x15, 0, 0x15, 10, 0x15, 10, 0x2c, 0x15, 6, 0x15, 0, 0x15, 6, 0x15, 6, 0];

    #[test]
    fn a_page_header_is_numbers_and_its_pages_numbers() {
        let header = [&HEADER[..], &[0, 0xff, 0xff]].concat();
        assert_eq!(check_page_header(&header), Ok(()));
        for cut in 0..=HEADER.len() {
            assert!(check_page_header(&HEADER[..cut]).is_err(), "{cut} bytes of it");
        }
    }

    #[test]
    fn values_are_plain() {
        // With a dictionary, by either name; and levels that are no runs.
        for (at, encoding) in [(10, 4), (10, 16), (12, 0), (14, 8)] {
            let mut header = HEADER;
            header[at] = encoding;
            assert!(check_page_header(&header).is_err(), "{encoding} at {at}");
        }
    }

    #[test]
    fn what_would_keep_the_reader_busy_is_refused() {
        let long = [0xff, 0xff, 0xff, 0xff, 0x07];
        // A field 9 that is a list of 2^31 - 1 booleans, of as many doubles past the end, of structs.
        for element in [kind::TRUE, kind::FALSE, kind::DOUBLE, kind::STRUCT, kind::LIST, 13] {
            let list = [&[0x99, 0xf0 | element], &long[..], &[0, 0]].concat();
            assert!(check_page_header(&list).is_err(), "{element}");
            assert!(check_metadata(&list).is_err(), "{element}");
        }
        // The same where numbers are expected, so that a reader that does not look at types is somewhere else.
        assert!(check_page_header(&[0x19, 0xf1, 0xff, 0x07, 0, 0]).is_err());
        let deep = vec![0x1c; 1 << 20];
        assert!(check_metadata(&deep).is_err());
    }

    #[test]
    fn metadata_is_lists_of_structs() {
        // Version 1, two structs with a name and a boolean, an empty list, a double.
        let metadata = [
            0x15, 2, 0x19, 0x2c, 0x18, 1, b'a', 0x11, 0, 0, 0x19, 0x0c, 0x17, 0, 0, 0, 0, 0, 0, 0,
            0, 0,
        ];
        assert_eq!(check_metadata(&metadata), Ok(()));
        assert!(check_metadata(&metadata[..metadata.len() - 1]).is_err());
    }
}
