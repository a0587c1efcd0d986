//! The controller in Kubernetes mode against an API server in memory: real binaries, real sockets, scripted agents.

mod documents;
mod joining;
mod leading;
mod status;

use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use mesh_api::{
    document::{Document, Resource},
    policy::MtlsMode,
    wire::Update,
};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use serde_json::{Value, json};
use tempfile::TempDir;
use tonic::{Code, Status, transport::Channel};

use crate::{
    fake_api::FakeApi,
    world::{Agent, CLUSTER, Identity, PATIENCE, bootstrap_by, connect_with, program, revision_of, sign, snapshot_of},
};

const NODEMESH: &str = "nodemesh.io/v1alpha1";
const GATEWAY: &str = "gateway.networking.k8s.io/v1";

/// A replica of the controller; killed when dropped.
struct Replica {
    child: Child,
    log: mpsc::Receiver<String>,
    _dir: TempDir,
}

/// Where a leader serves.
#[derive(Clone, Copy, Debug)]
struct Doors {
    agents: SocketAddr,
    operator: SocketAddr,
    revision: u64,
}

impl Replica {
    fn start(api: &FakeApi, name: &str) -> Replica {
        Replica::start_with(api, name, &[])
    }

    fn start_with(api: &FakeApi, name: &str, more: &[&str]) -> Replica {
        let dir = tempfile::tempdir().unwrap();
        let mut child = program()
            .args([
                "controller",
                "--kubernetes",
                "--pod-name",
                name,
                "--lease-duration",
                "2s",
            ])
            .args([
                "--listen",
                "127.0.0.1:0",
                "--operator-listen",
                "127.0.0.1:0",
                "--health-listen",
                "127.0.0.1:0",
            ])
            .args(more)
            .env_remove("POD_IP")
            .env("KUBECONFIG", api.kubeconfig(dir.path()))
            .env_remove("POD_NAMESPACE")
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (sender, log) = mpsc::channel();
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        Replica { child, log, _dir: dir }
    }

    /// The log's next line with this text.
    #[track_caller]
    fn line(&mut self, text: &str) -> String {
        let mut seen = Vec::new();
        let end = Instant::now() + PATIENCE;
        while let Ok(line) = self.log.recv_timeout(end.saturating_duration_since(Instant::now())) {
            if line.contains(text) {
                return line;
            }
            seen.push(line);
        }
        panic!("no {text:?} in the log: {seen:#?}");
    }

    #[track_caller]
    fn health(&mut self) -> SocketAddr {
        field(&self.line("the controller watches"), "health=").parse().unwrap()
    }

    #[track_caller]
    fn serves(&mut self) -> Doors {
        let line = self.line("the controller serves");
        Doors {
            agents: field(&line, "address=").parse().unwrap(),
            operator: field(&line, "operator=").parse().unwrap(),
            revision: field(&line, "revision=").parse().unwrap(),
        }
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Asks it to stop, and waits until it has.
    fn stop(mut self) {
        let status = Command::new("kill").arg(self.child.id().to_string()).status().unwrap();
        assert!(status.success());
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            while let Ok(line) = self.log.recv_timeout(Duration::from_secs(1)) {
                eprintln!("{line}");
            }
        }
    }
}

fn field<'a>(line: &'a str, name: &str) -> &'a str {
    let value = line.split_once(name).unwrap_or_else(|| panic!("no {name} in {line}")).1;
    value.split_whitespace().next().unwrap_or_default().trim_matches('"')
}

async fn get(address: SocketAddr, path: &str) -> (u16, String) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut tcp = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    tcp.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    tcp.read_to_string(&mut text).await.unwrap();
    let code = text.split_whitespace().nth(1).unwrap().parse().unwrap();
    (code, text)
}

/// The roots as an agent mounts them.
fn roots(api: &FakeApi) -> rustls::RootCertStore {
    let map = api
        .get("v1", "ConfigMap", "nodemesh-system", "nodemesh-trust-bundle")
        .unwrap();
    let mut roots = rustls::RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(map["data"]["bundle.pem"].as_str().unwrap().as_bytes()) {
        roots.add(root.unwrap()).unwrap();
    }
    roots
}

/// A pod of an agent and a token of it.
fn agent_pod(api: &FakeApi, name: &str, node: &str) -> String {
    let pod = api.apply(json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "nodemesh-system"},
        "spec": {"nodeName": node, "serviceAccountName": "nodemesh-agent", "hostNetwork": true,
                 "containers": [{"name": "agent"}]},
        "status": {"phase": "Running"},
    }));
    let token = format!("token-{name}");
    api.token(&token, review(name, pod["metadata"]["uid"].as_str().unwrap()));
    token
}

fn review(pod: &str, uid: &str) -> Value {
    json!({
        "authenticated": true, "audiences": ["nodemesh"],
        "user": {
            "username": "system:serviceaccount:nodemesh-system:nodemesh-agent",
            "extra": {
                "authentication.kubernetes.io/pod-name": [pod],
                "authentication.kubernetes.io/pod-uid": [uid],
            },
        },
    })
}

async fn join(api: &FakeApi, doors: Doors, node: &str, token: &str) -> Result<Identity, Status> {
    let client = connect_with(doors.agents, roots(api), None)
        .await
        .map_err(Status::unavailable)?;
    bootstrap_by(client, node, token).await
}

/// An agent of a pod of its own on that node.
async fn agent(api: &FakeApi, doors: Doors, node: &str, resume: u64) -> (Agent, Identity) {
    let token = agent_pod(api, &format!("agent-{node}"), node);
    let identity = join(api, doors, node, &token).await.unwrap();
    let client = connect_with(doors.agents, roots(api), Some(&identity)).await.unwrap();
    (Agent::open(client, node, resume).await.unwrap(), identity)
}

fn pod(name: &str, node: &str, address: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "shop", "labels": {"app": name}},
        "spec": {"nodeName": node, "serviceAccountName": name,
                 "containers": [{"name": "main", "ports": [{"containerPort": 8080}]}]},
        "status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}],
                   "conditions": [{"type": "Ready", "status": "True"}]},
    })
}

fn service(name: &str, address: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "shop"},
        "spec": {"clusterIP": address, "clusterIPs": [address], "selector": {"app": name},
                 "ports": [{"name": "http", "port": 80, "targetPort": 8080}]},
    })
}

fn strict(namespace: &str, mode: &str) -> Value {
    json!({
        "apiVersion": NODEMESH, "kind": "MeshPolicy", "metadata": {"name": "strict", "namespace": namespace},
        "spec": {"targetRefs": [{"kind": "Namespace", "name": namespace}], "mtls": {"mode": mode}},
    })
}

fn shop(api: &FakeApi) {
    api.apply_yaml(CLUSTER);
    api.apply(pod("cart", "node-1", "10.1.1.2"));
    api.apply(pod("front", "node-2", "10.1.2.2"));
    api.apply(service("cart", "10.96.0.10"));
}

/// Takes updates until one leaves nothing to ask for.
async fn take_until(agent: &mut Agent, mut enough: impl FnMut(&Update) -> bool) -> Update {
    loop {
        let update = agent.take().await;
        if enough(&update) {
            return update;
        }
    }
}

fn says(update: &Update, kind: &str, name: &str) -> bool {
    let all = match update {
        Update::Snapshot { resources, .. } => resources,
        Update::Delta { upserts, .. } => upserts,
    };
    all.iter().any(|resource| {
        let text = crate::world::key_text(&resource.key());
        text.starts_with(kind) && text.ends_with(name)
    })
}
