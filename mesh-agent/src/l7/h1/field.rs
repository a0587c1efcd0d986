//! The fields of an HTTP/1 head: ranges of its bytes, what each is to an agent, and what those say that frame a message.

use crate::l7::{UNDELIVERED_HEADER, Version};

/// A range of bytes in a head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    pub(super) start: u16,
    pub(super) end: u16,
}

/// What a field is to an agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FieldKind {
    /// Nothing special: forwarded.
    Other,
    /// `content-length`, `transfer-encoding`: written anew.
    Framing,
    /// `connection`, `keep-alive`, `proxy-connection`, `te`, `upgrade`, `http2-settings`: for one connection only.
    HopByHop,
    /// `host`: written anew.
    Host,
    /// `x-forwarded-for`
    ForwardedFor,
    /// `x-request-id`
    RequestId,
    /// `traceparent`
    TraceParent,
    /// `tracestate`
    TraceState,
    /// `x-forwarded-client-cert`
    ClientCert,
    /// `x-nodemesh-undelivered`: between agents only.
    Undelivered,
    /// A field that `Connection` names: for one connection only.
    Named,
}

/// One header field.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Its name, as sent.
    pub name: Span,
    /// Its value, without surrounding white space.
    pub value: Span,
    /// What it is.
    pub kind: FieldKind,
}

impl Span {
    pub(super) fn of(part: &[u8], whole: &[u8]) -> Span {
        // `part` is a slice of `whole`, which is no longer than HEAD_BYTES_MAX; anything else becomes empty.
        let start = (part.as_ptr() as usize).wrapping_sub(whole.as_ptr() as usize);
        match (u16::try_from(start), u16::try_from(start.wrapping_add(part.len()))) {
            (Ok(start), Ok(end)) if usize::from(end) <= whole.len() => Span { start, end },
            _ => Span::default(),
        }
    }

    /// The bytes.
    pub fn bytes<'a>(&self, head: &'a [u8]) -> &'a [u8] {
        head.get(usize::from(self.start)..usize::from(self.end))
            .unwrap_or_default()
    }

    /// The text, or nothing if it is not UTF-8.
    pub fn text<'a>(&self, head: &'a [u8]) -> &'a str {
        std::str::from_utf8(self.bytes(head)).unwrap_or_default()
    }
}

/// What a field of this name is.
pub fn classify(name: &str) -> FieldKind {
    use FieldKind::*;
    let table: &[(&str, FieldKind)] = match name.len() {
        2 => &[("te", HopByHop)],
        4 => &[("host", Host)],
        7 => &[("upgrade", HopByHop)],
        10 => &[
            ("connection", HopByHop),
            ("keep-alive", HopByHop),
            ("tracestate", TraceState),
        ],
        11 => &[("traceparent", TraceParent)],
        12 => &[("x-request-id", RequestId)],
        14 => &[("content-length", Framing), ("http2-settings", HopByHop)],
        15 => &[("x-forwarded-for", ForwardedFor)],
        16 => &[("proxy-connection", HopByHop)],
        17 => &[("transfer-encoding", Framing)],
        22 => &[(UNDELIVERED_HEADER, Undelivered)],
        23 => &[("x-forwarded-client-cert", ClientCert)],
        _ => return Other,
    };
    table
        .iter()
        .find(|(known, _)| name.eq_ignore_ascii_case(known))
        .map_or(Other, |(_, kind)| *kind)
}

/// What the fields that frame a message say.
#[derive(Default)]
pub(super) struct Scan {
    pub lengths: u32,
    pub length: Option<u64>,
    pub codings: u32,
    pub coding: Coding,
    close: bool,
    keep_alive: bool,
    connection_upgrade: bool,
    pub te_trailers: bool,
    upgrade: Option<Span>,
    pub expect_continue: bool,
    pub grpc: bool,
    pub hosts: u32,
    pub host: Option<Span>,
    /// `Connection` names fields beyond those that are hop-by-hop anyway.
    names: bool,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Coding {
    #[default]
    None,
    Chunked,
    /// Other codings, `chunked` not among them.
    Others,
    /// Other codings, and `chunked` last.
    OthersThenChunked,
    /// `chunked` is not last, or there twice.
    Broken,
}

/// The comma-separated members of a field's value; empty ones are skipped.
fn members(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value
        .split(|byte| *byte == b',')
        .map(<[u8]>::trim_ascii)
        .filter(|member| !member.is_empty())
}

fn parse_length(value: &[u8]) -> Option<u64> {
    // 18 digits cannot overflow, and no body is longer.
    if value.is_empty() || value.len() > 18 || !value.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(value).ok()?.parse().ok()
}

impl Scan {
    fn field(&mut self, name: &str, value: &[u8], span: Span) -> FieldKind {
        let kind = classify(name);
        match kind {
            FieldKind::Framing if name.len() == 14 => {
                self.lengths += 1;
                self.length = parse_length(value);
            }
            FieldKind::Framing => {
                self.codings += 1;
                for coding in members(value) {
                    let chunked = coding.eq_ignore_ascii_case(b"chunked");
                    self.coding = match (self.coding, chunked) {
                        (Coding::None, true) => Coding::Chunked,
                        (Coding::Others, true) => Coding::OthersThenChunked,
                        (Coding::None | Coding::Others, false) => Coding::Others,
                        _ => Coding::Broken,
                    };
                }
            }
            FieldKind::HopByHop => match name.len() {
                10 if name.eq_ignore_ascii_case("connection") => self.connection(value),
                2 => self.te_trailers |= members(value).any(|m| m.eq_ignore_ascii_case(b"trailers")),
                7 => self.upgrade = Some(span),
                _ => {}
            },
            FieldKind::Host => {
                self.hosts += 1;
                self.host = Some(span);
            }
            FieldKind::Other => match name.len() {
                6 if name.eq_ignore_ascii_case("expect") => {
                    self.expect_continue |= value.eq_ignore_ascii_case(b"100-continue");
                }
                12 if name.eq_ignore_ascii_case("content-type") => self.grpc |= is_grpc(value),
                _ => {}
            },
            _ => {}
        }
        kind
    }

    fn connection(&mut self, value: &[u8]) {
        for member in members(value) {
            if member.eq_ignore_ascii_case(b"close") {
                self.close = true;
            } else if member.eq_ignore_ascii_case(b"keep-alive") {
                self.keep_alive = true;
            } else if member.eq_ignore_ascii_case(b"upgrade") {
                self.connection_upgrade = true;
            } else if !member.eq_ignore_ascii_case(b"te") {
                self.names = true;
            }
        }
    }

    pub fn keeps_alive(&self, version: Version) -> bool {
        !self.close && (version == Version::Http11 || self.keep_alive)
    }

    /// The upgrade asked for. `h2c` is not passed on: it would put a protocol behind us that nobody looked at.
    pub fn upgrade(&self, version: Version, head: &[u8]) -> Option<Span> {
        let upgrade = self
            .upgrade
            .filter(|_| self.connection_upgrade && version == Version::Http11)?;
        let h2 = members(upgrade.bytes(head))
            .any(|m| m.len() >= 2 && m.get(..2).is_some_and(|m| m.eq_ignore_ascii_case(b"h2")));
        (!h2).then_some(upgrade)
    }
}

/// Whether a content type is gRPC's (`application/grpc`, `application/grpc+proto`, not `application/grpc-web`).
pub fn is_grpc(value: &[u8]) -> bool {
    let prefix = b"application/grpc";
    value
        .get(..prefix.len())
        .is_some_and(|start| start.eq_ignore_ascii_case(prefix))
        && matches!(value.get(prefix.len()), None | Some(b'+' | b';' | b' '))
}

/// Marks the fields that `Connection` names. Those with a meaning of their own are not at its disposal: a source must
/// not be able to take `host`, or what the mesh adds, out of a request.
fn mark_named(fields: &mut [Field], head: &[u8]) {
    let connections: smallvec::SmallVec<[Span; 2]> = fields
        .iter()
        .filter(|f| f.kind == FieldKind::HopByHop && f.name.bytes(head).eq_ignore_ascii_case(b"connection"))
        .map(|f| f.value)
        .collect();
    for field in fields.iter_mut().filter(|f| f.kind == FieldKind::Other) {
        let name = field.name.bytes(head);
        if connections
            .iter()
            .any(|c| members(c.bytes(head)).any(|m| m.eq_ignore_ascii_case(name)))
        {
            field.kind = FieldKind::Named;
        }
    }
}

/// Checks that every line of a complete head ends in CR LF: `httparse` would take a bare LF.
pub(super) fn lines_are_strict(head: &[u8], names: &[httparse::Header<'_>]) -> bool {
    head.ends_with(b"\r\n\r\n")
        && names.iter().all(|field| {
            let start = usize::from(Span::of(field.name.as_bytes(), head).start);
            head.get(..start).is_some_and(|before| before.ends_with(b"\r\n"))
        })
}

/// Turns `httparse`'s fields into ranges.
pub(super) fn collect(head: &[u8], parsed: &[httparse::Header<'_>]) -> (Vec<Field>, Scan) {
    let mut scan = Scan::default();
    let mut fields: Vec<Field> = parsed
        .iter()
        .map(|field| {
            let value = Span::of(field.value, head);
            let kind = scan.field(field.name, field.value, value);
            Field {
                name: Span::of(field.name.as_bytes(), head),
                value,
                kind,
            }
        })
        .collect();
    if scan.names {
        mark_named(&mut fields, head);
    }
    (fields, scan)
}
