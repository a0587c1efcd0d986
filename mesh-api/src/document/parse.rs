//! From text to documents.

use std::{collections::BTreeMap, sync::Arc};

use super::{
    DEFAULT_NAMESPACE, Document, DocumentKey, Kind, Meta, Object, Problem, Unreadable, core_reader, timestamp,
};
use crate::{
    policy::check,
    read::{Decode, Field, Fields, Log, Node, Tree, load, one_of, quoted},
};

/// Kinds that the design names and this version does not read.
const KINDS_LATER: [&str; 4] = ["Authentication", "Fault", "ExternalService", "ExternalWorkload"];

/// The most bytes that one object's annotations may have together, as in Kubernetes.
const ANNOTATIONS_BYTES_MAX: usize = 256 << 10;

/// The prefix of labels and annotations that the mesh gives a meaning.
const OWN_PREFIX: &str = "nodemesh.io/";
/// Labels of a Node that are kept.
pub(super) const ZONE_LABEL: &str = "topology.kubernetes.io/zone";
/// The label that names an EndpointSlice's service.
pub(super) const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// Where a document comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// People wrote it: what they wrote is kept, and every doubt is a problem.
    Text,
    /// An API server has it and changes it all the time: only what decisions look at is kept, so that other changes
    /// make no difference.
    Cluster,
}

/// Reads a file of YAML (or JSON) documents; `source` is its name in problems. All problems at once, never a panic.
///
/// Empty documents are skipped, a `v1` List stands for its items. A key that two documents of the source share is a
/// problem. Either every document is good, or none is handed out.
pub fn parse(source: &str, yaml: &str) -> Result<Vec<Document>, Vec<Problem>> {
    let log = Log::new(source);
    let nodes = load(&log, yaml);
    let mut documents = Vec::new();
    let mut seen = BTreeMap::new();
    for node in &nodes {
        let root = Field::root(&log, node, None);
        for field in items_of_list(&root) {
            let Some(document) = document(&field, Origin::Text) else {
                continue;
            };
            let line = field.node().line;
            if let Some(first) = seen.insert(document.key(), line) {
                let message = format!("{} is there twice, first on line {first}", document.key());
                field.refuse(message, "each document once");
            }
            documents.push(document);
        }
    }
    if log.len() == 0 {
        Ok(documents)
    } else {
        Err(log.into_problems())
    }
}

/// Reads an object of an API server; `source` is its name in problems.
///
/// Kubernetes' own kinds are read tolerantly and only for what decisions look at: two versions of an object that differ
/// in nothing of it are equal documents. Our kinds and routes are read as strictly as [`parse`] reads them.
pub fn from_json(source: &str, object: &serde_json::Value) -> Result<Document, Vec<Problem>> {
    let log = Log::new(source);
    let node = Node::from_json(object);
    let document = document(&Field::root(&log, &node, None), Origin::Cluster);
    match document {
        Some(document) if log.len() == 0 => Ok(document),
        _ => Err(log.into_problems()),
    }
}

/// As [`from_json`], for an object of a known kind (items of a list name none) that is there whether it can be read or
/// not: a policy, route or subset that cannot be read becomes a [`Document::Unreadable`], which holds what `last`, the
/// document of that key so far, said. An error only remains for an object without a good name, and for Kubernetes' own
/// kinds.
pub fn read_object(kind: Kind, object: &serde_json::Value, last: Option<&Document>) -> Result<Document, Vec<Problem>> {
    let at = |key: &str| object.get("metadata").and_then(|m| m.get(key)).and_then(|v| v.as_str());
    let source = match at("namespace") {
        Some(namespace) => format!("{kind} {namespace}/{}", at("name").unwrap_or_default()),
        None => format!("{kind} {}", at("name").unwrap_or_default()),
    };
    let log = Log::new(&source);
    let node = Node::from_json(object);
    let root = Field::root(&log, &node, None);
    let read = |log_len: usize| (log.len() == log_len).then_some(());
    let document = root.fields().and_then(|mut fields| {
        fields.get("apiVersion");
        fields.get("kind");
        document_of(kind, fields, &root, Origin::Cluster)
    });
    if let (Some(document), Some(())) = (document, read(0)) {
        return Ok(document);
    }
    let quiet = Log::new(&source);
    let root = Field::root(&quiet, &node, None);
    let meta = root
        .fields()
        .and_then(|mut fields| fields.get("metadata"))
        .and_then(|f| metadata(&f, kind, Origin::Cluster));
    match meta {
        Some(meta) if kind.is_policy() => {
            let namespace = meta.namespace.clone();
            let spec = Unreadable::new(kind, &namespace, object.get("spec"), log.into_problems(), last);
            Ok(Document::Unreadable(Object { meta, spec, raw: None }))
        }
        _ => Err(log.into_problems()),
    }
}

/// A guard that a peer says cannot be read: it denies at its targets.
pub(crate) fn unreadable_from_json(kind: Kind, meta: Meta, spec: &serde_json::Value) -> Document {
    let spec = Unreadable::from_peer(kind, &meta.namespace, spec);
    Document::Unreadable(Object { meta, spec, raw: None })
}

/// A policy, route or subset that somebody else could not read, for this reason: what holds for it is what
/// [`Document::holding`] says, whether this version could read it or not. `None` for a kind that is none of these.
pub fn unreadable(key: &DocumentKey, object: &serde_json::Value, why: &str) -> Option<Document> {
    if !key.kind.is_policy() {
        return None;
    }
    let problem = Problem {
        source: key.to_string(),
        line: None,
        path: String::new(),
        message: why.to_owned(),
        expected: String::new(),
    };
    let spec = Unreadable::new(key.kind, &key.namespace, object.get("spec"), vec![problem], None);
    let meta = Meta {
        namespace: key.namespace.clone(),
        name: key.name.clone(),
        ..Meta::default()
    };
    Some(Document::Unreadable(Object { meta, spec, raw: None }))
}

/// A policy, route or subset from its normalized spec, validated again: what a peer sends is not trusted.
pub fn policy_from_json(kind: Kind, meta: Meta, spec: &serde_json::Value) -> Result<Document, Vec<Problem>> {
    let source = format!("{kind} {}/{}", meta.namespace, meta.name);
    let log = Log::new(&source);
    let node = Node::from_json(spec);
    let namespace = meta.namespace.clone();
    let field = Field::root(&log, &node, Some(&namespace)).at("spec");
    let document = policy(kind, meta, &field);
    if document.is_none() && log.len() == 0 {
        field.refuse(format!("{kind} is no policy"), "a policy, route or subset");
    }
    match document {
        Some(document) if log.len() == 0 => Ok(document),
        _ => Err(log.into_problems()),
    }
}

/// The items of a `v1` List, or the document itself; nothing for an empty document.
fn items_of_list<'a>(root: &Field<'a>) -> Vec<Field<'a>> {
    let Tree::Map(entries) = &root.node().tree else {
        return if root.node().tree == Tree::Null {
            Vec::new()
        } else {
            vec![root.clone()]
        };
    };
    let is = |key: &str, text: &str| {
        entries
            .iter()
            .any(|e| e.key == key && matches!(&e.value.tree, Tree::Text(value) if value == text))
    };
    if !(is("kind", "List") && is("apiVersion", "v1")) {
        return vec![root.clone()];
    }
    let Some(mut fields) = root.fields() else {
        return Vec::new();
    };
    fields
        .get("items")
        .and_then(|items| items.items(crate::read::DOCUMENTS_PER_SOURCE_MAX))
        .unwrap_or_default()
}

fn document(field: &Field, origin: Origin) -> Option<Document> {
    let mut fields = field.fields()?;
    let api_version = fields
        .need("apiVersion", "the version of the kind")
        .and_then(|f| f.word().map(|text| (f, text)));
    let kind = fields
        .need("kind", "a kind of document")
        .and_then(|f| f.word().map(|text| (f, text)));
    let ((version_field, version), (kind_field, kind)) = (api_version?, kind?);
    let kind = known_kind(&version_field, version, &kind_field, kind)?;
    document_of(kind, fields, field, origin)
}

fn document_of(kind: Kind, mut fields: Fields, whole: &Field, origin: Origin) -> Option<Document> {
    let meta = fields
        .need("metadata", "name, and namespace where the kind has one")
        .and_then(|f| metadata(&f, kind, origin));
    if kind.is_policy() {
        // `status` is written by controllers and comes along when a document is copied out of a cluster.
        fields.get("status");
        let spec = fields.need("spec", "what the document says");
        fields.finish();
        // Without a good namespace the spec is read all the same, so that its problems are reported with the others.
        let namespace = meta.as_ref().map(|meta| meta.namespace.clone());
        let spec = spec?;
        let spec = spec.within(namespace.as_deref());
        return policy(kind, meta.clone().unwrap_or_default(), &spec).filter(|_| meta.is_some());
    }
    core_document(kind, meta, &mut fields, whole, origin)
}

fn known_kind(version_field: &Field, version: &str, kind_field: &Field, kind: &str) -> Option<Kind> {
    if let Some(found) = Kind::of(version, kind) {
        return Some(found);
    }
    match Kind::ALL.into_iter().find(|known| known.as_str() == kind) {
        Some(known) => {
            version_field.refuse(
                format!("{} is not a version of {kind}", quoted(version)),
                known.api_version(),
            );
        }
        None if KINDS_LATER.contains(&kind) => kind_field.refuse_later(kind, "another kind"),
        None => {
            let known: Vec<&str> = Kind::ALL.into_iter().map(Kind::as_str).collect();
            kind_field.refuse(
                format!("{} is no kind that the mesh reads", quoted(kind)),
                one_of(&known),
            );
        }
    }
    None
}

fn metadata(field: &Field, kind: Kind, origin: Origin) -> Option<Meta> {
    let mut fields = field.fields()?;
    let name = fields.need("name", "a name").and_then(|f| name_of(&f, kind));
    let namespace = match fields.get("namespace") {
        None if kind.is_namespaced() => Some(DEFAULT_NAMESPACE.to_owned()),
        None => Some(String::new()),
        Some(field) if kind.is_namespaced() => check::dns_label(&field),
        Some(field) => {
            field.refuse(format!("a {kind} is in no namespace"), "no such field");
            None
        }
    };
    let labels = fields.read("labels", check::labels);
    let annotations = fields.read("annotations", annotations);
    let generation = fields.read("generation", |f| f.integer(0..=u64::MAX));
    let created = fields.read("creationTimestamp", |f| {
        let text = f.text()?;
        let unix = timestamp::parse(text);
        if unix.is_none() {
            f.refuse(
                format!("{} is no time", quoted(text)),
                "a time such as 2026-01-31T12:00:00Z",
            );
        }
        unix
    });
    let uid = fields.read("uid", Field::text);
    // The rest of the metadata (resourceVersion, managedFields, …) is the API server's.
    let meta = Meta {
        name: name?.into(),
        namespace: namespace?.into(),
        labels: labels?.unwrap_or_default(),
        annotations: annotations?.unwrap_or_default(),
        uid: uid?.unwrap_or_default().into(),
        generation: generation?.unwrap_or(0),
        created_unix: created?.unwrap_or(0),
    };
    Some(match origin {
        Origin::Text => meta,
        Origin::Cluster => lean(meta, kind),
    })
}

/// What decisions, statuses and their order look at.
fn lean(mut meta: Meta, kind: Kind) -> Meta {
    meta.annotations.retain(|key, _| key.starts_with(OWN_PREFIX));
    match kind {
        Kind::Pod => {}
        Kind::Node => meta.labels.retain(|key, _| key == ZONE_LABEL),
        Kind::EndpointSlice => meta.labels.retain(|key, _| key == SERVICE_NAME_LABEL),
        _ => meta.labels.retain(|key, _| key.starts_with(OWN_PREFIX)),
    }
    if !kind.is_policy() {
        meta.generation = 0;
        meta.created_unix = 0;
        if kind != Kind::Pod {
            meta.uid = Arc::default();
        }
    }
    meta
}

fn name_of(field: &Field, kind: Kind) -> Option<String> {
    match kind {
        Kind::Namespace | Kind::Service => check::dns_label(field),
        _ => check::dns_name(field),
    }
}

fn annotations(field: &Field) -> Option<BTreeMap<String, String>> {
    let entries = field.entries()?;
    let read = |(key, value): &(&str, Field)| Some(((*key).to_owned(), value.text()?.to_owned()));
    let pairs: Vec<Option<(String, String)>> = entries.iter().map(read).collect();
    let pairs: BTreeMap<String, String> = pairs.into_iter().collect::<Option<_>>()?;
    let bytes: usize = pairs.iter().map(|(key, value)| key.len() + value.len()).sum();
    if bytes > ANNOTATIONS_BYTES_MAX {
        field.refuse(format!("has {bytes} bytes"), format!("at most {ANNOTATIONS_BYTES_MAX}"));
        return None;
    }
    Some(pairs)
}

fn policy(kind: Kind, meta: Meta, spec: &Field) -> Option<Document> {
    fn read<T: Decode>(meta: Meta, spec: &Field) -> Option<Object<T>> {
        Some(Object {
            meta,
            spec: T::decode(spec)?,
            raw: None,
        })
    }
    match kind {
        Kind::ReferenceGrant => read(meta, spec).map(Document::ReferenceGrant),
        Kind::HttpRoute => read(meta, spec).map(Document::HttpRoute),
        Kind::GrpcRoute => read(meta, spec).map(Document::GrpcRoute),
        Kind::TcpRoute => read(meta, spec).map(Document::TcpRoute),
        Kind::TlsRoute => read(meta, spec).map(Document::TlsRoute),
        Kind::MeshPolicy => read(meta, spec).map(Document::MeshPolicy),
        Kind::TrafficPolicy => read(meta, spec).map(Document::TrafficPolicy),
        Kind::RateLimit => read(meta, spec).map(Document::RateLimit),
        Kind::AccessPolicy => read(meta, spec).map(Document::AccessPolicy),
        Kind::ServiceSubset => read(meta, spec).map(Document::ServiceSubset),
        Kind::Namespace | Kind::Node | Kind::ServiceAccount | Kind::Pod | Kind::Service | Kind::EndpointSlice => None,
    }
}

fn core_document(
    kind: Kind,
    meta: Option<Meta>,
    fields: &mut Fields,
    whole: &Field,
    origin: Origin,
) -> Option<Document> {
    let raw = || (origin == Origin::Text).then(|| Arc::new(whole.node().to_json()));
    match kind {
        Kind::Namespace | Kind::ServiceAccount => {
            let good = kind != Kind::Namespace || origin == Origin::Cluster || core_reader::enrolment(fields);
            let object = Object {
                meta: meta?,
                spec: (),
                raw: raw(),
            };
            let document = if kind == Kind::Namespace {
                Document::Namespace(object)
            } else {
                Document::ServiceAccount(object)
            };
            good.then_some(document)
        }
        Kind::Node => {
            let spec = core_reader::node(fields);
            Some(Document::Node(Object {
                meta: meta?,
                spec: spec?,
                raw: raw(),
            }))
        }
        Kind::Pod => {
            let spec = core_reader::pod(fields, origin);
            Some(Document::Pod(Object {
                meta: meta?,
                spec: spec?,
                raw: raw(),
            }))
        }
        Kind::Service => {
            let spec = core_reader::service(fields);
            Some(Document::Service(Object {
                meta: meta?,
                spec: spec?,
                raw: raw(),
            }))
        }
        Kind::EndpointSlice => {
            let spec = core_reader::endpoint_slice(fields);
            Some(Document::EndpointSlice(Object {
                meta: meta?,
                spec: spec?,
                raw: raw(),
            }))
        }
        _ => None,
    }
}
