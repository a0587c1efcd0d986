//! RateLimit: how many requests a destination takes from whom.

use serde::Serialize;

use super::{
    Duration, TargetRef, check,
    target::{Targets, target_refs},
};
use crate::read::{Decode, Field, deserialize_by_decoding};

/// The most limits of one document.
const LIMITS_MAX: usize = 16;
/// The most parts of one key.
const KEY_PARTS_MAX: usize = 8;
/// The most requests of a rate or burst.
const REQUESTS_MAX: u32 = 1_000_000_000;

/// `spec` of a RateLimit. Every limit of every RateLimit that applies is asked; each may refuse.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct RateLimit {
    /// What it is attached to, at least one.
    #[cfg_attr(
        feature = "schema",
        schemars(length(min = 1, max = 16), with = "Vec<super::schema::Target<true>>")
    )]
    pub target_refs: Vec<TargetRef>,
    /// The limits, at least one.
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 16)))]
    pub limits: Vec<Limit>,
}

/// One limit: a bucket per key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Limit {
    /// A name for logs and metrics; `None`: its index.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(schema_with = "super::schema::dns_name"))]
    pub name: Option<String>,
    /// What makes two requests share a bucket; empty: all do.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schemars(length(max = 8)))]
    pub key: Vec<LimitKeyField>,
    /// How it counts.
    #[cfg_attr(feature = "schema", schemars(extend("default" = "token-bucket")))]
    pub algorithm: LimitAlgorithm,
    /// How fast a bucket fills.
    pub rate: RequestRate,
    /// Tokens that a full bucket holds, at least 1; `None`: `rate.requests`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 1_000_000_000)))]
    pub burst: Option<u32>,
    /// Who counts together.
    #[cfg_attr(feature = "schema", schemars(extend("default" = "local")))]
    pub scope: LimitScope,
    /// Count and report, but refuse nothing.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub shadow: bool,
}

/// How a limit counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum LimitAlgorithm {
    /// A bucket that fills at the rate and holds the burst.
    #[default]
    TokenBucket,
}

/// Who counts together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum LimitScope {
    /// Each node by itself.
    #[default]
    Local,
}

/// `{requests: 50, per: 1s}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct RequestRate {
    /// Requests per period, at least 1.
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 1_000_000_000)))]
    pub requests: u32,
    /// The period, more than zero.
    #[cfg_attr(feature = "schema", schemars(schema_with = "super::schema::some_time"))]
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
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum SourceField {
    /// Its proven identity.
    Identity,
    /// Its address.
    Address,
}

/// A fact about the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum RequestField {
    /// The path without the query.
    Path,
    /// The method.
    Method,
}

impl Decode for RateLimit {
    fn decode(field: &Field) -> Option<RateLimit> {
        let mut fields = field.fields()?;
        let target_refs = target_refs(
            &mut fields,
            &Targets {
                workloads: true,
                anywhere: false,
            },
        );
        let limits = fields.need("limits", "at least one limit").and_then(|f| limits(&f));
        fields.finish();
        Some(RateLimit {
            target_refs: target_refs?,
            limits: limits?,
        })
    }
}

fn limits(field: &Field) -> Option<Vec<Limit>> {
    let items = field.items(LIMITS_MAX)?;
    if items.is_empty() {
        field.refuse("is empty", "at least one limit");
        return None;
    }
    let limits: Vec<Option<Limit>> = items.iter().map(Limit::decode).collect();
    check::unique(
        &items,
        limits.iter().map(|l| l.as_ref().and_then(|l| l.name.as_deref())),
        "name",
    );
    limits.into_iter().collect()
}

impl Decode for Limit {
    fn decode(field: &Field) -> Option<Limit> {
        let mut fields = field.fields()?;
        fields.later(&["response"]);
        let name = fields.read("name", check::rule_name);
        let key = fields.list("key", KEY_PARTS_MAX, LimitKeyField::decode);
        let algorithms = [("token-bucket", LimitAlgorithm::TokenBucket)];
        let later = ["leaky-bucket", "sliding-window", "concurrency"];
        let algorithm = fields.read("algorithm", |f| f.choice(&algorithms, &later));
        let rate = fields
            .need("rate", "requests and per")
            .and_then(|f| RequestRate::decode(&f));
        let burst = fields.read("burst", |f| f.integer(1..=REQUESTS_MAX));
        let scope = fields.read("scope", |f| f.choice(&[("local", LimitScope::Local)], &["mesh"]));
        let shadow = fields.read("shadow", Field::boolean);
        fields.finish();
        Some(Limit {
            name: name?,
            key: key?,
            algorithm: algorithm?.unwrap_or_default(),
            rate: rate?,
            burst: burst?,
            scope: scope?.unwrap_or_default(),
            shadow: shadow?.unwrap_or(false),
        })
    }
}

impl Decode for RequestRate {
    fn decode(field: &Field) -> Option<RequestRate> {
        let mut fields = field.fields()?;
        let requests = fields
            .need("requests", "a number of requests")
            .and_then(|f| f.integer(1..=REQUESTS_MAX));
        let per = fields
            .need("per", "a duration such as 1s")
            .and_then(|f| check::some_time(&f));
        fields.finish();
        Some(RequestRate {
            requests: requests?,
            per: per?,
        })
    }
}

impl Decode for LimitKeyField {
    fn decode(field: &Field) -> Option<LimitKeyField> {
        const EXPECTED: &str = "one of source, header and request";
        let mut fields = field.fields()?;
        fields.later(&["claim", "address", "path"]);
        let sources = [("identity", SourceField::Identity), ("address", SourceField::Address)];
        let requests = [("path", RequestField::Path), ("method", RequestField::Method)];
        let source = fields.read("source", |f| f.choice(&sources, &[]));
        let header = fields.read("header", check::header_name);
        let request = fields.read("request", |f| f.choice(&requests, &[]));
        fields.finish();
        match (source?, header?, request?) {
            (Some(source), None, None) => Some(LimitKeyField::Source(source)),
            (None, Some(header), None) => Some(LimitKeyField::Header(header)),
            (None, None, Some(request)) => Some(LimitKeyField::Request(request)),
            (None, None, None) => {
                field.refuse("names nothing", EXPECTED);
                None
            }
            _ => {
                field.refuse(
                    "names more than one thing",
                    format!("{EXPECTED}, and further list items"),
                );
                None
            }
        }
    }
}

deserialize_by_decoding!(RateLimit);
