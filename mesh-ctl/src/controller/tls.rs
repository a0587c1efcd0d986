//! The controller's TLS port: accept, handshake within bounds, and name the peer.
//!
//! TLS 1.3 only. A client certificate is optional for the handshake and decided upon per call; one that is shown must be
//! signed by the mesh's root and name a node of the trust domain, or the connection ends. A connection lives no longer
//! than the certificate it was made with, and one without a certificate only as long as a bootstrap takes. No session
//! is resumed: a resumed one would skip the look at the certificate.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use mesh_api::identity::{IdentityKind, SpiffeId, TrustDomain};
use parking_lot::RwLock;
use rustls::{RootCertStore, ServerConfig, server::WebPkiClientVerifier};
use rustls_pki_types::CertificateDer;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::Sleep,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::transport::server::Connected;

use super::ca::{self, Authority, SignError};

/// Open connections, those in their handshake included.
pub const CONNECTIONS_MAX: usize = 4096;
/// Open connections that have shown no certificate.
pub const ANONYMOUS_MAX: usize = 256;
/// How long a handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection without a certificate lives.
const ANONYMOUS_LIFE: Duration = Duration::from_secs(30);
/// The life of the controller's own certificate; renewed at half of it.
pub const SERVING_TTL: Duration = Duration::from_secs(24 * 3600);
/// After an `accept` that failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Who is at the other end of a connection.
#[derive(Clone, Debug)]
pub struct Peer {
    /// The node, if the connection has shown its certificate.
    pub node: Option<PeerNode>,
    /// Where it connected from.
    pub address: String,
}

/// A node that has proven its identity.
#[derive(Clone, Debug)]
pub struct PeerNode {
    /// Its name.
    pub name: String,
    /// The end of its certificate's life.
    pub expires: SystemTime,
}

/// A connection with a known peer.
pub struct PeerStream {
    inner: TlsStream<TcpStream>,
    peer: Peer,
    ends: Pin<Box<Sleep>>,
    _place: (OwnedSemaphorePermit, Option<OwnedSemaphorePermit>),
}

/// The present configuration; replaced when the serving certificate is renewed.
pub struct Tls {
    config: RwLock<(Arc<ServerConfig>, SystemTime)>,
    names: Vec<String>,
    trust_domain: TrustDomain,
}

/// Why the TLS configuration cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The authority made no serving certificate.
    #[error("no serving certificate")]
    Sign(#[from] SignError),
    /// rustls refused what it was given.
    #[error("the TLS configuration: {0}")]
    Config(String),
}

fn config(
    authority: &dyn Authority,
    names: &[String],
    now: SystemTime,
) -> Result<(ServerConfig, SystemTime), TlsError> {
    let mut roots = RootCertStore::empty();
    for root in authority.bundle() {
        roots.add(root).map_err(|e| TlsError::Config(e.to_string()))?;
    }
    let verifier = WebPkiClientVerifier::builder(Arc::new(roots))
        .allow_unauthenticated()
        .build()
        .map_err(|e| TlsError::Config(e.to_string()))?;
    let serving = authority.serving(now, SERVING_TTL, names)?;
    let expires = serving.chain.first().and_then(ca::not_after).unwrap_or(now);
    let mut config = ServerConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
        .with_client_cert_verifier(verifier)
        .with_single_cert(serving.chain, serving.key)
        .map_err(|e| TlsError::Config(e.to_string()))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    Ok((config, expires))
}

impl Tls {
    /// Makes the first serving certificate.
    pub fn new(authority: &dyn Authority, names: Vec<String>, trust_domain: TrustDomain) -> Result<Tls, TlsError> {
        let (config, expires) = config(authority, &names, SystemTime::now())?;
        Ok(Tls {
            config: RwLock::new((Arc::new(config), expires)),
            names,
            trust_domain,
        })
    }

    /// When the serving certificate expires.
    pub fn expires(&self) -> SystemTime {
        self.config.read().1
    }

    /// Makes the serving certificate anew, and trusts the authority's present roots. A failure leaves all as it was.
    pub fn reload(&self, authority: &dyn Authority) -> Result<(), TlsError> {
        let (config, expires) = config(authority, &self.names, SystemTime::now())?;
        *self.config.write() = (Arc::new(config), expires);
        Ok(())
    }

    /// Renews the serving certificate at half its life, for ever. A failure leaves the present one in place.
    pub async fn renew(self: Arc<Self>, authority: Arc<dyn Authority>) {
        loop {
            let left = self.expires().duration_since(SystemTime::now()).unwrap_or_default();
            // The floor bounds the retries when the authority fails at the end.
            tokio::time::sleep((left / 2).max(Duration::from_secs(10))).await;
            if let Err(error) = self.reload(&*authority) {
                tracing::error!(%error, "the serving certificate was not renewed");
            }
        }
    }

    async fn handshake(
        &self,
        tcp: TcpStream,
        address: SocketAddr,
        place: OwnedSemaphorePermit,
        anonymous: &Arc<Semaphore>,
    ) -> Result<PeerStream, String> {
        let _ = tcp.set_nodelay(true);
        let acceptor = TlsAcceptor::from(self.config.read().0.clone());
        let inner = tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(tcp))
            .await
            .map_err(|_| "the handshake took too long".to_owned())?
            .map_err(|e| e.to_string())?;
        let certificate = inner.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        let node = certificate.map(|leaf| node_of(leaf, &self.trust_domain)).transpose()?;
        let (life, extra) = match &node {
            Some(node) => (node.expires.duration_since(SystemTime::now()).unwrap_or_default(), None),
            None => {
                let place = anonymous.clone().try_acquire_owned();
                let place = place.map_err(|_| "too many connections without a certificate".to_owned())?;
                (ANONYMOUS_LIFE, Some(place))
            }
        };
        Ok(PeerStream {
            inner,
            peer: Peer {
                node,
                // A dual-stack listener shows IPv4 peers as mapped addresses.
                address: SocketAddr::new(address.ip().to_canonical(), address.port()).to_string(),
            },
            ends: Box::pin(tokio::time::sleep(life)),
            _place: (place, extra),
        })
    }

    /// Accepts until told to stop. Handshakes run beside each other; what comes out has a known peer.
    pub async fn accept(
        self: Arc<Self>,
        listener: TcpListener,
        ready: mpsc::Sender<io::Result<PeerStream>>,
        stop: CancellationToken,
        tasks: TaskTracker,
    ) {
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let anonymous = Arc::new(Semaphore::new(ANONYMOUS_MAX));
        loop {
            let accepted = async {
                // Back-pressure before accept: a full house leaves new connections in the backlog.
                let place = places.clone().acquire_owned().await;
                (place, listener.accept().await)
            };
            let (place, accepted) = tokio::select! {
                accepted = accepted => accepted,
                () = stop.cancelled() => return,
            };
            let (tcp, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "accept");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Ok(place) = place else { return };
            let (tls, ready, anonymous, stop) = (self.clone(), ready.clone(), anonymous.clone(), stop.clone());
            tasks.spawn(async move {
                let done = async {
                    match tls.handshake(tcp, address, place, &anonymous).await {
                        Ok(stream) => {
                            // Nobody takes it when the server is stopping.
                            let _ = ready.send(Ok(stream)).await;
                        }
                        Err(why) => tracing::info!(%address, %why, "a connection was refused"),
                    }
                };
                tokio::select! {
                    () = done => {}
                    () = stop.cancelled() => {}
                }
            });
        }
    }
}

/// The node that a verified certificate names.
fn node_of(leaf: &CertificateDer<'_>, trust_domain: &TrustDomain) -> Result<PeerNode, String> {
    use x509_parser::extensions::GeneralName;
    let (_, parsed) = x509_parser::parse_x509_certificate(leaf).map_err(|e| e.to_string())?;
    let names = parsed.subject_alternative_name().map_err(|e| e.to_string())?;
    let names = names
        .map(|names| names.value.general_names.as_slice())
        .unwrap_or_default();
    // X509-SVID §2: exactly one URI.
    let mut uris = names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    let (Some(uri), None) = (uris.next(), uris.next()) else {
        return Err("the certificate does not have exactly one URI name".into());
    };
    let identity: SpiffeId = uri.parse().map_err(|e| format!("{uri}: {e}"))?;
    if identity.trust_domain() != trust_domain.as_str() {
        return Err(format!("{identity} is not of the trust domain {trust_domain}"));
    }
    match (identity.kind(), identity.node_name()) {
        (IdentityKind::Node, Some(name)) => Ok(PeerNode {
            name: name.to_owned(),
            expires: ca::not_after(leaf).ok_or("the certificate has no end")?,
        }),
        _ => Err(format!("{identity} is not a node")),
    }
}

impl Connected for PeerStream {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for PeerStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.ends.as_mut().poll(cx).is_ready() {
            let why = "the connection has reached the end of its certificate's life";
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, why)));
        }
        Pin::new(&mut self.inner).poll_read(cx, buffer)
    }
}

impl AsyncWrite for PeerStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
