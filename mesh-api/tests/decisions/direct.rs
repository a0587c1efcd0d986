//! Which flows of a node need no agent, by tables: documents, what is asked for, the source, the answer.

use mesh_api::view::{NotDirect, View};

use crate::world::{address, name, view};

const NODE: &str = "node-1";

/// A database in `shop` on `node-1` that says what its ports carry.
const STORE: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: store, namespace: shop, labels: {app: store}}
spec: {serviceAccountName: store, nodeName: node-1, containers: [{name: app}]}
status: {podIPs: [{ip: 10.1.0.5}, {ip: "fd00::5"}], conditions: [{type: Ready, status: "True"}]}
---
apiVersion: v1
kind: Service
metadata: {name: store, namespace: shop}
spec:
  clusterIPs: [10.96.0.12, "fd00:96::12"]
  selector: {app: store}
  ports: [{name: tcp-store, port: 6000, targetPort: 6001}, {name: http, port: 80, targetPort: 8080}]
---
apiVersion: v1
kind: Pod
metadata: {name: hosted, namespace: shop, labels: {app: hosted}}
spec: {serviceAccountName: hosted, nodeName: node-1, hostNetwork: true, containers: [{name: app}]}
status: {podIPs: [{ip: 172.30.0.11}], conditions: [{type: Ready, status: "True"}]}
---
apiVersion: v1
kind: Service
metadata: {name: hosted, namespace: shop}
spec: {clusterIP: 10.96.0.13, selector: {app: hosted}, ports: [{name: tcp-hosted, port: 6000}]}
"#;

/// A document of ours in `shop`.
fn document(kind: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: nodemesh.io/v1alpha1\nkind: {kind}\nmetadata: {{name: {}, namespace: shop}}\nspec: {spec}\n",
        kind.to_ascii_lowercase()
    )
}

fn direct() -> String {
    document(
        "MeshPolicy",
        "{targetRefs: [{kind: Namespace, name: shop}], sameNode: direct}",
    )
}

fn answer(view: &View, asked: &str, source: &str) -> Result<usize, NotDirect> {
    let destination = view.direct_destination(address(asked), NODE)?;
    let permits = destination.permits(view.workload(&name(source)).unwrap())?;
    assert_eq!(permits.len(), destination.endpoints.len());
    let listed = view.direct_destinations(NODE);
    assert!(
        listed.iter().any(|one| one.asked == address(asked)),
        "{asked} is listed"
    );
    Ok(permits.len())
}

fn check(documents: &str, cases: &[(&str, &str, Result<usize, NotDirect>)]) {
    let view = view(&format!("{STORE}{documents}"));
    for (asked, source, wanted) in cases {
        assert_eq!(
            answer(&view, asked, source),
            *wanted,
            "{source} to {asked}:\n{documents}"
        );
    }
}

#[test]
fn opaque_ports_of_the_node_are_direct_where_a_policy_says_so() {
    check("", &[("10.96.0.12:6000", "web/front", Err(NotDirect::Off))]);
    assert!(view(STORE).direct_destinations(NODE).is_empty());
    check(
        &direct(),
        &[
            ("10.96.0.12:6000", "web/front", Ok(1)),
            ("[fd00:96::12]:6000", "web/front", Ok(1)),
            ("10.1.0.5:6001", "web/front", Ok(1)),
            ("[fd00::5]:6001", "web/front", Ok(1)),
            // Requests, and what is not declared.
            ("10.96.0.12:80", "web/front", Err(NotDirect::Protocol)),
            ("10.1.0.5:8080", "web/front", Err(NotDirect::Protocol)),
            ("10.1.0.5:9999", "web/front", Err(NotDirect::Protocol)),
            // One of its endpoints is on another node.
            ("10.96.0.10:9100", "web/front", Err(NotDirect::OtherNode)),
            ("10.1.0.2:9100", "web/front", Err(NotDirect::OtherNode)),
            ("10.96.0.99:1", "web/front", Err(NotDirect::NotEnrolled)),
            ("10.96.0.12:6000", "legacy/old", Err(NotDirect::NotASource)),
            ("10.96.0.12:6000", "shop/store", Err(NotDirect::Itself)),
            // Those share their address and namespace with others.
            ("10.96.0.12:6000", "shop/hosted", Err(NotDirect::NotASource)),
            ("10.96.0.13:6000", "web/front", Err(NotDirect::NotEnrolled)),
            // It has no IPv6 address.
            ("[fd00:96::12]:6000", "shop/db", Err(NotDirect::NotASource)),
        ],
    );
}

#[test]
fn the_most_specific_word_on_directness_holds() {
    let mesh = |name: &str, namespace: &str, spec: &str| {
        format!(
            "---\napiVersion: nodemesh.io/v1alpha1\nkind: MeshPolicy\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
             spec: {spec}\n"
        )
    };
    let everywhere = mesh(
        "mesh",
        "nodemesh-system",
        "{targetRefs: [{kind: Mesh}], sameNode: direct}",
    );
    let asked = "10.96.0.12:6000";
    check(&everywhere, &[(asked, "web/front", Ok(1))]);
    // One that says nothing of it leaves it; one that does not want it wins over its equal.
    let strict = mesh(
        "a",
        "shop",
        "{targetRefs: [{kind: Namespace, name: shop}], mtls: {mode: strict}}",
    );
    check(&format!("{everywhere}{strict}"), &[(asked, "web/front", Ok(1))]);
    let agent = mesh(
        "b",
        "shop",
        "{targetRefs: [{kind: Namespace, name: shop}], sameNode: agent}",
    );
    let equal = mesh(
        "c",
        "shop",
        "{targetRefs: [{kind: Namespace, name: shop}], sameNode: direct}",
    );
    check(
        &format!("{everywhere}{agent}{equal}"),
        &[(asked, "web/front", Err(NotDirect::Off))],
    );
    let service = mesh(
        "d",
        "shop",
        "{targetRefs: [{kind: Service, name: store}], sameNode: direct}",
    );
    check(&format!("{agent}{service}"), &[(asked, "web/front", Ok(1))]);
}

#[test]
fn whatever_needs_the_agent_keeps_it() {
    const TARGET: &str = "targetRefs: [{kind: Service, name: store}]";
    let asked = "10.96.0.12:6000";
    for (document, wanted) in [
        (document("TrafficPolicy", &format!("{{{TARGET}, timeouts: {{idle: 5s}}}}")), NotDirect::Traffic),
        (
            document(
                "RateLimit",
                &format!("{{{TARGET}, limits: [{{key: [{{source: identity}}], algorithm: token-bucket, rate: {{requests: 50, per: 1s}}, burst: 20, scope: local}}]}}"),
            ),
            NotDirect::Limits,
        ),
        (
            document("AccessPolicy", &format!("{{{TARGET}, action: Deny, rules: [{{to: [{{methods: [DELETE]}}]}}]}}")),
            NotDirect::Requests,
        ),
        (
            "---\napiVersion: gateway.networking.k8s.io/v1alpha2\nkind: TCPRoute\nmetadata: {name: r, namespace: shop}\n\
             spec: {parentRefs: [{group: '', kind: Service, name: store}], rules: [{backendRefs: [{name: db, port: 5432}]}]}\n"
                .to_owned(),
            NotDirect::Routes,
        ),
    ] {
        check(&format!("{}{document}", direct()), &[(asked, "web/front", Err(wanted))]);
    }
}

#[test]
fn only_who_is_permitted_may() {
    let allow = document(
        "AccessPolicy",
        "{targetRefs: [{kind: Service, name: store}], action: Allow, rules: [{from: [{namespaces: [web]}], to: [{ports: [6001]}]}]}",
    );
    check(
        &format!("{}{allow}", direct()),
        &[
            ("10.96.0.12:6000", "web/front", Ok(1)),
            ("10.1.0.5:6001", "web/front", Ok(1)),
            ("10.96.0.12:6000", "shop/db", Err(NotDirect::Denied)),
            ("10.1.0.5:6001", "shop/db", Err(NotDirect::Denied)),
        ],
    );
}
