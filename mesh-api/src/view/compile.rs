//! From resources to a view: workloads and services joined, then policies laid over them.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::SocketAddr,
    sync::Arc,
};

use super::{
    Backend, BackendKey, ServicePortView, ServiceView, View,
    endpoints::{self, Member, Place, Workloads, endpoints},
    inbound::{InboundCompiler, InboundSet, compile_limits},
    inbound_of_unknown, routes,
    settings::TrafficCompiler,
};
use crate::{
    document::{Document, Resource, ResourceKey, Unreadable},
    identity::{IdentityKind, TrustDomain},
    policy::{
        AccessPolicy, GrpcRoute, HttpRoute, MeshPolicy, RateLimit, ReferenceGrant, ServiceSubset, TcpRoute, TlsRoute,
        TrafficPolicy,
    },
    workload::{ObjectName, Revision, Service, ServicePort, Workload},
};

/// A policy with the name of its document.
pub(super) struct Named<'a, P> {
    pub name: ObjectName,
    /// When it was made, seconds since 1970; 0: unknown.
    pub created: u64,
    pub spec: &'a P,
}

/// The documents that matter here, each kind ordered by `namespace/name`.
#[derive(Default)]
pub(super) struct Policies<'a> {
    pub mesh: Vec<Named<'a, MeshPolicy>>,
    pub traffic: Vec<Named<'a, TrafficPolicy>>,
    pub access: Vec<Named<'a, AccessPolicy>>,
    pub limits: Vec<Named<'a, RateLimit>>,
    pub routes: Vec<Named<'a, HttpRoute>>,
    pub grpc_routes: Vec<Named<'a, GrpcRoute>>,
    pub tcp_routes: Vec<Named<'a, TcpRoute>>,
    pub tls_routes: Vec<Named<'a, TlsRoute>>,
    pub grants: Vec<Named<'a, ReferenceGrant>>,
    /// Guards that cannot be read: they deny.
    pub unreadable: Vec<Named<'a, Unreadable>>,
    pub subsets: Vec<Named<'a, ServiceSubset>>,
}

/// A service's port that a workload serves.
pub(super) struct Served<'a> {
    pub service: &'a Arc<Service>,
    pub port: &'a ServicePort,
    /// The port's number on the workload.
    pub target: u16,
}

/// Backends by key.
pub(super) type Backends = HashMap<BackendKey, Arc<Backend>>;

pub(super) fn compile(
    trust_domain: TrustDomain,
    revision: Revision,
    resources: &[Resource],
    node: Option<&str>,
) -> View {
    // By key, so that the order of the input cannot matter.
    let by_key: BTreeMap<ResourceKey, &Resource> = resources.iter().map(|r| (r.key(), r)).collect();
    let mut workloads: Vec<Arc<Workload>> = Vec::new();
    let mut services: Vec<Arc<Service>> = Vec::new();
    let mut policies = Policies::default();
    for resource in by_key.values() {
        match resource {
            Resource::Workload(workload) => workloads.push(Arc::new(workload.clone())),
            Resource::Service(service) => services.push(Arc::new(service.clone())),
            Resource::Policy(document) => policies.push(document),
        }
    }

    let by_address = Workloads::new(&workloads);
    let selected = endpoints::selected(&services, &workloads);
    let members: Vec<Vec<Member<'_>>> = services
        .iter()
        .zip(&selected)
        .map(|(service, selected)| endpoints::members(&trust_domain, service, selected, &by_address))
        .collect();
    let here = workloads.iter().find(|workload| Some(&*workload.node) == node);
    let place = Place {
        node,
        zone: here.map_or("", |workload| &workload.zone),
    };
    let backends = compile_backends(place, &services, &members, &policies);
    let tables = routes::compile(&policies, &services, &backends);
    let mut view = View {
        trust_domain,
        revision,
        workloads: HashMap::with_capacity(workloads.len()),
        workloads_by_address: by_address.by_address(),
        workloads_by_host: HashMap::new(),
        node_addresses: HashSet::new(),
        workloads_by_node: HashMap::new(),
        services: HashMap::with_capacity(services.len()),
        ports_by_address: HashMap::with_capacity(services.len()),
        services_by_address: HashMap::with_capacity(services.len()),
        ports_by_external_address: HashMap::new(),
        ports_by_node_port: HashMap::new(),
        inbound: compile_inbound(revision, &services, &workloads, &selected, &members, &policies),
        inbound_of_unknown: inbound_of_unknown(revision),
        backends: backends.values().cloned().collect(),
        limits: policies
            .limits
            .iter()
            .flat_map(compile_limits)
            .map(|limit| limit.id)
            .collect(),
    };
    drop((members, by_address));
    for workload in workloads {
        index_workload(&mut view, workload);
    }
    for service in services {
        index_service(&mut view, service, &backends, &tables);
    }
    view
}

impl<'a> Policies<'a> {
    fn push(&mut self, document: &'a Document) {
        let meta = document.meta();
        let name = ObjectName {
            namespace: meta.namespace.clone(),
            name: meta.name.clone(),
        };
        macro_rules! push {
            ($list:ident, $object:ident) => {
                self.$list.push(Named {
                    name,
                    created: meta.created_unix,
                    spec: &$object.spec,
                })
            };
        }
        match document {
            Document::MeshPolicy(object) => push!(mesh, object),
            Document::TrafficPolicy(object) => push!(traffic, object),
            Document::AccessPolicy(object) => push!(access, object),
            Document::RateLimit(object) => push!(limits, object),
            Document::HttpRoute(object) => push!(routes, object),
            Document::GrpcRoute(object) => push!(grpc_routes, object),
            Document::TcpRoute(object) => push!(tcp_routes, object),
            Document::TlsRoute(object) => push!(tls_routes, object),
            Document::ReferenceGrant(object) => push!(grants, object),
            Document::ServiceSubset(object) => push!(subsets, object),
            // Another kind than a guard is not there while it cannot be read.
            Document::Unreadable(object) if object.spec.kind.is_guard() => push!(unreadable, object),
            Document::Unreadable(_) => {}
            // Workloads and services come as such.
            Document::Namespace(_)
            | Document::Node(_)
            | Document::ServiceAccount(_)
            | Document::Pod(_)
            | Document::Service(_)
            | Document::EndpointSlice(_) => {}
        }
    }
}

fn compile_backends(
    place: Place<'_>,
    services: &[Arc<Service>],
    members: &[Vec<Member<'_>>],
    policies: &Policies<'_>,
) -> Backends {
    let mut subsets: HashMap<(&str, &str), Vec<&Named<'_, ServiceSubset>>> = HashMap::new();
    for subset in &policies.subsets {
        subsets
            .entry((&subset.name.namespace, &subset.spec.service))
            .or_default()
            .push(subset);
    }
    let mut traffic = TrafficCompiler::new(&policies.traffic);
    let mut backends = Backends::new();
    for (service, members) in services.iter().zip(members) {
        let subsets = subsets.get(&(&*service.name.namespace, &*service.name.name));
        for port in &service.ports {
            let settings = traffic.settings(service, port);
            let mut add = |subset: Option<&Named<'_, ServiceSubset>>| {
                let labels = subset.map(|subset| &subset.spec.labels);
                let is_in = |member: &&Member<'_>| {
                    labels.is_none_or(|labels| labels.iter().all(|(k, v)| has_label(&member.workload, k, v)))
                };
                let chosen: Vec<&Member<'_>> = members.iter().filter(is_in).collect();
                let key = BackendKey {
                    service: service.name.clone(),
                    port: port.port,
                    subset: subset.map(|subset| subset.name.name.clone()),
                };
                let backend = Backend {
                    key: key.clone(),
                    service: service.clone(),
                    protocol: port.protocol,
                    endpoints_v4: endpoints(place, service, port, &chosen, false),
                    endpoints_v6: endpoints(place, service, port, &chosen, true),
                    traffic: settings.clone(),
                };
                backends.insert(key, Arc::new(backend));
            };
            add(None);
            for subset in subsets.into_iter().flatten() {
                add(Some(subset));
            }
        }
    }
    backends
}

fn has_label(workload: &Workload, key: &str, value: &str) -> bool {
    workload.labels.get(key).is_some_and(|v| **v == *value)
}

fn compile_inbound(
    revision: Revision,
    services: &[Arc<Service>],
    workloads: &[Arc<Workload>],
    selected: &[Vec<Arc<Workload>>],
    members: &[Vec<Member<'_>>],
    policies: &Policies<'_>,
) -> HashMap<ObjectName, InboundSet> {
    let mut served: HashMap<&ObjectName, Vec<Served<'_>>> = HashMap::new();
    for ((service, selected), members) in services.iter().zip(selected).zip(members) {
        for port in &service.ports {
            // Whom the selector picks is guarded by the service's policies before a slice names it.
            for workload in selected {
                if let Some(target) = workload.target_port(&port.target) {
                    add_served(&mut served, &workload.name, Served { service, port, target });
                }
            }
            // A slice may name any address. Policies of a service hold for pods of its own namespace only: whoever may
            // write slices and policies in one namespace has no say about another's pods.
            let own = members
                .iter()
                .filter(|member| member.workload.name.namespace == service.name.namespace)
                .filter(|member| member.workload.identity.kind() == IdentityKind::Workload);
            for member in own {
                if let Some(target) = member.target(port) {
                    add_served(&mut served, &member.workload.name, Served { service, port, target });
                }
            }
        }
    }
    let mut compiler = InboundCompiler::new(revision, policies);
    let mut inbound = HashMap::with_capacity(workloads.len());
    for workload in workloads {
        let served = served.get(&workload.name).map(Vec::as_slice).unwrap_or_default();
        inbound.insert(workload.name.clone(), compiler.workload(workload, served));
    }
    inbound
}

/// Adds it unless it is there: a workload may be picked by the selector and by slices.
fn add_served<'a>(served: &mut HashMap<&'a ObjectName, Vec<Served<'a>>>, workload: &'a ObjectName, one: Served<'a>) {
    let list = served.entry(workload).or_default();
    // What a service adds stands at the list's end.
    let mut own = list
        .iter()
        .rev()
        .take_while(|other| Arc::ptr_eq(other.service, one.service));
    if !own.any(|other| std::ptr::eq(other.port, one.port) && other.target == one.target) {
        list.push(one);
    }
}

fn index_workload(view: &mut View, workload: Arc<Workload>) {
    for address in &workload.node_addresses {
        view.node_addresses.insert(address.to_canonical());
    }
    if workload.enrolled && workload.host_network {
        // What the pod's status calls its addresses are the node's: only if both agree, somebody comes from there.
        for address in &workload.node_addresses {
            let at = view.workloads_by_host.entry(address.to_canonical()).or_default();
            at.push(workload.clone());
        }
    }
    view.workloads_by_node
        .entry(workload.node.clone())
        .or_default()
        .push(workload.clone());
    view.workloads.insert(workload.name.clone(), workload);
}

fn index_service(view: &mut View, service: Arc<Service>, backends: &Backends, tables: &routes::Tables) {
    let mut ports = Vec::with_capacity(service.ports.len());
    for port in &service.ports {
        let key = BackendKey {
            service: service.name.clone(),
            port: port.port,
            subset: None,
        };
        let Some(backend) = backends.get(&key) else {
            continue;
        };
        let port_view = Arc::new(ServicePortView {
            service: service.clone(),
            port: port.clone(),
            routes: tables.requests.get(&key).cloned(),
            flows: tables.flows.get(&key).cloned(),
            backend: backend.clone(),
        });
        for address in &service.addresses {
            let address = SocketAddr::new(address.to_canonical(), port.port);
            view.ports_by_address
                .entry(address)
                .or_insert_with(|| port_view.clone());
        }
        for address in &service.external_addresses {
            let address = SocketAddr::new(address.to_canonical(), port.port);
            view.ports_by_external_address
                .entry(address)
                .or_insert_with(|| port_view.clone());
        }
        if let Some(number) = port.node_port {
            view.ports_by_node_port
                .entry(number)
                .or_insert_with(|| port_view.clone());
        }
        ports.push(port_view);
    }
    for address in &service.addresses {
        view.services_by_address
            .entry(address.to_canonical())
            .or_insert_with(|| service.clone());
    }
    let name = service.name.clone();
    view.services.insert(name, Arc::new(ServiceView { service, ports }));
}
