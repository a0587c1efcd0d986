//! `mesh-ctl policy` in a cluster: apply, get, delete by the API server, as kubectl does it, with our own validation
//! before it.
//!
//! The reader that the controller runs sees every document first, so that what it would refuse is refused here, with
//! the field and what would be right. The API server is asked to check all of them before one of them is kept.

use std::time::{Duration, Instant, SystemTime};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{
    Api,
    api::{ApiResource, DynamicObject, GroupVersionKind, ListParams},
};
use mesh_api::{
    document::{Kind, from_json, parse},
    policy::GATEWAY_GROUP,
};
use serde::Serialize;
use serde_json::Value;

use super::{
    CONTROLLER_NAME, Cluster,
    objects::{self, Change, Manner, Object, Objects},
};
use crate::{
    connect::Failure,
    output::{Format, Table, print, print_value, when},
    policy::{ApplyArgs, DeleteArgs, DryRun, kind_and_name, read_sources},
};

/// How often the cluster is asked while something is awaited.
const POLL: Duration = Duration::from_millis(250);
/// The most objects in one page of a list.
const PAGE: u32 = 500;

/// What `apply` and `delete` print for programs.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    dry_run: bool,
    changes: Vec<Line>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    kind: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    namespace: String,
    name: String,
    change: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    generation: Option<i64>,
}

/// The mesh's kind of an object, if it is one that says something about traffic.
fn policy_kind(object: &Object) -> Option<Kind> {
    let kind = Kind::ALL
        .into_iter()
        .find(|kind| kind.as_str() == object.kind() && kind.is_policy())?;
    let ours = match kind.is_gateway() {
        true => object.gvk().group == GATEWAY_GROUP,
        false => kind.api_version() == object.api_version(),
    };
    ours.then_some(kind)
}

/// The objects of the files that the user named, in their namespaces, and valid as far as the mesh reads them.
pub fn checked(filenames: &[std::path::PathBuf], cluster: &Cluster) -> Result<Vec<Object>, Failure> {
    let mut problems = Vec::new();
    let mut all = Vec::new();
    for source in read_sources(filenames)? {
        let mut found = objects::read(&source.name, &source.yaml)?;
        let mut placed = false;
        for object in &mut found {
            let namespaced = policy_kind(object).is_some();
            if namespaced && object.namespace().is_empty() {
                object.value["metadata"]["namespace"] = cluster.namespace.clone().into();
                placed |= cluster.namespace != mesh_api::document::DEFAULT_NAMESPACE;
            } else if cluster.namespace_given && namespaced && object.namespace() != cluster.namespace {
                problems.push(format!(
                    "{}: {}: the namespace of the document is not that of --namespace, expected {}",
                    source.name,
                    object.title(),
                    cluster.namespace
                ));
            }
        }
        // Lines of the file can be told if the reader sees the file as it is.
        let ours = found.iter().filter(|object| policy_kind(object).is_some());
        if !placed && ours.clone().count() == found.len() {
            if let Err(wrong) = parse(&source.name, &source.yaml) {
                problems.extend(wrong.iter().map(ToString::to_string));
            }
        } else {
            for object in ours {
                let name = format!("{}: {}", source.name, object.title());
                if let Err(wrong) = from_json(&name, &object.value) {
                    problems.extend(wrong.iter().map(ToString::to_string));
                }
            }
        }
        all.extend(found);
    }
    if problems.is_empty() {
        Ok(all)
    } else {
        Err(Failure::Refused(problems))
    }
}

fn print_report(report: &Report, format: Format) -> Result<(), Failure> {
    if format != Format::Table {
        return print_value(report, format);
    }
    let note = if report.dry_run { " (dry run)" } else { "" };
    let mut text = String::new();
    for line in &report.changes {
        let place = if line.namespace.is_empty() { "" } else { "/" };
        text += &format!(
            "{} {}{place}{} {}{note}\n",
            line.kind, line.namespace, line.name, line.change
        );
    }
    print(&text);
    Ok(())
}

fn line(object: &Object, change: Change, after: Option<&DynamicObject>) -> Line {
    Line {
        kind: object.kind().to_owned(),
        namespace: object.namespace().to_owned(),
        name: object.name().to_owned(),
        change: change.as_str(),
        generation: after.and_then(|after| after.metadata.generation),
    }
}

/// `policy apply`.
pub async fn apply(args: &ApplyArgs, cluster: Cluster) -> Result<(), Failure> {
    let mut documents = checked(&args.filenames, &cluster)?;
    if args.dry_run == Some(DryRun::Client) {
        print(&format!(
            "{} documents are valid as far as this program can tell\n",
            documents.len()
        ));
        return Ok(());
    }
    let mut objects = Objects::new(cluster);
    let namespaces: Vec<String> = documents
        .iter()
        .filter(|object| object.kind() == "Namespace")
        .map(|object| format!("namespaces \"{}\" not found", object.name()))
        .collect();
    let manner = Manner {
        dry_run: true,
        force: args.force_conflicts,
    };
    let mut changes = Vec::new();
    let mut problems = Vec::new();
    // The API server sees all of them before one is kept: a file is applied whole, as far as one can know before.
    for object in &mut documents {
        match objects.apply(object, manner).await {
            Ok((change, after)) => changes.push(line(object, change, Some(&after))),
            // A namespace of the same file is not there while nothing is kept.
            Err(Failure::Refused(lines))
                if lines
                    .iter()
                    .all(|line| namespaces.iter().any(|missing| line.contains(missing))) =>
            {
                changes.push(self::line(object, Change::Created, None));
            }
            Err(Failure::Refused(lines)) => problems.extend(lines),
            Err(failure) => return Err(failure),
        }
    }
    if !problems.is_empty() {
        return Err(Failure::Refused(problems));
    }
    let dry_run = args.dry_run.is_some();
    if !dry_run {
        changes.clear();
        let manner = Manner {
            dry_run: false,
            ..manner
        };
        for object in &mut documents {
            let (change, after) = objects.apply(object, manner).await?;
            changes.push(line(object, change, Some(&after)));
        }
    }
    print_report(&Report { dry_run, changes }, args.output)?;
    if args.wait.wait && !dry_run {
        programmed(&mut objects, &mut documents, args.wait.timeout).await?;
        if args.output == Format::Table {
            print("programmed on every agent that needs it\n");
        }
    }
    Ok(())
}

/// What the controller has said of an object as it is now.
#[derive(Debug, PartialEq, Eq)]
enum Word {
    Programmed,
    Refused(String),
    Pending(String),
}

/// The conditions that the mesh's controller wrote: of a policy its own, of a route those of each Service parent.
pub fn conditions(object: &Value) -> Vec<&Value> {
    let own = object.pointer("/status/conditions").and_then(Value::as_array);
    let parents = object.pointer("/status/parents").and_then(Value::as_array);
    let of_mesh = parents
        .into_iter()
        .flatten()
        .filter(|parent| parent["controllerName"] == CONTROLLER_NAME);
    let of_parents = of_mesh.filter_map(|parent| parent["conditions"].as_array());
    own.into_iter().chain(of_parents).flatten().collect()
}

fn word(object: &Value) -> Word {
    let generation = object
        .pointer("/metadata/generation")
        .and_then(Value::as_i64)
        .unwrap_or(0);
    let all = conditions(object);
    let fresh: Vec<&&Value> = all
        .iter()
        .filter(|c| c["observedGeneration"].as_i64().unwrap_or(0) >= generation)
        .collect();
    let say = |c: &Value| {
        let text = |key: &str| c[key].as_str().unwrap_or_default().to_owned();
        format!("{}: {}", text("reason"), text("message"))
    };
    if let Some(refused) = fresh.iter().find(|c| c["type"] == "Accepted" && c["status"] == "False") {
        return Word::Refused(say(refused));
    }
    let programmed: Vec<_> = fresh.iter().filter(|c| c["type"] == "Programmed").collect();
    if !programmed.is_empty() && programmed.iter().all(|c| c["status"] == "True") {
        return Word::Programmed;
    }
    match programmed.iter().find(|c| c["status"] != "True") {
        Some(pending) => Word::Pending(say(pending)),
        None => Word::Pending("the controller has said nothing of it yet".to_owned()),
    }
}

/// Waits until every agent that needs a document holds it.
async fn programmed(objects: &mut Objects, documents: &mut [Object], timeout: Duration) -> Result<(), Failure> {
    let deadline = Instant::now() + timeout;
    for object in documents.iter_mut().filter(|object| policy_kind(object).is_some()) {
        loop {
            let found = objects.get(object).await?;
            let value = serde_json::to_value(&found).map_err(|e| Failure::refused(e.to_string()))?;
            match word(&value) {
                Word::Programmed => break,
                Word::Refused(why) => return Err(Failure::refused(format!("{}: {why}", object.title()))),
                Word::Pending(why) if Instant::now() >= deadline => {
                    return Err(Failure::Timeout(format!("{} is not programmed: {why}", object.title())));
                }
                Word::Pending(_) => tokio::time::sleep(POLL).await,
            }
        }
    }
    Ok(())
}

/// The resource of a kind in the version that is written here.
fn own_resource(kind: Kind) -> ApiResource {
    let (group, version) = kind.api_version().split_once('/').unwrap_or(("", kind.api_version()));
    let gvk = GroupVersionKind::gvk(group, version, kind.as_str());
    let lower = kind.as_str().to_lowercase();
    let plural = match lower.strip_suffix('y') {
        Some(stem) => format!("{stem}ies"),
        None => format!("{lower}s"),
    };
    ApiResource::from_gvk_with_plural(&gvk, &plural)
}

/// The resource of a kind that the mesh reads. Kinds of the Gateway API are looked up: a cluster has each in the versions
/// of its bundle. `None` if it does not have the kind.
async fn resource(cluster: &Cluster, kind: Kind) -> Result<Option<ApiResource>, Failure> {
    if !kind.is_gateway() {
        return Ok(Some(own_resource(kind)));
    }
    let group = match kube::discovery::group(&cluster.client, GATEWAY_GROUP).await {
        Ok(group) => group,
        Err(kube::Error::Discovery(_)) => return Ok(None),
        Err(kube::Error::Api(status)) if status.code == 404 => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let found = group.resources_by_stability().into_iter().map(|(resource, _)| resource);
    Ok(found.into_iter().find(|resource| resource.kind == kind.as_str()))
}

/// All objects of a kind, and their `apiVersion`; a kind that the cluster does not have has none.
pub async fn list(
    cluster: &Cluster,
    kind: Kind,
    namespace: Option<&str>,
) -> Result<Option<(String, Vec<DynamicObject>)>, Failure> {
    let Some(resource) = resource(cluster, kind).await? else {
        return Ok(None);
    };
    let client = cluster.client.clone();
    let api: Api<DynamicObject> = match namespace {
        Some(namespace) if kind.is_namespaced() => Api::namespaced_with(client, namespace, &resource),
        _ => Api::all_with(client, &resource),
    };
    let mut found = Vec::new();
    let mut params = ListParams::default().limit(PAGE);
    loop {
        let page = match api.list(&params).await {
            Err(kube::Error::Api(status)) if status.code == 404 => return Ok(None),
            other => other?,
        };
        let next = page.metadata.continue_.clone().filter(|token| !token.is_empty());
        found.extend(page.items);
        match next {
            Some(token) => params = params.continue_token(&token),
            None => return Ok(Some((resource.api_version, found))),
        }
    }
}

/// An object without what only the API server needs.
fn plain(mut object: DynamicObject, kind: Kind, api_version: &str) -> Result<Value, Failure> {
    object.metadata.managed_fields = None;
    let mut value = serde_json::to_value(&object).map_err(|e| Failure::refused(e.to_string()))?;
    // Items of a list name neither.
    value["apiVersion"] = api_version.into();
    value["kind"] = kind.as_str().into();
    Ok(value)
}

fn unix(time: &Option<Time>) -> i64 {
    time.as_ref().map_or(0, |time| time.0.as_second())
}

/// What a condition says for all parents: `True` if it is for each.
fn summary(object: &Value, condition: &str) -> String {
    let all: Vec<&str> = conditions(object)
        .into_iter()
        .filter(|c| c["type"] == condition)
        .filter_map(|c| c["status"].as_str())
        .collect();
    let odd = all.iter().find(|status| **status != "True");
    odd.or(all.first())
        .map(|status| (*status).to_owned())
        .unwrap_or_default()
}

/// What a document is attached to, in one cell.
fn target(object: &Value) -> String {
    let text = |value: &Value, key: &str| value[key].as_str().unwrap_or_default().to_owned();
    let refs = ["/spec/targetRefs", "/spec/parentRefs"]
        .into_iter()
        .find_map(|pointer| object.pointer(pointer)?.as_array());
    let words = refs.into_iter().flatten().map(|target| {
        let kind = text(target, "kind");
        let kind = if kind.is_empty() { "Gateway".to_owned() } else { kind };
        match (text(target, "name"), target.pointer("/selector/matchLabels")) {
            (name, _) if !name.is_empty() => format!("{kind}/{name}"),
            (_, Some(Value::Object(labels))) => {
                let pairs: Vec<String> = labels
                    .iter()
                    .map(|(k, v)| format!("{k}={}", v.as_str().unwrap_or_default()))
                    .collect();
                format!("{kind}/{}", pairs.join(","))
            }
            _ => kind,
        }
    });
    let words: Vec<String> = words.collect();
    match (
        words.is_empty(),
        object.pointer("/spec/service").and_then(Value::as_str),
    ) {
        (true, Some(service)) => format!("Service/{service}"),
        _ => words.join(" "),
    }
}

/// `policy get`.
pub async fn get(args: &crate::get::GetArgs, cluster: Cluster) -> Result<(), Failure> {
    let (kind, name) = kind_and_name(args.what.as_deref(), args.name.as_deref())?;
    let kinds: Vec<Kind> = match kind {
        Some(kind) => vec![kind],
        None => Kind::ALL.into_iter().filter(|kind| kind.is_policy()).collect(),
    };
    let namespace = (!args.all_namespaces).then_some(cluster.namespace.as_str());
    let mut items = Vec::new();
    for kind in kinds {
        let (version, found) = list(&cluster, kind, namespace).await?.unwrap_or_default();
        for object in found {
            if name.is_empty() || object.metadata.name.as_deref() == Some(&name) {
                let created = unix(&object.metadata.creation_timestamp);
                items.push((created, plain(object, kind, &version)?));
            }
        }
    }
    if !name.is_empty() && items.is_empty() {
        let kind = kind.map_or("document", |kind| kind.as_str());
        return Err(Failure::refused(format!(
            "{kind} {}/{name} is not there",
            cluster.namespace
        )));
    }
    match args.output {
        Format::Table if items.is_empty() => {
            eprintln!(
                "no documents in {}",
                namespace.map_or("any namespace".to_owned(), |n| format!("namespace {n}"))
            );
        }
        Format::Table => {
            let now = SystemTime::now();
            let mut table = Table::new(&[
                "KIND",
                "NAMESPACE",
                "NAME",
                "TARGET",
                "ACCEPTED",
                "PROGRAMMED",
                "CREATED",
            ]);
            for (created, item) in &items {
                let text = |pointer: &str| {
                    item.pointer(pointer)
                        .and_then(Value::as_str)
                        .unwrap_or_default()
                        .to_owned()
                };
                table.row([
                    text("/kind"),
                    text("/metadata/namespace"),
                    text("/metadata/name"),
                    target(item),
                    summary(item, "Accepted"),
                    summary(item, "Programmed"),
                    when(*created, now),
                ]);
            }
            print(&table.to_string());
        }
        Format::Yaml => {
            let mut text = String::new();
            for (place, (_, item)) in items.iter().enumerate() {
                text += if place > 0 { "---\n" } else { "" };
                text += &mesh_api::yaml::to_string(item).map_err(|e| Failure::refused(e.to_string()))?;
            }
            print(&text);
        }
        Format::Json => {
            let items: Vec<Value> = items.into_iter().map(|(_, item)| item).collect();
            print_value(
                &serde_json::json!({"apiVersion": "v1", "kind": "List", "items": items}),
                Format::Json,
            )?;
        }
    }
    Ok(())
}

/// `policy delete`.
pub async fn delete(args: &DeleteArgs, cluster: Cluster) -> Result<(), Failure> {
    let (kind, name) = kind_and_name(args.what.as_deref(), args.name.as_deref())?;
    let mut documents = Vec::new();
    if let Some(kind) = kind {
        if name.is_empty() {
            return Err(Failure::Usage(format!("which {kind}? expected {kind}/NAME")));
        }
        let namespace = if kind.is_namespaced() {
            cluster.namespace.as_str()
        } else {
            ""
        };
        let resource = resource(&cluster, kind)
            .await?
            .ok_or_else(|| Failure::refused(format!("the cluster has no {kind}")))?;
        documents.push(Object {
            source: "the command line".to_owned(),
            value: serde_json::json!({
                "apiVersion": resource.api_version,
                "kind": kind.as_str(),
                "metadata": {"name": name, "namespace": namespace},
            }),
        });
    }
    for source in read_sources(&args.filenames)? {
        documents.extend(objects::read(&source.name, &source.yaml)?);
    }
    let mut objects = Objects::new(cluster);
    // Asked dry at first: a document that is not there stops the others from being deleted.
    let mut missing = Vec::new();
    for object in &mut documents {
        if objects.delete(object, true).await?.is_none() {
            missing.push(format!("{} is not there", object.title()));
        }
    }
    if !missing.is_empty() && !args.ignore_not_found {
        return Err(Failure::Refused(missing));
    }
    let dry_run = args.dry_run.is_some();
    let mut changes = Vec::new();
    for object in &mut documents {
        if let Some(change) = objects.delete(object, dry_run).await? {
            changes.push(line(object, change, None));
        }
    }
    print_report(&Report { dry_run, changes }, args.output)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn condition(kind: &str, status: &str, generation: i64) -> Value {
        json!({"type": kind, "status": status, "observedGeneration": generation, "reason": "R", "message": "m"})
    }

    #[test]
    fn the_controllers_word_holds_for_the_generation_that_it_saw() {
        let policy =
            |conditions: Vec<Value>| json!({"metadata": {"generation": 2}, "status": {"conditions": conditions}});
        let cases = [
            (
                policy(vec![]),
                Word::Pending("the controller has said nothing of it yet".into()),
            ),
            (
                policy(vec![
                    condition("Accepted", "True", 2),
                    condition("Programmed", "True", 2),
                ]),
                Word::Programmed,
            ),
            (
                policy(vec![
                    condition("Accepted", "True", 1),
                    condition("Programmed", "True", 1),
                ]),
                Word::Pending("the controller has said nothing of it yet".into()),
            ),
            (
                policy(vec![condition("Accepted", "False", 2)]),
                Word::Refused("R: m".into()),
            ),
            (
                policy(vec![condition("Programmed", "False", 2)]),
                Word::Pending("R: m".into()),
            ),
        ];
        for (object, expected) in cases {
            assert_eq!(word(&object), expected, "{object}");
        }
    }

    #[test]
    fn a_route_is_programmed_when_every_parent_of_the_mesh_is() {
        let parent = |controller: &str, status: &str| json!({"controllerName": controller, "conditions": [condition("Programmed", status, 1)]});
        let route = |parents: Vec<Value>| json!({"metadata": {"generation": 1}, "status": {"parents": parents}});
        let ours = CONTROLLER_NAME;
        assert_eq!(
            word(&route(vec![parent(ours, "True"), parent("other", "False")])),
            Word::Programmed
        );
        assert_ne!(
            word(&route(vec![parent(ours, "True"), parent(ours, "False")])),
            Word::Programmed
        );
        assert_ne!(word(&route(vec![parent("other", "True")])), Word::Programmed);
        assert_eq!(
            summary(&route(vec![parent(ours, "True"), parent(ours, "False")]), "Programmed"),
            "False"
        );
    }

    #[test]
    fn kinds_have_their_plurals() {
        let plural = |kind: &str| own_resource(Kind::find(kind).unwrap()).plural;
        assert_eq!(plural("AccessPolicy"), "accesspolicies");
        assert_eq!(plural("HTTPRoute"), "httproutes");
        assert_eq!(plural("EndpointSlice"), "endpointslices");
    }

    #[test]
    fn targets_are_told_in_one_cell() {
        let spec = json!({"spec": {"targetRefs": [
            {"kind": "Service", "name": "cart"}, {"kind": "Pod", "selector": {"matchLabels": {"app": "x"}}}, {"kind": "Mesh"},
        ]}});
        assert_eq!(target(&spec), "Service/cart Pod/app=x Mesh");
        assert_eq!(target(&json!({"spec": {"service": "cart"}})), "Service/cart");
    }
}
