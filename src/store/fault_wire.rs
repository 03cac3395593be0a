//! As much HTTP/1.1 as the fault proxy needs: where a message ends, and its header fields.
//!
//! No parser for anything else: requests and answers go through as the bytes they came as.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

/// The longest head of a message.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// Bytes moved at once: large, so that a healthy exchange is not slowed down.
const CHUNK_BYTES: usize = 256 << 10;
/// The largest body that is held in memory, to be tampered with.
const HELD_BYTES_MAX: u64 = 256 << 20;

/// How far a body goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Framing {
    /// So many bytes.
    Length(u64),
    /// Chunks, the last of which is empty.
    Chunked,
    /// To the end of the connection.
    UntilClosed,
}

/// A message's first line and header fields, as they came.
#[derive(Debug, Clone)]
pub(super) struct Head(Bytes);

impl Head {
    /// The first line's word number `n`; `""` if there are fewer.
    pub fn word(&self, n: usize) -> &str {
        let line = self.lines().next().unwrap_or_default();
        line.split(' ').nth(n).unwrap_or_default()
    }

    /// A field's value; `name` in lower case.
    pub fn field(&self, name: &str) -> Option<&str> {
        self.lines().skip(1).find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    /// The status code of an answer; 0 if it has none.
    pub fn status(&self) -> u16 {
        self.word(1).parse().unwrap_or(0)
    }

    /// The same head with the first line `first` (unless empty) and other values for `fields`; an
    /// empty value takes the field away.
    pub fn rewritten(&self, first: &str, fields: &[(&str, String)]) -> Vec<u8> {
        let own = self.lines().next().unwrap_or_default();
        let mut head = format!("{}\r\n", if first.is_empty() { own } else { first });
        let replaced = |line: &str| {
            let key = line.split(':').next().unwrap_or_default();
            fields.iter().any(|(name, _)| key.eq_ignore_ascii_case(name))
        };
        for line in self.lines().skip(1).filter(|line| !line.is_empty() && !replaced(line)) {
            head.push_str(line);
            head.push_str("\r\n");
        }
        for (name, value) in fields.iter().filter(|(_, value)| !value.is_empty()) {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        head.into_bytes()
    }

    /// The head as it came.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// How far the body of this request goes.
    pub fn request_framing(&self) -> Framing {
        self.framing().unwrap_or(Framing::Length(0))
    }

    /// How far the body of this answer to a request with `method` goes.
    pub fn answer_framing(&self, method: &str) -> Framing {
        if method == "HEAD" || matches!(self.status(), 204 | 304) {
            return Framing::Length(0);
        }
        self.framing().unwrap_or(Framing::UntilClosed)
    }

    fn framing(&self) -> Option<Framing> {
        let chunked = self.field("transfer-encoding").is_some_and(|v| v.ends_with("chunked"));
        if chunked {
            return Some(Framing::Chunked);
        }
        self.field("content-length")?.parse().ok().map(Framing::Length)
    }

    fn lines(&self) -> impl Iterator<Item = &str> {
        // Heads are ASCII; one that is not has no fields that matter here.
        std::str::from_utf8(&self.0).unwrap_or_default().split("\r\n")
    }
}

/// What several connections go through together: so many bytes a second, in the order in which they come.
#[derive(Debug)]
pub(super) struct Link {
    bytes_per_s: u64,
    free_at: Mutex<Instant>,
}

impl Link {
    pub fn new(bytes_per_s: u64) -> Self {
        Self { bytes_per_s: bytes_per_s.max(1), free_at: Mutex::new(Instant::now()) }
    }

    /// Returns when the last of `bytes` bytes is through.
    async fn pass(&self, bytes: usize) {
        let through = {
            let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
            let takes = Duration::from_secs_f64(bytes as f64 / self.bytes_per_s as f64);
            *free_at = Instant::now().max(*free_at) + takes;
            *free_at
        };
        tokio::time::sleep_until(through).await;
    }
}

/// A connection and what was read ahead of its current message.
pub(super) struct Wire {
    stream: TcpStream,
    ahead: BytesMut,
    /// What is sent goes through this.
    link: Option<Arc<Link>>,
}

impl Wire {
    pub fn new(stream: TcpStream, link: Option<Arc<Link>>) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        Ok(Self { stream, ahead: BytesMut::new(), link })
    }

    /// The next message's head; `None` when the other side has left.
    pub async fn head(&mut self) -> io::Result<Option<Head>> {
        let mut searched = 0;
        loop {
            let found = self.ahead[searched..].windows(4).position(|four| four == b"\r\n\r\n");
            if let Some(at) = found {
                return Ok(Some(Head(self.ahead.split_to(searched + at + 4).freeze())));
            }
            searched = self.ahead.len().saturating_sub(3);
            if self.ahead.len() > HEAD_BYTES_MAX {
                return Err(io::Error::other("the head of a message is too long"));
            }
            if self.fill().await? == 0 {
                return Ok(None);
            }
        }
    }

    /// Sends `bytes`.
    pub async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        if let Some(link) = &self.link {
            link.pass(bytes.len()).await;
        }
        self.stream.write_all(bytes).await
    }

    /// Moves a body from here to `to`.
    pub async fn pass(&mut self, framing: Framing, to: &mut Wire) -> io::Result<()> {
        match framing {
            Framing::Length(bytes) => self.pass_bytes(bytes, Some(to)).await,
            Framing::UntilClosed => loop {
                let bytes = self.ahead.split();
                to.send(&bytes).await?;
                if self.fill().await? == 0 {
                    return Ok(());
                }
            },
            Framing::Chunked => self.pass_chunks(Some(to)).await,
        }
    }

    /// Reads a body and throws it away.
    pub async fn discard(&mut self, framing: Framing) -> io::Result<()> {
        match framing {
            Framing::Length(bytes) => self.pass_bytes(bytes, None).await,
            Framing::UntilClosed => loop {
                self.ahead.clear();
                if self.fill().await? == 0 {
                    return Ok(());
                }
            },
            Framing::Chunked => self.pass_chunks(None).await,
        }
    }

    /// Reads `bytes` bytes of a body.
    pub async fn take(&mut self, bytes: u64) -> io::Result<Vec<u8>> {
        if bytes > HELD_BYTES_MAX {
            return Err(io::Error::other("the body is too large to be tampered with"));
        }
        while (self.ahead.len() as u64) < bytes {
            if self.fill().await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(self.ahead.split_to(bytes as usize).to_vec())
    }

    /// Waits for `patience`, and says whether the other side left meanwhile.
    pub async fn leaves_within(&mut self, patience: Duration) -> bool {
        let left = async { while !matches!(self.fill().await, Ok(0) | Err(_)) {} };
        tokio::time::timeout(patience, left).await.is_ok()
    }

    /// Whether the other side has left an idle connection.
    pub fn is_stale(&self) -> bool {
        let mut byte = [0_u8];
        let read = self.stream.try_read(&mut byte);
        !read.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Ends the connection with a reset instead of an orderly end.
    pub fn reset(self) {
        if let Err(error) = self.stream.set_zero_linger() {
            tracing::debug!(%error, "a connection ends in order instead of by a reset");
        }
    }

    async fn pass_bytes(&mut self, bytes: u64, mut to: Option<&mut Wire>) -> io::Result<()> {
        let mut left = bytes;
        while left > 0 {
            if self.ahead.is_empty() && self.fill().await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let now = left.min(self.ahead.len() as u64);
            if let Some(to) = to.as_deref_mut() {
                to.send(&self.ahead[..now as usize]).await?;
            }
            self.ahead.advance(now as usize);
            left -= now;
        }
        Ok(())
    }

    async fn pass_chunks(&mut self, mut to: Option<&mut Wire>) -> io::Result<()> {
        loop {
            let line = self.line_bytes().await?;
            let size = std::str::from_utf8(&self.ahead[..line])
                .ok()
                .and_then(|line| line.split([';', '\r']).next())
                .and_then(|size| u64::from_str_radix(size.trim(), 16).ok())
                .ok_or_else(|| io::Error::other("a chunk has no size"))?;
            // The size's line, and the chunk with its line end.
            let whole = line as u64 + if size > 0 { size + 2 } else { 0 };
            self.pass_bytes(whole, to.as_deref_mut()).await?;
            if size == 0 {
                break;
            }
        }
        // Trailer fields, up to an empty line.
        loop {
            let line = self.line_bytes().await?;
            self.pass_bytes(line as u64, to.as_deref_mut()).await?;
            if line == 2 {
                return Ok(());
            }
        }
    }

    /// The length of the next line, its end included.
    async fn line_bytes(&mut self) -> io::Result<usize> {
        loop {
            if let Some(at) = self.ahead.windows(2).position(|two| two == b"\r\n") {
                return Ok(at + 2);
            }
            if self.ahead.len() > HEAD_BYTES_MAX {
                return Err(io::Error::other("a line of a chunked body is too long"));
            }
            if self.fill().await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    async fn fill(&mut self) -> io::Result<usize> {
        self.ahead.reserve(CHUNK_BYTES);
        self.stream.read_buf(&mut self.ahead).await
    }
}
