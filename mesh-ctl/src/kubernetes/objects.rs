//! Objects of any kind as JSON: read from files, found in the cluster, applied, compared.

use std::collections::BTreeMap;

use kube::{
    Api,
    api::{ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams},
    discovery::{Scope, pinned_kind},
};
use serde::Deserialize;
use serde_json::Value;

use super::{Cluster, FIELD_MANAGER};
use crate::connect::Failure;

/// The most documents in one file.
const DOCUMENTS_MAX: usize = 10_000;

/// An object as it is written, with what names it.
#[derive(Clone, Debug)]
pub struct Object {
    /// Where it was read.
    pub source: String,
    /// The whole.
    pub value: Value,
}

impl Object {
    fn word(&self, pointer: &str) -> &str {
        self.value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
    }

    /// `apiVersion`.
    pub fn api_version(&self) -> &str {
        self.word("/apiVersion")
    }

    /// `kind`.
    pub fn kind(&self) -> &str {
        self.word("/kind")
    }

    /// `metadata.name`.
    pub fn name(&self) -> &str {
        self.word("/metadata/name")
    }

    /// `metadata.namespace`.
    pub fn namespace(&self) -> &str {
        self.word("/metadata/namespace")
    }

    /// Group, version and kind.
    pub fn gvk(&self) -> GroupVersionKind {
        let (group, version) = self.api_version().split_once('/').unwrap_or(("", self.api_version()));
        GroupVersionKind::gvk(group, version, self.kind())
    }

    /// `Deployment nodemesh-system/nodemesh-controller`.
    pub fn title(&self) -> String {
        match self.namespace() {
            "" => format!("{} {}", self.kind(), self.name()),
            namespace => format!("{} {namespace}/{}", self.kind(), self.name()),
        }
    }
}

/// The objects of a YAML text, Lists taken apart.
pub fn read(source: &str, text: &str) -> Result<Vec<Object>, Failure> {
    let mut objects = Vec::new();
    for (index, document) in serde_yaml_ng::Deserializer::from_str(text).enumerate() {
        if index >= DOCUMENTS_MAX {
            return Err(Failure::refused(format!(
                "{source}: more than {DOCUMENTS_MAX} documents"
            )));
        }
        let value = Value::deserialize(document).map_err(|e| Failure::refused(format!("{source}: {e}")))?;
        let items = match value {
            Value::Null => continue,
            value if value["kind"] == "List" => match value["items"].as_array() {
                Some(items) => items.clone(),
                None => Vec::new(),
            },
            value => vec![value],
        };
        for value in items {
            let object = Object {
                source: source.to_owned(),
                value,
            };
            for (pointer, field) in [
                ("/apiVersion", "apiVersion"),
                ("/kind", "kind"),
                ("/metadata/name", "metadata.name"),
            ] {
                if object.word(pointer).is_empty() {
                    let message = format!("{source}: document {}: {field} is missing", index + 1);
                    return Err(Failure::refused(message));
                }
            }
            objects.push(object);
        }
    }
    Ok(objects)
}

/// What an apply did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It was not there.
    Created,
    /// It is another one now.
    Changed,
    /// It is as it was.
    Unchanged,
    /// It is gone.
    Deleted,
}

impl Change {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Change::Created => "created",
            Change::Changed => "changed",
            Change::Unchanged => "unchanged",
            Change::Deleted => "deleted",
        }
    }
}

/// How an apply is done.
#[derive(Clone, Copy, Debug, Default)]
pub struct Manner {
    /// The server says what it would do.
    pub dry_run: bool,
    /// Fields that another manager owns are taken over.
    pub force: bool,
}

/// Kinds that were looked up, and the cluster.
pub struct Objects {
    cluster: Cluster,
    known: BTreeMap<String, (ApiResource, Scope)>,
}

impl Objects {
    /// Nothing is looked up yet.
    pub fn new(cluster: Cluster) -> Objects {
        Objects {
            cluster,
            known: BTreeMap::new(),
        }
    }

    /// The API of an object's kind, in its namespace. An object that needs a namespace and names none gets the cluster's
    /// default one.
    pub async fn api(&mut self, object: &mut Object) -> Result<Api<DynamicObject>, Failure> {
        let key = format!("{}/{}", object.api_version(), object.kind());
        if !self.known.contains_key(&key) {
            let found = pinned_kind(&self.cluster.client, &object.gvk())
                .await
                .map_err(|error| {
                    let missing = matches!(&error, kube::Error::Discovery(_))
                        || matches!(&error, kube::Error::Api(status) if status.code == 404);
                    if missing {
                        let (source, kind, version) = (&object.source, object.kind(), object.api_version());
                        Failure::refused(format!("{source}: the cluster has no {kind} in {version}"))
                    } else {
                        Failure::from(error)
                    }
                })?;
            self.known.insert(key.clone(), (found.0, found.1.scope));
        }
        let Some((resource, scope)) = self.known.get(&key) else {
            return Err(Failure::refused(format!("{key} is not known")));
        };
        let client = self.cluster.client.clone();
        if matches!(scope, Scope::Cluster) {
            return Ok(Api::all_with(client, resource));
        }
        if object.namespace().is_empty() {
            object.value["metadata"]["namespace"] = self.cluster.namespace.clone().into();
        }
        Ok(Api::namespaced_with(client, object.namespace(), resource))
    }

    /// The object as the cluster has it.
    pub async fn get(&mut self, object: &mut Object) -> Result<Option<DynamicObject>, Failure> {
        let api = self.api(object).await?;
        Ok(api.get_opt(object.name()).await?)
    }

    /// Applies an object on the server's side; what came of it, and the object as it is (or would be).
    pub async fn apply(&mut self, object: &mut Object, manner: Manner) -> Result<(Change, DynamicObject), Failure> {
        let api = self.api(object).await?;
        let before = api.get_opt(object.name()).await?;
        let params = PatchParams {
            dry_run: manner.dry_run,
            force: manner.force,
            field_manager: Some(FIELD_MANAGER.to_owned()),
            field_validation: None,
        };
        let after = api
            .patch(object.name(), &params, &Patch::Apply(&object.value))
            .await
            .map_err(|error| named(object, error))?;
        let change = match &before {
            None => Change::Created,
            Some(before) if manner.dry_run && same(before, &after) => Change::Unchanged,
            Some(before) if !manner.dry_run && before.metadata.resource_version == after.metadata.resource_version => {
                Change::Unchanged
            }
            Some(_) => Change::Changed,
        };
        Ok((change, after))
    }

    /// Deletes an object; `None` if it was not there.
    pub async fn delete(&mut self, object: &mut Object, dry_run: bool) -> Result<Option<Change>, Failure> {
        let api = self.api(object).await?;
        let params = kube::api::DeleteParams {
            dry_run,
            propagation_policy: Some(kube::api::PropagationPolicy::Background),
            ..Default::default()
        };
        match api.delete(object.name(), &params).await {
            Ok(_) => Ok(Some(Change::Deleted)),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
            Err(error) => Err(named(object, error)),
        }
    }
}

/// The API server's refusal, with the object that it is about and what can be done.
fn named(object: &Object, error: kube::Error) -> Failure {
    match error {
        kube::Error::Api(status) => {
            let hint = if status.is_conflict() && status.message.contains("conflict") {
                " (--force-conflicts takes the fields over)"
            } else {
                ""
            };
            Failure::refused(format!(
                "{}: {}: {}{hint}",
                object.source,
                object.title(),
                status.message
            ))
        }
        error => Failure::from(error),
    }
}

/// Whether two forms of an object say the same, but for what the server keeps for itself.
fn same(before: &DynamicObject, after: &DynamicObject) -> bool {
    before.data.get("spec") == after.data.get("spec")
        && before.data.get("data") == after.data.get("data")
        && before.data.get("rules") == after.data.get("rules")
        && before.metadata.labels == after.metadata.labels
        && before.metadata.annotations == after.metadata.annotations
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_taken_apart_and_empty_documents_are_none() {
        let text = "---\n---\nkind: List\napiVersion: v1\nitems:\n- {apiVersion: v1, kind: Pod, metadata: {name: a}}\n\
                    ---\napiVersion: nodemesh.io/v1alpha1\nkind: RateLimit\nmetadata: {name: b, namespace: shop}\n";
        let objects = read("f.yaml", text).unwrap();
        let titles: Vec<String> = objects.iter().map(Object::title).collect();
        assert_eq!(titles, ["Pod a", "RateLimit shop/b"]);
        let gvk = objects[1].gvk();
        assert_eq!((gvk.group.as_str(), gvk.version.as_str()), ("nodemesh.io", "v1alpha1"));
    }

    #[test]
    fn what_has_no_name_is_refused_with_its_place() {
        let failure = read("f.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {}\n").unwrap_err();
        assert_eq!(failure.lines(), ["f.yaml: document 1: metadata.name is missing"]);
        assert!(read("f.yaml", "{").is_err());
    }
}
