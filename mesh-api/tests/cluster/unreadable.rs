//! A policy that cannot be read never widens what is allowed: asked through the decisions.

use mesh_api::{
    authz::{self, DenyReason, SourceAttributes},
    document::{Document, DocumentSet, read_object},
    identity::SpiffeId,
    policy::MtlsMode,
    workload::ObjectName,
};
use serde_json::Value;

use crate::world::{domain, kind_of, objects, read, set, view_on};

const PODS: &str = r#"
{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {nodemesh.io/mesh: enabled}}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: other, labels: {nodemesh.io/mesh: enabled}}}
---
apiVersion: v1
kind: Pod
metadata: {name: cart, namespace: shop, uid: u1, labels: {app: cart}}
spec: {nodeName: node-1, containers: [{name: app, ports: [{containerPort: 80}]}]}
status: {podIP: 10.1.0.1, conditions: [{type: Ready, status: "True"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: db, namespace: shop, uid: u2, labels: {app: db}}
spec: {nodeName: node-1, containers: [{name: app, ports: [{containerPort: 80}]}]}
status: {podIP: 10.1.0.2, conditions: [{type: Ready, status: "True"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: x, namespace: other, uid: u3, labels: {app: x}}
spec: {nodeName: node-1, containers: [{name: app, ports: [{containerPort: 80}]}]}
status: {podIP: 10.1.0.3, conditions: [{type: Ready, status: "True"}]}
---
{apiVersion: v1, kind: Service, metadata: {name: cart, namespace: shop}, spec: {clusterIP: 10.96.0.1, selector: {app: cart}, ports: [{port: 80}]}}
---
"#;

/// What is decided of a flow with a proven identity at each of the three pods: `true` is a permit.
fn decided(set: &DocumentSet) -> [(bool, Option<DenyReason>); 3] {
    let view = view_on("node-1", set);
    let identity = SpiffeId::workload(&domain(), "web", "front").unwrap();
    let source = SourceAttributes {
        identity: Some(&identity),
        address: "10.1.9.9".parse().unwrap(),
        port: 1,
    };
    let pods = [("shop", "cart"), ("shop", "db"), ("other", "x")];
    pods.map(|(namespace, name)| {
        let inbound = view.inbound(&ObjectName::new(namespace, name), 80);
        match authz::decide_flow(&inbound, &source) {
            Ok(_) => (true, None),
            Err(denied) => (false, Some(denied.reason)),
        }
    })
}

fn policy(text: &str) -> Value {
    objects(text).remove(0)
}

const YES: (bool, Option<DenyReason>) = (true, None);
const UNREADABLE: (bool, Option<DenyReason>) = (false, Some(DenyReason::UnreadablePolicy));
const NOT_ALLOWED: (bool, Option<DenyReason>) = (false, Some(DenyReason::NoAllowRule));

#[test]
fn a_guard_that_was_never_read_denies() {
    // The policy, and what is decided at cart, at db and in another namespace.
    let table = [
        (
            "targets that can be read",
            "{kind: AccessPolicy, metadata: {name: p, namespace: shop}, spec: {targetRefs: [{kind: Service, name: cart}], action: Permit}}",
            [UNREADABLE, YES, YES],
        ),
        (
            "by labels",
            "{kind: AccessPolicy, metadata: {name: p, namespace: shop}, spec: {targetRefs: [{kind: Pod, selector: {matchLabels: {app: db}}}], rulez: []}}",
            [YES, UNREADABLE, YES],
        ),
        (
            "one target that cannot be read: the whole namespace",
            "{kind: AccessPolicy, metadata: {name: p, namespace: shop}, spec: {targetRefs: [{kind: Service, name: cart}, {kind: Gateway, name: g}], action: Allow}}",
            [UNREADABLE, UNREADABLE, YES],
        ),
        (
            "no targets",
            "{kind: AccessPolicy, metadata: {name: p, namespace: shop}, spec: {action: Allow}}",
            [UNREADABLE, UNREADABLE, YES],
        ),
        (
            "no spec at all",
            "{kind: AccessPolicy, metadata: {name: p, namespace: shop}}",
            [UNREADABLE, UNREADABLE, YES],
        ),
        (
            "a spec that is no map",
            "{kind: AccessPolicy, metadata: {name: p, namespace: shop}, spec: [1]}",
            [UNREADABLE, UNREADABLE, YES],
        ),
        (
            "a target that it may not name: its own namespace, not the other's",
            "{kind: AccessPolicy, metadata: {name: p, namespace: shop}, spec: {targetRefs: [{kind: Namespace, name: other}], action: Deny}}",
            [UNREADABLE, UNREADABLE, YES],
        ),
        (
            "the whole mesh, by who may",
            "{kind: AccessPolicy, metadata: {name: p, namespace: nodemesh-system}, spec: {targetRefs: [{group: nodemesh.io, kind: Mesh}], action: x}}",
            [UNREADABLE, UNREADABLE, UNREADABLE],
        ),
        (
            "a limit",
            "{kind: RateLimit, metadata: {name: p, namespace: shop}, spec: {targetRefs: [{kind: Service, name: cart}], limits: [{algorithm: magic}]}}",
            [UNREADABLE, YES, YES],
        ),
        (
            "a TrafficPolicy guards nothing",
            "{kind: TrafficPolicy, metadata: {name: p, namespace: shop}, spec: {targetRefs: [{kind: Service, name: cart}], magic: 1}}",
            [YES, YES, YES],
        ),
    ];
    for (name, text, expected) in table {
        let document = read(&policy(text));
        assert!(matches!(document, Document::Unreadable(_)), "{name}");
        let mut all = set(PODS);
        assert_eq!(decided(&all), [YES; 3], "{name}: without it");
        all.insert(document);
        assert_eq!(decided(&all), expected, "{name}");
    }
}

#[test]
fn an_unreadable_mesh_policy_demands_mutual_tls() {
    let off = "{kind: MeshPolicy, metadata: {name: a, namespace: shop}, spec: {targetRefs: [{kind: Namespace, name: shop}], mtls: {mode: 'off'}}}";
    let bad = "{kind: MeshPolicy, metadata: {name: b, namespace: shop}, spec: {targetRefs: [{kind: Namespace, name: shop}], mtls: {mode: sometimes}}}";
    let mode = |set: &DocumentSet, namespace: &str, pod: &str| {
        view_on("node-1", set)
            .inbound(&ObjectName::new(namespace, pod), 80)
            .mtls
    };
    let mut all = set(PODS);
    all.insert(read(&policy(off)));
    assert_eq!(mode(&all, "shop", "cart"), MtlsMode::Off);
    all.insert(read(&policy(bad)));
    assert_eq!(mode(&all, "shop", "cart"), MtlsMode::Strict);
    assert_eq!(mode(&all, "other", "x"), MtlsMode::default());
}

#[test]
fn the_last_version_that_could_be_read_goes_on_to_hold() {
    let good = "{kind: AccessPolicy, metadata: {name: p, namespace: shop, generation: 1}, spec: {targetRefs: [{kind: Service, name: cart}], action: Allow, rules: [{from: [{namespaces: [nobody]}]}]}}";
    let bad = "{kind: AccessPolicy, metadata: {name: p, namespace: shop, generation: 2}, spec: {targetRefs: [{kind: Pod, selector: {matchLabels: {app: db}}}], action: Permit}}";
    let worse = "{kind: AccessPolicy, metadata: {name: p, namespace: shop, generation: 3}, spec: 7}";
    let mut all = set(PODS);
    let first = read(&policy(good));
    all.insert(first.clone());
    let holding = [NOT_ALLOWED, YES, YES];
    assert_eq!(decided(&all), holding);
    for text in [bad, worse] {
        let object = policy(text);
        let before = all.get(&first.key()).cloned();
        let document = read_object(kind_of(&object), &object, before.as_ref()).unwrap();
        assert!(matches!(document, Document::Unreadable(_)));
        assert!(document != *before.as_ref().unwrap(), "it is told");
        all.insert(document);
        assert_eq!(decided(&all), holding, "{text}");
    }
    // What agents get is what they had: nothing new to them.
    let mut fresh = set(PODS);
    fresh.insert(first.clone());
    assert_eq!(fresh.resources(&domain()), all.resources(&domain()));
    // It can be read again.
    let object = policy(good);
    let mended = read_object(kind_of(&object), &object, all.get(&first.key())).unwrap();
    assert_eq!(mended, first);
}

#[test]
fn a_route_that_cannot_be_read_is_not_there() {
    let bad = "{kind: HTTPRoute, metadata: {name: r, namespace: shop}, spec: {parentRefs: [{group: '', kind: Service, name: cart}], rules: [{filters: [{type: Magic}]}]}}";
    let mut all = set(PODS);
    let without = all.resources(&domain());
    let document = read(&policy(bad));
    assert_eq!(document.parent_refs().len(), 1);
    all.insert(document);
    assert_eq!(all.resources(&domain()), without);
}

#[test]
fn what_cannot_be_named_is_an_error() {
    let table = [
        "{kind: AccessPolicy, metadata: {namespace: shop}, spec: {}}",
        "{kind: AccessPolicy, metadata: {name: 'a b', namespace: shop}, spec: {}}",
        "{kind: Pod, metadata: {name: p, namespace: shop}}",
    ];
    for text in table {
        let object = policy(text);
        assert!(read_object(kind_of(&object), &object, None).is_err(), "{text}");
    }
}
