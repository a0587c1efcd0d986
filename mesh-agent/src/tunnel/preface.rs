//! The preface of a `nodemesh-tcp/1` flow: what the destination must know before the first byte of payload.
//!
//! Forty-eight bytes, fixed: `NMF`, version, flags, a zero, the source's port and address as the application should
//! see them (IPv4 as mapped IPv6), trace id and span id (zeros where there is no trace). The parser is total and
//! refuses what it does not know: a flag of a later version may change what the flow means.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// Bytes of a preface.
pub const PREFACE_BYTES: usize = 48;
const MAGIC: [u8; 3] = *b"NMF";
const VERSION: u8 = 1;
const FLAG_CONFIRM: u8 = 1;

/// The trace that a flow belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowTrace {
    /// The trace.
    pub trace_id: [u8; 16],
    /// The span at the source.
    pub span_id: [u8; 8],
}

/// What a source says of a flow before its first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preface {
    /// The source's address and port, as the application should see them. A claim: the tunnel's own address is the
    /// proof for the IP.
    pub source: SocketAddr,
    /// The source waits for the destination's accept before it sends.
    pub confirm: bool,
    /// The trace, if there is one.
    pub trace: Option<FlowTrace>,
}

/// Bytes that are no preface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PrefaceDefect {
    /// They do not begin with `NMF`.
    #[error("not a flow's preface")]
    Magic,
    /// A version that we do not speak.
    #[error("preface of version {0}, expected {VERSION}")]
    Version(u8),
    /// Flags that we do not know.
    #[error("unknown flags {0:#04x}")]
    Flags(u8),
    /// Bytes that must be zero are not.
    #[error("reserved bytes are not zero")]
    Reserved,
    /// No source address or port.
    #[error("no source address")]
    NoSource,
}

impl Preface {
    /// A preface without confirmation or trace.
    pub fn new(source: SocketAddr) -> Preface {
        Preface {
            source,
            confirm: false,
            trace: None,
        }
    }

    /// Reads a preface.
    pub fn parse(bytes: &[u8; PREFACE_BYTES]) -> Result<Preface, PrefaceDefect> {
        let [m0, m1, m2, version, flags, reserved, port_high, port_low, rest @ ..] = *bytes;
        if [m0, m1, m2] != MAGIC {
            return Err(PrefaceDefect::Magic);
        }
        if version != VERSION {
            return Err(PrefaceDefect::Version(version));
        }
        if flags & !FLAG_CONFIRM != 0 {
            return Err(PrefaceDefect::Flags(flags));
        }
        if reserved != 0 {
            return Err(PrefaceDefect::Reserved);
        }
        let (mut address, mut trace_id, mut span_id) = ([0; 16], [0; 16], [0; 8]);
        let (address_bytes, trace_bytes) = rest.split_at(16);
        let (trace_id_bytes, span_id_bytes) = trace_bytes.split_at(16);
        address.copy_from_slice(address_bytes);
        trace_id.copy_from_slice(trace_id_bytes);
        span_id.copy_from_slice(span_id_bytes);

        let ip = Ipv6Addr::from(address).to_canonical();
        let port = u16::from_be_bytes([port_high, port_low]);
        if port == 0 || ip.is_unspecified() {
            return Err(PrefaceDefect::NoSource);
        }
        let trace = FlowTrace { trace_id, span_id };
        Ok(Preface {
            source: SocketAddr::new(ip, port),
            confirm: flags & FLAG_CONFIRM != 0,
            trace: (trace.trace_id != [0; 16]).then_some(trace),
        })
    }

    /// Writes a preface.
    pub fn to_bytes(&self) -> [u8; PREFACE_BYTES] {
        let address = match self.source.ip() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped(),
            IpAddr::V6(ip) => ip,
        };
        let flags = if self.confirm { FLAG_CONFIRM } else { 0 };
        let trace = self.trace.unwrap_or(FlowTrace {
            trace_id: [0; 16],
            span_id: [0; 8],
        });
        let fields: [&[u8]; 6] = [
            &MAGIC,
            &[VERSION, flags, 0],
            &self.source.port().to_be_bytes(),
            &address.octets(),
            &trace.trace_id,
            &trace.span_id,
        ];
        let mut bytes = [0; PREFACE_BYTES];
        for (slot, byte) in bytes.iter_mut().zip(fields.into_iter().flatten()) {
            *slot = *byte;
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn good() -> [u8; PREFACE_BYTES] {
        Preface::new("10.1.2.3:4567".parse().unwrap()).to_bytes()
    }

    #[test]
    fn prefaces_are_read_or_refused() {
        let change = |at: usize, to: u8| {
            let mut bytes = good();
            bytes[at] = to;
            bytes
        };
        let no_port = {
            let mut bytes = change(6, 0);
            bytes[7] = 0;
            bytes
        };
        let no_address = {
            let mut bytes = good();
            bytes[8..24].fill(0);
            bytes
        };
        let cases = [
            (good(), None),
            (change(0, b'X'), Some(PrefaceDefect::Magic)),
            (change(3, 2), Some(PrefaceDefect::Version(2))),
            (change(4, 2), Some(PrefaceDefect::Flags(2))),
            (change(5, 1), Some(PrefaceDefect::Reserved)),
            (no_port, Some(PrefaceDefect::NoSource)),
            (no_address, Some(PrefaceDefect::NoSource)),
        ];
        for (bytes, defect) in cases {
            assert_eq!(Preface::parse(&bytes).err(), defect, "{bytes:?}");
        }
        assert_eq!(good()[8..24], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 1, 2, 3]);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(ip in any::<IpAddr>(), port in 1u16.., confirm in any::<bool>(), trace in any::<Option<([u8; 16], [u8; 8])>>()) {
            prop_assume!(!ip.to_canonical().is_unspecified());
            let trace = trace.filter(|(id, _)| *id != [0; 16]).map(|(trace_id, span_id)| FlowTrace { trace_id, span_id });
            let preface = Preface { source: SocketAddr::new(ip.to_canonical(), port), confirm, trace };
            prop_assert_eq!(Preface::parse(&preface.to_bytes()), Ok(preface));
        }

        #[test]
        fn the_parser_is_total(bytes in prop::collection::vec(any::<u8>(), PREFACE_BYTES)) {
            let mut bytes: [u8; PREFACE_BYTES] = bytes.try_into().unwrap();
            let _ = Preface::parse(&bytes);
            bytes[..5].copy_from_slice(b"NMF\x01\0");
            let _ = Preface::parse(&bytes);
        }
    }
}
