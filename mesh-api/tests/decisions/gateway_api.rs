//! What the Gateway API's own conformance suite asks of a mesh, as tables: its services, its routes, its requests and
//! what must become of each. The suite itself runs on a cluster; here the same is said in milliseconds.

use mesh_api::{
    explain::PlainRequest,
    request::Request,
    route::{FlowChoice, Hello, RouteAction, RouteRule, redirect_location, rewrite_path, select_flow},
    view::View,
    workload::AppProtocol,
};

use crate::world::{backends, request, routed, service_port, view_of};

/// The suite's applications, in two namespaces; `echo` is both versions.
const APPS: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: mesh, labels: {nodemesh.io/mesh: enabled}}
---
apiVersion: v1
kind: Namespace
metadata: {name: consumer, labels: {nodemesh.io/mesh: enabled}}
---
apiVersion: v1
kind: Pod
metadata: {name: echo-v1, namespace: mesh, labels: {app: echo, version: v1}}
spec: {nodeName: node-1, containers: [{name: echo}]}
status: {podIPs: [{ip: 10.1.0.1}], conditions: [{type: Ready, status: "True"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: echo-v2, namespace: mesh, labels: {app: echo, version: v2}}
spec: {nodeName: node-2, containers: [{name: echo}]}
status: {podIPs: [{ip: 10.1.0.2}], conditions: [{type: Ready, status: "True"}]}
---
apiVersion: v1
kind: Service
metadata: {name: echo, namespace: mesh}
spec:
  clusterIP: 10.96.0.1
  selector: {app: echo}
  ports:
  - {name: http, port: 80, appProtocol: http, targetPort: 8080}
  - {name: http-alt, port: 8080, appProtocol: http}
  - {name: https, port: 443, targetPort: 8443}
  - {name: tcp, port: 9090}
  - {name: grpc, port: 7070, appProtocol: kubernetes.io/h2c}
---
apiVersion: v1
kind: Service
metadata: {name: echo-v1, namespace: mesh}
spec:
  clusterIP: 10.96.0.11
  selector: {app: echo, version: v1}
  ports:
  - {name: http, port: 80, appProtocol: http, targetPort: 8080}
  - {name: http-alt, port: 8080, appProtocol: http}
  - {name: https, port: 443, targetPort: 8443}
  - {name: tcp, port: 9090}
  - {name: grpc, port: 7070}
---
apiVersion: v1
kind: Service
metadata: {name: echo-v2, namespace: mesh}
spec:
  clusterIP: 10.96.0.12
  selector: {app: echo, version: v2}
  ports:
  - {name: http, port: 80, appProtocol: http, targetPort: 8080}
  - {name: http-alt, port: 8080, appProtocol: http}
  - {name: https, port: 443, targetPort: 8443}
  - {name: tcp, port: 9090}
  - {name: grpc, port: 7070}
"#;

const ECHO: &str = "10.96.0.1:80";
const ECHO_V1: &str = "10.96.0.11:80";
const ECHO_V2: &str = "10.96.0.12:80";

fn world(routes: &str) -> View {
    view_of(&[("apps.yaml", APPS), ("routes.yaml", routes)])
}

fn route(kind: &str, namespace: &str, name: &str, parent: &str, rules: &str) -> String {
    format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
         spec:\n  parentRefs: [{{group: \"\", kind: Service, {parent}}}]\n  rules: {rules}\n"
    )
}

fn echo_route(rules: &str) -> String {
    route("HTTPRoute", "mesh", "route", "name: echo, port: 80", rules)
}

/// What becomes of a request: its backends (the service's name alone), `404`, or a redirect's status.
fn fate(view: &View, at: &str, source_namespace: &str, request: &dyn Request) -> String {
    let port = service_port(view, at);
    if port.routes.is_none() {
        return format!("service {}", port.service.name.name);
    }
    let Some(rule) = routed(&port, source_namespace, request) else {
        return "404".to_owned();
    };
    match &rule.action {
        RouteAction::Redirect(redirect) => redirect.status.to_string(),
        RouteAction::Forward(_) => {
            let short = |text: &String| text.replace("mesh/", "").replace("1*", "");
            backends(rule).iter().map(short).collect::<Vec<_>>().join(" ")
        }
    }
}

/// `(request line, fate)` at the service `echo`, asked by an application of its own namespace.
fn check(routes: &str, cases: &[(&str, &str)]) {
    let view = world(routes);
    for (line, wanted) in cases {
        assert_eq!(fate(&view, ECHO, "mesh", &request(line)), *wanted, "{line}");
    }
}

/// The port `echo:80`, and the request of a line.
fn rule_for(view: &View, line: &str) -> (std::sync::Arc<mesh_api::view::ServicePortView>, PlainRequest) {
    (service_port(view, ECHO), request(line))
}

#[test]
fn mesh_basic_and_simple_same_namespace() {
    check("", &[("GET /", "service echo")]);
    check(
        &echo_route("[{backendRefs: [{name: echo-v1, port: 8080}]}]"),
        &[("GET /", "echo-v1:8080")],
    );
}

#[test]
fn matching() {
    let rules = "
  - matches: [{path: {type: PathPrefix, value: /}}, {headers: [{name: version, value: one}]}]
    backendRefs: [{name: echo-v1, port: 8080}]
  - matches: [{path: {type: PathPrefix, value: /v2}}, {headers: [{name: version, value: two}]}]
    backendRefs: [{name: echo-v2, port: 8080}]";
    check(
        &echo_route(rules),
        &[
            ("GET /", "echo-v1:8080"),
            ("GET /example", "echo-v1:8080"),
            ("GET / echo Version: one", "echo-v1:8080"),
            ("GET /v2", "echo-v2:8080"),
            ("GET /v2/example", "echo-v2:8080"),
            ("GET / echo Version: two", "echo-v2:8080"),
            ("GET /v2/", "echo-v2:8080"),
            ("GET /v2example", "echo-v1:8080"),
            ("GET /foo/v2/example", "echo-v1:8080"),
        ],
    );
}

#[test]
fn query_param_matching() {
    let rules = "
  - {matches: [{queryParams: [{name: animal, value: whale}]}], backendRefs: [{name: echo-v1, port: 8080}]}
  - {matches: [{queryParams: [{name: animal, value: dolphin}]}], backendRefs: [{name: echo-v2, port: 8080}]}
  - matches: [{path: {type: PathPrefix, value: /path1}, queryParams: [{name: animal, value: whale}]}]
    backendRefs: [{name: echo-v1, port: 8080}]
  - matches: [{headers: [{name: version, value: one}], queryParams: [{name: animal, value: whale}]}]
    backendRefs: [{name: echo-v2, port: 8080}]
  - matches:
    - {path: {type: PathPrefix, value: /path3}, queryParams: [{name: animal, value: shark}]}
    - path: {type: PathPrefix, value: /path4}
      headers: [{name: version, value: three}]
      queryParams: [{name: animal, value: kraken}]
    backendRefs: [{name: echo-v1, port: 8080}]
  - {matches: [{path: {type: PathPrefix, value: /path5}}], backendRefs: [{name: echo-v1, port: 8080}]}
  - {matches: [{queryParams: [{name: animal, value: hydra}]}], backendRefs: [{name: echo-v2, port: 8080}]}";
    check(
        &echo_route(rules),
        &[
            ("GET /?animal=whale", "echo-v1:8080"),
            ("GET /?animal=dolphin", "echo-v2:8080"),
            ("GET /?animal=whale&otherparam=irrelevant", "echo-v1:8080"),
            ("GET /?animal=dolphin&color=yellow", "echo-v2:8080"),
            ("GET /?color=blue", "404"),
            ("GET /?animal=dog", "404"),
            ("GET /?animal=whaledolphin", "404"),
            ("GET /", "404"),
            ("GET /path1?animal=whale", "echo-v1:8080"),
            ("GET /?animal=whale echo version: one", "echo-v2:8080"),
            ("GET /path3?animal=shark", "echo-v1:8080"),
            ("GET /path4?animal=kraken echo version: three", "echo-v1:8080"),
            ("GET /?animal=shark", "404"),
            ("GET /path4?animal=kraken", "404"),
            ("GET /path5?animal=hydra", "echo-v1:8080"),
        ],
    );
}

#[test]
fn named_rules() {
    let rules = "
  - {name: named-rule, matches: [{path: {type: PathPrefix, value: /named}}], backendRefs: [{name: echo-v1, port: 8080}]}
  - {matches: [{path: {type: PathPrefix, value: /unnamed}}], backendRefs: [{name: echo-v2, port: 8080}]}";
    let routes = echo_route(rules);
    check(
        &routes,
        &[("GET /named", "echo-v1:8080"), ("GET /unnamed", "echo-v2:8080")],
    );
    let view = world(&routes);
    for (line, id) in [
        ("GET /named", "httproute/mesh/route/named-rule"),
        ("GET /unnamed", "httproute/mesh/route/1"),
    ] {
        let (port, request) = rule_for(&view, line);
        assert_eq!(routed(&port, "mesh", &request).unwrap().id.as_str(), id);
    }
}

#[test]
fn redirects() {
    let redirect = |path: &str, filter: &str| {
        format!(
            "\n  - matches: [{{path: {{type: PathPrefix, value: {path}}}}}]\n    \
             filters: [{{type: RequestRedirect, requestRedirect: {{{filter}}}}}]"
        )
    };
    let prefix = "path: {type: ReplacePrefixMatch, replacePrefixMatch: /replacement-prefix}";
    let full = "path: {type: ReplaceFullPath, replaceFullPath: /replacement-full}";
    // The path of the rule, its filter, the path asked for, and the answer.
    let cases = [
        ("/redirect", "statusCode: 303", "/redirect", 303, "http://echo/redirect"),
        (
            "/temporary",
            "statusCode: 307",
            "/temporary",
            307,
            "http://echo/temporary",
        ),
        (
            "/permanent",
            "statusCode: 308",
            "/permanent",
            308,
            "http://echo/permanent",
        ),
        (
            "/hostname-redirect",
            "hostname: example.org",
            "/hostname-redirect",
            302,
            "http://example.org/hostname-redirect",
        ),
        (
            "/host-and-status",
            "statusCode: 301, hostname: example.org",
            "/host-and-status",
            301,
            "http://example.org/host-and-status",
        ),
        (
            "/original-prefix",
            prefix,
            "/original-prefix/lemon",
            302,
            "http://echo/replacement-prefix/lemon",
        ),
        (
            "/full",
            "path: {type: ReplaceFullPath, replaceFullPath: /full-path-replacement}",
            "/full/path/original",
            302,
            "http://echo/full-path-replacement",
        ),
        (
            "/path-and-host",
            &format!("hostname: example.org, {prefix}"),
            "/path-and-host",
            302,
            "http://example.org/replacement-prefix",
        ),
        (
            "/path-and-status",
            &format!("statusCode: 301, {prefix}"),
            "/path-and-status",
            301,
            "http://echo/replacement-prefix",
        ),
        (
            "/full-path-and-host",
            &format!("hostname: example.org, {full}"),
            "/full-path-and-host",
            302,
            "http://example.org/replacement-full",
        ),
        (
            "/full-path-and-status",
            &format!("statusCode: 301, {full}"),
            "/full-path-and-status",
            301,
            "http://echo/replacement-full",
        ),
        ("/port", "port: 8083", "/port", 302, "http://echo:8083/port"),
        (
            "/port-and-host",
            "hostname: example.org, port: 8083",
            "/port-and-host",
            302,
            "http://example.org:8083/port-and-host",
        ),
        (
            "/port-and-status",
            "port: 8083, statusCode: 301",
            "/port-and-status",
            301,
            "http://echo:8083/port-and-status",
        ),
        (
            "/port-and-host-and-status",
            "port: 8083, hostname: example.org, statusCode: 302",
            "/port-and-host-and-status",
            302,
            "http://example.org:8083/port-and-host-and-status",
        ),
        ("/scheme", "scheme: https", "/scheme", 302, "https://echo/scheme"),
        (
            "/scheme-and-host",
            "hostname: example.org, scheme: https",
            "/scheme-and-host",
            302,
            "https://example.org/scheme-and-host",
        ),
        (
            "/scheme-and-status",
            "scheme: https, statusCode: 301",
            "/scheme-and-status",
            301,
            "https://echo/scheme-and-status",
        ),
        (
            "/scheme-and-host-and-status",
            "scheme: https, statusCode: 302, hostname: example.org",
            "/scheme-and-host-and-status",
            302,
            "https://example.org/scheme-and-host-and-status",
        ),
    ];
    for (path, filter, asked, status, location) in cases {
        let view = world(&echo_route(&redirect(path, filter)));
        let port = service_port(&view, ECHO);
        let request = request(&format!("GET {asked} echo"));
        let rule = routed(&port, "mesh", &request).unwrap_or_else(|| panic!("{asked}: no rule"));
        let RouteAction::Redirect(spec) = &rule.action else {
            panic!("{asked}: {rule:?}");
        };
        assert_eq!(spec.status, status, "{asked}");
        assert_eq!(redirect_location(spec, &request, 80, "http"), location, "{asked}");
    }
}

#[test]
fn header_modifiers_of_a_rule_and_of_a_backend() {
    let change = "type: RequestHeaderModifier, requestHeaderModifier: {\
         set: [{name: X-Header-Set, value: set-overwrites-values}], \
         add: [{name: X-Header-Add, value: add-appends-values}], remove: [X-Header-Remove]}";
    let of_rule = format!("[{{filters: [{{{change}}}], backendRefs: [{{name: echo-v1, port: 8080}}]}}]");
    let of_backend = format!("[{{backendRefs: [{{name: echo-v1, port: 8080, filters: [{{{change}}}]}}]}}]");
    let edit = |rule: &RouteRule, backend: bool| match &rule.action {
        RouteAction::Forward(shares) if backend => shares[0].request_headers.clone(),
        _ => rule.request_headers.clone(),
    };
    for (rules, backend) in [(of_rule, false), (of_backend, true)] {
        let view = world(&echo_route(&rules));
        let (port, request) = rule_for(&view, "GET /set");
        let rule = routed(&port, "mesh", &request).unwrap();
        let edit = edit(rule, backend);
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(edit.set, [pair("x-header-set", "set-overwrites-values")]);
        assert_eq!(edit.add, [pair("x-header-add", "add-appends-values")]);
        assert_eq!(edit.remove, ["x-header-remove"]);
    }
}

#[test]
fn rewrite_path_of_a_request() {
    let rewrite = |path: &str, how: &str| {
        format!(
            "\n  - matches: [{{path: {{type: PathPrefix, value: {path}}}}}]\n    \
             filters: [{{type: URLRewrite, urlRewrite: {{path: {{{how}}}}}}}]\n    \
             backendRefs: [{{name: echo-v1, port: 80}}]"
        )
    };
    let cases = [
        (
            "/prefix/one",
            "type: ReplacePrefixMatch, replacePrefixMatch: /one",
            "/prefix/one/two",
            "/one/two",
        ),
        (
            "/strip-prefix",
            "type: ReplacePrefixMatch, replacePrefixMatch: /",
            "/strip-prefix/three",
            "/three",
        ),
        (
            "/strip-prefix",
            "type: ReplacePrefixMatch, replacePrefixMatch: /",
            "/strip-prefix",
            "/",
        ),
        (
            "/full/one",
            "type: ReplaceFullPath, replaceFullPath: /one",
            "/full/one/two",
            "/one",
        ),
        (
            "/prefix/rewrite-path-and-modify-headers",
            "type: ReplacePrefixMatch, replacePrefixMatch: /prefix",
            "/prefix/rewrite-path-and-modify-headers/one",
            "/prefix/one",
        ),
    ];
    for (path, how, asked, wanted) in cases {
        let view = world(&echo_route(&rewrite(path, how)));
        let (port, request) = rule_for(&view, &format!("GET {asked}"));
        let rule = routed(&port, "mesh", &request).unwrap();
        let rewrite = rule.rewrite.as_ref().unwrap();
        assert_eq!(rewrite_path(rewrite, &rule.matched_prefix, asked), wanted, "{asked}");
    }
}

/// The shares that a rule's backends get of every hundred numbers.
fn shares(rule: &RouteRule) -> Vec<(String, usize)> {
    let mut counts = std::collections::BTreeMap::new();
    for random in 0..100 {
        let name = match rule.pick(random).map(|share| &share.backend) {
            Some(Ok(backend)) => backend.service.name.name.to_string(),
            Some(Err(bad)) => format!("500: {bad}"),
            None => "500".to_owned(),
        };
        *counts.entry(name).or_insert(0) += 1;
    }
    counts.into_iter().collect()
}

fn counted(pairs: &[(&str, usize)]) -> Vec<(String, usize)> {
    pairs.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
}

#[test]
fn weights_of_requests_and_of_calls() {
    let http = "[{backendRefs: [{name: echo-v1, port: 8080, weight: 70}, {name: echo-v2, port: 8080, weight: 30}]}]";
    let view = world(&echo_route(http));
    let (port, request) = rule_for(&view, "GET /");
    let rule = routed(&port, "mesh", &request).unwrap();
    assert_eq!(shares(rule), counted(&[("echo-v1", 70), ("echo-v2", 30)]));

    // The third backend does not exist and has no share.
    let grpc = "[{backendRefs: [{name: echo-v1, port: 7070, weight: 70}, {name: echo-v2, port: 7070, weight: 30}, \
                {name: echo-v3, port: 7070, weight: 0}]}]";
    let view = world(&route("GRPCRoute", "mesh", "calls", "name: echo, port: 7070", grpc));
    let port = service_port(&view, "10.96.0.1:7070");
    let call = self::request("POST /proto.EchoTestService/Echo echo content-type: application/grpc");
    let rule = routed(&port, "mesh", &call).unwrap();
    assert_eq!(rule.id.as_str(), "grpcroute/mesh/calls/0");
    assert_eq!(shares(rule), counted(&[("echo-v1", 70), ("echo-v2", 30)]));

    let bad = "[{backendRefs: [{name: echo-v1, port: 8080, weight: 20}, {name: nobody, port: 80, weight: 80}]}]";
    let view = world(&echo_route(bad));
    let (port, request) = rule_for(&view, "GET /");
    let wanted = counted(&[("500: service mesh/nobody does not exist", 80), ("echo-v1", 20)]);
    assert_eq!(shares(routed(&port, "mesh", &request).unwrap()), wanted);
    for nowhere in ["[{}]", "[{backendRefs: [{name: echo-v1, port: 8080, weight: 0}]}]"] {
        let view = world(&echo_route(nowhere));
        let (port, request) = rule_for(&view, "GET /");
        assert_eq!(
            shares(routed(&port, "mesh", &request).unwrap()),
            counted(&[("500", 100)]),
            "{nowhere}"
        );
    }
}

const SET: &str =
    "filters: [{type: ResponseHeaderModifier, responseHeaderModifier: {set: [{name: X-Header-Set, value: set}]}}]";

#[test]
fn split_frontend_ports_and_hostnames() {
    let split = "
  - {matches: [{path: {type: Exact, value: /v1}}], backendRefs: [{name: echo-v1, port: 80}]}
  - {matches: [{path: {type: Exact, value: /v2}}], backendRefs: [{name: echo-v2, port: 80}]}";
    let split = route("HTTPRoute", "mesh", "split", "name: echo", split);
    check(
        &split,
        &[("GET /v1", "echo-v1:80"), ("GET /v2", "echo-v2:80"), ("GET /", "404")],
    );

    // The service's address is what counts, whatever the Host says, and the pod's own address is nobody's service.
    let frontend = route(
        "HTTPRoute",
        "mesh",
        "frontend",
        "name: echo-v2",
        &format!("[{{{SET}, backendRefs: [{{name: echo-v2, port: 80}}]}}]"),
    );
    let view = world(&frontend);
    for host in ["echo-v1", "echo-v2", "anything"] {
        let line = format!("GET / {host}");
        assert_eq!(fate(&view, ECHO_V2, "mesh", &request(&line)), "echo-v2:80", "{line}");
        assert_eq!(
            fate(&view, "10.96.0.12:8080", "mesh", &request(&line)),
            "echo-v2:80",
            "{line}"
        );
        assert_eq!(
            fate(&view, ECHO_V1, "mesh", &request(&line)),
            "service echo-v1",
            "{line}"
        );
    }
    assert!(matches!(
        view.destination(crate::world::address("10.1.0.2:8080")),
        mesh_api::view::Destination::Workload(_)
    ));

    let ports = route(
        "HTTPRoute",
        "mesh",
        "ports",
        "name: echo-v1, port: 80",
        &format!("[{{{SET}, backendRefs: [{{name: echo-v1, port: 80}}]}}]"),
    );
    let view = world(&ports);
    assert_eq!(fate(&view, ECHO_V1, "mesh", &request("GET /")), "echo-v1:80");
    assert_eq!(
        fate(&view, "10.96.0.11:8080", "mesh", &request("GET /")),
        "service echo-v1"
    );
}

/// The suite has no ReferenceGrant: a consumer route names the very service that it is about.
#[test]
fn a_consumer_route_acts_on_sources_of_its_own_namespace_only() {
    let consumer = |backend: &str| {
        route(
            "HTTPRoute",
            "consumer",
            "add-header",
            "name: echo-v1, namespace: mesh",
            &format!("[{{{SET}, backendRefs: [{{namespace: mesh, port: 80, name: {backend}}}]}}]"),
        )
    };
    let view = world(&consumer("echo-v1"));
    let port = service_port(&view, ECHO_V1);
    let seen = |source: &str| routed(&port, source, &request("GET /")).unwrap().id.to_string();
    assert_eq!(seen("consumer"), "httproute/consumer/add-header/0");
    assert_eq!(seen("mesh"), "service/mesh/echo-v1");
    assert_eq!(fate(&view, ECHO_V1, "consumer", &request("GET /")), "echo-v1:80");

    // Another service needs its namespace's leave.
    let other = consumer("echo-v2");
    let refused = "no ReferenceGrant in namespace mesh lets the route name echo-v2";
    assert_eq!(fate(&world(&other), ECHO_V1, "consumer", &request("GET /")), refused);
    let grant = |kind: &str, name: &str| {
        format!(
            "---\napiVersion: gateway.networking.k8s.io/v1beta1\nkind: ReferenceGrant\n\
             metadata: {{name: g, namespace: mesh}}\nspec:\n  \
             from: [{{group: gateway.networking.k8s.io, kind: {kind}, namespace: consumer}}]\n  \
             to: [{{group: \"\", kind: Service{name}}}]\n"
        )
    };
    let cases = [
        (grant("HTTPRoute", ""), "echo-v2:80"),
        (grant("HTTPRoute", ", name: echo-v2"), "echo-v2:80"),
        (grant("HTTPRoute", ", name: echo-v1"), refused),
        (grant("GRPCRoute", ""), refused),
    ];
    for (grant, wanted) in cases {
        let view = world(&format!("{other}{grant}"));
        assert_eq!(fate(&view, ECHO_V1, "consumer", &request("GET /")), wanted, "{grant}");
    }
}

#[test]
fn the_longer_service_and_method_take_a_call() {
    let rule = |name: &str, matches: &str| {
        format!("\n  - {{name: {name}, matches: [{matches}], backendRefs: [{{name: echo-v1, port: 7070}}]}}")
    };
    let rules = [
        rule("any", "{}"),
        rule("method", "{method: {method: Echo}}"),
        rule("service", "{method: {service: a.Echo}}"),
        rule("both", "{method: {service: a.Echo, method: Echo}}"),
        rule(
            "header",
            "{method: {service: a.Echo, method: Echo}, headers: [{name: v, value: \"2\"}]}",
        ),
        rule("regex", "{method: {type: RegularExpression, service: 'b\\..*'}}"),
        rule("only-header", "{headers: [{name: v, value: \"3\"}]}"),
    ];
    let view = world(&route(
        "GRPCRoute",
        "mesh",
        "calls",
        "name: echo, port: 7070",
        &rules.concat(),
    ));
    let port = service_port(&view, "10.96.0.1:7070");
    let cases = [
        ("/a.Echo/Echo", "", "both"),
        ("/a.Echo/Echo", "v: 2", "header"),
        ("/a.Echo/Other", "", "service"),
        ("/a.Echo/Other", "v: 3", "service"),
        ("/c.Echo/Echo", "", "method"),
        ("/b.Echo/Echo", "", "regex"),
        ("/b.Echo/Other", "v: 3", "regex"),
        ("/c.Echo/Other", "v: 3", "only-header"),
        ("/c.Echo/Other", "", "any"),
        ("/a.Echo/x/Echo", "", "method"),
        ("/", "", "any"),
        ("/Echo", "", "any"),
    ];
    for (path, header, wanted) in cases {
        let line = format!("POST {path} echo content-type: application/grpc+proto; {header}");
        let rule = routed(&port, "mesh", &request(&line)).unwrap();
        assert_eq!(rule.id.as_str(), format!("grpcroute/mesh/calls/{wanted}"), "{line}");
    }
    // Without a rule for everything a call of something else has no way.
    let some = world(&route(
        "GRPCRoute",
        "mesh",
        "calls",
        "name: echo, port: 7070",
        &rules[3],
    ));
    assert_eq!(
        fate(
            &some,
            "10.96.0.1:7070",
            "mesh",
            &request("POST /b.B/C echo content-type: application/grpc")
        ),
        "404"
    );
}

#[test]
fn calls_and_other_requests_of_one_port_go_by_their_own_routes() {
    let both = format!(
        "{}{}",
        route(
            "GRPCRoute",
            "mesh",
            "calls",
            "name: echo, port: 7070",
            "[{backendRefs: [{name: echo-v1, port: 7070}]}]"
        ),
        route(
            "HTTPRoute",
            "mesh",
            "rest",
            "name: echo, port: 7070",
            "[{backendRefs: [{name: echo-v2, port: 7070}]}]"
        ),
    );
    let view = world(&both);
    for (kind, wanted) in [
        ("application/grpc", "echo-v1:7070"),
        ("application/grpc+proto", "echo-v1:7070"),
        ("Application/gRPC; a=b", "echo-v1:7070"),
        ("application/grpc-web", "echo-v2:7070"),
        ("application/json", "echo-v2:7070"),
    ] {
        let line = format!("POST /a.A/B echo content-type: {kind}");
        assert_eq!(fate(&view, "10.96.0.1:7070", "mesh", &request(&line)), wanted, "{line}");
    }
}

/// What becomes of a connection to `echo:9090`: the backends with their weights, `reset`, or the service itself.
fn connection(view: &View, source_namespace: &str, hello: Hello<'_>) -> String {
    let port = service_port(view, "10.96.0.1:9090");
    let Some(flows) = &port.flows else {
        return "service".to_owned();
    };
    match select_flow(flows, source_namespace, hello) {
        FlowChoice::Unrouted => "service".to_owned(),
        FlowChoice::NoMatch => "reset".to_owned(),
        FlowChoice::Rule(rule) => rule.id.to_string(),
    }
}

#[test]
fn connections_go_by_name_and_then_by_the_rest() {
    let tcp = |namespace: &str, name: &str, parent: &str| {
        route(
            "TCPRoute",
            namespace,
            name,
            parent,
            "[{backendRefs: [{name: echo-v1, namespace: mesh, port: 9090}]}]",
        )
    };
    let tls = |name: &str, hosts: &str| {
        route(
            "TLSRoute",
            "mesh",
            name,
            "name: echo, port: 9090",
            &format!("[{{backendRefs: [{{name: echo-v1, port: 9090}}]}}]\n  hostnames: {hosts}"),
        )
    };
    let own = tcp("mesh", "own", "name: echo, port: 9090");
    let names = format!(
        "{}{}",
        tls("whole", "[a.example]"),
        tls("wild", "['*.example', '*.b.example']")
    );
    let all = format!("{names}{own}");
    let consumer = format!(
        "{names}{}",
        tcp("consumer", "theirs", "name: echo, namespace: mesh, port: 9090")
    );
    let any = format!("{names}{}", tls("any", "[]"));
    let cases = [
        ("", "mesh", Hello::NotTls, "service"),
        (&own, "mesh", Hello::NotTls, "tcproute/mesh/own/0"),
        (&own, "mesh", Hello::Name("a.example"), "tcproute/mesh/own/0"),
        (&names, "mesh", Hello::Name("a.example"), "tlsroute/mesh/whole/0"),
        (&names, "mesh", Hello::Name("A.EXAMPLE"), "tlsroute/mesh/whole/0"),
        (&names, "mesh", Hello::Name("b.example"), "tlsroute/mesh/wild/0"),
        (&names, "mesh", Hello::Name("x.b.example"), "tlsroute/mesh/wild/0"),
        (&names, "mesh", Hello::Name("example"), "reset"),
        (&names, "mesh", Hello::Name("other"), "reset"),
        (&names, "mesh", Hello::Name(""), "reset"),
        (&names, "mesh", Hello::NoName, "reset"),
        (&names, "mesh", Hello::NotTls, "reset"),
        (&all, "mesh", Hello::Name("a.example"), "tlsroute/mesh/whole/0"),
        (&all, "mesh", Hello::Name("other"), "tcproute/mesh/own/0"),
        (&all, "mesh", Hello::NotTls, "tcproute/mesh/own/0"),
        (
            &consumer,
            "consumer",
            Hello::Name("a.example"),
            "tcproute/consumer/theirs/0",
        ),
        (&consumer, "mesh", Hello::Name("a.example"), "tlsroute/mesh/whole/0"),
        (&any, "mesh", Hello::NoName, "tlsroute/mesh/any/0"),
        (&any, "mesh", Hello::Name("other"), "tlsroute/mesh/any/0"),
        (&any, "mesh", Hello::NotTls, "reset"),
    ];
    for (routes, source, hello, wanted) in cases {
        assert_eq!(
            connection(&world(routes), source, hello),
            wanted,
            "{hello:?} from {source} under\n{routes}"
        );
    }
}

#[test]
fn routes_for_connections_alone_make_a_port_opaque() {
    let tcp = route(
        "TCPRoute",
        "mesh",
        "t",
        "name: echo, port: 80",
        "[{backendRefs: [{name: echo-v1, port: 80}]}]",
    );
    let http = echo_route("[{backendRefs: [{name: echo-v2, port: 80}]}]");
    let consumer = route(
        "TCPRoute",
        "consumer",
        "c",
        "name: echo, namespace: mesh, port: 80",
        "[{backendRefs: [{name: echo, namespace: mesh, port: 80}]}]",
    );
    let cases = [
        (String::new(), "mesh", AppProtocol::Http1),
        (tcp.clone(), "mesh", AppProtocol::Tcp),
        (tcp.clone(), "consumer", AppProtocol::Tcp),
        (format!("{tcp}{http}"), "mesh", AppProtocol::Http1),
        (consumer.clone(), "mesh", AppProtocol::Http1),
        (consumer.clone(), "consumer", AppProtocol::Tcp),
        (format!("{consumer}{http}"), "consumer", AppProtocol::Http1),
    ];
    for (routes, source, wanted) in cases {
        let port = service_port(&world(&routes), ECHO);
        assert_eq!(port.protocol_for(source), wanted, "{source} under\n{routes}");
    }
}
