//! Records against the exposition and the lines: what went in must come out, once, and in a form that parses.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    io::{self, Write},
    path::PathBuf,
    sync::mpsc,
    time::SystemTime,
};

use mesh_api::{
    identity::TrustDomain,
    request::Request,
    rule::RuleId,
    workload::{ObjectName, Revision, Service, Workload},
};
use parking_lot::Mutex;

use super::*;

fn workload(name: &str, app: &str) -> Arc<Workload> {
    let domain = TrustDomain::new("test.mesh").unwrap();
    Arc::new(Workload {
        name: ObjectName::new("shop", name),
        app: app.into(),
        version: "v1".into(),
        identity: mesh_api::identity::SpiffeId::workload(&domain, "shop", app).unwrap(),
        node: "node-1".into(),
        node_addresses: Vec::new(),
        addresses: vec!["10.0.0.1".parse().unwrap()],
        labels: BTreeMap::new(),
        enrolled: true,
        ready: true,
        netns: None,
        ports: Vec::new(),
        probe_ports: Vec::new(),
        exclude_inbound_ports: Vec::new(),
        exclude_outbound_ports: Vec::new(),
        uid: "".into(),
        host_network: false,
        zone: "".into(),
    })
}

fn service(name: &str) -> Arc<Service> {
    Arc::new(Service {
        name: ObjectName::new("shop", name),
        addresses: Vec::new(),
        ports: Vec::new(),
        selector: BTreeMap::new(),
        publish_not_ready: false,
        ..Service::default()
    })
}

fn parties(events: &Events, source: &str, destination: &str) -> Arc<PartySet> {
    let (source, destination) = (workload("pod-1", source), workload("pod-2", destination));
    let service = service("cart");
    events.parties(Parties::of(
        Reporter::Source,
        Some(&source),
        Some(&destination),
        Some(&service),
        ConnectionSecurity::MutualTls,
    ))
}

type Sample = (String, BTreeMap<String, String>, f64);

/// A strict reader of OpenMetrics text: families described once and in one piece, samples with the suffixes of their
/// type, no series twice, histograms cumulative, `# EOF` at the end.
fn parse(text: &str) -> Vec<Sample> {
    let body = text.strip_suffix("# EOF\n").expect("ends with EOF");
    let mut types: BTreeMap<String, String> = BTreeMap::new();
    let mut samples: Vec<Sample> = Vec::new();
    let mut seen = HashSet::new();
    let mut family = String::new();
    for line in body.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            family = help.split(' ').next().unwrap().to_owned();
            assert!(!types.contains_key(&family), "{family} twice");
            continue;
        }
        if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').unwrap();
            assert_eq!(name, family);
            types.insert(name.to_owned(), kind.to_owned());
            continue;
        }
        assert!(!line.starts_with('#'), "{line}");
        let (series, value) = line.rsplit_once(' ').unwrap();
        assert!(seen.insert(series.to_owned()), "twice: {series}");
        let (name, labels) = match series.split_once('{') {
            Some((name, labels)) => (name, labels.strip_suffix('}').unwrap()),
            None => (series, ""),
        };
        let suffix = name
            .strip_prefix(family.as_str())
            .unwrap_or_else(|| panic!("{name} within {family}"));
        let allowed: &[&str] = match types[&family].as_str() {
            "counter" => &["_total"],
            "gauge" => &[""],
            "histogram" => &["_bucket", "_sum", "_count"],
            other => panic!("{other}"),
        };
        assert!(allowed.contains(&suffix), "{name} in a {}", types[&family]);
        let value = value.parse().unwrap();
        samples.push((name.to_owned(), parse_labels(labels), value));
    }
    let mut last = (String::new(), 0.0);
    for (name, labels, value) in samples.iter().filter(|(name, ..)| name.ends_with("_bucket")) {
        let mut key = labels.clone();
        let bound = key.remove("le").expect("le");
        let key = format!("{name}{key:?}");
        if key == last.0 {
            assert!(*value >= last.1, "{key} le={bound} falls");
        }
        last = (key, *value);
    }
    samples
}

fn parse_labels(text: &str) -> BTreeMap<String, String> {
    let mut labels = BTreeMap::new();
    let mut chars = text.chars().peekable();
    while chars.peek().is_some() {
        let key: String = chars.by_ref().take_while(|c| *c != '=').collect();
        assert!(key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'), "{key:?}");
        assert_eq!(chars.next(), Some('"'));
        let mut value = String::new();
        loop {
            match chars.next().expect("an end of the value") {
                '"' => break,
                '\\' => value.push(match chars.next().unwrap() {
                    'n' => '\n',
                    c => c,
                }),
                c => value.push(c),
            }
        }
        assert!(labels.insert(key, value).is_none());
        if let Some(c) = chars.next() {
            assert_eq!(c, ',');
        }
    }
    labels
}

fn value(samples: &[Sample], name: &str, labels: &[(&str, &str)]) -> f64 {
    let found: Vec<_> = samples
        .iter()
        .filter(|(n, l, _)| n == name && labels.iter().all(|(k, v)| l.get(*k).map(String::as_str) == Some(*v)))
        .collect();
    found.iter().map(|(_, _, v)| v).sum()
}

fn scrape(events: &Events) -> Vec<Sample> {
    parse(&events.scrape().unwrap())
}

#[tokio::test(start_paused = true)]
async fn a_request_moves_its_series_and_carries_istios_labels() {
    let events = Events::quiet();
    let mut record = events.request(parties(&events, "front", "cart"), Protocol::Http1);
    record.set_status(200);
    record.set_bytes(2000, 10);
    tokio::time::advance(Duration::from_millis(3)).await;
    record.close(Outcome::Served);
    let mut refused = events.request(parties(&events, "front", "cart"), Protocol::Grpc);
    refused.set_grpc_status(14);
    refused.close(Outcome::Refused(Refusal::BreakerOpen));

    let samples = scrape(&events);
    let (_, labels, one) = samples
        .iter()
        .find(|(name, labels, _)| name == "mesh_requests_total" && labels["response_code"] == "200")
        .unwrap();
    assert_eq!(*one, 1.0);
    let expected = [
        ("connection_security_policy", "mutual_tls"),
        ("destination_app", "cart"),
        ("destination_principal", "spiffe://test.mesh/ns/shop/sa/cart"),
        ("destination_service", "cart.shop.svc.cluster.local"),
        ("destination_service_name", "cart"),
        ("destination_service_namespace", "shop"),
        ("destination_version", "v1"),
        ("destination_workload", "cart"),
        ("destination_workload_namespace", "shop"),
        ("grpc_response_status", ""),
        ("reporter", "source"),
        ("request_protocol", "http"),
        ("response_code", "200"),
        ("response_flags", "-"),
        ("source_app", "front"),
        ("source_principal", "spiffe://test.mesh/ns/shop/sa/front"),
        ("source_version", "v1"),
        ("source_workload", "front"),
        ("source_workload_namespace", "shop"),
    ];
    let labels: Vec<(&str, &str)> = labels.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    assert_eq!(labels, expected);

    let ok = ("response_code", "200");
    let bucket = |le: &str| value(&samples, "mesh_request_duration_seconds_bucket", &[ok, ("le", le)]);
    assert_eq!((bucket("0.0025"), bucket("0.005"), bucket("+Inf")), (0.0, 1.0, 1.0));
    assert_eq!(value(&samples, "mesh_request_duration_seconds_sum", &[ok]), 0.003);
    assert_eq!(value(&samples, "mesh_response_bytes_sum", &[ok]), 2000.0);
    assert_eq!(
        value(&samples, "mesh_request_bytes_bucket", &[ok, ("le", "256.0")]),
        1.0
    );
    let refused = [
        ("response_code", "503"),
        ("response_flags", "UO"),
        ("grpc_response_status", "14"),
    ];
    assert_eq!(value(&samples, "mesh_requests_total", &refused), 1.0);
    assert_eq!(
        value(&samples, "nodemesh_agent_refusals_total", &[("reason", "breaker-open")]),
        1.0
    );
}

#[test]
fn records_close_exactly_once_and_dropping_is_a_close() {
    let events = Events::quiet();
    let set = parties(&events, "front", "cart");
    let open = |kind| value(&scrape(&events), "nodemesh_agent_records_open", &[("kind", kind)]);
    let closed = |kind: &str, outcome: &str| {
        let labels = [("kind", kind), ("outcome", outcome)];
        value(&scrape(&events), "nodemesh_agent_records_closed_total", &labels)
    };
    let mut connection = events.connection(set.clone(), Protocol::Tcp);
    connection.established();
    let request = events.request(set.clone(), Protocol::Http1);
    assert_eq!((open("connection"), open("request")), (1.0, 1.0));
    drop(request);
    drop(connection);
    assert_eq!((open("connection"), open("request")), (0.0, 0.0));
    assert_eq!(
        (closed("connection", "cancelled"), closed("request", "cancelled")),
        (1.0, 1.0)
    );
    events.connection(set.clone(), Protocol::Tcp).close(Outcome::Served);
    events.request(set, Protocol::Http1).close(Outcome::Drained);
    assert_eq!(
        (closed("connection", "served"), closed("request", "drained")),
        (1.0, 1.0)
    );
    assert_eq!(
        (closed("connection", "cancelled"), closed("request", "cancelled")),
        (1.0, 1.0)
    );
    let samples = scrape(&events);
    assert_eq!(
        value(
            &samples,
            "mesh_requests_total",
            &[("response_flags", "DC"), ("response_code", "0")]
        ),
        1.0
    );
    assert_eq!(value(&samples, "mesh_tcp_connections_closed_total", &[]), 2.0);
}

#[test]
fn bytes_of_a_connection_are_told_once_however_often_progress_is() {
    let events = Events::quiet();
    let mut record = events.connection(parties(&events, "front", "cart"), Protocol::Tcp);
    record.established();
    for step in 1..=3 {
        record.set_bytes(step * 100, step * 10);
        record.progress();
        let samples = scrape(&events);
        assert_eq!(value(&samples, "mesh_tcp_sent_bytes_total", &[]), (step * 100) as f64);
    }
    record.set_bytes(1000, 100);
    record.close(Outcome::DestinationReset);
    let samples = scrape(&events);
    assert_eq!(value(&samples, "mesh_tcp_sent_bytes_total", &[]), 1000.0);
    assert_eq!(value(&samples, "mesh_tcp_received_bytes_total", &[]), 100.0);
    assert_eq!(value(&samples, "mesh_tcp_connections_opened_total", &[]), 1.0);
    assert_eq!(
        value(
            &samples,
            "mesh_tcp_connections_closed_total",
            &[("response_flags", "UC")]
        ),
        1.0
    );
}

#[test]
fn a_connection_that_carries_http_is_counted_by_its_requests_alone() {
    let events = Events::quiet();
    let mut record = events.connection(parties(&events, "front", "cart"), Protocol::Tcp);
    record.set_protocol(Protocol::Http1);
    record.established();
    record.close(Outcome::Served);
    let samples = scrape(&events);
    assert_eq!(value(&samples, "mesh_tcp_connections_opened_total", &[]), 0.0);
    assert_eq!(
        value(
            &samples,
            "nodemesh_agent_records_closed_total",
            &[("kind", "connection")]
        ),
        1.0
    );
}

#[test]
fn series_of_gone_peers_expire_and_those_in_use_do_not() {
    let events = Events::quiet();
    let start = now();
    let gone = parties(&events, "front", "gone");
    events.request(gone.clone(), Protocol::Http1).close(Outcome::Served);
    let kept = parties(&events, "front", "kept");
    let held_open = events.request(kept.clone(), Protocol::Http1);
    assert_eq!(events.expire(start + SERIES_IDLE / 2), 0, "too early");
    // The caller's own handle keeps a set alive: it may be about to move it.
    assert_eq!(events.expire(start + SERIES_IDLE * 2), 0);
    drop((gone, kept));
    assert_eq!(events.expire(start + SERIES_IDLE * 2), 1);
    let samples = scrape(&events);
    assert_eq!(value(&samples, "mesh_requests_total", &[]), 0.0);
    assert_eq!(value(&samples, "nodemesh_agent_series", &[]), 0.0);
    assert_eq!(value(&samples, "nodemesh_agent_series_expired_total", &[]), 1.0);
    held_open.close(Outcome::Served);
    events
        .request(parties(&events, "front", "gone"), Protocol::Http1)
        .close(Outcome::Served);
    let samples = scrape(&events);
    for destination in ["kept", "gone"] {
        assert_eq!(
            value(&samples, "mesh_requests_total", &[("destination_app", destination)]),
            1.0
        );
    }
}

#[test]
fn the_number_of_series_is_bounded_and_nothing_goes_uncounted() {
    let mut config = EventsConfig::new("node");
    config.series_max = 20;
    let events = Events::new(config);
    for n in 0..50 {
        let set = parties(&events, "front", &format!("app-{n}"));
        let mut record = events.request(set, Protocol::Http1);
        record.set_status(200 + n);
        record.close(Outcome::Served);
    }
    let set = parties(&events, "front", "app-0");
    for status in 100..150 {
        let mut record = events.request(set.clone(), Protocol::Http1);
        record.set_status(status);
        record.close(Outcome::Served);
    }
    let mut connection = events.connection(set, Protocol::Tcp);
    connection.established();
    connection.close(Outcome::Served);
    let samples = scrape(&events);
    let series = samples
        .iter()
        .filter(|(name, ..)| name == "mesh_requests_total")
        .count();
    assert!(series <= 22, "{series}");
    assert_eq!(
        value(&samples, "mesh_requests_total", &[]),
        100.0,
        "every request counts somewhere"
    );
    assert_eq!(
        value(&samples, "mesh_requests_total", &[("response_code", "other")]),
        80.0
    );
    assert_eq!(
        value(
            &samples,
            "mesh_tcp_connections_closed_total",
            &[("response_flags", "other")]
        ),
        1.0
    );
    assert!(value(&samples, "nodemesh_agent_series_overflows_total", &[]) >= 80.0);
}

#[test]
fn istio_names_are_given_when_asked_for() {
    let mut config = EventsConfig::new("node");
    config.compat = Compat::Istio;
    let events = Events::new(config);
    let mut record = events.request(parties(&events, "front", "cart"), Protocol::Http2);
    record.set_status(200);
    record.close(Outcome::Served);
    let samples = scrape(&events);
    let labels = [("destination_canonical_service", "cart"), ("response_code", "200")];
    assert_eq!(value(&samples, "istio_requests_total", &labels), 1.0);
    let bucket = [("le", "0.5")];
    assert_eq!(
        value(&samples, "istio_request_duration_milliseconds_bucket", &bucket),
        1.0
    );
    assert!(samples.iter().all(|(name, ..)| !name.starts_with("mesh_")));
}

#[test]
fn parties_of_the_same_values_are_one_set_and_the_shortcut_never_goes_stale() {
    let events = Events::quiet();
    let set = |source: &Arc<Workload>| {
        events.parties_of(Reporter::Source, Some(source), None, None, ConnectionSecurity::None)
    };
    let front = workload("a", "front");
    assert!(Arc::ptr_eq(&set(&front), &set(&front)));
    assert!(
        Arc::ptr_eq(&set(&front), &set(&workload("b", "front"))),
        "two pods of one role"
    );
    assert!(!Arc::ptr_eq(&set(&front), &set(&workload("a", "back"))));
    // Workloads come and go at the same addresses; each must find its own parties.
    for n in 0..1000 {
        let app = format!("app-{}", n % 7);
        assert_eq!(&*set(&workload("a", &app)).parties().source.app, app.as_str());
    }
    events.expire(now() + SERIES_IDLE * 2);
    let again = set(&front);
    events.request(again, Protocol::Http1).close(Outcome::Served);
    assert_eq!(
        value(&scrape(&events), "mesh_requests_total", &[("source_app", "front")]),
        1.0
    );
    let other = Events::quiet();
    other.parties_of(Reporter::Source, Some(&front), None, None, ConnectionSecurity::None);
    assert_eq!(
        value(&scrape(&other), "mesh_requests_total", &[]),
        0.0,
        "another instance"
    );
}

#[test]
fn a_source_adds_gauges_and_the_last_of_two_equal_series_wins() {
    let events = Events::quiet();
    events.add_source(Box::new(|samples: &mut Samples| {
        for value in [1.0, 2.5] {
            samples.gauge("nodemesh_agent_test", "A gauge", [("map", "a\"b\\c\nd".into())], value);
        }
        samples.counter("nodemesh_agent_test_things", "A counter", [], u64::from(u32::MAX));
    }));
    let samples = scrape(&events);
    assert_eq!(value(&samples, "nodemesh_agent_test", &[("map", "a\"b\\c\nd")]), 2.5);
    assert_eq!(
        value(&samples, "nodemesh_agent_test_things_total", &[]),
        f64::from(u32::MAX)
    );
    assert!(value(&samples, "process_resident_memory_bytes", &[]) > 1e6);
}

struct Head;

impl Request for Head {
    fn method(&self) -> &str {
        "GET"
    }
    fn path(&self) -> &str {
        "/a\"b\u{7f}\n"
    }
    fn query(&self) -> Option<&str> {
        Some("secret=1")
    }
    fn authority(&self) -> Option<&str> {
        Some("cart.shop")
    }
    fn header(&self, _name: &str) -> Option<&str> {
        None
    }
    fn each_header_value(&self, _name: &str, _tell: &mut dyn FnMut(&str)) {}
}

/// A writer whose test decides when a write returns, and sees what was written.
struct Gate {
    open: mpsc::Receiver<()>,
    written: Arc<Mutex<Vec<u8>>>,
}

impl Write for Gate {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // The gate stays open once its other end is gone.
        let _ = self.open.recv();
        self.written.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn logging(format: LogFormat, bytes_max: usize) -> (Arc<Events>, mpsc::Sender<()>, Arc<Mutex<Vec<u8>>>) {
    let written = Arc::new(Mutex::new(Vec::new()));
    let (gate, open) = mpsc::channel();
    let out = Gate {
        open,
        written: written.clone(),
    };
    let mut config = EventsConfig::new("node-1");
    config.access_log = Some(AccessLog::to(Box::new(out), format, "node-1", bytes_max).unwrap());
    (Events::new(config), gate, written)
}

#[tokio::test(start_paused = true)]
async fn a_line_tells_all_that_was_learnt() {
    let (events, gate, written) = logging(LogFormat::Json, 1 << 20);
    drop(gate);
    let mut record = events.request(parties(&events, "front", "cart"), Protocol::Http1);
    record.set_head(&Head);
    record.set_addresses("10.0.0.1:4000".parse().unwrap(), "10.96.0.1:80".parse().unwrap());
    record.set_endpoint("[fd00::2]:8080".parse().unwrap());
    record.set_workloads(Some(&workload("front-1", "front")), None);
    record.set_rule(RuleId::new("accesspolicy/shop/front/0"), Revision(7));
    record.set_route(RuleId::new("httproute/shop/cart/0"));
    record.set_trace("req-1", "4bf92f3577b34da6a3ce929d0e0e4736");
    record.attempt();
    tokio::time::advance(Duration::from_micros(1500)).await;
    record.set_status(403);
    record.close(Outcome::Refused(Refusal::AccessDeniedRequest));
    let mut connection = events.connection(parties(&events, "front", "cart"), Protocol::Tcp);
    connection.set_error(&"connection refused (os error 111)");
    connection.set_bytes(5, 6);
    connection.close(Outcome::Refused(Refusal::DialRefused));
    let mut silent = events.connection(parties(&events, "front", "cart"), Protocol::Http1);
    silent.established();
    silent.close(Outcome::Served);
    events.flush();

    let text = String::from_utf8(written.lock().clone()).unwrap();
    let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 2, "{text}");
    let expected = serde_json::json!({
        "event.name": "request",
        "nodemesh.outcome": "refused",
        "nodemesh.reporter": "source",
        "nodemesh.node": "node-1",
        "nodemesh.connection.security": "mutual_tls",
        "nodemesh.response_flags": "UAEX",
        "nodemesh.refusal": "access-denied-request",
        "nodemesh.refusal_code": 301,
        "nodemesh.duration_ms": 1.5,
        "network.protocol.name": "http",
        "network.protocol.version": "1.1",
        "http.request.method": "GET",
        "url.path": "/a\"b\u{7f}\n",
        "server.address": "cart.shop",
        "http.response.status_code": 403,
        "http.request.body.size": 0,
        "http.response.body.size": 0,
        "nodemesh.attempts": 1,
        "nodemesh.response_head_ms": 1.5,
        "source.address": "10.0.0.1",
        "source.port": 4000,
        "destination.address": "10.96.0.1",
        "destination.port": 80,
        "nodemesh.endpoint.address": "fd00::2",
        "nodemesh.endpoint.port": 8080,
        "nodemesh.source.workload": "front",
        "nodemesh.source.namespace": "shop",
        "nodemesh.source.identity": "spiffe://test.mesh/ns/shop/sa/front",
        "nodemesh.source.version": "v1",
        "nodemesh.source.pod": "front-1",
        "nodemesh.destination.workload": "cart",
        "nodemesh.destination.namespace": "shop",
        "nodemesh.destination.identity": "spiffe://test.mesh/ns/shop/sa/cart",
        "nodemesh.destination.version": "v1",
        "nodemesh.destination.service": "cart.shop.svc.cluster.local",
        "nodemesh.rule": "accesspolicy/shop/front/0",
        "nodemesh.route": "httproute/shop/cart/0",
        "nodemesh.revision": 7,
        "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
        "http.request.header.x-request-id": "req-1",
    });
    let mut first = lines[0].clone();
    let time = first.as_object_mut().unwrap().remove("timestamp").unwrap();
    assert_eq!(time.as_str().unwrap().len(), "2026-11-21T06:00:00.000Z".len());
    assert_eq!(first, expected);
    assert!(
        !text.contains("secret"),
        "the query may hold secrets and is never written"
    );
    assert_eq!(lines[1]["event.name"], "connection");
    assert_eq!(lines[1]["nodemesh.bytes_received"], 6);
    assert_eq!(lines[1]["error.message"], "connection refused (os error 111)");
    assert_eq!(lines[1]["nodemesh.refusal"], "dial-refused");
}

#[test]
fn text_lines_hold_no_control_bytes() {
    let (events, gate, written) = logging(LogFormat::Text, 1 << 20);
    drop(gate);
    let mut record = events.request(parties(&events, "front", "cart"), Protocol::Http1);
    record.set_head(&Head);
    record.close(Outcome::Served);
    events.flush();
    let text = String::from_utf8(written.lock().clone()).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.contains("url.path=\"/a\\\"b\\u007f\\n\""), "{text}");
    assert!(text.contains(" http.response.status_code=0 "), "{text}");
    assert!(!text.trim_end().bytes().any(|b| b.is_ascii_control()));
}

#[test]
fn a_full_buffer_drops_and_counts_and_never_waits() {
    let (events, gate, written) = logging(LogFormat::Json, 64 * 1024);
    let set = parties(&events, "front", "cart");
    for _ in 0..1000 {
        events.request(set.clone(), Protocol::Http1).close(Outcome::Served);
    }
    let samples = scrape(&events);
    let taken = value(&samples, "nodemesh_agent_access_log_lines_total", &[]);
    let dropped = value(&samples, "nodemesh_agent_access_log_dropped_total", &[]);
    assert!(dropped > 0.0 && taken > 0.0, "{taken} taken, {dropped} dropped");
    assert_eq!(taken + dropped, 1000.0);
    drop(gate);
    events.flush();
    let lines = written.lock().iter().filter(|b| **b == b'\n').count();
    assert_eq!(lines as f64, taken);
}

#[test]
fn dropping_the_events_writes_what_waits() {
    let (events, gate, written) = logging(LogFormat::Json, 1 << 20);
    drop(gate);
    let set = parties(&events, "front", "cart");
    for _ in 0..10 {
        events.request(set.clone(), Protocol::Http1).close(Outcome::Served);
    }
    drop(events);
    assert_eq!(written.lock().iter().filter(|b| **b == b'\n').count(), 10);
}

#[test]
fn times_are_written_as_rfc_3339() {
    let cases = [
        (0, "1970-01-01T00:00:00.000Z"),
        (951_782_399_999, "2000-02-28T23:59:59.999Z"),
        (951_782_400_000, "2000-02-29T00:00:00.000Z"),
        (1_709_251_200_123, "2024-03-01T00:00:00.123Z"),
        (1_798_761_599_000, "2026-12-31T23:59:59.000Z"),
        (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
    ];
    for (millis, expected) in cases {
        let mut text = Vec::new();
        line::write_time(&mut text, SystemTime::UNIX_EPOCH + Duration::from_millis(millis));
        assert_eq!(text, expected.as_bytes());
    }
}

/// The tables of docs/events.md, from the code.
fn reference() -> [(&'static str, String); 3] {
    let mut refusals = String::from("| code | reason | flags | status | what happened |\n|---|---|---|---|---|\n");
    for refusal in Refusal::ALL {
        let status = refusal
            .http_status()
            .map_or("-".to_owned(), |status| status.as_u16().to_string());
        refusals += &format!(
            "| {} | `{}` | {} | {status} | {} |\n",
            refusal.code(),
            refusal.name(),
            refusal.response_flags(),
            refusal.describe().trim(),
        );
    }
    let mut notices = String::from("| event |\n|---|\n");
    for name in Event::NAMES {
        notices += &format!("| `{name}` |\n");
    }
    let text = Events::quiet().scrape().unwrap();
    let families: BTreeSet<&str> = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
    let mut metrics = String::from("| family | type | meaning |\n|---|---|---|\n");
    for family in families {
        let (name, kind) = family.split_once(' ').unwrap();
        let prefix = format!("# HELP {name} ");
        let help = text
            .lines()
            .find_map(|line| line.strip_prefix(prefix.as_str()))
            .unwrap();
        let total = if kind == "counter" { "_total" } else { "" };
        metrics += &format!("| `{name}{total}` | {kind} | {help} |\n");
    }
    [("refusals", refusals), ("events", notices), ("metrics", metrics)]
}

/// docs/events.md is generated where it lists what the code has: `NODEMESH_GEN=1` writes it anew.
#[test]
fn the_documentation_lists_what_there_is() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/events.md");
    let mut page = std::fs::read_to_string(&path).expect("docs/events.md");
    let before = page.clone();
    for (name, table) in reference() {
        let (begin, end) = (format!("<!-- {name}: generated -->\n"), format!("<!-- {name}: end -->"));
        let from = page.find(&begin).expect("the table's mark") + begin.len();
        let to = page.find(&end).expect("the table's end");
        page.replace_range(from..to, &table);
    }
    if std::env::var_os("NODEMESH_GEN").is_some() {
        std::fs::write(&path, &page).unwrap();
    } else {
        assert!(
            page == before,
            "docs/events.md is stale: run this test with NODEMESH_GEN=1"
        );
    }
}
