//! The documents of a cluster, and the revisions that they make: the Kubernetes side of [`Source`].
//!
//! One task takes the watches' notes and owns every change; readers take locks for as long as it takes to copy. Changes
//! are joined into one revision: a short quiet, or a longest wait. Nothing is published before every kind was seen
//! whole, nor by a replica that does not lead; numbers come from the leader's reserve (`leader.rs`), so that they grow
//! from one leader to the next.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_api::{
    document::{Document, DocumentKey, DocumentSet, Kind, Problem, ResourceKey, read_object},
    identity::TrustDomain,
    workload::Revision,
};
use parking_lot::RwLock;
use tokio::{
    sync::{Notify, mpsc, watch},
    time::Instant,
};

use super::{
    health::Metrics,
    leader::Numbers,
    watch::{self as watches, Note, ObjectState, Seen},
};
use crate::controller::source::{
    Compiled, Kept, Outcome, Publisher, Source, SourceError, Summary, Unreadable, text_of,
};

/// How many documents the controller holds at most.
pub const DOCUMENTS_MAX: usize = 500_000;
/// Changes are joined until none has come for this time,
const QUIET: Duration = Duration::from_millis(10);
/// or until the first has waited for this time.
const WAIT_MAX: Duration = Duration::from_millis(100);
/// Of the time between two revisions, compiling takes one part in this many at most.
const COMPILE_SHARE: u32 = 4;

/// What the one task changes.
struct State {
    set: DocumentSet,
    objects: BTreeMap<DocumentKey, ObjectState>,
    unreadable: BTreeMap<DocumentKey, Vec<Problem>>,
    /// The revision that brought each policy's present form.
    brought: BTreeMap<DocumentKey, Revision>,
    current: Arc<Compiled>,
    made: SystemTime,
    synced: bool,
    withheld: Option<String>,
    /// The numbers of the term that this replica leads.
    numbers: Option<Arc<Numbers>>,
}

/// See the module.
pub struct Cluster {
    trust_domain: TrustDomain,
    state: RwLock<State>,
    publisher: Publisher,
    metrics: Arc<Metrics>,
    force: Notify,
    /// Counts what a status may depend on.
    changes: watch::Sender<u64>,
    synced: watch::Sender<bool>,
}

/// What statuses are computed from, for as long as a look takes.
pub struct Known<'a> {
    /// The documents.
    pub set: &'a DocumentSet,
    /// The API server's side of those whose status we write.
    pub objects: &'a BTreeMap<DocumentKey, ObjectState>,
    /// The revision that brought each policy's present form.
    pub brought: &'a BTreeMap<DocumentKey, Revision>,
    /// The newest revision.
    pub current: &'a Compiled,
}

impl Cluster {
    /// An empty one.
    pub fn new(trust_domain: TrustDomain, metrics: Arc<Metrics>) -> Cluster {
        let set = DocumentSet::new();
        let current = Arc::new(Compiled::new(Revision(0), &set, &trust_domain, None));
        Cluster {
            trust_domain,
            state: RwLock::new(State {
                set,
                objects: BTreeMap::new(),
                unreadable: BTreeMap::new(),
                brought: BTreeMap::new(),
                current,
                made: SystemTime::UNIX_EPOCH,
                synced: false,
                withheld: None,
                numbers: None,
            }),
            publisher: Publisher::default(),
            metrics,
            force: Notify::new(),
            changes: watch::Sender::new(0),
            synced: watch::Sender::new(false),
        }
    }

    /// Makes a revision although no document has changed: something that goes with one has.
    pub fn force(&self) {
        self.force.notify_one();
    }

    /// Marked as changed with every change of a document or revision.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Whether every kind has been seen whole.
    pub fn synced(&self) -> watch::Receiver<bool> {
        self.synced.subscribe()
    }

    /// Looks at what is known. Changes wait for as long as that takes.
    pub fn look<T>(&self, at: impl FnOnce(&Known<'_>) -> T) -> T {
        let state = self.state.read();
        at(&Known {
            set: &state.set,
            objects: &state.objects,
            brought: &state.brought,
            current: &state.current,
        })
    }

    /// Takes notes until nobody writes any. `leading` carries the numbers of the term that this replica leads.
    pub async fn run(
        self: Arc<Self>,
        mut notes: mpsc::Receiver<Note>,
        mut leading: watch::Receiver<Option<Arc<Numbers>>>,
    ) {
        let mut writer = Writer {
            cluster: &self,
            waiting: watches::kinds().collect(),
            listed: BTreeMap::new(),
            forced: false,
        };
        // When the first and the last of the unpublished changes came.
        let mut dirty: Option<(Instant, Instant)> = None;
        let mut not_before = Instant::now();
        loop {
            let due = dirty.map(|(first, last)| (last + QUIET).min(first + WAIT_MAX).max(not_before));
            tokio::select! {
                biased;
                () = async { tokio::time::sleep_until(due.unwrap_or_else(Instant::now)).await }, if due.is_some() => {
                    let began = Instant::now();
                    if tokio::task::block_in_place(|| writer.compile()) {
                        dirty = None;
                        not_before = Instant::now() + began.elapsed() * (COMPILE_SHARE - 1);
                    } else {
                        // The next renewal of the Lease brings numbers.
                        not_before = Instant::now() + WAIT_MAX;
                    }
                }
                note = notes.recv() => {
                    let Some(note) = note else { return };
                    if writer.take(note) {
                        let now = Instant::now();
                        dirty = Some((dirty.map_or(now, |(first, _)| first), now));
                    }
                }
                changed = leading.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    self.state.write().numbers = leading.borrow_and_update().clone();
                    self.publisher.reset();
                    writer.forced = true;
                    dirty = Some((Instant::now(), Instant::now()));
                }
                () = self.force.notified() => {
                    writer.forced = true;
                    dirty = Some((Instant::now(), Instant::now()));
                }
            }
        }
    }
}

/// The one task's own.
struct Writer<'a> {
    cluster: &'a Cluster,
    /// Kinds that were not seen whole yet.
    waiting: BTreeSet<Kind>,
    /// What a list that is going on has shown.
    listed: BTreeMap<Kind, BTreeSet<DocumentKey>>,
    forced: bool,
}

impl Writer<'_> {
    /// Whether the note changes what agents may get.
    fn take(&mut self, note: Note) -> bool {
        let mut state = self.cluster.state.write();
        let changed = match note {
            Note::Listing(kind) => {
                self.listed.insert(kind, BTreeSet::new());
                false
            }
            Note::Seen(seen) => {
                if let Some(listed) = self.listed.get_mut(&seen.key.kind) {
                    listed.insert(seen.key.clone());
                }
                state.put(*seen)
            }
            Note::Gone(key) => state.remove(&key),
            Note::Listed(kind) => {
                let seen = self.listed.remove(&kind).unwrap_or_default();
                state.keep_only(kind, &seen) | self.waiting.remove(&kind)
            }
            Note::Absent(kind) => {
                self.listed.remove(&kind);
                state.keep_only(kind, &BTreeSet::new()) | self.waiting.remove(&kind)
            }
        };
        if !state.synced {
            self.cluster
                .metrics
                .unseen(self.waiting.iter().map(|kind| kind.as_str()));
        }
        if self.waiting.is_empty() && !state.synced {
            state.synced = true;
            self.cluster.synced.send_replace(true);
            tracing::info!(documents = state.set.len(), "every kind has been seen");
        }
        drop(state);
        self.cluster.changes.send_modify(|count| *count += 1);
        changed
    }

    /// Makes the next revision if there is anything new in it. `false`: it cannot be numbered yet.
    fn compile(&mut self) -> bool {
        let began = Instant::now();
        let state = self.cluster.state.read();
        let (before, set) = (&state.current, &state.set);
        self.cluster.metrics.documents(set);
        self.cluster.metrics.unreadable(state.unreadable.len());
        if !state.synced || state.withheld.is_some() {
            return true;
        }
        let numbers = state.numbers.clone();
        if numbers.as_ref().is_some_and(|numbers| numbers.are_used_up()) {
            return false;
        }
        let compiled = Compiled::new(Revision(0), set, &self.cluster.trust_domain, Some(before));
        if !self.forced && compiled.same_resources(before) {
            return true;
        }
        let revision = match &numbers {
            // A replica that waits has everything ready but the number.
            None => Revision(0),
            Some(numbers) => match numbers.take() {
                Some(revision) => revision,
                None => return false,
            },
        };
        let compiled = Arc::new(compiled.numbered(revision));
        let mut brought = BTreeMap::new();
        for (key, resource) in compiled.resources.iter() {
            let ResourceKey::Policy(key) = key else { continue };
            let unchanged = before
                .resources
                .get(&ResourceKey::Policy(key.clone()))
                .is_some_and(|old| old == resource);
            let known = state.brought.get(key).filter(|known| unchanged && known.0 != 0);
            brought.insert(key.clone(), known.copied().unwrap_or(revision));
        }
        drop(state);
        let mut state = self.cluster.state.write();
        state.brought = brought;
        state.current = compiled.clone();
        state.made = SystemTime::now();
        let documents = state.set.len();
        drop(state);
        self.forced = false;
        if numbers.is_some() {
            self.cluster.publisher.remember(compiled.clone());
            self.cluster.publisher.publish(compiled);
            self.cluster.metrics.published(revision, began.elapsed());
            tracing::info!(%revision, documents, "a new revision");
        }
        self.cluster.changes.send_modify(|count| *count += 1);
        true
    }
}

impl State {
    fn put(&mut self, seen: Seen) -> bool {
        let Seen {
            key,
            document,
            object,
            state,
        } = seen;
        if let Some(state) = state {
            self.objects.insert(key.clone(), state);
        }
        if self.set.len() >= DOCUMENTS_MAX && self.set.get(&key).is_none() {
            if self.withheld.is_none() {
                tracing::error!(%key, "more than {DOCUMENTS_MAX} documents: nothing new is sent to agents");
            }
            self.withheld = Some(format!("more than {DOCUMENTS_MAX} documents"));
            return false;
        }
        // What it said so far goes on holding: only here is that known.
        let document = match object {
            Some(object) => read_object(key.kind, &object, self.set.get(&key)),
            None => document,
        };
        match document {
            Ok(document) => {
                if let Document::Unreadable(unreadable) = &document {
                    let problems = &unreadable.spec.problems;
                    if self.unreadable.get(&key) != Some(problems) {
                        tracing::warn!(%key, why = explain(problems), "an object cannot be read");
                    }
                    self.unreadable.insert(key.clone(), problems.clone());
                } else {
                    self.unreadable.remove(&key);
                }
                let generation = document.meta().generation;
                match self.set.insert(document) {
                    None => true,
                    Some(old) => {
                        let new = self.set.get(&key);
                        old.meta().generation != generation || !new.is_some_and(|new| new.same_as(&old))
                    }
                }
            }
            Err(problems) => {
                if self.unreadable.get(&key) != Some(&problems) {
                    let why = explain(&problems);
                    tracing::warn!(%key, %why, "an object cannot be read");
                }
                self.unreadable.insert(key, problems);
                false
            }
        }
    }

    fn remove(&mut self, key: &DocumentKey) -> bool {
        self.objects.remove(key);
        self.unreadable.remove(key);
        self.set.remove(key).is_some()
    }

    /// Removes what a whole list did not show.
    fn keep_only(&mut self, kind: Kind, listed: &BTreeSet<DocumentKey>) -> bool {
        let in_set = self.set.of_kind(kind).map(|document| document.key());
        let unreadable = self.unreadable.keys().filter(|key| key.kind == kind).cloned();
        let gone: BTreeSet<DocumentKey> = in_set.chain(unreadable).filter(|key| !listed.contains(key)).collect();
        gone.iter().fold(false, |changed, key| changed | self.remove(key))
    }
}

fn explain(problems: &[Problem]) -> String {
    problems.iter().map(Problem::to_string).collect::<Vec<_>>().join("; ")
}

/// Why this source is not written to.
const USE_KUBECTL: &str =
    "this mesh is kept in Kubernetes: use kubectl, or mesh-ctl policy with the cluster's kubeconfig";

impl Source for Cluster {
    fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    fn published(&self) -> watch::Receiver<Option<Arc<Compiled>>> {
        self.publisher.subscribe()
    }

    fn current(&self) -> Arc<Compiled> {
        self.state.read().current.clone()
    }

    /// Only what this term has published: another leader may have compiled the same number otherwise.
    fn compiled_at(&self, revision: Revision) -> Option<Arc<Compiled>> {
        self.publisher.find(revision, || None)
    }

    /// Numbers outlive a leader, and what they stand for does not; a lost Lease starts them over.
    fn is_lasting(&self) -> bool {
        false
    }

    /// The Lease that had the numbers is lost: agents take no older revision, so that the numbers go on above.
    fn outrun(&self, held: Revision) {
        let numbers = self.state.read().numbers.clone();
        if numbers.is_some_and(|numbers| numbers.raise(held)) {
            tracing::warn!(%held, "an agent holds more than was ever published here: the numbers go on above");
            self.force();
        }
    }

    fn summary(&self) -> Summary {
        let state = self.state.read();
        Summary {
            revision: state.current.revision,
            made: state.made,
            documents: state.set.len(),
        }
    }

    fn documents(&self, kind: &str, namespace: &str, name: &str) -> (Revision, Vec<Kept>) {
        let kind = Kind::find(kind).map_or(kind, |kind| kind.as_str());
        let state = self.state.read();
        let found = state.set.iter().filter(|document| {
            let meta = document.meta();
            (kind.is_empty() || document.kind().as_str() == kind)
                && (namespace.is_empty() || *meta.namespace == *namespace)
                && (name.is_empty() || *meta.name == *name)
        });
        let kept = found.map(|document| {
            let key = document.key();
            let unreadable = state.unreadable.get(&key).map(|all| explain(all)).unwrap_or_default();
            let holding = match document {
                _ if unreadable.is_empty() => None,
                Document::Unreadable(object) => object.spec.last.as_ref().map(|last| last.to_json()),
                // Another kind stays in the set as it could be read last.
                last => Some(last.to_json()),
            };
            Kept {
                generation: document.meta().generation,
                revision: state.brought.get(&key).map_or(0, |revision| revision.0),
                document: document.to_json(),
                unreadable,
                holding,
                key: text_of(&key),
            }
        });
        (state.current.revision, kept.collect())
    }

    fn unreadable(&self) -> (Vec<Unreadable>, bool) {
        let state = self.state.read();
        let all = state.unreadable.iter().map(|(key, problems)| Unreadable {
            key: text_of(key),
            why: explain(problems),
        });
        (all.collect(), state.withheld.is_some())
    }

    fn apply(&self, _: &[(String, String)], _: bool, _: SystemTime) -> Result<Outcome, SourceError> {
        Err(SourceError::NotHere(USE_KUBECTL.to_owned()))
    }

    fn delete(&self, _: &[String], _: bool, _: SystemTime) -> Result<Outcome, SourceError> {
        Err(SourceError::NotHere(USE_KUBECTL.to_owned()))
    }
}
