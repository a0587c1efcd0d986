//! TrafficPolicy by tables: which settings hold for which service port.

use std::{sync::Arc, time::Duration};

use mesh_api::resilience::{BalancerAlgorithm, RetryOn, TrafficSettings};

use crate::world::{name, view};

const POLICIES: &str = r#"
apiVersion: nodemesh.io/v1alpha1
kind: TrafficPolicy
metadata: {name: mesh, namespace: nodemesh-system}
spec:
  targetRefs: [{group: nodemesh.io, kind: Mesh}]
  loadBalancer: {algorithm: random}
  timeouts: {connect: 1s, request: 30s}
---
apiVersion: nodemesh.io/v1alpha1
kind: TrafficPolicy
metadata: {name: shop, namespace: shop}
spec:
  targetRefs: [{kind: Namespace, name: shop}]
  timeouts: {request: 10s}
  retry: {attempts: 2, on: [connect-failure, "503", 5xx, gateway-error], budget: {percent: 7}, perTryTimeout: 1s}
---
apiVersion: nodemesh.io/v1alpha1
kind: TrafficPolicy
metadata: {name: cart, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: cart}]
  loadBalancer: {algorithm: least-request}
  circuitBreaker:
    maxConnections: 100
    maxPendingRequests: 50
    maxRequests: 200
    consecutiveFailures: 5
    errorRate: {percent: 50}
---
apiVersion: nodemesh.io/v1alpha1
kind: TrafficPolicy
metadata: {name: cart-http, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: cart, sectionName: http}]
  timeouts: {request: 2s, idle: 1h}
  circuitBreaker: {maxRequests: 1, consecutiveFailures: 2, openFor: 1s, halfOpenProbes: 3}
---
apiVersion: nodemesh.io/v1alpha1
kind: TrafficPolicy
metadata: {name: a-cart-too, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: cart}]
  loadBalancer: {algorithm: round-robin}
"#;

fn settings(documents: &str, service: &str, port: u16) -> Arc<TrafficSettings> {
    let view = view(documents);
    view.service(&name(service))
        .unwrap()
        .port(port)
        .unwrap()
        .backend
        .traffic
        .clone()
}

#[test]
fn without_a_policy_there_are_defaults() {
    let plain = settings("", "shop/cart", 80);
    assert_eq!(*plain, TrafficSettings::default());
    assert_eq!(plain.balancer, BalancerAlgorithm::LeastRequest);
    assert_eq!(plain.timeouts.connect, Duration::from_secs(5));
    assert!(plain.retry.is_none() && plain.breaker.is_none());
}

#[test]
fn the_most_specific_policy_wins_field_by_field() {
    let seconds = Duration::from_secs;
    // service, port, balancer, request, connect, max_requests, sources
    let cases = [
        (
            "web/cart",
            80,
            BalancerAlgorithm::Random,
            30,
            None,
            "nodemesh-system/mesh",
        ),
        (
            "shop/db",
            5432,
            BalancerAlgorithm::Random,
            10,
            None,
            "shop/shop nodemesh-system/mesh",
        ),
        (
            "shop/cart",
            9100,
            BalancerAlgorithm::RoundRobin,
            10,
            Some(200),
            "shop/a-cart-too shop/cart shop/shop nodemesh-system/mesh",
        ),
        (
            "shop/cart",
            80,
            BalancerAlgorithm::RoundRobin,
            2,
            Some(1),
            "shop/cart-http shop/a-cart-too shop/cart shop/shop nodemesh-system/mesh",
        ),
    ];
    for (service, port, balancer, request, max_requests, sources) in cases {
        let found = settings(POLICIES, service, port);
        assert_eq!(found.balancer, balancer, "{service}:{port}");
        assert_eq!(found.timeouts.request, Some(seconds(request)), "{service}:{port}");
        assert_eq!(found.timeouts.connect, seconds(1), "{service}:{port}");
        assert_eq!(
            found.breaker.as_ref().and_then(|b| b.max_requests),
            max_requests,
            "{service}:{port}"
        );
        let names: Vec<&str> = found
            .sources
            .iter()
            .map(|id| id.as_str().trim_start_matches("trafficpolicy/"))
            .collect();
        assert_eq!(names.join(" "), sources);
    }
}

#[test]
fn every_field_is_taken_over_or_has_its_default() {
    let found = settings(POLICIES, "shop/cart", 9100);
    let retry = found.retry.as_ref().unwrap();
    assert_eq!((retry.attempts, retry.budget_percent), (2, 7));
    assert_eq!(retry.per_try_timeout, Some(Duration::from_secs(1)));
    assert_eq!(retry.on[..2], [RetryOn::ConnectFailure, RetryOn::Status(503)]);
    let breaker = found.breaker.as_ref().unwrap();
    assert_eq!(
        (breaker.max_connections, breaker.max_pending_requests),
        (Some(100), Some(50))
    );
    assert_eq!(breaker.consecutive_failures, Some(5));
    assert_eq!(
        (breaker.open_for, breaker.half_open_probes),
        (Duration::from_secs(5), 1)
    );
    let rate = breaker.error_rate.unwrap();
    assert_eq!(
        (rate.percent, rate.window, rate.min_requests),
        (50, Duration::from_secs(10), 20)
    );
    let http = settings(POLICIES, "shop/cart", 80);
    assert_eq!(http.timeouts.idle, Some(Duration::from_secs(3600)));
    let breaker = http.breaker.as_ref().unwrap();
    assert_eq!(
        (breaker.open_for, breaker.half_open_probes),
        (Duration::from_secs(1), 3)
    );
    assert_eq!(
        breaker.max_connections, None,
        "a circuitBreaker is one field: the more specific one replaces it whole"
    );
}

#[test]
fn retry_conditions_know_their_statuses() {
    let cases = [
        (RetryOn::GatewayError, [false, true, true, false]),
        (RetryOn::ServerError, [true, true, true, false]),
        (RetryOn::Status(503), [false, true, false, false]),
        (RetryOn::Reset, [false; 4]),
    ];
    for (on, wanted) in cases {
        assert_eq!(
            [500, 503, 504, 429].map(|status| on.matches_status(status)),
            wanted,
            "{on:?}"
        );
    }
}
