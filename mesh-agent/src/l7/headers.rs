//! The headers that the mesh itself reads, sets and strips, and the changes that routes ask for.
//!
//! `x-forwarded-for`, `x-request-id`, W3C `traceparent` and `x-forwarded-client-cert`. Parsers here are total: whatever
//! a source sends, they answer. A source must never be able to say who it is: identity headers are stripped at the
//! source and set at the destination.

use std::{fmt, net::IpAddr, sync::Arc};

use mesh_api::{request::Request, route::HeaderEdit};

use crate::digits::{from_hex, hex};

/// Changes to a message's headers: removals first, then `set` (replaces every field of that name), then `add`.
/// Names are in lower case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderChanges {
    /// Replaced or added.
    pub set: Vec<(String, String)>,
    /// Added beside those there.
    pub add: Vec<(String, String)>,
    /// Removed.
    pub remove: Vec<String>,
}

/// What the mesh does with its own headers on one request. The default strips identities and touches nothing else.
#[derive(Clone, Debug, Default)]
pub struct Standard {
    /// Append this address to `x-forwarded-for`.
    pub forwarded_for: Option<IpAddr>,
    /// Set `x-request-id`, for a request that came without one.
    pub request_id: Option<RequestId>,
    /// Set `traceparent`; `None` leaves what came.
    pub trace: Option<TraceParent>,
    /// Remove `tracestate`: it belongs to a `traceparent` that was not valid.
    pub drop_trace_state: bool,
    /// What becomes of `x-forwarded-client-cert`.
    pub client_cert: ClientCert,
}

/// What becomes of `x-forwarded-client-cert`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ClientCert {
    /// Removed: what a workload says of identities counts for nothing (the source's agent, and plaintext arrivals).
    #[default]
    Strip,
    /// Replaced by this value (the destination's agent).
    Set(Arc<str>),
}

/// A random request id in the form of a version 4 UUID.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct RequestId([u8; 36]);

/// A W3C trace context (version 00).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceParent {
    /// The trace; never zero.
    pub trace: u128,
    /// The span that sent the request; never zero.
    pub span: u64,
    /// Flags; bit 0 is `sampled`.
    pub flags: u8,
}

impl HeaderChanges {
    /// Nothing to change.
    pub fn is_empty(&self) -> bool {
        self.set.is_empty() && self.add.is_empty() && self.remove.is_empty()
    }

    /// Whether fields of this name, in any case, do not survive.
    pub fn drops(&self, name: &[u8]) -> bool {
        self.remove
            .iter()
            .any(|removed| removed.as_bytes().eq_ignore_ascii_case(name))
            || self
                .set
                .iter()
                .any(|(set, _)| set.as_bytes().eq_ignore_ascii_case(name))
    }

    /// The fields to write, in order.
    pub fn written(&self) -> impl Iterator<Item = (&str, &str)> {
        self.set
            .iter()
            .chain(&self.add)
            .map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// Applies further changes after these.
    pub fn extend(&mut self, later: &HeaderChanges) {
        if later.is_empty() {
            return;
        }
        self.set.retain(|(name, _)| !later.drops(name.as_bytes()));
        self.add.retain(|(name, _)| !later.drops(name.as_bytes()));
        self.set.extend(later.set.iter().cloned());
        self.add.extend(later.add.iter().cloned());
        self.remove.extend(later.remove.iter().cloned());
    }
}

impl From<&HeaderEdit> for HeaderChanges {
    fn from(edit: &HeaderEdit) -> HeaderChanges {
        HeaderChanges {
            set: edit.set.clone(),
            add: edit.add.clone(),
            remove: edit.remove.clone(),
        }
    }
}

impl Standard {
    /// What a source's agent does: name the source, make sure of a request id and of a valid trace context.
    pub fn at_source(request: &dyn Request, source: IpAddr) -> Standard {
        let came = request.header("traceparent");
        let valid = came.and_then(TraceParent::parse);
        Standard {
            forwarded_for: Some(source),
            request_id: request
                .header("x-request-id")
                .is_none_or(str::is_empty)
                .then(RequestId::generate),
            trace: if valid.is_none() {
                Some(TraceParent::generate())
            } else {
                None
            },
            drop_trace_state: valid.is_none(),
            client_cert: ClientCert::Strip,
        }
    }
}

impl RequestId {
    /// A new one.
    pub fn generate() -> RequestId {
        RequestId::from_bits(rand::random())
    }

    fn from_bits(bits: u128) -> RequestId {
        const HEX: &[u8; 16] = b"0123456789abcdef";
        // RFC 9562 §5.4: version 4, variant 10.
        let bits = bits & !(0xf << 76) & !(0x3 << 62) | 0x4 << 76 | 0x2 << 62;
        let mut text = [b'-'; 36];
        let places = text
            .iter_mut()
            .enumerate()
            .filter(|(at, _)| ![8, 13, 18, 23].contains(at));
        for (index, (_, place)) in places.enumerate() {
            *place = HEX[(bits >> (124 - 4 * index) & 0xf) as usize];
        }
        RequestId(text)
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

impl fmt::Debug for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl TraceParent {
    /// A new trace, sampled.
    pub fn generate() -> TraceParent {
        TraceParent {
            trace: rand::random::<u128>() | 1,
            span: rand::random::<u64>() | 1,
            flags: 1,
        }
    }

    /// Reads a `traceparent` (W3C Trace Context §3.2): `00-<32 hex>-<16 hex>-<2 hex>`, lower case, no zero ids. Of a
    /// later version the first 55 bytes are read, and a dash must follow if anything does. Version `ff` is invalid.
    pub fn parse(text: &str) -> Option<TraceParent> {
        let hex = |range: std::ops::Range<usize>| from_hex(text.as_bytes().get(range)?);
        let dash = |at: usize| text.as_bytes().get(at) == Some(&b'-');
        let version = hex(0..2)?;
        let length_is_valid = text.len() == 55 || (version != 0 && dash(55));
        if version == 0xff || !length_is_valid || !(dash(2) && dash(35) && dash(52)) {
            return None;
        }
        let (trace, span, flags) = (hex(3..35)?, hex(36..52)?, hex(53..55)?);
        if trace == 0 || span == 0 {
            return None;
        }
        Some(TraceParent {
            trace,
            span: u64::try_from(span).ok()?,
            flags: u8::try_from(flags).ok()?,
        })
    }

    /// The same trace with a new span.
    pub fn child(self) -> TraceParent {
        TraceParent {
            span: rand::random::<u64>() | 1,
            ..self
        }
    }

    /// As it stands in a header.
    pub fn text(&self) -> [u8; 55] {
        let mut text = *b"00-00000000000000000000000000000000-0000000000000000-00";
        // Of a later version's flags only those of version 00 are known.
        text[3..35].copy_from_slice(&hex::<32>(self.trace));
        text[36..52].copy_from_slice(&hex::<16>(self.span.into()));
        text[53..].copy_from_slice(&hex::<2>((self.flags & 1).into()));
        text
    }

    /// Whether the trace is sampled.
    pub fn is_sampled(self) -> bool {
        self.flags & 1 == 1
    }
}

impl fmt::Display for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(std::str::from_utf8(&self.text()).unwrap_or_default())
    }
}

/// Whether a value may stand in a header field: no CR, LF, NUL or other control but tab (RFC 9110 §5.5).
pub fn value_is_valid(value: &[u8]) -> bool {
    value.iter().all(|byte| matches!(byte, b'\t' | b' '..=b'~' | 0x80..))
}

/// Whether a name is a token (RFC 9110 §5.6.2).
pub fn name_is_valid(name: &[u8]) -> bool {
    !name.is_empty()
        && name
            .iter()
            .all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte))
}

/// Fuzz entry: a `traceparent` that is accepted prints as one that reads the same.
pub fn fuzz_traceparent(text: &str) {
    if let Some(parsed) = TraceParent::parse(text) {
        let again = TraceParent::parse(&parsed.to_string());
        assert_eq!(
            again,
            Some(TraceParent {
                flags: parsed.flags & 1,
                ..parsed
            })
        );
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn traceparents_are_read_or_refused() {
        let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let cases = [
            (good.to_owned(), true),
            (good.replace("-01", "-00"), true),
            (good.replacen("00-", "01-", 1), true),
            (good.replacen("00-", "cc-", 1) + "-what-is-to-come", true),
            (good.replacen("00-", "cc-", 1) + "x", false),
            (good.to_owned() + "-more", false),
            (good.replacen("00-", "ff-", 1), false),
            (good.to_uppercase(), false),
            (good.replace("b7ad6b7169203331", "0000000000000000"), false),
            (good.replace("0af7651916cd43dd8448eb211c80319c", &"0".repeat(32)), false),
            (good.replace('-', "_"), false),
            (good[..54].to_owned(), false),
            // A dash and zeros of the right length, and a text whose boundaries are within characters.
            (format!("-{}", "0".repeat(54)), false),
            ("é".repeat(28), false),
            (String::new(), false),
        ];
        for (text, valid) in cases {
            assert_eq!(TraceParent::parse(&text).is_some(), valid, "{text}");
        }
        assert_eq!(TraceParent::parse(good).unwrap().to_string(), good);
        assert!(TraceParent::parse(&TraceParent::generate().to_string()).is_some());
    }

    #[test]
    fn request_ids_are_uuids() {
        assert_eq!(RequestId::from_bits(0).as_str(), "00000000-0000-4000-8000-000000000000");
        assert_eq!(
            RequestId::from_bits(u128::MAX).as_str(),
            "ffffffff-ffff-4fff-bfff-ffffffffffff"
        );
        assert_ne!(RequestId::generate(), RequestId::generate());
    }

    #[test]
    fn changes_are_applied_in_order() {
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let mut changes = HeaderChanges {
            set: vec![pair("a", "1")],
            add: vec![pair("b", "2"), pair("c", "3")],
            remove: vec!["d".to_owned()],
        };
        changes.extend(&HeaderChanges {
            set: vec![pair("b", "4")],
            add: vec![],
            remove: vec!["a".to_owned()],
        });
        assert_eq!(changes.written().collect::<Vec<_>>(), [("b", "4"), ("c", "3")]);
        for (name, dropped) in [("A", true), ("B", true), ("c", false), ("D", true)] {
            assert_eq!(changes.drops(name.as_bytes()), dropped, "{name}");
        }
    }

    proptest! {
        #[test]
        fn any_traceparent_is_survived(text in "\\PC{0,60}", near in "[0-9a-f-]{55}") {
            fuzz_traceparent(&text);
            fuzz_traceparent(&near);
        }
    }
}
