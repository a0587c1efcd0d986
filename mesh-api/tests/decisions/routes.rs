//! Routing by tables: precedence, kinds of routes, ports, filters, backends.

use std::time::Duration;

use mesh_api::{
    route::{HeaderEdit, PathModifier, RedirectSpec, Rewrite, RouteAction, redirect_location, rewrite_path},
    view::Destination,
    workload::AppProtocol,
};

use crate::world::{address, backends, name, request, routed, service_port, view};

/// A route in `shop` on `cart` with these rules.
fn route(name: &str, rules: &str) -> String {
    format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec:\n  parentRefs: [{{group: \"\", kind: Service, name: cart, port: 80}}]\n  rules:\n{rules}\n"
    )
}

/// Asks `shop/cart:80` under the routes, as a source in `shop`, and compares the rule's id.
fn check(routes: &str, cases: &[(&str, &str)]) {
    let view = view(routes);
    let port = service_port(&view, "10.96.0.10:80");
    for (line, wanted) in cases {
        let found = routed(&port, "shop", &request(line)).map_or("none".to_owned(), |rule| rule.id.to_string());
        assert_eq!(found.trim_start_matches("httproute/shop/"), *wanted, "{line}");
    }
}

const BACKEND: &str = "backendRefs: [{name: cart, port: 80}]";

#[test]
fn destinations_are_told_apart() {
    let view = view("");
    let kind = |text: &str| match view.destination(address(text)) {
        Destination::ServicePort(port) => format!("service {}:{}", port.service.name, port.port.port),
        Destination::Workload(endpoint) => format!("workload {} {}", endpoint.workload.name, endpoint.address),
        Destination::NoPort(service) => format!("no port {}", service.name),
        Destination::Outside => "outside".to_owned(),
    };
    let cases = [
        ("10.96.0.10:80", "service shop/cart:80"),
        ("[fd00:96::10]:80", "service shop/cart:80"),
        ("[::ffff:10.96.0.10]:80", "service shop/cart:80"),
        ("10.96.0.10:9100", "service shop/cart:9100"),
        ("10.96.0.10:81", "no port shop/cart"),
        ("10.96.1.10:80", "service web/cart:80"),
        ("10.1.0.1:8080", "workload shop/cart-v1 10.1.0.1:8080"),
        ("[fd00::1]:1", "workload shop/cart-v1 [fd00::1]:1"),
        ("[::ffff:10.1.0.1]:8080", "workload shop/cart-v1 10.1.0.1:8080"),
        ("10.9.9.9:80", "outside"),
    ];
    for (text, wanted) in cases {
        assert_eq!(kind(text), wanted, "{text}");
    }
    let on_node: Vec<String> = view
        .workloads_on("node-1")
        .map(|workload| workload.name.to_string())
        .collect();
    assert_eq!(on_node, ["shop/cart-v1", "shop/db", "web/front"]);
    assert_eq!(view.workloads_on("node-9").count(), 0);
}

#[test]
fn endpoints_are_ready_workloads_at_their_own_target_port() {
    let view = view("");
    let endpoints = |service: &str, port: u16| {
        let service = view.service(&name(service)).unwrap();
        let backend = service.port(port).unwrap().backend.clone();
        let text = |endpoints: &[mesh_api::workload::Endpoint]| {
            endpoints
                .iter()
                .map(|endpoint| endpoint.address.to_string())
                .collect::<Vec<_>>()
        };
        (
            text(&backend.endpoints_v4),
            text(&backend.endpoints_v6),
            backend.protocol,
        )
    };
    let (v4, v6, protocol) = endpoints("shop/cart", 80);
    assert_eq!(
        v4,
        ["10.1.0.1:8080", "10.1.0.2:8081"],
        "a named target port is each workload's own"
    );
    assert_eq!(v6, ["[fd00::1]:8080"]);
    assert_eq!(protocol, AppProtocol::Http1);
    let (v4, _, protocol) = endpoints("shop/cart", 9100);
    assert_eq!(v4, ["10.1.0.1:9100", "10.1.0.2:9100"]);
    assert_eq!(protocol, AppProtocol::Tcp);
    let (v4, ..) = endpoints("shop/cart-all", 80);
    assert_eq!(
        v4,
        ["10.1.0.1:8080", "10.1.0.2:8080", "10.1.0.3:8080"],
        "publishNotReadyAddresses"
    );
}

#[test]
fn a_selector_needs_all_of_its_labels_and_none_selects_nothing() {
    let service = |selector: &str| {
        view(&format!(
            "{{apiVersion: v1, kind: Service, metadata: {{name: s, namespace: shop}}, spec: {{clusterIP: 10.96.0.99, {selector} ports: [{{port: 80}}]}}}}"
        ))
    };
    for (selector, count) in [
        ("selector: {app: cart},", 2),
        ("selector: {app: cart, version: v2},", 1),
        ("selector: {version: v2, app: db},", 0),
        ("selector: {app: nothing},", 0),
        ("", 0),
    ] {
        let port = service_port(&service(selector), "10.96.0.99:80");
        assert_eq!(port.backend.endpoints_v4.len(), count, "{selector}");
    }
}

#[test]
fn the_most_specific_match_wins() {
    let rules = format!(
        r#"
  - {{name: root, matches: [{{path: {{type: PathPrefix, value: /}}}}], {BACKEND}}}
  - {{name: api, matches: [{{path: {{type: PathPrefix, value: /api}}}}], {BACKEND}}}
  - {{name: api-v1, matches: [{{path: {{type: PathPrefix, value: /api/v1}}}}], {BACKEND}}}
  - {{name: exact, matches: [{{path: {{type: Exact, value: /api/v1/users}}}}], {BACKEND}}}
  - {{name: regex, matches: [{{path: {{type: RegularExpression, value: "/api/v[0-9]+/items/.*"}}}}], {BACKEND}}}
  - {{name: post, matches: [{{path: {{type: PathPrefix, value: /api}}, method: POST}}], {BACKEND}}}
  - {{name: one-header, matches: [{{path: {{type: PathPrefix, value: /api}}, headers: [{{name: X-Team, value: a}}]}}], {BACKEND}}}
  - {{name: two-headers, matches: [{{path: {{type: PathPrefix, value: /api}}, headers: [{{name: x-team, value: a}}, {{name: x-env, type: RegularExpression, value: "dev|test"}}]}}], {BACKEND}}}
  - {{name: query, matches: [{{path: {{type: PathPrefix, value: /api}}, queryParams: [{{name: q, value: "a b"}}]}}], {BACKEND}}}
  - {{name: query-regex, matches: [{{path: {{type: PathPrefix, value: /api}}, queryParams: [{{name: q, value: "1"}}, {{name: r, type: RegularExpression, value: "[0-9]+"}}]}}], {BACKEND}}}"#
    );
    check(
        &route("r", &rules),
        &[
            ("GET /", "r/root"),
            ("GET /apiary", "r/root"),
            ("OPTIONS *", "r/root"),
            ("GET /api", "r/api"),
            ("GET /api/", "r/api"),
            ("GET /api/x", "r/api"),
            ("GET /api//x", "r/api"),
            ("GET /API", "r/root"),
            ("GET /api/v1", "r/api-v1"),
            ("GET /api/v12", "r/api"),
            ("GET /api/v1/users", "r/exact"),
            ("GET /api/v1/users/", "r/api-v1"),
            ("POST /api/v1/users", "r/exact"),
            ("GET /api/v1/items/1", "r/regex"),
            ("GET /x/api/v1/items/1", "r/root"),
            ("POST /api/x", "r/post"),
            ("post /api/x", "r/api"),
            ("GET /api cart x-team: a", "r/one-header"),
            ("GET /api cart x-team: A", "r/api"),
            ("POST /api cart x-team: a", "r/post"),
            ("GET /api cart x-team: a; x-env: dev", "r/two-headers"),
            ("GET /api cart x-team: a; x-env: develop", "r/one-header"),
            ("GET /api?q=a+b", "r/query"),
            ("GET /api?q=a%20b", "r/query"),
            ("GET /api?%71=a%20b&x", "r/query"),
            ("GET /api?q=c&q=a+b", "r/api"),
            ("GET /api?q=1&r=22", "r/query-regex"),
            ("GET /api?q=1&r=x", "r/api"),
            ("GET /api?q=a+b cart x-team: a", "r/one-header"),
        ],
    );
}

#[test]
fn ties_go_to_the_first_route_and_then_the_first_rule() {
    let rules = |first: &str, second: &str| {
        format!(
            "  - {{name: {first}, matches: [{{path: {{type: PathPrefix, value: /a}}}}], {BACKEND}}}\n\
             \x20 - {{name: {second}, matches: [{{path: {{type: PathPrefix, value: /b}}}}, {{path: {{type: PathPrefix, value: /a}}}}], {BACKEND}}}"
        )
    };
    let routes = route("beta", &rules("one", "two")) + &route("alpha", &rules("three", "four"));
    check(
        &routes,
        &[("GET /a", "alpha/three"), ("GET /b", "alpha/four"), ("GET /c", "none")],
    );
}

#[test]
fn a_rule_without_matches_takes_all_and_one_without_a_name_has_its_index() {
    check(
        &route("r", &format!("  - {{{BACKEND}}}")),
        &[("GET /x", "r/0"), ("DELETE /", "r/0")],
    );
}

#[test]
fn consumer_routes_are_used_instead_of_producer_routes_by_their_own_namespace() {
    let consumer = r#"
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: mine, namespace: web}
spec:
  parentRefs: [{group: "", kind: Service, name: cart, namespace: shop}]
  rules:
  - {matches: [{path: {type: PathPrefix, value: /web}}], backendRefs: [{name: cart, port: 80}]}
"#;
    let both = view(&(route("r", &format!("  - {{{BACKEND}}}")) + consumer));
    let alone = view(consumer);
    let find = |view: &mesh_api::view::View, namespace: &str, line: &str| {
        let port = service_port(view, "10.96.0.10:80");
        routed(&port, namespace, &request(line)).map_or("none".to_owned(), |rule| rule.id.to_string())
    };
    assert_eq!(find(&both, "web", "GET /web"), "httproute/web/mine/0");
    assert_eq!(
        find(&both, "web", "GET /"),
        "none",
        "the producer's routes do not hold for web"
    );
    assert_eq!(find(&both, "shop", "GET /web"), "httproute/shop/r/0");
    assert_eq!(find(&alone, "web", "GET /web"), "httproute/web/mine/0");
    assert_eq!(
        find(&alone, "shop", "GET /web"),
        "service/shop/cart",
        "no route for shop: the service itself"
    );
    let port = service_port(&alone, "10.96.0.10:80");
    let rule = routed(&port, "web", &request("GET /web")).unwrap();
    assert_eq!(
        backends(rule),
        ["1*web/cart:80"],
        "a backend lies in the route's namespace"
    );
    assert!(
        service_port(&alone, "10.96.0.10:9100").routes.is_some(),
        "a parent without a port means all of them"
    );
}

#[test]
fn a_route_holds_only_for_the_ports_of_its_parents() {
    let by = |parent: &str| {
        view(&format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: r, namespace: shop}}\n\
             spec: {{parentRefs: [{parent}], rules: [{{{BACKEND}}}]}}"
        ))
    };
    let cases = [
        ("{group: '', kind: Service, name: cart}", true, true),
        ("{group: '', kind: Service, name: cart, port: 80}", true, false),
        (
            "{group: '', kind: Service, name: cart, sectionName: tcp-metrics}",
            false,
            true,
        ),
        (
            "{group: '', kind: Service, name: cart, sectionName: http, port: 9100}",
            false,
            false,
        ),
        ("{group: '', kind: Service, name: nothing}", false, false),
        ("{name: some-gateway}", false, false),
    ];
    for (parent, http, metrics) in cases {
        let view = by(parent);
        assert_eq!(service_port(&view, "10.96.0.10:80").routes.is_some(), http, "{parent}");
        assert_eq!(
            service_port(&view, "10.96.0.10:9100").routes.is_some(),
            metrics,
            "{parent}"
        );
    }
}

#[test]
fn backends_are_services_or_subsets_and_a_bad_one_gets_its_share_of_500() {
    let rules = r#"
  - name: r
    backendRefs:
    - {name: cart, port: 80, weight: 0}
    - {group: nodemesh.io, kind: ServiceSubset, name: cart-v1, port: 80, weight: 9}
    - {group: nodemesh.io, kind: ServiceSubset, name: cart-v2, port: 80}
    - {name: nothing, port: 80, weight: 2}
    - {name: cart, port: 81, weight: 3}
    - {group: nodemesh.io, kind: ServiceSubset, name: nothing, port: 80, weight: 4}"#;
    let view = view(&route("r", rules));
    let port = service_port(&view, "10.96.0.10:80");
    let rule = routed(&port, "shop", &request("GET /")).unwrap();
    assert_eq!(
        backends(rule),
        [
            "0*shop/cart:80",
            "9*shop/cart:80/cart-v1",
            "1*shop/cart:80/cart-v2",
            "2*service shop/nothing does not exist",
            "3*service shop/cart has no port 81",
            "4*service subset shop/nothing does not exist or has no service",
        ]
    );
    let RouteAction::Forward(list) = &rule.action else {
        panic!()
    };
    let subset = list[1].backend.as_ref().unwrap();
    let addresses: Vec<String> = subset
        .endpoints_v4
        .iter()
        .map(|endpoint| endpoint.address.to_string())
        .collect();
    assert_eq!(addresses, ["10.1.0.1:8080"]);
    let mut counts = [0u32; 6];
    for random in 0..19 {
        let picked = rule.pick(random).unwrap();
        counts[list.iter().position(|one| std::ptr::eq(one, picked)).unwrap()] += 1;
    }
    assert_eq!(counts, [0, 9, 1, 2, 3, 4]);
}

#[test]
fn without_weight_or_backend_nothing_is_picked() {
    for refs in ["backendRefs: [{name: cart, port: 80, weight: 0}]", "name: empty"] {
        let view = view(&route("r", &format!("  - {{{refs}}}")));
        let port = service_port(&view, "10.96.0.10:80");
        assert!(
            routed(&port, "shop", &request("GET /")).unwrap().pick(5).is_none(),
            "{refs}"
        );
    }
}

#[test]
fn filters_timeouts_and_retries_are_taken_over() {
    let rules = r#"
  - name: edits
    matches: [{path: {type: PathPrefix, value: /old/}}]
    filters:
    - type: RequestHeaderModifier
      requestHeaderModifier: {set: [{name: X-A, value: "1"}], add: [{name: x-b, value: "2"}], remove: [X-C]}
    - type: ResponseHeaderModifier
      responseHeaderModifier: {set: [{name: x-d, value: "3"}]}
    - type: URLRewrite
      urlRewrite: {hostname: other.example, path: {type: ReplacePrefixMatch, replacePrefixMatch: /new}}
    timeouts: {request: 2s, backendRequest: 500ms}
    retry: {attempts: 3, codes: [503]}
    backendRefs:
    - name: cart
      port: 80
      filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: x-e, value: "4"}]}}]
  - name: unlimited
    matches: [{path: {type: PathPrefix, value: /slow}}]
    timeouts: {request: 0s}
    backendRefs: [{name: cart, port: 80}]
  - name: default
    backendRefs: [{name: cart, port: 80}]"#;
    let policy = "\n---\napiVersion: nodemesh.io/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: t, namespace: shop}\n\
                  spec: {targetRefs: [{kind: Service, name: cart}], timeouts: {request: 9s}, retry: {attempts: 1, on: [reset]}}";
    let view = view(&(route("r", rules) + policy));
    let port = service_port(&view, "10.96.0.10:80");
    let traffic = &*port.backend.traffic;
    let edits = routed(&port, "shop", &request("GET /old/x")).unwrap();
    let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let wanted = HeaderEdit {
        set: vec![pair("x-a", "1")],
        add: vec![pair("x-b", "2")],
        remove: vec!["x-c".to_owned()],
    };
    assert_eq!(edits.request_headers, wanted);
    assert_eq!(edits.response_headers.set, [pair("x-d", "3")]);
    let rewrite = edits.rewrite.as_ref().unwrap();
    assert_eq!(rewrite.hostname.as_deref(), Some("other.example"));
    assert_eq!(rewrite_path(rewrite, &edits.matched_prefix, "/old/x"), "/new/x");
    assert_eq!(edits.pick(0).unwrap().request_headers.set, [pair("x-e", "4")]);
    assert_eq!(edits.timeout(traffic), Some(Duration::from_secs(2)));
    assert_eq!(edits.try_timeout(traffic), Some(Duration::from_millis(500)));
    assert_eq!(edits.retry(traffic).unwrap().attempts, 3);
    let unlimited = routed(&port, "shop", &request("GET /slow")).unwrap();
    assert_eq!(unlimited.timeout(traffic), None);
    let default = routed(&port, "shop", &request("GET /")).unwrap();
    assert_eq!(default.timeout(traffic), Some(Duration::from_secs(9)));
    assert_eq!(default.retry(traffic).unwrap().attempts, 1);
}

#[test]
fn prefixes_are_replaced_as_the_gateway_api_says() {
    let cases = [
        // The table of HTTPPathModifier.replacePrefixMatch.
        ("/foo/bar", "/foo", "/xyz", "/xyz/bar"),
        ("/foo/bar", "/foo", "/xyz/", "/xyz/bar"),
        ("/foo/bar", "/foo/", "/xyz", "/xyz/bar"),
        ("/foo/bar", "/foo/", "/xyz/", "/xyz/bar"),
        ("/foo", "/foo", "/xyz", "/xyz"),
        ("/foo/", "/foo", "/xyz", "/xyz/"),
        ("/foo/bar", "/foo", "", "/bar"),
        ("/foo/", "/foo", "", "/"),
        ("/foo", "/foo", "", "/"),
        ("/foo/", "/foo", "/", "/"),
        ("/foo", "/foo", "/", "/"),
        // Ours.
        ("/foo", "/", "/xyz", "/xyz/foo"),
        ("/", "/", "/xyz", "/xyz/"),
        ("/a b\u{e9}", "/", "/x\r\n", "/x%0D%0A/a%20b%C3%A9"),
    ];
    for (path, prefix, with, wanted) in cases {
        let rewrite = Rewrite {
            hostname: None,
            path: Some(PathModifier::ReplacePrefixMatch(with.into())),
        };
        assert_eq!(rewrite_path(&rewrite, prefix, path), wanted, "{path} {prefix} {with}");
    }
    let full = Rewrite {
        hostname: None,
        path: Some(PathModifier::ReplaceFullPath("/all".into())),
    };
    assert_eq!(rewrite_path(&full, "/", "/x/y"), "/all");
    assert_eq!(
        rewrite_path(
            &Rewrite {
                hostname: None,
                path: None
            },
            "/",
            "/x/y"
        ),
        "/x/y"
    );
}

#[test]
fn a_location_has_what_the_redirect_names_and_keeps_the_rest() {
    let spec = |scheme: Option<&str>, host: Option<&str>, port: Option<u16>, path: Option<PathModifier>| RedirectSpec {
        status: 302,
        scheme: scheme.map(Into::into),
        hostname: host.map(Into::into),
        port,
        path,
        matched_prefix: "/a".into(),
    };
    let prefix = |with: &str| Some(PathModifier::ReplacePrefixMatch(with.into()));
    let full = |with: &str| Some(PathModifier::ReplaceFullPath(with.into()));
    let cases = [
        (
            spec(None, None, None, None),
            "/a/b?c=d",
            "cart:80",
            80,
            "http://cart/a/b?c=d",
        ),
        (
            spec(None, None, None, None),
            "/a",
            "cart:8080",
            8080,
            "http://cart:8080/a",
        ),
        (
            spec(Some("https"), None, None, None),
            "/a",
            "cart:8080",
            8080,
            "https://cart/a",
        ),
        (
            spec(Some("https"), None, Some(8443), None),
            "/a",
            "cart",
            80,
            "https://cart:8443/a",
        ),
        (
            spec(Some("https"), None, Some(443), None),
            "/a",
            "cart",
            80,
            "https://cart/a",
        ),
        (
            spec(Some("http"), None, Some(443), None),
            "/a",
            "cart",
            80,
            "http://cart:443/a",
        ),
        (
            spec(None, Some("x.example"), None, None),
            "/a",
            "cart",
            80,
            "http://x.example/a",
        ),
        (
            spec(None, Some("x.example"), Some(80), None),
            "/a",
            "cart",
            8080,
            "http://x.example/a",
        ),
        (
            spec(None, None, None, prefix("/z")),
            "/a/b?q",
            "cart",
            80,
            "http://cart/z/b?q",
        ),
        (spec(None, None, None, prefix("/")), "/a", "cart", 80, "http://cart/"),
        (
            spec(None, None, None, full("/z")),
            "/a/b?q",
            "cart",
            80,
            "http://cart/z?q",
        ),
        (
            spec(None, None, None, None),
            "/a",
            "[fd00::1]:80",
            80,
            "http://[fd00::1]/a",
        ),
        (spec(None, None, None, None), "*", "cart", 80, "http://cart/*"),
        (
            spec(None, None, None, None),
            "/a\r\nx: y?\r\n",
            "ca\nrt",
            80,
            "http://ca%0Art/a%0D%0Ax:%20y?%0D%0A",
        ),
    ];
    for (spec, target, authority, port, wanted) in cases {
        let request = mesh_api::explain::PlainRequest::new("GET", target, authority);
        assert_eq!(
            redirect_location(&spec, &request, port, "http"),
            wanted,
            "{target} {authority} {spec:?}"
        );
    }
}

#[test]
fn a_redirect_knows_the_prefix_that_matched() {
    let rules = r#"
  - matches: [{path: {type: PathPrefix, value: /one}}]
    filters:
    - type: RequestRedirect
      requestRedirect: {statusCode: 301, path: {type: ReplacePrefixMatch, replacePrefixMatch: /new}}
  - matches: [{path: {type: PathPrefix, value: /two/}, method: GET}]
    filters:
    - type: RequestRedirect
      requestRedirect: {statusCode: 301, path: {type: ReplacePrefixMatch, replacePrefixMatch: /new}}"#;
    let view = view(&route("r", rules));
    let port = service_port(&view, "10.96.0.10:80");
    for (line, wanted) in [("GET /one/x", "http://cart/new/x"), ("GET /two", "http://cart/new")] {
        let rule = routed(&port, "shop", &request(line)).unwrap();
        let RouteAction::Redirect(spec) = &rule.action else {
            panic!("{line}")
        };
        assert_eq!(
            (
                spec.status,
                redirect_location(spec, &request(line), 80, "http").as_str()
            ),
            (301, wanted)
        );
    }
}
