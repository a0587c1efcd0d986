//! `mesh-ctl policy plan`: what an apply would do, before it is done.
//!
//! Three answers: which fields change, which references would be open, and which services and workloads the documents
//! speak of. The API server (or the standalone controller) checks everything as at an apply and keeps nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use mesh_api::{
    document::{Document, DocumentKey, Problem, Resource, from_json, parse},
    policy::TargetRef,
    wire::operator::ApplyRequest,
    workload::Workload,
};
use serde::Serialize;
use serde_json::Value;

use crate::{
    connect::{CALL_TIMEOUT, Failure, World, connect},
    held::{Held, held},
    kubernetes::{
        self,
        objects::{Manner, Object, Objects},
    },
    output::{Format, print, print_value},
    policy::{read_sources, split_problems, warn},
};

/// The most changed fields that are told of one document.
const FIELDS_SHOWN_MAX: usize = 50;
/// The most names that one line shows.
const NAMES_SHOWN_MAX: usize = 10;

/// Arguments of `plan`.
#[derive(Debug, clap::Args)]
pub struct PlanArgs {
    /// A file, a directory (its *.yaml, *.yml and *.json) or - for standard input; may be given again.
    #[arg(short, long = "filename", value_name = "FILE|DIR|-", required = true)]
    filenames: Vec<PathBuf>,
    /// As if fields that somebody else has set were taken over (in a cluster).
    #[arg(long)]
    force_conflicts: bool,
    /// How the result is printed.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Plan {
    steps: Vec<Step>,
    /// References that would be open and are not now.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Step {
    document: String,
    change: &'static str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    fields: Vec<Field>,
    #[serde(skip_serializing_if = "Option::is_none")]
    touches: Option<Touches>,
}

/// One changed field.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Field {
    path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    before: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    after: Option<Value>,
}

/// Whom a document speaks of.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
struct Touches {
    services: Vec<String>,
    workloads: Vec<String>,
}

/// Adds the fields in which two values differ.
fn differences(path: &str, before: Option<&Value>, after: Option<&Value>, fields: &mut Vec<Field>) {
    match (before, after) {
        (before, after) if before == after => {}
        (Some(Value::Object(old)), Some(Value::Object(new))) => {
            let keys: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
            for key in keys {
                let inner = if path.is_empty() {
                    key.clone()
                } else {
                    format!("{path}.{key}")
                };
                differences(&inner, old.get(key), new.get(key), fields);
            }
        }
        (Some(Value::Array(old)), Some(Value::Array(new))) => {
            for index in 0..old.len().max(new.len()) {
                differences(&format!("{path}[{index}]"), old.get(index), new.get(index), fields);
            }
        }
        (before, after) => fields.push(Field {
            path: path.to_owned(),
            before: before.cloned(),
            after: after.cloned(),
        }),
    }
}

/// What of an object is the user's: labels, annotations, and everything but metadata and status.
fn own(value: &Value) -> Value {
    let mut own = value.clone();
    if let Some(map) = own.as_object_mut() {
        map.remove("status");
        map.remove("apiVersion");
        map.remove("kind");
        let metadata = map.remove("metadata").unwrap_or_default();
        for key in ["labels", "annotations"] {
            if metadata[key].is_object() {
                map.insert(key.to_owned(), metadata[key].clone());
            }
        }
    }
    own
}

fn step(title: String, before: Option<&Value>, after: &Value) -> Step {
    let mut fields = Vec::new();
    if let Some(before) = before {
        differences("", Some(&own(before)), Some(&own(after)), &mut fields);
    }
    let change = match (before, fields.is_empty()) {
        (None, _) => "create",
        (Some(_), true) => "nothing",
        (Some(_), false) => "change",
    };
    Step {
        document: title,
        change,
        fields,
        touches: None,
    }
}

fn has(workload: &Workload, labels: &BTreeMap<String, String>) -> bool {
    let is = |(key, value): (&String, &String)| workload.labels.get(key.as_str()).is_some_and(|own| **own == **value);
    labels.iter().all(is)
}

/// The services and workloads that a document names, by the resources that there would be.
fn touches(document: &Document, resources: &[Resource]) -> Touches {
    let mut services = BTreeSet::new();
    let mut workloads = BTreeSet::new();
    let namespace = &document.meta().namespace;
    let mut service = |wanted_namespace: &str, wanted: &str| {
        for resource in resources {
            let Resource::Service(service) = resource else { continue };
            if *service.name.namespace != *wanted_namespace || *service.name.name != *wanted {
                continue;
            }
            services.insert(service.name.to_string());
            for resource in resources {
                if let Resource::Workload(workload) = resource
                    && service.selects(workload)
                {
                    workloads.insert(workload.name.to_string());
                }
            }
        }
    };
    for parent in document.parent_refs().iter().filter(|parent| parent.is_service()) {
        service(parent.namespace.as_deref().unwrap_or(namespace), &parent.name);
    }
    for target in document.target_refs() {
        if let TargetRef::Service { namespace, name, .. } = target {
            service(namespace, name);
        }
    }
    if let Document::ServiceSubset(subset) = document {
        service(namespace, &subset.spec.service);
    }
    for target in document.target_refs() {
        for resource in resources {
            match (target, resource) {
                (TargetRef::Mesh, Resource::Workload(w)) if w.enrolled => drop(workloads.insert(w.name.to_string())),
                (TargetRef::Namespace { name }, Resource::Workload(w)) if *w.name.namespace == **name && w.enrolled => {
                    workloads.insert(w.name.to_string());
                }
                (TargetRef::Namespace { name }, Resource::Service(s)) if *s.name.namespace == **name => {
                    services.insert(s.name.to_string());
                }
                (TargetRef::Workloads { namespace, labels, .. }, Resource::Workload(w))
                    if *w.name.namespace == **namespace && has(w, labels) =>
                {
                    workloads.insert(w.name.to_string());
                }
                _ => {}
            }
        }
    }
    Touches {
        services: services.into_iter().collect(),
        workloads: workloads.into_iter().collect(),
    }
}

fn lines(problems: Vec<Problem>) -> Failure {
    Failure::Refused(problems.iter().map(ToString::to_string).collect())
}

/// Runs `mesh-ctl policy plan`.
pub async fn run(args: PlanArgs, world: &World) -> Result<(), Failure> {
    let (mut steps, documents) = match world {
        World::Kubernetes(kube) => in_cluster(&args, kube).await?,
        World::Standalone(..) => standalone(&args, world).await?,
    };
    let mut warnings = Vec::new();
    match held(world).await {
        Ok(Held {
            set: before,
            trust_domain,
            ..
        }) => {
            let mut after = before.clone();
            after.extend(documents.values().cloned());
            let known: BTreeSet<String> = before.validate().iter().map(ToString::to_string).collect();
            let open = after.validate().into_iter().map(|problem| problem.to_string());
            warnings.extend(open.filter(|problem| !known.contains(problem)));
            let resources = after.resources(&trust_domain);
            for step in &mut steps {
                step.touches = documents
                    .get(&step.document)
                    .map(|document| touches(document, &resources));
            }
        }
        Err(failure) => {
            let why = failure.lines().join("; ");
            warnings.push(format!("whom this concerns cannot be told: {why}"));
        }
    }
    show(&Plan { steps, warnings }, args.output)
}

/// The documents of a plan, by the titles of their steps.
type Documents = BTreeMap<String, Document>;

async fn in_cluster(args: &PlanArgs, kube: &kubernetes::KubeArgs) -> Result<(Vec<Step>, Documents), Failure> {
    let cluster = kube.cluster().await?;
    let mut objects = kubernetes::policy::checked(&args.filenames, &cluster)?;
    let mut api = Objects::new(cluster);
    let manner = Manner {
        dry_run: true,
        force: args.force_conflicts,
    };
    let (mut steps, mut documents, mut problems) = (Vec::new(), BTreeMap::new(), Vec::new());
    for object in &mut objects {
        let json =
            |value: &kube::api::DynamicObject| serde_json::to_value(value).map_err(|e| Failure::refused(e.to_string()));
        let before = api.get(object).await?.as_ref().map(json).transpose()?;
        let after = match api.apply(object, manner).await {
            Ok((_, after)) => json(&after)?,
            Err(Failure::Refused(found)) => {
                problems.extend(found);
                continue;
            }
            Err(failure) => return Err(failure),
        };
        let title = object.title();
        if let Ok(document) = from_json(&title, &object.value) {
            documents.insert(title.clone(), document);
        }
        steps.push(step(title, before.as_ref(), &after));
    }
    match problems.is_empty() {
        true => Ok((steps, documents)),
        false => Err(Failure::Refused(problems)),
    }
}

async fn standalone(args: &PlanArgs, world: &World) -> Result<(Vec<Step>, Documents), Failure> {
    let sources = read_sources(&args.filenames)?;
    let mut client = connect(world, CALL_TIMEOUT).await?;
    let request = ApplyRequest {
        sources: sources.clone(),
        dry_run: true,
    };
    let (wrong, odd) = split_problems(client.apply(request).await?.into_inner().problems);
    if !wrong.is_empty() {
        warn(&odd);
        return Err(Failure::Refused(wrong));
    }
    let before = held(world).await?.set;
    let (mut steps, mut documents) = (Vec::new(), BTreeMap::new());
    for source in sources {
        for document in parse(&source.name, &source.yaml).map_err(lines)? {
            let key: DocumentKey = document.key();
            let value = document.to_json();
            let title = Object {
                source: String::new(),
                value: value.clone(),
            }
            .title();
            let old = before.get(&key).map(Document::to_json);
            steps.push(step(title.clone(), old.as_ref(), &value));
            documents.insert(title, document);
        }
    }
    Ok((steps, documents))
}

fn some(names: &[String]) -> String {
    let shown = names
        .iter()
        .take(NAMES_SHOWN_MAX)
        .cloned()
        .collect::<Vec<_>>()
        .join(", ");
    match names.len().saturating_sub(NAMES_SHOWN_MAX) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

fn text(plan: &Plan) -> String {
    let mut text = String::new();
    for step in &plan.steps {
        text += &format!("{}: {}\n", step.document, step.change);
        for field in step.fields.iter().take(FIELDS_SHOWN_MAX) {
            let word = |value: &Option<Value>| value.as_ref().map_or("(none)".to_owned(), Value::to_string);
            text += &format!("  {}: {} -> {}\n", field.path, word(&field.before), word(&field.after));
        }
        if step.fields.len() > FIELDS_SHOWN_MAX {
            text += &format!("  and {} more fields\n", step.fields.len() - FIELDS_SHOWN_MAX);
        }
        if let Some(touches) = &step.touches {
            for (what, names) in [("services", &touches.services), ("workloads", &touches.workloads)] {
                if !names.is_empty() {
                    text += &format!("  concerns {what}: {}\n", some(names));
                }
            }
        }
    }
    text
}

fn show(plan: &Plan, format: Format) -> Result<(), Failure> {
    if format != Format::Table {
        return print_value(plan, format);
    }
    warn(&plan.warnings);
    print(&text(plan));
    Ok(())
}

#[cfg(test)]
mod tests {
    use mesh_api::{document::DocumentSet, identity::TrustDomain};
    use serde_json::json;

    use super::*;

    #[test]
    fn fields_are_compared_one_by_one() {
        let before =
            json!({"metadata": {"uid": "1", "labels": {"a": "1"}}, "spec": {"x": 1, "list": [1, 2]}, "status": 1});
        let after = json!({"metadata": {"uid": "2", "labels": {"a": "2"}}, "spec": {"y": 1, "list": [1]}, "status": 2});
        let step = step("d".into(), Some(&before), &after);
        let told = text(&Plan {
            steps: vec![step],
            warnings: vec![],
        });
        assert_eq!(
            told,
            "d: change\n  labels.a: \"1\" -> \"2\"\n  spec.list[1]: 2 -> (none)\n  spec.x: 1 -> (none)\n  spec.y: \
             (none) -> 1\n"
        );
        assert_eq!(super::step("d".into(), Some(&before), &before).change, "nothing");
        assert_eq!(super::step("d".into(), None, &after).change, "create");
    }

    #[test]
    fn a_document_concerns_what_it_names() {
        let yaml = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {nodemesh.io/mesh: enabled}}
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec: {clusterIP: 10.96.0.7, selector: {app: cart}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Pod
metadata: {name: cart-1, namespace: shop, labels: {app: cart}}
spec: {nodeName: n, containers: [{name: c}]}
status: {podIPs: [{ip: 10.0.0.1}]}
---
apiVersion: v1
kind: Pod
metadata: {name: front-1, namespace: shop, labels: {app: front}}
spec: {nodeName: n, containers: [{name: c}]}
status: {podIPs: [{ip: 10.0.0.2}]}
";
        let mut set = DocumentSet::new();
        set.extend(parse("t", yaml).unwrap());
        let resources = set.resources(&TrustDomain::new("cluster.local").unwrap());
        let of = |targets: &str| {
            let text = format!(
                "apiVersion: nodemesh.io/v1alpha1\nkind: MeshPolicy\nmetadata: {{name: p, namespace: shop}}\nspec: \
                 {{targetRefs: [{targets}], mtls: {{mode: strict}}}}\n"
            );
            let found = touches(&parse("p", &text).unwrap()[0], &resources);
            (found.services.join(" "), found.workloads.join(" "))
        };
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(of("{kind: Service, name: cart}"), pair("shop/cart", "shop/cart-1"));
        assert_eq!(
            of("{kind: Namespace, name: shop}"),
            pair("shop/cart", "shop/cart-1 shop/front-1")
        );
        assert_eq!(of("{kind: Mesh}"), pair("", "shop/cart-1 shop/front-1"));
        assert_eq!(
            of("{kind: Pod, selector: {matchLabels: {app: front}}}"),
            pair("", "shop/front-1")
        );
        assert_eq!(of("{kind: Service, name: nope}"), pair("", ""));
    }
}
