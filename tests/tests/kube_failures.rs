//! What fails in a cluster, what goes on, and what fails closed: rows of `docs/failures.md`. Each has requests from both
//! nodes running, over kept and over new connections, allowed and denied ones, and a stranger who is to be refused.

use std::{
    collections::BTreeMap,
    env,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use mesh_tests::{
    cluster::{Cluster, SYSTEM, Scope},
    until,
};
use serde::Deserialize;
use serde_json::Value;

/// In the address of each request.
const MARKER: &str = "marker-4c61e0aa";
/// How long an outage lasts (`NODEMESH_OUTAGE` in seconds names another time).
const OUTAGE: Duration = Duration::from_secs(20);
const NODES: [usize; 2] = [1, 2];

const POLICIES: &str = r#"
apiVersion: nodemesh.io/v1alpha1
kind: MeshPolicy
metadata: {name: strict}
spec: {targetRefs: [{kind: Service, name: web}], mtls: {mode: strict}}
---
apiVersion: nodemesh.io/v1alpha1
kind: AccessPolicy
metadata: {name: secret}
spec:
  targetRefs: [{kind: Service, name: web}]
  action: Deny
  rules: [{to: [{paths: [{type: PathPrefix, value: /secret}]}]}]
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Pod
metadata: {name: stranger, labels: {nodemesh.io/mesh: disabled}}
spec:
  nodeSelector: {kubernetes.io/hostname: node1}
  terminationGracePeriodSeconds: 0
  containers:
  - {name: main, image: "localhost/nodemesh/test:dev", command: [sleep, infinity]}
"#;

/// A destination and a source on a node.
fn pods(node: usize) -> String {
    format!(
        r#"
---
apiVersion: v1
kind: Pod
metadata: {{name: web-{node}, labels: {{app: web}}}}
spec:
  nodeSelector: {{kubernetes.io/hostname: node{node}}}
  terminationGracePeriodSeconds: 0
  containers:
  - name: main
    image: localhost/nodemesh/test:dev
    command: [lab-load, serve, "8080", web-{node}]
    readinessProbe: {{tcpSocket: {{port: 8080}}, periodSeconds: 1}}
---
apiVersion: v1
kind: Pod
metadata: {{name: source-{node}, labels: {{app: source}}}}
spec:
  nodeSelector: {{kubernetes.io/hostname: node{node}}}
  terminationGracePeriodSeconds: 0
  containers:
  - {{name: main, image: "localhost/nodemesh/test:dev", command: [sleep, infinity]}}
"#
    )
}

fn application(namespace: &str) -> Result<Scope> {
    let scope = Scope::new(&Cluster::shared()?, namespace, "nodemesh.io/mesh: enabled")?;
    scope.apply(&[POLICIES, &pods(1), &pods(2)].concat())?;
    for pod in ["web-1", "web-2", "source-1", "source-2", "stranger"] {
        scope.condition(namespace, &format!("pod/{pod}"), "Ready")?;
    }
    for source in ["source-1", "source-2"] {
        for (path, status) in [("", "200"), ("secret", "403")] {
            until_answered(&scope, source, path, status)?;
        }
    }
    scope.until("the stranger's refusal", || {
        let asked = curl(&scope, "stranger", "")?;
        ensure!(asked == "000", "the stranger is answered with {asked}");
        Ok(Some(()))
    })?;
    Ok(scope)
}

/// The status that a path of the service is answered with; `000` if it is not answered.
fn curl(scope: &Scope, pod: &str, path: &str) -> Result<String> {
    let url = format!("http://web/{path}");
    let words = [
        "curl",
        "-s",
        "-o",
        "/dev/null",
        "-w",
        "%{http_code}",
        "--max-time",
        "20",
        &url,
    ];
    let said = scope.exec(pod, &words)?;
    let status = said.stdout.trim().to_string();
    ensure!(status.len() == 3, "{said}");
    Ok(status)
}

fn until_answered(scope: &Scope, pod: &str, path: &str, status: &str) -> Result<()> {
    scope.until(&format!("{status} for /{path} from {pod}"), || {
        let found = curl(scope, pod, path)?;
        ensure!(found == status, "{found}");
        Ok(Some(()))
    })
}

/// Requests of one kind that go on in a pod until they are stopped. They need no API server while they run.
#[derive(Clone, Copy, Debug)]
struct Load {
    pod: &'static str,
    /// The node of the pod.
    node: usize,
    /// lab-load's: `http` keeps its connections, `connect` makes one for each request.
    kind: &'static str,
    path: &'static str,
    connections: u64,
    rate: u64,
    /// The only status that there may be.
    wanted: &'static str,
}

/// All loads: 24 good requests in a second, 8 that are denied, 2 of a stranger.
fn loads() -> Vec<Load> {
    let mut loads = Vec::new();
    let mut add = |pod, node, kind, path, connections, rate, wanted| {
        loads.push(Load {
            pod,
            node,
            kind,
            path,
            connections,
            rate,
            wanted,
        });
    };
    for (pod, node) in [("source-1", 1), ("source-2", 2)] {
        for kind in ["http", "connect"] {
            add(pod, node, kind, "", 2, 6, "200");
            add(pod, node, kind, "secret", 1, 2, "403");
        }
    }
    add("stranger", 1, "connect", "", 1, 2, "none");
    loads
}

/// What lab-load counts.
#[derive(Debug, Deserialize)]
struct Counted {
    requests: u64,
    statuses: BTreeMap<String, u64>,
    errors: BTreeMap<String, u64>,
}

impl Load {
    fn file(&self) -> String {
        format!("/tmp/{}-{}", self.kind, self.wanted)
    }

    fn start(&self, scope: &Scope) -> Result<()> {
        let Load {
            kind,
            path,
            connections,
            rate,
            ..
        } = self;
        let command = format!(
            "lab-load {kind} 'http://web/{path}?{MARKER}' --connections {connections} --rate {rate} --seconds 1200 \
             --timeout 60 --stop /tmp/stop > {} 2>&1 < /dev/null &",
            self.file()
        );
        scope.exec(self.pod, &["sh", "-c", &command])?.ok()?;
        Ok(())
    }

    fn counted(&self, scope: &Scope) -> Result<Counted> {
        scope.until(&format!("the end of {self:?}"), || {
            let text = scope.exec(self.pod, &["cat", &self.file()])?.ok()?;
            if text.is_empty() {
                return Ok(None);
            }
            let counted: Counted = serde_json::from_str(&text).with_context(|| text.clone())?;
            let Counted {
                requests,
                statuses,
                errors,
            } = &counted;
            println!(
                "{} {} /{}: {requests}: {statuses:?} {errors:?}",
                self.pod, self.kind, self.path
            );
            Ok(Some(counted))
        })
    }

    /// What the table does not allow.
    fn problems(&self, counted: &Counted, loss: Loss) -> Vec<String> {
        let mut problems = Vec::new();
        if self.wanted == "none" {
            if !counted.statuses.is_empty() {
                problems.push("a stranger was answered".into());
            }
            return problems;
        }
        let answers = |status: &str| counted.statuses.get(status).copied().unwrap_or_default();
        let mut good = answers(self.wanted);
        if loss == Loss::Elsewhere && self.wanted == "403" {
            good += answers("503");
        }
        if self.wanted == "403" && counted.statuses.keys().any(|status| status.starts_with('2')) {
            problems.push("what is denied was answered".into());
        }
        let (failed, bound) = (counted.requests - good, loss.bound(self.connections));
        if failed > bound {
            problems.push(format!("{failed} requests failed, {bound} may"));
        }
        if good < 10 {
            problems.push("hardly a request was made".into());
        }
        problems
    }
}

/// What the table of `docs/failures.md` says of the requests of a source.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Loss {
    /// Not one request fails.
    None,
    /// At most the one request that each connection carries when the agent goes.
    Carried,
    /// None fails, but one that is denied may be told so by 503: it went from an endpoint that is gone to one that
    /// denies it.
    Elsewhere,
    /// New connections may be refused for a while.
    Refused,
}

impl Loss {
    fn bound(self, connections: u64) -> u64 {
        match self {
            Loss::None | Loss::Elsewhere => 0,
            Loss::Carried => connections,
            Loss::Refused => u64::MAX,
        }
    }
}

/// Does something under load and judges what the sources saw; `loss` is by the node of the source.
fn under_load(scope: &Scope, loss: impl Fn(usize) -> Loss, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let loads = loads();
    let capture = scope.capture("tcp and not port 6443 and not port 15010 and not port 10250")?;
    for load in &loads {
        load.start(scope)?;
    }
    let worked = until_served(scope, 20)
        .and_then(|()| work())
        .and_then(|()| until_served(scope, 40));
    for pod in ["source-1", "source-2", "stranger"] {
        scope.exec(pod, &["sh", "-c", "echo > /tmp/stop"])?.ok()?;
    }
    let mut problems = Vec::new();
    for load in &loads {
        let counted = load.counted(scope)?;
        for problem in load.problems(&counted, loss(load.node)) {
            problems.push(format!("{problem}: {load:?}: {counted:?}"));
        }
    }
    // The stranger's own requests are in the clear, but no answer is.
    let answers = capture.stop()?.count("HTTP/1.1 200");
    if answers > 0 {
        problems.push(format!("{answers} answers are in the clear between the nodes"));
    }
    worked?;
    ensure!(
        problems.is_empty(),
        "{}\n{}",
        problems.join("\n"),
        scope.describe(SYSTEM)
    );
    Ok(())
}

/// The requests that the agent of a node has counted for the application's pods.
fn counted(scope: &Scope, node: usize) -> Result<f64> {
    let labels = [
        ("reporter", "destination"),
        ("destination_workload_namespace", scope.namespace()),
    ];
    Ok(scope.metrics(node)?.sum("mesh_requests_total", &labels))
}

/// Waits until the pods of each node were asked so many times more. No API server is needed for it.
fn until_served(scope: &Scope, more: u32) -> Result<()> {
    NODES.iter().try_for_each(|node| until_served_by(scope, *node, more))
}

fn until_served_by(scope: &Scope, node: usize, more: u32) -> Result<()> {
    let mut first = None;
    scope.until(&format!("{more} more requests on node {node}"), || {
        let now = counted(scope, node)?;
        let from = *first.get_or_insert(now);
        // A restarted agent counts from zero.
        if now < from {
            first = Some(now);
        }
        Ok((now >= from + f64::from(more)).then_some(()))
    })
}

/// The time goes by, and requests with it: not fewer than half of what is sent.
fn outage(scope: &Scope) -> Result<()> {
    let seconds = env::var("NODEMESH_OUTAGE").ok().and_then(|text| text.parse().ok());
    let length = seconds.map_or(OUTAGE, Duration::from_secs);
    let served = || -> Result<f64> { Ok(counted(scope, 1)? + counted(scope, 2)?) };
    let (began, before) = (Instant::now(), served()?);
    until("the end of the outage", 2 * length, || {
        Ok((began.elapsed() >= length).then_some(()))
    })?;
    let more = served()? - before;
    println!("{more} requests in {:?}", began.elapsed());
    ensure!(
        more >= 12.0 * length.as_secs_f64(),
        "only {more} requests in {length:?}"
    );
    Ok(())
}

/// Denies one more path.
fn deny(scope: &Scope, name: &str) -> Result<()> {
    scope.apply(&format!(
        r#"
apiVersion: nodemesh.io/v1alpha1
kind: AccessPolicy
metadata: {{name: {name}}}
spec:
  targetRefs: [{{kind: Service, name: web}}]
  action: Deny
  rules: [{{to: [{{paths: [{{type: PathPrefix, value: /{name}}}]}}]}}]
"#
    ))?;
    Ok(())
}

/// Waits until a policy's status says that the agents that need it hold it.
fn until_programmed(scope: &Scope, name: &str) -> Result<()> {
    scope.until(&format!("{name} in effect"), || {
        let object = scope.get(scope.namespace(), "accesspolicy", name)?;
        let conditions = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let good = |value: &Value| value["type"] == "Programmed" && value["status"] == "True";
        ensure!(conditions.iter().any(good), "{}", object["status"]);
        Ok(Some(()))
    })
}

/// Waits until paths are denied by the agents of both nodes.
fn until_denied(scope: &Scope, names: &[String]) -> Result<()> {
    for name in names {
        until_programmed(scope, name)?;
        for source in ["source-1", "source-2"] {
            let found = curl(scope, source, name)?;
            ensure!(
                found == "403",
                "{name} is programmed, and {source} is answered with {found}"
            );
        }
    }
    Ok(())
}

/// The pod that leads.
fn leader(scope: &Scope) -> Result<Value> {
    let lease = scope.get(SYSTEM, "lease", "nodemesh-controller")?;
    let holder = lease["spec"]["holderIdentity"].as_str().unwrap_or_default();
    let pods = scope.list(SYSTEM, "pods", "app.kubernetes.io/component=controller")?;
    let leads = |pod: &Value| {
        pod["metadata"]["name"]
            .as_str()
            .is_some_and(|name| holder.starts_with(name))
    };
    let pod = pods.into_iter().find(leads);
    pod.with_context(|| format!("nobody leads; the lease is held by {holder:?}"))
}

/// How often a pod's container was started anew.
fn restarts(pod: &Value) -> Option<u64> {
    pod["status"]["containerStatuses"][0]["restartCount"].as_u64()
}

#[test]
fn an_api_server_that_hangs_stops_changes_and_nothing_else() -> Result<()> {
    let scope = application("kube-fail-api")?;
    under_load(
        &scope,
        |_| Loss::None,
        || {
            let paused = scope.pause("/cp", &["kube-apiserver"])?;
            outage(&scope)?;
            drop(paused);
            scope.until("the API server", || deny(&scope, "later").map(Some))?;
            until_denied(&scope, &["later".into()])
        },
    )
}

#[test]
fn a_paused_kubelet_takes_its_node_away_and_no_request() -> Result<()> {
    let scope = application("kube-fail-kubelet")?;
    let ready = |wanted: &str| {
        scope.until(&format!("web-2 with Ready={wanted}"), || {
            let pod = scope.get(scope.namespace(), "pod", "web-2")?;
            let conditions = pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
            let is_it = |value: &Value| value["type"] == "Ready" && value["status"] == wanted;
            Ok(conditions.iter().any(is_it).then_some(()))
        })
    };
    under_load(
        &scope,
        |_| Loss::None,
        || {
            let paused = scope.pause("node2", &["kubelet"])?;
            // Until the cluster takes the node for lost, and its pods for unready.
            ready("False")?;
            until_served_by(&scope, 1, 100)?;
            drop(paused);
            ready("True")?;
            deny(&scope, "later")?;
            until_denied(&scope, &["later".into()])
        },
    )
}

#[test]
fn a_slow_etcd_delays_changes_and_loses_none() -> Result<()> {
    let scope = application("kube-fail-etcd")?;
    under_load(
        &scope,
        |_| Loss::None,
        || {
            let slow = scope.slow_down("/cp", &["etcd"])?;
            let names: Vec<String> = (0..8).map(|number| format!("slow-{number}")).collect();
            for name in &names {
                // What etcd did not take in time is asked for again, as an operator does.
                scope.until("the API server", || deny(&scope, name).map(Some))?;
            }
            until_served(&scope, 60)?;
            drop(slow);
            until_denied(&scope, &names)
        },
    )
}

#[test]
fn a_deleted_agent_pod_refuses_its_own_pods_until_the_next_one() -> Result<()> {
    let scope = application("kube-fail-pod")?;
    let loss = |node| if node == 1 { Loss::Refused } else { Loss::Elsewhere };
    under_load(&scope, loss, || {
        let old = scope.agent_pod("node1")?;
        let began = Instant::now();
        scope.kubectl(&["-n", SYSTEM, "delete", "pod", &old, "--wait=false"])?;
        scope.until("another agent", || {
            let new = scope.agent_pod("node1")?;
            Ok((new != old).then_some(()))
        })?;
        scope.rolled_out(SYSTEM, "daemonset/nodemesh-agent")?;
        println!("the next agent is ready after {:?}", began.elapsed());
        until_answered(&scope, "source-1", "", "200")
    })
}

#[test]
fn a_killed_agent_loses_what_it_carried_and_the_keeper_holds_the_rest() -> Result<()> {
    let scope = application("kube-fail-agent")?;
    under_load(
        &scope,
        |_| Loss::Carried,
        || {
            let pid = scope.process("node1", &["mesh-agent", "run"])?;
            scope.kill("node1", &["mesh-agent", "run"])?;
            scope.until("another agent", || {
                let new = scope.process("node1", &["mesh-agent", "run"])?;
                Ok((new != pid).then_some(()))
            })?;
            until_answered(&scope, "source-1", "", "200")?;
            scope.rolled_out(SYSTEM, "daemonset/nodemesh-agent")
        },
    )
}

/// Gives the controller its replicas back, however a test ends.
struct NoController<'a>(&'a Scope);

impl NoController<'_> {
    fn begin(scope: &Scope) -> Result<NoController<'_>> {
        let guard = NoController(scope);
        scale(scope, "0")?;
        scope.until("the end of the controllers", || {
            let left = scope.list(SYSTEM, "pods", "app.kubernetes.io/component=controller")?;
            Ok(left.is_empty().then_some(()))
        })?;
        Ok(guard)
    }
}

impl Drop for NoController<'_> {
    fn drop(&mut self) {
        if let Err(error) = scale(self.0, "2") {
            eprintln!("the controller stays away: {error:#}");
        }
    }
}

fn scale(scope: &Scope, replicas: &str) -> Result<()> {
    let replicas = format!("--replicas={replicas}");
    scope.kubectl(&["-n", SYSTEM, "scale", "deployment/nodemesh-controller", &replicas])?;
    Ok(())
}

#[test]
fn without_a_controller_a_restarted_agent_serves_by_what_it_kept() -> Result<()> {
    let scope = application("kube-fail-scale")?;
    under_load(
        &scope,
        |_| Loss::Carried,
        || {
            let none = NoController::begin(&scope)?;
            deny(&scope, "later")?;
            until_served(&scope, 60)?;
            scope.kill("node2", &["mesh-agent", "run"])?;
            for (path, status) in [("", "200"), ("secret", "403"), ("later", "200")] {
                until_answered(&scope, "source-2", path, status)?;
            }
            until_served(&scope, 60)?;
            drop(none);
            scope.rolled_out(SYSTEM, "deployment/nodemesh-controller")?;
            until_denied(&scope, &["later".into()])
        },
    )
}

#[test]
fn a_killed_leader_loses_no_change() -> Result<()> {
    let scope = application("kube-fail-leader")?;
    let names: Vec<String> = (0..16).map(|number| format!("change-{number}")).collect();
    under_load(
        &scope,
        |_| Loss::None,
        || {
            let old = leader(&scope)?;
            let mut killed = Instant::now();
            let text = |field: &str| old["metadata"][field].as_str().context("a pod without a name");
            for (number, name) in names.iter().enumerate() {
                deny(&scope, name)?;
                if number == 5 {
                    killed = Instant::now();
                    scope.kill(text("uid")?, &["mesh-ctl", "controller"])?;
                }
            }
            // The first change that only the next leader can have told the agents.
            until_programmed(&scope, &names[6])?;
            println!("a change is in effect {:?} after the leader's death", killed.elapsed());
            until_denied(&scope, &names)?;
            leader(&scope)?;
            scope.until("the killed one's return", || {
                let now = scope.get(SYSTEM, "pod", text("name")?)?;
                Ok((restarts(&now) > restarts(&old)).then_some(()))
            })?;
            scope.rolled_out(SYSTEM, "deployment/nodemesh-controller")
        },
    )
}
