//! The specs of routes: what is read, what is refused and in which words, and that what is printed reads the same.
//!
//! A spec is read here by itself, as a controller reads it from the API server; `documents.rs` reads whole files.

use mesh_api::policy::{
    BackendKind, BackendTarget, Fraction, GrpcMethodMatch, GrpcRoute, HttpRoute, HttpRouteFilter, OriginMatch,
    TcpRoute, TlsRoute,
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

fn read<T: DeserializeOwned + Serialize + PartialEq + std::fmt::Debug>(spec: Value) -> T {
    let read: T = serde_json::from_value(spec.clone()).unwrap_or_else(|error| panic!("{error}, of {spec}"));
    let printed = serde_json::to_value(&read).unwrap();
    let again: T = serde_json::from_value(printed.clone()).unwrap_or_else(|error| panic!("{error}, of {printed}"));
    assert_eq!(again, read, "{printed}");
    read
}

fn refusal<T: DeserializeOwned>(spec: &Value) -> String {
    match serde_json::from_value::<T>(spec.clone()) {
        Ok(_) => panic!("not refused: {spec}"),
        Err(error) => error.to_string(),
    }
}

const PARENT: &str = r#"[{"group": "", "kind": "Service", "name": "cart"}]"#;

fn parents() -> Value {
    serde_json::from_str(PARENT).unwrap()
}

fn http(rule: Value) -> Value {
    json!({"parentRefs": parents(), "rules": [rule]})
}

#[test]
fn a_mirror_is_read() {
    let mirror = |more: Value| {
        let mut body = json!({"backendRef": {"group": "", "kind": "Service", "name": "copy", "port": 80}});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        http(
            json!({"filters": [{"type": "RequestMirror", "requestMirror": body}], "backendRefs": [{"name": "a", "port": 80}]}),
        )
    };
    let cases = [
        (json!({}), (100, 100)),
        (json!({"percent": 0}), (0, 100)),
        (json!({"percent": 42}), (42, 100)),
        (json!({"fraction": {"numerator": 1}}), (1, 100)),
        (json!({"fraction": {"numerator": 1, "denominator": 3}}), (1, 3)),
    ];
    for (more, (numerator, denominator)) in cases {
        let route: HttpRoute = read(mirror(more));
        let [HttpRouteFilter::RequestMirror(mirror)] = &*route.rules[0].filters else {
            panic!("{route:?}");
        };
        assert_eq!(mirror.fraction, Fraction { numerator, denominator });
        let named: Vec<_> = route.backends();
        assert_eq!(named[0].0, "spec.rules[0].filters[0].requestMirror.backendRef");
        assert_eq!(named[0].1.name, "copy");
        assert_eq!(
            (named[1].0.as_str(), named[1].1.name.as_str()),
            ("spec.rules[0].backendRefs[0]", "a")
        );
    }
    let refused = [
        (json!({"percent": 101}), "out of range"),
        (
            json!({"percent": 1, "fraction": {"numerator": 1}}),
            "has both percent and fraction",
        ),
        (
            json!({"fraction": {"numerator": 3, "denominator": 2}}),
            "is more than everything",
        ),
        (json!({"fraction": {"numerator": 3, "denominator": 0}}), "out of range"),
        (json!({"weight": 1}), "unknown field"),
    ];
    for (more, why) in refused {
        let said = refusal::<HttpRoute>(&mirror(more.clone()));
        assert!(said.contains(why), "{more}: {said}");
    }
    // Two copies are two filters; two of any other type are not.
    let twice = |filter: Value| http(json!({"filters": [filter, filter], "backendRefs": []}));
    read::<HttpRoute>(twice(
        json!({"type": "RequestMirror", "requestMirror": {"backendRef": {"name": "c", "port": 1}}}),
    ));
    let said = refusal::<HttpRoute>(&twice(json!({"type": "CORS", "cors": {"allowOrigins": ["*"]}})));
    assert!(said.contains("is there twice"), "{said}");
}

#[test]
fn origins_are_read_and_matched() {
    let cors = |origins: &[&str]| http(json!({"filters": [{"type": "CORS", "cors": {"allowOrigins": origins}}]}));
    let cases: &[(&str, &[(&str, bool)])] = &[
        ("*", &[("https://a.example", true), ("null", true)]),
        (
            "https://a.example",
            &[
                ("https://a.example", true),
                ("HTTPS://A.example", true),
                ("https://a.example:443", true),
                ("https://a.example:8443", false),
                ("http://a.example", false),
                ("https://b.a.example", false),
                ("https://a.example.evil", false),
                ("null", false),
                ("", false),
            ],
        ),
        (
            "https://*.example:8443",
            &[
                ("https://a.example:8443", true),
                ("https://a.b.example:8443", true),
                ("https://.example:8443", true),
                ("https://example:8443", false),
                ("https://a.example", false),
                ("https://a.example:8443/", false),
            ],
        ),
        (
            "http://*",
            &[
                ("http://any.where", true),
                ("http://any.where:81", false),
                ("https://any.where", false),
            ],
        ),
    ];
    for (origin, asked) in cases {
        let route: HttpRoute = read(cors(&[origin]));
        let [HttpRouteFilter::Cors(cors)] = &*route.rules[0].filters else {
            panic!("{route:?}");
        };
        for (said, matches) in *asked {
            assert_eq!(cors.allow_origins[0].matches(said), *matches, "{origin} of {said}");
        }
        assert_eq!((cors.max_age, cors.allow_credentials), (5, false));
    }
    assert_eq!(serde_json::to_value(OriginMatch::Any).unwrap(), "*");
    for bad in [
        "ftp://a.example",
        "a.example",
        "https://",
        "https://a*b",
        "https://a.example:0",
        "https://a.example/x",
    ] {
        let said = refusal::<HttpRoute>(&cors(&[bad]));
        assert!(said.contains("is not an origin"), "{bad}: {said}");
    }
    let said = refusal::<HttpRoute>(&cors(&["*", "https://a.example"]));
    assert!(said.contains("beside other values"), "{said}");
}

#[test]
fn a_backend_may_lie_in_another_namespace() {
    let route: HttpRoute = read(http(json!({"backendRefs": [
        {"name": "b", "namespace": "other", "port": 80},
        {"group": "nodemesh.io", "kind": "ServiceSubset", "name": "c", "port": 80},
    ]})));
    let [first, second] = &*route.rules[0].backend_refs else {
        panic!("{route:?}");
    };
    let target = BackendTarget {
        kind: BackendKind::Service,
        namespace: Some("other".to_owned()),
        name: "b".to_owned(),
        port: 80,
    };
    assert_eq!(first.target, target);
    assert_eq!(
        (&second.target.kind, second.target.namespace.as_deref()),
        (&BackendKind::ServiceSubset, None)
    );
}

#[test]
fn a_grpc_route_is_read() {
    let route: GrpcRoute = read(json!({
        "parentRefs": [{"group": "", "kind": "Service", "name": "echo", "port": 7070}],
        "hostnames": ["a.example"],
        "rules": [
            {
                "name": "one",
                "matches": [
                    {"method": {"service": "shop.v1.Cart", "method": "Add"}, "headers": [{"name": "Version", "value": "two"}]},
                    {"method": {"type": "Exact", "method": "Ping", "service": ""}},
                    {"method": {"type": "RegularExpression", "service": "shop\\..*"}},
                    {},
                ],
                "filters": [{"type": "RequestHeaderModifier", "requestHeaderModifier": {"remove": ["a"]}}],
                "backendRefs": [{"name": "echo-v1", "port": 7070, "weight": 9}],
            },
            {},
        ],
    }));
    let rule = &route.rules[0];
    let methods: Vec<_> = rule.matches.iter().map(|one| &one.method).collect();
    assert_eq!(
        methods[0],
        &Some(GrpcMethodMatch::Exact {
            service: Some("shop.v1.Cart".to_owned()),
            method: Some("Add".to_owned())
        })
    );
    assert_eq!(
        methods[1],
        &Some(GrpcMethodMatch::Exact {
            service: None,
            method: Some("Ping".to_owned())
        })
    );
    assert!(matches!(
        methods[2],
        Some(GrpcMethodMatch::RegularExpression {
            service: Some(_),
            method: None
        })
    ));
    assert!(methods[3].is_none());
    assert_eq!(rule.matches[0].headers[0].name, "version");
    assert_eq!(route.backends().len(), 1);
    // Not even rules: as the Gateway API has it.
    assert!(read::<GrpcRoute>(json!({"parentRefs": parents()})).rules.is_empty());

    let matching = |method: Value| json!({"parentRefs": parents(), "rules": [{"matches": [{"method": method}]}]});
    let refused = [
        (matching(json!({})), "names neither a service nor a method"),
        (matching(json!({"service": "a/b"})), "is not the name of a service"),
        (matching(json!({"service": "a..b"})), "is not the name of a service"),
        (matching(json!({"method": "a.b"})), "is not the name of a method"),
        (
            matching(json!({"type": "RegularExpression", "method": "("})),
            "is not a regular expression",
        ),
        (matching(json!({"type": "Prefix", "method": "a"})), "is not known"),
        (
            json!({"parentRefs": parents(), "rules": [{"filters": [{"type": "URLRewrite", "urlRewrite": {}}]}]}),
            "is not known",
        ),
        (
            json!({"parentRefs": parents(), "rules": [{"filters": [{"type": "ExtensionRef", "extensionRef": {}}]}]}),
            "is not supported yet",
        ),
        (
            json!({"parentRefs": parents(), "rules": [{"sessionPersistence": {}}]}),
            "is not supported yet",
        ),
        (json!({"rules": []}), "is missing"),
    ];
    for (spec, why) in refused {
        let said = refusal::<GrpcRoute>(&spec);
        assert!(said.contains(why), "{spec}: {said}");
    }
}

#[test]
fn routes_of_connections_are_read() {
    let rules = json!([{"backendRefs": [{"name": "a", "port": 1, "weight": 3}, {"name": "b", "port": 1}]}]);
    let tcp: TcpRoute = read(json!({"parentRefs": parents(), "rules": rules}));
    assert_eq!(
        tcp.rules[0].backend_refs.iter().map(|b| b.weight).collect::<Vec<_>>(),
        [3, 1]
    );
    assert_eq!(tcp.backends().len(), 2);
    let tls: TlsRoute =
        read(json!({"parentRefs": parents(), "hostnames": ["a.example", "*.b.example"], "rules": rules}));
    assert!(tls.hostnames[1].matches("x.b.example") && !tls.hostnames[1].matches("b.example"));

    let refused = [
        (json!({"parentRefs": parents(), "rules": []}), "at least one rule"),
        (json!({"parentRefs": parents(), "rules": [{}]}), "is missing"),
        (
            json!({"parentRefs": parents(), "rules": [{"backendRefs": []}]}),
            "at least one backend",
        ),
        (
            json!({"parentRefs": parents(), "rules": [{"backendRefs": [{"name": "a", "port": 1, "filters": []}]}]}),
            "unknown field",
        ),
    ];
    for (spec, why) in refused {
        for said in [refusal::<TcpRoute>(&spec), refusal::<TlsRoute>(&spec)] {
            assert!(said.contains(why), "{spec}: {said}");
        }
    }
    let said = refusal::<TlsRoute>(&json!({"parentRefs": parents(), "hostnames": ["10.0.0.1"], "rules": rules}));
    assert!(said.contains("is an address"), "{said}");
}
