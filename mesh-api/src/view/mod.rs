//! The view: one immutable revision of workloads, services and policy, with everything decided that can be before
//! traffic comes.
//!
//! An agent holds one behind a pointer and replaces it whole; a connection or request loads the pointer once, so that
//! no decision ever mixes two revisions. Lookups are one hash each; what they hand out is shared, never copied.
//! Compiling is total: there is no view that fails to come about. What a policy names and is not there refuses where
//! it matters (a missing backend's share gets 500, a missing workload is denied), and never lets something pass.
//!
//! Where several policies apply, the most specific target wins, field by field, for MeshPolicy and TrafficPolicy: a
//! port of a service or of selected workloads, then the service or the workloads, the namespace, the mesh. Between
//! equals the stricter mutual TLS mode holds, else the policy whose `namespace/name` comes first. AccessPolicies and
//! RateLimits add up.

mod attach;
mod compile;
mod compiler;
mod direct;
mod endpoints;
pub(crate) mod grants;
mod inbound;
pub(crate) mod routes;
mod settings;

use std::{
    collections::HashSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

pub use self::compiler::ViewCompiler;
pub use self::direct::{DIRECT_ENDPOINTS_MAX, DirectDestination, NotDirect};
use self::inbound::InboundSet;
use crate::{
    authz::AccessRules,
    document::Resource,
    identity::{SpiffeId, TrustDomain},
    policy::MtlsMode,
    route::{FlowTable, RouteTable, RuleId},
    shared_map::SharedMap,
    workload::{AppProtocol, Endpoint, ObjectName, Revision, Service, ServicePort, Workload},
};
pub use crate::{
    authz::InboundPolicy,
    backend::{Backend, BackendKey},
};

/// One revision of what the mesh knows.
#[derive(Clone, Debug)]
pub struct View {
    trust_domain: TrustDomain,
    revision: Revision,
    workloads: SharedMap<ObjectName, Arc<Workload>>,
    workloads_by_address: SharedMap<IpAddr, Arc<Workload>>,
    /// Enrolled workloads with their node's network, by the node's addresses.
    workloads_by_host: SharedMap<IpAddr, Arc<Vec<Arc<Workload>>>>,
    workloads_by_node: SharedMap<Arc<str>, Arc<Vec<Arc<Workload>>>>,
    services: SharedMap<ObjectName, Arc<ServiceView>>,
    ports_by_address: SharedMap<SocketAddr, Arc<ServicePortView>>,
    services_by_address: SharedMap<IpAddr, Arc<Service>>,
    ports_by_external_address: SharedMap<SocketAddr, Arc<ServicePortView>>,
    ports_by_node_port: SharedMap<u16, Arc<ServicePortView>>,
    /// Of every node that a workload runs on.
    node_addresses: Arc<HashSet<IpAddr>>,
    inbound: SharedMap<ObjectName, Arc<InboundSet>>,
    inbound_of_unknown: InboundPolicy,
    backends: SharedMap<BackendKey, Arc<Backend>>,
    limits: Arc<HashSet<RuleId>>,
}

/// What an original destination is.
#[derive(Clone, Debug)]
pub enum Destination {
    /// A port of a service: of one of its addresses, or its port on a node. Routes and balancing apply.
    ServicePort(Arc<ServicePortView>),
    /// A workload's own address: no route touches it.
    Workload(Endpoint),
    /// A service's address, at a port that the service does not have: nobody can answer there.
    NoPort(Arc<Service>),
    /// Nothing that the mesh knows.
    Outside,
}

/// A service and its ports.
#[derive(Clone, Debug)]
pub struct ServiceView {
    /// The service.
    pub service: Arc<Service>,
    /// Its ports, in the service's order.
    pub ports: Vec<Arc<ServicePortView>>,
}

/// One port of a service.
#[derive(Clone, Debug)]
pub struct ServicePortView {
    /// The service.
    pub service: Arc<Service>,
    /// The port.
    pub port: ServicePort,
    /// Its routes; `None`: all requests go to `backend`.
    pub routes: Option<Arc<RouteTable>>,
    /// Its routes for connections that carry no requests; `None`: all of these go to `backend`.
    pub flows: Option<Arc<FlowTable>>,
    /// The service itself, for opaque flows and where no route says otherwise.
    pub backend: Arc<Backend>,
}

impl View {
    /// The view before anything is known: revision 0, and every destination is outside.
    pub fn empty(trust_domain: TrustDomain) -> View {
        View::compile(trust_domain, Revision::default(), &[])
    }

    /// The view of these resources; of two with one key the later counts. It is nobody's in particular: services have
    /// all their endpoints.
    pub fn compile(trust_domain: TrustDomain, revision: Revision, resources: &[Resource]) -> View {
        compile_slice(None, trust_domain, revision, resources)
    }

    /// The view as the sources on that node see it: services that are node-local, or whose endpoints are meant for zones
    /// or nodes, have the endpoints that they have there.
    pub fn compile_on(node: &str, trust_domain: TrustDomain, revision: Revision, resources: &[Resource]) -> View {
        compile_slice(Some(node), trust_domain, revision, resources)
    }

    /// The mesh's trust domain.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The view's revision.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// The workload that has this address as its own. A node's address is nobody's: pods with their node's network share
    /// it, so that no identity follows from it alone; see [`View::source`].
    pub fn workload_by_address(&self, ip: IpAddr) -> Option<&Arc<Workload>> {
        self.workloads_by_address.get(&ip.to_canonical())
    }

    /// Who comes from this address and has proven that identity: the workload whose own address it is, or an enrolled one
    /// with the network of the node whose address it is.
    pub fn source(&self, ip: IpAddr, identity: &SpiffeId) -> Option<&Arc<Workload>> {
        let ip = ip.to_canonical();
        let hosted = self.workloads_by_host.get(&ip);
        let own = self.workloads_by_address.get(&ip);
        own.into_iter()
            .chain(hosted.into_iter().flat_map(|list| list.iter()))
            .find(|workload| workload.identity == *identity)
    }

    /// Whether anybody who is known comes from this address.
    pub fn has_sources_at(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        self.workloads_by_address.contains_key(&ip) || self.workloads_by_host.contains_key(&ip)
    }

    /// The workload of that name.
    pub fn workload(&self, name: &ObjectName) -> Option<&Arc<Workload>> {
        self.workloads.get(name)
    }

    /// All workloads, in no order.
    pub fn workloads(&self) -> impl ExactSizeIterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    /// The workloads of a node, ordered by name.
    pub fn workloads_on(&self, node: &str) -> impl ExactSizeIterator<Item = &Arc<Workload>> {
        let list = self.workloads_by_node.get(node);
        list.map(|list| list.as_slice()).unwrap_or_default().iter()
    }

    /// The service of that name.
    pub fn service(&self, name: &ObjectName) -> Option<&Arc<ServiceView>> {
        self.services.get(name)
    }

    /// All services, in no order.
    pub fn services(&self) -> impl ExactSizeIterator<Item = &Arc<ServiceView>> {
        self.services.values()
    }

    /// A backend that a request can be sent to: whose state an agent may keep.
    pub fn backend(&self, key: &BackendKey) -> Option<&Arc<Backend>> {
        self.backends.get(key)
    }

    /// Whether there is such a limit: whose buckets an agent may keep.
    pub fn has_limit(&self, id: &RuleId) -> bool {
        self.limits.contains(id)
    }

    /// What an original destination is.
    pub fn destination(&self, address: SocketAddr) -> Destination {
        let ip = address.ip().to_canonical();
        let address = SocketAddr::new(ip, address.port());
        if let Some(port) = self.ports_by_address.get(&address) {
            Destination::ServicePort(port.clone())
        } else if let Some(workload) = self.workloads_by_address.get(&ip) {
            Destination::Workload(Endpoint {
                workload: workload.clone(),
                address,
            })
        } else if let Some(service) = self.services_by_address.get(&ip) {
            Destination::NoPort(service.clone())
        } else if let Some(port) = self.ports_by_external_address.get(&address) {
            // After the cluster's own addresses: a service may claim any address as an external one.
            Destination::ServicePort(port.clone())
        } else if self.node_addresses.contains(&ip)
            && let Some(port) = self.ports_by_node_port.get(&address.port())
        {
            Destination::ServicePort(port.clone())
        } else {
            Destination::Outside
        }
    }

    /// What holds for connections to that port of that workload. For one that the view does not know everything is
    /// denied.
    pub fn inbound(&self, workload: &ObjectName, port: u16) -> InboundPolicy {
        let mut policy = match self.inbound.get(workload) {
            Some(set) => set.at(port).clone(),
            None => self.inbound_of_unknown.clone(),
        };
        policy.port = port;
        policy.revision = self.revision;
        policy
    }
}

impl ServicePortView {
    /// What connections from that namespace are taken for. Where the port's only routes are for connections, these
    /// decide, whatever the port declares: requests in them are not looked at.
    pub fn protocol_for(&self, source_namespace: &str) -> AppProtocol {
        let routed = |table: &Arc<FlowTable>| table.has_routes_for(source_namespace);
        let requests = self
            .routes
            .as_ref()
            .is_some_and(|table| table.has_routes_for(source_namespace));
        if !requests && self.flows.as_ref().is_some_and(routed) {
            AppProtocol::Tcp
        } else {
            self.port.protocol
        }
    }
}

impl ServiceView {
    /// The port of that number.
    pub fn port(&self, port: u16) -> Option<&Arc<ServicePortView>> {
        self.ports.iter().find(|view| view.port.port == port)
    }
}

fn compile_slice(node: Option<&str>, trust_domain: TrustDomain, revision: Revision, resources: &[Resource]) -> View {
    // Of two with one key the later counts.
    let by_key: SharedMap<_, _> = resources.iter().map(|resource| (resource.key(), resource)).collect();
    compile::compile(trust_domain, revision, by_key.values().copied(), node).0
}

/// What holds at a destination that the view does not know: nothing is let in.
fn inbound_of_unknown() -> InboundPolicy {
    InboundPolicy {
        revision: Revision::default(),
        port: 0,
        mtls: MtlsMode::Strict,
        access: Arc::new(AccessRules::unknown_workload()),
        limits: Arc::default(),
        protocol: AppProtocol::Detect,
        services: Arc::default(),
        direct: false,
    }
}
