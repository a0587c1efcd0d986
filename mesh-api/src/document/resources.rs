//! From documents to what agents work with: every default decided, enrolment and readiness settled.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use super::{
    Document, DocumentKey, DocumentSet, EndpointSliceSpec, Kind, Meta, Object, PodSpec, Resource, ResourceKey,
    ServiceSpec, SliceEndpoint, SpecPort,
    core_reader::{
        ENROL_LABEL, EXCLUDE_INBOUND_ANNOTATION, EXCLUDE_OUTBOUND_ANNOTATION, NETNS_ANNOTATION, ports_of_annotation,
    },
    parse::{SERVICE_NAME_LABEL, ZONE_LABEL},
};
use crate::{
    identity::{SpiffeId, TrustDomain},
    workload::{
        AppProtocol, EndpointGroup, ObjectName, Service, ServiceEndpoint, ServicePort, TargetPort, Workload,
        WorkloadPort,
    },
};

pub(super) fn resources(set: &DocumentSet, trust_domain: &TrustDomain) -> Vec<Resource> {
    let pods = set.of_kind(Kind::Pod).filter_map(|document| match document {
        Document::Pod(pod) => workload(set, trust_domain, pod).map(|workload| Resource::Workload(Arc::new(workload))),
        _ => None,
    });
    let slices = slices_by_service(set);
    let services = set.of_kind(Kind::Service).filter_map(|document| match document {
        Document::Service(object) => {
            let key = (&*object.meta.namespace, &*object.meta.name);
            let slices = slices.get(&key).map(Vec::as_slice);
            Some(Resource::Service(Arc::new(service(set, object, slices))))
        }
        _ => None,
    });
    let policies = set.iter().filter(|document| document.kind().is_policy());
    let policies = policies.filter_map(Document::holding);
    pods.chain(services)
        .chain(policies.map(|document| Resource::Policy(Arc::new(bare(&document)))))
        .collect()
}

/// See [`DocumentSet::changed_resources`].
pub(super) fn changed(
    set: &DocumentSet,
    before: &DocumentSet,
    trust_domain: &TrustDomain,
    changed: &BTreeSet<DocumentKey>,
) -> Option<Vec<(ResourceKey, Option<Resource>)>> {
    let mut found = Vec::new();
    let mut services: BTreeSet<ObjectName> = BTreeSet::new();
    for key in changed {
        let name = ObjectName {
            namespace: key.namespace.clone(),
            name: key.name.clone(),
        };
        let now = set.get(key);
        match key.kind {
            // Labels and addresses of these are everybody's.
            Kind::Namespace | Kind::Node => return None,
            Kind::ServiceAccount => {}
            Kind::Pod => {
                let workload = match now {
                    Some(Document::Pod(pod)) => workload(set, trust_domain, pod),
                    _ => None,
                };
                let workload = workload.map(|workload| Resource::Workload(Arc::new(workload)));
                found.push((ResourceKey::Workload(name), workload));
                // A slice counts as far as the pod that it names is there.
                for slices in [before, set].map(|set| set.of_namespace(Kind::EndpointSlice, &key.namespace)) {
                    let naming = slices.filter(|slice| match slice {
                        Document::EndpointSlice(slice) => {
                            let mut pods = slice.spec.endpoints.iter().filter_map(|endpoint| endpoint.pod.as_ref());
                            pods.any(|(pod, _)| **pod == *key.name)
                        }
                        _ => false,
                    });
                    services.extend(naming.filter_map(service_of));
                }
            }
            Kind::Service => {
                services.insert(name);
            }
            Kind::EndpointSlice => {
                let both = [before.get(key), now].into_iter().flatten();
                services.extend(both.filter_map(service_of));
            }
            kind if kind.is_policy() => {
                let holding = now.and_then(Document::holding);
                let policy = holding.map(|document| Resource::Policy(Arc::new(bare(&document))));
                found.push((ResourceKey::Policy(key.clone()), policy));
            }
            _ => return None,
        }
    }
    for name in services {
        let key = DocumentKey::new(Kind::Service, &name.namespace, &name.name);
        let now = match set.get(&key) {
            Some(Document::Service(object)) => {
                let slices = set.of_namespace(Kind::EndpointSlice, &name.namespace);
                let slices: Vec<_> = slices
                    .filter(|slice| service_of(slice).as_ref() == Some(&name))
                    .filter_map(|slice| match slice {
                        Document::EndpointSlice(slice) => Some(slice),
                        _ => None,
                    })
                    .collect();
                let slices = (!slices.is_empty()).then_some(slices.as_slice());
                Some(Resource::Service(Arc::new(service(set, object, slices))))
            }
            _ => None,
        };
        found.push((ResourceKey::Service(name), now));
    }
    Some(found)
}

/// Whose endpoints a slice lists.
fn service_of(slice: &Document) -> Option<ObjectName> {
    let meta = slice.meta();
    let service = meta.labels.get(SERVICE_NAME_LABEL)?;
    Some(ObjectName {
        namespace: meta.namespace.clone(),
        name: service.as_str().into(),
    })
}

/// Without labels, annotations and UID: no decision looks at them, and a change of theirs is no change for an agent.
fn bare(document: &Document) -> Document {
    let mut bare = document.clone();
    let meta = bare.meta_mut();
    meta.labels.clear();
    meta.annotations.clear();
    meta.uid = Arc::default();
    bare
}

type Slices<'a> = BTreeMap<(&'a str, &'a str), Vec<&'a Object<EndpointSliceSpec>>>;

/// By the service's namespace and name, each list in the order of the slices' names.
fn slices_by_service(set: &DocumentSet) -> Slices<'_> {
    let mut slices = Slices::new();
    for document in set.of_kind(Kind::EndpointSlice) {
        if let Document::EndpointSlice(slice) = document
            && let Some(service) = slice.meta.labels.get(SERVICE_NAME_LABEL)
        {
            slices.entry((&slice.meta.namespace, service)).or_default().push(slice);
        }
    }
    slices
}

fn shared(labels: &BTreeMap<String, String>) -> BTreeMap<Arc<str>, Arc<str>> {
    labels
        .iter()
        .map(|(key, value)| (key.as_str().into(), value.as_str().into()))
        .collect()
}

fn first_label(meta: &Meta, keys: [&str; 2]) -> Option<Arc<str>> {
    keys.iter()
        .find_map(|key| meta.labels.get(*key))
        .map(|value| value.as_str().into())
}

/// The pod's own label, else its namespace's, else no; a label that says neither `enabled` nor `disabled` counts as
/// absent. A pod with the node's network is enrolled as a source only.
pub(super) fn is_enrolled(set: &DocumentSet, pod: &Object<PodSpec>) -> bool {
    let namespace = set.get(&DocumentKey::new(Kind::Namespace, "", &pod.meta.namespace));
    let said = |meta: &Meta| match meta.labels.get(ENROL_LABEL).map(String::as_str) {
        Some("enabled") => Some(true),
        Some("disabled") => Some(false),
        _ => None,
    };
    let wanted = said(&pod.meta).or_else(|| said(namespace?.meta()));
    wanted.unwrap_or(false)
}

/// As the `Ready` condition says; without one, a pod that nobody probes is ready. A pod that terminates is not.
fn is_ready(spec: &PodSpec) -> bool {
    let said = spec.ready;
    !spec.terminating && said.unwrap_or_else(|| spec.running().all(|container| container.readiness.is_none()))
}

/// Its addresses and its zone.
fn node_of(set: &DocumentSet, node: &str) -> (Vec<IpAddr>, Arc<str>) {
    match set.get(&DocumentKey::new(Kind::Node, "", node)) {
        Some(Document::Node(node)) => {
            let zone = node.meta.labels.get(ZONE_LABEL).map(|zone| zone.as_str().into());
            (node.spec.addresses.clone(), zone.unwrap_or_default())
        }
        _ => (Vec::new(), Arc::default()),
    }
}

fn excluded(meta: &Meta, annotation: &str) -> Vec<u16> {
    meta.annotations
        .get(annotation)
        .and_then(|text| ports_of_annotation(text))
        .unwrap_or_default()
}

/// `None` for a pod that has run to its end, and for one that is nowhere yet: without an address it is known only by its
/// node and its UID, by which the node's agent finds it.
fn workload(set: &DocumentSet, trust_domain: &TrustDomain, pod: &Object<PodSpec>) -> Option<Workload> {
    let (meta, spec) = (&pod.meta, &pod.spec);
    let is_somewhere = !spec.addresses.is_empty() || (spec.node.is_some() && !meta.uid.is_empty());
    if spec.finished || !is_somewhere {
        return None;
    }
    let node = spec.node.as_deref().unwrap_or_default();
    let (node_addresses, zone) = node_of(set, node);
    let ports = spec
        .running()
        .flat_map(|container| &container.ports)
        .map(|port| WorkloadPort {
            name: port.name.as_str().into(),
            port: port.port,
            protocol: AppProtocol::declared(None, (!port.name.is_empty()).then_some(port.name.as_str())),
        });
    Some(Workload {
        name: ObjectName {
            namespace: meta.namespace.clone(),
            name: meta.name.clone(),
        },
        uid: meta.uid.clone(),
        host_network: spec.host_network,
        app: first_label(meta, ["app.kubernetes.io/name", "app"]).unwrap_or_else(|| meta.name.clone()),
        version: first_label(meta, ["app.kubernetes.io/version", "version"]).unwrap_or_default(),
        identity: SpiffeId::workload(trust_domain, &meta.namespace, &spec.service_account).ok()?,
        node: node.into(),
        zone,
        node_addresses,
        addresses: spec.addresses.clone(),
        labels: shared(&meta.labels),
        enrolled: is_enrolled(set, pod),
        ready: is_ready(spec),
        netns: meta.annotations.get(NETNS_ANNOTATION).map(|path| path.as_str().into()),
        ports: ports.collect(),
        probe_ports: spec.probe_ports(),
        exclude_inbound_ports: excluded(meta, EXCLUDE_INBOUND_ANNOTATION),
        exclude_outbound_ports: excluded(meta, EXCLUDE_OUTBOUND_ANNOTATION),
    })
}

fn service(set: &DocumentSet, object: &Object<ServiceSpec>, slices: Option<&[&Object<EndpointSliceSpec>]>) -> Service {
    let (meta, spec) = (&object.meta, &object.spec);
    let ports = spec.ports.iter().map(|port| ServicePort {
        name: port.name.as_str().into(),
        port: port.port,
        target: match &port.target {
            SpecPort::Number(number) => TargetPort::Number(*number),
            SpecPort::Name(name) => TargetPort::Name(name.as_str().into()),
        },
        protocol: port.protocol,
        node_port: port.node_port,
    });
    let slices = slices.filter(|_| spec.external_name.is_none());
    Service {
        name: ObjectName {
            namespace: meta.namespace.clone(),
            name: meta.name.clone(),
        },
        addresses: spec.addresses.clone(),
        ports: ports.collect(),
        selector: shared(&spec.selector),
        publish_not_ready: spec.publish_not_ready,
        external_addresses: spec.external_addresses.clone(),
        endpoints: slices.map(|slices| slices.iter().map(|slice| endpoint_group(set, slice)).collect()),
        session_affinity: spec.session_affinity,
        node_local: spec.node_local,
    }
}

fn endpoint_group(set: &DocumentSet, slice: &Object<EndpointSliceSpec>) -> EndpointGroup {
    let namespace = &slice.meta.namespace;
    let ports = slice
        .spec
        .ports
        .iter()
        .map(|port| (port.name.as_str().into(), port.port));
    let current = slice
        .spec
        .endpoints
        .iter()
        .filter(|endpoint| is_current(set, namespace, endpoint));
    let texts = |names: &[String]| names.iter().map(|name| name.as_str().into()).collect();
    let endpoints = current.filter_map(|endpoint| {
        Some(ServiceEndpoint {
            // They all mean the same endpoint: the first, as kube-proxy has it.
            address: *endpoint.addresses.first()?,
            workload: endpoint.pod.as_ref().map(|(name, _)| name.as_str().into()),
            node: endpoint.node.as_str().into(),
            ready: endpoint.ready,
            draining: endpoint.serving && endpoint.terminating,
            for_zones: texts(&endpoint.for_zones),
            for_nodes: texts(&endpoint.for_nodes),
        })
    });
    EndpointGroup {
        ports: ports.collect(),
        endpoints: endpoints.collect(),
    }
}

/// Whether the pod that an endpoint names is there and is that very pod. Slices and pods come on streams of their own:
/// an address may belong to another pod by now, and nothing may be sent to it in the name of the old one.
fn is_current(set: &DocumentSet, namespace: &str, endpoint: &SliceEndpoint) -> bool {
    let Some((name, uid)) = &endpoint.pod else {
        return true;
    };
    match set.get(&DocumentKey::new(Kind::Pod, namespace, name)) {
        Some(Document::Pod(pod)) => {
            let known = &*pod.meta.uid;
            !pod.spec.finished && (uid.is_empty() || known.is_empty() || uid == known)
        }
        _ => false,
    }
}
