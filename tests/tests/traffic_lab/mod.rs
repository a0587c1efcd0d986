//! The cluster of the traffic tests: one source, and the same real programs twice — in `near` on the source's node and
//! in `far` on the other one. Some ports declare what they speak and some leave it to be found out.

use std::net::IpAddr;

use anyhow::{Context, Result};
use mesh_tests::{Lab, LabConfig};
use serde_json::Value as Json;

/// The program of the fixtures, for what no packaged program can tell.
pub const TRAFFIC: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/traffic/traffic.py");
/// The pod from which everything is asked.
pub const SOURCE: &str = "traffic/source";

/// nginx with HTTP/2 in the clear, undeclared.
pub const NGINX_HTTP2: u16 = 8081;
/// The server that shows what reached it, declared as HTTP/1.
pub const WEB: u16 = 8090;
/// gRPC, undeclared.
pub const GRPC_DETECTED: u16 = 50052;
/// redis, declared.
pub const REDIS: u16 = 6379;
/// The greeter, undeclared: only its silence tells that the destination speaks first.
pub const GREETER: u16 = 2525;
/// TCP flows, declared.
pub const FLOWS: u16 = 7000;

/// What the documents of each destination are.
const DESTINATION: &str = r#"
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: NAME, namespace: traffic}
---
apiVersion: v1
kind: Pod
metadata: {name: NAME, namespace: traffic, labels: {app: NAME}}
spec:
  nodeName: NODE
  serviceAccountName: NAME
  containers:
  - name: python
    command: [sh, -c, "mkdir -p www && echo 'from NAME' > www/index.html && exec python3 -um http.server --bind :: -d www 8000"]
    readinessProbe: {tcpSocket: {port: 8000}}
  - name: nginx
    command:
    - sh
    - -c
    - |
      cat > nginx.conf <<'END'
      daemon off; pid nginx.pid; worker_processes 1; error_log stderr warn;
      events { worker_connections 1024; }
      http {
        access_log off; keepalive_requests 1000000; client_max_body_size 0;
        client_body_temp_path tmp; proxy_temp_path tmp; fastcgi_temp_path tmp; uwsgi_temp_path tmp; scgi_temp_path tmp;
        server {
          listen [::]:8080 ipv6only=off; listen [::]:8081 http2 ipv6only=off;
          root www;
          location / { return 200 "NAME saw $remote_addr by $server_protocol for $http_x_forwarded_for\n"; }
          location /files/ { alias files/; }
        }
      }
      END
      mkdir -p tmp files && python3 TRAFFIC bytes-of 50000000 > files/large && head -c 1000000 files/large > files/small && exec nginx -e stderr -p "$PWD" -c nginx.conf
    readinessProbe: {httpGet: {path: /, port: 8080}}
  - name: redis
    command: [redis-server, --port, "6379", --bind, "0.0.0.0", "::", --protected-mode, "no", --save, "", --appendonly, "no"]
    readinessProbe: {exec: {command: [redis-cli, ping]}}
  - name: iperf
    command: [iperf3, -s]
    readinessProbe: {exec: {command: [sh, -c, "ss -Hltn sport = 5201 | grep -q ."]}}
  - name: traffic
    command: [python3, TRAFFIC, serve]
    readinessProbe: {tcpSocket: {port: 8090}}
---
apiVersion: v1
kind: Service
metadata: {name: NAME, namespace: traffic}
spec:
  selector: {app: NAME}
  ipFamilyPolicy: RequireDualStack
  ports:
  - {name: python, port: 8000}
  - {name: http, port: 8080}
  - {name: mixed, port: 8081}
  - {name: shown, port: 8090, appProtocol: http}
  - {name: grpc, port: 50051}
  - {name: rpc, port: 50052}
  - {name: store, port: 6379, appProtocol: redis}
  - {name: measure, port: 5201}
  - {name: mail, port: 2525}
  - {name: smtp, port: 2526}
  - {name: tcp-flows, port: 7000}
  - {name: flows, port: 7001}
  - {name: nobody, port: 7999}
"#;

/// The namespace under strict mutual TLS, and the source.
const SOURCE_DOCUMENTS: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: traffic, labels: {nodemesh.io/mesh: enabled}}
---
apiVersion: nodemesh.io/v1alpha1
kind: MeshPolicy
metadata: {name: strict, namespace: traffic}
spec:
  targetRefs: [{kind: Namespace, name: traffic}]
  mtls: {mode: strict}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: source, namespace: traffic}
---
apiVersion: v1
kind: Pod
metadata: {name: source, namespace: traffic, labels: {app: source}}
spec:
  nodeName: node-1
  serviceAccountName: source
  containers: [{name: main, command: [sleep, infinity]}]
"#;

/// A lab with the source and both destinations under strict mutual TLS.
pub fn lab(name: &str, more: &str) -> Result<Lab> {
    let destination = |name: &str, node: &str| {
        DESTINATION
            .replace("NAME", name)
            .replace("NODE", node)
            .replace("TRAFFIC", TRAFFIC)
    };
    let documents = [
        SOURCE_DOCUMENTS,
        &destination("near", "node-1"),
        &destination("far", "node-2"),
        more,
    ];
    Lab::up(LabConfig::test(name).manifest(documents.concat()))
}

/// Runs a verb of the program of the fixtures in the source's pod and reads what it printed.
pub fn traffic(lab: &Lab, verb: &str, host: IpAddr, port: u16, words: &[&str]) -> Result<Json> {
    let (host, port) = (host.to_string(), port.to_string());
    let mut argv = vec!["python3", TRAFFIC, verb, &host, &port];
    argv.extend(words);
    let said = lab
        .exec(SOURCE, &argv)?
        .ok()
        .with_context(|| format!("{verb} {host} {port}"))?;
    serde_json::from_str(&said).with_context(|| format!("{verb} {host} {port}: {said}"))
}

/// Runs `curl` in the source's pod; an error if it fails.
pub fn curl(lab: &Lab, arguments: &[&str]) -> Result<String> {
    let mut argv = vec!["curl", "-sS", "--max-time", "30"];
    argv.extend(arguments);
    lab.exec(SOURCE, &argv)?
        .ok()
        .with_context(|| format!("curl {}", arguments.join(" ")))
}
