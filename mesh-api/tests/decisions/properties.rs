//! Properties: the route index against a brute-force oracle, exact weights, monotone authorization, clean rewrites.

use std::{cmp::Reverse, net::IpAddr, sync::Arc};

use mesh_api::{
    authz::{AccessRules, Decision, InboundPolicy, NamedRule, RuleId, SourceAttributes, decide, decide_flow},
    backend::{Backend, BackendKey},
    explain::PlainRequest,
    identity::SpiffeId,
    policy::{
        AccessRule, HeaderMatch, HttpRouteMatch, IdentityMatch, MtlsMode, PathMatch, RegexPattern, SourceClause,
        StringMatch, TargetClause,
    },
    request::Request,
    resilience::TrafficSettings,
    route::{
        HeaderEdit, Matches, PathModifier, RedirectSpec, Rewrite, RouteAction, RouteAge, RouteChoice, RouteRule,
        RouteTable, TableEntry, WeightedBackend, redirect_location, rewrite_path, select,
    },
    workload::{AppProtocol, ObjectName, Revision, Service},
};
use proptest::{collection::vec, option, prelude::*, sample};

fn backend(name: &str) -> Arc<Backend> {
    let name = ObjectName::new("shop", name);
    let service = Service {
        name: name.clone(),
        addresses: Vec::new(),
        ports: Vec::new(),
        selector: Default::default(),
        publish_not_ready: false,
        ..Service::default()
    };
    Arc::new(Backend {
        key: BackendKey {
            service: name,
            port: 80,
            subset: None,
        },
        service: Arc::new(service),
        protocol: AppProtocol::Http1,
        endpoints_v4: Vec::new(),
        endpoints_v6: Vec::new(),
        traffic: Arc::new(TrafficSettings::default()),
    })
}

fn header(name: &str, value: &str) -> HeaderMatch {
    HeaderMatch {
        name: name.to_owned(),
        value: StringMatch::Exact(value.to_owned()),
    }
}

fn any_path_match() -> impl Strategy<Value = PathMatch> {
    let regex = |text: &str| PathMatch::RegularExpression(RegexPattern::new(text).unwrap());
    let exact = sample::select(vec!["/", "/a", "/a/", "/a/b", "/ab"]).prop_map(|p| PathMatch::Exact(p.to_owned()));
    let prefix =
        sample::select(vec!["/", "/a", "/a/b", "/ab", "/a/b/c"]).prop_map(|p| PathMatch::PathPrefix(p.to_owned()));
    let pattern = sample::select(vec!["/a.*", "/[ab]+", ".*"]).prop_map(regex);
    prop_oneof![2 => exact, 4 => prefix, 1 => pattern]
}

fn any_match() -> impl Strategy<Value = HttpRouteMatch> {
    let headers = sample::subsequence(vec![header("x-a", "1"), header("x-b", "1"), header("x-c", "1")], 0..=2);
    let params = sample::subsequence(vec![header("p", "1"), header("q", "1")], 0..=2);
    let method = option::of(sample::select(vec!["GET".to_owned(), "PUT".to_owned()]));
    (any_path_match(), headers, params, method).prop_map(|(path, headers, query_params, method)| HttpRouteMatch {
        path,
        headers,
        query_params,
        method,
    })
}

/// Rules of a few routes; several share an age or a name's beginning.
fn any_entries() -> impl Strategy<Value = Vec<TableEntry>> {
    let route = (0u64..2, vec(vec(any_match(), 0..3), 1..4));
    vec(route, 1..4).prop_map(|routes| {
        let mut entries = Vec::new();
        for (index, (created, rules)) in routes.into_iter().enumerate() {
            for (rule_index, matches) in rules.into_iter().enumerate() {
                let id = RuleId::new(&format!("route-{index}/{rule_index}"));
                let name = ObjectName::new("shop", &format!("route-{index}"));
                let rule = RouteRule::to_backend(id, backend("cart"));
                entries.push(TableEntry {
                    age: RouteAge { created, name },
                    rule_index,
                    matches: Matches::Http(matches),
                    rule,
                });
            }
        }
        entries
    })
}

fn any_request() -> impl Strategy<Value = PlainRequest> {
    let path = sample::select(vec![
        "/", "/a", "/a/", "/a/b", "/a/b/", "/a/b/c/d", "/ab", "/b", "//", "*", "", "/a/bc",
    ]);
    let headers = sample::subsequence(vec![("x-a", "1"), ("x-b", "1"), ("x-b", "2"), ("x-c", "1")], 0..=4);
    let query = option::of(sample::select(vec![
        "p=1", "q=1&p=1", "p=2&p=1", "%70=1", "q=%31&p", "",
    ]));
    (path, headers, query, sample::select(vec!["GET", "PUT", "PATCH"])).prop_map(|(path, headers, query, method)| {
        let mut request = PlainRequest::new(method, path, "cart");
        request.query = query.map(str::to_owned);
        headers
            .into_iter()
            .fold(request, |request, (name, value)| request.with_header(name, value))
    })
}

/// The oracle's own reading of a path match: elements compared one by one.
fn path_holds(wanted: &PathMatch, path: &str) -> bool {
    match wanted {
        PathMatch::Exact(text) => text == path,
        PathMatch::RegularExpression(pattern) => pattern.matches(path),
        PathMatch::PathPrefix(prefix) if prefix == "/" => true,
        PathMatch::PathPrefix(prefix) => {
            let (wanted, has): (Vec<_>, Vec<_>) = (prefix.split('/').collect(), path.split('/').collect());
            has.len() >= wanted.len() && wanted.iter().zip(&has).all(|(a, b)| a == b)
        }
    }
}

fn holds(wanted: &HttpRouteMatch, request: &PlainRequest) -> bool {
    // The generated queries are decoded by hand here.
    let pairs: &[(&str, &str)] = match request.query.as_deref() {
        Some("p=1" | "%70=1") => &[("p", "1")],
        Some("q=1&p=1") => &[("q", "1"), ("p", "1")],
        Some("p=2&p=1") => &[("p", "2")],
        Some("q=%31&p") => &[("q", "1"), ("p", "")],
        _ => &[],
    };
    let exact = |value: &StringMatch, text: &str| matches!(value, StringMatch::Exact(wanted) if wanted == text);
    path_holds(&wanted.path, &request.path)
        && wanted.method.as_ref().is_none_or(|method| *method == request.method)
        && wanted
            .headers
            .iter()
            .all(|h| request.header(&h.name).is_some_and(|value| exact(&h.value, value)))
        && wanted
            .query_params
            .iter()
            .all(|p| pairs.iter().any(|(n, v)| *n == p.name && exact(&p.value, v)))
}

/// The best match by the Gateway API's list, found by looking at all of them.
fn oracle(entries: &[TableEntry], request: &PlainRequest) -> Option<String> {
    let everything = [HttpRouteMatch::default()];
    let mut found = Vec::new();
    for entry in entries {
        let matches = match &entry.matches {
            Matches::Http(matches) if !matches.is_empty() => &**matches,
            _ => &everything[..],
        };
        for one in matches.iter().filter(|one| holds(one, request)) {
            let path = match &one.path {
                PathMatch::Exact(_) => (0, 0),
                PathMatch::RegularExpression(pattern) => (1, usize::MAX - pattern.as_str().len()),
                PathMatch::PathPrefix(prefix) => (2, usize::MAX - prefix.trim_end_matches('/').len()),
            };
            let rank = (
                path,
                one.method.is_none(),
                Reverse(one.headers.len()),
                Reverse(one.query_params.len()),
                entry.age.created,
                entry.age.name.to_string(),
                entry.rule_index,
            );
            found.push((rank, entry.rule.id.to_string()));
        }
    }
    found.into_iter().min().map(|(_, id)| id)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_index_and_the_oracle_agree(entries in any_entries(), requests in vec(any_request(), 1..8)) {
        let unrouted = RouteRule::to_backend(RuleId::new("unrouted"), backend("cart"));
        let table = RouteTable::new(entries.clone(), Default::default(), unrouted);
        for request in &requests {
            let found = match select(&table, "shop", request) {
                RouteChoice::NoMatch => None,
                RouteChoice::Rule(rule) => Some(rule.id.to_string()),
            };
            prop_assert_eq!(found, oracle(&entries, request), "{:?}", request);
        }
    }

    #[test]
    fn prefixes_take_whole_elements(elements in vec("[ab]{0,2}", 0..4), more in "[ab/]{0,4}") {
        let prefix = format!("/{}", elements.join("/"));
        let wanted = PathMatch::PathPrefix(prefix.clone());
        let path = format!("{prefix}{more}");
        let as_spec = more.is_empty() || more.starts_with('/') || prefix.ends_with('/');
        prop_assert_eq!(mesh_api::route::path_matches(&wanted, &path), as_spec, "{} {}", prefix, path);
    }

    #[test]
    fn every_residue_has_its_backend(weights in vec(0u32..6, 0..6), start in any::<u32>()) {
        let forward = weights.iter().map(|weight| WeightedBackend {
            weight: *weight,
            backend: Ok(backend("cart")),
            request_headers: HeaderEdit::default(),
            response_headers: HeaderEdit::default(),
        });
        let mut rule = RouteRule::to_backend(RuleId::new("r"), backend("cart"));
        rule.action = RouteAction::Forward(forward.collect());
        let RouteAction::Forward(list) = &rule.action else { unreachable!() };
        let total: u32 = weights.iter().sum();
        let mut counts = vec![0u32; weights.len()];
        let start = start.saturating_sub(total);
        for random in start..start + total {
            let picked = rule.pick(random).expect("a weight");
            counts[list.iter().position(|one| std::ptr::eq(one, picked)).unwrap()] += 1;
        }
        prop_assert_eq!(&counts, &weights);
        prop_assert_eq!(rule.pick(start).is_none(), total == 0);
    }

    #[test]
    fn what_leaves_has_no_control_character(
        replacement in ".{0,12}",
        prefix in sample::select(vec!["/", "/a", "/a/"]),
        path in "(/a)?[/ab\\x00-\\x20é?#%]{0,12}",
        query in option::of(".{0,12}"),
        authority in option::of(".{0,12}"),
        host in option::of(".{0,8}"),
        full in any::<bool>(),
    ) {
        let modifier = if full {
            PathModifier::ReplaceFullPath(replacement.as_str().into())
        } else {
            PathModifier::ReplacePrefixMatch(replacement.as_str().into())
        };
        let clean = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic());
        let rewrite = Rewrite { hostname: None, path: Some(modifier.clone()) };
        let rewritten = rewrite_path(&rewrite, prefix, &path);
        prop_assert!(clean(&rewritten), "{:?}", rewritten);
        let request = PlainRequest { method: "GET".to_owned(), path, query, authority, headers: Vec::new() };
        let spec = RedirectSpec {
            status: 302,
            scheme: None,
            hostname: host.as_deref().map(Into::into),
            port: None,
            path: Some(modifier),
            matched_prefix: prefix.into(),
        };
        let location = redirect_location(&spec, &request, 8080, "http");
        prop_assert!(clean(&location) && location.starts_with("http://"), "{:?}", location);
    }
}

fn identity(text: &str) -> SpiffeId {
    format!("spiffe://cluster.local/ns/{text}").parse().unwrap()
}

fn any_access_rule() -> impl Strategy<Value = AccessRule> {
    let identities = vec![
        IdentityMatch::Exact(identity("web/sa/front")),
        IdentityMatch::Prefix("spiffe://cluster.local/ns/web/".to_owned()),
    ];
    let from = (
        sample::subsequence(identities, 0..=2),
        sample::subsequence(vec!["web".to_owned(), "shop".to_owned()], 0..=2),
        sample::subsequence(
            vec!["10.1.0.0/16".parse().unwrap(), "10.2.0.1/32".parse().unwrap()],
            0..=1,
        ),
    );
    let from = from.prop_map(|(identities, namespaces, cidrs)| SourceClause {
        identities,
        namespaces,
        cidrs,
    });
    let paths = vec![
        PathMatch::Exact("/a".to_owned()),
        PathMatch::PathPrefix("/a".to_owned()),
        PathMatch::RegularExpression(RegexPattern::new("/[ab]").unwrap()),
    ];
    let to = (
        sample::subsequence(vec![80u16, 81], 0..=1),
        sample::subsequence(vec!["GET".to_owned(), "PUT".to_owned()], 0..=1),
        sample::subsequence(paths, 0..=2),
        sample::subsequence(vec![header("x-a", "1")], 0..=1),
    );
    let to = to.prop_map(|(ports, methods, paths, headers)| TargetClause {
        ports,
        methods,
        paths,
        headers,
        ..TargetClause::default()
    });
    (vec(from, 0..3), vec(to, 0..3)).prop_map(|(from, to)| AccessRule { name: None, from, to })
}

fn any_source() -> impl Strategy<Value = (Option<SpiffeId>, IpAddr)> {
    let identities = vec![
        identity("web/sa/front"),
        identity("web/sa/batch"),
        identity("shop/sa/cart"),
    ];
    let addresses: Vec<IpAddr> = ["10.1.0.1", "10.2.0.1", "::ffff:10.1.0.9"]
        .map(|ip| ip.parse().unwrap())
        .to_vec();
    (option::of(sample::select(identities)), sample::select(addresses))
}

fn any_question() -> impl Strategy<Value = PlainRequest> {
    let paths = vec!["/a", "/a/b", "/b", "/%61", "/b/../a", "//a", "/a/..", "/c"];
    (sample::select(vec!["GET", "PUT"]), sample::select(paths), any::<bool>()).prop_map(|(method, path, with)| {
        let request = PlainRequest::new(method, path, "cart");
        if with { request.with_header("x-a", "1") } else { request }
    })
}

fn inbound(deny: &[AccessRule], allow: &[AccessRule], has_allow_policy: bool, port: u16) -> InboundPolicy {
    let named = |rules: &[AccessRule]| {
        rules
            .iter()
            .map(|rule| NamedRule {
                id: RuleId::new("rule"),
                rule: Arc::new(rule.clone()),
            })
            .collect()
    };
    let default_deny = has_allow_policy.then(|| RuleId::new("default-deny:p"));
    InboundPolicy {
        revision: Revision(1),
        port,
        mtls: MtlsMode::Permissive,
        access: Arc::new(AccessRules::new(named(deny), named(allow), default_deny)),
        limits: Arc::default(),
        protocol: AppProtocol::Detect,
        services: Arc::default(),
        direct: true,
    }
}

fn permits(decision: Decision) -> bool {
    match decision {
        Decision::Permit(_) => true,
        Decision::Denied(_) => false,
        Decision::NeedsRequest => panic!("a request leaves no question open"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_further_rule_moves_decisions_one_way_only(
        deny in vec(any_access_rule(), 0..3),
        allow in vec(any_access_rule(), 0..3),
        has_allow_policy in any::<bool>(),
        more in any_access_rule(),
        source in any_source(),
        question in any_question(),
        port in 80u16..82,
    ) {
        let allow = if has_allow_policy { allow } else { Vec::new() };
        let source = SourceAttributes { identity: source.0.as_ref(), address: source.1, port: 1 };
        let with = |rules: &[AccessRule]| [rules, std::slice::from_ref(&more)].concat();
        let base = inbound(&deny, &allow, has_allow_policy, port);
        let more_deny = inbound(&with(&deny), &allow, has_allow_policy, port);
        let more_allow = inbound(&deny, &with(&allow), has_allow_policy, port);
        let first_allow = inbound(&deny, &with(&allow), true, port);
        let ask = |policy: &InboundPolicy| permits(decide(policy, &source, Some(&question)));
        let flow = |policy: &InboundPolicy| decide_flow(policy, &source).is_ok();
        // A Deny more never permits more; taking an Allow rule away, while the policy stays, neither.
        prop_assert!(!ask(&more_deny) || ask(&base));
        prop_assert!(!flow(&more_deny) || flow(&base));
        if has_allow_policy {
            prop_assert!(!ask(&base) || ask(&more_allow));
            prop_assert!(!flow(&base) || flow(&more_allow));
        } else {
            // The first Allow turns the default around: it never permits more.
            prop_assert!(!ask(&first_allow) || ask(&base));
        }
    }

    #[test]
    fn a_connection_is_never_decided_otherwise_than_its_requests(
        deny in vec(any_access_rule(), 0..3),
        allow in vec(any_access_rule(), 0..3),
        has_allow_policy in any::<bool>(),
        source in any_source(),
        question in any_question(),
        port in 80u16..82,
    ) {
        let allow = if has_allow_policy { allow } else { Vec::new() };
        let source = SourceAttributes { identity: source.0.as_ref(), address: source.1, port: 1 };
        let policy = inbound(&deny, &allow, has_allow_policy, port);
        let by_request = permits(decide(&policy, &source, Some(&question)));
        let flow = decide_flow(&policy, &source).is_ok();
        match decide(&policy, &source, None) {
            Decision::Permit(_) => prop_assert!(by_request && flow),
            Decision::Denied(_) => prop_assert!(!by_request && !flow),
            Decision::NeedsRequest => prop_assert!(policy.access.needs_requests() && !flow),
        }
    }

    #[test]
    fn strict_mode_lets_nobody_in_without_an_identity(
        allow in vec(any_access_rule(), 0..3),
        source in any_source(),
        question in any_question(),
    ) {
        let mut policy = inbound(&[], &allow, false, 80);
        policy.mtls = MtlsMode::Strict;
        let source = SourceAttributes { identity: None, address: source.1, port: 1 };
        prop_assert!(!permits(decide(&policy, &source, Some(&question))));
        prop_assert!(decide_flow(&policy, &source).is_err());
    }
}
