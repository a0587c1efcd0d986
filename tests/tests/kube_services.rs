//! Services of every type, from pods of the mesh on both nodes: what Kubernetes promises of them holds in the mesh too.
//!
//! The destinations are strict unless they are asked from outside: whatever gets an answer went through the mesh.

use std::{
    collections::BTreeSet,
    io::Read,
    process::{Child, Stdio},
};

use anyhow::{Context, Result, ensure};
use mesh_tests::{
    Output,
    cluster::{Cluster, Scope},
};

/// Where something listens outside of the cluster's pods.
const OUTSIDE: (&str, u16) = ("172.30.0.1", 18080);

/// Two databases, one on each node, with names of their own; a source on each node.
const APPLICATION: &str = r#"
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db}
spec:
  serviceName: db
  replicas: 2
  podManagementPolicy: Parallel
  selector: {matchLabels: {app: db}}
  template:
    metadata: {labels: {app: db}}
    spec:
      terminationGracePeriodSeconds: 0
      topologySpreadConstraints:
      - {maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: DoNotSchedule, labelSelector: {matchLabels: {app: db}}}
      containers:
      - name: main
        image: localhost/nodemesh/test:dev
        command: [sh, -c, "exec lab-load serve 8080 $(hostname)"]
        ports: [{name: web, containerPort: 8080}]
        # No probe by the network: its port would be open to what comes from the node's own address.
        readinessProbe: {exec: {command: [curl, -sf, "http://127.0.0.1:8080/"]}, periodSeconds: 2}
---
apiVersion: nodemesh.io/v1alpha1
kind: MeshPolicy
metadata: {name: strict}
spec: {targetRefs: [{kind: Pod, selector: {matchLabels: {app: db}}}], mtls: {mode: strict}}
---
apiVersion: v1
kind: Service
metadata: {name: db}
spec: {clusterIP: None, selector: {app: db}, ports: [{name: http, port: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {type: NodePort, selector: {app: db}, ports: [{name: http, port: 80, targetPort: web}]}
---
apiVersion: v1
kind: Pod
metadata: {name: source-1}
spec:
  nodeSelector: {kubernetes.io/hostname: node1}
  terminationGracePeriodSeconds: 0
  containers:
  - {name: main, image: "localhost/nodemesh/test:dev", command: [sleep, infinity]}
---
apiVersion: v1
kind: Pod
metadata: {name: source-2}
spec:
  nodeSelector: {kubernetes.io/hostname: node2}
  terminationGracePeriodSeconds: 0
  containers:
  - {name: main, image: "localhost/nodemesh/test:dev", command: [sleep, infinity]}
"#;

const SOURCES: [&str; 2] = ["source-1", "source-2"];

fn application(namespace: &str) -> Result<Scope> {
    let scope = Scope::new(&Cluster::shared()?, namespace, "nodemesh.io/mesh: enabled")?;
    scope.apply(APPLICATION)?;
    scope.rolled_out(namespace, "statefulset/db")?;
    for source in SOURCES {
        scope.condition(namespace, &format!("pod/{source}"), "Ready")?;
        scope.until_served(source, "http://web/", &["db-0", "db-1"])?;
    }
    Ok(scope)
}

fn address(scope: &Scope, pod: &str) -> Result<String> {
    let object = scope.get(scope.namespace(), "pod", pod)?;
    let address = object["status"]["podIP"].as_str().map(String::from);
    address.with_context(|| format!("{pod} has no address"))
}

/// The node of a pod: `node1`.
fn node_of(scope: &Scope, pod: &str) -> Result<String> {
    let object = scope.get(scope.namespace(), "pod", pod)?;
    Ok(object["spec"]["nodeName"].as_str().unwrap_or_default().to_string())
}

/// The database on the node of a source.
fn neighbour(scope: &Scope, source: &str) -> Result<&'static str> {
    let node = node_of(scope, source)?;
    for name in ["db-0", "db-1"] {
        if node_of(scope, name)? == node {
            return Ok(name);
        }
    }
    anyhow::bail!("no database is on {node}")
}

/// A server in the control plane's network, which is no part of the mesh. It ends with this value.
struct Outside(Child);

impl Outside {
    fn start(cluster: &Cluster) -> Result<Outside> {
        let program = "import http.server, sys\n\
            class Handler(http.server.BaseHTTPRequestHandler):\n    \
                def do_GET(self):\n        \
                    self.send_response(200)\n        \
                    self.end_headers()\n        \
                    self.wfile.write(b'outside\\n')\n    \
                def log_message(self, *words):\n        pass\n\
            server = http.server.ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), Handler)\n\
            print('listens', flush=True)\nserver.serve_forever()";
        let mut command = cluster.command("python3");
        command.args(["-c", program, OUTSIDE.0, &OUTSIDE.1.to_string()]);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let mut said = [0; 7];
        child.stdout.as_mut().context("no output")?.read_exact(&mut said)?;
        Ok(Outside(child))
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Gives a Service the address of a load balancer, as a cloud's controller does.
fn balance(scope: &Scope, service: &str, address: &str) -> Result<()> {
    let status = format!(r#"{{"status": {{"loadBalancer": {{"ingress": [{{"ip": "{address}"}}]}}}}}}"#);
    scope.run(&["patch", "service", service, "--subresource=status", "-p", &status])?;
    Ok(())
}

/// A load balancer in front of a node: what is sent to an address from outside of the cluster goes there. It ends with
/// this value.
struct Balancer<'a> {
    scope: &'a Scope,
    address: &'a str,
}

impl<'a> Balancer<'a> {
    fn start(scope: &'a Scope, address: &'a str, node: &str) -> Result<Balancer<'a>> {
        let balancer = Balancer { scope, address };
        balancer.route(&["replace", address, "via", node])?;
        Ok(balancer)
    }

    fn route(&self, words: &[&str]) -> Result<()> {
        let mut command = self.scope.command("ip");
        let output: Output = command.arg("route").args(words).output().context("run ip")?.into();
        output.ok().map(drop)
    }
}

impl Drop for Balancer<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.route(&["del", self.address]) {
            eprintln!("the route to {} stays: {error:#}", self.address);
        }
    }
}

const RESOLVE: &str = "
import socket, sys
print(*{found[4][0] for found in socket.getaddrinfo(sys.argv[1], 80, socket.AF_INET)})
";

#[test]
fn every_type_of_service_leads_to_its_pods() -> Result<()> {
    let scope = application("kube-services")?;
    let both = &["db-0", "db-1"][..];
    let namespace = scope.namespace().to_string();
    let port = scope.get(&namespace, "service", "web")?["spec"]["ports"][0]["nodePort"].clone();
    let (db_0, db_1) = (address(&scope, "db-0")?, address(&scope, "db-1")?);
    let addresses = BTreeSet::from([db_0.as_str(), &db_1]);
    let outside = Outside::start(&scope)?;
    scope.apply(&format!(
        r#"
apiVersion: v1
kind: Service
metadata: {{name: manual}}
spec: {{ports: [{{name: http, port: 80}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: manual-1, labels: {{kubernetes.io/service-name: manual}}}}
addressType: IPv4
endpoints: [{{addresses: [{db_0}], conditions: {{ready: true}}}}]
ports: [{{name: http, port: 8080, protocol: TCP}}]
---
apiVersion: v1
kind: Service
metadata: {{name: outside}}
spec: {{ports: [{{name: http, port: 80}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: outside-1, labels: {{kubernetes.io/service-name: outside}}}}
addressType: IPv4
endpoints: [{{addresses: [{}], conditions: {{ready: true}}}}]
ports: [{{name: http, port: {}, protocol: TCP}}]
---
apiVersion: v1
kind: Service
metadata: {{name: alias}}
spec: {{type: ExternalName, externalName: web.{namespace}.svc.cluster.local}}
---
apiVersion: v1
kind: Service
metadata: {{name: balanced}}
spec: {{type: LoadBalancer, selector: {{app: db}}, ports: [{{name: http, port: 8000, targetPort: web}}]}}
"#,
        OUTSIDE.0, OUTSIDE.1
    ))?;
    balance(&scope, "balanced", "203.0.113.80")?;
    let capture = scope.capture("tcp port 8080")?;
    for source in SOURCES {
        let table = [
            ("http://web/".into(), both),
            (format!("http://web.{namespace}.svc.cluster.local/"), both),
            // Headless: each name leads to its own pod.
            ("http://db-0.db:8080/".into(), &["db-0"]),
            (format!("http://db-1.db.{namespace}.svc.cluster.local:8080/"), &["db-1"]),
            // At the nodes' addresses, from within the mesh.
            (format!("http://172.30.0.11:{port}/"), both),
            (format!("http://172.30.0.12:{port}/"), both),
            // Without a selector: a pod of the mesh, which is strict, and something else.
            ("http://manual/".into(), &["db-0"]),
            ("http://outside/".into(), &["outside"]),
            ("http://alias/".into(), both),
            // What a load balancer's address leads to, which the cluster answers for itself.
            ("http://203.0.113.80:8000/".into(), both),
        ];
        // The service's own name leads to all; which one a program takes is its resolver's choice.
        let said = scope.exec(source, &["python3", "-c", RESOLVE, "db"])?.ok()?;
        assert_eq!(
            said.split_whitespace().collect::<BTreeSet<_>>(),
            addresses,
            "the addresses of db"
        );
        for address in &addresses {
            let found = scope.ask(source, &format!("http://{address}:8080/"))?;
            assert!(both.contains(&found.as_str()), "{found}");
        }
        for (url, names) in table {
            scope.until_served(source, &url, names)?;
        }
    }
    drop(outside);
    let packets = capture.stop()?;
    assert_eq!(
        packets.count("HTTP/1.1"),
        0,
        "requests are in the clear between the nodes"
    );
    assert!(
        packets.of_port(8080).next().is_some(),
        "nothing was seen between the nodes"
    );
    Ok(())
}

#[test]
fn endpoints_are_those_that_the_service_asks_for() -> Result<()> {
    let scope = application("kube-endpoints")?;
    scope.apply(
        r#"
apiVersion: v1
kind: Service
metadata: {name: affine}
spec: {selector: {app: db}, sessionAffinity: ClientIP, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: local}
spec: {selector: {app: db}, internalTrafficPolicy: Local, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: near}
spec: {selector: {app: db}, trafficDistribution: PreferClose, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Pod
metadata: {name: lazy, labels: {app: lazy}}
spec:
  nodeSelector: {kubernetes.io/hostname: node2}
  terminationGracePeriodSeconds: 0
  containers:
  - name: main
    image: localhost/nodemesh/test:dev
    command: [lab-load, serve, "8080", lazy]
    readinessProbe: {exec: {command: ["false"]}, periodSeconds: 10}
---
apiVersion: v1
kind: Service
metadata: {name: early}
spec: {selector: {app: lazy}, publishNotReadyAddresses: true, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: early-headless}
spec: {clusterIP: None, selector: {app: lazy}, publishNotReadyAddresses: true, ports: [{name: http, port: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: late}
spec: {selector: {app: lazy}, ports: [{name: http, port: 80, targetPort: 8080}]}
"#,
    )?;
    for source in SOURCES {
        let own = neighbour(&scope, source)?;
        scope.until_served(source, "http://local/", &[own])?;
        scope.until_served(source, "http://near/", &[own])?;
        scope.until_served(source, "http://early/", &["lazy"])?;
        scope.until_served(source, "http://early-headless:8080/", &["lazy"])?;
        // One and the same, whichever it is.
        let mut first = None;
        scope.until("an endpoint to stay with", || {
            first = Some(scope.ask(source, "http://affine/")?);
            Ok(first.clone())
        })?;
        let found = scope.ask_often(source, "http://affine/")?;
        assert_eq!(found.into_iter().collect::<Vec<_>>(), Vec::from_iter(first), "{source}");
        assert!(scope.ask(source, "http://late/").is_err(), "an unready pod serves");
    }
    Ok(())
}

/// Answers datagrams, and asks for them.
const UDP: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: udp, labels: {app: udp}}
spec:
  nodeSelector: {kubernetes.io/hostname: node2}
  terminationGracePeriodSeconds: 0
  containers:
  - name: main
    image: localhost/nodemesh/test:dev
    command:
    - python3
    - -c
    - |
      import socket
      s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
      s.bind(("", 5353))
      while True:
          data, peer = s.recvfrom(2048)
          s.sendto(b"got " + data, peer)
---
apiVersion: v1
kind: Service
metadata: {name: udp}
spec: {selector: {app: udp}, ports: [{name: udp, port: 53, targetPort: 5353, protocol: UDP}]}
---
apiVersion: v1
kind: Pod
metadata: {name: edge-1, labels: {app: edge}}
spec:
  nodeSelector: {kubernetes.io/hostname: node1}
  terminationGracePeriodSeconds: 0
  containers:
  - {name: main, image: "localhost/nodemesh/test:dev", command: [lab-load, serve, "8080", edge-1]}
---
apiVersion: v1
kind: Pod
metadata: {name: edge-2, labels: {app: edge}}
spec:
  nodeSelector: {kubernetes.io/hostname: node2}
  terminationGracePeriodSeconds: 0
  containers:
  - {name: main, image: "localhost/nodemesh/test:dev", command: [lab-load, serve, "8080", edge-2]}
---
apiVersion: v1
kind: Service
metadata: {name: edge}
spec: {type: NodePort, selector: {app: edge}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: balanced}
spec:
  type: LoadBalancer
  externalTrafficPolicy: Local
  selector: {app: edge}
  ports: [{name: http, port: 8000, targetPort: 8080}]
---
apiVersion: v1
kind: Pod
metadata: {name: probed, labels: {app: probed}}
spec:
  nodeSelector: {kubernetes.io/hostname: node2}
  terminationGracePeriodSeconds: 0
  containers:
  - name: main
    image: localhost/nodemesh/test:dev
    command: [lab-load, serve, "8080", probed]
    readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}
---
apiVersion: nodemesh.io/v1alpha1
kind: MeshPolicy
metadata: {name: probed}
spec: {targetRefs: [{kind: Pod, selector: {matchLabels: {app: probed}}}], mtls: {mode: strict}}
---
apiVersion: v1
kind: Service
metadata: {name: probed}
spec: {type: NodePort, selector: {app: probed}, ports: [{name: http, port: 80, targetPort: 8080}]}
"#;

const ASK_UDP: &str = r#"
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(3)
s.connect(("udp", 53))
s.send(b"hello")
print(s.recv(100).decode())
"#;

/// Asks the cluster's DNS over TCP, as a resolver does for long answers.
const ASK_TCP_DNS: &str = r#"
import socket, struct, sys
name = b"".join(bytes([len(label)]) + label for label in sys.argv[1].encode().split(b".")) + b"\0"
question = struct.pack(">6H", 7, 0x100, 1, 0, 0, 0) + name + struct.pack(">2H", 1, 1)
s = socket.create_connection(("10.96.0.10", 53), 10)
s.sendall(struct.pack(">H", len(question)) + question)
answer = s.recv(2048)
print(socket.inet_ntoa(answer[-4:]))
"#;

const ASK_API: &str = "curl -sS --fail --max-time 10 --cacert $0/ca.crt -H \"authorization: Bearer $(cat $0/token)\" \
                       https://kubernetes.default.svc/version";

#[test]
fn what_is_not_the_meshs_own_goes_on() -> Result<()> {
    let scope = application("kube-beside")?;
    scope.apply(UDP)?;
    for pod in ["udp", "edge-1", "edge-2", "probed"] {
        scope.condition(scope.namespace(), &format!("pod/{pod}"), "Ready")?;
    }
    let cluster_ip = |service: &str| -> Result<String> {
        let object = scope.get(scope.namespace(), "service", service)?;
        Ok(object["spec"]["clusterIP"].as_str().unwrap_or_default().to_string())
    };
    // It is strict and serves the mesh.
    scope.until_served("source-1", "http://probed/", &["probed"])?;
    let (web, name) = (
        cluster_ip("web")?,
        format!("web.{}.svc.cluster.local", scope.namespace()),
    );
    for source in SOURCES {
        scope.until("an answer by UDP", || {
            let said = scope.exec(source, &["python3", "-c", ASK_UDP])?.ok()?;
            ensure!(said.trim() == "got hello", "{said}");
            Ok(Some(()))
        })?;
        let said = scope.exec(source, &["python3", "-c", ASK_TCP_DNS, &name])?.ok()?;
        assert_eq!(said.trim(), web, "DNS over TCP");
        let account = "/var/run/secrets/kubernetes.io/serviceaccount";
        let said = scope.exec(source, &["sh", "-c", ASK_API, account])?.ok()?;
        assert!(said.contains("gitVersion"), "the API server says {said}");
        // Node-local traffic: itself, by loopback and by its own address, while nobody serves there.
        let own = address(&scope, source)?;
        for host in ["127.0.0.1", &own] {
            let said = scope.exec(
                source,
                &[
                    "curl",
                    "-s",
                    "-o",
                    "/dev/null",
                    "-w",
                    "%{exitcode}",
                    &format!("http://{host}:9/"),
                ],
            )?;
            assert_eq!(said.stdout.trim(), "7", "nobody listens on port 9 of {host}");
        }
    }

    // From outside of the mesh by a node's port: permissive pods answer, strict ones do not.
    for (service, answered) in [("edge", true), ("web", false), ("probed", false)] {
        let object = scope.get(scope.namespace(), "service", service)?;
        let port = &object["spec"]["ports"][0]["nodePort"];
        for node in ["172.30.0.11", "172.30.0.12"] {
            let url = format!("http://{node}:{port}/");
            let mut found = BTreeSet::new();
            if answered {
                scope.until(&format!("answers of both pods at {url}"), || {
                    let name = from_outside(&scope, &url)?;
                    ensure!(name.starts_with("edge-"), "{name:?}");
                    found.insert(name);
                    Ok((found.len() == 2).then_some(()))
                })?;
            } else {
                for _ in 0..4 {
                    assert_eq!(
                        from_outside(&scope, &url)?,
                        "",
                        "a strict pod answers plaintext from {url}"
                    );
                }
            }
        }
    }
    // By a load balancer, which leaves the outside's own address as it is: only that node's pod may answer.
    let address = "203.0.113.81";
    balance(&scope, "balanced", address)?;
    for (node, pod) in [("172.30.0.11", "edge-1"), ("172.30.0.12", "edge-2")] {
        let balancer = Balancer::start(&scope, address, node)?;
        scope.until(&format!("an answer by the load balancer at {node}"), || {
            let said = from_outside(&scope, &format!("http://{address}:8000/"))?;
            ensure!(said == pod, "{said:?}");
            Ok(Some(()))
        })?;
        drop(balancer);
    }
    Ok(())
}

/// What a URL answers to one who is outside of the cluster: the first line, empty if there is no answer.
fn from_outside(scope: &Scope, url: &str) -> Result<String> {
    let mut command = scope.command("curl");
    command.args(["-sS", "--max-time", "5", url]).stdin(Stdio::null());
    let output = command.output().context("run curl")?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().to_string())
}

/// SCTP by hand, since not every kernel has it: its packets are the same. `packet` makes one with its checksum.
const SCTP: &str = r#"
import socket, struct, sys
def packet(source, destination, tag, kind):
    body = struct.pack(">IIHHI", 7, 65535, 1, 1, 1)
    chunk = struct.pack(">BBH", kind, 0, 4 + len(body)) + body
    head = struct.pack(">HHI", source, destination, tag)
    crc = 0xffffffff
    for byte in head + b"\0\0\0\0" + chunk:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82f63b78 if crc & 1 else 0)
    return head + struct.pack("<I", crc ^ 0xffffffff) + chunk
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, 132)
def receive(port):
    while True:
        data, (address, _) = raw.recvfrom(2048)
        packet = data[(data[0] & 15) * 4:]
        source, destination = struct.unpack(">HH", packet[:4])
        if destination == port:
            return address, source, packet[12]
if sys.argv[1] == "answer":
    while True:
        address, source, kind = receive(5001)
        if kind == 1:  # INIT, to be answered by INIT ACK
            raw.sendto(packet(5001, source, 7, 2), (address, 0))
else:
    raw.settimeout(3)
    raw.sendto(packet(40000, 5000, 0, 1), (socket.gethostbyname(sys.argv[1]), 0))
    address, source, kind = receive(40000)
    print(source, kind)
"#;

#[test]
fn sctp_passes_beside_what_is_captured() -> Result<()> {
    let scope = application("kube-sctp")?;
    let program = serde_json::Value::from(SCTP);
    scope.apply(&format!(
        r#"
apiVersion: v1
kind: Pod
metadata: {{name: both, labels: {{app: both}}}}
spec:
  nodeSelector: {{kubernetes.io/hostname: node2}}
  terminationGracePeriodSeconds: 0
  containers:
  - {{name: sctp, image: "localhost/nodemesh/test:dev", command: [python3, -c, {program}, answer]}}
  - {{name: tcp, image: "localhost/nodemesh/test:dev", command: [lab-load, serve, "8080", both]}}
---
apiVersion: v1
kind: Service
metadata: {{name: both}}
spec:
  selector: {{app: both}}
  ports:
  - {{name: sctp, port: 5000, targetPort: 5001, protocol: SCTP}}
  - {{name: http, port: 80, targetPort: 8080}}
---
apiVersion: nodemesh.io/v1alpha1
kind: MeshPolicy
metadata: {{name: strict-both}}
spec: {{targetRefs: [{{kind: Pod, selector: {{matchLabels: {{app: both}}}}}}], mtls: {{mode: strict}}}}
"#
    ))?;
    scope.condition(scope.namespace(), "pod/both", "Ready")?;
    for source in SOURCES {
        scope.until_served(source, "http://both/", &["both"])?;
        scope.until("an answer by SCTP", || {
            let said = scope.exec(source, &["python3", "-c", SCTP, "both"])?;
            ensure!(said.ok()?.trim() == "5000 2");
            Ok(Some(()))
        })?;
    }
    Ok(())
}

/// A table of rules in a node's network, as a CNI writes it. It goes with this value.
struct Rules<'a> {
    scope: &'a Scope,
    node: usize,
}

impl<'a> Rules<'a> {
    fn new(scope: &'a Scope, node: usize) -> Result<Rules<'a>> {
        let rules = Rules { scope, node };
        rules.nft("add table inet cni-test")?;
        rules.nft("flush table inet cni-test")?;
        rules.nft("add chain inet cni-test forward { type filter hook forward priority 0; policy accept; }")?;
        Ok(rules)
    }

    fn nft(&self, command: &str) -> Result<String> {
        self.scope.exec_on_node(self.node, &["nft", command])?.ok()
    }

    fn add(&self, rule: &str) -> Result<()> {
        self.nft(&format!("add rule inet cni-test forward {rule}")).map(drop)
    }

    /// The packets that each rule has counted.
    fn counts(&self) -> Result<Vec<u64>> {
        let text = self.nft("list chain inet cni-test forward")?;
        let after = text.split("counter packets ").skip(1);
        let number = |rest: &str| rest.split(' ').next().and_then(|word| word.parse().ok());
        after.map(|rest| number(rest).context("a count")).collect()
    }
}

impl Drop for Rules<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.nft("delete table inet cni-test") {
            eprintln!("the rules stay on node {}: {error:#}", self.node);
        }
    }
}

#[test]
fn rules_of_a_network_plugin_see_pods_and_their_ports() -> Result<()> {
    let scope = application("kube-rules")?;
    let far = match neighbour(&scope, "source-1")? {
        "db-0" => "db-1",
        _ => "db-0",
    };
    // A second source on node 1, so that one pair of addresses can be kept apart.
    scope.apply(
        r#"
apiVersion: v1
kind: Pod
metadata: {name: source-3}
spec:
  nodeSelector: {kubernetes.io/hostname: node1}
  terminationGracePeriodSeconds: 0
  containers:
  - {name: main, image: "localhost/nodemesh/test:dev", command: [sleep, infinity]}
"#,
    )?;
    scope.condition(scope.namespace(), "pod/source-3", "Ready")?;
    let (one, three, there) = (
        address(&scope, "source-1")?,
        address(&scope, "source-3")?,
        address(&scope, far)?,
    );
    let rules = Rules::new(&scope, 2)?;
    rules.add(&format!("ip saddr {one} ip daddr {there} tcp dport 8080 counter"))?;
    rules.add(&format!("ip saddr {there} tcp sport 8080 ip daddr {one} counter"))?;
    // What is none of the two ways of a pair on the pod's own port: nothing, if addresses and ports are the real ones.
    rules.add(&format!("ip daddr {there} tcp dport != 8080 counter"))?;
    let url = format!("http://{far}.db:8080/");
    for source in ["source-1", "source-3"] {
        scope.until_served(source, &url, &[far])?;
    }
    let counts = rules.counts()?;
    ensure!(
        matches!(counts[..], [there, back, 0] if there > 0 && back > 0),
        "rules on real addresses count {counts:?}"
    );

    rules.nft("flush chain inet cni-test forward")?;
    rules.add(&format!("ip saddr {one} ip daddr {there} tcp dport 8080 counter drop"))?;
    let asked = scope.exec("source-1", &["curl", "-sS", "--max-time", "3", &url])?;
    ensure!(!asked.stdout.contains(far), "the dropped pair speaks: {asked}");
    ensure!(rules.counts()?[0] > 0, "nothing was dropped");
    // Exactly that pair: another source, the other direction's service, and the other destination go on.
    scope.until_served("source-3", &url, &[far])?;
    let near = neighbour(&scope, "source-1")?;
    scope.until_served("source-1", &format!("http://{near}.db:8080/"), &[near])?;
    ensure!(three != one, "both sources have the address {one}");

    rules.nft("flush chain inet cni-test forward")?;
    scope.until_served("source-1", &url, &[far])
}
