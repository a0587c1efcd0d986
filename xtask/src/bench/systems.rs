//! What is measured: the direct paths, ours, and others' pairs, each as an address that a source's load is sent to.

use std::{net::SocketAddr, path::PathBuf};

use anyhow::{Result, ensure};
use mesh_tests::{
    Lab, mesh,
    peers::{Pair, Peer},
};

/// The source's pod in the mesh, and outside of it.
const MESH_SOURCE: &str = "mesh/source";
const DIRECT_SOURCE: &str = "direct/source";
/// The ports of the server: one that requests go to, one that bytes go to.
pub const HTTP_PORT: u16 = 8080;
const TCP_PORT: u16 = 8081;

/// One of our own systems.
pub struct Ours {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it is called in reports.
    pub title: &'static str,
    /// The Service that its source asks for.
    service: &'static str,
    /// The system that it is compared with.
    base: &'static str,
}

/// Paths without any proxy: what everything else is divided by.
pub const CROSS: &str = "direct";
const SAME: &str = "direct-same";

/// All that we have.
pub const OURS: &[Ours] = &[
    Ours {
        name: "l7",
        title: "ours, cross node, L7 mTLS with policy",
        service: "mesh/cross",
        base: CROSS,
    },
    Ours {
        name: "l4",
        title: "ours, cross node, L4 mTLS",
        service: "mesh/cross-tcp",
        base: CROSS,
    },
    Ours {
        name: "same-l7",
        title: "ours, same node, L7 with policy",
        service: "mesh/same",
        base: SAME,
    },
    Ours {
        name: "same-l4",
        title: "ours, same node, L4",
        service: "mesh/same-tcp",
        base: SAME,
    },
    Ours {
        name: "same-direct",
        title: "ours, same node, L4 decided in the kernel",
        service: "mesh/kernel-tcp",
        base: SAME,
    },
];

/// Those that the command line names; all by default.
pub fn wanted(names: &[String]) -> Result<Vec<&'static Ours>> {
    for name in names {
        let known = OURS.iter().any(|ours| ours.name == name);
        ensure!(
            known,
            "--systems {name}: expected l7, l4, same-l7, same-l4, same-direct"
        );
    }
    Ok(OURS
        .iter()
        .filter(|ours| names.is_empty() || names.iter().any(|name| name == ours.name))
        .collect())
}

/// A system as the rounds see it.
pub struct System {
    /// Its name.
    pub name: String,
    /// What it is called in reports.
    pub title: String,
    /// The name of the system that it is compared with; none for a base itself.
    pub base: Option<String>,
    /// The pod that the load runs in.
    pub source: &'static str,
    /// Where the load goes.
    pub address: SocketAddr,
    /// The control groups of its proxies.
    pub cgroups: Vec<PathBuf>,
    /// Whether its proxies are our agents.
    pub agents: bool,
}

/// The direct paths that these systems are compared with, then the systems.
pub fn prepare(lab: &Lab, ours: &[&Ours], pairs: &[Pair]) -> Result<Vec<System>> {
    let mut systems = Vec::new();
    for (name, title, pod) in [
        (CROSS, "direct, cross node", "direct/cross"),
        (SAME, "direct, same node", "direct/same"),
    ] {
        let needed = ours.iter().any(|ours| ours.base == name) || pairs.iter().any(|pair| base(pair.peer) == name);
        if needed {
            systems.push(System {
                name: name.into(),
                title: title.into(),
                base: None,
                source: DIRECT_SOURCE,
                address: SocketAddr::new(lab.pod_ip(pod)?, HTTP_PORT),
                cgroups: Vec::new(),
                agents: false,
            });
        }
    }
    let nodes = lab.state()?.nodes;
    let agents: Vec<PathBuf> = nodes
        .iter()
        .map(|node| mesh::agent_cgroup(lab.cgroup(), &node.name))
        .collect();
    for ours in ours {
        systems.push(System {
            name: ours.name.into(),
            title: ours.title.into(),
            base: Some(ours.base.into()),
            source: MESH_SOURCE,
            address: SocketAddr::new(lab.service_ip(ours.service)?, 80),
            cgroups: agents.clone(),
            agents: true,
        });
    }
    for pair in pairs {
        systems.push(System {
            name: pair.peer.name().into(),
            title: title(pair.peer),
            base: Some(base(pair.peer).into()),
            source: DIRECT_SOURCE,
            address: pair.address,
            cgroups: pair.cgroups.clone(),
            agents: false,
        });
    }
    Ok(systems)
}

/// What another proxy is compared with.
fn base(peer: Peer) -> &'static str {
    if peer.is_one() { SAME } else { CROSS }
}

/// What a report calls it.
fn title(peer: Peer) -> String {
    match peer {
        Peer::Floor | Peer::Hop => format!("floor: {}", peer.layer()),
        _ => format!("{} pair, {}", peer.name(), peer.layer()),
    }
}

/// In and out of the mesh: a source on node-1, a server on each node; policy for every Service in the mesh.
pub fn manifest() -> String {
    let mut text = String::new();
    for (namespace, label) in [("mesh", "enabled"), ("direct", "disabled")] {
        text.push_str(&format!(
            "---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {namespace}, labels: {{nodemesh.io/mesh: {label}}}}}\n\
             ---\napiVersion: v1\nkind: Pod\nmetadata: {{name: source, namespace: {namespace}}}\n\
             spec: {{nodeName: node-1, serviceAccountName: source, containers: [{{name: main, command: [sleep, infinity]}}]}}\n"
        ));
        for (name, node) in [("cross", "node-2"), ("same", "node-1"), ("kernel", "node-1")] {
            // The kernel's decisions are the mesh's; it has the same base as what goes through the agent.
            if name == "kernel" && namespace == "direct" {
                continue;
            }
            text.push_str(&format!(
                "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}\n\
                 spec:\n  nodeName: {node}\n  serviceAccountName: {name}\n  containers:\n  - name: main\n\
                 \x20   command: [sh, -c, 'exec \"$NODEMESH_PROGRAMS/bench-load\" serve {HTTP_PORT} {TCP_PORT}']\n\
                 \x20   ports: [{{name: http, containerPort: {HTTP_PORT}}}, {{name: tcp, containerPort: {TCP_PORT}}}]\n\
                 \x20   readinessProbe: {{tcpSocket: {{port: {HTTP_PORT}}}}}\n"
            ));
        }
    }
    for (name, suffix, protocol, port) in [
        ("cross", "", "http", HTTP_PORT),
        ("cross", "-tcp", "tcp", TCP_PORT),
        ("same", "", "http", HTTP_PORT),
        ("same", "-tcp", "tcp", TCP_PORT),
        ("kernel", "-tcp", "tcp", TCP_PORT),
    ] {
        text.push_str(&format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}{suffix}, namespace: mesh}}\n\
             spec: {{selector: {{app: {name}}}, ports: [{{name: {protocol}, port: 80, targetPort: {port}, appProtocol: {protocol}}}]}}\n"
        ));
    }
    text.push_str(POLICY);
    text
}

/// What a request is checked against: a route by path and an identity with methods and paths; for bytes an identity.
const POLICY: &str = "
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: cross, namespace: mesh}
spec:
  parentRefs: [{group: '', kind: Service, name: cross, port: 80}]
  rules:
  - matches: [{path: {type: PathPrefix, value: /bytes}}]
    backendRefs: [{name: cross, port: 80}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: same, namespace: mesh}
spec:
  parentRefs: [{group: '', kind: Service, name: same, port: 80}]
  rules:
  - matches: [{path: {type: PathPrefix, value: /bytes}}]
    backendRefs: [{name: same, port: 80}]
---
apiVersion: nodemesh.io/v1alpha1
kind: AccessPolicy
metadata: {name: requests, namespace: mesh}
spec:
  targetRefs: [{kind: Service, name: cross}, {kind: Service, name: same}]
  action: Allow
  rules:
  - from: [{identities: ['spiffe://cluster.local/ns/mesh/sa/source']}]
    to: [{methods: [GET], paths: [{type: PathPrefix, value: /bytes}]}]
---
apiVersion: nodemesh.io/v1alpha1
kind: AccessPolicy
metadata: {name: flows, namespace: mesh}
spec:
  targetRefs: [{kind: Service, name: cross-tcp}, {kind: Service, name: same-tcp}, {kind: Service, name: kernel-tcp}]
  action: Allow
  rules:
  - from: [{identities: ['spiffe://cluster.local/ns/mesh/sa/source']}]
---
apiVersion: nodemesh.io/v1alpha1
kind: MeshPolicy
metadata: {name: kernel, namespace: mesh}
spec: {targetRefs: [{kind: Service, name: kernel-tcp}], sameNode: direct}
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manifest_is_read() {
        let items = mesh_tests::kube::parse("bench", &manifest()).unwrap();
        for (kind, count) in [
            ("Pod", 7),
            ("Service", 5),
            ("AccessPolicy", 2),
            ("MeshPolicy", 1),
            ("HTTPRoute", 2),
        ] {
            assert_eq!(items.iter().filter(|item| item.kind == kind).count(), count, "{kind}");
        }
    }

    #[test]
    fn systems_by_name() {
        assert_eq!(wanted(&[]).unwrap().len(), OURS.len());
        assert_eq!(wanted(&["l4".into()]).unwrap()[0].name, "l4");
        assert!(wanted(&["l5".into()]).is_err());
    }
}
