//! `mesh-ctl controller`: the owner of the revisions and the CA.
//!
//! Documents come from a [`source::Source`]: the embedded store (`standalone/`) or the API server (`kubernetes/`). What is
//! common stands here: the agents' TLS port (`tls.rs`, `control.rs`), what an agent is sent next (`session.rs`), what is
//! known of each (`agents.rs`), who signs (`ca.rs`), and the operator's service (`operator.rs`). The controller is not on
//! the data path: when it is gone, agents serve by what they have.

mod agents;
mod ca;
mod control;
mod kubernetes;
mod operator;
mod session;
mod source;
mod standalone;
mod tls;

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, anyhow, bail};
use mesh_api::{
    identity::TrustDomain,
    wire::{MESSAGE_BYTES_MAX, control::ControlServer, operator::OperatorServer},
};
use tokio::{net::TcpListener, sync::mpsc, task::JoinHandle};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::transport::Server;

use self::{
    agents::Agents,
    ca::Authority,
    control::ControlService,
    operator::OperatorService,
    source::{Admission, Source},
    tls::Tls,
};
use crate::kubernetes::KubeArgs;

/// HTTP/2 pings on idle connections, and how long an answer may take: a dead agent is noticed within both.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(10));
/// Streams that one connection may have open.
const STREAMS_PER_CONNECTION_MAX: u32 = 64;
/// How long a stopping controller waits for its connections.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// What `mesh-ctl controller` is told.
#[derive(Debug, clap::Args)]
pub struct ControllerConfig {
    /// Keep the documents in an embedded store.
    #[arg(long, group = "mode", required_unless_present = "kubernetes")]
    pub standalone: bool,
    /// Read the documents from the API server; replicas elect a leader, which serves.
    #[arg(long, group = "mode")]
    pub kubernetes: bool,
    /// Options of `--kubernetes`.
    #[command(flatten)]
    pub cluster: kubernetes::ClusterConfig,
    /// Where the store lies; made if absent, readable by the owner only (standalone).
    #[arg(long, value_name = "DIR", default_value = "/var/lib/nodemesh/controller")]
    pub data_dir: PathBuf,
    /// The agents' port. With port 0 the system picks one; the log, and in standalone mode DATA_DIR/address, say which.
    #[arg(long, value_name = "ADDR:PORT", default_value = "[::]:15010")]
    pub listen: SocketAddr,
    /// The operator's socket (standalone).
    #[arg(long, value_name = "PATH", default_value = crate::connect::SOCKET_DEFAULT)]
    pub operator_socket: PathBuf,
    /// The trust domain of all identities. It cannot change once the store is made.
    #[arg(long, value_name = "DOMAIN", default_value = "cluster.local")]
    pub trust_domain: String,
    /// A further DNS name or IP address of the controller's certificate.
    #[arg(long, value_name = "NAME")]
    pub tls_san: Vec<String>,
    /// How long a workload's certificate lives (24h at most).
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = crate::duration)]
    pub svid_ttl: Duration,
    /// How many revisions are kept for agents that resume (standalone).
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    pub revision_history: u64,
    /// How the log is written, to standard error.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
}

/// How the log is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// Sets the log up; `RUST_LOG` filters it.
fn log_to_stderr(format: LogFormat) {
    use tracing_subscriber::EnvFilter;
    let wanted = std::env::var("RUST_LOG").unwrap_or_default();
    let wanted = if wanted.is_empty() { "info".to_owned() } else { wanted };
    // Each failed request is told by whoever made it; the client tells it a second time, as an error.
    let quiet = if wanted.contains("kube_client") {
        ""
    } else {
        ",kube_client=off"
    };
    let filter = EnvFilter::try_new(format!("{wanted}{quiet}")).unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    // A second subscriber in one process is a test's business, not an error.
    let _ = match format {
        LogFormat::Text => builder.with_ansi(false).try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
}

fn serving_names(config: &ControllerConfig, bound: SocketAddr) -> Vec<String> {
    let service = format!("nodemesh-controller.{}", config.cluster.system_namespace);
    let mut names = vec![
        "localhost".to_owned(),
        "nodemesh-controller".to_owned(),
        format!("{service}.svc"),
        format!("{service}.svc.cluster.local"),
        service,
        IpAddr::from([127, 0, 0, 1]).to_string(),
        "::1".to_owned(),
    ];
    if !bound.ip().is_unspecified() {
        names.push(bound.ip().to_string());
    }
    names.extend(config.tls_san.iter().cloned());
    names.sort();
    names.dedup();
    names
}

async fn terminated() -> std::io::Result<&'static str> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut term = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(tokio::select! {
        _ = term.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    })
}

fn server() -> Server {
    Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE.0))
        .http2_keepalive_timeout(Some(KEEPALIVE.1))
        .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
}

/// Seconds since 1970.
pub fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map(|d| d.as_secs()).unwrap_or(0)
}

/// The largest request of an agent: a status of all its pods.
const CONTROL_REQUEST_BYTES_MAX: usize = 4 << 20;

/// What both doors work with.
#[derive(Clone)]
struct Parts {
    source: Arc<dyn Source>,
    agents: Arc<Agents>,
    authority: Arc<dyn Authority>,
    admission: Arc<dyn Admission>,
    tls: Arc<Tls>,
    svid_ttl: Duration,
}

impl Parts {
    /// Serves agents until told to stop; ends when the server has. Streams are among `tasks`.
    fn serve_agents(
        &self,
        listener: TcpListener,
        stop: &CancellationToken,
        tasks: &TaskTracker,
    ) -> JoinHandle<Result<(), tonic::transport::Error>> {
        let control = ControlServer::new(ControlService {
            source: self.source.clone(),
            agents: self.agents.clone(),
            admission: self.admission.clone(),
            authority: self.authority.clone(),
            svid_ttl: self.svid_ttl,
            stop: stop.clone(),
            tasks: tasks.clone(),
        })
        .max_decoding_message_size(CONTROL_REQUEST_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
        // Handshakes wait here while the server takes them one by one.
        let (ready, accepted) = mpsc::channel(16);
        let accept = self.tls.clone().accept(listener, ready, stop.clone(), tasks.clone());
        tasks.spawn(accept);
        let incoming = ReceiverStream::new(accepted);
        tokio::spawn(
            server()
                .add_service(control)
                .serve_with_incoming_shutdown(incoming, stop.clone().cancelled_owned()),
        )
    }

    fn operator(&self) -> OperatorServer<OperatorService> {
        OperatorServer::new(OperatorService {
            source: self.source.clone(),
            agents: self.agents.clone(),
            admission: self.admission.clone(),
            authority: self.authority.clone(),
            tls: self.tls.clone(),
        })
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }
}

/// Runs until SIGTERM or SIGINT.
pub async fn run(config: ControllerConfig, kube: &KubeArgs) -> anyhow::Result<()> {
    log_to_stderr(config.log_format);
    if config.svid_ttl > ca::SVID_TTL_MAX || config.svid_ttl < Duration::from_secs(5) {
        bail!("--svid-ttl: expected 5s to 24h");
    }
    let trust_domain = TrustDomain::new(&config.trust_domain).context("--trust-domain")?;
    if config.standalone {
        standalone::run(config, trust_domain).await
    } else {
        let client = kube
            .config()
            .await
            .map_err(|failure| anyhow!(failure.lines().join("; ")))?;
        kubernetes::run(config, client, trust_domain).await
    }
}
