//! The controller's documents as a set: what `explain` and `plan` decide by.
//!
//! What the controller cannot read is in it too, as it holds: the last version that could be read, or what a guard turns
//! into without one. Leaving it out would show doors open that are shut.

use mesh_api::{
    document::{Document, DocumentKey, DocumentSet, Kind, from_json, unreadable},
    identity::TrustDomain,
    wire::operator::{DocumentKey as WireKey, GetRequest, StatusRequest, StoredDocument},
    workload::Revision,
};
use serde_json::Value;

use crate::connect::{CALL_TIMEOUT, Failure, World, connect};

/// What a controller holds.
pub struct Held {
    /// The documents.
    pub set: DocumentSet,
    /// Of this trust domain.
    pub trust_domain: TrustDomain,
    /// The revision that they make.
    pub revision: Revision,
    /// What people should know of those that cannot be read.
    pub notes: Vec<String>,
}

/// Asks the controller for everything.
pub async fn held(world: &World) -> Result<Held, Failure> {
    let mut client = connect(world, CALL_TIMEOUT).await?;
    let status = client.status(StatusRequest {}).await?.into_inner();
    let trust_domain = TrustDomain::new(&status.trust_domain).map_err(|e| Failure::refused(e.to_string()))?;
    let response = client.get(GetRequest::default()).await?.into_inner();
    let (set, mut notes) = documents(&response.documents);
    for stored in &status.unreadable {
        let listed = |other: &StoredDocument| other.key == stored.key;
        if !response.documents.iter().any(listed) {
            let why = &stored.unreadable;
            notes.push(format!("{} cannot be read and is not known: {why}", name(stored)));
        }
    }
    if status.withheld {
        let withheld = "the controller withholds new revisions because of that: agents go on by the one that they hold";
        notes.push(withheld.to_owned());
    }
    Ok(Held {
        set,
        trust_domain,
        revision: Revision(response.revision),
        notes,
    })
}

fn name(stored: &StoredDocument) -> String {
    let WireKey { kind, namespace, name } = stored.key.clone().unwrap_or_default();
    match namespace.as_str() {
        "" => format!("{kind} {name}"),
        namespace => format!("{kind} {namespace}/{name}"),
    }
}

/// The documents that hold, and notes of those that cannot be read.
fn documents(all: &[StoredDocument]) -> (DocumentSet, Vec<String>) {
    let mut set = DocumentSet::new();
    let mut notes = Vec::new();
    for stored in all {
        let name = name(stored);
        let read = |json: &str| {
            let value: Value = serde_json::from_str(json).map_err(|error| error.to_string())?;
            from_json(&name, &value).map_err(|problems| {
                let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
                problems.join("; ")
            })
        };
        let (document, why) = if stored.unreadable.is_empty() {
            match read(&stored.json) {
                Ok(document) => {
                    set.insert(document);
                    continue;
                }
                // The controller can, so it is of another version than this program.
                Err(why) => (turned(stored, &why), why),
            }
        } else {
            let last = read(&stored.holding_json)
                .ok()
                .filter(|_| !stored.holding_json.is_empty());
            let why = stored.unreadable.clone();
            (last.or_else(|| turned(stored, &why)), why)
        };
        let holds = match &document {
            Some(Document::Unreadable(object)) => object.spec.what_holds(),
            Some(_) => "its last version that could be read goes on to hold",
            None => "until it can be read it does nothing",
        };
        notes.push(format!("{name} cannot be read: {why}; {holds}"));
        set.extend(document);
    }
    (set, notes)
}

/// What a document turns into that cannot be read.
fn turned(stored: &StoredDocument, why: &str) -> Option<Document> {
    let key = stored.key.as_ref()?;
    let key = DocumentKey::new(Kind::find(&key.kind)?, &key.namespace, &key.name);
    let object: Value = serde_json::from_str(&stored.json).unwrap_or_default();
    unreadable(&key, &object, why)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn stored(kind: &str, name: &str, spec: Value, unreadable: &str) -> StoredDocument {
        let version = match kind {
            "Service" => "v1",
            _ => "nodemesh.io/v1alpha1",
        };
        let document =
            json!({"apiVersion": version, "kind": kind, "metadata": {"name": name, "namespace": "shop"}, "spec": spec});
        StoredDocument {
            key: Some(WireKey {
                kind: kind.into(),
                namespace: "shop".into(),
                name: name.into(),
            }),
            json: document.to_string(),
            unreadable: unreadable.into(),
            ..StoredDocument::default()
        }
    }

    #[test]
    fn what_cannot_be_read_is_in_the_set_as_it_holds() {
        let targets = json!([{"kind": "Service", "name": "cart"}]);
        let good = json!({"targetRefs": targets, "action": "Allow"});
        let bad = json!({"targetRefs": targets, "action": "Later"});
        let kept = StoredDocument {
            holding_json: stored("AccessPolicy", "kept", good.clone(), "").json,
            ..stored("AccessPolicy", "kept", bad.clone(), "spec.action: ...")
        };
        let all = [
            stored("AccessPolicy", "good", good.clone(), ""),
            kept,
            stored("AccessPolicy", "new", bad.clone(), "spec.action: ..."),
            // This program reads it, the controller does not: the controller's word counts.
            stored("AccessPolicy", "older-controller", good, "an unknown field"),
            // The other way round.
            stored("AccessPolicy", "newer-controller", bad, ""),
            stored("Service", "odd", json!({"ports": "none"}), "spec.ports: ..."),
        ];
        let (set, notes) = documents(&all);
        let found: Vec<String> = set
            .iter()
            .map(|document| {
                let turned = if matches!(document, Document::Unreadable(_)) {
                    " unreadable"
                } else {
                    ""
                };
                format!("{}{turned}", document.key())
            })
            .collect();
        assert_eq!(
            found,
            [
                "AccessPolicy shop/good",
                "AccessPolicy shop/kept",
                "AccessPolicy shop/new unreadable",
                "AccessPolicy shop/newer-controller unreadable",
                "AccessPolicy shop/older-controller unreadable",
            ]
        );
        let holds: Vec<&str> = notes.iter().filter_map(|note| note.rsplit("; ").next()).collect();
        let denied = "until it can be read its targets are denied everything";
        assert_eq!(
            holds,
            [
                "its last version that could be read goes on to hold",
                denied,
                denied,
                denied,
                "until it can be read it does nothing",
            ],
            "{notes:#?}"
        );
    }
}
