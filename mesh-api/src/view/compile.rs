//! From resources to a view: workloads and services joined, then policies laid over them.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    hash::Hash,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::{
    Backend, BackendKey, ServicePortView, ServiceView, View,
    endpoints::{self, Member, Place, Workloads, endpoints},
    inbound::{InboundCompiler, InboundSet, compile_limits},
    inbound_of_unknown,
    routes::{self, Tables},
    settings::TrafficCompiler,
};
use crate::{
    document::{Document, Resource, Unreadable},
    identity::{IdentityKind, TrustDomain},
    policy::{
        AccessPolicy, GrpcRoute, HttpRoute, MeshPolicy, RateLimit, ReferenceGrant, ServiceSubset, TcpRoute, TlsRoute,
        TrafficPolicy,
    },
    resilience::TrafficSettings,
    shared_map::SharedMap,
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
pub(super) type Backends = SharedMap<BackendKey, Arc<Backend>>;

/// What a view was compiled from, beyond what look-ups need: with it the next view is made by what has changed.
#[derive(Clone, Debug)]
pub(super) struct Parts {
    pub documents: Arc<[Arc<Document>]>,
    pub tables: Arc<Tables>,
    /// The subsets of each service.
    pub subsets: Arc<HashMap<ObjectName, Vec<Subset>>>,
    /// Whom the selector of each service picks, in order of their names.
    pub selected: SharedMap<ObjectName, Arc<Vec<Arc<Workload>>>>,
    /// The addresses that more than one workload claims.
    pub contended: Arc<HashSet<IpAddr>>,
    /// The zone of the node that the view is for.
    pub zone: Arc<str>,
}

/// A ServiceSubset.
#[derive(Clone, Debug)]
pub(super) struct Subset {
    pub name: Arc<str>,
    pub labels: BTreeMap<String, String>,
}

/// Everything anew.
pub(super) fn compile<'a>(
    trust_domain: TrustDomain,
    revision: Revision,
    resources: impl Iterator<Item = &'a Resource>,
    node: Option<&str>,
) -> (View, Parts, InboundCompiler) {
    let mut workloads: Vec<Arc<Workload>> = Vec::new();
    let mut services: Vec<Arc<Service>> = Vec::new();
    let mut documents: Vec<Arc<Document>> = Vec::new();
    for resource in resources {
        match resource {
            Resource::Workload(workload) => workloads.push(workload.clone()),
            Resource::Service(service) => services.push(service.clone()),
            Resource::Policy(document) => documents.push(document.clone()),
        }
    }
    // By key, so that the order of the input cannot matter.
    workloads.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    services.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    documents.sort_by_cached_key(|document| document.key());
    let policies = Policies::new(&documents);
    let subsets = subsets_of(&policies);

    let (known, contended) = Workloads::new(&workloads);
    let selected = endpoints::selected(&services, &workloads);
    let members: Vec<Vec<Member<'_>>> = services
        .iter()
        .zip(&selected)
        .map(|(service, selected)| endpoints::members(&trust_domain, service, selected, &known))
        .collect();
    let here = workloads.iter().find(|workload| Some(&*workload.node) == node);
    let zone = here.map_or_else(Arc::default, |workload| workload.zone.clone());
    let place = Place { node, zone: &zone };
    let mut traffic = TrafficCompiler::new(&policies.traffic);
    let mut backends = Backends::with_capacity(services.len());
    for (service, members) in services.iter().zip(&members) {
        let subsets = subsets.get(&service.name).map(Vec::as_slice).unwrap_or_default();
        let settings = |port: &ServicePort| traffic.settings(service, port);
        add_backends(&mut backends, place, service, members, subsets, settings);
    }
    let by_name: HashMap<&ObjectName, &Arc<Service>> =
        services.iter().map(|service| (&service.name, service)).collect();
    let find = |name: &ObjectName| by_name.get(name).map(|service| Arc::clone(service));
    let tables = routes::compile(&policies, &find, &backends, None);
    let mut compiler = InboundCompiler::new(&policies);
    let limits = policies.limits.iter().flat_map(compile_limits);
    let mut view = View {
        trust_domain,
        revision,
        inbound: compile_inbound(&mut compiler, &services, &workloads, &selected, &members),
        workloads: known.by_name.clone(),
        workloads_by_address: known.by_address.clone(),
        workloads_by_host: SharedMap::default(),
        node_addresses: Arc::default(),
        workloads_by_node: SharedMap::default(),
        services: SharedMap::with_capacity(services.len()),
        ports_by_address: SharedMap::with_capacity(services.len()),
        services_by_address: SharedMap::with_capacity(services.len()),
        ports_by_external_address: SharedMap::default(),
        ports_by_node_port: SharedMap::default(),
        inbound_of_unknown: inbound_of_unknown(),
        backends,
        limits: Arc::new(limits.map(|limit| limit.id).collect()),
    };
    compiler.end_revision();
    drop(members);
    for workload in &workloads {
        index_workload(&mut view, workload);
    }
    for service in &services {
        index_service(&mut view, service, &tables);
    }
    let picked = services.iter().zip(selected);
    let parts = Parts {
        selected: picked
            .map(|(service, selected)| (service.name.clone(), Arc::new(selected)))
            .collect(),
        documents: documents.into(),
        tables: Arc::new(tables),
        subsets: Arc::new(subsets),
        contended: Arc::new(contended),
        zone,
    };
    (view, parts, compiler)
}

/// The subsets of each service, in order of their names.
fn subsets_of(policies: &Policies<'_>) -> HashMap<ObjectName, Vec<Subset>> {
    let mut subsets: HashMap<ObjectName, Vec<Subset>> = HashMap::new();
    for subset in &policies.subsets {
        let service = ObjectName {
            namespace: subset.name.namespace.clone(),
            name: subset.spec.service.as_str().into(),
        };
        subsets.entry(service).or_default().push(Subset {
            name: subset.name.name.clone(),
            labels: subset.spec.labels.clone().into_iter().collect(),
        });
    }
    subsets
}

impl<'a> Policies<'a> {
    /// From documents in order of their keys.
    pub fn new(documents: &'a [Arc<Document>]) -> Policies<'a> {
        let mut policies = Policies::default();
        for document in documents {
            policies.push(document);
        }
        policies
    }

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

/// The backends of a service: of each port, and of each subset there.
pub(super) fn add_backends(
    backends: &mut Backends,
    place: Place<'_>,
    service: &Arc<Service>,
    members: &[Member<'_>],
    subsets: &[Subset],
    mut settings: impl FnMut(&ServicePort) -> Arc<TrafficSettings>,
) {
    for port in &service.ports {
        let settings = settings(port);
        let mut add = |subset: Option<&Subset>| {
            let is_in = |member: &&Member<'_>| {
                let mut labels = subset.iter().flat_map(|subset| &subset.labels);
                labels.all(|(k, v)| has_label(&member.workload, k, v))
            };
            let chosen: Vec<&Member<'_>> = members.iter().filter(is_in).collect();
            let key = BackendKey {
                service: service.name.clone(),
                port: port.port,
                subset: subset.map(|subset| subset.name.clone()),
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
        for subset in subsets {
            add(Some(subset));
        }
    }
}

fn has_label(workload: &Workload, key: &str, value: &str) -> bool {
    workload.labels.get(key).is_some_and(|v| **v == *value)
}

fn compile_inbound(
    compiler: &mut InboundCompiler,
    services: &[Arc<Service>],
    workloads: &[Arc<Workload>],
    selected: &[Vec<Arc<Workload>>],
    members: &[Vec<Member<'_>>],
) -> SharedMap<ObjectName, Arc<InboundSet>> {
    let mut served: HashMap<&ObjectName, Vec<Served<'_>>> = HashMap::new();
    for ((service, selected), members) in services.iter().zip(selected).zip(members) {
        serve(service, selected, members, |workload, one| {
            add_served(served.entry(workload).or_default(), one);
        });
    }
    let mut inbound = SharedMap::with_capacity(workloads.len());
    for workload in workloads {
        let served = served.get(&workload.name).map(Vec::as_slice).unwrap_or_default();
        inbound.insert(workload.name.clone(), Arc::new(compiler.workload(workload, served)));
    }
    inbound
}

/// Tells which workload serves which port of a service.
pub(super) fn serve<'a>(
    service: &'a Arc<Service>,
    selected: &'a [Arc<Workload>],
    members: &'a [Member<'_>],
    mut tell: impl FnMut(&'a ObjectName, Served<'a>),
) {
    for port in &service.ports {
        // Whom the selector picks is guarded by the service's policies before a slice names it.
        for workload in selected {
            if let Some(target) = workload.target_port(&port.target) {
                tell(&workload.name, Served { service, port, target });
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
                tell(&member.workload.name, Served { service, port, target });
            }
        }
    }
}

/// Adds it unless it is there: a workload may be picked by the selector and by slices.
pub(super) fn add_served<'a>(list: &mut Vec<Served<'a>>, one: Served<'a>) {
    // What a service adds stands at the list's end.
    let mut own = list
        .iter()
        .rev()
        .take_while(|other| Arc::ptr_eq(other.service, one.service));
    if !own.any(|other| std::ptr::eq(other.port, one.port) && other.target == one.target) {
        list.push(one);
    }
}

/// Lists stay in order of names, in whatever order workloads come.
fn insert_by_name(list: &mut Vec<Arc<Workload>>, workload: &Arc<Workload>) {
    let at = list.partition_point(|other| other.name < workload.name);
    list.insert(at, workload.clone());
}

/// Enters a workload where nodes are looked up.
pub(super) fn index_workload(view: &mut View, workload: &Arc<Workload>) {
    for address in &workload.node_addresses {
        if !view.node_addresses.contains(&address.to_canonical()) {
            Arc::make_mut(&mut view.node_addresses).insert(address.to_canonical());
        }
    }
    if workload.enrolled && workload.host_network {
        // What the pod's status calls its addresses are the node's: only if both agree, somebody comes from there.
        for address in &workload.node_addresses {
            enter(&mut view.workloads_by_host, address.to_canonical(), workload);
        }
    }
    enter(&mut view.workloads_by_node, workload.node.clone(), workload);
}

/// Takes a workload out from where nodes are looked up. Its node's addresses stay.
pub(super) fn forget_workload(view: &mut View, workload: &Workload) {
    if workload.enrolled && workload.host_network {
        for address in &workload.node_addresses {
            leave(&mut view.workloads_by_host, &address.to_canonical(), workload);
        }
    }
    leave(&mut view.workloads_by_node, &workload.node, workload);
}

type Lists<K> = SharedMap<K, Arc<Vec<Arc<Workload>>>>;

fn enter<K: Hash + Eq + Clone>(lists: &mut Lists<K>, key: K, workload: &Arc<Workload>) {
    match lists.get_mut(&key) {
        Some(list) => insert_by_name(Arc::make_mut(list), workload),
        None => drop(lists.insert(key, Arc::new(vec![workload.clone()]))),
    }
}

fn leave<K: Hash + Eq + Clone>(lists: &mut Lists<K>, key: &K, workload: &Workload) {
    if let Some(list) = lists.get_mut(key) {
        Arc::make_mut(list).retain(|other| other.name != workload.name);
        if list.is_empty() {
            lists.remove(key);
        }
    }
}

/// The view of a service, with whatever leads to it.
pub(super) fn index_service(view: &mut View, service: &Arc<Service>, tables: &Tables) {
    let mut ports = Vec::with_capacity(service.ports.len());
    for port in &service.ports {
        let key = BackendKey {
            service: service.name.clone(),
            port: port.port,
            subset: None,
        };
        let Some(backend) = view.backends.get(&key) else {
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
            claim(&mut view.ports_by_address, address, &port_view, is_of(&port_view));
        }
        for address in &service.external_addresses {
            let address = SocketAddr::new(address.to_canonical(), port.port);
            claim(
                &mut view.ports_by_external_address,
                address,
                &port_view,
                is_of(&port_view),
            );
        }
        if let Some(number) = port.node_port {
            claim(&mut view.ports_by_node_port, number, &port_view, is_of(&port_view));
        }
        ports.push(port_view);
    }
    for address in &service.addresses {
        let same = |held: &Arc<Service>| held.name == service.name;
        claim(&mut view.services_by_address, address.to_canonical(), service, same);
    }
    let of_service = ServiceView {
        service: service.clone(),
        ports,
    };
    view.services.insert(service.name.clone(), Arc::new(of_service));
}

/// Whether somebody holds what this port had in the view before.
fn is_of(port: &ServicePortView) -> impl Fn(&Arc<ServicePortView>) -> bool {
    |held| held.service.name == port.service.name && held.port == port.port
}

/// The first who claims a key has it, and has it anew.
fn claim<K: Hash + Eq + Clone, V: Clone>(map: &mut SharedMap<K, V>, key: K, value: &V, own: impl Fn(&V) -> bool) {
    if map.get(&key).is_none_or(own) {
        map.insert(key, value.clone());
    }
}
