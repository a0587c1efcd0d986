//! `sockops`: ties a captured socket to the flow that the agent will accept, and an accepted socket to its source; tells
//! the namespaces of pods which flows need no agent.
//!
//! At TCP_CONNECT the local port is chosen and the SYN not yet sent, so the original destination is in the map before
//! the agent can accept. If it cannot be written (which an LRU map does not do), the agent finds none and refuses.
//! The entry of a connect that is refused goes with it. An announced flow's entry is written then too, and goes when its
//! socket closes, before its port can be used again. At PASSIVE_ESTABLISHED the source that the agent presents is
//! kept in the accepted socket, so that it stays true after the agent's end of the connection is gone. This program
//! never refuses anything; sockets that are not ours cost it one compare or one storage lookup.

use aya_ebpf::{
    bindings::{bpf_sock, bpf_sock_ops},
    helpers::generated::bpf_sock_ops_cb_flags_set,
    macros::sock_ops,
    programs::SockOpsContext,
};
use mesh_abi::{
    Addr, Endpoint, FlowKey, ROLE_ACCEPTED, ROLE_CAPTURED, ROLE_DIRECT, Reason, SocketView,
    announce::{self, Tuple},
};

use crate::{
    context::{address, either, keep_socket_view, netns_cookie, socket_view, word},
    direct,
    maps::{ANNOUNCED, ORIG_BY_FLOW, PEERS, config, count},
};

const TCP_CONNECT: u32 = 3;
const PASSIVE_ESTABLISHED: u32 = 5;
const STATE: u32 = 10;
const STATE_CB_FLAG: i32 = 4;
const TCP_SYN_SENT: u32 = 2;
const TCP_FIN_WAIT2: u32 = 5;
const TCP_CLOSE: u32 = 7;
const AF_INET: u32 = 2;

#[sock_ops]
pub fn follow_sockets(ctx: SockOpsContext) -> u32 {
    let ops = ctx.ops;
    // SAFETY: fields of the context; the socket is tested before use.
    unsafe {
        let op = word(&raw const (*ops).op);
        if op != TCP_CONNECT && op != PASSIVE_ESTABLISHED && op != STATE {
            return 1;
        }
        let sk = (*ops).__bindgen_anon_2.sk;
        if sk.is_null() {
            return 1;
        }
        if op == TCP_CONNECT {
            connecting(ops, sk);
        } else if op == PASSIVE_ESTABLISHED {
            accepted(ops, sk);
        } else {
            changed(ops, sk);
        }
    }
    1
}

/// The socket's own end of the flow that it connects for. A v4-mapped socket is of family IPv6, but its flow is IPv4, as
/// what it asked for says.
///
/// # Safety
/// `ops` must be the program's context.
#[inline(always)]
unsafe fn local_end(ops: *mut bpf_sock_ops, view: &SocketView) -> Endpoint {
    // SAFETY: fields of the context, by the caller's promise.
    unsafe {
        let local = either(
            view.peer.addr.is_v4(),
            word(&raw const (*ops).local_ip4),
            address(&raw const (*ops).local_ip6),
        );
        Endpoint::new(local, word(&raw const (*ops).local_port) as u16)
    }
}

/// The key under which the agent will look for a captured socket's flow.
///
/// # Safety
/// As for `local_end`.
#[inline(always)]
unsafe fn flow_key(ops: *mut bpf_sock_ops, view: &SocketView) -> FlowKey {
    let netns = netns_cookie(ops);
    // SAFETY: by the caller's promise.
    let (source, agent_port) = unsafe { (local_end(ops, view), remote_port(ops)) };
    if config().is_some_and(|config| config.home == netns) {
        FlowKey::captured(netns, source, agent_port)
    } else {
        FlowKey::new(netns, source)
    }
}

/// The key under which a flow is announced.
///
/// # Safety
/// As for `local_end`.
#[inline(always)]
unsafe fn tuple(ops: *mut bpf_sock_ops, view: &SocketView) -> Tuple {
    // SAFETY: fields of the context, by the caller's promise.
    unsafe {
        let remote = either(
            view.peer.addr.is_v4(),
            word(&raw const (*ops).remote_ip4),
            address(&raw const (*ops).remote_ip6),
        );
        Tuple::new(local_end(ops, view), Endpoint::new(remote, remote_port(ops)))
    }
}

/// The peer's port, which the context holds in network order in the high half.
///
/// # Safety
/// As for `local_end`.
#[inline(always)]
unsafe fn remote_port(ops: *mut bpf_sock_ops) -> u16 {
    // SAFETY: a field of the context, by the caller's promise.
    unsafe { word(&raw const (*ops).remote_port).swap_bytes() as u16 }
}

/// # Safety
/// `ops` must be the program's context and `sk` its socket.
#[inline(always)]
unsafe fn connecting(ops: *mut bpf_sock_ops, sk: *mut bpf_sock) {
    // SAFETY: by the caller's promise.
    unsafe {
        let Some(view) = socket_view(sk) else {
            return;
        };
        if view.role == ROLE_CAPTURED {
            if ORIG_BY_FLOW.insert(&flow_key(ops, view), &view.peer, 0).is_err() {
                count(Reason::FlowNotWritten);
                return;
            }
        } else if let Some(announcement) = announce::of(view) {
            let tuple = tuple(ops, view);
            if view.role == ROLE_DIRECT && !direct::connecting(ops, &tuple) {
                return;
            }
            // What is on record is followed to its end all the same.
            if ANNOUNCED.insert(&tuple, &announcement, 0).is_err() {
                count(Reason::AnnouncementNotWritten);
            }
        } else {
            return;
        }
        let flags = word(&raw const (*ops).bpf_sock_ops_cb_flags) as i32;
        bpf_sock_ops_cb_flags_set(ops, flags | STATE_CB_FLAG);
    }
}

/// The end of SYN_SENT is all we want to know of a captured socket: refused or not. (At CLOSE it would be too late:
/// an application may have sent, closed and gone before the agent accepts.) Of one that announced, its end.
///
/// # Safety
/// As for `connecting`.
#[inline(always)]
unsafe fn changed(ops: *mut bpf_sock_ops, sk: *mut bpf_sock) {
    // SAFETY: by the caller's promise.
    unsafe {
        let args: *const u32 = (&raw const (*ops).__bindgen_anon_1).cast();
        let (old, new) = (word(args), word(args.add(1)));
        if old != TCP_SYN_SENT && new != TCP_CLOSE && new != TCP_FIN_WAIT2 {
            return;
        }
        let Some(view) = socket_view(sk) else {
            return;
        };
        if announce::of(view).is_some() {
            if view.role == ROLE_DIRECT && (new == TCP_CLOSE || new == TCP_FIN_WAIT2) {
                direct::changed(ops, old, new);
            }
            if new == TCP_CLOSE {
                let _evicted_already_is_fine = ANNOUNCED.remove(&tuple(ops, view));
            }
            return;
        }
        if view.role != ROLE_CAPTURED || old != TCP_SYN_SENT {
            return;
        }
        let flags = word(&raw const (*ops).bpf_sock_ops_cb_flags) as i32;
        bpf_sock_ops_cb_flags_set(ops, flags & !STATE_CB_FLAG);
        if new == TCP_CLOSE {
            let _gone_already_is_fine = ORIG_BY_FLOW.remove(&flow_key(ops, view));
        }
    }
}

/// # Safety
/// As for `connecting`.
#[inline(always)]
unsafe fn accepted(ops: *mut bpf_sock_ops, sk: *mut bpf_sock) {
    // SAFETY: by the caller's promise.
    unsafe {
        let is_v4 = word(&raw const (*ops).family) == AF_INET;
        let local = either(
            is_v4,
            word(&raw const (*ops).local_ip4),
            address(&raw const (*ops).local_ip6),
        );
        let remote = either(
            is_v4,
            word(&raw const (*ops).remote_ip4),
            address(&raw const (*ops).remote_ip6),
        );
        // The agent delivers to the pod's own address, from loopback or (IPv6) from that address; nobody else's
        // connection is looked up.
        if local.is_loopback() || !(local.same(&remote) || remote.is_loopback()) {
            return;
        }
        let key = FlowKey::new(netns_cookie(ops), Endpoint::new(remote, remote_port(ops)));
        let Some(peer) = PEERS.get(&key) else {
            return;
        };
        let view = SocketView {
            peer: Endpoint::new(peer.addr, peer.port),
            local: Addr::NONE,
            role: ROLE_ACCEPTED,
            number: 0,
        };
        if !keep_socket_view(sk, &view) {
            count(Reason::PeerNotWritten);
        }
    }
}
