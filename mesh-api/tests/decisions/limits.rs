//! RateLimit by tables: which limits hold where, and which requests share a bucket.

use mesh_api::{
    identity::SpiffeId,
    resilience::{LimitKey, LimitSource},
};

use crate::world::{name, request, view};

const LIMITS: &str = r#"
apiVersion: nodemesh.io/v1alpha1
kind: RateLimit
metadata: {name: cart, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: cart, sectionName: http}]
  limits:
  - {key: [{source: identity}, {header: X-User}], rate: {requests: 50, per: 1s}, burst: 20}
  - {name: all, rate: {requests: 1000, per: 1m}, shadow: true}
---
apiVersion: nodemesh.io/v1alpha1
kind: RateLimit
metadata: {name: everybody, namespace: shop}
spec:
  targetRefs: [{kind: Namespace, name: shop}]
  limits: [{key: [{source: address}, {request: path}, {request: method}], rate: {requests: 5, per: 1s}}]
"#;

fn key(limit: usize, identity: Option<&str>, address: &str, line: &str) -> LimitKey {
    let view = view(LIMITS);
    let inbound = view.inbound(&name("shop/cart-v1"), 8080);
    let identity: Option<SpiffeId> = identity.map(|text| text.parse().unwrap());
    let source = LimitSource {
        identity: identity.as_ref(),
        address: address.parse().unwrap(),
    };
    inbound.limits[limit].key(source, &request(line))
}

#[test]
fn limits_add_up_at_the_ports_of_their_targets() {
    let view = view(LIMITS);
    let ids = |workload: &str, port: u16| {
        let inbound = view.inbound(&name(workload), port);
        inbound
            .limits
            .iter()
            .map(|limit| limit.id.to_string())
            .collect::<Vec<_>>()
    };
    assert_eq!(
        ids("shop/cart-v1", 8080),
        [
            "ratelimit/shop/cart/0",
            "ratelimit/shop/cart/all",
            "ratelimit/shop/everybody/0"
        ]
    );
    assert_eq!(ids("shop/cart-v2", 8081).len(), 3);
    assert_eq!(ids("shop/cart-v1", 9100), ["ratelimit/shop/everybody/0"]);
    assert_eq!(ids("shop/db", 5432), ["ratelimit/shop/everybody/0"]);
    assert!(ids("web/front", 80).is_empty());
    let inbound = view.inbound(&name("shop/cart-v1"), 8080);
    assert_eq!(
        (
            inbound.limits[0].requests,
            inbound.limits[0].burst,
            inbound.limits[0].shadow
        ),
        (50, 20, false)
    );
    assert_eq!(
        (
            inbound.limits[1].requests,
            inbound.limits[1].burst,
            inbound.limits[1].shadow
        ),
        (1000, 1000, true)
    );
    assert_eq!(inbound.limits[1].per.as_secs(), 60);
}

#[test]
fn requests_share_a_bucket_when_every_part_is_equal() {
    let front = Some("spiffe://cluster.local/ns/web/sa/front");
    let batch = Some("spiffe://cluster.local/ns/web/sa/batch");
    let base = key(0, front, "10.1.1.1", "GET /a cart x-user: u");
    assert_eq!(base, key(0, front, "10.1.1.9", "PUT /b cart x-user: u"));
    assert_ne!(base, key(0, batch, "10.1.1.1", "GET /a cart x-user: u"));
    assert_ne!(base, key(0, None, "10.1.1.1", "GET /a cart x-user: u"));
    assert_ne!(base, key(0, front, "10.1.1.1", "GET /a cart x-user: v"));
    assert_ne!(base, key(0, front, "10.1.1.1", "GET /a"));
    assert_ne!(
        key(0, front, "10.1.1.1", "GET /a"),
        key(0, front, "10.1.1.1", "GET /a cart x-user: ")
    );
    assert_eq!(key(1, front, "10.1.1.1", "GET /a"), key(1, None, "10.1.1.2", "PUT /b"));
    let by_address = key(2, None, "10.1.1.1", "GET /a?x");
    assert_eq!(by_address, key(2, front, "::ffff:10.1.1.1", "GET /a?y"));
    assert_ne!(by_address, key(2, None, "10.1.1.2", "GET /a"));
    assert_ne!(by_address, key(2, None, "10.1.1.1", "GET /b"));
    assert_ne!(by_address, key(2, None, "10.1.1.1", "PUT /a"));
}

#[test]
fn a_long_part_is_hashed_so_that_a_key_is_bounded() {
    let long = "u".repeat(100_000);
    let one = key(0, None, "10.1.1.1", &format!("GET /a cart x-user: {long}"));
    let two = key(0, None, "10.1.1.1", &format!("GET /a cart x-user: {long}v"));
    assert_ne!(one, two);
    assert!(one.as_bytes().len() < 64);
}
