//! ServiceSubset: a Service narrowed by labels, usable as a backendRef.

use std::collections::BTreeMap;

use serde::Serialize;

/// `spec` of a ServiceSubset: `{service: cart, labels: {version: v2}}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceSubset {
    /// The Service, in the same namespace.
    pub service: String,
    /// Labels that an endpoint of the service must have as well, at least one.
    pub labels: BTreeMap<String, String>,
}
