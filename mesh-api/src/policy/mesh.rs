//! MeshPolicy: how the mesh itself behaves for a set of workloads.

use std::{collections::BTreeMap, fmt};

use serde::Serialize;

use super::{
    TargetRef,
    target::{Targets, target_refs},
};
use crate::read::{Decode, Field, deserialize_by_decoding, quoted};

/// The most ports with a mode of their own in one policy.
const PORTS_MAX: usize = 64;

/// `spec` of a MeshPolicy. The most specific target wins, field by field.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(extend("x-kubernetes-validations" = super::schema::rule("has(self.mtls) || has(self.sameNode)", "says nothing: expected mtls, sameNode or both"))))]
#[serde(rename_all = "camelCase")]
pub struct MeshPolicy {
    /// What it is attached to, at least one.
    #[cfg_attr(
        feature = "schema",
        schemars(length(min = 1, max = 16), with = "Vec<super::schema::Target<true>>")
    )]
    pub target_refs: Vec<TargetRef>,
    /// Mutual TLS of the targets as destinations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtls: Option<MtlsSettings>,
    /// How connections from the targets' own nodes reach them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub same_node: Option<SameNode>,
}

/// `mtls` of a MeshPolicy: at least one of its fields is set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(extend("x-kubernetes-validations" = super::schema::rule("has(self.mode) || (has(self.ports) && size(self.ports) > 0)", "says nothing: expected mode, ports or both"))))]
#[serde(rename_all = "camelCase")]
pub struct MtlsSettings {
    /// The mode of every port; `None`: what a less specific policy says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<MtlsMode>,
    /// Other modes for single ports of the workload (the pod's ports, not the service's).
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[cfg_attr(feature = "schema", schemars(with = "std::collections::BTreeMap<String, MtlsMode>", extend("maxProperties" = 64, "x-kubernetes-validations" = super::schema::rule("self.all(p, p.matches('^[1-9][0-9]{0,4}$') && int(p) <= 65535)", "a key is no port: expected a number from 1 to 65535"))))]
    pub ports: BTreeMap<u16, MtlsMode>,
}

/// Whether a destination takes plaintext.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
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

/// How a connection between two workloads of one node reaches its destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum SameNode {
    /// Through the node's agent. This holds where no MeshPolicy says anything.
    #[default]
    Agent,
    /// Without the agent, by a decision of the kernel, where nothing but who may speak to whom is to be decided.
    Direct,
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

impl Decode for MeshPolicy {
    fn decode(field: &Field) -> Option<MeshPolicy> {
        let mut fields = field.fields()?;
        fields.later(&["outbound", "failMode", "telemetry"]);
        let target_refs = target_refs(
            &mut fields,
            &Targets {
                workloads: true,
                anywhere: true,
            },
        );
        let mtls = fields.read("mtls", MtlsSettings::decode);
        let same_node = fields.read("sameNode", |f| f.choice(&SAME_NODE, &[]));
        fields.finish();
        let policy = MeshPolicy {
            target_refs: target_refs?,
            mtls: mtls?,
            same_node: same_node?,
        };
        if policy.mtls.is_none() && policy.same_node.is_none() {
            field.refuse("says nothing", "mtls, sameNode or both");
            return None;
        }
        Some(policy)
    }
}

const SAME_NODE: [(&str, SameNode); 2] = [("agent", SameNode::Agent), ("direct", SameNode::Direct)];

const MODES: [(&str, MtlsMode); 3] = [
    ("strict", MtlsMode::Strict),
    ("permissive", MtlsMode::Permissive),
    ("off", MtlsMode::Off),
];

impl Decode for MtlsSettings {
    fn decode(field: &Field) -> Option<MtlsSettings> {
        let mut fields = field.fields()?;
        let mode = fields.read("mode", |f| f.choice(&MODES, &[]));
        let ports = fields.read("ports", port_modes);
        fields.finish();
        let settings = MtlsSettings {
            mode: mode?,
            ports: ports?.unwrap_or_default(),
        };
        if settings.mode.is_none() && settings.ports.is_empty() {
            field.refuse("says nothing", "mode, ports or both");
            return None;
        }
        Some(settings)
    }
}

/// `{"8080": permissive}`.
fn port_modes(field: &Field) -> Option<BTreeMap<u16, MtlsMode>> {
    let entries = field.entries()?;
    if entries.len() > PORTS_MAX {
        field.refuse(format!("has {} ports", entries.len()), format!("at most {PORTS_MAX}"));
        return None;
    }
    let read = |(key, value): &(&str, Field)| {
        let mode = value.choice(&MODES, &[]);
        let port = key.parse::<u16>().ok().filter(|port| *port > 0);
        if port.is_none() {
            value.refuse(format!("{} is no port", quoted(key)), "a number from 1 to 65535");
        }
        Some((port?, mode?))
    };
    let pairs: Vec<Option<(u16, MtlsMode)>> = entries.iter().map(read).collect();
    pairs.into_iter().collect()
}

deserialize_by_decoding!(MeshPolicy);
