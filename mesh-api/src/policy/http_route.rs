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

impl HttpRoute {
    /// Everything that the rules name, each with the path of its field: for what a route's references lead to.
    pub fn backends(&self) -> Vec<(String, &BackendTarget)> {
        let rules = self.rules.iter().map(|rule| (&*rule.filters, &*rule.backend_refs));
        backends_of(rules)
    }
}

/// The backends of rules, those of mirrors too, with the paths of their fields.
pub(super) fn backends_of<'a>(
    rules: impl Iterator<Item = (&'a [HttpRouteFilter], &'a [BackendRef])>,
) -> Vec<(String, &'a BackendTarget)> {
    fn mirrors<'a>(at: &str, filters: &'a [HttpRouteFilter], found: &mut Vec<(String, &'a BackendTarget)>) {
        for (index, filter) in filters.iter().enumerate() {
            if let HttpRouteFilter::RequestMirror(mirror) = filter {
                let path = format!("{at}.filters[{index}].requestMirror.backendRef");
                found.push((path, &mirror.backend_ref));
            }
        }
    }
    let mut found = Vec::new();
    for (rule, (filters, backends)) in rules.enumerate() {
        let at = format!("spec.rules[{rule}]");
        mirrors(&at, filters, &mut found);
        for (index, backend) in backends.iter().enumerate() {
            let at = format!("{at}.backendRefs[{index}]");
            found.push((at.clone(), &backend.target));
            mirrors(&at, &backend.filters, &mut found);
        }
    }
    found
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
    /// Each kind but RequestMirror at most once; not both RequestRedirect and URLRewrite.
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
    /// Send a copy to another backend; may be given more than once.
    RequestMirror(RequestMirror),
    /// Answer browsers that ask for another origin's leave.
    Cors(Cors),
}

impl HttpRouteFilter {
    /// The filter's `type`.
    pub const fn type_name(&self) -> &'static str {
        match self {
            HttpRouteFilter::RequestHeaderModifier(_) => "RequestHeaderModifier",
            HttpRouteFilter::ResponseHeaderModifier(_) => "ResponseHeaderModifier",
            HttpRouteFilter::RequestRedirect(_) => "RequestRedirect",
            HttpRouteFilter::UrlRewrite(_) => "URLRewrite",
            HttpRouteFilter::RequestMirror(_) => "RequestMirror",
            HttpRouteFilter::Cors(_) => "CORS",
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
            HttpRouteFilter::RequestMirror(mirror) => map.serialize_entry("requestMirror", mirror)?,
            HttpRouteFilter::Cors(cors) => map.serialize_entry("cors", cors)?,
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

/// Send a copy of some requests to one endpoint of another backend, and drop its answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RequestMirror {
    /// Where the copies go.
    pub backend_ref: BackendTarget,
    /// Which share of the requests is copied; written as `percent` it reads as a fraction of 100.
    pub fraction: Fraction,
}

/// A share: `numerator` of `denominator`, at most one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Fraction {
    /// At most the denominator.
    pub numerator: u32,
    /// At least 1.
    pub denominator: u32,
}

/// Cross-origin resource sharing, as the Fetch standard has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Cors {
    /// Origins whose pages may read responses; `*` alone: all. Empty: none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub allow_origins: Vec<OriginMatch>,
    /// Whether pages may send cookies and the like.
    pub allow_credentials: bool,
    /// Methods beside GET, HEAD and POST; `*` alone: all.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub allow_methods: Vec<String>,
    /// Headers that pages may send, in lower case; `*` alone: all.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub allow_headers: Vec<String>,
    /// Headers that pages may read, in lower case; `*` alone: all.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub expose_headers: Vec<String>,
    /// How many seconds an answer to a preflight holds.
    pub max_age: u32,
}

/// An origin: `*`, or `<scheme>://<host>[:<port>]` where the host may begin with a `*`. Lower case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OriginMatch {
    /// Every origin.
    Any,
    /// One origin, or those whose host ends so.
    Origin {
        /// `http` or `https`.
        scheme: String,
        /// What stands before the host that is written: anything, or nothing.
        wildcard: bool,
        /// The host, or its end; empty with a wildcard alone.
        host: String,
        /// The port; the scheme's own where none is written.
        port: u16,
    },
}

impl OriginMatch {
    /// Whether an `Origin` header's value is meant.
    pub fn matches(&self, origin: &str) -> bool {
        let OriginMatch::Origin {
            scheme,
            wildcard,
            host,
            port,
        } = self
        else {
            return true;
        };
        let Some((its_scheme, authority)) = origin.split_once("://") else {
            return false;
        };
        let its_host = crate::request::host_of(authority);
        let its_port = match authority.get(its_host.len()..).and_then(|rest| rest.strip_prefix(':')) {
            Some(digits) => digits.parse().ok(),
            None => origin_port(scheme),
        };
        let same_host = if *wildcard {
            let start = its_host.len().checked_sub(host.len());
            let end = start.and_then(|at| its_host.as_bytes().get(at..));
            end.is_some_and(|end| end.eq_ignore_ascii_case(host.as_bytes()))
        } else {
            its_host.eq_ignore_ascii_case(host)
        };
        its_scheme.eq_ignore_ascii_case(scheme) && same_host && its_port == Some(*port)
    }
}

/// The port that an origin without one means.
pub(super) fn origin_port(scheme: &str) -> Option<u16> {
    match scheme {
        "http" => Some(80),
        "https" => Some(443),
        _ => None,
    }
}

impl Serialize for OriginMatch {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            OriginMatch::Any => serializer.serialize_str("*"),
            OriginMatch::Origin {
                scheme,
                wildcard,
                host,
                port,
            } => {
                let star = if *wildcard { "*" } else { "" };
                if origin_port(scheme) == Some(*port) {
                    serializer.collect_str(&format_args!("{scheme}://{star}{host}"))
                } else {
                    serializer.collect_str(&format_args!("{scheme}://{star}{host}:{port}"))
                }
            }
        }
    }
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

/// A port of a Service or ServiceSubset, as a route names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BackendTarget {
    /// `group` and `kind`.
    #[serde(flatten)]
    pub kind: BackendKind,
    /// The namespace; `None`: the route's own. Another one must permit it ([`BackendTarget::needs_grant`]).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// The name of the Service or ServiceSubset.
    pub name: String,
    /// The service's port; 0: none, as only another kind than these two may have it.
    #[serde(skip_serializing_if = "is_no_port")]
    pub port: u16,
}

fn is_no_port(port: &u16) -> bool {
    *port == 0
}

impl BackendTarget {
    /// Whether a route of that namespace, with these parents, needs a ReferenceGrant to name it: not in its own
    /// namespace, and not for a Service that is a parent of the route. Whom a consumer route speaks of its sources reach
    /// without any route.
    pub fn needs_grant(&self, route_namespace: &str, parents: &[ParentRef]) -> bool {
        let Some(namespace) = self.namespace.as_deref().filter(|ns| *ns != route_namespace) else {
            return false;
        };
        let is_it = |parent: &&ParentRef| {
            parent.is_service()
                && parent.name == self.name
                && parent.namespace.as_deref().unwrap_or(route_namespace) == namespace
        };
        self.kind != BackendKind::Service || !parents.iter().any(|parent| is_it(&parent))
    }
}

/// Where requests go, and which share of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BackendRef {
    /// What it names.
    #[serde(flatten)]
    pub target: BackendTarget,
    /// Its share among the rule's backends, 0 to 1000000; not given: 1.
    pub weight: u32,
    /// RequestHeaderModifier and ResponseHeaderModifier, for this backend only.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub filters: Vec<HttpRouteFilter>,
}

/// What a backend is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackendKind {
    /// A Service of the core group.
    Service,
    /// A ServiceSubset of `nodemesh.io`.
    ServiceSubset,
    /// Something that the mesh cannot send to. The Gateway API has the route accepted and this share of it refused.
    Other {
        /// The API group.
        group: String,
        /// The kind.
        kind: String,
    },
}

impl BackendKind {
    /// The API group.
    pub fn group(&self) -> &str {
        match self {
            BackendKind::Service => "",
            BackendKind::ServiceSubset => GROUP,
            BackendKind::Other { group, .. } => group,
        }
    }

    /// The kind's name.
    pub fn as_str(&self) -> &str {
        match self {
            BackendKind::Service => "Service",
            BackendKind::ServiceSubset => "ServiceSubset",
            BackendKind::Other { kind, .. } => kind,
        }
    }
}

/// `kind`, or `kind.group`, as people write it.
impl std::fmt::Display for BackendKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.group() {
            "" => f.write_str(self.as_str()),
            group => write!(f, "{}.{group}", self.as_str()),
        }
    }
}

impl Serialize for BackendKind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(2))?;
        map.serialize_entry("group", self.group())?;
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
