//! Reads and validates an HTTPRoute's spec, by the Gateway API's own rules and bounds.
//!
//! What the Gateway API defines and the mesh does not do yet is refused: a mirror that is not sent or a filter that is
//! not run would be silent surprises.

use super::{
    BackendKind, BackendRef, BackendTarget, Cors, Duration, Fraction, GATEWAY_GROUP, GROUP, HeaderModifier,
    HeaderValue, HttpRoute, HttpRouteFilter, HttpRouteMatch, HttpRouteRetry, HttpRouteRule, HttpRouteTimeouts,
    OriginMatch, ParentRef, PathMatch, PathModifier, RequestMirror, RequestRedirect, UrlRewrite, check,
    http_route::origin_port,
    traffic::{ATTEMPTS_MAX, RETRY_STATUS},
};
use crate::read::{Decode, Field, Fields, deserialize_by_decoding, port, quoted};

/// The most parents, hostnames, rules, matches of a rule, matches of a route, filters and backends: as the Gateway API has them.
const PARENTS_MAX: usize = 32;
pub(super) const HOSTNAMES_MAX: usize = 16;
pub(super) const RULES_MAX: usize = 16;
pub(super) const MATCHES_MAX: usize = 64;
pub(super) const MATCHES_OF_ROUTE_MAX: usize = 128;
const FILTERS_MAX: usize = 16;
pub(super) const BACKENDS_MAX: usize = 16;
const HEADERS_MAX: usize = 16;
/// The most origins, and the most headers of each list, of a CORS filter; its most methods.
const CORS_VALUES_MAX: usize = 64;
const CORS_METHODS_MAX: usize = 9;
/// How many seconds an answer to a preflight holds where the filter does not say, as the Gateway API has it.
const CORS_MAX_AGE_DEFAULT: u32 = 5;
const RETRY_CODES_MAX: usize = 32;
const WEIGHT_MAX: u32 = 1_000_000;

/// What is said of filters that the Gateway API calls incompatible.
pub(crate) const INCOMPATIBLE_FILTERS: &str = "has both a RequestRedirect and a URLRewrite";

impl Decode for HttpRoute {
    fn decode(field: &Field) -> Option<HttpRoute> {
        let mut fields = field.fields()?;
        fields.later(&["useDefaultGateways"]);
        let parent_refs = fields
            .need("parentRefs", "at least one parent")
            .and_then(|f| parents(&f));
        let hostnames = fields.list("hostnames", HOSTNAMES_MAX, |f| f.word().map(str::to_owned));
        let rules = fields.need("rules", "at least one rule").and_then(|f| rules(&f));
        fields.finish();
        Some(HttpRoute {
            parent_refs: parent_refs?,
            hostnames: hostnames?,
            rules: rules?,
        })
    }
}

deserialize_by_decoding!(HttpRoute);

pub(super) fn parents(field: &Field) -> Option<Vec<ParentRef>> {
    let parents = field.list(PARENTS_MAX, ParentRef::decode)?;
    if parents.is_empty() {
        field.refuse("is empty", "at least one parent");
        return None;
    }
    Some(parents)
}

impl Decode for ParentRef {
    fn decode(field: &Field) -> Option<ParentRef> {
        let mut fields = field.fields()?;
        let group = fields.read("group", Field::text);
        let kind = fields.read("kind", Field::word);
        let namespace = fields.read("namespace", check::dns_label);
        let name = fields
            .need("name", "the name of a Service")
            .and_then(|f| check::dns_name(&f));
        let section_name = fields.read("sectionName", check::dns_name);
        let port = fields.read("port", port);
        fields.finish();
        let kind = kind?.unwrap_or("Gateway");
        // The Gateway API's default group is that of Gateway. A Service is of no other group than the core one, so its
        // group may be left out.
        let group = match (group?, kind) {
            (None | Some("" | "core"), "Service") => "",
            (None, _) => GATEWAY_GROUP,
            (Some(group), _) => group,
        };
        Some(ParentRef {
            group: group.to_owned(),
            kind: kind.to_owned(),
            namespace: namespace?,
            name: name?,
            section_name: section_name?,
            port: port?,
        })
    }
}

fn rules(field: &Field) -> Option<Vec<HttpRouteRule>> {
    let items = field.items(RULES_MAX)?;
    if items.is_empty() {
        field.refuse("is empty", "at least one rule");
        return None;
    }
    let rules: Vec<Option<HttpRouteRule>> = items.iter().map(HttpRouteRule::decode).collect();
    check::unique(
        &items,
        rules.iter().map(|r| r.as_ref().and_then(|r| r.name.as_deref())),
        "name",
    );
    let rules: Vec<HttpRouteRule> = rules.into_iter().collect::<Option<_>>()?;
    let matches: usize = rules.iter().map(|rule| rule.matches.len()).sum();
    if matches > MATCHES_OF_ROUTE_MAX {
        field.refuse(
            format!("has {matches} matches in all"),
            format!("at most {MATCHES_OF_ROUTE_MAX}"),
        );
        return None;
    }
    Some(rules)
}

impl Decode for HttpRouteRule {
    fn decode(field: &Field) -> Option<HttpRouteRule> {
        let mut fields = field.fields()?;
        fields.later(&["sessionPersistence"]);
        let name = fields.read("name", check::rule_name);
        let matches = fields.list("matches", MATCHES_MAX, HttpRouteMatch::decode);
        let filters = fields.read("filters", |f| filters(f, Place::Rule));
        let backend_refs = fields.list("backendRefs", BACKENDS_MAX, BackendRef::decode);
        let timeouts = fields.read("timeouts", HttpRouteTimeouts::decode);
        let retry = fields.read("retry", HttpRouteRetry::decode);
        fields.finish();
        let rule = HttpRouteRule {
            name: name?,
            matches: matches?,
            filters: filters?.unwrap_or_default(),
            backend_refs: backend_refs?,
            timeouts: timeouts?.unwrap_or_default(),
            retry: retry?,
        };
        check_rule(field, &rule).then_some(rule)
    }
}

/// What the parts of a rule say of each other.
fn check_rule(field: &Field, rule: &HttpRouteRule) -> bool {
    let mut good = true;
    let mut refuse = |message: &str, expected: &str| {
        field.refuse(message, expected);
        good = false;
    };
    let redirects = rule
        .filters
        .iter()
        .any(|f| matches!(f, HttpRouteFilter::RequestRedirect(_)));
    let rewrites = rule.filters.iter().any(|f| matches!(f, HttpRouteFilter::UrlRewrite(_)));
    if redirects && !rule.backend_refs.is_empty() {
        refuse("has both a RequestRedirect and backendRefs", "one of them");
    }
    if redirects && rewrites {
        refuse(INCOMPATIBLE_FILTERS, "one of them");
    }
    let replaces_prefix = rule.filters.iter().any(|filter| {
        let path = match filter {
            HttpRouteFilter::RequestRedirect(redirect) => redirect.path.as_ref(),
            HttpRouteFilter::UrlRewrite(rewrite) => rewrite.path.as_ref(),
            HttpRouteFilter::RequestHeaderModifier(_)
            | HttpRouteFilter::ResponseHeaderModifier(_)
            | HttpRouteFilter::RequestMirror(_)
            | HttpRouteFilter::Cors(_) => None,
        };
        matches!(path, Some(PathModifier::ReplacePrefixMatch(_)))
    });
    let one_prefix = match rule.matches.as_slice() {
        [] => true,
        [only] => matches!(only.path, PathMatch::PathPrefix(_)),
        _ => false,
    };
    if replaces_prefix && !one_prefix {
        refuse(
            "ReplacePrefixMatch has no single prefix to replace",
            "exactly one match, with a path of type PathPrefix",
        );
    }
    good
}

impl Decode for HttpRouteMatch {
    fn decode(field: &Field) -> Option<HttpRouteMatch> {
        let mut fields = field.fields()?;
        let path = fields.read("path", PathMatch::decode);
        let headers = fields.read("headers", |f| named(f, check::header_match));
        let query_params = fields.read("queryParams", |f| named(f, check::query_match));
        let method = fields.read("method", |f| {
            f.choice(
                &[
                    "GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH",
                ]
                .map(|m| (m, m)),
                &[],
            )
        });
        fields.finish();
        Some(HttpRouteMatch {
            path: path?.unwrap_or_else(|| PathMatch::PathPrefix("/".to_owned())),
            headers: headers?.unwrap_or_default(),
            query_params: query_params?.unwrap_or_default(),
            method: method?.map(str::to_owned),
        })
    }
}

/// Matches by name, each name once: of two, the Gateway API would look at the first only.
pub(super) fn named(field: &Field, read: fn(&Field) -> Option<super::HeaderMatch>) -> Option<Vec<super::HeaderMatch>> {
    let items = field.items(HEADERS_MAX)?;
    let matches: Vec<Option<super::HeaderMatch>> = items.iter().map(read).collect();
    check::unique(
        &items,
        matches.iter().map(|m| m.as_ref().map(|m| m.name.as_str())),
        "name",
    );
    matches.into_iter().collect()
}

/// Where a filter stands.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Place {
    /// In a rule of an HTTPRoute.
    Rule,
    /// In a rule of a GRPCRoute.
    GrpcRule,
    /// In a backend of either.
    Backend,
}

/// The words of a filter's type, and the field that belongs to each.
#[derive(Clone, Copy)]
enum FilterType {
    RequestHeaders,
    ResponseHeaders,
    Redirect,
    Rewrite,
    Mirror,
    Cors,
}

const FILTERS_LATER: [&str; 2] = ["ExtensionRef", "ExternalAuth"];

pub(super) fn filters(field: &Field, place: Place) -> Option<Vec<HttpRouteFilter>> {
    let items = field.items(FILTERS_MAX)?;
    let filters: Vec<Option<HttpRouteFilter>> = items.iter().map(|item| filter(item, place)).collect();
    let once = |filter: &Option<HttpRouteFilter>| match filter {
        // Copies may go to several places.
        Some(HttpRouteFilter::RequestMirror(_)) | None => None,
        Some(filter) => Some(filter.type_name()),
    };
    check::unique(&items, filters.iter().map(once), "filter");
    filters.into_iter().collect()
}

fn filter(field: &Field, place: Place) -> Option<HttpRouteFilter> {
    let mut types = vec![
        ("RequestHeaderModifier", FilterType::RequestHeaders),
        ("ResponseHeaderModifier", FilterType::ResponseHeaders),
    ];
    let mut later = FILTERS_LATER.to_vec();
    match place {
        Place::Rule => types.extend([
            ("RequestRedirect", FilterType::Redirect),
            ("URLRewrite", FilterType::Rewrite),
            ("RequestMirror", FilterType::Mirror),
            ("CORS", FilterType::Cors),
        ]),
        Place::GrpcRule => types.push(("RequestMirror", FilterType::Mirror)),
        Place::Backend => later.extend(["RequestRedirect", "URLRewrite", "RequestMirror", "CORS"]),
    }
    let mut fields = field.fields()?;
    let kind = fields
        .need("type", "a type of filter")
        .and_then(|f| f.choice(&types, &later));
    let Some(kind) = kind else {
        // The body belongs to a type that has been refused: one problem is enough.
        return None;
    };
    let filter = match kind {
        FilterType::RequestHeaders => fields
            .need("requestHeaderModifier", "set, add or remove")
            .and_then(|f| HeaderModifier::decode(&f))
            .map(HttpRouteFilter::RequestHeaderModifier),
        FilterType::ResponseHeaders => fields
            .need("responseHeaderModifier", "set, add or remove")
            .and_then(|f| HeaderModifier::decode(&f))
            .map(HttpRouteFilter::ResponseHeaderModifier),
        FilterType::Redirect => fields
            .need("requestRedirect", "what the redirect changes")
            .and_then(|f| RequestRedirect::decode(&f))
            .map(HttpRouteFilter::RequestRedirect),
        FilterType::Rewrite => fields
            .need("urlRewrite", "hostname, path or both")
            .and_then(|f| UrlRewrite::decode(&f))
            .map(HttpRouteFilter::UrlRewrite),
        FilterType::Mirror => fields
            .need("requestMirror", "where the copies go")
            .and_then(|f| RequestMirror::decode(&f))
            .map(HttpRouteFilter::RequestMirror),
        FilterType::Cors => fields
            .need("cors", "which origins may do what")
            .and_then(|f| Cors::decode(&f))
            .map(HttpRouteFilter::Cors),
    };
    fields.finish();
    filter
}

impl Decode for RequestMirror {
    fn decode(field: &Field) -> Option<RequestMirror> {
        let mut fields = field.fields()?;
        let backend_ref = fields
            .need("backendRef", "where the copies go")
            .and_then(|f| BackendTarget::decode(&f));
        let percent = fields.read("percent", |f| f.integer(0u32..=100));
        let fraction = fields.read("fraction", Fraction::decode);
        fields.finish();
        let fraction = match (percent?, fraction?) {
            (Some(_), Some(_)) => {
                field.refuse("has both percent and fraction", "one of them");
                return None;
            }
            (Some(numerator), None) => Fraction {
                numerator,
                denominator: 100,
            },
            (None, Some(fraction)) => fraction,
            (None, None) => Fraction {
                numerator: 100,
                denominator: 100,
            },
        };
        Some(RequestMirror {
            backend_ref: backend_ref?,
            fraction,
        })
    }
}

impl Decode for Fraction {
    fn decode(field: &Field) -> Option<Fraction> {
        let mut fields = field.fields()?;
        let most = i32::MAX.unsigned_abs();
        let numerator = fields
            .need("numerator", "a whole number")
            .and_then(|f| f.integer(0..=most));
        let denominator = fields.read("denominator", |f| f.integer(1..=most));
        fields.finish();
        let fraction = Fraction {
            numerator: numerator?,
            denominator: denominator?.unwrap_or(100),
        };
        if fraction.numerator > fraction.denominator {
            field.refuse("is more than everything", "a numerator of at most the denominator");
            return None;
        }
        Some(fraction)
    }
}

impl Decode for Cors {
    fn decode(field: &Field) -> Option<Cors> {
        let mut fields = field.fields()?;
        let allow_origins = fields.list("allowOrigins", CORS_VALUES_MAX, OriginMatch::decode);
        let allow_credentials = fields.read("allowCredentials", Field::boolean);
        let allow_methods = fields.list("allowMethods", CORS_METHODS_MAX, or_star(check::method));
        let allow_headers = fields.list("allowHeaders", CORS_VALUES_MAX, or_star(check::header_name));
        let expose_headers = fields.list("exposeHeaders", CORS_VALUES_MAX, or_star(check::header_name));
        let max_age = fields.read("maxAge", |f| f.integer(1..=i32::MAX.unsigned_abs()));
        fields.finish();
        let cors = Cors {
            allow_origins: allow_origins?,
            allow_credentials: allow_credentials?.unwrap_or_default(),
            allow_methods: allow_methods?,
            allow_headers: allow_headers?,
            expose_headers: expose_headers?,
            max_age: max_age?.unwrap_or(CORS_MAX_AGE_DEFAULT),
        };
        let star = |list: &[String]| list.len() > 1 && list.iter().any(|word| word == "*");
        let lists = [&cors.allow_methods, &cors.allow_headers, &cors.expose_headers];
        if lists.into_iter().any(|list| star(list))
            || (cors.allow_origins.len() > 1 && cors.allow_origins.contains(&OriginMatch::Any))
        {
            field.refuse("has \"*\" beside other values", "\"*\" alone, or the values without it");
            return None;
        }
        Some(cors)
    }
}

/// A word that may be the one that stands for all.
fn or_star(read: fn(&Field) -> Option<String>) -> impl Fn(&Field<'_>) -> Option<String> {
    move |field| match field.text()? {
        "*" => Some("*".to_owned()),
        _ => read(field),
    }
}

impl Decode for OriginMatch {
    fn decode(field: &Field) -> Option<OriginMatch> {
        const EXPECTED: &str =
            "\"*\", or http:// or https:// with a host and perhaps a port; the host may begin with a *";
        let text = field.word()?.to_ascii_lowercase();
        if text == "*" {
            return Some(OriginMatch::Any);
        }
        let parsed = (|| {
            let (scheme, authority) = text.split_once("://")?;
            let (host, port) = match authority.rsplit_once(':') {
                Some((host, digits)) => (host, digits.parse().ok().filter(|port: &u16| *port > 0)?),
                None => (authority, origin_port(scheme)?),
            };
            origin_port(scheme)?;
            let (wildcard, host) = match host.strip_prefix('*') {
                Some(rest) => (true, rest),
                None => (false, host),
            };
            let plain = host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b));
            (plain && (wildcard || !host.is_empty())).then(|| OriginMatch::Origin {
                scheme: scheme.to_owned(),
                wildcard,
                host: host.to_owned(),
                port,
            })
        })();
        if parsed.is_none() {
            field.refuse(format!("{} is not an origin", quoted(&text)), EXPECTED);
        }
        parsed
    }
}

impl Decode for HeaderModifier {
    fn decode(field: &Field) -> Option<HeaderModifier> {
        let mut fields = field.fields()?;
        let set = fields.read("set", header_values);
        let add = fields.read("add", header_values);
        let remove = fields.list("remove", HEADERS_MAX, check::changed_header_name);
        fields.finish();
        let change = HeaderModifier {
            set: set?.unwrap_or_default(),
            add: add?.unwrap_or_default(),
            remove: remove?,
        };
        if change == HeaderModifier::default() {
            field.refuse("changes nothing", "set, add or remove");
            return None;
        }
        Some(change)
    }
}

fn header_values(field: &Field) -> Option<Vec<HeaderValue>> {
    let items = field.items(HEADERS_MAX)?;
    let values: Vec<Option<HeaderValue>> = items.iter().map(header).collect();
    check::unique(
        &items,
        values.iter().map(|v| v.as_ref().map(|v| v.name.as_str())),
        "header",
    );
    values.into_iter().collect()
}

fn header(field: &Field) -> Option<HeaderValue> {
    let mut fields = field.fields()?;
    let name = fields
        .need("name", "a header name")
        .and_then(|f| check::changed_header_name(&f));
    let value = fields.need("value", "a string").and_then(|f| check::header_value(&f));
    fields.finish();
    Some(HeaderValue {
        name: name?,
        value: value?,
    })
}

impl Decode for RequestRedirect {
    fn decode(field: &Field) -> Option<RequestRedirect> {
        let mut fields = field.fields()?;
        let scheme = fields.read("scheme", |f| f.choice(&[("http", "http"), ("https", "https")], &[]));
        let hostname = fields.read("hostname", check::hostname);
        let path = fields.read("path", PathModifier::decode);
        let port = fields.read("port", port);
        let status_code = fields.read("statusCode", status_of_redirect);
        fields.finish();
        Some(RequestRedirect {
            scheme: scheme?.map(str::to_owned),
            hostname: hostname?,
            path: path?,
            port: port?,
            status_code: status_code?.unwrap_or(302),
        })
    }
}

fn status_of_redirect(field: &Field) -> Option<u16> {
    let status: u16 = field.integer(300..=399)?;
    if ![301, 302, 303, 307, 308].contains(&status) {
        field.refuse(format!("{status} is no redirect"), "301, 302, 303, 307 or 308");
        return None;
    }
    Some(status)
}

impl Decode for UrlRewrite {
    fn decode(field: &Field) -> Option<UrlRewrite> {
        let mut fields = field.fields()?;
        let hostname = fields.read("hostname", check::hostname);
        let path = fields.read("path", PathModifier::decode);
        fields.finish();
        let rewrite = UrlRewrite {
            hostname: hostname?,
            path: path?,
        };
        if rewrite == UrlRewrite::default() {
            field.refuse("changes nothing", "hostname, path or both");
            return None;
        }
        Some(rewrite)
    }
}

impl Decode for PathModifier {
    fn decode(field: &Field) -> Option<PathModifier> {
        let mut fields = field.fields()?;
        let full = fields
            .need("type", "ReplaceFullPath or ReplacePrefixMatch")
            .and_then(|f| f.choice(&[("ReplaceFullPath", true), ("ReplacePrefixMatch", false)], &[]));
        let modifier = match full {
            Some(true) => fields
                .need("replaceFullPath", "the new path")
                .and_then(|f| check::replacement_path(&f))
                .map(PathModifier::ReplaceFullPath),
            Some(false) => fields
                .need("replacePrefixMatch", "the new prefix")
                .and_then(|f| check::replacement_path(&f))
                .map(PathModifier::ReplacePrefixMatch),
            None => return None,
        };
        fields.finish();
        modifier
    }
}

impl Decode for BackendTarget {
    fn decode(field: &Field) -> Option<BackendTarget> {
        let mut fields = field.fields()?;
        let target = backend_target(&mut fields);
        fields.finish();
        target
    }
}

fn backend_target(fields: &mut Fields) -> Option<BackendTarget> {
    let kind = backend_kind(fields);
    let name = fields
        .need("name", "the name of a Service or ServiceSubset")
        .and_then(|f| check::dns_name(&f));
    let own = fields.whole().namespace().map(str::to_owned);
    let namespace = fields.read("namespace", check::dns_label);
    let port = match &kind {
        Some(BackendKind::Other { .. }) => fields.read("port", port).map(Option::unwrap_or_default),
        _ => fields.need("port", "the service's port").and_then(|f| port(&f)),
    };
    Some(BackendTarget {
        kind: kind?,
        // Written out or not, the route's own namespace means the same.
        namespace: namespace?.filter(|namespace| own.as_ref() != Some(namespace)),
        name: name?,
        port: port?,
    })
}

impl Decode for BackendRef {
    fn decode(field: &Field) -> Option<BackendRef> {
        backend_ref(field, true)
    }
}

/// A backend of a rule; that of a TCPRoute or TLSRoute has no filters.
pub(super) fn backend_ref(field: &Field, takes_filters: bool) -> Option<BackendRef> {
    let mut fields = field.fields()?;
    let target = backend_target(&mut fields);
    let weight = fields.read("weight", |f| f.integer(0..=WEIGHT_MAX));
    let filters = if takes_filters {
        fields.read("filters", |f| filters(f, Place::Backend))
    } else {
        Some(None)
    };
    fields.finish();
    Some(BackendRef {
        target: target?,
        weight: weight?.unwrap_or(1),
        filters: filters?.unwrap_or_default(),
    })
}

/// A kind that the mesh does not know is read all the same: the status says so, and only this share is refused.
fn backend_kind(fields: &mut Fields) -> Option<BackendKind> {
    let kind = fields.read("kind", Field::word)?.unwrap_or("Service");
    let group = fields.get("group");
    let text = match &group {
        Some(field) => field.text()?,
        None => "",
    };
    match (kind, text) {
        ("Service", "" | "core") => Some(BackendKind::Service),
        ("ServiceSubset", GROUP) => Some(BackendKind::ServiceSubset),
        // Ours, and written so that it would be somebody else's.
        ("ServiceSubset", _) => {
            let field = group.as_ref().unwrap_or(fields.whole());
            let message = if group.is_some() {
                format!("{} is not the kind's group", quoted(text))
            } else {
                "names no group".to_owned()
            };
            field.refuse(message, GROUP);
            None
        }
        _ => Some(BackendKind::Other {
            group: text.to_owned(),
            kind: kind.to_owned(),
        }),
    }
}

impl Decode for HttpRouteTimeouts {
    fn decode(field: &Field) -> Option<HttpRouteTimeouts> {
        let mut fields = field.fields()?;
        let request = fields.read("request", Duration::decode);
        let backend_request = fields.read("backendRequest", Duration::decode);
        fields.finish();
        let timeouts = HttpRouteTimeouts {
            request: request?,
            backend_request: backend_request?,
        };
        if let (Some(whole), Some(part)) = (timeouts.request, timeouts.backend_request)
            && !whole.is_zero()
            && part > whole
        {
            field.refuse(
                format!("backendRequest {part} is longer than request {whole}"),
                "at most the request's timeout",
            );
            return None;
        }
        Some(timeouts)
    }
}

impl Decode for HttpRouteRetry {
    fn decode(field: &Field) -> Option<HttpRouteRetry> {
        let mut fields = field.fields()?;
        let codes = fields.list("codes", RETRY_CODES_MAX, |f| f.integer(RETRY_STATUS));
        let attempts = fields.read("attempts", |f| f.integer(1..=ATTEMPTS_MAX));
        let backoff = fields.read("backoff", check::some_time);
        fields.finish();
        Some(HttpRouteRetry {
            codes: codes?,
            attempts: attempts?,
            backoff: backoff?,
        })
    }
}
