//! HTTPRoute of the Gateway API (v1), as far as a mesh uses it (GAMMA: a Service as parent).

use serde::{Serialize, Serializer, ser::SerializeMap};

use super::{Duration, GROUP, RegexPattern};

/// `spec` of an HTTPRoute.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HttpRoute {
    /// What it is attached to. Only parents of kind Service concern the mesh.
    pub parent_refs: Vec<ParentRef>,
    /// Hostnames: kept, but not looked at for a Service parent, as GAMMA has it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub hostnames: Vec<String>,
    /// The rules.
    pub rules: Vec<HttpRouteRule>,
}

/// A parent of a route.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ParentRef {
    /// The API group; empty for a Service.
    pub group: String,
    /// The kind.
    pub kind: String,
    /// The namespace; `None`: the route's own. Another one makes it a consumer route: it holds only for sources in
    /// the route's namespace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// The name.
    pub name: String,
    /// One of the service's ports by name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub section_name: Option<String>,
    /// One of the service's ports by number; with `section_name`, both must hold.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
}

impl ParentRef {
    /// Whether the parent is a Service, that is, concerns the mesh.
    pub fn is_service(&self) -> bool {
        self.group.is_empty() && self.kind == "Service"
    }
}

/// One rule: any of its matches (none: every request), then filters and backends.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HttpRouteRule {
    /// A name, unique in the route.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Any of them; empty: every request.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub matches: Vec<HttpRouteMatch>,
    /// Each kind at most once; not both RequestRedirect and URLRewrite.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub filters: Vec<HttpRouteFilter>,
    /// Where to send; empty without a redirect: the answer is 500, as the Gateway API has it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub backend_refs: Vec<BackendRef>,
    /// Time limits.
    #[serde(skip_serializing_if = "HttpRouteTimeouts::is_empty")]
    pub timeouts: HttpRouteTimeouts,
    /// Retries; a TrafficPolicy's `retry` holds where a rule has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry: Option<HttpRouteRetry>,
}

/// All its parts must match.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HttpRouteMatch {
    /// The path without the query; not given: the prefix `/`.
    pub path: PathMatch,
    /// Headers, all of them; names in lower case, each once.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub headers: Vec<HeaderMatch>,
    /// Query parameters, all of them; names are case-sensitive, each once.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub query_params: Vec<HeaderMatch>,
    /// The method.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<String>,
}

impl Default for HttpRouteMatch {
    fn default() -> HttpRouteMatch {
        HttpRouteMatch {
            path: PathMatch::PathPrefix("/".to_owned()),
            headers: Vec::new(),
            query_params: Vec::new(),
            method: None,
        }
    }
}

/// `{type: PathPrefix, value: /api}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "type", content = "value")]
pub enum PathMatch {
    /// The whole path.
    Exact(String),
    /// A prefix of whole path elements: `/api` matches `/api` and `/api/x`, not `/apiary`.
    /// Begins with a slash; a slash at its end, other than that of `/`, has been taken away.
    PathPrefix(String),
    /// The whole path matches.
    RegularExpression(RegexPattern),
}

/// A named value: of a header (name in lower case) or of a query parameter. `{name: x-team, type: Exact, value: a}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HeaderMatch {
    /// The name.
    pub name: String,
    /// What its value must be.
    #[serde(flatten)]
    pub value: StringMatch,
}

/// What a value must be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "type", content = "value")]
pub enum StringMatch {
    /// Equal.
    Exact(String),
    /// The whole value matches.
    RegularExpression(RegexPattern),
}

impl StringMatch {
    /// Whether a value is meant.
    pub fn matches(&self, value: &str) -> bool {
        match self {
            StringMatch::Exact(wanted) => wanted == value,
            StringMatch::RegularExpression(pattern) => pattern.matches(value),
        }
    }
}

/// What is done to a request or its response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HttpRouteFilter {
    /// Changes to the request's headers.
    RequestHeaderModifier(HeaderModifier),
    /// Changes to the response's headers.
    ResponseHeaderModifier(HeaderModifier),
    /// Answer with a redirect.
    RequestRedirect(RequestRedirect),
    /// Change the request's host or path.
    UrlRewrite(UrlRewrite),
}

impl HttpRouteFilter {
    /// The filter's `type`.
    pub const fn type_name(&self) -> &'static str {
        match self {
            HttpRouteFilter::RequestHeaderModifier(_) => "RequestHeaderModifier",
            HttpRouteFilter::ResponseHeaderModifier(_) => "ResponseHeaderModifier",
            HttpRouteFilter::RequestRedirect(_) => "RequestRedirect",
            HttpRouteFilter::UrlRewrite(_) => "URLRewrite",
        }
    }
}

impl Serialize for HttpRouteFilter {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(2))?;
        map.serialize_entry("type", self.type_name())?;
        match self {
            HttpRouteFilter::RequestHeaderModifier(change) => map.serialize_entry("requestHeaderModifier", change)?,
            HttpRouteFilter::ResponseHeaderModifier(change) => map.serialize_entry("responseHeaderModifier", change)?,
            HttpRouteFilter::RequestRedirect(redirect) => map.serialize_entry("requestRedirect", redirect)?,
            HttpRouteFilter::UrlRewrite(rewrite) => map.serialize_entry("urlRewrite", rewrite)?,
        }
        map.end()
    }
}

/// Changes to headers: set, then add, then remove. Names in lower case.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HeaderModifier {
    /// Replace or make.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub set: Vec<HeaderValue>,
    /// Append.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub add: Vec<HeaderValue>,
    /// Remove.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub remove: Vec<String>,
}

/// A header.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HeaderValue {
    /// The name, in lower case.
    pub name: String,
    /// The value.
    pub value: String,
}

/// Answer with a redirect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RequestRedirect {
    /// `http` or `https`; `None`: the request's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scheme: Option<String>,
    /// `None`: the request's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// `None`: the request's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathModifier>,
    /// `None`: the scheme's own, or the request's where no scheme is given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// 301, 302, 303, 307 or 308.
    pub status_code: u16,
}

/// Change the request's host or path before it is sent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct UrlRewrite {
    /// The new authority.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// The new path.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathModifier>,
}

/// How a path changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathModifier {
    /// The whole path.
    ReplaceFullPath(String),
    /// The matched prefix; every match of the rule is a PathPrefix.
    ReplacePrefixMatch(String),
}

impl Serialize for PathModifier {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(2))?;
        match self {
            PathModifier::ReplaceFullPath(path) => {
                map.serialize_entry("type", "ReplaceFullPath")?;
                map.serialize_entry("replaceFullPath", path)?;
            }
            PathModifier::ReplacePrefixMatch(path) => {
                map.serialize_entry("type", "ReplacePrefixMatch")?;
                map.serialize_entry("replacePrefixMatch", path)?;
            }
        }
        map.end()
    }
}

/// Where requests go, and which share of them. Always in the route's own namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BackendRef {
    /// `group` and `kind`.
    #[serde(flatten)]
    pub kind: BackendKind,
    /// The name of the Service or ServiceSubset.
    pub name: String,
    /// The service's port.
    pub port: u16,
    /// Its share among the rule's backends, 0 to 1000000; not given: 1.
    pub weight: u32,
    /// RequestHeaderModifier and ResponseHeaderModifier, for this backend only.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub filters: Vec<HttpRouteFilter>,
}

/// What a backend is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendKind {
    /// A Service of the core group.
    Service,
    /// A ServiceSubset of `nodemesh.io`.
    ServiceSubset,
}

impl BackendKind {
    /// The kind's name.
    pub const fn as_str(self) -> &'static str {
        match self {
            BackendKind::Service => "Service",
            BackendKind::ServiceSubset => "ServiceSubset",
        }
    }
}

impl Serialize for BackendKind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let group = match self {
            BackendKind::Service => "",
            BackendKind::ServiceSubset => GROUP,
        };
        let mut map = serializer.serialize_map(Some(2))?;
        map.serialize_entry("group", group)?;
        map.serialize_entry("kind", self.as_str())?;
        map.end()
    }
}

/// Time limits of a rule. Zero means none, as the Gateway API has it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HttpRouteTimeouts {
    /// From the request's head to the response's last byte, retries and all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request: Option<Duration>,
    /// One try; at most `request`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend_request: Option<Duration>,
}

impl HttpRouteTimeouts {
    /// Whether nothing is set.
    pub fn is_empty(&self) -> bool {
        self.request.is_none() && self.backend_request.is_none()
    }
}

/// Retries of a rule (GEP-1731).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HttpRouteRetry {
    /// Statuses, 400 to 599, that are tried again besides connection failures.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub codes: Vec<u16>,
    /// Additional tries at most, 1 to 10; `None`: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attempts: Option<u32>,
    /// The pause before a try.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backoff: Option<Duration>,
}
