//! Documents through the public door: what is read, what is refused and with which words.

use mesh_api::document::{Document, Kind, Problem, parse};

/// The problems of a source, as people see them.
fn problems(yaml: &str) -> Vec<String> {
    match parse("file.yaml", yaml) {
        Ok(_) => Vec::new(),
        Err(problems) => problems.iter().map(Problem::to_string).collect(),
    }
}

/// Checks a document's text against the problems that it should have.
fn check(yaml: &str, expected: &[&str]) {
    assert_eq!(problems(yaml), expected, "of\n{yaml}");
}

/// A policy of a kind in namespace `shop`: the spec begins on line 4.
fn policy(kind: &str, spec: &str) -> String {
    let version = if kind == "HTTPRoute" {
        "gateway.networking.k8s.io/v1"
    } else {
        "nodemesh.io/v1alpha1"
    };
    format!("apiVersion: {version}\nkind: {kind}\nmetadata: {{name: x, namespace: shop}}\nspec:\n{spec}")
}

fn good(kind: &str, spec: &str) -> Document {
    let yaml = policy(kind, spec);
    match parse("file.yaml", &yaml) {
        Ok(mut documents) => documents.remove(0),
        Err(problems) => panic!(
            "{}\nof\n{yaml}",
            problems.iter().map(Problem::to_string).collect::<Vec<_>>().join("\n")
        ),
    }
}

fn bad(kind: &str, spec: &str, expected: &[&str]) {
    check(&policy(kind, spec), expected);
}

#[test]
fn every_problem_is_told_at_once_with_its_line() {
    check(
        "\
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata:
  name: cart
  namespace: shop
spec:
  parentRefs:
  - {kind: Service, name: cart, port: 80}
  rules:
  - matches:
    - path: {type: Exact, value: /a}
    - path: {type: PathPrefix, value: api}
    backendRefs:
    - {name: cart, port: 70000, wieght: 3}
---
apiVersion: nodemesh.io/v1alpha1
kind: MeshPolicy
metadata: {name: Strict}
spec:
  targetRefs: [{kind: Namespace, name: shop}]
  mtls: {mode: strickt}
",
        &[
            "file.yaml:12: spec.rules[0].matches[1].path.value: \"api\" does not start with '/', expected an absolute path",
            "file.yaml:14: spec.rules[0].backendRefs[0].port: 70000 is out of range, expected a whole number from 1 to 65535",
            "file.yaml:14: spec.rules[0].backendRefs[0].wieght: unknown field, expected filters, group, kind, name, namespace, port or weight",
            "file.yaml:18: metadata.name: \"Strict\" is not a DNS name, expected lower-case letters, digits, '-' and '.', with a letter or digit at both ends",
            "file.yaml:21: spec.mtls.mode: \"strickt\" is not known, expected strict, permissive or off",
        ],
    );
}

#[test]
fn the_frame_of_a_document_is_checked() {
    let cases: &[(&str, &[&str])] = &[
        ("", &[]),
        (
            "apiVersion: v1\nkind: Namespace\nmetadata: {name: a, creationTimestamp: 2026-01-31}\n",
            &[
                "file.yaml:3: metadata.creationTimestamp: \"2026-01-31\" is no time, expected a time such as 2026-01-31T12:00:00Z",
            ],
        ),
        ("---\n---\n# nothing\n", &[]),
        ("- a\n", &["file.yaml:1: is a list, expected a map"]),
        (
            "kind: Pod\n",
            &["file.yaml:1: apiVersion: is missing, expected the version of the kind"],
        ),
        (
            "apiVersion: v2\nkind: Pod\n",
            &["file.yaml:1: apiVersion: \"v2\" is not a version of Pod, expected v1"],
        ),
        (
            "apiVersion: apps/v1\nkind: Deployment\n",
            &[
                "file.yaml:2: kind: \"Deployment\" is no kind that the mesh reads, expected Namespace, Node, ServiceAccount, Pod, Service, EndpointSlice, ServiceSubset, ReferenceGrant, HTTPRoute, GRPCRoute, TCPRoute, TLSRoute, MeshPolicy, TrafficPolicy, RateLimit or AccessPolicy",
            ],
        ),
        (
            "apiVersion: nodemesh.io/v1alpha1\nkind: Fault\n",
            &["file.yaml:2: kind: Fault is not supported yet, expected another kind"],
        ),
        (
            "apiVersion: v1\nkind: Namespace\nmetadata: {name: a, namespace: b}\n",
            &["file.yaml:3: metadata.namespace: a Namespace is in no namespace, expected no such field"],
        ),
        (
            "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {nodemesh.io/mesh: enable}}\n",
            &[
                "file.yaml:3: metadata.labels[\"nodemesh.io/mesh\"]: \"enable\" is not known, expected enabled or disabled",
            ],
        ),
        (
            "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {version: 2}}\n",
            &["file.yaml:3: metadata.labels.version: is the number 2, expected a string (put it in quotes)"],
        ),
        (
            "apiVersion: v1\nkind: Namespace\nkind: Node\nmetadata: {name: a}\n",
            &["file.yaml:3: kind: the key is there twice, first on line 2, expected each key once"],
        ),
        (
            "apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n---\napiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n",
            &["file.yaml:5: Namespace a is there twice, first on line 1, expected each document once"],
        ),
        (
            "apiVersion: v1\nkind: Namespace\nmetadata: {name: &n a, labels: *m}\n",
            &["file.yaml:3: is not YAML: while parsing node, found unknown anchor"],
        ),
        (
            "a: &a [*a]\n",
            &[
                "file.yaml:1: a[0]: an alias names a value that it is part of, expected the name of a value that ends before it",
            ],
        ),
        (
            "a: !secret b\n",
            &[
                "file.yaml:1: a: the tag !secret is not known, expected no tag, or one of !!str, !!int, !!float, !!bool, !!null",
                "file.yaml:1: apiVersion: is missing, expected the version of the kind",
                "file.yaml:1: kind: is missing, expected a kind of document",
            ],
        ),
        (
            "a: [b\n",
            &["file.yaml:2: is not YAML: while parsing a flow sequence, expected ',' or ']'"],
        ),
        (
            "? [a]\n: b\n",
            &[
                "file.yaml:1: a key is not a string, expected a string",
                "file.yaml:1: apiVersion: is missing, expected the version of the kind",
                "file.yaml:1: kind: is missing, expected a kind of document",
            ],
        ),
    ];
    for (yaml, expected) in cases {
        check(yaml, expected);
    }
}

#[test]
fn what_is_not_done_yet_is_refused() {
    let target = "  targetRefs: [{kind: Service, name: cart}]\n";
    let later = |kind: &str, spec: &str, path: &str, what: &str| {
        let found = problems(&policy(kind, spec));
        let wanted = format!("spec{path}: {what} is not supported yet");
        assert!(
            found.len() == 1 && found[0].contains(&wanted),
            "{found:#?} has not only {wanted:?}, of\n{spec}"
        );
    };
    let field = "the field";
    let cases = [
        ("AccessPolicy", "  action: Audit\n", ".action", "\"Audit\""),
        ("AccessPolicy", "  action: Allow\n  dryRun: true\n", ".dryRun", field),
        (
            "AccessPolicy",
            "  action: Allow\n  rules: [{when: [\"true\"]}]\n",
            ".rules[0].when",
            field,
        ),
        (
            "AccessPolicy",
            "  action: Allow\n  rules: [{from: [{namespaces: [a], jwt: {}}]}]\n",
            ".rules[0].from[0].jwt",
            field,
        ),
        (
            "MeshPolicy",
            "  mtls: {mode: strict}\n  outbound: registry-only\n",
            ".outbound",
            field,
        ),
        (
            "MeshPolicy",
            "  mtls: {mode: strict}\n  failMode: refuse\n",
            ".failMode",
            field,
        ),
        (
            "TrafficPolicy",
            "  loadBalancer: {algorithm: maglev}\n",
            ".loadBalancer.algorithm",
            "\"maglev\"",
        ),
        (
            "TrafficPolicy",
            "  retry: {attempts: 1, on: [reset], hedging: {}}\n",
            ".retry.hedging",
            field,
        ),
        (
            "TrafficPolicy",
            "  timeouts: {request: 1s}\n  outlierEjection: {}\n",
            ".outlierEjection",
            field,
        ),
        (
            "TrafficPolicy",
            "  circuitBreaker: {maxRequests: 1, fallback: {}}\n",
            ".circuitBreaker.fallback",
            field,
        ),
        (
            "RateLimit",
            "  limits: [{rate: {requests: 1, per: 1s}, algorithm: sliding-window}]\n",
            ".limits[0].algorithm",
            "\"sliding-window\"",
        ),
        (
            "RateLimit",
            "  limits: [{rate: {requests: 1, per: 1s}, scope: mesh}]\n",
            ".limits[0].scope",
            "\"mesh\"",
        ),
        (
            "RateLimit",
            "  limits: [{rate: {requests: 1, per: 1s}, response: {}}]\n",
            ".limits[0].response",
            field,
        ),
    ];
    for (kind, rest, path, what) in cases {
        later(kind, &format!("{target}{rest}"), path, what);
    }
    let route = "  parentRefs: [{kind: Service, name: cart}]\n";
    for filter in ["ExternalAuth", "ExtensionRef"] {
        let spec = format!("{route}  rules: [{{filters: [{{type: {filter}, body: 1}}]}}]\n");
        later(
            "HTTPRoute",
            &spec,
            ".rules[0].filters[0].type",
            &format!("\"{filter}\""),
        );
    }
    let spec = format!("{route}  rules: [{{sessionPersistence: {{}}}}]\n");
    later("HTTPRoute", &spec, ".rules[0].sessionPersistence", field);
}

#[test]
fn an_http_route_is_read_whole() {
    let document = good(
        "HTTPRoute",
        "  parentRefs:
  - {group: \"\", kind: Service, name: cart, port: 80}
  - {name: public-gateway}
  hostnames: [shop.example.com]
  rules:
  - name: api
    matches:
    - path: {type: PathPrefix, value: /api/}
      headers: [{name: X-Team, value: a}, {name: x-kind, type: RegularExpression, value: 'b.*'}]
      queryParams: [{name: Page, value: \"2\"}]
      method: GET
    filters:
    - {type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: X-A, value: b}], remove: [x-c]}}
    - {type: URLRewrite, urlRewrite: {hostname: cart.internal, path: {type: ReplacePrefixMatch, replacePrefixMatch: /v1}}}
    backendRefs:
    - {name: cart, port: 80, weight: 90}
    - {group: nodemesh.io, kind: ServiceSubset, name: cart-v2, port: 80, weight: 10}
    timeouts: {request: 1m1s, backendRequest: 500ms}
    retry: {codes: [503], attempts: 2}
  - filters: [{type: RequestRedirect, requestRedirect: {scheme: https, statusCode: 301}}]
",
    );
    let expected = serde_json::json!({
        "parentRefs": [
            {"group": "", "kind": "Service", "name": "cart", "port": 80},
            {"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "public-gateway"}
        ],
        "hostnames": ["shop.example.com"],
        "rules": [
            {
                "name": "api",
                "matches": [{
                    "path": {"type": "PathPrefix", "value": "/api"},
                    "headers": [
                        {"name": "x-team", "type": "Exact", "value": "a"},
                        {"name": "x-kind", "type": "RegularExpression", "value": "b.*"}
                    ],
                    "queryParams": [{"name": "Page", "type": "Exact", "value": "2"}],
                    "method": "GET"
                }],
                "filters": [
                    {"type": "RequestHeaderModifier",
                     "requestHeaderModifier": {"set": [{"name": "x-a", "value": "b"}], "remove": ["x-c"]}},
                    {"type": "URLRewrite", "urlRewrite": {"hostname": "cart.internal",
                     "path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/v1"}}}
                ],
                "backendRefs": [
                    {"group": "", "kind": "Service", "name": "cart", "port": 80, "weight": 90},
                    {"group": "nodemesh.io", "kind": "ServiceSubset", "name": "cart-v2", "port": 80, "weight": 10}
                ],
                "timeouts": {"request": "1m1s", "backendRequest": "500ms"},
                "retry": {"codes": [503], "attempts": 2}
            },
            {"filters": [{"type": "RequestRedirect", "requestRedirect": {"scheme": "https", "statusCode": 301}}]}
        ]
    });
    assert_eq!(document.policy_spec(), Some(expected));
}

#[test]
fn http_routes_are_refused_for_what_is_wrong() {
    let rule = |rule: &str| format!("  parentRefs: [{{kind: Service, name: cart}}]\n  rules:\n  - {rule}\n");
    let cases: &[(&str, &[&str])] = &[
        (
            "matches: [{path: {type: RegularExpression, value: 'a('}}]",
            &[
                "file.yaml:7: spec.rules[0].matches[0].path.value: \"a(\" is not a regular expression: unclosed group, expected a regular expression in RE2's syntax",
            ],
        ),
        (
            "matches: [{path: {type: RegularExpression, value: '(?:\\pL{1000}){1000}'}}]",
            &[
                "file.yaml:7: spec.rules[0].matches[0].path.value: \"(?:\\\\pL{1000}){1000}\" compiles to more than 1048576 bytes, expected a regular expression in RE2's syntax",
            ],
        ),
        (
            "matches: [{path: {value: /a/../b}}]",
            &[
                "file.yaml:7: spec.rules[0].matches[0].path.value: \"/a/../b\" contains \"/../\", expected a plain path: no empty or dot elements, no escaped slash, no query, no fragment",
            ],
        ),
        (
            "matches: [{headers: [{name: x, value: a}, {name: X, value: b}]}]",
            &["file.yaml:7: spec.rules[0].matches[0].headers[1]: name \"x\" is there twice, expected each name once"],
        ),
        (
            "matches: [{headers: [{name: 'x y', value: a}]}]",
            &[
                "file.yaml:7: spec.rules[0].matches[0].headers[0].name: \"x y\" is not a header name, expected an HTTP token, such as x-user",
            ],
        ),
        (
            "matches: [{method: get}]",
            &[
                "file.yaml:7: spec.rules[0].matches[0].method: \"get\" is not known, expected GET, HEAD, POST, PUT, DELETE, CONNECT, OPTIONS, TRACE or PATCH",
            ],
        ),
        (
            "filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: Content-Length, value: '1'}]}}]",
            &[
                "file.yaml:7: spec.rules[0].filters[0].requestHeaderModifier.set[0].name: content-length frames the message, a rule cannot change it, expected another header",
            ],
        ),
        (
            "filters: [{type: RequestHeaderModifier, requestHeaderModifier: {add: [{name: x, value: \"a\\r\\nb\"}]}}]",
            &[
                "file.yaml:7: spec.rules[0].filters[0].requestHeaderModifier.add[0].value: \"a\\r\\nb\" is not a header value, expected at most 4096 printable ASCII characters, no blanks at the ends",
            ],
        ),
        (
            "{filters: [{type: RequestRedirect, requestRedirect: {}}], backendRefs: [{name: a, port: 1}]}",
            &["file.yaml:7: spec.rules[0]: has both a RequestRedirect and backendRefs, expected one of them"],
        ),
        (
            "filters: [{type: RequestRedirect, requestRedirect: {statusCode: 304}}]",
            &[
                "file.yaml:7: spec.rules[0].filters[0].requestRedirect.statusCode: 304 is no redirect, expected 301, 302, 303, 307 or 308",
            ],
        ),
        (
            "{matches: [{path: {type: Exact, value: /a}}], filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /b}}}]}",
            &[
                "file.yaml:7: spec.rules[0]: ReplacePrefixMatch has no single prefix to replace, expected exactly one match, with a path of type PathPrefix",
            ],
        ),
        (
            "backendRefs: [{name: a}]",
            &["file.yaml:7: spec.rules[0].backendRefs[0].port: is missing, expected the service's port"],
        ),
        (
            "backendRefs: [{kind: ServiceSubset, name: a, port: 1}]",
            &["file.yaml:7: spec.rules[0].backendRefs[0]: names no group, expected nodemesh.io"],
        ),
        (
            "backendRefs: [{name: a, port: 1, weight: -1}]",
            &[
                "file.yaml:7: spec.rules[0].backendRefs[0].weight: -1 is out of range, expected a whole number from 0 to 1000000",
            ],
        ),
        (
            "timeouts: {request: 10}",
            &["file.yaml:7: spec.rules[0].timeouts.request: is the number 10, expected a string (put it in quotes)"],
        ),
        (
            "timeouts: {request: 1.5s}",
            &[
                "file.yaml:7: spec.rules[0].timeouts.request: \"1.5s\" does not parse, expected a duration such as 1h10m30s500ms",
            ],
        ),
        (
            "timeouts: {request: 1s, backendRequest: 2s}",
            &[
                "file.yaml:7: spec.rules[0].timeouts: backendRequest 2s is longer than request 1s, expected at most the request's timeout",
            ],
        ),
        (
            "name: a\n  - name: a",
            &["file.yaml:8: spec.rules[1]: name \"a\" is there twice, expected each name once"],
        ),
    ];
    for (text, expected) in cases {
        bad("HTTPRoute", &rule(text), expected);
    }
    bad(
        "HTTPRoute",
        "  rules: []\n",
        &[
            "file.yaml:5: spec.parentRefs: is missing, expected at least one parent",
            "file.yaml:5: spec.rules: is empty, expected at least one rule",
        ],
    );
}

#[test]
fn access_policies() {
    let document = good(
        "AccessPolicy",
        "  targetRefs: [{kind: Service, name: cart, sectionName: http}, {kind: Pod, selector: {matchLabels: {app: cart}}, sectionName: \"8080\"}]
  action: Allow
  rules:
  - name: front
    from: [{identities: [\"spiffe://cluster.local/ns/shop/sa/front\", \"spiffe://cluster.local/ns/web/*\"], cidrs: [10.0.0.0/8, \"::1\"]}, {namespaces: [web]}]
    to: [{ports: [80], hosts: [Cart.shop, \"*.example.com\"], methods: [GET], paths: [{type: PathPrefix, value: /api}], headers: [{name: X-A, value: b}]}]
",
    );
    let expected = serde_json::json!({
        "targetRefs": [
            {"kind": "Service", "namespace": "shop", "name": "cart", "sectionName": "http"},
            {"kind": "Pod", "namespace": "shop", "selector": {"matchLabels": {"app": "cart"}}, "sectionName": "8080"}
        ],
        "action": "Allow",
        "rules": [{
            "name": "front",
            "from": [
                {"identities": ["spiffe://cluster.local/ns/shop/sa/front", "spiffe://cluster.local/ns/web/*"],
                 "cidrs": ["10.0.0.0/8", "::1/128"]},
                {"namespaces": ["web"]}
            ],
            "to": [{"ports": [80], "hosts": ["cart.shop", "*.example.com"], "methods": ["GET"],
                    "paths": [{"type": "PathPrefix", "value": "/api"}],
                    "headers": [{"name": "x-a", "type": "Exact", "value": "b"}]}]
        }]
    });
    assert_eq!(document.policy_spec(), Some(expected));
    let with = |rest: &str| format!("  targetRefs: [{{kind: Service, name: cart}}]\n{rest}");
    let cases: &[(&str, &[&str])] = &[
        (
            "  action: allow\n",
            &["file.yaml:6: spec.action: \"allow\" is not known, expected Allow or Deny"],
        ),
        (
            "  action: Deny\n",
            &["file.yaml:5: spec: a Deny policy without rules denies nothing, expected at least one rule"],
        ),
        (
            "  action: Allow\n  rules: [{from: []}]\n",
            &["file.yaml:7: spec.rules[0].from: is empty, expected at least one item, or no such field"],
        ),
        (
            "  action: Allow\n  rules: [{from: [{}]}]\n",
            &["file.yaml:7: spec.rules[0].from[0]: names no source, expected identities, namespaces or cidrs"],
        ),
        (
            "  action: Allow\n  rules: [{from: [{identities: [cart]}]}]\n",
            &[
                "file.yaml:7: spec.rules[0].from[0].identities[0]: \"cart\" is not an identity, expected spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>, or a part of it that ends with /*",
            ],
        ),
        (
            "  action: Allow\n  rules: [{from: [{identities: [\"spiffe://cluster.local/ns/sh*\"]}]}]\n",
            &[
                "file.yaml:7: spec.rules[0].from[0].identities[0]: \"spiffe://cluster.local/ns/sh*\" is not a prefix of identities, expected spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>, or a part of it that ends with /*",
            ],
        ),
        (
            "  action: Allow\n  rules: [{from: [{cidrs: [10.0.0.1/8]}]}]\n",
            &[
                "file.yaml:7: spec.rules[0].from[0].cidrs[0]: \"10.0.0.1/8\" has bits outside of its prefix, expected 10.0.0.0/8",
            ],
        ),
        (
            "  action: Allow\n  rules: [{from: [{cidrs: [all]}]}]\n",
            &[
                "file.yaml:7: spec.rules[0].from[0].cidrs[0]: \"all\" is not a network, expected a CIDR such as 10.0.0.0/8, or an address",
            ],
        ),
        (
            "  action: Allow\n  rules: [{to: [{ports: [0]}]}]\n",
            &["file.yaml:7: spec.rules[0].to[0].ports[0]: 0 is out of range, expected a whole number from 1 to 65535"],
        ),
        (
            "  action: Allow\n  rules: [{to: [{methods: [get]}]}]\n",
            &[
                "file.yaml:7: spec.rules[0].to[0].methods[0]: \"get\" is not a method, expected a method in upper case, such as GET",
            ],
        ),
        (
            "  action: Allow\n  rules: [{name: a}, {name: a}]\n",
            &["file.yaml:7: spec.rules[1]: name \"a\" is there twice, expected each name once"],
        ),
    ];
    for (rest, expected) in cases {
        bad("AccessPolicy", &with(rest), expected);
    }
}

#[test]
fn targets_stay_in_their_namespace() {
    let refused = |kind: &str, targets: &str, rest: &str, expected: &[&str]| {
        bad(kind, &format!("  targetRefs: {targets}\n{rest}"), expected);
    };
    let allow = "  action: Allow\n";
    good(
        "MeshPolicy",
        "  targetRefs: [{group: nodemesh.io, kind: Mesh}, {kind: Namespace, name: other}]\n  mtls: {mode: strict}\n",
    );
    refused(
        "AccessPolicy",
        "[{kind: Mesh}]",
        allow,
        &[
            "file.yaml:5: spec.targetRefs[0]: a policy in namespace shop cannot target the whole mesh, expected the policy in namespace nodemesh-system",
        ],
    );
    refused(
        "AccessPolicy",
        "[{kind: Namespace, name: other}]",
        allow,
        &[
            "file.yaml:5: spec.targetRefs[0].name: a policy in namespace shop cannot target namespace other, expected shop, or the policy in namespace other or nodemesh-system",
        ],
    );
    refused(
        "RateLimit",
        "[{kind: Service, name: a, namespace: other}]",
        "  limits: [{rate: {requests: 1, per: 1s}}]\n",
        &[
            "file.yaml:5: spec.targetRefs[0].namespace: a policy in namespace shop cannot target namespace other, expected shop, or the policy in namespace other or nodemesh-system",
        ],
    );
    refused(
        "AccessPolicy",
        "[]",
        allow,
        &["file.yaml:5: spec.targetRefs: is empty, expected at least one target"],
    );
    refused(
        "AccessPolicy",
        "[{kind: Service, name: a}, {kind: Service, name: a, namespace: shop}]",
        allow,
        &["file.yaml:5: spec.targetRefs[1]: the target is there twice, expected each target once"],
    );
    refused(
        "AccessPolicy",
        "[{group: apps, kind: Service, name: a}]",
        allow,
        &["file.yaml:5: spec.targetRefs[0].group: \"apps\" is not the kind's group, expected \"\", the core group"],
    );
    refused(
        "AccessPolicy",
        "[{kind: Pod, selector: {matchLabels: {}}}]",
        allow,
        &["file.yaml:5: spec.targetRefs[0].selector.matchLabels: is empty, expected at least one label"],
    );
    refused(
        "AccessPolicy",
        "[{kind: Service, name: a, sectionName: \"70000\"}]",
        allow,
        &[
            "file.yaml:5: spec.targetRefs[0].sectionName: 70000 is no port, expected a port's name, or its number from 1 to 65535",
        ],
    );
    refused(
        "TrafficPolicy",
        "[{kind: Pod, selector: {matchLabels: {a: b}}}]",
        "  timeouts: {request: 1s}\n",
        &["file.yaml:5: spec.targetRefs[0].kind: \"Pod\" is not known, expected Mesh, Namespace or Service"],
    );
    let root = "apiVersion: nodemesh.io/v1alpha1\nkind: AccessPolicy\nmetadata: {name: x, namespace: nodemesh-system}\nspec: {targetRefs: [{kind: Mesh}, {kind: Service, name: a, namespace: shop}], action: Allow}\n";
    check(root, &[]);
}

#[test]
fn rate_limits() {
    let document = good(
        "RateLimit",
        "  targetRefs: [{kind: Service, name: cart}]\n  limits: [{key: [{source: identity}, {header: X-User}, {request: path}], algorithm: token-bucket, rate: {requests: 50, per: 1s}, burst: 20, scope: local}]\n",
    );
    let expected = serde_json::json!({
        "targetRefs": [{"kind": "Service", "namespace": "shop", "name": "cart"}],
        "limits": [{"key": [{"source": "identity"}, {"header": "x-user"}, {"request": "path"}], "algorithm": "token-bucket",
                    "rate": {"requests": 50, "per": "1s"}, "burst": 20, "scope": "local"}]
    });
    assert_eq!(document.policy_spec(), Some(expected));
    let limits = |limits: &str| format!("  targetRefs: [{{kind: Service, name: cart}}]\n  limits: {limits}\n");
    let cases: &[(&str, &[&str])] = &[
        (
            "[]",
            &["file.yaml:6: spec.limits: is empty, expected at least one limit"],
        ),
        (
            "[{rate: {requests: 0, per: 1s}}]",
            &[
                "file.yaml:6: spec.limits[0].rate.requests: 0 is out of range, expected a whole number from 1 to 1000000000",
            ],
        ),
        (
            "[{rate: {requests: 5, per: 0s}}]",
            &["file.yaml:6: spec.limits[0].rate.per: is zero, expected a duration of more than zero"],
        ),
        (
            "[{rate: {requests: 5}}]",
            &["file.yaml:6: spec.limits[0].rate.per: is missing, expected a duration such as 1s"],
        ),
        (
            "[{key: [{source: identity, header: x}], rate: {requests: 5, per: 1s}}]",
            &[
                "file.yaml:6: spec.limits[0].key[0]: names more than one thing, expected one of source, header and request, and further list items",
            ],
        ),
        (
            "[{key: [{}], rate: {requests: 5, per: 1s}}]",
            &["file.yaml:6: spec.limits[0].key[0]: names nothing, expected one of source, header and request"],
        ),
    ];
    for (text, expected) in cases {
        bad("RateLimit", &limits(text), expected);
    }
}

#[test]
fn traffic_policies() {
    let spec = "  targetRefs: [{kind: Service, name: cart}]
  loadBalancer: {algorithm: least-request}
  timeouts: {request: 2s}
  retry: {attempts: 2, on: [connect-failure, \"503\"], budget: {percent: 20}}
  circuitBreaker: {maxConnections: 100, maxPendingRequests: 50, maxRequests: 200, consecutiveFailures: 5, errorRate: {percent: 50, window: 10s, minRequests: 20}, openFor: 5s, halfOpenProbes: 1}
";
    let expected = serde_json::json!({
        "targetRefs": [{"kind": "Service", "namespace": "shop", "name": "cart"}],
        "loadBalancer": {"algorithm": "least-request"},
        "timeouts": {"request": "2s"},
        "retry": {"attempts": 2, "on": ["connect-failure", "503"], "budget": {"percent": 20}},
        "circuitBreaker": {"maxConnections": 100, "maxPendingRequests": 50, "maxRequests": 200, "consecutiveFailures": 5,
            "errorRate": {"percent": 50, "window": "10s", "minRequests": 20}, "openFor": "5s", "halfOpenProbes": 1}
    });
    assert_eq!(good("TrafficPolicy", spec).policy_spec(), Some(expected));
    let cases: &[(&str, &[&str])] = &[
        (
            "",
            &["file.yaml:5: spec: says nothing, expected loadBalancer, timeouts, retry or circuitBreaker"],
        ),
        (
            "  timeouts: {}\n",
            &["file.yaml:6: spec.timeouts: says nothing, expected request, connect or idle"],
        ),
        (
            "  timeouts: {connect: 0s}\n",
            &["file.yaml:6: spec.timeouts.connect: is zero, expected a duration of more than zero"],
        ),
        (
            "  retry: {attempts: 99, on: [\"200\"]}\n",
            &[
                "file.yaml:6: spec.retry.attempts: 99 is out of range, expected a whole number from 1 to 10",
                "file.yaml:6: spec.retry.on[0]: \"200\" is not known, expected connect-failure, reset, refused-stream, gateway-error, 5xx or a status from 400 to 599 in quotes",
            ],
        ),
        (
            "  retry: {attempts: 1, on: [503]}\n",
            &["file.yaml:6: spec.retry.on[0]: is the number 503, expected a string (put it in quotes)"],
        ),
        (
            "  circuitBreaker: {openFor: 5s}\n",
            &[
                "file.yaml:6: spec.circuitBreaker: limits nothing, expected maxConnections, maxPendingRequests, maxRequests, consecutiveFailures or errorRate",
            ],
        ),
        (
            "  circuitBreaker: {errorRate: {percent: 101}}\n",
            &[
                "file.yaml:6: spec.circuitBreaker.errorRate.percent: 101 is out of range, expected a whole number from 1 to 100",
            ],
        ),
    ];
    for (rest, expected) in cases {
        bad(
            "TrafficPolicy",
            &format!("  targetRefs: [{{kind: Service, name: cart}}]\n{rest}"),
            expected,
        );
    }
}

#[test]
fn mesh_policies_and_subsets() {
    let document = good(
        "MeshPolicy",
        "  targetRefs: [{kind: Mesh}]\n  mtls: {mode: strict, ports: {9090: permissive}}\n",
    );
    let expected = serde_json::json!({
        "targetRefs": [{"group": "nodemesh.io", "kind": "Mesh"}],
        "mtls": {"mode": "strict", "ports": {"9090": "permissive"}}
    });
    assert_eq!(document.policy_spec(), Some(expected));
    bad(
        "MeshPolicy",
        "  targetRefs: [{kind: Mesh}]\n",
        &["file.yaml:5: spec: says nothing, expected mtls, sameNode or both"],
    );
    let document = good("MeshPolicy", "  targetRefs: [{kind: Mesh}]\n  sameNode: direct\n");
    let expected = serde_json::json!({
        "targetRefs": [{"group": "nodemesh.io", "kind": "Mesh"}],
        "sameNode": "direct"
    });
    assert_eq!(document.policy_spec(), Some(expected));
    bad(
        "MeshPolicy",
        "  targetRefs: [{kind: Mesh}]\n  sameNode: yes\n",
        &["file.yaml:6: spec.sameNode: \"yes\" is not known, expected agent or direct"],
    );
    bad(
        "MeshPolicy",
        "  targetRefs: [{kind: Mesh}]\n  mtls: {}\n",
        &["file.yaml:6: spec.mtls: says nothing, expected mode, ports or both"],
    );
    bad(
        "MeshPolicy",
        "  targetRefs: [{kind: Mesh}]\n  mtls: {ports: {http: off}}\n",
        &["file.yaml:6: spec.mtls.ports.http: \"http\" is no port, expected a number from 1 to 65535"],
    );
    good("ServiceSubset", "  {service: cart, labels: {version: v2}}\n");
    bad(
        "ServiceSubset",
        "  {service: cart}\n",
        &["file.yaml:5: spec.labels: is missing, expected at least one label"],
    );
    bad(
        "ServiceSubset",
        "  {service: Cart, labels: {version: v2}}\n",
        &[
            "file.yaml:5: spec.service: \"Cart\" is not a DNS label, expected at most 63 lower-case letters, digits and '-', with a letter or digit at both ends",
        ],
    );
}

#[test]
fn kubernetes_own_kinds_are_read_and_kept() {
    let yaml = "\
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Pod
  metadata: {name: cart-1, namespace: shop, uid: abc, annotations: {nodemesh.io/netns: /run/netns/cart-1, nodemesh.io/exclude-inbound-ports: \"22, 9100\"}}
  spec:
    serviceAccountName: cart
    nodeName: node-1
    restartPolicy: Never
    containers:
    - name: main
      image: nginx
      command: [python3, -m, http.server]
      env: [{name: A, value: b}, {name: C, valueFrom: {fieldRef: {fieldPath: status.podIP}}}]
      ports: [{name: http, containerPort: 8080}, {name: dns, containerPort: 53, protocol: UDP}]
      readinessProbe: {httpGet: {path: /ready, port: http}, periodSeconds: 2}
  status: {podIP: 10.1.0.5, podIPs: [{ip: 10.1.0.5}, {ip: \"fd00::5\"}], conditions: [{type: Ready, status: \"True\"}]}
";
    let documents = parse("file.yaml", yaml).unwrap();
    let Document::Pod(pod) = &documents[0] else {
        panic!("{:?}", documents[0].kind())
    };
    assert_eq!(pod.spec.service_account, "cart");
    assert_eq!(pod.spec.containers[0].env.len(), 1);
    assert_eq!(pod.spec.containers[0].ports.len(), 1);
    assert_eq!(pod.spec.probe_ports(), [8080]);
    assert_eq!(pod.spec.addresses.len(), 2);
    assert_eq!(pod.spec.ready, Some(true));
    let json = documents[0].to_json();
    assert_eq!(json["spec"]["restartPolicy"], "Never");
    assert_eq!(json["metadata"]["uid"], "abc");
    assert_eq!(parse("again", &documents[0].to_yaml()).unwrap(), documents);
    let pod = |spec: &str| format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: a}}\nspec: {spec}\n");
    let cases: &[(&str, &[&str])] = &[
        (
            "{}",
            &["file.yaml:4: spec.containers: is missing, expected at least one container"],
        ),
        (
            "{containers: [{name: a, command: ls}]}",
            &["file.yaml:4: spec.containers[0].command: is the string \"ls\", expected a list"],
        ),
        (
            "{containers: [{name: a, env: [{name: A, value: 1}]}]}",
            &["file.yaml:4: spec.containers[0].env[0].value: is the number 1, expected a string (put it in quotes)"],
        ),
        (
            "{containers: [{name: a, readinessProbe: {httpGet: {port: web}}}]}",
            &["file.yaml:4: spec: a probe of container a asks for port \"web\", expected the name of one of its ports"],
        ),
        (
            "{containers: [{name: a, readinessProbe: {periodSeconds: 1}}]}",
            &[
                "file.yaml:4: spec.containers[0].readinessProbe: has no single check, expected one of httpGet, tcpSocket, grpc and exec",
            ],
        ),
    ];
    for (spec, expected) in cases {
        check(&pod(spec), expected);
    }
    check(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: a, annotations: {nodemesh.io/exclude-inbound-ports: \"0\"}}\nspec: {containers: [{name: a}]}\n",
        &[
            "file.yaml:3: metadata.annotations[\"nodemesh.io/exclude-inbound-ports\"]: \"0\" is no list of ports, expected at most 64 ports separated by commas, such as \"80,443\"",
        ],
    );
}

#[test]
fn services() {
    let service = |spec: &str| {
        format!("apiVersion: v1\nkind: Service\nmetadata: {{name: cart, namespace: shop}}\nspec: {spec}\n")
    };
    let read = |spec: &str| match parse("file.yaml", &service(spec)).unwrap().remove(0) {
        Document::Service(object) => object.spec,
        other => panic!("{}", other.kind()),
    };
    let plain = read(
        "{clusterIP: 10.96.0.1, selector: {app: cart}, ports: [{port: 80, name: http, targetPort: web}, {port: 53, name: dns, protocol: UDP}]}",
    );
    assert_eq!(
        (plain.addresses.len(), plain.headless, plain.ports.len()),
        (1, false, 1)
    );
    let headless = read("{clusterIP: None, clusterIPs: [None], ports: [{port: 80}]}");
    assert_eq!((headless.addresses.len(), headless.headless), (0, true));
    assert_eq!(
        read("{clusterIPs: [10.96.0.1, \"fd00::1\"], clusterIP: 10.96.0.1, ports: []}")
            .addresses
            .len(),
        2
    );
    let cases: &[(&str, &[&str])] = &[
        (
            "{clusterIP: 10.96}",
            &["file.yaml:4: spec.clusterIP: is the number 10.96, expected a string (put it in quotes)"],
        ),
        (
            "{clusterIP: cart}",
            &["file.yaml:4: spec.clusterIP: \"cart\" does not parse, expected an IPv4 or IPv6 address, or None"],
        ),
        (
            "{ports: [{port: 80}, {port: 81}]}",
            &[
                "file.yaml:4: spec.ports[0]: has no name, expected a name, since the service has several ports",
                "file.yaml:4: spec.ports[1]: has no name, expected a name, since the service has several ports",
            ],
        ),
        (
            "{ports: [{port: 80, name: a}, {port: 80, name: b}]}",
            &["file.yaml:4: spec.ports[1]: port \"80\" is there twice, expected each port once"],
        ),
        (
            "{ports: [{port: 80, protocol: TLS}]}",
            &["file.yaml:4: spec.ports[0].protocol: \"TLS\" is not known, expected TCP, UDP or SCTP"],
        ),
    ];
    for (spec, expected) in cases {
        check(&service(spec), expected);
    }
}

#[test]
fn bounds_hold() {
    let first = |yaml: &str| problems(yaml).first().cloned().unwrap_or_default();
    let deep = format!("{}{}", "[".repeat(100), "]".repeat(100));
    assert!(
        first(&deep).contains("nest too deep, expected at most 64 levels"),
        "{}",
        first(&deep)
    );
    let mut laughs = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for level in 1..10 {
        let before = format!("*a{}, ", level - 1).repeat(10);
        laughs.push_str(&format!("a{level}: &a{level} [{before}]\n"));
    }
    assert!(first(&laughs).contains("too many values"), "{}", first(&laughs));
    let aliases = format!("a: &a 1\nb: [{}]\n", "*a, ".repeat(2000));
    assert!(first(&aliases).contains("too many aliases"), "{}", first(&aliases));
    let large = " ".repeat(mesh_api::document::SOURCE_BYTES_MAX + 1);
    assert!(
        first(&large).contains("has 4194305 bytes, expected at most 4194304 bytes"),
        "{}",
        first(&large)
    );
    let many = "--- {}\n".repeat(mesh_api::document::DOCUMENTS_PER_SOURCE_MAX + 1);
    assert!(problems(&many).len() <= mesh_api::document::PROBLEMS_MAX);
}

#[test]
fn merge_keys_and_anchors_work() {
    let yaml = "\
apiVersion: v1
kind: Pod
metadata: {name: a, labels: &labels {app: a, version: v1}}
spec: {containers: [{name: a}]}
---
apiVersion: v1
kind: Pod
metadata:
  name: b
  labels:
    <<: {app: a, version: v1}
    version: v2
spec: {containers: [{name: a}]}
";
    let documents = parse("file.yaml", yaml).unwrap();
    let labels = &documents[1].meta().labels;
    assert_eq!((labels["app"].as_str(), labels["version"].as_str()), ("a", "v2"));
}

#[test]
fn kinds_are_found_as_people_type_them() {
    for (word, kind) in [
        ("pods", Some(Kind::Pod)),
        ("HTTPRoute", Some(Kind::HttpRoute)),
        ("httproutes", Some(Kind::HttpRoute)),
        ("accesspolicies", Some(Kind::AccessPolicy)),
        ("RateLimit", Some(Kind::RateLimit)),
        ("thing", None),
    ] {
        assert_eq!(Kind::find(word), kind, "{word}");
    }
}
