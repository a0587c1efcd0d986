//! Which endpoints a node's sources find behind a service, as kube-proxy would have it.

use mesh_api::{identity::IdentityKind, view::Destination, workload::ObjectName};

use crate::world::{behind, set, view_on};

/// Four pods of the mesh on two nodes in two zones, and one with its node's network.
const PODS: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {nodemesh.io/mesh: enabled}}
---
apiVersion: v1
kind: Node
metadata: {name: node-1, labels: {topology.kubernetes.io/zone: zone1}}
status: {addresses: [{type: InternalIP, address: 172.30.0.11}]}
---
apiVersion: v1
kind: Node
metadata: {name: node-2, labels: {topology.kubernetes.io/zone: zone2}}
status: {addresses: [{type: InternalIP, address: 172.30.0.12}]}
---
apiVersion: v1
kind: Pod
metadata: {name: a, namespace: shop, uid: ua, labels: {app: cart, v: "1"}}
spec: {nodeName: node-1, serviceAccountName: cart, containers: [{name: app, ports: [{name: http, containerPort: 8080}]}]}
status: {podIPs: [{ip: 10.1.0.1}, {ip: "fd00::1"}], conditions: [{type: Ready, status: "True"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: b, namespace: shop, uid: ub, labels: {app: cart, v: "2"}}
spec: {nodeName: node-2, serviceAccountName: cart, containers: [{name: app, ports: [{name: http, containerPort: 8081}]}]}
status: {podIPs: [{ip: 10.1.0.2}], conditions: [{type: Ready, status: "True"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: c, namespace: shop, uid: uc, labels: {app: cart}}
spec: {nodeName: node-2, serviceAccountName: cart, containers: [{name: app, ports: [{name: http, containerPort: 8080}]}]}
status: {podIPs: [{ip: 10.1.0.3}], conditions: [{type: Ready, status: "False"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: new, namespace: shop, uid: un, labels: {app: cart}}
spec: {nodeName: node-1, serviceAccountName: cart, containers: [{name: app, ports: [{name: http, containerPort: 8080}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: host, namespace: shop, uid: uh, labels: {app: exporter}}
spec: {nodeName: node-1, hostNetwork: true, containers: [{name: app, ports: [{name: http, containerPort: 9100}]}]}
status: {podIPs: [{ip: 172.30.0.11}], conditions: [{type: Ready, status: "True"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: victim, namespace: bank, uid: uv, labels: {app: bank, nodemesh.io/mesh: enabled}}
spec: {nodeName: node-2, serviceAccountName: bank, containers: [{name: app, ports: [{name: http, containerPort: 8080}]}]}
status: {podIPs: [{ip: 10.1.9.1}], conditions: [{type: Ready, status: "True"}]}
---
"#;

/// A service's spec, its slices (`None`: there are none), and what is found at its address from each node.
struct Case {
    name: &'static str,
    service: &'static str,
    slices: &'static [&'static str],
    node_1: &'static [&'static str],
    node_2: &'static [&'static str],
}

const SELECTING: &str =
    "clusterIP: 10.96.0.10, selector: {app: cart}, ports: [{name: http, port: 80, targetPort: http}]";
const PLAIN: &str = "clusterIP: 10.96.0.10, ports: [{name: http, port: 80}]";

fn text(case: &Case) -> String {
    let mut text = PODS.to_owned();
    text.push_str(&format!(
        "{{apiVersion: v1, kind: Service, metadata: {{name: cart, namespace: shop}}, spec: {{{}}}}}\n",
        case.service
    ));
    for (index, slice) in case.slices.iter().enumerate() {
        text.push_str(&format!(
            "---\n{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {{name: cart-{index}, namespace: shop, \
             labels: {{kubernetes.io/service-name: cart}}}}, {slice}}}\n"
        ));
    }
    text
}

/// An endpoint that is a pod.
macro_rules! pod {
    ($name:literal, $address:literal, $node:literal $(, $rest:literal)?) => {
        concat!(
            "{addresses: ['", $address, "'], nodeName: ", $node, ", targetRef: {kind: Pod, name: ", $name,
            ", uid: u", $name, "}", $(", ", $rest,)? "}"
        )
    };
}

macro_rules! slice {
    (@ $head:literal, $($endpoint:expr),+) => {
        concat!($head, "endpoints: [", $($endpoint, ", ",)+ "]")
    };
    ($($endpoint:expr),+) => {
        concat!("addressType: IPv4, ports: [{name: http, port: 8080}], endpoints: [", $($endpoint, ", ",)+ "]")
    };
}

#[test]
fn endpoints_are_those_of_the_slices() {
    let cases = [
        Case {
            name: "no slices: the selector picks, each with its own port; not ready or without an address: not there",
            service: SELECTING,
            slices: &[],
            node_1: &["a 10.1.0.1:8080", "b 10.1.0.2:8081"],
            node_2: &["a 10.1.0.1:8080", "b 10.1.0.2:8081"],
        },
        Case {
            name: "slices win over the selector, ready or not",
            service: SELECTING,
            slices: &[
                slice!(pod!("c", "10.1.0.3", "node-2")),
                slice!(@ "ports: [{name: http, port: 8081}], ", pod!("b", "10.1.0.2", "node-2")),
            ],
            node_1: &["b 10.1.0.2:8081", "c 10.1.0.3:8080"],
            node_2: &["b 10.1.0.2:8081", "c 10.1.0.3:8080"],
        },
        Case {
            name: "an empty slice: no endpoint, whatever the selector says",
            service: SELECTING,
            slices: &["addressType: IPv4, ports: [], endpoints: []"],
            node_1: &[],
            node_2: &[],
        },
        Case {
            name: "in two slices at once: once",
            service: SELECTING,
            slices: &[
                slice!(pod!("a", "10.1.0.1", "node-1")),
                slice!(pod!("a", "10.1.0.1", "node-1")),
            ],
            node_1: &["a 10.1.0.1:8080"],
            node_2: &["a 10.1.0.1:8080"],
        },
        Case {
            name: "not ready",
            service: SELECTING,
            slices: &[slice!(
                pod!("a", "10.1.0.1", "node-1"),
                pod!(
                    "b",
                    "10.1.0.2",
                    "node-2",
                    "conditions: {ready: false, serving: true, terminating: true}"
                )
            )],
            node_1: &["a 10.1.0.1:8080"],
            node_2: &["a 10.1.0.1:8080"],
        },
        Case {
            name: "none ready: those that terminate and serve",
            service: SELECTING,
            slices: &[slice!(
                pod!(
                    "a",
                    "10.1.0.1",
                    "node-1",
                    "conditions: {ready: false, serving: false, terminating: false}"
                ),
                pod!(
                    "b",
                    "10.1.0.2",
                    "node-2",
                    "conditions: {ready: false, serving: true, terminating: true}"
                ),
                pod!(
                    "c",
                    "10.1.0.3",
                    "node-2",
                    "conditions: {ready: false, serving: false, terminating: true}"
                )
            )],
            node_1: &["b 10.1.0.2:8080"],
            node_2: &["b 10.1.0.2:8080"],
        },
        Case {
            name: "the slice's port has another name",
            service: PLAIN,
            slices: &["addressType: IPv4, ports: [{name: other, port: 8080}], endpoints: [{addresses: [10.1.0.1]}]"],
            node_1: &[],
            node_2: &[],
        },
        Case {
            name: "addresses that are no pods of the mesh stand for themselves; a pod's address is the pod",
            service: PLAIN,
            slices: &[slice!(
                "{addresses: [203.0.113.9]}",
                "{addresses: [10.1.0.1]}",
                "{addresses: [172.30.0.12]}"
            )],
            node_1: &[
                "172.30.0.12 172.30.0.12:8080",
                "203.0.113.9 203.0.113.9:8080",
                "a 10.1.0.1:8080",
            ],
            node_2: &[
                "172.30.0.12 172.30.0.12:8080",
                "203.0.113.9 203.0.113.9:8080",
                "a 10.1.0.1:8080",
            ],
        },
        Case {
            name: "a pod that is not there, another pod of that name, and a pod without that address: left out",
            service: PLAIN,
            slices: &[slice!(
                pod!("gone", "10.1.0.77", "node-1"),
                "{addresses: [10.1.0.1], targetRef: {kind: Pod, name: a, uid: older}}",
                pod!("b", "10.1.0.1", "node-1"),
                pod!("c", "10.1.0.3", "node-2")
            )],
            node_1: &["c 10.1.0.3:8080"],
            node_2: &["c 10.1.0.3:8080"],
        },
        Case {
            name: "a pod whose address the API server does not tell yet",
            service: PLAIN,
            slices: &[slice!(
                pod!("n", "10.1.0.9", "node-1"),
                "{addresses: [10.1.0.8], targetRef: {kind: Pod, name: new}}"
            )],
            node_1: &["new 10.1.0.8:8080"],
            node_2: &["new 10.1.0.8:8080"],
        },
        Case {
            name: "a pod with its node's network",
            service: PLAIN,
            slices: &[
                "ports: [{name: http, port: 9100}], endpoints: [{addresses: [172.30.0.11], nodeName: node-1, targetRef: {kind: Pod, name: host, uid: uh}}]",
            ],
            node_1: &["host 172.30.0.11:9100"],
            node_2: &["host 172.30.0.11:9100"],
        },
        Case {
            name: "node-local",
            service: "clusterIP: 10.96.0.10, internalTrafficPolicy: Local, ports: [{name: http, port: 80}]",
            slices: &[slice!(
                pod!("a", "10.1.0.1", "node-1"),
                pod!("b", "10.1.0.2", "node-2"),
                pod!("c", "10.1.0.3", "node-2", "conditions: {ready: false}")
            )],
            node_1: &["a 10.1.0.1:8080"],
            node_2: &["b 10.1.0.2:8080"],
        },
        Case {
            name: "node-local, none there",
            service: "clusterIP: 10.96.0.10, internalTrafficPolicy: Local, ports: [{name: http, port: 80}]",
            slices: &[slice!(pod!("a", "10.1.0.1", "node-1"))],
            node_1: &["a 10.1.0.1:8080"],
            node_2: &[],
        },
        Case {
            name: "zone hints",
            service: PLAIN,
            slices: &[slice!(
                pod!("a", "10.1.0.1", "node-1", "hints: {forZones: [{name: zone1}]}"),
                pod!(
                    "b",
                    "10.1.0.2",
                    "node-2",
                    "hints: {forZones: [{name: zone2}, {name: zone1}]}"
                )
            )],
            node_1: &["a 10.1.0.1:8080", "b 10.1.0.2:8080"],
            node_2: &["b 10.1.0.2:8080"],
        },
        Case {
            name: "zone hints, not on every endpoint: out of date",
            service: PLAIN,
            slices: &[slice!(
                pod!("a", "10.1.0.1", "node-1", "hints: {forZones: [{name: zone1}]}"),
                pod!("b", "10.1.0.2", "node-2")
            )],
            node_1: &["a 10.1.0.1:8080", "b 10.1.0.2:8080"],
            node_2: &["a 10.1.0.1:8080", "b 10.1.0.2:8080"],
        },
        Case {
            name: "zone hints, none for the zone",
            service: PLAIN,
            slices: &[slice!(pod!(
                "a",
                "10.1.0.1",
                "node-1",
                "hints: {forZones: [{name: zone1}]}"
            ))],
            node_1: &["a 10.1.0.1:8080"],
            node_2: &["a 10.1.0.1:8080"],
        },
        Case {
            name: "zone hints count ready endpoints only",
            service: PLAIN,
            slices: &[slice!(
                pod!(
                    "a",
                    "10.1.0.1",
                    "node-1",
                    "conditions: {ready: false}, hints: {forZones: [{name: zone1}]}"
                ),
                pod!("b", "10.1.0.2", "node-2", "hints: {forZones: [{name: zone2}]}")
            )],
            node_1: &["b 10.1.0.2:8080"],
            node_2: &["b 10.1.0.2:8080"],
        },
        Case {
            name: "node hints before zone hints",
            service: PLAIN,
            slices: &[slice!(
                pod!(
                    "a",
                    "10.1.0.1",
                    "node-1",
                    "hints: {forNodes: [{name: node-1}], forZones: [{name: zone1}]}"
                ),
                pod!(
                    "b",
                    "10.1.0.2",
                    "node-1",
                    "hints: {forNodes: [{name: node-9}], forZones: [{name: zone1}]}"
                ),
                pod!(
                    "c",
                    "10.1.0.3",
                    "node-2",
                    "hints: {forNodes: [{name: node-9}], forZones: [{name: zone2}]}"
                )
            )],
            node_1: &["a 10.1.0.1:8080"],
            node_2: &["c 10.1.0.3:8080"],
        },
    ];
    for case in &cases {
        let set = set(&text(case));
        for (node, expected) in [("node-1", case.node_1), ("node-2", case.node_2)] {
            let view = view_on(node, &set);
            assert_eq!(behind(&view, "10.96.0.10:80"), expected, "{} on {node}", case.name);
        }
    }
}

#[test]
fn an_endpoint_that_is_no_workload_is_spoken_to_in_plaintext() {
    let case = Case {
        name: "",
        service: PLAIN,
        slices: &[slice!("{addresses: [203.0.113.9]}")],
        node_1: &[],
        node_2: &[],
    };
    let view = view_on("node-1", &set(&text(&case)));
    let Destination::ServicePort(port) = view.destination("10.96.0.10:80".parse().unwrap()) else {
        panic!("a service")
    };
    let workload = &port.backend.endpoints_v4[0].workload;
    assert!(!workload.enrolled);
    assert_eq!(workload.identity.kind(), IdentityKind::Outside);
    assert!(view.workload(&workload.name).is_none());
    assert!(view.workload_by_address("203.0.113.9".parse().unwrap()).is_none());
}

#[test]
fn what_an_address_is() {
    let case = Case {
        name: "",
        service: "clusterIPs: [10.96.0.10, 'fd00:96::10'], externalIPs: [192.0.2.7, 10.1.9.1], ports: [{name: http, port: 80, nodePort: 30080}]",
        slices: &[
            slice!(pod!("a", "10.1.0.1", "node-1")),
            "addressType: IPv6, ports: [{name: http, port: 8080}], endpoints: [{addresses: ['fd00::1'], targetRef: {kind: Pod, name: a}}]",
        ],
        node_1: &[],
        node_2: &[],
    };
    let headless = "---\n{apiVersion: v1, kind: Service, metadata: {name: cart-0, namespace: shop}, spec: {clusterIP: None, selector: {app: cart}, ports: [{port: 80}]}}\n";
    let view = view_on("node-2", &set(&format!("{}{headless}", text(&case))));
    let a = "a 10.1.0.1:8080";
    let table: [(&str, &str, &[&str]); 11] = [
        ("the cluster's address", "10.96.0.10:80", &[a]),
        ("of the other family", "[fd00:96::10]:80", &["a [fd00::1]:8080"]),
        ("mapped into the other family", "[::ffff:10.96.0.10]:80", &[]),
        ("a port that it does not have", "10.96.0.10:81", &["no port"]),
        ("an external address", "192.0.2.7:80", &[a]),
        (
            "an external address that is a pod's stays the pod's",
            "10.1.9.1:80",
            &["workload victim"],
        ),
        ("a node's port", "172.30.0.12:30080", &[a]),
        ("the same port elsewhere", "172.30.0.99:30080", &["outside"]),
        (
            "a node's address is nobody's, though a pod has it",
            "172.30.0.11:9100",
            &["outside"],
        ),
        ("a pod of a headless service", "10.1.0.2:80", &["workload b"]),
        (
            "an address that the API server does not know",
            "10.1.0.9:80",
            &["outside"],
        ),
    ];
    for (name, address, expected) in table {
        if name.starts_with("mapped") {
            // The endpoints of a family are asked for by the address as it came; what matters is which service it is.
            assert!(
                matches!(view.destination(address.parse().unwrap()), Destination::ServicePort(_)),
                "{name}"
            );
            continue;
        }
        assert_eq!(behind(&view, address), expected, "{name}");
    }
    assert!(view.workload_by_address("172.30.0.11".parse().unwrap()).is_none());
    assert_eq!(
        view.workload(&ObjectName::new("shop", "new")).unwrap().addresses.len(),
        0
    );
}

/// Whoever writes slices and policies in one namespace has no say about another's pods.
#[test]
fn policies_of_a_service_hold_for_pods_of_its_namespace_only() {
    let case = Case {
        name: "",
        service: PLAIN,
        slices: &[slice!("{addresses: [10.1.9.1]}", "{addresses: [10.1.0.1]}")],
        node_1: &[],
        node_2: &[],
    };
    let policies = r#"---
{apiVersion: nodemesh.io/v1alpha1, kind: AccessPolicy, metadata: {name: all, namespace: shop}, spec: {targetRefs: [{kind: Service, name: cart}], action: Allow, rules: [{}]}}
---
{apiVersion: nodemesh.io/v1alpha1, kind: AccessPolicy, metadata: {name: nobody, namespace: bank}, spec: {targetRefs: [{kind: Namespace, name: bank}], action: Allow}}
"#;
    let view = view_on("node-1", &set(&format!("{}{policies}", text(&case))));
    assert_eq!(
        behind(&view, "10.96.0.10:80"),
        ["victim 10.1.9.1:8080", "a 10.1.0.1:8080"]
    );
    let services = |namespace: &str, name: &str| view.inbound(&ObjectName::new(namespace, name), 8080).services.len();
    assert_eq!((services("shop", "a"), services("bank", "victim")), (1, 0));
    let source = mesh_api::authz::SourceAttributes {
        identity: None,
        address: "10.1.0.2".parse().unwrap(),
        port: 1,
    };
    let inbound = view.inbound(&ObjectName::new("bank", "victim"), 8080);
    assert!(mesh_api::authz::decide_flow(&inbound, &source).is_err());
}

/// A pod is guarded by a service's policies from the moment that the selector picks it, not only when it is ready.
#[test]
fn policies_hold_before_a_slice_names_the_pod() {
    let case = Case {
        name: "",
        service: SELECTING,
        slices: &["addressType: IPv4, ports: [], endpoints: []"],
        node_1: &[],
        node_2: &[],
    };
    let view = view_on("node-1", &set(&text(&case)));
    for (pod, port) in [("a", 8080), ("b", 8081), ("new", 8080)] {
        assert_eq!(
            view.inbound(&ObjectName::new("shop", pod), port).services.len(),
            1,
            "{pod}"
        );
    }
}

#[test]
fn a_nodes_address_is_that_of_each_enrolled_pod_of_its_network_who_proves_it() {
    let pod = |name: &str, mesh: &str, host_network: bool, node: &str| {
        format!(
            "---\n{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: shop, uid: u{name}, labels: \
             {{nodemesh.io/mesh: {mesh}}}}}, spec: {{nodeName: {node}, hostNetwork: {host_network}, serviceAccountName: \
             {name}, containers: [{{name: app}}]}}, status: {{podIPs: [{{ip: 172.30.0.11}}], conditions: [{{type: Ready, \
             status: \"True\"}}]}}}}\n"
        )
    };
    let node = "---\n{apiVersion: v1, kind: Node, metadata: {name: node-1}, status: {addresses: [{type: InternalIP, address: \
                172.30.0.11}]}}\n";
    let text = [
        node.to_owned(),
        pod("one", "enabled", true, "node-1"),
        pod("two", "enabled", true, "node-1"),
        pod("outside", "disabled", true, "node-1"),
        // Its status claims an address that its node does not have.
        pod("liar", "enabled", true, "node-2"),
    ];
    let view = view_on("node-1", &set(&text.concat()));
    let node: std::net::IpAddr = "172.30.0.11".parse().unwrap();
    let proven = |ip: std::net::IpAddr, account: &str| {
        let identity = format!("spiffe://cluster.local/ns/shop/sa/{account}").parse().unwrap();
        view.source(ip, &identity)
            .map(|workload| workload.name.name.to_string())
    };
    for (account, expected) in [
        ("one", Some("one")),
        ("two", Some("two")),
        ("outside", None),
        ("liar", None),
        ("nobody", None),
    ] {
        assert_eq!(proven(node, account).as_deref(), expected, "{account}");
    }
    assert_eq!(
        proven("172.30.0.12".parse().unwrap(), "one"),
        None,
        "another node's address"
    );
    assert!(view.has_sources_at(node) && view.workload_by_address(node).is_none());
    assert!(view.workloads().all(|workload| !workload.is_steered()));
}
