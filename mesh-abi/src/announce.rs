//! Announced flows: what a socket of this node is about to open, told to the namespace where it will arrive.
//!
//! An address proves little: a node's address is shared by its daemons, its `hostNetwork` pods and by what kube-proxy
//! masquerades. So the side that opens a flow writes its two ends into a map before the SYN is sent, and takes them
//! out when the socket closes; the side where it arrives lets pass what is announced, and nothing else. Pure: the
//! hooks ask the functions here, and so do the tests on the host.

use crate::{
    addr::{Addr, Endpoint},
    flow::{ROLE_DIRECT, ROLE_NODE, SocketView},
    pod::Config,
};

/// [`Announcement::why`]: a process of the node itself, outside all pods, calls a pod of this node.
pub const ANNOUNCED_PROBE: u32 = 1;
/// [`Announcement::why`]: the kernel decided that the flow needs no agent.
pub const ANNOUNCED_DIRECT: u32 = 2;

/// The two ends of a TCP flow, as both its sides see them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Tuple {
    /// The connecting socket's address and port.
    pub source: Endpoint,
    /// The address and port that it connects to.
    pub destination: Endpoint,
}

/// Why a flow is announced.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Announcement {
    /// [`ANNOUNCED_PROBE`] or [`ANNOUNCED_DIRECT`].
    pub why: u32,
    /// [`SocketView::number`] of the socket.
    pub number: u32,
}

/// What a socket with this view announces as it connects.
#[inline(always)]
pub const fn of(view: &SocketView) -> Option<Announcement> {
    let why = match view.role {
        ROLE_NODE => ANNOUNCED_PROBE,
        ROLE_DIRECT => ANNOUNCED_DIRECT,
        _ => return None,
    };
    Some(Announcement {
        why,
        number: view.number,
    })
}

/// Whether a connection is the node's own to one of its pods. `netns` is the caller's namespace. `is_pod`: the
/// destination is an enrolled pod of this node; `is_guarded`: the process is below a cgroup that holds pods. Both are
/// asked only as far as needed. Without a home on record nothing is the node's own.
#[inline(always)]
pub fn is_node(
    config: &Config,
    netns: u64,
    destination: &Addr,
    is_pod: impl FnOnce(&Addr) -> bool,
    is_guarded: impl FnOnce() -> bool,
) -> bool {
    config.home != 0 && config.home == netns && is_pod(destination) && !is_guarded()
}

impl Tuple {
    /// The flow between these two ends.
    #[inline(always)]
    pub const fn new(source: Endpoint, destination: Endpoint) -> Tuple {
        Tuple { source, destination }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::{ROLE_ACCEPTED, ROLE_CAPTURED};

    #[test]
    fn only_the_nodes_own_and_direct_sockets_announce() {
        for (role, expected) in [
            (0, None),
            (ROLE_CAPTURED, None),
            (ROLE_ACCEPTED, None),
            (ROLE_NODE, Some(ANNOUNCED_PROBE)),
            (ROLE_DIRECT, Some(ANNOUNCED_DIRECT)),
            (99, None),
        ] {
            let view = SocketView {
                role,
                number: 7,
                ..SocketView::default()
            };
            let expected = expected.map(|why| Announcement { why, number: 7 });
            assert_eq!(of(&view), expected, "role {role}");
        }
    }

    #[test]
    fn the_node_is_who_calls_its_own_pod_from_home_and_is_no_pod() {
        // home, the caller's namespace, the destination is a pod of this node, a pod's process
        for (home, netns, is_pod, is_guarded, expected) in [
            (5, 5, true, false, true),
            (5, 5, true, true, false),
            (5, 5, false, false, false),
            (5, 6, true, false, false),
            (0, 0, true, false, false),
        ] {
            let config = Config {
                home,
                ..Config::default()
            };
            let found = is_node(&config, netns, &Addr::LOOPBACK4, |_| is_pod, || is_guarded);
            assert_eq!(found, expected, "{home} {netns} {is_pod} {is_guarded}");
        }
    }
}
