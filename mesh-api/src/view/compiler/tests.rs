//! Whatever changes in whatever order: the view is the one that is compiled anew from the same resources.

use std::{fmt::Debug, hash::Hash};

use proptest::prelude::*;

use super::*;
use crate::{
    document::parse,
    identity::SpiffeId,
    workload::{AppProtocol, EndpointGroup, ServiceEndpoint, TargetPort, WorkloadPort},
};

const POLICIES: [&str; 6] = [
    "{apiVersion: nodemesh.io/v1alpha1, kind: AccessPolicy, metadata: {name: p, namespace: a},
      spec: {targetRefs: [{kind: Service, name: s0}], action: Allow, rules: [{from: [{namespaces: [b]}]}]}}",
    "{apiVersion: nodemesh.io/v1alpha1, kind: MeshPolicy, metadata: {name: p, namespace: a},
      spec: {targetRefs: [{kind: Namespace, name: a}], mtls: {mode: strict}}}",
    "{apiVersion: nodemesh.io/v1alpha1, kind: TrafficPolicy, metadata: {name: p, namespace: a},
      spec: {targetRefs: [{kind: Service, name: s1}], timeouts: {request: 2s}}}",
    "{apiVersion: nodemesh.io/v1alpha1, kind: ServiceSubset, metadata: {name: sub, namespace: a},
      spec: {service: s0, labels: {version: v1}}}",
    "{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {name: p, namespace: a},
      spec: {parentRefs: [{group: '', kind: Service, name: s1}], rules: [{backendRefs: [
        {name: s2, port: 80}, {group: nodemesh.io, kind: ServiceSubset, name: sub, port: 80}]}]}}",
    "{apiVersion: gateway.networking.k8s.io/v1alpha2, kind: TCPRoute, metadata: {name: p, namespace: b},
      spec: {parentRefs: [{group: '', kind: Service, name: s3, namespace: b}], rules: [{backendRefs: [{name: s3, port: 80}]}]}}",
];

fn domain() -> TrustDomain {
    TrustDomain::new("cluster.local").unwrap()
}

fn policy(number: usize) -> Resource {
    let document = parse("test", POLICIES[number]).unwrap().remove(0);
    Resource::Policy(Arc::new(document))
}

fn pairs(pairs: &[(&str, &str)]) -> BTreeMap<Arc<str>, Arc<str>> {
    pairs
        .iter()
        .map(|(key, value)| ((*key).into(), (*value).into()))
        .collect()
}

/// One of a few workloads, in one of many forms.
fn workload(number: u8, form: u16) -> Resource {
    let namespace = if number.is_multiple_of(3) { "b" } else { "a" };
    let bit = |n: u16| form >> n & 1 == 1;
    let node = format!("node-{}", form >> 4 & 1);
    // Most have an address of their own; some claim another's.
    let address = if form >> 5 & 7 == 7 { 1 } else { number };
    Resource::Workload(Arc::new(Workload {
        name: ObjectName::new(namespace, &format!("w{number}")),
        uid: Arc::default(),
        host_network: form >> 8 & 7 == 7,
        app: "app".into(),
        version: Arc::default(),
        identity: SpiffeId::workload(&domain(), namespace, "sa").unwrap(),
        node: node.as_str().into(),
        zone: if form >> 11 & 15 == 15 {
            "z2".into()
        } else {
            "z1".into()
        },
        node_addresses: vec![IpAddr::from([192, 168, 0, u8::try_from(form >> 4 & 1).unwrap()])],
        addresses: vec![IpAddr::from([10, 0, 0, address])],
        labels: pairs(&[
            ("app", if bit(0) { "x" } else { "y" }),
            ("version", if bit(1) { "v1" } else { "v2" }),
        ]),
        enrolled: bit(2),
        ready: bit(3),
        netns: None,
        ports: vec![WorkloadPort {
            name: "http".into(),
            port: 8080,
            protocol: AppProtocol::Http1,
        }],
        probe_ports: Vec::new(),
        exclude_inbound_ports: Vec::new(),
        exclude_outbound_ports: Vec::new(),
    }))
}

/// s0 and s1 by selectors, s2 and s3 by slices.
fn service(number: u8, form: u16) -> Resource {
    let endpoint = |n: u8| {
        let named = form >> 9 & 1 == 1 || n.is_multiple_of(2);
        ServiceEndpoint {
            address: IpAddr::from([10, 0, 0, n]),
            workload: named.then(|| format!("w{n}").as_str().into()),
            node: Arc::default(),
            ready: form >> 10 & 1 == 0 || n.is_multiple_of(2),
            draining: false,
            for_zones: vec![if n.is_multiple_of(2) { "z1".into() } else { "z2".into() }],
            for_nodes: Vec::new(),
        }
    };
    let group = EndpointGroup {
        ports: vec![("http".into(), 8080)],
        endpoints: (0..8).filter(|n| form >> n & 1 == 1).map(endpoint).collect(),
    };
    Resource::Service(Arc::new(Service {
        name: ObjectName::new(if number == 3 { "b" } else { "a" }, &format!("s{number}")),
        addresses: vec![IpAddr::from([172, 16, 0, number])],
        ports: vec![crate::workload::ServicePort {
            name: "http".into(),
            port: 80,
            target: TargetPort::Name("http".into()),
            protocol: if form >> 11 & 31 == 31 {
                AppProtocol::Grpc
            } else {
                AppProtocol::Detect
            },
            node_port: Some(30000 + u16::from(number)),
        }],
        selector: match number {
            0 => pairs(&[("app", "x"), ("version", "v1")]),
            1 => pairs(&[("app", "x")]),
            2 => pairs(&[("app", "y")]),
            _ => BTreeMap::new(),
        },
        endpoints: (number >= 2).then(|| vec![group]),
        ..Service::default()
    }))
}

/// Everything that a view says, whatever the order.
fn told(view: &View) -> Vec<String> {
    fn all<K: Debug + Hash + Eq, V: Debug>(what: &str, map: &SharedMap<K, V>, lines: &mut Vec<String>) {
        lines.extend(map.iter().map(|(key, value)| format!("{what} {key:?}: {value:?}")));
    }
    let mut lines = Vec::new();
    all("workload", &view.workloads, &mut lines);
    all("address", &view.workloads_by_address, &mut lines);
    all("host", &view.workloads_by_host, &mut lines);
    all("node", &view.workloads_by_node, &mut lines);
    all("service", &view.services, &mut lines);
    all("port", &view.ports_by_address, &mut lines);
    all("service address", &view.services_by_address, &mut lines);
    all("external", &view.ports_by_external_address, &mut lines);
    all("node port", &view.ports_by_node_port, &mut lines);
    all("inbound", &view.inbound, &mut lines);
    all("backend", &view.backends, &mut lines);
    let addresses: BTreeSet<_> = view.node_addresses.iter().collect();
    lines.push(format!("nodes {addresses:?} at {}", view.revision));
    lines.sort();
    lines
}

#[derive(Clone, Debug)]
enum Step {
    Workload(u8, Option<u16>),
    Service(u8, u16),
    Policy(usize, bool),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0..9u8, proptest::option::weighted(0.8, any::<u16>())).prop_map(|(n, form)| Step::Workload(n, form)),
        3 => (2..4u8, 0..1u16 << 11).prop_map(|(n, form)| Step::Service(n, form)),
        1 => (0..4u8, any::<u16>()).prop_map(|(n, form)| Step::Service(n, form)),
        1 => (0..POLICIES.len(), any::<bool>()).prop_map(|(n, there)| Step::Policy(n, there)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn a_view_by_its_changes_is_the_view_compiled_anew(steps in proptest::collection::vec(step(), 1..40)) {
        let mut compiler = ViewCompiler::new(Some("node-1"));
        let resources = (0..9).map(|n| workload(n, 0x0c + u16::from(n)))
            .chain((0..4).map(|n| service(n, 0x0f)))
            .chain((0..POLICIES.len()).map(policy));
        let mut resources: SharedMap<_, _> = resources.map(|resource| (resource.key(), resource)).collect();
        compiler.compile(&domain(), Revision(1), &resources);
        for (number, step) in steps.into_iter().enumerate() {
            match step {
                Step::Workload(n, None) => drop(resources.remove(&workload(n, 0).key())),
                Step::Workload(n, Some(form)) => drop(resources.insert(workload(n, form).key(), workload(n, form))),
                Step::Service(n, form) => drop(resources.insert(service(n, form).key(), service(n, form))),
                Step::Policy(n, true) => drop(resources.insert(policy(n).key(), policy(n))),
                Step::Policy(n, false) => drop(resources.remove(&policy(n).key())),
            }
            let revision = Revision(2 + number as u64);
            let view = compiler.compile(&domain(), revision, &resources);
            let all: Vec<Resource> = resources.values().cloned().collect();
            let anew = View::compile_on("node-1", domain(), revision, &all);
            prop_assert_eq!(told(&view), told(&anew));
        }
    }
}

#[test]
fn most_changes_are_worked_in() {
    let resources = (0..9)
        .map(|n| workload(n, 0x0c))
        .chain((0..4).map(|n| service(n, 0x0f)));
    let mut resources: SharedMap<_, _> = resources.map(|resource| (resource.key(), resource)).collect();
    let mut compiler = ViewCompiler::new(Some("node-1"));
    compiler.compile(&domain(), Revision(1), &resources);
    let mut patched = |change: Resource| {
        resources.insert(change.key(), change);
        let last = compiler.last.take().unwrap();
        let next = last.patched(Revision(2), &resources, Some("node-1"));
        compiler.compile(&domain(), Revision(2), &resources);
        next.is_some()
    };
    assert!(patched(workload(2, 0x04)), "one is not ready any more");
    assert!(patched(workload(4, 0x0d)), "one has another label");
    assert!(patched(service(2, 0x3f)), "a service has more endpoints");
    assert!(!patched(workload(5, 0x0c | 7 << 5)), "two claim an address");
    assert!(!patched(policy(0)), "a policy");
}
