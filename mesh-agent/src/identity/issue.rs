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

use super::{Credential, CredentialStore, TrustBundle, keep::Keep};
use crate::{
    event::{Event, Events},
    net::Clock,
};

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
        let left: Vec<SpiffeId> = self
            .entries
            .keys()
            .filter(|id| !identities.contains(*id))
            .cloned()
            .collect();
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
        due.into_iter()
            .take(BATCH_MAX)
            .map(|(identity, _)| identity.clone())
            .collect()
    }

    /// When the next one is due.
    pub fn next(&self) -> Option<SystemTime> {
        self.entries.values().map(|entry| entry.due).min()
    }

    /// Notes a certificate: due again at half of its life, up to a tenth earlier by `random` (0..=1).
    pub fn issued(
        &mut self,
        identity: &SpiffeId,
        not_before: SystemTime,
        expires: SystemTime,
        now: SystemTime,
        random: f64,
    ) {
        let Some(entry) = self.entries.get_mut(identity) else {
            return;
        };
        let life = expires.duration_since(not_before.max(now)).unwrap_or_default();
        let wait = life.mul_f64(0.5 - 0.05 * random.clamp(0.0, 1.0));
        *entry = Entry {
            due: now + wait.max(BACKOFF_FIRST),
            failures: 0,
        };
    }

    /// Notes a failure: due again after a backoff of this identity's own, between half and the whole of it by `random`.
    pub fn failed(&mut self, identity: &SpiffeId, now: SystemTime, random: f64) {
        let Some(entry) = self.entries.get_mut(identity) else {
            return;
        };
        let backoff = BACKOFF_FIRST
            .saturating_mul(1 << entry.failures.min(10))
            .min(BACKOFF_MAX);
        entry.failures = entry.failures.saturating_add(1);
        entry.due = now + backoff.mul_f64(0.5 + 0.5 * random.clamp(0.0, 1.0));
    }

    /// How long an identity may wait for its next attempt.
    fn due_in(&self, identity: &SpiffeId, now: SystemTime) -> Duration {
        let entry = self.entries.get(identity);
        entry
            .and_then(|entry| entry.due.duration_since(now).ok())
            .unwrap_or_default()
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
    let request = SigningRequest {
        identity: identity.clone(),
        csr: csr.der().to_vec(),
    };
    Ok((
        PendingKey {
            identity: identity.clone(),
            key,
        },
        request,
    ))
}

/// Keeps a [`CredentialStore`] filled.
pub struct Issuer<S> {
    signer: S,
    store: Arc<CredentialStore>,
    clock: Arc<dyn Clock>,
    schedule: Schedule,
    bundle: Option<Arc<TrustBundle>>,
    keep: Option<Keep>,
    events: Option<Arc<Events>>,
}

impl<S: Signer> Issuer<S> {
    /// An issuer that fills `store` from `signer`.
    pub fn new(signer: S, store: Arc<CredentialStore>, clock: Arc<dyn Clock>) -> Issuer<S> {
        Issuer {
            signer,
            store,
            clock,
            schedule: Schedule::default(),
            bundle: None,
            keep: None,
            events: None,
        }
    }

    /// Keeps credentials on disk too, and takes those that are kept there when their identities are wanted.
    pub fn kept_in(mut self, keep: Keep, bundle: Option<Arc<TrustBundle>>) -> Issuer<S> {
        self.keep = Some(keep);
        self.bundle = bundle;
        self
    }

    /// Tells of every certificate that is issued, and of every one that is not.
    pub fn telling(mut self, events: Arc<Events>) -> Issuer<S> {
        self.events = Some(events);
        self
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
        let now = self.clock.wall();
        for left in self.schedule.want(identities, now) {
            self.store.remove(&left);
            if let Some(keep) = &self.keep {
                keep.remove(&left);
            }
        }
        let (Some(keep), Some(bundle)) = (&self.keep, &self.bundle) else {
            return;
        };
        let missing = identities
            .iter()
            .filter(|identity| self.store.get(identity).is_none())
            .cloned()
            .collect();
        for credential in keep.load(&missing, bundle, now) {
            let (from, until) = (credential.not_before(), credential.expires());
            self.schedule
                .issued(credential.identity(), from, until, now, rand::random());
            self.store.put(credential);
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
                self.take_bundle(&signed.bundle);
                let mut chains = signed.chains.into_iter();
                for key in keys {
                    let chain = chains
                        .next()
                        .unwrap_or_else(|| Err("no answer for this identity".to_owned()));
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

    /// Takes the trust bundle as it is now. Every credential is rebuilt if it changed, those of other identities too.
    pub fn take_bundle(&mut self, bundle: &Arc<TrustBundle>) {
        if self.bundle.as_ref().is_none_or(|known| known.roots() != bundle.roots()) {
            self.bundle = Some(bundle.clone());
            self.store.set_bundle(bundle, self.clock.wall());
        }
    }

    fn take(
        &mut self,
        pending: PendingKey,
        chain: Result<Vec<CertificateDer<'static>>, String>,
        bundle: &Arc<TrustBundle>,
    ) {
        let now = self.clock.wall();
        let key = PrivatePkcs8KeyDer::from(pending.key.serialize_der());
        let credential = chain.and_then(|chain| {
            let credential = Credential::new(
                pending.identity.clone(),
                chain.clone(),
                PrivateKeyDer::Pkcs8(key.clone_key()),
                bundle.clone(),
                now,
            );
            let credential = credential.map_err(|error| error.to_string())?;
            if let Some(keep) = &self.keep
                && let Err(error) = keep.save(&pending.identity, key.secret_pkcs8_der(), &chain)
            {
                // It serves all the same; only a restart without the controller will miss it.
                tracing::warn!(%error, identity = %pending.identity, "keeping a credential");
            }
            Ok(credential)
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
                if let Some(events) = &self.events {
                    let valid_for = credential.expires().duration_since(now).unwrap_or_default();
                    events.emit(Event::CredentialIssued {
                        identity: pending.identity,
                        valid_for,
                    });
                }
                self.store.put(credential);
            }
            Err(reason) => self.note_failure(&pending.identity, &reason),
        }
    }

    fn note_failure(&mut self, identity: &SpiffeId, reason: &str) {
        let now = self.clock.wall();
        self.schedule.failed(identity, now, rand::random());
        if let Some(events) = &self.events {
            let retry_in = self.schedule.due_in(identity, now);
            events.emit(Event::CredentialFailed {
                identity: identity.clone(),
                reason: reason.to_owned(),
                retry_in,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::time::Instant;

    use parking_lot::Mutex;

    use super::*;
    use crate::identity::testing::{HOUR, TestCa, domain, id};

    #[test]
    fn a_restarted_issuer_serves_by_what_was_kept_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let keep = Keep::open(directory.path().join("credentials")).unwrap();
        let ca = TestCa::new();
        let now = SystemTime::now();
        let (pending, request) = request(&id("a")).unwrap();
        let chain = ca.sign(&request.csr, &id("a"), now, now + HOUR);
        keep.save(&id("a"), &pending.key.serialize_der(), &chain).unwrap();

        let good = keep.load(&set(&["a", "b"]), &ca.bundle(), now);
        assert_eq!(
            good.iter()
                .map(|credential| credential.identity().clone())
                .collect::<Vec<_>>(),
            [id("a")]
        );
        // Expired, of another authority, cut short, or gone: nothing.
        assert!(keep.load(&set(&["a"]), &ca.bundle(), now + HOUR * 2).is_empty());
        assert!(keep.load(&set(&["a"]), &TestCa::new().bundle(), now).is_empty());
        let file = std::fs::read_dir(directory.path().join("credentials"))
            .unwrap()
            .next()
            .unwrap()
            .unwrap()
            .path();
        let whole = std::fs::read(&file).unwrap();
        std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
        assert!(keep.load(&set(&["a"]), &ca.bundle(), now).is_empty());
        keep.remove(&id("a"));
        assert!(!file.exists());
    }

    fn set(accounts: &[&str]) -> BTreeSet<SpiffeId> {
        accounts.iter().map(|account| id(account)).collect()
    }

    #[test]
    fn renewal_is_due_at_half_life_and_failures_back_off_each_for_itself() {
        let now = SystemTime::now();
        let mut schedule = Schedule::default();
        assert!(schedule.want(&set(&["a", "b"]), now).is_empty());
        assert_eq!(schedule.due(now), [id("a"), id("b")]);

        schedule.issued(&id("a"), now, now + HOUR, now, 0.0);
        assert_eq!(schedule.due(now), [id("b")]);
        let half = now + HOUR / 2;
        assert_eq!(schedule.due(half - Duration::from_secs(1)), [id("b")]);
        schedule.issued(&id("b"), now, now + HOUR, now, 1.0);
        assert_eq!(
            schedule.next(),
            Some(now + HOUR.mul_f64(0.45)),
            "jitter only makes it earlier"
        );
        assert_eq!(schedule.due(half), [id("b"), id("a")]);

        let mut waits = Vec::new();
        let mut at = half;
        for _ in 0..12 {
            schedule.failed(&id("a"), at, 1.0);
            let due = schedule.entries[&id("a")].due;
            waits.push(due.duration_since(at).unwrap());
            at = due;
        }
        assert_eq!(waits[..3], [BACKOFF_FIRST, BACKOFF_FIRST * 2, BACKOFF_FIRST * 4]);
        assert!(
            waits.iter().all(|wait| *wait <= BACKOFF_MAX) && waits[11] == BACKOFF_MAX,
            "{waits:?}"
        );
        assert_eq!(schedule.failures(&id("b")), 0);
        assert_eq!(schedule.due(half), [id("b")]);

        assert_eq!(schedule.want(&set(&["b", "c"]), at), [id("a")]);
        schedule.issued(&id("a"), at, at + HOUR, at, 0.0);
        assert!(
            !schedule.entries.contains_key(&id("a")),
            "an answer that comes too late brings nobody back"
        );
    }

    #[test]
    fn batches_are_bounded() {
        let now = SystemTime::now();
        let mut schedule = Schedule::default();
        let many: Vec<String> = (0..BATCH_MAX + 10).map(|n| format!("sa{n}")).collect();
        schedule.want(&many.iter().map(|account| id(account)).collect(), now);
        assert_eq!(schedule.due(now).len(), BATCH_MAX);
    }

    struct FakeClock(Mutex<SystemTime>);
    impl Clock for FakeClock {
        fn now(&self) -> Instant {
            Instant::now()
        }
        fn wall(&self) -> SystemTime {
            *self.0.lock()
        }
    }

    /// `None` fails the call, else the life of what is signed and who is refused.
    type Step = Option<(Duration, Option<SpiffeId>)>;

    /// A CA that does as its script says.
    struct ScriptedCa<'a> {
        ca: &'a TestCa,
        clock: Arc<FakeClock>,
        script: RefCell<Vec<Step>>,
    }

    impl Signer for ScriptedCa<'_> {
        async fn sign(&self, requests: Vec<SigningRequest>) -> Result<Signed, SignError> {
            let step = self.script.borrow_mut().remove(0);
            let (life, refused) = step.ok_or_else(|| SignError("the controller is away".to_owned()))?;
            let now = self.clock.wall();
            let chains = requests.iter().map(|request| {
                if Some(&request.identity) == refused.as_ref() {
                    return Err("no such pod on this node".to_owned());
                }
                Ok(self.ca.sign(
                    &request.csr,
                    &request.identity,
                    now - Duration::from_secs(5),
                    now + life,
                ))
            });
            Ok(Signed {
                bundle: self.ca.bundle(),
                chains: chains.collect(),
            })
        }
    }

    #[tokio::test]
    async fn a_failed_renewal_takes_nothing_away_and_leaving_does() {
        let ca = TestCa::new();
        let start = SystemTime::now();
        let clock = Arc::new(FakeClock(Mutex::new(start)));
        let store = CredentialStore::new();
        let script = RefCell::new(vec![
            Some((HOUR, Some(id("b")))),
            Some((HOUR, None)),
            None,
            Some((HOUR, None)),
        ]);
        let signer = ScriptedCa {
            ca: &ca,
            clock: clock.clone(),
            script,
        };
        let mut issuer = Issuer::new(signer, store.clone(), clock.clone());

        issuer.want(&set(&["a", "b"]));
        issuer.renew_due().await;
        let first = store.get(&id("a")).expect("signed");
        assert!(store.get(&id("b")).is_none(), "refused");

        *clock.0.lock() += Duration::from_secs(1);
        issuer.renew_due().await;
        assert!(store.get(&id("b")).is_some(), "asked again after its own backoff");
        assert_eq!(store.get(&id("a")).unwrap().epoch(), first.epoch(), "which was not due");

        *clock.0.lock() = start + HOUR / 2 + Duration::from_secs(5);
        issuer.renew_due().await;
        assert_eq!(
            store.get(&id("a")).unwrap().epoch(),
            first.epoch(),
            "a failed renewal takes nothing away"
        );

        *clock.0.lock() += BACKOFF_MAX;
        issuer.renew_due().await;
        assert_ne!(store.get(&id("a")).unwrap().epoch(), first.epoch(), "renewed");

        let (both, a) = (
            TrustBundle::new(domain(), vec![ca.root.clone(), TestCa::new().root]),
            store.get(&id("a")),
        );
        issuer.take_bundle(&Arc::new(both.unwrap()));
        let rebuilt = store.get(&id("a")).unwrap();
        assert_ne!(
            rebuilt.epoch(),
            a.unwrap().epoch(),
            "another bundle makes other credentials"
        );
        assert_eq!(rebuilt.bundle().roots().len(), 2);
        issuer.take_bundle(&rebuilt.bundle().clone());
        assert_eq!(
            store.get(&id("a")).unwrap().epoch(),
            rebuilt.epoch(),
            "the same one does not"
        );

        issuer.want(&set(&["b"]));
        assert!(store.get(&id("a")).is_none(), "it left the node");
        assert!(store.get(&id("b")).is_some());
    }

    #[tokio::test]
    async fn a_certificate_for_somebody_else_or_of_another_ca_is_not_taken() {
        let (ca, other) = (TestCa::new(), TestCa::new());
        let now = SystemTime::now();
        let (pending, signing) = request(&id("a")).unwrap();
        let key = || PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(pending.key.serialize_der()));
        let chain = ca.sign(&signing.csr, &id("a"), now - HOUR, now + HOUR);
        assert!(Credential::new(id("a"), chain.clone(), key(), ca.bundle(), now).is_ok());
        assert!(
            Credential::new(id("b"), chain.clone(), key(), ca.bundle(), now).is_err(),
            "somebody else"
        );
        assert!(
            Credential::new(id("a"), chain.clone(), key(), other.bundle(), now).is_err(),
            "another CA"
        );
        let (stranger, _) = request(&id("a")).unwrap();
        let wrong = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(stranger.key.serialize_der()));
        assert!(
            Credential::new(id("a"), chain, wrong, ca.bundle(), now).is_err(),
            "another key"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_waits_for_a_credential_gets_it_or_gives_up() {
        let ca = TestCa::new();
        let store = CredentialStore::new();
        let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
        assert!(store.ready(&id("a"), deadline).await.is_none());
        let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
        let wanted = id("a");
        let (got, ()) = tokio::join!(store.ready(&wanted, deadline), async {
            tokio::task::yield_now().await;
            store.put(ca.credential("b"));
            tokio::task::yield_now().await;
            store.put(ca.credential("a"));
        });
        assert_eq!(got.unwrap().identity(), &id("a"));
    }
}
