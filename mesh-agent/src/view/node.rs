//! The node's own credential: how the agent shows the controller which node it is.
//!
//! Key and chain live in one file of the state directory, replaced atomically, so that they can never disagree. What is
//! on disk is judged like anything else: it must lead to a trusted root, name this node and be valid now.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use mesh_api::identity::SpiffeId;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime, pem::PemObject};
use webpki::{EndEntityCert, KeyUsage};
use x509_parser::prelude::FromDer;

use super::snapshot::write_atomically;
use crate::identity::TrustBundle;

const FILE_NAME: &str = "node.pem";
/// The certificates of a chain, at most.
const CHAIN_MAX: usize = 4;

/// A key and the chain that proves the node's identity.
#[derive(Debug)]
pub struct NodeCredential {
    chain: Vec<CertificateDer<'static>>,
    key: PrivatePkcs8KeyDer<'static>,
    not_before: SystemTime,
    expires: SystemTime,
}

/// Why a key and chain do not prove the node's identity.
#[derive(Debug, thiserror::Error)]
pub enum NodeCredentialError {
    /// The file cannot be read or written.
    #[error("{path}: {error}")]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// The file is not PEM with a key and certificates.
    #[error("not a key and certificates in PEM")]
    Pem,
    /// The chain is empty or longer than any.
    #[error("a chain of {0} certificates")]
    Length(usize),
    /// A certificate cannot be parsed.
    #[error("a certificate that cannot be parsed")]
    Malformed,
    /// The chain does not lead to a trusted root now.
    #[error("the chain does not hold: {0}")]
    Chain(webpki::Error),
    /// It names somebody else.
    #[error("it does not name {0}")]
    OtherIdentity(SpiffeId),
    /// The key is not the certificate's.
    #[error("the key is not the certificate's")]
    OtherKey,
    /// The key could not be made or the request signed.
    #[error("cannot make a key or a request: {0}")]
    Request(#[from] rcgen::Error),
}

/// A key that no certificate exists for yet, with the request for one.
pub struct Pending {
    key: KeyPair,
    /// The PKCS#10 request, DER.
    pub csr: Vec<u8>,
}

impl Pending {
    /// A new P-256 key and its request.
    pub fn new(node: &SpiffeId) -> Result<Pending, NodeCredentialError> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(node.as_str().try_into()?)];
        let csr = params.serialize_request(&key)?.der().to_vec();
        Ok(Pending { key, csr })
    }

    /// The credential, if the chain is one for this key and node.
    pub fn certified(
        self,
        chain: Vec<Vec<u8>>,
        node: &SpiffeId,
        bundle: &TrustBundle,
        now: SystemTime,
    ) -> Result<NodeCredential, NodeCredentialError> {
        let chain = chain.into_iter().map(CertificateDer::from).collect();
        let key = PrivatePkcs8KeyDer::from(self.key.serialize_der());
        NodeCredential::new(chain, key, node, bundle, now)
    }
}

fn time(seconds: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.max(0).unsigned_abs())
}

impl NodeCredential {
    fn new(
        chain: Vec<CertificateDer<'static>>,
        key: PrivatePkcs8KeyDer<'static>,
        node: &SpiffeId,
        bundle: &TrustBundle,
        now: SystemTime,
    ) -> Result<NodeCredential, NodeCredentialError> {
        let leaf = match chain.split_first() {
            Some((leaf, issuers)) if issuers.len() < CHAIN_MAX => {
                verify(leaf, issuers, bundle, now, KeyUsage::client_auth())?;
                leaf
            }
            _ => return Err(NodeCredentialError::Length(chain.len())),
        };
        if !names_only(leaf, node)? {
            return Err(NodeCredentialError::OtherIdentity(node.clone()));
        }
        let (_, parsed) =
            x509_parser::certificate::X509Certificate::from_der(leaf).map_err(|_| NodeCredentialError::Malformed)?;
        let own = KeyPair::try_from(&key)?;
        if parsed.public_key().subject_public_key.data.as_ref() != rcgen::PublicKeyData::der_bytes(&own) {
            return Err(NodeCredentialError::OtherKey);
        }
        let (not_before, expires) = (
            time(parsed.validity().not_before.timestamp()),
            time(parsed.validity().not_after.timestamp()),
        );
        Ok(NodeCredential {
            chain,
            key,
            not_before,
            expires,
        })
    }

    /// Reads the credential of the state directory; `None` if there is none.
    pub fn load(
        state_dir: &Path,
        node: &SpiffeId,
        bundle: &TrustBundle,
        now: SystemTime,
    ) -> Result<Option<NodeCredential>, NodeCredentialError> {
        let path = state_dir.join(FILE_NAME);
        let pem = match fs::read(&path) {
            Ok(pem) => pem,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(NodeCredentialError::File { path, error }),
        };
        let key = PrivatePkcs8KeyDer::from_pem_slice(&pem).map_err(|_| NodeCredentialError::Pem)?;
        let chain = CertificateDer::pem_slice_iter(&pem)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_| NodeCredentialError::Pem)?;
        NodeCredential::new(chain, key, node, bundle, now).map(Some)
    }

    /// Replaces the credential of the state directory.
    pub fn save(&self, state_dir: &Path) -> Result<(), NodeCredentialError> {
        let path = state_dir.join(FILE_NAME);
        let mut pem = String::new();
        push_pem(&mut pem, "PRIVATE KEY", self.key.secret_pkcs8_der());
        for certificate in &self.chain {
            push_pem(&mut pem, "CERTIFICATE", certificate);
        }
        write_atomically(&path, pem.as_bytes()).map_err(|error| NodeCredentialError::File { path, error })
    }

    /// The chain, leaf first.
    pub fn chain(&self) -> Vec<CertificateDer<'static>> {
        self.chain.clone()
    }

    /// The key.
    pub fn key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(self.key.clone_key())
    }

    /// When it ends.
    pub fn expires(&self) -> SystemTime {
        self.expires
    }

    /// When to ask for another one: at half of its life, up to a tenth of it earlier by `random` (0..=1).
    pub fn renew_at(&self, random: f64) -> SystemTime {
        let life = self.expires.duration_since(self.not_before).unwrap_or_default();
        self.not_before + life.mul_f64(0.5 - 0.1 * random.clamp(0.0, 1.0))
    }
}

fn push_pem(out: &mut String, label: &str, der: &[u8]) {
    let text = BASE64_STANDARD.encode(der);
    out.push_str(&format!("-----BEGIN {label}-----\n"));
    let mut rest = text.as_str();
    while !rest.is_empty() {
        // Base64 is ASCII, so that every place is a boundary.
        let (line, next) = rest.split_at(rest.len().min(64));
        out.push_str(line);
        out.push('\n');
        rest = next;
    }
    out.push_str(&format!("-----END {label}-----\n"));
}

/// Whether the chain leads to a root of the bundle now and may be used so.
pub(super) fn verify(
    leaf: &CertificateDer<'_>,
    issuers: &[CertificateDer<'_>],
    bundle: &TrustBundle,
    now: SystemTime,
    usage: KeyUsage,
) -> Result<(), NodeCredentialError> {
    let since_epoch = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let algorithms = crate::identity::provider().signature_verification_algorithms;
    EndEntityCert::try_from(leaf)
        .map_err(NodeCredentialError::Chain)?
        .verify_for_usage(
            algorithms.all,
            bundle.anchors(),
            issuers,
            UnixTime::since_unix_epoch(since_epoch),
            usage,
            None,
            None,
        )
        .map_err(NodeCredentialError::Chain)?;
    Ok(())
}

/// Whether the leaf has exactly one URI name, and this one.
pub(super) fn names_only(leaf: &CertificateDer<'_>, identity: &SpiffeId) -> Result<bool, NodeCredentialError> {
    let leaf = EndEntityCert::try_from(leaf).map_err(NodeCredentialError::Chain)?;
    let mut names = leaf.valid_uri_names();
    Ok(names.next() == Some(identity.as_str()) && names.next().is_none())
}

/// The roots of a PEM file, and `more` besides.
pub fn bundle(
    file: &Path,
    more: &[Vec<u8>],
    trust_domain: &mesh_api::identity::TrustDomain,
) -> Result<Arc<TrustBundle>, String> {
    let pem = match fs::read(file) {
        Ok(pem) => pem,
        // What the controller gave us last time is enough.
        Err(error) if error.kind() == io::ErrorKind::NotFound && !more.is_empty() => Vec::new(),
        Err(error) => return Err(format!("{}: {error}", file.display())),
    };
    let mut roots = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| format!("{}: {error}", file.display()))?;
    for root in more {
        if !roots.iter().any(|known| known.as_ref() == root.as_slice()) {
            roots.push(CertificateDer::from(root.clone()));
        }
    }
    TrustBundle::new(trust_domain.clone(), roots)
        .map(Arc::new)
        .map_err(|error| format!("{}: {error}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::testing::{HOUR, TestCa, domain};

    fn node(name: &str) -> SpiffeId {
        SpiffeId::node(&domain(), name).unwrap()
    }

    #[test]
    fn a_credential_is_kept_and_judged_again_when_loaded() {
        let (ca, other) = (TestCa::new(), TestCa::new());
        let dir = tempfile::tempdir().unwrap();
        let now = SystemTime::now();
        let id = node("node-1");
        assert!(
            NodeCredential::load(dir.path(), &id, &ca.bundle(), now)
                .unwrap()
                .is_none()
        );
        let pending = Pending::new(&id).unwrap();
        let chain: Vec<Vec<u8>> = ca
            .sign(&pending.csr, &id, now - HOUR, now + HOUR)
            .iter()
            .map(|c| c.to_vec())
            .collect();
        let stranger = Pending::new(&id).unwrap();
        let taken = stranger.certified(chain.clone(), &id, &ca.bundle(), now);
        assert!(matches!(taken, Err(NodeCredentialError::OtherKey)), "{taken:?}");
        let credential = pending.certified(chain, &id, &ca.bundle(), now).unwrap();
        credential.save(dir.path()).unwrap();

        let load = |id: &SpiffeId, bundle: &TrustBundle, now| NodeCredential::load(dir.path(), id, bundle, now);
        let loaded = load(&id, &ca.bundle(), now).unwrap().unwrap();
        assert_eq!(loaded.chain(), credential.chain());
        assert_eq!(loaded.expires(), credential.expires());
        let half = loaded.renew_at(0.0);
        assert!(
            half <= now + Duration::from_secs(1) && half >= now - Duration::from_secs(2),
            "half of two hours"
        );
        assert!(load(&id, &other.bundle(), now).is_err(), "another CA");
        assert!(load(&node("node-2"), &ca.bundle(), now).is_err(), "another node");
        assert!(load(&id, &ca.bundle(), now + HOUR * 2).is_err(), "expired");
        let mode = std::os::unix::fs::MetadataExt::mode(&fs::metadata(dir.path().join(FILE_NAME)).unwrap());
        assert_eq!(mode & 0o777, 0o600);
        fs::write(dir.path().join(FILE_NAME), "garbage").unwrap();
        assert!(matches!(load(&id, &ca.bundle(), now), Err(NodeCredentialError::Pem)));
    }
}
