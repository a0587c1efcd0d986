//! The certificate authority of a run. It rotates in three steps, with overlap: the new root is trusted beside the old
//! one, then it signs, then it is trusted alone.

use std::{
    cell::{Cell, RefCell},
    sync::Arc,
    time::Duration,
};

use mesh_api::{identity::SpiffeId, wire::TrustRoots};
use rcgen::{BasicConstraints, CertificateParams, CertificateSigningRequestParams, IsCa, Issuer, KeyPair, SanType};
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer};

use super::mesh::domain;
use crate::{
    identity::TrustBundle,
    net::{Clock, SystemClock},
};

/// How long a workload's certificate lives here.
pub const LIFE: Duration = Duration::from_secs(60);

struct Root {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
}

impl Root {
    fn new() -> Root {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).expect("a key");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).expect("a root").der().clone();
        Root {
            issuer: Issuer::new(params, key),
            certificate,
        }
    }
}

/// The authority.
pub struct Authority {
    roots: RefCell<Vec<Root>>,
    /// Which of the roots signs.
    signing: Cell<usize>,
}

/// What a step of the rotation changed.
pub enum Rotated {
    /// The roots: agents must be told.
    Roots,
    /// Only who signs.
    Signer,
}

impl Default for Authority {
    fn default() -> Authority {
        Authority {
            roots: RefCell::new(vec![Root::new()]),
            signing: Cell::new(0),
        }
    }
}

impl Authority {
    pub fn roots(&self) -> TrustRoots {
        TrustRoots(
            self.roots
                .borrow()
                .iter()
                .map(|root| root.certificate.to_vec())
                .collect(),
        )
    }

    /// The next step.
    pub fn rotate(&self) -> Rotated {
        let mut roots = self.roots.borrow_mut();
        match (roots.len(), self.signing.get()) {
            (1, _) => {
                roots.push(Root::new());
                Rotated::Roots
            }
            (_, 0) => {
                self.signing.set(1);
                Rotated::Signer
            }
            _ => {
                roots.remove(0);
                self.signing.set(0);
                Rotated::Roots
            }
        }
    }

    /// Whether the next step takes a root away.
    pub fn is_about_to_drop(&self) -> bool {
        self.signing.get() == 1
    }

    pub fn sign(&self, csr: &[u8], identity: &SpiffeId) -> Vec<CertificateDer<'static>> {
        let now = SystemClock.wall();
        let csr = CertificateSigningRequestDer::from(csr);
        let mut csr = CertificateSigningRequestParams::from_der(&csr).expect("a request");
        let named = [SanType::URI(identity.as_str().try_into().expect("a URI"))];
        assert_eq!(csr.params.subject_alt_names, named, "the request names its identity");
        (csr.params.not_before, csr.params.not_after) = ((now - Duration::from_secs(5)).into(), (now + LIFE).into());
        let roots = self.roots.borrow();
        let signed = csr.signed_by(&roots[self.signing.get()].issuer).expect("signed");
        vec![signed.der().clone()]
    }
}

/// What an agent makes of roots.
pub fn bundle_of(roots: &TrustRoots) -> Arc<TrustBundle> {
    let roots = roots.0.iter().cloned().map(CertificateDer::from).collect();
    Arc::new(TrustBundle::new(domain(), roots).expect("roots"))
}
