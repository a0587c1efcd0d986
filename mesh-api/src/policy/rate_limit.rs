//! RateLimit: how many requests a destination takes from whom.

use serde::Serialize;

use super::{Duration, TargetRef};

/// `spec` of a RateLimit. Every limit of every RateLimit that applies is asked; each may refuse.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RateLimit {
    /// What it is attached to, at least one.
    pub target_refs: Vec<TargetRef>,
    /// The limits, at least one.
    pub limits: Vec<Limit>,
}

/// One limit: a bucket per key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Limit {
    /// A name for logs and metrics; `None`: its index.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What makes two requests share a bucket; empty: all do.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub key: Vec<LimitKeyField>,
    /// How it counts.
    pub algorithm: LimitAlgorithm,
    /// How fast a bucket fills.
    pub rate: RequestRate,
    /// Tokens that a full bucket holds, at least 1; `None`: `rate.requests`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub burst: Option<u32>,
    /// Who counts together.
    pub scope: LimitScope,
    /// Count and report, but refuse nothing.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub shadow: bool,
}

/// How a limit counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LimitAlgorithm {
    /// A bucket that fills at the rate and holds the burst.
    #[default]
    TokenBucket,
}

/// Who counts together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LimitScope {
    /// Each node by itself.
    #[default]
    Local,
}

/// `{requests: 50, per: 1s}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RequestRate {
    /// Requests per period, at least 1.
    pub requests: u32,
    /// The period, more than zero.
    pub per: Duration,
}

/// A part of a bucket's key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum LimitKeyField {
    /// `{source: identity}` or `{source: address}`.
    Source(SourceField),
    /// `{header: x-user}`; the name in lower case.
    Header(String),
    /// `{request: path}` or `{request: method}`.
    Request(RequestField),
}

/// A fact about the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum SourceField {
    /// Its proven identity.
    Identity,
    /// Its address.
    Address,
}

/// A fact about the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum RequestField {
    /// The path without the query.
    Path,
    /// The method.
    Method,
}
