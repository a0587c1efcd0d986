//! Rewritten paths and the Location of a redirect.
//!
//! Both are made of a policy's text and a peer's path, so both are encoded on the way out: no control character, space
//! or byte outside ASCII ever gets into a request line or header from here.

use std::{borrow::Cow, fmt::Write as _};

use super::{PathModifier, RedirectSpec, Rewrite, matching::without_trailing_slash};
use crate::request::{Request, host_of};

/// The path, without the query, that the destination gets.
pub fn rewrite_path<'a>(rewrite: &'a Rewrite, matched_prefix: &str, path: &'a str) -> Cow<'a, str> {
    match &rewrite.path {
        Some(modifier) => modify(modifier, matched_prefix, path),
        None => Cow::Borrowed(path),
    }
}

/// The Location of a redirect: `port` and `scheme` are those that the request came with. The query stays.
pub fn redirect_location(spec: &RedirectSpec, request: &dyn Request, port: u16, scheme: &str) -> String {
    let host = spec
        .hostname
        .as_deref()
        .unwrap_or_else(|| host_of(request.authority().unwrap_or_default()));
    let location_scheme = spec.scheme.as_deref().unwrap_or(scheme);
    let well_known = well_known_port(location_scheme);
    let location_port = spec
        .port
        .or(if spec.scheme.is_some() { well_known } else { Some(port) });
    let mut location = String::with_capacity(64);
    encode(&mut location, location_scheme);
    location.push_str("://");
    encode(&mut location, host);
    if let Some(port) = location_port
        && location_port != well_known
    {
        let _ = write!(location, ":{port}");
    }
    let path = match &spec.path {
        Some(modifier) => modify(modifier, &spec.matched_prefix, request.path()),
        None => Cow::Borrowed(request.path()),
    };
    if !path.starts_with('/') {
        location.push('/');
    }
    encode(&mut location, &path);
    if let Some(query) = request.query() {
        location.push('?');
        encode(&mut location, query);
    }
    location
}

fn modify<'a>(modifier: &'a PathModifier, matched_prefix: &str, path: &'a str) -> Cow<'a, str> {
    match modifier {
        PathModifier::ReplaceFullPath(full) => encoded(Cow::Borrowed(full)),
        PathModifier::ReplacePrefixMatch(replacement) => {
            let rest = path
                .strip_prefix(without_trailing_slash(matched_prefix))
                .unwrap_or(path);
            let replacement = without_trailing_slash(replacement);
            // The rest is empty or starts with a slash: a prefix ends where a path element does.
            let joined = match (replacement, rest) {
                ("", "") => Cow::Borrowed("/"),
                ("", rest) => Cow::Borrowed(rest),
                (replacement, "") => Cow::Borrowed(replacement),
                (replacement, rest) => Cow::Owned(format!("{replacement}{rest}")),
            };
            encoded(joined)
        }
    }
}

fn well_known_port(scheme: &str) -> Option<u16> {
    match scheme {
        "http" => Some(80),
        "https" => Some(443),
        _ => None,
    }
}

fn is_plain(byte: u8) -> bool {
    byte.is_ascii_graphic()
}

fn encoded(text: Cow<'_, str>) -> Cow<'_, str> {
    if text.bytes().all(is_plain) {
        return text;
    }
    let mut out = String::with_capacity(text.len().saturating_add(16));
    encode(&mut out, &text);
    Cow::Owned(out)
}

fn encode(out: &mut String, text: &str) {
    for byte in text.bytes() {
        if is_plain(byte) {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
}
