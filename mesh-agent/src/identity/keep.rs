//! Credentials on disk, so that a restarted agent serves without the controller for as long as they are valid.
//!
//! One file per identity, readable by root alone, replaced atomically. A file that does not decode, is expired, names
//! another identity, or does not lead to the present trust bundle is left out: its identity waits for the controller.

use std::{
    collections::BTreeSet,
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use mesh_api::identity::SpiffeId;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Credential, TrustBundle};

/// The largest file that is read: a key and a chain of a few certificates have some KiB.
const FILE_BYTES_MAX: u64 = 256 * 1024;

/// A directory of credentials.
#[derive(Clone, Debug)]
pub struct Keep(PathBuf);

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    identity: String,
    key: Vec<u8>,
    chain: Vec<Vec<u8>>,
}

impl Keep {
    /// Opens the directory, made for root alone if it is missing.
    pub fn open(directory: PathBuf) -> io::Result<Keep> {
        DirBuilder::new().recursive(true).mode(0o700).create(&directory)?;
        Ok(Keep(directory))
    }

    fn file(&self, identity: &SpiffeId) -> PathBuf {
        let name: String = Sha256::digest(identity.as_str())
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        self.0.join(name)
    }

    /// Keeps a key (PKCS #8) and its chain.
    pub fn save(&self, identity: &SpiffeId, key: &[u8], chain: &[CertificateDer<'static>]) -> io::Result<()> {
        let kept = Kept {
            identity: identity.as_str().to_owned(),
            key: key.to_vec(),
            chain: chain.iter().map(|certificate| certificate.to_vec()).collect(),
        };
        let file = self.file(identity);
        let beside = file.with_extension("new");
        let mut out = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&beside)?;
        out.write_all(&serde_json::to_vec(&kept)?)?;
        out.sync_all()?;
        fs::rename(&beside, &file)?;
        fs::File::open(&self.0)?.sync_all()
    }

    /// Forgets an identity that left the node.
    pub fn remove(&self, identity: &SpiffeId) {
        match fs::remove_file(self.file(identity)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(%error, %identity, "removing a kept credential");
            }
            _ => {}
        }
    }

    /// What is kept of these identities and still good.
    pub fn load(&self, wanted: &BTreeSet<SpiffeId>, bundle: &Arc<TrustBundle>, now: SystemTime) -> Vec<Credential> {
        let good = |identity: &SpiffeId| match read(&self.file(identity), identity, bundle, now) {
            Ok(credential) => credential,
            Err(reason) => {
                tracing::warn!(%identity, reason, "a kept credential is of no use");
                None
            }
        };
        wanted.iter().filter_map(good).collect()
    }
}

fn read(
    file: &Path,
    identity: &SpiffeId,
    bundle: &Arc<TrustBundle>,
    now: SystemTime,
) -> Result<Option<Credential>, String> {
    match fs::metadata(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.to_string()),
        Ok(metadata) if metadata.len() > FILE_BYTES_MAX => return Err("too large".to_owned()),
        Ok(_) => {}
    }
    let bytes = fs::read(file).map_err(|error| error.to_string())?;
    let kept: Kept = serde_json::from_slice(&bytes).map_err(|error| error.to_string())?;
    if kept.identity != identity.as_str() {
        return Err(format!("it is of {}", kept.identity));
    }
    let chain = kept.chain.into_iter().map(CertificateDer::from).collect();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(kept.key));
    let credential = Credential::new(identity.clone(), chain, key, bundle.clone(), now);
    credential.map(Some).map_err(|error| error.to_string())
}
