//! A set of documents: what an apply changes, what the documents say of each other, what agents get.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{Document, DocumentKey, Kind, Object, PodSpec, Problem, references, resources};
use crate::{
    identity::TrustDomain,
    workload::{ObjectName, Service, Workload},
};

/// What an agent and the view work with. Cheap to clone.
#[derive(Clone, Debug, PartialEq)]
pub enum Resource {
    /// A pod.
    Workload(Arc<Workload>),
    /// A service.
    Service(Arc<Service>),
    /// A policy, route or subset ([`Kind::is_policy`]).
    Policy(Arc<Document>),
}

/// What a resource is called.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ResourceKey {
    /// A pod.
    Workload(ObjectName),
    /// A service.
    Service(ObjectName),
    /// A policy, route or subset.
    Policy(DocumentKey),
}

impl Resource {
    /// What it is called.
    pub fn key(&self) -> ResourceKey {
        match self {
            Resource::Workload(workload) => ResourceKey::Workload(workload.name.clone()),
            Resource::Service(service) => ResourceKey::Service(service.name.clone()),
            Resource::Policy(document) => ResourceKey::Policy(document.key()),
        }
    }
}

/// Documents by key.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DocumentSet {
    documents: BTreeMap<DocumentKey, Arc<Document>>,
}

/// What an apply does to one document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It was not there.
    Created,
    /// It was there and says something else.
    Changed,
    /// It was there and says the same.
    Unchanged,
    /// It is gone.
    Removed,
}

impl DocumentSet {
    /// An empty set.
    pub fn new() -> DocumentSet {
        DocumentSet::default()
    }

    /// Puts a document in; the one that it replaces is handed back.
    pub fn insert(&mut self, document: Document) -> Option<Arc<Document>> {
        self.documents.insert(document.key(), Arc::new(document))
    }

    /// Takes a document out.
    pub fn remove(&mut self, key: &DocumentKey) -> Option<Arc<Document>> {
        self.documents.remove(key)
    }

    /// The document of that key.
    pub fn get(&self, key: &DocumentKey) -> Option<&Document> {
        self.documents.get(key).map(|document| &**document)
    }

    /// All of them, ordered by kind, namespace and name.
    pub fn iter(&self) -> impl Iterator<Item = &Document> {
        self.documents.values().map(|document| &**document)
    }

    /// Those of one kind, ordered by namespace and name.
    pub fn of_kind(&self, kind: Kind) -> impl Iterator<Item = &Document> {
        let first = DocumentKey::new(kind, "", "");
        let all = self.documents.range(first..);
        all.map(|(_, document)| &**document)
            .take_while(move |document| document.kind() == kind)
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.documents.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.documents.is_empty()
    }

    /// What the documents say of each other that cannot be so: a backend, parent, target or subset that does not
    /// exist. These are warnings: what is missing may still come, and until then it is refused where it matters.
    pub fn validate(&self) -> Vec<Problem> {
        references::validate(self)
    }

    /// Those of [`DocumentSet::validate`] that are about pods, or about what namespaces say of theirs: what an API server
    /// takes and nobody is told when it is applied.
    pub fn validate_pods(&self) -> Vec<(DocumentKey, Problem)> {
        references::validate_pods(self)
    }

    /// Whether a pod is enrolled: by its own label, else by its namespace's.
    pub fn enrols(&self, pod: &Object<PodSpec>) -> bool {
        resources::is_enrolled(self, pod)
    }

    /// Those of one kind in one namespace, ordered by name.
    pub(super) fn of_namespace<'a>(&'a self, kind: Kind, namespace: &'a str) -> impl Iterator<Item = &'a Document> {
        let all = self.documents.range(DocumentKey::new(kind, namespace, "")..);
        all.take_while(move |(key, _)| key.kind == kind && *key.namespace == *namespace)
            .map(|(_, document)| &**document)
    }

    /// What agents get by these documents, which are not as they were in `before`; `None` for a resource that is not there.
    /// `None`: they may change any resource.
    pub fn changed_resources(
        &self,
        before: &DocumentSet,
        trust_domain: &TrustDomain,
        changed: &BTreeSet<DocumentKey>,
    ) -> Option<Vec<(ResourceKey, Option<Resource>)>> {
        resources::changed(self, before, trust_domain, changed)
    }

    /// What agents get: workloads, services and policies, in that order, each ordered by name.
    pub fn resources(&self, trust_domain: &TrustDomain) -> Vec<Resource> {
        resources::resources(self, trust_domain)
    }
}

impl FromIterator<Document> for DocumentSet {
    fn from_iter<I: IntoIterator<Item = Document>>(documents: I) -> DocumentSet {
        let mut set = DocumentSet::new();
        set.extend(documents);
        set
    }
}

impl Extend<Document> for DocumentSet {
    fn extend<I: IntoIterator<Item = Document>>(&mut self, documents: I) {
        for document in documents {
            self.insert(document);
        }
    }
}

/// What leads from one set to the other, ordered by key; unchanged documents are listed too.
pub fn diff(old: &DocumentSet, new: &DocumentSet) -> Vec<(DocumentKey, Change)> {
    let mut changes: BTreeMap<DocumentKey, Change> =
        old.documents.keys().map(|key| (key.clone(), Change::Removed)).collect();
    for (key, document) in &new.documents {
        let change = match old.documents.get(key) {
            None => Change::Created,
            Some(before) if before.same_as(document) => Change::Unchanged,
            Some(_) => Change::Changed,
        };
        changes.insert(key.clone(), change);
    }
    changes.into_iter().collect()
}
