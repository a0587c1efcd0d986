//! What is known of each pod's cgroup, and when to look again.
//!
//! Driven from outside: changes, scans and the time come as arguments. Between the birth of a container's cgroup and
//! its process's entry into the network namespace lie some milliseconds; they are bridged by looking again after a
//! wait that doubles.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use mesh_api::workload::ObjectName;
use tokio::time::Instant;

use super::{
    KUBEPODS_DEPTH, Sandbox, Sandboxes,
    inotify::{Change, Inotify, Watch},
    kubepods_below,
    paths::{self, Member, PodUid},
    subdirectories,
};
use crate::{kernel::node_addresses, pods::Netns};

/// The first wait before a cgroup is looked at again.
const WAIT_MIN: Duration = Duration::from_millis(2);
/// The longest while a sandbox is young: its process is about to come.
const WAIT_YOUNG: Duration = Duration::from_millis(10);
/// How long it is young.
const YOUNG: Duration = Duration::from_secs(5);
/// The longest.
const WAIT_MAX: Duration = Duration::from_secs(1);
/// How long processes may be in the node's network namespace only before that is taken for the pod's own.
const HOST_NETWORK_AFTER: Duration = Duration::from_millis(500);
/// How deep below a container's cgroup its processes may be.
const PROCESS_DEPTH: usize = 3;
/// The most pods; what exceeds them is not found.
const PODS_MAX: usize = mesh_abi::maps::PODS_MAX as usize;

/// Device and inode of a network namespace.
type Inode = (u64, u64);

/// The pods' cgroups.
#[derive(Debug)]
pub struct Tracker {
    /// Roots of hierarchies, the preferred one first.
    hierarchies: Vec<PathBuf>,
    proc: PathBuf,
    pod_logs: PathBuf,
    home: Inode,
    /// Whether what was there at the start has been found.
    pub is_started: bool,
    /// The directories that hold pods, of the first hierarchy that has any.
    roots: BTreeSet<PathBuf>,
    watches: BTreeMap<Watch, PathBuf>,
    pods: BTreeMap<PodUid, Track>,
}

/// One pod's cgroup.
#[derive(Debug)]
struct Track {
    dir: PathBuf,
    containers: BTreeSet<OsString>,
    sandbox: Option<Sandbox>,
    last_look: Option<Instant>,
    next_look: Option<Instant>,
    wait: Duration,
}

/// What a pod's processes say of its network namespace.
enum Sight {
    /// There are none yet, or no more.
    NoProcess,
    /// All are in the node's.
    Home,
    /// Where most containers' first processes are: such a process and its namespace.
    Pod(u32, Inode),
}

impl Tracker {
    /// Nothing known yet.
    pub fn new(hierarchies: Vec<PathBuf>, proc: &Path, pod_logs: &Path) -> io::Result<Tracker> {
        Ok(Tracker {
            hierarchies,
            proc: proc.to_owned(),
            pod_logs: pod_logs.to_owned(),
            is_started: false,
            home: Netns::current()?.inode(),
            roots: BTreeSet::new(),
            watches: BTreeMap::new(),
            pods: BTreeMap::new(),
        })
    }

    /// The directories that hold pods, if they are in the preferred hierarchy.
    pub fn roots_in_first_hierarchy(&self) -> Vec<PathBuf> {
        let Some(first) = self.hierarchies.first() else {
            return Vec::new();
        };
        self.roots
            .iter()
            .filter(|root| root.starts_with(first))
            .cloned()
            .collect()
    }

    /// Every sandbox.
    pub fn sandboxes(&self) -> Sandboxes {
        let sandboxes = self.pods.iter();
        sandboxes
            .filter_map(|(uid, track)| Some((uid.clone(), track.sandbox.clone()?)))
            .collect()
    }

    /// When a pod is to be looked at again.
    pub fn next_look(&self) -> Option<Instant> {
        self.pods.values().filter_map(|track| track.next_look).min()
    }

    /// Looks at every directory.
    pub fn scan(&mut self, inotify: &Inotify, now: Instant) {
        self.roots.retain(|root| root.is_dir());
        if self.roots.is_empty() {
            for hierarchy in &self.hierarchies {
                let mut found = Vec::new();
                kubepods_below(hierarchy, KUBEPODS_DEPTH, &mut found);
                if !found.is_empty() {
                    self.roots = found.into_iter().collect();
                    break;
                }
            }
        }
        for root in self.roots.clone() {
            self.enter_branch(inotify, &root, now);
        }
        let gone: Vec<PodUid> = self
            .pods
            .iter()
            .filter(|(_, track)| !track.dir.is_dir())
            .map(|(uid, _)| uid.clone())
            .collect();
        for uid in gone {
            self.pods.remove(&uid);
        }
    }

    /// Takes a change in.
    pub fn take(&mut self, inotify: &Inotify, change: Change, now: Instant) {
        match change {
            Change::Made(watch, name) => {
                if let Some(dir) = self.watches.get(&watch).cloned() {
                    self.made(inotify, &dir, &name, now);
                }
            }
            Change::Gone(watch, name) => {
                if let Some(dir) = self.watches.get(&watch).cloned() {
                    self.gone(&dir, &name, now);
                }
            }
            Change::Ended(watch) => {
                self.watches.remove(&watch);
            }
            // The caller scans.
            Change::Lost => {}
        }
    }

    fn made(&mut self, inotify: &Inotify, dir: &Path, name: &std::ffi::OsStr, now: Instant) {
        if let Some(track) = self.pods.values_mut().find(|track| track.dir == dir) {
            track.container(name.to_owned(), now);
            return;
        }
        self.enter(inotify, &dir.join(name), now);
    }

    fn gone(&mut self, dir: &Path, name: &std::ffi::OsStr, now: Instant) {
        if let Some(track) = self.pods.values_mut().find(|track| track.dir == dir) {
            if track.containers.remove(name) {
                track.changed(now);
            }
            return;
        }
        let path = dir.join(name);
        self.pods.retain(|_, track| track.dir != path);
        self.roots.remove(&path);
    }

    /// Takes a directory directly in a branch in: a pod's, or another branch.
    fn enter(&mut self, inotify: &Inotify, path: &Path, now: Instant) {
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
            return;
        };
        match paths::pod_of_name(name) {
            Some(uid) => self.enter_pod(inotify, uid, path, now),
            None if paths::is_class(name) => self.enter_branch(inotify, path, now),
            None => {}
        }
    }

    fn enter_branch(&mut self, inotify: &Inotify, dir: &Path, now: Instant) {
        self.watch(inotify, dir);
        for name in subdirectories(dir) {
            self.enter(inotify, &dir.join(name), now);
        }
    }

    fn enter_pod(&mut self, inotify: &Inotify, uid: PodUid, dir: &Path, now: Instant) {
        if !self.pods.contains_key(&uid) {
            if self.pods.len() >= PODS_MAX {
                tracing::error!(pod = %uid, "more than {PODS_MAX} pods on this node: this one is not found");
                return;
            }
            // The watch comes before the listing: what appears in between is in one of them.
            self.watch(inotify, dir);
        }
        let listed: BTreeSet<OsString> = subdirectories(dir).into_iter().collect();
        let track = self.pods.entry(uid).or_insert_with(|| Track {
            dir: dir.to_owned(),
            containers: BTreeSet::new(),
            sandbox: None,
            last_look: None,
            next_look: None,
            wait: WAIT_MIN,
        });
        let before = track.containers.len();
        track.containers.retain(|name| listed.contains(name));
        if track.containers.len() != before {
            track.changed(now);
        }
        for name in listed {
            track.container(name, now);
        }
    }

    fn watch(&mut self, inotify: &Inotify, dir: &Path) {
        match inotify.add(dir) {
            Ok(watch) => {
                self.watches.insert(watch, dir.to_owned());
            }
            // Gone again, or no more watches to be had: the scan sees it all the same.
            Err(error) => tracing::debug!(%error, dir = %dir.display(), "a cgroup is not watched"),
        }
    }

    /// Looks at the pods whose time has come.
    pub fn look(&mut self, now: Instant) {
        for (uid, track) in &mut self.pods {
            if track.next_look.is_some_and(|time| time <= now) {
                let was_there = track.sandbox.is_some();
                track.look(uid, &self.proc, self.home, now);
                if let Some(sandbox) = &mut track.sandbox {
                    sandbox.is_new |= !was_there && self.is_started;
                    if sandbox.pod.is_none() {
                        sandbox.pod = pod_of_logs(&self.pod_logs, uid);
                    }
                }
            }
        }
    }
}

impl Track {
    fn container(&mut self, name: OsString, now: Instant) {
        let is_monitor = name
            .to_str()
            .is_some_and(|name| matches!(paths::member_of_name(name), Member::Monitor));
        if !is_monitor && self.containers.insert(name) {
            self.changed(now);
        }
    }

    /// The set of containers changed: look at once.
    fn changed(&mut self, now: Instant) {
        self.next_look = Some(now);
        self.wait = WAIT_MIN;
    }

    fn look(&mut self, uid: &PodUid, proc: &Path, home: Inode, now: Instant) {
        self.next_look = None;
        let last_look = self.last_look.replace(now);
        if self.containers.is_empty() {
            (self.sandbox, self.last_look) = (None, None);
            return;
        }
        let sandbox = self.sandbox.get_or_insert_with(|| Sandbox {
            cgroup: self.dir.clone(),
            pod: None,
            born: now,
            is_new: false,
            host_network: false,
            netns: None,
            addresses: Vec::new(),
        });
        let is_done = match sight(&self.dir, &self.containers, proc, home) {
            Sight::Pod(pid, inode) => {
                if sandbox.netns.as_ref().is_none_or(|netns| netns.inode() != inode) {
                    sandbox.is_new |= sandbox.netns.is_some();
                    sandbox.move_to(uid, &proc.join(format!("{pid}/ns/net")), inode);
                    // At the first look the cgroup's own age is all that is known.
                    let age = || newest(&self.dir, &self.containers).min(YOUNG);
                    sandbox.born = last_look.unwrap_or_else(|| now.checked_sub(age()).unwrap_or(now));
                }
                sandbox.host_network = false;
                let had_addresses = !sandbox.addresses.is_empty();
                sandbox.find_addresses();
                if !had_addresses && !sandbox.addresses.is_empty() {
                    let after_ms = Instant::now().duration_since(sandbox.born).as_millis();
                    tracing::debug!(pod = %uid, addresses = ?sandbox.addresses, after_ms, "a sandbox is found");
                }
                sandbox.netns.is_some() && !sandbox.addresses.is_empty()
            }
            Sight::Home => {
                sandbox.netns = None;
                sandbox.addresses.clear();
                sandbox.host_network = now.duration_since(sandbox.born) >= HOST_NETWORK_AFTER;
                sandbox.host_network
            }
            // Either it has not begun or it is ending. A namespace that nobody is in is let go.
            Sight::NoProcess => {
                sandbox.netns = None;
                sandbox.addresses.clear();
                false
            }
        };
        if !is_done {
            self.next_look = Some(now + self.wait);
            let is_young = now.duration_since(sandbox.born) < YOUNG;
            self.wait = (self.wait * 2).min(if is_young { WAIT_YOUNG } else { WAIT_MAX });
        }
    }
}

impl Sandbox {
    fn move_to(&mut self, uid: &PodUid, path: &Path, inode: Inode) {
        self.netns = None;
        self.addresses.clear();
        match Netns::open(path) {
            // The process may have ended and another taken its number.
            Ok(netns) if netns.inode() == inode => self.netns = Some(Arc::new(netns)),
            Ok(_) => {}
            Err(error) => tracing::debug!(pod = %uid, %error, "a sandbox's network namespace cannot be opened yet"),
        }
    }

    fn find_addresses(&mut self) {
        let Some(netns) = &self.netns else { return };
        if self.addresses.is_empty() {
            let found: io::Result<Vec<IpAddr>> = netns.run(node_addresses).flatten();
            match found {
                Ok(mut addresses) => {
                    addresses.truncate(mesh_abi::POD_ADDRESSES_MAX);
                    self.addresses = addresses;
                }
                Err(error) => tracing::warn!(%error, "a sandbox's addresses cannot be read"),
            }
        }
    }
}

/// How old the newest container's cgroup is.
fn newest(dir: &Path, containers: &BTreeSet<OsString>) -> Duration {
    let ages = containers.iter().filter_map(|name| {
        let metadata = fs::metadata(dir.join(name)).ok()?;
        metadata.modified().ok()?.elapsed().ok()
    });
    ages.min().unwrap_or_default()
}

/// The pod of that UID, by the name of its directory of logs: `<namespace>_<name>_<uid>`, which the kubelet makes
/// before the sandbox.
fn pod_of_logs(pod_logs: &Path, uid: &PodUid) -> Option<ObjectName> {
    subdirectories(pod_logs).iter().find_map(|entry| {
        let mut parts = entry.to_str()?.split('_');
        let (namespace, name, other) = (parts.next()?, parts.next()?, parts.next()?);
        (other == uid.as_str()).then(|| ObjectName::new(namespace, name))
    })
}

/// The processes directly in a container's cgroup, else those in the ones below.
fn processes(dir: &Path, depth: usize) -> Vec<u32> {
    let text = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    // A process outside our process namespace shows as 0.
    let mut pids: Vec<u32> = text
        .lines()
        .filter_map(|line| line.parse().ok().filter(|pid| *pid != 0))
        .collect();
    if pids.is_empty() && depth > 0 {
        for name in subdirectories(dir) {
            pids.extend(processes(&dir.join(name), depth - 1));
        }
    }
    pids.sort_unstable();
    pids
}

fn sight(dir: &Path, containers: &BTreeSet<OsString>, proc: &Path, home: Inode) -> Sight {
    let mut places: BTreeMap<Inode, (usize, u32)> = BTreeMap::new();
    let mut is_home = false;
    for container in containers {
        for pid in processes(&dir.join(container), PROCESS_DEPTH) {
            let Ok(inode) = Netns::inode_at(&proc.join(format!("{pid}/ns/net"))) else {
                continue;
            };
            if inode == home {
                is_home = true;
                continue;
            }
            // A container's first process decides for it: later ones may have made namespaces of their own.
            let place = places.entry(inode).or_insert((0, pid));
            *place = (place.0 + 1, place.1.min(pid));
            break;
        }
    }
    let most = places
        .into_iter()
        .max_by_key(|(_, (count, pid))| (*count, std::cmp::Reverse(*pid)));
    match most {
        Some((inode, (_, pid))) => Sight::Pod(pid, inode),
        None if is_home => Sight::Home,
        None => Sight::NoProcess,
    }
}
