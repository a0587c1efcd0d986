//! Workloads, services and the endpoints that join them.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use crate::identity::SpiffeId;

/// A numbered, immutable state of workloads and policy. Revisions only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(pub u64);

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// `namespace/name` of a document.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName {
    /// The namespace.
    pub namespace: Arc<str>,
    /// The name within the namespace.
    pub name: Arc<str>,
}

impl ObjectName {
    /// A name in a namespace.
    pub fn new(namespace: &str, name: &str) -> ObjectName {
        ObjectName {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// What a port speaks: `appProtocol`, else the port name's prefix, else detected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum AppProtocol {
    /// Not declared: the agent looks at the first bytes of either side.
    #[default]
    Detect,
    /// HTTP/1.1 (`http`, `kubernetes.io/ws`).
    Http1,
    /// HTTP/2 with prior knowledge (`http2`, `kubernetes.io/h2c`).
    Http2,
    /// gRPC, that is HTTP/2 with trailers (`grpc`).
    Grpc,
    /// TLS of the application's own, passed through (`tls`, `https`, `kubernetes.io/wss`).
    Tls,
    /// Opaque bytes, either side may speak first (`tcp`, `mysql`, `redis`, `postgres`, `mongo`, `smtp`, …).
    Tcp,
}

/// A container port with a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadPort {
    /// The port's name; empty if it has none.
    pub name: Arc<str>,
    /// The port's number.
    pub port: u16,
    /// What it speaks.
    pub protocol: AppProtocol,
}

/// A pod or other running program with one identity and its own addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Namespace and name of the Pod.
    pub name: ObjectName,
    /// The owner's name for telemetry (`app.kubernetes.io/name`, `app`, else the Pod's name).
    pub app: Arc<str>,
    /// The version for telemetry (`app.kubernetes.io/version`, `version`, else empty).
    pub version: Arc<str>,
    /// Its identity.
    pub identity: SpiffeId,
    /// The node that it runs on.
    pub node: Arc<str>,
    /// The node's own addresses: its kubelet probes from there.
    pub node_addresses: Vec<IpAddr>,
    /// Its addresses, the primary one first.
    pub addresses: Vec<IpAddr>,
    /// Its labels.
    pub labels: BTreeMap<Arc<str>, Arc<str>>,
    /// Whether `nodemesh.io/mesh` enrols it.
    pub enrolled: bool,
    /// Whether it is ready to serve.
    pub ready: bool,
    /// The network namespace's file (`nodemesh.io/netns`), on its own node.
    pub netns: Option<Arc<str>>,
    /// Named container ports.
    pub ports: Vec<WorkloadPort>,
    /// Ports that the node's kubelet probes.
    pub probe_ports: Vec<u16>,
    /// `nodemesh.io/exclude-inbound-ports`.
    pub exclude_inbound_ports: Vec<u16>,
    /// `nodemesh.io/exclude-outbound-ports`.
    pub exclude_outbound_ports: Vec<u16>,
}

/// Where a service port leads on the endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetPort {
    /// A number.
    Number(u16),
    /// The name of a container port.
    Name(Arc<str>),
}

/// One port of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// The port's name; empty if it has none.
    pub name: Arc<str>,
    /// The port's number on the service's address.
    pub port: u16,
    /// Where it leads on the endpoint.
    pub target: TargetPort,
    /// What it speaks.
    pub protocol: AppProtocol,
}

/// A Kubernetes Service with its resolved endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Namespace and name.
    pub name: ObjectName,
    /// Cluster IPs; empty for a headless service.
    pub addresses: Vec<IpAddr>,
    /// Its ports.
    pub ports: Vec<ServicePort>,
    /// The selector; a service without one has no endpoints of its own.
    pub selector: BTreeMap<Arc<str>, Arc<str>>,
    /// Whether endpoints that are not ready count.
    pub publish_not_ready: bool,
}

/// One address that serves a service port.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Who listens there.
    pub workload: Arc<Workload>,
    /// Where: the workload's address of the wanted family and the target port.
    pub address: SocketAddr,
}

impl Service {
    /// `name.namespace.svc.cluster.local`.
    pub fn host(&self) -> String {
        format!("{}.{}.svc.cluster.local", self.name.name, self.name.namespace)
    }

    /// The port of that number.
    pub fn port(&self, port: u16) -> Option<&ServicePort> {
        self.ports.iter().find(|p| p.port == port)
    }

    /// Whether the service's selector picks this workload.
    pub fn selects(&self, workload: &Workload) -> bool {
        !self.selector.is_empty()
            && self.name.namespace == workload.name.namespace
            && self.selector.iter().all(|(k, v)| workload.labels.get(k) == Some(v))
    }
}

impl Workload {
    /// The port number that a service's target names on this workload.
    pub fn target_port(&self, target: &TargetPort) -> Option<u16> {
        match target {
            TargetPort::Number(port) => Some(*port),
            TargetPort::Name(name) => self.ports.iter().find(|p| p.name == *name).map(|p| p.port),
        }
    }

    /// The first address of the wanted family.
    pub fn address(&self, ipv6: bool) -> Option<IpAddr> {
        self.addresses.iter().copied().find(|a| a.is_ipv6() == ipv6)
    }
}

impl AppProtocol {
    /// From a Service port's `appProtocol` and name, as Kubernetes and other meshes read them.
    pub fn declared(app_protocol: Option<&str>, port_name: Option<&str>) -> AppProtocol {
        fn known(word: &str) -> Option<AppProtocol> {
            Some(match word {
                "http" | "http1" | "ws" => AppProtocol::Http1,
                "http2" | "h2c" => AppProtocol::Http2,
                "grpc" => AppProtocol::Grpc,
                "https" | "tls" | "wss" => AppProtocol::Tls,
                "tcp" | "mysql" | "redis" | "postgres" | "postgresql" | "mongo" | "smtp" | "amqp" | "kafka" => {
                    AppProtocol::Tcp
                }
                _ => return None,
            })
        }
        app_protocol
            .map(|p| p.to_ascii_lowercase())
            .and_then(|p| known(p.strip_prefix("kubernetes.io/").unwrap_or(&p)))
            .or_else(|| port_name.and_then(|n| known(n.split('-').next().unwrap_or_default())))
            .unwrap_or_default()
    }
}
