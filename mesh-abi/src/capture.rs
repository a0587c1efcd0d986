//! The outbound decision: what becomes of a `connect()` in a pod.
//!
//! Pure: `cgroup/connect4` and `connect6` run this very function, and so do the tests on the host. It decides by
//! values only; whether the agent listens, and whether the destination can be kept, is found out by the caller.

use crate::{
    addr::{Addr, Endpoint},
    pod::PodEntry,
    reason::Reason,
};

/// A connection about to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// The destination that the application asked for; v4-mapped addresses are IPv4 by construction.
    pub destination: Endpoint,
    /// Whether the protocol is TCP.
    pub is_tcp: bool,
    /// Whether the socket is the agent's own.
    pub is_agent_socket: bool,
}

/// What becomes of the connection.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Not ours: nothing is counted and nothing is kept.
    Untouched,
    /// Goes on as asked.
    Pass(Reason),
    /// Is rewritten to the agent's listener.
    Agent(Endpoint),
    /// Fails with the reason's errno.
    Refuse(Reason),
}

/// Decides on a connection of the pod whose entry is given; `None` if the network namespace is not enrolled.
#[inline(always)]
pub fn decide(pod: Option<&PodEntry>, flow: &Flow) -> Verdict {
    let Some(pod) = pod else {
        return Verdict::Untouched;
    };
    if !flow.is_tcp {
        return Verdict::Untouched;
    }
    if flow.is_agent_socket {
        return Verdict::Pass(Reason::OutboundAgentSocket);
    }
    let addr: &Addr = &flow.destination.addr;
    if addr.is_loopback() {
        return Verdict::Pass(Reason::OutboundLoopback);
    }
    if pod.is_own(addr) {
        return Verdict::Pass(Reason::OutboundSelf);
    }
    if addr.is_link_local6() {
        return Verdict::Pass(Reason::OutboundLinkLocal);
    }
    if pod.exclude_outbound.contains(flow.destination.port) {
        return Verdict::Pass(Reason::OutboundExcludedPort);
    }
    let agent = if addr.is_v4() { pod.agent4 } else { pod.agent6 };
    if agent.is_none() {
        return Verdict::Refuse(Reason::OutboundNoListener);
    }
    Verdict::Agent(agent)
}

/// The errno of a refusal, as `connect()` returns it.
#[inline(always)]
pub const fn errno(reason: Reason) -> i32 {
    const ENETUNREACH: i32 = 101;
    const ENOBUFS: i32 = 105;
    const EPROTONOSUPPORT: i32 = 93;
    const ECONNREFUSED: i32 = 111;
    match reason {
        Reason::OutboundNoListener => ENETUNREACH,
        Reason::OutboundNoMemory => ENOBUFS,
        Reason::OutboundProtocol => EPROTONOSUPPORT,
        _ => ECONNREFUSED,
    }
}
