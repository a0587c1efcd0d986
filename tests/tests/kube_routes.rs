//! What the conformance suite does not look at, on the cluster: statuses of routes and policies, where redirects lead,
//! what can be read between the nodes, TCP, retries, timeouts and mirrors.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use mesh_tests::cluster::{Cluster, Scope};
use serde_json::Value;

/// A server that says what it was asked, fails and sleeps when asked to, and a source on the other node.
const APPLICATION: &str = r#"
apiVersion: v1
kind: ConfigMap
metadata: {name: server}
data:
  server.py: |
    import http.server, os, sys, time
    counts = {}
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        def do_GET(self):
            path = self.path.split("?")[0]
            counts[path] = counts.get(path, 0) + 1
            status = 200
            if path.startswith("/flaky") and counts[path] % 2 == 1:
                status = 503
            if path.startswith("/slow"):
                time.sleep(3)
            body = f"{os.environ['NAME']} {path} {counts[path]}\n".encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        def log_message(self, form, *args):
            print("served", form % args, flush=True)
    class Server(http.server.ThreadingHTTPServer):
        address_family = 10
        request_queue_size = 128
    Server(("::", 8080), Handler).serve_forever()
---
apiVersion: v1
kind: Pod
metadata: {name: front, labels: {app: front}}
spec:
  nodeSelector: {kubernetes.io/hostname: node1}
  terminationGracePeriodSeconds: 0
  containers:
  - {name: main, image: "localhost/nodemesh/test:dev", command: [sleep, infinity]}
---
apiVersion: v1
kind: Pod
metadata: {name: redis, labels: {app: redis}}
spec:
  nodeSelector: {kubernetes.io/hostname: node2}
  terminationGracePeriodSeconds: 0
  containers:
  - name: main
    image: localhost/nodemesh/test:dev
    command: [redis-server, --save, "", --bind, "*", --protected-mode, "no"]
    readinessProbe: {tcpSocket: {port: 6379}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: redis}
spec: {selector: {app: redis}, ports: [{name: tcp-redis, port: 6379}]}
"#;

/// One version of the server, on node 2, and its Service.
fn version(name: &str) -> String {
    format!(
        r#"
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: web, version: {name}}}}}
spec:
  nodeSelector: {{kubernetes.io/hostname: node2}}
  terminationGracePeriodSeconds: 0
  containers:
  - name: main
    image: localhost/nodemesh/test:dev
    command: [python3, /app/server.py]
    env: [{{name: NAME, value: {name}}}]
    readinessProbe: {{httpGet: {{path: /ready, port: 8080}}, periodSeconds: 1}}
    volumeMounts: [{{name: app, mountPath: /app}}]
  volumes: [{{name: app, configMap: {{name: server}}}}]
---
apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec: {{selector: {{version: {name}}}, ports: [{{name: http, port: 80, targetPort: 8080}}]}}
"#
    )
}

const WEB: &str = r#"
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}]}
"#;

fn application(namespace: &str) -> Result<Scope> {
    let scope = Scope::new(&Cluster::shared()?, namespace, "nodemesh.io/mesh: enabled")?;
    scope.apply(&[APPLICATION, &version("one"), &version("two"), WEB].concat())?;
    for pod in ["front", "redis", "one", "two"] {
        scope.condition(namespace, &format!("pod/{pod}"), "Ready")?;
    }
    Ok(scope)
}

/// Asks from the source; gives the status, where a redirect leads, and the body.
fn ask(scope: &Scope, url: &str) -> Result<(String, String, String)> {
    let form = "\n%{http_code}\n%{redirect_url}";
    let output = scope
        .exec("front", &["curl", "-s", "--max-time", "20", "-w", form, url])?
        .ok()?;
    let mut lines: Vec<&str> = output.split('\n').collect();
    let location = lines.pop().unwrap_or_default().to_string();
    let status = lines.pop().unwrap_or_default().to_string();
    Ok((status, location, lines.join("\n").trim().to_string()))
}

/// Waits until the route is said to be in effect.
fn programmed(scope: &Scope, kind: &str, name: &str) -> Result<()> {
    scope.until(&format!("{kind} {name} in effect"), || {
        let object = scope.get(scope.namespace(), kind, name)?;
        let of_parents = object["status"]["parents"].as_array().cloned().unwrap_or_default();
        let found = of_parents
            .iter()
            .map(conditions)
            .find(|conditions| conditions.contains_key("Programmed"));
        let generation = object["metadata"]["generation"].as_i64();
        let good = found.as_ref().is_some_and(|conditions| {
            conditions["Programmed"].status == "True" && conditions["Programmed"].generation == generation
        });
        ensure!(good, "{}", object["status"]);
        Ok(Some(()))
    })
}

#[derive(Debug, PartialEq)]
struct Condition {
    status: String,
    reason: String,
    generation: Option<i64>,
}

/// The conditions in a status or in one parent's part of it, by their type.
fn conditions(status: &Value) -> BTreeMap<String, Condition> {
    let list = status["conditions"].as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_string();
    let condition = |value: &Value| Condition {
        status: text(&value["status"]),
        reason: text(&value["reason"]),
        generation: value["observedGeneration"].as_i64(),
    };
    list.iter()
        .map(|value| (text(&value["type"]), condition(value)))
        .collect()
}

#[test]
fn statuses_of_routes_say_what_is_in_effect() -> Result<()> {
    let scope = application("kube-status")?;
    scope.apply(
        r#"
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: good}
spec:
  parentRefs: [{group: "", kind: Service, name: web}]
  rules: [{backendRefs: [{name: one, port: 80}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: missing-backend}
spec:
  parentRefs: [{group: "", kind: Service, name: two}]
  rules: [{backendRefs: [{name: nobody, port: 80}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: forbidden-backend}
spec:
  parentRefs: [{group: "", kind: Service, name: one}]
  rules: [{backendRefs: [{name: kubernetes, namespace: default, port: 443}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: missing-parent}
spec:
  parentRefs: [{group: "", kind: Service, name: nobody}]
  rules: [{backendRefs: [{name: one, port: 80}]}]
---
apiVersion: nodemesh.io/v1alpha1
kind: AccessPolicy
metadata: {name: policy}
spec:
  targetRefs: [{kind: Service, name: web}]
  action: Allow
  rules: [{to: [{methods: [GET]}]}]
"#,
    )?;
    let wanted = [
        (
            "good",
            [
                ("Accepted", "True", "Accepted"),
                ("ResolvedRefs", "True", "ResolvedRefs"),
            ],
        ),
        (
            "missing-backend",
            [
                ("Accepted", "True", "Accepted"),
                ("ResolvedRefs", "False", "BackendNotFound"),
            ],
        ),
        (
            "forbidden-backend",
            [
                ("Accepted", "True", "Accepted"),
                ("ResolvedRefs", "False", "RefNotPermitted"),
            ],
        ),
        (
            "missing-parent",
            [
                ("Accepted", "False", "NoMatchingParent"),
                ("ResolvedRefs", "True", "ResolvedRefs"),
            ],
        ),
    ];
    for (name, expected) in wanted {
        scope.until(&format!("the status of {name}"), || {
            let object = scope.get(scope.namespace(), "httproute", name)?;
            let parents = object["status"]["parents"].as_array().cloned().unwrap_or_default();
            let ours = parents
                .iter()
                .find(|parent| parent["controllerName"] == "nodemesh.io/mesh");
            let ours = ours.context("no status of ours")?;
            ensure!(
                ours["parentRef"]["kind"] == "Service",
                "the parent is not named: {ours}"
            );
            let found = conditions(ours);
            for (kind, status, reason) in expected {
                let condition = found
                    .get(kind)
                    .with_context(|| format!("{kind} is missing in {ours}"))?;
                ensure!(condition.status == status && condition.reason == reason, "{ours}");
                ensure!(
                    condition.generation == object["metadata"]["generation"].as_i64(),
                    "{ours}"
                );
            }
            Ok(Some(()))
        })?;
    }
    programmed(&scope, "httproute", "good")?;
    scope.until("the status of the policy", || {
        let object = scope.get(scope.namespace(), "accesspolicy", "policy")?;
        let found = conditions(&object["status"]);
        for kind in ["Accepted", "ResolvedRefs", "Programmed"] {
            let good = found.get(kind).is_some_and(|condition| condition.status == "True");
            ensure!(good, "{kind}: {}", object["status"]);
        }
        ensure!(object["status"]["revision"].as_i64() > Some(0), "{}", object["status"]);
        Ok(Some(()))
    })?;

    // What a status says follows the object: the backend comes, the route is in effect.
    scope.apply(
        "apiVersion: v1\nkind: Service\nmetadata: {name: nobody}\nspec: {selector: {version: one}, ports: [{port: 80, targetPort: 8080}]}\n",
    )?;
    programmed(&scope, "httproute", "missing-backend")?;
    scope.until("an answer by the backend that came", || {
        let (status, _, body) = ask(&scope, "http://two/")?;
        ensure!(status == "200" && body.starts_with("one "), "{status} {body}");
        Ok(Some(()))
    })
}

#[test]
fn redirects_lead_where_the_route_says() -> Result<()> {
    let scope = application("kube-redirect")?;
    scope.apply(
        r#"
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: redirects}
spec:
  parentRefs: [{group: "", kind: Service, name: web, port: 80}]
  rules:
  - matches: [{path: {type: PathPrefix, value: /host}}]
    filters: [{type: RequestRedirect, requestRedirect: {hostname: example.org, statusCode: 301}}]
  - matches: [{path: {type: PathPrefix, value: /scheme}}]
    filters: [{type: RequestRedirect, requestRedirect: {scheme: https, statusCode: 302}}]
  - matches: [{path: {type: PathPrefix, value: /port}}]
    filters: [{type: RequestRedirect, requestRedirect: {port: 8443, statusCode: 302}}]
  - matches: [{path: {type: PathPrefix, value: /old}}]
    filters: [{type: RequestRedirect, requestRedirect: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /new}, statusCode: 302}}]
  - matches: [{path: {type: PathPrefix, value: /full}}]
    filters: [{type: RequestRedirect, requestRedirect: {path: {type: ReplaceFullPath, replaceFullPath: /all}, statusCode: 302}}]
"#,
    )?;
    programmed(&scope, "httproute", "redirects")?;
    let table = [
        ("/host/a?b=c", "301", "http://example.org/host/a?b=c"),
        ("/scheme/a", "302", "https://web/scheme/a"),
        ("/port/a", "302", "http://web:8443/port/a"),
        ("/old/a?b=c", "302", "http://web/new/a?b=c"),
        ("/full/a?b=c", "302", "http://web/all?b=c"),
        // No rule matches.
        ("/none", "404", ""),
    ];
    for (path, status, location) in table {
        let found = ask(&scope, &format!("http://web{path}"))?;
        assert_eq!((found.0.as_str(), found.1.as_str()), (status, location), "{path}");
    }
    Ok(())
}

#[test]
fn nothing_between_the_nodes_can_be_read() -> Result<()> {
    const MARKER: &str = "marker-7be1d05c";
    let scope = application("kube-wire")?;
    let address = |pod: &str| -> Result<String> {
        let object = scope.get(scope.namespace(), "pod", pod)?;
        Ok(object["status"]["podIP"]
            .as_str()
            .context("the pod has no address")?
            .to_string())
    };
    let (front, one, redis) = (address("front")?, address("one")?, address("redis")?);
    let speak = || -> Result<()> {
        let (status, _, body) = ask(&scope, &format!("http://one/{MARKER}?{MARKER}"))?;
        ensure!(status == "200" && body.contains(MARKER), "{status} {body}");
        let output = scope
            .exec("front", &["redis-cli", "-h", "redis", "set", MARKER, MARKER])?
            .ok()?;
        ensure!(output.trim() == "OK", "{output}");
        Ok(())
    };
    let capture = scope.capture("tcp and not port 6443 and not port 15010 and not port 10250")?;
    speak()?;
    let packets = capture.stop()?;
    for text in [MARKER, "HTTP/1.1", "spiffe://"] {
        assert_eq!(packets.count(text), 0, "{text:?} can be read on the wire");
    }
    // TLS 1.3 between the pods' own addresses, on their own ports: what a NetworkPolicy or a flow log sees is true.
    for (pod, port) in [(one, 8080), (redis, 6379)] {
        assert!(packets.tls13_handshakes(port) >= 1, "no TLS 1.3 on port {port}");
        let between = packets.of_port(port).all(|segment| {
            let ends = [segment.source.ip().to_string(), segment.destination.ip().to_string()];
            ends.contains(&front) && ends.contains(&pod)
        });
        assert!(between, "port {port} has segments of other addresses");
    }

    // The same search finds the marker where the mesh is told to stay out, or it would prove nothing.
    scope.label("nodemesh.io/mesh=disabled")?;
    scope.until("plaintext after the namespace has left the mesh", || {
        let capture = scope.capture("tcp and not port 6443 and not port 15010 and not port 10250")?;
        speak()?;
        Ok((capture.stop()?.count(MARKER) > 0).then_some(()))
    })
}

#[test]
fn retries_timeouts_and_mirrors() -> Result<()> {
    let scope = application("kube-filters")?;
    scope.apply(
        r#"
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: filters}
spec:
  parentRefs: [{group: "", kind: Service, name: web}]
  rules:
  - matches: [{path: {type: PathPrefix, value: /slow}}]
    timeouts: {request: 500ms}
    backendRefs: [{name: one, port: 80}]
  - matches: [{path: {type: PathPrefix, value: /mirrored}}]
    filters: [{type: RequestMirror, requestMirror: {backendRef: {name: two, port: 80}}}]
    backendRefs: [{name: one, port: 80}]
  - matches: [{path: {type: PathPrefix, value: /flaky}}]
    backendRefs: [{name: one, port: 80}]
---
apiVersion: nodemesh.io/v1alpha1
kind: TrafficPolicy
metadata: {name: retries}
spec:
  targetRefs: [{kind: Service, name: one}]
  retry: {attempts: 2, retryOn: ["503"], budget: {percent: 100}}
"#,
    )?;
    programmed(&scope, "httproute", "filters")?;

    let (status, _, _) = ask(&scope, "http://web/slow")?;
    assert_eq!(status, "504", "a timeout of the route");

    let (status, _, body) = ask(&scope, "http://web/mirrored/once")?;
    assert_eq!((status.as_str(), body.as_str()), ("200", "one /mirrored/once 1"));
    scope.until("the mirrored request at its second destination", || {
        let log = scope.logs(scope.namespace(), "two")?;
        Ok(log.contains("GET /mirrored/once").then_some(()))
    })?;

    // Each path fails once and then succeeds: with the policy of the backend in effect no failure is seen.
    scope.until("the policy in effect", || {
        let object = scope.get(scope.namespace(), "trafficpolicy", "retries")?;
        let found = conditions(&object["status"]);
        let good = found
            .get("Programmed")
            .is_some_and(|condition| condition.status == "True");
        ensure!(good, "{}", object["status"]);
        Ok(Some(()))
    })?;
    for number in 0..5 {
        let (status, _, body) = ask(&scope, &format!("http://web/flaky/{number}"))?;
        assert_eq!((status, body), ("200".into(), format!("one /flaky/{number} 2")));
    }
    Ok(())
}
