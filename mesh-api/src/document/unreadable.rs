//! Policies and routes that are there and cannot be read: whoever stores documents took them, the mesh does not.
//!
//! Such a document must never widen what is allowed. The last version that could be read goes on to hold; without one
//! (the controller has just started) a guard does the most that its kind can do, at its targets if they can be read, else
//! in its whole namespace: an AccessPolicy and a RateLimit deny everything, a MeshPolicy demands mutual TLS. Another
//! kind without a version that can be read is not there, as the Gateway API has it of routes: it is not accepted.

use std::{borrow::Cow, collections::BTreeMap, sync::Arc};

use serde::Serialize;
use serde_json::{Value, json};

use super::{Document, Kind, Object, Problem};
use crate::{
    policy::{MeshPolicy, MtlsMode, MtlsSettings, ParentRef, SameNode, TargetRef, guard_targets},
    read::{Decode, Field, Log, Node},
};

/// What is known of a document that cannot be read.
#[derive(Clone, Debug, PartialEq)]
pub struct Unreadable {
    /// What it would be.
    pub kind: Kind,
    /// Why it cannot be read, for people.
    pub problems: Vec<Problem>,
    /// A route's parents, as far as they can be read.
    pub parents: Vec<ParentRef>,
    /// Where a guard is taken to hold: its targets if all of them can be read, else its namespace.
    pub targets: Vec<TargetRef>,
    /// The last version that could be read; it goes on to hold.
    pub last: Option<Arc<Document>>,
}

impl Unreadable {
    /// From what a document's spec is, whatever it is.
    pub(super) fn new(
        kind: Kind,
        namespace: &str,
        spec: Option<&Value>,
        problems: Vec<Problem>,
        last: Option<&Document>,
    ) -> Unreadable {
        let last = match last {
            Some(Document::Unreadable(before)) => before.spec.last.clone(),
            Some(document) if document.kind() == kind => Some(Arc::new(document.clone())),
            _ => None,
        };
        let node = Node::from_json(spec.unwrap_or(&Value::Null));
        let own_namespace = TargetRef::Namespace {
            name: namespace.to_owned(),
        };
        let targets = match kind.is_guard() {
            true => targets(kind, &node, namespace).unwrap_or_else(|| vec![own_namespace]),
            false => Vec::new(),
        };
        Unreadable {
            kind,
            problems,
            parents: parents(&node),
            targets,
            last,
        }
    }

    /// A guard that a peer says cannot be read, with the spec that [`Unreadable::spec_json`] made.
    pub(super) fn from_peer(kind: Kind, namespace: &str, spec: &Value) -> Unreadable {
        Unreadable::new(kind, namespace, Some(spec), Vec::new(), None)
    }

    /// Where it holds, as a spec.
    pub(super) fn spec_json(&self) -> Value {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Spec<'a> {
            target_refs: &'a [TargetRef],
        }
        let spec = Spec {
            target_refs: &self.targets,
        };
        serde_json::to_value(&spec).unwrap_or_else(|_| json!({}))
    }

    /// What holds instead, for people.
    pub fn what_holds(&self) -> &'static str {
        match (&self.last, self.kind) {
            (Some(_), _) => "its last version that could be read goes on to hold",
            (None, Kind::MeshPolicy) => "until it can be read its targets demand mutual TLS",
            (None, kind) if kind.is_guard() => "until it can be read its targets are denied everything",
            (None, _) => "until it can be read it does nothing",
        }
    }

    /// The reasons, on one line.
    pub fn why(&self) -> String {
        let one = |problem: &Problem| {
            let problem = problem.to_string();
            // The source is the document itself.
            problem
                .split_once(": ")
                .map_or(problem.clone(), |(_, rest)| rest.to_owned())
        };
        let texts: Vec<String> = self.problems.iter().map(one).collect();
        texts.join("; ")
    }
}

impl Document {
    /// What holds for it: itself, or if it cannot be read its last version that could be, else what a guard turns into.
    /// `None`: nothing.
    pub fn holding(&self) -> Option<Cow<'_, Document>> {
        let Document::Unreadable(object) = self else {
            return Some(Cow::Borrowed(self));
        };
        let spec = &object.spec;
        match (&spec.last, spec.kind) {
            (Some(last), _) => Some(Cow::Borrowed(last)),
            (None, Kind::MeshPolicy) => {
                let strict = MtlsSettings {
                    mode: Some(MtlsMode::Strict),
                    ports: BTreeMap::new(),
                };
                Some(Cow::Owned(Document::MeshPolicy(Object {
                    meta: object.meta.clone(),
                    spec: MeshPolicy {
                        target_refs: spec.targets.clone(),
                        mtls: Some(strict),
                        same_node: Some(SameNode::Agent),
                    },
                    raw: None,
                })))
            }
            (None, kind) if kind.is_guard() => {
                // Why it cannot be read is no matter of agents.
                let spec = Unreadable {
                    problems: Vec::new(),
                    ..spec.clone()
                };
                let meta = object.meta.clone();
                Some(Cow::Owned(Document::Unreadable(Object { meta, spec, raw: None })))
            }
            (None, _) => None,
        }
    }
}

/// The targets, if they can be read. Whether the policy may name them is looked at, too: what lies in another namespace
/// is not denied by whoever may not say anything of it.
fn targets(kind: Kind, spec: &Node, namespace: &str) -> Option<Vec<TargetRef>> {
    let log = Log::new("");
    let mut fields = Field::root(&log, spec, Some(namespace)).fields_if_map()?;
    let targets = guard_targets(&mut fields, kind == Kind::MeshPolicy)?;
    (log.len() == 0).then_some(targets)
}

/// The parents, each that can be read.
fn parents(spec: &Node) -> Vec<ParentRef> {
    let log = Log::new("");
    let fields = Field::root(&log, spec, None).fields_if_map();
    let items = fields.and_then(|mut fields| fields.get("parentRefs"));
    let items = items.and_then(|field| field.items(32)).unwrap_or_default();
    items.iter().filter_map(ParentRef::decode).collect()
}
