//! TCPRoute and TLSRoute of the Gateway API, as far as a mesh uses them: a Service as parent.
//!
//! Both send whole connections to one of several backends. A TLSRoute looks at the name that the source's ClientHello
//! asks for (SNI) and passes the bytes through; nothing is decrypted.

use serde::Serialize;

use super::{BackendRef, BackendTarget, HostMatch, ParentRef, http_route::backends_of};

/// `spec` of a TCPRoute.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TcpRoute {
    /// What it is attached to. Only parents of kind Service concern the mesh.
    pub parent_refs: Vec<ParentRef>,
    /// The rules; every connection takes the first.
    pub rules: Vec<L4RouteRule>,
}

/// `spec` of a TLSRoute.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TlsRoute {
    /// What it is attached to. Only parents of kind Service concern the mesh.
    pub parent_refs: Vec<ParentRef>,
    /// The names that a source may ask for; empty: any, and none at all.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub hostnames: Vec<HostMatch>,
    /// The rules; every connection takes the first.
    pub rules: Vec<L4RouteRule>,
}

/// One rule: where connections go, by weight.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct L4RouteRule {
    /// A name, unique in the route.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Where to send, at least one. A share that leads nowhere is reset.
    pub backend_refs: Vec<BackendRef>,
}

impl TcpRoute {
    /// Everything that the rules name, each with the path of its field.
    pub fn backends(&self) -> Vec<(String, &BackendTarget)> {
        backends_of(self.rules.iter().map(|rule| (&[][..], &*rule.backend_refs)))
    }
}

impl TlsRoute {
    /// Everything that the rules name, each with the path of its field.
    pub fn backends(&self) -> Vec<(String, &BackendTarget)> {
        backends_of(self.rules.iter().map(|rule| (&[][..], &*rule.backend_refs)))
    }
}
