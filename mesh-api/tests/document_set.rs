//! Sets of documents: what agents get of them, what is missing in them, what an apply changes.

use mesh_api::{
    document::{Change, DocumentKey, DocumentSet, Kind, Problem, Resource, ResourceKey, diff, parse},
    identity::TrustDomain,
    workload::{ObjectName, Service, TargetPort, Workload},
};

fn set(yaml: &str) -> DocumentSet {
    match parse("file.yaml", yaml) {
        Ok(documents) => documents.into_iter().collect(),
        Err(problems) => panic!(
            "{}",
            problems.iter().map(Problem::to_string).collect::<Vec<_>>().join("\n")
        ),
    }
}

const SHOP: &str = "\
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {nodemesh.io/mesh: enabled}}
---
apiVersion: v1
kind: Node
metadata: {name: node-1}
status: {addresses: [{type: InternalIP, address: 192.168.0.1}, {type: Hostname, address: node-1}]}
---
apiVersion: v1
kind: Pod
metadata:
  name: cart-1
  namespace: shop
  labels: {app: cart, version: v1}
  annotations: {nodemesh.io/netns: /run/netns/cart-1, nodemesh.io/exclude-outbound-ports: \"25\"}
spec:
  serviceAccountName: cart
  nodeName: node-1
  containers:
  - name: main
    ports: [{name: grpc-api, containerPort: 9000}]
    readinessProbe: {tcpSocket: {port: grpc-api}}
    livenessProbe: {httpGet: {port: 8081}}
status: {podIPs: [{ip: 10.1.0.5}, {ip: \"fd00::5\"}], conditions: [{type: Ready, status: \"True\"}]}
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec: {clusterIP: 10.96.0.1, selector: {app: cart}, ports: [{name: http, port: 80, targetPort: 8080}, {name: api, port: 81, targetPort: grpc-api, appProtocol: grpc}]}
---
apiVersion: nodemesh.io/v1alpha1
kind: ServiceSubset
metadata: {name: cart-v1, namespace: shop, labels: {a: b}}
spec: {service: cart, labels: {version: v1}}
";

fn trust_domain() -> TrustDomain {
    TrustDomain::new("cluster.local").unwrap()
}

fn workload(set: &DocumentSet, name: &str) -> Option<Workload> {
    set.resources(&trust_domain())
        .into_iter()
        .find_map(|resource| match resource {
            Resource::Workload(workload) if &*workload.name.name == name => Some(Workload::clone(&workload)),
            _ => None,
        })
}

fn service(set: &DocumentSet) -> Service {
    let found = set
        .resources(&trust_domain())
        .into_iter()
        .find_map(|resource| match resource {
            Resource::Service(service) => Some(Service::clone(&service)),
            _ => None,
        });
    found.expect("a service")
}

#[test]
fn agents_get_decided_values() {
    let set = set(SHOP);
    let keys: Vec<ResourceKey> = set.resources(&trust_domain()).iter().map(Resource::key).collect();
    assert_eq!(
        keys,
        [
            ResourceKey::Workload(ObjectName::new("shop", "cart-1")),
            ResourceKey::Service(ObjectName::new("shop", "cart")),
            ResourceKey::Policy(DocumentKey::new(Kind::ServiceSubset, "shop", "cart-v1")),
        ]
    );
    let cart = workload(&set, "cart-1").unwrap();
    assert_eq!(cart.identity.as_str(), "spiffe://cluster.local/ns/shop/sa/cart");
    assert_eq!((&*cart.app, &*cart.version, &*cart.node), ("cart", "v1", "node-1"));
    assert_eq!(
        cart.node_addresses,
        ["192.168.0.1".parse::<std::net::IpAddr>().unwrap()]
    );
    assert_eq!(cart.addresses.len(), 2);
    assert!(cart.enrolled && cart.ready);
    assert_eq!(cart.netns.as_deref(), Some("/run/netns/cart-1"));
    assert_eq!(cart.probe_ports, [8081, 9000]);
    assert_eq!(cart.exclude_outbound_ports, [25]);
    let service = service(&set);
    assert!(service.selects(&cart));
    assert_eq!(service.ports[0].target, TargetPort::Number(8080));
    assert_eq!(cart.target_port(&service.ports[1].target), Some(9000));
}

#[test]
fn the_pods_label_wins_over_its_namespaces() {
    // Namespace's label, pod's label, host network, enrolled.
    let cases = [
        ("", "", false, false),
        ("enabled", "", false, true),
        ("enabled", "disabled", false, false),
        ("disabled", "enabled", false, true),
        ("", "enabled", false, true),
        ("disabled", "", false, false),
        // As a source.
        ("enabled", "enabled", true, true),
        ("", "", true, false),
    ];
    let label = |value: &str| match value {
        "" => "{}".to_owned(),
        value => format!("{{nodemesh.io/mesh: {value}}}"),
    };
    for (of_namespace, of_pod, host_network, enrolled) in cases {
        let (space, own) = (label(of_namespace), label(of_pod));
        let yaml = format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: a, labels: {space}}}\n---\napiVersion: v1\nkind: Pod\n\
             metadata: {{name: p, namespace: a, labels: {own}}}\nspec: {{hostNetwork: {host_network}, containers: [{{name: c}}]}}\n\
             status: {{podIP: 10.0.0.1}}\n"
        );
        let found = workload(&set(&yaml), "p").unwrap().enrolled;
        assert_eq!(found, enrolled, "{of_namespace:?} {of_pod:?} {host_network}");
    }
}

#[test]
fn readiness_and_addresses_decide() {
    let pod = |probe: &str, status: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: p}}\nspec: {{containers: [{{name: c{probe}}}]}}\nstatus: {{{status}}}\n"
        )
    };
    let probe = ", readinessProbe: {tcpSocket: {port: 1}}";
    let ready = "podIP: 10.0.0.1, conditions: [{type: Ready, status: \"True\"}]";
    let not_ready = "podIP: 10.0.0.1, conditions: [{type: Ready, status: \"False\"}]";
    let cases = [
        ("", "podIP: 10.0.0.1", Some(true)),
        (probe, "podIP: 10.0.0.1", Some(false)),
        (probe, ready, Some(true)),
        ("", not_ready, Some(false)),
        ("", "", None),
    ];
    for (probe, status, expected) in cases {
        let found = workload(&set(&pod(probe, status)), "p").map(|workload| workload.ready);
        assert_eq!(found, expected, "{probe} {status}");
    }
}

#[test]
fn what_is_missing_is_a_warning() {
    let more = "\
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: cart, namespace: shop}
spec:
  parentRefs: [{kind: Service, name: cart, port: 99}, {kind: Service, name: cart, sectionName: web}, {kind: Service, name: gone}]
  rules: [{backendRefs: [{name: cart, port: 80}, {name: cart, port: 8080}, {name: none, port: 1}, {group: nodemesh.io, kind: ServiceSubset, name: cart-v1, port: 80}, {group: nodemesh.io, kind: ServiceSubset, name: cart-v9, port: 80}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: gateway, namespace: shop}
spec: {parentRefs: [{name: public}], rules: [{}]}
---
apiVersion: nodemesh.io/v1alpha1
kind: AccessPolicy
metadata: {name: a, namespace: shop}
spec: {targetRefs: [{kind: Service, name: cart, sectionName: web}, {kind: Service, name: gone}], action: Allow}
---
apiVersion: nodemesh.io/v1alpha1
kind: MeshPolicy
metadata: {name: m, namespace: shop}
spec: {targetRefs: [{kind: Namespace, name: gone}], mtls: {mode: strict}}
---
apiVersion: nodemesh.io/v1alpha1
kind: ServiceSubset
metadata: {name: lost, namespace: shop}
spec: {service: gone, labels: {version: v1}}
---
apiVersion: v1
kind: Service
metadata: {name: twin, namespace: shop}
spec: {clusterIP: 10.96.0.1, ports: [{port: 1}]}
";
    let warnings: Vec<String> = set(&format!("{SHOP}{more}"))
        .validate()
        .iter()
        .map(Problem::to_string)
        .collect();
    assert_eq!(
        warnings,
        [
            "Service shop/twin: spec.clusterIPs: 10.96.0.1 is also the address of Service shop/cart, expected an address of its own",
            "ServiceSubset shop/lost: spec.service: there is no Service shop/gone, expected an existing Service",
            "HTTPRoute shop/cart: spec.parentRefs[0].port: Service shop/cart has no port 99, expected one of its ports",
            "HTTPRoute shop/cart: spec.parentRefs[1].sectionName: Service shop/cart has no port \"web\", expected the name of one of its ports",
            "HTTPRoute shop/cart: spec.parentRefs[2]: there is no Service shop/gone, expected an existing Service",
            "HTTPRoute shop/cart: spec.rules[0].backendRefs[1].port: Service shop/cart has no port 8080, expected one of its ports",
            "HTTPRoute shop/cart: spec.rules[0].backendRefs[2]: there is no Service shop/none, expected an existing Service",
            "HTTPRoute shop/cart: spec.rules[0].backendRefs[4]: there is no ServiceSubset shop/cart-v9, expected an existing ServiceSubset",
            "HTTPRoute shop/gateway: spec.parentRefs: no parent is a Service: the mesh does not use this route, expected a parent with kind Service",
            "MeshPolicy shop/m: spec.targetRefs[0]: there is no Namespace gone, expected an existing Namespace",
            "AccessPolicy shop/a: spec.targetRefs[0].sectionName: Service shop/cart has no port web, expected one of its ports, by name or number",
            "AccessPolicy shop/a: spec.targetRefs[1]: there is no Service shop/gone, expected an existing Service",
        ]
    );
    assert_eq!(set(SHOP).validate(), []);
}

#[test]
fn changes_are_told_apart() {
    let old = set(SHOP);
    let mut new = set(&SHOP.replace("targetPort: 8080", "targetPort: 8081"));
    let pod = DocumentKey::new(Kind::Pod, "shop", "cart-1");
    assert!(new.remove(&pod).is_some());
    let account = "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: cart, namespace: shop}\n";
    new.extend(parse("x", account).unwrap());
    let subset = DocumentKey::new(Kind::ServiceSubset, "shop", "cart-v1");
    let mut stored = new.get(&subset).unwrap().clone();
    stored.meta_mut().generation = 7;
    new.insert(stored);
    let changes: Vec<String> = diff(&old, &new)
        .iter()
        .map(|(key, change)| format!("{key} {change:?}"))
        .collect();
    assert_eq!(
        changes,
        [
            "Namespace shop Unchanged",
            "Node node-1 Unchanged",
            "ServiceAccount shop/cart Created",
            "Pod shop/cart-1 Removed",
            "Service shop/cart Changed",
            "ServiceSubset shop/cart-v1 Unchanged",
        ]
    );
    assert_eq!(
        diff(&old, &old)
            .iter()
            .filter(|(_, change)| *change != Change::Unchanged)
            .count(),
        0
    );
}
