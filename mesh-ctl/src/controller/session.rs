//! One agent's side of `Sync` as a state machine: events in, the next update out, no I/O.
//!
//! The session knows what the agent holds (`base`) and what is on its way. There is one update on its way at a time, and
//! the next one is always from `base` to the newest revision: what changed in between is joined, so an agent that is
//! slow, or does not answer at all, costs two references to compiled revisions and nothing else.

use std::sync::Arc;

use mesh_api::{
    document::{Resource, ResourceKey},
    identity::TrustDomain,
    wire::{TrustRoots, Update},
    workload::{Revision, Workload},
};

use super::source::Compiled;

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
            // Most have neither, and are the same to everybody.
            if workload.netns.is_none() && workload.probe_ports.is_empty() {
                return resource.clone();
            }
            let mut workload = Workload::clone(workload);
            workload.netns = None;
            workload.probe_ports.clear();
            Resource::Workload(Arc::new(workload))
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
        // An agent that resumes by the newest revision is told nothing until there is a newer one.
        let known = self.answered.max(self.base.as_ref().map(|base| base.revision));
        if self.on_its_way.is_some() || known >= Some(newest.revision) {
            return None;
        }
        let update = match &self.base {
            None => Update::Snapshot {
                revision: newest.revision,
                stamp: newest.stamp,
                trust_domain: self.trust_domain.clone(),
                resources: newest.resources.values().map(|r| seen_from(&self.node, r)).collect(),
                trust_roots: roots.clone(),
            },
            Some(base) => {
                let (upserts, removed) = self.changes(base, newest);
                Update::Delta {
                    from: base.revision,
                    to: newest.revision,
                    stamp: newest.stamp,
                    upserts,
                    removed,
                    trust_roots: (self.roots_sent.as_ref() != Some(roots)).then(|| roots.clone()),
                }
            }
        };
        self.roots_sent = Some(roots.clone());
        self.on_its_way = Some(newest.clone());
        Some(update)
    }

    /// What leads from one revision to another, at the cost of the change.
    fn changes(&self, base: &Compiled, newest: &Compiled) -> (Vec<Resource>, Vec<ResourceKey>) {
        let (mut upserts, mut removed) = (Vec::new(), Vec::new());
        newest.resources.differences(&base.resources, |key, now| {
            let Some(now) = now else {
                removed.push(key.clone());
                return;
            };
            let seen = seen_from(&self.node, now);
            let before = base.resources.get(key).map(|before| seen_from(&self.node, before));
            if before.as_ref() != Some(&seen) {
                upserts.push(seen);
            }
        });
        // In an order, so that two agents are told the same.
        upserts.sort_by_cached_key(Resource::key);
        removed.sort_unstable();
        (upserts, removed)
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

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use mesh_api::document::{DocumentSet, ResourceKey, parse};
    use proptest::prelude::*;

    use super::*;

    /// What happens next in a session.
    #[derive(Clone, Debug)]
    enum Event {
        /// A document is set to a variant, or deleted; this makes a revision.
        Change { document: u8, variant: Option<u8> },
        /// The agent is sent what there is to send.
        Send,
        /// It takes what was sent.
        Ack,
        /// It refuses what was sent.
        Nack,
        /// The connection is made anew, and the agent resumes by what it holds, if that is still known.
        Reconnect { known: bool },
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            4 => (0..6u8, proptest::option::weighted(0.7, 0..3u8))
                .prop_map(|(document, variant)| Event::Change { document, variant }),
            4 => Just(Event::Send),
            4 => Just(Event::Ack),
            1 => Just(Event::Nack),
            1 => any::<bool>().prop_map(|known| Event::Reconnect { known }),
        ]
    }

    /// Pods on both nodes, and services; a variant changes what some nodes see and others do not.
    fn yaml(document: u8, variant: u8) -> String {
        let node = document % 2 + 1;
        match document {
            0..4 => format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{name: p{document}, namespace: shop, annotations: \
                 {{nodemesh.io/netns: /run/netns/{}}}}}\nspec: {{nodeName: node-{node}, containers: [{{name: a}}]}}\n\
                 status: {{podIP: 10.0.{}.1{document}}}\n",
                variant % 2,
                variant / 2
            ),
            _ => format!(
                "apiVersion: v1\nkind: Service\nmetadata: {{name: s{document}, namespace: shop}}\n\
                 spec: {{ports: [{{port: {}}}]}}\n",
                u16::from(variant) + 1
            ),
        }
    }

    fn seen(compiled: &Compiled) -> BTreeMap<ResourceKey, Resource> {
        let all = compiled.resources.iter();
        all.map(|(key, resource)| (key.clone(), seen_from("node-1", resource)))
            .collect()
    }

    proptest! {
        /// Whatever was joined, refused or resumed: an agent that takes an update holds exactly that revision.
        #[test]
        fn an_agent_that_acks_holds_what_the_revision_says(events in proptest::collection::vec(event(), 1..60)) {
            let domain = TrustDomain::new("cluster.local").unwrap();
            let roots = TrustRoots(vec![vec![1]]);
            let mut set = DocumentSet::new();
            let mut newest = Arc::new(Compiled::new(Revision(1), &set, &domain, None));
            let mut state = SyncState::new("node-1", domain.clone(), None);
            let mut held: Option<(Arc<Compiled>, BTreeMap<ResourceKey, Resource>)> = None;
            let mut sent: Option<(Arc<Compiled>, Update)> = None;
            for event in events {
                match event {
                    Event::Change { document, variant } => {
                        let mut parsed = parse("test", &yaml(document, variant.unwrap_or(0))).unwrap();
                        let parsed = parsed.remove(0);
                        let (before, changed) = (set.clone(), BTreeSet::from([parsed.key()]));
                        match variant {
                            Some(_) => set.insert(parsed),
                            None => set.remove(&parsed.key()),
                        };
                        let revision = Revision(newest.revision.0 + 1);
                        let next = newest.next(revision, [&before, &set], &domain, &changed);
                        let anew = Compiled::new(revision, &set, &domain, None);
                        prop_assert_eq!(&next.resources, &anew.resources);
                        prop_assert_eq!(&next.identities, &anew.identities);
                        newest = Arc::new(next);
                    }
                    Event::Send => {
                        if let Some(update) = state.next(&newest, &roots) {
                            prop_assert!(sent.is_none(), "two updates on their way");
                            sent = Some((newest.clone(), update));
                        }
                    }
                    Event::Ack => {
                        let Some((compiled, update)) = sent.take() else {
                            prop_assert!(state.acked(newest.revision).is_err());
                            continue;
                        };
                        let mut holds = match (&update, &held) {
                            (Update::Snapshot { .. }, _) => BTreeMap::new(),
                            (Update::Delta { from, .. }, Some((base, holds))) => {
                                prop_assert_eq!(*from, base.revision);
                                holds.clone()
                            }
                            (Update::Delta { .. }, None) => panic!("a delta for an agent that holds nothing"),
                        };
                        let revision = compiled.revision;
                        match update {
                            Update::Snapshot { resources, .. } => {
                                holds.extend(resources.into_iter().map(|resource| (resource.key(), resource)));
                            }
                            Update::Delta { upserts, removed, .. } => {
                                holds.extend(upserts.into_iter().map(|resource| (resource.key(), resource)));
                                for key in removed {
                                    prop_assert!(holds.remove(&key).is_some(), "{:?} was not held", key);
                                }
                            }
                        }
                        prop_assert_eq!(&holds, &seen(&compiled));
                        held = Some((compiled, holds));
                        state.acked(revision).unwrap();
                    }
                    Event::Nack => {
                        if let Some((compiled, _)) = sent.take() {
                            state.nacked(compiled.revision).unwrap();
                        }
                    }
                    Event::Reconnect { known } => {
                        sent = None;
                        let base = held.as_ref().filter(|_| known).map(|(base, _)| base.clone());
                        state = SyncState::new("node-1", domain.clone(), base);
                    }
                }
            }
            // An answered agent that is behind is sent something.
            let behind = held.as_ref().is_none_or(|(base, _)| base.revision < newest.revision);
            if sent.is_none() && state.answered != Some(newest.revision) {
                let resumed = state.base.is_some();
                prop_assert_eq!(state.next(&newest, &roots).is_some(), behind || !resumed);
            }
        }
    }

    #[test]
    fn roots_are_told_once_and_again_when_they_change() {
        let domain = TrustDomain::new("cluster.local").unwrap();
        let (one, two) = (TrustRoots(vec![vec![1]]), TrustRoots(vec![vec![1], vec![2]]));
        let set = DocumentSet::new();
        let revision = |n| Arc::new(Compiled::new(Revision(n), &set, &domain, None));
        let mut state = SyncState::new("node-1", domain.clone(), None);
        let mut told = Vec::new();
        for (n, roots) in [(1, &one), (2, &one), (3, &two), (4, &two)] {
            match state.next(&revision(n), roots).unwrap() {
                Update::Snapshot { trust_roots, .. } => told.push(Some(trust_roots)),
                Update::Delta { trust_roots, .. } => told.push(trust_roots),
            }
            state.acked(Revision(n)).unwrap();
        }
        assert_eq!(told, [Some(one), None, Some(two), None]);
    }
}
