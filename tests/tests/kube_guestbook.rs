//! An application of several languages that was there before the mesh: enrolled under load, restarted, carried over a
//! rollout of the agents, and let go again. Not one request may fail.
//!
//! nginx (C) asks the guestbook (Python), which asks redis (C), the news (Go) and the clock (Rust) for each page.

use std::{
    sync::mpsc::{self, RecvTimeoutError},
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context, Result};
use mesh_tests::cluster::{Cluster, SYSTEM, Scope, load};

const CONFIGURATION: &str = r#"
apiVersion: v1
kind: ConfigMap
metadata: {name: guestbook}
data:
  guestbook.py: |
    import http.server, signal, socket, sys, threading, urllib.request
    def redis(*words):
        with socket.create_connection(("redis", 6379), timeout=10) as connection:
            connection.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in words))
            return connection.makefile("rb").readline().strip()
    def get(url):
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.read()
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        def do_GET(self):
            try:
                status, body = 200, b"ready\n"
                if self.path.startswith("/sign"):
                    entry = redis(b"INCR", b"entries")
                    assert entry.startswith(b":"), entry
                    assert get("http://clock/") and get("http://news/"), "empty"
                    body = b"entry %s\n" % entry[1:]
            except Exception as error:
                status, body = 500, f"{type(error).__name__}: {error}\n".encode()
                print("failed", self.path, body, flush=True)
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        def log_message(self, *args):
            pass
    class Server(http.server.ThreadingHTTPServer):
        address_family = 10
        request_queue_size = 128
        daemon_threads = False
    server = Server(("::", 8080), Handler)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    server.serve_forever()
  nginx.conf: |
    daemon off;
    user nobody nobody;
    error_log /dev/stderr;
    pid /tmp/nginx.pid;
    events {}
    http {
      access_log off;
      client_body_temp_path /tmp/body;
      proxy_temp_path /tmp/proxy;
      fastcgi_temp_path /tmp/fastcgi;
      uwsgi_temp_path /tmp/uwsgi;
      scgi_temp_path /tmp/scgi;
      server {
        listen [::]:8080 ipv6only=off;
        location = /ready { return 200 "ready\n"; }
        location / { proxy_pass http://guestbook; proxy_http_version 1.1; proxy_set_header Connection ""; }
      }
    }
"#;

/// A condition of pods that somebody else sets, as controllers of load balancers do; a pod whose spec names it is not
/// ready without.
const GATE: &str = "example.org/in-rotation";
/// The part of the application whose pods have it.
const GATED: &str = "guestbook";

/// Opens the gates of pods when their containers are ready, until this value goes.
struct Gatekeeper {
    stop: mpsc::Sender<()>,
    running: Option<JoinHandle<()>>,
}

impl Gatekeeper {
    fn start(cluster: &Cluster, namespace: &str) -> Gatekeeper {
        let (stop, stopped) = mpsc::channel();
        let (cluster, namespace) = (cluster.clone(), namespace.to_string());
        let running = std::thread::spawn(move || {
            // One look in a second: each gate stays shut for a while.
            while stopped.recv_timeout(Duration::from_secs(1)) == Err(RecvTimeoutError::Timeout) {
                if let Err(error) = open_gates(&cluster, &namespace) {
                    eprintln!("the gates stay as they are for now: {error:#}");
                }
            }
        });
        Gatekeeper {
            stop,
            running: Some(running),
        }
    }
}

impl Drop for Gatekeeper {
    fn drop(&mut self) {
        // A thread that has ended hears nothing.
        let _ = self.stop.send(());
        let _ = self.running.take().map(JoinHandle::join);
    }
}

fn open_gates(cluster: &Cluster, namespace: &str) -> Result<()> {
    for pod in cluster.list(namespace, "pods", &format!("app={GATED}"))? {
        let conditions = pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let holds = |kind: &str| {
            conditions
                .iter()
                .any(|each| each["type"] == kind && each["status"] == "True")
        };
        if !holds("ContainersReady") || holds(GATE) {
            continue;
        }
        let name = pod["metadata"]["name"].as_str().context("a pod without a name")?;
        let patch = format!(r#"{{"status": {{"conditions": [{{"type": "{GATE}", "status": "True"}}]}}}}"#);
        let words = [
            "patch",
            "pod",
            name,
            "-n",
            namespace,
            "--subresource=status",
            "-p",
            &patch,
        ];
        cluster.kubectl(&words)?;
    }
    Ok(())
}

/// A part of the application: a Deployment with a Service of the same name.
struct Part {
    name: &'static str,
    replicas: u8,
    port: u16,
    service_port: u16,
    command: &'static str,
    probe: &'static str,
}

const PARTS: [Part; 5] = [
    Part {
        name: "web",
        replicas: 2,
        port: 8080,
        service_port: 80,
        command: "[nginx, -c, /app/nginx.conf]",
        probe: "httpGet: {path: /ready, port: 8080}",
    },
    Part {
        name: "guestbook",
        replicas: 2,
        port: 8080,
        service_port: 80,
        command: "[python3, /app/guestbook.py]",
        probe: "httpGet: {path: /ready, port: 8080}",
    },
    Part {
        name: "redis",
        replicas: 1,
        port: 6379,
        service_port: 6379,
        command: "[redis-server, --save, '', --bind, '*', --protected-mode, 'no']",
        probe: "tcpSocket: {port: 6379}",
    },
    Part {
        name: "news",
        replicas: 2,
        port: 8080,
        service_port: 80,
        command: "[echo-server, --port=8080]",
        probe: "tcpSocket: {port: 8080}",
    },
    Part {
        name: "clock",
        replicas: 2,
        port: 8080,
        service_port: 80,
        command: "[lab-load, serve, '8080']",
        probe: "tcpSocket: {port: 8080}",
    },
];

fn manifest(part: &Part) -> String {
    let Part {
        name,
        replicas,
        port,
        service_port,
        command,
        probe,
    } = part;
    let gate = match *name == GATED {
        true => format!("\n      readinessGates: [{{conditionType: {GATE}}}]"),
        false => String::new(),
    };
    format!(
        r#"
---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: {name}}}
spec:
  replicas: {replicas}
  selector: {{matchLabels: {{app: {name}}}}}
  strategy: {{rollingUpdate: {{maxSurge: 1, maxUnavailable: 0}}}}
  template:
    metadata: {{labels: {{app: {name}}}}}
    spec:{gate}
      topologySpreadConstraints:
      - {{maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: ScheduleAnyway, labelSelector: {{matchLabels: {{app: {name}}}}}}}
      terminationGracePeriodSeconds: 8
      containers:
      - name: main
        image: localhost/nodemesh/test:dev
        command: {command}
        readinessProbe: {{{probe}, periodSeconds: 1}}
        # As every application does that wants no failed request without a mesh either: it goes on until nobody asks.
        lifecycle: {{preStop: {{exec: {{command: [sleep, "4"]}}}}}}
        volumeMounts: [{{name: app, mountPath: /app}}]
      volumes: [{{name: app, configMap: {{name: guestbook}}}}]
---
apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec: {{selector: {{app: {name}}}, ports: [{{port: {service_port}, targetPort: {port}}}]}}
"#
    )
}

/// Does something under load, which passes before, during and after; not one request may fail.
fn under_load(scope: &Scope, name: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let loaded = load::under_load(scope, "http://web/sign", name, || {
        until_signed(scope, 20)?;
        work()?;
        until_signed(scope, 40)
    });
    loaded.with_context(|| failures(scope))
}

/// Waits until the guestbook has so many new entries.
fn until_signed(scope: &Scope, more: u64) -> Result<()> {
    let entries = || -> Result<u64> {
        let text = scope.exec("deployment/redis", &["redis-cli", "get", "entries"])?.ok()?;
        Ok(text.trim().parse().unwrap_or_default())
    };
    let before = entries()?;
    scope.until("new entries in the guestbook", || {
        Ok((entries()? >= before + more).then_some(()))
    })
}

/// What the application says of requests that failed.
fn failures(scope: &Scope) -> String {
    let words = ["logs", "-l", "app in (guestbook, web)", "--prefix", "--tail=20"];
    scope.run(&words).unwrap_or_else(|error| error.to_string())
}

/// Waits until the requests that destinations see are (or are no longer) those of the mesh.
fn until_meshed(scope: &Scope, meshed: bool) -> Result<()> {
    let seen = || -> Result<f64> {
        let mut sum = 0.0;
        for node in 1..=scope.nodes()? {
            let labels = [
                ("reporter", "destination"),
                ("destination_workload_namespace", scope.namespace()),
            ];
            sum += scope.metrics(node)?.sum("mesh_requests_total", &labels);
        }
        Ok(sum)
    };
    let mut before = seen()?;
    let mut unchanged = 0;
    scope.until(
        if meshed {
            "requests in the mesh"
        } else {
            "the end of requests in the mesh"
        },
        || {
            let now = seen()?;
            unchanged = if now > before { 0 } else { unchanged + 1 };
            let grown = now > before;
            before = now;
            // Requests go on at more than one in each look: several looks without one mean that none passes.
            Ok(if meshed {
                grown.then_some(())
            } else {
                (unchanged > 20).then_some(())
            })
        },
    )
}

#[test]
fn no_request_fails_on_the_way_into_the_mesh_and_out_of_it() -> Result<()> {
    let scope = Scope::new(&Cluster::shared()?, "kube-guestbook", "")?;
    let parts: String = PARTS.iter().map(manifest).collect();
    scope.apply(&[CONFIGURATION, &parts, load::POD].concat())?;
    let _gatekeeper = Gatekeeper::start(&scope, scope.namespace());
    for part in &PARTS {
        scope.rolled_out(scope.namespace(), &format!("deployment/{}", part.name))?;
    }
    scope.condition(scope.namespace(), "pod/load", "Ready")?;

    under_load(&scope, "enrolment", || {
        scope.label("nodemesh.io/mesh=enabled")?;
        until_meshed(&scope, true)
    })?;
    under_load(&scope, "rolling-restart", || {
        for part in PARTS.iter().filter(|part| part.replicas > 1) {
            scope.run(&["rollout", "restart", &format!("deployment/{}", part.name)])?;
        }
        for part in &PARTS {
            scope.rolled_out(scope.namespace(), &format!("deployment/{}", part.name))?;
        }
        Ok(())
    })?;
    under_load(&scope, "rollout-of-the-agents", || {
        scope.kubectl(&["-n", SYSTEM, "rollout", "restart", "daemonset/nodemesh-agent"])?;
        scope.rolled_out(SYSTEM, "daemonset/nodemesh-agent")?;
        until_meshed(&scope, true)
    })?;
    under_load(&scope, "retirement", || {
        scope.label("nodemesh.io/mesh=disabled")?;
        until_meshed(&scope, false)
    })
}
