//! The actors of the tests of policy: destinations that count what reached them and can be told to misbehave, and
//! sources that count what they saw. Both are `fixtures/actors/actors.py`, run in pods; here are their documents and
//! their verbs. What a destination counts is asked inside its own pod, past the mesh.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::{Value as Json, json};

use crate::{Background, Lab, until};

/// The program.
pub const PROGRAM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/actors/actors.py");
/// HTTP, declared by its services.
pub const WEB: u16 = 8080;
/// The same, undeclared.
pub const WEB_UNDECLARED: u16 = 8081;
/// Lines of TCP, declared by its services.
pub const LINES: u16 = 7000;
/// gRPC, declared by its services.
pub const RPC: u16 = 50051;

/// How long records may take to be written.
const RECORDS_LIMIT: Duration = Duration::from_secs(10);
const PYTHON: &str = "/usr/bin/python3";

/// The documents of a namespace, in the mesh or not.
pub fn namespace(name: &str, enrolled: bool) -> String {
    let labels = if enrolled { "{nodemesh.io/mesh: enabled}" } else { "{}" };
    format!("---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {labels}}}\n")
}

/// The documents of a source with an identity of its own.
pub fn source(pod: &str, node: &str) -> String {
    let (namespace, name) = split(pod);
    format!(
        "---
apiVersion: v1
kind: ServiceAccount
metadata: {{name: {name}, namespace: {namespace}}}
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}
spec:
  nodeName: {node}
  serviceAccountName: {name}
  containers: [{{name: main, command: [sleep, infinity]}}]
"
    )
}

/// The documents of a destination with these labels besides its name as `pod`; its identity is its own.
pub fn destination(pod: &str, node: &str, labels: &[(&str, &str)]) -> String {
    let (namespace, name) = split(pod);
    let labels: String = labels.iter().map(|(key, value)| format!(", {key}: {value}")).collect();
    format!(
        "---
apiVersion: v1
kind: ServiceAccount
metadata: {{name: {name}, namespace: {namespace}}}
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}, labels: {{pod: {name}{labels}}}}}
spec:
  nodeName: {node}
  serviceAccountName: {name}
  containers:
  - name: main
    command: [{PYTHON}, -u, {PROGRAM}, serve, {name}]
    readinessProbe: {{httpGet: {{path: /healthz, port: {WEB}}}}}
"
    )
}

/// The documents of a service of destinations: HTTP on 80 (undeclared on 81), lines on 7000, gRPC on 50051.
pub fn service(service: &str, label: &str, value: &str) -> String {
    let (namespace, name) = split(service);
    format!(
        "---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: {namespace}}}
spec:
  selector: {{{label}: {value}}}
  ports:
  - {{name: http, port: 80, targetPort: {WEB}}}
  - {{name: web, port: 81, targetPort: {WEB_UNDECLARED}}}
  - {{name: tcp-lines, port: {LINES}}}
  - {{name: grpc, port: {RPC}}}
"
    )
}

fn split(name: &str) -> (&str, &str) {
    name.split_once('/').unwrap_or(("default", name))
}

/// One answer as its source saw it.
#[derive(Clone, Debug, Deserialize)]
pub struct Answer {
    /// The status; 0: there was no answer.
    pub status: u16,
    /// How a request without an answer failed.
    #[serde(default)]
    pub how: String,
    /// The answer's headers, by lower-case name.
    #[serde(default)]
    pub headers: std::collections::BTreeMap<String, String>,
    /// What the destination says that reached it, or a text.
    #[serde(default)]
    pub body: Json,
    /// How long it took.
    pub seconds: f64,
}

impl Answer {
    /// Why the mesh refused it; empty if it did not.
    pub fn refusal(&self) -> &str {
        self.headers.get("x-nodemesh-refusal").map_or("", String::as_str)
    }

    /// The destination that answered.
    pub fn from(&self) -> &str {
        self.body["name"].as_str().unwrap_or_default()
    }
}

/// How requests are sent.
#[derive(Clone, Debug)]
pub struct Plan(Json);

/// A plan of these requests, each with `path` and perhaps `method`, `headers` and `body`, over one kept connection.
pub fn requests(requests: Json) -> Plan {
    Plan(json!({"requests": requests}))
}

/// A plan of one GET of a path.
pub fn get(path: &str) -> Plan {
    requests(json!([{"path": path}]))
}

impl Plan {
    /// Everything so many times.
    pub fn times(mut self, repeat: usize) -> Plan {
        self.0["repeat"] = repeat.into();
        self
    }

    /// On so many connections at once.
    pub fn connections(mut self, connections: usize) -> Plan {
        self.0["connections"] = connections.into();
        self
    }

    /// Each request on a connection of its own.
    pub fn fresh(mut self) -> Plan {
        self.0["fresh"] = true.into();
        self
    }

    /// The arguments of a background command that sends it; see [`answers`].
    pub fn command(&self, host: &str, port: u16) -> Vec<String> {
        [PYTHON, PROGRAM, "ask", host, &port.to_string(), &self.0.to_string()]
            .map(str::to_owned)
            .to_vec()
    }

    /// Sends the requests from a pod.
    pub fn ask(&self, lab: &Lab, pod: &str, host: &str, port: u16) -> Result<Vec<Answer>> {
        let words = self.command(host, port);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let said = lab.exec(pod, &words)?.ok()?;
        answers(&said).with_context(|| format!("{pod} asks {host}:{port}"))
    }

    /// Starts to send the requests from a pod.
    pub fn start(&self, lab: &Lab, pod: &str, host: &str, port: u16) -> Result<Background> {
        let words = self.command(host, port);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        lab.exec_background(pod, &words)
    }
}

/// Reads what a sent [`Plan`] printed.
pub fn answers(said: &str) -> Result<Vec<Answer>> {
    serde_json::from_str(said).with_context(|| format!("answers: {said}"))
}

/// How often each status came.
pub fn statuses(answers: &[Answer]) -> std::collections::BTreeMap<u16, usize> {
    let mut counts = std::collections::BTreeMap::new();
    for answer in answers {
        *counts.entry(answer.status).or_default() += 1;
    }
    counts
}

/// How often each destination answered.
pub fn destinations(answers: &[Answer]) -> std::collections::BTreeMap<String, usize> {
    let mut counts = std::collections::BTreeMap::new();
    for answer in answers {
        *counts.entry(answer.from().to_owned()).or_default() += 1;
    }
    counts
}

/// Runs another verb of the program in a pod and reads what it printed.
pub fn verb(lab: &Lab, pod: &str, verb: &str, words: &[&str]) -> Result<Json> {
    let argv = [&[PYTHON, PROGRAM, verb], words].concat();
    let said = lab.exec(pod, &argv)?.ok()?;
    serde_json::from_str(&said).with_context(|| format!("{verb}: {said}"))
}

/// Sends one line to a TCP destination: `{"how": "answer", …}` or how it failed.
pub fn line(lab: &Lab, pod: &str, host: &str) -> Result<Json> {
    verb(lab, pod, "line", &[host, &LINES.to_string()])
}

/// Calls the gRPC destination: for each call who answered, or the status.
pub fn rpc(lab: &Lab, pod: &str, host: &str, plan: Json) -> Result<Vec<String>> {
    let said = verb(lab, pod, "rpc", &[host, &RPC.to_string(), &plan.to_string()])?;
    Ok(serde_json::from_value(said)?)
}

/// Opens a TCP flow that goes on beside the test; returns when the destination has answered on it once.
pub fn hold(lab: &Lab, pod: &str, host: &str) -> Result<Background> {
    start_hold(lab, pod, &[host, &LINES.to_string()])
}

fn start_hold(lab: &Lab, pod: &str, words: &[&str]) -> Result<Background> {
    start(lab, pod, &[&["hold"], words].concat())
}

/// Starts a verb that goes on beside the test; returns when it is under way.
pub fn start(lab: &Lab, pod: &str, words: &[&str]) -> Result<Background> {
    let flow = lab.exec_background(pod, &[&[PYTHON, "-u", PROGRAM], words].concat())?;
    until("an open flow", RECORDS_LIMIT, || {
        let said = flow.stdout();
        ensure!(!said.contains("how"), "{said}");
        Ok(said.starts_with("open").then_some(()))
    })?;
    Ok(flow)
}

/// Opens an HTTP connection that is upgraded to lines and goes on beside the test; returns when it is used.
pub fn hold_upgraded(lab: &Lab, pod: &str, host: &str) -> Result<Background> {
    start_hold(lab, pod, &[host, "80", "upgrade"])
}

/// What a flow of [`hold`] says of its end.
pub fn end_of(said: &str) -> Result<Json> {
    let line = said.lines().last().unwrap_or_default();
    serde_json::from_str(line).with_context(|| format!("the end of a flow: {said}"))
}

/// Sets how a destination behaves (`status=500&hold=1`), and tells what reached it until then.
pub fn behave(lab: &Lab, pod: &str, words: &str) -> Result<Json> {
    let url = format!("http://127.0.0.1:9900/?{words}");
    let said = lab.exec(pod, &["curl", "-sS", "--max-time", "10", &url])?.ok()?;
    serde_json::from_str(&said).with_context(|| format!("{pod} behaves {words}: {said}"))
}

/// Makes a destination as one whose program crashed, and which the mesh still calls ready.
pub fn fall_deaf(lab: &Lab, pod: &str) -> Result<()> {
    lab.exec(pod, &["curl", "-sS", "--max-time", "10", "http://127.0.0.1:9900/deaf"])?
        .ok()?;
    Ok(())
}

/// One number of what a destination tells of itself.
pub fn told(lab: &Lab, pod: &str, what: &str) -> Result<u64> {
    behave(lab, pod, "")?[what].as_u64().context("no such number")
}

/// Applies policies; returns when every agent holds them.
pub fn apply(lab: &Lab, yaml: &str) -> Result<()> {
    lab.ctl_with_input(&["policy", "apply", "-f", "-", "--wait"], yaml)?
        .ok()
        .with_context(|| format!("apply\n{yaml}"))?;
    Ok(())
}

/// Deletes a policy; returns when no agent holds it any more.
pub fn delete(lab: &Lab, kind: &str, namespace: &str, name: &str) -> Result<()> {
    lab.ctl(&["policy", "delete", kind, name, "-n", namespace, "--wait"])?
        .ok()?;
    Ok(())
}

/// Waits until an agent's metric has grown by exactly so much since an earlier scrape, and no more.
pub fn expect_growth(
    lab: &Lab,
    node: &str,
    before: &crate::Metrics,
    name: &str,
    labels: &[(&str, &str)],
    want: f64,
) -> Result<()> {
    until("a metric", RECORDS_LIMIT, || {
        let grown = lab.metrics(node)?.sum(name, labels) - before.sum(name, labels);
        ensure!(
            grown == want,
            "{name}{labels:?} on {node} grew by {grown}, expected {want}"
        );
        Ok(Some(()))
    })
}

/// Waits until an agent's access log has a record of which all these fields are so, and gives it.
pub fn expect_record(lab: &Lab, node: &str, fields: &[(&str, Json)]) -> Result<Json> {
    let fits = |record: &Json| fields.iter().all(|(name, value)| record[*name] == *value);
    until("a record", RECORDS_LIMIT, || {
        let records = lab.access_log(node)?;
        let found = records.iter().rev().find(|record| fits(record)).cloned();
        found
            .with_context(|| format!("no record with {fields:?} on {node}; the last is {:?}", records.last()))
            .map(Some)
    })
}
