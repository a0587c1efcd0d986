//! The CA of a cluster: its key in a Secret, the roots in a ConfigMap that every agent mounts.
//!
//! The first leader makes the Secret, unless somebody has provided one (an intermediate of cert-manager's, say); it is
//! created and never overwritten. When it is replaced, the new root joins the bundle at once and signs only after the
//! agents have had time to learn it; the old root stays in the bundle for as long as a certificate of it may live.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, anyhow, bail};
use base64::{Engine, prelude::BASE64_STANDARD_NO_PAD};
use k8s_openapi::{
    ByteString,
    api::core::v1::{ConfigMap, Secret},
};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
};
use mesh_api::identity::TrustDomain;
use parking_lot::RwLock;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use sha2::{Digest, Sha256};

use crate::controller::{
    ca::{self, Authority, SVID_TTL_MAX, Serving, SignError, Signing, SigningCa, SigningRequest, pem},
    unix_seconds,
};

/// The Secret with the signing CA.
pub const SECRET: &str = "nodemesh-ca";
/// The ConfigMap with the roots.
pub const BUNDLE: &str = "nodemesh-trust-bundle";
/// The ConfigMap's key.
const BUNDLE_KEY: &str = "bundle.pem";
/// The annotation that says since when a root has been replaced, by fingerprint.
const RETIRED: &str = "nodemesh.io/retired-roots";
/// A root stays trusted for this long after it was replaced.
const OVERLAP: Duration = Duration::from_secs(SVID_TTL_MAX.as_secs() + 3600);
/// How long a new root is only told before it signs: agents ack a revision in seconds, kubelets renew mounts in a minute.
pub const TOLD: Duration = Duration::from_secs(90);
/// How often the Secret is looked at.
pub const LOOK: Duration = Duration::from_secs(10);
/// The most roots in the bundle.
const ROOTS_MAX: usize = 16;

/// The authority of this replica while it leads.
pub struct Trust {
    client: Client,
    namespace: String,
    trust_domain: TrustDomain,
    state: RwLock<State>,
}

struct State {
    signing: Arc<SigningCa>,
    /// Read from the Secret, told in the bundle, and to sign from this time on.
    next: Option<(Arc<SigningCa>, SystemTime)>,
    bundle: Vec<CertificateDer<'static>>,
    secret_version: String,
}

impl State {
    /// Another CA is to follow. One of the same root may sign at once; another's root is told first.
    fn succeed(&mut self, next: Arc<SigningCa>, now: SystemTime) {
        let told = next.bundle().iter().all(|root| self.bundle.contains(root));
        let from = if told { now } else { now + TOLD };
        tracing::info!(same_root = told, "the CA has been replaced");
        self.next = Some((next, from));
    }

    /// The roots that must be in the bundle.
    fn wanted(&self) -> Vec<CertificateDer<'static>> {
        let next = self.next.iter().flat_map(|(ca, _)| ca.bundle());
        self.signing.bundle().into_iter().chain(next).collect()
    }

    /// Lets the next CA sign if its time has come.
    fn promote(&mut self, now: SystemTime) -> bool {
        match self.next.take_if(|(_, from)| *from <= now) {
            Some((next, _)) => {
                self.signing = next;
                tracing::info!("the new CA signs");
                true
            }
            None => false,
        }
    }
}

/// What a look at the Secret came to.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Agents must be told of the bundle.
    pub bundle: bool,
    /// Another key signs: the serving certificate is made anew.
    pub signing: bool,
}

fn fingerprint(root: &CertificateDer<'_>) -> String {
    BASE64_STANDARD_NO_PAD.encode(Sha256::digest(root))
}

/// Reads the CA out of the Secret's data.
fn read(data: &BTreeMap<String, ByteString>, trust_domain: &TrustDomain) -> anyhow::Result<SigningCa> {
    let part = |key: &str| {
        data.get(key)
            .map(|bytes| bytes.0.as_slice())
            .filter(|bytes| !bytes.is_empty())
    };
    let certificates = |key: &str| -> anyhow::Result<Vec<CertificateDer<'static>>> {
        let all = part(key).unwrap_or_default();
        let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(all).collect();
        read.map_err(|e| anyhow!("{key}: {e}"))
    };
    let key = part("tls.key").context("tls.key is missing, expected the CA's private key as PEM")?;
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|e| anyhow!("tls.key: {e}"))?;
    Ok(SigningCa::new(
        &key,
        certificates("tls.crt")?,
        certificates("ca.crt")?,
        trust_domain,
    )?)
}

fn conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409)
}

/// A key in PKCS #8 as PEM.
fn key_pem(key: &[u8]) -> String {
    pem("PRIVATE KEY", key)
}

impl Trust {
    /// Reads the CA, making it if there is none, and brings the bundle up to date.
    pub async fn open(client: Client, namespace: &str, trust_domain: TrustDomain) -> anyhow::Result<Trust> {
        let (signing, secret_version) = open_secret(&client, namespace, &trust_domain).await?;
        let signing = Arc::new(signing);
        let bundle = write_bundle(&client, namespace, &signing.bundle(), SystemTime::now()).await?;
        Ok(Trust {
            client,
            namespace: namespace.to_owned(),
            trust_domain,
            state: RwLock::new(State {
                signing,
                next: None,
                bundle,
                secret_version,
            }),
        })
    }

    /// Looks at the Secret again. A CA that cannot be used leaves the present one in place.
    pub async fn look(&self, now: SystemTime) -> anyhow::Result<Changes> {
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), &self.namespace);
        let secret = secrets.get_opt(SECRET).await?;
        let secret = secret.with_context(|| format!("the Secret {SECRET} is gone; its key is still used here"))?;
        let version = secret.metadata.resource_version.clone().unwrap_or_default();
        let mut changes = Changes::default();
        if version != self.state.read().secret_version {
            let found = read(&secret.data.unwrap_or_default(), &self.trust_domain);
            let found = Arc::new(found.with_context(|| format!("the Secret {SECRET} has changed and cannot be used"))?);
            let mut state = self.state.write();
            state.secret_version = version;
            state.succeed(found, now);
        }
        let wanted = self.state.read().wanted();
        let bundle = write_bundle(&self.client, &self.namespace, &wanted, now).await?;
        let mut state = self.state.write();
        if state.bundle != bundle {
            state.bundle = bundle;
            changes.bundle = true;
        }
        changes.signing = state.promote(now);
        Ok(changes)
    }

    fn signing(&self) -> Arc<SigningCa> {
        self.state.read().signing.clone()
    }

    /// The end of the signing certificate's life.
    pub fn not_after(&self) -> SystemTime {
        self.signing().not_after()
    }
}

async fn open_secret(
    client: &Client,
    namespace: &str,
    trust_domain: &TrustDomain,
) -> anyhow::Result<(SigningCa, String)> {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let secret = match secrets.get_opt(SECRET).await? {
        Some(secret) => secret,
        None => {
            let root = SigningCa::new_root(trust_domain, SystemTime::now())?;
            let certificate = pem("CERTIFICATE", &root.certificate);
            let data = [
                ("tls.crt", certificate.clone()),
                ("tls.key", key_pem(&root.key)),
                ("ca.crt", certificate),
            ];
            let secret = Secret {
                metadata: ObjectMeta {
                    name: Some(SECRET.to_owned()),
                    labels: Some(BTreeMap::from([(
                        "app.kubernetes.io/name".to_owned(),
                        "nodemesh".to_owned(),
                    )])),
                    ..ObjectMeta::default()
                },
                type_: Some("kubernetes.io/tls".to_owned()),
                data: Some(data.map(|(k, v)| (k.to_owned(), ByteString(v.into_bytes()))).into()),
                ..Secret::default()
            };
            match secrets.create(&PostParams::default(), &secret).await {
                Ok(made) => {
                    tracing::info!(secret = SECRET, "a CA was made");
                    made
                }
                // Somebody was faster: theirs it is.
                Err(error) if conflict(&error) => secrets.get(SECRET).await?,
                Err(error) => return Err(error.into()),
            }
        }
    };
    let version = secret.metadata.resource_version.clone().unwrap_or_default();
    let ca = read(&secret.data.unwrap_or_default(), trust_domain);
    Ok((
        ca.with_context(|| format!("the Secret {SECRET} cannot be used"))?,
        version,
    ))
}

/// What the bundle should hold: the wanted roots first, then those that were replaced a short while ago. Returns the
/// roots, and since when each of the latter has been replaced.
fn merge(
    wanted: &[CertificateDer<'static>],
    present: &[CertificateDer<'static>],
    retired: &BTreeMap<String, u64>,
    now: SystemTime,
) -> (Vec<CertificateDer<'static>>, BTreeMap<String, u64>) {
    let mut bundle: Vec<CertificateDer<'static>> = Vec::new();
    for root in wanted {
        if !bundle.contains(root) {
            bundle.push(root.clone());
        }
    }
    let mut since = BTreeMap::new();
    for root in present.iter().filter(|root| !wanted.contains(root)) {
        let name = fingerprint(root);
        let at = retired.get(&name).copied().unwrap_or_else(|| unix_seconds(now));
        let over = UNIX_EPOCH + Duration::from_secs(at) + OVERLAP;
        let expired = ca::not_after(root).is_none_or(|end| end <= now);
        if over <= now || expired || bundle.len() >= ROOTS_MAX || bundle.contains(root) {
            continue;
        }
        since.insert(name, at);
        bundle.push(root.clone());
    }
    (bundle, since)
}

/// Brings the ConfigMap up to date and returns its roots.
async fn write_bundle(
    client: &Client,
    namespace: &str,
    wanted: &[CertificateDer<'static>],
    now: SystemTime,
) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    for _ in 0..3 {
        let found = maps.get_opt(BUNDLE).await?;
        let data = found.as_ref().and_then(|map| map.data.as_ref());
        let text = data.and_then(|data| data.get(BUNDLE_KEY)).map_or("", String::as_str);
        // What is no certificate there is not ours to keep.
        let present: Vec<_> = CertificateDer::pem_slice_iter(text.as_bytes())
            .map_while(Result::ok)
            .collect();
        let annotation = found
            .as_ref()
            .and_then(|map| map.metadata.annotations.as_ref()?.get(RETIRED));
        let retired = annotation
            .and_then(|text| serde_json::from_str(text).ok())
            .unwrap_or_default();
        let (bundle, retired) = merge(wanted, &present, &retired, now);
        let new_text: String = bundle.iter().map(|root| pem("CERTIFICATE", root)).collect();
        let new_annotation = serde_json::to_string(&retired)?;
        if new_text == text && (annotation == Some(&new_annotation) || (annotation.is_none() && retired.is_empty())) {
            return Ok(bundle);
        }
        let exists = found.is_some();
        let mut map = found.unwrap_or_else(|| ConfigMap {
            metadata: ObjectMeta {
                name: Some(BUNDLE.to_owned()),
                ..ObjectMeta::default()
            },
            ..ConfigMap::default()
        });
        map.metadata.managed_fields = None;
        map.data.get_or_insert_default().insert(BUNDLE_KEY.to_owned(), new_text);
        let annotations = map.metadata.annotations.get_or_insert_default();
        annotations.insert(RETIRED.to_owned(), new_annotation);
        let parameters = PostParams::default();
        let written = match exists {
            true => maps.replace(BUNDLE, &parameters, &map).await,
            false => maps.create(&parameters, &map).await,
        };
        match written {
            Ok(_) => return Ok(bundle),
            Err(error) if conflict(&error) => continue,
            Err(error) => return Err(error.into()),
        }
    }
    bail!("the ConfigMap {BUNDLE} is written by somebody else all the time")
}

impl Authority for Trust {
    fn bundle(&self) -> Vec<CertificateDer<'static>> {
        self.state.read().bundle.clone()
    }

    fn sign<'a>(&'a self, request: &'a SigningRequest, now: SystemTime) -> Signing<'a> {
        let signing = self.signing();
        Box::pin(async move { signing.sign(request, now).await })
    }

    fn serving(&self, now: SystemTime, ttl: Duration, names: &[String]) -> Result<Serving, SignError> {
        self.signing().serving(now, ttl, names)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain() -> TrustDomain {
        TrustDomain::new("cluster.local").unwrap()
    }

    fn data(parts: &[(&str, String)]) -> BTreeMap<String, ByteString> {
        let bytes = |text: &String| ByteString(text.clone().into_bytes());
        parts
            .iter()
            .map(|(key, text)| ((*key).to_owned(), bytes(text)))
            .collect()
    }

    #[test]
    fn the_secret_is_read_or_says_what_is_wrong_with_it() {
        let root = SigningCa::new_root(&domain(), SystemTime::now()).unwrap();
        let other = SigningCa::new_root(&domain(), SystemTime::now()).unwrap();
        let certificate = |root: &ca::NewRoot| pem("CERTIFICATE", &root.certificate);
        let key = || ("tls.key", key_pem(&root.key));
        let cases = [
            (data(&[key(), ("tls.crt", certificate(&root))]), None),
            (
                data(&[key(), ("tls.crt", certificate(&root)), ("ca.crt", certificate(&root))]),
                None,
            ),
            (
                data(&[key(), ("tls.crt", certificate(&root)), ("ca.crt", String::new())]),
                None,
            ),
            (data(&[("tls.crt", certificate(&root))]), Some("tls.key is missing")),
            (data(&[key()]), Some("no certificate")),
            (
                data(&[key(), ("tls.crt", certificate(&other))]),
                Some("not the certificate's"),
            ),
            (
                data(&[("tls.key", "x".into()), ("tls.crt", certificate(&root))]),
                Some("tls.key:"),
            ),
        ];
        for (data, expected) in cases {
            match (read(&data, &domain()), expected) {
                (Ok(_), None) => {}
                (Err(error), Some(expected)) => {
                    let text = format!("{error:#}");
                    assert!(text.contains(expected), "{text}");
                }
                (found, expected) => panic!("{expected:?}: {:?}", found.err()),
            }
        }
    }

    #[test]
    fn a_replaced_root_stays_as_long_as_its_certificates_may_live() {
        let now = SystemTime::now();
        let [old, new] = [(); 2].map(|()| SigningCa::new_root(&domain(), now).unwrap().certificate);
        let (bundle, since) = merge(std::slice::from_ref(&old), &[], &BTreeMap::new(), now);
        assert_eq!((bundle.as_slice(), since.len()), (&[old.clone()][..], 0));

        let (bundle, since) = merge(std::slice::from_ref(&new), &bundle, &since, now);
        assert_eq!(bundle, [new.clone(), old.clone()]);
        assert_eq!(since.len(), 1);

        let later = now + OVERLAP - Duration::from_secs(2);
        let (bundle, since) = merge(std::slice::from_ref(&new), &bundle, &since, later);
        assert_eq!(bundle, [new.clone(), old.clone()]);

        let (bundle, since) = merge(std::slice::from_ref(&new), &bundle, &since, now + OVERLAP);
        assert_eq!((bundle.as_slice(), since.len()), (&[new.clone()][..], 0));

        // A root that comes back is not retired any more.
        let (_, since) = merge(
            std::slice::from_ref(&new),
            std::slice::from_ref(&old),
            &BTreeMap::new(),
            now,
        );
        let (bundle, since) = merge(&[old.clone(), new.clone()], &[new, old], &since, later);
        assert_eq!((bundle.len(), since.len()), (2, 0));
    }

    #[test]
    fn a_new_root_signs_only_after_it_was_told() {
        let now = SystemTime::now();
        let ca = || {
            let root = SigningCa::new_root(&domain(), now).unwrap();
            let key = PrivateKeyDer::Pkcs8(root.key.into());
            Arc::new(SigningCa::new(&key, vec![root.certificate], vec![], &domain()).unwrap())
        };
        let (old, new) = (ca(), ca());
        let mut state = State {
            signing: old.clone(),
            next: None,
            bundle: old.bundle(),
            secret_version: String::new(),
        };
        assert!(!state.promote(now));
        state.succeed(new.clone(), now);
        assert_eq!(state.wanted(), [old.bundle(), new.bundle()].concat());
        assert!(!state.promote(now + TOLD - Duration::from_secs(1)));
        assert!(Arc::ptr_eq(&state.signing, &old));
        assert!(state.promote(now + TOLD));
        assert!(Arc::ptr_eq(&state.signing, &new));
        assert_eq!(state.wanted(), new.bundle());
        // Back to the one whose root is in the bundle still: nobody has to be told.
        state.succeed(old, now);
        assert!(state.promote(now));
    }
}
