//! What a policy is attached to.

use std::collections::BTreeMap;

use serde::{Serialize, Serializer, ser::SerializeMap};

use super::{GROUP, ROOT_NAMESPACE, check};
use crate::read::{Field, Fields, quoted};

/// One of a policy's `targetRefs`. From the most to the least specific: [`TargetRef::Workloads`] and
/// [`TargetRef::Service`] with a port, without one, [`TargetRef::Namespace`], [`TargetRef::Mesh`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TargetRef {
    /// `{group: nodemesh.io, kind: Mesh}`: everything.
    Mesh,
    /// `{kind: Namespace, name: shop}`: every workload and service of a namespace.
    Namespace {
        /// The namespace's name.
        name: String,
    },
    /// `{kind: Service, name: cart, sectionName: http}`: a service and the pods that serve it.
    Service {
        /// The service's namespace.
        namespace: String,
        /// The service's name.
        name: String,
        /// `sectionName`: one of the service's ports only, by name or number.
        port: Option<PortRef>,
    },
    /// `{kind: Pod, selector: {matchLabels: {app: cart}}}`: the workloads with these labels.
    Workloads {
        /// The workloads' namespace.
        namespace: String,
        /// Labels that a workload must have, at least one.
        labels: BTreeMap<String, String>,
        /// `sectionName`: one of the workload's own ports only, by name or number.
        port: Option<PortRef>,
    },
}

/// A port by name or number.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PortRef {
    /// By number.
    Number(u16),
    /// By name.
    Name(String),
}

impl PortRef {
    /// Whether the port with this name and number is meant.
    pub fn is(&self, name: &str, number: u16) -> bool {
        match self {
            PortRef::Number(wanted) => *wanted == number,
            PortRef::Name(wanted) => wanted == name,
        }
    }
}

impl std::fmt::Display for PortRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            PortRef::Number(number) => write!(f, "{number}"),
            PortRef::Name(name) => f.write_str(name),
        }
    }
}

impl TargetRef {
    /// The port that it is narrowed to.
    pub fn port(&self) -> Option<&PortRef> {
        match self {
            TargetRef::Mesh | TargetRef::Namespace { .. } => None,
            TargetRef::Service { port, .. } | TargetRef::Workloads { port, .. } => port.as_ref(),
        }
    }
}

impl Serialize for TargetRef {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Selector<'a> {
            match_labels: &'a BTreeMap<String, String>,
        }
        let mut map = serializer.serialize_map(None)?;
        match self {
            TargetRef::Mesh => {
                map.serialize_entry("group", GROUP)?;
                map.serialize_entry("kind", "Mesh")?;
            }
            TargetRef::Namespace { name } => {
                map.serialize_entry("kind", "Namespace")?;
                map.serialize_entry("name", name)?;
            }
            TargetRef::Service { namespace, name, .. } => {
                map.serialize_entry("kind", "Service")?;
                map.serialize_entry("namespace", namespace)?;
                map.serialize_entry("name", name)?;
            }
            TargetRef::Workloads { namespace, labels, .. } => {
                map.serialize_entry("kind", "Pod")?;
                map.serialize_entry("namespace", namespace)?;
                map.serialize_entry("selector", &Selector { match_labels: labels })?;
            }
        }
        if let Some(port) = self.port() {
            map.serialize_entry("sectionName", &port.to_string())?;
        }
        map.end()
    }
}

/// The most `targetRefs` of one policy.
const TARGETS_MAX: usize = 16;

/// What a kind of policy may be attached to.
pub(crate) struct Targets {
    /// Pods by labels.
    pub(crate) workloads: bool,
    /// Whether the kind belongs to whoever runs the mesh, and so may name any namespace from anywhere.
    pub(crate) anywhere: bool,
}

/// Reads `targetRefs`, at least one.
pub(crate) fn target_refs(fields: &mut Fields, allowed: &Targets) -> Option<Vec<TargetRef>> {
    let field = fields.need("targetRefs", "at least one target")?;
    let items = field.items(TARGETS_MAX)?;
    if items.is_empty() {
        field.refuse("is empty", "at least one target");
        return None;
    }
    let targets: Vec<Option<TargetRef>> = items.iter().map(|item| target_ref(item, allowed)).collect();
    for (index, item) in items.iter().enumerate() {
        let this = targets.get(index).and_then(Option::as_ref);
        let before = targets.iter().take(index).flatten();
        if let Some(this) = this
            && before.into_iter().any(|other| other == this)
        {
            item.refuse("the target is there twice", "each target once");
        }
    }
    targets.into_iter().collect()
}

/// The `targetRefs` of a guard of which nothing else is read. `anywhere`: as in [`Targets`].
pub(crate) fn guard_targets(fields: &mut Fields, anywhere: bool) -> Option<Vec<TargetRef>> {
    let allowed = Targets {
        workloads: true,
        anywhere,
    };
    target_refs(fields, &allowed)
}

#[derive(Clone, Copy)]
enum TargetKind {
    Mesh,
    Namespace,
    Service,
    Pod,
}

fn target_ref(field: &Field, allowed: &Targets) -> Option<TargetRef> {
    let mut fields = field.fields()?;
    let mut kinds = vec![
        ("Mesh", TargetKind::Mesh),
        ("Namespace", TargetKind::Namespace),
        ("Service", TargetKind::Service),
    ];
    if allowed.workloads {
        kinds.push(("Pod", TargetKind::Pod));
    }
    let kind = fields
        .need("kind", "Mesh, Namespace, Service or Pod")
        .and_then(|f| f.choice(&kinds, &["ServiceSubset"]));
    let group = fields.get("group");
    let Some(kind) = kind else {
        for name in ["name", "namespace", "sectionName", "selector"] {
            fields.get(name);
        }
        fields.finish();
        return None;
    };
    let group_good = group.is_none_or(|group| right_group(&group, kind));
    let place = matches!(kind, TargetKind::Service | TargetKind::Pod)
        .then(|| namespace_of(&mut fields, allowed))
        .unwrap_or(Some(String::new()));
    let target = match kind {
        TargetKind::Mesh => mesh_target(&mut fields, allowed),
        TargetKind::Namespace => namespace_target(&mut fields, allowed),
        TargetKind::Service => {
            let name = fields
                .need("name", "the name of a Service")
                .and_then(|f| check::dns_label(&f));
            let port = fields.read("sectionName", section);
            (|| {
                Some(TargetRef::Service {
                    namespace: place?,
                    name: name?,
                    port: port?,
                })
            })()
        }
        TargetKind::Pod => {
            let labels = fields
                .need("selector", "matchLabels with at least one label")
                .and_then(|f| selector(&f));
            let port = fields.read("sectionName", section);
            (|| {
                Some(TargetRef::Workloads {
                    namespace: place?,
                    labels: labels?,
                    port: port?,
                })
            })()
        }
    };
    fields.finish();
    target.filter(|_| group_good)
}

fn right_group(group: &Field, kind: TargetKind) -> bool {
    let Some(text) = group.text() else { return false };
    let (good, expected) = match kind {
        TargetKind::Mesh => (text == GROUP, "nodemesh.io"),
        _ => (text.is_empty() || text == "core", "\"\", the core group"),
    };
    if !good {
        group.refuse(format!("{} is not the kind's group", quoted(text)), expected);
    }
    good
}

fn mesh_target(fields: &mut Fields, allowed: &Targets) -> Option<TargetRef> {
    let named = fields.read("name", |f| f.choice(&[("default", ()), ("mesh", ())], &[]));
    let whole = fields.whole();
    match whole.namespace() {
        Some(namespace) if namespace != ROOT_NAMESPACE && !allowed.anywhere => {
            let message = format!("a policy in namespace {namespace} cannot target the whole mesh");
            whole.refuse(message, format!("the policy in namespace {ROOT_NAMESPACE}"));
            None
        }
        _ => named.map(|_| TargetRef::Mesh),
    }
}

fn namespace_target(fields: &mut Fields, allowed: &Targets) -> Option<TargetRef> {
    let field = fields.need("name", "the name of a namespace")?;
    let name = check::dns_label(&field)?;
    own_namespace(&field, &name, allowed).then_some(TargetRef::Namespace { name })
}

/// Whether the document may say something of that namespace.
fn own_namespace(field: &Field, wanted: &str, allowed: &Targets) -> bool {
    match field.namespace() {
        Some(own) if own != wanted && own != ROOT_NAMESPACE && !allowed.anywhere => {
            let message = format!("a policy in namespace {own} cannot target namespace {wanted}");
            field.refuse(
                message,
                format!("{own}, or the policy in namespace {wanted} or {ROOT_NAMESPACE}"),
            );
            false
        }
        _ => true,
    }
}

/// The namespace of a Service or Pod target: its own, else the document's.
fn namespace_of(fields: &mut Fields, allowed: &Targets) -> Option<String> {
    match fields.get("namespace") {
        Some(field) => {
            let name = check::dns_label(&field)?;
            own_namespace(&field, &name, allowed).then_some(name)
        }
        None => Some(fields.whole().namespace().unwrap_or("default").to_owned()),
    }
}

fn section(field: &Field) -> Option<PortRef> {
    let name = check::dns_label(field)?;
    match name.parse::<u16>() {
        Ok(0) => {
            field.refuse("0 is no port", "a port's name, or its number from 1 to 65535");
            None
        }
        Ok(number) => Some(PortRef::Number(number)),
        Err(_) if name.bytes().all(|b| b.is_ascii_digit()) => {
            field.refuse(
                format!("{name} is no port"),
                "a port's name, or its number from 1 to 65535",
            );
            None
        }
        Err(_) => Some(PortRef::Name(name)),
    }
}

fn selector(field: &Field) -> Option<BTreeMap<String, String>> {
    let mut fields = field.fields()?;
    fields.later(&["matchExpressions"]);
    let labels = fields
        .need("matchLabels", "at least one label")
        .and_then(|f| check::some_labels(&f));
    fields.finish();
    labels
}
