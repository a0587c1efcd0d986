//! Credentials: the key and chain that prove an identity, the trust bundle that judges a peer's, and the TLS
//! configurations made of both.
//!
//! The control thread makes them ([`issue`]), every worker reads them from one [`CredentialStore`], and the tunnels use
//! them. rustls resumes a session without asking the verifier again, so the rules here are strict: each credential has
//! configurations, resolver and session stores of its own, a new bundle makes new credentials, and [`verify::peer`]
//! judges every connection by the certificates that stand behind it, resumed or not.

pub mod issue;
pub mod keep;
pub mod verify;

#[cfg(test)]
pub(crate) mod testing;

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use foldhash::fast::RandomState;
use mesh_api::identity::{SpiffeId, TrustDomain};
use rustls::{
    ClientConfig, ServerConfig,
    client::Resumption,
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, PrivateKeyDer, TrustAnchor, UnixTime},
    server::ServerSessionMemoryCache,
    sign::{CertifiedKey, SingleCertAndKey},
    time_provider::TimeProvider,
};
use tokio::{sync::watch, time::Instant};

use crate::net::{Clock, SystemClock};

pub use verify::{PeerError, PeerIdentity};

/// Sessions that one credential keeps as a server. The oldest go first.
const SERVER_SESSIONS_MAX: usize = 4096;
/// Peers that one credential keeps sessions of, as a client.
const CLIENT_SESSION_PEERS_MAX: usize = 1024;
/// Tickets given out with each handshake: every connection brings the next one's.
const TICKETS_PER_HANDSHAKE: usize = 1;

/// What a tunnel carries; each is an ALPN name on the original port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Alpn {
    /// `nodemesh-http/1`: HTTP/1.1 requests one after another, or HTTP/2.
    Http,
    /// `nodemesh-tcp/1`: one flow after another, framed.
    Tcp,
}

impl Alpn {
    /// The name on the wire.
    pub fn as_bytes(self) -> &'static [u8] {
        match self {
            Alpn::Http => b"nodemesh-http/1",
            Alpn::Tcp => b"nodemesh-tcp/1",
        }
    }

    /// The ALPN of a name on the wire.
    pub fn from_bytes(name: &[u8]) -> Option<Alpn> {
        [Alpn::Http, Alpn::Tcp].into_iter().find(|alpn| alpn.as_bytes() == name)
    }
}

/// The roots that certificates of a trust domain must lead to.
pub struct TrustBundle {
    trust_domain: TrustDomain,
    roots: Vec<CertificateDer<'static>>,
    anchors: Vec<TrustAnchor<'static>>,
}

/// Why there is no credential or bundle.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// A root is not a certificate that can be trusted from.
    #[error("a root of the trust bundle is not a usable certificate: {0}")]
    Root(webpki::Error),
    /// There is no root at all.
    #[error("the trust bundle is empty")]
    EmptyBundle,
    /// The certificate is not one that a peer would accept.
    #[error("the issued certificate is not usable: {0}")]
    Certificate(#[from] PeerError),
    /// The certificate names somebody else.
    #[error("the issued certificate names {0}")]
    OtherIdentity(SpiffeId),
    /// rustls does not take the key or the chain.
    #[error("the key or chain is not usable: {0}")]
    Key(#[from] rustls::Error),
}

impl TrustBundle {
    /// A bundle of DER certificates.
    pub fn new(trust_domain: TrustDomain, roots: Vec<CertificateDer<'static>>) -> Result<TrustBundle, CredentialError> {
        if roots.is_empty() {
            return Err(CredentialError::EmptyBundle);
        }
        let anchors = roots
            .iter()
            .map(|root| webpki::anchor_from_trusted_cert(root).map(|anchor| anchor.to_owned()))
            .collect::<Result<Vec<_>, _>>()
            .map_err(CredentialError::Root)?;
        Ok(TrustBundle {
            trust_domain,
            roots,
            anchors,
        })
    }

    /// The trust domain.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The roots, as they came.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// The roots as webpki wants them.
    pub(crate) fn anchors(&self) -> &[TrustAnchor<'static>] {
        &self.anchors
    }
}

impl fmt::Debug for TrustBundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TrustBundle({}, {} roots)", self.trust_domain, self.roots.len())
    }
}

/// Tells one credential from every other one, older ones of the same identity too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CredentialEpoch(u64);

/// A key and chain for one identity, and what TLS needs to use them. Immutable: a renewal or a new bundle makes another.
pub struct Credential {
    identity: SpiffeId,
    epoch: CredentialEpoch,
    not_before: SystemTime,
    expires: SystemTime,
    key: Arc<CertifiedKey>,
    bundle: Arc<TrustBundle>,
    client_http: Arc<ClientConfig>,
    client_tcp: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl Credential {
    /// Puts a credential together. The leaf must name `identity`, lead to `bundle` at `now` and fit the key.
    pub fn new(
        identity: SpiffeId,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        bundle: Arc<TrustBundle>,
        now: SystemTime,
    ) -> Result<Credential, CredentialError> {
        let key = Arc::new(CertifiedKey::from_der(chain, key, &provider())?);
        Credential::build(identity, key, bundle, now)
    }

    /// The same key and chain, judging peers by another bundle.
    pub fn with_bundle(&self, bundle: Arc<TrustBundle>, now: SystemTime) -> Result<Credential, CredentialError> {
        Credential::build(self.identity.clone(), self.key.clone(), bundle, now)
    }

    fn build(
        identity: SpiffeId,
        key: Arc<CertifiedKey>,
        bundle: Arc<TrustBundle>,
        now: SystemTime,
    ) -> Result<Credential, CredentialError> {
        static EPOCHS: AtomicU64 = AtomicU64::new(1);
        let leaf = verify::own(&key.cert, &bundle, now)?;
        if leaf.spiffe != identity {
            return Err(CredentialError::OtherIdentity(leaf.spiffe));
        }
        let provider = Arc::new(provider());
        Ok(Credential {
            epoch: CredentialEpoch(EPOCHS.fetch_add(1, Ordering::Relaxed)),
            not_before: leaf.not_before,
            expires: leaf.expires,
            client_http: client_config(&provider, &key, &bundle, Alpn::Http)?,
            client_tcp: client_config(&provider, &key, &bundle, Alpn::Tcp)?,
            server: server_config(&provider, &key, &bundle)?,
            identity,
            key,
            bundle,
        })
    }

    /// Whom it proves.
    pub fn identity(&self) -> &SpiffeId {
        &self.identity
    }

    /// Which one it is.
    pub fn epoch(&self) -> CredentialEpoch {
        self.epoch
    }

    /// When the certificate becomes valid.
    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    /// When the certificate expires.
    pub fn expires(&self) -> SystemTime {
        self.expires
    }

    /// What is left of its life.
    pub fn remaining(&self, now: SystemTime) -> Duration {
        self.expires.duration_since(now).unwrap_or_default()
    }

    /// The bundle that peers are judged by.
    pub fn bundle(&self) -> &Arc<TrustBundle> {
        &self.bundle
    }

    /// To open tunnels with.
    pub fn client(&self, alpn: Alpn) -> &Arc<ClientConfig> {
        match alpn {
            Alpn::Http => &self.client_http,
            Alpn::Tcp => &self.client_tcp,
        }
    }

    /// To accept tunnels with; both ALPN names are offered.
    pub fn server(&self) -> &Arc<ServerConfig> {
        &self.server
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credential")
            .field("identity", &self.identity)
            .field("epoch", &self.epoch)
            .field("expires", &self.expires)
            .finish_non_exhaustive()
    }
}

/// The one crypto provider. X25519MLKEM768 comes first among its key exchanges (feature `prefer-post-quantum`).
pub fn provider() -> CryptoProvider {
    let mut provider = aws_lc_rs::default_provider();
    provider.cipher_suites = vec![
        aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
        aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
        aws_lc_rs::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    provider
}

/// The agent's own wall clock, for rustls.
#[derive(Debug)]
struct WallTime;

impl TimeProvider for WallTime {
    fn current_time(&self) -> Option<UnixTime> {
        let since = SystemClock.wall().duration_since(SystemTime::UNIX_EPOCH).ok()?;
        Some(UnixTime::since_unix_epoch(since))
    }
}

fn client_config(
    provider: &Arc<CryptoProvider>,
    key: &Arc<CertifiedKey>,
    bundle: &Arc<TrustBundle>,
    alpn: Alpn,
) -> Result<Arc<ClientConfig>, rustls::Error> {
    let mut config = ClientConfig::builder_with_details(provider.clone(), Arc::new(WallTime))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verify::ServerVerifier::new(bundle.clone(), provider)))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(key.clone())));
    config.alpn_protocols = vec![alpn.as_bytes().to_vec()];
    config.enable_sni = false;
    // One store for each configuration: a ticket of one ALPN, credential or bundle is never offered under another.
    config.resumption = Resumption::in_memory_sessions(CLIENT_SESSION_PEERS_MAX);
    Ok(Arc::new(config))
}

fn server_config(
    provider: &Arc<CryptoProvider>,
    key: &Arc<CertifiedKey>,
    bundle: &Arc<TrustBundle>,
) -> Result<Arc<ServerConfig>, rustls::Error> {
    let mut config = ServerConfig::builder_with_details(provider.clone(), Arc::new(WallTime))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(verify::ClientVerifier::new(bundle.clone(), provider)))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(key.clone())));
    config.alpn_protocols = vec![Alpn::Http.as_bytes().to_vec(), Alpn::Tcp.as_bytes().to_vec()];
    config.session_storage = ServerSessionMemoryCache::new(SERVER_SESSIONS_MAX);
    config.send_tls13_tickets = TICKETS_PER_HANDSHAKE;
    Ok(Arc::new(config))
}

type Credentials = HashMap<SpiffeId, Arc<Credential>, RandomState>;

/// The credentials of this node's identities: written by the control thread, read by all with one pointer load.
pub struct CredentialStore {
    current: ArcSwap<Credentials>,
    changed: watch::Sender<()>,
}

impl Default for CredentialStore {
    fn default() -> Self {
        CredentialStore {
            current: ArcSwap::default(),
            changed: watch::Sender::new(()),
        }
    }
}

impl CredentialStore {
    /// An empty store.
    pub fn new() -> Arc<CredentialStore> {
        Arc::default()
    }

    /// The credential of `identity`, if it is there. It may have expired: see [`CredentialStore::valid`].
    pub fn get(&self, identity: &SpiffeId) -> Option<Arc<Credential>> {
        self.current.load().get(identity).cloned()
    }

    /// The credential of `identity`, if it is there and holds at `now`.
    pub fn valid(&self, identity: &SpiffeId, now: SystemTime) -> Option<Arc<Credential>> {
        self.get(identity).filter(|credential| credential.expires > now)
    }

    /// Waits until `identity` has a credential; `None` when it had none by `deadline`.
    pub async fn ready(&self, identity: &SpiffeId, deadline: Instant) -> Option<Arc<Credential>> {
        let mut changed = self.changed.subscribe();
        loop {
            changed.mark_unchanged();
            if let Some(credential) = self.get(identity) {
                return Some(credential);
            }
            tokio::time::timeout_at(deadline, changed.changed()).await.ok()?.ok()?;
        }
    }

    /// A receiver that is marked as changed whenever a credential comes or goes.
    pub fn subscribe(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// All credentials, for status.
    pub fn all(&self) -> Vec<Arc<Credential>> {
        self.current.load().values().cloned().collect()
    }

    /// Takes a credential in, in place of an older one of its identity.
    pub fn put(&self, credential: Credential) {
        let credential = Arc::new(credential);
        self.edit(|all| {
            all.insert(credential.identity.clone(), credential.clone());
        });
    }

    /// Drops the credential of an identity that left the node.
    pub fn remove(&self, identity: &SpiffeId) {
        self.edit(|all| {
            all.remove(identity);
        });
    }

    /// Rebuilds every credential for a new bundle. One that does not lead to it any more stays as it is: its own peers
    /// decide what it is still worth, and its renewal comes from the new bundle's CA.
    pub fn set_bundle(&self, bundle: &Arc<TrustBundle>, now: SystemTime) {
        self.edit(|all| {
            for credential in all.values_mut() {
                if let Ok(rebuilt) = credential.with_bundle(bundle.clone(), now) {
                    *credential = Arc::new(rebuilt);
                }
            }
        });
    }

    fn edit(&self, change: impl Fn(&mut Credentials)) {
        self.current.rcu(|all| {
            let mut all = Credentials::clone(all);
            change(&mut all);
            all
        });
        self.changed.send_replace(());
    }
}

impl fmt::Debug for CredentialStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.current.load().keys()).finish()
    }
}
