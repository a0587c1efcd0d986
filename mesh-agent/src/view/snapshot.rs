//! The last good revision on disk, so that the agent serves without the controller after a restart.
//!
//! One file, replaced atomically: written beside, synced, renamed, directory synced. It carries a checksum and is taken
//! whole or not at all: a file that is cut, changed, of another trust domain or of an unknown form counts as none.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use mesh_api::{
    identity::TrustDomain,
    wire::{MESSAGE_BYTES_MAX, Update, WireError, control::ControllerMessage},
};
use prost::Message;
use sha2::{Digest, Sha256};

use super::sync::Held;

const MAGIC: &[u8; 8] = b"NMSNAP1\n";
const CHECKSUM_BYTES: usize = 32;
const FILE_NAME: &str = "snapshot";

/// Why the file on disk is of no use.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// It cannot be read.
    #[error("cannot read it: {0}")]
    Read(#[source] io::Error),
    /// It is larger than any snapshot.
    #[error("{0} bytes, more than a snapshot may have")]
    TooLarge(u64),
    /// It does not begin as a snapshot of this form.
    #[error("not a snapshot of this form")]
    Form,
    /// The checksum does not hold.
    #[error("the checksum does not hold")]
    Checksum,
    /// The checksum holds and the content does not decode: another version wrote it.
    #[error("it does not decode: {0}")]
    Decode(#[from] prost::DecodeError),
    /// The content is not a model.
    #[error("its content is not valid: {0}")]
    Content(#[from] WireError),
    /// Another mesh.
    #[error("for trust domain {0}, not ours")]
    TrustDomain(TrustDomain),
}

/// Where the snapshot of a state directory is.
pub fn path(state_dir: &Path) -> PathBuf {
    state_dir.join(FILE_NAME)
}

fn encode(held: &Held) -> Vec<u8> {
    let update = Update::Snapshot {
        revision: held.revision,
        stamp: held.stamp,
        trust_domain: held.trust_domain.clone(),
        resources: held.resources.values().cloned().collect(),
        trust_roots: held.roots.clone(),
    };
    let content = ControllerMessage::from(&update).encode_to_vec();
    let mut bytes = Vec::with_capacity(MAGIC.len() + CHECKSUM_BYTES + content.len());
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&Sha256::digest(&content));
    bytes.extend_from_slice(&content);
    bytes
}

fn decode(bytes: &[u8], trust_domain: &TrustDomain) -> Result<Held, SnapshotError> {
    let rest = bytes.strip_prefix(MAGIC).ok_or(SnapshotError::Form)?;
    let (checksum, content) = rest.split_at_checked(CHECKSUM_BYTES).ok_or(SnapshotError::Form)?;
    if Sha256::digest(content).as_slice() != checksum {
        return Err(SnapshotError::Checksum);
    }
    match Update::try_from(ControllerMessage::decode(content)?)? {
        Update::Snapshot {
            revision,
            stamp,
            trust_domain: of,
            resources,
            trust_roots,
        } if of == *trust_domain => Ok(Held {
            revision,
            stamp,
            trust_domain: of,
            resources: resources.into_iter().map(|r| (r.key(), r)).collect(),
            roots: trust_roots,
        }),
        Update::Snapshot { trust_domain: of, .. } => Err(SnapshotError::TrustDomain(of)),
        Update::Delta { .. } => Err(SnapshotError::Form),
    }
}

/// Reads the snapshot; `None` if there is no file.
pub fn load(state_dir: &Path, trust_domain: &TrustDomain) -> Result<Option<Arc<Held>>, SnapshotError> {
    let path = path(state_dir);
    let bytes_max = (MESSAGE_BYTES_MAX + MAGIC.len() + CHECKSUM_BYTES) as u64;
    match fs::metadata(&path) {
        Ok(file) if file.len() > bytes_max => return Err(SnapshotError::TooLarge(file.len())),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(SnapshotError::Read(error)),
    }
    let bytes = fs::read(&path).map_err(SnapshotError::Read)?;
    decode(&bytes, trust_domain).map(|held| Some(Arc::new(held)))
}

/// Replaces the snapshot. A crash at any moment leaves the old one or the new one.
pub fn save(state_dir: &Path, held: &Held) -> io::Result<()> {
    write_atomically(&path(state_dir), &encode(held))
}

/// Replaces a file whole, readable by its owner only.
pub(super) fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(directory)?;
    let beside = path.with_extension("new");
    let mut file = fs::OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(&beside)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    drop(file);
    fs::rename(&beside, path)?;
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use mesh_api::{
        document::Resource,
        wire::TrustRoots,
        workload::{ObjectName, Revision, Service},
    };

    use super::*;

    fn domain() -> TrustDomain {
        TrustDomain::new("test.mesh").unwrap()
    }

    fn held(revision: u64) -> Held {
        let service = Resource::Service(Arc::new(Service {
            name: ObjectName::new("shop", "cart"),
            addresses: vec!["10.0.0.1".parse().unwrap()],
            ports: Vec::new(),
            selector: BTreeMap::new(),
            publish_not_ready: false,
            ..Service::default()
        }));
        Held {
            revision: Revision(revision),
            stamp: 7,
            trust_domain: domain(),
            resources: [(service.key(), service)].into_iter().collect(),
            roots: TrustRoots(vec![vec![1, 2, 3]]),
        }
    }

    #[test]
    fn what_is_saved_is_loaded_and_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("made/by/save");
        assert!(load(&state, &domain()).unwrap().is_none());
        for revision in [1, 2] {
            save(&state, &held(revision)).unwrap();
            assert_eq!(*load(&state, &domain()).unwrap().unwrap(), held(revision));
        }
        // What a crash between write and rename leaves behind does no harm.
        fs::write(path(&state).with_extension("new"), b"half").unwrap();
        assert_eq!(*load(&state, &domain()).unwrap().unwrap(), held(2));
        save(&state, &held(3)).unwrap();
        assert_eq!(load(&state, &domain()).unwrap().unwrap().revision, Revision(3));
    }

    #[test]
    fn a_file_that_was_cut_or_changed_anywhere_is_refused() {
        let good = encode(&held(9));
        assert!(decode(&good, &domain()).is_ok());
        for length in 0..good.len() {
            assert!(decode(&good[..length], &domain()).is_err(), "cut to {length}");
        }
        for place in 0..good.len() {
            let mut changed = good.clone();
            changed[place] ^= 1;
            assert!(decode(&changed, &domain()).is_err(), "changed at {place}");
        }
        let other = TrustDomain::new("other").unwrap();
        assert!(matches!(decode(&good, &other), Err(SnapshotError::TrustDomain(_))));
    }
}
