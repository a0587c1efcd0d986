//! Opaque connections between pods of one node that the kernel lets go without the agent: that they are, that nobody
//! gets by who may not, that they end with their permit, and that each is told of once.

mod shop_lab;

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use mesh_tests::{Background, Lab, LabConfig, until};
use serde_json::{Value as Json, json};
use shop_lab::{LIMIT, all_current, apply, record, revision};

const NODE: &str = "node-1";
const SOURCE: &str = "near/source";
const OTHER: &str = "near/other";
const ECHO: &str = "near/echo";
/// Declared to carry opaque bytes.
const DECLARED: u16 = 7777;
/// Not declared to carry anything.
const UNDECLARED: u16 = 7778;

/// Tells who calls, then echoes.
const PODS: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: near, labels: {nodemesh.io/mesh: enabled}}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: source, namespace: near}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: other, namespace: near}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: echo, namespace: near}
---
apiVersion: v1
kind: Pod
metadata: {name: source, namespace: near, labels: {app: source}}
spec: {nodeName: node-1, serviceAccountName: source, containers: [{name: main, command: [sleep, infinity]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: other, namespace: near, labels: {app: other}}
spec: {nodeName: node-1, serviceAccountName: other, containers: [{name: main, command: [sleep, infinity]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: echo, namespace: near, labels: {app: echo}}
spec:
  nodeName: node-1
  serviceAccountName: echo
  containers:
  - name: echo
    command:
    - python3
    - -uc
    - |
      import socket, socketserver, threading
      class Echo(socketserver.BaseRequestHandler):
          def handle(self):
              try:
                  self.request.sendall(("%s %d\n" % self.client_address[:2]).encode())
                  while data := self.request.recv(65536):
                      self.request.sendall(data)
              except OSError:
                  pass
      class Server(socketserver.ThreadingTCPServer):
          address_family = socket.AF_INET6
          allow_reuse_address = True
          daemon_threads = True
      servers = [Server(("::", port), Echo) for port in (7777, 7778)]
      for server in servers[1:]:
          threading.Thread(target=server.serve_forever).start()
      servers[0].serve_forever()
    readinessProbe: {tcpSocket: {port: 7777}}
---
apiVersion: v1
kind: Service
metadata: {name: echo, namespace: near}
spec: {selector: {app: echo}, ports: [{name: tcp-echo, port: 7777}]}
"#;

/// Connects, says what it sees and exchanges four bytes; then again and again, until a file exists.
const SPEAK: &str = r#"
import json, os, socket, sys, time
host, port, stop = sys.argv[1:4]
flow = socket.create_connection((host, int(port)), timeout=float(sys.argv[4]))
greeting = b""
def take(size):
    data = b""
    while len(data) < size:
        more = flow.recv(size - len(data))
        if not more:
            raise EOFError("ended")
        data += more
    return data
while not greeting.endswith(b"\n"):
    greeting += take(1)
def echo():
    flow.sendall(b"ping")
    if take(4) != b"ping":
        raise ValueError("not what was sent")
echo()
seen = greeting.decode().split()
print(json.dumps({"peer": flow.getpeername()[:2], "local": flow.getsockname()[:2],
    "seen": [seen[0].removeprefix("::ffff:"), int(seen[1])], "greeting": len(greeting)}), flush=True)
while stop != "-" and not os.path.exists(stop):
    try:
        echo()
    except Exception as error:
        print(json.dumps({"lost": type(error).__name__}), flush=True)
        sys.exit(3)
    print("{}", flush=True)
    time.sleep(0.05)
"#;

/// What the policies of the namespace say: who may, and whether connections may go without the agent.
fn policies(allowed: &str, same_node: &str) -> String {
    format!(
        "\
apiVersion: nodemesh.io/v1alpha1
kind: AccessPolicy
metadata: {{name: known, namespace: near}}
spec:
  targetRefs: [{{kind: Namespace, name: near}}]
  action: Allow
  rules: [{{name: callers, from: [{{identities: ['spiffe://cluster.local/ns/near/sa/{allowed}']}}]}}]
---
apiVersion: nodemesh.io/v1alpha1
kind: MeshPolicy
metadata: {{name: near, namespace: near}}
spec: {{targetRefs: [{{kind: Namespace, name: near}}], mtls: {{mode: strict}}, sameNode: {same_node}}}
"
    )
}

/// Speaks once from a pod; what the program printed.
fn speak(lab: &Lab, pod: &str, host: &str, port: u16, patience: u32) -> Result<Json> {
    let (port, patience) = (port.to_string(), patience.to_string());
    let said = lab
        .exec(pod, &["python3", "-c", SPEAK, host, &port, "-", &patience])?
        .ok()?;
    serde_json::from_str(said.trim()).with_context(|| said)
}

/// How often the kernel gave a verdict on the node.
fn verdicts(lab: &Lab, reason: &str) -> Result<f64> {
    Ok(lab
        .metrics(NODE)?
        .sum("nodemesh_agent_kernel_verdicts_total", &[("reason", reason)]))
}

/// Speaks until the kernel lets a connection go.
fn until_direct(lab: &Lab, host: &str) -> Result<()> {
    until("a connection without the agent", LIMIT, || {
        let before = verdicts(lab, "outbound-direct")?;
        speak(lab, SOURCE, host, DECLARED, 20)?;
        Ok((verdicts(lab, "outbound-direct")? > before).then_some(()))
    })
}

/// A connection that goes on beside the test.
struct Flow {
    program: Background,
    stop: PathBuf,
    facts: Json,
}

impl Flow {
    fn open(lab: &Lab, host: &str, name: &str) -> Result<Flow> {
        let stop = lab.directory().join(name);
        let port = DECLARED.to_string();
        let argv = ["python3", "-c", SPEAK, host, &port, &stop.display().to_string(), "20"];
        let program = lab.exec_background(SOURCE, &argv)?;
        let facts = until("the first exchange", LIMIT, || {
            let said = program.stdout();
            let line = said.lines().next().with_context(|| program.stderr())?;
            Ok(Some(serde_json::from_str(line)?))
        })?;
        Ok(Flow { program, stop, facts })
    }

    /// Its source's port.
    fn port(&self) -> u64 {
        self.facts["local"][1].as_u64().unwrap_or_default()
    }

    /// Waits for exchanges that have not been yet.
    fn goes_on(&self) -> Result<()> {
        let before = self.program.stdout().lines().count();
        until("further exchanges", LIMIT, || {
            Ok((self.program.stdout().lines().count() > before + 3).then_some(()))
        })
    }

    fn finish(self) -> Result<()> {
        std::fs::write(&self.stop, "")?;
        self.program.wait(LIMIT)?.ok()?;
        Ok(())
    }
}

/// The records of the connection that was made from that port, one of each side and no more.
fn told(lab: &Lab, source_port: u64) -> Result<[Json; 2]> {
    let mine = |line: &Json| line["event.name"] == "connection" && line["source.port"] == source_port;
    let mut found = Vec::new();
    for reporter in ["source", "destination"] {
        found.push(record(lab, NODE, |line| {
            mine(line) && line["nodemesh.reporter"] == reporter
        })?);
    }
    let all: Vec<_> = lab.access_log(NODE)?.into_iter().filter(mine).collect();
    ensure!(all.len() == 2, "told of once by each side: {all:#?}");
    found.try_into().map_err(|_| anyhow::anyhow!("two records"))
}

fn has(line: &Json, wanted: &Json) {
    for (key, value) in wanted.as_object().into_iter().flatten() {
        assert_eq!(&line[key], value, "{key}: {line:#}");
    }
}

#[test]
fn the_kernel_connects_who_may_and_nobody_else() -> Result<()> {
    let lab = Lab::up(LabConfig::test("gdirect").kept().manifest(PODS))?;
    let (ip, ip6) = (lab.pod_ip(ECHO)?.to_string(), lab.pod_ip6(ECHO)?.to_string());
    let service = lab.service_ip(ECHO)?.to_string();
    apply(&lab, &policies("source", "agent"))?;
    speak(&lab, SOURCE, &service, DECLARED, 20)?;
    assert_eq!(verdicts(&lab, "outbound-direct")?, 0.0, "only where a policy says so");

    apply(&lab, &policies("source", "direct"))?;
    until_direct(&lab, &service)?;
    let before = [verdicts(&lab, "captured")?, verdicts(&lab, "outbound-direct")?];
    let hosts = [&service, &ip, &ip6];
    for host in hosts {
        let seen = speak(&lab, SOURCE, host, DECLARED, 20)?;
        assert_eq!(seen["peer"], json!([host, DECLARED]), "what was asked for: {seen}");
        assert_eq!(seen["seen"], seen["local"], "the source itself: {seen}");
        let own = if host == &ip6 {
            lab.pod_ip6(SOURCE)?
        } else {
            lab.pod_ip(SOURCE)?
        };
        assert_eq!(seen["local"][0], own.to_string());
        let [source, destination] = told(&lab, seen["local"][1].as_u64().unwrap_or_default())?;
        for line in [&source, &destination] {
            has(
                line,
                &json!({
                    "nodemesh.outcome": "served",
                    "nodemesh.connection.security": "same_node",
                    "nodemesh.source.identity": "spiffe://cluster.local/ns/near/sa/source",
                    "nodemesh.destination.identity": "spiffe://cluster.local/ns/near/sa/echo",
                    "nodemesh.bytes_received": 4,
                    "nodemesh.bytes_sent": 4 + seen["greeting"].as_u64().unwrap_or_default(),
                    "nodemesh.revision": revision(&lab)?,
                    "destination.address": host,
                }),
            );
        }
        let rule = destination["nodemesh.rule"].as_str().unwrap_or_default();
        assert!(rule.contains("accesspolicy/near/known/callers"), "{destination:#}");
    }
    let after = [verdicts(&lab, "captured")?, verdicts(&lab, "outbound-direct")?];
    assert_eq!(after, [before[0], before[1] + 3.0], "none of them saw the agent");
    let labels = [("source_workload", "source"), ("destination_workload", "echo")];
    let metrics = lab.metrics(NODE)?;
    assert_eq!(
        metrics.sum("mesh_tcp_connections_opened_total", &labels),
        metrics.sum("mesh_tcp_connections_closed_total", &labels)
    );

    // What is not declared to be opaque goes through the agent, and so does everything of whoever may not.
    speak(&lab, SOURCE, &ip, UNDECLARED, 20)?;
    for (host, port) in [
        (&service, DECLARED),
        (&ip, DECLARED),
        (&ip6, DECLARED),
        (&ip, UNDECLARED),
    ] {
        ensure!(speak(&lab, OTHER, host, port, 20).is_err(), "{host} {port}");
    }
    assert_eq!(verdicts(&lab, "outbound-direct")?, after[1]);

    // A permit that goes takes its connections along, and those alone.
    let flows = [Flow::open(&lab, &service, "first")?, Flow::open(&lab, &ip6, "second")?];
    apply(&lab, &policies("other", "direct"))?;
    for flow in flows {
        let port = flow.port();
        let output = flow.program.wait(LIMIT)?;
        assert_eq!(output.code(), 3, "{output}");
        assert!(output.stdout.contains("ConnectionAbortedError"), "{output}");
        for line in told(&lab, port)? {
            has(&line, &json!({"nodemesh.refusal": "permit-lost"}));
        }
    }
    for host in [&service, &ip6] {
        ensure!(speak(&lab, SOURCE, host, DECLARED, 20).is_err(), "{host}");
        speak(&lab, OTHER, host, DECLARED, 20)?;
    }
    lab.down()
}

#[test]
fn direct_connections_outlive_their_agent() -> Result<()> {
    let lab = Lab::up(LabConfig::test("gdirectkill").kept().manifest(PODS))?;
    let ip = lab.pod_ip(ECHO)?.to_string();
    apply(&lab, &policies("source", "direct"))?;
    until_direct(&lab, &ip)?;
    let (killed, replaced) = (Flow::open(&lab, &ip, "killed")?, Flow::open(&lab, &ip, "replaced")?);
    lab.kill_agent(NODE)?;
    killed.goes_on()?;
    // Once the agent is known to be dead, new connections wait for the next one.
    until("a new connection that waits", LIMIT, || {
        Ok(speak(&lab, SOURCE, &ip, DECLARED, 1).is_err().then_some(()))
    })?;
    killed.goes_on()?;
    lab.start_agent(NODE)?;
    all_current(&lab)?;
    until_direct(&lab, &ip)?;
    killed.goes_on()?;
    let port = killed.port();
    killed.finish()?;
    for line in told(&lab, port)? {
        has(&line, &json!({"nodemesh.outcome": "served"}));
    }
    // The next generation goes on with what the last one let go, and takes it away when it has to.
    lab.upgrade_agent(NODE)?;
    until_direct(&lab, &ip)?;
    replaced.goes_on()?;
    let port = replaced.port();
    apply(&lab, &policies("other", "direct"))?;
    let output = replaced.program.wait(LIMIT)?;
    assert_eq!(output.code(), 3, "{output}");
    for line in told(&lab, port)? {
        has(&line, &json!({"nodemesh.refusal": "permit-lost"}));
    }
    lab.down()
}
