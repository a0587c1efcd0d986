//! Routing: which rule of a service's routes takes a request, and what is done with it.
//!
//! Stands on the source's side, after the service is known and before an endpoint is picked. Pure: a table compiled
//! with the view, a request's head, and a random number in; a rule out. A route attaches to a Service, so traffic
//! sent to a pod's own address never comes here.
//!
//! Precedence is the Gateway API's: exact path, then longest prefix, method, number of headers, number of query
//! parameters; ties go to the older route, then to `namespace/name` in order, then to the earlier rule. A path
//! regex, which that specification leaves to us, stands between exact and prefix (the longer pattern first), since
//! under the prefixes a catch-all `/` would hide every one of them. Where a source's namespace has routes of its own
//! for the service (consumer routes), they are used instead of the producer's, not merged with them. Where a port has
//! GRPCRoutes and HTTPRoutes, calls of gRPC go by the former and all other requests by the latter; where it has routes
//! of one kind only, they are for all requests. Connections that carry no requests go by TCPRoutes and TLSRoutes
//! ([`FlowTable`]).

mod cors;
mod flow;
mod grpc;
mod matching;
mod rewrite;

use std::{collections::HashMap, fmt, sync::Arc, time::Duration};

pub use self::{
    cors::{cors_headers, is_preflight, preflight_headers},
    flow::{FlowChoice, FlowEntry, FlowRule, FlowTable, Hello, select_flow},
    grpc::{grpc_match_holds, is_grpc},
    matching::{match_holds, path_matches},
    rewrite::{redirect_location, rewrite_path},
};
pub use crate::rule::RuleId;
use crate::{
    backend::Backend,
    policy::{Cors, GrpcRouteMatch, HttpRouteMatch},
    request::Request,
    resilience::{RetrySettings, TrafficSettings},
    workload::ObjectName,
};

pub(crate) use self::matching::percent_decode;

use self::{grpc::GrpcSet, matching::RuleSet};

/// The routes of one service port, in the order in which they are tried.
#[derive(Clone, Debug)]
pub struct RouteTable {
    /// For sources whose namespace has no routes of its own.
    producers: Rules,
    /// Whether the producer has routes, or `producers` is the service itself.
    produced: bool,
    /// By namespace of the source.
    consumers: HashMap<Arc<str>, Rules>,
}

/// The rules for one kind of source; at least one of the sets is there.
#[derive(Clone, Debug, Default)]
struct Rules {
    grpc: Option<GrpcSet>,
    http: Option<RuleSet>,
}

/// What a table says to a request.
#[derive(Clone, Copy, Debug)]
pub enum RouteChoice<'a> {
    /// The service has routes for this source and none matches: 404.
    NoMatch,
    /// This rule.
    Rule(&'a Arc<RouteRule>),
}

/// A rule as one of its matches sees it: what to do with the request.
#[derive(Clone, Debug)]
pub struct RouteRule {
    /// `httproute/<namespace>/<name>/<rule name or index>`.
    pub id: RuleId,
    /// The prefix that matched, for [`PathModifier::ReplacePrefixMatch`]; `/` if the match was no prefix.
    pub matched_prefix: Arc<str>,
    /// Where the request goes.
    pub action: RouteAction,
    /// From head to last byte; zero: expressly unlimited; `None`: the backend's. See [`RouteRule::timeout`].
    pub request_timeout: Option<Duration>,
    /// Of one try; zero: expressly unlimited; `None`: as long as the request.
    pub backend_timeout: Option<Duration>,
    /// Retries; `None`: the backend's.
    pub retry: Option<Arc<RetrySettings>>,
    /// Edits to the request's headers.
    pub request_headers: HeaderEdit,
    /// Edits to the response's headers.
    pub response_headers: HeaderEdit,
    /// Changes to host and path.
    pub rewrite: Option<Rewrite>,
    /// Where copies go.
    pub mirrors: Vec<Mirror>,
    /// What other origins' pages may do.
    pub cors: Option<Arc<Cors>>,
}

/// Copies of some requests, for another backend.
#[derive(Clone, Debug)]
pub struct Mirror {
    /// Of `denominator` requests so many are copied.
    pub numerator: u32,
    /// At least 1.
    pub denominator: u32,
    /// The backend, or why there are no copies.
    pub backend: Result<Arc<Backend>, BadBackend>,
}

/// Where a request goes.
#[derive(Clone, Debug)]
pub enum RouteAction {
    /// To one of these, by weight.
    Forward(Vec<WeightedBackend>),
    /// Back to the source with a Location.
    Redirect(RedirectSpec),
}

/// A backend and its share.
#[derive(Clone, Debug)]
pub struct WeightedBackend {
    /// The share of the sum of the rule's weights; 0: none.
    pub weight: u32,
    /// The backend, or why its share of requests gets a 500.
    pub backend: Result<Arc<Backend>, BadBackend>,
    /// Edits to the request's headers, after the rule's.
    pub request_headers: HeaderEdit,
    /// Edits to the response's headers, before the rule's.
    pub response_headers: HeaderEdit,
}

/// Why a backendRef leads nowhere.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadBackend {
    /// No Service of that name.
    #[error("service {0} does not exist")]
    NoService(ObjectName),
    /// No ServiceSubset of that name, or its Service is missing.
    #[error("service subset {0} does not exist or has no service")]
    NoSubset(ObjectName),
    /// The Service has no such port.
    #[error("service {service} has no port {port}")]
    NoPort {
        /// The service.
        service: ObjectName,
        /// The port asked for.
        port: u16,
    },
    /// It is of a kind that the mesh cannot send to.
    #[error("{0} is not a kind of backend that the mesh knows")]
    Kind(String),
    /// Its port speaks something that the route's requests cannot be sent as.
    #[error("service {service} port {port} speaks {speaks}, which the route cannot send")]
    Protocol {
        /// The service.
        service: ObjectName,
        /// The port.
        port: u16,
        /// What the port is declared to speak.
        speaks: &'static str,
    },
    /// It lies in another namespace, and no ReferenceGrant there lets this route name it.
    #[error("no ReferenceGrant in namespace {} lets the route name {}", .0.namespace, .0.name)]
    NotPermitted(ObjectName),
}

/// Edits to headers, applied in this order: set, add, remove. Names are lower case and, like the values, free of
/// CR, LF and NUL.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderEdit {
    /// Replace all values of the name.
    pub set: Vec<(String, String)>,
    /// Add a value.
    pub add: Vec<(String, String)>,
    /// Remove all values.
    pub remove: Vec<String>,
}

/// URLRewrite.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rewrite {
    /// The new authority.
    pub hostname: Option<Arc<str>>,
    /// The new path.
    pub path: Option<PathModifier>,
}

/// How a path changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathModifier {
    /// The whole path becomes this; the query stays.
    ReplaceFullPath(Arc<str>),
    /// The matched prefix becomes this.
    ReplacePrefixMatch(Arc<str>),
}

/// RequestRedirect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedirectSpec {
    /// The status, a 3xx.
    pub status: u16,
    /// `http` or `https`; `None`: the request's.
    pub scheme: Option<Arc<str>>,
    /// `None`: the request's.
    pub hostname: Option<Arc<str>>,
    /// `None`: the scheme's own if a scheme is given, else the port that the request came to.
    pub port: Option<u16>,
    /// `None`: the path as sent.
    pub path: Option<PathModifier>,
    /// The prefix that matched.
    pub matched_prefix: Arc<str>,
}

/// Where a route stands among its kind.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RouteAge {
    /// Lower is older: the time or revision of creation, 0 where unknown.
    pub created: u64,
    /// Breaks ties.
    pub name: ObjectName,
}

/// One rule with its matches, ready to enter a table.
#[derive(Clone, Debug)]
pub struct TableEntry {
    /// The route's place among its kind.
    pub age: RouteAge,
    /// The rule's index in its route.
    pub rule_index: usize,
    /// What it takes, and of which kind the route is.
    pub matches: Matches,
    /// What follows; its `matched_prefix` is filled in per match.
    pub rule: RouteRule,
}

/// The matches of a rule.
#[derive(Clone, Debug)]
pub enum Matches {
    /// An HTTPRoute's: any of these; empty: everything.
    Http(Vec<HttpRouteMatch>),
    /// A GRPCRoute's: any of these; empty: everything.
    Grpc(Vec<GrpcRouteMatch>),
}

/// Which rule takes the request. A total function of its arguments.
pub fn select<'a>(table: &'a RouteTable, source_namespace: &str, request: &dyn Request) -> RouteChoice<'a> {
    let rules = table.consumers.get(source_namespace).unwrap_or(&table.producers);
    match rules.select(request) {
        Some(rule) => RouteChoice::Rule(rule),
        None => RouteChoice::NoMatch,
    }
}

impl RouteTable {
    /// Builds a table from the producer's rules and, by namespace, the consumers'. `unrouted` is what sources get
    /// for whom neither exists: the service itself.
    pub fn new(
        producers: Vec<TableEntry>,
        consumers: HashMap<Arc<str>, Vec<TableEntry>>,
        unrouted: RouteRule,
    ) -> RouteTable {
        let produced = !producers.is_empty();
        let producers = if produced {
            producers
        } else {
            vec![TableEntry {
                age: RouteAge {
                    created: 0,
                    name: ObjectName::new("", ""),
                },
                rule_index: 0,
                matches: Matches::Http(Vec::new()),
                rule: unrouted,
            }]
        };
        RouteTable {
            producers: Rules::new(producers),
            produced,
            consumers: consumers
                .into_iter()
                .map(|(ns, entries)| (ns, Rules::new(entries)))
                .collect(),
        }
    }

    /// Whether some route speaks of requests from this namespace.
    pub fn has_routes_for(&self, source_namespace: &str) -> bool {
        self.produced || self.consumers.contains_key(source_namespace)
    }
}

impl Rules {
    fn new(entries: Vec<TableEntry>) -> Rules {
        let (mut grpc, mut http) = (Vec::new(), Vec::new());
        for TableEntry {
            age,
            rule_index,
            matches,
            rule,
        } in entries
        {
            match matches {
                Matches::Http(matches) => http.push((age, rule_index, matches, rule)),
                Matches::Grpc(matches) => grpc.push((age, rule_index, matches, rule)),
            }
        }
        Rules {
            grpc: (!grpc.is_empty()).then(|| GrpcSet::new(grpc)),
            http: (!http.is_empty()).then(|| RuleSet::new(http)),
        }
    }

    fn select(&self, request: &dyn Request) -> Option<&Arc<RouteRule>> {
        match (&self.grpc, &self.http) {
            (Some(grpc), None) => grpc.select(request),
            (Some(grpc), Some(_)) if is_grpc(request) => grpc.select(request),
            (_, Some(http)) => http.select(request),
            (None, None) => None,
        }
    }
}

impl RouteRule {
    /// A rule that sends everything to one backend.
    pub fn to_backend(id: RuleId, backend: Arc<Backend>) -> RouteRule {
        RouteRule {
            id,
            matched_prefix: "/".into(),
            action: RouteAction::Forward(vec![WeightedBackend {
                weight: 1,
                backend: Ok(backend),
                request_headers: HeaderEdit::default(),
                response_headers: HeaderEdit::default(),
            }]),
            request_timeout: None,
            backend_timeout: None,
            retry: None,
            request_headers: HeaderEdit::default(),
            response_headers: HeaderEdit::default(),
            rewrite: None,
            mirrors: Vec::new(),
            cors: None,
        }
    }

    /// The backend for this random number, each chosen in exactly `weight` of the sum's residues. `None`, if all
    /// weights are 0 or the rule forwards nowhere: 500.
    pub fn pick(&self, random: u32) -> Option<&WeightedBackend> {
        let RouteAction::Forward(backends) = &self.action else {
            return None;
        };
        pick(backends, random)
    }

    /// The limit from the request's head to the response's end: the route's, else the backend's; `None`: unlimited.
    pub fn timeout(&self, backend: &TrafficSettings) -> Option<Duration> {
        match self.request_timeout {
            Some(Duration::ZERO) => None,
            Some(timeout) => Some(timeout),
            None => backend.timeouts.request,
        }
    }

    /// The limit of one try: the route's, else the retry policy's; `None`: as long as the request.
    pub fn try_timeout(&self, backend: &TrafficSettings) -> Option<Duration> {
        match self.backend_timeout {
            Some(Duration::ZERO) => None,
            Some(timeout) => Some(timeout),
            None => self.retry(backend).and_then(|retry| retry.per_try_timeout),
        }
    }

    /// Whether and when to try again: the route's word, else the backend's.
    pub fn retry<'a>(&'a self, backend: &'a TrafficSettings) -> Option<&'a RetrySettings> {
        self.retry.as_deref().or(backend.retry.as_ref())
    }
}

/// The share that this random number falls into.
fn pick(backends: &[WeightedBackend], random: u32) -> Option<&WeightedBackend> {
    let total: u64 = backends.iter().map(|b| u64::from(b.weight)).sum();
    let mut left = u64::from(random).checked_rem(total)?;
    for backend in backends {
        match left.checked_sub(u64::from(backend.weight)) {
            None => return Some(backend),
            Some(rest) => left = rest,
        }
    }
    None
}

impl Mirror {
    /// Whether the request of this random number is copied: exactly `numerator` of each `denominator` numbers are.
    pub fn takes(&self, random: u32) -> bool {
        random
            .checked_rem(self.denominator)
            .is_some_and(|rest| rest < self.numerator)
    }
}

impl HeaderEdit {
    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        self.set.is_empty() && self.add.is_empty() && self.remove.is_empty()
    }
}

impl fmt::Display for RouteChoice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RouteChoice::NoMatch => f.write_str("no match"),
            RouteChoice::Rule(rule) => write!(f, "{}", rule.id),
        }
    }
}
