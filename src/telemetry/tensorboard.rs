//! TensorBoard's event files, encoded: what a run tells TensorBoard is put together here, in memory, as the bytes of one file.
//!
//! Pure: no clock, no file, no reader of events. When a file is begun and where it goes is the caller's. A file is written
//! whole and never again: TensorBoard reads those of a folder in the order of their names ([`file_name`]), and does not go back.
//!
//! Scalars are `simple_value` and images `image`, not tensors: to `EventAccumulator` nothing else is a scalar or an image, and
//! TensorBoard itself reads both. A scalar is an `f32` by that, as it is in TensorBoard's data server whatever is written. A
//! text has no such form: it is a string tensor of the text plugin.
//!
//! The steps of a tag rise. The data server keeps only the last value of a step, so two images of one step have two tags.

use prost::Message;

/// Tells readers to go by [`START`], and not to guess restarts from steps that fall.
const FILE_VERSION: &str = "brain.Event:2";
/// `SessionLog.SessionStatus.START`.
const START: i32 = 1;
/// `DataType.DT_STRING`.
const DT_STRING: i32 = 7;
/// `DataClass.DATA_CLASS_TENSOR`, which is what the text plugin reads.
const DATA_CLASS_TENSOR: i32 = 2;

/// The name of a file that is started at `wall_unix_s`; names sort by that time, then by part.
///
/// They do up to the year 2286 and a million parts. If clocks may disagree, all files of a run have the time of its first one,
/// and a process that resumes it counts on in parts.
#[must_use]
pub fn file_name(wall_unix_s: u64, part: u64) -> String {
    format!("events.out.tfevents.{wall_unix_s:010}.cpcr.{part:06}")
}

/// `text` as Markdown that shows it as it is, for [`Events::text`]: a block of code, by indentation.
#[must_use]
pub fn verbatim(text: &str) -> String {
    text.lines().map(|line| format!("    {line}\n")).collect()
}

/// The events of one file, in the order in which they are told.
///
/// Wall times are seconds since 1970. The data server drops an event whose wall time is not finite.
#[derive(Debug, Clone)]
pub struct Events {
    bytes: Vec<u8>,
}

impl Events {
    /// Begins a file.
    ///
    /// `first_step` is for the first file of each process: the first step that it will tell of. Readers forget what they have
    /// of that step and later ones. The process that starts the run has one too: TensorBoard takes the first in a run for the
    /// run's start, and forgets at those that follow. Later files of a process have `None`.
    ///
    /// The data server does not heed this: it forgets for each tag by itself, when its steps fall.
    #[must_use]
    pub fn begin(wall_s: f64, first_step: Option<u64>) -> Self {
        let mut events = Self { bytes: Vec::new() };
        events.event(0, wall_s, What::FileVersion(FILE_VERSION.to_owned()));
        if let Some(step) = first_step {
            events.event(step, wall_s, What::SessionLog(SessionLog { status: START }));
        }
        events
    }

    /// A point of a curve, rounded to an `f32`. What is not finite stays so; what is too large for one becomes infinite.
    pub fn scalar(&mut self, tag: &str, step: u64, wall_s: f64, value: f64) {
        self.summary(step, wall_s, tag, Content::SimpleValue(value as f32));
    }

    /// A picture, of the size that its PNG has.
    pub fn image_png(
        &mut self,
        tag: &str,
        step: u64,
        wall_s: f64,
        png: &[u8],
        height: u32,
        width: u32,
    ) {
        let [height, width] = [height, width].map(|side| i32::try_from(side).unwrap_or(i32::MAX));
        let image = Image { height, width, encoded_image_string: png.to_vec() };
        self.summary(step, wall_s, tag, Content::Image(image));
    }

    /// A text, which TensorBoard shows as Markdown; see [`verbatim`].
    pub fn text(&mut self, tag: &str, step: u64, wall_s: f64, text: &str) {
        let tensor = Tensor {
            dtype: DT_STRING,
            tensor_shape: Some(Shape {}),
            string_val: vec![text.as_bytes().to_vec()],
        };
        self.summary(step, wall_s, tag, Content::Tensor(tensor));
    }

    /// The file.
    #[must_use]
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    fn summary(&mut self, step: u64, wall_s: f64, tag: &str, content: Content) {
        // All tensors here are texts; what else there is says by its kind which plugin's it is.
        let metadata = matches!(content, Content::Tensor(_)).then(|| Metadata {
            plugin_data: Some(PluginData { plugin_name: "text".to_owned() }),
            data_class: DATA_CLASS_TENSOR,
        });
        let value = Value { tag: tag.to_owned(), content: Some(content), metadata };
        self.event(step, wall_s, What::Summary(Summary { value: vec![value] }));
    }

    fn event(&mut self, step: u64, wall_s: f64, what: What) {
        let step = i64::try_from(step).unwrap_or(i64::MAX);
        let event = Event { wall_time: wall_s, step, what: Some(what) };
        append_record(&mut self.bytes, &event.encode_to_vec());
    }
}

/// A TFRecord: the length, its checksum, the data, its checksum; all little-endian.
fn append_record(bytes: &mut Vec<u8>, data: &[u8]) {
    let length = (data.len() as u64).to_le_bytes();
    bytes.reserve(length.len() + data.len() + 8);
    bytes.extend_from_slice(&length);
    bytes.extend_from_slice(&masked(crc32c(&length)).to_le_bytes());
    bytes.extend_from_slice(data);
    bytes.extend_from_slice(&masked(crc32c(data)).to_le_bytes());
}

/// What a record holds of a checksum, so that one of data that holds checksums is still worth something.
fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), a byte at a time.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes
        .iter()
        .fold(!0, |crc: u32, byte| CRC_TABLE[usize::from(crc.to_le_bytes()[0] ^ byte)] ^ (crc >> 8))
}

const CRC_TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < table.len() {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
};

// What is needed of tensorflow's event.proto, summary.proto and tensor.proto, with their names and numbers.

#[derive(Clone, PartialEq, prost::Message)]
struct Event {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

#[derive(Clone, PartialEq, prost::Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Value>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(oneof = "Content", tags = "2, 4, 8")]
    content: Option<Content>,
    #[prost(message, optional, tag = "9")]
    metadata: Option<Metadata>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Content {
    #[prost(float, tag = "2")]
    SimpleValue(f32),
    #[prost(message, tag = "4")]
    Image(Image),
    #[prost(message, tag = "8")]
    Tensor(Tensor),
}

#[derive(Clone, PartialEq, prost::Message)]
struct Image {
    #[prost(int32, tag = "1")]
    height: i32,
    #[prost(int32, tag = "2")]
    width: i32,
    #[prost(bytes = "vec", tag = "4")]
    encoded_image_string: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Metadata {
    #[prost(message, optional, tag = "1")]
    plugin_data: Option<PluginData>,
    #[prost(int32, tag = "4")]
    data_class: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PluginData {
    #[prost(string, tag = "1")]
    plugin_name: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Tensor {
    #[prost(int32, tag = "1")]
    dtype: i32,
    #[prost(message, optional, tag = "2")]
    tensor_shape: Option<Shape>,
    #[prost(bytes = "vec", repeated, tag = "8")]
    string_val: Vec<Vec<u8>>,
}

/// No dimensions: one value.
#[derive(Clone, PartialEq, prost::Message)]
struct Shape {}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
        let (length, rest) = bytes.split_at_checked(8)?;
        let (crc, rest) = rest.split_at_checked(4)?;
        (crc == masked(crc32c(length)).to_le_bytes()).then_some(())?;
        let length = usize::try_from(u64::from_le_bytes(length.try_into().ok()?)).ok()?;
        let (data, rest) = rest.split_at_checked(length)?;
        let (crc, rest) = rest.split_at_checked(4)?;
        (crc == masked(crc32c(data)).to_le_bytes()).then_some((data, rest))
    }

    fn read(mut bytes: &[u8]) -> Option<Vec<Event>> {
        let mut events = Vec::new();
        while !bytes.is_empty() {
            let (data, rest) = record(bytes)?;
            events.push(Event::decode(data).ok()?);
            bytes = rest;
        }
        Some(events)
    }

    fn content(event: &Event) -> (&str, &Content) {
        let Some(What::Summary(summary)) = &event.what else { panic!("{event:?}") };
        (&summary.value[0].tag, summary.value[0].content.as_ref().unwrap())
    }

    #[test]
    fn checksums_are_those_of_the_standard() {
        // RFC 3720, B.4, and the usual check.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(&std::array::from_fn::<u8, 32, _>(|at| at as u8)), 0x46dd_794e);
        assert_eq!(crc32c(&std::array::from_fn::<u8, 32, _>(|at| 31 - at as u8)), 0x113f_db5c);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn a_file_begins_like_tensorflows_own() {
        let bytes = Events::begin(1.5, None).into_bytes();
        assert_eq!(bytes[..12], *b"\x18\0\0\0\0\0\0\0\xa3\x7fK\"");
        assert_eq!(bytes[12..36], *b"\x09\0\0\0\0\0\0\xf8\x3f\x1a\x0dbrain.Event:2");
        assert_eq!(bytes.len(), 40);
    }

    #[test]
    fn what_was_told_is_read() {
        let mut events = Events::begin(10.0, Some(7));
        events.scalar("loss/total", 7, 11.0, 0.1);
        events.image_png("overlay/0", 8, 12.0, b"png", 3, u32::MAX);
        events.text("configuration", u64::MAX, 13.0, "a = 1\n");
        let read = read(&events.into_bytes()).unwrap();
        let steps: Vec<(i64, f64)> = read.iter().map(|e| (e.step, e.wall_time)).collect();
        assert_eq!(steps, [(0, 10.0), (7, 10.0), (7, 11.0), (8, 12.0), (i64::MAX, 13.0)]);
        assert_eq!(read[0].what, Some(What::FileVersion(FILE_VERSION.to_owned())));
        assert_eq!(read[1].what, Some(What::SessionLog(SessionLog { status: START })));
        assert_eq!(content(&read[2]), ("loss/total", &Content::SimpleValue(0.1)));
        let image = Image { height: 3, width: i32::MAX, encoded_image_string: b"png".to_vec() };
        assert_eq!(content(&read[3]), ("overlay/0", &Content::Image(image)));
        let (tag, Content::Tensor(tensor)) = content(&read[4]) else { panic!("no tensor") };
        assert_eq!((tag, &tensor.string_val[0][..]), ("configuration", &b"a = 1\n"[..]));
    }

    #[test]
    fn zero_and_what_is_not_finite_are_points_too() {
        let values = [0.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e300];
        let mut events = Events::begin(0.0, None);
        values.into_iter().for_each(|value| events.scalar("x", 0, 0.0, value));
        let read = read(&events.into_bytes()).unwrap();
        let told: Vec<String> = read[1..].iter().map(|e| format!("{:?}", content(e).1)).collect();
        let floats = ["0.0", "NaN", "inf", "-inf", "inf"].map(|f| format!("SimpleValue({f})"));
        assert_eq!(told, floats);
    }

    #[test]
    fn a_cut_or_changed_file_does_not_read_as_another() {
        let bytes = Events::begin(1.0, Some(3)).into_bytes();
        assert_eq!(read(&bytes).unwrap().len(), 2);
        assert_eq!((0..bytes.len()).filter(|&cut| read(&bytes[..cut]).is_some()).count(), 2);
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 0x10;
            assert_eq!(read(&changed), None, "{at}");
        }
    }

    #[test]
    fn names_sort_in_the_order_of_writing() {
        assert_eq!(file_name(1_764_355_200, 3), "events.out.tfevents.1764355200.cpcr.000003");
        let written = [(0, 0), (0, 1), (0, 12), (9, 2), (999_999_999, 0), (1_764_355_200, 999_999)];
        assert!(written.map(|(time, part)| file_name(time, part)).is_sorted());
    }

    #[test]
    fn verbatim_indents_every_line() {
        assert_eq!(verbatim("[a]\n\n  b = 1"), "    [a]\n    \n      b = 1\n");
    }
}
