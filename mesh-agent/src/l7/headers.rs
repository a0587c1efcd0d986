//! The headers that the mesh itself reads, sets and strips, and the changes that routes ask for.
//!
//! `x-forwarded-for`, `x-request-id`, W3C `traceparent` and `x-forwarded-client-cert`. Parsers here are total: whatever
//! a source sends, they answer. A source must never be able to say who it is: identity headers are stripped at the
//! source and set at the destination.

use std::{net::IpAddr, sync::Arc};

/// Changes to a message's headers: removals first, then `set` (replaces every field of that name), then `add`.
/// Names are in lower case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderChanges {
    /// Replaced or added.
    pub set: Vec<(String, String)>,
    /// Added beside those there.
    pub add: Vec<(String, String)>,
    /// Removed.
    pub remove: Vec<String>,
}

/// What the mesh does with its own headers on one request. The default touches nothing.
#[derive(Clone, Debug, Default)]
pub struct Standard {
    /// Append this address to `x-forwarded-for`.
    pub forwarded_for: Option<IpAddr>,
    /// Set `x-request-id`, for a request that came without one.
    pub request_id: Option<RequestId>,
    /// Set `traceparent`; `None` leaves what came.
    pub trace: Option<TraceParent>,
    /// What becomes of `x-forwarded-client-cert`.
    pub client_cert: ClientCert,
}

/// What becomes of `x-forwarded-client-cert`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ClientCert {
    /// Removed: what a workload says of identities counts for nothing (the source's agent, and plaintext arrivals).
    #[default]
    Strip,
    /// Replaced by this value (the destination's agent).
    Set(Arc<str>),
}

/// A random request id in the form of a version 4 UUID.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RequestId([u8; 36]);

/// A W3C trace context, version 00.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceParent {
    /// The trace; never zero.
    pub trace: u128,
    /// The span that sent the request; never zero.
    pub span: u64,
    /// Flags; bit 0 is `sampled`.
    pub flags: u8,
}
