//! Pods as a kubelet makes them: found by their UIDs in a tree of cgroups, guarded from their birth.

use std::{
    collections::BTreeSet,
    fs,
    io::{Read, Write},
    net::{IpAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    sync::Arc,
};

use mesh_agent::{
    kernel::{Kernel, KernelConfig, NetnsCookie},
    pods::{Discovery, GateConfig, Netns, Pods, Sandboxes, sever},
};
use mesh_api::workload::{ObjectName, Workload};
use tokio::{sync::watch, time::timeout};

use crate::{
    listen_outside,
    pods::{self, Worker, reconcile_and_serve, status},
    world::{Cgroup, PATIENCE, Program, World, accept, is_refused},
};

const UID: &str = "0a3f7c52-9d1e-4b6a-8f00-1234567890ab";
/// What the kubelet calls a static pod.
const STATIC: &str = "0123456789abcdef0123456789abcdef";

/// A node with one pod. Fields are dropped in this order: cgroups from the inside out.
struct Node {
    uid: &'static str,
    container: Option<Cgroup>,
    pod: Option<Cgroup>,
    _kubepods: Cgroup,
    tree: Cgroup,
    logs: tempfile::TempDir,
    world: World,
    kernel: Arc<Kernel>,
    workers: Vec<Worker>,
    pods: Pods,
    found: watch::Receiver<Arc<Sandboxes>>,
    looking: tokio::task::JoinHandle<()>,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.looking.abort();
    }
}

impl Node {
    fn new() -> Node {
        Node::with_uid(UID)
    }

    fn with_uid(uid: &'static str) -> Node {
        Node::with(uid, |_| {})
    }

    fn with(uid: &'static str, change: impl FnOnce(&mut KernelConfig)) -> Node {
        let mut world = World::with(change);
        let tree = Cgroup::new(&world, "node");
        let kubepods = tree.child("kubepods");
        let logs = tempfile::tempdir().unwrap();
        let discovery = Discovery::open(tree.path(), logs.path()).unwrap();
        let gate = GateConfig {
            refuses: true,
            trusted: BTreeSet::from(["nodemesh-system".to_owned()]),
            roots: discovery.pod_roots(),
            severs: false,
        };
        let kernel = world.take_kernel();
        let (pods, workers) = pods::pods(&kernel, 1);
        Node {
            uid,
            container: None,
            pod: None,
            _kubepods: kubepods,
            tree,
            logs,
            world,
            workers,
            pods: pods.with_gate(gate).unwrap(),
            kernel,
            found: discovery.sandboxes(),
            looking: tokio::spawn(discovery.run()),
        }
    }

    fn path(&self) -> PathBuf {
        self.tree.path().join("kubepods").join(format!("pod{}", self.uid))
    }

    /// Makes the pod's cgroup, a container's in it, and a process in that and in the pod's network namespace.
    async fn start(&mut self) -> Program {
        let kubepods = &self._kubepods;
        let pod = kubepods.child(&format!("pod{}", self.uid));
        let container = pod.child("sandbox");
        let pause = container.run(&self.world.netns_path(), "import signal\nsignal.pause()");
        (self.pod, self.container) = (Some(pod), Some(container));
        self.until(|found| found.values().any(|sandbox| !sandbox.addresses.is_empty()))
            .await;
        pause
    }

    /// Ends the process and removes the cgroups, as at a pod's end.
    async fn end(&mut self, pause: Program) {
        pause.kill();
        self.container = None;
        self.pod = None;
        assert!(!self.path().exists());
        self.until(|found| found.is_empty()).await;
    }

    async fn until(&mut self, wanted: impl FnMut(&Arc<Sandboxes>) -> bool) {
        let found = timeout(PATIENCE, self.found.wait_for(wanted)).await;
        let found = found.expect("the sandboxes become as wanted").unwrap().clone();
        self.pods.set_sandboxes(found);
    }

    /// What becomes of a connection that the pod makes to the outside.
    fn attempt(&self, to: std::net::SocketAddr) -> String {
        let program = format!(
            "import errno, socket
try:
    socket.create_connection(('{}', {}))
    print('ok')
except OSError as error:
    print(errno.errorcode[error.errno])",
            to.ip(),
            to.port()
        );
        let container = self.container.as_ref().unwrap();
        container.output(&self.world.netns_path(), &program).trim().to_owned()
    }

    fn workload(&self, enrolled: bool) -> Arc<Workload> {
        Arc::new(Workload {
            uid: UID.into(),
            netns: None,
            addresses: Vec::new(),
            enrolled,
            ..pods::workload(&self.world, "cart")
        })
    }
}

fn home() -> NetnsCookie {
    Netns::current().unwrap().cookie()
}

#[tokio::test]
async fn a_pod_is_refused_then_known_then_captured_then_known_then_forgotten() {
    let mut node = Node::new();
    let (_outside, address) = listen_outside(&node.world, false);
    let cookie = node.world.cookie();
    node.pods.reconcile(&[]).await;
    let pause = node.start().await;
    let ip = node.world.pod_ip(false);
    let application = node.world.in_pod(move || TcpListener::bind((ip, 0))).unwrap();
    let inside = application.local_addr().unwrap();
    assert_eq!(node.attempt(address), "ECONNREFUSED", "nobody knows it");
    node.pods.reconcile(&[]).await;
    let arrives = || node.world.outside(move || TcpStream::connect(inside));
    assert!(is_refused(&arrives()), "nothing arrives there either");
    assert_eq!(node.attempt(address), "ECONNREFUSED", "the API does not know it");

    node.pods.reconcile(&[node.workload(false)]).await;
    assert_eq!(node.attempt(address), "ok", "not enrolled");
    arrives().unwrap();
    accept(std::slice::from_ref(&application));
    assert!(!status(&node.pods).captured && node.pods.is_settled());

    let enrolled = [node.workload(true)];
    let (outbound, inbound) = reconcile_and_serve(&mut node.pods, &mut node.workers, &enrolled).await;
    assert!(status(&node.pods).captured, "{:?}", status(&node.pods));
    assert_eq!(node.attempt(address), "ok");
    accept(&outbound);
    arrives().unwrap();
    accept(&inbound);
    let found = node.pods.directory().by_address(node.world.pod_ip(false));
    assert_eq!(
        found.unwrap().cookie(),
        cookie,
        "its addresses are those of the namespace"
    );
    assert_eq!(node.kernel.known().unwrap(), BTreeSet::from([home()]));
    let (_, times) = node.pods.times().snapshot();
    assert_eq!(times.iter().map(|(_, count)| count).sum::<u64>(), 1, "{times:?}");

    node.pods.reconcile(&[node.workload(false)]).await;
    assert_eq!(node.attempt(address), "ok", "retired");
    arrives().unwrap();
    accept(std::slice::from_ref(&application));
    assert_eq!(node.kernel.known().unwrap(), BTreeSet::from([home(), cookie]));

    node.end(pause).await;
    node.pods.reconcile(&enrolled).await;
    let absent = status(&node.pods);
    assert_eq!(
        (absent.captured, absent.reason.as_deref()),
        (false, Some("no sandbox yet"))
    );
    assert!(absent.is_absent && node.pods.is_settled());
    assert_eq!(node.kernel.known().unwrap(), BTreeSet::from([home()]));
    assert_eq!(node.kernel.enrolled().unwrap(), BTreeSet::new());
}

#[tokio::test]
async fn a_captured_pod_is_let_go_with_its_sandbox_and_another_of_its_name_is_not_it() {
    let mut node = Node::new();
    node.pods.reconcile(&[]).await;
    let pause = node.start().await;
    let enrolled = [node.workload(true)];
    let listeners = reconcile_and_serve(&mut node.pods, &mut node.workers, &enrolled).await;
    let later = Arc::new(Workload {
        uid: UID.replace('0', "f").into(),
        ..(*enrolled[0]).clone()
    });
    node.pods.reconcile(&[later]).await;
    assert_eq!(status(&node.pods).reason.as_deref(), Some("no sandbox yet"));
    assert_eq!(
        node.kernel.enrolled().unwrap(),
        BTreeSet::new(),
        "another UID is another pod"
    );
    drop(listeners);
    while let Ok(_retired) = node.workers.iter_mut().next().unwrap().commands.try_recv() {}

    let listeners = reconcile_and_serve(&mut node.pods, &mut node.workers, &enrolled).await;
    node.end(pause).await;
    node.pods.reconcile(&enrolled).await;
    assert_eq!(node.kernel.enrolled().unwrap(), BTreeSet::new());
    assert!(
        node.pods.directory().all().is_empty(),
        "nothing may keep the namespace of a pod that has ended"
    );
    drop(listeners);
}

/// The network namespace of this process, which plays the agent.
const HOME: &str = "/proc/self/ns/net";

impl Node {
    /// A node whose own namespace is this process's, with a pod that shares it.
    async fn hosting(uid: &'static str) -> (Node, Program) {
        let mut node = Node::with(uid, |config| config.home = Netns::current().unwrap().cookie());
        let pod = node._kubepods.child(&format!("pod{uid}"));
        let container = pod.child("main");
        let pause = container.run(Path::new(HOME), "import signal\nsignal.pause()");
        (node.pod, node.container) = (Some(pod), Some(container));
        node.until(|found| !found.is_empty()).await;
        (node, pause)
    }

    fn hosted(&self, enrolled: bool) -> Workload {
        Workload {
            host_network: true,
            // As the API tells: nothing else does.
            addresses: vec!["192.0.2.9".parse().unwrap()],
            ..(*self.workload(enrolled)).clone()
        }
    }
}

#[tokio::test]
async fn a_pod_of_the_nodes_network_is_captured_as_a_source_by_its_cgroup() {
    let (mut node, pause) = Node::hosting(UID).await;
    let wanted = Arc::new(node.hosted(true));
    let enrolled = [wanted.clone()];
    let (outbound, inbound) = reconcile_and_serve(&mut node.pods, &mut node.workers, &enrolled).await;
    let found = status(&node.pods);
    let why = "host network: captured as a source only";
    assert_eq!((found.captured, found.reason.as_deref()), (true, Some(why)));
    assert!(inbound.is_empty(), "what arrives at it is nobody's to steer");
    let pod = node.pods.directory().by_name(&wanted.name).unwrap();
    assert!(pod.is_hosted());
    assert!(
        node.pods.directory().by_address(wanted.addresses[0]).is_none(),
        "the node's addresses are nobody's own"
    );
    let container = node.container.as_ref().unwrap();
    let connect = "import socket\nsocket.create_connection(('203.0.113.7', 80))";
    container.run(Path::new(HOME), connect).finish();
    let (_, source) = accept(&outbound);
    let original = node.kernel.take_original_destination(pod.cookie(), source);
    assert_eq!(original, Some("203.0.113.7:80".parse().unwrap()));

    // Its end is its cgroup's.
    node.end(pause).await;
    node.pods.reconcile(&enrolled).await;
    assert_eq!(node.kernel.enrolled().unwrap(), BTreeSet::new());
    assert!(node.pods.directory().all().is_empty());
}

#[tokio::test]
async fn what_the_node_and_the_mesh_are_made_of_is_never_captured() {
    let (mut node, pause) = Node::hosting(UID).await;
    let hosted = node.hosted(true);
    let trusted = Workload {
        name: ObjectName::new("nodemesh-system", "agent"),
        ..hosted.clone()
    };
    let ended = Workload {
        uid: "00000000-9d1e-4b6a-8f00-1234567890ab".into(),
        ..hosted
    };
    for (workload, why) in [
        (trusted, "host network, and a part of the node or of the mesh itself"),
        (ended, "no sandbox yet"),
    ] {
        node.pods.reconcile(&[Arc::new(workload)]).await;
        let found = status(&node.pods);
        assert_eq!((found.captured, found.reason.as_deref()), (false, Some(why)));
        assert!(found.is_absent && node.pods.is_settled());
        assert_eq!(node.kernel.enrolled().unwrap(), BTreeSet::new());
    }
    node.end(pause).await;
}

#[tokio::test]
async fn the_controllers_pods_need_not_wait_for_the_controller() {
    let mut node = Node::new();
    let (_outside, address) = listen_outside(&node.world, false);
    node.pods.reconcile(&[]).await;
    fs::create_dir(
        node.logs
            .path()
            .join(format!("nodemesh-system_nodemesh-controller-1_{UID}")),
    )
    .unwrap();
    let _pause = node.start().await;
    assert_eq!(node.attempt(address), "ECONNREFUSED");
    node.pods.await_view();
    assert_eq!(node.attempt(address), "ok");
    // What the API says counts more.
    let enrolled = [node.workload(true)];
    let (outbound, _inbound) = reconcile_and_serve(&mut node.pods, &mut node.workers, &enrolled).await;
    assert_eq!(node.attempt(address), "ok");
    accept(&outbound);
}

#[tokio::test]
async fn a_namespace_within_a_pod_is_as_the_pod_but_never_captured() {
    let mut node = Node::new();
    node.pods.reconcile(&[]).await;
    let _pause = node.start().await;
    node.pods.reconcile(&[node.workload(false)]).await;
    // A process that leaves for a namespace of its own, where only loopback is: refused before there is no route.
    let nested = "import ctypes, errno, socket, sys
def attempt():
    try:
        socket.create_connection(('192.0.2.1', 80))
    except OSError as error:
        print(errno.errorcode[error.errno], flush=True)
assert ctypes.CDLL(None).unshare(0x40000000) == 0
attempt()
sys.stdin.read(1)
attempt()";
    for (is_enrolled, expected) in [
        (false, "ECONNREFUSED\nENETUNREACH\n"),
        (true, "ECONNREFUSED\nECONNREFUSED\n"),
    ] {
        let container = node.container.as_ref().unwrap();
        let mut process = container.talk(&node.world.netns_path(), nested);
        let mut output = process.stdout.take().unwrap();
        let mut text = String::new();
        let mut byte = [0];
        while !text.ends_with('\n') {
            output.read_exact(&mut byte).unwrap();
            text.push(char::from(byte[0]));
        }
        assert!(node.pods.meet_strangers(), "a stranger is news");
        assert!(!node.pods.meet_strangers(), "once");
        if is_enrolled {
            let enrolled = [node.workload(true)];
            let _listeners = reconcile_and_serve(&mut node.pods, &mut node.workers, &enrolled).await;
        } else {
            node.pods.reconcile(&[node.workload(false)]).await;
        }
        process.stdin.take().unwrap().write_all(b"x").unwrap();
        output.read_to_string(&mut text).unwrap();
        assert!(process.wait().unwrap().success());
        assert_eq!(text, expected, "enrolled: {is_enrolled}");
    }
}

#[test]
fn what_a_pod_has_connected_is_ended_and_what_it_has_accepted_goes_on() {
    let world = World::new();
    for ipv6 in [false, true] {
        let (outside, address) = listen_outside(&world, ipv6);
        let (mut made, accepted) = (
            world.in_pod(move || TcpStream::connect(address)).unwrap(),
            accept(std::slice::from_ref(&outside)).0,
        );
        let ip: IpAddr = world.pod_ip(ipv6);
        let inside = world.in_pod(move || TcpListener::bind((ip, 0))).unwrap();
        let address = inside.local_addr().unwrap();
        let mut caller = world.outside(move || TcpStream::connect(address)).unwrap();
        let (mut served, _) = accept(std::slice::from_ref(&inside));
        let own = world.in_pod(move || TcpStream::connect(address)).unwrap();
        let (mut own_served, _) = accept(std::slice::from_ref(&inside));

        assert_eq!(sever(world.netns()).unwrap(), 1, "ipv6: {ipv6}");
        let error = made.read(&mut [0]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ECONNABORTED));
        drop(accepted);
        for (from, to) in [(&mut caller, &mut served), (&mut { own }, &mut own_served)] {
            from.write_all(b"x").unwrap();
            to.read_exact(&mut [0]).unwrap();
        }
        assert_eq!(sever(world.netns()).unwrap(), 0);
    }
}

#[tokio::test]
async fn a_static_pod_goes_by_its_name() {
    let mut node = Node::with_uid(STATIC);
    let (_outside, address) = listen_outside(&node.world, false);
    fs::create_dir(node.logs.path().join(format!("shop_cart_{STATIC}"))).unwrap();
    let _pause = node.start().await;
    // The API's UID is that of the mirror pod.
    node.pods.reconcile(&[node.workload(false)]).await;
    assert_eq!(node.attempt(address), "ok", "not enrolled");
    let enrolled = [node.workload(true)];
    let (outbound, _inbound) = reconcile_and_serve(&mut node.pods, &mut node.workers, &enrolled).await;
    assert_eq!(node.attempt(address), "ok");
    accept(&outbound);
}
