//! Heads written for the next hop: hop-by-hop fields dropped, the mesh's headers set, a route's changes applied, the
//! body's length said once and in one way.

use std::io::Write;

use http::StatusCode;

use super::{
    codec::{Framing, RequestHead, ResponseHead},
    field::{FieldKind, Span, classify},
};
use crate::{
    digits,
    l7::{
        Forward, HeaderChanges, Reply, Version,
        headers::{ClientCert, name_is_valid, value_is_valid},
    },
};

/// How the body is framed towards the source, and what becomes of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outgoing {
    /// The framing to announce.
    pub framing: Framing,
    /// The connection is kept.
    pub keep_alive: bool,
    /// What the source speaks.
    pub version: Version,
}

fn write_field(name: &[u8], value: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(name);
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

fn write_content_length(length: u64, out: &mut Vec<u8>) {
    out.extend_from_slice(b"content-length: ");
    digits::decimal(out, length);
    out.extend_from_slice(b"\r\n");
}

fn write_length(framing: Framing, out: &mut Vec<u8>) {
    match framing {
        Framing::Length(length) => write_content_length(length, out),
        Framing::Chunked => out.extend_from_slice(b"transfer-encoding: chunked\r\n"),
        Framing::None | Framing::UntilClose => {}
    }
}

/// Writes what a route sets and adds. What frames a message or belongs to one connection is no route's business, and
/// a value that would break out of its line is left out.
fn write_changes(changes: &HeaderChanges, out: &mut Vec<u8>) {
    for (name, value) in changes.written() {
        let ours = matches!(
            classify(name),
            FieldKind::Framing | FieldKind::HopByHop | FieldKind::Host
        );
        if !ours && name_is_valid(name.as_bytes()) && value_is_valid(value.as_bytes()) {
            write_field(name.as_bytes(), value.as_bytes(), out);
        }
    }
}

/// Writes a target, escaping what cannot stand in a request line. What came was checked; a rewritten one may not be.
fn write_target(target: &[u8], out: &mut Vec<u8>) {
    for byte in target {
        match byte {
            b'!'..=b'~' if *byte != b'#' => out.push(*byte),
            // A Vec takes every write.
            byte => drop(write!(out, "%{byte:02X}")),
        }
    }
}

/// Writes the head of a request for its target.
pub(super) fn write_request(head: &RequestHead, bytes: &[u8], forward: &Forward, out: &mut Vec<u8>) {
    out.reserve(head.bytes + 256);
    out.extend_from_slice(head.method.bytes(bytes));
    out.push(b' ');
    match &forward.target {
        Some(target) => write_target(target.as_bytes(), out),
        None => {
            let target = head.target.bytes(bytes);
            // An absolute target may have no path.
            if !matches!(target.first(), Some(b'/' | b'*')) {
                out.push(b'/');
            }
            out.extend_from_slice(target);
        }
    }
    out.extend_from_slice(b" HTTP/1.1\r\n");

    let changes = &forward.request_headers;
    let standard = &forward.standard;
    let host_set = changes
        .written()
        .find(|(name, _)| *name == "host")
        .map(|(_, value)| value.as_bytes());
    let host = forward
        .authority
        .as_deref()
        .map(str::as_bytes)
        .or(host_set)
        .filter(|host| value_is_valid(host));
    let came = || head.authority.map_or(&[][..], |authority| authority.bytes(bytes));
    write_field(b"host", host.unwrap_or_else(came), out);

    for field in &head.fields {
        let (name, value) = (field.name.bytes(bytes), field.value.bytes(bytes));
        let keep = match field.kind {
            FieldKind::Other => true,
            FieldKind::Framing
            | FieldKind::HopByHop
            | FieldKind::Host
            | FieldKind::Named
            | FieldKind::Undelivered
            | FieldKind::ClientCert => false,
            FieldKind::ForwardedFor => standard.forwarded_for.is_none(),
            FieldKind::RequestId => standard.request_id.is_none(),
            FieldKind::TraceParent => standard.trace.is_none(),
            FieldKind::TraceState => !standard.drop_trace_state,
        };
        if keep && !changes.drops(name) {
            write_field(name, value, out);
        }
    }
    write_standard(head, bytes, forward, out);
    write_changes(changes, out);
    write_length(head.framing, out);
    match (head.upgrade, head.te_trailers) {
        (Some(upgrade), _) => {
            out.extend_from_slice(b"connection: upgrade\r\n");
            write_field(b"upgrade", upgrade.bytes(bytes), out);
        }
        (None, true) => out.extend_from_slice(b"connection: te\r\nte: trailers\r\n"),
        (None, false) => {}
    }
    out.extend_from_slice(b"\r\n");
}

/// Writes the mesh's own headers.
fn write_standard(head: &RequestHead, bytes: &[u8], forward: &Forward, out: &mut Vec<u8>) {
    let standard = &forward.standard;
    let dropped = |name: &str| forward.request_headers.drops(name.as_bytes());
    if let Some(address) = standard.forwarded_for {
        out.extend_from_slice(b"x-forwarded-for: ");
        // Several fields are one list (RFC 9110 §5.3), and our hop is its end.
        let came = head.fields.iter().filter(|field| field.kind == FieldKind::ForwardedFor);
        for value in came
            .map(|field| field.value.bytes(bytes))
            .filter(|value| !value.is_empty())
        {
            out.extend_from_slice(value);
            out.extend_from_slice(b", ");
        }
        digits::ip(out, address);
        out.extend_from_slice(b"\r\n");
    }
    if let Some(id) = standard.request_id.filter(|_| !dropped("x-request-id")) {
        write_field(b"x-request-id", id.as_str().as_bytes(), out);
    }
    if let Some(trace) = standard.trace.filter(|_| !dropped("traceparent")) {
        write_field(b"traceparent", &trace.text(), out);
    }
    if let ClientCert::Set(value) = &standard.client_cert
        && value_is_valid(value.as_bytes())
    {
        write_field(b"x-forwarded-client-cert", value.as_bytes(), out);
    }
}

fn write_status(status: StatusCode, reason: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(b"HTTP/1.1 ");
    out.extend_from_slice(status.as_str().as_bytes());
    out.push(b' ');
    let known = status.canonical_reason().unwrap_or_default().as_bytes();
    out.extend_from_slice(if reason.is_empty() { known } else { reason });
    out.extend_from_slice(b"\r\n");
}

fn write_connection(outgoing: Outgoing, out: &mut Vec<u8>) {
    match (outgoing.keep_alive, outgoing.version) {
        (false, _) => out.extend_from_slice(b"connection: close\r\n"),
        (true, Version::Http10) => out.extend_from_slice(b"connection: keep-alive\r\n"),
        (true, _) => {}
    }
}

/// Writes the head of a final response for the source.
pub(super) fn write_response(
    head: &ResponseHead,
    bytes: &[u8],
    changes: &HeaderChanges,
    outgoing: Outgoing,
    out: &mut Vec<u8>,
) {
    out.reserve(head.bytes + 128);
    write_status(head.status, head.reason.bytes(bytes), out);
    for field in &head.fields {
        let name = field.name.bytes(bytes);
        let ours = matches!(
            field.kind,
            FieldKind::Framing | FieldKind::HopByHop | FieldKind::Named | FieldKind::Undelivered
        );
        if !ours && !changes.drops(name) {
            write_field(name, field.value.bytes(bytes), out);
        }
    }
    write_changes(changes, out);
    match head.length_without_body {
        Some(length) => write_content_length(length, out),
        None => write_length(outgoing.framing, out),
    }
    write_connection(outgoing, out);
    out.extend_from_slice(b"\r\n");
}

/// Writes an interim response (1xx) as it came; `upgrade` is the protocol that a 101 changes to.
pub(super) fn write_interim(head: &ResponseHead, bytes: &[u8], upgrade: Option<Span>, out: &mut Vec<u8>) {
    write_status(head.status, head.reason.bytes(bytes), out);
    for field in &head.fields {
        if !matches!(field.kind, FieldKind::Framing | FieldKind::HopByHop | FieldKind::Named) {
            write_field(field.name.bytes(bytes), field.value.bytes(bytes), out);
        }
    }
    if let Some(upgrade) = upgrade {
        out.extend_from_slice(b"connection: upgrade\r\n");
        write_field(b"upgrade", upgrade.bytes(bytes), out);
    }
    out.extend_from_slice(b"\r\n");
}

/// Writes an answer of the agent's own; `to_head` leaves the body out.
pub(super) fn write_reply(reply: &Reply, version: Version, keep_alive: bool, to_head: bool, out: &mut Vec<u8>) {
    write_status(reply.status, &[], out);
    for (name, value) in &reply.headers {
        if name_is_valid(name.as_bytes()) && value_is_valid(value.as_bytes()) {
            write_field(name.as_bytes(), value.as_bytes(), out);
        }
    }
    let bodiless = reply.status == StatusCode::NO_CONTENT || reply.status == StatusCode::NOT_MODIFIED;
    if !bodiless {
        if !reply.body.is_empty() && !reply.headers.iter().any(|(name, _)| *name == "content-type") {
            out.extend_from_slice(b"content-type: text/plain; charset=utf-8\r\n");
        }
        write_content_length(reply.body.len() as u64, out);
    }
    write_connection(
        Outgoing {
            framing: Framing::None,
            keep_alive,
            version,
        },
        out,
    );
    out.extend_from_slice(b"\r\n");
    if !bodiless && !to_head {
        out.extend_from_slice(reply.body.as_bytes());
    }
}
