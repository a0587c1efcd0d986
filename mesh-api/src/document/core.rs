//! What the mesh reads of Kubernetes' own kinds. Everything else is not looked at: kept where people wrote the document,
//! left out where it comes from an API server.

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use crate::workload::AppProtocol;

/// A Node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeSpec {
    /// `status.addresses` of type InternalIP.
    pub addresses: Vec<IpAddr>,
}

/// A Pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodSpec {
    /// `spec.serviceAccountName`, else `default`.
    pub service_account: String,
    /// `spec.nodeName`.
    pub node: Option<String>,
    /// `spec.hostNetwork`: such a pod has the node's own network and is never enrolled.
    pub host_network: bool,
    /// `spec.containers`.
    pub containers: Vec<Container>,
    /// `spec.initContainers` that run as long as the pod does (`restartPolicy: Always`).
    pub sidecars: Vec<Container>,
    /// `status.podIPs`, else `status.podIP`.
    pub addresses: Vec<IpAddr>,
    /// The `Ready` condition of `status.conditions`; `None` if it has none.
    pub ready: Option<bool>,
    /// Whether it is being deleted (`metadata.deletionTimestamp`): it still runs, and is not ready.
    pub terminating: bool,
    /// Whether it has run to its end (`status.phase` Succeeded or Failed): it is no workload any more.
    pub finished: bool,
}

/// A container of a Pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Container {
    /// Its name, unique in the pod.
    pub name: String,
    /// `command`.
    pub command: Vec<String>,
    /// `args`.
    pub args: Vec<String>,
    /// `workingDir`.
    pub working_dir: Option<String>,
    /// `env` with a plain `value`; other sources are left out.
    pub env: Vec<EnvVar>,
    /// `ports` of protocol TCP.
    pub ports: Vec<ContainerPort>,
    /// `readinessProbe`.
    pub readiness: Option<Probe>,
    /// `livenessProbe`.
    pub liveness: Option<Probe>,
    /// `startupProbe`.
    pub startup: Option<Probe>,
}

/// A variable of a container's environment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EnvVar {
    /// Its name.
    pub name: String,
    /// Its value.
    pub value: String,
}

/// A port of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerPort {
    /// Its name; empty if it has none.
    pub name: String,
    /// `containerPort`.
    pub port: u16,
}

/// A probe as the kubelet runs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// What is asked.
    pub check: Check,
    /// `initialDelaySeconds`.
    pub initial_delay: Duration,
    /// `periodSeconds`, 10 s by default.
    pub period: Duration,
    /// `timeoutSeconds`, 1 s by default.
    pub timeout: Duration,
    /// `successThreshold`, 1 by default.
    pub success_threshold: u32,
    /// `failureThreshold`, 3 by default.
    pub failure_threshold: u32,
}

/// What a probe asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Check {
    /// `httpGet`: a status from 200 to 399.
    HttpGet {
        /// The path with its query.
        path: String,
        /// The port.
        port: SpecPort,
        /// `scheme: HTTPS`.
        https: bool,
        /// `httpHeaders`.
        headers: Vec<(String, String)>,
    },
    /// `tcpSocket`: the port takes a connection.
    TcpSocket {
        /// The port.
        port: SpecPort,
    },
    /// `grpc`: the gRPC health service says SERVING.
    Grpc {
        /// The port.
        port: u16,
        /// The service's name; empty for the whole server.
        service: String,
    },
    /// `exec`: the command ends with 0.
    Exec {
        /// The command.
        command: Vec<String>,
    },
}

/// A port by number or name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SpecPort {
    /// By number.
    Number(u16),
    /// By the name of a container port.
    Name(String),
}

/// A Service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceSpec {
    /// `clusterIPs`, else `clusterIP`; empty for a headless service (`None`) and where none is given yet.
    pub addresses: Vec<IpAddr>,
    /// Whether `clusterIP: None` is written: no address is to be given to it.
    pub headless: bool,
    /// `ports` of protocol TCP.
    pub ports: Vec<ServicePortSpec>,
    /// `selector`.
    pub selector: BTreeMap<String, String>,
    /// `publishNotReadyAddresses`.
    pub publish_not_ready: bool,
    /// `externalIPs`, and `status.loadBalancer.ingress` where the nodes answer for it.
    pub external_addresses: Vec<IpAddr>,
    /// `externalName` of a service of that type: a name in DNS, with no address and no endpoints.
    pub external_name: Option<String>,
    /// The timeout of `sessionAffinity: ClientIP`, 3 h by default.
    pub session_affinity: Option<Duration>,
    /// `internalTrafficPolicy: Local`.
    pub node_local: bool,
}

/// An EndpointSlice. Its service is named by the label `kubernetes.io/service-name`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EndpointSliceSpec {
    /// `ports` of protocol TCP with a number.
    pub ports: Vec<SlicePort>,
    /// `endpoints`; empty for address type FQDN.
    pub endpoints: Vec<SliceEndpoint>,
}

/// A port of an EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlicePort {
    /// The name of the service's port; empty if it has none.
    pub name: String,
    /// The number at the endpoints.
    pub port: u16,
}

/// An endpoint of an EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SliceEndpoint {
    /// `addresses`; they all mean the same.
    pub addresses: Vec<IpAddr>,
    /// `targetRef` of kind Pod: its name and UID. The UID may be empty.
    pub pod: Option<(String, String)>,
    /// `nodeName`; empty: unknown.
    pub node: String,
    /// `conditions.ready`, true by default.
    pub ready: bool,
    /// `conditions.serving`, as `ready` by default.
    pub serving: bool,
    /// `conditions.terminating`.
    pub terminating: bool,
    /// `hints.forZones`.
    pub for_zones: Vec<String>,
    /// `hints.forNodes`.
    pub for_nodes: Vec<String>,
}

/// A port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePortSpec {
    /// Its name; empty if it has none.
    pub name: String,
    /// `port`.
    pub port: u16,
    /// `targetPort`, else `port`.
    pub target: SpecPort,
    /// From `appProtocol`, else the name's first word.
    pub protocol: AppProtocol,
    /// `nodePort`.
    pub node_port: Option<u16>,
}

impl PodSpec {
    /// The containers that run while the pod serves.
    pub fn running(&self) -> impl Iterator<Item = &Container> {
        self.containers.iter().chain(&self.sidecars)
    }

    /// The number of a port that a probe or a service names.
    pub fn port_number(&self, port: &SpecPort) -> Option<u16> {
        self.running().find_map(|container| container.port_number(port))
    }

    /// The ports that the node's kubelet asks, each once, in order.
    pub fn probe_ports(&self) -> Vec<u16> {
        let of_container = |container: &Container| -> Vec<u16> {
            let ports = container.probes().filter_map(|probe| probe.check.port());
            ports.filter_map(|port| container.port_number(&port)).collect()
        };
        let mut ports: Vec<u16> = self.running().flat_map(of_container).collect();
        ports.sort_unstable();
        ports.dedup();
        ports
    }
}

impl Container {
    /// Its probes.
    pub fn probes(&self) -> impl Iterator<Item = &Probe> {
        [&self.readiness, &self.liveness, &self.startup].into_iter().flatten()
    }

    /// The number of a port that is named by number, or by the name of one of this container's ports.
    pub fn port_number(&self, port: &SpecPort) -> Option<u16> {
        match port {
            SpecPort::Number(number) => Some(*number),
            SpecPort::Name(name) => self.ports.iter().find(|p| p.name == *name).map(|p| p.port),
        }
    }
}

impl Probe {
    /// What is left when only the port that is asked matters; nothing of a command.
    pub(super) fn only_its_port(self) -> Option<Probe> {
        Some(Probe {
            check: Check::TcpSocket {
                port: self.check.port()?,
            },
            initial_delay: Duration::ZERO,
            period: Duration::from_secs(10),
            timeout: Duration::from_secs(1),
            success_threshold: 1,
            failure_threshold: 3,
        })
    }
}

impl Check {
    /// The port that is asked; `None` for a command.
    pub fn port(&self) -> Option<SpecPort> {
        match self {
            Check::HttpGet { port, .. } | Check::TcpSocket { port } => Some(port.clone()),
            Check::Grpc { port, .. } => Some(SpecPort::Number(*port)),
            Check::Exec { .. } => None,
        }
    }
}
