//! What the data path's own pieces cost: reading a head, and telling the record of a request.

use std::{hint::black_box, sync::Arc};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use mesh_agent::{
    event::{AccessLog, ConnectionSecurity, Events, EventsConfig, LogFormat, Outcome, Parties, Protocol, Reporter},
    l7::{
        Limits,
        h1::codec::{parse_request, parse_response},
    },
};
use mesh_api::{rule::RuleId, workload::Revision};

const REQUEST: &[u8] = b"GET /bytes/1024 HTTP/1.1\r\nhost: cart\r\nuser-agent: bench\r\naccept: */*\r\n\
    x-request-id: 6e1f0d0c-8f1e-4b0e-9d51-7a7d2c1f4b10\r\n\
    traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\nx-forwarded-for: 10.0.0.1\r\n\r\n";
const RESPONSE: &[u8] =
    b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\ncontent-length: 1024\r\nserver: bench\r\n\r\n";
/// Lines that may wait for the sink: enough that none is dropped.
const LOG_BYTES_MAX: usize = 64 << 20;

fn heads(criterion: &mut Criterion) {
    let limits = Limits::default();
    let mut group = criterion.benchmark_group("http/1.1");
    group.throughput(Throughput::Bytes(REQUEST.len() as u64));
    group.bench_function("request's head", |bencher| {
        bencher.iter(|| parse_request(black_box(REQUEST), &limits));
    });
    group.throughput(Throughput::Bytes(RESPONSE.len() as u64));
    group.bench_function("response's head", |bencher| {
        bencher.iter(|| parse_response(black_box(RESPONSE), false, &limits));
    });
    group.finish();
}

fn records(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("record");
    for (name, logged) in [
        ("of a request, metrics only", false),
        ("of a request, with its line", true),
    ] {
        let mut config = EventsConfig::new("node-1");
        if logged {
            let log = AccessLog::to(Box::new(std::io::sink()), LogFormat::Json, "node-1", LOG_BYTES_MAX);
            config.access_log = Some(log.expect("the log's thread"));
        }
        let events = Events::new(config);
        let parties = events.parties(Parties {
            security: ConnectionSecurity::MutualTls,
            ..Parties::unknown(Reporter::Source)
        });
        group.bench_function(name, |bencher| bencher.iter(|| record(&events, &parties)));
    }
    group.finish();
}

fn record(events: &Arc<Events>, parties: &Arc<mesh_agent::event::PartySet>) {
    let mut record = events.request(parties.clone(), Protocol::Http1);
    let address = |text: &str| text.parse().expect("an address");
    record.set_addresses(address("10.0.0.1:4000"), address("10.96.0.1:80"));
    record.set_endpoint(address("10.1.2.3:8080"));
    record.set_rule(RuleId::constant("accesspolicy/shop/front/0"), Revision(7));
    record.set_trace(
        "6e1f0d0c-8f1e-4b0e-9d51-7a7d2c1f4b10",
        "4bf92f3577b34da6a3ce929d0e0e4736",
    );
    record.attempt();
    record.set_status(200);
    record.set_bytes(1024, 0);
    record.close(Outcome::Served);
}

criterion_group!(benches, heads, records);
criterion_main!(benches);
