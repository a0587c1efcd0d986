//! The controller in Kubernetes mode against an API server in memory: real binaries, real sockets, scripted agents.

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

#[tokio::test(flavor = "multi_thread")]
async fn what_the_api_server_has_reaches_the_agents_and_nothing_else_does() {
    let api = FakeApi::start().await;
    shop(&api);
    let mut replica = Replica::start(&api, "one");
    let doors = replica.serves();
    let (mut agent, _) = agent(&api, doors, "node-1", 0).await;
    let (first, resources) = snapshot_of(agent.take().await);
    let cart = crate::world::workload(&resources, "shop", "cart");
    assert!(cart.enrolled);
    assert_eq!(
        &*cart.uid,
        api.get("v1", "Pod", "shop", "cart").unwrap()["metadata"]["uid"]
            .as_str()
            .unwrap()
    );

    // Churn that means nothing to the mesh makes no revision ...
    for n in 0..5 {
        let mut cart = pod("cart", "node-1", "10.1.1.2");
        cart["metadata"]["annotations"] = json!({"example.com/seen": n.to_string()});
        cart["status"]["conditions"][0]["lastProbeTime"] = json!(format!("2026-01-01T00:00:0{n}Z"));
        api.apply(cart);
        api.apply(json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "other", "namespace": "shop"}, "data": {"n": n.to_string()},
        }));
    }
    // ... and what means something makes the next one.
    api.apply(service("other", "10.96.0.11"));
    let update = take_until(&mut agent, |update| says(update, "Service", "shop/other")).await;
    let (from, to, mut upserts, removed) = crate::world::delta_of(&update);
    // The agent's own pod may have come in between, in the same revision or one before.
    upserts.retain(|key| key != "Workload nodemesh-system/agent-node-1");
    assert_eq!((upserts, removed), (vec!["Service shop/other".to_owned()], vec![]));
    assert!(from >= first && to <= first + 2, "{from} {to}");

    api.delete("v1", "Service", "shop", "other");
    let update = agent.take().await;
    assert_eq!(crate::world::delta_of(&update).3, ["Service shop/other"]);
    replica.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_that_is_cut_or_expired_loses_nothing() {
    let api = FakeApi::start().await;
    shop(&api);
    let mut replica = Replica::start(&api, "one");
    let doors = replica.serves();
    let (mut agent, _) = agent(&api, doors, "node-1", 0).await;
    agent.take().await;

    api.apply(service("kept", "10.96.0.20"));
    take_until(&mut agent, |update| says(update, "Service", "shop/kept")).await;
    // Cut: the watch goes on from where it was.
    api.cut();
    api.apply(service("while-cut", "10.96.0.21"));
    take_until(&mut agent, |update| says(update, "Service", "shop/while-cut")).await;
    // Expired: the list shows what is new, and what is gone.
    api.down(true);
    api.apply(service("while-down", "10.96.0.22"));
    api.delete("v1", "Service", "shop", "kept");
    api.compact();
    api.down(false);
    let mut seen = Vec::new();
    let mut gone = Vec::new();
    take_until(&mut agent, |update| {
        let (_, _, upserts, removed) = crate::world::delta_of(update);
        seen.extend(upserts);
        gone.extend(removed);
        seen.contains(&"Service shop/while-down".to_owned()) && gone.contains(&"Service shop/kept".to_owned())
    })
    .await;
    assert!(!gone.iter().any(|key| key != "Service shop/kept"), "{gone:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_published_before_every_kind_was_seen() {
    let api = FakeApi::start().await;
    shop(&api);
    api.apply(strict("shop", "strict"));
    api.forbid("meshpolicies");
    let mut replica = Replica::start(&api, "one");
    let health = replica.health();
    replica.line("a watch was interrupted");
    assert_eq!(get(health, "/livez").await.0, 200);
    let end = Instant::now() + PATIENCE;
    loop {
        let (code, text) = get(health, "/readyz").await;
        assert_eq!(code, 503);
        if text.ends_with("waiting: not seen yet: MeshPolicy\n") {
            break;
        }
        assert!(Instant::now() < end, "{text}");
    }
    // It does not even lead: another replica may be able to.
    tokio::time::timeout(
        crate::fake_api::A_WHILE,
        api.wait_for("a Lease", |api| {
            api.get(
                "coordination.k8s.io/v1",
                "Lease",
                "nodemesh-system",
                "nodemesh-controller",
            )
        }),
    )
    .await
    .expect_err("a replica leads that has not seen everything");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kind_that_is_installed_later_is_noticed() {
    let api = FakeApi::start().await;
    shop(&api);
    let mut replica = Replica::start(&api, "one");
    let doors = replica.serves();
    let (mut agent, _) = agent(&api, doors, "node-1", 0).await;
    agent.take().await;
    api.apply(json!({
        "apiVersion": GATEWAY, "kind": "GRPCRoute", "metadata": {"name": "calls", "namespace": "shop"},
        "spec": {"parentRefs": [{"group": "", "kind": "Service", "name": "cart"}],
                 "rules": [{"backendRefs": [{"name": "cart", "port": 80}]}]},
    }));
    api.define("gateway.networking.k8s.io", "GRPCRoute", "v1");
    take_until(&mut agent, |update| says(update, "GRPCRoute", "shop/calls")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_other_replica_takes_over_and_numbers_go_on() {
    let api = FakeApi::start().await;
    shop(&api);
    let mut one = Replica::start(&api, "one");
    let first = one.serves();
    let (mut held, identity) = agent(&api, first, "node-1", 0).await;
    let held_revision = revision_of(&held.take().await);
    let mut two = Replica::start(&api, "two");
    let health = two.health();
    two.line("every kind has been seen");
    assert_eq!(
        get(health, "/readyz").await.0,
        503,
        "a replica that waits takes no agents"
    );

    one.kill();
    api.apply(service("while-nobody-led", "10.96.0.30"));
    let second = two.serves();
    assert_eq!(get(health, "/readyz").await.0, 200);
    assert!(
        second.revision > held_revision + 100,
        "{} after {held_revision}",
        second.revision
    );
    // The certificate is as good as it was, and nothing is lost.
    let client = connect_with(second.agents, roots(&api), Some(&identity)).await.unwrap();
    let mut again = Agent::open(client, "node-1", held_revision).await.unwrap();
    let update = again.take().await;
    assert!(says(&update, "Service", "shop/while-nobody-led") && matches!(update, Update::Snapshot { .. }));

    // A leader that is told to stop hands over at once, to one of the same name if need be, and not before.
    let mut three = Replica::start(&api, "three");
    three.line("every kind has been seen");
    let mut namesake = Replica::start(&api, "two");
    let namesakes = namesake.health();
    namesake.line("every kind has been seen");
    assert_eq!(get(namesakes, "/readyz").await.0, 503);
    namesake.kill();
    two.stop();
    let third = three.serves();
    assert!(third.revision > second.revision + 100);
    let lease = api
        .get(
            "coordination.k8s.io/v1",
            "Lease",
            "nodemesh-system",
            "nodemesh-controller",
        )
        .unwrap();
    assert!(lease["spec"]["holderIdentity"].as_str().unwrap().starts_with("three_"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_without_an_api_server_stops_serving_and_comes_back() {
    let api = FakeApi::start().await;
    shop(&api);
    let mut replica = Replica::start(&api, "one");
    let health = replica.health();
    let doors = replica.serves();
    let (mut held, _) = agent(&api, doors, "node-1", 0).await;
    held.take().await;

    api.down(true);
    replica.line("the lead is lost");
    let ended = async {
        loop {
            match held.next().await {
                Ok(update) => held.ack(revision_of(&update)).await,
                Err(status) => return status,
            }
        }
    };
    let status = ended.await;
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert_eq!(get(health, "/readyz").await.0, 503);
    assert!(
        tokio::net::TcpStream::connect(doors.agents).await.is_err(),
        "the agents' port is still open"
    );

    api.down(false);
    let again = replica.serves();
    assert!(again.revision > doors.revision);
    assert_eq!(get(health, "/readyz").await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_joins_by_its_own_pods_token_only() {
    let api = FakeApi::start().await;
    shop(&api);
    let mut replica = Replica::start(&api, "one");
    let doors = replica.serves();
    let own = agent_pod(&api, "agent-1", "node-1");
    let other = agent_pod(&api, "agent-2", "node-2");
    api.token("default-account", {
        let mut review = review("agent-1", "uid");
        review["user"]["username"] = json!("system:serviceaccount:nodemesh-system:default");
        review
    });
    api.token("gone", review("agent-0", "uid-0"));
    api.token("another-uid", review("agent-1", "uid-of-before"));
    let cases = [
        ("node-1", own.as_str(), true),
        ("node-1", own.as_str(), true),
        ("node-2", own.as_str(), false),
        ("node-1", other.as_str(), false),
        ("node-1", "default-account", false),
        ("node-1", "gone", false),
        ("node-1", "another-uid", false),
        ("node-1", "unknown", false),
    ];
    for (node, token, good) in cases {
        match join(&api, doors, node, token).await {
            Ok(_) => assert!(good, "{node} {token}"),
            Err(status) => {
                assert!(!good, "{node} {token}: {status}");
                assert_eq!(status.code(), Code::PermissionDenied, "{status}");
                assert!(!status.message().contains("agent-"), "it tells too much: {status}");
            }
        }
    }
    // The pod is gone, and with it the worth of its token.
    api.delete("v1", "Pod", "nodemesh-system", "agent-1");
    assert!(join(&api, doors, "node-1", &own).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_gets_the_identities_of_its_nodes_pods_and_steals_none() {
    let api = FakeApi::start().await;
    shop(&api);
    let mut replica = Replica::start(&api, "one");
    let doors = replica.serves();
    let (_agent, identity) = agent(&api, doors, "node-1", 0).await;
    let mut client = connect_with(doors.agents, roots(&api), Some(&identity)).await.unwrap();
    sign(&mut client, "spiffe://cluster.local/ns/shop/sa/cart")
        .await
        .unwrap()
        .unwrap();
    for stolen in [
        "spiffe://cluster.local/ns/shop/sa/front",
        "spiffe://cluster.local/ns/nodemesh-system/sa/nodemesh-controller",
        // It runs there, and is outside of the mesh.
        "spiffe://cluster.local/ns/nodemesh-system/sa/nodemesh-agent",
        "spiffe://cluster.local/node/node-2",
        "spiffe://cluster.local/controller",
    ] {
        assert!(
            sign(&mut client, stolen).await.unwrap().is_err(),
            "{stolen} was signed for node-1"
        );
    }
    // The pod goes, and with it the right to its identity.
    api.delete("v1", "Pod", "shop", "cart");
    let end = Instant::now() + PATIENCE;
    while sign(&mut client, "spiffe://cluster.local/ns/shop/sa/cart")
        .await
        .unwrap()
        .is_ok()
    {
        assert!(Instant::now() < end, "it is still signed");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ca_is_made_once_and_its_successor_overlaps() {
    let api = FakeApi::start().await;
    shop(&api);
    let mut one = Replica::start(&api, "one");
    one.serves();
    let secret = || api.get("v1", "Secret", "nodemesh-system", "nodemesh-ca").unwrap();
    let bundle = || {
        api.get("v1", "ConfigMap", "nodemesh-system", "nodemesh-trust-bundle")
            .unwrap()
    };
    let (made, told) = (secret(), bundle());
    assert_eq!(made["type"], "kubernetes.io/tls");
    one.stop();
    let mut two = Replica::start(&api, "two");
    let doors = two.serves();
    assert_eq!(secret(), made, "another leader must not make another CA");
    assert_eq!(bundle(), told);

    // Somebody replaces it: both roots are told at once, over the stream too.
    let (mut agent, _) = agent(&api, doors, "node-1", 0).await;
    agent.take().await;
    let other = FakeApi::start().await;
    other.apply_yaml(CLUSTER);
    let mut elsewhere = Replica::start(&other, "elsewhere");
    elsewhere.serves();
    let mut new = other.get("v1", "Secret", "nodemesh-system", "nodemesh-ca").unwrap();
    new["metadata"] = made["metadata"].clone();
    api.apply(new);
    let update = take_until(&mut agent, |update| {
        matches!(
            update,
            Update::Delta {
                trust_roots: Some(_),
                ..
            }
        )
    })
    .await;
    let Update::Delta {
        trust_roots: Some(roots),
        ..
    } = update
    else {
        unreachable!()
    };
    assert_eq!(roots.0.len(), 2);
    assert_eq!(
        bundle()["data"]["bundle.pem"]
            .as_str()
            .unwrap()
            .matches("BEGIN")
            .count(),
        2
    );
}

async fn operator(doors: Doors) -> mesh_api::wire::operator::OperatorClient<Channel> {
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", doors.operator)).unwrap();
    mesh_api::wire::operator::OperatorClient::new(endpoint.connect().await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_operator_sees_everything_and_changes_nothing_here() {
    use mesh_api::wire::operator::{ApplyRequest, DeleteRequest, GetRequest, IssueJoinTokenRequest, StatusRequest};
    let api = FakeApi::start().await;
    shop(&api);
    api.apply(strict("shop", "strict"));
    let mut broken = strict("other", "very-strict");
    broken["metadata"]["name"] = json!("broken");
    api.apply(broken);
    let mut replica = Replica::start(&api, "one");
    let doors = replica.serves();
    let (mut agent, _) = agent(&api, doors, "node-1", 0).await;
    agent.take().await;
    let mut client = operator(doors).await;
    let status = client.status(StatusRequest {}).await.unwrap().into_inner();
    assert_eq!(
        status
            .nodes
            .iter()
            .map(|n| (n.node.as_str(), n.connected))
            .collect::<Vec<_>>(),
        [("node-1", true), ("node-2", false)]
    );
    assert!(status.ca_expires_unix > 0 && status.serving_expires_unix > 0);
    let unreadable: Vec<_> = status
        .unreadable
        .iter()
        .map(|d| d.key.as_ref().unwrap().name.as_str())
        .collect();
    assert_eq!((unreadable, status.withheld), (vec!["broken"], false));
    let request = GetRequest {
        kind: "meshpolicy".into(),
        namespace: "shop".into(),
        name: String::new(),
    };
    let found = client.get(request).await.unwrap().into_inner().documents;
    assert_eq!(found.len(), 1);
    assert!(found[0].json.contains("\"strict\""), "{}", found[0].json);

    let apply = client.apply(ApplyRequest::default()).await.unwrap_err();
    let delete = client.delete(DeleteRequest::default()).await.unwrap_err();
    let token = client
        .issue_join_token(IssueJoinTokenRequest {
            node: "node-1".into(),
            valid_for_seconds: 0,
        })
        .await
        .unwrap_err();
    for status in [apply, delete, token] {
        assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guard_that_cannot_be_read_still_guards() {
    let api = FakeApi::start().await;
    shop(&api);
    api.apply(strict("shop", "strict"));
    let mut replica = Replica::start(&api, "one");
    let doors = replica.serves();
    let (mut agent, _) = agent(&api, doors, "node-1", 0).await;
    let snapshot = agent.take().await;
    assert!(says(&snapshot, "MeshPolicy", "shop/strict"));
    // An API server with an older schema lets it pass; the mesh keeps what it knew.
    api.apply(strict("shop", "whatever"));
    replica.line("cannot be read");
    api.apply(service("after", "10.96.0.40"));
    let update = take_until(&mut agent, |update| says(update, "Service", "shop/after")).await;
    let (_, _, _, removed) = crate::world::delta_of(&update);
    assert!(removed.is_empty(), "{removed:?}");

    // Without a version that could be read, a new leader denies rather than allows.
    replica.kill();
    let mut two = Replica::start(&api, "two");
    let doors = two.serves();
    let (mut agent, _) = self::agent(&api, doors, "node-1", 0).await;
    let (_, resources) = snapshot_of(agent.take().await);
    let modes: Vec<_> = resources
        .iter()
        .filter_map(|resource| match resource {
            Resource::Policy(Document::MeshPolicy(policy)) => policy.spec.mtls.as_ref()?.mode,
            _ => None,
        })
        .collect();
    assert_eq!(modes, [MtlsMode::Strict]);
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_say_who_leads_and_what_there_is() {
    let api = FakeApi::start().await;
    shop(&api);
    let mut replica = Replica::start(&api, "one");
    let health = replica.health();
    let doors = replica.serves();
    let (mut agent, _) = agent(&api, doors, "node-1", 0).await;
    agent.take().await;
    let end = Instant::now() + PATIENCE;
    loop {
        let (code, text) = get(health, "/metrics").await;
        assert_eq!(code, 200);
        let wanted = [
            "nodemesh_controller_is_leader 1",
            "nodemesh_controller_agents_connected 1",
            "nodemesh_controller_documents{kind=\"Node\"} 2",
        ];
        if wanted.iter().all(|line| text.lines().any(|l| l.trim() == *line)) {
            return;
        }
        assert!(Instant::now() < end, "{text}");
        tokio::time::timeout(Duration::from_millis(50), std::future::pending::<()>())
            .await
            .unwrap_err();
    }
}

/// A condition of an object's status, of the parent of that name for a route: status, reason, generation.
fn condition(object: &Value, parent: Option<&str>, kind: &str) -> Option<(String, String, i64)> {
    let conditions = match parent {
        None => &object["status"]["conditions"],
        Some(name) => {
            let parents = object["status"]["parents"].as_array()?;
            let ours = parents
                .iter()
                .find(|p| p["parentRef"]["name"] == name && p["controllerName"] == "nodemesh.io/mesh")?;
            &ours["conditions"]
        }
    };
    let found = conditions
        .as_array()?
        .iter()
        .find(|condition| condition["type"] == kind)?;
    let text = |key: &str| found[key].as_str().unwrap_or_default().to_owned();
    Some((text("status"), text("reason"), found["observedGeneration"].as_i64()?))
}

fn route(backend: &str) -> Value {
    json!({
        "apiVersion": GATEWAY, "kind": "HTTPRoute", "metadata": {"name": "cart", "namespace": "shop"},
        "spec": {"parentRefs": [{"group": "", "kind": "Service", "name": "cart"}],
                 "rules": [{"backendRefs": [{"name": backend, "port": 80}]}]},
    })
}

async fn says_of(api: &FakeApi, kind: &str, name: &str, parent: Option<&str>, wanted: &[(&str, &str, &str, i64)]) {
    let version = if kind == "HTTPRoute" { GATEWAY } else { NODEMESH };
    let what = format!("{kind} {name}: {wanted:?}");
    api.wait_for(&what, |api| {
        let object = api.get(version, kind, "shop", name)?;
        let good = wanted.iter().all(|(condition_type, status, reason, generation)| {
            condition(&object, parent, condition_type)
                == Some(((*status).to_owned(), (*reason).to_owned(), *generation))
        });
        good.then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_status_says_what_is_so_and_when_agents_hold_it() {
    let api = FakeApi::start().await;
    shop(&api);
    api.apply(route("missing"));
    api.apply(strict("shop", "strict"));
    let theirs = json!({
        "parentRef": {"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "edge"},
        "controllerName": "example.com/gateway", "conditions": [],
    });
    let mut object = route("missing");
    object["status"] = json!({ "parents": [theirs.clone()] });
    api.apply(object);
    let mut replica = Replica::start(&api, "one");
    let doors = replica.serves();
    let unresolved = [
        ("Accepted", "True", "Accepted", 1),
        ("ResolvedRefs", "False", "BackendNotFound", 1),
        ("Programmed", "False", "Pending", 1),
    ];
    says_of(&api, "HTTPRoute", "cart", Some("cart"), &unresolved).await;
    let policy = [
        ("Accepted", "True", "Accepted", 1),
        ("Programmed", "False", "Pending", 1),
    ];
    says_of(&api, "MeshPolicy", "strict", None, &policy).await;

    // Somebody else writes in between: nothing of it may be lost.
    api.conflict("httproutes", 1);
    api.apply(route("cart"));
    let resolved = [
        ("ResolvedRefs", "True", "ResolvedRefs", 2),
        ("Programmed", "False", "Pending", 2),
    ];
    says_of(&api, "HTTPRoute", "cart", Some("cart"), &resolved).await;

    // Both nodes run workloads of the shop: the second ack completes it.
    let (mut first, _) = agent(&api, doors, "node-1", 0).await;
    let revision = revision_of(&first.take().await);
    let waiting = api.get(GATEWAY, "HTTPRoute", "shop", "cart").unwrap();
    assert_eq!(condition(&waiting, Some("cart"), "Programmed").unwrap().0, "False");
    let (mut second, _) = agent(&api, doors, "node-2", 0).await;
    second.take().await;
    says_of(
        &api,
        "HTTPRoute",
        "cart",
        Some("cart"),
        &[("Programmed", "True", "Programmed", 2)],
    )
    .await;
    says_of(
        &api,
        "MeshPolicy",
        "strict",
        None,
        &[("Programmed", "True", "Programmed", 1)],
    )
    .await;
    let policy = api.get(NODEMESH, "MeshPolicy", "shop", "strict").unwrap();
    let told = policy["status"]["revision"].as_u64().unwrap();
    assert!(told > 0 && told <= revision, "{told}");
    let route = api.get(GATEWAY, "HTTPRoute", "shop", "cart").unwrap();
    assert!(
        route["status"]["parents"].as_array().unwrap().contains(&theirs),
        "{route:#}"
    );

    // Revisions that change nothing of it, and another leader, are no news.
    let writes = api.requests("PATCH");
    api.apply(service("other", "10.96.0.50"));
    first.take().await;
    let mut two = Replica::start(&api, "two");
    two.line("every kind has been seen");
    replica.stop();
    let doors = two.serves();
    let (mut again, _) = agent(&api, doors, "node-1", told).await;
    again.take().await;
    tokio::time::timeout(
        crate::fake_api::A_WHILE,
        api.wait_for("a write", |api| (api.requests("PATCH") > writes).then_some(())),
    )
    .await
    .expect_err("a status was written that says nothing new");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_status_names_what_is_wrong() {
    let api = FakeApi::start().await;
    shop(&api);
    api.apply(strict("shop", "whatever"));
    let mut elsewhere = route("cart");
    elsewhere["spec"]["parentRefs"][0]["name"] = json!("nobody");
    api.apply(elsewhere);
    let mut replica = Replica::start(&api, "one");
    let doors = replica.serves();
    let invalid = [
        ("Accepted", "False", "Invalid", 1),
        ("Programmed", "False", "Invalid", 1),
    ];
    says_of(&api, "MeshPolicy", "strict", None, &invalid).await;
    says_of(
        &api,
        "HTTPRoute",
        "cart",
        Some("nobody"),
        &[("Accepted", "False", "NoMatchingParent", 1)],
    )
    .await;

    // Mended, and refused by an agent.
    api.apply(strict("shop", "strict"));
    says_of(
        &api,
        "MeshPolicy",
        "strict",
        None,
        &[("Accepted", "True", "Accepted", 2)],
    )
    .await;
    let (mut first, _) = agent(&api, doors, "node-1", 0).await;
    let (mut second, _) = agent(&api, doors, "node-2", 0).await;
    second.take().await;
    let revision = revision_of(&first.next().await.unwrap());
    first
        .say(mesh_api::wire::Report::Nack {
            revision: mesh_api::workload::Revision(revision),
            reason: "no memory".into(),
        })
        .await;
    says_of(
        &api,
        "MeshPolicy",
        "strict",
        None,
        &[("Programmed", "False", "Refused", 2)],
    )
    .await;
    let policy = api.get(NODEMESH, "MeshPolicy", "shop", "strict").unwrap();
    assert!(
        policy.to_string().contains("node-1 refused it: no memory"),
        "{policy:#}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_cannot_be_captured_has_an_event() {
    let api = FakeApi::start().await;
    shop(&api);
    let mut replica = Replica::start(&api, "one");
    let doors = replica.serves();
    let (mut agent, _) = agent(&api, doors, "node-1", 0).await;
    agent.take().await;
    let report = |name: &str, captured: bool| mesh_api::wire::PodReport {
        name: mesh_api::workload::ObjectName::new("shop", name),
        enrolled: true,
        captured,
        why: if captured {
            String::new()
        } else {
            "it has no network namespace".into()
        },
    };
    let pods = vec![report("cart", false), report("front", true)];
    agent
        .say(mesh_api::wire::Report::Status {
            pods,
            certificates: Vec::new(),
        })
        .await;
    let event = api
        .wait_for("an Event", |api| {
            api.all("events.k8s.io/v1", "Event").into_iter().next()
        })
        .await;
    assert_eq!(event["regarding"]["name"], "cart");
    assert_eq!(
        event["regarding"]["uid"],
        api.get("v1", "Pod", "shop", "cart").unwrap()["metadata"]["uid"]
    );
    assert_eq!(
        (&event["type"], &event["reason"]),
        (&json!("Warning"), &json!("NotCaptured"))
    );
    assert!(
        event["note"].as_str().unwrap().contains("it has no network namespace"),
        "{event:#}"
    );
    assert_eq!(api.all("events.k8s.io/v1", "Event").len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_are_led_to_the_leader_and_the_replica_that_waits_is_well() {
    let api = FakeApi::start().await;
    shop(&api);
    let leads_to = |api: &FakeApi| {
        let slice = api.get(
            "discovery.k8s.io/v1",
            "EndpointSlice",
            "nodemesh-system",
            "nodemesh-controller",
        )?;
        Some(
            slice["endpoints"][0]["addresses"][0]
                .as_str()
                .unwrap_or_default()
                .to_owned(),
        )
    };
    let mut one = Replica::start_with(&api, "one", &["--pod-ip", "10.9.0.1"]);
    one.serves();
    let is = |wanted: &'static str| move |api: &FakeApi| leads_to(api).filter(|address| address == wanted);
    api.wait_for("the first leader's address", is("10.9.0.1")).await;
    let mut two = Replica::start_with(&api, "two", &["--pod-ip", "10.9.0.2"]);
    let health = two.health();
    two.line("every kind has been seen");
    let end = Instant::now() + PATIENCE;
    while get(health, "/readyz").await.0 != 200 {
        assert!(Instant::now() < end, "it does not get ready");
    }
    assert_eq!(
        leads_to(&api).as_deref(),
        Some("10.9.0.1"),
        "it waits and does not lead"
    );
    one.kill();
    two.serves();
    api.wait_for("the second leader's address", is("10.9.0.2")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_server_that_says_nothing_costs_the_lead_too() {
    let api = FakeApi::start().await;
    shop(&api);
    let mut replica = Replica::start(&api, "one");
    let doors = replica.serves();
    let (mut held, _) = agent(&api, doors, "node-1", 0).await;
    held.take().await;
    let began = Instant::now();
    api.silent(true);
    replica.line("the lead is lost");
    // The Lease is for 2 s; another replica would begin then at the earliest.
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    api.silent(false);
    assert!(replica.serves().revision > doors.revision);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_cluster_is_no_trouble() {
    const PODS: usize = 2000;
    let api = FakeApi::start().await;
    shop(&api);
    for n in 0..PODS {
        let address = format!("10.{}.{}.{}", 100 + n / 62_500, n / 250 % 250, n % 250 + 1);
        api.apply(pod(&format!("pod-{n}"), &format!("node-{}", n % 2 + 1), &address));
        if n.is_multiple_of(10) {
            api.apply(service(
                &format!("pod-{n}"),
                &format!("10.97.{}.{}", n / 2500, n / 10 % 250 + 1),
            ));
        }
    }
    let mut replica = Replica::start(&api, "one");
    let doors = replica.serves();
    let (mut agent, _) = agent(&api, doors, "node-1", 0).await;
    let (_, resources) = snapshot_of(agent.take().await);
    let workloads = resources.iter().filter(|r| matches!(r, Resource::Workload(_))).count();
    assert!(workloads >= PODS + 2, "{workloads}");
    let began = Instant::now();
    for n in 0..20 {
        api.apply(service(&format!("late-{n}"), &format!("10.98.0.{}", n + 1)));
    }
    let mut seen = std::collections::BTreeSet::new();
    let mut revisions = 0;
    while seen.len() < 20 {
        let update = agent.take().await;
        revisions += 1;
        let (_, _, upserts, _) = crate::world::delta_of(&update);
        seen.extend(upserts.into_iter().filter(|key| key.starts_with("Service shop/late-")));
    }
    println!("20 changes in {revisions} revisions, after {:?}", began.elapsed());
    assert!(revisions <= 10, "changes that come together are joined: {revisions}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_lease_does_not_start_the_numbers_over_for_agents() {
    let api = FakeApi::start().await;
    shop(&api);
    let mut replica = Replica::start(&api, "one");
    let doors = replica.serves();
    // It got its revision from a leader whose Lease somebody has deleted.
    let (mut agent, _) = agent(&api, doors, "node-1", 70_000).await;
    let newest = take_until(&mut agent, |update| revision_of(update) > 70_000).await;
    let lease = api.get(
        "coordination.k8s.io/v1",
        "Lease",
        "nodemesh-system",
        "nodemesh-controller",
    );
    let reserved = &lease.unwrap()["metadata"]["annotations"]["nodemesh.io/revision-reserved"];
    let reserved: u64 = reserved.as_str().unwrap().parse().unwrap();
    assert!(reserved >= revision_of(&newest));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_number_that_was_not_acked_here_is_no_base_for_a_delta() {
    let api = FakeApi::start().await;
    shop(&api);
    let mut replica = Replica::start(&api, "one");
    let doors = replica.serves();
    let (mut first, identity) = agent(&api, doors, "node-1", 0).await;
    let held = revision_of(&first.take().await);
    let again = || async {
        let client = connect_with(doors.agents, roots(&api), Some(&identity)).await.unwrap();
        Agent::open(client, "node-1", held).await.unwrap()
    };
    // Acked here: it goes on from there. The first update is the first change since.
    let mut second = again().await;
    api.apply(service("later", "10.96.0.60"));
    let update = second.next().await.unwrap();
    assert!(
        matches!(update, Update::Delta { from, .. } if from.0 == held),
        "{update:?}"
    );

    // The same number, from an agent that got it elsewhere: another row of numbers may have had it.
    let token = agent_pod(&api, "agent-2", "node-2");
    let identity = join(&api, doors, "node-2", &token).await.unwrap();
    let open = || async {
        let client = connect_with(doors.agents, roots(&api), Some(&identity)).await.unwrap();
        Agent::open(client, "node-2", held).await.unwrap()
    };
    // Twice: the first connection after a join gets a snapshot anyway.
    for _ in 0..2 {
        let update = open().await.next().await.unwrap();
        assert!(matches!(update, Update::Snapshot { .. }), "{update:?}");
    }
}
