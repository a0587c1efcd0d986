//! Views one after the other: what has changed is compiled, everything else is shared with the view before.
//!
//! Endpoints change by the second, services and policies by the hour. So workloads that come, go or change, and other
//! endpoints of a service, are worked in by as much work as there is change; anything else compiles the view anew.
//! Wherever a rule of the view hangs on more than what changed (an address that two workloads claim, the last workload
//! of a node), it is compiled anew as well: the result must never differ from that.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use super::{
    BackendKey, View,
    compile::{
        self, Parts, Policies, Served, add_backends, add_served, forget_workload, index_service, index_workload,
    },
    endpoints::{self, Member, Place, Workloads, own_addresses},
    inbound::InboundCompiler,
    routes,
};
use crate::{
    document::{Resource, ResourceKey},
    identity::TrustDomain,
    shared_map::SharedMap,
    workload::{ObjectName, Revision, Service, ServicePort, Workload},
};

/// More changes than one in so many resources are not looked at one by one.
const CHANGED_SHARE: usize = 8;

/// See the module.
#[derive(Debug)]
pub struct ViewCompiler {
    node: Option<Arc<str>>,
    last: Option<Last>,
}

/// The view that was compiled last, and what it was made from.
#[derive(Debug)]
struct Last {
    resources: SharedMap<ResourceKey, Resource>,
    view: View,
    parts: Parts,
    inbound: InboundCompiler,
    services: ServiceIndex,
}

/// Which services a workload may serve.
#[derive(Debug, Default)]
struct ServiceIndex {
    /// By namespace and the first pair of the selector.
    by_selector: HashMap<LabelKey, Vec<ObjectName>>,
    /// Those with EndpointSlices, by namespace.
    sliced: HashMap<Arc<str>, Vec<ObjectName>>,
    /// By addresses that slices give without a pod's name.
    by_address: HashMap<IpAddr, BTreeSet<ObjectName>>,
}

/// A namespace, and a label there with its value.
type LabelKey = (Arc<str>, Arc<str>, Arc<str>);

/// What is different.
#[derive(Default)]
struct Changes<'a> {
    /// Before and after.
    workloads: BTreeMap<&'a ObjectName, [Option<&'a Arc<Workload>>; 2]>,
    /// Services with other endpoints, before and after.
    services: BTreeMap<&'a ObjectName, [&'a Arc<Service>; 2]>,
}

impl ViewCompiler {
    /// For the sources on a node; `None`: nobody's in particular.
    pub fn new(node: Option<&str>) -> ViewCompiler {
        ViewCompiler {
            node: node.map(Into::into),
            last: None,
        }
    }

    /// The view of these resources.
    pub fn compile(
        &mut self,
        trust_domain: &TrustDomain,
        revision: Revision,
        resources: &SharedMap<ResourceKey, Resource>,
    ) -> View {
        // Taken out, so that a step that is not finished leaves nothing behind.
        let patched = self.last.take().and_then(|last| {
            let same_domain = last.view.trust_domain == *trust_domain;
            same_domain.then(|| last.patched(revision, resources, self.node.as_deref()))?
        });
        let last = patched.unwrap_or_else(|| {
            let all = resources.values();
            let node = self.node.as_deref();
            let (view, parts, inbound) = compile::compile(trust_domain.clone(), revision, all, node);
            Last {
                services: ServiceIndex::new(view.services.values().map(|service| &service.service)),
                resources: resources.clone(),
                view,
                parts,
                inbound,
            }
        });
        let view = last.view.clone();
        self.last = Some(last);
        view
    }
}

impl<'a> Changes<'a> {
    /// `None`: the view has to be compiled anew.
    fn between(
        before: &'a SharedMap<ResourceKey, Resource>,
        after: &'a SharedMap<ResourceKey, Resource>,
    ) -> Option<Changes<'a>> {
        let mut changes = Changes::default();
        let (mut count, mut small) = (0, true);
        after.differences(before, |key, now| {
            count += 1;
            small &= changes.add(key, before.get(key), now);
        });
        (small && count <= after.len() / CHANGED_SHARE).then_some(changes)
    }

    /// Whether it is a change that can be worked in.
    fn add(&mut self, key: &'a ResourceKey, before: Option<&'a Resource>, now: Option<&'a Resource>) -> bool {
        fn workload(resource: &Resource) -> Option<&Arc<Workload>> {
            match resource {
                Resource::Workload(workload) => Some(workload),
                Resource::Service(_) | Resource::Policy(_) => None,
            }
        }
        match (key, before, now) {
            (ResourceKey::Workload(name), before, now) => {
                self.workloads
                    .insert(name, [before.and_then(workload), now.and_then(workload)]);
                true
            }
            (ResourceKey::Service(name), Some(Resource::Service(before)), Some(Resource::Service(now))) => {
                self.services.insert(name, [before, now]);
                let other = Service {
                    endpoints: before.endpoints.clone(),
                    ..Service::clone(now)
                };
                before.endpoints.is_some() && now.endpoints.is_some() && other == **before
            }
            _ => false,
        }
    }
}

impl ServiceIndex {
    fn new<'a>(services: impl Iterator<Item = &'a Arc<Service>>) -> ServiceIndex {
        let mut index = ServiceIndex::default();
        for service in services {
            let name = &service.name;
            if let Some((key, value)) = service.selector.iter().next() {
                let key = (name.namespace.clone(), key.clone(), value.clone());
                index.by_selector.entry(key).or_default().push(name.clone());
            }
            if service.endpoints.is_some() {
                index
                    .sliced
                    .entry(name.namespace.clone())
                    .or_default()
                    .push(name.clone());
                index.enter_addresses(service);
            }
        }
        index
    }

    fn enter_addresses(&mut self, service: &Service) {
        for address in nameless(service) {
            self.by_address.entry(address).or_default().insert(service.name.clone());
        }
    }

    fn forget_addresses(&mut self, service: &Service) {
        for address in nameless(service) {
            if let Some(services) = self.by_address.get_mut(&address) {
                services.remove(&service.name);
            }
        }
    }

    /// The services that a workload may serve, in order of their names.
    fn of(&self, workload: &Workload, view: &View, found: &mut BTreeSet<ObjectName>) {
        let namespace = &workload.name.namespace;
        for (key, value) in &workload.labels {
            let key = (namespace.clone(), key.clone(), value.clone());
            found.extend(self.by_selector.get(&key).into_iter().flatten().cloned());
        }
        for name in self.sliced.get(namespace).into_iter().flatten() {
            let service = view.services.get(name).map(|service| &service.service);
            if service.is_some_and(|service| named(service).any(|pod| **pod == *workload.name.name)) {
                found.insert(name.clone());
            }
        }
        for address in own_addresses(workload) {
            found.extend(self.by_address.get(&address).into_iter().flatten().cloned());
        }
    }
}

/// The addresses of slices without a pod's name.
fn nameless(service: &Service) -> impl Iterator<Item = IpAddr> {
    let endpoints = service.endpoints.iter().flatten().flat_map(|group| &group.endpoints);
    endpoints
        .filter(|endpoint| endpoint.workload.is_none())
        .map(|endpoint| endpoint.address.to_canonical())
}

/// The pods that slices name.
fn named(service: &Service) -> impl Iterator<Item = &Arc<str>> {
    let endpoints = service.endpoints.iter().flatten().flat_map(|group| &group.endpoints);
    endpoints.filter_map(|endpoint| endpoint.workload.as_ref())
}

impl Last {
    /// The next one by what has changed; `None`: it has to be compiled anew.
    fn patched(
        mut self,
        revision: Revision,
        resources: &SharedMap<ResourceKey, Resource>,
        node: Option<&str>,
    ) -> Option<Last> {
        let before = self.resources.clone();
        let changes = Changes::between(&before, resources)?;
        self.resources = resources.clone();
        self.view.revision = revision;

        // Whom the changed workloads served, and serve now. Asked before and after the services change.
        let mut services: BTreeSet<ObjectName> = changes.services.keys().map(|name| (*name).clone()).collect();
        for workload in changes.workloads.values().flatten().flatten() {
            self.services.of(workload, &self.view, &mut services);
        }
        // What holds at a workload is compiled for those that changed, and for all of a service whose endpoints did: they
        // know their services.
        let mut workloads: BTreeSet<ObjectName> = changes.workloads.keys().map(|name| (*name).clone()).collect();
        for service in changes.services.values().flatten() {
            workloads.extend(named(service).map(|pod| ObjectName {
                namespace: service.name.namespace.clone(),
                name: pod.clone(),
            }));
            for address in nameless(service) {
                workloads.extend(self.view.workload_by_address(address).map(|held| held.name.clone()));
            }
            let selected = self.parts.selected.get(&service.name);
            workloads.extend(selected.iter().flat_map(|all| all.iter()).map(|one| one.name.clone()));
        }

        self.change_workloads(&changes)?;
        self.zone_is_the_same(node)?;
        for [before, now] in changes.services.values() {
            self.services.forget_addresses(before);
            self.services.enter_addresses(now);
            let name = now.name.clone();
            let mut view = super::ServiceView::clone(self.view.services.get(&name)?);
            view.service = (*now).clone();
            self.view.services.insert(name, Arc::new(view));
        }
        for workload in changes.workloads.values().flatten().flatten() {
            self.services.of(workload, &self.view, &mut services);
        }
        for name in &services {
            self.select(name, &changes);
        }
        self.change_services(&services, node)?;
        self.change_inbound(&workloads);
        Some(self)
    }

    /// Workloads, and what they are looked up by. `None`: their addresses or nodes say more than these changes.
    fn change_workloads(&mut self, changes: &Changes<'_>) -> Option<()> {
        let all = || changes.workloads.values().flatten().flatten();
        if all()
            .flat_map(|one| own_addresses(one))
            .any(|ip| self.parts.contended.contains(&ip))
        {
            return None;
        }
        for before in changes.workloads.values().filter_map(|[before, _]| *before) {
            for address in own_addresses(before) {
                self.view.workloads_by_address.remove(&address);
            }
            forget_workload(&mut self.view, before);
            self.view.workloads.remove(&before.name);
        }
        for now in changes.workloads.values().filter_map(|[_, now]| *now) {
            for address in own_addresses(now) {
                if self.view.workloads_by_address.insert(address, now.clone()).is_some() {
                    return None;
                }
            }
            index_workload(&mut self.view, now);
            self.view.workloads.insert(now.name.clone(), now.clone());
        }
        // A node's addresses stay known as long as a workload is there that has them.
        for before in changes.workloads.values().filter_map(|[before, _]| *before) {
            let others = self.view.workloads_by_node.get(&before.node)?;
            let other = others.first()?;
            if !before.node_addresses.iter().all(|ip| other.node_addresses.contains(ip)) {
                return None;
            }
        }
        Some(())
    }

    /// The node's zone decides about endpoints of every service.
    fn zone_is_the_same(&self, node: Option<&str>) -> Option<()> {
        let here = node.and_then(|node| self.view.workloads_by_node.get(node)?.first());
        let zone = here.map_or("", |workload| &workload.zone);
        (zone == &*self.parts.zone).then_some(())
    }

    /// Whom a service's selector picks.
    fn select(&mut self, name: &ObjectName, changes: &Changes<'_>) {
        let Some(service) = self.view.services.get(name).map(|service| service.service.clone()) else {
            return;
        };
        let Some(list) = self.parts.selected.get_mut(name) else {
            return;
        };
        for (workload, [_, now]) in &changes.workloads {
            let at = list.binary_search_by(|one| one.name.cmp(workload));
            match (at, now.filter(|now| service.selects(now))) {
                (Ok(at), Some(now)) => {
                    if let Some(one) = Arc::make_mut(list).get_mut(at) {
                        *one = now.clone();
                    }
                }
                (Ok(at), None) => drop(Arc::make_mut(list).remove(at)),
                (Err(at), Some(now)) => Arc::make_mut(list).insert(at, now.clone()),
                (Err(_), None) => {}
            }
        }
    }

    fn known(&self) -> Workloads {
        Workloads {
            by_name: self.view.workloads.clone(),
            by_address: self.view.workloads_by_address.clone(),
        }
    }

    fn members<'a>(&self, known: &Workloads, service: &'a Service) -> Vec<Member<'a>> {
        let selected = self.parts.selected.get(&service.name);
        let selected = selected.map(|list| list.as_slice()).unwrap_or_default();
        endpoints::members(&self.view.trust_domain, service, selected, known)
    }

    /// The backends of these services, the routes that lead to them, and what leads to these.
    fn change_services(&mut self, names: &BTreeSet<ObjectName>, node: Option<&str>) -> Option<()> {
        let known = self.known();
        let zone = self.parts.zone.clone();
        let place = Place { node, zone: &zone };
        let subsets = self.parts.subsets.clone();
        let mut tables = BTreeSet::new();
        let mut services: BTreeMap<ObjectName, Arc<Service>> = BTreeMap::new();
        for name in names {
            let Some(service) = self.view.services.get(name).map(|service| service.service.clone()) else {
                continue;
            };
            let members = self.members(&known, &service);
            let subsets = subsets.get(name).map(Vec::as_slice).unwrap_or_default();
            let own = |port: &ServicePort| BackendKey {
                service: name.clone(),
                port: port.port,
                subset: None,
            };
            let kept = self.view.backends.clone();
            // Its ports are what they were, so each has a backend, and what says how to send there has not changed.
            let mut missing = false;
            let settings = |port: &ServicePort| {
                let backend = kept.get(&own(port));
                missing |= backend.is_none();
                backend.map(|backend| backend.traffic.clone()).unwrap_or_default()
            };
            add_backends(&mut self.view.backends, place, &service, &members, subsets, settings);
            if missing {
                return None;
            }
            let has_table = |key: &BackendKey| {
                self.parts.tables.requests.contains_key(key) || self.parts.tables.flows.contains_key(key)
            };
            tables.extend(service.ports.iter().map(own).filter(has_table));
            tables.extend(self.parts.tables.users.get(name).into_iter().flatten().cloned());
            services.insert(name.clone(), service);
        }
        if !tables.is_empty() {
            self.change_tables(&tables);
            for key in &tables {
                let service = self.view.services.get(&key.service)?.service.clone();
                services.insert(key.service.clone(), service);
            }
        }
        for service in services.values() {
            index_service(&mut self.view, service, &self.parts.tables);
        }
        Some(())
    }

    fn change_tables(&mut self, keys: &BTreeSet<BackendKey>) {
        let policies = Policies::new(&self.parts.documents);
        let find = |name: &ObjectName| self.view.services.get(name).map(|service| service.service.clone());
        let changed = routes::compile(&policies, &find, &self.view.backends, Some(keys));
        // Who uses what hangs on routes and on the names of services, which are as they were.
        let tables = Arc::make_mut(&mut self.parts.tables);
        tables.requests.extend(changed.requests);
        tables.flows.extend(changed.flows);
    }

    /// What holds at these workloads.
    fn change_inbound(&mut self, names: &BTreeSet<ObjectName>) {
        let known = self.known();
        for name in names {
            let Some(workload) = self.view.workloads.get(name).cloned() else {
                self.view.inbound.remove(name);
                continue;
            };
            let mut candidates = BTreeSet::new();
            self.services.of(&workload, &self.view, &mut candidates);
            let services = candidates.iter().filter_map(|name| self.view.services.get(name));
            let services: Vec<Arc<Service>> = services.map(|service| service.service.clone()).collect();
            let picked: Vec<_> = services
                .iter()
                .map(|service| self.parts.selected.get(&service.name))
                .collect();
            let picked: Vec<_> = picked
                .into_iter()
                .map(|list| list.cloned().unwrap_or_default())
                .collect();
            let members: Vec<_> = services.iter().map(|service| self.members(&known, service)).collect();
            let mut served: Vec<Served<'_>> = Vec::new();
            for ((service, selected), members) in services.iter().zip(&picked).zip(&members) {
                compile::serve(service, selected, members, |who, one| {
                    if who == name {
                        add_served(&mut served, one);
                    }
                });
            }
            let set = Arc::new(self.inbound.workload(&workload, &served));
            self.view.inbound.insert(name.clone(), set);
        }
        self.inbound.end_revision();
    }
}

#[cfg(test)]
mod tests;
