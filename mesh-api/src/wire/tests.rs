//! What a neighbouring version says that this one does not know: it is passed over where nothing can be let in by that,
//! else the whole message is refused by name. Fields that are not known are the matter of `tests/round_trip.rs`.

use super::{Update, WireError, generated as pb};
use crate::{
    document::{Resource, ResourceKey},
    workload::{AppProtocol, Revision},
};

fn workload(protocol: i32) -> pb::Workload {
    pb::Workload {
        namespace: "shop".to_owned(),
        name: "cart".to_owned(),
        identity: "spiffe://cluster.local/ns/shop/sa/cart".to_owned(),
        ports: vec![pb::WorkloadPort {
            name: "web".to_owned(),
            port: 80,
            protocol,
        }],
        ..pb::Workload::default()
    }
}

fn policy(kind: &str, spec_json: &str) -> pb::Resource {
    pb::Resource {
        resource: Some(pb::resource::Resource::Policy(pb::PolicyDocument {
            kind: kind.to_owned(),
            namespace: "shop".to_owned(),
            name: "strict".to_owned(),
            spec_json: spec_json.to_owned(),
            ..pb::PolicyDocument::default()
        })),
    }
}

fn delta(upserts: Vec<pb::Resource>, removed: Vec<pb::ResourceKey>) -> Result<Update, WireError> {
    let delta = pb::Delta {
        from: 1,
        to: 2,
        upserts,
        removed,
        trust_bundle: None,
        stamp: 3,
    };
    let message = pb::ControllerMessage {
        message: Some(pb::controller_message::Message::Delta(delta)),
    };
    assert_eq!(message.revision(), Revision(2), "a refusal says of what");
    Update::try_from(message)
}

#[test]
fn a_protocol_that_is_not_known_is_detected() {
    for (value, expected) in [
        (1, AppProtocol::Http1),
        (5, AppProtocol::Tcp),
        (77, AppProtocol::Detect),
    ] {
        let resource = pb::Resource {
            resource: Some(pb::resource::Resource::Workload(workload(value))),
        };
        let Ok(Update::Delta { upserts, .. }) = delta(vec![resource], Vec::new()) else {
            panic!("protocol {value} is refused");
        };
        let [Resource::Workload(workload)] = upserts.as_slice() else {
            panic!("{upserts:?}");
        };
        assert_eq!(workload.ports[0].protocol, expected, "{value}");
    }
}

#[test]
fn what_may_guard_is_never_passed_over() {
    let strict = r#"{"targetRefs": [{"kind": "Namespace", "name": "shop"}], "mtls": {"mode": "strict"}}"#;
    assert!(delta(vec![policy("MeshPolicy", strict)], Vec::new()).is_ok());
    let table = [
        (policy("Authentication", "{}"), "unknown kind \"Authentication\""),
        (pb::Resource { resource: None }, "resource is missing"),
        (
            policy("MeshPolicy", &strict.replace("\"mtls\"", "\"audit\": true, \"mtls\"")),
            "MeshPolicy shop/strict: spec.audit",
        ),
        (
            policy("MeshPolicy", &strict.replace("strict", "quantum")),
            "MeshPolicy shop/strict: spec.mtls.mode",
        ),
    ];
    for (resource, problem) in table {
        let refused = delta(vec![resource], Vec::new()).unwrap_err().to_string();
        assert!(refused.contains(problem), "{refused:?} instead of {problem:?}");
    }
}

#[test]
fn the_end_of_what_was_never_held_is_no_news() {
    let key = |kind: &str| pb::ResourceKey {
        kind: kind.to_owned(),
        namespace: "shop".to_owned(),
        name: "cart".to_owned(),
    };
    let Ok(Update::Delta { removed, .. }) = delta(Vec::new(), vec![key("Authentication"), key("Service")]) else {
        panic!("a removal is refused");
    };
    assert!(matches!(removed.as_slice(), [ResourceKey::Service(_)]), "{removed:?}");
}

#[test]
fn a_kind_of_message_that_is_not_known_says_so() {
    assert!(pb::ControllerMessage { message: None }.is_unknown());
    assert!(pb::AgentMessage { message: None }.is_unknown());
    // A member of the oneof that a later version has added: field 15, a message.
    let later: &[u8] = &[15 << 3 | 2, 2, 8, 1];
    let message: pb::ControllerMessage = prost::Message::decode(later).unwrap();
    assert!(message.is_unknown());
    let message: pb::AgentMessage = prost::Message::decode(later).unwrap();
    assert!(message.is_unknown());
}
