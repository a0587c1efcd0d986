//! Announced flows: who passes to a probe port is known by the socket that connects, never by its address.

use std::{
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use mesh_abi::Reason;
use socket2::{Domain, Socket};

use crate::{
    entries, listen, tcp,
    world::{self, Agent, Cgroup, Exceptions, PATIENCE, World, accept, is_idle, is_refused},
};

const PROBED: u16 = 9001;

fn probed(world: &World) -> (Agent, Vec<TcpListener>) {
    let exceptions = Exceptions {
        probes: vec![PROBED],
        ..Exceptions::default()
    };
    let agent = world.capture_except(1, &exceptions);
    let applications = [false, true].map(|ipv6| {
        let ip = world.pod_ip(ipv6);
        world.in_pod(move || listen(ip, PROBED))
    });
    (agent, applications.into())
}

fn announced(world: &World) -> u64 {
    entries(&world.kernel().gauges(), "ANNOUNCED")
}

/// A process of a pod that shares the node's network connects from a port, if that is not 0.
fn connect_from_a_pod_of_the_node(world: &World, pod: &Cgroup, port: u16, to: SocketAddr) {
    let family = if to.is_ipv6() { "AF_INET6" } else { "AF_INET" };
    let ip = world.outside_ip(to.is_ipv6());
    let program = format!(
        "import socket
s = socket.socket(socket.{family})
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(('{ip}', {port}))
s.connect(('{}', {}))",
        to.ip(),
        to.port()
    );
    pod.run(&world.outside_path(), &program).finish();
}

/// A socket of the node that has connected from its address and the port.
fn connect_from(ip: IpAddr, port: u16, to: SocketAddr) -> Socket {
    let socket = tcp(Domain::for_address(to));
    socket.set_reuse_address(true).unwrap();
    socket.bind(&SocketAddr::new(ip, port).into()).unwrap();
    socket.connect(&to.into()).unwrap();
    socket
}

#[test]
fn a_pod_with_the_nodes_address_is_no_prober() {
    let world = World::new();
    let pods = Cgroup::new(&world, "pods");
    let pod = pods.child("pod");
    world.kernel().set_guarded(&[pods.path()]).unwrap();
    let (agent, applications) = probed(&world);
    for application in &applications {
        let to = application.local_addr().unwrap();
        world.outside(move || TcpStream::connect(to)).unwrap();
        accept(std::slice::from_ref(application));
        connect_from_a_pod_of_the_node(&world, &pod, 0, to);
        accept(&agent.inbound);
        assert!(is_idle(std::slice::from_ref(application)) && is_idle(&agent.inbound));
    }
    assert_eq!(world.count(Reason::InboundProbe), 2);
    assert_eq!(world.count(Reason::Steered), 2);
}

#[test]
fn an_address_of_the_node_alone_proves_nothing() {
    // This process connects from the node's namespace, and out of the programs' sight: as what is masqueraded does.
    let mut world = World::new();
    let elsewhere = Cgroup::new(&world, "elsewhere");
    world.die();
    world.config.cgroup = elsewhere.path().to_owned();
    world.attach();
    let (agent, applications) = probed(&world);
    for application in &applications {
        let to = application.local_addr().unwrap();
        world.outside(move || TcpStream::connect(to)).unwrap();
        accept(&agent.inbound);
    }
    assert!(is_idle(&applications));
    assert_eq!(world.count(Reason::InboundProbe), 0);
}

#[test]
fn a_port_that_is_used_again_proves_nothing() {
    const PORT: u16 = 20_001;
    let world = World::new();
    let pods = Cgroup::new(&world, "pods");
    let pod = pods.child("pod");
    world.kernel().set_guarded(&[pods.path()]).unwrap();
    let (agent, applications) = probed(&world);
    for application in &applications {
        let to = application.local_addr().unwrap();
        let from = world.outside_ip(to.is_ipv6());
        let socket = world.outside(move || connect_from(from, PORT, to));
        accept(std::slice::from_ref(application));
        assert_eq!(announced(&world), 1, "as long as the socket lives");
        // A reset: the port is free at once.
        socket.set_linger(Some(Duration::ZERO)).unwrap();
        world::close(socket);
        assert_eq!(announced(&world), 0);
        connect_from_a_pod_of_the_node(&world, &pod, PORT, to);
        accept(&agent.inbound);
        assert!(is_idle(std::slice::from_ref(application)));
    }
}

#[test]
fn an_announcement_ends_with_its_connection_however_that_ends() {
    let world = World::new();
    let (_agent, applications) = probed(&world);
    for application in &applications {
        let to = application.local_addr().unwrap();
        let from = world.outside_ip(to.is_ipv6());
        // By the node's own end, which stays behind in TIME_WAIT.
        let socket = world.outside(move || connect_from(from, 0, to));
        let accepted = accept(std::slice::from_ref(application));
        world::close(socket);
        world::close(accepted);
        let deadline = Instant::now() + PATIENCE;
        while announced(&world) != 0 {
            assert!(Instant::now() < deadline, "the announcement stays");
            std::thread::yield_now();
        }
        // By being disconnected, to be used again.
        let socket = world.outside(move || connect_from(from, 0, to));
        accept(std::slice::from_ref(application));
        assert_eq!(announced(&world), 1);
        world::disconnect(&socket).unwrap();
        assert_eq!(announced(&world), 0);
    }
    // By a refusal.
    world::close(applications);
    for ipv6 in [false, true] {
        let to = SocketAddr::new(world.pod_ip(ipv6), PROBED);
        let refused = world.outside(move || TcpStream::connect(to));
        assert!(is_refused(&refused), "{refused:?}");
        assert_eq!(announced(&world), 0);
    }
}

#[test]
fn the_node_probes_while_no_agent_lives() {
    let mut world = World::new();
    let (agent, applications) = probed(&world);
    world::close(agent);
    world.die();
    for application in &applications {
        let to = application.local_addr().unwrap();
        world.outside(move || TcpStream::connect(to)).unwrap();
        accept(std::slice::from_ref(application));
    }
    let other = SocketAddr::new(world.pod_ip(false), 9003);
    let refused = world.outside(move || TcpStream::connect(other));
    assert!(is_refused(&refused), "{refused:?}");
    world.attach();
    let to = applications[0].local_addr().unwrap();
    world.outside(move || TcpStream::connect(to)).unwrap();
    accept(&applications);
    assert_eq!(world.count(Reason::InboundProbe), 3);
}

#[test]
fn a_probe_answered_by_a_syn_cookie_passes() {
    let world = World::new();
    // Always: the connection is looked up again at its first acknowledgement.
    world.in_pod(|| std::fs::write("/proc/sys/net/ipv4/tcp_syncookies", "2").unwrap());
    let (agent, applications) = probed(&world);
    for application in &applications {
        let to = application.local_addr().unwrap();
        let mapped = match to.ip() {
            IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), to.port()),
            IpAddr::V6(_) => to,
        };
        for to in [to, mapped] {
            let socket = world.outside(move || {
                let socket = tcp(Domain::for_address(to));
                socket.connect(&to.into()).unwrap();
                socket
            });
            accept(std::slice::from_ref(application));
            drop(socket);
        }
    }
    assert!(is_idle(&agent.inbound));
}
