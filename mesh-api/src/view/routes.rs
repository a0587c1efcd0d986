//! Routes as tables: requests by HTTPRoutes and GRPCRoutes, connections by TCPRoutes and TLSRoutes. One table of each
//! per service port that has such routes.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use super::{
    BackendKey,
    compile::{Backends, Named, Policies},
    grants::Grants,
    settings::route_retry_settings,
};
use crate::{
    document::Kind,
    policy::{
        self, BackendKind, BackendRef, BackendTarget, Cors, GrpcRouteRule, HttpRouteFilter, HttpRouteRule, L4RouteRule,
        ParentRef, UrlRewrite,
    },
    route::{
        BadBackend, FlowEntry, FlowRule, FlowTable, HeaderEdit, Matches, Mirror, PathModifier, RedirectSpec, Rewrite,
        RouteAction, RouteAge, RouteRule, RouteTable, TableEntry, WeightedBackend,
    },
    rule::RuleId,
    workload::{AppProtocol, ObjectName, Service, ServicePort},
};

/// Tables by the key of the port's own backend.
#[derive(Clone, Debug, Default)]
pub(super) struct Tables {
    pub requests: HashMap<BackendKey, Arc<RouteTable>>,
    pub flows: HashMap<BackendKey, Arc<FlowTable>>,
    /// The ports whose tables have backends of a service.
    pub users: HashMap<ObjectName, BTreeSet<BackendKey>>,
}

/// The rules of one port.
struct Entries<E> {
    producers: Vec<E>,
    consumers: HashMap<Arc<str>, Vec<E>>,
}

/// The rules of all ports.
struct ByPort<E>(HashMap<BackendKey, Entries<E>>);

/// What rules of routes may name.
struct Known<'a> {
    services: &'a dyn Fn(&ObjectName) -> Option<Arc<Service>>,
    /// The name of each subset's service.
    subsets: HashMap<(&'a str, &'a str), &'a str>,
    backends: &'a Backends,
    grants: Grants<'a>,
    /// The ports whose tables are wanted; `None`: all.
    only: Option<&'a BTreeSet<BackendKey>>,
}

/// The tables of all ports, or of some.
pub(super) fn compile(
    policies: &Policies<'_>,
    services: &dyn Fn(&ObjectName) -> Option<Arc<Service>>,
    backends: &Backends,
    only: Option<&BTreeSet<BackendKey>>,
) -> Tables {
    let subsets = policies.subsets.iter();
    let grants = policies.grants.iter();
    let known = Known {
        services,
        subsets: subsets
            .map(|s| ((&*s.name.namespace, &*s.name.name), s.spec.service.as_str()))
            .collect(),
        backends,
        grants: Grants::new(grants.map(|grant| (&*grant.name.namespace, grant.spec))),
        only,
    };
    let mut users = HashMap::new();

    let mut requests = ByPort(HashMap::new());
    for route in &policies.routes {
        let named = || route.spec.backends();
        let at = known.attached(&mut users, &route.name, &route.spec.parent_refs, named);
        requests.attach(&route.name, at, || {
            let rules = route.spec.rules.iter().enumerate();
            rules
                .map(|(index, rule)| http_entry(&known, route, index, rule))
                .collect()
        });
    }
    for route in &policies.grpc_routes {
        let named = || route.spec.backends();
        let at = known.attached(&mut users, &route.name, &route.spec.parent_refs, named);
        requests.attach(&route.name, at, || {
            let rules = route.spec.rules.iter().enumerate();
            rules
                .map(|(index, rule)| grpc_entry(&known, route, index, rule))
                .collect()
        });
    }
    let mut flows = ByPort(HashMap::new());
    for route in &policies.tcp_routes {
        let from = From {
            kind: Kind::TcpRoute,
            route: &route.name,
            parents: &route.spec.parent_refs,
            known: &known,
        };
        let named = || route.spec.backends();
        let at = known.attached(&mut users, &route.name, &route.spec.parent_refs, named);
        flows.attach(&route.name, at, || {
            let rules = route.spec.rules.iter().enumerate();
            let entry = |(index, rule)| FlowEntry {
                age: age(route),
                names: None,
                rule: flow_rule(&from, index, rule),
            };
            rules.map(entry).collect()
        });
    }
    for route in &policies.tls_routes {
        let from = From {
            kind: Kind::TlsRoute,
            route: &route.name,
            parents: &route.spec.parent_refs,
            known: &known,
        };
        let named = || route.spec.backends();
        let at = known.attached(&mut users, &route.name, &route.spec.parent_refs, named);
        flows.attach(&route.name, at, || {
            let rules = route.spec.rules.iter().enumerate();
            let entry = |(index, rule)| FlowEntry {
                age: age(route),
                names: Some(route.spec.hostnames.clone()),
                rule: flow_rule(&from, index, rule),
            };
            rules.map(entry).collect()
        });
    }

    let table_of_requests = |(key, entries): (BackendKey, Entries<TableEntry>)| {
        let backend = backends.get(&key)?.clone();
        let unrouted = RouteRule::to_backend(RuleId::new(&format!("service/{}", key.service)), backend);
        let table = RouteTable::new(entries.producers, entries.consumers, unrouted);
        Some((key, Arc::new(table)))
    };
    let table_of_flows = |(key, entries): (BackendKey, Entries<FlowEntry>)| {
        let table = FlowTable::new(entries.producers, entries.consumers);
        (key, Arc::new(table))
    };
    Tables {
        requests: requests.0.into_iter().filter_map(table_of_requests).collect(),
        flows: flows.0.into_iter().map(table_of_flows).collect(),
        users,
    }
}

impl<E: Clone> ByPort<E> {
    /// Gives a route's rules to each port that it is attached to. A route without rules says nothing.
    fn attach(&mut self, route: &ObjectName, ports: Vec<(BackendKey, bool)>, rules: impl FnOnce() -> Vec<E>) {
        if ports.is_empty() {
            return;
        }
        let rules = rules();
        if rules.is_empty() {
            return;
        }
        for (key, is_consumer) in ports {
            let entries = self.0.entry(key).or_insert_with(|| Entries {
                producers: Vec::new(),
                consumers: HashMap::new(),
            });
            let list = if is_consumer {
                entries.consumers.entry(route.namespace.clone()).or_default()
            } else {
                &mut entries.producers
            };
            list.extend_from_slice(&rules);
        }
    }
}

impl Known<'_> {
    /// The wanted ports that a route is attached to, and whether it is a consumer route there. Whose backends its rules
    /// have is noted.
    fn attached<'r>(
        &self,
        users: &mut HashMap<ObjectName, BTreeSet<BackendKey>>,
        route: &ObjectName,
        parents: &[ParentRef],
        named: impl FnOnce() -> Vec<(String, &'r BackendTarget)>,
    ) -> Vec<(BackendKey, bool)> {
        let mut ports = attached_to(route, parents, self);
        ports.retain(|(key, _)| self.only.is_none_or(|only| only.contains(key)));
        if ports.is_empty() {
            return ports;
        }
        for (_, target) in named() {
            let namespace = target.namespace.as_deref().unwrap_or(&route.namespace);
            let service = match self.subsets.get(&(namespace, target.name.as_str())) {
                Some(service) if matches!(target.kind, BackendKind::ServiceSubset) => service,
                _ => target.name.as_str(),
            };
            let of_service = users.entry(ObjectName::new(namespace, service)).or_default();
            of_service.extend(ports.iter().map(|(key, _)| key.clone()));
        }
        ports
    }
}

fn age<P>(route: &Named<'_, P>) -> RouteAge {
    RouteAge {
        created: route.created,
        name: route.name.clone(),
    }
}

/// The service ports that a route is attached to, each once, and whether it is a consumer route there.
fn attached_to(route: &ObjectName, parents: &[ParentRef], known: &Known<'_>) -> Vec<(BackendKey, bool)> {
    let mut attached: Vec<(BackendKey, bool)> = Vec::new();
    for parent in parents.iter().filter(|parent| parent.is_service()) {
        let namespace = parent.namespace.as_deref().unwrap_or(&route.namespace);
        let Some(service) = (known.services)(&ObjectName::new(namespace, &parent.name)) else {
            continue;
        };
        for port in service.ports.iter().filter(|port| parent_means(parent, port)) {
            let key = BackendKey {
                service: service.name.clone(),
                port: port.port,
                subset: None,
            };
            if !attached.iter().any(|(other, _)| *other == key) {
                attached.push((key, *service.name.namespace != *route.namespace));
            }
        }
    }
    attached
}

fn parent_means(parent: &ParentRef, port: &ServicePort) -> bool {
    parent.port.is_none_or(|number| number == port.port)
        && parent.section_name.as_deref().is_none_or(|name| *port.name == *name)
}

fn http_entry(
    known: &Known<'_>,
    route: &Named<'_, policy::HttpRoute>,
    index: usize,
    rule: &HttpRouteRule,
) -> TableEntry {
    let from = From {
        kind: Kind::HttpRoute,
        route: &route.name,
        parents: &route.spec.parent_refs,
        known,
    };
    let compiled = RouteRule {
        request_timeout: rule.timeouts.request.map(|t| t.as_std()),
        backend_timeout: rule.timeouts.backend_request.map(|t| t.as_std()),
        retry: rule.retry.as_ref().map(|retry| Arc::new(route_retry_settings(retry))),
        ..from.rule(index, rule.name.as_deref(), &rule.filters, &rule.backend_refs)
    };
    TableEntry {
        age: age(route),
        rule_index: index,
        matches: Matches::Http(rule.matches.clone()),
        rule: compiled,
    }
}

fn grpc_entry(
    known: &Known<'_>,
    route: &Named<'_, policy::GrpcRoute>,
    index: usize,
    rule: &GrpcRouteRule,
) -> TableEntry {
    let from = From {
        kind: Kind::GrpcRoute,
        route: &route.name,
        parents: &route.spec.parent_refs,
        known,
    };
    TableEntry {
        age: age(route),
        rule_index: index,
        matches: Matches::Grpc(rule.matches.clone()),
        rule: from.rule(index, rule.name.as_deref(), &rule.filters, &rule.backend_refs),
    }
}

fn flow_rule(from: &From<'_>, index: usize, rule: &L4RouteRule) -> FlowRule {
    FlowRule {
        id: from.rule_id(index, rule.name.as_deref()),
        backends: rule.backend_refs.iter().map(|backend| from.weighted(backend)).collect(),
    }
}

/// A route whose rules are compiled.
struct From<'a> {
    kind: Kind,
    route: &'a ObjectName,
    parents: &'a [ParentRef],
    known: &'a Known<'a>,
}

impl From<'_> {
    fn rule_id(&self, index: usize, name: Option<&str>) -> RuleId {
        let kind = self.kind.as_str().to_ascii_lowercase();
        let name = name.map_or_else(|| index.to_string(), str::to_owned);
        RuleId::new(&format!("{kind}/{}/{name}", self.route))
    }

    fn rule(
        &self,
        index: usize,
        name: Option<&str>,
        filters: &[HttpRouteFilter],
        backends: &[BackendRef],
    ) -> RouteRule {
        let edits = Edits::of(filters);
        let action = match edits.redirect {
            Some(redirect) => RouteAction::Redirect(redirect),
            None => RouteAction::Forward(backends.iter().map(|backend| self.weighted(backend)).collect()),
        };
        let mirrors = edits.mirrors.into_iter().map(|mirror| Mirror {
            numerator: mirror.fraction.numerator,
            denominator: mirror.fraction.denominator.max(1),
            backend: self.backend(&mirror.backend_ref),
        });
        RouteRule {
            id: self.rule_id(index, name),
            matched_prefix: "/".into(),
            action,
            request_timeout: None,
            backend_timeout: None,
            retry: None,
            request_headers: edits.request,
            response_headers: edits.response,
            rewrite: edits.rewrite,
            mirrors: mirrors.collect(),
            cors: edits.cors,
        }
    }

    fn weighted(&self, wanted: &BackendRef) -> WeightedBackend {
        let edits = Edits::of(&wanted.filters);
        WeightedBackend {
            weight: wanted.weight,
            backend: self.backend(&wanted.target),
            request_headers: edits.request,
            response_headers: edits.response,
        }
    }

    fn backend(&self, wanted: &BackendTarget) -> Result<Arc<super::Backend>, BadBackend> {
        let known = self.known;
        let own = &*self.route.namespace;
        let namespace = wanted.namespace.as_deref().unwrap_or(own);
        let name = ObjectName::new(namespace, &wanted.name);
        if let BackendKind::Other { .. } = wanted.kind {
            return Err(BadBackend::Kind(wanted.kind.to_string()));
        }
        if wanted.needs_grant(own, self.parents)
            && !known
                .grants
                .permits(self.kind, own, &wanted.kind, namespace, &wanted.name)
        {
            return Err(BadBackend::NotPermitted(name));
        }
        let (service, subset) = match wanted.kind {
            BackendKind::Service | BackendKind::Other { .. } => (wanted.name.as_str(), None),
            BackendKind::ServiceSubset => match known.subsets.get(&(namespace, wanted.name.as_str())) {
                Some(service) => (*service, Some(name.name.clone())),
                None => return Err(BadBackend::NoSubset(name)),
            },
        };
        let Some(service) = (known.services)(&ObjectName::new(namespace, service)).map(|found| found.name.clone())
        else {
            return Err(if subset.is_none() {
                BadBackend::NoService(name)
            } else {
                BadBackend::NoSubset(name)
            });
        };
        let key = BackendKey {
            service: service.clone(),
            port: wanted.port,
            subset,
        };
        let port = wanted.port;
        match known.backends.get(&key) {
            None => Err(BadBackend::NoPort { service, port }),
            Some(backend) if !can_send_to(self.kind, backend.protocol) => Err(BadBackend::Protocol {
                service,
                port,
                speaks: backend.protocol.words(),
            }),
            Some(backend) => Ok(backend.clone()),
        }
    }
}

/// Whether a route of that kind can send to a port that is declared to speak so. Whole connections go anywhere;
/// requests need HTTP, and calls HTTP/2.
pub(crate) fn can_send_to(route: Kind, speaks: AppProtocol) -> bool {
    !matches!(
        (route, speaks),
        (Kind::HttpRoute | Kind::GrpcRoute, AppProtocol::Tls | AppProtocol::Tcp)
            | (Kind::GrpcRoute, AppProtocol::Http1)
    )
}

/// The filters of a rule or backend, each kind but mirrors at most once.
#[derive(Default)]
struct Edits<'a> {
    request: HeaderEdit,
    response: HeaderEdit,
    redirect: Option<RedirectSpec>,
    rewrite: Option<Rewrite>,
    mirrors: Vec<&'a policy::RequestMirror>,
    cors: Option<Arc<Cors>>,
}

impl Edits<'_> {
    fn of(filters: &[HttpRouteFilter]) -> Edits<'_> {
        let mut edits = Edits::default();
        for filter in filters {
            match filter {
                HttpRouteFilter::RequestHeaderModifier(change) => edits.request = header_edit(change),
                HttpRouteFilter::ResponseHeaderModifier(change) => edits.response = header_edit(change),
                HttpRouteFilter::RequestRedirect(redirect) => edits.redirect = Some(redirect_spec(redirect)),
                HttpRouteFilter::UrlRewrite(rewrite) => edits.rewrite = Some(rewrite_spec(rewrite)),
                HttpRouteFilter::RequestMirror(mirror) => edits.mirrors.push(mirror),
                HttpRouteFilter::Cors(cors) => edits.cors = Some(Arc::new(cors.clone())),
            }
        }
        edits
    }
}

fn header_edit(change: &policy::HeaderModifier) -> HeaderEdit {
    let pair = |header: &policy::HeaderValue| (header.name.clone(), header.value.clone());
    HeaderEdit {
        set: change.set.iter().map(pair).collect(),
        add: change.add.iter().map(pair).collect(),
        remove: change.remove.clone(),
    }
}

fn redirect_spec(redirect: &policy::RequestRedirect) -> RedirectSpec {
    RedirectSpec {
        status: redirect.status_code,
        scheme: redirect.scheme.as_deref().map(Arc::from),
        hostname: redirect.hostname.as_deref().map(Arc::from),
        port: redirect.port,
        path: redirect.path.as_ref().map(path_modifier),
        matched_prefix: "/".into(),
    }
}

fn rewrite_spec(rewrite: &UrlRewrite) -> Rewrite {
    Rewrite {
        hostname: rewrite.hostname.as_deref().map(Arc::from),
        path: rewrite.path.as_ref().map(path_modifier),
    }
}

fn path_modifier(modifier: &policy::PathModifier) -> PathModifier {
    match modifier {
        policy::PathModifier::ReplaceFullPath(path) => PathModifier::ReplaceFullPath(path.as_str().into()),
        policy::PathModifier::ReplacePrefixMatch(path) => PathModifier::ReplacePrefixMatch(path.as_str().into()),
    }
}
