//! The two kernel decisions: a table of every situation, and what holds for all inputs.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use mesh_abi::{
    Addr, Config, Endpoint, FAIL_PASS, FAIL_REFUSE, PORTS_MAX, PodEntry, PortSet, Reason, SteerEntry,
    announce::{ANNOUNCED_DIRECT, ANNOUNCED_PROBE, Announcement},
    capture::{self, Flow},
    steer::{self, Arrival},
};
use proptest::prelude::*;

const AGENT4: Endpoint = Endpoint::new(Addr::LOOPBACK4, 15001);
const AGENT6: Endpoint = Endpoint::new(Addr::LOOPBACK6, 15001);

fn addr(text: &str) -> Addr {
    text.parse::<IpAddr>().unwrap().into()
}

fn addresses<const N: usize>(texts: &[&str]) -> [Addr; N] {
    let mut addresses = [Addr::NONE; N];
    for (place, text) in addresses.iter_mut().zip(texts) {
        *place = addr(text);
    }
    addresses
}

fn pod() -> PodEntry {
    PodEntry {
        agent4: AGENT4,
        agent6: AGENT6,
        addresses: addresses(&["10.1.0.5", "fd00::5"]),
        exclude_outbound: PortSet::new(&[3306, 5432]).unwrap(),
    }
}

fn flow(ip: &str, port: u16) -> Flow {
    Flow {
        destination: Endpoint::new(addr(ip), port),
        is_tcp: true,
        is_agent_socket: false,
    }
}

#[test]
fn capture_decides_each_situation() {
    use capture::Verdict::{Agent, Pass, Refuse, Untouched};
    let udp = Flow {
        is_tcp: false,
        ..flow("10.96.0.10", 53)
    };
    let own = Flow {
        is_agent_socket: true,
        ..flow("10.96.0.10", 80)
    };
    let without6 = PodEntry {
        agent6: Endpoint::NONE,
        ..pod()
    };
    let cases = [
        ("not enrolled", None, flow("10.96.0.10", 80), Untouched),
        ("UDP", Some(pod()), udp, Untouched),
        ("the agent's own", Some(pod()), own, Pass(Reason::OutboundAgentSocket)),
        (
            "loopback",
            Some(pod()),
            flow("127.0.0.1", 80),
            Pass(Reason::OutboundLoopback),
        ),
        (
            "loopback, mapped",
            Some(pod()),
            flow("::ffff:127.3.4.5", 80),
            Pass(Reason::OutboundLoopback),
        ),
        (
            "loopback 6",
            Some(pod()),
            flow("::1", 80),
            Pass(Reason::OutboundLoopback),
        ),
        (
            "unspecified",
            Some(pod()),
            flow("0.0.0.0", 80),
            Pass(Reason::OutboundLoopback),
        ),
        ("itself", Some(pod()), flow("10.1.0.5", 80), Pass(Reason::OutboundSelf)),
        ("itself 6", Some(pod()), flow("fd00::5", 80), Pass(Reason::OutboundSelf)),
        (
            "link-local 6",
            Some(pod()),
            flow("fe80::1", 80),
            Pass(Reason::OutboundLinkLocal),
        ),
        (
            "link-local 4 is routable here",
            Some(pod()),
            flow("169.254.169.254", 80),
            Agent(AGENT4),
        ),
        (
            "excluded",
            Some(pod()),
            flow("10.96.0.10", 5432),
            Pass(Reason::OutboundExcludedPort),
        ),
        ("captured", Some(pod()), flow("10.96.0.10", 80), Agent(AGENT4)),
        (
            "captured, mapped",
            Some(pod()),
            flow("::ffff:10.96.0.10", 80),
            Agent(AGENT4),
        ),
        ("captured 6", Some(pod()), flow("fd00::6", 80), Agent(AGENT6)),
        (
            "no listener 6",
            Some(without6),
            flow("fd00::6", 80),
            Refuse(Reason::OutboundNoListener),
        ),
        (
            "no listener 6, but 4",
            Some(without6),
            flow("10.96.0.10", 80),
            Agent(AGENT4),
        ),
    ];
    for (situation, pod, flow, expected) in cases {
        assert_eq!(capture::decide(pod.as_ref(), &flow), expected, "{situation}");
    }
}

fn config(fail_mode: u32) -> Config {
    Config {
        abi_version: mesh_abi::ABI_VERSION,
        fail_mode,
        node: addresses(&["192.0.2.1", "2001:db8::1"]),
        ..Config::default()
    }
}

fn entry() -> SteerEntry {
    SteerEntry {
        netns: 7,
        probes: PortSet::new(&[8080]).unwrap(),
        exclude_inbound: PortSet::new(&[9090]).unwrap(),
    }
}

fn arrival(local: &str, local_port: u16, remote: &str) -> Arrival {
    Arrival {
        local: addr(local),
        local_port,
        remote: addr(remote),
        is_tcp: true,
    }
}

fn announcement(why: u32) -> Option<Announcement> {
    (why != 0).then_some(Announcement { why, number: 0 })
}

#[test]
fn steer_decides_each_situation() {
    use steer::Verdict::{Agent, Pass, Refuse, Untouched};
    let udp = Arrival {
        is_tcp: false,
        ..arrival("10.1.0.5", 53, "10.1.0.9")
    };
    let known = Some(entry());
    let (probe, direct) = (announcement(ANNOUNCED_PROBE), announcement(ANNOUNCED_DIRECT));
    let announced = [
        (
            "the node's probe",
            known,
            arrival("10.1.0.5", 8080, "192.0.2.1"),
            probe,
            Pass(Reason::InboundProbe),
        ),
        (
            "the node's probe 6",
            known,
            arrival("fd00::5", 8080, "2001:db8::1"),
            probe,
            Pass(Reason::InboundProbe),
        ),
        (
            "the node itself, no probe port",
            known,
            arrival("10.1.0.5", 80, "192.0.2.1"),
            probe,
            Agent,
        ),
        (
            "announced as a probe, not the node's address",
            known,
            arrival("10.1.0.5", 8080, "10.1.0.9"),
            probe,
            Agent,
        ),
        (
            "direct",
            known,
            arrival("10.1.0.5", 80, "10.1.0.9"),
            direct,
            Pass(Reason::InboundDirect),
        ),
        (
            "direct to an address that is nobody's",
            None,
            arrival("10.9.0.5", 80, "10.1.0.9"),
            direct,
            Refuse(Reason::InboundUnknownAddress),
        ),
        (
            "announced for nothing that is known",
            known,
            arrival("10.1.0.5", 8080, "192.0.2.1"),
            announcement(99),
            Agent,
        ),
    ];
    for (situation, entry, arrival, announced, expected) in announced {
        let found = steer::decide(&config(FAIL_REFUSE), entry.as_ref(), &arrival, || announced);
        assert_eq!(found, expected, "{situation}");
    }
    let cases = [
        ("UDP", known, udp, Untouched),
        (
            "loopback",
            None,
            arrival("127.0.0.1", 80, "127.0.0.1"),
            Pass(Reason::InboundLoopback),
        ),
        (
            "loopback from the pod's own",
            None,
            arrival("127.0.0.1", 80, "10.1.0.5"),
            Pass(Reason::InboundLoopback),
        ),
        (
            "itself",
            known,
            arrival("10.1.0.5", 80, "10.1.0.5"),
            Pass(Reason::InboundSelf),
        ),
        (
            "the agent's delivery",
            known,
            arrival("10.1.0.5", 80, "127.64.0.1"),
            Pass(Reason::InboundSelf),
        ),
        (
            "itself, unknown address",
            None,
            arrival("10.9.0.5", 80, "10.9.0.5"),
            Pass(Reason::InboundSelf),
        ),
        (
            "unknown address",
            None,
            arrival("10.9.0.5", 80, "10.1.0.9"),
            Refuse(Reason::InboundUnknownAddress),
        ),
        (
            "excluded",
            known,
            arrival("10.1.0.5", 9090, "10.1.0.9"),
            Pass(Reason::InboundExcludedPort),
        ),
        (
            "the node's address on a probe port, not announced",
            known,
            arrival("10.1.0.5", 8080, "192.0.2.1"),
            Agent,
        ),
        (
            "probe port, not the node",
            known,
            arrival("10.1.0.5", 8080, "10.1.0.9"),
            Agent,
        ),
        (
            "the node, no probe port",
            known,
            arrival("10.1.0.5", 80, "192.0.2.1"),
            Agent,
        ),
        ("steered", known, arrival("10.1.0.5", 80, "10.1.0.9"), Agent),
    ];
    for (situation, entry, arrival, expected) in cases {
        assert_eq!(
            steer::decide(&config(FAIL_REFUSE), entry.as_ref(), &arrival, || None),
            expected,
            "{situation}"
        );
    }
    assert_eq!(
        steer::agent_absent(&config(FAIL_REFUSE)),
        Refuse(Reason::InboundAgentAbsent)
    );
    assert_eq!(
        steer::agent_absent(&config(FAIL_PASS)),
        Pass(Reason::InboundAgentAbsentPass)
    );
}

#[test]
fn every_refusal_has_an_errno_of_its_own_kind() {
    assert_eq!(capture::errno(Reason::OutboundNoListener), 101);
    assert_eq!(capture::errno(Reason::OutboundNoMemory), 105);
    assert_eq!(capture::errno(Reason::OutboundProtocol), 93);
    assert!(Reason::ALL.into_iter().all(|reason| capture::errno(reason) > 0));
}

/// Addresses dense enough for collisions between pod, node and flow.
fn ips() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        (0u8..4, any::<u8>()).prop_map(|(c, d)| IpAddr::from(Ipv4Addr::new(10, 0, c, d % 4))),
        any::<u32>().prop_map(|bits| IpAddr::from(Ipv4Addr::from(bits))),
        (0u16..4).prop_map(|h| IpAddr::from(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, h))),
        any::<u128>().prop_map(|bits| IpAddr::from(Ipv6Addr::from(bits))),
        Just(IpAddr::from(Ipv4Addr::LOCALHOST)),
        Just(IpAddr::from(Ipv6Addr::LOCALHOST)),
    ]
}

fn ports() -> impl Strategy<Value = Vec<u16>> {
    prop::collection::vec(prop_oneof![1u16..16, any::<u16>()], 0..PORTS_MAX)
}

/// What a human would say of loopback, by the standard library.
fn is_loopback(ip: IpAddr) -> bool {
    let ip = ip.to_canonical();
    ip.is_loopback() || ip.is_unspecified() || matches!(ip, IpAddr::V4(ip) if ip.octets() == [0, 0, 0, 0])
}

proptest! {
    #[test]
    fn an_address_survives_the_contract(ip in ips()) {
        prop_assert_eq!(IpAddr::from(Addr::from(ip)), ip.to_canonical());
        prop_assert_eq!(Addr::from(ip).is_v4(), ip.to_canonical().is_ipv4());
        prop_assert_eq!(Addr::from(ip).is_loopback(), is_loopback(ip));
    }

    #[test]
    fn a_port_set_holds_exactly_its_ports(ports in ports(), port in prop_oneof![0u16..16, any::<u16>()]) {
        let set = PortSet::new(&ports).unwrap();
        prop_assert_eq!(set.contains(port), port != 0 && ports.contains(&port));
    }

    /// Independent of the order of questions in `decide`: a flow goes past the agent only for one of the named
    /// reasons, and goes to the agent of its own family.
    #[test]
    fn nothing_goes_past_the_agent_without_a_reason(
        destination in ips(),
        port in prop_oneof![1u16..16, any::<u16>()],
        own in prop::collection::vec(ips(), 1..4),
        excluded in ports(),
        has_v6 in any::<bool>(),
        is_tcp in any::<bool>(),
        is_agent_socket in any::<bool>(),
    ) {
        let mut addresses = [Addr::NONE; 4];
        for (place, ip) in addresses.iter_mut().zip(&own) {
            *place = (*ip).into();
        }
        let pod = PodEntry {
            agent4: AGENT4,
            agent6: if has_v6 { AGENT6 } else { Endpoint::NONE },
            addresses,
            exclude_outbound: PortSet::new(&excluded).unwrap(),
        };
        let flow = Flow { destination: Endpoint::new(destination.into(), port), is_tcp, is_agent_socket };
        let canonical = destination.to_canonical();
        let link_local = matches!(canonical, IpAddr::V6(ip) if ip.is_unicast_link_local());
        let is_exempt = is_agent_socket
            || is_loopback(destination)
            || own.iter().any(|ip| ip.to_canonical() == canonical)
            || link_local
            || (port != 0 && excluded.contains(&port));
        let verdict = capture::decide(Some(&pod), &flow);
        match verdict {
            capture::Verdict::Untouched => prop_assert!(!is_tcp),
            capture::Verdict::Pass(_) => prop_assert!(is_tcp && is_exempt),
            capture::Verdict::Agent(agent) => {
                prop_assert!(is_tcp && !is_exempt);
                prop_assert_eq!(agent, if canonical.is_ipv4() { AGENT4 } else { AGENT6 });
            }
            capture::Verdict::Refuse(reason) => {
                prop_assert!(is_tcp && !is_exempt && canonical.is_ipv6() && !has_v6);
                prop_assert_eq!(reason, Reason::OutboundNoListener);
            }
        }
        prop_assert_eq!(capture::decide(None, &flow), capture::Verdict::Untouched);
    }

    #[test]
    fn nothing_is_let_in_past_the_agent_without_a_reason(
        local in ips(),
        remote in ips(),
        port in prop_oneof![1u16..16, any::<u16>()],
        node in prop::collection::vec(ips(), 0..4),
        probes in ports(),
        excluded in ports(),
        is_known in any::<bool>(),
        why in 0u32..4,
    ) {
        let mut config = config(FAIL_REFUSE);
        config.node = [Addr::NONE; mesh_abi::NODE_ADDRESSES_MAX];
        for (place, ip) in config.node.iter_mut().zip(&node) {
            *place = (*ip).into();
        }
        let entry = SteerEntry {
            netns: 1,
            probes: PortSet::new(&probes).unwrap(),
            exclude_inbound: PortSet::new(&excluded).unwrap(),
        };
        let arrival = Arrival { local: local.into(), local_port: port, remote: remote.into(), is_tcp: true };
        let is_inner = is_loopback(local) || is_loopback(remote) || local.to_canonical() == remote.to_canonical();
        let is_excluded = port != 0 && excluded.contains(&port);
        let from_node = !remote.is_unspecified() && node.iter().any(|ip| ip.to_canonical() == remote.to_canonical());
        let is_probe = port != 0 && probes.contains(&port) && from_node && why == ANNOUNCED_PROBE;
        let is_announced = is_probe || why == ANNOUNCED_DIRECT;
        match steer::decide(&config, is_known.then_some(&entry), &arrival, || announcement(why)) {
            steer::Verdict::Untouched => prop_assert!(false, "TCP is always judged"),
            steer::Verdict::Pass(_) => prop_assert!(is_inner || (is_known && (is_excluded || is_announced))),
            steer::Verdict::Agent => prop_assert!(is_known && !is_inner && !is_excluded && !is_announced),
            steer::Verdict::Refuse(reason) => {
                prop_assert!(!is_known && !is_inner);
                prop_assert_eq!(reason, Reason::InboundUnknownAddress);
            }
        }
    }
}
