//! Who may connect without being captured: on Kubernetes every sandbox is enrolled, known, or a stranger.
//!
//! [`class`] decides; [`Gate`] keeps the kernel's map of known network namespaces in step with it, and raises the
//! guard when every sandbox has been looked at. A stranger is refused by the kernel. What is not certainly outside the
//! mesh is a stranger: this file must never make it known for want of an answer, unless it was configured to.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use mesh_api::workload::{ObjectName, Workload};

use super::{Chain, Netns, NetnsCookie, PodError, PodUid, Sandbox, Sandboxes};
use crate::kernel::{Kernel, KernelError, Stranger, cgroup_id, own_cgroup_id};

/// How deep below a pod's cgroup the processes of a namespace of its own may be.
const NESTED_DEPTH: usize = 6;

/// How pods are told apart and what becomes of those that nobody knows.
#[derive(Clone, Debug)]
pub struct GateConfig {
    /// Whether the connections of pods that are not known are refused; else they go on unguarded.
    pub refuses: bool,
    /// Namespaces whose pods need not wait for the API: the controller's own, for one, without which it could never
    /// be asked. If they are enrolled they are captured like any other.
    pub trusted: BTreeSet<String>,
    /// The cgroup2 directories that hold all pods' processes.
    pub roots: Vec<PathBuf>,
    /// Whether what enrolled pods connected to before this agent's start is ended, because the node has just started.
    pub severs: bool,
}

/// What a sandbox's network namespace is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    /// Captured: the kernel knows it as such.
    Captured,
    /// Not in the mesh.
    Known,
    /// Not to connect: nobody has said whose it is, or it should be captured and is not.
    Stranger,
}

/// Decides. `workload` is what the view says of the pod.
fn class(config: &GateConfig, is_captured: bool, workload: Option<&Workload>, pod: Option<&ObjectName>) -> Class {
    if is_captured {
        return Class::Captured;
    }
    match workload {
        Some(workload) if workload.enrolled => Class::Stranger,
        Some(_) => Class::Known,
        None if pod.is_some_and(|pod| config.trusted.contains(&*pod.namespace)) => Class::Known,
        None => Class::Stranger,
    }
}

/// Keeps the kernel's known namespaces.
pub struct Gate {
    config: GateConfig,
    kernel: Arc<Kernel>,
    home: NetnsCookie,
    sandboxes: Arc<Sandboxes>,
    /// What the kernel's map holds.
    known: BTreeSet<NetnsCookie>,
    /// Namespaces that processes of a pod made for themselves.
    nested: BTreeMap<NetnsCookie, PodUid>,
    is_raised: bool,
    /// Strangers' namespaces, in which nothing arrives.
    closed: BTreeSet<NetnsCookie>,
    /// Sandboxes that were there before the agent and should have been captured; none before the first view.
    cold: Option<BTreeSet<NetnsCookie>>,
}

impl Gate {
    /// With no sandbox yet; what an earlier agent knew stays known until the first look.
    pub fn new(config: GateConfig, kernel: Arc<Kernel>, home: NetnsCookie) -> Result<Gate, KernelError> {
        // The node's own namespace, and with it the pods that share it.
        kernel.know(home)?;
        if let Err(error) = kernel.set_guarded(&config.roots) {
            tracing::error!(error = %Chain(&error), "pods of the node's network cannot be told from the node");
        }
        Ok(Gate {
            config,
            known: kernel.known()?,
            kernel,
            home,
            sandboxes: Arc::default(),
            nested: BTreeMap::new(),
            is_raised: false,
            closed: BTreeSet::new(),
            cold: None,
        })
    }

    /// Takes in what was found.
    pub fn set_sandboxes(&mut self, sandboxes: Arc<Sandboxes>) {
        self.sandboxes = sandboxes;
    }

    /// The pod's sandbox. That of a static pod goes by its name: the API has given the pod a UID of its own.
    pub fn sandbox(&self, workload: &Workload) -> Option<&Sandbox> {
        let uid = PodUid::new(&workload.uid)?;
        let is_static =
            |(uid, sandbox): &(&PodUid, &Sandbox)| uid.is_static() && sandbox.pod.as_ref() == Some(&workload.name);
        self.sandboxes
            .get(&uid)
            .or_else(|| self.sandboxes.iter().find(is_static).map(|(_, sandbox)| sandbox))
    }

    /// The sandbox of a pod that is to be captured, or why there is none.
    pub fn place(&self, workload: &Workload) -> Result<&Sandbox, PodError> {
        let sandbox = self.sandbox(workload).ok_or(PodError::NoSandbox)?;
        if sandbox.host_network {
            return Err(PodError::NodeNetwork);
        }
        Ok(sandbox)
    }

    /// The cgroup's id of a pod with the node's network that is to be captured as a source, or why it is not. Never of
    /// what the node itself is made of, enrolled or not: static pods (an API server, for one), the namespaces that need
    /// not wait for the API, and the agent.
    pub fn place_hosted(&self, workload: &Workload) -> Result<u64, PodError> {
        if self.config.trusted.contains(&*workload.name.namespace) {
            return Err(PodError::NodeItself);
        }
        let uid = PodUid::new(&workload.uid).ok_or(PodError::NoSandbox)?;
        let Some(sandbox) = self.sandboxes.get(&uid) else {
            let is_static = self.sandbox(workload).is_some();
            return Err(if is_static {
                PodError::NodeItself
            } else {
                PodError::NoSandbox
            });
        };
        if !self.config.roots.iter().any(|root| sandbox.cgroup.starts_with(root)) {
            return Err(PodError::NoCgroup2);
        }
        if holds(&sandbox.cgroup, own_cgroup_id()?, NESTED_DEPTH) {
            return Err(PodError::NodeItself);
        }
        Ok(cgroup_id(&sandbox.cgroup)?)
    }

    /// Says before a pod is let go that it may connect, if its sandbox lives on outside the mesh.
    pub fn release(&mut self, cookie: NetnsCookie, workload: Option<&Workload>) {
        let lives_on = workload.is_some_and(|workload| {
            !workload.enrolled && self.sandbox(workload).and_then(Sandbox::cookie) == Some(cookie)
        });
        if lives_on {
            self.know(cookie);
        }
    }

    /// The first view tells which pods should have been captured when they were born.
    pub fn take_view(&mut self, workloads: &[Arc<Workload>]) {
        if self.cold.is_some() {
            return;
        }
        let enrolled = workloads
            .iter()
            .filter(|workload| workload.enrolled && self.config.severs);
        let sandboxes = enrolled.filter_map(|workload| self.sandbox(workload));
        self.cold = Some(
            sandboxes
                .filter(|found| !found.is_new)
                .filter_map(Sandbox::cookie)
                .collect(),
        );
    }

    /// Whether a pod that is captured now has connections that should not be.
    pub fn is_cold(&mut self, cookie: NetnsCookie) -> bool {
        self.cold.as_mut().is_some_and(|cold| cold.remove(&cookie))
    }

    fn know(&mut self, cookie: NetnsCookie) {
        match self.kernel.know(cookie).and_then(|()| self.kernel.open(cookie)) {
            Ok(()) => {
                self.known.insert(cookie);
                self.closed.remove(&cookie);
            }
            Err(error) => tracing::error!(%cookie, error = %Chain(&error), "a pod outside the mesh stays refused"),
        }
    }

    /// Looks at every sandbox. `workloads` are those of this node, none if there is no view yet; `captured` tells the
    /// namespaces that are.
    pub fn classify(&mut self, workloads: Option<&[Arc<Workload>]>, captured: &BTreeSet<NetnsCookie>) {
        let by_uid: BTreeMap<PodUid, &Workload> = workloads
            .unwrap_or_default()
            .iter()
            .filter_map(|workload| Some((PodUid::new(&workload.uid)?, &**workload)))
            .collect();
        let by_name: BTreeMap<&ObjectName, &Workload> = workloads
            .unwrap_or_default()
            .iter()
            .map(|workload| (&workload.name, &**workload))
            .collect();
        let workload_of = |uid: &PodUid, sandbox: &Sandbox| {
            let by_name = || by_name.get(sandbox.pod.as_ref().filter(|_| uid.is_static())?).copied();
            by_uid.get(uid).copied().or_else(by_name)
        };
        let mut wanted = BTreeSet::from([self.home]);
        let sandboxes = self.sandboxes.clone();
        let class_of = |uid: &PodUid, sandbox: &Sandbox, is_captured: bool| {
            class(
                &self.config,
                is_captured,
                workload_of(uid, sandbox),
                sandbox.pod.as_ref(),
            )
        };
        let mut strangers = BTreeMap::new();
        for (uid, sandbox) in sandboxes.iter() {
            let Some(netns) = &sandbox.netns else { continue };
            match class_of(uid, sandbox, captured.contains(&netns.cookie())) {
                Class::Captured => {}
                Class::Known => {
                    wanted.insert(netns.cookie());
                }
                Class::Stranger => {
                    strangers.insert(netns.cookie(), netns.clone());
                }
            }
        }
        // A namespace within an enrolled pod would be a way around the mesh.
        for (cookie, uid) in &self.nested {
            if sandboxes
                .get(uid)
                .is_some_and(|sandbox| class_of(uid, sandbox, false) == Class::Known)
            {
                wanted.insert(*cookie);
            }
        }
        self.nested.retain(|_, uid| sandboxes.contains_key(uid));
        for cookie in wanted.difference(&self.known.clone()) {
            self.know(*cookie);
        }
        // Before there is a view, what an earlier agent knew is not doubted, as long as it lives.
        let lives = |cookie: &NetnsCookie| {
            workloads.is_none() && sandboxes.values().any(|sandbox| sandbox.cookie() == Some(*cookie))
        };
        let gone: Vec<NetnsCookie> = self.known.difference(&wanted).copied().filter(|c| !lives(c)).collect();
        for cookie in gone {
            match self.kernel.forget(cookie) {
                Ok(()) => {
                    self.known.remove(&cookie);
                }
                Err(error) => tracing::error!(%cookie, error = %Chain(&error), "a namespace could not be forgotten"),
            }
        }
        if workloads.is_some() && !self.is_raised {
            self.raise();
        }
        if self.is_raised && self.config.refuses {
            self.close(&strangers, captured);
        }
    }

    /// Closes the strangers' namespaces, and forgets those that are strangers no more: captured, known, or gone.
    fn close(&mut self, strangers: &BTreeMap<NetnsCookie, Arc<Netns>>, captured: &BTreeSet<NetnsCookie>) {
        for (cookie, netns) in strangers {
            if self.closed.contains(cookie) {
                continue;
            }
            match self.kernel.close(*cookie, netns.as_fd()) {
                Ok(()) => {
                    self.closed.insert(*cookie);
                }
                Err(error) => tracing::error!(%cookie, error = %Chain(&error), "a stranger can be reached"),
            }
        }
        let others: Vec<NetnsCookie> = self
            .closed
            .iter()
            .filter(|c| !strangers.contains_key(c))
            .copied()
            .collect();
        for cookie in others {
            // A captured pod has taken the link over.
            if !captured.contains(&cookie)
                && let Err(error) = self.kernel.open(cookie)
            {
                tracing::warn!(%cookie, error = %Chain(&error), "a link of a pod that is gone stays");
                continue;
            }
            self.closed.remove(&cookie);
        }
    }

    fn raise(&mut self) {
        let result = if self.config.refuses {
            if self.config.roots.is_empty() {
                tracing::error!("the kubelet keeps no cgroup2 tree: pods are unguarded until they are captured");
            }
            self.kernel.raise_guard(&self.config.roots)
        } else {
            self.kernel.lower_guard()
        };
        match result {
            Ok(()) => self.is_raised = true,
            Err(error) => tracing::error!(error = %Chain(&error), "unknown pods are not guarded"),
        }
    }

    /// Takes in what the kernel refused since the last call; says whether there was anything to classify anew.
    pub fn meet_strangers(&mut self) -> bool {
        if !self.is_raised {
            return false;
        }
        let strangers = self.kernel.take_strangers().unwrap_or_else(|error| {
            tracing::warn!(error = %Chain(&error), "refused pods could not be listed");
            Vec::new()
        });
        let mut is_news = false;
        for Stranger { cookie, cgroup_id } in strangers {
            let is_sandbox = self.sandboxes.values().any(|sandbox| sandbox.cookie() == Some(cookie));
            if is_sandbox || self.nested.contains_key(&cookie) {
                continue;
            }
            let owner = self
                .sandboxes
                .iter()
                .find(|(_, sandbox)| holds(&sandbox.cgroup, cgroup_id, NESTED_DEPTH));
            match owner {
                Some((uid, _)) => {
                    tracing::info!(pod = %uid, %cookie, "a process of a pod is in a network namespace of its own");
                    self.nested.insert(cookie, uid.clone());
                    is_news = true;
                }
                None => tracing::debug!(%cookie, "a refused pod has no sandbox that is known yet"),
            }
        }
        is_news
    }
}

/// Whether the cgroup of that id is this directory or below it.
fn holds(dir: &Path, id: u64, depth: usize) -> bool {
    if dir.metadata().is_ok_and(|metadata| metadata.ino() == id) {
        return true;
    }
    let Ok(entries) = std::fs::read_dir(dir) else {
        return false;
    };
    depth > 0
        && entries
            .filter_map(Result::ok)
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .any(|entry| holds(&entry.path(), id, depth - 1))
}

#[cfg(test)]
mod tests {
    use mesh_api::identity::TrustDomain;

    use super::*;

    fn workload(enrolled: bool) -> Workload {
        let domain = TrustDomain::new("cluster.local").unwrap();
        let address = [192, 0, 2, 7].into();
        Workload {
            enrolled,
            ..Workload::outside(&domain, &ObjectName::new("shop", "cart"), address, "node-1".into())
        }
    }

    #[test]
    fn every_sandbox_is_captured_known_or_a_stranger() {
        let (shop, mesh) = (ObjectName::new("shop", "x"), ObjectName::new("nodemesh-system", "x"));
        let (enrolled, plain) = (workload(true), workload(false));
        // captured, what the view says, the name by the kubelet's logs -> class
        let cases = [
            (true, Some(&enrolled), None, Class::Captured),
            (true, None, None, Class::Captured),
            (false, Some(&enrolled), None, Class::Stranger),
            (false, Some(&enrolled), Some(&mesh), Class::Stranger),
            (false, Some(&plain), None, Class::Known),
            (false, None, None, Class::Stranger),
            (false, None, Some(&shop), Class::Stranger),
            (false, None, Some(&mesh), Class::Known),
        ];
        for (captured, view, pod, expected) in cases {
            let config = GateConfig {
                refuses: true,
                trusted: BTreeSet::from(["nodemesh-system".to_owned()]),
                roots: Vec::new(),
                severs: false,
            };
            let found = class(&config, captured, view, pod);
            assert_eq!(found, expected, "{captured} {view:?} {pod:?}");
        }
    }
}
