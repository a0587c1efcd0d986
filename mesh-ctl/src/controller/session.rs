//! One agent's side of `Sync` as a state machine: events in, the next update out, no I/O.
//!
//! The session knows what the agent holds (`base`) and what is on its way. There is one update on its way at a time, and
//! the next one is always from `base` to the newest revision: what changed in between is joined, so an agent that is
//! slow, or does not answer at all, costs two references to compiled revisions and nothing else.

use std::sync::Arc;

use mesh_api::{
    document::Resource,
    wire::{TrustRoots, Update},
    workload::Revision,
};

use super::index::Compiled;
use mesh_api::identity::TrustDomain;

/// See the module.
pub struct SyncState {
    node: Arc<str>,
    trust_domain: TrustDomain,
    base: Option<Arc<Compiled>>,
    on_its_way: Option<Arc<Compiled>>,
    /// The newest revision that the agent answered; nothing is sent again until there is a newer one.
    answered: Option<Revision>,
    roots_sent: Option<TrustRoots>,
}

/// The agent answered a revision that is not on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("revision {0} was not sent, or was answered already")]
pub struct UnexpectedAnswer(pub Revision);

/// What this node is told of a resource: where another node keeps its pods' namespaces, and what its kubelet probes, is
/// nobody else's business.
fn seen_from(node: &str, resource: &Resource) -> Resource {
    match resource {
        Resource::Workload(workload) if *workload.node != *node => {
            let mut workload = workload.clone();
            workload.netns = None;
            workload.probe_ports.clear();
            Resource::Workload(workload)
        }
        other => other.clone(),
    }
}

impl SyncState {
    /// A session with an agent that holds `base`.
    pub fn new(node: &str, trust_domain: TrustDomain, base: Option<Arc<Compiled>>) -> SyncState {
        SyncState {
            node: node.into(),
            trust_domain,
            base,
            on_its_way: None,
            answered: None,
            roots_sent: None,
        }
    }

    /// What to send now, if anything.
    pub fn next(&mut self, newest: &Arc<Compiled>, roots: &TrustRoots) -> Option<Update> {
        if self.on_its_way.is_some() || self.answered.is_some_and(|answered| answered >= newest.revision) {
            return None;
        }
        let update = match &self.base {
            None => Update::Snapshot {
                revision: newest.revision,
                trust_domain: self.trust_domain.clone(),
                resources: newest.resources.values().map(|r| seen_from(&self.node, r)).collect(),
                trust_roots: roots.clone(),
            },
            Some(base) => Update::Delta {
                from: base.revision,
                to: newest.revision,
                upserts: self.upserts(base, newest),
                removed: base
                    .resources
                    .keys()
                    .filter(|key| !newest.resources.contains_key(key))
                    .cloned()
                    .collect(),
                trust_roots: (self.roots_sent.as_ref() != Some(roots)).then(|| roots.clone()),
            },
        };
        self.roots_sent = Some(roots.clone());
        self.on_its_way = Some(newest.clone());
        Some(update)
    }

    fn upserts(&self, base: &Compiled, newest: &Compiled) -> Vec<Resource> {
        let mut upserts = Vec::new();
        for (key, resource) in &newest.resources {
            match base.resources.get(key) {
                Some(old) if Arc::ptr_eq(old, resource) => {}
                Some(old) => {
                    let seen = seen_from(&self.node, resource);
                    if seen != seen_from(&self.node, old) {
                        upserts.push(seen);
                    }
                }
                None => upserts.push(seen_from(&self.node, resource)),
            }
        }
        upserts
    }

    /// The agent holds this revision now.
    pub fn acked(&mut self, revision: Revision) -> Result<(), UnexpectedAnswer> {
        self.base = Some(self.answer(revision)?);
        Ok(())
    }

    /// The agent refused this revision; the next one goes to it whole.
    pub fn nacked(&mut self, revision: Revision) -> Result<(), UnexpectedAnswer> {
        self.answer(revision)?;
        self.base = None;
        Ok(())
    }

    fn answer(&mut self, revision: Revision) -> Result<Arc<Compiled>, UnexpectedAnswer> {
        match self.on_its_way.take() {
            Some(sent) if sent.revision == revision => {
                self.answered = Some(revision);
                Ok(sent)
            }
            other => {
                self.on_its_way = other;
                Err(UnexpectedAnswer(revision))
            }
        }
    }
}
