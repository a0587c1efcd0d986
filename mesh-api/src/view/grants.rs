//! ReferenceGrants: whether a route may name what lies in another namespace.

use std::collections::HashMap;

use crate::{
    document::Kind,
    policy::{BackendKind, ReferenceGrant},
};

/// The grants of each namespace.
#[derive(Default)]
pub(crate) struct Grants<'a> {
    by_namespace: HashMap<&'a str, Vec<&'a ReferenceGrant>>,
}

impl<'a> Grants<'a> {
    /// From the namespace and spec of each grant.
    pub fn new(grants: impl Iterator<Item = (&'a str, &'a ReferenceGrant)>) -> Grants<'a> {
        let mut all = Grants::default();
        for (namespace, grant) in grants {
            all.by_namespace.entry(namespace).or_default().push(grant);
        }
        all
    }

    /// Whether a route of that kind in namespace `from` may send to that Service or ServiceSubset in namespace `to`.
    pub fn permits(&self, route: Kind, from: &str, backend: &BackendKind, to: &str, name: &str) -> bool {
        let granted = |grant: &&ReferenceGrant| grant.permits(route.as_str(), from, backend, name);
        from == to || self.by_namespace.get(to).into_iter().flatten().any(granted)
    }
}
