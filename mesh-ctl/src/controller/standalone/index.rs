//! The standalone source: documents in an embedded store, and the revisions that they make.
//!
//! Whoever changes the documents does so alone: validates, commits to the store, and only then replaces the whole
//! [`State`] and publishes the compiled revision. Readers take whole values, wait for no disk and never see half an apply. A stored document that this
//! program cannot read stays in the store, and nothing new is published until it is replaced or deleted: without a policy,
//! a namespace's label or the service that a policy names, a door would open. Agents keep what they have meanwhile.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use mesh_api::{
    document::{Change, Document, DocumentKey, DocumentSet, Kind, Problem, parse},
    identity::TrustDomain,
    workload::Revision,
};
use parking_lot::{Mutex, RwLock};
use tokio::sync::watch;

use super::store::{self, RevisionRecord, Store, StoreError, Stored};
use crate::controller::source::{
    Compiled, Kept, Outcome, Publisher, Source, SourceError, Summary, Unreadable, key_parts, text_of,
};

/// How many documents the controller holds at most.
pub const DOCUMENTS_MAX: usize = 200_000;

type StoredSet = BTreeMap<String, Arc<Stored>>;

/// One revision's documents; replaced whole.
struct State {
    revision: Revision,
    made: SystemTime,
    stored: StoredSet,
    set: DocumentSet,
    unreadable: BTreeMap<String, String>,
    current: Arc<Compiled>,
}

/// See the module.
pub struct Index {
    store: Arc<Store>,
    trust_domain: TrustDomain,
    /// Held by whoever changes the documents, from the first look to the publication.
    writer: Mutex<()>,
    state: RwLock<Arc<State>>,
    publisher: Publisher,
    /// Agents that hold an older revision got it from a program that may have compiled it otherwise.
    resume_floor: u64,
}

fn milliseconds(time: SystemTime) -> u64 {
    u64::try_from(time.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
}

/// Reads a stored document; the error says why it cannot be.
fn read(key: &str, stored: &Stored) -> Result<Document, String> {
    let documents = parse("store", &stored.document.to_string())
        .map_err(|problems| problems.iter().map(Problem::to_string).collect::<Vec<_>>().join("; "))?;
    let [document] = <[Document; 1]>::try_from(documents).map_err(|all| format!("{} documents", all.len()))?;
    let found = text_of(&document.key());
    if found != key {
        return Err(format!("it says that it is {found}"));
    }
    let mut document = document;
    document.meta_mut().generation = stored.generation;
    Ok(document)
}

/// Reads all stored documents, and says which cannot be.
fn read_all(stored: &StoredSet) -> (DocumentSet, BTreeMap<String, String>) {
    let mut set = DocumentSet::new();
    let mut unreadable = BTreeMap::new();
    for (key, stored) in stored {
        match read(key, stored) {
            Ok(document) => {
                set.insert(document);
            }
            Err(why) => {
                unreadable.insert(key.clone(), why);
            }
        }
    }
    (set, unreadable)
}

impl Index {
    /// Reads the store.
    pub fn open(store: Arc<Store>, trust_domain: TrustDomain) -> Result<Index, StoreError> {
        let loaded = store.load()?;
        let revision = Revision(loaded.revision);
        let newest = store.history_after(loaded.revision.saturating_sub(1))?;
        let (made, stamp) = match newest.first() {
            Some(record) => (UNIX_EPOCH + Duration::from_millis(record.time_ms), record.stamp),
            None => (UNIX_EPOCH, 0),
        };
        let stored: StoredSet = loaded.documents.into_iter().map(|(k, v)| (k, Arc::new(v))).collect();
        let (set, unreadable) = read_all(&stored);
        for (key, why) in &unreadable {
            tracing::error!(document = %key, %why, "a stored document cannot be read; it is kept");
        }
        // An agent may still hold what cannot be read here, so this program does not know what a delta would start from.
        let resume_floor = match unreadable.is_empty() {
            true => resume_floor(&store, loaded.revision)?,
            false => loaded.revision + 1,
        };
        let current = Arc::new(Compiled::new(revision, &set, &trust_domain, None).stamped(stamp));
        let index = Index {
            store,
            trust_domain,
            writer: Mutex::new(()),
            state: RwLock::new(Arc::new(State {
                revision,
                made,
                stored,
                set,
                unreadable,
                current,
            })),
            publisher: Publisher::default(),
            resume_floor,
        };
        index.publish(&index.state());
        Ok(index)
    }

    fn state(&self) -> Arc<State> {
        self.state.read().clone()
    }

    fn publish(&self, state: &State) {
        self.publisher.remember(state.current.clone());
        if !state.unreadable.is_empty() {
            tracing::error!("nothing is sent to agents while a stored document cannot be read");
        } else {
            self.publisher.publish(state.current.clone());
        }
    }

    fn rebuild(&self, revision: Revision, state: &State) -> Result<Option<Compiled>, StoreError> {
        let newest = state.revision;
        let mut stored = state.stored.clone();
        let mut records = self.store.history_after(revision.0.saturating_sub(1))?;
        // The last is the wanted one itself, if it is kept.
        let stamp = records
            .pop_if(|record| record.revision == revision.0)
            .map_or(0, |record| record.stamp);
        // An apply may have come in between.
        records.retain(|record| record.revision <= newest.0);
        if records.len() as u64 != newest.0 - revision.0 {
            return Ok(None);
        }
        for change in records.into_iter().flat_map(|record| record.changes) {
            match change.before {
                Some(before) => stored.insert(change.key, Arc::new(before)),
                None => stored.remove(&change.key),
            };
        }
        let (set, unreadable) = read_all(&stored);
        let known = unreadable.is_empty();
        Ok(known.then(|| Compiled::new(revision, &set, &self.trust_domain, Some(&state.current)).stamped(stamp)))
    }

    fn apply_all(&self, sources: &[(String, String)], dry_run: bool, now: SystemTime) -> Result<Outcome, StoreError> {
        let mut problems = Vec::new();
        let mut documents: Vec<(String, Document)> = Vec::new();
        let mut seen: BTreeMap<DocumentKey, String> = BTreeMap::new();
        for (name, yaml) in sources {
            match parse(name, yaml) {
                Ok(parsed) => {
                    for document in parsed {
                        if let Some(first) = seen.insert(document.key(), name.clone()) {
                            problems.push(plain_problem(
                                name,
                                format!("{} is in {first} already", document.key()),
                                "each document once",
                            ));
                        }
                        documents.push((name.clone(), document));
                    }
                }
                Err(found) => problems.extend(found),
            }
        }
        if documents.is_empty() && problems.is_empty() {
            let source = sources.first().map_or("", |(name, _)| name);
            problems.push(plain_problem(source, "no document in it".to_owned(), "at least one"));
        }
        let _alone = self.writer.lock();
        let state = self.state();
        let mut outcome = Outcome {
            revision: state.revision,
            problems,
            ..Outcome::default()
        };
        if !outcome.problems.is_empty() {
            return Ok(outcome);
        }
        let mut set = state.set.clone();
        let mut records = Vec::new();
        let revision = Revision(state.revision.0 + 1);
        for (_, mut document) in documents {
            let key = document.key();
            let text = text_of(&key);
            let before = state.stored.get(&text).map(|stored| Stored::clone(stored));
            let change = match (&before, state.set.get(&key)) {
                (None, _) => Change::Created,
                (Some(_), Some(old)) if old.same_as(&document) => Change::Unchanged,
                (Some(_), _) => Change::Changed,
            };
            // The controller's own clock says how old a document is, not the file that it came in.
            document.meta_mut().created_unix = match state.set.get(&key) {
                Some(old) => old.meta().created_unix,
                None => milliseconds(now) / 1000,
            };
            outcome.changes.push((key, change));
            if change == Change::Unchanged {
                continue;
            }
            document.meta_mut().generation = 0;
            let generation = before.as_ref().map_or(0, |stored| stored.generation) + 1;
            let after = Stored {
                generation,
                revision: revision.0,
                document: document.to_json(),
            };
            document.meta_mut().generation = generation;
            set.insert(document);
            records.push(store::Change {
                key: text,
                before,
                after: Some(after),
            });
        }
        if set.len() > DOCUMENTS_MAX {
            outcome.changes.clear();
            let expected = format!("at most {DOCUMENTS_MAX}");
            outcome.problems = vec![plain_problem(
                "",
                format!("this makes {} documents", set.len()),
                &expected,
            )];
            return Ok(outcome);
        }
        outcome.warnings = set.validate();
        self.finish(&state, set, records, dry_run, now, &mut outcome)?;
        Ok(outcome)
    }

    fn delete_all(&self, keys: &[String], dry_run: bool, now: SystemTime) -> Result<Outcome, StoreError> {
        let _alone = self.writer.lock();
        let state = self.state();
        let mut outcome = Outcome {
            revision: state.revision,
            ..Outcome::default()
        };
        let mut set = state.set.clone();
        let mut records = Vec::new();
        for text in keys.iter().collect::<BTreeSet<_>>() {
            let (kind, namespace, name) = key_parts(text);
            let Some(before) = state.stored.get(text) else {
                let message = format!("{kind} {namespace}/{name} is not there");
                outcome.warnings.push(plain_problem("", message, ""));
                continue;
            };
            if let Some(kind) = Kind::find(kind) {
                let key = DocumentKey::new(kind, namespace, name);
                set.remove(&key);
                outcome.changes.push((key, Change::Removed));
            }
            records.push(store::Change {
                key: text.clone(),
                before: Some(Stored::clone(before)),
                after: None,
            });
        }
        self.finish(&state, set, records, dry_run, now, &mut outcome)?;
        Ok(outcome)
    }

    fn finish(
        &self,
        state: &State,
        set: DocumentSet,
        changes: Vec<store::Change>,
        dry_run: bool,
        now: SystemTime,
        outcome: &mut Outcome,
    ) -> Result<(), StoreError> {
        if dry_run || changes.is_empty() {
            return Ok(());
        }
        let revision = Revision(state.revision.0 + 1);
        let keys = changes.iter().filter_map(|change| {
            let (kind, namespace, name) = key_parts(&change.key);
            Some(DocumentKey::new(Kind::find(kind)?, namespace, name))
        });
        let current = state
            .current
            .next(revision, [&state.set, &set], &self.trust_domain, &keys.collect());
        let record = RevisionRecord {
            revision: revision.0,
            time_ms: milliseconds(now),
            changes,
            stamp: current.stamp,
        };
        self.store.commit(&record)?;
        let (mut stored, mut unreadable) = (state.stored.clone(), state.unreadable.clone());
        for change in record.changes {
            unreadable.remove(&change.key);
            match change.after {
                Some(after) => stored.insert(change.key, Arc::new(after)),
                None => stored.remove(&change.key),
            };
        }
        let state = Arc::new(State {
            revision,
            made: now,
            stored,
            set,
            unreadable,
            current: Arc::new(current),
        });
        *self.state.write() = state.clone();
        self.publish(&state);
        tracing::info!(%revision, documents = state.stored.len(), "a new revision");
        outcome.revision = revision;
        Ok(())
    }
}

/// The whole chain of causes: the operator sees one line.
pub fn failed(error: StoreError) -> SourceError {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    SourceError::Failed(format!("the store failed, nothing was changed: {text}"))
}

impl Source for Index {
    fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    fn published(&self) -> watch::Receiver<Option<Arc<Compiled>>> {
        self.publisher.subscribe()
    }

    fn current(&self) -> Arc<Compiled> {
        self.state().current.clone()
    }

    fn compiled_at(&self, revision: Revision) -> Option<Arc<Compiled>> {
        let state = self.state();
        if revision.0 == 0 || revision > state.revision || revision.0 < self.resume_floor {
            return None;
        }
        self.publisher.find(revision, || match self.rebuild(revision, &state) {
            Ok(compiled) => Some(Arc::new(compiled?)),
            Err(error) => {
                tracing::warn!(%error, %revision, "the history cannot be read");
                None
            }
        })
    }

    fn is_lasting(&self) -> bool {
        true
    }

    /// The store is older than the mesh, which only the operator can set right: the agents go on by what they hold.
    fn outrun(&self, held: Revision) {
        tracing::error!(%held, newest = %self.summary().revision, "an agent holds more than the store: was it restored?");
    }

    fn summary(&self) -> Summary {
        let state = self.state();
        Summary {
            revision: state.revision,
            made: state.made,
            documents: state.stored.len(),
        }
    }

    fn documents(&self, kind: &str, namespace: &str, name: &str) -> (Revision, Vec<Kept>) {
        let kind = Kind::find(kind).map_or(kind, |kind| kind.as_str());
        let state = self.state();
        let matches = |key: &str| {
            let parts = key_parts(key);
            (kind.is_empty() || parts.0 == kind)
                && (namespace.is_empty() || parts.1 == namespace)
                && (name.is_empty() || parts.2 == name)
        };
        let found = state
            .stored
            .iter()
            .filter(|(key, _)| matches(key))
            .map(|(key, stored)| Kept {
                key: key.clone(),
                generation: stored.generation,
                revision: stored.revision,
                document: stored.document.clone(),
                unreadable: state.unreadable.get(key).cloned().unwrap_or_default(),
                holding: None,
            });
        (state.revision, found.collect())
    }

    fn unreadable(&self) -> (Vec<Unreadable>, bool) {
        let state = self.state();
        let all = state.unreadable.iter().map(|(key, why)| Unreadable {
            key: key.clone(),
            why: why.clone(),
        });
        (all.collect(), !state.unreadable.is_empty())
    }

    fn apply(&self, sources: &[(String, String)], dry_run: bool, now: SystemTime) -> Result<Outcome, SourceError> {
        self.apply_all(sources, dry_run, now).map_err(failed)
    }

    fn delete(&self, keys: &[String], dry_run: bool, now: SystemTime) -> Result<Outcome, SourceError> {
        self.delete_all(keys, dry_run, now).map_err(failed)
    }
}

fn plain_problem(source: &str, message: String, expected: &str) -> Problem {
    Problem {
        source: source.to_owned(),
        line: None,
        path: String::new(),
        message,
        expected: expected.to_owned(),
    }
}

/// Another version of this program may compile the same documents otherwise, so what agents got from it is no base for
/// a delta.
fn resume_floor(store: &Store, revision: u64) -> Result<u64, StoreError> {
    let program = env!("CARGO_PKG_VERSION").as_bytes();
    if store.setting("program")?.as_deref() == Some(program) {
        let floor = store.setting("resume.floor")?.and_then(|bytes| bytes.try_into().ok());
        return Ok(floor.map_or(revision + 1, u64::from_le_bytes));
    }
    let floor = revision + 1;
    store.put_settings(&[("program", program), ("resume.floor", &floor.to_le_bytes())])?;
    Ok(floor)
}

#[cfg(test)]
mod tests {
    use mesh_api::document::Resource;

    use super::*;

    fn open(dir: &std::path::Path) -> (Arc<Store>, Index) {
        let store = Arc::new(Store::open(dir, 10).unwrap());
        let index = Index::open(store.clone(), TrustDomain::new("cluster.local").unwrap()).unwrap();
        (store, index)
    }

    fn apply(index: &Index, yaml: &str) -> Outcome {
        let sources = [("test.yaml".to_owned(), yaml.to_owned())];
        index.apply(&sources, false, SystemTime::now()).unwrap()
    }

    const STRICT: &str = "apiVersion: nodemesh.io/v1alpha1\nkind: MeshPolicy\nmetadata: {name: strict, namespace: shop}\n\
                          spec: {targetRefs: [{kind: Namespace, name: shop}], mtls: {mode: strict}}\n";

    fn service(name: &str, port: u16) -> String {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\n\
             spec: {{clusterIP: 10.96.0.{port}, ports: [{{port: {port}}}]}}\n"
        )
    }

    /// Makes a stored document one that no program can read, as a newer one might have left it.
    fn spoil(store: &Store, index: &Index, key: &str) {
        let revision = index.summary().revision;
        let before = Stored::clone(&index.state().stored[key]);
        let mut after = before.clone();
        after.document["spec"] = serde_json::json!({ "fromTheFuture": true });
        after.document["apiVersion"] = "nodemesh.io/v9".into();
        let change = store::Change {
            key: key.to_owned(),
            before: Some(before),
            after: Some(after),
        };
        let record = RevisionRecord {
            stamp: 0,
            revision: revision.0 + 1,
            time_ms: 0,
            changes: vec![change],
        };
        store.commit(&record).unwrap();
    }

    #[test]
    fn an_older_revision_is_rebuilt_from_the_history_as_far_as_that_goes() {
        let dir = tempfile::tempdir().unwrap();
        {
            let (_store, index) = open(dir.path());
            for n in 1..=20 {
                apply(&index, &service(&format!("s{}", n % 3), n));
            }
        }
        let (_store, index) = open(dir.path());
        assert_eq!(index.summary().revision, Revision(20));
        assert!(index.compiled_at(Revision(0)).is_none());
        assert!(index.compiled_at(Revision(21)).is_none());
        assert!(index.compiled_at(Revision(9)).is_none(), "ten are kept");
        for n in 10..=20 {
            let compiled = index.compiled_at(Revision(n)).unwrap();
            let mut ports: Vec<u16> = compiled
                .resources
                .values()
                .filter_map(|resource| match resource {
                    Resource::Service(service) => service.ports.first().map(|port| port.port),
                    _ => None,
                })
                .collect();
            ports.sort();
            assert_eq!(ports, [n as u16 - 2, n as u16 - 1, n as u16], "revision {n}");
        }
    }

    #[test]
    fn an_unreadable_document_is_kept_and_withholds_and_its_replacement_publishes() {
        let cart = service("cart", 80);
        let cases = [
            ("MeshPolicy/shop/strict", STRICT, true),
            ("MeshPolicy/shop/strict", STRICT, false),
            ("Service/shop/cart", cart.as_str(), true),
            ("Service/shop/cart", cart.as_str(), false),
        ];
        for (key, text, replace) in cases {
            let (kind, ..) = key_parts(key);
            let dir = tempfile::tempdir().unwrap();
            {
                let (store, index) = open(dir.path());
                apply(&index, &format!("{STRICT}---\n{cart}"));
                spoil(&store, &index, key);
            }
            let (_store, index) = open(dir.path());
            assert!(
                index.published().borrow().is_none(),
                "nothing may be published without it"
            );
            let (unreadable, withheld) = index.unreadable();
            assert_eq!((unreadable.len(), withheld), (1, true));
            assert_eq!(index.documents(kind, "shop", "").1.len(), 1, "it must not be lost");
            assert!(
                index.compiled_at(Revision(1)).is_none(),
                "an agent may hold what cannot be read"
            );

            apply(&index, &service("other", 81));
            assert!(
                index.published().borrow().is_none(),
                "another apply must not publish either"
            );
            if replace {
                apply(&index, text);
            } else {
                index.delete(&[key.to_owned()], false, SystemTime::now()).unwrap();
            }
            let published = index.published().borrow().clone().unwrap();
            assert_eq!(published.revision, Revision(4));
            assert_eq!(published.resources.len(), if replace { 3 } else { 2 });
            assert!(!index.unreadable().1);
        }
    }
}
