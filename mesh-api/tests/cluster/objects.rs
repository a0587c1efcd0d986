//! What is read of objects, and what makes no difference.

use std::time::Duration;

use mesh_api::document::{DocumentSet, Kind, from_json, parse, read_object};
use serde_json::{Value, json};

use crate::world::{objects, read, resources, services, set, workloads};

const POD: &str = r#"
apiVersion: v1
kind: Pod
metadata:
  name: cart-0
  namespace: shop
  uid: 6a2b0f9e-0000-4000-8000-000000000001
  resourceVersion: "812"
  generation: 1
  creationTimestamp: "2026-01-31T12:00:00Z"
  labels: {app: cart, version: v1, nodemesh.io/mesh: enabled}
  annotations: {kubernetes.io/config.source: api, nodemesh.io/exclude-inbound-ports: "9100"}
  ownerReferences: [{apiVersion: apps/v1, kind: StatefulSet, name: cart, uid: x, controller: true}]
spec:
  serviceAccountName: cart
  nodeName: node-1
  restartPolicy: Always
  dnsPolicy: ClusterFirst
  initContainers:
  - {name: migrate, image: x, ports: [{containerPort: 1111, name: gone}]}
  - {name: logs, image: x, restartPolicy: Always, ports: [{containerPort: 2020, name: logs}], readinessProbe: {httpGet: {path: /ready, port: logs, scheme: HTTP}}}
  containers:
  - name: app
    image: shop/cart:v1
    command: [/cart]
    env: [{name: KEY, valueFrom: {secretKeyRef: {name: s, key: k}}}, {name: A, value: b}]
    ports: [{name: http, containerPort: 8080, protocol: TCP}, {name: dns, containerPort: 53, protocol: UDP}]
    livenessProbe: {grpc: {port: 9000, service: ""}, periodSeconds: 10, timeoutSeconds: 1}
    readinessProbe: {exec: {command: [/bin/true]}}
status:
  phase: Running
  hostIP: 172.30.0.11
  podIP: 10.244.1.7
  podIPs: [{ip: 10.244.1.7}, {ip: "fd00:10::7"}]
  startTime: "2026-01-31T12:00:01Z"
  conditions:
  - {type: PodScheduled, status: "True", lastTransitionTime: "2026-01-31T12:00:01Z"}
  - {type: Ready, status: "True", lastTransitionTime: "2026-01-31T12:00:05Z"}
  containerStatuses: [{name: app, ready: true, restartCount: 0, state: {running: {startedAt: "2026-01-31T12:00:02Z"}}}]
"#;

const OTHERS: &str = r#"
apiVersion: v1
kind: Node
metadata: {name: node-1, uid: n1, labels: {topology.kubernetes.io/zone: zone1, kubernetes.io/os: linux}, annotations: {a: b}}
spec: {podCIDR: 10.244.1.0/24}
status:
  addresses: [{type: InternalIP, address: 172.30.0.11}, {type: Hostname, address: node-1}]
  conditions: [{type: Ready, status: "True", lastHeartbeatTime: "2026-01-31T12:00:00Z"}]
---
apiVersion: v1
kind: Namespace
metadata: {name: shop, uid: ns1, labels: {nodemesh.io/mesh: enabled, kubernetes.io/metadata.name: shop}}
status: {phase: Active}
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop, uid: s1, annotations: {a: b}, labels: {x: y}}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10, "fd00:96::10"]
  externalIPs: [192.0.2.7]
  selector: {app: cart}
  sessionAffinity: ClientIP
  sessionAffinityConfig: {clientIP: {timeoutSeconds: 600}}
  internalTrafficPolicy: Local
  ports:
  - {name: http, port: 80, targetPort: http, protocol: TCP, nodePort: 30080, appProtocol: kubernetes.io/h2c}
  - {name: dns, port: 53, targetPort: 53, protocol: UDP}
status: {loadBalancer: {ingress: [{ip: 198.51.100.4, ipMode: VIP}, {ip: 198.51.100.5, ipMode: Proxy}, {hostname: lb.example}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: cart-abcde
  namespace: shop
  uid: e1
  generation: 7
  labels: {kubernetes.io/service-name: cart, endpointslice.kubernetes.io/managed-by: endpointslice-controller.k8s.io}
  annotations: {endpoints.kubernetes.io/last-change-trigger-time: "2026-01-31T12:00:00Z"}
addressType: IPv4
ports: [{name: http, port: 8080, protocol: TCP, appProtocol: kubernetes.io/h2c}, {name: dns, port: 53, protocol: UDP}]
endpoints:
- addresses: [10.244.1.7]
  conditions: {ready: true, serving: true, terminating: false}
  nodeName: node-1
  zone: zone1
  targetRef: {kind: Pod, name: cart-0, namespace: shop, uid: 6a2b0f9e-0000-4000-8000-000000000001}
  hints: {forZones: [{name: zone1}], forNodes: [{name: node-1}]}
- addresses: [203.0.113.9]
---
apiVersion: gateway.networking.k8s.io/v1beta1
kind: ReferenceGrant
metadata: {name: from-web, namespace: shop, uid: g1, generation: 2}
spec:
  from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: web}]
  to: [{group: "", kind: Service, name: cart}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: cart, namespace: shop, uid: r1, generation: 3, creationTimestamp: "2026-01-31T12:00:00Z", annotations: {kubectl.kubernetes.io/last-applied-configuration: "{}"}}
spec:
  parentRefs: [{group: "", kind: Service, name: cart, port: 80}]
  rules: [{matches: [{path: {type: PathPrefix, value: /}}], backendRefs: [{group: "", kind: Service, name: cart, port: 80, weight: 1}]}]
status: {parents: []}
---
apiVersion: nodemesh.io/v1alpha1
kind: AccessPolicy
metadata: {name: cart, namespace: shop, uid: a1, generation: 4}
spec: {targetRefs: [{kind: Service, name: cart}], action: Allow, rules: [{from: [{namespaces: [web]}]}]}
status: {conditions: [], revision: 4}
"#;

fn object(kind: &str) -> Value {
    let all = objects(POD).into_iter().chain(objects(OTHERS));
    all.into_iter()
        .find(|object| object["kind"] == kind)
        .expect("an object")
}

/// Sets a field; the path's parts are keys, with `~1` for a slash, and indexes.
fn put(object: &mut Value, path: &str, value: Value) {
    let mut at = object;
    for part in path.split('/') {
        at = match part.parse::<usize>() {
            Ok(index) => &mut at[index],
            Err(_) => &mut at[part.replace("~1", "/").as_str()],
        };
    }
    *at = value;
}

#[test]
fn what_decisions_do_not_look_at_makes_no_difference() {
    let time = || json!("2026-02-01T00:00:00Z");
    let cases: Vec<(&str, &str, Value)> = vec![
        ("Pod", "metadata/resourceVersion", json!("900")),
        ("Pod", "metadata/generation", json!(2)),
        (
            "Pod",
            "metadata/managedFields",
            json!([{"manager": "kubelet", "fieldsV1": {"f:status": {}}}]),
        ),
        ("Pod", "metadata/annotations/other", json!("x")),
        ("Pod", "metadata/finalizers", json!(["x"])),
        ("Pod", "spec/containers/0/image", json!("shop/cart:v2")),
        ("Pod", "spec/containers/0/env/1/value", json!("c")),
        (
            "Pod",
            "spec/containers/0/readinessProbe/exec/command/0",
            json!("/bin/false"),
        ),
        (
            "Pod",
            "spec/initContainers/1/readinessProbe/httpGet/path",
            json!("/other"),
        ),
        ("Pod", "spec/initContainers/0/ports/0/containerPort", json!(2222)),
        ("Pod", "status/conditions/0/lastTransitionTime", time()),
        ("Pod", "status/conditions/1/lastTransitionTime", time()),
        ("Pod", "status/conditions/1/message", json!("x")),
        ("Pod", "status/containerStatuses/0/restartCount", json!(5)),
        ("Pod", "status/startTime", time()),
        ("Pod", "status/qosClass", json!("Burstable")),
        ("Node", "status/conditions/0/lastHeartbeatTime", time()),
        ("Node", "status/images", json!([{"names": ["x"]}])),
        ("Node", "metadata/annotations/a", json!("c")),
        ("Node", "metadata/labels/other", json!("c")),
        ("Node", "spec/unschedulable", json!(true)),
        ("Namespace", "metadata/labels/other", json!("c")),
        ("Namespace", "status/phase", json!("Terminating")),
        ("Service", "metadata/annotations/a", json!("c")),
        ("Service", "metadata/labels/x", json!("c")),
        ("Service", "spec/ports/1/nodePort", json!(30053)),
        ("Service", "status/conditions", json!([])),
        ("EndpointSlice", "metadata/generation", json!(8)),
        (
            "EndpointSlice",
            "metadata/annotations/endpoints.kubernetes.io~1x",
            time(),
        ),
        ("EndpointSlice", "endpoints/0/zone", json!("zone9")),
        ("EndpointSlice", "endpoints/0/targetRef/resourceVersion", json!("5")),
        ("HTTPRoute", "status/parents", json!([{"controllerName": "x"}])),
        ("HTTPRoute", "metadata/annotations/x", json!("y")),
        ("HTTPRoute", "metadata/labels", json!({"x": "y"})),
        ("AccessPolicy", "status/revision", json!(9)),
    ];
    for (kind, path, value) in cases {
        let before = object(kind);
        let mut after = before.clone();
        put(&mut after, path, value);
        assert_ne!(before, after, "{kind} {path} changes something");
        assert_eq!(read(&before), read(&after), "{kind} {path}");
        assert!(read(&before).same_as(&read(&after)), "{kind} {path}");
    }
}

#[test]
fn what_decisions_look_at_makes_a_difference() {
    let cases: Vec<(&str, &str, Value)> = vec![
        ("Pod", "metadata/uid", json!("another")),
        ("Pod", "metadata/labels/version", json!("v2")),
        (
            "Pod",
            "metadata/annotations/nodemesh.io~1exclude-inbound-ports",
            json!("9101"),
        ),
        ("Pod", "metadata/deletionTimestamp", json!("2026-02-01T00:00:00Z")),
        ("Pod", "spec/nodeName", json!("node-2")),
        ("Pod", "spec/serviceAccountName", json!("other")),
        ("Pod", "spec/containers/0/ports/0/containerPort", json!(8081)),
        ("Pod", "spec/containers/0/livenessProbe/grpc/port", json!(9001)),
        ("Pod", "status/podIPs/0/ip", json!("10.244.1.8")),
        ("Pod", "status/phase", json!("Succeeded")),
        ("Pod", "status/conditions/1/status", json!("False")),
        ("Node", "status/addresses/0/address", json!("172.30.0.12")),
        ("Node", "metadata/labels/topology.kubernetes.io~1zone", json!("zone2")),
        ("Namespace", "metadata/labels/nodemesh.io~1mesh", json!("disabled")),
        ("Service", "spec/clusterIPs/0", json!("10.96.0.11")),
        ("Service", "spec/ports/0/targetPort", json!(81)),
        ("Service", "spec/internalTrafficPolicy", json!("Cluster")),
        ("Service", "status/loadBalancer/ingress/0/ip", json!("198.51.100.9")),
        ("EndpointSlice", "endpoints/0/conditions/ready", json!(false)),
        ("EndpointSlice", "endpoints/0/conditions/terminating", json!(true)),
        ("EndpointSlice", "endpoints/0/hints/forZones/0/name", json!("zone2")),
        ("EndpointSlice", "endpoints/0/targetRef/uid", json!("another")),
        ("EndpointSlice", "ports/0/port", json!(8081)),
        (
            "EndpointSlice",
            "metadata/labels/kubernetes.io~1service-name",
            json!("other"),
        ),
        ("ReferenceGrant", "spec/to/0/name", json!("other")),
        ("HTTPRoute", "spec/parentRefs/0/port", json!(81)),
        ("AccessPolicy", "spec/action", json!("Deny")),
    ];
    for (kind, path, value) in cases {
        let before = object(kind);
        let mut after = before.clone();
        put(&mut after, path, value);
        assert_ne!(read(&before), read(&after), "{kind} {path}");
        assert!(!read(&before).same_as(&read(&after)), "{kind} {path}");
    }
}

#[test]
fn a_document_without_its_text_is_printed_and_reads_back() {
    let all: Vec<Value> = objects(POD).into_iter().chain(objects(OTHERS)).collect();
    for object in &all {
        let document = read(object);
        let again = from_json("again", &document.to_json()).unwrap_or_else(|problems| panic!("{problems:?}"));
        assert_eq!(document, again, "{}", document.to_yaml());
    }
    // Whoever reads the printed text as people's text, as `explain` does, comes to the same resources.
    let of_objects: DocumentSet = all.iter().map(read).collect();
    let text: Vec<String> = of_objects.iter().map(|document| document.to_yaml()).collect();
    let of_text: DocumentSet = parse("printed", &text.join("---\n"))
        .expect("documents")
        .into_iter()
        .collect();
    assert_eq!(resources(&of_objects), resources(&of_text));
}

#[test]
fn items_of_lists_name_no_kind() {
    let mut pod = object("Pod");
    pod.as_object_mut().unwrap().remove("kind");
    pod.as_object_mut().unwrap().remove("apiVersion");
    assert_eq!(read_object(Kind::Pod, &pod, None).unwrap(), read(&object("Pod")));
    assert!(from_json("pod", &pod).is_err());
}

/// Everything that an object says of a workload.
#[test]
fn a_pod_is_a_workload_while_it_runs() {
    let workload = |change: &dyn Fn(&mut Value)| {
        let mut pod = object("Pod");
        change(&mut pod);
        let mut all: DocumentSet = objects(OTHERS).iter().map(read).collect();
        all.insert(read(&pod));
        workloads(&all).into_iter().next()
    };
    let there = workload(&|_| {}).expect("a workload");
    assert_eq!(&*there.uid, "6a2b0f9e-0000-4000-8000-000000000001");
    assert_eq!(&*there.zone, "zone1");
    assert_eq!(
        there.node_addresses,
        ["172.30.0.11".parse::<std::net::IpAddr>().unwrap()]
    );
    assert_eq!(there.probe_ports, [2020, 9000]);
    assert_eq!(there.exclude_inbound_ports, [9100]);
    let ports: Vec<(&str, u16)> = there.ports.iter().map(|port| (&*port.name, port.port)).collect();
    assert_eq!(ports, [("http", 8080), ("logs", 2020)]);
    assert!(there.enrolled && there.ready && !there.host_network);

    struct Case {
        name: &'static str,
        change: fn(&mut Value),
        /// Addresses, ready, enrolled; `None`: no workload.
        expected: Option<(usize, bool, bool)>,
    }
    let cases = [
        Case {
            name: "terminates: it runs on, and is no endpoint",
            change: |pod| pod["metadata"]["deletionTimestamp"] = json!("2026-02-01T00:00:00Z"),
            expected: Some((2, false, true)),
        },
        Case {
            name: "succeeded",
            change: |pod| pod["status"]["phase"] = json!("Succeeded"),
            expected: None,
        },
        Case {
            name: "failed",
            change: |pod| pod["status"]["phase"] = json!("Failed"),
            expected: None,
        },
        Case {
            name: "bound, without an address: its agent must find it",
            change: |pod| pod["status"] = json!({"phase": "Pending"}),
            expected: Some((0, false, true)),
        },
        Case {
            name: "no status at all",
            change: |pod| {
                pod.as_object_mut().unwrap().remove("status");
            },
            expected: Some((0, false, true)),
        },
        Case {
            name: "not bound",
            change: |pod| {
                pod["status"] = json!({"phase": "Pending"});
                pod["spec"].as_object_mut().unwrap().remove("nodeName");
            },
            expected: None,
        },
        Case {
            name: "no condition yet: not ready",
            change: |pod| pod["status"]["conditions"] = json!([]),
            expected: Some((2, false, true)),
        },
        Case {
            name: "the node's network: enrolled as its label says, as a source",
            change: |pod| pod["spec"]["hostNetwork"] = json!(true),
            expected: Some((2, true, true)),
        },
        Case {
            name: "its own label wins over the namespace's",
            change: |pod| pod["metadata"]["labels"]["nodemesh.io/mesh"] = json!("disabled"),
            expected: Some((2, true, false)),
        },
        Case {
            name: "a label that is neither counts as absent: the namespace's holds",
            change: |pod| pod["metadata"]["labels"]["nodemesh.io/mesh"] = json!("yes"),
            expected: Some((2, true, true)),
        },
        Case {
            name: "no labels at all: the namespace's holds",
            change: |pod| {
                pod["metadata"].as_object_mut().unwrap().remove("labels");
            },
            expected: Some((2, true, true)),
        },
    ];
    for case in cases {
        let found = workload(&case.change).map(|w| (w.addresses.len(), w.ready, w.enrolled));
        assert_eq!(found, case.expected, "{}", case.name);
    }
}

#[test]
fn what_a_text_is_refused_for_an_api_server_has_taken() {
    let mut pod = object("Pod");
    pod["metadata"]["labels"]["nodemesh.io/mesh"] = json!("yes");
    pod["metadata"]["annotations"]["nodemesh.io/exclude-inbound-ports"] = json!("http");
    pod["spec"]["containers"][0]["livenessProbe"] = json!({"tcpSocket": {"port": "nobody"}});
    let text = serde_yaml_ng::to_string(&pod).unwrap();
    assert_eq!(parse("text", &text).unwrap_err().len(), 3);

    let all: DocumentSet = [read(&pod)].into_iter().collect();
    assert!(workloads(&all)[0].exclude_inbound_ports.is_empty());
    let told: Vec<String> = all.validate().iter().map(ToString::to_string).collect();
    assert_eq!(told.len(), 2, "{told:?}");
    assert!(
        told[0].contains("nodemesh.io/mesh") && told[1].contains("exclude-inbound-ports"),
        "{told:?}"
    );
}

#[test]
fn services_of_every_type() {
    let one = services(&set(OTHERS)).remove(0);
    let text = |addresses: &[std::net::IpAddr]| addresses.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(text(&one.addresses), ["10.96.0.10", "fd00:96::10"]);
    assert_eq!(text(&one.external_addresses), ["192.0.2.7", "198.51.100.4"]);
    assert_eq!(one.session_affinity, Some(Duration::from_secs(600)));
    assert!(one.node_local);
    assert_eq!(one.ports.len(), 1);
    assert_eq!(one.ports[0].node_port, Some(30080));

    // The name of each case, what is changed in the spec, and (addresses, affinity seconds, selected by labels).
    let cases = [
        (
            "headless",
            json!({"clusterIP": "None", "selector": {"a": "b"}, "ports": [{"port": 80}]}),
            (0, None, true),
        ),
        (
            "a name in DNS",
            json!({"type": "ExternalName", "externalName": "example.com", "selector": {"a": "b"}}),
            (0, None, false),
        ),
        (
            "the default timeout",
            json!({"clusterIP": "10.96.0.1", "sessionAffinity": "ClientIP", "ports": [{"port": 80}]}),
            (1, Some(10_800), false),
        ),
        (
            "only UDP",
            json!({"clusterIP": "10.96.0.1", "ports": [{"port": 53, "protocol": "UDP"}]}),
            (1, None, false),
        ),
    ];
    for (name, spec, expected) in cases {
        let object =
            json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s", "namespace": "n"}, "spec": spec});
        let all: DocumentSet = [read(&object)].into_iter().collect();
        let service = services(&all).remove(0);
        let found = (
            service.addresses.len(),
            service.session_affinity.map(|time| time.as_secs()),
            !service.selector.is_empty(),
        );
        assert_eq!(found, expected, "{name}");
    }
}

/// Any JSON, and objects with any JSON in the place of some field.
mod anything {
    use mesh_api::document::{Document, from_json};
    use proptest::{collection, prelude::*, sample};

    use super::*;

    fn json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            "[ -~é]{0,12}".prop_map(Value::from),
            sample::select(vec!["10.0.0.1", "None", "ClientIP", "Pod", "Service", "enabled", "::1"])
                .prop_map(Value::from),
        ];
        let name = prop_oneof![
            "[a-z]{1,6}",
            sample::select(vec!["name", "kind", "port", "addresses", "parentRefs", "targetRefs"])
                .prop_map(str::to_owned)
        ];
        leaf.prop_recursive(3, 24, 4, move |inner| {
            prop_oneof![
                collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                collection::btree_map(name.clone(), inner, 0..4).prop_map(|map| map.into_iter().collect()),
            ]
        })
    }

    /// Every place in the object, as JSON pointers.
    fn places(value: &Value, at: &str, found: &mut Vec<String>) {
        found.push(at.to_owned());
        match value {
            Value::Array(items) => {
                for (index, item) in items.iter().enumerate() {
                    places(item, &format!("{at}/{index}"), found);
                }
            }
            Value::Object(map) => {
                for (key, item) in map {
                    let key = key.replace('~', "~0").replace('/', "~1");
                    places(item, &format!("{at}/{key}"), found);
                }
            }
            _ => {}
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        /// Nothing panics; what is read prints and reads back; what guards is never lost.
        #[test]
        fn no_object_is_too_strange(which in any::<sample::Index>(), place in any::<sample::Index>(), value in json()) {
            let all: Vec<Value> = objects(POD).into_iter().chain(objects(OTHERS)).collect();
            let mut object = which.get(&all).clone();
            let kind = crate::world::kind_of(&object);
            let mut found = Vec::new();
            places(&object, "", &mut found);
            let place = place.get(&found);
            *object.pointer_mut(place).unwrap() = value;
            let read = read_object(kind, &object, None);
            if kind.is_policy() && place.starts_with("/spec") {
                prop_assert!(read.is_ok(), "a policy is there, whatever its spec says");
            }
            let Ok(document) = read else { return Ok(()) };
            let set: DocumentSet = [document.clone()].into_iter().collect();
            set.validate();
            mesh_api::status::statuses(&set);
            let resources = set.resources(&crate::world::domain());
            mesh_api::view::View::compile(crate::world::domain(), mesh_api::workload::Revision(1), &resources);
            if !matches!(document, Document::Unreadable(_)) {
                let again = from_json("again", &document.to_json());
                prop_assert_eq!(again.ok(), Some(document));
            } else if kind.is_guard() {
                prop_assert_eq!(resources.len(), 1, "a guard that cannot be read is told to agents");
            }
        }
    }
}
