//! HTTP/1 heads, read strictly: pure and total.
//!
//! `httparse` finds the tokens; here they are judged. What two readers could understand differently — a second length,
//! a bare line feed, white space before a colon — is refused, since this agent is always followed by another reader.
//! A parsed head is a list of ranges into the bytes that it was read from, so that nothing is copied.

use http::StatusCode;
use mesh_api::request::Request;

use super::{
    RequestDefect, ResponseDefect,
    field::{Coding, Field, Span, collect, lines_are_strict},
};
use crate::l7::{Limits, Version};

/// The most fields of a head, whatever [`Limits`] say: ranges are parsed on the stack.
const FIELDS_MAX: usize = 128;
/// The most bytes of a head, whatever [`Limits`] say: ranges are 16 bits wide.
pub const HEAD_BYTES_MAX: usize = u16::MAX as usize;

/// How the end of a body is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// No body.
    None,
    /// So many bytes.
    Length(u64),
    /// Chunks.
    Chunked,
    /// Until the connection closes (responses only).
    UntilClose,
}

/// A request's head. All spans lie in the bytes that it was parsed from.
#[derive(Debug)]
pub struct RequestHead {
    /// The head's length with its empty line.
    pub bytes: usize,
    /// The method.
    pub method: Span,
    /// Path and query, in origin form; `*` for a server-wide OPTIONS.
    pub target: Span,
    /// The path.
    pub path: Span,
    /// The query, if there is a question mark.
    pub query: Option<Span>,
    /// The authority: of an absolute target, else `Host`.
    pub authority: Option<Span>,
    /// HTTP/1.0 or HTTP/1.1.
    pub version: Version,
    /// The fields, in their order.
    pub fields: Vec<Field>,
    /// How the body ends.
    pub framing: Framing,
    /// The source wants the connection kept.
    pub keep_alive: bool,
    /// The value of `Upgrade`, if the source asks for another protocol that we may pass on.
    pub upgrade: Option<Span>,
    /// `TE: trailers`
    pub te_trailers: bool,
    /// `Expect: 100-continue`
    pub expect_continue: bool,
    /// The content type is gRPC's.
    pub grpc: bool,
    /// The method is HEAD.
    pub is_head: bool,
}

/// A response's head.
#[derive(Debug)]
pub struct ResponseHead {
    /// The head's length with its empty line.
    pub bytes: usize,
    /// The status.
    pub status: StatusCode,
    /// The reason phrase.
    pub reason: Span,
    /// The fields, in their order.
    pub fields: Vec<Field>,
    /// How the body ends.
    pub framing: Framing,
    /// `Content-Length` of a response that has no body (to HEAD, or 304).
    pub length_without_body: Option<u64>,
    /// The target keeps the connection.
    pub keep_alive: bool,
    /// The value of `Upgrade`.
    pub upgrade: Option<Span>,
}

/// A head, or the wish for more bytes.
pub type Parsed<T, E> = Result<Option<T>, E>;

/// `host[:port]` without user information, as `Host` and an absolute target may have it.
fn authority_is_valid(authority: &[u8]) -> bool {
    let port_is_valid = |port: &[u8]| port.len() <= 5 && port.iter().all(u8::is_ascii_digit);
    if let Some(rest) = authority.strip_prefix(b"[") {
        let Some(end) = rest.iter().position(|byte| *byte == b']') else {
            return false;
        };
        let (address, rest) = (
            rest.get(..end).unwrap_or_default(),
            rest.get(end + 1..).unwrap_or_default(),
        );
        return address.iter().all(|b| b.is_ascii_hexdigit() || b":.".contains(b))
            && (rest.is_empty() || rest.strip_prefix(b":").is_some_and(port_is_valid));
    }
    let mut parts = authority.splitn(2, |byte| *byte == b':');
    let host = parts.next().unwrap_or_default();
    host.iter()
        .all(|b| b.is_ascii_alphanumeric() || b"-._~%!$&'()*+;=".contains(b))
        && parts.next().is_none_or(port_is_valid)
}

/// The request line's target in its three forms; the authority only of an absolute one.
fn parse_target<'a>(method: &str, target: &'a [u8]) -> Result<(&'a [u8], Option<&'a [u8]>), RequestDefect> {
    if !target.iter().all(|byte| matches!(byte, b'!'..=b'~')) || target.contains(&b'#') {
        return Err(RequestDefect::Malformed);
    }
    if method == "CONNECT" {
        return Err(RequestDefect::Connect);
    }
    if target.starts_with(b"/") || (target == b"*" && method == "OPTIONS") {
        return Ok((target, None));
    }
    let scheme = |scheme: &[u8]| {
        target
            .get(..scheme.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(scheme))
    };
    let skip = match (scheme(b"http://"), scheme(b"https://")) {
        (true, _) => 7,
        (_, true) => 8,
        _ => return Err(RequestDefect::Malformed),
    };
    let rest = target.get(skip..).unwrap_or_default();
    let end = rest.iter().position(|byte| b"/?".contains(byte)).unwrap_or(rest.len());
    let (authority, path) = (rest.get(..end).unwrap_or_default(), rest.get(end..).unwrap_or_default());
    if authority.is_empty() || !authority_is_valid(authority) {
        return Err(RequestDefect::Malformed);
    }
    Ok((path, Some(authority)))
}

fn too_large(bytes: &[u8], limits: &Limits) -> Result<(), RequestDefect> {
    let line = bytes
        .iter()
        .take(limits.request_line_bytes_max + 1)
        .position(|byte| *byte == b'\n');
    if line.is_none() && bytes.len() > limits.request_line_bytes_max {
        return Err(RequestDefect::LineTooLong);
    }
    if bytes.len() >= limits.head_bytes_max.min(HEAD_BYTES_MAX) {
        return Err(RequestDefect::HeadTooLarge);
    }
    Ok(())
}

/// Reads a request's head from the start of `bytes`; `Ok(None)` asks for more.
pub fn parse_request(bytes: &[u8], limits: &Limits) -> Parsed<RequestHead, RequestDefect> {
    let window = bytes.get(..limits.head_bytes_max.min(HEAD_BYTES_MAX)).unwrap_or(bytes);
    // The engine skips empty lines before a request; httparse would skip bare LFs too.
    if matches!(window.first(), Some(b'\r' | b'\n')) {
        return Err(RequestDefect::Malformed);
    }
    let mut storage = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let storage = storage
        .get_mut(..limits.headers_max.min(FIELDS_MAX))
        .unwrap_or_default();
    let mut request = httparse::Request::new(storage);
    let length = match request.parse(window) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return too_large(bytes, limits).map(|()| None),
        Err(httparse::Error::TooManyHeaders) => return Err(RequestDefect::HeadTooLarge),
        Err(httparse::Error::Version) if version_is_other(window) => return Err(RequestDefect::Version),
        Err(_) => return Err(RequestDefect::Malformed),
    };
    let head = window.get(..length).unwrap_or_default();
    let (Some(method), Some(target), Some(minor)) = (request.method, request.path, request.version) else {
        return Err(RequestDefect::Malformed);
    };
    if !lines_are_strict(head, request.headers) {
        return Err(RequestDefect::Malformed);
    }
    if head
        .iter()
        .position(|byte| *byte == b'\n')
        .is_some_and(|end| end > limits.request_line_bytes_max)
    {
        return Err(RequestDefect::LineTooLong);
    }
    let version = if minor == 0 { Version::Http10 } else { Version::Http11 };
    let (target, absolute) = parse_target(method, target.as_bytes())?;
    let (fields, scan) = collect(head, request.headers);
    let host_is_valid = scan.host.is_none_or(|host| authority_is_valid(host.bytes(head)));
    if scan.hosts > 1 || (scan.hosts == 0 && version == Version::Http11) || !host_is_valid {
        return Err(RequestDefect::Host);
    }
    let framing = match (scan.lengths, scan.codings, scan.coding) {
        (0, 0, _) => Framing::None,
        (1, 0, _) => Framing::Length(scan.length.ok_or(RequestDefect::Length)?),
        // HTTP/1.0 has no transfer codings (RFC 9112 §6.1): what it means by one is anybody's guess.
        (0, 1, Coding::Chunked) if version == Version::Http11 => Framing::Chunked,
        (0, 1, Coding::OthersThenChunked) if version == Version::Http11 => return Err(RequestDefect::Coding),
        _ => return Err(RequestDefect::Length),
    };
    let target = Span::of(target, head);
    let question = target
        .bytes(head)
        .iter()
        .position(|byte| *byte == b'?')
        .and_then(|at| u16::try_from(at).ok());
    let path_end = question.map_or(target.end, |at| target.start + at);
    Ok(Some(RequestHead {
        bytes: length,
        method: Span::of(method.as_bytes(), head),
        target,
        path: Span {
            start: target.start,
            end: path_end,
        },
        query: question.map(|at| Span {
            start: target.start + at + 1,
            end: target.end,
        }),
        authority: absolute.map(|authority| Span::of(authority, head)).or(scan.host),
        version,
        framing,
        keep_alive: scan.keeps_alive(version),
        upgrade: scan.upgrade(version, head),
        te_trailers: scan.te_trailers && version == Version::Http11,
        expect_continue: scan.expect_continue && version == Version::Http11,
        grpc: scan.grpc,
        is_head: method == "HEAD",
        fields,
    }))
}

/// Whether a request line names a version of HTTP that is not ours, rather than nonsense.
fn version_is_other(bytes: &[u8]) -> bool {
    let line = bytes
        .split(|byte| *byte == b'\r' || *byte == b'\n')
        .next()
        .unwrap_or_default();
    line.split(|byte| *byte == b' ').nth(2).is_some_and(|version| {
        let digit = |at: usize| version.get(at).is_some_and(u8::is_ascii_digit);
        version.starts_with(b"HTTP/") && digit(5) && (version.len() == 6 || version.get(6) == Some(&b'.') && digit(7))
    })
}

/// Reads a response's head from the start of `bytes`; `Ok(None)` asks for more. `to_head` says that the request was
/// HEAD.
pub fn parse_response(bytes: &[u8], to_head: bool, limits: &Limits) -> Parsed<ResponseHead, ResponseDefect> {
    let bound = limits.head_bytes_max.min(HEAD_BYTES_MAX);
    let window = bytes.get(..bound).unwrap_or(bytes);
    if matches!(window.first(), Some(b'\r' | b'\n')) {
        return Err(ResponseDefect::Malformed);
    }
    let mut storage = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let storage = storage
        .get_mut(..limits.headers_max.min(FIELDS_MAX))
        .unwrap_or_default();
    let mut response = httparse::Response::new(storage);
    let length = match response.parse(window) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) if bytes.len() >= bound => return Err(ResponseDefect::HeadTooLarge),
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(ResponseDefect::HeadTooLarge),
        Err(_) => return Err(ResponseDefect::Malformed),
    };
    let head = window.get(..length).unwrap_or_default();
    let status = response.code.and_then(|code| StatusCode::from_u16(code).ok());
    let (Some(status), Some(minor)) = (status, response.version) else {
        return Err(ResponseDefect::Malformed);
    };
    if !lines_are_strict(head, response.headers) {
        return Err(ResponseDefect::Malformed);
    }
    let version = if minor == 0 { Version::Http10 } else { Version::Http11 };
    let (fields, scan) = collect(head, response.headers);
    let bodiless =
        to_head || status.is_informational() || status == StatusCode::NO_CONTENT || status == StatusCode::NOT_MODIFIED;
    let framing = match (scan.lengths, scan.codings, scan.coding) {
        (0, 0, _) if bodiless => Framing::None,
        (0, 0, _) => Framing::UntilClose,
        (1, 0, _) => match scan.length.ok_or(ResponseDefect::Length)? {
            _ if bodiless => Framing::None,
            length => Framing::Length(length),
        },
        (0, 1, Coding::Chunked) if version == Version::Http11 && bodiless => Framing::None,
        (0, 1, Coding::Chunked) if version == Version::Http11 => Framing::Chunked,
        _ => return Err(ResponseDefect::Length),
    };
    let keeps_length = to_head || status == StatusCode::NOT_MODIFIED;
    Ok(Some(ResponseHead {
        bytes: length,
        status,
        reason: Span::of(response.reason.unwrap_or_default().as_bytes(), head),
        length_without_body: scan.length.filter(|_| bodiless && keeps_length),
        keep_alive: scan.keeps_alive(version) && framing != Framing::UntilClose,
        upgrade: scan.upgrade(version, head),
        framing,
        fields,
    }))
}

/// A request's head with its bytes: what decisions look at.
#[derive(Clone, Copy)]
pub struct RequestView<'a> {
    /// The parsed head.
    pub head: &'a RequestHead,
    /// The bytes that it was parsed from.
    pub bytes: &'a [u8],
}

impl Request for RequestView<'_> {
    fn method(&self) -> &str {
        self.head.method.text(self.bytes)
    }

    fn path(&self) -> &str {
        // An absolute target may have an empty path: it means the root (RFC 9110 §4.2.3).
        match self.head.path.text(self.bytes) {
            "" => "/",
            path => path,
        }
    }

    fn query(&self) -> Option<&str> {
        self.head.query.map(|query| query.text(self.bytes))
    }

    fn authority(&self) -> Option<&str> {
        self.head.authority.map(|authority| authority.text(self.bytes))
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.head
            .fields
            .iter()
            .filter(|field| field.name.bytes(self.bytes).eq_ignore_ascii_case(name.as_bytes()))
            .find_map(|field| std::str::from_utf8(field.value.bytes(self.bytes)).ok())
    }

    fn each_header_value(&self, name: &str, tell: &mut dyn FnMut(&str)) {
        self.head
            .fields
            .iter()
            .filter(|field| field.name.bytes(self.bytes).eq_ignore_ascii_case(name.as_bytes()))
            .for_each(|field| tell(&String::from_utf8_lossy(field.value.bytes(self.bytes))));
    }
}

/// Fuzz entry: parses `bytes` as a request's head and checks what must hold of any head that is let through.
pub fn fuzz_request(bytes: &[u8]) {
    let limits = Limits::default();
    if let Ok(Some(head)) = parse_request(bytes, &limits) {
        assert!(head.bytes <= limits.head_bytes_max && bytes[..head.bytes].ends_with(b"\r\n\r\n"));
        assert!(!bytes[..head.bytes].windows(2).any(|w| w[1] == b'\n' && w[0] != b'\r'));
        let view = RequestView { head: &head, bytes };
        assert!(view.path().starts_with('/') || view.path() == "*");
    }
}

/// Fuzz entry: the same for a response's head.
pub fn fuzz_response(bytes: &[u8]) {
    let limits = Limits::default();
    for to_head in [false, true] {
        if let Ok(Some(head)) = parse_response(bytes, to_head, &limits) {
            assert!(head.bytes <= limits.head_bytes_max && bytes[..head.bytes].ends_with(b"\r\n\r\n"));
            assert!(!to_head || head.framing == Framing::None);
        }
    }
}
