//! The mesh of a run: nodes, pods, one service for each account, and who may speak to whom, as documents and as a plain
//! table that the checks are made by.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use mesh_api::{
    document::{self, DocumentSet, Resource},
    identity::{SpiffeId, TrustDomain},
    workload::ObjectName,
};

use crate::chance::Random;

/// Service accounts; each has a service of its name and one or two pods.
pub const ACCOUNTS: [&str; 4] = ["front", "cart", "pay", "log"];
/// The account whose service has a circuit breaker, in runs with limits.
pub const BROKEN: usize = 2;
/// The account whose pods have a rate limit, in runs with limits.
pub const LIMITED: usize = 3;
/// `maxRequests` of [`BROKEN`].
pub const REQUESTS_MAX: u32 = 3;
/// `maxConnections` of [`BROKEN`].
pub const CONNECTIONS_MAX: u32 = 2;
/// Tokens a second of [`LIMITED`], and its burst.
pub const RATE: u32 = 4;
/// Nodes of a run.
pub const NODES: usize = 3;
/// The port of requests, and that of flows; the same at service and pod.
pub const WEB: u16 = 80;
pub const FLOW: u16 = 90;

/// A pod.
#[derive(Clone, Debug)]
pub struct PodModel {
    pub name: String,
    pub account: usize,
    pub node: usize,
    pub address: IpAddr,
    pub netns: u64,
}

/// Who may speak to whom: `table[source][destination]`.
pub type Table = [[bool; ACCOUNTS.len()]; ACCOUNTS.len()];

/// What does not change in a run.
#[derive(Clone, Debug)]
pub struct Mesh {
    pub pods: Vec<PodModel>,
    pub limits: bool,
}

pub fn domain() -> TrustDomain {
    TrustDomain::new("sim.mesh").expect("a trust domain")
}

pub fn identity(account: usize) -> SpiffeId {
    SpiffeId::workload(&domain(), "sim", ACCOUNTS[account]).expect("an identity")
}

pub fn node_name(node: usize) -> String {
    format!("node-{node}")
}

/// The address of an account's service.
pub fn service(account: usize, port: u16) -> SocketAddr {
    SocketAddr::new(Ipv4Addr::new(10, 96, 0, account as u8 + 1).into(), port)
}

impl Mesh {
    pub fn new(seed: u64, limits: bool) -> Mesh {
        let mut random = Random::new(seed, "mesh");
        let mut pods = Vec::new();
        for (account, name) in ACCOUNTS.iter().enumerate() {
            for copy in 0..random.between(1, 2) {
                let number = pods.len();
                let node = random.below(NODES as u64) as usize;
                pods.push(PodModel {
                    name: format!("{name}-{copy}"),
                    account,
                    node,
                    address: Ipv4Addr::new(10, 1, node as u8, number as u8 + 10).into(),
                    netns: 100 + number as u64,
                });
            }
        }
        Mesh { pods, limits }
    }

    pub fn pod_at(&self, address: IpAddr) -> Option<&PodModel> {
        self.pods.iter().find(|pod| pod.address == address)
    }

    pub fn pod_named(&self, name: &ObjectName) -> Option<&PodModel> {
        self.pods.iter().find(|pod| *pod.name == *name.name)
    }

    pub fn nodes_of(&self, account: usize) -> impl Iterator<Item = usize> {
        self.pods
            .iter()
            .filter(move |pod| pod.account == account)
            .map(|pod| pod.node)
    }

    /// What agents are told under a table.
    pub fn resources(&self, table: &Table) -> Vec<Resource> {
        let mut yaml = String::from(
            "apiVersion: v1\nkind: Namespace\nmetadata: {name: sim, labels: {nodemesh.io/mesh: enabled}}\n---\n\
             apiVersion: nodemesh.io/v1alpha1\nkind: MeshPolicy\nmetadata: {name: strict, namespace: sim}\n\
             spec: {targetRefs: [{kind: Namespace, name: sim}], mtls: {mode: strict}}\n",
        );
        for account in ACCOUNTS {
            yaml +=
                &format!("---\napiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {account}, namespace: sim}}\n");
        }
        for node in 0..NODES {
            yaml += &format!(
                "---\napiVersion: v1\nkind: Node\nmetadata: {{name: {}}}\n",
                node_name(node)
            );
        }
        for pod in &self.pods {
            let account = ACCOUNTS[pod.account];
            yaml += &format!(
                "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {}, namespace: sim, labels: {{app: {account}}}}}\n\
                 spec: {{nodeName: {}, serviceAccountName: {account}, containers: [{{name: main}}]}}\n\
                 status: {{podIP: {}}}\n",
                pod.name,
                node_name(pod.node),
                pod.address
            );
        }
        for (number, account) in ACCOUNTS.iter().enumerate() {
            yaml += &format!(
                "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {account}, namespace: sim}}\n\
                 spec:\n  clusterIP: {}\n  selector: {{app: {account}}}\n  ports:\n  \
                 - {{name: http, port: {WEB}}}\n  - {{name: tcp, port: {FLOW}}}\n",
                service(number, WEB).ip()
            );
            let callers: Vec<String> = (0..ACCOUNTS.len())
                .filter(|source| table[*source][number])
                .map(|source| format!("\"{}\"", identity(source)))
                .collect();
            // Nobody is somebody who does not exist: an Allow without rules would not say the same to every reader.
            let callers = match callers.is_empty() {
                true => format!("\"{}\"", identity(0).as_str().replace("front", "nobody")),
                false => callers.join(", "),
            };
            yaml += &format!(
                "---\napiVersion: nodemesh.io/v1alpha1\nkind: AccessPolicy\nmetadata: {{name: {account}, namespace: sim}}\n\
                 spec: {{targetRefs: [{{kind: Service, name: {account}}}], action: Allow, \
                 rules: [{{from: [{{identities: [{callers}]}}]}}]}}\n"
            );
        }
        if self.limits {
            yaml += &format!(
                "---\napiVersion: nodemesh.io/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: broken, namespace: sim}}\n\
                 spec: {{targetRefs: [{{kind: Service, name: {}}}], circuitBreaker: {{maxRequests: {REQUESTS_MAX}, \
                 maxConnections: {CONNECTIONS_MAX}, maxPendingRequests: 2, consecutiveFailures: 3, openFor: 5s}}}}\n\
                 ---\napiVersion: nodemesh.io/v1alpha1\nkind: RateLimit\nmetadata: {{name: limited, namespace: sim}}\n\
                 spec: {{targetRefs: [{{kind: Service, name: {}}}], limits: [{{rate: {{requests: {RATE}, per: 1s}}, \
                 burst: {RATE}}}]}}\n",
                ACCOUNTS[BROKEN], ACCOUNTS[LIMITED]
            );
        }
        let documents = match document::parse("sim", &yaml) {
            Ok(documents) => documents,
            Err(problems) => panic!("{problems:#?}\n{yaml}"),
        };
        let set: DocumentSet = documents.into_iter().collect();
        set.resources(&domain())
    }
}
