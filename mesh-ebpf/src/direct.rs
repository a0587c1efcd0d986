//! Direct flows: see `mesh_abi::direct`. Asked by the connect programs for what would go to the agent, and by `sockops`
//! for the sockets that were let go.
//!
//! | situation | answer |
//! | --- | --- |
//! | a socket in the node's own network namespace, which many share | the agent |
//! | no entry, or one of another generation | the agent |
//! | the agent that wrote the entries is silent, or another one holds a newer view | the agent |
//! | the endpoint's address is no longer that pod's | the agent |
//! | the socket is bound to a device, by which the agent could not find it again | the agent |
//! | the flow cannot be kept on record (map full, no memory) | the agent |
//! | it comes from another address than the pod's own | not announced: judged where it arrives, as plaintext |
//! | its end cannot be queued for the agent | it stays on record, where the agent finds it later |

use aya_ebpf::{
    bindings::{bpf_sock_addr, bpf_sock_ops},
    helpers::generated::{bpf_get_prandom_u32, bpf_get_socket_cookie, bpf_ktime_get_ns},
};
use core::ptr;
use mesh_abi::{
    Addr, Endpoint, ROLE_DIRECT, Reason, SocketView,
    announce::Tuple,
    direct::{self, DirectFlow, DirectKey, tcp},
};

use crate::{
    context::{keep_socket_view, netns_cookie, word},
    maps::{DIRECT, DIRECT_ENDED, DIRECT_FLOWS, DIRECT_STATE, PODS, STEER, config, count},
};

/// `BPF_NOEXIST`.
const NEW: u64 = 1;

/// Where the connection goes without the agent; `None`: it goes to the agent. What is returned is on record.
#[inline(always)]
pub fn decide(raw: *mut bpf_sock_addr, netns: u64, asked: Endpoint) -> Option<Endpoint> {
    let state = DIRECT_STATE.get(direct::STATE_OWNER)?;
    if state.generation == direct::GENERATION_NONE || config()?.home == netns {
        return None;
    }
    // SAFETY: the entry is read only; an update replaces it as a whole, and it outlives the program.
    let entry = unsafe { DIRECT.get(&DirectKey::new(netns, asked)) }?;
    // SAFETY: the helpers take nothing.
    let (now, random) = unsafe { (bpf_ktime_get_ns(), bpf_get_prandom_u32()) };
    if !state.is_valid(DIRECT_STATE.get(direct::STATE_OTHERS)?, now) {
        return None;
    }
    let endpoint = direct::choose(entry, state.generation, random)?;
    // SAFETY: as above.
    let steered = unsafe { STEER.get(&endpoint.address.addr) }?;
    if steered.netns != endpoint.netns {
        return None;
    }
    // SAFETY: the context's socket is never null, and its device is a field that may be read; the helper reads the
    // context.
    let (sk, device, socket) = unsafe {
        let sk = (*raw).__bindgen_anon_1.sk;
        (
            sk,
            word(&raw const (*sk).bound_dev_if),
            bpf_get_socket_cookie(raw.cast()),
        )
    };
    if device != 0 {
        return None;
    }
    let flow = DirectFlow {
        socket,
        netns,
        decision: entry.decision,
        opened: now,
        closed: 0,
        acked: 0,
        received: 0,
        received_half: 0,
        source: Endpoint::NONE,
        asked,
        endpoint: endpoint.address,
        ended_in: 0,
    };
    if DIRECT_FLOWS.insert(&socket, &flow, NEW).is_err() {
        count(Reason::DirectNotKept);
        return None;
    }
    let view = SocketView {
        peer: asked,
        local: Addr::NONE,
        role: ROLE_DIRECT,
        number: 0,
    };
    // SAFETY: the context's socket, not null.
    if !unsafe { keep_socket_view(sk, &view) } {
        let _it_was_just_put_there = DIRECT_FLOWS.remove(&socket);
        count(Reason::DirectNotKept);
        return None;
    }
    count(Reason::OutboundDirect);
    Some(endpoint.address)
}

/// A direct flow's socket is about to send its SYN: whether it may be announced.
///
/// # Safety
/// `ops` must be the program's context.
#[inline(always)]
pub unsafe fn connecting(ops: *mut bpf_sock_ops, tuple: &Tuple) -> bool {
    // SAFETY: the helpers read the context, by the caller's promise.
    let (socket, netns) = unsafe { (bpf_get_socket_cookie(ops.cast()), netns_cookie(ops)) };
    // SAFETY: the entry is read only, as in `decide`.
    let is_own = unsafe { PODS.get(&netns) }.is_some_and(|pod| pod.is_own(&tuple.source.addr));
    if !is_own {
        let _none_is_fine_too = DIRECT_FLOWS.remove(&socket);
        return false;
    }
    let Some(flow) = DIRECT_FLOWS.get_ptr_mut(&socket) else {
        return false;
    };
    // SAFETY: the map's value, which only this socket's callbacks write; the agent copies it, and deletes it only when
    // it has closed.
    unsafe { (*flow).source = tuple.source };
    true
}

/// A direct flow's socket goes from one state to another.
///
/// # Safety
/// `ops` must be the program's context.
#[inline(always)]
pub unsafe fn changed(ops: *mut bpf_sock_ops, old: u32, new: u32) {
    // SAFETY: the helper reads the context, by the caller's promise.
    let socket = unsafe { bpf_get_socket_cookie(ops.cast()) };
    let Some(flow) = DIRECT_FLOWS.get_ptr_mut(&socket) else {
        return;
    };
    // SAFETY: as in `connecting`. The two counters are fields of eight bytes, which are read as such.
    unsafe {
        let received = ptr::read_volatile(&raw const (*ops).bytes_received);
        if new != tcp::CLOSE {
            (*flow).received_half = received;
            return;
        }
        (*flow).acked = ptr::read_volatile(&raw const (*ops).bytes_acked);
        (*flow).received = received;
        (*flow).ended_in = old;
        (*flow).closed = bpf_ktime_get_ns();
        if DIRECT_ENDED.push(&*flow, 0).is_ok() {
            let _it_was_just_there = DIRECT_FLOWS.remove(&socket);
        }
    }
}
