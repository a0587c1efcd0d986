//! A body by its framing: which bytes belong to it, and what they are for the next hop.

use super::{
    chunk::{ChunkDecoder, ChunkDefect, write_chunk},
    codec::Framing,
};

/// A body that is still coming in.
#[derive(Debug)]
pub(super) enum Incoming {
    Done,
    Length(u64),
    Chunked(Box<ChunkDecoder>),
    UntilClose,
}

impl Incoming {
    pub fn new(framing: Framing) -> Incoming {
        match framing {
            Framing::None | Framing::Length(0) => Incoming::Done,
            Framing::Length(length) => Incoming::Length(length),
            Framing::Chunked => Incoming::Chunked(Box::default()),
            Framing::UntilClose => Incoming::UntilClose,
        }
    }

    pub fn is_done(&self) -> bool {
        matches!(self, Incoming::Done)
    }

    /// Takes what belongs to the body from the start of `input` and appends it to `out`, as chunks if `chunk`.
    /// Returns how much of `input` was used and how many bytes of body that was.
    pub fn take(&mut self, input: &[u8], chunk: bool, out: &mut Vec<u8>) -> Result<(usize, usize), ChunkDefect> {
        let write = |data: &[u8], out: &mut Vec<u8>| {
            if chunk {
                write_chunk(data, out)
            } else {
                out.extend_from_slice(data)
            }
        };
        match self {
            Incoming::Done => Ok((0, 0)),
            Incoming::UntilClose => {
                write(input, out);
                Ok((input.len(), input.len()))
            }
            Incoming::Length(remaining) => {
                let count = usize::try_from(*remaining).map_or(input.len(), |remaining| remaining.min(input.len()));
                write(input.get(..count).unwrap_or_default(), out);
                *remaining -= count as u64;
                if *remaining == 0 {
                    *self = Incoming::Done;
                }
                Ok((count, count))
            }
            Incoming::Chunked(decoder) => {
                let (mut used, mut bytes) = (0, 0);
                while used < input.len() {
                    let rest = input.get(used..).unwrap_or_default();
                    let step = decoder.step(rest)?;
                    write(
                        rest.get(step.skipped..step.skipped + step.data).unwrap_or_default(),
                        out,
                    );
                    used += step.skipped + step.data;
                    bytes += step.data;
                    if step.done {
                        if chunk {
                            decoder.write_end(out);
                        }
                        *self = Incoming::Done;
                        break;
                    }
                }
                Ok((used, bytes))
            }
        }
    }
}
