//! Keys, signing requests and the renewal schedule of this node's identities.
//!
//! Runs on the control thread. The schedule is a pure state machine: identities that the node wants, what time it is
//! and how the last attempt went in; what is due out. A failed renewal never takes a credential away that is still
//! valid, and an identity that leaves the node loses its credential at once.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_api::identity::SpiffeId;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::sync::watch;

use super::{Credential, CredentialStore, TrustBundle};
use crate::net::Clock;

/// Requests in one call of the signer, at most.
pub const BATCH_MAX: usize = 64;
/// The wait after a first failure; it doubles with each one more.
const BACKOFF_FIRST: Duration = Duration::from_millis(500);
/// The longest wait after a failure.
const BACKOFF_MAX: Duration = Duration::from_secs(60);

/// What a CA is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SigningRequest {
    /// The identity to certify.
    pub identity: SpiffeId,
    /// The PKCS#10 request, DER.
    pub csr: Vec<u8>,
}

/// A CA's answer.
#[derive(Debug)]
pub struct Signed {
    /// The trust bundle as of now.
    pub bundle: Arc<TrustBundle>,
    /// For each request, in order: the chain, leaf first, or why there is none.
    pub chains: Vec<Result<Vec<CertificateDer<'static>>, String>>,
}

/// Why a whole call of the signer failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no certificates from the controller: {0}")]
pub struct SignError(pub String);

/// Whoever can have requests signed: the controller's client, or a CA in a test.
#[expect(async_fn_in_trait, reason = "the issuer runs on one thread and needs no Send")]
pub trait Signer {
    /// Has requests signed, [`BATCH_MAX`] at most.
    async fn sign(&self, requests: Vec<SigningRequest>) -> Result<Signed, SignError>;
}

#[derive(Clone, Debug)]
struct Entry {
    due: SystemTime,
    failures: u32,
}

/// When which identity needs a certificate.
#[derive(Debug, Default)]
pub struct Schedule {
    entries: BTreeMap<SpiffeId, Entry>,
}

impl Schedule {
    /// Takes in what the node wants; new identities are due at once. Returns those that left.
    pub fn want(&mut self, identities: &BTreeSet<SpiffeId>, now: SystemTime) -> Vec<SpiffeId> {
        let left: Vec<SpiffeId> = self.entries.keys().filter(|id| !identities.contains(*id)).cloned().collect();
        for identity in &left {
            self.entries.remove(identity);
        }
        for identity in identities {
            self.entries
                .entry(identity.clone())
                .or_insert(Entry { due: now, failures: 0 });
        }
        left
    }

    /// Those that are due, [`BATCH_MAX`] at most, the longest overdue first.
    pub fn due(&self, now: SystemTime) -> Vec<SpiffeId> {
        let mut due: Vec<_> = self.entries.iter().filter(|(_, entry)| entry.due <= now).collect();
        due.sort_by_key(|(_, entry)| entry.due);
        due.into_iter().take(BATCH_MAX).map(|(identity, _)| identity.clone()).collect()
    }

    /// When the next one is due.
    pub fn next(&self) -> Option<SystemTime> {
        self.entries.values().map(|entry| entry.due).min()
    }

    /// Notes a certificate: due again at half of its life, up to a tenth earlier by `random` (0..=1).
    pub fn issued(&mut self, identity: &SpiffeId, not_before: SystemTime, expires: SystemTime, now: SystemTime, random: f64) {
        let Some(entry) = self.entries.get_mut(identity) else { return };
        let life = expires.duration_since(not_before.max(now)).unwrap_or_default();
        let wait = life.mul_f64(0.5 - 0.05 * random.clamp(0.0, 1.0));
        *entry = Entry { due: now + wait.max(BACKOFF_FIRST), failures: 0 };
    }

    /// Notes a failure: due again after a backoff of this identity's own, between half and the whole of it by `random`.
    pub fn failed(&mut self, identity: &SpiffeId, now: SystemTime, random: f64) {
        let Some(entry) = self.entries.get_mut(identity) else { return };
        let backoff = BACKOFF_FIRST.saturating_mul(1 << entry.failures.min(10)).min(BACKOFF_MAX);
        entry.failures = entry.failures.saturating_add(1);
        entry.due = now + backoff.mul_f64(0.5 + 0.5 * random.clamp(0.0, 1.0));
    }

    /// Failures in a row, for status.
    pub fn failures(&self, identity: &SpiffeId) -> u32 {
        self.entries.get(identity).map_or(0, |entry| entry.failures)
    }
}

/// A key that no certificate exists for yet.
struct PendingKey {
    identity: SpiffeId,
    key: KeyPair,
}

/// A new P-256 key and the request to certify it.
fn request(identity: &SpiffeId) -> Result<(PendingKey, SigningRequest), rcgen::Error> {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(identity.as_str().try_into()?)];
    let csr = params.serialize_request(&key)?;
    let request = SigningRequest { identity: identity.clone(), csr: csr.der().to_vec() };
    Ok((PendingKey { identity: identity.clone(), key }, request))
}

/// Keeps a [`CredentialStore`] filled.
pub struct Issuer<S> {
    signer: S,
    store: Arc<CredentialStore>,
    clock: Arc<dyn Clock>,
    schedule: Schedule,
}

impl<S: Signer> Issuer<S> {
    /// An issuer that fills `store` from `signer`.
    pub fn new(signer: S, store: Arc<CredentialStore>, clock: Arc<dyn Clock>) -> Issuer<S> {
        Issuer { signer, store, clock, schedule: Schedule::default() }
    }

    /// Serves what `wanted` says until its sender is gone.
    pub async fn run(mut self, mut wanted: watch::Receiver<BTreeSet<SpiffeId>>) {
        loop {
            let identities = wanted.borrow_and_update().clone();
            self.want(&identities);
            self.renew_due().await;
            let now = self.clock.wall();
            let wait = match self.schedule.next() {
                Some(due) => due.duration_since(now).unwrap_or_default(),
                None => Duration::from_secs(3600),
            };
            tokio::select! {
                changed = wanted.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Takes in what the node wants and drops the credentials of those that left.
    pub fn want(&mut self, identities: &BTreeSet<SpiffeId>) {
        for left in self.schedule.want(identities, self.clock.wall()) {
            self.store.remove(&left);
        }
    }

    /// One batch of what is due.
    pub async fn renew_due(&mut self) {
        let due = self.schedule.due(self.clock.wall());
        if due.is_empty() {
            return;
        }
        let mut keys = Vec::with_capacity(due.len());
        let mut requests = Vec::with_capacity(due.len());
        for identity in &due {
            match request(identity) {
                Ok((key, request)) => {
                    keys.push(key);
                    requests.push(request);
                }
                Err(error) => self.note_failure(identity, &error.to_string()),
            }
        }
        match self.signer.sign(requests).await {
            Ok(signed) => {
                let mut chains = signed.chains.into_iter();
                for key in keys {
                    let chain = chains.next().unwrap_or_else(|| Err("no answer for this identity".to_owned()));
                    self.take(key, chain, &signed.bundle);
                }
            }
            Err(error) => {
                for key in keys {
                    self.note_failure(&key.identity, &error.0);
                }
            }
        }
    }

    fn take(&mut self, pending: PendingKey, chain: Result<Vec<CertificateDer<'static>>, String>, bundle: &Arc<TrustBundle>) {
        let now = self.clock.wall();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(pending.key.serialize_der()));
        let credential = chain.and_then(|chain| {
            Credential::new(pending.identity.clone(), chain, key, bundle.clone(), now).map_err(|error| error.to_string())
        });
        match credential {
            Ok(credential) => {
                self.schedule.issued(
                    &pending.identity,
                    credential.not_before(),
                    credential.expires(),
                    now,
                    rand::random(),
                );
                self.store.put(credential);
            }
            Err(reason) => self.note_failure(&pending.identity, &reason),
        }
    }

    fn note_failure(&mut self, identity: &SpiffeId, reason: &str) {
        self.schedule.failed(identity, self.clock.wall(), rand::random());
        let failures = self.schedule.failures(identity);
        tracing::warn!(%identity, failures, reason, "no certificate");
    }
}
