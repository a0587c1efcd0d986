//! `explain` tells the same story as the decisions.

use mesh_api::explain::{Explanation, Verdict, explain};

use crate::world::{address, name, request, view};

const DOCUMENTS: &str = r#"
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: r, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: cart, port: 80}]
  rules:
  - name: go
    matches: [{path: {type: PathPrefix, value: /go}}]
    filters: [{type: RequestRedirect, requestRedirect: {hostname: x.example, statusCode: 302}}]
  - name: api
    matches: [{path: {type: PathPrefix, value: /api}}]
    filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /internal}}}]
    backendRefs:
    - {group: nodemesh.io, kind: ServiceSubset, name: cart-v1, port: 80, weight: 3}
    - {group: nodemesh.io, kind: ServiceSubset, name: cart-v2, port: 80}
  - name: gone
    matches: [{path: {type: PathPrefix, value: /gone}}]
    backendRefs: [{name: nothing, port: 80}]
---
apiVersion: nodemesh.io/v1alpha1
kind: AccessPolicy
metadata: {name: p, namespace: shop}
spec:
  targetRefs: [{kind: Pod, selector: {matchLabels: {version: v2}}}]
  action: Deny
  rules: [{name: no-batch, from: [{identities: ["spiffe://cluster.local/ns/web/sa/batch"]}], to: [{paths: [{type: PathPrefix, value: /internal}]}]}]
---
apiVersion: nodemesh.io/v1alpha1
kind: MeshPolicy
metadata: {name: strict, namespace: shop}
spec: {targetRefs: [{kind: Pod, selector: {matchLabels: {app: db}}}], mtls: {mode: strict}}
---
apiVersion: nodemesh.io/v1alpha1
kind: RateLimit
metadata: {name: l, namespace: shop}
spec: {targetRefs: [{kind: Service, name: cart}], limits: [{rate: {requests: 5, per: 1s}}]}
"#;

fn ask(source: &str, destination: &str, line: Option<&str>) -> Explanation {
    let request = line.map(request);
    explain(&view(DOCUMENTS), &name(source), address(destination), request.as_ref())
}

#[test]
fn the_verdict_and_the_deciding_rule_are_told() {
    use Verdict::{Answered, Depends, Refused, Served, Untouched};
    let cases = [
        (
            "web/front",
            "10.96.0.10:80",
            Some("GET /api/x"),
            Served,
            "httproute/shop/r/api",
        ),
        (
            "web/batch",
            "10.96.0.10:80",
            Some("GET /api/x"),
            Depends,
            "accesspolicy/shop/p/no-batch",
        ),
        (
            "web/front",
            "10.96.0.10:80",
            Some("GET /go"),
            Answered,
            "httproute/shop/r/go",
        ),
        (
            "web/front",
            "10.96.0.10:80",
            Some("GET /gone"),
            Refused,
            "httproute/shop/r/gone",
        ),
        ("web/front", "10.96.0.10:80", Some("GET /other"), Refused, ""),
        (
            "web/front",
            "10.1.0.1:8080",
            Some("GET /other"),
            Served,
            "ratelimit/shop/l/0",
        ),
        (
            "web/batch",
            "10.1.0.2:8081",
            None,
            Refused,
            "accesspolicy/shop/p/no-batch",
        ),
        ("legacy/old", "10.96.0.11:5432", None, Refused, "mtls-strict"),
        ("web/front", "10.96.0.11:5432", None, Served, "default-allow"),
        ("web/front", "10.96.0.11:1", None, Refused, ""),
        ("web/front", "10.1.2.1:80", None, Served, ""),
        ("web/front", "192.0.2.1:80", None, Untouched, ""),
        ("web/nobody", "192.0.2.1:80", None, Refused, ""),
    ];
    for (source, destination, line, verdict, rule) in cases {
        let told = ask(source, destination, line);
        assert_eq!(told.verdict, verdict, "{source} to {destination} {line:?}: {told:#?}");
        assert_eq!(told.revision, 7);
        let named = rule.is_empty() || told.steps.iter().any(|step| step.rule.as_deref() == Some(rule));
        assert!(named, "{rule} in {told:#?}");
    }
}

#[test]
fn it_serializes_for_programs() {
    let json = serde_json::to_value(ask("web/front", "10.96.0.10:80", Some("GET /api/x"))).unwrap();
    assert_eq!(json["verdict"], "served");
    assert_eq!(json["revision"], 7);
    assert_eq!(json["steps"][0]["stage"], "source");
    let text = json.to_string();
    assert!(
        text.contains("3 of 4 to shop/cart:80/cart-v1") && text.contains("GET /internal/x"),
        "{text}"
    );
}

#[test]
fn routes_of_connections_are_told() {
    let routes = r#"
apiVersion: gateway.networking.k8s.io/v1
kind: TLSRoute
metadata: {name: names, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: db, port: 5432}]
  hostnames: [db.example]
  rules: [{backendRefs: [{name: db, port: 5432, weight: 3}, {name: nobody, port: 1}]}]
"#;
    let view = view(routes);
    let told = |host: Option<&str>| {
        let request = host.map(|host| request(&format!("GET / {host}")));
        let told = explain(&view, &name("web/front"), address("10.96.0.11:5432"), request.as_ref());
        let steps: Vec<String> = told.steps.iter().map(|step| format!("{step:?}")).collect();
        (told.verdict, steps.join("\n"))
    };
    let (verdict, steps) = told(Some("db.example"));
    assert_eq!(verdict, Verdict::Depends);
    for wanted in [
        "tlsroute/shop/names/0",
        "3 of 4 connections to shop/db:5432",
        "1 of 4 connections are reset",
    ] {
        assert!(steps.contains(wanted), "{wanted:?} is not in\n{steps}");
    }
    for host in [Some("other.example"), None] {
        let (verdict, steps) = told(host);
        assert!(
            verdict == Verdict::Refused && steps.contains("none takes this one"),
            "{steps}"
        );
    }
}
