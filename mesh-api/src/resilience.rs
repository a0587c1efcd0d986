//! Limits, breakers, retries and timeouts as checked plain values.
//!
//! The agent's `traffic` module keeps the state (buckets, counters, clocks); here is only what is to be kept, so that
//! controller, agent and `explain` mean the same. Nothing here can fail: a value out of range is brought into its
//! range when the view is compiled, since the validator has already refused it where people can see it.

use std::{net::IpAddr, sync::Arc, time::Duration};

use crate::{identity::SpiffeId, request::Request, rule::RuleId};

/// How long a dial to an endpoint may take unless a TrafficPolicy says otherwise.
pub const CONNECT_TIMEOUT_DEFAULT: Duration = Duration::from_secs(5);
/// How long a breaker stays open unless a TrafficPolicy says otherwise.
pub const OPEN_FOR_DEFAULT: Duration = Duration::from_secs(5);
/// How many probes a half-open breaker lets through at once unless a TrafficPolicy says otherwise.
pub const HALF_OPEN_PROBES_DEFAULT: u32 = 1;
/// The window of a breaker's error rate unless a TrafficPolicy says otherwise.
pub const ERROR_RATE_WINDOW_DEFAULT: Duration = Duration::from_secs(10);
/// How many requests an error rate needs before it counts unless a TrafficPolicy says otherwise.
pub const ERROR_RATE_MIN_REQUESTS_DEFAULT: u32 = 20;
/// The share of requests that may be retries unless a TrafficPolicy says otherwise.
pub const RETRY_BUDGET_PERCENT_DEFAULT: u32 = 20;
/// The longest text that a part of a [`LimitKey`] holds as it is; a longer one is replaced by its SHA-256.
pub const LIMIT_KEY_PART_BYTES_MAX: usize = 128;

/// How an endpoint is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BalancerAlgorithm {
    /// Each in turn.
    RoundRobin,
    /// By chance.
    Random,
    /// The one with fewer requests in flight of two taken by chance (the default: it needs no tuning).
    #[default]
    LeastRequest,
}

/// The traffic policy that applies to a backend, every field decided.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TrafficSettings {
    /// How an endpoint is chosen.
    pub balancer: BalancerAlgorithm,
    /// Time limits.
    pub timeouts: TimeoutSettings,
    /// Whether and when to try again; `None`: never, but for a reused connection that closed before the request.
    pub retry: Option<RetrySettings>,
    /// When to stop sending; `None`: no limits.
    pub breaker: Option<BreakerSettings>,
    /// The policies that gave at least one field, the most specific first; for logs and `explain`.
    pub sources: Vec<RuleId>,
}

/// Time limits of a backend. A route's own timeouts win over these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimeoutSettings {
    /// From the request's head to the response's last byte; `None`: unlimited.
    pub request: Option<Duration>,
    /// To dial an endpoint ([`CONNECT_TIMEOUT_DEFAULT`]).
    pub connect: Duration,
    /// Without a byte in either direction on an opaque flow; `None`: unlimited.
    pub idle: Option<Duration>,
}

/// When a request is tried again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetrySettings {
    /// Additional tries at most, 1 to 10.
    pub attempts: u32,
    /// What makes a try count as failed.
    pub on: Vec<RetryOn>,
    /// The share of the backend's requests that may be retries, 0 to 100.
    pub budget_percent: u32,
    /// The limit of one try; `None`: the request's own.
    pub per_try_timeout: Option<Duration>,
    /// The least pause before a try; `None`: the agent's own jittered backoff.
    pub backoff: Option<Duration>,
}

/// A failure that may be tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RetryOn {
    /// The endpoint could not be dialed: nothing was sent.
    ConnectFailure,
    /// The endpoint closed or reset the connection before a response.
    Reset,
    /// HTTP/2 REFUSED_STREAM: the endpoint says that it did not process the request.
    RefusedStream,
    /// 502, 503 or 504.
    GatewayError,
    /// Any 5xx.
    ServerError,
    /// This status.
    Status(u16),
}

/// When a backend's endpoint counts as broken, and how much it may be given at once.
#[derive(Clone, Debug, PartialEq)]
pub struct BreakerSettings {
    /// Connections at once; `None`: unlimited.
    pub max_connections: Option<u32>,
    /// Requests that wait for a connection at once.
    pub max_pending_requests: Option<u32>,
    /// Requests in flight at once.
    pub max_requests: Option<u32>,
    /// Failures in a row that open it.
    pub consecutive_failures: Option<u32>,
    /// The share of failures that opens it.
    pub error_rate: Option<ErrorRateSettings>,
    /// How long it stays open before it lets probes through ([`OPEN_FOR_DEFAULT`]).
    pub open_for: Duration,
    /// Requests at once while half open ([`HALF_OPEN_PROBES_DEFAULT`]).
    pub half_open_probes: u32,
}

/// A share of failures in a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ErrorRateSettings {
    /// Failures of 100 requests that open the breaker, 1 to 100.
    pub percent: u32,
    /// The window ([`ERROR_RATE_WINDOW_DEFAULT`]).
    pub window: Duration,
    /// Requests in the window before the rate counts ([`ERROR_RATE_MIN_REQUESTS_DEFAULT`]).
    pub min_requests: u32,
}

/// One limit of a RateLimit document: a bucket per key.
#[derive(Clone, Debug, PartialEq)]
pub struct LimitSettings {
    /// `ratelimit/<namespace>/<name>/<index>`: also the identity of its buckets across revisions.
    pub id: RuleId,
    /// What makes two requests share a bucket; empty: all do.
    pub key: Vec<LimitKeyPart>,
    /// Requests per `per`.
    pub requests: u32,
    /// The period in which `requests` tokens come in.
    pub per: Duration,
    /// Tokens that a full bucket holds; at least 1.
    pub burst: u32,
    /// Count and report, but refuse nothing.
    pub shadow: bool,
}

/// A part of a bucket's key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LimitKeyPart {
    /// The source's identity; sources without one share a bucket.
    SourceIdentity,
    /// The source's address.
    SourceAddress,
    /// A header's first value, name in lower case; requests without it share a bucket.
    Header(Arc<str>),
    /// The path without the query.
    Path,
    /// The method.
    Method,
}

/// The key of one bucket: each part tagged and length-prefixed, so that two different keys never have the same text.
/// At most [`LIMIT_KEY_PART_BYTES_MAX`] bytes per part.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LimitKey(Box<[u8]>);

/// What a limit may know of the source.
#[derive(Clone, Copy, Debug)]
pub struct LimitSource<'a> {
    /// The proven identity.
    pub identity: Option<&'a SpiffeId>,
    /// The address.
    pub address: IpAddr,
}

impl Default for TimeoutSettings {
    fn default() -> TimeoutSettings {
        TimeoutSettings {
            request: None,
            connect: CONNECT_TIMEOUT_DEFAULT,
            idle: None,
        }
    }
}

impl RetryOn {
    /// Whether a response of that status counts as failed.
    pub fn matches_status(self, status: u16) -> bool {
        match self {
            RetryOn::GatewayError => (502..=504).contains(&status),
            RetryOn::ServerError => (500..=599).contains(&status),
            RetryOn::Status(wanted) => wanted == status,
            RetryOn::ConnectFailure | RetryOn::Reset | RetryOn::RefusedStream => false,
        }
    }
}

impl LimitKey {
    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl LimitSettings {
    /// The bucket that a request belongs to.
    pub fn key(&self, source: LimitSource<'_>, request: &dyn Request) -> LimitKey {
        let mut bytes = Vec::with_capacity(self.key.len().saturating_mul(48));
        for part in &self.key {
            match part {
                LimitKeyPart::SourceIdentity => push_part(&mut bytes, source.identity.map(|id| id.as_str().as_bytes())),
                LimitKeyPart::SourceAddress => match source.address.to_canonical() {
                    IpAddr::V4(ip) => push_part(&mut bytes, Some(&ip.octets())),
                    IpAddr::V6(ip) => push_part(&mut bytes, Some(&ip.octets())),
                },
                LimitKeyPart::Header(name) => push_part(&mut bytes, request.header(name).map(str::as_bytes)),
                LimitKeyPart::Path => push_part(&mut bytes, Some(request.path().as_bytes())),
                LimitKeyPart::Method => push_part(&mut bytes, Some(request.method().as_bytes())),
            }
        }
        LimitKey(bytes.into_boxed_slice())
    }
}

/// Appends a part: 0 for an absent one; 1, length, text for a short one; 2, SHA-256 for a long one.
fn push_part(bytes: &mut Vec<u8>, part: Option<&[u8]>) {
    match part {
        None => bytes.push(0),
        Some(text) if text.len() <= LIMIT_KEY_PART_BYTES_MAX => {
            bytes.push(1);
            bytes.push(u8::try_from(text.len()).unwrap_or(u8::MAX));
            bytes.extend_from_slice(text);
        }
        Some(text) => {
            use sha2::Digest as _;
            bytes.push(2);
            bytes.extend_from_slice(&sha2::Sha256::digest(text));
        }
    }
}
