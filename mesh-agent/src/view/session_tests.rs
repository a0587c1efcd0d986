//! The session against a controller that does as its test says, over real sockets and real TLS.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use mesh_api::{
    document::Resource,
    identity::SpiffeId,
    wire::{
        Report, TrustRoots, Update,
        control::{
            AgentMessage, BootstrapRequest, BootstrapResponse, Chain, Control, ControlServer, ControllerMessage,
            SignRequest, SignResponse, SigningOutcome, SigningResult,
        },
    },
    workload::{ObjectName, Revision, Service},
};
use rustls::{RootCertStore, ServerConfig, server::WebPkiClientVerifier};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
    task::{JoinHandle, LocalSet},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status, Streaming, transport::server::Connected};

use super::{
    session::{AgentReport, ControllerConfig, SyncConfig, SyncError, ViewSync},
    snapshot,
};
use crate::{
    event::Events,
    identity::{
        issue::{Signer, SigningRequest},
        provider,
        testing::{HOUR, TestCa, domain, id},
    },
};

const PATIENCE: Duration = Duration::from_secs(20);
/// What the controller saw and its test has not looked at yet.
const SEEN_MAX: usize = 256;
const TOKEN: &str = "nmj1.right.token";

/// What the scripted controller saw.
#[derive(Debug)]
enum Saw {
    Joined { token: String, with_certificate: bool },
    Stream(Outgoing),
    Said(Report),
}

type Outgoing = mpsc::Sender<Result<ControllerMessage, Status>>;

struct Script {
    ca: Arc<TestCa>,
    saw: mpsc::Sender<Saw>,
    /// How long before now the certificates of nodes begin.
    age: Duration,
}

/// A TLS connection, with whether the agent showed a certificate.
struct Peer(TlsStream<TcpStream>);

impl Connected for Peer {
    type ConnectInfo = bool;
    fn connect_info(&self) -> bool {
        self.0.get_ref().1.peer_certificates().is_some()
    }
}

impl AsyncRead for Peer {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Peer {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

#[tonic::async_trait]
impl Control for Script {
    type SyncStream = ReceiverStream<Result<ControllerMessage, Status>>;

    async fn bootstrap(
        &self,
        request: tonic::Request<BootstrapRequest>,
    ) -> Result<Response<BootstrapResponse>, Status> {
        let with_certificate = request.extensions().get::<bool>().copied().unwrap_or(false);
        let BootstrapRequest {
            join_token,
            node_name,
            csr_der,
        } = request.into_inner();
        let allowed = join_token == TOKEN || (join_token.is_empty() && with_certificate);
        let _ = self.saw.try_send(Saw::Joined {
            token: join_token,
            with_certificate,
        });
        if !allowed {
            return Err(Status::permission_denied("no such token"));
        }
        let now = SystemTime::now();
        let node = SpiffeId::node(&domain(), &node_name).unwrap();
        let chain = self.ca.sign(&csr_der, &node, now - self.age, now + HOUR);
        Ok(Response::new(BootstrapResponse {
            chain: Some(Chain {
                certificates_der: chain.iter().map(|c| c.to_vec()).collect(),
            }),
            trust_bundle: None,
            trust_domain: domain().to_string(),
        }))
    }

    async fn sign(&self, request: tonic::Request<SignRequest>) -> Result<Response<SignResponse>, Status> {
        let now = SystemTime::now();
        let results = request.into_inner().requests.into_iter().map(|request| {
            let identity: SpiffeId = request.identity.parse().unwrap();
            let outcome = if identity == id("refused") {
                SigningOutcome::Refusal("no such pod on this node".into())
            } else {
                let chain = self.ca.sign(&request.csr_der, &identity, now - HOUR, now + HOUR);
                SigningOutcome::Chain(Chain {
                    certificates_der: chain.iter().map(|c| c.to_vec()).collect(),
                })
            };
            SigningResult {
                identity: request.identity,
                outcome: Some(outcome),
            }
        });
        Ok(Response::new(SignResponse {
            results: results.collect(),
        }))
    }

    async fn sync(
        &self,
        request: tonic::Request<Streaming<AgentMessage>>,
    ) -> Result<Response<Self::SyncStream>, Status> {
        if request.extensions().get::<bool>() != Some(&true) {
            return Err(Status::unauthenticated("no certificate"));
        }
        let mut incoming = request.into_inner();
        let (outgoing, messages) = mpsc::channel(16);
        let saw = self.saw.clone();
        let _ = saw.try_send(Saw::Stream(outgoing));
        tokio::spawn(async move {
            while let Ok(Some(message)) = incoming.message().await {
                let _ = saw.try_send(Saw::Said(Report::try_from(message).unwrap()));
            }
        });
        Ok(Response::new(ReceiverStream::new(messages)))
    }
}

/// A controller on a loopback address.
struct FakeController {
    ca: Arc<TestCa>,
    address: SocketAddr,
    saw: mpsc::Receiver<Saw>,
    serving: JoinHandle<()>,
}

impl FakeController {
    async fn start(ca: &Arc<TestCa>, identity: &str, age: Duration, at: Option<SocketAddr>) -> FakeController {
        let now = SystemTime::now();
        let (chain, key) = ca.leaf(&[identity], now - HOUR, now + HOUR);
        let mut roots = RootCertStore::empty();
        roots.add(ca.root.clone()).unwrap();
        let provider = Arc::new(provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
            .allow_unauthenticated()
            .build()
            .unwrap();
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind(at.unwrap_or(([127, 0, 0, 1], 0).into()))
            .await
            .unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, saw) = mpsc::channel(SEEN_MAX);
        let script = Script {
            ca: ca.clone(),
            saw: sender,
            age,
        };
        let (peers, incoming) = mpsc::channel::<io::Result<Peer>>(4);
        let serving = tokio::spawn(async move {
            let accepting = async {
                while let Ok((stream, _)) = listener.accept().await {
                    if let Ok(stream) = acceptor.accept(stream).await {
                        let _ = peers.send(Ok(Peer(stream))).await;
                    }
                }
            };
            let serving = tonic::transport::Server::builder()
                .add_service(ControlServer::new(script))
                .serve_with_incoming(ReceiverStream::new(incoming));
            let _ = tokio::join!(accepting, serving);
        });
        FakeController {
            ca: ca.clone(),
            address,
            saw,
            serving,
        }
    }

    async fn next(&mut self) -> Saw {
        tokio::time::timeout(PATIENCE, self.saw.recv())
            .await
            .expect("the agent does something in time")
            .expect("the controller lives")
    }

    /// Ends it; its address is free when this returns.
    async fn stop(mut self) {
        self.serving.abort();
        let _ = (&mut self.serving).await;
    }

    async fn stream(&mut self) -> (Outgoing, Revision) {
        let outgoing = match self.next().await {
            Saw::Stream(outgoing) => outgoing,
            other => panic!("{other:?} instead of a stream"),
        };
        match self.said().await {
            Report::Hello { node, resume, .. } => {
                assert_eq!(node, "node-1");
                (outgoing, resume)
            }
            other => panic!("{other:?} instead of a hello"),
        }
    }

    /// The next report that is no status.
    async fn said(&mut self) -> Report {
        loop {
            match self.next().await {
                Saw::Said(Report::Status { .. }) => {}
                Saw::Said(report) => return report,
                other => panic!("{other:?} instead of a report"),
            }
        }
    }

    fn snapshot(&self, revision: u64, names: &[&str]) -> ControllerMessage {
        ControllerMessage::from(&Update::Snapshot {
            stamp: 0,
            revision: Revision(revision),
            trust_domain: domain(),
            resources: names.iter().map(|name| service(name)).collect(),
            trust_roots: TrustRoots(vec![self.ca.root.to_vec()]),
        })
    }
}

impl Drop for FakeController {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

fn service(name: &str) -> Resource {
    Resource::Service(Arc::new(Service {
        name: ObjectName::new("shop", name),
        addresses: Vec::new(),
        ports: Vec::new(),
        selector: BTreeMap::new(),
        publish_not_ready: false,
        ..Service::default()
    }))
}

fn delta(from: u64, to: u64, name: &str) -> ControllerMessage {
    ControllerMessage::from(&Update::Delta {
        stamp: 0,
        from: Revision(from),
        to: Revision(to),
        upserts: vec![service(name)],
        removed: Vec::new(),
        trust_roots: None,
    })
}

fn config(dir: &std::path::Path, ca: &TestCa, address: SocketAddr) -> SyncConfig {
    use base64::{Engine, prelude::BASE64_STANDARD};
    let root = BASE64_STANDARD.encode(&ca.root);
    let pem = format!("-----BEGIN CERTIFICATE-----\n{root}\n-----END CERTIFICATE-----\n");
    std::fs::write(dir.join("bundle.pem"), pem).unwrap();
    std::fs::write(dir.join("token"), format!("{TOKEN}\n")).unwrap();
    SyncConfig {
        node: "node-1".into(),
        trust_domain: domain(),
        state_dir: dir.join("state"),
        controller: ControllerConfig {
            address: address.to_string(),
            trust_bundle: dir.join("bundle.pem"),
            join_token_file: Some(dir.join("token")),
            connect_timeout: Duration::from_secs(5),
            call_timeout: Duration::from_secs(5),
            retry_max: Duration::from_millis(300),
        },
        abi_version: 1,
    }
}

fn names(sync: &super::ViewStore) -> Vec<String> {
    let mut names: Vec<String> = sync
        .load()
        .services()
        .map(|s| s.service.name.name.to_string())
        .collect();
    names.sort();
    names
}

#[tokio::test]
async fn joins_syncs_survives_a_restart_of_either_side_and_signs() {
    let local = LocalSet::new();
    let ca = Arc::new(TestCa::new());
    let dir = tempfile::tempdir().unwrap();
    local
        .run_until(async {
            let controller_id = "spiffe://test.mesh/controller";
            let mut controller = FakeController::start(&ca, controller_id, Duration::ZERO, None).await;
            let config = config(dir.path(), &ca, controller.address);
            let sync = ViewSync::open(config.clone(), Events::quiet()).unwrap();
            let (views, health, client) = (sync.views(), sync.health(), sync.client());
            assert!(client.sign(Vec::new()).await.is_err(), "not connected yet");
            let (_reports, reported) = watch::channel(AgentReport::default());
            let running = tokio::task::spawn_local(sync.run(reported));

            match controller.next().await {
                Saw::Joined {
                    token,
                    with_certificate,
                } => assert_eq!((token.as_str(), with_certificate), (TOKEN, false)),
                other => panic!("{other:?} instead of a join"),
            }
            let (outgoing, resume) = controller.stream().await;
            assert_eq!(resume, Revision(0));
            outgoing.send(Ok(controller.snapshot(4, &["a"]))).await.unwrap();
            assert_eq!(controller.said().await, Report::Ack(Revision(4)));
            assert_eq!((names(&views), health.revision()), (vec!["a".to_owned()], 4));

            // Bytes that are no model: nacked by their number, and nothing is taken from them.
            let rootless = ControllerMessage::from(&Update::Snapshot {
                stamp: 0,
                revision: Revision(5),
                trust_domain: domain(),
                resources: vec![service("b")],
                trust_roots: TrustRoots(vec![b"no certificate".to_vec()]),
            });
            outgoing.send(Ok(rootless)).await.unwrap();
            match controller.said().await {
                Report::Nack { revision, reason } => {
                    assert_eq!(revision, Revision(5));
                    assert!(reason.contains("root"), "{reason}");
                }
                other => panic!("{other:?} instead of a nack"),
            }
            assert_eq!(names(&views), ["a"]);
            // A kind of message that only a newer controller knows gets no answer: the next one is to what follows it.
            outgoing.send(Ok(ControllerMessage { message: None })).await.unwrap();
            outgoing.send(Ok(controller.snapshot(4, &["a"]))).await.unwrap();
            assert_eq!(controller.said().await, Report::Ack(Revision(4)));

            let csr = super::node::Pending::new(&id("cart")).unwrap().csr;
            let ask = |identity: SpiffeId| SigningRequest {
                identity,
                csr: csr.clone(),
            };
            let signed = client.sign(vec![ask(id("cart"))]).await.unwrap();
            assert_eq!(signed.chains.len(), 1);
            assert!(signed.chains[0].is_ok());
            let refused = client.sign(vec![ask(id("refused"))]).await.unwrap();
            assert_eq!(refused.chains[0].as_ref().unwrap_err(), "no such pod on this node");

            // The controller goes; the view stays; it comes back and the agent resumes.
            let address = controller.address;
            drop(outgoing);
            controller.stop().await;
            let mut controller = FakeController::start(&ca, controller_id, Duration::ZERO, Some(address)).await;
            assert_eq!(names(&views), ["a"]);
            let (outgoing, resume) = controller.stream().await;
            assert_eq!(resume, Revision(4), "no second join, and resumed");
            outgoing.send(Ok(delta(4, 6, "d"))).await.unwrap();
            assert_eq!(controller.said().await, Report::Ack(Revision(6)));
            assert_eq!(names(&views), ["a", "d"]);
            assert!(health.connected());

            // The agent goes, without the controller, and comes back by itself. The snapshot is written after the ack.
            wait_for(|| {
                let held = snapshot::load(&config.state_dir, &domain());
                held.is_ok_and(|held| held.is_some_and(|held| held.revision == Revision(6)))
            })
            .await;
            controller.stop().await;
            running.abort();
            let again = ViewSync::open(config.clone(), Events::quiet()).unwrap();
            assert_eq!(names(&again.views()), ["a", "d"]);
            assert!(again.health().node_expires_unix() > 0, "with its certificate");

            // A snapshot that was cut is none.
            let path = snapshot::path(&config.state_dir);
            let bytes = std::fs::read(&path).unwrap();
            std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
            let events = Events::quiet();
            let fresh = ViewSync::open(config.clone(), events.clone()).unwrap();
            assert_eq!(fresh.views().load().revision(), Revision(0));
            let text = events.scrape().unwrap();
            assert!(
                text.contains("nodemesh_agent_events_total{event=\"snapshot-unusable\"} 1"),
                "{text}"
            );

            std::fs::remove_file(dir.path().join("bundle.pem")).unwrap();
            let blind = ViewSync::open(config, Events::quiet());
            assert!(matches!(blind, Err(SyncError::Bundle(_))), "nobody could be believed");
        })
        .await;
}

async fn wait_for(condition: impl Fn() -> bool) {
    let waited = tokio::time::timeout(PATIENCE, async {
        let mut ticks = tokio::time::interval(Duration::from_millis(5));
        while !condition() {
            ticks.tick().await;
        }
    });
    waited.await.expect("the condition holds in time");
}

#[tokio::test]
async fn a_certificate_past_its_half_is_renewed_without_a_token_and_shown_at_once() {
    let local = LocalSet::new();
    let ca = Arc::new(TestCa::new());
    let dir = tempfile::tempdir().unwrap();
    local
        .run_until(async {
            // Its life began two hours ago and ends in one.
            let mut controller = FakeController::start(&ca, "spiffe://test.mesh/controller", HOUR * 2, None).await;
            let sync = ViewSync::open(config(dir.path(), &ca, controller.address), Events::quiet()).unwrap();
            let (_reports, reported) = watch::channel(AgentReport::default());
            let running = tokio::task::spawn_local(sync.run(reported));
            assert!(matches!(
                controller.next().await,
                Saw::Joined {
                    with_certificate: false,
                    ..
                }
            ));
            let (_first, _) = controller.stream().await;
            let renewal = loop {
                match controller.next().await {
                    Saw::Said(_) => {}
                    other => break other,
                }
            };
            match renewal {
                Saw::Joined {
                    token,
                    with_certificate,
                } => assert_eq!((token.as_str(), with_certificate), ("", true)),
                other => panic!("{other:?} instead of a renewal"),
            }
            controller.stream().await;
            running.abort();
        })
        .await;
}

#[tokio::test]
async fn whoever_is_not_the_controller_is_not_believed() {
    let local = LocalSet::new();
    let (ca, other) = (Arc::new(TestCa::new()), Arc::new(TestCa::new()));
    local
        .run_until(async {
            let cases = [
                (&ca, "spiffe://test.mesh/node/node-1"),
                (&ca, "spiffe://test.mesh/ns/shop/sa/cart"),
                (&ca, "spiffe://other.mesh/controller"),
                (&other, "spiffe://test.mesh/controller"),
            ];
            for (signer, identity) in cases {
                let dir = tempfile::tempdir().unwrap();
                let mut impostor = FakeController::start(signer, identity, Duration::ZERO, None).await;
                let sync = ViewSync::open(config(dir.path(), &ca, impostor.address), Events::quiet()).unwrap();
                let health = sync.health();
                let (_reports, reported) = watch::channel(AgentReport::default());
                let running = tokio::task::spawn_local(sync.run(reported));
                wait_for(|| !health.last_failure().is_empty()).await;
                assert!(!health.connected());
                assert!(
                    impostor.saw.try_recv().is_err(),
                    "{identity}: it never got so much as the token"
                );
                let failure = health.last_failure();
                assert!(failure.contains("certificate") || failure.contains("name"), "{failure}");
                running.abort();
            }
        })
        .await;
}

#[tokio::test]
async fn without_a_token_or_with_a_wrong_one_there_is_no_stream() {
    let local = LocalSet::new();
    let ca = Arc::new(TestCa::new());
    local
        .run_until(async {
            for token in [None, Some("nmj1.wrong.token")] {
                let dir = tempfile::tempdir().unwrap();
                let mut controller =
                    FakeController::start(&ca, "spiffe://test.mesh/controller", Duration::ZERO, None).await;
                let config = config(dir.path(), &ca, controller.address);
                let file = dir.path().join("token");
                match token {
                    Some(token) => std::fs::write(file, token).unwrap(),
                    None => std::fs::remove_file(file).unwrap(),
                }
                let sync = ViewSync::open(config, Events::quiet()).unwrap();
                let health = sync.health();
                let (_reports, reported) = watch::channel(AgentReport::default());
                let running = tokio::task::spawn_local(sync.run(reported));
                wait_for(|| !health.last_failure().is_empty()).await;
                let failure = health.last_failure();
                match token {
                    Some(_) => assert!(failure.contains("no such token"), "{failure}"),
                    None => assert!(failure.contains("cannot read the join token"), "{failure}"),
                }
                running.abort();
                while let Ok(saw) = controller.saw.try_recv() {
                    assert!(matches!(saw, Saw::Joined { .. }), "{saw:?}");
                }
            }
        })
        .await;
}

#[test]
fn only_endpoints_may_wait_to_be_written() {
    use mesh_api::{
        document::parse,
        workload::{ObjectName, Workload},
    };
    let pod = |name: &str, change: fn(&mut Workload)| {
        let service = ObjectName::new("shop", "cart");
        let mut pod = Workload::outside(&domain(), &service, [10, 0, 0, 1].into(), "node-1".into());
        pod.name = ObjectName::new("shop", name);
        change(&mut pod);
        Resource::Workload(Arc::new(pod))
    };
    let held = |resources: Vec<Resource>| super::sync::Held {
        revision: Revision(1),
        stamp: 0,
        trust_domain: domain(),
        resources: resources
            .into_iter()
            .map(|resource| (resource.key(), resource))
            .collect(),
        roots: TrustRoots::default(),
    };
    let policy = "{apiVersion: nodemesh.io/v1alpha1, kind: MeshPolicy, metadata: {name: p, namespace: shop}, spec: \
                  {targetRefs: [{kind: Namespace, name: shop}], mtls: {mode: strict}}}";
    let policy = Resource::Policy(Arc::new(parse("p", policy).unwrap().remove(0)));
    let before = held(vec![pod("a", |_| {}), service("cart")]);
    let cases = [
        ("nothing", vec![pod("a", |_| {}), service("cart")], true),
        (
            "it is not ready",
            vec![pod("a", |pod| pod.ready = false), service("cart")],
            true,
        ),
        (
            "one more",
            vec![pod("a", |_| {}), pod("b", |_| {}), service("cart")],
            true,
        ),
        ("it is gone", vec![service("cart")], true),
        (
            "it is enrolled",
            vec![pod("a", |pod| pod.enrolled = true), service("cart")],
            false,
        ),
        ("a service is gone", vec![pod("a", |_| {})], false),
        (
            "a service more",
            vec![pod("a", |_| {}), service("cart"), service("bank")],
            false,
        ),
        ("a policy", vec![pod("a", |_| {}), service("cart"), policy], false),
    ];
    for (what, after, expected) in cases {
        assert_eq!(super::session::is_alike(&before, &held(after)), expected, "{what}");
    }
}
