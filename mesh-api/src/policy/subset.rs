//! ServiceSubset: a Service narrowed by labels, usable as a backendRef.

use std::collections::BTreeMap;

use serde::Serialize;

use super::check;
use crate::read::{Decode, Field, deserialize_by_decoding};

/// `spec` of a ServiceSubset: `{service: cart, labels: {version: v2}}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ServiceSubset {
    /// The Service, in the same namespace.
    #[cfg_attr(feature = "schema", schemars(schema_with = "super::schema::dns_label"))]
    pub service: String,
    /// Labels that an endpoint of the service must have as well, at least one.
    #[cfg_attr(feature = "schema", schemars(schema_with = "super::schema::labels"))]
    pub labels: BTreeMap<String, String>,
}

impl Decode for ServiceSubset {
    fn decode(field: &Field) -> Option<ServiceSubset> {
        let mut fields = field.fields()?;
        let service = fields
            .need("service", "the name of a Service in this namespace")
            .and_then(|f| check::dns_label(&f));
        let labels = fields
            .need("labels", "at least one label")
            .and_then(|f| check::some_labels(&f));
        fields.finish();
        Some(ServiceSubset {
            service: service?,
            labels: labels?,
        })
    }
}

deserialize_by_decoding!(ServiceSubset);
