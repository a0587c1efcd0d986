//! GRPCRoute of the Gateway API (v1), as far as a mesh uses it: a Service as parent.
//!
//! What a rule does is the same as an HTTPRoute's; what differs is how it says which requests it means.

use serde::Serialize;

use super::{
    BackendRef, BackendTarget, HeaderMatch, HttpRouteFilter, ParentRef, RegexPattern, http_route::backends_of,
};

/// `spec` of a GRPCRoute.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct GrpcRoute {
    /// What it is attached to. Only parents of kind Service concern the mesh.
    pub parent_refs: Vec<ParentRef>,
    /// Hostnames: kept, but not looked at for a Service parent, as GAMMA has it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub hostnames: Vec<String>,
    /// The rules; none: as if the route were not there.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<GrpcRouteRule>,
}

/// One rule: any of its matches (none: every request), then filters and backends.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct GrpcRouteRule {
    /// A name, unique in the route.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Any of them; empty: every request.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub matches: Vec<GrpcRouteMatch>,
    /// RequestHeaderModifier and ResponseHeaderModifier at most once each, RequestMirror.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub filters: Vec<HttpRouteFilter>,
    /// Where to send; empty: every call fails with UNAVAILABLE.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub backend_refs: Vec<BackendRef>,
}

/// All its parts must match.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct GrpcRouteMatch {
    /// The service and method; not given: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<GrpcMethodMatch>,
    /// Headers, all of them; names in lower case, each once.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub headers: Vec<HeaderMatch>,
}

/// `{type: Exact, service: shop.Cart, method: Add}`: at least one of service and method.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "type")]
pub enum GrpcMethodMatch {
    /// These very names.
    Exact {
        /// The service with its package; `None`: any.
        #[serde(skip_serializing_if = "Option::is_none")]
        service: Option<String>,
        /// The method; `None`: any.
        #[serde(skip_serializing_if = "Option::is_none")]
        method: Option<String>,
    },
    /// The whole names match.
    RegularExpression {
        /// The service with its package; `None`: any.
        #[serde(skip_serializing_if = "Option::is_none")]
        service: Option<RegexPattern>,
        /// The method; `None`: any.
        #[serde(skip_serializing_if = "Option::is_none")]
        method: Option<RegexPattern>,
    },
}

impl GrpcRoute {
    /// Everything that the rules name, each with the path of its field.
    pub fn backends(&self) -> Vec<(String, &BackendTarget)> {
        let rules = self.rules.iter().map(|rule| (&*rule.filters, &*rule.backend_refs));
        backends_of(rules)
    }
}
