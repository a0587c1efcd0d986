//! The frames of a `nodemesh-tcp/1` flow: data, end (half-close), reset with a reason, accept; and retire, by which a
//! destination asks for no further flow on this tunnel.
//!
//! Four bytes of head: kind, code, length (big endian); only data has a body. The reader works in place: it closes the
//! gaps that heads leave in a buffer of mixed heads and payload. It is total: every byte sequence is frames or one named
//! defect, and a defect ends the tunnel.

/// Bytes of a frame's head.
pub const HEAD_BYTES: usize = 4;
/// The payload that our writer puts in one data frame: with its head it fills 64 KiB.
pub const DATA_BYTES_MAX: usize = 64 * 1024 - HEAD_BYTES;

const KIND_DATA: u8 = 1;
const KIND_END: u8 = 2;
const KIND_RESET: u8 = 3;
const KIND_ACCEPT: u8 = 4;
const KIND_RETIRE: u8 = 5;

/// Why a flow was reset or refused. Codes are stable; an unknown one is kept as it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ResetReason {
    /// The application's connection was reset.
    Reset,
    /// Policy at the destination does not permit this flow.
    Denied,
    /// The application refused the connection.
    Unreachable,
    /// The application did not take the connection in time.
    Timeout,
    /// The destination's agent takes no new flow.
    Draining,
    /// A limit at the destination is reached.
    Overload,
    /// The peer broke the protocol.
    Protocol,
    /// A reason that a later version knows.
    Other(u8),
}

impl ResetReason {
    /// The code on the wire.
    pub fn code(self) -> u8 {
        match self {
            ResetReason::Reset => 0,
            ResetReason::Denied => 1,
            ResetReason::Unreachable => 2,
            ResetReason::Timeout => 3,
            ResetReason::Draining => 4,
            ResetReason::Overload => 5,
            ResetReason::Protocol => 6,
            ResetReason::Other(code) => code,
        }
    }

    /// The reason of a code on the wire.
    pub fn from_code(code: u8) -> ResetReason {
        match code {
            0 => ResetReason::Reset,
            1 => ResetReason::Denied,
            2 => ResetReason::Unreachable,
            3 => ResetReason::Timeout,
            4 => ResetReason::Draining,
            5 => ResetReason::Overload,
            6 => ResetReason::Protocol,
            other => ResetReason::Other(other),
        }
    }
}

/// A frame's head, read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// So many bytes of payload follow, one at least.
    Data(u16),
    /// The sender will send no more.
    End,
    /// The flow is over, both ways.
    Reset(ResetReason),
    /// The destination took the flow.
    Accept,
    /// The destination takes no flow on this tunnel that was not on its way already. Comes at any time.
    Retire,
}

/// Bytes that are no frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameDefect {
    /// A kind that this version does not have.
    #[error("unknown frame kind {0}")]
    Kind(u8),
    /// A code or a length where there must be none.
    #[error("a frame of kind {kind} with code {code} and length {length}")]
    Fields {
        /// The kind.
        kind: u8,
        /// The code.
        code: u8,
        /// The length.
        length: u16,
    },
    /// The destination accepted twice, or after its first data.
    #[error("the flow was accepted twice")]
    AcceptTwice,
    /// A source sent what only a destination may.
    #[error("a frame that only a destination sends")]
    NotFromSource,
}

impl Head {
    /// Reads a head.
    pub fn parse([kind, code, high, low]: [u8; HEAD_BYTES]) -> Result<Head, FrameDefect> {
        let length = u16::from_be_bytes([high, low]);
        match (kind, code, length) {
            (KIND_DATA, 0, 1..) => Ok(Head::Data(length)),
            (KIND_END, 0, 0) => Ok(Head::End),
            (KIND_RESET, code, 0) => Ok(Head::Reset(ResetReason::from_code(code))),
            (KIND_ACCEPT, 0, 0) => Ok(Head::Accept),
            (KIND_RETIRE, 0, 0) => Ok(Head::Retire),
            (KIND_DATA..=KIND_RETIRE, ..) => Err(FrameDefect::Fields { kind, code, length }),
            _ => Err(FrameDefect::Kind(kind)),
        }
    }

    /// Writes a head.
    pub fn to_bytes(self) -> [u8; HEAD_BYTES] {
        match self {
            Head::Data(length) => {
                let [high, low] = length.to_be_bytes();
                [KIND_DATA, 0, high, low]
            }
            Head::End => [KIND_END, 0, 0, 0],
            Head::Reset(reason) => [KIND_RESET, reason.code(), 0, 0],
            Head::Accept => [KIND_ACCEPT, 0, 0, 0],
            Head::Retire => [KIND_RETIRE, 0, 0, 0],
        }
    }
}

/// Where the reading side of a flow stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// Nothing came yet.
    Waiting,
    /// The flow is accepted; payload may come.
    Open,
    /// The peer ended its side.
    Ended,
    /// The peer reset the flow.
    Reset {
        /// Why.
        reason: ResetReason,
        /// It was the first that came: the flow was refused before it was accepted.
        refused: bool,
    },
}

/// Reads frames out of a byte stream, in place.
#[derive(Clone, Debug)]
pub struct Reader {
    state: Reading,
    /// Payload of the current data frame still to come.
    body: u16,
    head: [u8; HEAD_BYTES],
    head_bytes: u8,
    from_source: bool,
    retired: bool,
}

/// What became of a piece of the stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stripped {
    /// Payload bytes, moved to the piece's front.
    pub payload: usize,
    /// Bytes read. What follows belongs to whoever reads after the flow's end.
    pub consumed: usize,
}

impl Default for Reader {
    fn default() -> Self {
        Reader::new()
    }
}

impl Reader {
    /// The source's reader at a flow's start.
    pub fn new() -> Reader {
        Reader {
            state: Reading::Waiting,
            body: 0,
            head: [0; HEAD_BYTES],
            head_bytes: 0,
            from_source: false,
            retired: false,
        }
    }

    /// The destination's reader of a source's frames: nothing there needs accepting.
    pub fn open() -> Reader {
        Reader {
            state: Reading::Open,
            from_source: true,
            ..Reader::new()
        }
    }

    /// Whether the destination asked for no further flow on the tunnel.
    pub fn is_retired(&self) -> bool {
        self.retired
    }

    /// Where it stands.
    pub fn state(&self) -> Reading {
        self.state
    }

    /// How many bytes may be read without reading past the current head or body.
    pub fn head_missing(&self) -> usize {
        HEAD_BYTES - usize::from(self.head_bytes).min(HEAD_BYTES)
    }

    /// Whether the next byte is payload.
    pub fn in_body(&self) -> bool {
        self.body > 0
    }

    /// Reads as many frames as `piece` has, until it ends or the flow does, and moves the payload to its front.
    pub fn strip(&mut self, piece: &mut [u8]) -> Result<Stripped, FrameDefect> {
        let mut out = Stripped::default();
        while out.consumed < piece.len() && !self.is_over() {
            if self.body > 0 {
                let n = usize::from(self.body).min(piece.len() - out.consumed);
                piece.copy_within(out.consumed..out.consumed + n, out.payload);
                out.consumed += n;
                out.payload += n;
                self.body -= u16::try_from(n).unwrap_or(self.body);
                continue;
            }
            if let (Some(slot), Some(byte)) = (self.head.get_mut(usize::from(self.head_bytes)), piece.get(out.consumed))
            {
                *slot = *byte;
                self.head_bytes += 1;
            }
            out.consumed += 1;
            if usize::from(self.head_bytes) == HEAD_BYTES {
                self.head_bytes = 0;
                self.enter(Head::parse(self.head)?)?;
            }
        }
        Ok(out)
    }

    fn is_over(&self) -> bool {
        matches!(self.state, Reading::Ended | Reading::Reset { .. })
    }

    fn enter(&mut self, head: Head) -> Result<(), FrameDefect> {
        let waiting = self.state == Reading::Waiting;
        match head {
            Head::Data(length) => (self.state, self.body) = (Reading::Open, length),
            Head::End => self.state = Reading::Ended,
            Head::Reset(reason) => {
                self.state = Reading::Reset {
                    reason,
                    refused: waiting,
                }
            }
            Head::Accept | Head::Retire if self.from_source => return Err(FrameDefect::NotFromSource),
            Head::Retire => self.retired = true,
            Head::Accept if waiting => self.state = Reading::Open,
            Head::Accept => return Err(FrameDefect::AcceptTwice),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn heads_are_read_or_refused() {
        let cases: &[([u8; 4], Result<Head, FrameDefect>)] = &[
            ([1, 0, 0, 1], Ok(Head::Data(1))),
            ([1, 0, 255, 255], Ok(Head::Data(65535))),
            (
                [1, 0, 0, 0],
                Err(FrameDefect::Fields {
                    kind: 1,
                    code: 0,
                    length: 0,
                }),
            ),
            (
                [1, 9, 0, 1],
                Err(FrameDefect::Fields {
                    kind: 1,
                    code: 9,
                    length: 1,
                }),
            ),
            ([2, 0, 0, 0], Ok(Head::End)),
            (
                [2, 0, 0, 1],
                Err(FrameDefect::Fields {
                    kind: 2,
                    code: 0,
                    length: 1,
                }),
            ),
            ([3, 1, 0, 0], Ok(Head::Reset(ResetReason::Denied))),
            ([3, 77, 0, 0], Ok(Head::Reset(ResetReason::Other(77)))),
            (
                [3, 1, 1, 0],
                Err(FrameDefect::Fields {
                    kind: 3,
                    code: 1,
                    length: 256,
                }),
            ),
            ([4, 0, 0, 0], Ok(Head::Accept)),
            ([0, 0, 0, 0], Err(FrameDefect::Kind(0))),
            ([5, 0, 0, 0], Ok(Head::Retire)),
            ([6, 0, 0, 0], Err(FrameDefect::Kind(6))),
        ];
        for (bytes, expected) in cases {
            assert_eq!(Head::parse(*bytes), *expected, "{bytes:?}");
            if let Ok(head) = expected {
                assert_eq!(head.to_bytes(), *bytes);
            }
        }
    }

    #[test]
    fn a_flow_is_accepted_once_and_nothing_is_read_past_its_end() {
        let mut bytes = [&[4, 0, 0, 0, 1, 0, 0, 2][..], b"hi", &[2, 0, 0, 0], b"NMF"].concat();
        let mut reader = Reader::new();
        let stripped = reader.strip(&mut bytes).unwrap();
        assert_eq!(
            stripped,
            Stripped {
                payload: 2,
                consumed: 14
            }
        );
        assert_eq!(&bytes[..2], b"hi");
        assert_eq!(reader.state(), Reading::Ended);
        assert_eq!(reader.strip(&mut [4, 0, 0, 0]).unwrap(), Stripped::default());

        let mut twice = [4, 0, 0, 0, 4, 0, 0, 0];
        assert_eq!(Reader::new().strip(&mut twice), Err(FrameDefect::AcceptTwice));
        for destination_only in [[4, 0, 0, 0], [5, 0, 0, 0]] {
            assert_eq!(
                Reader::open().strip(&mut destination_only.clone()),
                Err(FrameDefect::NotFromSource)
            );
        }
        let mut reader = Reader::new();
        reader.strip(&mut [5, 0, 0, 0, 2, 0, 0, 0]).unwrap();
        assert!(reader.is_retired() && reader.state() == Reading::Ended);
    }

    #[test]
    fn a_reset_before_anything_else_is_a_refusal() {
        for (bytes, refused) in [(&[3u8, 1, 0, 0][..], true), (&[4, 0, 0, 0, 3, 1, 0, 0][..], false)] {
            let mut reader = Reader::new();
            reader.strip(&mut bytes.to_vec()).unwrap();
            assert_eq!(
                reader.state(),
                Reading::Reset {
                    reason: ResetReason::Denied,
                    refused
                }
            );
        }
    }

    #[derive(Clone, Debug)]
    enum Piece {
        Data(Vec<u8>),
        Accept,
    }

    fn pieces() -> impl Strategy<Value = Vec<Piece>> {
        let data = prop::collection::vec(any::<u8>(), 1..300).prop_map(Piece::Data);
        (any::<bool>(), prop::collection::vec(data, 0..8)).prop_map(|(accept, mut data)| {
            if accept {
                data.insert(0, Piece::Accept);
            }
            data
        })
    }

    proptest! {
        /// However the stream is cut, the payload comes out whole and what follows the end is left alone.
        #[test]
        fn payload_survives_any_cutting(pieces in pieces(), cuts in prop::collection::vec(1usize..64, 1..40), tail in any::<[u8; 5]>()) {
            let (mut wire, mut expected) = (Vec::new(), Vec::<u8>::new());
            for piece in &pieces {
                match piece {
                    Piece::Data(data) => {
                        wire.extend(Head::Data(data.len() as u16).to_bytes());
                        wire.extend(data);
                        expected.extend(data);
                    }
                    Piece::Accept => wire.extend(Head::Accept.to_bytes()),
                }
            }
            wire.extend(Head::End.to_bytes());
            let whole = wire.len();
            wire.extend(tail);

            let (mut reader, mut got, mut at) = (Reader::new(), Vec::<u8>::new(), 0);
            for cut in cuts.iter().cycle() {
                let end = (at + cut).min(wire.len());
                let mut piece = wire[at..end].to_vec();
                let stripped = reader.strip(&mut piece).unwrap();
                got.extend(&piece[..stripped.payload]);
                at += stripped.consumed;
                if reader.state() == Reading::Ended {
                    break;
                }
            }
            prop_assert_eq!(got, expected);
            prop_assert_eq!(at, whole);
        }

        /// No input panics, and no more payload comes out than went in.
        #[test]
        fn the_reader_is_total(mut bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let length = bytes.len();
            if let Ok(stripped) = Reader::new().strip(&mut bytes) {
                prop_assert!(stripped.payload <= stripped.consumed && stripped.consumed <= length);
            }
        }
    }
}
