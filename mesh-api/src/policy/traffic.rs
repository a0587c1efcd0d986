//! TrafficPolicy: how requests are sent to a destination.

use serde::{Serialize, Serializer};

use super::{
    Duration, TargetRef, check,
    target::{Targets, target_refs},
};
use crate::read::{Decode, Field, deserialize_by_decoding, quoted};

/// The most additional tries of one request.
pub(super) const ATTEMPTS_MAX: u32 = 10;
/// The statuses that may be tried again.
pub(super) const RETRY_STATUS: std::ops::RangeInclusive<u16> = 400..=599;
/// The most conditions of one retry policy.
const RETRY_CONDITIONS_MAX: usize = 32;
/// The highest of a breaker's numbers.
const COUNT_MAX: u32 = 1_000_000_000;

/// `spec` of a TrafficPolicy. The most specific target wins, field by field (`loadBalancer`, each timeout, `retry`,
/// `circuitBreaker`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(extend("x-kubernetes-validations" = super::schema::rule("has(self.loadBalancer) || has(self.timeouts) || has(self.retry) || has(self.circuitBreaker)", "says nothing: expected loadBalancer, timeouts, retry or circuitBreaker"))))]
#[serde(rename_all = "camelCase")]
pub struct TrafficPolicy {
    /// What it is attached to, at least one.
    #[cfg_attr(
        feature = "schema",
        schemars(length(min = 1, max = 16), with = "Vec<super::schema::Target<false>>")
    )]
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
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct LoadBalancer {
    /// The algorithm.
    pub algorithm: BalancerName,
}

/// The algorithms that are implemented.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
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
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(extend("x-kubernetes-validations" = super::schema::rule("has(self.request) || has(self.connect) || has(self.idle)", "says nothing: expected request, connect or idle"))))]
#[serde(rename_all = "camelCase")]
pub struct TrafficTimeouts {
    /// From the request's head to the response's last byte. A route's own timeout wins.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(schema_with = "super::schema::some_time"))]
    pub request: Option<Duration>,
    /// To dial an endpoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(schema_with = "super::schema::some_time"))]
    pub connect: Option<Duration>,
    /// Without a byte in either direction on an opaque flow.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(schema_with = "super::schema::some_time"))]
    pub idle: Option<Duration>,
}

/// Whether and when a request is tried again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(transform = super::schema::retry_on))]
#[serde(rename_all = "camelCase")]
pub struct RetryPolicy {
    /// Additional tries at most, 1 to 10.
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 10)))]
    pub attempts: u32,
    /// What makes a try count as failed; at least one. Also written `retryOn`.
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 32)))]
    pub on: Vec<RetryCondition>,
    /// The limit of one try; `None`: the request's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(schema_with = "super::schema::some_time"))]
    pub per_try_timeout: Option<Duration>,
    /// How much load retries may add.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub budget: Option<RetryBudget>,
}

/// How much load retries may add.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct RetryBudget {
    /// Of 100 requests, how many may be retries: 0 to 100.
    #[cfg_attr(feature = "schema", schemars(range(min = 0, max = 100)))]
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
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(extend("x-kubernetes-validations" = super::schema::rule("has(self.maxConnections) || has(self.maxPendingRequests) || has(self.maxRequests) || has(self.consecutiveFailures) || has(self.errorRate)", "limits nothing: expected maxConnections, maxPendingRequests, maxRequests, consecutiveFailures or errorRate"))))]
#[serde(rename_all = "camelCase")]
pub struct CircuitBreaker {
    /// Connections at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 1_000_000_000)))]
    pub max_connections: Option<u32>,
    /// Requests that wait for a connection at once (0: none may wait).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 0, max = 1_000_000_000)))]
    pub max_pending_requests: Option<u32>,
    /// Requests in flight at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 1_000_000_000)))]
    pub max_requests: Option<u32>,
    /// Failures in a row that open it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 1_000_000_000)))]
    pub consecutive_failures: Option<u32>,
    /// The share of failures that opens it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_rate: Option<BreakerErrorRate>,
    /// How long it stays open before it lets probes through.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(schema_with = "super::schema::some_time"))]
    pub open_for: Option<Duration>,
    /// Requests at once while half open.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 1_000_000_000)))]
    pub half_open_probes: Option<u32>,
}

/// A share of failures in a window.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct BreakerErrorRate {
    /// Failures of 100 requests that open the breaker, 1 to 100.
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 100)))]
    pub percent: u32,
    /// The window.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(schema_with = "super::schema::some_time"))]
    pub window: Option<Duration>,
    /// Requests in the window before the rate counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 1_000_000_000)))]
    pub min_requests: Option<u32>,
}

impl Decode for TrafficPolicy {
    fn decode(field: &Field) -> Option<TrafficPolicy> {
        let mut fields = field.fields()?;
        fields.later(&[
            "locality",
            "slowStart",
            "adaptiveConcurrency",
            "healthChecks",
            "outlierEjection",
            "connectionPool",
        ]);
        let target_refs = target_refs(
            &mut fields,
            &Targets {
                workloads: false,
                anywhere: false,
            },
        );
        let load_balancer = fields.read("loadBalancer", LoadBalancer::decode);
        let timeouts = fields.read("timeouts", TrafficTimeouts::decode);
        let retry = fields.read("retry", RetryPolicy::decode);
        let circuit_breaker = fields.read("circuitBreaker", CircuitBreaker::decode);
        fields.finish();
        let policy = TrafficPolicy {
            target_refs: target_refs?,
            load_balancer: load_balancer?,
            timeouts: timeouts?,
            retry: retry?,
            circuit_breaker: circuit_breaker?,
        };
        let silent = policy.load_balancer.is_none()
            && policy.timeouts.is_none()
            && policy.retry.is_none()
            && policy.circuit_breaker.is_none();
        if silent {
            field.refuse("says nothing", "loadBalancer, timeouts, retry or circuitBreaker");
            return None;
        }
        Some(policy)
    }
}

impl Decode for LoadBalancer {
    fn decode(field: &Field) -> Option<LoadBalancer> {
        let mut fields = field.fields()?;
        fields.later(&["weights", "hashKey", "locality", "slowStart"]);
        let algorithms = [
            ("round-robin", BalancerName::RoundRobin),
            ("random", BalancerName::Random),
            ("least-request", BalancerName::LeastRequest),
        ];
        let later = ["peak-ewma", "ring-hash", "maglev"];
        let algorithm = fields
            .need("algorithm", "round-robin, random or least-request")
            .and_then(|f| f.choice(&algorithms, &later));
        fields.finish();
        Some(LoadBalancer { algorithm: algorithm? })
    }
}

impl Decode for TrafficTimeouts {
    fn decode(field: &Field) -> Option<TrafficTimeouts> {
        let mut fields = field.fields()?;
        let request = fields.read("request", check::some_time);
        let connect = fields.read("connect", check::some_time);
        let idle = fields.read("idle", check::some_time);
        fields.finish();
        let timeouts = TrafficTimeouts {
            request: request?,
            connect: connect?,
            idle: idle?,
        };
        if timeouts == TrafficTimeouts::default() {
            field.refuse("says nothing", "request, connect or idle");
            return None;
        }
        Some(timeouts)
    }
}

impl Decode for RetryPolicy {
    fn decode(field: &Field) -> Option<RetryPolicy> {
        let mut fields = field.fields()?;
        fields.later(&["hedging", "backoff"]);
        let attempts = fields
            .need("attempts", &format!("a number from 1 to {ATTEMPTS_MAX}"))
            .and_then(|f| f.integer(1..=ATTEMPTS_MAX));
        // An unquoted `on` is a boolean to readers of YAML 1.1, kubectl among them: `retryOn` is the same list.
        let on = match (fields.get("on"), fields.get("retryOn")) {
            (None, None) => fields
                .need("retryOn", "at least one condition")
                .and_then(|f| retry_conditions(&f)),
            (Some(on), None) | (None, Some(on)) => retry_conditions(&on),
            (Some(_), Some(twice)) => {
                twice.refuse("is the same as on, which is there too", "one of them");
                None
            }
        };
        let per_try_timeout = fields.read("perTryTimeout", check::some_time);
        let budget = fields.read("budget", RetryBudget::decode);
        fields.finish();
        Some(RetryPolicy {
            attempts: attempts?,
            on: on?,
            per_try_timeout: per_try_timeout?,
            budget: budget?,
        })
    }
}

fn retry_conditions(field: &Field) -> Option<Vec<RetryCondition>> {
    let items = field.items(RETRY_CONDITIONS_MAX)?;
    if items.is_empty() {
        field.refuse("is empty", "at least one condition");
    }
    let conditions: Vec<Option<RetryCondition>> = items.iter().map(RetryCondition::decode).collect();
    let names: Vec<Option<String>> = conditions.iter().map(|c| c.map(|c| c.to_string())).collect();
    check::unique(&items, names.iter().map(Option::as_deref), "condition");
    let conditions: Option<Vec<RetryCondition>> = conditions.into_iter().collect();
    conditions.filter(|conditions| !conditions.is_empty())
}

impl Decode for RetryCondition {
    fn decode(field: &Field) -> Option<RetryCondition> {
        let text = field.text()?;
        let condition = match text {
            "connect-failure" => Some(RetryCondition::ConnectFailure),
            "reset" => Some(RetryCondition::Reset),
            "refused-stream" => Some(RetryCondition::RefusedStream),
            "gateway-error" => Some(RetryCondition::GatewayError),
            "5xx" => Some(RetryCondition::ServerError),
            status if status.len() == 3 => status
                .parse()
                .ok()
                .filter(|status| RETRY_STATUS.contains(status))
                .map(RetryCondition::Status),
            _ => None,
        };
        if condition.is_none() {
            let expected =
                "connect-failure, reset, refused-stream, gateway-error, 5xx or a status from 400 to 599 in quotes";
            field.refuse(format!("{} is not known", quoted(text)), expected);
        }
        condition
    }
}

impl Decode for RetryBudget {
    fn decode(field: &Field) -> Option<RetryBudget> {
        let mut fields = field.fields()?;
        let percent = fields
            .need("percent", "a number from 0 to 100")
            .and_then(|f| check::percent(0)(&f));
        fields.finish();
        Some(RetryBudget { percent: percent? })
    }
}

impl Decode for CircuitBreaker {
    fn decode(field: &Field) -> Option<CircuitBreaker> {
        let mut fields = field.fields()?;
        fields.later(&["fallback"]);
        let max_connections = fields.read("maxConnections", |f| f.integer(1..=COUNT_MAX));
        let max_pending_requests = fields.read("maxPendingRequests", |f| f.integer(0..=COUNT_MAX));
        let max_requests = fields.read("maxRequests", |f| f.integer(1..=COUNT_MAX));
        let consecutive_failures = fields.read("consecutiveFailures", |f| f.integer(1..=COUNT_MAX));
        let error_rate = fields.read("errorRate", BreakerErrorRate::decode);
        let open_for = fields.read("openFor", check::some_time);
        let half_open_probes = fields.read("halfOpenProbes", |f| f.integer(1..=COUNT_MAX));
        fields.finish();
        let breaker = CircuitBreaker {
            max_connections: max_connections?,
            max_pending_requests: max_pending_requests?,
            max_requests: max_requests?,
            consecutive_failures: consecutive_failures?,
            error_rate: error_rate?,
            open_for: open_for?,
            half_open_probes: half_open_probes?,
        };
        let trips = breaker.consecutive_failures.is_some() || breaker.error_rate.is_some();
        let limits = breaker
            .max_connections
            .or(breaker.max_pending_requests)
            .or(breaker.max_requests)
            .is_some();
        if !trips && !limits {
            let expected = "maxConnections, maxPendingRequests, maxRequests, consecutiveFailures or errorRate";
            field.refuse("limits nothing", expected);
            return None;
        }
        if !trips && (breaker.open_for.is_some() || breaker.half_open_probes.is_some()) {
            let expected = "consecutiveFailures or errorRate, which open it";
            field.refuse("openFor and halfOpenProbes are of a breaker that never opens", expected);
            return None;
        }
        Some(breaker)
    }
}

impl Decode for BreakerErrorRate {
    fn decode(field: &Field) -> Option<BreakerErrorRate> {
        let mut fields = field.fields()?;
        let percent = fields
            .need("percent", "a number from 1 to 100")
            .and_then(|f| check::percent(1)(&f));
        let window = fields.read("window", check::some_time);
        let min_requests = fields.read("minRequests", |f| f.integer(1..=COUNT_MAX));
        fields.finish();
        Some(BreakerErrorRate {
            percent: percent?,
            window: window?,
            min_requests: min_requests?,
        })
    }
}

deserialize_by_decoding!(TrafficPolicy);
