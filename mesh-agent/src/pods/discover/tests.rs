//! Discovery on directories that look like a kubelet's, with real processes in real network namespaces. Needs root.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use tokio::time::{timeout, timeout_at};

use super::*;

const UID: &str = "0a3f7c52-9d1e-4b6a-8f00-1234567890ab";

/// A process in a network namespace of its own, or in ours; ends with the value.
struct Process(Child);

impl Process {
    fn isolated() -> Process {
        let home = Netns::current().unwrap().inode();
        let process = Process(
            Command::new("unshare")
                .args(["-n", "cat"])
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .spawn()
                .unwrap(),
        );
        while process.inode() == home {
            std::thread::yield_now();
        }
        process
    }

    fn home() -> Process {
        let cat = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn();
        Process(cat.unwrap())
    }

    fn inode(&self) -> (u64, u64) {
        Netns::inode_at(Path::new(&format!("/proc/{}/ns/net", self.0.id()))).unwrap()
    }

    fn netns(&self) -> Netns {
        Netns::open(Path::new(&format!("/proc/{}/ns/net", self.0.id()))).unwrap()
    }

    fn ip(&self, arguments: &str) {
        let status = Command::new("nsenter")
            .args(["-t", &self.0.id().to_string(), "-n", "ip"])
            .args(arguments.split(' '))
            .status();
        assert!(status.unwrap().success(), "ip {arguments}");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// A made-up cgroup hierarchy.
struct Tree(tempfile::TempDir);

impl Tree {
    fn new() -> Tree {
        let tree = Tree(tempfile::tempdir().unwrap());
        fs::create_dir_all(tree.0.path().join("kubepods/burstable")).unwrap();
        tree
    }

    fn discovery(&self) -> io::Result<Discovery> {
        Discovery::open(self.0.path(), &self.0.path().join("logs"))
    }

    fn pod(&self) -> PathBuf {
        self.0.path().join(format!("kubepods/burstable/pod{UID}"))
    }

    /// Makes a container's cgroup as a runtime does: the directory first, its process after it.
    fn container(&self, name: &str, processes: &[&Process]) {
        let dir = self.pod().join(name);
        fs::create_dir_all(&dir).unwrap();
        let pids: Vec<String> = processes.iter().map(|process| process.0.id().to_string()).collect();
        fs::write(dir.join("cgroup.procs"), pids.join("\n")).unwrap();
    }

    fn remove(&self, name: &str) {
        fs::remove_dir_all(self.pod().join(name)).unwrap();
    }
}

/// Looks until the pod's sandbox is as wanted.
async fn until(discovery: &mut Discovery, what: &str, wanted: impl Fn(Option<&Sandbox>) -> bool) -> Option<Sandbox> {
    let mut found = discovery.sandboxes();
    let uid = PodUid::new(UID).unwrap();
    let looking = async {
        loop {
            let sandbox = found.borrow_and_update().get(&uid).cloned();
            if wanted(sandbox.as_ref()) {
                return sandbox;
            }
            let next = discovery.tracker.next_look().unwrap_or(Instant::now() + SCAN);
            // Without scans: what the kernel tells must be enough.
            match timeout_at(next, discovery.inotify.changes()).await {
                Ok(changes) => discovery.turn(changes.unwrap(), false),
                Err(_time_to_look_again) => discovery.turn(Vec::new(), false),
            }
        }
    };
    timeout(Duration::from_secs(10), looking)
        .await
        .unwrap_or_else(|_| panic!("{what}"))
}

#[tokio::test]
async fn a_sandbox_is_found_when_it_comes_and_let_go_when_it_ends() {
    let tree = Tree::new();
    let mut discovery = tree.discovery().unwrap();
    assert_eq!(discovery.pod_roots(), [tree.0.path().join("kubepods")]);

    fs::create_dir(tree.pod()).unwrap();
    let empty = tree.pod().join("sandbox");
    fs::create_dir(&empty).unwrap();
    let born = until(&mut discovery, "the cgroup alone", |sandbox| sandbox.is_some())
        .await
        .unwrap();
    assert!(born.netns.is_none() && !born.host_network && born.is_new && born.pod.is_none());

    let process = Process::isolated();
    tree.container("sandbox", &[&process]);
    let wanted = |sandbox: Option<&Sandbox>| sandbox.is_some_and(|sandbox| sandbox.netns.is_some());
    let bare = until(&mut discovery, "the namespace", wanted).await.unwrap();
    assert_eq!(bare.netns.as_ref().unwrap().inode(), process.inode());
    assert!(bare.addresses.is_empty() && bare.born >= born.born);

    process.ip("link add eth0 type veth peer name eth1");
    process.ip("addr add 192.0.2.7/32 dev eth0");
    let wanted = |sandbox: Option<&Sandbox>| sandbox.is_some_and(|sandbox| !sandbox.addresses.is_empty());
    let whole = until(&mut discovery, "the address", wanted).await.unwrap();
    assert_eq!(whole.addresses, ["192.0.2.7".parse::<IpAddr>().unwrap()]);
    assert_eq!(whole.cookie(), Some(process.netns().cookie()));

    tree.remove("sandbox");
    until(&mut discovery, "the end", |sandbox| sandbox.is_none()).await;
    drop((whole, bare));
    let held = &discovery.found.borrow().clone();
    assert!(held.is_empty(), "a namespace must not outlive its sandbox: {held:?}");

    fs::remove_dir(tree.pod()).unwrap();
    fs::create_dir(tree.pod()).unwrap();
    tree.container("again", &[&process]);
    until(&mut discovery, "a cgroup of the same name", |sandbox| sandbox.is_some()).await;
}

#[tokio::test]
async fn what_was_there_before_is_found_at_once() {
    let tree = Tree::new();
    let process = Process::isolated();
    process.ip("link add eth0 type veth peer name eth1");
    process.ip("addr add 192.0.2.7/32 dev eth0");
    tree.container("sandbox", &[&process]);
    for name in [format!("shop_cart-1_{UID}"), "shop_other_uid".into(), "odd".into()] {
        fs::create_dir_all(tree.0.path().join("logs").join(name)).unwrap();
    }
    let discovery = tree.discovery().unwrap();
    let found = discovery.sandboxes().borrow().clone();
    let sandbox = &found[&PodUid::new(UID).unwrap()];
    assert_eq!(sandbox.netns.as_ref().unwrap().inode(), process.inode());
    assert_eq!(sandbox.addresses.len(), 1);
    assert_eq!(sandbox.pod, Some(ObjectName::new("shop", "cart-1")));
    assert!(!sandbox.is_new, "it was there before");
}

#[tokio::test]
async fn a_sandbox_made_anew_is_another_one() {
    let tree = Tree::new();
    let mut discovery = tree.discovery().unwrap();
    let (first, second) = (Process::isolated(), Process::isolated());
    let is_in = |inode: (u64, u64)| {
        move |sandbox: Option<&Sandbox>| {
            sandbox
                .and_then(|sandbox| sandbox.netns.as_ref())
                .is_some_and(|netns| netns.inode() == inode)
        }
    };
    tree.container("first", &[&first]);
    let old = until(&mut discovery, "the first", is_in(first.inode())).await.unwrap();
    tree.remove("first");
    tree.container("second", &[&second]);
    let new = until(&mut discovery, "the second", is_in(second.inode()))
        .await
        .unwrap();
    assert!(new.born > old.born);
}

#[tokio::test]
async fn the_namespace_of_most_containers_is_the_pods_and_the_monitors_is_nobodys() {
    let tree = Tree::new();
    let mut discovery = tree.discovery().unwrap();
    let (pod, nested, monitor) = (Process::isolated(), Process::isolated(), Process::home());
    tree.container("crio-conmon-1.scope", &[&monitor]);
    tree.container("a", &[&nested]);
    tree.container("b", &[&pod]);
    tree.container("c/container", &[&pod]);
    let wanted = |sandbox: Option<&Sandbox>| {
        sandbox
            .and_then(|sandbox| sandbox.netns.as_ref())
            .is_some_and(|netns| netns.inode() == pod.inode())
    };
    until(&mut discovery, "the pod's", wanted).await;
    for name in ["a", "b", "c"] {
        tree.remove(name);
    }
    until(&mut discovery, "the end", |sandbox| sandbox.is_none()).await;
}

#[tokio::test]
async fn a_pod_of_the_nodes_network_is_told_as_such() {
    let tree = Tree::new();
    let mut discovery = tree.discovery().unwrap();
    let process = Process::home();
    tree.container("sandbox", &[&process]);
    let wanted = |sandbox: Option<&Sandbox>| sandbox.is_some_and(|sandbox| sandbox.host_network);
    let sandbox = until(&mut discovery, "the node's network", wanted).await.unwrap();
    assert!(sandbox.netns.is_none());
}

#[test]
fn version_1_hierarchies_are_tried_in_order() {
    let mountinfo = "40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
42 31 0:39 / /sys/fs/cgroup/devices rw - cgroup cgroup rw,devices
43 31 0:40 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
44 31 0:41 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids";
    let expected: Vec<PathBuf> = ["pids", "cpu,cpuacct", "systemd", "devices"]
        .iter()
        .map(|name| PathBuf::from("/sys/fs/cgroup").join(name))
        .collect();
    assert_eq!(mounts_v1(mountinfo), expected);
}
