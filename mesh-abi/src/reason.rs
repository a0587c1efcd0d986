//! Why a kernel program did what it did: codes that are counted, never renumbered.

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $code:literal, $text:literal, $verdict:ident;)+) => {
        /// Why a connection was captured, steered, passed or refused in the kernel. The codes are stable.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Reason {
            $($(#[doc = $doc])+ $name = $code,)+
        }

        /// How many codes there are: the size of the `REASONS` map.
        pub const REASONS: u32 = [$($code as u32),+].len() as u32;

        impl Reason {
            /// Every reason, by code.
            pub const ALL: [Reason; REASONS as usize] = [$(Reason::$name),+];

            /// The stable name: a metric label.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Reason::$name => $text,)+
                }
            }

            /// What became of the connection: `agent`, `pass`, `refuse` or `note` (bookkeeping only).
            pub const fn verdict(self) -> &'static str {
                match self {
                    $(Reason::$name => stringify!($verdict),)+
                }
            }
        }
    };
}

reasons! {
    /// Outbound: handed to the agent.
    Captured = 0, "captured", agent;
    /// Outbound: the destination is loopback.
    OutboundLoopback = 1, "outbound-loopback", pass;
    /// Outbound: the destination is one of the pod's own addresses.
    OutboundSelf = 2, "outbound-self", pass;
    /// Outbound: the destination port is excluded.
    OutboundExcludedPort = 3, "outbound-excluded-port", pass;
    /// Outbound: the socket is the agent's own.
    OutboundAgentSocket = 4, "outbound-agent-socket", pass;
    /// Outbound: the destination is link-local IPv6, whose scope the agent could not keep.
    OutboundLinkLocal = 5, "outbound-link-local", pass;
    /// Outbound: no agent listens and the fail mode is pass.
    OutboundAgentAbsentPass = 6, "outbound-agent-absent-pass", pass;
    /// Outbound: the agent has no listener that this socket can reach, of its family or from its device (`ENETUNREACH`).
    OutboundNoListener = 7, "outbound-no-listener", refuse;
    /// Outbound: the original destination could not be kept (`ENOBUFS`).
    OutboundNoMemory = 8, "outbound-no-memory", refuse;
    /// Outbound: a protocol that would go around the mesh, such as MPTCP (`EPROTONOSUPPORT`).
    OutboundProtocol = 9, "outbound-protocol", refuse;
    /// Bookkeeping: the original destination could not be written for the agent, which will refuse the connection.
    FlowNotWritten = 10, "flow-not-written", refuse;
    /// Inbound: handed to the agent.
    Steered = 11, "steered", agent;
    /// Inbound: the local address is loopback.
    InboundLoopback = 12, "inbound-loopback", pass;
    /// Inbound: the pod talks to itself, or the agent delivers.
    InboundSelf = 13, "inbound-self", pass;
    /// Inbound: the local port is excluded.
    InboundExcludedPort = 14, "inbound-excluded-port", pass;
    /// Inbound: the node itself, by an announced flow, probes a probe port.
    InboundProbe = 15, "inbound-probe", pass;
    /// Inbound: no agent listens and the fail mode is pass.
    InboundAgentAbsentPass = 16, "inbound-agent-absent-pass", pass;
    /// Inbound: no agent listens.
    InboundAgentAbsent = 17, "inbound-agent-absent", refuse;
    /// Inbound: an address of the namespace that the mesh does not know as the pod's.
    InboundUnknownAddress = 18, "inbound-unknown-address", refuse;
    /// Bookkeeping: the source could not be kept for `getpeername`, which will show the pod's address.
    PeerNotWritten = 19, "peer-not-written", note;
    /// Outbound: a pod that the agent has not looked at yet, or cannot tell whose it is.
    OutboundUnclassified = 20, "outbound-unclassified", refuse;
    /// Inbound: the flow was announced as one that needs no agent.
    InboundDirect = 21, "inbound-direct", pass;
    /// Bookkeeping: a flow could not be announced; where it arrives it is judged like any other.
    AnnouncementNotWritten = 22, "announcement-not-written", note;
    /// Outbound: goes to an endpoint of this node without the agent.
    OutboundDirect = 23, "outbound-direct", pass;
    /// Outbound: could do without the agent and could not be kept on record, so it goes to the agent.
    DirectNotKept = 24, "direct-not-kept", note;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_dense_and_names_differ() {
        let mut names = std::collections::BTreeSet::new();
        for (index, reason) in Reason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, index);
            assert!(names.insert(reason.name()));
        }
    }
}
