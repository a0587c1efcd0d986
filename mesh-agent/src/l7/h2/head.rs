//! HTTP/2 heads: what decisions see of one, what is refused, and what is changed before it is sent on.

use std::io::Write;

use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request as HttpRequest, StatusCode, Uri, header, request::Parts,
};
use mesh_api::request::Request;

use crate::l7::{
    Fault, Forward, GrpcStatus, HeaderChanges, Reply,
    h1::{
        RequestDefect,
        field::{FieldKind, classify},
    },
    headers::ClientCert,
};

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const TRACE_PARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACE_STATE: HeaderName = HeaderName::from_static("tracestate");
const CLIENT_CERT: HeaderName = HeaderName::from_static("x-forwarded-client-cert");
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// A request's head as decisions see it.
pub(super) struct View<'a>(pub &'a Parts);

impl Request for View<'_> {
    fn method(&self) -> &str {
        self.0.method.as_str()
    }

    fn path(&self) -> &str {
        match self.0.uri.path() {
            "" => "/",
            path => path,
        }
    }

    fn query(&self) -> Option<&str> {
        self.0.uri.query()
    }

    fn authority(&self) -> Option<&str> {
        authority(self.0)
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.0
            .headers
            .get_all(name)
            .iter()
            .find_map(|value| std::str::from_utf8(value.as_bytes()).ok())
    }

    fn each_header_value(&self, name: &str, tell: &mut dyn FnMut(&str)) {
        self.0
            .headers
            .get_all(name)
            .iter()
            .for_each(|value| tell(&String::from_utf8_lossy(value.as_bytes())));
    }
}

fn authority(parts: &Parts) -> Option<&str> {
    let host = || parts.headers.get(header::HOST).and_then(|host| host.to_str().ok());
    parts.uri.authority().map(|authority| authority.as_str()).or_else(host)
}

/// Checks what `h2` leaves to its users. It has refused malformed fields, connection headers and bad lengths itself.
pub(super) fn check(parts: &Parts, headers_max: usize) -> Result<(), RequestDefect> {
    if parts.method == Method::CONNECT {
        return Err(RequestDefect::Connect);
    }
    if parts.headers.len() > headers_max {
        return Err(RequestDefect::HeadTooLarge);
    }
    // One authority, and the same everywhere (RFC 9113 §8.3.1).
    let mut hosts = parts.headers.get_all(header::HOST).iter();
    let (host, second) = (hosts.next(), hosts.next());
    let named = parts.uri.authority().map(|authority| authority.as_str().as_bytes());
    let same = match (named, host) {
        (Some(named), Some(host)) => named.eq_ignore_ascii_case(host.as_bytes()),
        (named, host) => named.is_some() || host.is_some(),
    };
    let text = authority(parts).unwrap_or_default();
    if second.is_some() || !same || text.is_empty() || text.contains(['@', '/', ',', ' ']) {
        return Err(RequestDefect::Host);
    }
    match parts.uri.path() {
        "*" if parts.method == Method::OPTIONS => Ok(()),
        path if path.starts_with('/') => Ok(()),
        _ => Err(RequestDefect::Malformed),
    }
}

/// Whether the content type is gRPC's.
pub(super) fn is_grpc(headers: &HeaderMap) -> bool {
    headers
        .get(header::CONTENT_TYPE)
        .is_some_and(|value| crate::l7::h1::field::is_grpc(value.as_bytes()))
}

/// The request to send on.
pub(super) fn outgoing(parts: &Parts, forward: &Forward) -> Result<HttpRequest<()>, Fault> {
    let malformed = |_| Fault::Request(RequestDefect::Malformed);
    let target = match &forward.target {
        Some(target) => target.as_str(),
        None => parts.uri.path_and_query().map_or("/", |target| target.as_str()),
    };
    let host_set = forward
        .request_headers
        .written()
        .find(|(name, _)| *name == "host")
        .map(|(_, value)| value);
    let authority = forward
        .authority
        .as_deref()
        .or(host_set)
        .or_else(|| authority(parts))
        .unwrap_or_default();
    let uri = Uri::builder()
        .scheme(parts.uri.scheme_str().unwrap_or("http"))
        .authority(authority)
        .path_and_query(target)
        .build()
        .map_err(malformed)?;
    let mut request = HttpRequest::new(());
    *request.method_mut() = parts.method.clone();
    *request.uri_mut() = uri;
    *request.version_mut() = http::Version::HTTP_2;
    let headers = request.headers_mut();
    headers.reserve(parts.headers.len() + 4);
    headers.extend(parts.headers.iter().map(|(name, value)| (name.clone(), value.clone())));
    headers.remove(header::HOST);
    headers.remove(CLIENT_CERT);
    set_standard(headers, forward);
    apply(headers, &forward.request_headers);
    if let ClientCert::Set(value) = &forward.standard.client_cert
        && let Ok(value) = HeaderValue::from_str(value)
    {
        headers.insert(CLIENT_CERT, value);
    }
    Ok(request)
}

fn set_standard(headers: &mut HeaderMap, forward: &Forward) {
    let standard = &forward.standard;
    if let Some(address) = standard.forwarded_for {
        let mut list = Vec::new();
        for value in headers.get_all(FORWARDED_FOR).iter().filter(|value| !value.is_empty()) {
            list.extend_from_slice(value.as_bytes());
            list.extend_from_slice(b", ");
        }
        // A Vec takes every write.
        let _ = write!(list, "{address}");
        if let Ok(list) = HeaderValue::from_bytes(&list) {
            headers.insert(FORWARDED_FOR, list);
        }
    }
    if let Some(id) = standard.request_id
        && let Ok(id) = HeaderValue::from_str(id.as_str())
    {
        headers.insert(REQUEST_ID, id);
    }
    if let Some(trace) = standard.trace
        && let Ok(trace) = HeaderValue::from_str(&trace.to_string())
    {
        headers.insert(TRACE_PARENT, trace);
    }
    if standard.drop_trace_state {
        headers.remove(TRACE_STATE);
    }
}

/// Applies a route's changes. What frames a message or belongs to one connection is no route's business.
pub(super) fn apply(headers: &mut HeaderMap, changes: &HeaderChanges) {
    if changes.is_empty() {
        return;
    }
    let name = |name: &str| match classify(name) {
        FieldKind::Framing | FieldKind::HopByHop | FieldKind::Host => None,
        _ => HeaderName::from_bytes(name.as_bytes()).ok(),
    };
    for removed in changes.remove.iter().chain(changes.set.iter().map(|(set, _)| set)) {
        if let Some(removed) = name(removed) {
            headers.remove(removed);
        }
    }
    for (written, value) in changes.written() {
        if let (Some(written), Ok(value)) = (name(written), HeaderValue::from_str(value)) {
            headers.append(written, value);
        }
    }
}

/// `grpc-status` of a response's headers or trailers.
pub(super) fn grpc_status(headers: &HeaderMap) -> Option<u32> {
    headers.get(GRPC_STATUS)?.to_str().ok()?.parse().ok()
}

/// The fields that tell a gRPC source how its call ended.
pub(super) fn grpc_trailers(status: GrpcStatus, message: &str) -> HeaderMap {
    // Percent-encoded (gRPC over HTTP/2, Responses): everything but printable ASCII, and the percent sign.
    let mut encoded = String::new();
    for byte in message.trim_end().bytes() {
        match byte {
            b'%' | ..=0x1f | 0x7f.. => encoded.push_str(&format!("%{byte:02X}")),
            byte => encoded.push(byte as char),
        }
    }
    let mut trailers = HeaderMap::with_capacity(2);
    trailers.insert(GRPC_STATUS, HeaderValue::from(status.code()));
    if let Ok(message) = HeaderValue::from_str(&encoded)
        && !message.is_empty()
    {
        trailers.insert(GRPC_MESSAGE, message);
    }
    trailers
}

/// An answer of the agent's own, in the way that the source understands; with its body.
pub(super) fn answer(reply: &Reply, grpc: bool, to_head: bool) -> (http::Response<()>, Bytes) {
    let mut response = http::Response::new(());
    *response.version_mut() = http::Version::HTTP_2;
    for (name, value) in &reply.headers {
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name.as_bytes()), HeaderValue::from_str(value)) {
            response.headers_mut().append(name, value);
        }
    }
    if grpc {
        // "Trailers-Only": the status of the call stands in the only head, and HTTP's is 200.
        response
            .headers_mut()
            .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        response.headers_mut().extend(grpc_trailers(reply.grpc, &reply.body));
        return (response, Bytes::new());
    }
    *response.status_mut() = reply.status;
    let bodiless = reply.status == StatusCode::NO_CONTENT || reply.status == StatusCode::NOT_MODIFIED;
    let body = if bodiless {
        Bytes::new()
    } else {
        Bytes::from(reply.body.clone().into_owned())
    };
    if !bodiless {
        response
            .headers_mut()
            .insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
    }
    if !body.is_empty() {
        let text = HeaderValue::from_static("text/plain; charset=utf-8");
        response.headers_mut().entry(header::CONTENT_TYPE).or_insert(text);
    }
    (response, if to_head { Bytes::new() } else { body })
}
