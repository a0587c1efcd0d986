//! ReferenceGrant of the Gateway API: leave for routes of other namespaces to name what lies in this one.

use serde::Serialize;

use super::{BackendKind, GATEWAY_GROUP, check};
use crate::read::{Decode, Field, deserialize_by_decoding};

/// The most entries of `from` and `to`, as the Gateway API has them.
const ENTRIES_MAX: usize = 16;

/// `spec` of a ReferenceGrant. It lies in the namespace of what is named.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ReferenceGrant {
    /// Who may name; any of them.
    pub from: Vec<GrantFrom>,
    /// What may be named; any of them.
    pub to: Vec<GrantTo>,
}

/// Documents of one kind in one namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct GrantFrom {
    /// The API group.
    pub group: String,
    /// The kind.
    pub kind: String,
    /// The namespace.
    pub namespace: String,
}

/// Documents of one kind, or one of them, in the grant's namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct GrantTo {
    /// The API group.
    pub group: String,
    /// The kind.
    pub kind: String,
    /// The name; `None`: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

impl ReferenceGrant {
    /// Whether a route of that kind and namespace may name a Service or ServiceSubset of this name in the grant's
    /// namespace.
    pub fn permits(&self, route_kind: &str, namespace: &str, backend: &BackendKind, name: &str) -> bool {
        let from =
            |from: &GrantFrom| from.group == GATEWAY_GROUP && from.kind == route_kind && from.namespace == namespace;
        let to = |to: &GrantTo| {
            to.group == backend.group()
                && to.kind == backend.as_str()
                && to.name.as_deref().is_none_or(|wanted| wanted == name)
        };
        self.from.iter().any(from) && self.to.iter().any(to)
    }
}

impl Decode for ReferenceGrant {
    fn decode(field: &Field) -> Option<ReferenceGrant> {
        let mut fields = field.fields()?;
        let from = fields.need("from", "at least one source").and_then(|f| {
            f.list(ENTRIES_MAX, |f| {
                let mut fields = f.fields()?;
                let group = fields.need("group", "an API group").and_then(|f| group(&f));
                let kind = fields.need("kind", "a kind").and_then(|f| f.word());
                let namespace = fields
                    .need("namespace", "a namespace")
                    .and_then(|f| check::dns_label(&f));
                fields.finish();
                Some(GrantFrom {
                    group: group?,
                    kind: kind?.to_owned(),
                    namespace: namespace?,
                })
            })
        });
        let to = fields.need("to", "at least one kind").and_then(|f| {
            f.list(ENTRIES_MAX, |f| {
                let mut fields = f.fields()?;
                let group = fields
                    .need("group", "an API group, \"\" for a Service")
                    .and_then(|f| group(&f));
                let kind = fields.need("kind", "a kind").and_then(|f| f.word());
                let name = fields.read("name", |f| f.word().map(str::to_owned));
                fields.finish();
                Some(GrantTo {
                    group: group?,
                    kind: kind?.to_owned(),
                    name: name?,
                })
            })
        });
        fields.finish();
        Some(ReferenceGrant { from: from?, to: to? })
    }
}

deserialize_by_decoding!(ReferenceGrant);

/// The core group is written as nothing, here and there as `core`.
fn group(field: &Field) -> Option<String> {
    let text = field.text()?;
    Some(if text == "core" { "" } else { text }.to_owned())
}
