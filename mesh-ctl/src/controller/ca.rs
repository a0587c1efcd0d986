//! The certificate authority: who signs, what a certificate of this mesh looks like, and the CA whose key we hold.
//!
//! An [`Authority`] signs one checked [`SigningRequest`]; whether the asker may have that identity was decided before
//! (`control.rs`) and is not asked again here. The subject, the names and the usages come from the request's checked
//! fields, never from what a CSR asks for: of the CSR only the public key is used, after its signature was verified.

use std::{
    future::Future,
    net::IpAddr,
    pin::Pin,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use mesh_api::identity::{SpiffeId, TrustDomain};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType,
    SerialNumber,
};
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, PrivatePkcs8KeyDer};

/// A certificate's life begins this long before it is signed, for clocks that run behind.
pub const BACKDATE: Duration = Duration::from_secs(30);
/// No workload or node certificate lives longer.
pub const SVID_TTL_MAX: Duration = Duration::from_secs(24 * 3600);
/// The life of the embedded root.
const ROOT_TTL: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// The longest CSR that is looked at.
pub const CSR_BYTES_MAX: usize = 4096;

/// Why a certificate was not signed.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// The request is not a CSR with a valid signature of its own key.
    #[error("the signing request is malformed: {0}")]
    Request(String),
    /// The key is not ECDSA P-256.
    #[error("the signing request has a key that is not ECDSA P-256")]
    KeyType,
    /// The CSR asks for a name other than the identity.
    #[error("the signing request names {found:?}, expected only {expected}")]
    Name {
        /// What the CSR says.
        found: String,
        /// What it may say.
        expected: SpiffeId,
    },
    /// The authority itself failed.
    #[error("the authority cannot sign: {0}")]
    Authority(String),
}

/// A CSR whose signature was verified and whose name is the identity that was permitted.
pub struct SigningRequest {
    public_key: rcgen::PublicKey,
    /// The one name in the certificate.
    pub identity: SpiffeId,
    /// How long the certificate should live; at most [`SVID_TTL_MAX`].
    pub ttl: Duration,
}

/// A signed certificate.
#[derive(Debug)]
pub struct Issued {
    /// The certificate, then its intermediates; the root is in the bundle.
    pub chain: Vec<CertificateDer<'static>>,
}

/// The future of a signature: an authority may be a remote one.
pub type Signing<'a> = Pin<Box<dyn Future<Output = Result<Issued, SignError>> + Send + 'a>>;

/// Who signs certificates.
pub trait Authority: Send + Sync {
    /// The roots that prove this authority's signatures, the present one first.
    fn bundle(&self) -> Vec<CertificateDer<'static>>;
    /// Signs a request that was permitted.
    fn sign<'a>(&'a self, request: &'a SigningRequest, now: SystemTime) -> Signing<'a>;
    /// Makes the controller's own serving certificate with a fresh key.
    fn serving(&self, now: SystemTime, ttl: Duration, names: &[String]) -> Result<Serving, SignError>;
}

/// A key and its chain for the controller's own port.
pub struct Serving {
    /// The chain.
    pub chain: Vec<CertificateDer<'static>>,
    /// The key.
    pub key: PrivateKeyDer<'static>,
}

impl SigningRequest {
    /// Checks a CSR in DER against the identity that the asker may have.
    pub fn new(csr: &[u8], identity: SpiffeId, ttl: Duration) -> Result<SigningRequest, SignError> {
        if csr.len() > CSR_BYTES_MAX {
            return Err(SignError::Request(format!("longer than {CSR_BYTES_MAX} bytes")));
        }
        let csr = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(csr))
            .map_err(|e| SignError::Request(e.to_string()))?;
        if PublicKeyData::algorithm(&csr.public_key) != &PKCS_ECDSA_P256_SHA256 {
            return Err(SignError::KeyType);
        }
        for name in &csr.params.subject_alt_names {
            match name {
                SanType::URI(uri) if uri.as_str() == identity.as_str() => {}
                other => {
                    return Err(SignError::Name {
                        found: format!("{other:?}"),
                        expected: identity,
                    });
                }
            }
        }
        Ok(SigningRequest {
            public_key: csr.public_key,
            identity,
            ttl: ttl.min(SVID_TTL_MAX),
        })
    }
}

/// A CA whose key is here: a root of our own, or an intermediate that somebody else's root signed.
pub struct SigningCa {
    issuer: Issuer<'static, KeyPair>,
    /// What stands between a leaf and the root.
    intermediates: Vec<CertificateDer<'static>>,
    roots: Vec<CertificateDer<'static>>,
    not_after: SystemTime,
    trust_domain: TrustDomain,
}

fn authority_error(error: rcgen::Error) -> SignError {
    SignError::Authority(error.to_string())
}

/// A random positive serial of 16 bytes (RFC 5280 §4.1.2.2 allows 20).
fn serial() -> SerialNumber {
    let mut bytes: [u8; 16] = rand::random();
    bytes[0] &= 0x7f;
    SerialNumber::from_slice(&bytes)
}

/// Parameters common to every certificate; `rcgen` names time by a type of its own, reached from its epoch helper.
fn params(not_before: SystemTime, not_after: SystemTime) -> CertificateParams {
    let since_epoch = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let mut params = CertificateParams::default();
    params.not_before = epoch + since_epoch(not_before);
    params.not_after = epoch + since_epoch(not_after);
    params.serial_number = Some(serial());
    params.distinguished_name = DistinguishedName::new();
    params.use_authority_key_identifier_extension = true;
    params
}

/// Why a CA cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// A new root could not be made.
    #[error("cannot make a root: {0}")]
    Make(String),
    /// The key or the certificates cannot be read, or do not belong together.
    #[error("{0}")]
    Unusable(String),
}

/// A key in PKCS #8 and its self-signed certificate.
pub struct NewRoot {
    /// The key, DER.
    pub key: Vec<u8>,
    /// The certificate.
    pub certificate: CertificateDer<'static>,
}

impl SigningCa {
    /// Takes a key with its certificate, the certificates up to the root, and the roots. Without roots, the last of the
    /// chain must be self-signed and is the root.
    pub fn new(
        key: &PrivateKeyDer<'_>,
        chain: Vec<CertificateDer<'static>>,
        roots: Vec<CertificateDer<'static>>,
        trust_domain: &TrustDomain,
    ) -> Result<SigningCa, CaError> {
        let unusable = |what: &str| CaError::Unusable(what.to_owned());
        let key = KeyPair::try_from(key).map_err(|e| CaError::Unusable(format!("the key: {e}")))?;
        let signing = chain.first().ok_or_else(|| unusable("there is no certificate"))?;
        let (_, parsed) = x509_parser::parse_x509_certificate(signing)
            .map_err(|e| CaError::Unusable(format!("the certificate: {e}")))?;
        if !parsed.is_ca() {
            return Err(unusable("the certificate is not one of a CA"));
        }
        if parsed.public_key().raw != key.subject_public_key_info().as_slice() {
            return Err(unusable("the key is not the certificate's"));
        }
        let self_signed = |der: &CertificateDer<'_>| {
            x509_parser::parse_x509_certificate(der).is_ok_and(|(_, c)| c.subject() == c.issuer())
        };
        let roots = match (roots.is_empty(), chain.last()) {
            (false, _) => roots,
            (true, Some(last)) if self_signed(last) => vec![last.clone()],
            _ => {
                return Err(unusable(
                    "the chain does not end in a self-signed root, and no root is given",
                ));
            }
        };
        let intermediates: Vec<_> = chain.iter().filter(|der| !self_signed(der)).cloned().collect();
        verify_chain(signing, &intermediates, &roots)?;
        let not_after = chain.iter().filter_map(not_after).min();
        let not_after = not_after.ok_or_else(|| unusable("the certificate has no end"))?;
        let issuer = Issuer::from_ca_cert_der(signing, key).map_err(|e| CaError::Unusable(e.to_string()))?;
        Ok(SigningCa {
            issuer,
            intermediates,
            roots,
            not_after,
            trust_domain: trust_domain.clone(),
        })
    }

    /// Makes a key and a root for a trust domain.
    pub fn new_root(trust_domain: &TrustDomain, now: SystemTime) -> Result<NewRoot, CaError> {
        let make = || {
            let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
            let mut root = params(now - BACKDATE, now + ROOT_TTL);
            root.distinguished_name
                .push(DnType::CommonName, format!("Nodemesh root of {trust_domain}"));
            root.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
            root.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
            // SPIFFE X509-SVID §3.2: a signing certificate may carry the trust domain's own id.
            root.subject_alt_names = vec![SanType::URI(format!("spiffe://{trust_domain}").try_into()?)];
            let certificate = root.self_signed(&key)?.der().clone();
            Ok(NewRoot {
                key: key.serialize_der(),
                certificate,
            })
        };
        make().map_err(|e: rcgen::Error| CaError::Make(e.to_string()))
    }

    /// The end of the signing certificate's life.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }
}

/// Each certificate must be signed by the next, and the last by a root: an agent would refuse what is not.
fn verify_chain(
    signing: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    roots: &[CertificateDer<'_>],
) -> Result<(), CaError> {
    let parse =
        |der: &'_ CertificateDer<'_>| x509_parser::parse_x509_certificate(der).map(|(_, c)| c.subject().to_string());
    if roots.iter().any(|root| root == signing) {
        return Ok(());
    }
    let mut below = signing;
    for above in intermediates.iter().skip(1).chain(roots) {
        let (Ok((_, lower)), Ok((_, upper))) = (
            x509_parser::parse_x509_certificate(below),
            x509_parser::parse_x509_certificate(above),
        ) else {
            return Err(CaError::Unusable("a certificate of the chain cannot be read".into()));
        };
        if lower.issuer() == upper.subject() {
            if roots.iter().any(|root| root == above) {
                return Ok(());
            }
            below = above;
        }
    }
    let name = parse(below).unwrap_or_default();
    Err(CaError::Unusable(format!("no given root has signed {name}")))
}

/// The textual form of RFC 7468.
pub fn pem(label: &str, der: &[u8]) -> String {
    let text = BASE64_STANDARD.encode(der);
    let mut pem = format!("-----BEGIN {label}-----\n");
    for line in text.as_bytes().chunks(64) {
        pem.push_str(&String::from_utf8_lossy(line));
        pem.push('\n');
    }
    pem + &format!("-----END {label}-----\n")
}

/// The end of a certificate's life.
pub fn not_after(certificate: &CertificateDer<'_>) -> Option<SystemTime> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let seconds = u64::try_from(parsed.validity().not_after.timestamp()).ok()?;
    Some(UNIX_EPOCH + Duration::from_secs(seconds))
}

impl SigningCa {
    fn chain(&self, leaf: &CertificateDer<'static>) -> Vec<CertificateDer<'static>> {
        std::iter::once(leaf).chain(&self.intermediates).cloned().collect()
    }
}

impl Authority for SigningCa {
    fn bundle(&self) -> Vec<CertificateDer<'static>> {
        self.roots.clone()
    }

    fn sign<'a>(&'a self, request: &'a SigningRequest, now: SystemTime) -> Signing<'a> {
        Box::pin(std::future::ready((|| {
            let not_after = (now + request.ttl.min(SVID_TTL_MAX)).min(self.not_after);
            let mut leaf = params(now - BACKDATE, not_after);
            leaf.is_ca = IsCa::ExplicitNoCa;
            leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
            leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
            let uri = request.identity.as_str().try_into().map_err(authority_error)?;
            leaf.subject_alt_names = vec![SanType::URI(uri)];
            let certificate = leaf
                .signed_by(&request.public_key, &self.issuer)
                .map_err(authority_error)?;
            Ok(Issued {
                chain: self.chain(certificate.der()),
            })
        })()))
    }

    fn serving(&self, now: SystemTime, ttl: Duration, names: &[String]) -> Result<Serving, SignError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(authority_error)?;
        let mut leaf = params(now - BACKDATE, (now + ttl).min(self.not_after));
        leaf.is_ca = IsCa::ExplicitNoCa;
        leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let uri = SpiffeId::controller(&self.trust_domain);
        leaf.subject_alt_names = vec![SanType::URI(uri.as_str().try_into().map_err(authority_error)?)];
        for name in names {
            leaf.subject_alt_names.push(match name.parse::<IpAddr>() {
                Ok(ip) => SanType::IpAddress(ip),
                Err(_) => SanType::DnsName(name.as_str().try_into().map_err(authority_error)?),
            });
        }
        let certificate = leaf.signed_by(&key, &self.issuer).map_err(authority_error)?;
        Ok(Serving {
            chain: self.chain(certificate.der()),
            key: PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn csr(key: &KeyPair, names: &[&str]) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = names.iter().map(|n| SanType::URI((*n).try_into().unwrap())).collect();
        params.serialize_request(key).unwrap().der().to_vec()
    }

    fn domain() -> TrustDomain {
        TrustDomain::new("cluster.local").unwrap()
    }

    fn authority() -> (SigningCa, SystemTime) {
        let now = SystemTime::now();
        let root = SigningCa::new_root(&domain(), now).unwrap();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(root.key));
        (
            SigningCa::new(&key, vec![root.certificate], vec![], &domain()).unwrap(),
            now,
        )
    }

    /// Somebody's root, and an intermediate that it has signed.
    fn intermediate() -> (Vec<u8>, CertificateDer<'static>, CertificateDer<'static>) {
        let now = SystemTime::now();
        let root_key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
        let ca = |name: &str| {
            let mut ca = params(now - BACKDATE, now + SVID_TTL_MAX);
            ca.distinguished_name.push(DnType::CommonName, name);
            ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            ca.key_usages = vec![KeyUsagePurpose::KeyCertSign];
            ca
        };
        let root = ca("corporate root").self_signed(&root_key).unwrap().der().clone();
        let issuer = Issuer::from_ca_cert_der(&root, root_key).unwrap();
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let middle = ca("mesh intermediate").signed_by(&key, &issuer).unwrap().der().clone();
        (key.serialize_der(), middle, root)
    }

    #[tokio::test]
    async fn an_intermediate_signs_and_stands_in_the_chain_and_its_root_in_the_bundle() {
        let (key, middle, root) = intermediate();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key));
        let ways = [
            (vec![middle.clone()], vec![root.clone()]),
            (vec![middle.clone(), root.clone()], vec![]),
            (vec![middle.clone(), root.clone()], vec![root.clone()]),
        ];
        for (chain, roots) in ways {
            let ca = SigningCa::new(&key, chain, roots, &domain()).unwrap();
            assert_eq!(ca.bundle(), std::slice::from_ref(&root));
            let identity: SpiffeId = "spiffe://cluster.local/ns/shop/sa/front".parse().unwrap();
            let own = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
            let request = SigningRequest::new(&csr(&own, &[]), identity, SVID_TTL_MAX * 9).unwrap();
            let issued = ca.sign(&request, SystemTime::now()).await.unwrap();
            assert_eq!(issued.chain.len(), 2);
            let anchor = webpki::anchor_from_trusted_cert(&root).unwrap();
            let end = webpki::EndEntityCert::try_from(&issued.chain[0]).unwrap();
            end.verify_for_usage(
                webpki::ALL_VERIFICATION_ALGS,
                &[anchor],
                &issued.chain[1..],
                rustls_pki_types::UnixTime::now(),
                webpki::KeyUsage::client_auth(),
                None,
                None,
            )
            .unwrap();
            assert!(
                not_after(&issued.chain[0]) <= not_after(&middle),
                "it would outlive its issuer"
            );
        }
    }

    #[test]
    fn a_key_and_certificates_that_do_not_belong_together_are_refused() {
        let (key, middle, root) = intermediate();
        let (other_key, _, other_root) = intermediate();
        let der = |key: &[u8]| PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.to_vec()));
        let own = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let mut leaf = CertificateParams::default();
        leaf.is_ca = IsCa::ExplicitNoCa;
        let leaf = leaf.self_signed(&own).unwrap().der().clone();
        let cases = [
            (der(&key), vec![], vec![root.clone()], "no certificate"),
            (der(&key), vec![middle.clone()], vec![], "no root is given"),
            (der(&key), vec![middle.clone()], vec![leaf.clone()], "no given root"),
            (
                der(&other_key),
                vec![middle.clone()],
                vec![root],
                "not the certificate's",
            ),
            (
                der(&own.serialize_der()),
                vec![leaf],
                vec![other_root],
                "not one of a CA",
            ),
        ];
        for (key, chain, roots, expected) in cases {
            let error = SigningCa::new(&key, chain, roots, &domain()).err().unwrap().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[tokio::test]
    async fn a_certificate_holds_the_identity_and_the_bounds_and_nothing_else() {
        let (ca, now) = authority();
        let identity: SpiffeId = "spiffe://cluster.local/ns/shop/sa/front".parse().unwrap();
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let request =
            SigningRequest::new(&csr(&key, &[identity.as_str()]), identity.clone(), SVID_TTL_MAX * 9).unwrap();
        let issued = ca.sign(&request, now).await.unwrap();
        let (_, parsed) = x509_parser::parse_x509_certificate(&issued.chain[0]).unwrap();
        let names = parsed.subject_alternative_name().unwrap().unwrap();
        assert_eq!(names.value.general_names.len(), 1);
        assert!(names.value.general_names[0].to_string().contains(identity.as_str()));
        let life = parsed.validity().not_after.timestamp() - parsed.validity().not_before.timestamp();
        assert_eq!(life as u64, (SVID_TTL_MAX + BACKDATE).as_secs());
        let usage = parsed.extended_key_usage().unwrap().unwrap().value;
        assert!(usage.server_auth && usage.client_auth && !usage.any);
        assert!(!parsed.is_ca());

        let bundle = ca.bundle();
        let anchor = webpki::anchor_from_trusted_cert(&bundle[0]).unwrap();
        let end = webpki::EndEntityCert::try_from(&issued.chain[0]).unwrap();
        let verify = |at: SystemTime| {
            let at = rustls_pki_types::UnixTime::since_unix_epoch(at.duration_since(UNIX_EPOCH).unwrap());
            end.verify_for_usage(
                webpki::ALL_VERIFICATION_ALGS,
                std::slice::from_ref(&anchor),
                &[],
                at,
                webpki::KeyUsage::client_auth(),
                None,
                None,
            )
            .map(|_| ())
        };
        verify(now - Duration::from_secs(10)).unwrap();
        verify(now + Duration::from_secs(3600)).unwrap();
        verify(now + SVID_TTL_MAX + Duration::from_secs(2)).unwrap_err();
    }

    #[test]
    fn requests_that_lie_are_refused() {
        let identity: SpiffeId = "spiffe://cluster.local/ns/shop/sa/front".parse().unwrap();
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let good = csr(&key, &[identity.as_str()]);
        let check = |der: &[u8]| SigningRequest::new(der, identity.clone(), SVID_TTL_MAX).map(|_| ());
        check(&good).unwrap();
        check(&csr(&key, &[])).unwrap();
        assert!(matches!(
            check(&csr(&key, &["spiffe://cluster.local/ns/shop/sa/bank"])),
            Err(SignError::Name { .. })
        ));
        let p384 = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
        assert!(matches!(check(&csr(&p384, &[])), Err(SignError::KeyType)));
        let mut forged = good.clone();
        *forged.last_mut().unwrap() ^= 1;
        assert!(matches!(check(&forged), Err(SignError::Request(_))));
        assert!(matches!(check(&[0x30; CSR_BYTES_MAX + 1]), Err(SignError::Request(_))));
        assert!(check(&[]).is_err());
    }
}
