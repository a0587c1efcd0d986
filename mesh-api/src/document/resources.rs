//! From documents to what agents work with: every default decided, enrolment and readiness settled.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use super::{
    Document, DocumentKey, DocumentSet, Kind, Meta, Object, PodSpec, Resource, ServiceSpec, SpecPort,
    core_reader::{
        ENROL_LABEL, EXCLUDE_INBOUND_ANNOTATION, EXCLUDE_OUTBOUND_ANNOTATION, NETNS_ANNOTATION, ports_of_annotation,
    },
};
use crate::{
    identity::{SpiffeId, TrustDomain},
    workload::{AppProtocol, ObjectName, Service, ServicePort, TargetPort, Workload, WorkloadPort},
};

pub(super) fn resources(set: &DocumentSet, trust_domain: &TrustDomain) -> Vec<Resource> {
    let pods = set.of_kind(Kind::Pod).filter_map(|document| match document {
        Document::Pod(pod) => workload(set, trust_domain, pod).map(Resource::Workload),
        _ => None,
    });
    let services = set.of_kind(Kind::Service).filter_map(|document| match document {
        Document::Service(object) => Some(Resource::Service(service(object))),
        _ => None,
    });
    let policies = set.iter().filter(|document| document.kind().is_policy());
    pods.chain(services)
        .chain(policies.map(|document| Resource::Policy(bare(document))))
        .collect()
}

/// Without labels and annotations: no decision looks at them, and a change of theirs is no change for an agent.
fn bare(document: &Document) -> Document {
    let mut bare = document.clone();
    let meta = bare.meta_mut();
    meta.labels.clear();
    meta.annotations.clear();
    bare
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

/// The pod's own label, else its namespace's, else no. A pod with the node's network cannot be told from the node.
fn is_enrolled(set: &DocumentSet, pod: &Object<PodSpec>) -> bool {
    let namespace = set.get(&DocumentKey::new(Kind::Namespace, "", &pod.meta.namespace));
    let label = pod
        .meta
        .labels
        .get(ENROL_LABEL)
        .or_else(|| namespace?.meta().labels.get(ENROL_LABEL));
    !pod.spec.host_network && label.is_some_and(|value| value == "enabled")
}

/// As the `Ready` condition says; without one, a pod that nobody probes is ready.
fn is_ready(spec: &PodSpec) -> bool {
    spec.ready
        .unwrap_or_else(|| spec.containers.iter().all(|container| container.readiness.is_none()))
}

fn node_addresses(set: &DocumentSet, node: &str) -> Vec<IpAddr> {
    match set.get(&DocumentKey::new(Kind::Node, "", node)) {
        Some(Document::Node(node)) => node.spec.addresses.clone(),
        _ => Vec::new(),
    }
}

fn excluded(meta: &Meta, annotation: &str) -> Vec<u16> {
    meta.annotations
        .get(annotation)
        .and_then(|text| ports_of_annotation(text))
        .unwrap_or_default()
}

/// `None` for a pod without an address: it cannot send or be sent to yet.
fn workload(set: &DocumentSet, trust_domain: &TrustDomain, pod: &Object<PodSpec>) -> Option<Workload> {
    let (meta, spec) = (&pod.meta, &pod.spec);
    if spec.addresses.is_empty() {
        return None;
    }
    let node = spec.node.as_deref().unwrap_or_default();
    let ports = spec
        .containers
        .iter()
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
        app: first_label(meta, ["app.kubernetes.io/name", "app"]).unwrap_or_else(|| meta.name.clone()),
        version: first_label(meta, ["app.kubernetes.io/version", "version"]).unwrap_or_default(),
        identity: SpiffeId::workload(trust_domain, &meta.namespace, &spec.service_account).ok()?,
        node: node.into(),
        node_addresses: node_addresses(set, node),
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

fn service(object: &Object<ServiceSpec>) -> Service {
    let (meta, spec) = (&object.meta, &object.spec);
    let ports = spec.ports.iter().map(|port| ServicePort {
        name: port.name.as_str().into(),
        port: port.port,
        target: match &port.target {
            SpecPort::Number(number) => TargetPort::Number(*number),
            SpecPort::Name(name) => TargetPort::Name(name.as_str().into()),
        },
        protocol: port.protocol,
    });
    Service {
        name: ObjectName {
            namespace: meta.namespace.clone(),
            name: meta.name.clone(),
        },
        addresses: spec.addresses.clone(),
        ports: ports.collect(),
        selector: shared(&spec.selector),
        publish_not_ready: spec.publish_not_ready,
    }
}
