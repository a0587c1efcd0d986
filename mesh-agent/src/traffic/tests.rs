//! Traffic state: exact under concurrency, true across revisions, without sleeps.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Barrier,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use mesh_api::{
    backend::{Backend, BackendKey},
    identity::{SpiffeId, TrustDomain},
    request::Request,
    resilience::{
        BalancerAlgorithm, BreakerSettings, LimitKeyPart, LimitSettings, LimitSource, RetrySettings, TrafficSettings,
    },
    rule::RuleId,
    workload::{AppProtocol, Endpoint, ObjectName, Service, Workload},
};

use super::{Rejection, Report, Traffic, breaker::BreakerState};

fn breaker() -> BreakerSettings {
    BreakerSettings {
        max_connections: None,
        max_pending_requests: None,
        max_requests: None,
        consecutive_failures: None,
        error_rate: None,
        open_for: Duration::from_secs(5),
        half_open_probes: 1,
    }
}

fn endpoint(number: u8) -> Endpoint {
    let domain = TrustDomain::new("test").unwrap();
    let workload = Workload {
        name: ObjectName::new("shop", &format!("cart-{number}")),
        app: "cart".into(),
        version: "".into(),
        identity: SpiffeId::workload(&domain, "shop", "cart").unwrap(),
        node: "n1".into(),
        node_addresses: vec![],
        addresses: vec![[10, 0, 0, number].into()],
        labels: BTreeMap::new(),
        enrolled: true,
        ready: true,
        netns: None,
        ports: vec![],
        probe_ports: vec![],
        exclude_inbound_ports: vec![],
        exclude_outbound_ports: vec![],
        uid: "".into(),
        host_network: false,
        zone: "".into(),
    };
    Endpoint {
        workload: Arc::new(workload),
        address: SocketAddr::from(([10, 0, 0, number], 80)),
    }
}

fn backend(endpoints: u8, settings: BreakerSettings) -> Backend {
    let service = Service {
        name: ObjectName::new("shop", "cart"),
        addresses: vec![],
        ports: vec![],
        selector: BTreeMap::new(),
        publish_not_ready: false,
        ..Service::default()
    };
    Backend {
        key: BackendKey {
            service: service.name.clone(),
            port: 80,
            subset: None,
        },
        service: Arc::new(service),
        protocol: AppProtocol::Http1,
        endpoints_v4: (1..=endpoints).map(endpoint).collect(),
        endpoints_v6: vec![],
        traffic: Arc::new(TrafficSettings {
            balancer: BalancerAlgorithm::RoundRobin,
            breaker: Some(settings),
            retry: Some(RetrySettings {
                attempts: 1,
                on: vec![],
                budget_percent: 20,
                per_try_timeout: None,
                backoff: None,
            }),
            ..TrafficSettings::default()
        }),
    }
}

fn last(number: u8) -> SocketAddr {
    endpoint(number).address
}

#[test]
fn max_requests_is_exact_whoever_asks() {
    let traffic = Traffic::new();
    let backend = backend(
        1,
        BreakerSettings {
            max_requests: Some(7),
            ..breaker()
        },
    );
    let (now_in_flight, most, refused) = (AtomicU32::new(0), AtomicU32::new(0), AtomicU32::new(0));
    let barrier = Barrier::new(4);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                barrier.wait();
                for _ in 0..2_000 {
                    // Three at a time from each thread: twelve want in.
                    let admissions: Vec<_> = (0..3).map(|_| traffic.admit(&backend)).collect();
                    let admitted = admissions.iter().filter(|a| a.is_ok()).count() as u32;
                    refused.fetch_add(3 - admitted, Ordering::Relaxed);
                    most.fetch_max(
                        now_in_flight.fetch_add(admitted, Ordering::SeqCst) + admitted,
                        Ordering::SeqCst,
                    );
                    now_in_flight.fetch_sub(admitted, Ordering::SeqCst);
                }
            });
        }
    });
    assert!(most.into_inner() <= 7);
    let all: Vec<_> = (0..9).map(|_| traffic.admit(&backend)).collect();
    assert_eq!(
        all.iter().filter(|a| a.is_ok()).count(),
        7,
        "every one was counted out again"
    );
    assert_eq!(all.last().unwrap().as_ref().unwrap_err(), &Rejection::MaxRequests);
}

#[test]
fn turns_skip_what_was_tried() {
    let traffic = Traffic::new();
    let backend = backend(3, breaker());
    let now = Instant::now();
    let admission = traffic.admit(&backend).unwrap();
    let mut tried = Vec::new();
    while let Ok(picked) = admission.pick(&backend.endpoints_v4, &tried, now) {
        assert!(!tried.contains(&picked.endpoint.address));
        tried.push(picked.endpoint.address);
    }
    assert_eq!(tried.len(), 3);
    assert_eq!(
        admission.pick(&backend.endpoints_v4, &tried, now).unwrap_err(),
        Rejection::AllTried
    );
    assert_eq!(
        admission.pick(&backend.endpoints_v6, &[], now).unwrap_err(),
        Rejection::NoEndpoints
    );
}

#[test]
fn a_source_stays_with_its_endpoint() {
    const TIMEOUT: Duration = Duration::from_secs(60);
    let with = |numbers: &[u8]| {
        let mut backend = backend(0, breaker());
        let mut service = Service::clone(&backend.service);
        service.session_affinity = Some(TIMEOUT);
        backend.service = Arc::new(service);
        backend.endpoints_v4 = numbers.iter().copied().map(endpoint).collect();
        backend
    };
    let traffic = Traffic::new();
    let start = Instant::now();
    let ask = |backend: &Backend, source: [u8; 4], tried: &[SocketAddr], now: Instant| {
        let admission = traffic.admit(backend).unwrap().of_source(source.into());
        admission
            .pick(&backend.endpoints_v4, tried, now)
            .unwrap()
            .endpoint
            .address
    };
    let sources: Vec<[u8; 4]> = (1..=40).map(|n| [10, 9, 0, n]).collect();
    let few = with(&[1, 2]);
    let first: Vec<SocketAddr> = sources.iter().map(|source| ask(&few, *source, &[], start)).collect();
    assert!(first.contains(&last(1)) && first.contains(&last(2)));
    // New endpoints take nobody away, for as long as the source asks in time.
    let more = with(&[1, 2, 3, 4, 5, 6]);
    let mut now = start;
    for _ in 0..3 {
        now += TIMEOUT - Duration::from_secs(1);
        let again: Vec<SocketAddr> = sources.iter().map(|source| ask(&more, *source, &[], now)).collect();
        assert_eq!(again, first);
    }
    // Where its endpoint was tried another serves, and the binding stays.
    for (source, bound) in sources.iter().zip(&first) {
        assert_ne!(ask(&more, *source, &[*bound], now), *bound);
        assert_eq!(ask(&more, *source, &[], now), *bound);
    }
    // Who was silent for too long is bound anew, by its hash: as on an agent that has just started.
    now += TIMEOUT;
    let anew: Vec<SocketAddr> = sources.iter().map(|source| ask(&more, *source, &[], now)).collect();
    let fresh = Traffic::new();
    let by_hash = |source: &[u8; 4]| {
        let admission = fresh.admit(&more).unwrap().of_source((*source).into());
        admission.pick(&more.endpoints_v4, &[], now).unwrap().endpoint.address
    };
    assert_eq!(anew, sources.iter().map(by_hash).collect::<Vec<_>>());
    assert_ne!(anew, first);
    // An endpoint that is gone binds nobody.
    let fewer = with(&[5]);
    assert!(sources.iter().all(|source| ask(&fewer, *source, &[], now) == last(5)));
}

#[test]
fn only_so_many_sources_are_remembered() {
    let traffic = Traffic::new();
    let mut backend = backend(3, breaker());
    let mut service = Service::clone(&backend.service);
    service.session_affinity = Some(Duration::from_secs(60));
    backend.service = Arc::new(service);
    let now = Instant::now();
    for number in 0..2 * super::BOUND_SOURCES_MAX as u32 {
        let admission = traffic.admit(&backend).unwrap().of_source(number.to_be_bytes().into());
        admission.pick(&backend.endpoints_v4, &[], now).unwrap();
    }
    assert_eq!(
        traffic.backend(&backend.key).unwrap().bound.lock().len(),
        super::BOUND_SOURCES_MAX
    );
    // Those who are silent make room.
    let admission = traffic.admit(&backend).unwrap().of_source([9, 9, 9, 9].into());
    admission
        .pick(&backend.endpoints_v4, &[], now + Duration::from_secs(60))
        .unwrap();
    assert_eq!(traffic.backend(&backend.key).unwrap().bound.lock().len(), 1);
}

#[test]
fn an_open_breaker_closes_one_endpoint_and_not_the_service() {
    let traffic = Traffic::new();
    let backend = backend(
        2,
        BreakerSettings {
            consecutive_failures: Some(2),
            ..breaker()
        },
    );
    let start = Instant::now();
    let admission = traffic.admit(&backend).unwrap();
    let pick = |now| admission.pick(&backend.endpoints_v4, &[], now);
    // The first endpoint fails twice, the second is well.
    for _ in 0..4 {
        let picked = pick(start).unwrap();
        let report = if picked.endpoint.address == last(1) {
            Report::Failure
        } else {
            Report::Success
        };
        picked.report(report, start);
    }
    for _ in 0..10 {
        let picked = pick(start + Duration::from_secs(4)).unwrap();
        assert_eq!(picked.endpoint.address, last(2));
        picked.report(Report::Success, start);
    }
    // The other one too: now nothing is sent.
    for _ in 0..2 {
        assert!(pick(start).map(|picked| picked.report(Report::Failure, start)).is_ok());
    }
    assert_eq!(
        pick(start + Duration::from_secs(4)).unwrap_err(),
        Rejection::BreakerOpen
    );
    // Half open: one probe each, and no more while they are under way.
    let later = start + Duration::from_secs(5);
    let probes = [pick(later).unwrap(), pick(later).unwrap()];
    assert_eq!(pick(later).unwrap_err(), Rejection::BreakerOpen);
    for probe in probes {
        probe.report(Report::Success, later);
    }
    assert!(
        traffic
            .status()
            .iter()
            .all(|endpoint| endpoint.breaker == BreakerState::Closed && endpoint.active == 0)
    );
    assert!(pick(later).is_ok());
}

#[test]
fn a_half_open_breaker_lets_exactly_its_probes_through() {
    let traffic = Traffic::new();
    let settings = BreakerSettings {
        consecutive_failures: Some(1),
        half_open_probes: 3,
        ..breaker()
    };
    let backend = backend(1, settings);
    let start = Instant::now();
    let trip = traffic.admit(&backend).unwrap();
    assert!(
        trip.pick(&backend.endpoints_v4, &[], start)
            .unwrap()
            .report(Report::Failure, start)
    );
    let later = start + Duration::from_secs(5);
    let barrier = Barrier::new(4);
    let picked: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    barrier.wait();
                    let admission = traffic.admit(&backend).unwrap();
                    (0..50)
                        .filter_map(|_| admission.pick(&backend.endpoints_v4, &[], later).ok())
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(picked.len(), 3);
    // Cancelled ones make room for others.
    drop(picked);
    assert!(trip.pick(&backend.endpoints_v4, &[], later).is_ok());
}

async fn is_pending<F: Future + Unpin>(future: &mut F) -> bool {
    std::future::poll_fn(|cx| std::task::Poll::Ready(std::pin::Pin::new(&mut *future).poll(cx).is_pending())).await
}

#[tokio::test]
async fn connections_are_waited_for_in_bounds() {
    let traffic = Traffic::new();
    let settings = BreakerSettings {
        max_connections: Some(1),
        max_pending_requests: Some(1),
        ..breaker()
    };
    let first_backend = backend(1, settings.clone());
    let admission = traffic.admit(&first_backend).unwrap();
    let held = admission.connection().await.unwrap();
    assert_eq!(admission.try_connection().unwrap_err(), Rejection::MaxConnections);
    let mut waiting = Box::pin(admission.connection());
    assert!(is_pending(&mut waiting).await);
    assert_eq!(admission.connection().await.unwrap_err(), Rejection::MaxPending);
    drop(held);
    let held = waiting.await.unwrap();
    // One that gives up waiting leaves its place.
    let mut waiting = Box::pin(admission.connection());
    assert!(is_pending(&mut waiting).await);
    drop(waiting);
    let mut waiting = Box::pin(admission.connection());
    assert!(is_pending(&mut waiting).await);

    // A later revision allows more: who waits gets on.
    let more = backend(
        1,
        BreakerSettings {
            max_connections: Some(3),
            ..settings.clone()
        },
    );
    let later = traffic.admit(&more).unwrap();
    let third = later.connection().await.unwrap();
    let second = waiting.await.unwrap();
    assert_eq!(later.try_connection().unwrap_err(), Rejection::MaxConnections);
    // And one that allows less: what is in use stays, and is not given out again.
    let less = traffic.admit(&first_backend).unwrap();
    assert_eq!(less.try_connection().unwrap_err(), Rejection::MaxConnections);
    drop((held, second));
    assert_eq!(less.try_connection().unwrap_err(), Rejection::MaxConnections);
    drop(third);
    let only = less.try_connection().unwrap();
    assert_eq!(less.try_connection().unwrap_err(), Rejection::MaxConnections);
    drop(only);
}

#[tokio::test]
async fn pending_counts_connections_being_made_where_those_are_unlimited() {
    let traffic = Traffic::new();
    let backend = backend(
        1,
        BreakerSettings {
            max_pending_requests: Some(1),
            ..breaker()
        },
    );
    let admission = traffic.admit(&backend).unwrap();
    let mut making = admission.connection().await.unwrap();
    assert_eq!(admission.connection().await.unwrap_err(), Rejection::MaxPending);
    making.connected();
    assert!(admission.connection().await.is_ok());
}

#[test]
fn retries_have_a_budget() {
    let traffic = Traffic::new();
    let backend = backend(1, breaker());
    let admissions: Vec<_> = (0..50).map(|_| traffic.admit(&backend).unwrap()).collect();
    // 20 % of 50.
    let retries: Vec<_> = (0..20).filter_map(|_| admissions[0].retry(20)).collect();
    assert_eq!(retries.len(), 10);
    drop(retries);
    drop(admissions);
    let one = traffic.admit(&backend).unwrap();
    let few: Vec<_> = (0..20).filter_map(|_| one.retry(20)).collect();
    assert_eq!(few.len(), 3, "a little is always allowed");
}

#[test]
fn state_outlives_revisions_and_goes_with_the_backend() {
    let traffic = Traffic::new();
    let settings = BreakerSettings {
        consecutive_failures: Some(1),
        ..breaker()
    };
    let old = backend(2, settings.clone());
    let now = Instant::now();
    let admission = traffic.admit(&old).unwrap();
    let picked = admission.pick(&old.endpoints_v4, &[last(2)], now).unwrap();
    picked.report(Report::Failure, now);
    // A new revision of the same backend: the breaker is still open.
    let new = backend(2, settings.clone());
    traffic.retain(|key| (*key == new.key).then_some(&new), |_| false);
    let again = traffic.admit(&new).unwrap();
    assert_eq!(
        again.pick(&new.endpoints_v4, &[last(2)], now).unwrap_err(),
        Rejection::BreakerOpen
    );
    // The endpoint leaves and comes back: it starts anew.
    let left = Backend {
        endpoints_v4: vec![endpoint(2)],
        ..new.clone()
    };
    traffic.retain(|key| (*key == left.key).then_some(&left), |_| false);
    assert!(again.pick(&new.endpoints_v4, &[last(2)], now).is_ok());
    // The backend goes, with requests under way.
    traffic.retain(|_| None, |_| false);
    assert!(traffic.status().is_empty());
    drop((admission, again));
}

struct Get;
impl Request for Get {
    fn method(&self) -> &str {
        "GET"
    }
    fn path(&self) -> &str {
        "/"
    }
    fn query(&self) -> Option<&str> {
        None
    }
    fn authority(&self) -> Option<&str> {
        None
    }
    fn header(&self, _: &str) -> Option<&str> {
        None
    }
    fn each_header_value(&self, _: &str, _: &mut dyn FnMut(&str)) {}
}

fn limit(id: &'static str, burst: u32, shadow: bool) -> LimitSettings {
    LimitSettings {
        id: RuleId::constant(id),
        key: vec![LimitKeyPart::SourceAddress],
        requests: 1,
        per: Duration::from_secs(90),
        burst,
        shadow,
    }
}

#[test]
fn limits_take_of_all_or_of_none() {
    let traffic = Traffic::new();
    let (wide, narrow) = (limit("wide", 3, false), limit("narrow", 1, false));
    let now = Instant::now() + Duration::from_secs(1);
    let source = |last| LimitSource {
        identity: None,
        address: [10, 0, 0, last].into(),
    };
    let ask = |limits: &[&LimitSettings], last, now| {
        traffic.limit(limits.iter().copied(), source(last), &Get, now, |_| {
            panic!("no shadow here")
        })
    };
    assert_eq!(ask(&[&wide, &narrow], 1, now), Ok(()));
    // The narrow one refuses; the wide one's token comes back each time.
    for _ in 0..10 {
        let limited = ask(&[&wide, &narrow], 1, now).unwrap_err();
        assert_eq!((limited.rule.as_str(), limited.retry_after), ("narrow", 90));
    }
    assert_eq!(ask(&[&wide], 1, now), Ok(()));
    assert_eq!(ask(&[&wide], 1, now), Ok(()));
    let limited = ask(&[&wide], 1, now + Duration::from_millis(1)).unwrap_err();
    assert_eq!(limited.retry_after, 90);
    assert_eq!(ask(&[&wide, &narrow], 2, now), Ok(()), "another source has its own");
    assert_eq!(ask(&[&wide, &narrow], 1, now + Duration::from_secs(90)), Ok(()));
    assert_eq!(ask(&[], 1, now), Ok(()));
}

#[test]
fn shadow_limits_tell_and_refuse_nothing() {
    let traffic = Traffic::new();
    let shadow = limit("shadow", 1, true);
    let mut told = Vec::new();
    let source = LimitSource {
        identity: None,
        address: [10, 0, 0, 1].into(),
    };
    for _ in 0..3 {
        let limited = traffic.limit([&shadow], source, &Get, Instant::now(), |rule| told.push(rule.clone()));
        assert_eq!(limited, Ok(()));
    }
    assert_eq!(told.len(), 2);
    traffic.retain(|_| None, |_| false);
    let mut again = 0;
    let _ = traffic.limit([&shadow], source, &Get, Instant::now(), |_| again += 1);
    assert_eq!(again, 0, "a limit that is gone starts anew");
}
