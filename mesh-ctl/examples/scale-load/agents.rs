//! Hundreds of agents in one process: each joins, connects with its node's certificate, and answers every update.
//!
//! The first asks for everything, as an agent without a snapshot does; the others say that they hold the newest
//! revision, as agents that come back do, so that what is measured is the change and not the start.

use std::{
    net::SocketAddr,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use hyper_util::rt::TokioIo;
use mesh_api::{
    wire::{
        MESSAGE_BYTES_MAX, Report,
        control::{BootstrapRequest, ControlClient, ControllerMessage},
        operator::{BundleRequest, IssueJoinTokenRequest, OperatorClient, StatusRequest},
    },
    workload::Revision,
};
use prost::Message;
use rcgen::{CertificateParams, DistinguishedName, KeyPair};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use serde_json::{Value, json};
use tokio::{net::TcpStream, sync::mpsc, task::JoinSet, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::{
    operator,
    world::{self, Size},
};

/// No wait is longer.
const PATIENCE: Duration = Duration::from_secs(120);
/// Agents that join at one time.
const JOINING_MAX: usize = 32;

/// What churn does.
pub struct Churn {
    /// Where simulated agents connect, and how many.
    pub agents: Option<(SocketAddr, usize)>,
    /// Endpoints that each apply changes.
    pub per_apply: u32,
    /// The time from one apply to the next.
    pub pause: Duration,
    /// How many applies.
    pub applies: u32,
}

/// What the agents have seen.
#[derive(Default)]
struct Seen {
    updates: AtomicU64,
    bytes: AtomicU64,
    /// When which revision came, since the last look.
    arrivals: Mutex<Vec<(u64, Instant)>>,
}

impl Seen {
    fn arrivals(&self) -> Vec<(u64, Instant)> {
        std::mem::take(&mut *self.arrivals.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn note(&self, message: &ControllerMessage) {
        self.updates.fetch_add(1, Relaxed);
        self.bytes.fetch_add(message.encoded_len() as u64, Relaxed);
        let mut arrivals = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
        arrivals.push((message.revision().0, Instant::now()));
    }
}

type Identity = (Vec<CertificateDer<'static>>, KeyPair);

async fn dial(
    address: SocketAddr,
    roots: &rustls::RootCertStore,
    identity: Option<&Identity>,
) -> Result<ControlClient<Channel>> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots.clone());
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some((chain, key)) => {
            let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
            builder.with_client_auth_cert(chain.clone(), key)?
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let connect = tower::service_fn(move |_: Uri| {
        let connector = connector.clone();
        async move {
            let tcp = TcpStream::connect(address).await?;
            let name = ServerName::from(address.ip());
            connector.connect(name, tcp).await.map(TokioIo::new)
        }
    });
    let channel = Endpoint::from_static("http://controller")
        .connect_with_connector(connect)
        .await?;
    Ok(ControlClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX))
}

/// Joins, connects, and answers for as long as the stream lives. Returns once the stream is open.
async fn start(
    address: SocketAddr,
    roots: &rustls::RootCertStore,
    node: String,
    token: String,
    resume: u64,
    seen: Arc<Seen>,
) -> Result<()> {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let request = BootstrapRequest {
        join_token: token,
        node_name: node.clone(),
        csr_der: params.serialize_request(&key)?.der().to_vec(),
    };
    let joined = dial(address, roots, None).await?.bootstrap(request).await?.into_inner();
    let chain = joined.chain.context("no certificate")?.certificates_der;
    let identity = (chain.into_iter().map(CertificateDer::from).collect(), key);

    let open = async |resume: u64| -> Result<_> {
        let (reports, outgoing) = mpsc::channel(16);
        let hello = Report::Hello {
            stamp: 0,
            node: node.clone(),
            agent_version: "scale".to_owned(),
            resume: Revision(resume),
            abi_version: 0,
        };
        reports.send(hello.into()).await?;
        let mut client = dial(address, roots, Some(&identity)).await?;
        let stream = client.sync(ReceiverStream::new(outgoing)).await?.into_inner();
        Ok((reports, stream))
    };
    let (mut reports, mut stream) = open(resume).await?;
    if resume > 0 {
        // After a join an agent is sent everything; the second time it resumes.
        drop((reports, stream));
        (reports, stream) = open(resume).await?;
    }
    tokio::spawn(async move {
        while let Ok(Some(message)) = stream.message().await {
            seen.note(&message);
            if reports.send(Report::Ack(message.revision()).into()).await.is_err() {
                return;
            }
        }
    });
    Ok(())
}

/// Starts so many agents.
async fn start_all(
    operator: &mut OperatorClient<Channel>,
    address: SocketAddr,
    agents: usize,
    seen: &Arc<Seen>,
) -> Result<Duration> {
    let mut roots = rustls::RootCertStore::empty();
    for root in operator.bundle(BundleRequest {}).await?.into_inner().roots_der {
        roots.add(CertificateDer::from(root))?;
    }
    let roots = Arc::new(roots);
    let resume = operator.status(StatusRequest {}).await?.into_inner().revision;
    let started = Instant::now();
    let mut joining: JoinSet<Result<()>> = JoinSet::new();
    for number in 0..agents {
        let node = world::node(number);
        let request = IssueJoinTokenRequest {
            node: node.clone(),
            valid_for_seconds: 3600,
        };
        let token = operator.issue_join_token(request).await?.into_inner().join_token;
        let (roots, seen) = (roots.clone(), seen.clone());
        let resume = if number == 0 { 0 } else { resume };
        joining.spawn(async move { start(address, &roots, node, token, resume, seen).await });
        if joining.len() >= JOINING_MAX
            && let Some(joined) = joining.join_next().await
        {
            joined??;
        }
    }
    while let Some(joined) = joining.join_next().await {
        joined??;
    }
    Ok(started.elapsed())
}

/// Waits until every agent has a revision; gives when each of them had it.
async fn all_have(seen: &Seen, agents: usize, revision: u64) -> Result<Vec<Instant>> {
    let mut had = Vec::with_capacity(agents);
    let all = async {
        loop {
            let arrivals = seen.arrivals();
            had.extend(
                arrivals
                    .into_iter()
                    .filter(|(came, _)| *came >= revision)
                    .map(|(_, at)| at),
            );
            if had.len() >= agents {
                return;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let waited = timeout(PATIENCE, all).await;
    ensure!(
        waited.is_ok(),
        "{} of {agents} agents have revision {revision}",
        had.len()
    );
    Ok(had)
}

fn quantile(sorted: &[Duration], share: f64) -> f64 {
    let index = (sorted.len() as f64 * share).ceil() as usize;
    let at = sorted.get(index.saturating_sub(1)).or(sorted.last());
    at.map_or(0.0, Duration::as_secs_f64)
}

/// See the verb.
pub async fn apply(socket: &Path, address: SocketAddr, agents: usize, rounds: usize) -> Result<Value> {
    let mut operator = operator::connect(socket).await?;
    let seen = Arc::new(Seen::default());
    let start = start_all(&mut operator, address, agents, &seen).await?;
    // The first change brings everybody to one revision, whatever each was sent before.
    let first = operator::apply(&mut operator, &[world::access_policy(0, 1, 1)]).await?;
    all_have(&seen, agents, first).await?;
    let (mut applies, mut each, mut all) = (Vec::new(), Vec::new(), Vec::new());
    let bytes_before = seen.bytes.load(Relaxed);
    for round in 0..rounds {
        let started = Instant::now();
        let revision = operator::apply(&mut operator, &[world::access_policy(0, 1, round + 2)]).await?;
        applies.push(started.elapsed());
        let had = all_have(&seen, agents, revision).await?;
        let times: Vec<Duration> = had.iter().map(|at| at.saturating_duration_since(started)).collect();
        all.extend(times.iter().max());
        each.extend(times);
    }
    let bytes = seen.bytes.load(Relaxed) - bytes_before;
    for times in [&mut applies, &mut each, &mut all] {
        times.sort_unstable();
    }
    Ok(json!({
        "agents": agents,
        "rounds": rounds,
        "start_seconds": start.as_secs_f64(),
        "apply_p50_seconds": quantile(&applies, 0.5),
        "apply_p99_seconds": quantile(&applies, 0.99),
        "agent_p50_seconds": quantile(&each, 0.5),
        "agent_p99_seconds": quantile(&each, 0.99),
        "all_p50_seconds": quantile(&all, 0.5),
        "all_p99_seconds": quantile(&all, 0.99),
        "bytes_per_agent_and_change": bytes as f64 / (agents * rounds).max(1) as f64,
    }))
}

/// See the verb.
pub async fn churn(socket: &Path, load: &Churn, size: &Size) -> Result<Value> {
    let mut operator = operator::connect(socket).await?;
    let seen = Arc::new(Seen::default());
    if let Some((address, agents)) = load.agents {
        start_all(&mut operator, address, agents, &seen).await?;
    }
    let agents = load.agents.map_or(0, |(_, agents)| agents);
    let (updates, bytes) = (seen.updates.load(Relaxed), seen.bytes.load(Relaxed));
    let started = Instant::now();
    let (mut changes, mut late, mut revision) = (0usize, Duration::ZERO, 0);
    for apply in 0..load.applies {
        let due = load.pause * apply;
        late = late.max(started.elapsed().saturating_sub(due));
        tokio::time::sleep_until((started + due).into()).await;
        let some = (0..load.per_apply as usize).map(|n| {
            let number = changes + n;
            // Each endpoint goes when it is met first and comes back the next time round.
            let ready = (number / size.endpoints.max(1)) % 2 == 1;
            world::pod(size, number * 7919 % size.endpoints.max(1), ready)
        });
        let some: Vec<Value> = some.collect();
        changes += some.len();
        revision = operator::apply(&mut operator, &some).await?;
    }
    let seconds = started.elapsed().as_secs_f64();
    if agents > 0 {
        all_have(&seen, agents, revision).await?;
    }
    Ok(json!({
        "agents": agents,
        "changes": changes,
        "applies": load.applies,
        "revision": revision,
        "seconds": seconds,
        "latest_seconds": late.as_secs_f64(),
        "updates": seen.updates.load(Relaxed) - updates,
        "bytes": seen.bytes.load(Relaxed) - bytes,
    }))
}
