//! TrafficPolicy: how requests are sent to a destination.

use serde::{Serialize, Serializer};

use super::{Duration, TargetRef};

/// `spec` of a TrafficPolicy. The most specific target wins, field by field (`loadBalancer`, each timeout, `retry`,
/// `circuitBreaker`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TrafficPolicy {
    /// What it is attached to, at least one.
    pub target_refs: Vec<TargetRef>,
    /// How an endpoint is chosen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load_balancer: Option<LoadBalancer>,
    /// Time limits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeouts: Option<TrafficTimeouts>,
    /// Whether and when to try again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry: Option<RetryPolicy>,
    /// When to stop sending.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub circuit_breaker: Option<CircuitBreaker>,
}

/// How an endpoint is chosen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LoadBalancer {
    /// The algorithm.
    pub algorithm: BalancerName,
}

/// The algorithms that are implemented.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum BalancerName {
    /// Each in turn.
    RoundRobin,
    /// By chance.
    Random,
    /// The one with fewer requests in flight of two taken by chance.
    LeastRequest,
}

/// Time limits; at least one is set, each is more than zero.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TrafficTimeouts {
    /// From the request's head to the response's last byte. A route's own timeout wins.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request: Option<Duration>,
    /// To dial an endpoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connect: Option<Duration>,
    /// Without a byte in either direction on an opaque flow.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle: Option<Duration>,
}

/// Whether and when a request is tried again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RetryPolicy {
    /// Additional tries at most, 1 to 10.
    pub attempts: u32,
    /// What makes a try count as failed; at least one.
    pub on: Vec<RetryCondition>,
    /// The limit of one try; `None`: the request's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub per_try_timeout: Option<Duration>,
    /// How much load retries may add.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub budget: Option<RetryBudget>,
}

/// How much load retries may add.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RetryBudget {
    /// Of 100 requests, how many may be retries: 0 to 100.
    pub percent: u32,
}

/// A failure that may be tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RetryCondition {
    /// `connect-failure`: the endpoint could not be dialed.
    ConnectFailure,
    /// `reset`: the endpoint closed or reset the connection before a response.
    Reset,
    /// `refused-stream`: HTTP/2 says that the request was not processed.
    RefusedStream,
    /// `gateway-error`: 502, 503 or 504.
    GatewayError,
    /// `5xx`: any status from 500.
    ServerError,
    /// `"503"`: this status, 400 to 599.
    Status(u16),
}

impl std::fmt::Display for RetryCondition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            RetryCondition::ConnectFailure => f.write_str("connect-failure"),
            RetryCondition::Reset => f.write_str("reset"),
            RetryCondition::RefusedStream => f.write_str("refused-stream"),
            RetryCondition::GatewayError => f.write_str("gateway-error"),
            RetryCondition::ServerError => f.write_str("5xx"),
            RetryCondition::Status(status) => write!(f, "{status}"),
        }
    }
}

impl Serialize for RetryCondition {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// When to stop sending. At least one of the limits is set; each number is at least 1.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CircuitBreaker {
    /// Connections at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_connections: Option<u32>,
    /// Requests that wait for a connection at once (0: none may wait).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_pending_requests: Option<u32>,
    /// Requests in flight at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_requests: Option<u32>,
    /// Failures in a row that open it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub consecutive_failures: Option<u32>,
    /// The share of failures that opens it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_rate: Option<BreakerErrorRate>,
    /// How long it stays open before it lets probes through.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub open_for: Option<Duration>,
    /// Requests at once while half open.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub half_open_probes: Option<u32>,
}

/// A share of failures in a window.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BreakerErrorRate {
    /// Failures of 100 requests that open the breaker, 1 to 100.
    pub percent: u32,
    /// The window.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window: Option<Duration>,
    /// Requests in the window before the rate counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_requests: Option<u32>,
}
