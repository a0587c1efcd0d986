//! The keeper's messages: one question, one answer, each a packet of its own.
//!
//! One byte of kind, then fixed fields in big endian. Reading is total: every byte sequence is a message or one named
//! defect, and what comes after the last field is a defect too. Descriptors travel beside the bytes; the messages say
//! how many.

use super::VERSION;

/// Bytes of the longest message: a full page of namespaces.
pub const MESSAGE_BYTES_MAX: usize = 4 + 8 * PAGE_MAX;
/// Namespaces in one page.
pub const PAGE_MAX: usize = 500;

/// Which way the connections of a listener go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// Captured: from the pod.
    Outbound,
    /// Steered: to the pod.
    Inbound,
}

/// Which of a namespace's groups of listeners.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot {
    /// Which way.
    pub direction: Direction,
    /// Whether the group is for IPv6.
    pub ipv6: bool,
}

impl Slot {
    /// Every slot, in the order in which they are told.
    pub const ALL: [Slot; 4] = [
        Slot::new(Direction::Outbound, false),
        Slot::new(Direction::Outbound, true),
        Slot::new(Direction::Inbound, false),
        Slot::new(Direction::Inbound, true),
    ];

    /// A slot.
    pub const fn new(direction: Direction, ipv6: bool) -> Slot {
        Slot { direction, ipv6 }
    }

    /// Its number on the wire.
    pub fn code(self) -> u8 {
        u8::from(self.direction == Direction::Inbound) * 2 + u8::from(self.ipv6)
    }

    fn from_code(code: u8) -> Option<Slot> {
        Slot::ALL.get(usize::from(code)).copied()
    }
}

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// An agent, or somebody who only looks.
    Agent,
    /// A new keeper that takes over.
    Keeper,
}

/// What can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// The first message.
    Hello {
        /// The asker's version.
        version: u16,
        /// Who asks.
        role: Role,
    },
    /// The namespaces with a greater cookie than this one that sockets are held of, a page at most.
    Namespaces {
        /// The last one of the page before; 0 at first.
        after: u64,
    },
    /// Sockets of one slot from `first` on, as many as a packet takes.
    Take {
        /// The namespace's cookie.
        netns: u64,
        /// Which slot.
        slot: Slot,
        /// The first one's index.
        first: u16,
    },
    /// Hold these sockets too. `first` must be the number of those that the slot has.
    Put {
        /// The namespace's cookie.
        netns: u64,
        /// Which slot.
        slot: Slot,
        /// The first one's index.
        first: u16,
        /// How many come with this packet.
        count: u8,
    },
    /// Let go of everything of a namespace.
    Withdraw {
        /// The namespace's cookie.
        netns: u64,
    },
    /// From now on, and as long as this connection lives, the asker serves what is held.
    Serving {
        /// When it was started, in nanoseconds since the machine's start.
        started: u64,
    },
    /// Does somebody serve who was started later?
    Successor {
        /// When the asker was started.
        started: u64,
    },
    /// I hold all that you hold, and have your place: end your connections and hold nothing.
    Supersede,
}

/// Why something is not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Nothing but a Hello may come first, and nobody says it twice.
    #[error("a Hello out of place")]
    Order,
    /// A message that this version does not know, or a broken one.
    #[error("a message that is not understood")]
    Unknown,
    /// Another generation has put sockets there: take those.
    #[error("the slot's sockets are not those that the asker thinks")]
    Taken,
    /// A bound is reached.
    #[error("the keeper is full")]
    Full,
    /// The descriptors are not those that the message tells of.
    #[error("the descriptors do not match the message")]
    Descriptors,
    /// Only a keeper may say this.
    #[error("only a new keeper may take over")]
    Role,
    /// A newer keeper has taken over: ask that one.
    #[error("a newer keeper has taken over")]
    Superseded,
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Response {
    /// To Hello.
    Hello {
        /// The keeper's version.
        version: u16,
        /// Sockets held.
        sockets: u32,
    },
    /// To Namespaces; the last page is an empty one.
    Namespaces(Vec<u64>),
    /// To Take: as many sockets come with this packet, and so many has the slot.
    Sockets {
        /// With this packet.
        count: u8,
        /// In all.
        total: u16,
    },
    /// It is done.
    Done,
    /// To Successor.
    Successor(bool),
    /// It is not done.
    Refused(Refusal),
}

/// What is wrong with a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Defect {
    /// No such kind.
    #[error("unknown kind {0}")]
    Kind(u8),
    /// Fewer bytes than its kind has, or more.
    #[error("wrong length")]
    Length,
    /// A field holds what it cannot.
    #[error("bad value of {0}")]
    Value(&'static str),
}

const HELLO: u8 = 1;
const NAMESPACES: u8 = 2;
const TAKE: u8 = 3;
const PUT: u8 = 4;
const WITHDRAW: u8 = 5;
const SERVING: u8 = 6;
const SUCCESSOR: u8 = 7;
const SUPERSEDE: u8 = 8;

const SOCKETS: u8 = 3;
const DONE: u8 = 4;
const REFUSED: u8 = 5;

/// Reads fields from the front.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Defect> {
        let (field, rest) = self.0.split_first_chunk::<N>().ok_or(Defect::Length)?;
        self.0 = rest;
        Ok(*field)
    }

    fn byte(&mut self) -> Result<u8, Defect> {
        self.take::<1>().map(|[byte]| byte)
    }

    fn u16(&mut self) -> Result<u16, Defect> {
        self.take().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, Defect> {
        self.take().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64, Defect> {
        self.take().map(u64::from_be_bytes)
    }

    fn slot(&mut self) -> Result<Slot, Defect> {
        Slot::from_code(self.byte()?).ok_or(Defect::Value("slot"))
    }

    fn end<T>(self, value: T) -> Result<T, Defect> {
        if self.0.is_empty() {
            Ok(value)
        } else {
            Err(Defect::Length)
        }
    }
}

impl Request {
    /// The first message of this version.
    pub fn hello(role: Role) -> Request {
        Request::Hello { version: VERSION, role }
    }

    /// How many descriptors come with it.
    pub fn sockets(&self) -> usize {
        match self {
            Request::Put { count, .. } => usize::from(*count),
            _ => 0,
        }
    }

    /// The message's bytes.
    pub fn to_bytes(self) -> Vec<u8> {
        match self {
            Request::Hello { version, role } => {
                let role = u8::from(role == Role::Keeper);
                [&[HELLO][..], &version.to_be_bytes(), &[role]].concat()
            }
            Request::Namespaces { after } => [&[NAMESPACES][..], &after.to_be_bytes()].concat(),
            Request::Take { netns, slot, first } => {
                [&[TAKE][..], &netns.to_be_bytes(), &[slot.code()], &first.to_be_bytes()].concat()
            }
            Request::Put {
                netns,
                slot,
                first,
                count,
            } => [
                &[PUT][..],
                &netns.to_be_bytes(),
                &[slot.code()],
                &first.to_be_bytes(),
                &[count],
            ]
            .concat(),
            Request::Withdraw { netns } => [&[WITHDRAW][..], &netns.to_be_bytes()].concat(),
            Request::Serving { started } => [&[SERVING][..], &started.to_be_bytes()].concat(),
            Request::Successor { started } => [&[SUCCESSOR][..], &started.to_be_bytes()].concat(),
            Request::Supersede => vec![SUPERSEDE],
        }
    }

    /// Reads a message.
    pub fn parse(bytes: &[u8]) -> Result<Request, Defect> {
        let mut fields = Fields(bytes);
        let request = match fields.byte()? {
            HELLO => Request::Hello {
                version: fields.u16()?,
                role: match fields.byte()? {
                    0 => Role::Agent,
                    1 => Role::Keeper,
                    _ => return Err(Defect::Value("role")),
                },
            },
            NAMESPACES => Request::Namespaces { after: fields.u64()? },
            TAKE => Request::Take {
                netns: fields.u64()?,
                slot: fields.slot()?,
                first: fields.u16()?,
            },
            PUT => Request::Put {
                netns: fields.u64()?,
                slot: fields.slot()?,
                first: fields.u16()?,
                count: fields.byte()?,
            },
            WITHDRAW => Request::Withdraw { netns: fields.u64()? },
            SERVING => Request::Serving { started: fields.u64()? },
            SUCCESSOR => Request::Successor { started: fields.u64()? },
            SUPERSEDE => Request::Supersede,
            kind => return Err(Defect::Kind(kind)),
        };
        fields.end(request)
    }
}

impl Refusal {
    const ALL: [Refusal; 7] = [
        Refusal::Order,
        Refusal::Unknown,
        Refusal::Taken,
        Refusal::Full,
        Refusal::Descriptors,
        Refusal::Role,
        Refusal::Superseded,
    ];

    fn code(self) -> u8 {
        let place = Refusal::ALL.iter().position(|refusal| *refusal == self);
        place.and_then(|place| u8::try_from(place).ok()).unwrap_or(u8::MAX)
    }
}

impl Response {
    /// How many descriptors come with it.
    pub fn sockets(&self) -> usize {
        match self {
            Response::Sockets { count, .. } => usize::from(*count),
            _ => 0,
        }
    }

    /// The message's bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        match self {
            Response::Hello { version, sockets } => {
                [&[HELLO][..], &version.to_be_bytes(), &sockets.to_be_bytes()].concat()
            }
            Response::Namespaces(cookies) => {
                let mut bytes = vec![NAMESPACES];
                for cookie in cookies.iter().take(PAGE_MAX) {
                    bytes.extend_from_slice(&cookie.to_be_bytes());
                }
                bytes
            }
            Response::Sockets { count, total } => [&[SOCKETS, *count][..], &total.to_be_bytes()].concat(),
            Response::Done => vec![DONE],
            Response::Successor(yes) => vec![SUCCESSOR, u8::from(*yes)],
            Response::Refused(refusal) => vec![REFUSED, refusal.code()],
        }
    }

    /// Reads a message.
    pub fn parse(bytes: &[u8]) -> Result<Response, Defect> {
        let mut fields = Fields(bytes);
        let response = match fields.byte()? {
            HELLO => Response::Hello {
                version: fields.u16()?,
                sockets: fields.u32()?,
            },
            NAMESPACES => {
                let mut cookies = Vec::with_capacity(fields.0.len() / 8);
                while !fields.0.is_empty() {
                    cookies.push(fields.u64()?);
                }
                if cookies.len() > PAGE_MAX {
                    return Err(Defect::Length);
                }
                Response::Namespaces(cookies)
            }
            SOCKETS => Response::Sockets {
                count: fields.byte()?,
                total: fields.u16()?,
            },
            DONE => Response::Done,
            SUCCESSOR => match fields.byte()? {
                0 => Response::Successor(false),
                1 => Response::Successor(true),
                _ => return Err(Defect::Value("successor")),
            },
            REFUSED => {
                let code = usize::from(fields.byte()?);
                // A later keeper may refuse for a reason that is not known here.
                Response::Refused(Refusal::ALL.get(code).copied().unwrap_or(Refusal::Unknown))
            }
            kind => return Err(Defect::Kind(kind)),
        };
        fields.end(response)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn slot() -> impl Strategy<Value = Slot> {
        (0..4usize).prop_map(|n| Slot::ALL[n])
    }

    fn request() -> impl Strategy<Value = Request> {
        prop_oneof![
            (any::<u16>(), any::<bool>()).prop_map(|(version, keeper)| Request::Hello {
                version,
                role: if keeper { Role::Keeper } else { Role::Agent },
            }),
            any::<u64>().prop_map(|after| Request::Namespaces { after }),
            (any::<u64>(), slot(), any::<u16>()).prop_map(|(netns, slot, first)| Request::Take { netns, slot, first }),
            (any::<u64>(), slot(), any::<u16>(), any::<u8>()).prop_map(|(netns, slot, first, count)| Request::Put {
                netns,
                slot,
                first,
                count
            }),
            any::<u64>().prop_map(|netns| Request::Withdraw { netns }),
            any::<u64>().prop_map(|started| Request::Serving { started }),
            any::<u64>().prop_map(|started| Request::Successor { started }),
            Just(Request::Supersede),
        ]
    }

    fn response() -> impl Strategy<Value = Response> {
        prop_oneof![
            (any::<u16>(), any::<u32>()).prop_map(|(version, sockets)| Response::Hello { version, sockets }),
            prop::collection::vec(any::<u64>(), 0..=PAGE_MAX).prop_map(Response::Namespaces),
            (any::<u8>(), any::<u16>()).prop_map(|(count, total)| Response::Sockets { count, total }),
            Just(Response::Done),
            any::<bool>().prop_map(Response::Successor),
            (0..Refusal::ALL.len()).prop_map(|n| Response::Refused(Refusal::ALL[n])),
        ]
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(request in request(), response in response()) {
            let bytes = request.to_bytes();
            prop_assert!(bytes.len() <= MESSAGE_BYTES_MAX);
            prop_assert_eq!(Request::parse(&bytes), Ok(request));
            let bytes = response.to_bytes();
            prop_assert!(bytes.len() <= MESSAGE_BYTES_MAX);
            prop_assert_eq!(Response::parse(&bytes), Ok(response));
        }

        #[test]
        fn cut_or_longer_messages_are_refused(request in request(), cut in 0usize..20) {
            let bytes = request.to_bytes();
            let shorter = &bytes[..bytes.len().saturating_sub(cut + 1)];
            prop_assert_eq!(Request::parse(shorter), Err(Defect::Length));
            prop_assert_eq!(Request::parse(&[&bytes[..], &[0]].concat()), Err(Defect::Length));
        }

        #[test]
        fn the_readers_are_total(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = (Request::parse(&bytes), Response::parse(&bytes));
        }
    }

    #[test]
    fn bad_values_are_named() {
        let cases = [
            (&[9][..], Defect::Kind(9)),
            (&[HELLO, 0, 1, 2], Defect::Value("role")),
            (&[TAKE, 0, 0, 0, 0, 0, 0, 0, 1, 4, 0, 0], Defect::Value("slot")),
            (&[], Defect::Length),
        ];
        for (bytes, defect) in cases {
            assert_eq!(Request::parse(bytes), Err(defect), "{bytes:?}");
        }
        assert_eq!(Response::parse(&[SUCCESSOR, 2]), Err(Defect::Value("successor")));
        assert_eq!(
            Response::parse(&[REFUSED, 200]),
            Ok(Response::Refused(Refusal::Unknown)),
            "a later version's reason"
        );
    }

    #[test]
    fn slots_have_their_numbers() {
        for (number, slot) in Slot::ALL.into_iter().enumerate() {
            assert_eq!(usize::from(slot.code()), number);
        }
    }
}
