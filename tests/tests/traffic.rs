//! Unmodified programs through the mesh under strict mutual TLS: on one node and between two, by IPv4 and IPv6, by
//! service and by pod address. What each program sees must be what it would see without the mesh; what the mesh says of
//! it in logs and metrics must agree.

mod traffic_lab;

use std::{
    fmt,
    net::IpAddr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use mesh_tests::{Lab, until};
use serde_json::{Value as Json, json};
use traffic_lab::*;

/// `python3 -m http.server`, undeclared.
const PYTHON_HTTP: u16 = 8000;
/// nginx, declared as HTTP/1.
const NGINX: u16 = 8080;
/// gRPC, declared.
const GRPC: u16 = 50051;
/// iperf3, undeclared.
const IPERF: u16 = 5201;
/// The greeter, declared.
const GREETER_DECLARED: u16 = 2526;
/// TCP flows, undeclared.
const FLOWS_DETECTED: u16 = 7001;

/// How long records may take to be written.
const RECORDS_LIMIT: Duration = Duration::from_secs(10);

/// A program of the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Program {
    PythonHttpServer,
    Nginx,
    NginxHttp2,
    Grpc,
    GrpcDetected,
    Redis,
    Greeter,
    GreeterDeclared,
    Iperf3,
    WebSocket,
    TcpFlow,
    TcpFlowDetected,
}

/// Where the destination is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Node {
    Same,
    Other,
}

/// By which protocol it is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

/// By which address it is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Address {
    Service,
    Pod,
}

/// One entry of the matrix.
#[derive(Clone, Copy, Debug)]
struct Cell {
    program: Program,
    node: Node,
    family: Family,
    address: Address,
}

impl Program {
    const ALL: [Program; 12] = [
        Program::PythonHttpServer,
        Program::Nginx,
        Program::NginxHttp2,
        Program::Grpc,
        Program::GrpcDetected,
        Program::Redis,
        Program::Greeter,
        Program::GreeterDeclared,
        Program::Iperf3,
        Program::WebSocket,
        Program::TcpFlow,
        Program::TcpFlowDetected,
    ];

    const fn port(self) -> u16 {
        match self {
            Program::PythonHttpServer => PYTHON_HTTP,
            Program::Nginx => NGINX,
            Program::NginxHttp2 => NGINX_HTTP2,
            Program::Grpc => GRPC,
            Program::GrpcDetected => GRPC_DETECTED,
            Program::Redis => REDIS,
            Program::Greeter => GREETER,
            Program::GreeterDeclared => GREETER_DECLARED,
            Program::Iperf3 => IPERF,
            Program::WebSocket => WEB,
            Program::TcpFlow => FLOWS,
            Program::TcpFlowDetected => FLOWS_DETECTED,
        }
    }

    /// What the mesh must find it to be: `network.protocol.name` of its records.
    const fn protocol(self) -> &'static str {
        match self {
            Program::PythonHttpServer | Program::Nginx | Program::NginxHttp2 | Program::WebSocket => "http",
            Program::Grpc | Program::GrpcDetected => "grpc",
            _ => "tcp",
        }
    }
}

impl Node {
    const fn pod(self) -> &'static str {
        match self {
            Node::Same => "traffic/near",
            Node::Other => "traffic/far",
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Node::Same => "near",
            Node::Other => "far",
        }
    }

    const fn node(self) -> &'static str {
        match self {
            Node::Same => "node-1",
            Node::Other => "node-2",
        }
    }

    /// How the two agents say it was protected.
    const fn security(self) -> &'static str {
        match self {
            Node::Same => "same_node",
            Node::Other => "mutual_tls",
        }
    }
}

impl Cell {
    fn all() -> impl Iterator<Item = Cell> {
        Program::ALL.into_iter().flat_map(|program| {
            [Node::Same, Node::Other].into_iter().flat_map(move |node| {
                [Family::V4, Family::V6].into_iter().flat_map(move |family| {
                    [Address::Service, Address::Pod].map(move |address| Cell {
                        program,
                        node,
                        family,
                        address,
                    })
                })
            })
        })
    }

    fn host(&self, lab: &Lab) -> Result<IpAddr> {
        let addresses = match self.address {
            Address::Pod => lab.pod(self.node.pod())?.addresses.to_vec(),
            Address::Service => lab.state()?.service(self.node.pod())?.addresses.clone(),
        };
        of_family(&addresses, self.family)
    }

    /// Drives the program once and checks everything that either side can see.
    fn run(&self, lab: &Lab) -> Result<()> {
        let host = self.host(lab)?;
        let port = self.program.port();
        let source = of_family(&lab.pod(SOURCE)?.addresses, self.family)?.to_string();
        let peer = json!([host.to_string(), port]);
        match self.program {
            Program::PythonHttpServer => {
                let path = format!("/?{:?}-{:?}-{:?}", self.node, self.family, self.address);
                let said = self.curl(lab, host, &[&path])?;
                expect("the page", &said, &format!("from {}\n", self.node.name()))?;
                // Its own log says from whom the request came.
                let want = format!("\"GET {path} HTTP/1.1\" 200");
                let line = until("the server's log line", RECORDS_LIMIT, || {
                    Ok(lab
                        .logs(self.node.pod())?
                        .lines()
                        .find(|line| line.contains(&want))
                        .map(str::to_owned))
                })?;
                let saw = line.split(' ').next().unwrap_or_default();
                expect("the address in its log", saw.trim_start_matches("::ffff:"), &source)?;
            }
            Program::Nginx | Program::NginxHttp2 => {
                let (version, arguments) = match self.program {
                    Program::NginxHttp2 => ("HTTP/2.0", ["/", "--http2-prior-knowledge"].as_slice()),
                    _ => ("HTTP/1.1", ["/"].as_slice()),
                };
                let said = self.curl(lab, host, arguments)?;
                let saw = said.trim().replace("::ffff:", "");
                expect(
                    "the page",
                    &saw,
                    &format!("{} saw {source} by {version} for {source}", self.node.name()),
                )?;
            }
            Program::Grpc | Program::GrpcDetected => {
                let said = traffic(lab, "grpc", host, port, &[])?;
                let want = json!({
                    "saw": source, "unary": true, "binary": true, "download": true, "upload": "1000000",
                    "chat": ["ONE", "TWO", "THREE"], "cancelled": [10, "yes"],
                    "deadline": ["DEADLINE_EXCEEDED", "yes"], "failed": ["FAILED_PRECONDITION", "as asked: é"],
                    "unknown": "UNIMPLEMENTED",
                });
                expect("the calls", &said, &want)?;
            }
            Program::Redis => {
                let (host, port) = (host.to_string(), port.to_string());
                let ask = |words: &[&str]| -> Result<String> {
                    let argv = [&["redis-cli", "-h", &host, "-p", &port], words].concat();
                    lab.exec(SOURCE, &argv)?.ok()
                };
                expect("SET", ask(&["set", "key", "value of redis"])?.trim(), "OK")?;
                expect("GET", ask(&["get", "key"])?.trim(), "value of redis")?;
                let info = ask(&["client", "info"])?;
                let saw = info
                    .split(' ')
                    .find_map(|word| word.strip_prefix("addr="))
                    .unwrap_or_default();
                let saw = saw.rsplit_once(':').map_or(saw, |(ip, _)| ip);
                expect(
                    "CLIENT INFO",
                    saw.trim_matches(['[', ']']).trim_start_matches("::ffff:"),
                    &source,
                )?;
            }
            Program::Greeter | Program::GreeterDeclared => {
                let said = traffic(lab, "greeter", host, port, &[])?;
                let want = json!({"peer": peer, "saw": source, "reply": "250 EHLO source", "bye": "221 bye"});
                expect("the conversation", &said, &want)?;
            }
            Program::Iperf3 => {
                // One way after the other: with --bidir its server tells streams apart by the order in which they come,
                // which connections that were opened at the same time do not keep.
                for direction in ["--reverse", "--no-delay"] {
                    let (host, port) = (host.to_string(), port.to_string());
                    let argv = [
                        "iperf3", "-J", "-P", "2", "-n", "64M", "-c", &host, "-p", &port, direction,
                    ];
                    // The server takes one test at a time and may still be closing the one before.
                    let report = until("iperf3", RECORDS_LIMIT, || {
                        let output = lab.exec(SOURCE, &argv)?;
                        ensure!(output.status.success(), "{output}");
                        let report: Json = serde_json::from_str(&output.stdout)?;
                        ensure!(report.get("error").is_none(), "{report}");
                        Ok(Some(report))
                    })?;
                    expect("its peer", &report["start"]["connecting_to"]["host"], &json!(host))?;
                    // It does not count what is still on its way when the last byte was sent.
                    let received = report["end"]["sum_received"]["bytes"].as_f64().unwrap_or_default();
                    ensure!(
                        received >= 16e6,
                        "iperf3 {direction}: {received} bytes of {:#}",
                        report["end"]
                    );
                }
                let want = format!("Accepted connection from {source}, ");
                let log = lab.logs(self.node.pod())?.replace("::ffff:", "");
                ensure!(log.contains(&want), "iperf3's server does not say {want:?}");
            }
            Program::WebSocket => {
                let said = traffic(lab, "websocket", host, port, &[])?;
                let want = json!({
                    "peer": peer, "saw": source, "status": "HTTP/1.1 101 Switching Protocols",
                    "accept": "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=", "echoed": true, "closed": true,
                });
                expect("the conversation", &said, &want)?;
            }
            Program::TcpFlow | Program::TcpFlowDetected => {
                let said = traffic(lab, "who", host, port, &[])?;
                expect("getpeername at the source", &said["peer"], &peer)?;
                // A flow keeps even the port of the source.
                expect("getpeername at the destination", &said["saw"], &said["local"])?;
                expect("its address", &said["saw"][0], &json!(source))?;
            }
        }
        Ok(())
    }

    /// Asks by `curl`; a service by its name. The peer that the socket shows must be the address asked for.
    fn curl(&self, lab: &Lab, host: IpAddr, words: &[&str]) -> Result<String> {
        let port = self.program.port();
        let name = match (self.address, host) {
            (Address::Service, _) => self.node.name().to_string(),
            (_, IpAddr::V4(ip)) => ip.to_string(),
            (_, IpAddr::V6(ip)) => format!("[{ip}]"),
        };
        let url = format!("http://{name}:{port}{}", words[0]);
        let family = match self.family {
            Family::V4 => "-4",
            Family::V6 => "-6",
        };
        let mut arguments = vec!["-f", family, "-w", "%{stderr}%{remote_ip} %{remote_port}"];
        arguments.extend(&words[1..]);
        arguments.push(&url);
        let argv = [&["curl", "-sS", "--max-time", "30"], arguments.as_slice()].concat();
        let output = lab.exec(SOURCE, &argv)?;
        let peer = output.stderr.clone();
        let page = output.ok()?;
        expect("curl's peer", peer.as_str(), &format!("{host} {port}"))?;
        Ok(page)
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Cell {
            program,
            node,
            family,
            address,
        } = self;
        write!(f, "{program:?} on the {node:?} node by {family:?} {address:?} address")
    }
}

fn of_family(addresses: &[IpAddr], family: Family) -> Result<IpAddr> {
    let found = addresses.iter().find(|ip| ip.is_ipv4() == (family == Family::V4));
    found.copied().context("no address of this family")
}

fn expect<T: fmt::Debug + PartialEq<U> + ?Sized, U: fmt::Debug + ?Sized>(
    what: &str,
    found: &T,
    want: &U,
) -> Result<()> {
    ensure!(found == want, "{what}: found {found:?}, expected {want:?}");
    Ok(())
}

/// Runs named checks to their end, so that one run shows all that is wrong.
#[derive(Default)]
struct Checks {
    passed: usize,
    failed: Vec<String>,
}

impl Checks {
    fn check(&mut self, name: impl fmt::Display, run: impl FnOnce() -> Result<()>) {
        let started = Instant::now();
        match run() {
            Ok(()) => {
                self.passed += 1;
                println!("ok      {name} ({:?})", started.elapsed());
            }
            Err(error) => {
                println!("FAILED  {name} ({:?}): {error:#}", started.elapsed());
                self.failed.push(format!("{name}: {error:#}"));
            }
        }
    }

    fn finish(self, what: &str) {
        println!("{what}: {} passed, {} failed", self.passed, self.failed.len());
        assert!(self.failed.is_empty(), "{what}:\n{}", self.failed.join("\n"));
    }
}

#[test]
fn every_program_works_on_every_way() -> Result<()> {
    let lab = lab("matrix", "")?;
    let mut checks = Checks::default();
    for cell in Cell::all() {
        checks.check(cell, || cell.run(&lab));
    }
    let deadline = Instant::now() + RECORDS_LIMIT;
    for cell in Cell::all() {
        let limit = deadline.saturating_duration_since(Instant::now());
        checks.check(format!("records of {cell}"), || records(&lab, &cell, limit));
    }
    checks.check("metrics agree with the access log", || metrics_agree(&lab));
    checks.check("nothing stays open", || nothing_open(&lab));
    checks.finish("the matrix");
    lab.down()
}

/// Both sides must have recorded the cell with the identities of both ends, served, under a rule.
fn records(lab: &Lab, cell: &Cell, limit: Duration) -> Result<()> {
    let asked = cell.host(lab)?;
    let pod = of_family(&lab.pod(cell.node.pod())?.addresses, cell.family)?;
    let source = of_family(&lab.pod(SOURCE)?.addresses, cell.family)?;
    // The destination's agent on another node sees the pod's own address only.
    let steered = if cell.node == Node::Same { asked } else { pod };
    for (reporter, node, destination) in [("source", "node-1", asked), ("destination", cell.node.node(), steered)] {
        let wanted = [
            ("nodemesh.reporter", json!(reporter)),
            ("nodemesh.outcome", json!("served")),
            ("nodemesh.connection.security", json!(cell.node.security())),
            ("network.protocol.name", json!(cell.program.protocol())),
            ("source.address", json!(source.to_string())),
            ("destination.address", json!(destination.to_string())),
            ("destination.port", json!(cell.program.port())),
            (
                "nodemesh.source.identity",
                json!("spiffe://cluster.local/ns/traffic/sa/source"),
            ),
            (
                "nodemesh.destination.identity",
                json!(format!("spiffe://cluster.local/ns/traffic/sa/{}", cell.node.name())),
            ),
        ];
        until(&format!("a record of the {reporter}"), limit, || {
            let log = lab.access_log(node)?;
            let of_cell = |record: &&Json| wanted.iter().all(|(key, value)| record.get(key) == Some(value));
            let Some(record) = log.iter().find(of_cell) else {
                let near = log.iter().rev().find(|record| {
                    record["nodemesh.reporter"] == reporter && record["destination.port"] == cell.program.port()
                });
                anyhow::bail!("none like {wanted:?}; the last one of its port is {near:?}");
            };
            ensure!(
                reporter == "source" || record.get("nodemesh.rule").is_some(),
                "no rule permitted {record}"
            );
            Ok(Some(()))
        })?;
    }
    Ok(())
}

/// The series of each reporter must be what the access log's lines add up to.
fn metrics_agree(lab: &Lab) -> Result<()> {
    const FAMILIES: [(&str, &str, Option<&str>); 4] = [
        ("mesh_requests_total", "request", None),
        ("mesh_tcp_connections_closed_total", "connection", None),
        ("mesh_tcp_sent_bytes_total", "connection", Some("nodemesh.bytes_sent")),
        (
            "mesh_tcp_received_bytes_total",
            "connection",
            Some("nodemesh.bytes_received"),
        ),
    ];
    for node in ["node-1", "node-2"] {
        let reporters: &[&str] = if node == "node-1" {
            &["source", "destination"]
        } else {
            &["destination"]
        };
        until(&format!("agreement on {node}"), RECORDS_LIMIT, || {
            let metrics = lab.metrics(node)?;
            let log = lab.access_log(node)?;
            for (reporter, (name, event, field)) in reporters
                .iter()
                .flat_map(|reporter| FAMILIES.map(|family| (reporter, family)))
            {
                let of_event =
                    |record: &&Json| record["event.name"] == event && record["nodemesh.reporter"] == *reporter;
                let value = |record: &Json| {
                    field
                        .map_or(Some(1.0), |field| record[field].as_f64())
                        .unwrap_or_default()
                };
                let lines: f64 = log.iter().filter(of_event).map(value).sum();
                let sum = metrics.sum(name, &[("reporter", reporter)]);
                ensure!(
                    lines > 0.0 && sum == lines,
                    "{name} of the {reporter} is {sum}, the log says {lines}"
                );
            }
            Ok(Some(()))
        })?;
    }
    // What the sources count, the destinations count; but for bytes that were on their way when iperf3 gave up.
    let count = |node: &str, name: &str, reporter: &str| -> Result<f64> {
        Ok(lab.metrics(node)?.sum(name, &[("reporter", reporter)]))
    };
    for (name, _, _) in FAMILIES.into_iter().filter(|(_, _, field)| field.is_none()) {
        let source = count("node-1", name, "source")?;
        let destination = count("node-1", name, "destination")? + count("node-2", name, "destination")?;
        ensure!(
            source == destination,
            "{name}: {source} at the source, {destination} at the destination"
        );
    }
    Ok(())
}

/// When all programs have ended, neither records nor entries of the kernel's maps may be left of them.
fn nothing_open(lab: &Lab) -> Result<()> {
    for node in ["node-1", "node-2"] {
        until(&format!("{node} at rest"), RECORDS_LIMIT, || {
            let metrics = lab.metrics(node)?;
            let open = metrics.sum("nodemesh_agent_records_open", &[]);
            ensure!(open == 0.0, "{open} records are open");
            // The tunnels that wait for more requests keep their connections to applications of the other node.
            let maps: &[&str] = if node == "node-1" {
                &["ORIG_BY_FLOW", "PEERS"]
            } else {
                &["ORIG_BY_FLOW"]
            };
            for map in maps {
                let mut gauge = metrics
                    .matching("nodemesh_agent_map_entries", &[])
                    .filter(|sample| sample.labels["map"] == *map);
                let entries = gauge
                    .next()
                    .with_context(|| format!("no gauge of the map {map}"))?
                    .value;
                ensure!(entries == 0.0, "{entries} entries are left in the map {map}");
            }
            Ok(Some(()))
        })?;
    }
    Ok(())
}

/// What a raw exchange must give: a predicate over the whole answer.
type Answer = fn(&str) -> bool;

/// Exchanges whose exact bytes matter, each on a connection of its own that both sides close.
const RAW: &[(&str, &str, Answer)] = &[
    ("HTTP/1.0 without a host", "GET /bytes/5 HTTP/1.0\r\n\r\n", |answer| {
        answer.starts_with("HTTP/1.") && head(answer).contains(" 200 ") && body(answer).chars().count() == 5
    }),
    (
        "HEAD keeps the length and has no body",
        "HEAD /bytes/12345 HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n",
        |answer| header(answer, "content-length") == Some("12345") && body(answer).is_empty(),
    ),
    (
        "204 has no body and no length",
        "GET /status/204 HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n",
        |answer| {
            head(answer).contains(" 204 ") && header(answer, "content-length").is_none() && body(answer).is_empty()
        },
    ),
    (
        "304 keeps its tag and has no body",
        "GET /status/304 HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n",
        |answer| head(answer).contains(" 304 ") && header(answer, "etag") == Some("\"tag\"") && body(answer).is_empty(),
    ),
    (
        "a chunked answer with trailers",
        "GET /chunked/100000 HTTP/1.1\r\nhost: a\r\nte: trailers\r\nconnection: close, te\r\n\r\n",
        |answer| {
            header(answer, "transfer-encoding") == Some("chunked")
                && answer.to_lowercase().contains("\r\n0\r\nx-digest: ")
                && answer.ends_with("\r\n\r\n")
        },
    ),
    (
        "a chunked request with trailers and an extension",
        "POST /echo HTTP/1.1\r\nhost: a\r\nconnection: close\r\ntrailer: x-after\r\ntransfer-encoding: chunked\r\n\r\n\
         5;ext=1\r\nhello\r\n6\r\n world\r\n0\r\nx-after: body\r\n\r\n",
        |answer| {
            let seen = seen(answer);
            seen["body"] == "hello world" && seen["trailers"] == json!(["x-after: body"])
        },
    ),
    (
        "Expect: 100-continue is answered before the body",
        "PUT /echo HTTP/1.1\r\nhost: a\r\nconnection: close\r\nexpect: 100-continue\r\ncontent-length: 4\r\n\r\nbody",
        |answer| {
            answer.starts_with("HTTP/1.1 100 ")
                && answer
                    .split_once("\r\n\r\n")
                    .is_some_and(|(_, rest)| seen(rest)["body"] == "body")
        },
    ),
    (
        "Expect: 100-continue may be refused",
        "PUT /refuse HTTP/1.1\r\nhost: a\r\nconnection: close\r\nexpect: 100-continue\r\ncontent-length: 4\r\n\r\n",
        |answer| head(answer).contains(" 417 ") && body(answer) == "no",
    ),
    (
        "an informational answer comes before the final one",
        "GET /hints HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n",
        |answer| {
            answer.starts_with("HTTP/1.1 103 ")
                && answer
                    .split_once("\r\n\r\n")
                    .is_some_and(|(_, rest)| body(rest) == "after hints")
        },
    ),
    (
        "pipelined requests are answered in their order",
        "GET /bytes/3 HTTP/1.1\r\nhost: a\r\n\r\nGET /status/204 HTTP/1.1\r\nhost: a\r\n\r\n\
         GET /hop HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n",
        |answer| {
            let order = [answer.find(" 200 "), answer.find(" 204 "), answer.rfind(" 200 ")];
            order.is_sorted() && order[0].is_some() && order[0] != order[2] && answer.ends_with("\r\n\r\nhop")
        },
    ),
    (
        "an answer without a length ends with its connection",
        "GET /until-close HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n",
        |answer| answer.contains("until close") && head(answer).contains(" 200 "),
    ),
    (
        "hop-by-hop headers stop at each hop, in both directions",
        "GET /echo HTTP/1.1\r\nhost: a\r\nconnection: close, x-private\r\nx-private: 1\r\nkeep-alive: 9\r\n\
         proxy-connection: keep-alive\r\nx-kept: 1\r\n\r\n",
        |answer| {
            let seen = seen(answer);
            let has = |name| sent_header(&seen, name).is_some();
            has("x-kept") && !has("x-private") && !has("keep-alive") && !has("proxy-connection")
        },
    ),
    (
        "an answer's hop-by-hop headers",
        "GET /hop HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n",
        |answer| {
            header(answer, "x-hop").is_none()
                && header(answer, "keep-alive") != Some("timeout=7")
                && header(answer, "x-end") == Some("2")
        },
    ),
    (
        "what is known of the request is added",
        "GET /echo HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n",
        |answer| {
            let seen = seen(answer);
            let has = |name, good: fn(&str) -> bool| sent_header(&seen, name).is_some_and(good);
            has("host", |host| host == "a")
                && sent_header(&seen, "x-forwarded-for") == seen["saw"].as_str()
                && has("x-request-id", |id| id.len() == 36)
                && has("traceparent", |trace| trace.len() == 55 && trace.starts_with("00-"))
        },
    ),
    (
        "what the source says of the request is kept",
        "GET /echo HTTP/1.1\r\nhost: a\r\nconnection: close\r\nx-request-id: mine\r\nx-forwarded-for: 192.0.2.1\r\n\
         traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\ntracestate: a=1\r\n\r\n",
        |answer| {
            let seen = seen(answer);
            let sent = |name| sent_header(&seen, name).unwrap_or_default().to_owned();
            sent("x-request-id") == "mine"
                && sent("x-forwarded-for") == format!("192.0.2.1, {}", seen["saw"].as_str().unwrap_or_default())
                && sent("traceparent").starts_with("00-0af7651916cd43dd8448eb211c80319c-")
                && sent("tracestate") == "a=1"
        },
    ),
    (
        "the target comes as it was written",
        "GET /echo?a=%2541&b=c%2520d#frag HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n",
        |answer| head(answer).contains(" 400 ") || seen(answer)["path"] == "/echo?a=%41&b=c%20d",
    ),
    (
        "a header of 20 KB passes",
        "GET /echo HTTP/1.1\r\nhost: a\r\nconnection: close\r\nx-large: LARGE\r\n\r\n",
        |answer| sent_header(&seen(answer), "x-large").is_some_and(|value| value.len() == 20_000),
    ),
    (
        "headers beyond all measure are refused",
        "GET /echo HTTP/1.1\r\nhost: a\r\nx-a: LARGE\r\nx-b: LARGE\r\nx-c: LARGE\r\nx-d: LARGE\r\nx-e: LARGE\r\n\r\n",
        |answer| head(answer).contains(" 431 "),
    ),
    (
        "OPTIONS * is no path",
        "OPTIONS * HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n",
        |answer| head(answer).contains(" 404 "),
    ),
    (
        "no host is refused",
        "GET / HTTP/1.1\r\nconnection: close\r\n\r\n",
        |answer| head(answer).contains(" 400 "),
    ),
    (
        "conflicting lengths are refused",
        "POST /echo HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\ncontent-length: 5\r\n\r\nbody!",
        |answer| head(answer).contains(" 400 "),
    ),
    (
        "both framings are refused",
        "POST /echo HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        |answer| head(answer).contains(" 400 "),
    ),
    (
        "a folded header is refused",
        "GET / HTTP/1.1\r\nhost: a\r\nx-a: 1\r\n 2\r\n\r\n",
        |answer| head(answer).contains(" 400 "),
    ),
    (
        "a bare CR is refused",
        "GET / HTTP/1.1\r\nhost: a\r\nx-a: 1\r2\r\n\r\n",
        |answer| head(answer).contains(" 400 "),
    ),
];

fn head(answer: &str) -> &str {
    answer.split("\r\n\r\n").next().unwrap_or_default()
}

fn body(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").map_or("", |(_, body)| body)
}

fn header<'a>(answer: &'a str, name: &str) -> Option<&'a str> {
    let mut lines = head(answer).lines().filter_map(|line| line.split_once(':'));
    lines
        .find(|(key, _)| key.eq_ignore_ascii_case(name))
        .map(|(_, value)| value.trim())
}

/// What the server of `/echo` says that it saw.
fn seen(answer: &str) -> Json {
    serde_json::from_str(body(answer)).unwrap_or_default()
}

fn sent_header<'a>(seen: &'a Json, name: &str) -> Option<&'a str> {
    let headers = seen["headers"].as_array()?;
    headers
        .iter()
        .find(|header| header[0] == name)
        .and_then(|header| header[1].as_str())
}

#[test]
fn http_means_the_same_through_the_mesh() -> Result<()> {
    let lab = lab("http", "")?;
    let mut checks = Checks::default();
    for node in [Node::Same, Node::Other] {
        let service = lab.service_ip(node.pod())?;
        for (name, request, good) in RAW {
            checks.check(format!("{node:?} node: {name}"), || {
                let escaped = request
                    .replace("LARGE", &"x".repeat(20_000))
                    .replace('\r', "%0d")
                    .replace('\n', "%0a");
                let said = traffic(&lab, "raw", service, WEB, &[&escaped])?;
                let answer = said["answer"].as_str().context("no answer")?;
                ensure!(good(answer) && said["how"] == "end", "{said:#}");
                Ok(())
            });
        }
        for (name, check) in CURLED {
            checks.check(format!("{node:?} node: {name}"), || check(&lab, node));
        }
    }
    checks.check("nothing stays open", || nothing_open(&lab));
    checks.finish("HTTP");
    lab.down()
}

type Curled = fn(&Lab, Node) -> Result<()>;

/// Exchanges for which `curl` and `nghttp` are the judges.
const CURLED: &[(&str, Curled)] = &[
    ("a connection is kept for many requests", |lab, node| {
        let url = format!("http://{}:{WEB}/echo?[1-20]", node.name());
        let said = curl(lab, &["-w", "\n%{num_connects} %{http_code}\n", &url])?;
        let counts: Vec<&str> = said.lines().filter(|line| line.ends_with(" 200")).collect();
        expect(
            "connections by request",
            &counts,
            &[["1 200"].as_slice(), &["0 200"; 19]].concat(),
        )?;
        // The destination's program keeps its connection as well.
        let ports: std::collections::BTreeSet<u64> = said
            .lines()
            .filter_map(|line| serde_json::from_str::<Json>(line).ok()?.get("port")?.as_u64())
            .collect();
        expect("connections at the destination", &ports.len(), &1)
    }),
    ("a destination that closes its connections unannounced", |lab, node| {
        let url = format!("http://{}:{WEB}/then-close?[1-30]", node.name());
        let said = curl(lab, &["-o", "/dev/null", "-w", "%{num_connects} %{http_code}\n", &url])?;
        let counts: Vec<&str> = said.lines().collect();
        expect(
            "connections by request",
            &counts,
            &[["1 200"].as_slice(), &["0 200"; 29]].concat(),
        )
    }),
    ("many connections with many requests", |lab, node| {
        let url = format!("http://{}:{NGINX}/", node.name());
        let said = lab
            .exec(SOURCE, &["h2load", "--h1", "-n", "2000", "-c", "100", &url])?
            .ok()?;
        ensure!(
            said.contains("2000 succeeded, 0 failed, 0 errored, 0 timeout"),
            "{said}"
        );
        Ok(())
    }),
    ("many HTTP/2 connections with many streams", |lab, node| {
        let url = format!("http://{}:{NGINX_HTTP2}/", node.name());
        let said = lab
            .exec(SOURCE, &["h2load", "-n", "2000", "-c", "20", "-m", "20", &url])?
            .ok()?;
        ensure!(
            said.contains("2000 succeeded, 0 failed, 0 errored, 0 timeout"),
            "{said}"
        );
        Ok(())
    }),
    (
        "a large upload by length, which curl announces by Expect",
        |lab, node| {
            let script = format!(
                "python3 {TRAFFIC} bytes-of 20000000 >up && sha256sum up && curl -sSv --max-time 30 -T up http://{}:{WEB}/sum 2>log \
             && grep -c '^< HTTP/1.1 100' log",
                node.name()
            );
            let said = lab.shell(SOURCE, &script)?;
            ensure!(
                said.contains("\"count\": 20000000") && said.trim().ends_with('1'),
                "{said}"
            );
            ensure!(said.matches(&said[..64]).count() == 2, "the digests differ: {said}");
            Ok(())
        },
    ),
    ("a large chunked upload", |lab, node| {
        let script = format!(
            "python3 {TRAFFIC} bytes-of 20000000 | curl -sS --max-time 30 -T - -H 'expect:' http://{}:{WEB}/sum; \
             python3 {TRAFFIC} bytes-of 20000000 | sha256sum",
            node.name()
        );
        let said = lab.shell(SOURCE, &script)?;
        let digest = said
            .split("}")
            .nth(1)
            .unwrap_or_default()
            .trim()
            .trim_end_matches(['-', ' ']);
        ensure!(
            digest.len() == 64 && said.matches(digest).count() == 2,
            "the digests differ: {said}"
        );
        Ok(())
    }),
    ("a large download by length and one in chunks", |lab, node| {
        for path in ["bytes/20000000", "chunked/20000000"] {
            let script = format!(
                "curl -sS --max-time 30 http://{}:{WEB}/{path} | sha256sum; python3 {TRAFFIC} bytes-of 20000000 | sha256sum",
                node.name()
            );
            let said = lab.shell(SOURCE, &script)?;
            let lines: Vec<&str> = said.lines().collect();
            ensure!(
                lines.len() == 2 && lines[0] == lines[1],
                "{path}: the digests differ: {said}"
            );
        }
        Ok(())
    }),
    ("an early refusal of an upload reaches the source", |lab, node| {
        let script = format!(
            "python3 {TRAFFIC} bytes-of 30000000 | curl -sS --max-time 30 -o /dev/null -w '%{{http_code}}' -T - \
             -H 'expect:' http://{}:{WEB}/early || true",
            node.name()
        );
        expect("its status", lab.shell(SOURCE, &script)?.trim(), "413")
    }),
    ("an answer that is cut is no whole answer", |lab, node| {
        let url = format!("http://{}:{WEB}/cut", node.name());
        let output = lab.exec(SOURCE, &["curl", "-sS", "--max-time", "30", &url])?;
        // 18: the transfer was partial. 56: the connection was reset within it.
        ensure!([18, 56].contains(&output.code()), "curl says {output}");
        Ok(())
    }),
    ("many HTTP/2 streams at once on one connection", |lab, node| {
        let script = format!(
            "nghttp -nas -m 20 http://{}:{NGINX_HTTP2}/files/small | grep -c ' 200 '",
            node.name()
        );
        let served = lab.shell(SOURCE, &script)?;
        expect("answers", served.trim(), "20")
    }),
    ("a large HTTP/2 download is intact", |lab, node| {
        let script = format!(
            "curl -sS --max-time 30 --http2-prior-knowledge http://{}:{NGINX_HTTP2}/files/large | sha256sum; \
             python3 {TRAFFIC} bytes-of 50000000 | sha256sum",
            node.name()
        );
        let said = lab.shell(SOURCE, &script)?;
        let lines: Vec<&str> = said.lines().collect();
        ensure!(lines.len() == 2 && lines[0] == lines[1], "the digests differ: {said}");
        Ok(())
    }),
    (
        "HTTP/2 without a declaration keeps its status and headers",
        |lab, node| {
            let url = format!("http://{}:{NGINX_HTTP2}/files/none", node.name());
            let said = curl(lab, &["--http2-prior-knowledge", "-I", &url])?;
            ensure!(
                said.starts_with("HTTP/2 404") && said.contains("content-type: text/html"),
                "{said}"
            );
            Ok(())
        },
    ),
    ("nothing that listens is a 503 that says why", |lab, node| {
        let url = format!("http://{}:{NGINX}/", node.name());
        let pod = lab.pod_ip(node.pod())?;
        let direct = format!("http://{pod}:7998/");
        expect(
            "the page",
            &curl(lab, &["-o", "/dev/null", "-w", "%{http_code}", &url])?.as_str(),
            &"200",
        )?;
        expect(
            "the refusal",
            &curl(lab, &["-o", "/dev/null", "-w", "%{http_code}", &direct])?.as_str(),
            &"503",
        )
    }),
];

#[test]
fn flows_are_carried_byte_by_byte() -> Result<()> {
    let lab = lab("flows", "")?;
    let mut checks = Checks::default();
    for node in [Node::Same, Node::Other] {
        let service = lab.service_ip(node.pod())?;
        let pod6 = lab.pod_ip6(node.pod())?;
        for (port, host) in [(FLOWS, service), (FLOWS_DETECTED, pod6)] {
            let place = format!("{node:?} node, port {port}");
            checks.check(format!("{place}: the source's end comes before the answer"), || {
                for size in [0, 1, 65_536, 5_000_001] {
                    let said = traffic(&lab, "upload", host, port, &[&size.to_string()])?;
                    ensure!(said["intact"] == true, "{size} bytes: {said}");
                }
                Ok(())
            });
            checks.check(
                format!("{place}: the destination's end comes before the source's last bytes"),
                || {
                    for size in [1, 65_536, 5_000_001] {
                        let said = traffic(&lab, "download", host, port, &[&size.to_string()])?;
                        ensure!(said["intact"] == true && said["back"] == true, "{size} bytes: {said}");
                    }
                    Ok(())
                },
            );
            checks.check(format!("{place}: both ways at once"), || {
                let said = traffic(&lab, "both", host, port, &["30000000"])?;
                ensure!(said["intact"] == true, "{said}");
                Ok(())
            });
            checks.check(
                format!("{place}: a reset by the destination is a reset at the source"),
                || {
                    let said = traffic(&lab, "reset-by-destination", host, port, &[])?;
                    expect(
                        "what the source saw",
                        &said,
                        &json!({"before": "before", "how": "ConnectionResetError"}),
                    )
                },
            );
            checks.check(
                format!("{place}: a reset by the source is a reset at the destination"),
                || {
                    let said = traffic(&lab, "reset-by-source", host, port, &[])?;
                    expect(
                        "what the destination saw",
                        &said,
                        &json!({"how": "ConnectionResetError"}),
                    )
                },
            );
        }
        checks.check(
            format!("{node:?} node: a port without a listener is a failed connection"),
            || {
                for host in [service, pod6] {
                    let said = traffic(&lab, "refused", host, 7999, &[])?;
                    let how = said["how"].as_str().unwrap_or_default();
                    ensure!(
                        ["ConnectionResetError", "ConnectionRefusedError"].contains(&how),
                        "{said}"
                    );
                }
                Ok(())
            },
        );
    }
    checks.check("a gibibyte between nodes is intact", || {
        let said = traffic(&lab, "upload", lab.service_ip("traffic/far")?, FLOWS, &["1073741824"])?;
        ensure!(said["intact"] == true, "{said}");
        Ok(())
    });
    checks.check("a quarter of a gibibyte back is intact", || {
        let said = traffic(&lab, "download", lab.service_ip("traffic/far")?, FLOWS, &["268435456"])?;
        ensure!(said["intact"] == true && said["back"] == true, "{said}");
        Ok(())
    });
    checks.check("nothing stays open", || nothing_open(&lab));
    checks.finish("flows");
    lab.down()
}

#[test]
fn sockets_of_every_kind_are_captured() -> Result<()> {
    let lab = lab("sockets", "")?;
    let mut checks = Checks::default();
    let own = lab.pod(SOURCE)?.addresses;
    for node in [Node::Same, Node::Other] {
        let service = lab.state()?.service(node.pod())?.addresses.clone();
        let pod = lab.pod(node.pod())?.addresses;
        for family in [Family::V4, Family::V6] {
            let service = of_family(&service, family)?;
            let source = of_family(&own, family)?.to_string();
            let peer = json!([service.to_string(), FLOWS]);
            let mut check = |name: &str, run: &dyn Fn() -> Result<()>| {
                checks.check(format!("{node:?} node, {family:?}: {name}"), run);
            };
            let truthful = |said: &Json| -> Result<()> {
                expect("getpeername at the source", &said["peer"], &peer)?;
                expect("the address at the destination", &said["saw"][0], &json!(source))
            };
            check("non-blocking", &|| {
                let said = traffic(&lab, "non-blocking", service, FLOWS, &[])?;
                ensure!(said["begun"] == "EINPROGRESS" && said["error"] == 0, "{said}");
                truthful(&said)
            });
            check("bound to the pod's address", &|| {
                truthful(&traffic(&lab, "bound", service, FLOWS, &[&source])?)
            });
            check("bound to the pod's device", &|| {
                truthful(&traffic(&lab, "bound", service, FLOWS, &[&source, "eth0"])?)
            });
            check("fast open", &|| {
                truthful(&traffic(&lab, "fast-open", service, FLOWS, &[])?)
            });
            check("connected twice", &|| {
                let said = traffic(&lab, "twice", service, FLOWS, &[])?;
                ensure!(said["how"] == "EISCONN", "{said}");
                truthful(&said)
            });
            check("three hundred at once", &|| {
                expect(
                    "right ones",
                    &traffic(&lab, "many", service, FLOWS, &["300"])?,
                    &json!({"right": 300}),
                )
            });
            check("UDP is left alone", &|| {
                let pod = of_family(&pod, family)?;
                let said = traffic(&lab, "datagram", pod, FLOWS, &[])?;
                let want = json!({"peer": [pod.to_string(), FLOWS], "saw": [source, "hello"]});
                expect("the datagrams", &said, &want)
            });
        }
        let service = of_family(&service, Family::V4)?;
        checks.check(format!("{node:?} node: an IPv6 socket to an IPv4 address"), || {
            let said = traffic(&lab, "mapped", service, FLOWS, &[])?;
            expect(
                "getpeername",
                &said["peer"],
                &json!([format!("::ffff:{service}"), FLOWS]),
            )?;
            expect(
                "the address at the destination",
                &said["saw"][0],
                &json!(own[0].to_string()),
            )
        });
        // A pod that asks for its own service, its own address and its own loopback.
        let pods = lab.pod(node.pod())?.addresses.map(|ip| match ip {
            IpAddr::V4(ip) => ip.to_string(),
            IpAddr::V6(ip) => format!("[{ip}]"),
        });
        for name in [node.name(), pods[0].as_str(), pods[1].as_str()] {
            checks.check(format!("{name} asked by itself"), || {
                let said = lab.exec(
                    node.pod(),
                    &["curl", "-sS", "--max-time", "10", &format!("http://{name}:{NGINX}/")],
                )?;
                let said = said.ok()?.replace("::ffff:", "");
                let saw = said.split(' ').nth(2).unwrap_or_default();
                ensure!(
                    pods.iter().any(|own| own.trim_matches(['[', ']']) == saw),
                    "it says {said:?}"
                );
                Ok(())
            });
        }
        checks.check(format!("{} asked over its loopback", node.name()), || {
            let said = lab.exec(
                node.pod(),
                &["curl", "-sS", "--max-time", "10", &format!("http://localhost:{NGINX}/")],
            )?;
            ensure!(said.code() == 0 && said.stdout.contains(" saw "), "{said}");
            Ok(())
        });
    }
    checks.check("nothing stays open", || nothing_open(&lab));
    checks.finish("sockets");
    lab.down()
}
