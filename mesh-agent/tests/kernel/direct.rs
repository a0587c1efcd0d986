//! Direct flows: what an entry lets go reaches the application, is known by its socket and leaves one end to be told;
//! whatever is in doubt goes to the agent.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd,
    time::{Duration, Instant},
};

use mesh_abi::{
    PortSet, Reason,
    direct::{self, DirectEndpoint, DirectFlow, DirectKey, DirectState, tcp as state},
};
use mesh_agent::{
    kernel::{
        PodCapture,
        direct::{direct_entry, monotonic_ns},
    },
    pods::{Netns, SocketName, sever_sockets},
};
use socket2::Domain;

use crate::{
    Way, connect, entries, listen, shown, tcp,
    world::{self, Agent, Exceptions, PATIENCE, World, accept, chain, is_idle, is_refused},
};

const PORT: u16 = 7000;
const GENERATION: u64 = 11;
const DECISION: u64 = 4711;
const REVISION: u64 = 30;

/// A world whose outside is a captured pod too.
struct Node {
    world: World,
    agent: Agent,
    other: Agent,
    other_netns: Netns,
}

impl Node {
    fn new() -> Node {
        Node::with(&Exceptions::default())
    }

    fn with(exceptions: &Exceptions) -> Node {
        let world = World::new();
        let agent = world.capture_except(1, exceptions);
        let other_netns = Netns::open(&world.outside_path()).unwrap();
        let listeners =
            || ["127.0.0.1:0", "[::1]:0"].map(|address| world.outside(move || TcpListener::bind(address).unwrap()));
        let other = Agent {
            outbound: listeners().into(),
            inbound: listeners().into(),
        };
        let [in4, in6] = [0, 1].map(|index| Some(other.inbound[index].as_fd()));
        let [out4, out6] = [0, 1].map(|index| other.outbound[index].local_addr().ok());
        let capture = PodCapture {
            cookie: other_netns.cookie(),
            netns: other_netns.as_fd(),
            addresses: &[world.outside_ip(false), world.outside_ip(true)],
            outbound_v4: out4,
            outbound_v6: out6,
            inbound_v4: in4,
            inbound_v6: in6,
            exclude_outbound: PortSet::default(),
            exclude_inbound: PortSet::default(),
            probes: PortSet::default(),
        };
        world
            .kernel()
            .enrol(&capture)
            .unwrap_or_else(|error| panic!("{}", chain(&error)));
        world.kernel().set_direct_state(&valid()).unwrap();
        Node {
            world,
            agent,
            other,
            other_netns,
        }
    }

    fn endpoint(&self, ipv6: bool) -> SocketAddr {
        SocketAddr::new(self.world.outside_ip(ipv6), PORT)
    }

    fn permit(&self, asked: SocketAddr, endpoint: SocketAddr, generation: u64, netns: u64) {
        let key = DirectKey::new(self.world.cookie().0, asked.into());
        let endpoint = DirectEndpoint::new(netns, endpoint.into());
        let entry = direct_entry(generation, DECISION, &[endpoint]);
        self.world.kernel().set_direct(&key, &entry).unwrap();
    }

    fn permit_all(&self) {
        for (asked, ipv6) in [(asked(false), false), (asked(true), true)] {
            self.permit(asked, self.endpoint(ipv6), GENERATION, self.other_netns.cookie().0);
        }
    }

    fn applications(&self) -> [TcpListener; 2] {
        [false, true].map(|ipv6| {
            let ip = self.world.outside_ip(ipv6);
            self.world.outside(move || listen(ip, PORT))
        })
    }

    fn connect(&self, way: Way, to: SocketAddr) -> io::Result<TcpStream> {
        let ip = self.world.pod_ip(to.is_ipv6());
        Ok(self.world.in_pod(move || connect(way, ip, to))?.into())
    }

    fn open_flows(&self) -> u64 {
        entries(&self.world.kernel().gauges(), "DIRECT_FLOWS")
    }

    /// The next end that is told.
    fn ended(&self) -> DirectFlow {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(flow) = self.world.kernel().take_ended_flow().unwrap() {
                return flow;
            }
            assert!(Instant::now() < deadline, "no end is told");
            std::thread::yield_now();
        }
    }

    fn is_left_alone(&self) -> bool {
        [
            &self.agent.outbound,
            &self.agent.inbound,
            &self.other.outbound,
            &self.other.inbound,
        ]
        .into_iter()
        .all(|listeners| is_idle(listeners))
    }
}

/// What holds while the owner of the entries lives: through the whole test, however slow the machine.
fn valid() -> DirectState {
    DirectState {
        generation: GENERATION,
        owner: 1,
        beat: u64::MAX,
        revision: REVISION,
    }
}

/// What applications ask for.
fn asked(ipv6: bool) -> SocketAddr {
    if ipv6 { "[2001:db8::7]:80" } else { "203.0.113.7:80" }
        .parse()
        .unwrap()
}

#[test]
fn what_an_entry_lets_go_reaches_the_application_and_its_end_is_told_once() {
    let node = Node::new();
    node.permit_all();
    let applications = node.applications();
    for (way, ipv6) in [
        (Way::V4, false),
        (Way::V6, true),
        (Way::V4Mapped, false),
        (Way::NonBlocking, false),
        (Way::NonBlocking, true),
        (Way::Bound, false),
        (Way::Bound, true),
    ] {
        // Who ends the connection, and what the source's socket was when it was gone.
        for source_ends in [true, false] {
            let listener = std::slice::from_ref(&applications[usize::from(ipv6)]);
            let mut source = node.connect(way, asked(ipv6)).unwrap();
            let (mut destination, from) = accept(listener);
            let socket = socket2::SockRef::from(&source);
            assert_eq!(
                shown(socket.peer_addr()),
                asked(ipv6),
                "{way:?}: getpeername shows what was asked for"
            );
            let local = shown(socket.local_addr());
            assert_eq!(local.ip(), node.world.pod_ip(ipv6), "{way:?}");
            assert_eq!(from, local, "{way:?}: the destination sees the source itself");
            assert_eq!(destination.peer_addr().unwrap(), local, "{way:?}");
            assert_eq!(node.open_flows(), 1);
            let mut text = [0; 5];
            source.write_all(b"ping").unwrap();
            destination.read_exact(&mut text[..4]).unwrap();
            destination.write_all(b"pong!").unwrap();
            source.read_exact(&mut text).unwrap();
            assert_eq!(&text, b"pong!");
            let (first, mut second) = if source_ends {
                (source, destination)
            } else {
                (destination, source)
            };
            drop(first);
            assert_eq!(second.read(&mut text).unwrap(), 0, "{way:?}: a clean end");
            drop(second);
            let flow = node.ended();
            assert_eq!(direct::payload(&flow), (4, 5), "{way:?}: {flow:?}");
            assert!(direct::is_orderly(flow.ended_in), "{way:?}: {flow:?}");
            assert_eq!((flow.netns, flow.decision), (node.world.cookie().0, DECISION));
            assert_eq!(SocketAddr::from(flow.source), local);
            assert_eq!(SocketAddr::from(flow.asked), asked(ipv6));
            assert_eq!(SocketAddr::from(flow.endpoint), node.endpoint(ipv6));
            assert!(flow.closed >= flow.opened);
            assert_eq!(node.open_flows(), 0);
            assert_eq!(entries(&node.world.kernel().gauges(), "ANNOUNCED"), 0, "{way:?}");
        }
    }
    assert!(node.is_left_alone());
    assert_eq!(
        node.world.kernel().take_ended_flow().unwrap(),
        None,
        "each end is told once"
    );
    assert_eq!(node.world.count(Reason::Captured), 0);
    assert_eq!(node.world.count(Reason::Steered), 0);
}

#[test]
fn what_is_in_doubt_goes_to_the_agent() {
    let node = Node::new();
    let applications = node.applications();
    let other = node.other_netns.cookie().0;
    let none = DirectState {
        generation: direct::GENERATION_NONE,
        ..valid()
    };
    let next = DirectState {
        generation: GENERATION + 1,
        ..valid()
    };
    let silent = DirectState {
        beat: monotonic_ns().saturating_sub(direct::OWNER_SILENCE_NS + 1),
        ..valid()
    };
    for (what, state, netns) in [
        ("no generation is valid", none, other),
        ("another generation is valid", next, other),
        ("the owner is silent", silent, other),
        ("the address is another pod's by now", valid(), other + 1000),
    ] {
        for ipv6 in [false, true] {
            node.permit(asked(ipv6), node.endpoint(ipv6), GENERATION, netns);
            node.world.kernel().set_direct_state(&state).unwrap();
            let _source = node.connect(Way::V4, asked(ipv6)).unwrap();
            let (_stream, from) = accept(&node.agent.outbound);
            let original = node.world.kernel().take_original_destination(node.world.cookie(), from);
            assert_eq!(original, Some(asked(ipv6)), "{what}");
        }
    }
    node.world.kernel().set_direct_state(&valid()).unwrap();
    node.permit_all();
    // Another agent holds a newer view than the owner of the entries, until it holds that one too.
    node.world.kernel().outdate_direct(REVISION + 1).unwrap();
    node.world.kernel().outdate_direct(REVISION).unwrap();
    let _source = node.connect(Way::V4, asked(false)).unwrap();
    accept(&node.agent.outbound);
    let newer = DirectState {
        revision: REVISION + 1,
        ..valid()
    };
    node.world.kernel().set_direct_state(&newer).unwrap();
    let _source = node.connect(Way::V4, asked(false)).unwrap();
    accept(&applications[..1]);
    assert_eq!(node.world.count(Reason::OutboundDirect), 1);
    // One that was taken away again.
    let key = DirectKey::new(node.world.cookie().0, asked(true).into());
    node.world.kernel().delete_direct(&key).unwrap();
    let _source = node.connect(Way::V6, asked(true)).unwrap();
    accept(&node.agent.outbound);
    // One whose endpoint is not steered any more, that is, whose pod is retired.
    node.world.kernel().retire(node.other_netns.cookie()).unwrap();
    let _source = node.connect(Way::V4, asked(false)).unwrap();
    accept(&node.agent.outbound);
    assert!(is_idle(&applications));
    assert_eq!(node.open_flows(), 1);
    assert_eq!(node.world.count(Reason::OutboundDirect), 1);
}

#[test]
fn a_socket_that_could_not_be_found_again_is_not_let_go() {
    let node = Node::new();
    node.permit_all();
    let applications = node.applications();
    let _source = node.world.in_pod(move || {
        let socket = tcp(Domain::IPV4);
        socket.bind_device(Some(b"eth0")).unwrap();
        socket.connect(&asked(false).into()).unwrap();
        socket
    });
    accept(&node.agent.outbound);
    assert!(is_idle(&applications));
    assert_eq!(node.open_flows(), 0);
}

#[test]
fn only_the_announced_flow_passes() {
    // What the source's agent does not take arrives like any other connection, an entry for the same endpoint or not.
    let node = Node::with(&Exceptions {
        outbound: vec![PORT],
        ..Exceptions::default()
    });
    node.permit_all();
    let applications = node.applications();
    for ipv6 in [false, true] {
        let _direct = node.connect(Way::V4, asked(ipv6)).unwrap();
        accept(std::slice::from_ref(&applications[usize::from(ipv6)]));
        let _other = node.connect(Way::V4, node.endpoint(ipv6)).unwrap();
        accept(&node.other.inbound);
    }
}

#[test]
fn a_connection_that_nobody_takes_is_refused_and_told() {
    let node = Node::new();
    node.permit_all();
    for ipv6 in [false, true] {
        assert!(is_refused(&node.connect(Way::V4, asked(ipv6))));
        let flow = node.ended();
        assert!(direct::is_unanswered(flow.ended_in), "{flow:?}");
        assert_eq!(direct::payload(&flow), (0, 0));
        assert_eq!(SocketAddr::from(flow.endpoint), node.endpoint(ipv6));
    }
    assert_eq!(node.open_flows(), 0);
    assert!(node.is_left_alone());
}

#[test]
fn a_flow_that_lost_its_permit_is_ended() {
    let node = Node::new();
    node.permit_all();
    let applications = node.applications();
    for (way, ipv6) in [(Way::V4, false), (Way::V6, true), (Way::V4Mapped, false)] {
        let listener = std::slice::from_ref(&applications[usize::from(ipv6)]);
        let mut source = node.connect(way, asked(ipv6)).unwrap();
        let (mut destination, _) = accept(listener);
        let mut spared = node.connect(way, asked(ipv6)).unwrap();
        let (mut spared_too, _) = accept(listener);
        let flows = node.world.kernel().direct_flows().unwrap();
        let local = shown(socket2::SockRef::from(&source).local_addr());
        let flow = flows
            .iter()
            .find(|flow| SocketAddr::from(flow.source) == local)
            .unwrap();
        let name = SocketName {
            source: flow.source.into(),
            destination: flow.endpoint.into(),
            cookie: flow.socket,
        };
        let stranger = SocketName {
            cookie: flow.socket + 1_000_000,
            ..name
        };
        assert_eq!(
            sever_sockets(node.world.netns(), &[stranger]).unwrap(),
            0,
            "another socket at the same port"
        );
        assert_eq!(sever_sockets(node.world.netns(), &[name, name]).unwrap(), 1, "{way:?}");
        let mut byte = [0];
        let error = source.read(&mut byte).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted, "{way:?}");
        let error = destination.read(&mut byte).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{way:?}");
        assert_eq!(node.ended().socket, flow.socket);
        spared.write_all(b"x").unwrap();
        spared_too.read_exact(&mut byte).unwrap();
        world::close((source, destination, spared, spared_too));
        node.ended();
    }
}

#[test]
fn what_no_agent_has_told_waits_for_the_next_one() {
    let mut node = Node::new();
    node.permit_all();
    let applications = node.applications();
    node.world.die();
    let source = node.connect(Way::V4, asked(false)).unwrap();
    let (destination, _) = accept(&applications[..1]);
    node.world.attach();
    assert_eq!(node.open_flows(), 1, "an open flow stays on record");
    socket2::SockRef::from(&source)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
    world::close((source, destination));
    let flow = node.ended();
    assert_eq!(flow.decision, DECISION);
    assert!(
        !direct::is_orderly(flow.ended_in) && flow.ended_in != state::SYN_SENT,
        "{flow:?}"
    );
    let state = node.world.kernel().direct_state().unwrap();
    assert_eq!(
        state.generation, GENERATION,
        "entries stand until their owner is known to be dead"
    );
}
