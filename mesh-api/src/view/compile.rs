//! From resources to a view: workloads and services joined, then policies laid over them.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::Arc,
};

use super::{
    Backend, BackendKey, ServicePortView, ServiceView, View,
    inbound::{InboundCompiler, InboundSet, compile_limits},
    inbound_of_unknown, routes,
    settings::TrafficCompiler,
};
use crate::{
    document::{Document, Resource, ResourceKey, Unreadable},
    identity::TrustDomain,
    policy::{
        AccessPolicy, GrpcRoute, HttpRoute, MeshPolicy, RateLimit, ReferenceGrant, ServiceSubset, TcpRoute, TlsRoute,
        TrafficPolicy,
    },
    workload::{Endpoint, ObjectName, Revision, Service, ServicePort, Workload},
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
    _node: Option<&str>,
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

    let members = members_of(&services, &workloads);
    let backends = compile_backends(&services, &members, &policies);
    let tables = routes::compile(&policies, &services, &backends);
    let mut view = View {
        trust_domain,
        revision,
        workloads: HashMap::with_capacity(workloads.len()),
        workloads_by_address: HashMap::with_capacity(workloads.len()),
        workloads_by_node: HashMap::new(),
        services: HashMap::with_capacity(services.len()),
        ports_by_address: HashMap::with_capacity(services.len()),
        services_by_address: HashMap::with_capacity(services.len()),
        inbound: compile_inbound(revision, &services, &workloads, &members, &policies),
        inbound_of_unknown: inbound_of_unknown(revision),
        backends: backends.values().cloned().collect(),
        limits: policies
            .limits
            .iter()
            .flat_map(compile_limits)
            .map(|limit| limit.id)
            .collect(),
    };
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

/// For each service the workloads that its selector picks, in order of their names. Goes through the workloads that
/// have the selector's rarest label only, so that many services in one namespace stay cheap.
fn members_of(services: &[Arc<Service>], workloads: &[Arc<Workload>]) -> Vec<Vec<Arc<Workload>>> {
    let mut by_label: HashMap<(&str, &str, &str), Vec<&Arc<Workload>>> = HashMap::new();
    for workload in workloads {
        for (key, value) in &workload.labels {
            by_label
                .entry((&workload.name.namespace, key, value))
                .or_default()
                .push(workload);
        }
    }
    let members = |service: &Arc<Service>| {
        let namespace = &*service.name.namespace;
        let lists = service
            .selector
            .iter()
            .map(|(key, value)| by_label.get(&(namespace, &**key, &**value)));
        let rarest = lists.min_by_key(|list| list.map_or(0, Vec::len));
        let candidates = rarest.flatten().into_iter().flatten();
        candidates
            .filter(|workload| service.selects(workload))
            .map(|workload| Arc::clone(workload))
            .collect()
    };
    services.iter().map(members).collect()
}

fn compile_backends(services: &[Arc<Service>], members: &[Vec<Arc<Workload>>], policies: &Policies<'_>) -> Backends {
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
                let is_in = |workload: &&Arc<Workload>| {
                    labels.is_none_or(|labels| labels.iter().all(|(k, v)| has_label(workload, k, v)))
                };
                let chosen: Vec<&Arc<Workload>> = members.iter().filter(is_in).collect();
                let key = BackendKey {
                    service: service.name.clone(),
                    port: port.port,
                    subset: subset.map(|subset| subset.name.name.clone()),
                };
                let backend = Backend {
                    key: key.clone(),
                    service: service.clone(),
                    protocol: port.protocol,
                    endpoints_v4: endpoints(service, port, &chosen, false),
                    endpoints_v6: endpoints(service, port, &chosen, true),
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

fn endpoints(service: &Service, port: &ServicePort, members: &[&Arc<Workload>], ipv6: bool) -> Vec<Endpoint> {
    let serving = members
        .iter()
        .filter(|workload| workload.ready || service.publish_not_ready);
    serving
        .filter_map(|workload| {
            let ip = workload.address(ipv6)?;
            let target = workload.target_port(&port.target)?;
            Some(Endpoint {
                workload: Arc::clone(workload),
                address: SocketAddr::new(ip, target),
            })
        })
        .collect()
}

fn compile_inbound(
    revision: Revision,
    services: &[Arc<Service>],
    workloads: &[Arc<Workload>],
    members: &[Vec<Arc<Workload>>],
    policies: &Policies<'_>,
) -> HashMap<ObjectName, InboundSet> {
    let mut served: HashMap<&ObjectName, Vec<Served<'_>>> = HashMap::new();
    for (service, members) in services.iter().zip(members) {
        for workload in members {
            let list = served.entry(&workload.name).or_default();
            for port in &service.ports {
                if let Some(target) = workload.target_port(&port.target) {
                    list.push(Served { service, port, target });
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

fn index_workload(view: &mut View, workload: Arc<Workload>) {
    for address in &workload.addresses {
        let address = address.to_canonical();
        // Two workloads may claim an address while one replaces the other: the enrolled one has it, then the ready
        // one, then the first by name.
        let rank = |workload: &Workload| (workload.enrolled, workload.ready);
        let held = view
            .workloads_by_address
            .get(&address)
            .is_some_and(|holder| rank(holder) >= rank(&workload));
        if !held {
            view.workloads_by_address.insert(address, workload.clone());
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
            routes: tables.get(&key).cloned(),
            backend: backend.clone(),
        });
        for address in &service.addresses {
            let address = SocketAddr::new(address.to_canonical(), port.port);
            view.ports_by_address
                .entry(address)
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
