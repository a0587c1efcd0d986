//! The inbound decision: what becomes of a SYN that arrives in a pod's network namespace.
//!
//! Pure: the `sk_lookup` program runs this very function, and so do the tests on the host. The program is linked to
//! enrolled namespaces only; an address in one that the mesh does not know as the pod's would be a way around it, so
//! it is refused.

use crate::{
    addr::Addr,
    announce::{ANNOUNCED_DIRECT, ANNOUNCED_PROBE, Announcement},
    pod::{Config, FAIL_PASS, SteerEntry},
    reason::Reason,
};

/// A connection about to be accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// The address it came to.
    pub local: Addr,
    /// The port it came to, in host byte order.
    pub local_port: u16,
    /// The address it came from.
    pub remote: Addr,
    /// Whether the protocol is TCP.
    pub is_tcp: bool,
}

/// What becomes of the connection.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Not ours: nothing is counted.
    Untouched,
    /// Goes to whoever listens on that port.
    Pass(Reason),
    /// Goes to the agent's listener.
    Agent,
    /// Is reset.
    Refuse(Reason),
}

/// Decides on an arrival; `entry` is that of the local address, and `announced` gives the flow's announcement, asked
/// only as far as needed. That the source has the node's address, or a pod's, is no proof of anything: whoever
/// masquerades has it too. What passes was announced by the socket that opened it.
#[inline(always)]
pub fn decide(
    config: &Config,
    entry: Option<&SteerEntry>,
    arrival: &Arrival,
    announced: impl FnOnce() -> Option<Announcement>,
) -> Verdict {
    if !arrival.is_tcp {
        return Verdict::Untouched;
    }
    if arrival.local.is_loopback() {
        return Verdict::Pass(Reason::InboundLoopback);
    }
    // Only the pod itself and the agent's deliveries come from loopback: from outside it is a martian source
    // (RFC 1812 §5.3.7), and an answer to it would not leave the pod.
    if arrival.local.same(&arrival.remote) || arrival.remote.is_loopback() {
        return Verdict::Pass(Reason::InboundSelf);
    }
    let Some(entry) = entry else {
        return Verdict::Refuse(Reason::InboundUnknownAddress);
    };
    if entry.exclude_inbound.contains(arrival.local_port) {
        return Verdict::Pass(Reason::InboundExcludedPort);
    }
    match announced() {
        Some(Announcement {
            why: ANNOUNCED_DIRECT, ..
        }) => Verdict::Pass(Reason::InboundDirect),
        Some(Announcement {
            why: ANNOUNCED_PROBE, ..
        }) if entry.probes.contains(arrival.local_port) && config.is_node(&arrival.remote) => {
            Verdict::Pass(Reason::InboundProbe)
        }
        _ => Verdict::Agent,
    }
}

/// The verdict when the agent's listener is gone.
#[inline(always)]
pub const fn agent_absent(config: &Config) -> Verdict {
    if config.fail_mode == FAIL_PASS {
        Verdict::Pass(Reason::InboundAgentAbsentPass)
    } else {
        Verdict::Refuse(Reason::InboundAgentAbsent)
    }
}
