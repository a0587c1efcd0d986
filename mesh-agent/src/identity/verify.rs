//! Who a peer is: a chain to the trust bundle, and exactly one SPIFFE id of our trust domain in its leaf.
//!
//! The rustls verifiers judge a full handshake. [`peer`] judges every connection afterwards, because a resumed one
//! never reaches a verifier: it takes the identity from the certificates behind the session and looks at the expiry
//! again. Whether that identity is the *right* one is for the caller: a source compares with the destination it chose,
//! a destination with what its view says of the source's address. Host names play no part.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_api::identity::{IdentityKind, SpiffeId};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use webpki::{EndEntityCert, KeyUsage};
use x509_parser::{extensions::GeneralName, prelude::FromDer};

use super::TrustBundle;

/// The certificates of a chain, at most.
const CHAIN_MAX: usize = 4;

/// Who the other end of a tunnel proved to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerIdentity {
    /// The identity.
    pub spiffe: SpiffeId,
    /// When the proof ends: the earliest expiry in the chain.
    pub expires: SystemTime,
}

/// Why a peer's certificates prove nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// It showed no certificate.
    #[error("the peer showed no certificate")]
    NoCertificate,
    /// It showed more certificates than a chain may have.
    #[error("a chain of more than {CHAIN_MAX} certificates")]
    ChainTooLong,
    /// A certificate cannot be parsed.
    #[error("a certificate that cannot be parsed")]
    Malformed,
    /// The chain does not lead to the trust bundle, or not now, or not for this use.
    #[error("the chain does not hold: {0}")]
    Chain(webpki::Error),
    /// Expired, or not valid yet.
    #[error("the certificate is not valid now")]
    NotNow,
    /// The leaf has no URI name, or several.
    #[error("{0} URI names where exactly one SPIFFE id is expected")]
    UriNames(usize),
    /// The URI name is not an identity of a mesh.
    #[error("not a SPIFFE id of a workload: {0:?}")]
    NotSpiffe(String),
    /// An identity of another trust domain.
    #[error("{0} is of another trust domain")]
    TrustDomain(SpiffeId),
}

/// A leaf, read.
#[derive(Clone, Debug)]
pub(super) struct Leaf {
    pub spiffe: SpiffeId,
    pub not_before: SystemTime,
    pub expires: SystemTime,
}

/// Judges the certificates behind an established connection at `now`, resumed or not: identity, trust domain, expiry.
/// The chain itself was verified in the full handshake, against the bundle of the credential that owns the session.
pub fn peer(chain: &[CertificateDer<'_>], bundle: &TrustBundle, now: SystemTime) -> Result<PeerIdentity, PeerError> {
    let leaf = read_leaf(chain, bundle)?;
    let mut expires = leaf.expires;
    let mut not_before = leaf.not_before;
    for issuer in chain.iter().skip(1) {
        let (from, until) = validity(issuer)?;
        (not_before, expires) = (not_before.max(from), expires.min(until));
    }
    if now < not_before || now >= expires {
        return Err(PeerError::NotNow);
    }
    if leaf.spiffe.kind() != IdentityKind::Workload {
        return Err(PeerError::NotSpiffe(leaf.spiffe.to_string()));
    }
    Ok(PeerIdentity {
        spiffe: leaf.spiffe,
        expires,
    })
}

/// Judges our own chain as a peer would.
pub(super) fn own(chain: &[CertificateDer<'_>], bundle: &TrustBundle, now: SystemTime) -> Result<Leaf, PeerError> {
    let since_epoch = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let algorithms = super::provider().signature_verification_algorithms;
    let at = UnixTime::since_unix_epoch(since_epoch);
    verify_chain(chain, bundle, &algorithms, at, KeyUsage::client_auth())?;
    verify_chain(chain, bundle, &algorithms, at, KeyUsage::server_auth())?;
    read_leaf(chain, bundle)
}

fn parse<'a>(der: &'a CertificateDer<'_>) -> Result<x509_parser::certificate::X509Certificate<'a>, PeerError> {
    match x509_parser::certificate::X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        _ => Err(PeerError::Malformed),
    }
}

fn instant(seconds: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.max(0).unsigned_abs())
}

fn validity(der: &CertificateDer<'_>) -> Result<(SystemTime, SystemTime), PeerError> {
    let certificate = parse(der)?;
    let validity = certificate.validity();
    Ok((
        instant(validity.not_before.timestamp()),
        instant(validity.not_after.timestamp()),
    ))
}

fn read_leaf(chain: &[CertificateDer<'_>], bundle: &TrustBundle) -> Result<Leaf, PeerError> {
    if chain.len() > CHAIN_MAX {
        return Err(PeerError::ChainTooLong);
    }
    let leaf = parse(chain.first().ok_or(PeerError::NoCertificate)?)?;
    let names = leaf.subject_alternative_name().map_err(|_| PeerError::Malformed)?;
    let mut uris = names
        .iter()
        .flat_map(|names| &names.value.general_names)
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        });
    let (first, others) = (uris.next(), uris.count());
    let uri = match first {
        Some(uri) if others == 0 => uri,
        Some(_) => return Err(PeerError::UriNames(1 + others)),
        None => return Err(PeerError::UriNames(0)),
    };
    let spiffe: SpiffeId = uri
        .parse()
        .map_err(|_| PeerError::NotSpiffe(uri.chars().take(256).collect()))?;
    if spiffe.trust_domain() != bundle.trust_domain().as_str() {
        return Err(PeerError::TrustDomain(spiffe));
    }
    let validity = leaf.validity();
    Ok(Leaf {
        spiffe,
        not_before: instant(validity.not_before.timestamp()),
        expires: instant(validity.not_after.timestamp()),
    })
}

fn verify_chain(
    chain: &[CertificateDer<'_>],
    bundle: &TrustBundle,
    algorithms: &WebPkiSupportedAlgorithms,
    now: UnixTime,
    usage: KeyUsage,
) -> Result<(), PeerError> {
    let (leaf, intermediates) = chain.split_first().ok_or(PeerError::NoCertificate)?;
    if chain.len() > CHAIN_MAX {
        return Err(PeerError::ChainTooLong);
    }
    EndEntityCert::try_from(leaf)
        .map_err(PeerError::Chain)?
        .verify_for_usage(algorithms.all, bundle.anchors(), intermediates, now, usage, None, None)
        .map_err(PeerError::Chain)?;
    Ok(())
}

/// What goes over the wire as an alert is chosen from rustls' own kinds; the details stay in the error's text.
fn to_rustls(error: PeerError) -> Error {
    let kind = match &error {
        PeerError::NoCertificate => return Error::NoCertificatesPresented,
        PeerError::Malformed => CertificateError::BadEncoding,
        PeerError::NotNow => CertificateError::Expired,
        PeerError::Chain(webpki::Error::CertExpired { .. }) => CertificateError::Expired,
        PeerError::Chain(webpki::Error::CertNotValidYet { .. }) => CertificateError::NotValidYet,
        PeerError::Chain(webpki::Error::UnknownIssuer) => CertificateError::UnknownIssuer,
        PeerError::Chain(webpki::Error::InvalidSignatureForPublicKey) => CertificateError::BadSignature,
        _ => CertificateError::Other(rustls::OtherError(Arc::new(error))),
    };
    Error::InvalidCertificate(kind)
}

fn judge(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    bundle: &TrustBundle,
    algorithms: &WebPkiSupportedAlgorithms,
    now: UnixTime,
    usage: KeyUsage,
) -> Result<(), Error> {
    let chain: Vec<CertificateDer<'_>> = std::iter::once(leaf).chain(intermediates).cloned().collect();
    verify_chain(&chain, bundle, algorithms, now, usage)
        .and_then(|()| read_leaf(&chain, bundle).map(drop))
        .map_err(to_rustls)
}

/// The source's judgement of a destination.
#[derive(Debug)]
pub(super) struct ServerVerifier {
    bundle: Arc<TrustBundle>,
    algorithms: WebPkiSupportedAlgorithms,
}

/// The destination's judgement of a source; a certificate is demanded.
#[derive(Debug)]
pub(super) struct ClientVerifier {
    bundle: Arc<TrustBundle>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerVerifier {
    pub(super) fn new(bundle: Arc<TrustBundle>, provider: &CryptoProvider) -> ServerVerifier {
        let algorithms = provider.signature_verification_algorithms;
        ServerVerifier { bundle, algorithms }
    }
}

impl ClientVerifier {
    pub(super) fn new(bundle: Arc<TrustBundle>, provider: &CryptoProvider) -> ClientVerifier {
        let algorithms = provider.signature_verification_algorithms;
        ClientVerifier { bundle, algorithms }
    }
}

fn no_tls12() -> Error {
    Error::General("TLS 1.2 is never spoken here".to_owned())
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        judge(
            leaf,
            intermediates,
            &self.bundle,
            &self.algorithms,
            now,
            KeyUsage::server_auth(),
        )?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // An agent has one certificate for each identity and needs no hint.
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        judge(
            leaf,
            intermediates,
            &self.bundle,
            &self.algorithms,
            now,
            KeyUsage::client_auth(),
        )?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::testing::{HOUR, TestCa, id};

    #[test]
    fn a_peer_is_who_its_one_uri_says_or_nobody() {
        let ca = TestCa::new();
        let now = SystemTime::now();
        let good = "spiffe://test.mesh/ns/shop/sa/front";
        type Case<'a> = (&'a str, &'a [&'a str], fn(&PeerError) -> bool);
        let cases: &[Case<'_>] = &[
            ("no URI", &[], |e| *e == PeerError::UriNames(0)),
            ("two URIs", &[good, "spiffe://test.mesh/ns/shop/sa/cart"], |e| {
                *e == PeerError::UriNames(2)
            }),
            ("the same twice", &[good, good], |e| *e == PeerError::UriNames(2)),
            ("no SPIFFE id", &["https://test.mesh/ns/shop/sa/front"], |e| {
                matches!(e, PeerError::NotSpiffe(_))
            }),
            ("a node", &["spiffe://test.mesh/node/n1"], |e| {
                matches!(e, PeerError::NotSpiffe(_))
            }),
            ("another domain", &["spiffe://other.mesh/ns/shop/sa/front"], |e| {
                matches!(e, PeerError::TrustDomain(_))
            }),
        ];
        for (name, uris, expected) in cases {
            let (chain, _) = ca.leaf(uris, now - HOUR, now + HOUR);
            let error = peer(&chain, &ca.bundle(), now).unwrap_err();
            assert!(expected(&error), "{name}: {error:?}");
        }
        let (chain, _) = ca.leaf(&[good], now - HOUR, now + HOUR);
        let peer = peer(&chain, &ca.bundle(), now).unwrap();
        assert_eq!(peer.spiffe, id("front"));
        assert!(peer.expires <= now + HOUR && peer.expires > now + HOUR - Duration::from_secs(2));
        assert_eq!(super::peer(&[], &ca.bundle(), now), Err(PeerError::NoCertificate));
        let garbage = CertificateDer::from(vec![0x30, 0x03, 1, 2, 3]);
        assert_eq!(super::peer(&[garbage], &ca.bundle(), now), Err(PeerError::Malformed));
    }

    #[test]
    fn time_is_judged_on_every_connection() {
        let ca = TestCa::new();
        let now = SystemTime::now();
        let (chain, _) = ca.leaf(&[id("front").as_str()], now, now + HOUR);
        let cases = [(-10, false), (10, true), (3590, true), (3601, false)];
        for (seconds, good) in cases {
            let at = if seconds < 0 {
                now - Duration::from_secs(10)
            } else {
                now + Duration::from_secs(seconds as u64)
            };
            assert_eq!(peer(&chain, &ca.bundle(), at).is_ok(), good, "{seconds}");
        }
    }

    #[test]
    fn a_chain_leads_to_the_bundle_or_nowhere() {
        let (ours, theirs) = (TestCa::new(), TestCa::new());
        let now = SystemTime::now();
        let (chain, _) = theirs.leaf(&[id("front").as_str()], now - HOUR, now + HOUR);
        assert!(own(&chain, &theirs.bundle(), now).is_ok());
        assert!(matches!(own(&chain, &ours.bundle(), now), Err(PeerError::Chain(_))));
        assert!(matches!(
            own(&chain, &theirs.bundle(), now + 2 * HOUR),
            Err(PeerError::Chain(_))
        ));
        let long: Vec<_> = chain.iter().cycle().take(CHAIN_MAX + 1).cloned().collect();
        assert_eq!(own(&long, &theirs.bundle(), now).unwrap_err(), PeerError::ChainTooLong);
    }
}
