//! What a policy is attached to.

use std::collections::BTreeMap;

use serde::{Serialize, Serializer, ser::SerializeMap};

use super::GROUP;

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
