//! What the mesh tells of its traffic, against what the two ends counted themselves.

mod shop_lab;

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use mesh_tests::{Lab, Metrics, Place, until};
use serde_json::{Value as Json, json};
use shop_lab::*;

/// Istio's labels of all traffic.
const LABELS: [&str; 17] = [
    "connection_security_policy",
    "destination_app",
    "destination_principal",
    "destination_service",
    "destination_service_name",
    "destination_service_namespace",
    "destination_version",
    "destination_workload",
    "destination_workload_namespace",
    "reporter",
    "request_protocol",
    "response_flags",
    "source_app",
    "source_principal",
    "source_version",
    "source_workload",
    "source_workload_namespace",
];

/// Echoes in capitals and then adds a word, so that the two directions differ.
const ECHO: &str = r#"
apiVersion: v1
kind: ServiceAccount
metadata: {name: echo, namespace: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: echo, namespace: shop, labels: {app: echo, version: v7}}
spec:
  nodeName: node-2
  serviceAccountName: echo
  containers:
  - name: echo
    command:
    - python3
    - -uc
    - |
      import socketserver
      class Echo(socketserver.BaseRequestHandler):
          def handle(self):
              while data := self.request.recv(65536):
                  self.request.sendall(data)
              self.request.sendall(b"goodbye")
      socketserver.ThreadingTCPServer.allow_reuse_address = True
      socketserver.ThreadingTCPServer(("", 7777), Echo).serve_forever()
    readinessProbe: {tcpSocket: {port: 7777}}
---
apiVersion: v1
kind: Service
metadata: {name: echo, namespace: shop}
spec: {selector: {app: echo}, ports: [{name: tcp-echo, port: 7777}]}
"#;

/// Sends so many bytes to the echo and counts what comes back.
const SEND: &str = r#"
import socket, sys, threading
size = int(sys.argv[2])
flow = socket.create_connection((sys.argv[1], 7777), timeout=30)
def send():
    left = size
    while left:
        left -= flow.send(b"x" * min(left, 65536))
    flow.shutdown(socket.SHUT_WR)
threading.Thread(target=send).start()
got = 0
while data := flow.recv(65536):
    got += len(data)
print(got)
"#;

/// Lets the visitor and the front ask for anything but `/secret`.
const RULES: &str = "\
apiVersion: nodemesh.io/v1alpha1
kind: AccessPolicy
metadata: {name: known, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: cart}, {kind: Service, name: catalog}]
  action: Allow
  rules:
  - from: [{identities: ['spiffe://cluster.local/ns/shop/sa/visitor', 'spiffe://cluster.local/ns/shop/sa/front']}]
    to: [{paths: [{type: Exact, value: /}, {type: Exact, value: /missing}]}]
";

fn load(lab: &Lab, pod: &str, url: &str, requests: u32) -> Result<BTreeMap<String, u64>> {
    let program = lab.state()?.programs.join("lab-load").display().to_string();
    let argv = [
        &program,
        "http",
        url,
        "--requests",
        &requests.to_string(),
        "--seconds",
        "60",
        "--connections",
        "3",
    ];
    let seen: Json = serde_json::from_str(&lab.exec(pod, &argv)?.ok()?)?;
    ensure!(seen["errors"] == json!({}), "{seen:#}");
    Ok(serde_json::from_value(seen["statuses"].clone())?)
}

/// Waits until a reporter's sum of a family is what the ends counted; it must never be more.
fn agrees(lab: &Lab, node: &str, family: &str, labels: &[(&str, &str)], wanted: u64) -> Result<()> {
    until(&format!("{family} {labels:?} on {node}"), LIMIT, || {
        let metrics = lab.metrics(node)?;
        let sum = metrics.sum(family, labels);
        ensure!(
            sum == wanted as f64,
            "{sum}, not {wanted}:\n{}",
            lines(&metrics, family)
        );
        Ok(Some(()))
    })
}

fn lines(metrics: &Metrics, family: &str) -> String {
    let of_family = metrics.text.lines().filter(|line| line.starts_with(family));
    of_family.collect::<Vec<_>>().join("\n")
}

#[test]
fn requests_are_counted_as_their_source_counted_them() -> Result<()> {
    let lab = Lab::up(shop("counts"))?;
    apply(&lab, RULES)?;
    // On the other node, and on this one.
    for (service, far, path, requests) in [
        ("cart", "node-2", "", 311),
        ("cart", "node-2", "secret", 23),
        ("catalog", "node-1", "", 127),
        ("catalog", "node-1", "secret", 17),
    ] {
        let statuses = load(&lab, VISITOR, &format!("http://{service}/{path}"), requests)?;
        let status = if path == "secret" { "403" } else { "200" };
        assert_eq!(
            statuses,
            BTreeMap::from([(status.to_string(), u64::from(requests))]),
            "{service}/{path}"
        );
        let flags = if path == "secret" { "UAEX" } else { "-" };
        let security = if far == "node-1" { "same_node" } else { "mutual_tls" };
        let host = format!("{service}.shop.svc.cluster.local");
        let labels = |reporter| {
            [
                ("reporter", reporter),
                ("destination_service", host.as_str()),
                ("destination_service_name", service),
                ("destination_workload", service),
                ("source_workload", "visitor"),
                ("source_principal", "spiffe://cluster.local/ns/shop/sa/visitor"),
                ("response_code", status),
                ("connection_security_policy", security),
                ("request_protocol", "http"),
            ]
        };
        for (reporter, node) in [("source", "node-1"), ("destination", far)] {
            let labels = labels(reporter);
            for family in [
                "mesh_requests_total",
                "mesh_request_duration_seconds_count",
                "mesh_response_bytes_count",
            ] {
                agrees(&lab, node, family, &labels, requests.into())?;
            }
            if reporter == "destination" || far == "node-1" {
                let with_flags: Vec<_> = labels.into_iter().chain([("response_flags", flags)]).collect();
                agrees(&lab, node, "mesh_requests_total", &with_flags, requests.into())?;
            }
        }
    }
    // Nobody else's requests are among them, no label is missing and none is too many.
    for (node, total) in [("node-1", 311 + 23 + 2 * (127 + 17)), ("node-2", 311 + 23)] {
        agrees(
            &lab,
            node,
            "mesh_requests_total",
            &[("source_workload", "visitor")],
            total,
        )?;
        for sample in &lab.metrics(node)?.samples {
            let names: Vec<&str> = sample.labels.keys().map(String::as_str).collect();
            let mut wanted = LABELS.to_vec();
            if sample.name == "mesh_requests_total" {
                wanted.extend(["response_code", "grpc_response_status"]);
                wanted.sort_unstable();
                assert_eq!(names, wanted, "{sample:?}");
            } else if sample.name.starts_with("mesh_tcp_") {
                assert_eq!(names, wanted, "{sample:?}");
            }
        }
    }
    lab.down()
}

#[test]
fn bytes_are_counted_as_the_ends_counted_them() -> Result<()> {
    let lab = Lab::up(shop("bytes").manifest(ECHO))?;
    let (mut up, mut down, mut flows) = (0, 0, 0);
    for size in [0_u64, 1, 65_537, 3_000_001] {
        let said = lab
            .exec(VISITOR, &["python3", "-c", SEND, "echo", &size.to_string()])?
            .ok()?;
        assert_eq!(said.trim(), (size + 7).to_string());
        (up, down, flows) = (up + size, down + size + 7, flows + 1);
        for (reporter, node) in [("source", "node-1"), ("destination", "node-2")] {
            let labels = [
                ("reporter", reporter),
                ("destination_service_name", "echo"),
                ("destination_version", "v7"),
                ("source_app", "visitor"),
                ("request_protocol", "tcp"),
                ("connection_security_policy", "mutual_tls"),
            ];
            agrees(&lab, node, "mesh_tcp_received_bytes_total", &labels, up)?;
            agrees(&lab, node, "mesh_tcp_sent_bytes_total", &labels, down)?;
            agrees(&lab, node, "mesh_tcp_connections_opened_total", &labels, flows)?;
            agrees(&lab, node, "mesh_tcp_connections_closed_total", &labels, flows)?;
        }
    }
    lab.down()
}

#[test]
fn each_request_and_connection_has_one_line_that_says_who_and_why() -> Result<()> {
    let lab = Lab::up(shop("lines").manifest(ECHO))?;
    apply(&lab, RULES)?;
    let revision = revision(&lab)?;
    let identity = |account: &str| format!("spiffe://cluster.local/ns/shop/sa/{account}");
    let ask = |id: &str, url: &str| {
        let header = format!("x-request-id: {id}");
        lab.exec(
            VISITOR,
            &[
                "curl",
                "-sS",
                "-o",
                "/dev/null",
                "-w",
                "%{http_code}",
                "-H",
                &header,
                url,
            ],
        )?
        .ok()
    };
    for (id, url, node, status, service, security) in [
        (
            "id-far",
            "http://cart/missing?secret=1",
            "node-2",
            200,
            "cart",
            "mutual_tls",
        ),
        (
            "id-far-denied",
            "http://cart/forbidden",
            "node-2",
            403,
            "cart",
            "mutual_tls",
        ),
        (
            "id-near",
            "http://catalog/missing?secret=1",
            "node-1",
            200,
            "catalog",
            "same_node",
        ),
        (
            "id-near-denied",
            "http://catalog/forbidden",
            "node-1",
            403,
            "catalog",
            "same_node",
        ),
    ] {
        assert_eq!(ask(id, url)?, status.to_string());
        for (reporter, node) in [("source", "node-1"), ("destination", node)] {
            let mine =
                |line: &Json| line["http.request.header.x-request-id"] == id && line["nodemesh.reporter"] == reporter;
            let line = record(&lab, node, mine)?;
            assert_eq!(
                lab.access_log(node)?.iter().filter(|line| mine(line)).count(),
                1,
                "one line: {line:#}"
            );
            let path = url
                .rsplit_once('/')
                .map(|(_, path)| format!("/{}", path.split('?').next().unwrap_or_default()));
            let wanted = json!({
                "event.name": "request",
                "nodemesh.node": node,
                "http.request.method": "GET",
                "url.path": path,
                "server.address": service,
                "http.response.status_code": status,
                "nodemesh.source.identity": identity("visitor"),
                "nodemesh.source.workload": "visitor",
                "nodemesh.source.namespace": "shop",
                "nodemesh.destination.identity": identity(service),
                "nodemesh.destination.workload": service,
                "nodemesh.destination.service": format!("{service}.shop.svc.cluster.local"),
                "nodemesh.revision": revision,
                "nodemesh.connection.security": security,
                "network.protocol.name": "http",
            });
            for (key, value) in wanted.as_object().into_iter().flatten() {
                assert_eq!(&line[key], value, "{key} of {id} as the {reporter} tells it: {line:#}");
            }
            if reporter == "destination" {
                let rule = line["nodemesh.rule"].as_str().unwrap_or_default();
                assert!(rule.contains("accesspolicy/shop/known"), "{rule}: {line:#}");
                let refusal = (status == 403).then_some("access-denied-request");
                assert_eq!(line["nodemesh.refusal"].as_str(), refusal, "{line:#}");
            }
            assert!(
                !line.to_string().contains("secret"),
                "a query is not for logs: {line:#}"
            );
        }
    }

    lab.exec(VISITOR, &["python3", "-c", SEND, "echo", "1000"])?.ok()?;
    for (reporter, node) in [("source", "node-1"), ("destination", "node-2")] {
        let mine = |line: &Json| line["event.name"] == "connection" && line["destination.port"] == 7777;
        let line = record(&lab, node, mine)?;
        assert_eq!(
            lab.access_log(node)?.iter().filter(|line| mine(line)).count(),
            1,
            "{line:#}"
        );
        let wanted = json!({
            "nodemesh.reporter": reporter,
            "nodemesh.outcome": "served",
            "nodemesh.source.identity": identity("visitor"),
            "nodemesh.destination.identity": identity("echo"),
            "nodemesh.bytes_received": 1000,
            "nodemesh.bytes_sent": 1007,
            "nodemesh.revision": revision,
            "source.address": lab.pod_ip(VISITOR)?.to_string(),
        });
        for (key, value) in wanted.as_object().into_iter().flatten() {
            assert_eq!(&line[key], value, "{key} as the {reporter} tells it: {line:#}");
        }
        assert!(reporter == "source" || line["nodemesh.rule"].is_string(), "{line:#}");
    }
    lab.down()
}

#[test]
fn prometheus_reads_both_namings_without_complaint() -> Result<()> {
    for (name, arguments, family) in [
        ("native", &[][..], "mesh_requests_total"),
        ("istio", &["--metrics-compat=istio"][..], "istio_requests_total"),
    ] {
        let mut config = shop(&format!("names-{name}"));
        for argument in arguments {
            config = config.agent_arg(argument);
        }
        let lab = Lab::up(config)?;
        load(&lab, VISITOR, "http://cart/", 5)?;
        agrees(
            &lab,
            "node-2",
            family,
            &[("reporter", "destination"), ("source_workload", "visitor")],
            5,
        )?;
        // `promtool` is Prometheus' own reader; it speaks the older format, so the newer one's last line goes.
        let text = lab.metrics("node-2")?.text;
        let file = lab.directory().join("scrape");
        std::fs::write(&file, text.trim_end().trim_end_matches("# EOF"))?;
        let check = format!("promtool check metrics < {}", file.display());
        let output = lab.exec_in(Place::Node("node-2"), &["sh", "-c", &check])?;
        // Exit code 3 is style: names of families that the other format forms differently.
        ensure!(output.code() == 0 || output.code() == 3, "{output}\n{text}");
        lab.down().context(name)?;
    }
    Ok(())
}
