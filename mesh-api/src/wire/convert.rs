//! Resources, keys, changes and problems: model to protobuf and back.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
    time::Duration,
};

use super::{WireError, generated as pb};
use crate::{
    document::{
        Change, Document, DocumentKey, Kind, Meta, Problem, Resource, ResourceKey, policy_from_json,
        unreadable_from_json,
    },
    identity::SpiffeId,
    workload::{
        AppProtocol, EndpointGroup, ObjectName, Service, ServiceEndpoint, ServicePort, TargetPort, Workload,
        WorkloadPort,
    },
};

/// The kind of a workload's key on the wire.
const WORKLOAD: &str = "Workload";
/// The kind of a service's key on the wire.
const SERVICE: &str = "Service";

fn address_to_bytes(address: &IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn address_from_bytes(bytes: Vec<u8>) -> Result<IpAddr, WireError> {
    if let Ok(octets) = <[u8; 4]>::try_from(bytes.as_slice()) {
        return Ok(Ipv4Addr::from(octets).into());
    }
    match <[u8; 16]>::try_from(bytes.as_slice()) {
        Ok(octets) => Ok(Ipv6Addr::from(octets).into()),
        Err(_) => Err(WireError::Address(bytes.len())),
    }
}

fn addresses_from_bytes(addresses: Vec<Vec<u8>>) -> Result<Vec<IpAddr>, WireError> {
    addresses.into_iter().map(address_from_bytes).collect()
}

fn port(number: u32) -> Result<u16, WireError> {
    u16::try_from(number)
        .ok()
        .filter(|p| *p > 0)
        .ok_or(WireError::Port(number))
}

fn ports(numbers: Vec<u32>) -> Result<Vec<u16>, WireError> {
    numbers.into_iter().map(port).collect()
}

fn labels_to_text(labels: &BTreeMap<Arc<str>, Arc<str>>) -> BTreeMap<String, String> {
    labels
        .iter()
        .map(|(key, value)| (key.to_string(), value.to_string()))
        .collect()
}

fn labels_from_text(labels: BTreeMap<String, String>) -> BTreeMap<Arc<str>, Arc<str>> {
    labels
        .into_iter()
        .map(|(key, value)| (key.into(), value.into()))
        .collect()
}

fn protocol_to_wire(protocol: AppProtocol) -> i32 {
    let protocol = match protocol {
        AppProtocol::Detect => pb::AppProtocol::Detect,
        AppProtocol::Http1 => pb::AppProtocol::Http1,
        AppProtocol::Http2 => pb::AppProtocol::Http2,
        AppProtocol::Grpc => pb::AppProtocol::Grpc,
        AppProtocol::Tls => pb::AppProtocol::Tls,
        AppProtocol::Tcp => pb::AppProtocol::Tcp,
    };
    protocol.into()
}

/// A protocol that only a newer controller knows is as good as none said: what passes is looked at, and judged by that.
fn protocol_from_wire(value: i32) -> AppProtocol {
    let protocol = pb::AppProtocol::try_from(value).unwrap_or(pb::AppProtocol::Detect);
    match protocol {
        pb::AppProtocol::Detect => AppProtocol::Detect,
        pb::AppProtocol::Http1 => AppProtocol::Http1,
        pb::AppProtocol::Http2 => AppProtocol::Http2,
        pb::AppProtocol::Grpc => AppProtocol::Grpc,
        pb::AppProtocol::Tls => AppProtocol::Tls,
        pb::AppProtocol::Tcp => AppProtocol::Tcp,
    }
}

impl From<&Workload> for pb::Workload {
    fn from(workload: &Workload) -> pb::Workload {
        let numbers = |ports: &[u16]| ports.iter().map(|p| u32::from(*p)).collect();
        pb::Workload {
            namespace: workload.name.namespace.to_string(),
            name: workload.name.name.to_string(),
            app: workload.app.to_string(),
            version: workload.version.to_string(),
            identity: workload.identity.to_string(),
            node: workload.node.to_string(),
            node_addresses: workload.node_addresses.iter().map(address_to_bytes).collect(),
            addresses: workload.addresses.iter().map(address_to_bytes).collect(),
            labels: labels_to_text(&workload.labels),
            enrolled: workload.is_steered(),
            enrolled_as_source: workload.enrolled && workload.host_network,
            ready: workload.ready,
            netns: workload.netns.as_deref().unwrap_or_default().to_owned(),
            ports: workload
                .ports
                .iter()
                .map(|port| pb::WorkloadPort {
                    name: port.name.to_string(),
                    port: port.port.into(),
                    protocol: protocol_to_wire(port.protocol),
                })
                .collect(),
            probe_ports: numbers(&workload.probe_ports),
            exclude_inbound_ports: numbers(&workload.exclude_inbound_ports),
            exclude_outbound_ports: numbers(&workload.exclude_outbound_ports),
            uid: workload.uid.to_string(),
            host_network: workload.host_network,
            zone: workload.zone.to_string(),
        }
    }
}

impl TryFrom<pb::Workload> for Workload {
    type Error = WireError;

    fn try_from(workload: pb::Workload) -> Result<Workload, WireError> {
        let name = ObjectName::new(&workload.namespace, &workload.name);
        let identity: SpiffeId = workload.identity.parse().map_err(|source| WireError::Identity {
            name: name.to_string(),
            source,
        })?;
        let named_ports = workload.ports.into_iter().map(|named| {
            Ok(WorkloadPort {
                name: named.name.into(),
                port: port(named.port)?,
                protocol: protocol_from_wire(named.protocol),
            })
        });
        Ok(Workload {
            name,
            app: workload.app.into(),
            version: workload.version.into(),
            identity,
            node: workload.node.into(),
            node_addresses: addresses_from_bytes(workload.node_addresses)?,
            addresses: addresses_from_bytes(workload.addresses)?,
            labels: labels_from_text(workload.labels),
            enrolled: workload.enrolled || (workload.enrolled_as_source && workload.host_network),
            ready: workload.ready,
            netns: (!workload.netns.is_empty()).then(|| workload.netns.into()),
            ports: named_ports.collect::<Result<_, _>>()?,
            probe_ports: ports(workload.probe_ports)?,
            exclude_inbound_ports: ports(workload.exclude_inbound_ports)?,
            exclude_outbound_ports: ports(workload.exclude_outbound_ports)?,
            uid: workload.uid.into(),
            host_network: workload.host_network,
            zone: workload.zone.into(),
        })
    }
}

impl From<&Service> for pb::Service {
    fn from(service: &Service) -> pb::Service {
        use pb::service_port::Target;
        pb::Service {
            namespace: service.name.namespace.to_string(),
            name: service.name.name.to_string(),
            addresses: service.addresses.iter().map(address_to_bytes).collect(),
            ports: service
                .ports
                .iter()
                .map(|port| pb::ServicePort {
                    name: port.name.to_string(),
                    port: port.port.into(),
                    target: Some(match &port.target {
                        TargetPort::Number(number) => Target::TargetNumber((*number).into()),
                        TargetPort::Name(name) => Target::TargetName(name.to_string()),
                    }),
                    protocol: protocol_to_wire(port.protocol),
                    node_port: port.node_port.unwrap_or_default().into(),
                })
                .collect(),
            selector: labels_to_text(&service.selector),
            publish_not_ready: service.publish_not_ready,
            external_addresses: service.external_addresses.iter().map(address_to_bytes).collect(),
            endpoint_groups: service
                .endpoints
                .iter()
                .flatten()
                .map(pb::EndpointGroup::from)
                .collect(),
            has_endpoint_groups: service.endpoints.is_some(),
            session_affinity_seconds: service.session_affinity.map_or(0, |timeout| {
                // Less than a second is a second: 0 would be none at all.
                u32::try_from(timeout.as_secs()).unwrap_or(u32::MAX).max(1)
            }),
            node_local: service.node_local,
        }
    }
}

impl From<&EndpointGroup> for pb::EndpointGroup {
    fn from(group: &EndpointGroup) -> pb::EndpointGroup {
        let texts = |names: &[Arc<str>]| names.iter().map(ToString::to_string).collect();
        let port = |(name, number): &(Arc<str>, u16)| pb::EndpointPort {
            name: name.to_string(),
            port: (*number).into(),
        };
        let endpoint = |endpoint: &ServiceEndpoint| pb::ServiceEndpoint {
            address: address_to_bytes(&endpoint.address),
            workload: endpoint.workload.as_deref().unwrap_or_default().to_owned(),
            node: endpoint.node.to_string(),
            ready: endpoint.ready,
            draining: endpoint.draining,
            for_zones: texts(&endpoint.for_zones),
            for_nodes: texts(&endpoint.for_nodes),
        };
        pb::EndpointGroup {
            ports: group.ports.iter().map(port).collect(),
            endpoints: group.endpoints.iter().map(endpoint).collect(),
        }
    }
}

impl TryFrom<pb::EndpointGroup> for EndpointGroup {
    type Error = WireError;

    fn try_from(group: pb::EndpointGroup) -> Result<EndpointGroup, WireError> {
        fn texts(names: Vec<String>) -> Vec<Arc<str>> {
            names.into_iter().map(Into::into).collect()
        }
        let endpoint = |endpoint: pb::ServiceEndpoint| {
            Ok(ServiceEndpoint {
                address: address_from_bytes(endpoint.address)?,
                workload: (!endpoint.workload.is_empty()).then(|| endpoint.workload.into()),
                node: endpoint.node.into(),
                ready: endpoint.ready,
                draining: endpoint.draining,
                for_zones: texts(endpoint.for_zones),
                for_nodes: texts(endpoint.for_nodes),
            })
        };
        let ports = group
            .ports
            .into_iter()
            .map(|received| Ok((received.name.into(), port(received.port)?)));
        Ok(EndpointGroup {
            ports: ports.collect::<Result<_, WireError>>()?,
            endpoints: group
                .endpoints
                .into_iter()
                .map(endpoint)
                .collect::<Result<_, WireError>>()?,
        })
    }
}

impl TryFrom<pb::Service> for Service {
    type Error = WireError;

    fn try_from(service: pb::Service) -> Result<Service, WireError> {
        use pb::service_port::Target;
        let service_ports = service.ports.into_iter().map(|received| {
            Ok(ServicePort {
                name: received.name.into(),
                port: port(received.port)?,
                target: match received.target.ok_or(WireError::Missing("service.ports.target"))? {
                    Target::TargetNumber(number) => TargetPort::Number(port(number)?),
                    Target::TargetName(name) => TargetPort::Name(name.into()),
                },
                protocol: protocol_from_wire(received.protocol),
                node_port: (received.node_port > 0).then(|| port(received.node_port)).transpose()?,
            })
        });
        let groups = service.endpoint_groups.into_iter().map(EndpointGroup::try_from);
        let groups: Vec<EndpointGroup> = groups.collect::<Result<_, _>>()?;
        let affinity = service.session_affinity_seconds;
        Ok(Service {
            name: ObjectName::new(&service.namespace, &service.name),
            addresses: addresses_from_bytes(service.addresses)?,
            ports: service_ports.collect::<Result<_, _>>()?,
            selector: labels_from_text(service.selector),
            publish_not_ready: service.publish_not_ready,
            external_addresses: addresses_from_bytes(service.external_addresses)?,
            endpoints: service.has_endpoint_groups.then_some(groups),
            session_affinity: (affinity > 0).then(|| Duration::from_secs(affinity.into())),
            node_local: service.node_local,
        })
    }
}

impl From<&Document> for pb::PolicyDocument {
    /// Labels and annotations stay behind: no decision looks at them.
    fn from(document: &Document) -> pb::PolicyDocument {
        let meta = document.meta();
        pb::PolicyDocument {
            kind: document.kind().as_str().to_owned(),
            namespace: meta.namespace.to_string(),
            name: meta.name.to_string(),
            generation: meta.generation,
            created_unix: meta.created_unix,
            spec_json: document.policy_spec().unwrap_or_default().to_string(),
            unreadable: matches!(document, Document::Unreadable(_)),
        }
    }
}

impl TryFrom<pb::PolicyDocument> for Document {
    type Error = WireError;

    fn try_from(policy: pb::PolicyDocument) -> Result<Document, WireError> {
        let kind = policy_kind(&policy.kind)?;
        let key = DocumentKey::new(kind, &policy.namespace, &policy.name);
        let refused = |problem: String| WireError::Policy {
            document: key.to_string(),
            problem,
        };
        let spec: serde_json::Value =
            serde_json::from_str(&policy.spec_json).map_err(|error| refused(error.to_string()))?;
        let meta = Meta {
            namespace: key.namespace.clone(),
            name: key.name.clone(),
            generation: policy.generation,
            created_unix: policy.created_unix,
            ..Meta::default()
        };
        if policy.unreadable {
            return Ok(unreadable_from_json(kind, meta, &spec));
        }
        policy_from_json(kind, meta, &spec).map_err(|problems| {
            refused(
                problems
                    .first()
                    .map_or_else(|| "invalid".to_owned(), |p| format!("{}: {}", p.path, p.message)),
            )
        })
    }
}

fn policy_kind(kind: &str) -> Result<Kind, WireError> {
    Kind::ALL
        .into_iter()
        .find(|known| known.is_policy() && known.as_str() == kind)
        .ok_or_else(|| WireError::Kind(kind.to_owned()))
}

impl From<&Resource> for pb::Resource {
    fn from(resource: &Resource) -> pb::Resource {
        use pb::resource::Resource as Inner;
        let inner = match resource {
            Resource::Workload(workload) => Inner::Workload((&**workload).into()),
            Resource::Service(service) => Inner::Service((&**service).into()),
            Resource::Policy(document) => Inner::Policy((&**document).into()),
        };
        pb::Resource { resource: Some(inner) }
    }
}

impl TryFrom<pb::Resource> for Resource {
    type Error = WireError;

    fn try_from(resource: pb::Resource) -> Result<Resource, WireError> {
        use pb::resource::Resource as Inner;
        Ok(match resource.resource.ok_or(WireError::Missing("resource"))? {
            Inner::Workload(workload) => Resource::Workload(Arc::new(workload.try_into()?)),
            Inner::Service(service) => Resource::Service(Arc::new(service.try_into()?)),
            Inner::Policy(policy) => Resource::Policy(Arc::new(policy.try_into()?)),
        })
    }
}

impl From<&ResourceKey> for pb::ResourceKey {
    fn from(key: &ResourceKey) -> pb::ResourceKey {
        let (kind, namespace, name) = match key {
            ResourceKey::Workload(name) => (WORKLOAD, &name.namespace, &name.name),
            ResourceKey::Service(name) => (SERVICE, &name.namespace, &name.name),
            ResourceKey::Policy(key) => (key.kind.as_str(), &key.namespace, &key.name),
        };
        pb::ResourceKey {
            kind: kind.to_owned(),
            namespace: namespace.to_string(),
            name: name.to_string(),
        }
    }
}

impl TryFrom<pb::ResourceKey> for ResourceKey {
    type Error = WireError;

    fn try_from(key: pb::ResourceKey) -> Result<ResourceKey, WireError> {
        let name = ObjectName::new(&key.namespace, &key.name);
        Ok(match key.kind.as_str() {
            WORKLOAD => ResourceKey::Workload(name),
            SERVICE => ResourceKey::Service(name),
            kind => ResourceKey::Policy(DocumentKey::new(policy_kind(kind)?, &key.namespace, &key.name)),
        })
    }
}

impl From<&DocumentKey> for pb::DocumentKey {
    fn from(key: &DocumentKey) -> pb::DocumentKey {
        pb::DocumentKey {
            kind: key.kind.as_str().to_owned(),
            namespace: key.namespace.to_string(),
            name: key.name.to_string(),
        }
    }
}

impl TryFrom<&pb::DocumentKey> for DocumentKey {
    type Error = WireError;

    fn try_from(key: &pb::DocumentKey) -> Result<DocumentKey, WireError> {
        let kind = Kind::find(&key.kind).ok_or_else(|| WireError::Kind(key.kind.clone()))?;
        Ok(DocumentKey::new(kind, &key.namespace, &key.name))
    }
}

impl From<Change> for pb::Change {
    fn from(change: Change) -> pb::Change {
        match change {
            Change::Created => pb::Change::Created,
            Change::Changed => pb::Change::Changed,
            Change::Unchanged => pb::Change::Unchanged,
            Change::Removed => pb::Change::Removed,
        }
    }
}

impl TryFrom<pb::Change> for Change {
    type Error = WireError;

    fn try_from(change: pb::Change) -> Result<Change, WireError> {
        Ok(match change {
            pb::Change::Unspecified => {
                return Err(WireError::UnknownValue {
                    field: "change",
                    value: 0,
                });
            }
            pb::Change::Created => Change::Created,
            pb::Change::Changed => Change::Changed,
            pb::Change::Unchanged => Change::Unchanged,
            pb::Change::Removed => Change::Removed,
        })
    }
}

impl pb::DocumentChange {
    /// A change of a document.
    pub fn of(key: &DocumentKey, change: Change) -> pb::DocumentChange {
        pb::DocumentChange {
            key: Some(key.into()),
            change: pb::Change::from(change).into(),
        }
    }
}

impl pb::Problem {
    /// A problem, or a warning, which does not stop an apply.
    pub fn of(problem: &Problem, warning: bool) -> pb::Problem {
        pb::Problem {
            source: problem.source.clone(),
            line: problem.line.unwrap_or(0),
            path: problem.path.clone(),
            message: problem.message.clone(),
            expected: problem.expected.clone(),
            warning,
        }
    }
}

impl From<pb::Problem> for Problem {
    fn from(problem: pb::Problem) -> Problem {
        Problem {
            source: problem.source,
            line: (problem.line > 0).then_some(problem.line),
            path: problem.path,
            message: problem.message,
            expected: problem.expected,
        }
    }
}
