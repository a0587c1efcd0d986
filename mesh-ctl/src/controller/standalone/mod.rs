//! The controller by itself: documents, CA and join tokens in one embedded store, the operator on a Unix socket.
//!
//! It reads the same documents that a cluster would. Nothing here is needed in a cluster.

mod index;
mod store;
mod token;

use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context, bail};
use mesh_api::identity::TrustDomain;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{index::Index, store::Store};
use super::{
    ControllerConfig, Parts, STOP_TIMEOUT,
    agents::Agents,
    ca::{Authority, SigningCa},
    server, serving_names,
    source::{Admission, AdmissionError, Source, SourceError, Waiting},
    terminated,
    tls::Tls,
};

/// The file in the data directory that says which address is served.
const ADDRESS_FILE: &str = "address";

const SETTING_KEY: &str = "ca.key";
const SETTING_CERTIFICATE: &str = "ca.certificate";

/// The store's trust domain is fixed by its first start: all identities and the root are made for it.
fn check_trust_domain(store: &Store, wanted: &TrustDomain) -> anyhow::Result<()> {
    match store.setting("trust-domain")? {
        None => store.put_settings(&[("trust-domain", wanted.as_str().as_bytes())])?,
        Some(found) if found == wanted.as_str().as_bytes() => {}
        Some(found) => bail!(
            "the store was made for the trust domain {}, not {wanted}",
            String::from_utf8_lossy(&found)
        ),
    }
    Ok(())
}

/// Opens the CA of this store, making its key and root when there is none.
fn open_ca(store: &Store, trust_domain: &TrustDomain, now: SystemTime) -> anyhow::Result<SigningCa> {
    let (key, certificate) = match (store.setting(SETTING_KEY)?, store.setting(SETTING_CERTIFICATE)?) {
        (Some(key), Some(certificate)) => (key, CertificateDer::from(certificate)),
        (None, None) => {
            let root = SigningCa::new_root(trust_domain, now)?;
            store.put_settings(&[
                (SETTING_KEY, &root.key),
                (SETTING_CERTIFICATE, root.certificate.as_ref()),
            ])?;
            (root.key, root.certificate)
        }
        _ => bail!("the stored CA cannot be read: only one half of it is in the store"),
    };
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key));
    SigningCa::new(&key, vec![certificate], Vec::new(), trust_domain).context("the stored CA cannot be read")
}

/// Binds the operator's socket so that nobody else can open it, not even for a moment: it gets its mode under a name
/// of its own and then its place. A socket that a living controller serves is left alone.
async fn bind_operator(path: &Path) -> anyhow::Result<UnixListener> {
    if UnixStream::connect(path).await.is_ok() {
        bail!("{} is served by another controller", path.display());
    }
    if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
        std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    }
    let mut own = path.as_os_str().to_owned();
    own.push(format!(".{}", std::process::id()));
    let own = PathBuf::from(own);
    let listener = UnixListener::bind(&own).with_context(|| own.display().to_string())?;
    std::fs::set_permissions(&own, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&own, path).with_context(|| path.display().to_string())?;
    Ok(listener)
}

/// Writes a file so that a reader sees all of it or the one before.
fn write_whole(path: &Path, text: &str) -> anyhow::Result<()> {
    let new = path.with_extension("new");
    std::fs::write(&new, text).with_context(|| new.display().to_string())?;
    std::fs::rename(&new, path).with_context(|| path.display().to_string())
}

/// Join tokens of the store.
struct Tokens(Arc<Store>);

impl Admission for Tokens {
    fn admit<'a>(&'a self, token: &'a str, node: &'a str) -> Waiting<'a, Result<(), AdmissionError>> {
        Box::pin(async move {
            let (store, node, text) = (self.0.clone(), node.to_owned(), token.to_owned());
            let checked =
                tokio::task::spawn_blocking(move || token::check(&store, &text, &node, SystemTime::now())).await;
            match checked {
                Ok(Ok(Ok(()))) => Ok(()),
                Ok(Ok(Err(why))) => Err(AdmissionError::Refused {
                    told: "the join token is unknown, expired, or not for this node",
                    why: why.to_string(),
                }),
                Ok(Err(error)) => Err(AdmissionError::Failed(error.to_string())),
                Err(error) => Err(AdmissionError::Failed(error.to_string())),
            }
        })
    }

    fn issue(&self, node: &str, ttl: Duration, now: SystemTime) -> Result<String, SourceError> {
        token::create(&self.0, node, ttl, now).map_err(index::failed)
    }
}

/// Runs until SIGTERM or SIGINT.
pub async fn run(config: ControllerConfig, trust_domain: TrustDomain) -> anyhow::Result<()> {
    let stopped_by = terminated();
    tokio::pin!(stopped_by);

    let store = Arc::new(Store::open(&config.data_dir, config.revision_history)?);
    check_trust_domain(&store, &trust_domain)?;
    let authority: Arc<dyn Authority> = Arc::new(open_ca(&store, &trust_domain, SystemTime::now())?);
    let index = Arc::new(Index::open(store.clone(), trust_domain.clone())?);

    let listener = TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("cannot listen on {}", config.listen))?;
    let address = listener.local_addr()?;
    let tls = Arc::new(Tls::new(&*authority, serving_names(&config, address), trust_domain)?);
    let operator_listener = bind_operator(&config.operator_socket).await?;
    write_whole(&config.data_dir.join(ADDRESS_FILE), &format!("{address}\n"))?;

    let parts = Parts {
        source: index.clone(),
        agents: Arc::new(Agents::default()),
        authority: authority.clone(),
        admission: Arc::new(Tokens(store)),
        tls: tls.clone(),
        svid_ttl: config.svid_ttl,
    };
    let stop = CancellationToken::new();
    let tasks = TaskTracker::new();
    let renewal = tokio::spawn(tls.renew(authority));
    let agents_server = parts.serve_agents(listener, &stop, &tasks);
    let operator_server = tokio::spawn(server().add_service(parts.operator()).serve_with_incoming_shutdown(
        UnixListenerStream::new(operator_listener),
        stop.clone().cancelled_owned(),
    ));
    let summary = index.summary();
    let (revision, documents) = (summary.revision, summary.documents);
    tracing::info!(%address, socket = %config.operator_socket.display(), %revision, documents, "the controller serves");

    let signal = stopped_by.await?;
    tracing::info!(signal, "stopping");
    stop.cancel();
    renewal.abort();
    tasks.close();
    let all = async {
        tasks.wait().await;
        // A server that failed while stopping has nothing left to lose.
        let _ = agents_server.await;
        let _ = operator_server.await;
    };
    if tokio::time::timeout(STOP_TIMEOUT, all).await.is_err() {
        tracing::warn!("connections were cut");
    }
    let _ = std::fs::remove_file(&config.operator_socket);
    tracing::info!("stopped");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_outlives_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), 3).unwrap();
        let domain = TrustDomain::new("cluster.local").unwrap();
        let now = SystemTime::now();
        let first = open_ca(&store, &domain, now).unwrap();
        let again = open_ca(&store, &domain, now).unwrap();
        assert_eq!(first.bundle(), again.bundle());
    }
}
