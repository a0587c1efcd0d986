//! Keys and values that live as long as a connection.

use crate::addr::{Addr, Endpoint};

/// [`SocketView::role`]: the socket connected and was captured; `peer` is the destination that it asked for.
pub const ROLE_CAPTURED: u32 = 1;
/// [`SocketView::role`]: the socket was accepted from the agent; `peer` is the source that it serves.
pub const ROLE_ACCEPTED: u32 = 2;
/// [`SocketView::role`]: the socket is the node's own and connects to a pod of it; `peer` is the destination.
pub const ROLE_NODE: u32 = 3;
/// [`SocketView::role`]: the socket connected without the agent by the kernel's verdict; `peer` is the destination that
/// it asked for, of the family that it connects by.
pub const ROLE_DIRECT: u32 = 4;

/// One end of a connection inside a network namespace. A cookie is never used again, so a key cannot go stale by
/// the death of a pod.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// The network namespace's cookie.
    pub netns: u64,
    /// The connecting socket's local address and port.
    pub source: Endpoint,
    /// Of a connection captured in the node's own namespace: the port of the agent's listener that it was sent to. The
    /// pods that share that namespace have listeners of their own, and none may pass for another. Else 0.
    pub agent_port: u32,
}

/// What the hooks know of a socket: kept in the socket itself, freed with it, never evicted.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketView {
    /// What `getpeername` shows.
    pub peer: Endpoint,
    /// What `getsockname` shows instead of a loopback address; [`Addr::NONE`] to leave it.
    pub local: Addr,
    /// [`ROLE_CAPTURED`], [`ROLE_ACCEPTED`], [`ROLE_NODE`] or [`ROLE_DIRECT`].
    pub role: u32,
    /// What the flow's announcement carries; 0 where there is none.
    pub number: u32,
}

impl FlowKey {
    /// The key of the socket with that local address in that network namespace.
    #[inline(always)]
    pub const fn new(netns: u64, source: Endpoint) -> FlowKey {
        FlowKey {
            netns,
            source,
            agent_port: 0,
        }
    }

    /// The key of a connection captured in the node's own namespace that was sent to the agent's listener at that port.
    #[inline(always)]
    pub const fn captured(netns: u64, source: Endpoint, agent_port: u16) -> FlowKey {
        FlowKey {
            netns,
            source,
            agent_port: agent_port as u32,
        }
    }
}
