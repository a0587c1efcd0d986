//! Deliveries to an application: many short connections must not run out of the pod's ports.

use anyhow::Result;
use mesh_tests::{Lab, LabConfig};

const PODS: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {nodemesh.io/mesh: enabled}}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: shop}
spec:
  nodeName: node-1
  containers: [{name: main, command: [sleep, infinity]}]
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec:
  nodeName: node-1
  containers:
  - name: main
    command:
    - sh
    - -c
    - echo 40000 40063 > /proc/sys/net/ipv4/ip_local_port_range && exec python3 -m http.server 8080
    ports: [{name: http, containerPort: 8080}]
    readinessProbe: {tcpSocket: {port: 8080}}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: http}, {name: tcp, port: 81, targetPort: http}]}
"#;

/// The pod has 64 ports, and each connection that its agent closes first keeps one in TIME-WAIT for a minute.
#[test]
fn short_connections_on_one_node_do_not_run_out_of_ports() -> Result<()> {
    let lab = Lab::up(LabConfig::test("ports").manifest(PODS))?;
    let script = "
import http.client, sys
for n in range(400):
    c = http.client.HTTPConnection('web', 80, timeout=10)
    c.request('GET', '/')
    status = c.getresponse().read() and 200
    c.close()
print('served', n + 1)
";
    assert_eq!(
        lab.exec("shop/client", &["python3", "-c", script])?.ok()?.trim(),
        "served 400"
    );
    let opaque = "
import socket
for n in range(400):
    with socket.create_connection(('web', 81), timeout=10) as s:
        s.sendall(b'GET / HTTP/1.0\\r\\nHost: web\\r\\n\\r\\n')
        s.shutdown(socket.SHUT_WR)
        assert s.recv(12).startswith(b'HTTP/1.0 200'), n
print('served', n + 1)
";
    assert_eq!(
        lab.exec("shop/client", &["python3", "-c", opaque])?.ok()?.trim(),
        "served 400"
    );
    lab.down()
}
