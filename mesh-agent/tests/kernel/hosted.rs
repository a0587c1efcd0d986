//! Pods that share the node's network namespace: captured as sources, each by its cgroup.

use std::{
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::fs::MetadataExt,
};

use mesh_abi::{
    PortSet, Reason,
    direct::{DirectEndpoint, DirectKey, DirectState},
};
use mesh_agent::{
    kernel::{HostedCapture, NetnsCookie, direct::direct_entry},
    pods::Netns,
};

use crate::{
    listen, listen_outside,
    world::{Cgroup, World, accept, is_idle},
};

/// A pod of the node's network, and the agent's listeners for it.
struct Hosted {
    cgroup: Cgroup,
    listeners: Vec<TcpListener>,
}

impl Hosted {
    fn capture(world: &World, pods: &Cgroup, name: &str) -> Hosted {
        let listeners: Vec<TcpListener> = ["127.0.0.1:0", "[::1]:0"]
            .map(|any| world.outside(move || TcpListener::bind(any)).unwrap())
            .into();
        let hosted = Hosted {
            cgroup: pods.child(name),
            listeners,
        };
        hosted.enrol(world);
        hosted
    }

    fn enrol(&self, world: &World) {
        let at = |index: usize| {
            self.listeners
                .get(index)
                .and_then(|listener| listener.local_addr().ok())
        };
        let capture = HostedCapture {
            cgroup_id: self.id(),
            addresses: &[world.outside_ip(false), world.outside_ip(true)],
            outbound_v4: at(0),
            outbound_v6: at(1),
            exclude_outbound: PortSet::default(),
        };
        world.kernel().enrol_hosted(&capture).unwrap();
    }

    fn id(&self) -> u64 {
        self.cgroup.path().metadata().unwrap().ino()
    }

    fn run(&self, world: &World, program: &str) -> String {
        self.cgroup.output(&world.outside_path(), program)
    }

    /// Has the pod connect, and says what its socket shows.
    fn connect(&self, world: &World, to: SocketAddr) -> String {
        let program = format!(
            "import socket
s = socket.create_connection(('{}', {}))
print(s.getpeername()[0], s.getpeername()[1], s.getsockname()[0])",
            to.ip(),
            to.port()
        );
        self.run(world, &program)
    }

    /// What the connection asked for that was accepted for this pod.
    fn original(&self, world: &World) -> Option<SocketAddr> {
        let (_, source) = accept(&self.listeners);
        let cookie = NetnsCookie::hosted(self.id());
        world.kernel().take_original_destination(cookie, source)
    }
}

#[test]
fn what_a_pod_of_the_nodes_network_connects_to_is_captured_and_nothing_else() {
    let world = World::new();
    let pods = Cgroup::new(&world, "pods");
    let stranger = pods.child("stranger");
    let (one, two) = (
        Hosted::capture(&world, &pods, "one"),
        Hosted::capture(&world, &pods, "two"),
    );
    for destination in ["203.0.113.7:80", "[2001:db8::7]:443"] {
        let destination: SocketAddr = destination.parse().unwrap();
        for hosted in [&one, &two] {
            let shown = hosted.connect(&world, destination);
            let own = world.outside_ip(destination.is_ipv6());
            assert_eq!(
                shown.trim(),
                format!("{} {} {own}", destination.ip(), destination.port())
            );
            assert_eq!(hosted.original(&world), Some(destination));
        }
    }
    assert_eq!(world.count(Reason::Captured), 4);
    // A process in a cgroup within the pod's is the pod's.
    let container = one.cgroup.child("container");
    let destination: SocketAddr = "203.0.113.8:81".parse().unwrap();
    let connect = format!("import socket\nsocket.create_connection(('{}', 81))", destination.ip());
    container.run(&world.outside_path(), &connect).finish();
    assert_eq!(one.original(&world), Some(destination));

    // The node's daemons, a pod that is not enrolled, and what is the node's own.
    let pod_ip = world.pod_ip(false);
    let application = world.in_pod(move || listen(pod_ip, 0));
    let address = application.local_addr().unwrap();
    world.outside(move || TcpStream::connect(address)).unwrap();
    accept(std::slice::from_ref(&application));
    let connect = format!(
        "import socket\nsocket.create_connection(('{pod_ip}', {}))",
        address.port()
    );
    stranger.run(&world.outside_path(), &connect).finish();
    accept(std::slice::from_ref(&application));
    let (kubelet, address) = listen_outside(&world, false);
    one.connect(&world, address);
    accept(std::slice::from_ref(&kubelet));
    assert!(is_idle(&one.listeners) && is_idle(&two.listeners));

    let mptcp = "import errno, socket
try:
    socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
    print('ok')
except OSError as error:
    print(errno.errorcode[error.errno])";
    assert_eq!(one.run(&world, mptcp).trim(), "EPROTONOSUPPORT");
}

#[test]
fn nothing_of_the_nodes_network_is_direct() {
    let world = World::new();
    let _agent = world.capture(1);
    let pods = Cgroup::new(&world, "pods");
    let hosted = Hosted::capture(&world, &pods, "hosted");
    // What no agent writes: an entry for the namespace that many share.
    let pod_ip = world.pod_ip(false);
    let application = world.in_pod(move || listen(pod_ip, 0));
    let endpoint = application.local_addr().unwrap();
    let destination: SocketAddr = "203.0.113.7:80".parse().unwrap();
    let places = [DirectEndpoint::new(world.cookie().0, endpoint.into())];
    let home = Netns::open(&world.outside_path()).unwrap().cookie();
    for cookie in [home, NetnsCookie::hosted(hosted.id())] {
        let key = DirectKey::new(cookie.0, destination.into());
        world.kernel().set_direct(&key, &direct_entry(1, 1, &places)).unwrap();
    }
    let valid = DirectState {
        generation: 1,
        owner: 1,
        beat: u64::MAX,
        revision: 1,
    };
    world.kernel().set_direct_state(&valid).unwrap();
    hosted.connect(&world, destination);
    assert_eq!(hosted.original(&world), Some(destination));
    assert!(is_idle(std::slice::from_ref(&application)));
    assert_eq!(world.count(Reason::OutboundDirect), 0);
}

#[test]
fn no_pod_of_the_nodes_network_passes_for_another() {
    let world = World::new();
    let pods = Cgroup::new(&world, "pods");
    let (victim, thief) = (
        Hosted::capture(&world, &pods, "victim"),
        Hosted::capture(&world, &pods, "thief"),
    );
    let listener = victim.listeners[0].local_addr().unwrap();
    // From one port of its own: a captured connection, whose destination is kept, and one to the other's listener.
    let program = format!(
        "import socket
def bound(ip, port):
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind((ip, port))
    return s
captured = bound('', 0)
forged = bound('127.0.0.1', captured.getsockname()[1])
captured.connect(('203.0.113.7', 80))
forged.connect(('{}', {}))",
        listener.ip(),
        listener.port()
    );
    thief.run(&world, &program);
    assert_eq!(victim.original(&world), None, "nobody asked for anything there");
    assert_eq!(thief.original(&world), Some("203.0.113.7:80".parse().unwrap()));
}

#[test]
fn a_pod_of_the_nodes_network_is_retired_by_its_cgroup() {
    let mut world = World::new();
    let pods = Cgroup::new(&world, "pods");
    let hosted = Hosted::capture(&world, &pods, "one");
    let cookie = NetnsCookie::hosted(hosted.id());
    assert_eq!(
        world.kernel().enrolled().unwrap().into_iter().collect::<Vec<_>>(),
        [cookie]
    );
    // While no agent lives its listeners are refused or held, like any pod's; the next one makes the entry its own.
    world.die();
    hosted.connect(&world, "203.0.113.7:80".parse().unwrap());
    world.attach();
    hosted.enrol(&world);
    assert!(hosted.original(&world).is_some(), "an agent's death changes nothing");
    world.kernel().retire(cookie).unwrap();
    assert!(world.kernel().enrolled().unwrap().is_empty());
    let pod_ip = world.pod_ip(false);
    let application = world.in_pod(move || listen(pod_ip, 0));
    hosted.connect(&world, application.local_addr().unwrap());
    accept(std::slice::from_ref(&application));
    assert!(is_idle(&hosted.listeners));
}
