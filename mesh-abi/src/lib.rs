//! The contract between the kernel programs and the agent.
//!
//! Both sides compile this crate: the kernel programs for `bpfel-unknown-none`, the agent for the host. It holds
//! the keys and values of the maps, their names and bounds, the reason codes, and the pure decisions
//! ([`capture::decide`], [`steer::decide`], [`announce`], [`direct`], [`guard`]) which the kernel runs and the host tests.
//!
//! Nothing else may enter: no allocation, no I/O, no type whose layout a compiler is free to choose.
#![cfg_attr(not(test), no_std)]

mod addr;
pub mod announce;
pub mod capture;
pub mod direct;
mod flow;
pub mod guard;
mod layout;
mod pod;
mod reason;
pub mod steer;

pub use addr::{Addr, Endpoint};
pub use flow::{FlowKey, ROLE_ACCEPTED, ROLE_CAPTURED, ROLE_DIRECT, ROLE_NODE, SocketView};
pub use pod::{
    Config, FAIL_PASS, FAIL_REFUSE, GUARD_OFF, GUARD_REFUSE, NODE_ADDRESSES_MAX, POD_ADDRESSES_MAX, PORTS_MAX,
    PodEntry, PortSet, SteerEntry, TooManyPorts,
};
pub use reason::{REASONS, Reason};

/// The version of everything in this crate that both sides must agree on. It names the pin directory's suffix and a
/// symbol in the kernel object; raise it with any change of a map's key, value or meaning.
pub const ABI_VERSION: u32 = 3;

/// The symbol in the kernel object that carries [`ABI_VERSION`] in its name: an object of another version lacks it
/// and is refused at load.
pub const ABI_SYMBOL: &str = "MESH_ABI_3";

/// The mark on the agent's own sockets (`SO_MARK`).
pub const AGENT_MARK: u32 = 0x539;

/// Where the agent listens for captured connections in each pod's network namespace, unless the port is taken there.
pub const OUTBOUND_PORT: u16 = 15001;

/// Where the agent listens for steered connections in each pod's network namespace, unless the port is taken there.
pub const INBOUND_PORT: u16 = 15006;

/// Names of the maps, 15 bytes at most.
pub mod maps {
    /// `[Config; 1]`.
    pub const CONFIG: &str = "CONFIG";
    /// cgroup id -> generation: the cgroups whose marked sockets are the agent's own.
    pub const AGENTS: &str = "AGENTS";
    /// netns cookie -> `PodEntry`.
    pub const PODS: &str = "PODS";
    /// cgroup id -> `PodEntry`: enrolled pods that share the node's network namespace.
    pub const HOSTED: &str = "HOSTED";
    /// `Addr` -> `SteerEntry`.
    pub const STEER: &str = "STEER";
    /// `Addr` -> listening socket.
    pub const LISTENERS: &str = "LISTENERS";
    /// socket -> `SocketView`.
    pub const SOCKETS: &str = "SOCKETS";
    /// `FlowKey` -> `Endpoint`: the original destination of a captured connection, until the agent takes it.
    pub const ORIG_BY_FLOW: &str = "ORIG_BY_FLOW";
    /// `FlowKey` of the agent's socket towards a workload -> the `Endpoint` that the workload is shown.
    pub const PEERS: &str = "PEERS";
    /// `Tuple` -> `Announcement`: flows that may pass where they arrive, until their sockets close.
    pub const ANNOUNCED: &str = "ANNOUNCED";
    /// `[DirectState; 2]`: the owner's, and what other agents took away.
    pub const DIRECT_STATE: &str = "DIRECT_STATE";
    /// `DirectKey` -> `DirectEntry`: what may be connected without the agent.
    pub const DIRECT: &str = "DIRECT";
    /// socket cookie -> `DirectFlow`: flows without the agent, until they close.
    pub const DIRECT_FLOWS: &str = "DIRECT_FLOWS";
    /// `DirectFlow`s that have closed, until the agent takes them.
    pub const DIRECT_ENDED: &str = "DIRECT_ENDED";
    /// `Reason` -> count per CPU.
    pub const REASONS: &str = "REASONS";

    /// cgroup id -> 1: the cgroups below which every network namespace must be known.
    pub const GUARDED: &str = "GUARDED";
    /// netns cookie -> 1: namespaces that the agent has looked at and that are not enrolled.
    pub const KNOWN: &str = "KNOWN";
    /// netns cookie -> cgroup id of a process that was refused because its namespace is not known.
    pub const STRANGERS: &str = "STRANGERS";

    /// Every map.
    pub const ALL: [&str; 18] = [
        CONFIG,
        AGENTS,
        GUARDED,
        KNOWN,
        STRANGERS,
        PODS,
        HOSTED,
        STEER,
        LISTENERS,
        SOCKETS,
        ORIG_BY_FLOW,
        PEERS,
        ANNOUNCED,
        DIRECT_STATE,
        DIRECT,
        DIRECT_FLOWS,
        DIRECT_ENDED,
        REASONS,
    ];

    /// Agent generations that may run side by side during an upgrade.
    pub const AGENTS_MAX: u32 = 64;
    /// Cgroups that hold all pods' processes: a kubelet has one.
    pub const GUARDED_MAX: u32 = 8;
    /// Network namespaces that are known and not enrolled.
    pub const KNOWN_MAX: u32 = 8192;
    /// Network namespaces whose refusal the agent has not looked at; the oldest go first.
    pub const STRANGERS_MAX: u32 = 1024;
    /// Pods on a node.
    pub const PODS_MAX: u32 = 4096;
    /// Pods of a node that share its network namespace.
    pub const HOSTED_MAX: u32 = 1024;
    /// Pod addresses on a node.
    pub const STEER_MAX: u32 = 4 * PODS_MAX;
    /// Captured connections that the agent has not accepted yet.
    pub const FLOWS_MAX: u32 = 65536;
    /// Connections from the agent to workloads of this node.
    pub const PEERS_MAX: u32 = 131_072;
    /// Announced flows; the least recently used go first. One is needed until its connection is established.
    pub const ANNOUNCED_MAX: u32 = 65536;
    /// Pairs of a source and a destination that need no agent; further ones go through it.
    pub const DIRECT_MAX: u32 = 16384;
    /// Open flows without the agent; further ones go through it.
    pub const DIRECT_FLOWS_MAX: u32 = 65536;
    /// Closed flows that wait for the agent; further ones wait in `DIRECT_FLOWS`.
    pub const DIRECT_ENDED_MAX: u32 = 8192;
}

/// Names of the kernel programs: the symbol of the function.
pub mod programs {
    /// `cgroup/connect4`.
    pub const CONNECT4: &str = "capture_connect4";
    /// `cgroup/connect6`.
    pub const CONNECT6: &str = "capture_connect6";
    /// `cgroup/getpeername4`.
    pub const GETPEERNAME4: &str = "show_peer4";
    /// `cgroup/getpeername6`.
    pub const GETPEERNAME6: &str = "show_peer6";
    /// `cgroup/getsockname4`.
    pub const GETSOCKNAME4: &str = "show_local4";
    /// `cgroup/getsockname6`.
    pub const GETSOCKNAME6: &str = "show_local6";
    /// `sockops`.
    pub const SOCK_OPS: &str = "follow_sockets";
    /// `cgroup/sock_create`.
    pub const SOCK_CREATE: &str = "check_protocol";
    /// `sk_lookup`.
    pub const SK_LOOKUP: &str = "steer_inbound";
}
