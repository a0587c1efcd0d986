//! The world that the tables ask about, and how they ask.

use std::net::{IpAddr, SocketAddr};

use mesh_api::{
    authz::{self, Decision, SourceAttributes},
    document::{DocumentSet, parse},
    explain::PlainRequest,
    identity::TrustDomain,
    request::Request,
    route::{RouteAction, RouteChoice, RouteRule, select},
    view::{Destination, ServicePortView, View},
    workload::{ObjectName, Revision},
};

pub const REVISION: Revision = Revision(7);

/// Two versions of `cart` behind a service, a database, two workloads in `web` and one outside the mesh.
const WORLD: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {nodemesh.io/mesh: enabled}}
---
apiVersion: v1
kind: Namespace
metadata: {name: web, labels: {nodemesh.io/mesh: enabled}}
---
apiVersion: v1
kind: Namespace
metadata: {name: legacy}
---
apiVersion: v1
kind: Pod
metadata: {name: cart-v1, namespace: shop, labels: {app: cart, version: v1}}
spec:
  serviceAccountName: cart
  nodeName: node-1
  containers:
  - {name: app, ports: [{name: http, containerPort: 8080}, {name: metrics, containerPort: 9100}]}
status: {podIPs: [{ip: 10.1.0.1}, {ip: "fd00::1"}], conditions: [{type: Ready, status: "True"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: cart-v2, namespace: shop, labels: {app: cart, version: v2}}
spec:
  serviceAccountName: cart
  nodeName: node-2
  containers:
  - {name: app, ports: [{name: http, containerPort: 8081}, {name: metrics, containerPort: 9100}]}
status: {podIPs: [{ip: 10.1.0.2}], conditions: [{type: Ready, status: "True"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: cart-v3, namespace: shop, labels: {app: cart, version: v3}}
spec:
  serviceAccountName: cart
  nodeName: node-2
  containers:
  - {name: app, ports: [{name: http, containerPort: 8080}]}
status: {podIPs: [{ip: 10.1.0.3}], conditions: [{type: Ready, status: "False"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: db, namespace: shop, labels: {app: db}}
spec: {serviceAccountName: db, nodeName: node-1, containers: [{name: app, ports: [{name: postgres, containerPort: 5432}]}]}
status: {podIPs: [{ip: 10.1.0.4}], conditions: [{type: Ready, status: "True"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: front, namespace: web, labels: {app: front}}
spec: {serviceAccountName: front, nodeName: node-1, containers: [{name: app}]}
status: {podIPs: [{ip: 10.1.1.1}, {ip: "fd00::11"}], conditions: [{type: Ready, status: "True"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: batch, namespace: web, labels: {app: batch}}
spec: {serviceAccountName: batch, nodeName: node-2, containers: [{name: app}]}
status: {podIPs: [{ip: 10.1.1.2}], conditions: [{type: Ready, status: "True"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: old, namespace: legacy, labels: {app: old}}
spec: {serviceAccountName: old, nodeName: node-2, containers: [{name: app}]}
status: {podIPs: [{ip: 10.1.2.1}], conditions: [{type: Ready, status: "True"}]}
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec:
  clusterIPs: [10.96.0.10, "fd00:96::10"]
  selector: {app: cart}
  ports:
  - {name: http, port: 80, targetPort: http}
  - {name: tcp-metrics, port: 9100}
---
apiVersion: v1
kind: Service
metadata: {name: cart-all, namespace: shop}
spec:
  clusterIP: None
  publishNotReadyAddresses: true
  selector: {app: cart}
  ports: [{name: http, port: 80, targetPort: 8080}]
---
apiVersion: v1
kind: Service
metadata: {name: db, namespace: shop}
spec: {clusterIP: 10.96.0.11, selector: {app: db}, ports: [{name: postgres, port: 5432}]}
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: web}
spec: {clusterIP: 10.96.1.10, selector: {app: batch}, ports: [{name: http, port: 80, targetPort: 8000}]}
---
apiVersion: nodemesh.io/v1alpha1
kind: ServiceSubset
metadata: {name: cart-v1, namespace: shop}
spec: {service: cart, labels: {version: v1}}
---
apiVersion: nodemesh.io/v1alpha1
kind: ServiceSubset
metadata: {name: cart-v2, namespace: shop}
spec: {service: cart, labels: {version: v2}}
"#;

/// The view of the world with more documents in it.
pub fn view(documents: &str) -> View {
    view_of(&[("world.yaml", WORLD), ("test.yaml", documents)])
}

/// The view of these sources of documents alone.
pub fn view_of(sources: &[(&str, &str)]) -> View {
    let mut set = DocumentSet::new();
    for (source, text) in sources {
        let parsed = parse(source, text).unwrap_or_else(|problems| {
            let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
            panic!("{}", problems.join("\n"))
        });
        set.extend(parsed);
    }
    let domain = TrustDomain::new("cluster.local").unwrap();
    let resources = set.resources(&domain);
    View::compile(domain, REVISION, &resources)
}

pub fn name(text: &str) -> ObjectName {
    let (namespace, name) = text.split_once('/').unwrap();
    ObjectName::new(namespace, name)
}

pub fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

pub fn service_port(view: &View, at: &str) -> std::sync::Arc<ServicePortView> {
    match view.destination(address(at)) {
        Destination::ServicePort(port) => port,
        other => panic!("{at} is {other:?}"),
    }
}

/// A request from one line: `GET /path?query host header: value; header: value`.
pub fn request(line: &str) -> PlainRequest {
    let mut words = line.splitn(4, ' ');
    let method = words.next().unwrap_or_default();
    let target = words.next().unwrap_or_default();
    let host = words.next().unwrap_or("cart");
    let headers = words
        .next()
        .unwrap_or_default()
        .split("; ")
        .filter_map(|h| h.split_once(": "));
    headers.fold(PlainRequest::new(method, target, host), |request, (name, value)| {
        request.with_header(name, value)
    })
}

/// The rule of `10.96.0.10:80` (or another address) that takes a request from a workload.
pub fn routed<'a>(port: &'a ServicePortView, source_namespace: &str, request: &dyn Request) -> Option<&'a RouteRule> {
    let table = port.routes.as_ref().expect("the service has routes");
    match select(table, source_namespace, request) {
        RouteChoice::Rule(rule) => Some(rule),
        RouteChoice::NoMatch => None,
    }
}

/// The backends of a rule with their weights, as text.
pub fn backends(rule: &RouteRule) -> Vec<String> {
    match &rule.action {
        RouteAction::Redirect(_) => vec!["redirect".to_owned()],
        RouteAction::Forward(backends) => backends
            .iter()
            .map(|one| match &one.backend {
                Ok(backend) => format!("{}*{}", one.weight, backend.key),
                Err(bad) => format!("{}*{bad}", one.weight),
            })
            .collect(),
    }
}

/// `permit RULE`, `deny RULE` or `needs-request`: what a workload gets at a workload's port. With `mtls:` before the
/// source's name it proves its identity, else it does not. The question is a request's line, `connect`, or `flow`.
pub fn decision(view: &View, source: &str, destination: &str, port: u16, question: &str) -> String {
    let (proven, source) = match source.strip_prefix("mtls:") {
        Some(source) => (true, source),
        None => (false, source),
    };
    let workload = view
        .workload(&name(source))
        .unwrap_or_else(|| panic!("no workload {source}"));
    let attributes = SourceAttributes {
        identity: proven.then_some(&workload.identity),
        address: workload
            .addresses
            .first()
            .copied()
            .unwrap_or(IpAddr::from([0, 0, 0, 0])),
        port: 40000,
    };
    let inbound = view.inbound(&name(destination), port);
    let answer = match question {
        "flow" => match authz::decide_flow(&inbound, &attributes) {
            Ok(permit) => Decision::Permit(permit),
            Err(denied) => Decision::Denied(denied),
        },
        "connect" => authz::decide(&inbound, &attributes, None),
        line => authz::decide(&inbound, &attributes, Some(&request(line))),
    };
    match answer {
        Decision::Permit(permit) => {
            assert_eq!(permit.revision(), REVISION);
            format!("permit {}", permit.rule())
        }
        Decision::Denied(denied) => {
            assert_eq!(denied.revision, REVISION);
            format!("deny {}", denied.rule)
        }
        Decision::NeedsRequest => "needs-request".to_owned(),
    }
}
