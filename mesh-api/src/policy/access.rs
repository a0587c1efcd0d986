//! AccessPolicy: who may do what at a destination.

use ipnet::IpNet;
use serde::{Serialize, Serializer};

use super::{
    HeaderMatch, PathMatch, TargetRef, check,
    target::{Targets, target_refs},
};
use crate::{
    identity::SpiffeId,
    read::{Decode, Field, deserialize_by_decoding, port},
};

/// The most rules of one policy.
const RULES_MAX: usize = 128;
/// The most clauses in one `from` or `to`.
const CLAUSES_MAX: usize = 32;
/// The most values in one list of a clause.
const VALUES_MAX: usize = 256;

/// `spec` of an AccessPolicy. Deny beats allow; once an Allow policy applies, what no rule allows is denied.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(extend("x-kubernetes-validations" = super::schema::rule("self.action != 'Deny' || (has(self.rules) && size(self.rules) > 0)", "a Deny policy without rules denies nothing: expected at least one rule"))))]
#[serde(rename_all = "camelCase")]
pub struct AccessPolicy {
    /// What it is attached to, at least one.
    #[cfg_attr(
        feature = "schema",
        schemars(length(min = 1, max = 16), with = "Vec<super::schema::Target<true>>")
    )]
    pub target_refs: Vec<TargetRef>,
    /// What a match means.
    pub action: AccessAction,
    /// The rules; any may match. An Allow policy without rules allows nothing; a Deny policy has at least one.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schemars(length(max = 128)))]
    pub rules: Vec<AccessRule>,
}

/// What a matching rule means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum AccessAction {
    /// The match is allowed.
    Allow,
    /// The match is denied, whatever allows it.
    Deny,
}

/// A rule matches when one of `from` (or none is given) and one of `to` (or none is given) match.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct AccessRule {
    /// A name for logs and `explain`; `None`: its index. Unique in its policy.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(schema_with = "super::schema::dns_name"))]
    pub name: Option<String>,
    /// Sources; empty: any.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 32)))]
    pub from: Vec<SourceClause>,
    /// What is asked; empty: anything.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 32)))]
    pub to: Vec<TargetClause>,
}

/// A clause over the source: every field that is not empty must have a value that matches. At least one is not empty.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(extend("x-kubernetes-validations" = super::schema::rule("has(self.identities) || has(self.namespaces) || has(self.cidrs)", "names no source: expected identities, namespaces or cidrs"))))]
#[serde(rename_all = "camelCase")]
pub struct SourceClause {
    /// Proven identities.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 256)))]
    pub identities: Vec<IdentityMatch>,
    /// Namespaces of proven identities.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(
        feature = "schema",
        schemars(length(min = 1, max = 256), with = "Vec<super::schema::Label>")
    )]
    pub namespaces: Vec<String>,
    /// Addresses, whether an identity is proven or not. A single address is a network of its own.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(
        feature = "schema",
        schemars(length(min = 1, max = 256), with = "Vec<super::schema::Network>")
    )]
    pub cidrs: Vec<IpNet>,
}

/// An identity by its whole text, or by a prefix written with a `*` at its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IdentityMatch {
    /// This identity.
    Exact(SpiffeId),
    /// `spiffe://cluster.local/ns/shop/*`: identities that begin so; ends with `/`, has the trust domain whole.
    Prefix(String),
}

impl IdentityMatch {
    /// Whether the identity is meant.
    pub fn matches(&self, identity: &SpiffeId) -> bool {
        match self {
            IdentityMatch::Exact(wanted) => wanted == identity,
            IdentityMatch::Prefix(prefix) => identity.as_str().starts_with(prefix.as_str()),
        }
    }
}

impl std::fmt::Display for IdentityMatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            IdentityMatch::Exact(identity) => write!(f, "{identity}"),
            IdentityMatch::Prefix(prefix) => write!(f, "{prefix}*"),
        }
    }
}

impl Serialize for IdentityMatch {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A clause over what is asked: every field that is not empty must have a value that matches. At least one is not empty.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(extend("x-kubernetes-validations" = super::schema::rule("has(self.ports) || has(self.hosts) || has(self.methods) || has(self.paths) || has(self.headers)", "names nothing: expected ports, hosts, methods, paths or headers"))))]
#[serde(rename_all = "camelCase")]
pub struct TargetClause {
    /// The workload's own ports (not the service's).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(
        feature = "schema",
        schemars(length(min = 1, max = 256), inner(range(min = 1, max = 65535)))
    )]
    pub ports: Vec<u16>,
    /// Hosts of the request's authority, without the port.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 256)))]
    pub hosts: Vec<HostMatch>,
    /// Methods, as sent.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(
        feature = "schema",
        schemars(length(min = 1, max = 256), with = "Vec<super::schema::Method>")
    )]
    pub methods: Vec<String>,
    /// Paths, without the query.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 256)))]
    pub paths: Vec<PathMatch>,
    /// Headers: unlike the other fields, ALL of them must match.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 256)))]
    pub headers: Vec<HeaderMatch>,
}

impl TargetClause {
    /// Whether the clause asks about a request; such a clause never matches an opaque flow.
    pub fn needs_request(&self) -> bool {
        !(self.hosts.is_empty() && self.methods.is_empty() && self.paths.is_empty() && self.headers.is_empty())
    }
}

/// A host, or `*.example.com` for every host below it. Lower case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostMatch {
    /// This host.
    Exact(String),
    /// Hosts that end with this, which begins with a dot.
    Suffix(String),
}

impl HostMatch {
    /// Whether a host (no port) is meant; compared without regard to case.
    pub fn matches(&self, host: &str) -> bool {
        match self {
            HostMatch::Exact(wanted) => wanted.eq_ignore_ascii_case(host),
            HostMatch::Suffix(suffix) => {
                let start = host.len().checked_sub(suffix.len()).filter(|at| *at > 0);
                let end = start.and_then(|at| host.as_bytes().get(at..));
                end.is_some_and(|end| end.eq_ignore_ascii_case(suffix.as_bytes()))
            }
        }
    }
}

impl Serialize for HostMatch {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            HostMatch::Exact(host) => serializer.serialize_str(host),
            HostMatch::Suffix(suffix) => serializer.collect_str(&format_args!("*{suffix}")),
        }
    }
}

impl Decode for AccessPolicy {
    fn decode(field: &Field) -> Option<AccessPolicy> {
        let mut fields = field.fields()?;
        fields.later(&["dryRun"]);
        let target_refs = target_refs(
            &mut fields,
            &Targets {
                workloads: true,
                anywhere: false,
            },
        );
        let action = fields.need("action", "Allow or Deny").and_then(|f| {
            f.choice(
                &[("Allow", AccessAction::Allow), ("Deny", AccessAction::Deny)],
                &["Audit"],
            )
        });
        let rules = fields.read("rules", access_rules);
        fields.finish();
        let policy = AccessPolicy {
            target_refs: target_refs?,
            action: action?,
            rules: rules?.unwrap_or_default(),
        };
        if policy.action == AccessAction::Deny && policy.rules.is_empty() {
            field.refuse("a Deny policy without rules denies nothing", "at least one rule");
            return None;
        }
        Some(policy)
    }
}

fn access_rules(field: &Field) -> Option<Vec<AccessRule>> {
    let items = field.items(RULES_MAX)?;
    let rules: Vec<Option<AccessRule>> = items.iter().map(AccessRule::decode).collect();
    check::unique(
        &items,
        rules.iter().map(|r| r.as_ref().and_then(|r| r.name.as_deref())),
        "name",
    );
    rules.into_iter().collect()
}

impl Decode for AccessRule {
    fn decode(field: &Field) -> Option<AccessRule> {
        let mut fields = field.fields()?;
        fields.later(&["when"]);
        let name = fields.read("name", check::rule_name);
        let from = fields.filled_list("from", CLAUSES_MAX, SourceClause::decode);
        let to = fields.filled_list("to", CLAUSES_MAX, TargetClause::decode);
        fields.finish();
        Some(AccessRule {
            name: name?,
            from: from?,
            to: to?,
        })
    }
}

impl Decode for SourceClause {
    fn decode(field: &Field) -> Option<SourceClause> {
        let mut fields = field.fields()?;
        fields.later(&["jwt", "claims"]);
        let identities = fields.filled_list("identities", VALUES_MAX, check::identity_match);
        let namespaces = fields.filled_list("namespaces", VALUES_MAX, check::dns_label);
        let cidrs = fields.filled_list("cidrs", VALUES_MAX, check::network);
        fields.finish();
        let clause = SourceClause {
            identities: identities?,
            namespaces: namespaces?,
            cidrs: cidrs?,
        };
        if clause == SourceClause::default() {
            field.refuse("names no source", "identities, namespaces or cidrs");
            return None;
        }
        Some(clause)
    }
}

impl Decode for TargetClause {
    fn decode(field: &Field) -> Option<TargetClause> {
        let mut fields = field.fields()?;
        let ports = fields.filled_list("ports", VALUES_MAX, port);
        let hosts = fields.filled_list("hosts", VALUES_MAX, check::host_match);
        let methods = fields.filled_list("methods", VALUES_MAX, check::method);
        let paths = fields.filled_list("paths", VALUES_MAX, PathMatch::decode);
        let headers = fields.filled_list("headers", VALUES_MAX, check::header_match);
        fields.finish();
        let clause = TargetClause {
            ports: ports?,
            hosts: hosts?,
            methods: methods?,
            paths: paths?,
            headers: headers?,
        };
        if clause == TargetClause::default() {
            field.refuse("names nothing", "ports, hosts, methods, paths or headers");
            return None;
        }
        Some(clause)
    }
}

deserialize_by_decoding!(AccessPolicy);
