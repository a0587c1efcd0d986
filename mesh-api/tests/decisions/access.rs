//! Authorization and mutual TLS by tables: a policy, a source, a question, the answer with the rule that decided.

use mesh_api::policy::MtlsMode;

use crate::world::{decision, name, view};

/// A document of ours in `shop`, or in the mesh's own namespace.
fn document(kind: &str, namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: nodemesh.io/v1alpha1\nkind: {kind}\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
         spec: {spec}\n"
    )
}

fn access(name: &str, spec: &str) -> String {
    document("AccessPolicy", "shop", name, spec)
}

/// Asks with `(source, destination, port, question, answer)`.
fn check(documents: &str, cases: &[(&str, &str, u16, &str, &str)]) {
    let view = view(documents);
    for (source, destination, port, question, wanted) in cases {
        let answer = decision(&view, source, destination, *port, question);
        let short = answer.replace("accesspolicy/shop/", "");
        assert_eq!(short, *wanted, "{source} to {destination}:{port} {question}");
    }
}

const CART: &str = "targetRefs: [{kind: Service, name: cart}]";
const FRONT: &str = "spiffe://cluster.local/ns/web/sa/front";

#[test]
fn without_a_policy_everything_known_is_allowed() {
    check(
        "",
        &[
            (
                "mtls:web/front",
                "shop/cart-v1",
                8080,
                "connect",
                "permit default-allow",
            ),
            ("legacy/old", "shop/cart-v1", 8080, "connect", "permit default-allow"),
            ("legacy/old", "shop/cart-v1", 8080, "flow", "permit default-allow"),
            ("legacy/old", "shop/cart-v1", 8080, "GET /", "permit default-allow"),
            (
                "mtls:web/front",
                "shop/nobody",
                8080,
                "connect",
                "deny unknown-workload",
            ),
        ],
    );
}

#[test]
fn once_an_allow_applies_the_rest_is_denied_on_the_services_ports_only() {
    check(
        &access(
            "front",
            &format!("{{{CART}, action: Allow, rules: [{{name: it, from: [{{identities: ['{FRONT}']}}]}}]}}"),
        ),
        &[
            ("mtls:web/front", "shop/cart-v1", 8080, "connect", "permit front/it"),
            ("mtls:web/front", "shop/cart-v1", 8080, "flow", "permit front/it"),
            ("mtls:web/front", "shop/cart-v2", 8081, "connect", "permit front/it"),
            ("mtls:web/front", "shop/cart-v1", 9100, "connect", "permit front/it"),
            (
                "mtls:web/batch",
                "shop/cart-v1",
                8080,
                "connect",
                "deny default-deny:front",
            ),
            (
                "mtls:web/batch",
                "shop/cart-v1",
                8080,
                "GET /",
                "deny default-deny:front",
            ),
            ("web/front", "shop/cart-v1", 8080, "connect", "deny default-deny:front"),
            ("mtls:web/batch", "shop/cart-v1", 22, "connect", "permit default-allow"),
            (
                "mtls:web/batch",
                "shop/cart-v2",
                8080,
                "connect",
                "permit default-allow",
            ),
            ("mtls:web/batch", "shop/db", 5432, "connect", "permit default-allow"),
        ],
    );
}

#[test]
fn deny_beats_allow() {
    let documents = access("all", &format!("{{{CART}, action: Allow, rules: [{{}}]}}"))
        + &access(
            "no-batch",
            &format!(
                "{{{CART}, action: Deny, rules: [{{from: [{{identities: ['spiffe://cluster.local/ns/web/sa/batch']}}]}}]}}"
            ),
        );
    check(
        &documents,
        &[
            ("mtls:web/front", "shop/cart-v1", 8080, "connect", "permit all/0"),
            ("web/front", "shop/cart-v1", 8080, "connect", "permit all/0"),
            ("mtls:web/batch", "shop/cart-v1", 8080, "connect", "deny no-batch/0"),
            ("mtls:web/batch", "shop/cart-v1", 8080, "GET /", "deny no-batch/0"),
        ],
    );
}

#[test]
fn an_allow_without_rules_denies_all() {
    check(
        &access("none", &format!("{{{CART}, action: Allow}}")),
        &[("mtls:web/front", "shop/cart-v1", 8080, "flow", "deny default-deny:none")],
    );
}

#[test]
fn clauses_are_and_lists_are_or() {
    let rules = "[{name: a, from: [{namespaces: [web], identities: ['spiffe://cluster.local/ns/web/*']}, {cidrs: [10.1.2.0/24]}], \
                 to: [{ports: [8080], methods: [GET, HEAD]}, {ports: [9100]}]}]";
    check(
        &access("p", &format!("{{{CART}, action: Allow, rules: {rules}}}")),
        &[
            ("mtls:web/front", "shop/cart-v1", 8080, "GET /", "permit p/a"),
            ("mtls:web/front", "shop/cart-v1", 8080, "HEAD /", "permit p/a"),
            ("mtls:web/front", "shop/cart-v1", 8080, "POST /", "deny default-deny:p"),
            ("mtls:web/front", "shop/cart-v1", 8080, "get /", "deny default-deny:p"),
            ("mtls:web/front", "shop/cart-v2", 8081, "GET /", "deny default-deny:p"),
            ("mtls:web/front", "shop/cart-v1", 9100, "flow", "permit p/a"),
            ("web/front", "shop/cart-v1", 9100, "flow", "deny default-deny:p"),
            ("legacy/old", "shop/cart-v1", 9100, "flow", "permit p/a"),
            ("mtls:shop/db", "shop/cart-v1", 9100, "flow", "deny default-deny:p"),
        ],
    );
}

#[test]
fn rules_about_requests_wait_for_them_and_fail_closed_without() {
    let allow = access(
        "get",
        &format!("{{{CART}, action: Allow, rules: [{{to: [{{methods: [GET]}}]}}]}}"),
    );
    check(
        &allow,
        &[
            ("mtls:web/front", "shop/cart-v1", 8080, "connect", "needs-request"),
            ("mtls:web/front", "shop/cart-v1", 8080, "GET /", "permit get/0"),
            ("mtls:web/front", "shop/cart-v1", 8080, "PUT /", "deny default-deny:get"),
            ("mtls:web/front", "shop/cart-v1", 8080, "flow", "deny default-deny:get"),
        ],
    );
    let deny = access(
        "no-put",
        &format!("{{{CART}, action: Deny, rules: [{{from: [{{namespaces: [web]}}], to: [{{methods: [PUT]}}]}}]}}"),
    );
    check(
        &deny,
        &[
            ("mtls:web/front", "shop/cart-v1", 8080, "connect", "needs-request"),
            ("mtls:web/front", "shop/cart-v1", 8080, "GET /", "permit default-allow"),
            ("mtls:web/front", "shop/cart-v1", 8080, "PUT /", "deny no-put/0"),
            ("mtls:web/front", "shop/cart-v1", 8080, "flow", "deny no-put/0"),
            ("mtls:shop/db", "shop/cart-v1", 8080, "flow", "permit default-allow"),
        ],
    );
}

#[test]
fn hosts_paths_and_headers_are_matched() {
    let rules = "[{name: r, to: [{hosts: ['*.example.com', cart], paths: [{type: Exact, value: /one}, {type: PathPrefix, value: /api}, \
                 {type: RegularExpression, value: '/v[0-9]/.*'}], headers: [{name: X-Team, value: a}, {name: x-env, value: dev}]}]}]";
    check(
        &access("p", &format!("{{{CART}, action: Allow, rules: {rules}}}")),
        &[
            (
                "web/front",
                "shop/cart-v1",
                8080,
                "GET /one cart x-team: a; x-env: dev",
                "permit p/r",
            ),
            (
                "web/front",
                "shop/cart-v1",
                8080,
                "GET /one cart:80 x-team: a; x-env: dev",
                "permit p/r",
            ),
            (
                "web/front",
                "shop/cart-v1",
                8080,
                "GET /one A.Example.com x-team: a; x-env: dev",
                "permit p/r",
            ),
            (
                "web/front",
                "shop/cart-v1",
                8080,
                "GET /one example.com x-team: a; x-env: dev",
                "deny default-deny:p",
            ),
            (
                "web/front",
                "shop/cart-v1",
                8080,
                "GET /one cart x-team: a",
                "deny default-deny:p",
            ),
            (
                "web/front",
                "shop/cart-v1",
                8080,
                "GET /one/ cart x-team: a; x-env: dev",
                "deny default-deny:p",
            ),
            (
                "web/front",
                "shop/cart-v1",
                8080,
                "GET /api/x?y cart x-team: a; x-env: dev",
                "permit p/r",
            ),
            (
                "web/front",
                "shop/cart-v1",
                8080,
                "GET /apix cart x-team: a; x-env: dev",
                "deny default-deny:p",
            ),
            (
                "web/front",
                "shop/cart-v1",
                8080,
                "GET /v1/x cart x-team: a; x-env: dev",
                "permit p/r",
            ),
            (
                "web/front",
                "shop/cart-v1",
                8080,
                "GET /x/v1/x cart x-team: a; x-env: dev",
                "deny default-deny:p",
            ),
        ],
    );
}

#[test]
fn every_line_of_a_header_counts() {
    let to = "to: [{headers: [{name: x-team, value: a}]}]";
    let allow = access("a", &format!("{{{CART}, action: Allow, rules: [{{{to}}}]}}"));
    let deny = access("d", &format!("{{{CART}, action: Deny, rules: [{{{to}}}]}}"));
    // The header's lines, what the Allow says, what the Deny says.
    let cases = [
        ("x-team: a", "permit a/0", "deny d/0"),
        ("x-team: a; x-team: a", "permit a/0", "deny d/0"),
        ("x-team: b; x-team: a", "deny default-deny:a", "deny d/0"),
        ("x-team: a; x-team: b", "deny default-deny:a", "deny d/0"),
        ("x-team: b", "deny default-deny:a", "permit default-allow"),
        ("x-other: a", "deny default-deny:a", "permit default-allow"),
    ];
    for (lines, allowed, denied) in cases {
        let line = format!("GET / cart {lines}");
        check(&allow, &[("web/front", "shop/cart-v1", 8080, &line, allowed)]);
        check(&deny, &[("web/front", "shop/cart-v1", 8080, &line, denied)]);
    }
}

#[test]
fn a_path_in_disguise_is_neither_let_in_nor_overlooked() {
    let deny = access(
        "d",
        &format!("{{{CART}, action: Deny, rules: [{{to: [{{paths: [{{type: PathPrefix, value: /admin}}]}}]}}]}}"),
    );
    let allow = access(
        "a",
        &format!("{{{CART}, action: Allow, rules: [{{to: [{{paths: [{{type: PathPrefix, value: /public}}]}}]}}]}}"),
    );
    for path in [
        "/admin",
        "/admin/x",
        "/%61dmin",
        "//admin",
        "/x/../admin",
        "/x/%2e%2e/admin",
        "/./admin",
        "/x\\..\\admin",
        "/admin%2fx",
        "/admin;x=1",
        "/;x/admin",
        "/public/..;x/admin",
        "/public/..%3bx/admin",
        "/x;%2f../admin",
        "/%2561dmin",
        "/public/%252e%252e/admin",
        "/public/%252e%252e%252fadmin",
        "/public/..%255cadmin",
        "/admin%3fx",
        "/admin%00.png",
        "/x//../admin",
        "/%25252561",
    ] {
        let line = format!("GET {path}");
        check(&deny, &[("web/front", "shop/cart-v1", 8080, &line, "deny d/0")]);
    }
    for path in [
        "/public/../admin",
        "/public/%2e%2e/admin",
        "/public/..",
        "/admin/../public",
        "/public%2f..%2fadmin",
        "/%70ublic",
        "/public/..;x/admin",
        "/public/..;/admin",
        "/public/..%3bx/admin",
        "/public/%252e%252e/admin",
        "/public/%25252e%25252e/admin",
        "/public/..%5cadmin",
        "/public//../../admin",
        "/public/x//../../y",
        "/publi%2563",
        "/public;v=1/x",
    ] {
        let line = format!("GET {path}");
        check(
            &allow,
            &[("web/front", "shop/cart-v1", 8080, &line, "deny default-deny:a")],
        );
    }
    for path in [
        "/public",
        "/public/a%20b",
        "/public//x",
        "/public/x/../y",
        "/public/.well-known",
        "/public/100%",
        "/public/x;v=1;w=2",
        "/public/..;x/public/y",
        "/public/a%2520b",
        "/public/x%3fy",
    ] {
        let line = format!("GET {path}");
        check(&allow, &[("web/front", "shop/cart-v1", 8080, &line, "permit a/0")]);
    }
    let exact = access(
        "e",
        &format!("{{{CART}, action: Allow, rules: [{{to: [{{paths: [{{type: Exact, value: /a%20b}}]}}]}}]}}"),
    );
    check(
        &exact,
        &[
            ("web/front", "shop/cart-v1", 8080, "GET /a%20b", "permit e/0"),
            ("web/front", "shop/cart-v1", 8080, "GET /a%2520b", "deny default-deny:e"),
            ("web/front", "shop/cart-v1", 8080, "GET /a%20b;x", "deny default-deny:e"),
        ],
    );
}

#[test]
fn strict_mutual_tls_needs_an_identity_before_anything_else() {
    let documents = document(
        "MeshPolicy",
        "shop",
        "m",
        "{targetRefs: [{kind: Namespace, name: shop}], mtls: {mode: strict}}",
    ) + &access(
        "d",
        &format!("{{{CART}, action: Deny, rules: [{{from: [{{namespaces: [web]}}]}}]}}"),
    );
    check(
        &documents,
        &[
            ("legacy/old", "shop/cart-v1", 8080, "connect", "deny mtls-strict"),
            ("legacy/old", "shop/db", 5432, "flow", "deny mtls-strict"),
            ("mtls:shop/db", "shop/cart-v1", 8080, "connect", "permit default-allow"),
            ("mtls:web/front", "shop/cart-v1", 8080, "connect", "deny d/0"),
            ("legacy/old", "web/front", 80, "connect", "permit default-allow"),
        ],
    );
}

#[test]
fn the_most_specific_mtls_mode_holds() {
    let mesh = |spec: &str| document("MeshPolicy", "nodemesh-system", "mesh", spec);
    let documents = mesh("{targetRefs: [{group: nodemesh.io, kind: Mesh}], mtls: {mode: strict, ports: {7000: off}}}")
        + &document(
            "MeshPolicy",
            "shop",
            "ns-a",
            "{targetRefs: [{kind: Namespace, name: shop}], mtls: {mode: permissive}}",
        )
        + &document(
            "MeshPolicy",
            "shop",
            "ns-b",
            "{targetRefs: [{kind: Namespace, name: shop}], mtls: {ports: {9100: off}}}",
        )
        + &document(
            "MeshPolicy",
            "shop",
            "db",
            "{targetRefs: [{kind: Pod, selector: {matchLabels: {app: db}}}], mtls: {mode: strict}}",
        )
        + &document(
            "MeshPolicy",
            "shop",
            "http",
            "{targetRefs: [{kind: Service, name: cart, sectionName: http}], mtls: {mode: off}}",
        );
    let view = view(&documents);
    let cases = [
        ("web/front", 80, MtlsMode::Strict),
        ("web/front", 7000, MtlsMode::Off),
        ("shop/cart-v1", 1, MtlsMode::Permissive),
        ("shop/cart-v1", 7000, MtlsMode::Permissive),
        ("shop/cart-v1", 9100, MtlsMode::Off),
        ("shop/cart-v1", 8080, MtlsMode::Off),
        ("shop/cart-v2", 8081, MtlsMode::Off),
        ("shop/cart-v2", 8080, MtlsMode::Permissive),
        ("shop/db", 5432, MtlsMode::Strict),
        ("shop/db", 9100, MtlsMode::Strict),
        ("shop/nobody", 1, MtlsMode::Strict),
    ];
    for (workload, port, wanted) in cases {
        assert_eq!(view.inbound(&name(workload), port).mtls, wanted, "{workload}:{port}");
    }
    let both = document(
        "MeshPolicy",
        "shop",
        "a",
        "{targetRefs: [{kind: Namespace, name: shop}], mtls: {mode: permissive}}",
    ) + &document(
        "MeshPolicy",
        "shop",
        "b",
        "{targetRefs: [{kind: Namespace, name: shop}], mtls: {mode: strict}}",
    );
    assert_eq!(
        crate::world::view(&both).inbound(&name("shop/db"), 1).mtls,
        MtlsMode::Strict,
        "equals: the strictest"
    );
    assert_eq!(
        crate::world::view("").inbound(&name("shop/db"), 1).mtls,
        MtlsMode::Permissive,
        "nothing said"
    );
}

#[test]
fn policies_add_up_over_all_targets() {
    let documents = document(
        "AccessPolicy",
        "nodemesh-system",
        "all",
        "{targetRefs: [{group: nodemesh.io, kind: Mesh}], action: Deny, rules: [{from: [{cidrs: [10.1.2.1]}]}]}",
    ) + &access(
        "ns",
        "{targetRefs: [{kind: Namespace, name: shop}], action: Allow, rules: [{from: [{namespaces: [shop]}]}]}",
    ) + &access(
        "pod",
        "{targetRefs: [{kind: Pod, selector: {matchLabels: {app: cart, version: v1}}, sectionName: http}], action: Allow, rules: [{from: [{namespaces: [web]}]}]}",
    );
    let view = view(&documents);
    let cases = [
        ("mtls:shop/db", "shop/cart-v1", 8080, "permit accesspolicy/shop/ns/0"),
        ("mtls:web/front", "shop/cart-v1", 8080, "permit accesspolicy/shop/pod/0"),
        (
            "mtls:web/front",
            "shop/cart-v1",
            9100,
            "deny default-deny:accesspolicy/shop/ns",
        ),
        (
            "mtls:web/front",
            "shop/cart-v2",
            8081,
            "deny default-deny:accesspolicy/shop/ns",
        ),
        (
            "legacy/old",
            "shop/cart-v1",
            8080,
            "deny accesspolicy/nodemesh-system/all/0",
        ),
        ("legacy/old", "web/front", 80, "deny accesspolicy/nodemesh-system/all/0"),
        ("mtls:shop/db", "web/front", 80, "permit default-allow"),
    ];
    for (source, destination, port, wanted) in cases {
        assert_eq!(
            decision(&view, source, destination, port, "connect"),
            wanted,
            "{source} {destination}:{port}"
        );
    }
}

#[test]
fn replicas_share_their_rules_and_know_their_services() {
    let view = view(&access("p", &format!("{{{CART}, action: Allow, rules: [{{}}]}}")));
    let (one, two) = (
        view.inbound(&name("shop/cart-v1"), 8080),
        view.inbound(&name("shop/cart-v2"), 8081),
    );
    assert!(std::sync::Arc::ptr_eq(&one.access, &two.access));
    assert!(!one.access.allows_everything());
    assert!(view.inbound(&name("shop/db"), 5432).access.allows_everything());
    let services: Vec<String> = one.services.iter().map(|service| service.name.to_string()).collect();
    assert_eq!(services, ["shop/cart", "shop/cart-all"]);
    assert_eq!(one.protocol, mesh_api::workload::AppProtocol::Http1);
    assert_eq!(one.port, 8080);
    assert_eq!(view.inbound(&name("shop/cart-v1"), 4).services.len(), 0);
}
