//! What a route or policy is to be told about itself: conditions, as the Gateway API has them.
//!
//! Pure: a set of documents in, statuses out. `Accepted` and `ResolvedRefs` follow from the documents alone. Whether
//! agents hold a document (`Programmed`) only the controller knows: [`DocumentStatus::nodes`] says whose answer counts,
//! and [`Condition::programmed`] is the third condition. Nothing here decides traffic; what is told must be what the view
//! does, which the tests compare.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use crate::{
    document::{Document, DocumentKey, DocumentSet, Kind, ServiceSpec, Unreadable},
    policy::{BackendKind, BackendTarget, HostMatch, ParentRef, TargetRef, http_route_reader::INCOMPATIBLE_FILTERS},
    view::{grants::Grants, routes::can_send_to},
    workload::AppProtocol,
};

/// One condition of a status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// `Accepted`, `ResolvedRefs` or `Programmed`.
    pub kind: &'static str,
    /// Whether it is so.
    pub holds: bool,
    /// One word: why.
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

/// What a route is told of one of its parents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParentStatus {
    /// The parent, as the route names it.
    pub parent: ParentRef,
    /// `Accepted` and `ResolvedRefs`.
    pub conditions: Vec<Condition>,
}

/// The status of one document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DocumentStatus {
    /// The document.
    pub key: DocumentKey,
    /// The generation that this is about.
    pub generation: u64,
    /// For a route: its parents that are Services, in the route's order. Other parents are other controllers'.
    pub parents: Vec<ParentStatus>,
    /// For one of our kinds: `Accepted` and `ResolvedRefs`.
    pub conditions: Vec<Condition>,
    /// The nodes that need the document: those with captured workloads that it touches. It is programmed when all of
    /// their agents hold it, so at once when there are none.
    pub nodes: Arc<BTreeSet<Arc<str>>>,
}

/// The document is taken into account.
pub const ACCEPTED: &str = "Accepted";
/// What it names exists, and may be named.
pub const RESOLVED_REFS: &str = "ResolvedRefs";
/// The agents that need it hold it.
pub const PROGRAMMED: &str = "Programmed";

impl Condition {
    fn new(kind: &'static str, holds: bool, reason: &'static str, message: impl Into<String>) -> Condition {
        Condition {
            kind,
            holds,
            reason,
            message: message.into(),
        }
    }

    fn accepted() -> Condition {
        Condition::new(ACCEPTED, true, ACCEPTED, "it is taken into account")
    }

    fn refused(reason: &'static str, message: impl Into<String>) -> Condition {
        Condition::new(ACCEPTED, false, reason, message)
    }

    fn resolved() -> Condition {
        Condition::new(RESOLVED_REFS, true, RESOLVED_REFS, "everything that it names is there")
    }

    fn unresolved(reason: &'static str, message: impl Into<String>) -> Condition {
        Condition::new(RESOLVED_REFS, false, reason, message)
    }

    /// Whether agents hold an accepted document: `reason` is `Programmed`, `Pending` or `Refused`.
    pub fn programmed(holds: bool, reason: &'static str, message: String) -> Condition {
        Condition::new(PROGRAMMED, holds, reason, message)
    }
}

impl DocumentStatus {
    /// Whether some parent, or the policy itself, is accepted.
    pub fn is_accepted(&self) -> bool {
        let all = self.parents.iter().flat_map(|parent| &parent.conditions);
        let mut all = all.chain(&self.conditions);
        all.any(|condition| condition.kind == ACCEPTED && condition.holds)
    }
}

/// The status of every route and of every policy and subset of ours, ordered by key. A ReferenceGrant has none.
pub fn statuses(set: &DocumentSet) -> Vec<DocumentStatus> {
    let known = Known::new(set);
    let policies = set.iter().filter(|document| document.kind().is_policy());
    policies
        .filter(|document| document.kind() != Kind::ReferenceGrant)
        .map(|document| known.status(document))
        .collect()
}

/// A namespace and a name.
type Name<'a> = (&'a str, &'a str);

/// A port of a service, and the namespace whose sources a route there is for; empty: all that have none of their own.
type Place<'a> = (Name<'a>, u16, &'a str);

/// What a route for connections takes at a place.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Takes<'a> {
    /// A TCPRoute: each.
    Any,
    /// A TLSRoute without names: each that begins with a ClientHello.
    AnyName,
    /// A TLSRoute: those that ask for this name,
    Name(&'a str),
    /// or for one that ends so.
    End(&'a str),
}

struct Known<'a> {
    set: &'a DocumentSet,
    grants: Grants<'a>,
    /// The oldest route for what connections there are at each place.
    flows: HashMap<(Place<'a>, Takes<'a>), &'a Document>,
    /// The places that have routes for requests.
    requests: HashSet<Place<'a>>,
    /// The captured workloads' pods by namespace.
    pods: BTreeMap<&'a str, Vec<Captured<'a>>>,
    everywhere: Arc<BTreeSet<Arc<str>>>,
}

/// A pod that an agent captures.
struct Captured<'a> {
    labels: &'a BTreeMap<String, String>,
    node: &'a str,
}

impl<'a> Known<'a> {
    fn new(set: &'a DocumentSet) -> Known<'a> {
        let grants = set.of_kind(Kind::ReferenceGrant).filter_map(|document| match document {
            Document::ReferenceGrant(grant) => Some((&*grant.meta.namespace, &grant.spec)),
            _ => None,
        });
        let mut pods: BTreeMap<&str, Vec<Captured<'_>>> = BTreeMap::new();
        for document in set.of_kind(Kind::Pod) {
            if let Document::Pod(pod) = document
                && let Some(node) = pod.spec.node.as_deref()
                && !pod.spec.finished
                && set.enrols(pod)
            {
                let labels = &pod.meta.labels;
                pods.entry(&pod.meta.namespace)
                    .or_default()
                    .push(Captured { labels, node });
            }
        }
        let everywhere = pods.values().flatten().map(|pod| Arc::from(pod.node)).collect();
        let mut known = Known {
            set,
            grants: Grants::new(grants),
            flows: HashMap::new(),
            requests: HashSet::new(),
            pods,
            everywhere: Arc::new(everywhere),
        };
        let routes = set.iter().filter(|document| document.kind().is_route());
        for route in routes.filter_map(held) {
            known.add_route(route);
        }
        known
    }

    fn add_route(&mut self, route: &'a Document) {
        let age = |route: &'a Document| (route.meta().created_unix, &route.meta().namespace, &route.meta().name);
        for parent in route.parent_refs().iter().filter(|parent| parent.is_service()) {
            let Ok((service, ports)) = self.parent_ports(route, parent) else {
                continue;
            };
            for port in ports {
                let place = (service, port, sources_of(route, service.0));
                if speaks_of_requests(route) {
                    self.requests.insert(place);
                }
                for takes in takes(route) {
                    let oldest = self.flows.entry((place, takes)).or_insert(route);
                    if age(route) < age(oldest) {
                        *oldest = route;
                    }
                }
            }
        }
    }

    fn service(&self, (namespace, name): Name<'_>) -> Option<&'a ServiceSpec> {
        match self.set.get(&DocumentKey::new(Kind::Service, namespace, name)) {
            Some(Document::Service(object)) => Some(&object.spec),
            _ => None,
        }
    }

    /// The service that a parent is and the ports that are meant, or why there are none.
    fn parent_ports(&self, route: &'a Document, parent: &'a ParentRef) -> Result<(Name<'a>, Vec<u16>), Condition> {
        let none = |message: String| Condition::refused("NoMatchingParent", message);
        let namespace = parent.namespace.as_deref().unwrap_or(&route.meta().namespace);
        let service = (namespace, parent.name.as_str());
        let Some(spec) = self.service(service) else {
            return Err(none(format!("there is no Service {namespace}/{}", parent.name)));
        };
        let means = |number: u16, name: &str| {
            parent.port.is_none_or(|wanted| wanted == number)
                && parent.section_name.as_deref().is_none_or(|wanted| wanted == name)
        };
        let ports = spec.ports.iter().filter(|port| means(port.port, &port.name));
        let ports: Vec<u16> = ports.map(|port| port.port).collect();
        if ports.is_empty() {
            let wanted = match (parent.port, parent.section_name.as_deref()) {
                (Some(port), Some(name)) => format!("port {port} with the name {name:?}"),
                (Some(port), None) => format!("port {port}"),
                (None, Some(name)) => format!("port {name:?}"),
                (None, None) => "TCP port".to_owned(),
            };
            return Err(none(format!("Service {namespace}/{} has no {wanted}", parent.name)));
        }
        if spec.headless || spec.external_name.is_some() {
            let message = format!(
                "Service {namespace}/{} has no address: connections go to pods or elsewhere, and no route touches them",
                parent.name
            );
            return Err(Condition::refused("UnsupportedValue", message));
        }
        Ok((service, ports))
    }

    fn status(&self, document: &'a Document) -> DocumentStatus {
        let is_route = document.kind().is_route();
        let parents = document.parent_refs().iter().filter(|parent| parent.is_service());
        let resolved = match document {
            Document::Unreadable(_) => None,
            _ if is_route => Some(self.backends(document)),
            _ => None,
        };
        let of_parent = |parent: &'a ParentRef| ParentStatus {
            parent: parent.clone(),
            conditions: std::iter::once(self.parent(document, parent))
                .chain(resolved.clone())
                .collect(),
        };
        DocumentStatus {
            key: document.key(),
            generation: document.meta().generation,
            parents: parents.filter(|_| is_route).map(of_parent).collect(),
            conditions: if is_route { Vec::new() } else { self.policy(document) },
            nodes: self.nodes(document),
        }
    }

    /// `Accepted` of a route at a parent.
    fn parent(&self, route: &'a Document, parent: &'a ParentRef) -> Condition {
        if let Document::Unreadable(object) = route {
            return unreadable(&object.spec);
        }
        let (service, ports) = match self.parent_ports(route, parent) {
            Ok(found) => found,
            Err(condition) => return condition,
        };
        // One port at which it counts is enough.
        let mut idle = ports.into_iter().map(|port| self.idle(route, service, port));
        let first = idle.next().flatten();
        match first {
            Some(why) if idle.all(|why| why.is_some()) => why,
            _ => Condition::accepted(),
        }
    }

    /// Why a route never counts at a port that it is attached to.
    fn idle(&self, route: &'a Document, service: Name<'a>, port: u16) -> Option<Condition> {
        let place = (service, port, sources_of(route, service.0));
        let (namespace, name) = service;
        let spec = self.service(service)?;
        let speaks = spec.ports.iter().find(|spec| spec.port == port)?.protocol;
        let opaque = matches!(speaks, AppProtocol::Tcp | AppProtocol::Tls);
        if matches!(route.kind(), Kind::HttpRoute | Kind::GrpcRoute) {
            let message = || {
                format!(
                    "Service {namespace}/{name} port {port} speaks {}: requests are not looked at there",
                    speaks.words()
                )
            };
            return opaque.then(|| Condition::refused("UnsupportedProtocol", message()));
        }
        // Where requests are routed, a port that is known to speak HTTP has no other connections.
        let declared = !opaque && speaks != AppProtocol::Detect;
        let everybody = (service, port, "");
        if declared && (self.requests.contains(&place) || self.requests.contains(&everybody)) {
            let message = format!(
                "Service {namespace}/{name} port {port} speaks {} and has routes for requests: they come first",
                speaks.words()
            );
            return Some(Condition::refused("Conflicted", message));
        }
        // Of two that take the same connections the younger one never counts.
        let mut holders = takes(route)
            .into_iter()
            .filter_map(|takes| self.flows.get(&(place, takes)));
        let first = holders.next()?;
        let key = route.key();
        if first.key() == key || holders.any(|holder| holder.key() == key) {
            return None;
        }
        let message = format!("{} takes the connections there, and is older", first.key());
        Some(Condition::refused("Conflicted", message))
    }

    /// `ResolvedRefs` of a route: the first thing that is wrong, and how many more.
    fn backends(&self, route: &Document) -> Condition {
        let mut wrong = route
            .backends()
            .into_iter()
            .filter_map(|(path, backend)| Some((path, self.backend(route, backend)?)));
        let Some((path, (reason, message))) = wrong.next() else {
            return Condition::resolved();
        };
        let more = match wrong.count() {
            0 => String::new(),
            more => format!("; {more} more"),
        };
        Condition::unresolved(reason, format!("{path}: {message}{more}"))
    }

    fn backend(&self, route: &Document, backend: &BackendTarget) -> Option<(&'static str, String)> {
        let own = &*route.meta().namespace;
        let namespace = backend.namespace.as_deref().unwrap_or(own);
        let (kind, name) = (backend.kind.as_str(), backend.name.as_str());
        if let BackendKind::Other { .. } = backend.kind {
            let message = format!(
                "the mesh cannot send to a {}, only to Services and ServiceSubsets",
                backend.kind
            );
            return Some(("InvalidKind", message));
        }
        // Asked first: whether something exists in another namespace is not told to those who may not name it.
        if backend.needs_grant(own, route.parent_refs())
            && !self.grants.permits(route.kind(), own, &backend.kind, namespace, name)
        {
            let message = format!("no ReferenceGrant in namespace {namespace} lets it name {kind} {namespace}/{name}");
            return Some(("RefNotPermitted", message));
        }
        let missing = |what: String| Some(("BackendNotFound", what));
        let service = match backend.kind {
            BackendKind::Service | BackendKind::Other { .. } => name.to_owned(),
            BackendKind::ServiceSubset => {
                let subset = self.set.get(&DocumentKey::new(Kind::ServiceSubset, namespace, name));
                match subset.and_then(Document::holding).as_deref() {
                    Some(Document::ServiceSubset(subset)) => subset.spec.service.clone(),
                    _ => return missing(format!("there is no ServiceSubset {namespace}/{name}")),
                }
            }
        };
        let Some(spec) = self.service((namespace, &service)) else {
            return missing(format!("there is no Service {namespace}/{service}"));
        };
        if spec.external_name.is_some() {
            return missing(format!(
                "Service {namespace}/{service} is a name in DNS and has no endpoints"
            ));
        }
        let Some(port) = spec.ports.iter().find(|port| port.port == backend.port) else {
            return missing(format!("Service {namespace}/{service} has no port {}", backend.port));
        };
        let message = || {
            format!(
                "Service {namespace}/{service} port {} speaks {}, which a {} cannot send",
                port.port,
                port.protocol.words(),
                route.kind()
            )
        };
        (!can_send_to(route.kind(), port.protocol)).then(|| ("UnsupportedProtocol", message()))
    }

    /// The conditions of one of our kinds.
    fn policy(&self, document: &Document) -> Vec<Condition> {
        if let Document::Unreadable(object) = document {
            return vec![unreadable(&object.spec)];
        }
        if let Document::ServiceSubset(subset) = document {
            let namespace = &*subset.meta.namespace;
            let resolved = match self.service((namespace, &subset.spec.service)) {
                Some(_) => Condition::resolved(),
                None => {
                    let message = format!("there is no Service {namespace}/{}", subset.spec.service);
                    Condition::unresolved("TargetNotFound", message)
                }
            };
            return vec![Condition::accepted(), resolved];
        }
        let targets = document.target_refs();
        let missing: Vec<String> = targets.iter().filter_map(|target| self.missing(target)).collect();
        let Some(first) = missing.first() else {
            return vec![Condition::accepted(), Condition::resolved()];
        };
        let accepted = match missing.len() == targets.len() {
            true => Condition::refused("TargetNotFound", first.clone()),
            false => Condition::accepted(),
        };
        vec![accepted, Condition::unresolved("TargetNotFound", missing.join("; "))]
    }

    /// Why a target is not there. Labels need not be anybody's yet.
    fn missing(&self, target: &TargetRef) -> Option<String> {
        match target {
            TargetRef::Mesh | TargetRef::Workloads { .. } => None,
            TargetRef::Namespace { name } => {
                let there = self.set.get(&DocumentKey::new(Kind::Namespace, "", name)).is_some();
                (!there).then(|| format!("there is no Namespace {name}"))
            }
            TargetRef::Service { namespace, name, port } => {
                let Some(spec) = self.service((namespace, name)) else {
                    return Some(format!("there is no Service {namespace}/{name}"));
                };
                let port = port.as_ref()?;
                let there = spec.ports.iter().any(|one| port.is(&one.name, one.port));
                (!there).then(|| format!("Service {namespace}/{name} has no port {port}"))
            }
        }
    }

    /// Whose agents must hold it.
    fn nodes(&self, document: &Document) -> Arc<BTreeSet<Arc<str>>> {
        let here = |nodes: BTreeSet<&str>| Arc::new(nodes.into_iter().map(Arc::from).collect());
        match document.kind() {
            // Judged where the destination is.
            Kind::AccessPolicy | Kind::RateLimit => {
                let mut nodes = BTreeSet::new();
                for target in document.target_refs() {
                    match target {
                        TargetRef::Mesh => return Arc::clone(&self.everywhere),
                        TargetRef::Namespace { name } => nodes.extend(self.nodes_of(name, |_| true)),
                        TargetRef::Workloads { namespace, labels, .. } => {
                            nodes.extend(self.nodes_of(namespace, |pod| has_all(pod.labels, labels)));
                        }
                        TargetRef::Service { namespace, name, .. } => {
                            let selector = self.service((namespace, name)).map(|spec| &spec.selector);
                            // Slices may name any pod of the namespace where there is no selector.
                            let selector = selector.filter(|selector| !selector.is_empty());
                            let picks = |pod: &Captured<'_>| selector.is_none_or(|s| has_all(pod.labels, s));
                            nodes.extend(self.nodes_of(namespace, picks));
                        }
                    }
                }
                here(nodes)
            }
            // Judged where the source is: a consumer route speaks to the sources of its own namespace only.
            kind if kind.is_route() => {
                let own = &*document.meta().namespace;
                let parents = || document.parent_refs().iter().filter(|parent| parent.is_service());
                let elsewhere = |parent: &ParentRef| parent.namespace.as_deref().is_some_and(|ns| ns != own);
                if parents().next().is_some() && parents().all(elsewhere) {
                    return here(self.nodes_of(own, |_| true).collect());
                }
                Arc::clone(&self.everywhere)
            }
            _ => Arc::clone(&self.everywhere),
        }
    }

    fn nodes_of(&self, namespace: &str, wanted: impl Fn(&Captured<'_>) -> bool) -> impl Iterator<Item = &'a str> {
        let pods = self.pods.get(namespace).into_iter().flatten();
        pods.filter(move |pod| wanted(pod)).map(|pod| pod.node)
    }
}

/// What holds of a route: itself, or the last version of it that could be read.
fn held(route: &Document) -> Option<&Document> {
    match route {
        Document::Unreadable(object) => object.spec.last.as_deref(),
        route => Some(route),
    }
}

fn speaks_of_requests(route: &Document) -> bool {
    match route {
        Document::HttpRoute(route) => !route.spec.rules.is_empty(),
        Document::GrpcRoute(route) => !route.spec.rules.is_empty(),
        _ => false,
    }
}

/// What a route for connections takes; nothing, if it is one for requests.
fn takes(route: &Document) -> Vec<Takes<'_>> {
    match route {
        Document::TcpRoute(_) => vec![Takes::Any],
        Document::TlsRoute(route) if route.spec.hostnames.is_empty() => vec![Takes::AnyName],
        Document::TlsRoute(route) => {
            let names = route.spec.hostnames.iter();
            let taken = names.map(|name| match name {
                HostMatch::Exact(name) => Takes::Name(name),
                HostMatch::Suffix(end) => Takes::End(end),
            });
            taken.collect()
        }
        _ => Vec::new(),
    }
}

/// The namespace whose sources a route is for; empty for the producer's, which is for all that have none of their own.
fn sources_of<'a>(route: &'a Document, service_namespace: &str) -> &'a str {
    let own = &*route.meta().namespace;
    if own == service_namespace { "" } else { own }
}

fn has_all(labels: &BTreeMap<String, String>, wanted: &BTreeMap<String, String>) -> bool {
    wanted.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// `Accepted` of what cannot be read.
fn unreadable(spec: &Unreadable) -> Condition {
    let what = spec.what_holds();
    let all = |says: &dyn Fn(&str) -> bool| {
        !spec.problems.is_empty() && spec.problems.iter().all(|problem| says(&problem.message))
    };
    // A route's fields and values are the Gateway API's, whose later versions have more of them.
    let unknown = |message: &str| {
        message.ends_with("is not supported yet")
            || (spec.kind.is_route() && (message.ends_with("is not known") || message == "unknown field"))
    };
    let reason = if all(&|message| message == INCOMPATIBLE_FILTERS) {
        "IncompatibleFilters"
    } else if all(&unknown) {
        "UnsupportedValue"
    } else {
        "Invalid"
    };
    Condition::refused(reason, format!("{}; {what}", spec.why()))
}
