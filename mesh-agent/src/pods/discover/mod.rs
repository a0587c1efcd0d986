//! From a pod's UID to its network namespace, without the container runtime: by the cgroups of its processes.
//!
//! The kubelet makes a cgroup for each pod, the runtime one in it for each container, the sandbox's first. The kernel
//! tells of each at once; its first process that is not in the node's network namespace shows the way into the pod's.
//! A slow scan finds what was missed. Addresses come from the namespace itself, because the API knows them later.
//!
//! [`Discovery`] only looks: it captures nothing and holds a namespace no longer than its sandbox lives.

mod inotify;
mod paths;
mod tracker;

use std::{
    collections::BTreeMap,
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use mesh_api::workload::{ObjectName, Workload};

use super::Netns;
use crate::kernel::NetnsCookie;

pub use paths::PodUid;
use tracker::Tracker;

/// How often everything is looked at, as a safety net.
const SCAN: Duration = Duration::from_secs(1);
/// How deep below a hierarchy's root a kubelet's pods may begin.
const KUBEPODS_DEPTH: usize = 3;

/// The sandboxes on this node, by their pods' UIDs.
pub type Sandboxes = BTreeMap<PodUid, Sandbox>;

/// A pod's sandbox: there is at least one container's cgroup.
#[derive(Clone, Debug)]
pub struct Sandbox {
    /// The pod's cgroup.
    pub cgroup: PathBuf,
    /// The pod's name, as the kubelet's directory of its logs has it.
    pub pod: Option<ObjectName>,
    /// When it was born: the last look at which no process was in its network namespace; before there is one, when
    /// its cgroup was first seen.
    pub born: Instant,
    /// Whether it was made under our eyes.
    pub is_new: bool,
    /// Whether its processes are in the node's own network namespace.
    pub host_network: bool,
    /// Its network namespace, as soon as a process is in it.
    pub netns: Option<Arc<Netns>>,
    /// The namespace's addresses, as soon as it has some.
    pub addresses: Vec<IpAddr>,
}

impl Sandbox {
    /// Its network namespace's cookie.
    pub fn cookie(&self) -> Option<NetnsCookie> {
        self.netns.as_ref().map(|netns| netns.cookie())
    }

    /// The workload with the addresses that the sandbox has, where the API does not know them or those of an earlier
    /// sandbox.
    pub fn complete(&self, workload: &Arc<Workload>) -> Arc<Workload> {
        let is_right = |ip: &IpAddr| self.addresses.contains(ip);
        if self.addresses.is_empty() || !workload.addresses.is_empty() && workload.addresses.iter().all(is_right) {
            return workload.clone();
        }
        Arc::new(Workload {
            addresses: self.addresses.clone(),
            ..(**workload).clone()
        })
    }

    fn same(&self, other: &Sandbox) -> bool {
        let key = |sandbox: &Sandbox| (sandbox.cookie(), sandbox.host_network, sandbox.pod.is_some());
        key(self) == key(other) && self.addresses == other.addresses
    }
}

/// Looks for sandboxes and tells of changes.
#[derive(Debug)]
pub struct Discovery {
    inotify: inotify::Inotify,
    tracker: Tracker,
    found: watch::Sender<Arc<Sandboxes>>,
}

impl Discovery {
    /// Looks in the cgroup2 hierarchy mounted at `cgroup2`; where the kubelet has no tree there, in a version 1
    /// hierarchy. `pod_logs` is the kubelet's directory of logs, which tells pods' names; it may be missing. What is
    /// there already is found before this returns. Needs a runtime.
    pub fn open(cgroup2: &Path, pod_logs: &Path) -> io::Result<Discovery> {
        let inotify = inotify::Inotify::new()?;
        let mounts = mounts_v1(&fs::read_to_string("/proc/self/mountinfo")?);
        let hierarchies = std::iter::once(cgroup2.to_owned()).chain(mounts).collect();
        let mut discovery = Discovery {
            inotify,
            tracker: Tracker::new(hierarchies, Path::new("/proc"), pod_logs)?,
            found: watch::Sender::default(),
        };
        discovery.turn(Vec::new(), true);
        discovery.tracker.is_started = true;
        Ok(discovery)
    }

    /// The sandboxes, now and whenever they change.
    pub fn sandboxes(&self) -> watch::Receiver<Arc<Sandboxes>> {
        self.found.subscribe()
    }

    /// The cgroup2 directories that hold all pods' processes; none where the kubelet uses version 1 only.
    pub fn pod_roots(&self) -> Vec<PathBuf> {
        self.tracker.roots_in_first_hierarchy()
    }

    /// Looks for ever.
    pub async fn run(mut self) {
        let mut next_scan = Instant::now() + SCAN;
        loop {
            let next = self
                .tracker
                .next_look()
                .map_or(next_scan, |look: Instant| look.min(next_scan));
            let changes = tokio::select! {
                changes = self.inotify.changes() => changes,
                () = sleep_until(next) => Ok(Vec::new()),
            };
            let changes = changes.unwrap_or_else(|error| {
                tracing::warn!(%error, "changes of cgroups are not told; pods are found by the scan");
                vec![inotify::Change::Lost]
            });
            let is_scan = Instant::now() >= next_scan;
            if is_scan {
                next_scan = Instant::now() + SCAN;
            }
            self.turn(changes, is_scan);
        }
    }

    fn turn(&mut self, changes: Vec<inotify::Change>, mut is_scan: bool) {
        let now = Instant::now();
        for change in changes {
            is_scan |= matches!(change, inotify::Change::Lost);
            self.tracker.take(&self.inotify, change, now);
        }
        if is_scan {
            self.tracker.scan(&self.inotify, now);
        }
        self.tracker.look(now);
        let now_found = self.tracker.sandboxes();
        self.found.send_if_modified(|found| {
            let is_same = found.len() == now_found.len()
                && found
                    .iter()
                    .zip(&now_found)
                    .all(|((uid, old), (other, new))| uid == other && old.same(new));
            if !is_same {
                *found = Arc::new(now_found);
            }
            !is_same
        });
    }
}

/// Why no pod will ever be found here, if so: other processes cannot be seen, or not looked into.
pub fn blindness() -> Option<String> {
    if std::process::id() == 1 {
        return Some("the node's processes are not seen, which needs hostPID".to_owned());
    }
    let error = Netns::inode_at(Path::new("/proc/1/ns/net")).err()?;
    Some(format!(
        "the namespaces of other processes, which need CAP_SYS_PTRACE: {error}"
    ))
}

/// Mount points of version 1 hierarchies, those first in which every runtime makes a cgroup per container.
fn mounts_v1(mountinfo: &str) -> Vec<PathBuf> {
    let mut mounts: Vec<(usize, PathBuf)> = mountinfo
        .lines()
        .filter_map(|line| {
            let (mount, kind) = line.split_once(" - ")?;
            let point = mount.split(' ').nth(4)?;
            let options = kind.strip_prefix("cgroup ")?;
            let preferred = ["pids", "memory", "cpu", "name=systemd"];
            let has = |name: &str| options.split([' ', ',']).any(|option| option == name);
            let rank = preferred.iter().position(|name| has(name)).unwrap_or(preferred.len());
            Some((rank, PathBuf::from(point)))
        })
        .collect();
    mounts.sort();
    mounts.into_iter().map(|(_, point)| point).collect()
}

/// The directories that hold a kubelet's pods, below a hierarchy's root.
fn kubepods_below(dir: &Path, depth: usize, found: &mut Vec<PathBuf>) {
    for name in subdirectories(dir) {
        let path = dir.join(&name);
        match name.to_str() {
            Some(name) if paths::is_kubepods(name) => found.push(path),
            _ if depth > 1 => kubepods_below(&path, depth - 1, found),
            _ => {}
        }
    }
}

/// The names of a directory's directories; none if it is gone.
fn subdirectories(dir: &Path) -> Vec<std::ffi::OsString> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    entries
        .filter_map(Result::ok)
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.file_name())
        .collect()
}

#[cfg(test)]
mod tests;
