//! The seam between where documents come from and what agents are told of them.
//!
//! A [`Source`] owns the documents: the embedded store (`standalone/`) or the API server's watches (`kubernetes/`). What
//! it makes of them is a [`Compiled`] revision, handed out by [`Publisher`]: agents' streams wait for the newest and
//! resume from one that is still known. An [`Admission`] says whether a node may join. Neither knows of sockets.

use std::{
    collections::{BTreeSet, VecDeque},
    future::Future,
    pin::Pin,
    sync::Arc,
    time::SystemTime,
};

use mesh_api::{
    document::{Change, DocumentKey, DocumentSet, Kind, Problem, Resource, ResourceKey},
    identity::{SpiffeId, TrustDomain},
    shared_map::SharedMap,
    workload::Revision,
};
use parking_lot::Mutex;
use tokio::sync::watch;

/// How many compiled revisions are kept for agents that resume.
pub const COMPILED_MAX: usize = 8;

/// One revision as agents see it, before the node's filter.
#[derive(Clone)]
pub struct Compiled {
    /// Its number.
    pub revision: Revision,
    /// Drawn when it was made. A store that is restored from a backup gives old numbers to new revisions; by its stamp an
    /// agent's revision is told from the controller's own of that number.
    pub stamp: u64,
    /// Its resources. Those that did not change are shared with the revision before.
    pub resources: SharedMap<ResourceKey, Resource>,
    /// Which identities of the mesh each node runs, and in how many workloads.
    pub(super) identities: SharedMap<(Arc<str>, SpiffeId), usize>,
}

/// What an apply or delete came to.
#[derive(Debug, Default)]
pub struct Outcome {
    /// The revision that holds now.
    pub revision: Revision,
    /// What happened to each document, in the order given.
    pub changes: Vec<(DocumentKey, Change)>,
    /// Why nothing was changed; empty if it was.
    pub problems: Vec<Problem>,
    /// What is odd but was accepted.
    pub warnings: Vec<Problem>,
}

/// A document that this program cannot read.
#[derive(Clone, Debug)]
pub struct Unreadable {
    /// `Kind/namespace/name`.
    pub key: String,
    /// Why.
    pub why: String,
}

/// A document as the source holds it.
pub struct Kept {
    /// `Kind/namespace/name`.
    pub key: String,
    /// Counts its changes.
    pub generation: u64,
    /// The revision that brought its present form; 0 if the source does not say.
    pub revision: u64,
    /// The whole document.
    pub document: serde_json::Value,
    /// Why it cannot be read; empty if it can.
    pub unreadable: String,
    /// If it cannot be read: what it said when it could be, which goes on to hold.
    pub holding: Option<serde_json::Value>,
}

/// Where the source stands.
#[derive(Clone, Copy, Debug)]
pub struct Summary {
    /// The newest revision.
    pub revision: Revision,
    /// When it was made.
    pub made: SystemTime,
    /// How many documents there are.
    pub documents: usize,
}

/// Why a source did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// It failed; nothing was changed.
    #[error("{0}")]
    Failed(String),
    /// This source is changed in another way.
    #[error("{0}")]
    NotHere(String),
}

/// A future that a trait object returns.
pub type Waiting<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Where the documents are.
pub trait Source: Send + Sync + 'static {
    /// The trust domain.
    fn trust_domain(&self) -> &TrustDomain;
    /// What agents are to hold; `None` while nothing may be published.
    fn published(&self) -> watch::Receiver<Option<Arc<Compiled>>>;
    /// The newest revision as compiled, published or not.
    fn current(&self) -> Arc<Compiled>;
    /// The revision of that number, if an agent that holds it can be brought on from it. May block on a disk.
    fn compiled_at(&self, revision: Revision) -> Option<Arc<Compiled>>;
    /// Whether a number means the same revision for ever. If not, only an agent that acked it to this very process
    /// resumes by it.
    fn is_lasting(&self) -> bool;
    /// An agent holds a revision that is newer than any that is known here.
    fn outrun(&self, held: Revision);
    /// Where it stands.
    fn summary(&self) -> Summary;
    /// The documents that match; an empty field matches everything.
    fn documents(&self, kind: &str, namespace: &str, name: &str) -> (Revision, Vec<Kept>);
    /// Documents that cannot be read, and whether that withholds revisions from agents.
    fn unreadable(&self) -> (Vec<Unreadable>, bool);
    /// Validates all sources together and makes them the next revision, or changes nothing. May block on a disk.
    fn apply(&self, sources: &[(String, String)], dry_run: bool, now: SystemTime) -> Result<Outcome, SourceError>;
    /// Deletes documents by `Kind/namespace/name`; one that is not there is a warning. May block on a disk.
    fn delete(&self, keys: &[String], dry_run: bool, now: SystemTime) -> Result<Outcome, SourceError>;
}

/// Why a node was not admitted.
#[derive(Debug, thiserror::Error)]
pub enum AdmissionError {
    /// The proof is not one of this node now. What the caller is told says no more than that.
    #[error("{told}")]
    Refused {
        /// What the caller is told.
        told: &'static str,
        /// For the controller's own log.
        why: String,
    },
    /// It cannot be checked now.
    #[error("the token cannot be checked")]
    Failed(String),
}

/// Who says whether a node may join.
pub trait Admission: Send + Sync + 'static {
    /// Whether the bearer of `token` is the agent of `node`.
    fn admit<'a>(&'a self, token: &'a str, node: &'a str) -> Waiting<'a, Result<(), AdmissionError>>;
    /// Makes a token for a node.
    fn issue(&self, node: &str, ttl: std::time::Duration, now: SystemTime) -> Result<String, SourceError>;
}

/// The key as the operator's service writes it.
pub fn text_key(kind: &str, namespace: &str, name: &str) -> String {
    let (kind, namespace) = match Kind::find(kind) {
        Some(kind) if kind.is_namespaced() => (kind.as_str(), namespace),
        Some(kind) => (kind.as_str(), ""),
        None => (kind, namespace),
    };
    format!("{kind}/{namespace}/{name}")
}

/// The text of a key.
pub fn text_of(key: &DocumentKey) -> String {
    text_key(key.kind.as_str(), &key.namespace, &key.name)
}

/// The parts of a text key.
pub fn key_parts(key: &str) -> (&str, &str, &str) {
    let mut parts = key.splitn(3, '/');
    let mut next = || parts.next().unwrap_or_default();
    (next(), next(), next())
}

impl Compiled {
    /// Compiles a set; what did not change since `before` is shared with it.
    pub fn new(revision: Revision, set: &DocumentSet, domain: &TrustDomain, before: Option<&Compiled>) -> Compiled {
        let resources = set.resources(domain);
        let all: SharedMap<_, _> = resources
            .into_iter()
            .map(|resource| (resource.key(), resource))
            .collect();
        let mut compiled = before.cloned().unwrap_or_else(|| Compiled {
            revision,
            stamp: 0,
            resources: SharedMap::with_capacity(all.len()),
            identities: SharedMap::default(),
        });
        compiled.revision = revision;
        compiled.stamp = new_stamp();
        let mut changes = Vec::new();
        all.differences(&compiled.resources, |key, resource| {
            changes.push((key.clone(), resource.cloned()))
        });
        compiled.change(changes);
        compiled
    }

    /// The next revision, by what has become of some documents. It costs as much as there is change.
    pub fn next(
        &self,
        revision: Revision,
        [old, new]: [&DocumentSet; 2],
        domain: &TrustDomain,
        changed: &BTreeSet<DocumentKey>,
    ) -> Compiled {
        let Some(changes) = new.changed_resources(old, domain, changed) else {
            return Compiled::new(revision, new, domain, Some(self));
        };
        let mut next = Compiled {
            revision,
            stamp: new_stamp(),
            ..self.clone()
        };
        next.change(changes);
        next
    }

    fn change(&mut self, changes: impl IntoIterator<Item = (ResourceKey, Option<Resource>)>) {
        for (key, now) in changes {
            if now.as_ref() == self.resources.get(&key) {
                continue;
            }
            let place = |resource: &Resource| match resource {
                // Who is outside of the mesh needs no certificate, so nobody gets one in its name.
                Resource::Workload(one) if one.enrolled => Some((one.node.clone(), one.identity.clone())),
                _ => None,
            };
            let (came, went) = (now.as_ref().and_then(place), self.resources.get(&key).and_then(place));
            match now {
                Some(now) => drop(self.resources.insert(key, now)),
                None => drop(self.resources.remove(&key)),
            }
            if let Some(place) = came {
                let count = self.identities.get(&place).copied().unwrap_or(0);
                self.identities.insert(place, count + 1);
            }
            if let Some(place) = went {
                match self.identities.get(&place).copied().unwrap_or(0) {
                    0 | 1 => drop(self.identities.remove(&place)),
                    count => drop(self.identities.insert(place, count - 1)),
                }
            }
        }
    }

    /// The same with the stamp that it was given when it was made.
    pub fn stamped(self, stamp: u64) -> Compiled {
        Compiled { stamp, ..self }
    }

    /// The same under another number.
    pub fn numbered(self, revision: Revision) -> Compiled {
        Compiled { revision, ..self }
    }

    /// Whether both have the same resources.
    pub fn same_resources(&self, before: &Compiled) -> bool {
        self.resources == before.resources
    }

    /// Whether a workload of the mesh with that identity runs on that node.
    pub fn runs(&self, node: &str, identity: &SpiffeId) -> bool {
        self.identities.contains_key(&(node.into(), identity.clone()))
    }
}

/// A number that no other revision has, nor will have. Never 0, which means that it is not known.
fn new_stamp() -> u64 {
    rand::random::<u64>() | 1
}

/// Hands compiled revisions to the agents' streams.
pub struct Publisher {
    /// Newest last.
    recent: Mutex<VecDeque<Arc<Compiled>>>,
    published: watch::Sender<Option<Arc<Compiled>>>,
}

impl Default for Publisher {
    fn default() -> Publisher {
        Publisher {
            recent: Mutex::default(),
            published: watch::Sender::new(None),
        }
    }
}

impl Publisher {
    /// Remembers a revision for agents that resume.
    pub fn remember(&self, compiled: Arc<Compiled>) {
        let mut recent = self.recent.lock();
        recent.push_back(compiled);
        while recent.len() > COMPILED_MAX {
            recent.pop_front();
        }
    }

    /// Makes it what agents are to hold.
    pub fn publish(&self, compiled: Arc<Compiled>) {
        self.published.send_replace(Some(compiled));
    }

    /// Forgets everything: the numbers that follow are not of the same row.
    pub fn reset(&self) {
        self.recent.lock().clear();
        self.published.send_replace(None);
    }

    /// What agents are to hold.
    pub fn subscribe(&self) -> watch::Receiver<Option<Arc<Compiled>>> {
        self.published.subscribe()
    }

    /// A remembered revision, or what `rebuild` makes of it. Agents that come back together rebuild it once.
    pub fn find(&self, revision: Revision, rebuild: impl FnOnce() -> Option<Arc<Compiled>>) -> Option<Arc<Compiled>> {
        // Held throughout, so that it is done once.
        let mut recent = self.recent.lock();
        if let Some(found) = recent.iter().find(|c| c.revision == revision) {
            return Some(found.clone());
        }
        let compiled = rebuild()?;
        if recent.len() >= COMPILED_MAX {
            recent.pop_front();
        }
        recent.push_front(compiled.clone());
        Some(compiled)
    }
}
