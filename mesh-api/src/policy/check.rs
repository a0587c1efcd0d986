//! Readers of the words that policies are made of: names, headers, methods, paths, hosts, networks, durations.
//! Crate-private, and shared with the readers of Kubernetes' own kinds.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;

use super::{Duration, HeaderMatch, HostMatch, IdentityMatch, PathMatch, RegexPattern, StringMatch};
use crate::{
    identity::{SpiffeId, TrustDomain},
    read::{Decode, Field, quoted},
};

/// The longest DNS name (RFC 1123).
const DNS_NAME_BYTES_MAX: usize = 253;
/// The longest label of a DNS name.
const DNS_LABEL_BYTES_MAX: usize = 63;
/// The most labels or annotations of one object, and of one selector.
pub(crate) const LABELS_MAX: usize = 256;
/// The longest path in a match, as the Gateway API has it.
const PATH_BYTES_MAX: usize = 1024;
/// The longest header name, as the Gateway API has it.
const HEADER_NAME_BYTES_MAX: usize = 256;
/// The longest header or query value, as the Gateway API has it.
const VALUE_BYTES_MAX: usize = 4096;
/// The longest method.
const METHOD_BYTES_MAX: usize = 32;
/// Headers that frame a message or belong to one connection: a rule cannot change them.
const FRAMING_HEADERS: [&str; 9] = [
    "connection",
    "content-length",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "http2-settings",
];
/// The header by which the mesh tells a workload who asks.
const IDENTITY_HEADER: &str = "x-forwarded-client-cert";

fn is_dns_label(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    !text.is_empty()
        && text.len() <= DNS_LABEL_BYTES_MAX
        && text.bytes().all(|b| inner(b) || b == b'-')
        && text.bytes().next().is_some_and(inner)
        && text.bytes().last().is_some_and(inner)
}

fn is_dns_name(text: &str) -> bool {
    text.len() <= DNS_NAME_BYTES_MAX && text.split('.').all(is_dns_label)
}

/// The name of a namespace, service or container.
pub(crate) fn dns_label(field: &Field) -> Option<String> {
    let text = field.word()?;
    if is_dns_label(text) {
        return Some(text.to_owned());
    }
    field.refuse(
        format!("{} is not a DNS label", quoted(text)),
        "at most 63 lower-case letters, digits and '-', with a letter or digit at both ends",
    );
    None
}

/// The name of most objects.
pub(crate) fn dns_name(field: &Field) -> Option<String> {
    let text = field.word()?;
    if is_dns_name(text) {
        return Some(text.to_owned());
    }
    field.refuse(
        format!("{} is not a DNS name", quoted(text)),
        "lower-case letters, digits, '-' and '.', with a letter or digit at both ends",
    );
    None
}

/// The name of a rule or limit: it becomes part of rule ids in logs and metrics.
pub(crate) fn rule_name(field: &Field) -> Option<String> {
    dns_name(field)
}

/// A hostname without wildcard.
pub(crate) fn hostname(field: &Field) -> Option<String> {
    let text = field.word()?;
    if is_dns_name(text) && text.parse::<IpAddr>().is_err() {
        return Some(text.to_owned());
    }
    field.refuse(
        format!("{} is not a hostname", quoted(text)),
        "a DNS name in lower case, no address and no port",
    );
    None
}

/// A hostname, or `*.` and a hostname.
pub(crate) fn host_match(field: &Field) -> Option<HostMatch> {
    let text = field.word()?;
    let (wild, name) = match text.strip_prefix("*.") {
        Some(name) => (true, name),
        None => (false, text),
    };
    let lower = name.to_ascii_lowercase();
    let good = is_dns_name(&lower) || (!wild && name.parse::<IpAddr>().is_ok());
    if !good {
        field.refuse(
            format!("{} is not a host", quoted(text)),
            "a DNS name, or *. and a DNS name, without a port",
        );
        return None;
    }
    Some(if wild {
        HostMatch::Suffix(format!(".{lower}"))
    } else {
        HostMatch::Exact(lower)
    })
}

fn is_label_word(text: &str) -> bool {
    let end = |b: u8| b.is_ascii_alphanumeric();
    text.len() <= DNS_LABEL_BYTES_MAX
        && text.bytes().all(|b| end(b) || b"-_.".contains(&b))
        && text.bytes().next().is_some_and(end)
        && text.bytes().last().is_some_and(end)
}

/// Labels: checked as Kubernetes checks them.
pub(crate) fn labels(field: &Field) -> Option<BTreeMap<String, String>> {
    let entries = field.entries()?;
    if entries.len() > LABELS_MAX {
        field.refuse(format!("has {} labels", entries.len()), format!("at most {LABELS_MAX}"));
        return None;
    }
    let read = |(key, value): &(&str, Field)| {
        let (prefix, name) = key.rsplit_once('/').unwrap_or(("", key));
        let good_key = is_label_word(name) && (!key.contains('/') || is_dns_name(prefix));
        if !good_key {
            let expected = "letters, digits, '-', '_' and '.', at most 63, after an optional DNS name and '/'";
            value.refuse(format!("{} is not a label's key", quoted(key)), expected);
        }
        let text = value.text()?;
        if !text.is_empty() && !is_label_word(text) {
            let expected = "at most 63 letters, digits, '-', '_' and '.', with a letter or digit at both ends";
            value.refuse(format!("{} is not a label's value", quoted(text)), expected);
            return None;
        }
        good_key.then(|| ((*key).to_owned(), text.to_owned()))
    };
    let pairs: Vec<Option<(String, String)>> = entries.iter().map(read).collect();
    pairs.into_iter().collect()
}

/// Labels, at least one.
pub(crate) fn some_labels(field: &Field) -> Option<BTreeMap<String, String>> {
    let labels = labels(field)?;
    if labels.is_empty() {
        field.refuse("is empty", "at least one label");
        return None;
    }
    Some(labels)
}

fn is_token(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
}

/// A header's name, in lower case.
pub(crate) fn header_name(field: &Field) -> Option<String> {
    let text = field.word()?;
    if is_token(text) && text.len() <= HEADER_NAME_BYTES_MAX {
        return Some(text.to_ascii_lowercase());
    }
    field.refuse(
        format!("{} is not a header name", quoted(text)),
        "an HTTP token, such as x-user",
    );
    None
}

/// The name of a header that a rule may change.
pub(crate) fn changed_header_name(field: &Field) -> Option<String> {
    let name = header_name(field)?;
    if FRAMING_HEADERS.contains(&name.as_str()) {
        field.refuse(
            format!("{name} frames the message, a rule cannot change it"),
            "another header",
        );
        return None;
    }
    if name == "host" {
        field.refuse("host is not changed as a header", "a URLRewrite filter with hostname");
        return None;
    }
    if name == IDENTITY_HEADER {
        field.refuse(format!("{name} is the mesh's own: it says who asks"), "another header");
        return None;
    }
    Some(name)
}

/// A header's value: visible ASCII, with blanks inside.
pub(crate) fn header_value(field: &Field) -> Option<String> {
    let text = field.word()?;
    let visible = text.bytes().all(|b| (0x20..0x7f).contains(&b) || b == b'\t');
    if visible && text.len() <= VALUE_BYTES_MAX && text.trim() == text {
        return Some(text.to_owned());
    }
    let expected = format!("at most {VALUE_BYTES_MAX} printable ASCII characters, no blanks at the ends");
    field.refuse(format!("{} is not a header value", quoted(text)), expected);
    None
}

/// A method as it is sent.
pub(crate) fn method(field: &Field) -> Option<String> {
    let text = field.word()?;
    let upper = !text.bytes().any(|b| b.is_ascii_lowercase());
    if is_token(text) && upper && text.len() <= METHOD_BYTES_MAX {
        return Some(text.to_owned());
    }
    field.refuse(
        format!("{} is not a method", quoted(text)),
        "a method in upper case, such as GET",
    );
    None
}

/// A path that begins with a slash and has no way around it, as the Gateway API has it.
pub(crate) fn absolute_path(field: &Field) -> Option<String> {
    let text = field.text()?;
    if !text.starts_with('/') {
        field.refuse(format!("{} does not start with '/'", quoted(text)), "an absolute path");
        return None;
    }
    if text.len() > PATH_BYTES_MAX {
        field.refuse(format!("has {} bytes", text.len()), format!("at most {PATH_BYTES_MAX}"));
        return None;
    }
    let lower = text.to_ascii_lowercase();
    let bad = ["//", "/./", "/../", "%2f", "#", "?"]
        .into_iter()
        .find(|part| lower.contains(part));
    let bad = bad.or_else(|| ["/..", "/."].into_iter().find(|end| text.ends_with(end)));
    if let Some(bad) = bad {
        let expected = "a plain path: no empty or dot elements, no escaped slash, no query, no fragment";
        field.refuse(format!("{} contains {bad:?}", quoted(text)), expected);
        return None;
    }
    if !text.bytes().all(|b| b.is_ascii_graphic()) {
        field.refuse(
            format!("{} has a character that no path has", quoted(text)),
            "percent-encoded ASCII",
        );
        return None;
    }
    Some(text.to_owned())
}

/// The text of a new path: empty, or absolute.
pub(crate) fn replacement_path(field: &Field) -> Option<String> {
    if field.text()?.is_empty() {
        Some(String::new())
    } else {
        absolute_path(field)
    }
}

/// A regular expression.
pub(crate) fn regex(field: &Field) -> Option<RegexPattern> {
    let text = field.word()?;
    match RegexPattern::new(text) {
        Ok(pattern) => Some(pattern),
        Err(error) => {
            field.refuse(
                format!("{} {error}", quoted(text)),
                "a regular expression in RE2's syntax",
            );
            None
        }
    }
}

impl Decode for PathMatch {
    fn decode(field: &Field) -> Option<PathMatch> {
        #[derive(Clone, Copy)]
        enum Type {
            Exact,
            Prefix,
            Regex,
        }
        let mut fields = field.fields()?;
        let types = [
            ("Exact", Type::Exact),
            ("PathPrefix", Type::Prefix),
            ("RegularExpression", Type::Regex),
        ];
        let kind = fields.read("type", |f| f.choice(&types, &[]));
        let path = match kind {
            Some(Some(Type::Exact)) => fields
                .need("value", "a path")
                .and_then(|f| absolute_path(&f))
                .map(PathMatch::Exact),
            Some(Some(Type::Regex)) => fields
                .need("value", "a regular expression")
                .and_then(|f| regex(&f))
                .map(PathMatch::RegularExpression),
            Some(Some(Type::Prefix) | None) => match fields.get("value") {
                None => Some(PathMatch::PathPrefix("/".to_owned())),
                Some(value) => absolute_path(&value).map(|path| {
                    let trimmed = path.strip_suffix('/').filter(|p| !p.is_empty()).unwrap_or(&path);
                    PathMatch::PathPrefix(trimmed.to_owned())
                }),
            },
            None => {
                fields.get("value");
                None
            }
        };
        fields.finish();
        path
    }
}

/// A named value; the name is read by `name`.
fn named_match(
    field: &Field,
    name: fn(&Field) -> Option<String>,
    value: fn(&Field) -> Option<String>,
) -> Option<HeaderMatch> {
    let mut fields = field.fields()?;
    let name = fields.need("name", "a name").and_then(|f| name(&f));
    let is_regex = fields.read("type", |f| {
        f.choice(&[("Exact", false), ("RegularExpression", true)], &[])
    });
    let text = fields.need("value", "a string");
    fields.finish();
    let value = match is_regex?.unwrap_or(false) {
        false => StringMatch::Exact(value(&text?)?),
        true => StringMatch::RegularExpression(regex(&text?)?),
    };
    Some(HeaderMatch { name: name?, value })
}

/// A header match.
pub(crate) fn header_match(field: &Field) -> Option<HeaderMatch> {
    named_match(field, header_name, header_value)
}

/// A match of a query parameter: its name and value are any text.
pub(crate) fn query_match(field: &Field) -> Option<HeaderMatch> {
    let text = |field: &Field| {
        let text = field.word()?;
        if text.len() > VALUE_BYTES_MAX {
            field.refuse(
                format!("has {} bytes", text.len()),
                format!("at most {VALUE_BYTES_MAX}"),
            );
            return None;
        }
        Some(text.to_owned())
    };
    named_match(field, text, text)
}

/// Reports a name that two items have.
pub(crate) fn unique<'n>(items: &[Field], names: impl IntoIterator<Item = Option<&'n str>>, what: &str) {
    let mut seen = BTreeSet::new();
    for (item, name) in items.iter().zip(names) {
        if let Some(name) = name
            && !seen.insert(name)
        {
            item.refuse(
                format!("{what} {} is there twice", quoted(name)),
                format!("each {what} once"),
            );
        }
    }
}

impl Decode for Duration {
    fn decode(field: &Field) -> Option<Duration> {
        field.parse("a duration such as 1h10m30s500ms")
    }
}

/// A duration of more than zero.
pub(crate) fn some_time(field: &Field) -> Option<Duration> {
    let duration = Duration::decode(field)?;
    if duration.is_zero() {
        field.refuse("is zero", "a duration of more than zero");
        return None;
    }
    Some(duration)
}

/// An IP network, or one address as a network of its own. Host bits are refused: they are a typing error.
pub(crate) fn network(field: &Field) -> Option<IpNet> {
    let text = field.word()?;
    let parsed = text
        .parse::<IpNet>()
        .ok()
        .or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from));
    match parsed {
        Some(network) if network.trunc() == network => Some(network),
        Some(network) => {
            field.refuse(
                format!("{} has bits outside of its prefix", quoted(text)),
                network.trunc().to_string(),
            );
            None
        }
        None => {
            field.refuse(
                format!("{} is not a network", quoted(text)),
                "a CIDR such as 10.0.0.0/8, or an address",
            );
            None
        }
    }
}

/// An identity, or a prefix of identities that ends with `/*`.
pub(crate) fn identity_match(field: &Field) -> Option<IdentityMatch> {
    const EXPECTED: &str =
        "spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>, or a part of it that ends with /*";
    let text = field.word()?;
    let Some(prefix) = text.strip_suffix('*') else {
        return match text.parse::<SpiffeId>() {
            Ok(identity) => Some(IdentityMatch::Exact(identity)),
            Err(_) => {
                field.refuse(format!("{} is not an identity", quoted(text)), EXPECTED);
                None
            }
        };
    };
    let domain = prefix.strip_prefix("spiffe://").and_then(|rest| rest.split_once('/'));
    let good = prefix.ends_with('/')
        && domain.is_some_and(|(domain, path)| {
            let plain = path.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._/".contains(&b));
            plain && !path.contains("//") && TrustDomain::new(domain).is_ok()
        });
    if !good {
        field.refuse(format!("{} is not a prefix of identities", quoted(text)), EXPECTED);
        return None;
    }
    Some(IdentityMatch::Prefix(prefix.to_owned()))
}

/// A share of 100.
pub(crate) fn percent(least: u32) -> impl Fn(&Field) -> Option<u32> {
    move |field| field.integer(least..=100)
}
