//! A large world as documents: services with ten endpoints or so each, over many nodes and namespaces, and policies on
//! some of the services. The same size gives the same documents.

use std::net::{IpAddr, Ipv4Addr};

use serde_json::{Value, json};

/// How large it is.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Size {
    /// Services.
    #[arg(long, default_value_t = 10_000)]
    pub services: usize,
    /// Pods.
    #[arg(long, default_value_t = 100_000)]
    pub endpoints: usize,
    /// Policies and routes.
    #[arg(long, default_value_t = 5_000)]
    pub policies: usize,
    /// Nodes, beside those that are there.
    #[arg(long, default_value_t = 500)]
    pub nodes: usize,
}

/// Services in one namespace.
const SERVICES_PER_NAMESPACE: usize = 100;

fn address(base: [u8; 4], number: usize) -> IpAddr {
    let number = u32::try_from(number).unwrap_or(u32::MAX);
    Ipv4Addr::from(u32::from(Ipv4Addr::from(base)).saturating_add(number)).into()
}

/// The address of a service.
pub fn service_address(number: usize) -> IpAddr {
    address([172, 16, 0, 1], number)
}

/// The address of a pod.
pub fn pod_address(number: usize) -> IpAddr {
    address([100, 64, 0, 1], number)
}

fn namespace_of(service: usize) -> String {
    format!("scale-{}", service / SERVICES_PER_NAMESPACE)
}

/// The name of a simulated node.
pub fn node(number: usize) -> String {
    format!("scale-node-{number}")
}

/// A pod that is ready or not.
pub fn pod(size: &Size, number: usize, ready: bool) -> Value {
    let service = number % size.services.max(1);
    let status = if ready { "True" } else { "False" };
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": format!("s{service}-{number}"),
            "namespace": namespace_of(service),
            "labels": {"app": format!("s{service}"), "version": "v1"},
        },
        "spec": {
            "nodeName": node(number % size.nodes.max(1)),
            "serviceAccountName": format!("s{service}"),
            "containers": [{"name": "app", "ports": [{"name": "http", "containerPort": 8080}]}],
        },
        "status": {
            "podIPs": [{"ip": pod_address(number)}],
            "conditions": [{"type": "Ready", "status": status}],
        },
    })
}

fn service(number: usize) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": format!("s{number}"), "namespace": namespace_of(number)},
        "spec": {
            "clusterIP": service_address(number),
            "selector": {"app": format!("s{number}")},
            "ports": [{"name": "http", "port": 80, "targetPort": "http"}],
        },
    })
}

/// A policy that changes with `turn` and touches one service.
pub fn access_policy(number: usize, services: usize, turn: usize) -> Value {
    let (target, from) = (number % services.max(1), (number + 1) % services.max(1));
    json!({
        "apiVersion": "nodemesh.io/v1alpha1",
        "kind": "AccessPolicy",
        "metadata": {"name": format!("p{number}"), "namespace": namespace_of(target)},
        "spec": {
            "targetRefs": [{"kind": "Service", "name": format!("s{target}")}],
            "action": "Allow",
            "rules": [{
                "from": [{"identities": [
                    format!("spiffe://cluster.local/ns/{}/sa/s{from}", namespace_of(from)),
                    format!("spiffe://cluster.local/ns/turn/sa/t{turn}"),
                ]}],
                "to": [{"methods": ["GET"]}],
            }],
        },
    })
}

/// Eight of ten guard, one sets how to send, one routes.
fn policy(number: usize, services: usize) -> Value {
    let target = number % services.max(1);
    let (name, namespace) = (format!("p{number}"), namespace_of(target));
    let service = format!("s{target}");
    match number % 10 {
        8 => json!({
            "apiVersion": "nodemesh.io/v1alpha1",
            "kind": "TrafficPolicy",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {
                "targetRefs": [{"kind": "Service", "name": service}],
                "retry": {"attempts": 2, "on": ["connect-failure"]},
                "timeouts": {"request": "2s"},
            },
        }),
        9 => json!({
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "HTTPRoute",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {
                "parentRefs": [{"group": "", "kind": "Service", "name": service}],
                "rules": [{
                    "matches": [{"path": {"type": "PathPrefix", "value": "/api"}}],
                    "backendRefs": [{"name": service, "port": 80}],
                }],
            },
        }),
        _ => access_policy(number, services, 0),
    }
}

/// All documents, what others name before what names it.
pub fn documents(size: &Size) -> impl Iterator<Item = Value> + use<> {
    let size = *size;
    let namespaces = (0..size.services.div_ceil(SERVICES_PER_NAMESPACE)).map(|number| {
        json!({
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {
                "name": namespace_of(number * SERVICES_PER_NAMESPACE),
                "labels": {"nodemesh.io/mesh": "enabled"},
            },
        })
    });
    let nodes = (0..size.nodes).map(|number| {
        json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": node(number)},
            "status": {"addresses": [{"type": "InternalIP", "address": address([192, 168, 0, 1], number)}]},
        })
    });
    let services = (0..size.services).map(service);
    let pods = (0..size.endpoints).map(move |number| pod(&size, number, true));
    let policies = (0..size.policies).map(move |number| policy(number, size.services));
    namespaces.chain(nodes).chain(services).chain(pods).chain(policies)
}
