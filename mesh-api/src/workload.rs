//! Workloads, services and the endpoints that join them.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use crate::identity::{SpiffeId, TrustDomain};

/// A numbered, immutable state of workloads and policy. Revisions only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(pub u64);

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// `namespace/name` of a document.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
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
    /// `metadata.uid` of the Pod, by which its node's agent finds its processes; empty in standalone mode.
    pub uid: Arc<str>,
    /// Whether it has its node's own network. Its addresses are then the node's and nobody's own: it is never named by its
    /// address alone, and as an endpoint it is reached in plaintext. If it is enrolled, it is so as a source.
    pub host_network: bool,
    /// The owner's name for telemetry (`app.kubernetes.io/name`, `app`, else the Pod's name).
    pub app: Arc<str>,
    /// The version for telemetry (`app.kubernetes.io/version`, `version`, else empty).
    pub version: Arc<str>,
    /// Its identity.
    pub identity: SpiffeId,
    /// The node that it runs on.
    pub node: Arc<str>,
    /// The node's zone (`topology.kubernetes.io/zone`); empty: unknown.
    pub zone: Arc<str>,
    /// The node's own addresses: its kubelet probes from there.
    pub node_addresses: Vec<IpAddr>,
    /// Its addresses, the primary one first; empty while the API does not know them yet. Such a workload is no endpoint
    /// and no source, but its agent captures it.
    pub addresses: Vec<IpAddr>,
    /// Its labels.
    pub labels: BTreeMap<Arc<str>, Arc<str>>,
    /// Whether `nodemesh.io/mesh` enrols it; see [`Workload::is_steered`] for what arrives at it.
    pub enrolled: bool,
    /// Whether it is ready to serve; never while it terminates.
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
    /// `nodePort`: the port on every node's address; `None`: none.
    pub node_port: Option<u16>,
}

/// A Kubernetes Service with its endpoints.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// Namespace and name.
    pub name: ObjectName,
    /// Cluster IPs; empty for a headless service.
    pub addresses: Vec<IpAddr>,
    /// Further addresses at which it is reached from within the cluster: `externalIPs` and those of its load balancer.
    pub external_addresses: Vec<IpAddr>,
    /// Its ports.
    pub ports: Vec<ServicePort>,
    /// The selector; a service without one has no endpoints of its own.
    pub selector: BTreeMap<Arc<str>, Arc<str>>,
    /// Whether endpoints that are not ready count.
    pub publish_not_ready: bool,
    /// Its EndpointSlices; `None`: there are none and the selector picks the endpoints, as in standalone mode.
    pub endpoints: Option<Vec<EndpointGroup>>,
    /// `sessionAffinity: ClientIP` and its timeout: requests of one source go to one endpoint while the endpoints stay.
    pub session_affinity: Option<Duration>,
    /// `internalTrafficPolicy: Local`: a node sees only the endpoints on itself.
    pub node_local: bool,
}

/// One EndpointSlice: endpoints with the same ports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EndpointGroup {
    /// The number of each of the service's ports, by the port's name, at these endpoints.
    pub ports: Vec<(Arc<str>, u16)>,
    /// The endpoints.
    pub endpoints: Vec<ServiceEndpoint>,
}

/// One endpoint of an EndpointSlice, with one address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceEndpoint {
    /// Its address.
    pub address: IpAddr,
    /// The name of the Pod in the service's namespace (`targetRef`); `None`: an address that is no pod's.
    pub workload: Option<Arc<str>>,
    /// `nodeName`; empty: unknown.
    pub node: Arc<str>,
    /// `conditions.ready`.
    pub ready: bool,
    /// It terminates and still serves: it takes connections where no endpoint of the service is ready.
    pub draining: bool,
    /// `hints.forZones`.
    pub for_zones: Vec<Arc<str>>,
    /// `hints.forNodes`.
    pub for_nodes: Vec<Arc<str>>,
}

/// One address that serves a service port.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Who listens there; for an address outside the mesh's knowledge a stand-in ([`Workload::outside`]).
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
    /// Whether what arrives at it is handed to its node's agent. The sockets of a pod with its node's network have no
    /// namespace of their own to steer in.
    pub const fn is_steered(&self) -> bool {
        self.enrolled && !self.host_network
    }

    /// Who listens at an endpoint of that service which is no pod: nobody of the mesh. It is not enrolled, proves
    /// nothing, and is in no view.
    pub fn outside(domain: &TrustDomain, service: &ObjectName, address: IpAddr, node: Arc<str>) -> Workload {
        Workload {
            name: ObjectName {
                namespace: service.namespace.clone(),
                name: address.to_string().into(),
            },
            uid: Arc::default(),
            host_network: false,
            app: service.name.clone(),
            version: Arc::default(),
            identity: SpiffeId::outside(domain),
            node,
            zone: Arc::default(),
            node_addresses: Vec::new(),
            addresses: vec![address],
            labels: BTreeMap::new(),
            enrolled: false,
            ready: true,
            netns: None,
            ports: Vec::new(),
            probe_ports: Vec::new(),
            exclude_inbound_ports: Vec::new(),
            exclude_outbound_ports: Vec::new(),
        }
    }

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
    /// The word that declares it as an `appProtocol`; empty for [`AppProtocol::Detect`].
    pub const fn as_str(self) -> &'static str {
        match self {
            AppProtocol::Detect => "",
            AppProtocol::Http1 => "http",
            AppProtocol::Http2 => "kubernetes.io/h2c",
            AppProtocol::Grpc => "grpc",
            AppProtocol::Tls => "tls",
            AppProtocol::Tcp => "tcp",
        }
    }

    /// For people.
    pub const fn words(self) -> &'static str {
        match self {
            AppProtocol::Detect => "protocol detected",
            AppProtocol::Http1 => "HTTP/1.1",
            AppProtocol::Http2 => "HTTP/2",
            AppProtocol::Grpc => "gRPC",
            AppProtocol::Tls => "TLS of its own",
            AppProtocol::Tcp => "opaque TCP",
        }
    }

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
