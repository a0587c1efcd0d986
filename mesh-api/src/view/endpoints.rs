//! Which endpoints a service's port has: those of its EndpointSlices, else the workloads that its selector picks.
//!
//! Which of them a source sees hangs on its node: a node-local service has the endpoints of the node, and hints of slices
//! keep traffic in a zone or node. The rules are those of kube-proxy, so that a pod finds the same endpoints whether it
//! is in the mesh or not.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use crate::{
    identity::TrustDomain,
    shared_map::SharedMap,
    workload::{Endpoint, ObjectName, Service, ServiceEndpoint, ServicePort, Workload},
};

/// Whose view is compiled.
#[derive(Clone, Copy, Default)]
pub(super) struct Place<'a> {
    /// The node; `None`: nobody's in particular.
    pub node: Option<&'a str>,
    /// Its zone; empty: unknown.
    pub zone: &'a str,
}

/// The workloads by name and by the addresses that are their own.
#[derive(Clone, Debug, Default)]
pub(super) struct Workloads {
    pub by_name: SharedMap<ObjectName, Arc<Workload>>,
    pub by_address: SharedMap<IpAddr, Arc<Workload>>,
}

/// A workload, or a stand-in, that serves a service.
#[derive(Clone)]
pub(super) struct Member<'a> {
    pub workload: Arc<Workload>,
    /// What a slice says of it; `None`: the selector picks it.
    slice: Option<Slice<'a>>,
}

#[derive(Clone, Copy)]
struct Slice<'a> {
    ports: &'a [(Arc<str>, u16)],
    endpoint: &'a ServiceEndpoint,
}

impl Workloads {
    /// From workloads ordered by name, and the addresses that several claim.
    pub fn new(workloads: &[Arc<Workload>]) -> (Workloads, HashSet<IpAddr>) {
        let mut all = Workloads {
            by_name: SharedMap::with_capacity(workloads.len()),
            by_address: SharedMap::with_capacity(workloads.len()),
        };
        let mut contended = HashSet::new();
        for workload in workloads {
            all.by_name.insert(workload.name.clone(), workload.clone());
            for address in own_addresses(workload) {
                // Two workloads may claim an address while one replaces the other: the enrolled one has it, then the
                // ready one, then the first by name.
                let rank = |workload: &Workload| (workload.enrolled, workload.ready);
                let held = all.by_address.get(&address);
                if held.is_some() {
                    contended.insert(address);
                }
                if held.is_none_or(|holder| rank(holder) < rank(workload)) {
                    all.by_address.insert(address, workload.clone());
                }
            }
        }
        (all, contended)
    }

    /// Who listens at an endpoint; `None` where the slice and the workloads contradict each other: nothing is sent to an
    /// address in the name of a pod that does not have it.
    fn at(&self, domain: &TrustDomain, service: &Service, endpoint: &ServiceEndpoint) -> Option<Arc<Workload>> {
        let address = endpoint.address.to_canonical();
        let Some(name) = &endpoint.workload else {
            // Whoever has the address is spoken to as what it is, whatever the slice calls it.
            let known = self.by_address.get(&address).cloned();
            let stand_in = || Workload::outside(domain, &service.name, address, endpoint.node.clone());
            return Some(known.unwrap_or_else(|| Arc::new(stand_in())));
        };
        let pod = ObjectName {
            namespace: service.name.namespace.clone(),
            name: name.clone(),
        };
        let workload = self.by_name.get(&pod)?;
        let known = &workload.addresses;
        let has_it = known.is_empty() || known.iter().any(|one| one.to_canonical() == address);
        has_it.then(|| Arc::clone(workload))
    }
}

/// A pod with its node's network has none of its own.
pub(super) fn own_addresses(workload: &Workload) -> impl Iterator<Item = IpAddr> {
    let own = workload.addresses.iter().filter(|_| !workload.host_network);
    own.map(IpAddr::to_canonical)
}

/// For each service the workloads that its selector picks, in order of their names. Goes through the workloads that
/// have the selector's rarest label only, so that many services in one namespace stay cheap.
pub(super) fn selected(services: &[Arc<Service>], workloads: &[Arc<Workload>]) -> Vec<Vec<Arc<Workload>>> {
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

/// Who serves a service, ready or not, in order of their names.
pub(super) fn members<'a>(
    domain: &TrustDomain,
    service: &'a Service,
    selected: &[Arc<Workload>],
    workloads: &Workloads,
) -> Vec<Member<'a>> {
    let Some(groups) = &service.endpoints else {
        let picked = |workload: &Arc<Workload>| Member {
            workload: Arc::clone(workload),
            slice: None,
        };
        return selected.iter().map(picked).collect();
    };
    let mut members = Vec::new();
    for group in groups {
        for endpoint in &group.endpoints {
            if let Some(workload) = workloads.at(domain, service, endpoint) {
                let ports = &group.ports;
                let slice = Some(Slice { ports, endpoint });
                members.push(Member { workload, slice });
            }
        }
    }
    members.sort_by(|a, b| {
        let by = |member: &Member<'_>| member.slice.map(|slice| slice.endpoint.address);
        (&a.workload.name, by(a)).cmp(&(&b.workload.name, by(b)))
    });
    members
}

impl Member<'_> {
    /// The number of a service's port there.
    pub fn target(&self, port: &ServicePort) -> Option<u16> {
        match &self.slice {
            Some(slice) => slice.ports.iter().find(|(name, _)| *name == port.name).map(|(_, n)| *n),
            None => self.workload.target_port(&port.target),
        }
    }

    fn address(&self, ipv6: bool) -> Option<IpAddr> {
        match &self.slice {
            Some(slice) => Some(slice.endpoint.address.to_canonical()).filter(|ip| ip.is_ipv6() == ipv6),
            None => self.workload.address(ipv6),
        }
    }

    fn node(&self) -> &str {
        match &self.slice {
            Some(slice) if !slice.endpoint.node.is_empty() => &slice.endpoint.node,
            _ => &self.workload.node,
        }
    }

    fn is_ready(&self, service: &Service) -> bool {
        match &self.slice {
            Some(slice) => slice.endpoint.ready,
            None => self.workload.ready || service.publish_not_ready,
        }
    }

    fn is_draining(&self) -> bool {
        self.slice.is_some_and(|slice| slice.endpoint.draining)
    }

    fn zones(&self) -> &[Arc<str>] {
        self.slice.map_or(&[], |slice| &slice.endpoint.for_zones)
    }

    fn nodes(&self) -> &[Arc<str>] {
        self.slice.map_or(&[], |slice| &slice.endpoint.for_nodes)
    }
}

/// The endpoints of a port that take connections, as a place sees them.
pub(super) fn endpoints(
    place: Place<'_>,
    service: &Service,
    port: &ServicePort,
    members: &[&Member<'_>],
    ipv6: bool,
) -> Vec<Endpoint> {
    let mut candidates: Vec<(&Member<'_>, SocketAddr)> = Vec::with_capacity(members.len());
    for member in members {
        if let (Some(ip), Some(target)) = (member.address(ipv6), member.target(port)) {
            candidates.push((member, SocketAddr::new(ip, target)));
        }
    }
    // An endpoint may be in two slices while one takes over from the other. Members of one name stand side by side.
    candidates.dedup_by(|a, b| a.1 == b.1);
    if service.node_local
        && let Some(node) = place.node
    {
        candidates.retain(|(member, _)| member.node() == node);
    }
    let some_ready = candidates.iter().any(|(member, _)| member.is_ready(service));
    candidates.retain(|(member, _)| match some_ready {
        true => member.is_ready(service),
        false => member.is_draining(),
    });
    if some_ready && !service.node_local {
        narrow(place, &mut candidates);
    }
    let endpoint = |(member, address): (&Member<'_>, SocketAddr)| Endpoint {
        workload: Arc::clone(&member.workload),
        address,
    };
    candidates.into_iter().map(endpoint).collect()
}

/// As the hints say, if every endpoint has one and some endpoint is meant for the place: else they are out of date, and
/// any endpoint is better than none.
fn narrow(place: Place<'_>, candidates: &mut Vec<(&Member<'_>, SocketAddr)>) {
    let Some(node) = place.node else { return };
    let complete = |names: fn(&Member<'_>) -> bool| candidates.iter().all(|(member, _)| names(member));
    let has = |names: &[Arc<str>], wanted: &str| names.iter().any(|name| **name == *wanted);
    let for_node = |member: &Member<'_>| has(member.nodes(), node);
    let for_zone = |member: &Member<'_>| has(member.zones(), place.zone);
    if complete(|member| !member.nodes().is_empty()) && candidates.iter().any(|(m, _)| for_node(m)) {
        candidates.retain(|(member, _)| for_node(member));
    } else if !place.zone.is_empty()
        && complete(|member| !member.zones().is_empty())
        && candidates.iter().any(|(m, _)| for_zone(m))
    {
        candidates.retain(|(member, _)| for_zone(member));
    }
}
