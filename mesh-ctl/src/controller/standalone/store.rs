//! The embedded store: documents, numbered revisions, the CA's key and the join tokens in one redb file.
//!
//! Every change is one durable transaction: the documents, the revision counter and the history entry go to disk together,
//! or not at all, whatever kills the process. The store keeps documents as the JSON that was accepted and never interprets
//! it: a document that a newer or older program cannot read is still here, and can still be listed and replaced.
//! It must never acknowledge what is not on disk, and never forget a document because it does not parse.

use std::{collections::BTreeMap, path::Path};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};

/// The layout of the tables below; a store of another layout is refused, never rewritten by guess.
const FORMAT: u64 = 1;
/// The store's file within the data directory.
pub const FILE_NAME: &str = "store.redb";
/// How many join tokens may be alive at once.
pub const TOKENS_MAX: usize = 10_000;

const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
const DOCUMENTS: TableDefinition<&str, &[u8]> = TableDefinition::new("documents");
const REVISIONS: TableDefinition<u64, &[u8]> = TableDefinition::new("revisions");
const TOKENS: TableDefinition<&str, &[u8]> = TableDefinition::new("tokens");

/// Why the store could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process holds the file.
    #[error("{0} is open in another process: is a controller running on this data directory already?")]
    Busy(String),
    /// The file system said no.
    #[error("{0}")]
    Io(String, #[source] std::io::Error),
    /// The database said no.
    #[error("the store")]
    Database(#[source] Box<redb::Error>),
    /// The file was written by a program with another layout.
    #[error("the store has format {0}, this program reads format {FORMAT}")]
    Format(u64),
    /// A record is not the JSON that this program writes.
    #[error("the store's record {0}")]
    Record(String, #[source] serde_json::Error),
    /// [`TOKENS_MAX`] tokens are alive.
    #[error("{TOKENS_MAX} join tokens are alive: delete some or let them expire")]
    TooManyTokens,
}

impl<E: Into<redb::Error>> From<E> for StoreError {
    fn from(error: E) -> StoreError {
        StoreError::Database(Box::new(error.into()))
    }
}

/// A document as it lies in the store.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stored {
    /// Counts the changes of this document, from 1.
    pub generation: u64,
    /// The revision that brought the present text.
    pub revision: u64,
    /// The document in its Kubernetes form.
    pub document: serde_json::Value,
}

/// What one revision did to one document.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Change {
    /// `Kind/namespace/name`; the namespace is empty for kinds that have none.
    pub key: String,
    /// The document before; `None` when the revision created it.
    pub before: Option<Stored>,
    /// The document after; `None` when the revision deleted it.
    pub after: Option<Stored>,
}

/// One numbered revision of the history.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RevisionRecord {
    /// Its number.
    pub revision: u64,
    /// When it was accepted, in milliseconds since 1970.
    pub time_ms: u64,
    /// What it changed.
    pub changes: Vec<Change>,
    /// Drawn when it was made; 0 if a program made it that drew none.
    #[serde(default)]
    pub stamp: u64,
}

/// A join token as it lies in the store: the secret itself is never kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StoredToken {
    /// The node that may join with it.
    pub node: String,
    /// SHA-256 of the secret half.
    pub secret_sha256: [u8; 32],
    /// The end of its life, in seconds since 1970.
    pub expires: u64,
}

/// Everything that a starting controller reads.
#[derive(Debug, Default)]
pub struct Loaded {
    /// The newest revision; 0 in a new store.
    pub revision: u64,
    /// All documents by key.
    pub documents: BTreeMap<String, Stored>,
}

/// The open store. All methods block on the disk; callers on a runtime use `spawn_blocking`.
pub struct Store {
    database: Database,
    history_max: u64,
}

fn decode<T: for<'de> Deserialize<'de>>(what: &str, bytes: &[u8]) -> Result<T, StoreError> {
    serde_json::from_slice(bytes).map_err(|e| StoreError::Record(what.to_owned(), e))
}

fn encode<T: Serialize>(what: &str, value: &T) -> Result<Vec<u8>, StoreError> {
    serde_json::to_vec(value).map_err(|e| StoreError::Record(what.to_owned(), e))
}

fn number(bytes: &[u8]) -> u64 {
    bytes.try_into().map(u64::from_le_bytes).unwrap_or(0)
}

impl Store {
    /// Opens the store of a data directory, making both when they are absent, readable by the owner only.
    pub fn open(dir: &Path, history_max: u64) -> Result<Store, StoreError> {
        use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
        let io = |what: &str| {
            let what = what.to_owned();
            move |e| StoreError::Io(what, e)
        };
        if !dir.exists() {
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(dir)
                .map_err(io(&dir.display().to_string()))?;
        }
        let path = dir.join(FILE_NAME);
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(io(&path.display().to_string()))?;
        let database = Database::builder().create_file(file).map_err(|e| match e {
            redb::DatabaseError::DatabaseAlreadyOpen => StoreError::Busy(path.display().to_string()),
            other => other.into(),
        })?;
        let store = Store { database, history_max };
        store.prepare()?;
        Ok(store)
    }

    fn prepare(&self) -> Result<(), StoreError> {
        let transaction = self.database.begin_write()?;
        {
            let mut meta = transaction.open_table(META)?;
            let format = meta.get("format")?.map(|v| number(v.value()));
            match format {
                None => {
                    meta.insert("format", FORMAT.to_le_bytes().as_slice())?;
                }
                Some(FORMAT) => {}
                Some(other) => return Err(StoreError::Format(other)),
            }
            transaction.open_table(DOCUMENTS)?;
            transaction.open_table(REVISIONS)?;
            transaction.open_table(TOKENS)?;
        }
        transaction.commit()?;
        Ok(())
    }

    /// Reads the newest revision whole.
    pub fn load(&self) -> Result<Loaded, StoreError> {
        let transaction = self.database.begin_read()?;
        let meta = transaction.open_table(META)?;
        let revision = meta.get("revision")?.map(|v| number(v.value())).unwrap_or(0);
        let mut documents = BTreeMap::new();
        for entry in transaction.open_table(DOCUMENTS)?.iter()? {
            let (key, value) = entry?;
            documents.insert(key.value().to_owned(), decode(key.value(), value.value())?);
        }
        Ok(Loaded { revision, documents })
    }

    /// Makes `record` the newest revision. When this returns `Ok`, it is on disk.
    pub fn commit(&self, record: &RevisionRecord) -> Result<(), StoreError> {
        let transaction = self.database.begin_write()?;
        {
            let mut documents = transaction.open_table(DOCUMENTS)?;
            for change in &record.changes {
                match &change.after {
                    Some(stored) => {
                        let bytes = encode(&change.key, stored)?;
                        documents.insert(change.key.as_str(), bytes.as_slice())?;
                    }
                    None => {
                        documents.remove(change.key.as_str())?;
                    }
                }
            }
            let mut revisions = transaction.open_table(REVISIONS)?;
            let bytes = encode("revision", record)?;
            revisions.insert(record.revision, bytes.as_slice())?;
            let forget_to = record.revision.saturating_sub(self.history_max);
            revisions.retain_in(..=forget_to, |_, _| false)?;
            let mut meta = transaction.open_table(META)?;
            meta.insert("revision", record.revision.to_le_bytes().as_slice())?;
        }
        transaction.commit()?;
        Ok(())
    }

    /// The kept revisions after `revision`, newest first.
    pub fn history_after(&self, revision: u64) -> Result<Vec<RevisionRecord>, StoreError> {
        let transaction = self.database.begin_read()?;
        let revisions = transaction.open_table(REVISIONS)?;
        let mut records = Vec::new();
        for entry in revisions.range(revision.saturating_add(1)..)?.rev() {
            let (number, value) = entry?;
            records.push(decode(&format!("revision {}", number.value()), value.value())?);
        }
        Ok(records)
    }

    /// A named secret or setting.
    pub fn setting(&self, name: &str) -> Result<Option<Vec<u8>>, StoreError> {
        let transaction = self.database.begin_read()?;
        let meta = transaction.open_table(META)?;
        Ok(meta.get(name)?.map(|v| v.value().to_vec()))
    }

    /// Writes settings together.
    pub fn put_settings(&self, settings: &[(&str, &[u8])]) -> Result<(), StoreError> {
        let transaction = self.database.begin_write()?;
        {
            let mut meta = transaction.open_table(META)?;
            for (name, value) in settings {
                meta.insert(*name, *value)?;
            }
        }
        transaction.commit()?;
        Ok(())
    }

    /// Keeps a join token under its public id, and drops those that expired before `now` (seconds since 1970).
    pub fn put_token(&self, id: &str, token: &StoredToken, now: u64) -> Result<(), StoreError> {
        let transaction = self.database.begin_write()?;
        {
            let mut tokens = transaction.open_table(TOKENS)?;
            tokens.retain(|_, value| {
                serde_json::from_slice::<StoredToken>(value).is_ok_and(|token| token.expires > now)
            })?;
            if tokens.iter()?.count() >= TOKENS_MAX {
                return Err(StoreError::TooManyTokens);
            }
            let bytes = encode("token", token)?;
            tokens.insert(id, bytes.as_slice())?;
        }
        transaction.commit()?;
        Ok(())
    }

    /// The join token of that public id.
    pub fn token(&self, id: &str) -> Result<Option<StoredToken>, StoreError> {
        let transaction = self.database.begin_read()?;
        let tokens = transaction.open_table(TOKENS)?;
        match tokens.get(id)? {
            Some(value) => Ok(Some(decode("token", value.value())?)),
            None => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn record(revision: u64, name: &str, text: Option<u64>) -> RevisionRecord {
        RevisionRecord {
            stamp: 0,
            revision,
            time_ms: 0,
            changes: vec![Change {
                key: format!("Service/shop/{name}"),
                before: None,
                after: text.map(|n| Stored {
                    generation: 1,
                    revision,
                    document: json!({ "n": n }),
                }),
            }],
        }
    }

    #[test]
    fn a_revision_is_there_after_reopening_and_history_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        {
            let store = Store::open(dir.path(), 3).unwrap();
            for n in 1..=10 {
                store.commit(&record(n, &format!("s{}", n % 4), Some(n))).unwrap();
            }
            store.commit(&record(11, "s0", None)).unwrap();
            assert!(matches!(Store::open(dir.path(), 3), Err(StoreError::Busy(_))));
        }
        let store = Store::open(dir.path(), 3).unwrap();
        let loaded = store.load().unwrap();
        assert_eq!(loaded.revision, 11);
        assert_eq!(
            loaded.documents.keys().collect::<Vec<_>>(),
            ["Service/shop/s1", "Service/shop/s2", "Service/shop/s3"]
        );
        assert_eq!(loaded.documents["Service/shop/s2"].document, json!({ "n": 10 }));
        let history: Vec<u64> = store.history_after(0).unwrap().iter().map(|r| r.revision).collect();
        assert_eq!(history, [11, 10, 9]);
        assert_eq!(store.history_after(10).unwrap().len(), 1);
    }

    #[test]
    fn another_format_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        {
            let store = Store::open(dir.path(), 3).unwrap();
            store.put_settings(&[("format", &7u64.to_le_bytes())]).unwrap();
        }
        assert!(matches!(Store::open(dir.path(), 3), Err(StoreError::Format(7))));
    }

    #[test]
    fn expired_tokens_are_dropped_when_one_is_added() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), 3).unwrap();
        let token = |expires| StoredToken {
            node: "n1".into(),
            secret_sha256: [0; 32],
            expires,
        };
        store.put_token("a", &token(100), 0).unwrap();
        store.put_token("b", &token(300), 200).unwrap();
        assert!(store.token("a").unwrap().is_none());
        assert!(store.token("b").unwrap().is_some());
    }
}
