//! Every map: type, bound, owner, and when entries go. All are pinned by user space, so that they outlive the agent.

use aya_ebpf::{
    Global,
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::SkStorage,
    macros::{btf_map, map},
    maps::{Array, HashMap, LruHashMap, PerCpuArray, Queue, SockHash},
};
use mesh_abi::{
    ABI_VERSION, Addr, Config, Endpoint, FlowKey, PodEntry, REASONS, Reason, SocketView, SteerEntry,
    announce::{Announcement, Tuple},
    direct::{DirectEntry, DirectFlow, DirectKey, DirectState, STATES},
    maps,
};

/// The contract's version, in the symbol's name: user space insists on finding it.
#[unsafe(no_mangle)]
pub static MESH_ABI_3: Global<u32> = Global::new(ABI_VERSION);

/// The node's settings. One entry, written by the agent at start.
#[map]
pub static CONFIG: Array<Config> = Array::with_max_entries(1, 0);

/// cgroup ids of living agents. Written by each agent at start, the oldest goes when it is full.
#[map]
pub static AGENTS: HashMap<u64, u64> = HashMap::with_max_entries(maps::AGENTS_MAX, 0);

/// The cgroups below which every network namespace must be known. Written by the agent at start.
#[map]
pub static GUARDED: HashMap<u64, u64> = HashMap::with_max_entries(maps::GUARDED_MAX, 0);

/// Network namespaces that are not enrolled, by cookie. Written when the agent has looked at one, deleted when it is
/// gone.
#[map]
pub static KNOWN: HashMap<u64, u64> = HashMap::with_max_entries(maps::KNOWN_MAX, BPF_F_NO_PREALLOC);

/// Namespaces that were refused because they are not known, and a cgroup id of theirs, until the agent takes them.
#[map]
pub static STRANGERS: LruHashMap<u64, u64> = LruHashMap::with_max_entries(maps::STRANGERS_MAX, 0);

/// Enrolled pods by netns cookie. Written at enrolment, deleted at retirement, swept at the agent's start.
#[map]
pub static PODS: HashMap<u64, PodEntry> = HashMap::with_max_entries(maps::PODS_MAX, BPF_F_NO_PREALLOC);

/// Enrolled pods that share the node's network namespace, by the id of their cgroup. Written at enrolment, deleted at
/// retirement.
#[map]
pub static HOSTED: HashMap<u64, PodEntry> = HashMap::with_max_entries(maps::HOSTED_MAX, BPF_F_NO_PREALLOC);

/// Addresses of enrolled pods. Written and deleted with `PODS`.
#[map]
pub static STEER: HashMap<Addr, SteerEntry> = HashMap::with_max_entries(maps::STEER_MAX, BPF_F_NO_PREALLOC);

/// The agent's listeners by pod address. Written and deleted with `PODS`; a listener that closes leaves by itself.
#[map]
pub static LISTENERS: SockHash<Addr> = SockHash::with_max_entries(maps::STEER_MAX, 0);

/// What `getpeername` and `getsockname` show of a socket. In the socket: freed with it, never evicted, not bounded by
/// itself but by the sockets there are.
#[btf_map]
pub static SOCKETS: SkStorage<SocketView> = SkStorage::new();

/// Original destinations of captured connections, until the agent takes them at `accept`. Least recently used go
/// first: a flow that loses its entry is refused by the agent.
#[map]
pub static ORIG_BY_FLOW: LruHashMap<FlowKey, Endpoint> = LruHashMap::with_max_entries(maps::FLOWS_MAX, 0);

/// The source that the agent delivers for, by its socket's address. Written before the agent connects, deleted by it
/// when the connection ends; when it is full the agent refuses the delivery.
#[map]
pub static PEERS: HashMap<FlowKey, Endpoint> = HashMap::with_max_entries(maps::PEERS_MAX, BPF_F_NO_PREALLOC);

/// Flows that may pass where they arrive. Written before the SYN, deleted when the socket closes, so that a port used
/// again proves nothing. Least recently used go first: a flow that loses its entry while it connects goes to the agent.
#[map]
pub static ANNOUNCED: LruHashMap<Tuple, Announcement> = LruHashMap::with_max_entries(maps::ANNOUNCED_MAX, 0);

/// Which direct entries are valid: the word of the agent that owns them, and that of the others.
#[map]
pub static DIRECT_STATE: Array<DirectState> = Array::with_max_entries(STATES, 0);

/// What may be connected without the agent. Written and deleted by the agent with each view, before it says that it
/// holds the view.
#[map]
pub static DIRECT: HashMap<DirectKey, DirectEntry> = HashMap::with_max_entries(maps::DIRECT_MAX, BPF_F_NO_PREALLOC);

/// Open direct flows by their sockets' cookies. Written at `connect()`, deleted when the socket closes; one whose end
/// could not be queued, and one whose connection never got under way, is deleted by the agent.
#[map]
pub static DIRECT_FLOWS: HashMap<u64, DirectFlow> =
    HashMap::with_max_entries(maps::DIRECT_FLOWS_MAX, BPF_F_NO_PREALLOC);

/// Direct flows that have closed. Taken by the agent, each once, whichever generation of it does.
#[map]
pub static DIRECT_ENDED: Queue<DirectFlow> = Queue::with_max_entries(maps::DIRECT_ENDED_MAX, 0);

/// How often each reason was given. Fixed size.
#[map(name = "REASONS")]
pub static REASON_COUNTS: PerCpuArray<u64> = PerCpuArray::with_max_entries(REASONS, 0);

/// Counts a reason.
#[inline(always)]
pub fn count(reason: Reason) {
    if let Some(counter) = REASON_COUNTS.get_ptr_mut(reason as u32) {
        // SAFETY: the pointer is to this CPU's own 8-byte value, and programs of one CPU do not nest on it often
        // enough to matter to a counter.
        unsafe { *counter += 1 };
    }
}

/// The node's settings; `None` cannot happen with an array's only entry, but the verifier wants the question asked.
#[inline(always)]
pub fn config() -> Option<&'static Config> {
    if MESH_ABI_3.load() != ABI_VERSION {
        return None;
    }
    CONFIG.get(0)
}
