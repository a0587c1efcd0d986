//! The kernel programs in the real kernel: real network namespaces, real sockets, real pins.
//!
//! Each test makes a small world of its own: a pod's network namespace and one outside, joined by a veth pair, and a
//! pin directory. The test's process plays the agent and, on threads, the applications. Needs root; a test never
//! passes by being skipped.

#[path = "kernel/announce.rs"]
mod announce;
#[path = "kernel/direct.rs"]
mod direct;
#[path = "kernel/foreign.rs"]
mod foreign;
#[path = "kernel/guard.rs"]
mod guard;
#[path = "kernel/hosted.rs"]
mod hosted;
#[path = "kernel/pods.rs"]
mod pods;
#[path = "kernel/sandboxes.rs"]
mod sandboxes;
#[path = "kernel/world.rs"]
mod world;

use std::{
    collections::BTreeSet,
    fs,
    io::{self, Read, Write},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::Mutex,
};

use mesh_abi::{AGENT_MARK, Reason};
use mesh_agent::kernel::{FailMode, Kernel, MapGauge};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use world::{Exceptions, World, accept, accept_any, is_idle, is_refused};

fn tcp(domain: Domain) -> Socket {
    Socket::new(domain, Type::STREAM, Some(Protocol::TCP)).unwrap()
}

/// The ways an application may connect.
#[derive(Clone, Copy, Debug)]
enum Way {
    V4,
    V6,
    V4Mapped,
    NonBlocking,
    Bound,
    /// `sendto` with `MSG_FASTOPEN`: there is no `connect()`.
    FastOpen,
}

fn connect(way: Way, pod: IpAddr, to: SocketAddr) -> io::Result<Socket> {
    let address = match (way, to.ip()) {
        (Way::V4Mapped, IpAddr::V4(ip)) => SocketAddr::new(ip.to_ipv6_mapped().into(), to.port()),
        _ => to,
    };
    let socket = tcp(Domain::for_address(address));
    if let Way::Bound = way {
        socket.bind(&SocketAddr::new(pod, 0).into())?;
    }
    if let Way::FastOpen = way {
        socket.send_to_with_flags(b"early", &address.into(), libc::MSG_FASTOPEN)?;
        return Ok(socket);
    }
    if let Way::NonBlocking = way {
        socket.set_nonblocking(true)?;
        match socket.connect(&address.into()) {
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
            other => other?,
        }
        world::writable(&socket)?;
        socket.set_nonblocking(false)?;
        return socket.take_error()?.map_or(Ok(socket), Err);
    }
    socket.connect(&address.into())?;
    Ok(socket)
}

fn shown(address: io::Result<SockAddr>) -> SocketAddr {
    let address = address.unwrap().as_socket().unwrap();
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[test]
fn every_way_to_connect_reaches_the_agent_and_shows_the_destination() {
    let world = World::new();
    let agent = world.capture(2);
    let cases = [
        (Way::V4, "203.0.113.7:80"),
        (Way::V6, "[2001:db8::7]:443"),
        (Way::V4Mapped, "203.0.113.8:81"),
        (Way::NonBlocking, "203.0.113.9:82"),
        (Way::NonBlocking, "[2001:db8::9]:83"),
        (Way::Bound, "203.0.113.10:84"),
        (Way::Bound, "[2001:db8::10]:85"),
        (Way::FastOpen, "203.0.113.11:86"),
        (Way::FastOpen, "[2001:db8::11]:87"),
    ];
    for (way, destination) in cases {
        let destination: SocketAddr = destination.parse().unwrap();
        let pod_ip = world.pod_ip(destination.is_ipv6());
        let application = world.in_pod(move || connect(way, pod_ip, destination)).unwrap();
        let (mut accepted, source) = accept(&agent.outbound);
        let original = world.kernel().take_original_destination(world.cookie(), source);
        assert_eq!(original, Some(destination), "{way:?}");
        assert_eq!(
            world.kernel().take_original_destination(world.cookie(), source),
            None,
            "{way:?}: an original destination is taken once"
        );
        assert_eq!(shown(application.peer_addr()), destination, "{way:?}: getpeername");
        assert_eq!(shown(application.local_addr()).ip(), pod_ip, "{way:?}: getsockname");
        if let Way::FastOpen = way {
            let mut early = [0; 5];
            accepted.read_exact(&mut early).unwrap();
            assert_eq!(&early, b"early");
        }
        accepted.write_all(b"hello").unwrap();
        drop(accepted);
        let mut text = String::new();
        TcpStream::from(application).read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello", "{way:?}");
    }
    assert_eq!(world.count(Reason::Captured), cases.len() as u64);
}

fn listen(ip: IpAddr, port: u16) -> TcpListener {
    TcpListener::bind(SocketAddr::new(ip, port)).unwrap()
}

/// Where a listener outside, on a free port, can be reached.
fn listen_outside(world: &World, ipv6: bool) -> (TcpListener, SocketAddr) {
    let ip = world.outside_ip(ipv6);
    let listener = world.outside(move || listen(ip, 0));
    let address = listener.local_addr().unwrap();
    (listener, address)
}

fn entries(gauges: &[MapGauge], map: &str) -> u64 {
    gauges.iter().find(|gauge| gauge.map == map).unwrap().entries
}

#[test]
fn no_connection_among_many_gets_anothers_destination() {
    const APPLICATIONS: u16 = 4;
    const CONNECTIONS: u16 = 250;
    let world = World::new();
    let agent = world.capture(2);
    let (kernel, cookie) = (world.kernel(), world.cookie());
    std::thread::scope(|threads| {
        for listener in &agent.outbound {
            // The agent tells each application where it wanted to go; the end of the test ends the accepting.
            threads.spawn(move || {
                while let Ok((mut stream, source)) = listener.accept() {
                    match kernel.take_original_destination(cookie, source) {
                        Some(destination) => stream.write_all(destination.to_string().as_bytes()).unwrap(),
                        None => break,
                    }
                }
            });
        }
        let applications: Vec<_> = (0..APPLICATIONS)
            .map(|application| {
                let in_pod = move || {
                    for connection in 0..CONNECTIONS {
                        let port = 1 + application * CONNECTIONS + connection;
                        let destination: SocketAddr = match connection % 2 {
                            0 => ([203, 0, 113, 7], port).into(),
                            _ => ("2001:db8::7".parse::<Ipv6Addr>().unwrap(), port).into(),
                        };
                        let mut stream = TcpStream::connect(destination).unwrap();
                        let mut told = String::new();
                        stream.read_to_string(&mut told).unwrap();
                        assert_eq!(told, destination.to_string());
                    }
                };
                let netns = world.netns_path();
                threads.spawn(move || world::run_in(&netns, in_pod))
            })
            .collect();
        let results: Vec<_> = applications.into_iter().map(|application| application.join()).collect();
        for listener in &agent.outbound {
            world::stop_accepting(listener);
        }
        assert!(results.iter().all(Result::is_ok));
    });
    assert_eq!(world.count(Reason::Captured), u64::from(APPLICATIONS * CONNECTIONS));
    assert_eq!(
        entries(&world.kernel().gauges(), "ORIG_BY_FLOW"),
        0,
        "every entry was taken"
    );
}

#[test]
fn what_is_not_to_be_captured_passes_and_shows_the_truth() {
    let world = World::new();
    let (excluded, excluded_at) = listen_outside(&world, false);
    let exceptions = Exceptions {
        outbound: vec![excluded_at.port()],
        ..Exceptions::default()
    };
    let agent = world.capture_except(1, &exceptions);
    let (pod4, pod6) = (world.pod_ip(false), world.pod_ip(true));
    let own: Vec<TcpListener> = [pod4, pod6, "127.0.0.1".parse().unwrap(), Ipv6Addr::LOCALHOST.into()]
        .into_iter()
        .map(|ip| world.in_pod(move || listen(ip, 0)))
        .collect();

    let cases = own.iter().map(|listener| (listener, listener.local_addr().unwrap()));
    for (listener, address) in cases.chain([(&excluded, excluded_at)]) {
        let application = world.in_pod(move || TcpStream::connect(address)).unwrap();
        let (_, source) = accept(std::slice::from_ref(listener));
        assert_eq!(application.peer_addr().unwrap(), address);
        assert_eq!(
            application.local_addr().unwrap(),
            source,
            "{address}: both ends name the source alike"
        );
    }
    assert!(is_idle(&agent.outbound) && is_idle(&agent.inbound));
    assert_eq!(world.count(Reason::OutboundExcludedPort), 1);
    assert_eq!(world.count(Reason::OutboundSelf), 2);
    assert_eq!(world.count(Reason::OutboundLoopback), 2);
    assert_eq!(world.count(Reason::Captured), 0);
}

#[test]
fn a_socket_that_is_used_again_forgets_its_captured_life() {
    let world = World::new();
    let (excluded, address) = listen_outside(&world, false);
    let exceptions = Exceptions {
        outbound: vec![address.port()],
        ..Exceptions::default()
    };
    let agent = world.capture_except(1, &exceptions);
    let socket = world
        .in_pod(move || {
            let socket = tcp(Domain::IPV4);
            socket.connect(&SocketAddr::from(([203, 0, 113, 1], 80)).into())?;
            world::disconnect(&socket)?;
            socket.connect(&address.into())?;
            io::Result::Ok(socket)
        })
        .unwrap();
    let (_agent_side, _) = accept(&agent.outbound);
    let (_, source) = accept(std::slice::from_ref(&excluded));
    assert_eq!(shown(socket.peer_addr()), address);
    assert_eq!(shown(socket.local_addr()), source);
}

#[test]
fn udp_is_not_touched() {
    let world = World::new();
    let _agent = world.capture(1);
    let ip = world.outside_ip(false);
    let receiver = world.outside(move || std::net::UdpSocket::bind((ip, 0))).unwrap();
    receiver.set_read_timeout(Some(world::PATIENCE)).unwrap();
    let address = receiver.local_addr().unwrap();
    let sender = world.in_pod(move || {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.connect(address).unwrap();
        socket.send(b"query").unwrap();
        socket
    });
    assert_eq!(sender.peer_addr().unwrap(), address);
    let mut bytes = [0; 16];
    let (length, from) = receiver.recv_from(&mut bytes).unwrap();
    assert_eq!((&bytes[..length], from.ip()), (&b"query"[..], world.pod_ip(false)));
}

#[test]
fn mptcp_is_refused_in_a_captured_pod_so_that_applications_fall_back() {
    const IPPROTO_MPTCP: i32 = 262;
    let world = World::new();
    let mptcp = || Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::from(IPPROTO_MPTCP))).map(drop);
    let has_mptcp = world.in_pod(mptcp).is_ok();
    let _agent = world.capture(1);
    let error = world.in_pod(mptcp).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EPROTONOSUPPORT));
    assert_eq!(world.count(Reason::OutboundProtocol), u64::from(has_mptcp));
}

#[test]
fn the_agents_own_sockets_pass_and_a_marked_socket_of_another_cgroup_does_not() {
    let world = World::new();
    let agent = world.capture(1);
    let (outside, address) = listen_outside(&world, false);
    let marked = move || {
        let socket = tcp(Domain::IPV4);
        socket.set_mark(AGENT_MARK)?;
        socket.connect(&address.into())?;
        io::Result::Ok(socket)
    };
    world.in_pod(marked).unwrap();
    accept(std::slice::from_ref(&outside));
    assert!(is_idle(&agent.outbound));

    let cgroup = world::Cgroup::new(&world, "forger");
    let path = world.netns_path();
    let forger = cgroup.run(&path, &format!(
        "import socket\ns = socket.socket()\ns.setsockopt(socket.SOL_SOCKET, 36, {AGENT_MARK})\ns.connect(('{}', {}))",
        address.ip(),
        address.port()
    ));
    let (_, source) = accept(&agent.outbound);
    assert_eq!(
        world.kernel().take_original_destination(world.cookie(), source),
        Some(address)
    );
    forger.finish();
    assert!(is_idle(std::slice::from_ref(&outside)));
}

#[test]
fn only_the_configured_cgroup_is_looked_at() {
    let mut world = World::new();
    let inside = world::Cgroup::new(&world, "inside");
    world.kernel().enrolled().unwrap();
    world.die();
    world.config.cgroup = inside.path().to_owned();
    // The pinned links are those of the root: they must be moved, not updated.
    world.attach();
    let agent = world.capture(1);
    let (outside, address) = listen_outside(&world, false);
    world.in_pod(move || TcpStream::connect(address)).unwrap();
    accept(std::slice::from_ref(&outside));
    assert!(is_idle(&agent.outbound), "this process is not in the subtree");
    let connect = format!(
        "import socket\nsocket.create_connection(('{}', {}))",
        address.ip(),
        address.port()
    );
    let application = inside.run(&world.netns_path(), &connect);
    accept(&agent.outbound);
    application.finish();
}

#[test]
fn inbound_connections_are_steered_to_every_worker_with_their_addresses_intact() {
    const WORKERS: usize = 4;
    let world = World::new();
    let agent = world.capture(WORKERS);
    for ipv6 in [false, true] {
        let address = SocketAddr::new(world.pod_ip(ipv6), 8080);
        let mut used = BTreeSet::new();
        let mut steered = 0;
        // 200 times the same worker out of four would be a chance of 4^-199.
        while used.len() < WORKERS && steered < 200 {
            let source = world.outside(move || TcpStream::connect(address)).unwrap();
            let (index, accepted, from) = accept_any(&agent.inbound);
            assert_eq!(accepted.local_addr().unwrap(), address);
            assert_eq!(from, source.local_addr().unwrap());
            assert_eq!(source.peer_addr().unwrap(), address);
            used.insert(index);
            steered += 1;
        }
        assert_eq!(
            used.len(),
            WORKERS,
            "every worker of the SO_REUSEPORT group gets connections"
        );
    }
}

#[test]
fn probes_excluded_ports_and_self_traffic_are_not_steered() {
    let world = World::new();
    let (probed, excluded, other) = (9001, 9002, 9003);
    let exceptions = Exceptions {
        inbound: vec![excluded],
        probes: vec![probed],
        ..Exceptions::default()
    };
    let agent = world.capture_except(1, &exceptions);
    for ipv6 in [false, true] {
        let ip = world.pod_ip(ipv6);
        for port in [probed, excluded] {
            let application = world.in_pod(move || listen(ip, port));
            world.outside(move || TcpStream::connect((ip, port))).unwrap();
            accept(std::slice::from_ref(&application));
        }
        let application = world.in_pod(move || listen(ip, other));
        world.in_pod(move || TcpStream::connect((ip, other))).unwrap();
        accept(std::slice::from_ref(&application));
        assert!(is_idle(&agent.inbound));
        world.outside(move || TcpStream::connect((ip, other))).unwrap();
        accept(&agent.inbound);
    }
    assert_eq!(world.count(Reason::InboundProbe), 2);
    assert_eq!(world.count(Reason::InboundExcludedPort), 2);
    assert_eq!(world.count(Reason::InboundSelf), 2);
    assert_eq!(world.count(Reason::Steered), 2);
}

#[test]
fn only_the_node_may_probe() {
    let world = World::with(|config| config.node_addresses = vec!["192.0.2.1".parse().unwrap()]);
    let agent = world.capture_except(
        1,
        &Exceptions {
            probes: vec![9001],
            ..Exceptions::default()
        },
    );
    let ip = world.pod_ip(false);
    let _application = world.in_pod(move || listen(ip, 9001));
    world.outside(move || TcpStream::connect((ip, 9001))).unwrap();
    accept(&agent.inbound);
}

#[test]
fn an_address_that_the_mesh_does_not_know_is_no_way_around_it() {
    let world = World::new();
    let _agent = world.capture(1);
    world.ip("address add 10.99.254.2/32 dev eth0");
    let unknown = world.in_pod(|| TcpListener::bind("0.0.0.0:9001")).unwrap();
    let pod = world.pod_ip(false);
    let result = world.outside(move || {
        world::ip(&format!("route add 10.99.254.2 via {pod}"));
        TcpStream::connect("10.99.254.2:9001")
    });
    assert!(is_refused(&result), "{result:?}");
    assert!(is_idle(std::slice::from_ref(&unknown)));
    assert_eq!(world.count(Reason::InboundUnknownAddress), 1);
}

/// What a connection out of and one into the pod come to; there is a direct listener at both ends.
fn both_ways(world: &World) -> (io::Result<TcpStream>, io::Result<TcpStream>) {
    let (outside, address) = listen_outside(world, false);
    let ip = world.pod_ip(false);
    let application = world.in_pod(move || listen(ip, 0));
    let port = application.local_addr().unwrap().port();
    let out = world.in_pod(move || TcpStream::connect(address));
    let inward = world.outside(move || TcpStream::connect((ip, port)));
    for (result, listener) in [(&out, &outside), (&inward, &application)] {
        match result {
            Ok(_) => drop(accept(std::slice::from_ref(listener))),
            Err(_) => assert!(is_idle(std::slice::from_ref(listener))),
        }
    }
    (out, inward)
}

#[test]
fn a_dead_agent_leaves_its_pods_refused() {
    let mut world = World::new();
    world::close(world.capture(2));
    world.die();
    let (out, inward) = both_ways(&world);
    assert!(is_refused(&out) && is_refused(&inward), "{out:?} {inward:?}");
    world.attach();
    assert_eq!(
        entries(&world.kernel().gauges(), "ORIG_BY_FLOW"),
        0,
        "a refused connect takes its entry with it"
    );
    assert_eq!(world.count(Reason::InboundAgentAbsent), 1);
}

#[test]
fn a_dead_agent_with_fail_mode_pass_lets_its_pods_through() {
    let mut world = World::with(|config| config.fail_mode = FailMode::Pass);
    let agent = world.capture(1);
    world.in_pod(|| TcpStream::connect("203.0.113.7:80")).unwrap();
    accept(&agent.outbound);
    world::close(agent);
    world.die();
    let (out, inward) = both_ways(&world);
    out.unwrap();
    inward.unwrap();
    world.attach();
    assert_eq!(world.count(Reason::OutboundAgentAbsentPass), 1);
    assert_eq!(world.count(Reason::InboundAgentAbsentPass), 1);
}

#[test]
fn a_retired_pod_is_direct_again_and_its_live_connections_go_on() {
    let world = World::new();
    let agent = world.capture(1);
    let mut live = world.in_pod(|| TcpStream::connect("203.0.113.7:80")).unwrap();
    let (mut accepted, _) = accept(&agent.outbound);
    world.kernel().retire(world.cookie()).unwrap();
    let (out, inward) = both_ways(&world);
    out.unwrap();
    inward.unwrap();
    accepted.write_all(b"still here").unwrap();
    drop(accepted);
    let mut text = String::new();
    live.read_to_string(&mut text).unwrap();
    assert_eq!(text, "still here");
    assert_eq!(live.peer_addr().unwrap(), "203.0.113.7:80".parse().unwrap());
    world.kernel().retire(world.cookie()).unwrap();
    let gauges = world.kernel().gauges();
    for map in ["PODS", "STEER", "LISTENERS"] {
        assert_eq!(entries(&gauges, map), 0, "{map}");
    }
}

#[test]
fn an_application_is_shown_its_source() {
    let world = World::new();
    let _agent = world.capture(1);
    let cases = [("127.0.0.1", false), ("0.0.0.0", false), ("::", false), ("::", true)];
    for (bound, ipv6) in cases {
        let ip = world.pod_ip(ipv6);
        let on = if bound == "127.0.0.1" {
            ip
        } else {
            bound.parse().unwrap()
        };
        let application = world.in_pod(move || listen(on, 0));
        let port = application.local_addr().unwrap().port();
        let source: SocketAddr = if ipv6 {
            "[2001:db8::77]:40001"
        } else {
            "198.51.100.77:40001"
        }
        .parse()
        .unwrap();
        // What the agent does to deliver.
        let socket = world.in_pod(move || {
            let socket = tcp(if ipv6 { Domain::IPV6 } else { Domain::IPV4 });
            socket.set_mark(AGENT_MARK).unwrap();
            socket.bind(&SocketAddr::new(ip, 0).into()).unwrap();
            socket
        });
        let local = socket.local_addr().unwrap().as_socket().unwrap();
        let guard = world.kernel().present_peer(world.cookie(), local, source).unwrap();
        socket.connect(&SocketAddr::new(ip, port).into()).unwrap();
        let (accepted, from) = accept(std::slice::from_ref(&application));
        let canonical = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
        assert_eq!(canonical(from), source, "{bound} {ipv6}: accept");
        assert_eq!(
            canonical(accepted.peer_addr().unwrap()),
            source,
            "{bound} {ipv6}: getpeername"
        );
        assert_eq!(canonical(accepted.local_addr().unwrap()), SocketAddr::new(ip, port));
        assert_eq!(entries(&world.kernel().gauges(), "PEERS"), 1);
        drop((socket, guard));
        assert_eq!(entries(&world.kernel().gauges(), "PEERS"), 0);
        assert_eq!(
            canonical(accepted.peer_addr().unwrap()),
            source,
            "{bound} {ipv6}: true as long as the socket lives, also when the agent's end is gone"
        );
    }
}

#[test]
fn a_port_that_is_bound_again_keeps_its_new_presentation() {
    let world = World::new();
    let local: SocketAddr = "10.0.0.1:40000".parse().unwrap();
    let present = |shown: &str| {
        world
            .kernel()
            .present_peer(world.cookie(), local, shown.parse().unwrap())
            .unwrap()
    };
    let first = present("198.51.100.1:1");
    let second = present("198.51.100.2:2");
    drop(first);
    assert_eq!(entries(&world.kernel().gauges(), "PEERS"), 1);
    drop(second);
    assert_eq!(entries(&world.kernel().gauges(), "PEERS"), 0);
}

#[test]
fn a_debugging_agent_reads_what_the_programs_log() {
    static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());
    struct Lines;
    impl log::Log for Lines {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            true
        }
        fn log(&self, record: &log::Record<'_>) {
            LINES.lock().unwrap().push(record.args().to_string());
        }
        fn flush(&self) {}
    }
    log::set_logger(&Lines).unwrap();
    log::set_max_level(log::LevelFilter::Trace);

    let quiet = World::new();
    assert!(quiet.kernel().take_logger().is_none());
    let world = World::with(|config| config.debug = true);
    let mut logger = world.kernel().take_logger().unwrap();
    let _agent = world.capture(1);
    world.in_pod(|| TcpStream::connect("203.0.113.7:80")).unwrap();
    logger.flush();
    let line = format!("netns {} to ::ffff:203.0.113.7 port 80", world.cookie());
    assert!(LINES.lock().unwrap().contains(&line), "{:?}", LINES.lock().unwrap());
}

#[test]
fn a_restarted_agent_takes_over_what_is_pinned() {
    let mut world = World::new();
    assert!(!world.kernel().resumed());
    let agent = world.capture(1);
    let live = world.in_pod(|| TcpStream::connect("203.0.113.7:80")).unwrap();
    let (_accepted, _) = accept(&agent.outbound);
    world::close(agent);
    world.die();
    world.attach();
    assert!(world.kernel().resumed());
    assert_eq!(world.kernel().enrolled().unwrap(), BTreeSet::from([world.cookie()]));
    let (out, inward) = both_ways(&world);
    assert!(is_refused(&out) && is_refused(&inward), "nobody listens yet");
    let agent = world.capture(1);
    let destination: SocketAddr = "203.0.113.8:81".parse().unwrap();
    world.in_pod(move || TcpStream::connect(destination)).unwrap();
    let (_, source) = accept(&agent.outbound);
    assert_eq!(
        world.kernel().take_original_destination(world.cookie(), source),
        Some(destination)
    );
    let ip = world.pod_ip(false);
    world.outside(move || TcpStream::connect((ip, 8080))).unwrap();
    accept(&agent.inbound);
    assert_eq!(
        live.peer_addr().unwrap(),
        "203.0.113.7:80".parse().unwrap(),
        "the old life's sockets tell the truth"
    );
}

#[test]
fn two_generations_live_side_by_side() {
    let world = World::new();
    let old_agent = world.capture(1);
    let next = Kernel::attach(&world.config).unwrap();
    let guard = next
        .present_peer(
            world.cookie(),
            "10.0.0.1:1".parse().unwrap(),
            "10.0.0.2:2".parse().unwrap(),
        )
        .unwrap();
    let after = Kernel::attach(&world.config).unwrap();
    assert_eq!(
        entries(&after.gauges(), "PEERS"),
        1,
        "an agent that lives keeps what it presents"
    );
    drop(guard);
    // The switch: new listeners at another address, one update of the pod.
    let new_agent = world.capture(1);
    let destination: SocketAddr = "203.0.113.8:81".parse().unwrap();
    world.in_pod(move || TcpStream::connect(destination)).unwrap();
    let (_, source) = accept(&new_agent.outbound);
    assert_eq!(
        next.take_original_destination(world.cookie(), source),
        Some(destination)
    );
    let ip = world.pod_ip(true);
    world.outside(move || TcpStream::connect((ip, 8080))).unwrap();
    accept(&new_agent.inbound);
    assert!(is_idle(&old_agent.outbound) && is_idle(&old_agent.inbound));
}

#[test]
fn what_is_known_of_a_pod_changes_in_place() {
    let world = World::new();
    let agent = world.capture(1);
    let (outside, address) = listen_outside(&world, false);
    world.in_pod(move || TcpStream::connect(address)).unwrap();
    accept(&agent.outbound);
    world.enrol(
        &agent,
        &Exceptions {
            outbound: vec![address.port()],
            ..Exceptions::default()
        },
    );
    world.in_pod(move || TcpStream::connect(address)).unwrap();
    accept(std::slice::from_ref(&outside));
    world.enrol(&agent, &Exceptions::default());
    world.in_pod(move || TcpStream::connect(address)).unwrap();
    accept(&agent.outbound);
    assert_eq!(entries(&world.kernel().gauges(), "STEER"), 2);
}

#[test]
fn dead_pods_are_swept_at_start() {
    let mut world = World::new();
    world::close(world.capture(1));
    world.die();
    world.delete_pod();
    world.attach();
    assert_eq!(world.kernel().enrolled().unwrap(), BTreeSet::new());
    let gauges = world.kernel().gauges();
    for map in ["PODS", "STEER", "LISTENERS", "PEERS"] {
        assert_eq!(entries(&gauges, map), 0, "{map}");
    }
    let pins: Vec<_> = fs::read_dir(&world.config.pin_dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert!(
        pins.iter().all(|pin| !pin.to_string_lossy().starts_with("steer-")),
        "{pins:?}"
    );
}

#[test]
fn removal_leaves_nothing_behind() {
    let mut world = World::new();
    let _agent = world.capture(1);
    world.die();
    Kernel::remove(&world.config.pin_dir).unwrap();
    assert!(!world.config.pin_dir.exists());
    let (out, inward) = both_ways(&world);
    out.unwrap();
    inward.unwrap();
    Kernel::remove(&world.config.pin_dir).unwrap();
    Kernel::remove(Path::new("/sys/fs/bpf/nmt-never-was")).unwrap();
}

#[test]
fn a_bpffs_is_mounted_where_there_is_none() {
    let place = tempfile::tempdir().unwrap();
    let instance = place.path().join("bpf");
    let mounted = world::Mounted::at(&instance);
    let mut world = World::with(|config| config.pin_dir = instance.join("node-abi1"));
    let agent = world.capture(1);
    world.in_pod(|| TcpStream::connect("203.0.113.7:80")).unwrap();
    accept(&agent.outbound);
    // The root of a bpffs will do as well.
    let before = std::mem::replace(&mut world.config.pin_dir, instance.clone());
    world.attach();
    world.die();
    Kernel::remove(&before).unwrap();
    Kernel::remove(&instance).unwrap();
    let left: Vec<_> = fs::read_dir(&instance)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert!(
        left.iter().all(|name| name.to_string_lossy().ends_with(".debug")),
        "{left:?}"
    );
    drop((world, mounted));
}

#[test]
fn a_pod_without_ipv6_is_captured_for_ipv4_and_told_the_truth_about_ipv6() {
    let world = World::new();
    let mut agent = world.capture(1);
    agent
        .outbound
        .retain(|listener| listener.local_addr().unwrap().is_ipv4());
    world.enrol(&agent, &Exceptions::default());
    world.in_pod(|| TcpStream::connect("203.0.113.7:80")).unwrap();
    accept(&agent.outbound);
    let error = world.in_pod(|| TcpStream::connect("[2001:db8::7]:80")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENETUNREACH));
}
