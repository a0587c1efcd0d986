//! TrafficPolicy and RateLimit documents as the settings that the agent's traffic state works with.

use std::{collections::HashMap, sync::Arc};

use super::{attach::Targets, compile::Named};
use crate::{
    policy::{
        BalancerName, CircuitBreaker, HttpRouteRetry, Limit, LimitAlgorithm, LimitKeyField, LimitScope, RequestField,
        RetryCondition, RetryPolicy, SourceField, TrafficPolicy,
    },
    resilience::{
        BalancerAlgorithm, BreakerSettings, CONNECT_TIMEOUT_DEFAULT, ERROR_RATE_MIN_REQUESTS_DEFAULT,
        ERROR_RATE_WINDOW_DEFAULT, ErrorRateSettings, HALF_OPEN_PROBES_DEFAULT, LimitKeyPart, LimitSettings,
        OPEN_FOR_DEFAULT, RETRY_BUDGET_PERCENT_DEFAULT, RetryOn, RetrySettings, TimeoutSettings, TrafficSettings,
    },
    rule::RuleId,
    workload::{ObjectName, Service, ServicePort},
};

/// Lays TrafficPolicies over one another and shares equal results.
pub(super) struct TrafficCompiler<'a> {
    policies: &'a [Named<'a, TrafficPolicy>],
    targets: Targets,
    shared: HashMap<Vec<usize>, Arc<TrafficSettings>>,
}

impl<'a> TrafficCompiler<'a> {
    pub fn new(policies: &'a [Named<'a, TrafficPolicy>]) -> TrafficCompiler<'a> {
        let targets = Targets::new(policies.iter().map(|policy| &*policy.spec.target_refs));
        TrafficCompiler {
            policies,
            targets,
            shared: HashMap::new(),
        }
    }

    /// What holds for sending to a service's port.
    pub fn settings(&mut self, service: &Service, port: &ServicePort) -> Arc<TrafficSettings> {
        let applied = self.targets.of_service_port(service, port);
        if let Some(shared) = self.shared.get(&applied) {
            return shared.clone();
        }
        let policies: Vec<_> = applied.iter().filter_map(|&index| self.policies.get(index)).collect();
        let settings = Arc::new(merge(&policies));
        self.shared.insert(applied, settings.clone());
        settings
    }
}

/// Field by field the first policy that says something.
fn merge(policies: &[&Named<'_, TrafficPolicy>]) -> TrafficSettings {
    let specs = || policies.iter().map(|policy| policy.spec);
    let timeouts = || specs().filter_map(|spec| spec.timeouts.as_ref());
    TrafficSettings {
        balancer: specs()
            .find_map(|spec| spec.load_balancer.as_ref())
            .map(|balancer| algorithm(balancer.algorithm))
            .unwrap_or_default(),
        timeouts: TimeoutSettings {
            request: timeouts()
                .find_map(|t| t.request)
                .map(|t| t.as_std())
                .filter(|t| !t.is_zero()),
            connect: timeouts()
                .find_map(|t| t.connect)
                .map_or(CONNECT_TIMEOUT_DEFAULT, |t| t.as_std()),
            idle: timeouts()
                .find_map(|t| t.idle)
                .map(|t| t.as_std())
                .filter(|t| !t.is_zero()),
        },
        retry: specs().find_map(|spec| spec.retry.as_ref()).map(retry_settings),
        breaker: specs()
            .find_map(|spec| spec.circuit_breaker.as_ref())
            .map(breaker_settings),
        sources: policies
            .iter()
            .map(|policy| RuleId::new(&format!("trafficpolicy/{}", policy.name)))
            .collect(),
    }
}

fn algorithm(name: BalancerName) -> BalancerAlgorithm {
    match name {
        BalancerName::RoundRobin => BalancerAlgorithm::RoundRobin,
        BalancerName::Random => BalancerAlgorithm::Random,
        BalancerName::LeastRequest => BalancerAlgorithm::LeastRequest,
    }
}

fn retry_settings(retry: &RetryPolicy) -> RetrySettings {
    RetrySettings {
        attempts: retry.attempts,
        on: retry.on.iter().map(|condition| retry_on(*condition)).collect(),
        budget_percent: retry
            .budget
            .as_ref()
            .map_or(RETRY_BUDGET_PERCENT_DEFAULT, |budget| budget.percent),
        per_try_timeout: retry.per_try_timeout.map(|t| t.as_std()).filter(|t| !t.is_zero()),
        backoff: None,
    }
}

fn retry_on(condition: RetryCondition) -> RetryOn {
    match condition {
        RetryCondition::ConnectFailure => RetryOn::ConnectFailure,
        RetryCondition::Reset => RetryOn::Reset,
        RetryCondition::RefusedStream => RetryOn::RefusedStream,
        RetryCondition::GatewayError => RetryOn::GatewayError,
        RetryCondition::ServerError => RetryOn::ServerError,
        RetryCondition::Status(status) => RetryOn::Status(status),
    }
}

/// A route's retries (GEP-1731): its statuses and, as that proposal has it, failures to connect.
pub(super) fn route_retry_settings(retry: &HttpRouteRetry) -> RetrySettings {
    let codes = retry.codes.iter().map(|code| RetryOn::Status(*code));
    RetrySettings {
        attempts: retry.attempts.unwrap_or(1),
        on: [RetryOn::ConnectFailure, RetryOn::RefusedStream]
            .into_iter()
            .chain(codes)
            .collect(),
        budget_percent: RETRY_BUDGET_PERCENT_DEFAULT,
        per_try_timeout: None,
        backoff: retry.backoff.map(|t| t.as_std()),
    }
}

fn breaker_settings(breaker: &CircuitBreaker) -> BreakerSettings {
    BreakerSettings {
        max_connections: breaker.max_connections,
        max_pending_requests: breaker.max_pending_requests,
        max_requests: breaker.max_requests,
        consecutive_failures: breaker.consecutive_failures,
        error_rate: breaker.error_rate.as_ref().map(|rate| ErrorRateSettings {
            percent: rate.percent,
            window: rate.window.map_or(ERROR_RATE_WINDOW_DEFAULT, |t| t.as_std()),
            min_requests: rate.min_requests.unwrap_or(ERROR_RATE_MIN_REQUESTS_DEFAULT),
        }),
        open_for: breaker.open_for.map_or(OPEN_FOR_DEFAULT, |t| t.as_std()),
        half_open_probes: breaker.half_open_probes.unwrap_or(HALF_OPEN_PROBES_DEFAULT),
    }
}

/// One limit of a RateLimit.
pub(super) fn limit_settings(policy: &ObjectName, index: usize, limit: &Limit) -> LimitSettings {
    // Taken apart so that a new field or algorithm cannot be forgotten here.
    let Limit {
        name,
        key,
        algorithm: LimitAlgorithm::TokenBucket,
        rate,
        burst,
        scope: LimitScope::Local,
        shadow,
    } = limit;
    let name = name.clone().unwrap_or_else(|| index.to_string());
    LimitSettings {
        id: RuleId::new(&format!("ratelimit/{policy}/{name}")),
        key: key.iter().map(key_part).collect(),
        requests: rate.requests.max(1),
        per: rate.per.as_std().max(std::time::Duration::from_millis(1)),
        burst: burst.unwrap_or(rate.requests).max(1),
        shadow: *shadow,
    }
}

fn key_part(field: &LimitKeyField) -> LimitKeyPart {
    match field {
        LimitKeyField::Source(SourceField::Identity) => LimitKeyPart::SourceIdentity,
        LimitKeyField::Source(SourceField::Address) => LimitKeyPart::SourceAddress,
        LimitKeyField::Header(name) => LimitKeyPart::Header(name.to_ascii_lowercase().into()),
        LimitKeyField::Request(RequestField::Path) => LimitKeyPart::Path,
        LimitKeyField::Request(RequestField::Method) => LimitKeyPart::Method,
    }
}
