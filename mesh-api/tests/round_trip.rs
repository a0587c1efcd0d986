//! Properties: no text makes the parser panic, what is printed reads back equal, and the wire loses nothing.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::Arc,
    time::{Duration as Time, UNIX_EPOCH},
};

use mesh_api::{
    document::{DocumentKey, Kind, Problem, Resource, ResourceKey, parse},
    identity::TrustDomain,
    policy::{
        AccessAction, AccessPolicy, AccessRule, BackendKind, BackendRef, BackendTarget, BalancerName, BreakerErrorRate,
        CircuitBreaker, Duration, HeaderMatch, HeaderModifier, HeaderValue, HostMatch, HttpRoute, HttpRouteFilter,
        HttpRouteMatch, HttpRouteRetry, HttpRouteRule, HttpRouteTimeouts, IdentityMatch, Limit, LimitAlgorithm,
        LimitKeyField, LimitScope, LoadBalancer, MeshPolicy, MtlsMode, MtlsSettings, ParentRef, PathMatch,
        PathModifier, PortRef, RateLimit, RegexPattern, RequestField, RequestRate, RequestRedirect, RetryBudget,
        RetryCondition, RetryPolicy, SameNode, ServiceSubset, SourceClause, SourceField, StringMatch, TargetClause,
        TargetRef, TrafficPolicy, TrafficTimeouts, UrlRewrite,
    },
    wire::{CertificateReport, PodReport, Report, TrustRoots, Update, control},
    workload::{
        AppProtocol, EndpointGroup, ObjectName, Revision, Service, ServiceEndpoint, ServicePort, TargetPort, Workload,
        WorkloadPort,
    },
};
use proptest::{collection, option, prelude::*};

fn name() -> impl Strategy<Value = String> {
    "[a-z]([a-z0-9-]{0,6}[a-z0-9])?"
}

fn port() -> impl Strategy<Value = u16> {
    1..=u16::MAX
}

fn time() -> impl Strategy<Value = Duration> {
    (1..10_000_000_000u64).prop_map(Duration::from_millis)
}

fn labels() -> impl Strategy<Value = BTreeMap<String, String>> {
    collection::btree_map(name(), name(), 1..4)
}

fn port_ref() -> impl Strategy<Value = Option<PortRef>> {
    option::of(prop_oneof![
        port().prop_map(PortRef::Number),
        name().prop_map(PortRef::Name)
    ])
}

fn service_target() -> impl Strategy<Value = TargetRef> {
    (name(), port_ref()).prop_map(|(name, port)| TargetRef::Service {
        namespace: "shop".to_owned(),
        name,
        port,
    })
}

fn target() -> impl Strategy<Value = TargetRef> {
    let workloads = (labels(), port_ref()).prop_map(|(labels, port)| TargetRef::Workloads {
        namespace: "shop".to_owned(),
        labels,
        port,
    });
    prop_oneof![
        Just(TargetRef::Namespace {
            name: "shop".to_owned()
        }),
        service_target(),
        workloads
    ]
}

fn targets(target: impl Strategy<Value = TargetRef>) -> impl Strategy<Value = Vec<TargetRef>> {
    collection::btree_set(target, 1..4).prop_map(|set| set.into_iter().collect())
}

fn pattern() -> impl Strategy<Value = RegexPattern> {
    prop_oneof![Just("a.*"), Just("(b|c)+"), Just("[0-9]{1,3}"), Just("\\d+\"'")]
        .prop_map(|text| RegexPattern::new(text).unwrap())
}

fn path() -> impl Strategy<Value = PathMatch> {
    prop_oneof![
        "/[a-zA-Z0-9_~%-]{0,8}"
            .prop_filter("an escaped slash", |p| !p.to_lowercase().contains("%2f"))
            .prop_map(PathMatch::Exact),
        "/[a-z0-9]{0,8}".prop_map(PathMatch::PathPrefix),
        pattern().prop_map(PathMatch::RegularExpression),
    ]
}

fn text() -> impl Strategy<Value = String> {
    // Words that YAML would read as something else are wanted here.
    prop_oneof![
        "[!-~]([ -~]{0,10}[!-~])?",
        Just("true".to_owned()),
        Just("1e3".to_owned()),
        Just("~".to_owned()),
        Just("<<".to_owned())
    ]
}

fn named() -> impl Strategy<Value = Vec<HeaderMatch>> {
    let value = prop_oneof![
        text().prop_map(StringMatch::Exact),
        pattern().prop_map(StringMatch::RegularExpression)
    ];
    collection::btree_map(name(), value, 0..3).prop_map(|map| {
        map.into_iter()
            .map(|(name, value)| HeaderMatch { name, value })
            .collect()
    })
}

fn header_values() -> impl Strategy<Value = Vec<HeaderValue>> {
    collection::btree_map("x-[a-z]{1,5}", text(), 0..3).prop_map(|map| {
        map.into_iter()
            .map(|(name, value)| HeaderValue { name, value })
            .collect()
    })
}

fn modifier() -> impl Strategy<Value = HeaderModifier> {
    (header_values(), header_values(), collection::vec("y-[a-z]{1,5}", 1..3))
        .prop_map(|(set, add, remove)| HeaderModifier { set, add, remove })
}

fn new_path() -> impl Strategy<Value = Option<PathModifier>> {
    option::of("(/[a-z]{0,5})?".prop_map(PathModifier::ReplaceFullPath))
}

fn rule() -> impl Strategy<Value = HttpRouteRule> {
    let one_match = (path(), named(), named(), option::of(Just("GET".to_owned()))).prop_map(
        |(path, headers, query_params, method)| HttpRouteMatch {
            path,
            headers,
            query_params,
            method,
        },
    );
    let backend = (
        any::<bool>(),
        option::of(name().prop_map(|name| format!("other-{name}"))),
        name(),
        port(),
        0..1_000_000u32,
        collection::vec(modifier(), 0..2),
    )
        .prop_map(|(subset, namespace, name, port, weight, changes)| BackendRef {
            target: BackendTarget {
                kind: if subset {
                    BackendKind::ServiceSubset
                } else {
                    BackendKind::Service
                },
                namespace,
                name,
                port,
            },
            weight,
            filters: changes
                .into_iter()
                .map(HttpRouteFilter::RequestHeaderModifier)
                .collect(),
        });
    let redirect = (
        option::of(name()),
        new_path(),
        option::of(port()),
        prop_oneof![Just(301), Just(302), Just(308)],
    )
        .prop_map(|(hostname, path, port, status_code)| {
            HttpRouteFilter::RequestRedirect(RequestRedirect {
                scheme: Some("https".to_owned()),
                hostname,
                path,
                port,
                status_code,
            })
        });
    let rewrite = (name(), new_path()).prop_map(|(host, path)| {
        HttpRouteFilter::UrlRewrite(UrlRewrite {
            hostname: Some(host),
            path,
        })
    });
    let forward = (
        option::of(rewrite),
        collection::vec(backend, 0..3),
        option::of(time()),
        option::of((
            collection::vec(400..600u16, 0..3),
            option::of(1..=10u32),
            option::of(time()),
        )),
    );
    let action = prop_oneof![
        redirect.prop_map(|filter| (Some(filter), Vec::new(), None, None)),
        forward,
    ];
    (collection::vec(one_match, 0..3), option::of(modifier()), action).prop_map(
        |(matches, change, (filter, backend_refs, timeout, retry))| HttpRouteRule {
            name: None,
            matches,
            filters: change
                .map(HttpRouteFilter::ResponseHeaderModifier)
                .into_iter()
                .chain(filter)
                .collect(),
            backend_refs,
            timeouts: HttpRouteTimeouts {
                request: timeout,
                backend_request: timeout,
            },
            retry: retry.map(|(codes, attempts, backoff)| HttpRouteRetry {
                codes,
                attempts,
                backoff,
            }),
        },
    )
}

fn http_route() -> impl Strategy<Value = HttpRoute> {
    let parent = (name(), option::of(name()), option::of(port()), option::of(name())).prop_map(
        |(name, namespace, port, section_name)| ParentRef {
            group: String::new(),
            kind: "Service".to_owned(),
            namespace,
            name,
            section_name,
            port,
        },
    );
    (collection::vec(parent, 1..3), collection::vec(rule(), 1..4)).prop_map(|(parent_refs, rules)| HttpRoute {
        parent_refs,
        hostnames: Vec::new(),
        rules,
    })
}

fn access_policy() -> impl Strategy<Value = AccessPolicy> {
    let identity = prop_oneof![
        name().prop_map(|n| IdentityMatch::Exact(format!("spiffe://cluster.local/ns/shop/sa/{n}").parse().unwrap())),
        name().prop_map(|n| IdentityMatch::Prefix(format!("spiffe://cluster.local/ns/{n}/"))),
    ];
    let cidr = any::<IpAddr>().prop_map(ipnet::IpNet::from);
    let from = (
        collection::vec(identity, 1..3),
        collection::vec(name(), 0..3),
        collection::vec(cidr, 0..3),
    )
        .prop_map(|(identities, namespaces, cidrs)| SourceClause {
            identities,
            namespaces,
            cidrs,
        });
    let host = prop_oneof![
        name().prop_map(HostMatch::Exact),
        name().prop_map(|n| HostMatch::Suffix(format!(".{n}")))
    ];
    let to = (
        collection::vec(port(), 1..3),
        collection::vec(host, 0..3),
        collection::vec("[A-Z]{1,6}", 0..3),
        collection::vec(path(), 0..3),
        named(),
    )
        .prop_map(|(ports, hosts, methods, paths, headers)| TargetClause {
            ports,
            hosts,
            methods,
            paths,
            headers,
        });
    let rule = (collection::vec(from, 0..3), collection::vec(to, 0..3)).prop_map(|(from, to)| AccessRule {
        name: None,
        from,
        to,
    });
    let action = prop_oneof![Just(AccessAction::Allow), Just(AccessAction::Deny)];
    (targets(target()), action, collection::vec(rule, 1..4)).prop_map(|(target_refs, action, rules)| AccessPolicy {
        target_refs,
        action,
        rules,
    })
}

fn rate_limit() -> impl Strategy<Value = RateLimit> {
    let key = prop_oneof![
        Just(LimitKeyField::Source(SourceField::Identity)),
        Just(LimitKeyField::Source(SourceField::Address)),
        name().prop_map(LimitKeyField::Header),
        Just(LimitKeyField::Request(RequestField::Method)),
    ];
    let limit = (
        collection::vec(key, 0..4),
        1..1000u32,
        time(),
        option::of(1..1000u32),
        any::<bool>(),
    )
        .prop_map(|(key, requests, per, burst, shadow)| Limit {
            name: None,
            key,
            algorithm: LimitAlgorithm::TokenBucket,
            rate: RequestRate { requests, per },
            burst,
            scope: LimitScope::Local,
            shadow,
        });
    (targets(target()), collection::vec(limit, 1..4))
        .prop_map(|(target_refs, limits)| RateLimit { target_refs, limits })
}

fn traffic_policy() -> impl Strategy<Value = TrafficPolicy> {
    let algorithm = prop_oneof![
        Just(BalancerName::RoundRobin),
        Just(BalancerName::Random),
        Just(BalancerName::LeastRequest)
    ];
    let timeouts =
        (time(), option::of(time()), option::of(time())).prop_map(|(request, connect, idle)| TrafficTimeouts {
            request: Some(request),
            connect,
            idle,
        });
    let conditions = collection::btree_set(
        prop_oneof![
            Just(RetryCondition::ConnectFailure),
            Just(RetryCondition::Reset),
            Just(RetryCondition::RefusedStream),
            Just(RetryCondition::GatewayError),
            Just(RetryCondition::ServerError),
            (400..600u16).prop_map(RetryCondition::Status),
        ],
        1..4,
    );
    let retry = (1..=10u32, conditions, option::of(time()), option::of(0..=100u32)).prop_map(
        |(attempts, on, per_try_timeout, percent)| RetryPolicy {
            attempts,
            on: on.into_iter().collect(),
            per_try_timeout,
            budget: percent.map(|percent| RetryBudget { percent }),
        },
    );
    let limit = || option::of(1..1000u32);
    let rate = (1..=100u32, option::of(time()), limit()).prop_map(|(percent, window, min_requests)| BreakerErrorRate {
        percent,
        window,
        min_requests,
    });
    let breaker = (
        limit(),
        limit(),
        limit(),
        1..100u32,
        option::of(rate),
        option::of(time()),
        limit(),
    )
        .prop_map(
            |(
                max_connections,
                max_pending_requests,
                max_requests,
                failures,
                error_rate,
                open_for,
                half_open_probes,
            )| {
                CircuitBreaker {
                    max_connections,
                    max_pending_requests,
                    max_requests,
                    consecutive_failures: Some(failures),
                    error_rate,
                    open_for,
                    half_open_probes,
                }
            },
        );
    (
        targets(service_target()),
        algorithm,
        option::of(timeouts),
        option::of(retry),
        option::of(breaker),
    )
        .prop_map(
            |(target_refs, algorithm, timeouts, retry, circuit_breaker)| TrafficPolicy {
                target_refs,
                load_balancer: Some(LoadBalancer { algorithm }),
                timeouts,
                retry,
                circuit_breaker,
            },
        )
}

fn mesh_policy() -> impl Strategy<Value = MeshPolicy> {
    let mode = || prop_oneof![Just(MtlsMode::Strict), Just(MtlsMode::Permissive), Just(MtlsMode::Off)];
    let same_node = prop_oneof![Just(None), Just(Some(SameNode::Agent)), Just(Some(SameNode::Direct))];
    let ports = collection::btree_map(port(), mode(), 0..3);
    (targets(target()), mode(), ports, same_node).prop_map(|(target_refs, mode, ports, same_node)| MeshPolicy {
        target_refs,
        mtls: Some(MtlsSettings {
            mode: Some(mode),
            ports,
        }),
        same_node,
    })
}

fn subset() -> impl Strategy<Value = ServiceSubset> {
    (name(), labels()).prop_map(|(service, labels)| ServiceSubset { service, labels })
}

/// Any policy's kind and spec, as JSON.
fn spec() -> impl Strategy<Value = (Kind, serde_json::Value)> {
    fn json<T: serde::Serialize>(kind: Kind) -> impl Fn(T) -> (Kind, serde_json::Value) {
        move |spec| (kind, serde_json::to_value(spec).unwrap())
    }
    prop_oneof![
        http_route().prop_map(json(Kind::HttpRoute)),
        access_policy().prop_map(json(Kind::AccessPolicy)),
        rate_limit().prop_map(json(Kind::RateLimit)),
        traffic_policy().prop_map(json(Kind::TrafficPolicy)),
        mesh_policy().prop_map(json(Kind::MeshPolicy)),
        subset().prop_map(json(Kind::ServiceSubset)),
    ]
}

fn document((kind, spec): &(Kind, serde_json::Value)) -> serde_json::Value {
    serde_json::json!({
        "apiVersion": kind.api_version(), "kind": kind.as_str(),
        "metadata": {"name": "x", "namespace": "shop", "generation": 3, "creationTimestamp": "2026-01-31T12:00:00Z"}, "spec": spec
    })
}

fn texts(problems: Vec<Problem>) -> String {
    problems.iter().map(Problem::to_string).collect::<Vec<_>>().join("\n")
}

/// A spec type reads back what it prints, without a document around it.
macro_rules! reads_back {
    ($value:expr, $type:ty) => {{
        let value: $type = $value;
        let json = serde_json::to_value(&value).unwrap();
        let back: $type = serde_json::from_value(json).map_err(|e| TestCaseError::fail(e.to_string()))?;
        prop_assert_eq!(back, value);
    }};
}

fn short(text: impl Strategy<Value = String>) -> impl Strategy<Value = Arc<str>> {
    text.prop_map(|text| text.as_str().into())
}

fn shared_labels() -> impl Strategy<Value = BTreeMap<Arc<str>, Arc<str>>> {
    collection::btree_map(short(name()), short(name()), 0..3)
}

fn protocol() -> impl Strategy<Value = AppProtocol> {
    prop_oneof![
        Just(AppProtocol::Detect),
        Just(AppProtocol::Http1),
        Just(AppProtocol::Http2),
        Just(AppProtocol::Grpc),
        Just(AppProtocol::Tls),
        Just(AppProtocol::Tcp),
    ]
}

fn object_name() -> impl Strategy<Value = ObjectName> {
    (name(), name()).prop_map(|(namespace, name)| ObjectName::new(&namespace, &name))
}

fn workload() -> impl Strategy<Value = Workload> {
    let addresses = || collection::vec(any::<IpAddr>(), 0..3);
    let ports = || collection::vec(port(), 0..3);
    let named =
        (short(name()), port(), protocol()).prop_map(|(name, port, protocol)| WorkloadPort { name, port, protocol });
    (
        (object_name(), short(name()), short(name()), short(name())),
        (addresses(), addresses(), shared_labels()),
        (any::<bool>(), any::<bool>(), option::of(short("/[a-z]{1,9}"))),
        (collection::vec(named, 0..3), ports(), ports(), ports()),
        (short("[a-f0-9]{0,9}"), any::<bool>(), short("[a-z0-9]{0,9}")),
    )
        .prop_map(
            |(
                (name, app, version, node),
                (node_addresses, addresses, labels),
                (enrolled, ready, netns),
                ports,
                (uid, host_network, zone),
            )| {
                let identity = format!("spiffe://cluster.local/ns/{}/sa/x", name.namespace)
                    .parse()
                    .unwrap();
                let (ports, probe_ports, exclude_inbound_ports, exclude_outbound_ports) = ports;
                Workload {
                    name,
                    app,
                    version,
                    identity,
                    node,
                    node_addresses,
                    addresses,
                    labels,
                    enrolled,
                    ready,
                    netns,
                    ports,
                    probe_ports,
                    exclude_inbound_ports,
                    exclude_outbound_ports,
                    uid,
                    host_network,
                    zone,
                }
            },
        )
}

fn service() -> impl Strategy<Value = Service> {
    let target = prop_oneof![
        port().prop_map(TargetPort::Number),
        short(name()).prop_map(TargetPort::Name)
    ];
    let service_port = (short(name()), port(), target, protocol(), option::of(port())).prop_map(
        |(name, port, target, protocol, node_port)| ServicePort {
            name,
            port,
            target,
            protocol,
            node_port,
        },
    );
    let affinity = option::of((1u64..100_000).prop_map(Time::from_secs));
    (
        object_name(),
        (
            collection::vec(any::<IpAddr>(), 0..3),
            collection::vec(any::<IpAddr>(), 0..3),
        ),
        collection::vec(service_port, 0..3),
        (shared_labels(), any::<bool>()),
        option::of(collection::vec(endpoint_group(), 0..3)),
        (affinity, any::<bool>()),
    )
        .prop_map(
            |(
                name,
                (addresses, external_addresses),
                ports,
                (selector, publish_not_ready),
                endpoints,
                (session_affinity, node_local),
            )| Service {
                name,
                addresses,
                external_addresses,
                ports,
                selector,
                publish_not_ready,
                endpoints,
                session_affinity,
                node_local,
            },
        )
}

fn endpoint_group() -> impl Strategy<Value = EndpointGroup> {
    let names = || collection::vec(short(name()), 0..2);
    let endpoint = (
        any::<IpAddr>(),
        option::of(short(name())),
        short(name()),
        (any::<bool>(), any::<bool>()),
        (names(), names()),
    )
        .prop_map(
            |(address, workload, node, (ready, draining), (for_zones, for_nodes))| ServiceEndpoint {
                address,
                workload,
                node,
                ready,
                draining,
                for_zones,
                for_nodes,
            },
        );
    (
        collection::vec((short(name()), port()), 0..3),
        collection::vec(endpoint, 0..3),
    )
        .prop_map(|(ports, endpoints)| EndpointGroup { ports, endpoints })
}

fn resource() -> impl Strategy<Value = Resource> {
    let policy = spec().prop_map(|spec| {
        let text = document(&spec).to_string();
        let mut parsed = parse("x", &text).unwrap_or_else(|problems| panic!("{}", texts(problems)));
        Resource::Policy(Arc::new(parsed.remove(0)))
    });
    prop_oneof![
        workload().prop_map(|workload| Resource::Workload(Arc::new(workload))),
        service().prop_map(|service| Resource::Service(Arc::new(service))),
        policy
    ]
}

fn update() -> impl Strategy<Value = Update> {
    let roots = || collection::vec(collection::vec(any::<u8>(), 0..9), 0..3).prop_map(TrustRoots);
    let key = prop_oneof![
        object_name().prop_map(ResourceKey::Workload),
        object_name().prop_map(ResourceKey::Service),
        name().prop_map(|n| ResourceKey::Policy(DocumentKey::new(Kind::HttpRoute, "shop", &n))),
    ];
    prop_oneof![
        (any::<u64>(), collection::vec(resource(), 0..4), roots()).prop_map(|(revision, resources, trust_roots)| {
            let trust_domain = TrustDomain::new("cluster.local").unwrap();
            Update::Snapshot {
                revision: Revision(revision),
                stamp: revision ^ 7,
                trust_domain,
                resources,
                trust_roots,
            }
        }),
        (
            any::<u64>(),
            any::<u64>(),
            collection::vec(resource(), 0..4),
            collection::vec(key, 0..4),
            option::of(roots())
        )
            .prop_map(|(from, to, upserts, removed, trust_roots)| Update::Delta {
                from: Revision(from),
                to: Revision(to),
                stamp: from ^ to,
                upserts,
                removed,
                trust_roots,
            }),
    ]
}

fn report() -> impl Strategy<Value = Report> {
    let pod =
        (object_name(), any::<bool>(), any::<bool>(), name()).prop_map(|(name, enrolled, captured, why)| PodReport {
            name,
            enrolled,
            captured,
            why,
        });
    let certificate = (name(), option::of(1..4_000_000_000u64), name()).prop_map(|(identity, expires, problem)| {
        let expires = expires.map(|seconds| UNIX_EPOCH + Time::from_secs(seconds));
        CertificateReport {
            identity,
            expires,
            problem,
        }
    });
    prop_oneof![
        (name(), name(), any::<u64>(), any::<u32>()).prop_map(|(node, agent_version, resume, abi_version)| {
            Report::Hello {
                node,
                agent_version,
                resume: Revision(resume),
                stamp: resume ^ 7,
                abi_version,
            }
        }),
        any::<u64>().prop_map(|revision| Report::Ack(Revision(revision))),
        (any::<u64>(), name()).prop_map(|(revision, reason)| Report::Nack {
            revision: Revision(revision),
            reason
        }),
        (collection::vec(pod, 0..3), collection::vec(certificate, 0..3))
            .prop_map(|(pods, certificates)| Report::Status { pods, certificates }),
    ]
}

/// The messages within messages, as `proto/mesh.proto` has them.
fn inner(message: &str, tag: u32) -> Option<&'static str> {
    Some(match (message, tag) {
        ("ControllerMessage", 1) => "Snapshot",
        ("ControllerMessage", 2) => "Delta",
        ("Snapshot" | "Delta", 3) => "Resource",
        ("Snapshot", 4) | ("Delta", 5) => "TrustBundle",
        ("Delta", 4) => "ResourceKey",
        ("Resource", 1) => "Workload",
        ("Resource", 2) => "Service",
        ("Resource", 3) => "PolicyDocument",
        ("Workload", 13) => "WorkloadPort",
        ("Service", 4) => "ServicePort",
        ("Service", 8) => "EndpointGroup",
        ("EndpointGroup", 1) => "EndpointPort",
        ("EndpointGroup", 2) => "ServiceEndpoint",
        ("AgentMessage", 1) => "Hello",
        ("AgentMessage", 2) => "Ack",
        ("AgentMessage", 3) => "Nack",
        ("AgentMessage", 4) => "AgentStatus",
        ("AgentStatus", 1) => "PodStatus",
        ("AgentStatus", 2) => "CertificateStatus",
        _ => return None,
    })
}

/// The bytes of a message as a later version might send them: with fields in it and in every message within it that
/// this version does not know.
fn as_a_later_version(message: &str, mut bytes: &[u8]) -> Vec<u8> {
    use prost::encoding::{WireType, decode_key, decode_varint, encode_key, encode_varint};
    let mut later = Vec::new();
    prost::encoding::uint64::encode(3000, &7, &mut later);
    prost::encoding::string::encode(3001, &"later".to_owned(), &mut later);
    prost::encoding::fixed64::encode(3002, &7, &mut later);
    while !bytes.is_empty() {
        let (tag, kind) = decode_key(&mut bytes).unwrap();
        encode_key(tag, kind, &mut later);
        let number = decode_varint(&mut bytes).unwrap();
        if kind == WireType::Varint {
            encode_varint(number, &mut later);
            continue;
        }
        assert_eq!(kind, WireType::LengthDelimited, "field {tag} of {message}");
        let (content, rest) = bytes.split_at(usize::try_from(number).unwrap());
        bytes = rest;
        let content = match inner(message, tag) {
            Some(inner) => as_a_later_version(inner, content),
            None => content.to_vec(),
        };
        encode_varint(content.len() as u64, &mut later);
        later.extend(content);
    }
    later
}

/// YAML's own punctuation, so that some of it parses.
fn yaml_like() -> impl Strategy<Value = String> {
    let token = prop_oneof![
        Just("- "),
        Just("a: "),
        Just("\n"),
        Just("  "),
        Just("["),
        Just("]"),
        Just("{"),
        Just("}"),
        Just(", "),
        Just("&a "),
        Just("*a "),
        Just("<<: "),
        Just("---\n"),
        Just("!!int "),
        Just("\"x\""),
        Just("'"),
        Just("|\n"),
        Just("#"),
        Just("? "),
        Just("apiVersion: v1\n"),
        Just("kind: Pod\n"),
        Just("metadata: "),
        Just("spec: "),
        Just("1"),
        Just("\t"),
        Just("%"),
    ];
    collection::vec(token, 0..60).prop_map(|tokens| tokens.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_text_makes_the_parser_panic(text in ".{0,200}", like in yaml_like()) {
        let _ = parse("x", &text);
        let _ = parse("x", &like);
    }

    #[test]
    fn no_change_to_a_good_document_makes_the_parser_panic(
        spec in spec(), at in any::<prop::sample::Index>(), with in "[\\PC\n]{0,3}", drop in 0..5usize,
    ) {
        let yaml = serde_yaml_ng::to_string(&document(&spec)).unwrap();
        let mut chars: Vec<char> = yaml.chars().collect();
        let start = at.index(chars.len());
        let end = (start + drop).min(chars.len());
        chars.splice(start..end, with.chars());
        let _ = parse("x", &chars.into_iter().collect::<String>());
    }

    #[test]
    fn documents_read_back_as_they_were_printed(spec in spec()) {
        let json = document(&spec);
        let first = parse("json", &json.to_string()).map_err(|p| TestCaseError::fail(texts(p)))?;
        prop_assert_eq!(first[0].policy_spec(), Some(spec.1));
        let yaml = first[0].to_yaml();
        let second = parse("yaml", &yaml).map_err(|p| TestCaseError::fail(format!("{}\nof\n{yaml}", texts(p))))?;
        prop_assert_eq!(&first, &second, "of\n{}", yaml);
        prop_assert!(first[0].same_as(&second[0]));
    }

    #[test]
    fn specs_read_back_without_a_document(
        route in http_route(), access in access_policy(), limit in rate_limit(), traffic in traffic_policy(),
        mesh in mesh_policy(), subset in subset(),
    ) {
        reads_back!(route, HttpRoute);
        reads_back!(access, AccessPolicy);
        reads_back!(limit, RateLimit);
        reads_back!(traffic, TrafficPolicy);
        reads_back!(mesh, MeshPolicy);
        reads_back!(subset, ServiceSubset);
    }

    #[test]
    fn durations_read_back(millis in 0..360_000_000_000u64) {
        let duration = Duration::from_millis(millis);
        prop_assert_eq!(duration.to_string().parse::<Duration>(), Ok(duration));
    }

    #[test]
    fn updates_survive_the_wire(update in update()) {
        let message = control::ControllerMessage::from(&update);
        let bytes = prost::Message::encode_to_vec(&message);
        let message: control::ControllerMessage = prost::Message::decode(bytes.as_slice()).unwrap();
        prop_assert_eq!(Update::try_from(message).unwrap(), update.clone());
        let later = as_a_later_version("ControllerMessage", &bytes);
        let message: control::ControllerMessage = prost::Message::decode(later.as_slice()).unwrap();
        prop_assert_eq!(Update::try_from(message).unwrap(), update);
    }

    #[test]
    fn reports_survive_the_wire(report in report()) {
        let message = control::AgentMessage::from(report.clone());
        let bytes = prost::Message::encode_to_vec(&message);
        let message: control::AgentMessage = prost::Message::decode(bytes.as_slice()).unwrap();
        prop_assert_eq!(Report::try_from(message).unwrap(), report.clone());
        let later = as_a_later_version("AgentMessage", &bytes);
        let message: control::AgentMessage = prost::Message::decode(later.as_slice()).unwrap();
        prop_assert_eq!(Report::try_from(message).unwrap(), report);
    }

    #[test]
    fn no_bytes_make_the_wire_panic(bytes in collection::vec(any::<u8>(), 0..200), update in update(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let message: Result<control::ControllerMessage, _> = prost::Message::decode(bytes.as_slice());
        if let Ok(message) = message {
            let _ = Update::try_from(message);
        }
        let mut bytes = prost::Message::encode_to_vec(&control::ControllerMessage::from(&update));
        if !bytes.is_empty() {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let message: Result<control::ControllerMessage, _> = prost::Message::decode(bytes.as_slice());
        if let Ok(message) = message {
            let _ = Update::try_from(message);
        }
    }
}
