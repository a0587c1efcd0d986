//! MeshPolicy: how the mesh itself behaves for a set of workloads.

use std::{collections::BTreeMap, fmt};

use serde::Serialize;

use super::TargetRef;

/// `spec` of a MeshPolicy. The most specific target wins, field by field.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MeshPolicy {
    /// What it is attached to, at least one.
    pub target_refs: Vec<TargetRef>,
    /// Mutual TLS of the targets as destinations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtls: Option<MtlsSettings>,
}

/// `mtls` of a MeshPolicy: at least one of its fields is set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MtlsSettings {
    /// The mode of every port; `None`: what a less specific policy says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<MtlsMode>,
    /// Other modes for single ports of the workload (the pod's ports, not the service's).
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub ports: BTreeMap<u16, MtlsMode>,
}

/// Whether a destination takes plaintext.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum MtlsMode {
    /// Plaintext is refused.
    Strict,
    /// Plaintext is taken, judged as unauthenticated; between workloads of the mesh it is still mutual TLS.
    /// This holds where no MeshPolicy says anything.
    #[default]
    Permissive,
    /// No TLS of ours to this destination.
    Off,
}

impl MtlsMode {
    /// The word used in documents.
    pub const fn as_str(self) -> &'static str {
        match self {
            MtlsMode::Strict => "strict",
            MtlsMode::Permissive => "permissive",
            MtlsMode::Off => "off",
        }
    }
}

impl fmt::Display for MtlsMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
