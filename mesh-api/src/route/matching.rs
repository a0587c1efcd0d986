//! Matches of a route and the index that finds the first of them by precedence.
//!
//! Exact paths and prefixes are hashed, so that a service with a thousand routes costs a request a few lookups;
//! regexes are tried in order. A request can never make it do more: the lookups are bounded by the number of
//! distinct prefix lengths in the policy, not by the path.

use std::{borrow::Cow, cmp::Reverse, collections::HashMap, fmt, sync::Arc};

use super::{RouteAction, RouteAge, RouteRule};
use crate::{
    policy::{HeaderMatch, HttpRouteMatch, PathMatch, RegexPattern},
    request::Request,
};

/// The matches of all rules for one kind of source, by precedence.
#[derive(Clone, Default)]
pub(super) struct RuleSet {
    exact: HashMap<Arc<str>, Vec<Candidate>>,
    regex: Vec<(RegexPattern, Candidate)>,
    /// By prefix without its trailing slash: `/` is the empty text.
    prefix: HashMap<Arc<str>, Vec<Candidate>>,
    /// Distinct lengths of the prefixes, longest first.
    prefix_lengths: Vec<usize>,
}

/// A match without its path.
#[derive(Clone, Debug)]
struct Candidate {
    method: Option<String>,
    headers: Vec<HeaderMatch>,
    query: Vec<HeaderMatch>,
    order: Order,
    rule: Arc<RouteRule>,
}

/// What breaks the tie between matches whose paths rank the same; less is earlier.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Order {
    without_method: bool,
    headers: Reverse<usize>,
    query: Reverse<usize>,
    age: RouteAge,
    rule_index: usize,
    match_index: usize,
}

impl RuleSet {
    pub(super) fn new(entries: Vec<(RouteAge, usize, Vec<HttpRouteMatch>, RouteRule)>) -> RuleSet {
        let mut set = RuleSet::default();
        for (age, rule_index, matches, rule) in entries {
            let matches = if matches.is_empty() {
                vec![HttpRouteMatch::default()]
            } else {
                matches
            };
            for (match_index, one) in matches.into_iter().enumerate() {
                let order = Order {
                    without_method: one.method.is_none(),
                    headers: Reverse(one.headers.len()),
                    query: Reverse(one.query_params.len()),
                    age: age.clone(),
                    rule_index,
                    match_index,
                };
                set.insert(one, order, &rule);
            }
        }
        set.exact
            .values_mut()
            .for_each(|c| c.sort_by(|a, b| a.order.cmp(&b.order)));
        set.prefix
            .values_mut()
            .for_each(|c| c.sort_by(|a, b| a.order.cmp(&b.order)));
        set.regex.sort_by(|(regex_a, a), (regex_b, b)| {
            let longer_first = regex_b.as_str().len().cmp(&regex_a.as_str().len());
            longer_first.then_with(|| a.order.cmp(&b.order))
        });
        set.prefix_lengths = set.prefix.keys().map(|p| p.len()).collect();
        set.prefix_lengths.sort_unstable_by_key(|length| Reverse(*length));
        set.prefix_lengths.dedup();
        set
    }

    fn insert(&mut self, one: HttpRouteMatch, order: Order, rule: &RouteRule) {
        let mut rule = rule.clone();
        if let PathMatch::PathPrefix(prefix) = &one.path {
            let prefix: Arc<str> = prefix.as_str().into();
            rule.matched_prefix = prefix.clone();
            if let RouteAction::Redirect(redirect) = &mut rule.action {
                redirect.matched_prefix = prefix;
            }
        }
        let candidate = Candidate {
            method: one.method,
            headers: one.headers,
            query: one.query_params,
            order,
            rule: Arc::new(rule),
        };
        match one.path {
            PathMatch::Exact(path) => self.exact.entry(path.into()).or_default().push(candidate),
            PathMatch::PathPrefix(prefix) => {
                self.prefix
                    .entry(without_trailing_slash(&prefix).into())
                    .or_default()
                    .push(candidate);
            }
            PathMatch::RegularExpression(regex) => self.regex.push((regex, candidate)),
        }
    }

    pub(super) fn select(&self, request: &dyn Request) -> Option<&Arc<RouteRule>> {
        let path = request.path();
        let mut query = Query::of(request);
        if let Some(rule) = first_match(self.exact.get(path), request, &mut query) {
            return Some(rule);
        }
        for (regex, candidate) in &self.regex {
            if regex.matches(path) && candidate.matches(request, &mut query) {
                return Some(&candidate.rule);
            }
        }
        for &length in &self.prefix_lengths {
            let Some(prefix) = prefix_of(path, length) else {
                continue;
            };
            if let Some(rule) = first_match(self.prefix.get(prefix), request, &mut query) {
                return Some(rule);
            }
        }
        None
    }
}

/// The first `length` bytes of the path if they end where a path element does. The empty prefix takes every target,
/// also `*`.
fn prefix_of(path: &str, length: usize) -> Option<&str> {
    let at_border = length == 0 || matches!(path.as_bytes().get(length), None | Some(b'/'));
    if at_border { path.get(..length) } else { None }
}

pub(crate) fn without_trailing_slash(prefix: &str) -> &str {
    prefix.strip_suffix('/').unwrap_or(prefix)
}

fn first_match<'a>(
    candidates: Option<&'a Vec<Candidate>>,
    request: &dyn Request,
    query: &mut Query<'_>,
) -> Option<&'a Arc<RouteRule>> {
    let candidate = candidates?.iter().find(|c| c.matches(request, query))?;
    Some(&candidate.rule)
}

impl Candidate {
    fn matches(&self, request: &dyn Request, query: &mut Query<'_>) -> bool {
        self.method.as_deref().is_none_or(|method| method == request.method())
            && values_hold(&self.headers, &self.query, request, query)
    }
}

/// Whether the request has all of a match. The table's index and this always agree.
pub fn match_holds(wanted: &HttpRouteMatch, request: &dyn Request) -> bool {
    let mut query = Query::of(request);
    path_matches(&wanted.path, request.path())
        && wanted.method.as_deref().is_none_or(|method| method == request.method())
        && values_hold(&wanted.headers, &wanted.query_params, request, &mut query)
}

/// Whether the path has this form.
pub fn path_matches(wanted: &PathMatch, path: &str) -> bool {
    match wanted {
        PathMatch::Exact(wanted) => wanted == path,
        PathMatch::PathPrefix(prefix) => {
            let prefix = without_trailing_slash(prefix);
            prefix_of(path, prefix.len()).is_some_and(|start| start == prefix)
        }
        PathMatch::RegularExpression(pattern) => pattern.matches(path),
    }
}

fn values_hold(headers: &[HeaderMatch], params: &[HeaderMatch], request: &dyn Request, query: &mut Query<'_>) -> bool {
    headers.iter().all(|wanted| {
        request
            .header(&wanted.name)
            .is_some_and(|value| wanted.value.matches(value))
    }) && params.iter().all(|wanted| {
        query
            .first(&wanted.name)
            .is_some_and(|value| wanted.value.matches(value))
    })
}

/// A request's query, taken apart when a match first asks for it.
struct Query<'a> {
    text: &'a str,
    pairs: Option<Vec<(Cow<'a, str>, Cow<'a, str>)>>,
}

impl<'a> Query<'a> {
    fn of(request: &'a dyn Request) -> Query<'a> {
        Query {
            text: request.query().unwrap_or_default(),
            pairs: None,
        }
    }

    /// The first value of that name; a parameter without `=` has the empty value.
    fn first(&mut self, name: &str) -> Option<&str> {
        let text = self.text;
        let pairs = self.pairs.get_or_insert_with(|| {
            text.split('&')
                .filter(|pair| !pair.is_empty())
                .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
                .map(|(name, value)| (decode_form(name), decode_form(value)))
                .collect()
        });
        pairs.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_ref())
    }
}

/// Percent-decoding of a query's name or value, `+` being a space. What is no valid escape stays as it is.
fn decode_form(text: &str) -> Cow<'_, str> {
    if !text.bytes().any(|b| b == b'%' || b == b'+') {
        return Cow::Borrowed(text);
    }
    let spaced: Vec<u8> = text.bytes().map(|b| if b == b'+' { b' ' } else { b }).collect();
    Cow::Owned(String::from_utf8_lossy(&percent_decode(&spaced)).into_owned())
}

/// Replaces each `%XX` by its byte. What is no valid escape stays as it is.
pub(crate) fn percent_decode(text: &[u8]) -> Vec<u8> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, tail @ ..] = rest {
        let escaped = match (first, tail) {
            (b'%', [high, low, tail @ ..]) => hex_value(*high).zip(hex_value(*low)).map(|(h, l)| (h << 4 | l, tail)),
            _ => None,
        };
        let (byte, tail) = escaped.unwrap_or((*first, tail));
        decoded.push(byte);
        rest = tail;
    }
    decoded
}

fn hex_value(digit: u8) -> Option<u8> {
    char::from(digit)
        .to_digit(16)
        .and_then(|value| u8::try_from(value).ok())
}

impl fmt::Debug for RuleSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ids = |c: &[Candidate]| c.iter().map(|c| c.rule.id.to_string()).collect::<Vec<_>>();
        f.debug_struct("RuleSet")
            .field(
                "exact",
                &self.exact.iter().map(|(p, c)| (p, ids(c))).collect::<Vec<_>>(),
            )
            .field(
                "regex",
                &self
                    .regex
                    .iter()
                    .map(|(r, c)| (r.as_str(), &c.rule.id))
                    .collect::<Vec<_>>(),
            )
            .field(
                "prefix",
                &self.prefix.iter().map(|(p, c)| (p, ids(c))).collect::<Vec<_>>(),
            )
            .finish()
    }
}
