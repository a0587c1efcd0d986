//! A CA for tests, and credentials of it.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_api::identity::{SpiffeId, TrustDomain};
use rcgen::{BasicConstraints, CertificateParams, CertificateSigningRequestParams, IsCa, Issuer, KeyPair, SanType};
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer};

use super::{Credential, TrustBundle};

/// A hour, as most certificates here live.
pub(crate) const HOUR: Duration = Duration::from_secs(3600);

pub(crate) fn domain() -> TrustDomain {
    TrustDomain::new("test.mesh").unwrap()
}

/// The identity of a service account in namespace `shop`.
pub(crate) fn id(account: &str) -> SpiffeId {
    SpiffeId::workload(&domain(), "shop", account).unwrap()
}

/// A root with its key.
pub(crate) struct TestCa {
    issuer: Issuer<'static, KeyPair>,
    pub root: CertificateDer<'static>,
}

impl TestCa {
    pub(crate) fn new() -> TestCa {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).unwrap().der().clone();
        TestCa {
            issuer: Issuer::new(params, key),
            root,
        }
    }

    pub(crate) fn bundle(&self) -> Arc<TrustBundle> {
        Arc::new(TrustBundle::new(domain(), vec![self.root.clone()]).unwrap())
    }

    /// A leaf with these URI names and this life.
    pub(crate) fn leaf(
        &self,
        uris: &[&str],
        from: SystemTime,
        until: SystemTime,
    ) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = uris
            .iter()
            .map(|uri| SanType::URI((*uri).try_into().unwrap()))
            .collect();
        (params.not_before, params.not_after) = (from.into(), until.into());
        let leaf = params.signed_by(&key, &self.issuer).unwrap();
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        (vec![leaf.der().clone()], key)
    }

    /// A credential of `account` that is valid for an hour from now.
    pub(crate) fn credential(&self, account: &str) -> Credential {
        self.credential_until(account, SystemTime::now() + HOUR)
    }

    pub(crate) fn credential_until(&self, account: &str, until: SystemTime) -> Credential {
        let from = SystemTime::now() - HOUR;
        let (chain, key) = self.leaf(&[id(account).as_str()], from, until);
        // Judged in the middle of its life, so that an expired one can be made too.
        Credential::new(id(account), chain, key, self.bundle(), from + Duration::from_secs(60)).unwrap()
    }

    /// Signs a request for `identity`.
    pub(crate) fn sign(
        &self,
        csr: &[u8],
        identity: &SpiffeId,
        from: SystemTime,
        until: SystemTime,
    ) -> Vec<CertificateDer<'static>> {
        let csr = CertificateSigningRequestDer::from(csr);
        let mut csr = CertificateSigningRequestParams::from_der(&csr).unwrap();
        let asked: Vec<_> = csr.params.subject_alt_names.clone();
        assert_eq!(
            asked,
            [SanType::URI(identity.as_str().try_into().unwrap())],
            "the request names its identity"
        );
        (csr.params.not_before, csr.params.not_after) = (from.into(), until.into());
        vec![csr.signed_by(&self.issuer).unwrap().der().clone()]
    }
}
