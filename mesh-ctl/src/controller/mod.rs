//! `mesh-ctl controller`: the owner of the documents, the revisions and the CA.
//!
//! Two doors: the agents' TLS port (`tls.rs`, `control.rs`) and the operator's Unix socket (`operator.rs`). Behind them
//! `index.rs` holds the documents, compiles revisions and writes `store.rs`; `session.rs` decides what an agent is sent
//! next. The controller is not on the data path: when it is gone, agents serve by what they have.

mod agents;
mod ca;
mod control;
mod index;
mod operator;
mod session;
mod store;
mod tls;
mod token;

use std::{
    net::{IpAddr, SocketAddr},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context, bail};
use mesh_api::{
    identity::TrustDomain,
    wire::{MESSAGE_BYTES_MAX, control::ControlServer, operator::OperatorServer},
};
use tokio::{
    net::{TcpListener, UnixListener, UnixStream},
    sync::mpsc,
};
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::transport::Server;

use self::{agents::Agents, ca::Authority, control::ControlService, index::Index, store::Store, tls::Tls};

/// HTTP/2 pings on idle connections, and how long an answer may take: a dead agent is noticed within both.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(10));
/// Streams that one connection may have open.
const STREAMS_PER_CONNECTION_MAX: u32 = 64;
/// How long a stopping controller waits for its connections.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// The file in the data directory that says which address is served.
pub const ADDRESS_FILE: &str = "address";

/// What `mesh-ctl controller` is told.
#[derive(Debug, clap::Args)]
pub struct ControllerConfig {
    /// Keep the documents in an embedded store (the only mode so far; Kubernetes is to come).
    #[arg(long)]
    pub standalone: bool,
    /// Where the store lies; made if absent, readable by the owner only.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/nodemesh/controller")]
    pub data_dir: PathBuf,
    /// The agents' port. With port 0 the system picks one; DATA_DIR/address says which.
    #[arg(long, value_name = "ADDR:PORT", default_value = "[::]:15010")]
    pub listen: SocketAddr,
    /// The operator's socket.
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
    /// How many revisions are kept for agents that resume.
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
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    // A second subscriber in one process is a test's business, not an error.
    let _ = match format {
        LogFormat::Text => builder.with_ansi(false).try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
}

/// The store's trust domain is fixed by its first start: all identities and the root are made for it.
fn check_trust_domain(store: &Store, wanted: &TrustDomain) -> anyhow::Result<()> {
    match store.setting("trust-domain")? {
        None => store.put_settings(&[("trust-domain", wanted.as_str().as_bytes())])?,
        Some(found) if found == wanted.as_str().as_bytes() => {}
        Some(found) => bail!(
            "the store was made for the trust domain {}, not {wanted}",
            String::from_utf8_lossy(&found)
        ),
    }
    Ok(())
}

/// Binds the operator's socket so that nobody else can open it, not even for a moment: it gets its mode under a name
/// of its own and then its place. A socket that a living controller serves is left alone.
async fn bind_operator(path: &Path) -> anyhow::Result<UnixListener> {
    if UnixStream::connect(path).await.is_ok() {
        bail!("{} is served by another controller", path.display());
    }
    if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
        std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    }
    let mut own = path.as_os_str().to_owned();
    own.push(format!(".{}", std::process::id()));
    let own = PathBuf::from(own);
    let listener = UnixListener::bind(&own).with_context(|| own.display().to_string())?;
    std::fs::set_permissions(&own, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&own, path).with_context(|| path.display().to_string())?;
    Ok(listener)
}

fn serving_names(config: &ControllerConfig, bound: SocketAddr) -> Vec<String> {
    let mut names = vec![
        "localhost".to_owned(),
        "nodemesh-controller".to_owned(),
        "nodemesh-controller.nodemesh-system".to_owned(),
        "nodemesh-controller.nodemesh-system.svc".to_owned(),
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

/// Runs until SIGTERM or SIGINT.
pub async fn run(config: ControllerConfig) -> anyhow::Result<()> {
    log_to_stderr(config.log_format);
    if !config.standalone {
        bail!("only --standalone is there so far");
    }
    if config.svid_ttl > ca::SVID_TTL_MAX || config.svid_ttl < Duration::from_secs(5) {
        bail!("--svid-ttl: expected 5s to 24h");
    }
    let trust_domain = TrustDomain::new(&config.trust_domain).context("--trust-domain")?;
    let stopped_by = terminated();
    tokio::pin!(stopped_by);

    let store = Arc::new(Store::open(&config.data_dir, config.revision_history)?);
    check_trust_domain(&store, &trust_domain)?;
    let authority: Arc<dyn Authority> = Arc::new(ca::EmbeddedCa::open(&store, &trust_domain, SystemTime::now())?);
    let index = Arc::new(Index::open(store.clone(), trust_domain.clone())?);
    let agents = Arc::new(Agents::default());

    let listener = TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("cannot listen on {}", config.listen))?;
    let address = listener.local_addr()?;
    let tls = Arc::new(Tls::new(&*authority, serving_names(&config, address), trust_domain)?);
    let operator_listener = bind_operator(&config.operator_socket).await?;
    write_whole(&config.data_dir.join(ADDRESS_FILE), &format!("{address}\n"))?;

    let stop = CancellationToken::new();
    let tasks = TaskTracker::new();
    let control = ControlServer::new(ControlService {
        index: index.clone(),
        agents: agents.clone(),
        store: store.clone(),
        authority: authority.clone(),
        svid_ttl: config.svid_ttl,
        stop: stop.clone(),
        tasks: tasks.clone(),
    })
    .max_decoding_message_size(CONTROL_REQUEST_BYTES_MAX)
    .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let operator = OperatorServer::new(operator::OperatorService {
        index: index.clone(),
        agents,
        store,
        authority: authority.clone(),
        tls: tls.clone(),
    })
    .max_decoding_message_size(MESSAGE_BYTES_MAX)
    .max_encoding_message_size(MESSAGE_BYTES_MAX);

    // Handshakes wait here while the server takes them one by one.
    let (ready, accepted) = mpsc::channel(16);
    tasks.spawn(tls.clone().accept(listener, ready, stop.clone(), tasks.clone()));
    let renewal = tokio::spawn(tls.renew(authority));
    let agents_server = tokio::spawn(
        server()
            .add_service(control)
            .serve_with_incoming_shutdown(ReceiverStream::new(accepted), stop.clone().cancelled_owned()),
    );
    let operator_server = tokio::spawn(server().add_service(operator).serve_with_incoming_shutdown(
        UnixListenerStream::new(operator_listener),
        stop.clone().cancelled_owned(),
    ));
    let (revision, _, documents) = index.summary();
    tracing::info!(%address, socket = %config.operator_socket.display(), %revision, documents, "the controller serves");

    let signal = stopped_by.await?;
    tracing::info!(signal, "stopping");
    stop.cancel();
    renewal.abort();
    tasks.close();
    let all = async {
        tasks.wait().await;
        // A server that failed while stopping has nothing left to lose.
        let _ = agents_server.await;
        let _ = operator_server.await;
    };
    if tokio::time::timeout(STOP_TIMEOUT, all).await.is_err() {
        tracing::warn!("connections were cut");
    }
    let _ = std::fs::remove_file(&config.operator_socket);
    tracing::info!("stopped");
    Ok(())
}

/// The largest request of an agent: a status of all its pods.
const CONTROL_REQUEST_BYTES_MAX: usize = 4 << 20;

/// Writes a file so that a reader sees all of it or the one before.
fn write_whole(path: &Path, text: &str) -> anyhow::Result<()> {
    let new = path.with_extension("new");
    std::fs::write(&new, text).with_context(|| new.display().to_string())?;
    std::fs::rename(&new, path).with_context(|| path.display().to_string())
}
