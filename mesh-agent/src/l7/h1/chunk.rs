//! The chunked coding (RFC 9112 §7.1), both ways: pure and total.
//!
//! Stricter than the RFC asks: a line ends in CR LF and nothing else, a size is plain hexadecimal, extensions are
//! bounded and dropped. Two readers that disagree about where a chunk ends are how requests are smuggled.

use std::io::Write;

use super::field::{FieldKind, classify};

/// The most bytes of chunk extensions in one body.
const EXTENSION_BYTES_MAX: usize = 16 * 1024;
/// The most bytes of trailers.
const TRAILER_BYTES_MAX: usize = 8 * 1024;
/// The most trailer fields.
const TRAILERS_MAX: usize = 64;

/// A broken chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkDefect;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before the first digit of a size.
    SizeStart,
    Size,
    /// White space after a size: only an extension may follow.
    SizeSpace,
    Extension,
    SizeEnd,
    Data,
    DataEnd,
    DataEndLf,
    Trailers,
    Done,
}

/// Reads one chunked body.
#[derive(Debug)]
pub struct ChunkDecoder {
    state: State,
    /// What remains of the size being read or of the chunk's data.
    size: u64,
    digits: u8,
    extension_bytes: usize,
    trailers: Vec<u8>,
}

/// One step of a [`ChunkDecoder`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkStep {
    /// Bytes of the input used before the data.
    pub skipped: usize,
    /// Bytes of data right after those; they count as used too.
    pub data: usize,
    /// The body is over.
    pub done: bool,
}

impl Default for ChunkDecoder {
    fn default() -> ChunkDecoder {
        ChunkDecoder {
            state: State::SizeStart,
            size: 0,
            digits: 0,
            extension_bytes: 0,
            trailers: Vec::new(),
        }
    }
}

impl ChunkDecoder {
    /// Reads from `input` up to the end of its first run of data. A step that used all of the input and has no data
    /// needs more.
    pub fn step(&mut self, input: &[u8]) -> Result<ChunkStep, ChunkDefect> {
        let mut skipped = 0;
        while let Some(&byte) = input.get(skipped) {
            match (self.state, byte) {
                (State::Done, _) => break,
                (State::Data, _) => {
                    let here = (input.len() - skipped) as u64;
                    let data = self.size.min(here);
                    self.size -= data;
                    if self.size == 0 {
                        self.state = State::DataEnd;
                    }
                    // At most `here`, which came from a usize.
                    return Ok(ChunkStep {
                        skipped,
                        data: data as usize,
                        done: false,
                    });
                }
                (State::SizeStart | State::Size, byte) if byte.is_ascii_hexdigit() => {
                    // 15 digits stay below 2^60: no overflow, here or in any sum of lengths.
                    if self.digits == 15 {
                        return Err(ChunkDefect);
                    }
                    let digit = (byte as char).to_digit(16).ok_or(ChunkDefect)?;
                    self.size = self.size << 4 | u64::from(digit);
                    self.digits += 1;
                    self.state = State::Size;
                }
                (State::Size, b' ' | b'\t') => self.state = State::SizeSpace,
                (State::SizeSpace, b' ' | b'\t') => self.extension(1)?,
                (State::Size | State::SizeSpace, b';') => self.state = State::Extension,
                (State::Size | State::Extension, b'\r') => self.state = State::SizeEnd,
                (State::Extension, b'\t' | b' '..=b'~' | 0x80..) => self.extension(1)?,
                (State::SizeEnd, b'\n') => {
                    self.digits = 0;
                    self.state = if self.size == 0 { State::Trailers } else { State::Data };
                }
                (State::DataEnd, b'\r') => self.state = State::DataEndLf,
                (State::DataEndLf, b'\n') => self.state = State::SizeStart,
                (State::Trailers, byte) => {
                    if self.trailers.len() == TRAILER_BYTES_MAX {
                        return Err(ChunkDefect);
                    }
                    self.trailers.push(byte);
                    if self.trailers == b"\r\n" || self.trailers.ends_with(b"\r\n\r\n") {
                        self.state = State::Done;
                        self.check_trailers()?;
                    } else if self.trailers.ends_with(b"\n") && !self.trailers.ends_with(b"\r\n") {
                        return Err(ChunkDefect);
                    }
                }
                _ => return Err(ChunkDefect),
            }
            skipped += 1;
        }
        Ok(ChunkStep {
            skipped,
            data: 0,
            done: self.state == State::Done,
        })
    }

    /// Whether the body is over.
    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }

    fn extension(&mut self, bytes: usize) -> Result<(), ChunkDefect> {
        self.extension_bytes += bytes;
        if self.extension_bytes > EXTENSION_BYTES_MAX {
            Err(ChunkDefect)
        } else {
            Ok(())
        }
    }

    fn check_trailers(&self) -> Result<(), ChunkDefect> {
        self.each_trailer(|_, _| ())
    }

    fn each_trailer(&self, mut each: impl FnMut(&str, &[u8])) -> Result<(), ChunkDefect> {
        let mut headers = [httparse::EMPTY_HEADER; TRAILERS_MAX];
        match httparse::parse_headers(&self.trailers, &mut headers) {
            Ok(httparse::Status::Complete((_, fields))) => {
                fields.iter().for_each(|field| each(field.name, field.value));
                Ok(())
            }
            _ => Err(ChunkDefect),
        }
    }

    /// Writes the last chunk and the trailers that may be forwarded: no field that frames, routes or identifies a
    /// message may come after it (RFC 9110 §6.5.1).
    pub fn write_end(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(b"0\r\n");
        // Checked when the body ended.
        let _ = self.each_trailer(|name, value| {
            if classify(name) == FieldKind::Other {
                out.extend_from_slice(name.as_bytes());
                out.extend_from_slice(b": ");
                out.extend_from_slice(value);
                out.extend_from_slice(b"\r\n");
            }
        });
        out.extend_from_slice(b"\r\n");
    }
}

/// Writes `data` as one chunk; nothing for no data, as that would end the body.
pub fn write_chunk(data: &[u8], out: &mut Vec<u8>) {
    if !data.is_empty() {
        // A Vec takes every write.
        let _ = write!(out, "{:x}\r\n", data.len());
        out.extend_from_slice(data);
        out.extend_from_slice(b"\r\n");
    }
}

/// Fuzz entry: decodes `bytes` as a chunked body, split at `split`, and checks that the split makes no difference.
pub fn fuzz_chunks(bytes: &[u8], split: usize) {
    let decode = |parts: &[&[u8]]| -> Result<(Vec<u8>, bool), ChunkDefect> {
        let (mut decoder, mut data) = (ChunkDecoder::default(), Vec::new());
        for part in parts {
            let mut rest = *part;
            while !rest.is_empty() && !decoder.is_done() {
                let step = decoder.step(rest)?;
                let used = step.skipped + step.data;
                data.extend_from_slice(rest.get(step.skipped..used).unwrap_or_default());
                rest = rest.get(used..).unwrap_or_default();
            }
        }
        Ok((data, decoder.is_done()))
    };
    let (head, tail) = bytes.split_at(split.min(bytes.len()));
    assert_eq!(decode(&[bytes]), decode(&[head, tail]));
}
