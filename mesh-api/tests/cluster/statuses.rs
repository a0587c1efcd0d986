//! What routes and policies are told about themselves.

use mesh_api::{
    document::{DocumentSet, Kind},
    status::{Condition, DocumentStatus, statuses},
};

use crate::world::set;

const WORLD: &str = r#"
{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {nodemesh.io/mesh: enabled}}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: web, labels: {nodemesh.io/mesh: enabled}}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: out}}
---
apiVersion: v1
kind: Pod
metadata: {name: cart, namespace: shop, uid: u1, labels: {app: cart}}
spec: {nodeName: node-1, containers: [{name: app}]}
---
apiVersion: v1
kind: Pod
metadata: {name: db, namespace: shop, uid: u2, labels: {app: db}}
spec: {nodeName: node-2, containers: [{name: app}]}
---
apiVersion: v1
kind: Pod
metadata: {name: front, namespace: web, uid: u3, labels: {app: front}}
spec: {nodeName: node-3, containers: [{name: app}]}
---
apiVersion: v1
kind: Pod
metadata: {name: done, namespace: web, uid: u4}
spec: {nodeName: node-4, containers: [{name: app}]}
status: {phase: Succeeded}
---
apiVersion: v1
kind: Pod
metadata: {name: old, namespace: out, uid: u5}
spec: {nodeName: node-5, containers: [{name: app}]}
---
{apiVersion: v1, kind: Service, metadata: {name: cart, namespace: shop}, spec: {clusterIP: 10.96.0.1, selector: {app: cart}, ports: [{name: http, port: 80}, {name: alt, port: 81}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: mixed, namespace: shop}, spec: {clusterIP: 10.96.0.4, selector: {app: cart}, ports: [{name: http, port: 80}, {name: redis, port: 6379}, {name: https, port: 443}, {name: x, port: 90}, {name: grpc, port: 50051}, {name: odd, appProtocol: 'kubernetes.io/h2c', port: 91}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: pods, namespace: shop}, spec: {clusterIP: None, selector: {app: cart}, ports: [{port: 80}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: dns, namespace: shop}, spec: {type: ExternalName, externalName: example.com, ports: [{port: 80}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: secret, namespace: web}, spec: {clusterIP: 10.96.0.2, selector: {app: front}, ports: [{port: 80}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: open, namespace: web}, spec: {clusterIP: 10.96.0.3, selector: {app: front}, ports: [{port: 80}]}}
---
{apiVersion: gateway.networking.k8s.io/v1beta1, kind: ReferenceGrant, metadata: {name: g, namespace: web}, spec: {from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: shop}], to: [{group: "", kind: Service, name: open}]}}
---
{apiVersion: nodemesh.io/v1alpha1, kind: ServiceSubset, metadata: {name: cart-v2, namespace: shop}, spec: {service: cart, labels: {v: "2"}}}
---
{apiVersion: nodemesh.io/v1alpha1, kind: ServiceSubset, metadata: {name: lost, namespace: shop}, spec: {service: nobody, labels: {v: "2"}}}
---
"#;

fn told(set: &DocumentSet, kind: Kind, name: &str) -> DocumentStatus {
    let found = statuses(set)
        .into_iter()
        .find(|status| status.key.kind == kind && &*status.key.name == name);
    found.unwrap_or_else(|| panic!("{kind} {name}"))
}

/// `Accepted=False/NoMatchingParent`, space-separated.
fn words(conditions: &[Condition]) -> String {
    let one = |condition: &Condition| {
        let holds = if condition.holds { "True" } else { "False" };
        format!("{}={holds}/{}", condition.kind, condition.reason)
    };
    conditions.iter().map(one).collect::<Vec<_>>().join(" ")
}

const GOOD: &str = "Accepted=True/Accepted ResolvedRefs=True/ResolvedRefs";

#[test]
fn routes_are_told_for_each_parent() {
    // A route's spec without its rules, its backend, and what each parent that is a Service is told.
    let table: [(&str, &str, &str, &[&str]); 25] = [
        (
            "all is well",
            "{group: '', kind: Service, name: cart}",
            "{name: cart, port: 80}",
            &[GOOD],
        ),
        (
            "a port by number",
            "{group: '', kind: Service, name: cart, port: 81}",
            "{name: cart, port: 80}",
            &[GOOD],
        ),
        (
            "a port by name",
            "{group: '', kind: Service, name: cart, sectionName: alt}",
            "{name: cart, port: 80}",
            &[GOOD],
        ),
        (
            "a port that is not there",
            "{group: '', kind: Service, name: cart, port: 82}",
            "{name: cart, port: 80}",
            &["Accepted=False/NoMatchingParent ResolvedRefs=True/ResolvedRefs"],
        ),
        (
            "name and number of different ports",
            "{group: '', kind: Service, name: cart, port: 80, sectionName: alt}",
            "{name: cart, port: 80}",
            &["Accepted=False/NoMatchingParent ResolvedRefs=True/ResolvedRefs"],
        ),
        (
            "each parent by itself",
            "{group: '', kind: Service, name: nobody}, {group: '', kind: Service, name: cart}",
            "{name: cart, port: 80}",
            &["Accepted=False/NoMatchingParent ResolvedRefs=True/ResolvedRefs", GOOD],
        ),
        (
            "a Gateway is somebody else's",
            "{name: gateway}",
            "{name: cart, port: 80}",
            &[],
        ),
        (
            "a headless service",
            "{group: '', kind: Service, name: pods}",
            "{name: cart, port: 80}",
            &["Accepted=False/UnsupportedValue ResolvedRefs=True/ResolvedRefs"],
        ),
        (
            "a consumer route",
            "{group: '', kind: Service, name: secret, namespace: web}",
            "{name: cart, port: 80}",
            &[GOOD],
        ),
        (
            "a consumer route that sends to its parent",
            "{group: '', kind: Service, name: secret, namespace: web}",
            "{name: secret, namespace: web, port: 80}",
            &[GOOD],
        ),
        (
            "no such backend",
            "{group: '', kind: Service, name: cart}",
            "{name: nobody, port: 80}",
            &["Accepted=True/Accepted ResolvedRefs=False/BackendNotFound"],
        ),
        (
            "no such port",
            "{group: '', kind: Service, name: cart}",
            "{name: cart, port: 82}",
            &["Accepted=True/Accepted ResolvedRefs=False/BackendNotFound"],
        ),
        (
            "a name in DNS",
            "{group: '', kind: Service, name: cart}",
            "{name: dns, port: 80}",
            &["Accepted=True/Accepted ResolvedRefs=False/BackendNotFound"],
        ),
        (
            "another namespace, without leave",
            "{group: '', kind: Service, name: cart}",
            "{name: secret, namespace: web, port: 80}",
            &["Accepted=True/Accepted ResolvedRefs=False/RefNotPermitted"],
        ),
        (
            "what is not there in another namespace is not told",
            "{group: '', kind: Service, name: cart}",
            "{name: nobody, namespace: web, port: 80}",
            &["Accepted=True/Accepted ResolvedRefs=False/RefNotPermitted"],
        ),
        (
            "another namespace, with leave",
            "{group: '', kind: Service, name: cart}",
            "{name: open, namespace: web, port: 80}",
            &[GOOD],
        ),
        (
            "a subset",
            "{group: '', kind: Service, name: cart}",
            "{group: nodemesh.io, kind: ServiceSubset, name: cart-v2, port: 80}",
            &[GOOD],
        ),
        (
            "a subset of nothing",
            "{group: '', kind: Service, name: cart}",
            "{group: nodemesh.io, kind: ServiceSubset, name: lost, port: 80}",
            &["Accepted=True/Accepted ResolvedRefs=False/BackendNotFound"],
        ),
        (
            "a backend of a kind that nobody knows",
            "{group: '', kind: Service, name: cart}",
            "{kind: NonExistent, name: cart}",
            &["Accepted=True/Accepted ResolvedRefs=False/InvalidKind"],
        ),
        (
            "a kind of that name in another group, elsewhere",
            "{group: '', kind: Service, name: cart}",
            "{group: example.com, kind: Service, name: nobody, namespace: web, port: 80}",
            &["Accepted=True/Accepted ResolvedRefs=False/InvalidKind"],
        ),
        (
            "a backend that speaks no HTTP",
            "{group: '', kind: Service, name: cart}",
            "{name: mixed, port: 6379}",
            &["Accepted=True/Accepted ResolvedRefs=False/UnsupportedProtocol"],
        ),
        (
            "a backend that wants TLS from its sources",
            "{group: '', kind: Service, name: cart}",
            "{name: mixed, port: 443}",
            &["Accepted=True/Accepted ResolvedRefs=False/UnsupportedProtocol"],
        ),
        (
            "backends of which nothing, HTTP/2 and gRPC are known",
            "{group: '', kind: Service, name: cart}",
            "{name: mixed, port: 90}, {name: mixed, port: 91}, {name: mixed, port: 50051}",
            &[GOOD],
        ),
        (
            "a parent's port where no requests are seen",
            "{group: '', kind: Service, name: mixed, port: 6379}, {group: '', kind: Service, name: mixed, sectionName: https}",
            "{name: cart, port: 80}",
            &[
                "Accepted=False/UnsupportedProtocol ResolvedRefs=True/ResolvedRefs",
                "Accepted=False/UnsupportedProtocol ResolvedRefs=True/ResolvedRefs",
            ],
        ),
        (
            "a parent with such ports and others",
            "{group: '', kind: Service, name: mixed}",
            "{name: cart, port: 80}",
            &[GOOD],
        ),
    ];
    for (name, parents, backend, expected) in table {
        let route = format!(
            "{{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {{name: r, namespace: shop, generation: 5}}, \
             spec: {{parentRefs: [{parents}], rules: [{{backendRefs: [{backend}]}}]}}}}"
        );
        let status = told(&set(&format!("{WORLD}{route}")), Kind::HttpRoute, "r");
        let found: Vec<String> = status.parents.iter().map(|parent| words(&parent.conditions)).collect();
        assert_eq!(found, expected, "{name}");
        assert_eq!(status.generation, 5);
        assert!(status.conditions.is_empty(), "{name}");
    }
}

/// A route of any kind in namespace `shop`; `rest` is what its spec has beside parents and rules.
fn route(kind: &str, name: &str, created: &str, parent: &str, rest: &str, rule: &str) -> String {
    let version = if matches!(kind, "TCPRoute" | "TLSRoute") {
        "v1alpha2"
    } else {
        "v1"
    };
    format!(
        "---\n{{apiVersion: gateway.networking.k8s.io/{version}, kind: {kind}, metadata: {{name: {name}, namespace: shop, \
         creationTimestamp: '{created}'}}, spec: {{parentRefs: [{{group: '', kind: Service, name: {parent}}}], {rest} \
         rules: [{{{rule}}}]}}}}\n"
    )
}

const OLD: &str = "2026-01-01T00:00:00Z";
const NEW: &str = "2026-02-01T00:00:00Z";

#[test]
fn each_kind_of_route_is_told_of_its_backends() {
    // What HTTPRoute, GRPCRoute, TCPRoute and TLSRoute are told of the same backend.
    let unsupported = "UnsupportedProtocol";
    let table = [
        (
            "{name: cart, port: 80}",
            ["ResolvedRefs", unsupported, "ResolvedRefs", "ResolvedRefs"],
        ),
        ("{name: cart, port: 81}", ["ResolvedRefs"; 4]),
        ("{name: mixed, port: 50051}", ["ResolvedRefs"; 4]),
        ("{name: mixed, port: 91}", ["ResolvedRefs"; 4]),
        (
            "{name: mixed, port: 6379}",
            [unsupported, unsupported, "ResolvedRefs", "ResolvedRefs"],
        ),
        (
            "{name: mixed, port: 443}",
            [unsupported, unsupported, "ResolvedRefs", "ResolvedRefs"],
        ),
        ("{name: nobody, port: 80}", ["BackendNotFound"; 4]),
        ("{name: secret, namespace: web, port: 80}", ["RefNotPermitted"; 4]),
        ("{group: example.com, kind: Bucket, name: b}", ["InvalidKind"; 4]),
    ];
    let kinds = [
        ("HTTPRoute", Kind::HttpRoute),
        ("GRPCRoute", Kind::GrpcRoute),
        ("TCPRoute", Kind::TcpRoute),
        ("TLSRoute", Kind::TlsRoute),
    ];
    for (backend, expected) in table {
        for ((kind, of), reason) in kinds.into_iter().zip(expected) {
            let text = route(
                kind,
                "r",
                OLD,
                "cart, port: 81",
                "",
                &format!("backendRefs: [{backend}]"),
            );
            let status = told(&set(&format!("{WORLD}{text}")), of, "r");
            let resolved = &status.parents[0].conditions[1];
            assert_eq!(resolved.reason, reason, "{kind} to {backend}: {}", resolved.message);
            assert_eq!(resolved.holds, reason == "ResolvedRefs");
            assert!(status.is_accepted(), "{kind} to {backend}");
        }
    }
}

#[test]
fn of_routes_that_take_the_same_one_is_told_that_it_does_not_count() {
    let to = "backendRefs: [{name: cart, port: 80}]";
    let http = |created, port: &str| route("HTTPRoute", "http", created, &format!("mixed, port: {port}"), "", to);
    let tcp = |created, port: &str| route("TCPRoute", "tcp", created, &format!("mixed, port: {port}"), "", to);
    let tls = |name: &str, created, names: &str| {
        let names = if names.is_empty() {
            String::new()
        } else {
            format!("hostnames: [{names}],")
        };
        route("TLSRoute", name, created, "mixed, port: 443", &names, to)
    };
    type Expected<'a> = &'a [(Kind, &'a str, &'a str)];
    let table: [(&str, String, Expected); 8] = [
        (
            "a declared HTTP port routes requests if it can, whatever is older",
            http(NEW, "80") + &tcp(OLD, "80"),
            &[
                (Kind::HttpRoute, "http", "Accepted"),
                (Kind::TcpRoute, "tcp", "Conflicted"),
            ],
        ),
        (
            "without routes for requests its connections are routed",
            tcp(OLD, "80"),
            &[(Kind::TcpRoute, "tcp", "Accepted")],
        ),
        (
            "where nothing is declared both count, each for its own",
            http(NEW, "90") + &tcp(OLD, "90"),
            &[
                (Kind::HttpRoute, "http", "Accepted"),
                (Kind::TcpRoute, "tcp", "Accepted"),
            ],
        ),
        (
            "a port of opaque TCP has no requests",
            http(OLD, "6379") + &tcp(NEW, "6379"),
            &[
                (Kind::HttpRoute, "http", "UnsupportedProtocol"),
                (Kind::TcpRoute, "tcp", "Accepted"),
            ],
        ),
        (
            "of two TLSRoutes for one name the older counts",
            tls("young", NEW, "a.example") + &tls("old", OLD, "a.example, b.example"),
            &[
                (Kind::TlsRoute, "young", "Conflicted"),
                (Kind::TlsRoute, "old", "Accepted"),
            ],
        ),
        (
            "one name of its own is enough",
            tls("young", NEW, "a.example, c.example") + &tls("old", OLD, "a.example, b.example"),
            &[
                (Kind::TlsRoute, "young", "Accepted"),
                (Kind::TlsRoute, "old", "Accepted"),
            ],
        ),
        (
            "a wildcard and a name are two things",
            tls("young", NEW, "'*.example'") + &tls("old", OLD, "a.example"),
            &[
                (Kind::TlsRoute, "young", "Accepted"),
                (Kind::TlsRoute, "old", "Accepted"),
            ],
        ),
        (
            "a TCPRoute takes what no TLSRoute does",
            tls("young", NEW, "") + &tls("old", OLD, "") + &tcp(NEW, "443"),
            &[
                (Kind::TlsRoute, "young", "Conflicted"),
                (Kind::TlsRoute, "old", "Accepted"),
                (Kind::TcpRoute, "tcp", "Accepted"),
            ],
        ),
    ];
    for (name, routes, expected) in table {
        let all = set(&format!("{WORLD}{routes}"));
        for (kind, route, reason) in expected {
            let status = told(&all, *kind, route);
            let accepted = &status.parents[0].conditions[0];
            assert_eq!(accepted.reason, *reason, "{name}: {route}: {}", accepted.message);
            assert_eq!(accepted.holds, *reason == "Accepted", "{name}: {route}");
        }
    }
}

#[test]
fn a_grant_is_for_one_kind_of_route() {
    let route = "{apiVersion: gateway.networking.k8s.io/v1, kind: GRPCRoute, metadata: {name: r, namespace: shop}, \
                 spec: {parentRefs: [{group: '', kind: Service, name: cart}], rules: [{backendRefs: [{name: open, namespace: web, port: 80}]}]}}";
    let status = told(&set(&format!("{WORLD}{route}")), Kind::GrpcRoute, "r");
    assert_eq!(
        words(&status.parents[0].conditions),
        "Accepted=True/Accepted ResolvedRefs=False/RefNotPermitted"
    );
}

#[test]
fn of_two_tcp_routes_at_a_port_the_older_counts() {
    let route = |name: &str, namespace: &str, created: &str, port: &str| {
        format!(
            "---\n{{apiVersion: gateway.networking.k8s.io/v1alpha2, kind: TCPRoute, metadata: {{name: {name}, namespace: {namespace}, \
             creationTimestamp: '{created}'}}, spec: {{parentRefs: [{{group: '', kind: Service, name: cart, namespace: shop{port}}}], \
             rules: [{{backendRefs: [{{name: open, namespace: web, port: 80}}]}}]}}}}\n"
        )
    };
    let text = [
        WORLD.to_owned(),
        route("younger", "shop", "2026-02-01T00:00:00Z", ""),
        route("older", "shop", "2026-01-01T00:00:00Z", ""),
        route("consumer", "web", "2026-03-01T00:00:00Z", ""),
    ];
    let all = set(&text.concat());
    let accepted = |set: &DocumentSet, name| {
        let status = told(set, Kind::TcpRoute, name);
        words(&status.parents[0].conditions[..1])
    };
    assert_eq!(accepted(&all, "older"), "Accepted=True/Accepted");
    assert_eq!(accepted(&all, "younger"), "Accepted=False/Conflicted");
    assert_eq!(accepted(&all, "consumer"), "Accepted=True/Accepted");
    // One port of its own is enough to count.
    let text = [
        WORLD.to_owned(),
        route("younger", "shop", "2026-02-01T00:00:00Z", ""),
        route("older", "shop", "2026-01-01T00:00:00Z", ", port: 80"),
    ];
    assert_eq!(accepted(&set(&text.concat()), "younger"), "Accepted=True/Accepted");
}

#[test]
fn what_cannot_be_read_is_told_why() {
    let table = [
        (
            "{kind: HTTPRoute, apiVersion: gateway.networking.k8s.io/v1, metadata: {name: r, namespace: shop}, spec: {parentRefs: [{group: '', kind: Service, name: cart}], rules: [{backendRefs: [{name: cart, port: 0}]}]}}",
            "Accepted=False/Invalid",
            "does nothing",
        ),
        (
            "{kind: HTTPRoute, apiVersion: gateway.networking.k8s.io/v1, metadata: {name: r, namespace: shop}, spec: {useDefaultGateways: All, parentRefs: [{group: '', kind: Service, name: cart}], rules: [{}]}}",
            "Accepted=False/UnsupportedValue",
            "spec.useDefaultGateways",
        ),
        (
            "{kind: HTTPRoute, apiVersion: gateway.networking.k8s.io/v1, metadata: {name: r, namespace: shop}, spec: {parentRefs: [{group: '', kind: Service, name: cart}], rules: [{filters: [{type: Vanish}], tomorrow: 1}]}}",
            "Accepted=False/UnsupportedValue",
            "does nothing",
        ),
        (
            "{kind: HTTPRoute, apiVersion: gateway.networking.k8s.io/v1, metadata: {name: r, namespace: shop}, spec: {parentRefs: [{group: '', kind: Service, name: cart}], rules: [{filters: [{type: RequestRedirect, requestRedirect: {hostname: a.example}}, {type: URLRewrite, urlRewrite: {hostname: b.example}}]}]}}",
            "Accepted=False/IncompatibleFilters",
            "does nothing",
        ),
        (
            "{kind: AccessPolicy, apiVersion: nodemesh.io/v1alpha1, metadata: {name: r, namespace: shop}, spec: {targetRefs: [{kind: Service, name: cart}], action: x}}",
            "Accepted=False/Invalid",
            "denied everything",
        ),
    ];
    for (text, expected, word) in table {
        let all = set(&format!("{WORLD}{text}"));
        let status = statuses(&all)
            .into_iter()
            .find(|status| &*status.key.name == "r")
            .expect("a status");
        let conditions: Vec<&Condition> = status.parents.iter().flat_map(|parent| &parent.conditions).collect();
        let conditions = if conditions.is_empty() {
            status.conditions.iter().collect()
        } else {
            conditions
        };
        let found: Vec<Condition> = conditions.into_iter().cloned().collect();
        assert_eq!(words(&found), expected, "{text}");
        assert!(found[0].message.contains(word), "{}", found[0].message);
        assert!(!status.is_accepted());
    }
}

#[test]
fn policies_are_told_of_their_targets() {
    // A policy's targets, what it is told, and the nodes that need it.
    let table: [(&str, &str, &[&str]); 9] = [
        ("{kind: Service, name: cart}", GOOD, &["node-1"]),
        ("{kind: Service, name: cart, sectionName: alt}", GOOD, &["node-1"]),
        (
            "{kind: Service, name: cart, sectionName: x}",
            "Accepted=False/TargetNotFound ResolvedRefs=False/TargetNotFound",
            &["node-1"],
        ),
        (
            "{kind: Service, name: nobody}",
            "Accepted=False/TargetNotFound ResolvedRefs=False/TargetNotFound",
            &["node-1", "node-2"],
        ),
        (
            "{kind: Service, name: nobody}, {kind: Service, name: cart}",
            "Accepted=True/Accepted ResolvedRefs=False/TargetNotFound",
            &["node-1", "node-2"],
        ),
        ("{kind: Namespace, name: shop}", GOOD, &["node-1", "node-2"]),
        ("{kind: Pod, selector: {matchLabels: {app: db}}}", GOOD, &["node-2"]),
        ("{kind: Pod, selector: {matchLabels: {app: nobody-yet}}}", GOOD, &[]),
        (
            "{kind: Pod, selector: {matchLabels: {app: db}}}, {kind: Service, name: cart}",
            GOOD,
            &["node-1", "node-2"],
        ),
    ];
    for (targets, expected, nodes) in table {
        let policy = format!(
            "{{apiVersion: nodemesh.io/v1alpha1, kind: AccessPolicy, metadata: {{name: p, namespace: shop}}, \
             spec: {{targetRefs: [{targets}], action: Allow}}}}"
        );
        let status = told(&set(&format!("{WORLD}{policy}")), Kind::AccessPolicy, "p");
        assert_eq!(words(&status.conditions), expected, "{targets}");
        let found: Vec<&str> = status.nodes.iter().map(|node| &**node).collect();
        assert_eq!(found, nodes, "{targets}");
        assert!(status.parents.is_empty());
    }
}

#[test]
fn who_needs_a_document() {
    let everywhere = ["node-1", "node-2", "node-3"];
    let table: [(&str, Kind, &[&str]); 5] = [
        (
            "{apiVersion: nodemesh.io/v1alpha1, kind: AccessPolicy, metadata: {name: p, namespace: nodemesh-system}, spec: {targetRefs: [{group: nodemesh.io, kind: Mesh}], action: Allow}}",
            Kind::AccessPolicy,
            &everywhere,
        ),
        (
            "{apiVersion: nodemesh.io/v1alpha1, kind: TrafficPolicy, metadata: {name: p, namespace: shop}, spec: {targetRefs: [{kind: Service, name: cart}], loadBalancer: {algorithm: random}}}",
            Kind::TrafficPolicy,
            &everywhere,
        ),
        (
            "{apiVersion: nodemesh.io/v1alpha1, kind: MeshPolicy, metadata: {name: p, namespace: shop}, spec: {targetRefs: [{kind: Service, name: cart}], mtls: {mode: strict}}}",
            Kind::MeshPolicy,
            &everywhere,
        ),
        (
            "{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {name: p, namespace: shop}, spec: {parentRefs: [{group: '', kind: Service, name: cart}], rules: [{}]}}",
            Kind::HttpRoute,
            &everywhere,
        ),
        (
            "{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {name: p, namespace: web}, spec: {parentRefs: [{group: '', kind: Service, name: cart, namespace: shop}], rules: [{}]}}",
            Kind::HttpRoute,
            &["node-3"],
        ),
    ];
    for (text, kind, nodes) in table {
        let status = told(&set(&format!("{WORLD}{text}")), kind, "p");
        let found: Vec<&str> = status.nodes.iter().map(|node| &**node).collect();
        assert_eq!(found, nodes, "{text}");
    }
    let subset = told(&set(WORLD), Kind::ServiceSubset, "lost");
    assert_eq!(
        words(&subset.conditions),
        "Accepted=True/Accepted ResolvedRefs=False/TargetNotFound"
    );
    assert!(
        statuses(&set(WORLD))
            .iter()
            .all(|status| status.key.kind != Kind::ReferenceGrant)
    );
}
