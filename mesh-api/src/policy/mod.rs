//! The policies as checked values: what a document's `spec` is once it has been read.
//!
//! A value of these types has been validated: its regular expressions compile, its CIDRs and identities parse, its
//! numbers are in range. They are made by [`crate::document::parse`] or from a spec's JSON ([`serde::Deserialize`], which
//! runs the same reader), and print themselves in the documented YAML shape ([`serde::Serialize`]).
//! A field that would guard and is not implemented is refused by the reader, never dropped.

mod access;
pub(crate) mod check;
mod grpc_route;
mod grpc_route_reader;
mod http_route;
pub(crate) mod http_route_reader;
mod l4_route;
mod l4_route_reader;
mod mesh;
mod rate_limit;
mod reference_grant;
#[cfg(feature = "schema")]
pub mod schema;
mod subset;
mod target;
mod traffic;
mod value;

pub use access::{AccessAction, AccessPolicy, AccessRule, HostMatch, IdentityMatch, SourceClause, TargetClause};
pub use grpc_route::{GrpcMethodMatch, GrpcRoute, GrpcRouteMatch, GrpcRouteRule};
pub use http_route::{
    BackendKind, BackendRef, BackendTarget, Cors, Fraction, HeaderMatch, HeaderModifier, HeaderValue, HttpRoute,
    HttpRouteFilter, HttpRouteMatch, HttpRouteRetry, HttpRouteRule, HttpRouteTimeouts, OriginMatch, ParentRef,
    PathMatch, PathModifier, RequestMirror, RequestRedirect, StringMatch, UrlRewrite,
};
pub use l4_route::{L4RouteRule, TcpRoute, TlsRoute};
pub use mesh::{MeshPolicy, MtlsMode, MtlsSettings, SameNode};
pub use rate_limit::{
    Limit, LimitAlgorithm, LimitKeyField, LimitScope, RateLimit, RequestField, RequestRate, SourceField,
};
pub use reference_grant::{GrantFrom, GrantTo, ReferenceGrant};
pub use subset::ServiceSubset;
pub(crate) use target::guard_targets;
pub use target::{PortRef, TargetRef};
pub use traffic::{
    BalancerName, BreakerErrorRate, CircuitBreaker, LoadBalancer, RetryBudget, RetryCondition, RetryPolicy,
    TrafficPolicy, TrafficTimeouts,
};
pub use value::{Duration, DurationError, REGEX_BYTES_MAX, REGEX_COMPILED_BYTES_MAX, RegexError, RegexPattern};

/// The API group of the mesh's own kinds.
pub const GROUP: &str = "nodemesh.io";
/// The API version of the mesh's own kinds.
pub const API_VERSION: &str = "nodemesh.io/v1alpha1";
/// The API group of the Gateway API.
pub const GATEWAY_GROUP: &str = "gateway.networking.k8s.io";
/// The namespace of the mesh itself: only policies in it may target the whole mesh or another namespace
/// (a [`MeshPolicy`] may do so from anywhere: whoever may write that kind runs the mesh).
pub const ROOT_NAMESPACE: &str = "nodemesh-system";
