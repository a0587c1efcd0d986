//! `cgroup/getpeername4|6` and `getsockname4|6`: what an application is told about its connection.
//!
//! A captured socket shows the destination that it asked for and the pod's own address; a socket accepted from the
//! agent shows the source that it serves. `accept4()` runs the getpeername hooks too. Any other socket, and any map
//! miss, is left as it is: these hooks never refuse.

use aya_ebpf::{bindings::bpf_sock_addr, macros::cgroup_sock_addr, programs::SockAddrContext};
use mesh_abi::{Addr, Endpoint, FlowKey, ROLE_CAPTURED};

use crate::{
    context::{
        address, netns_cookie, set_address, set_user4, set_user6, socket_view, user_address4, user_address6, user_port,
        word,
    },
    maps::PEERS,
};

const ALLOW: i32 = 1;

#[cgroup_sock_addr(getpeername4)]
pub fn show_peer4(ctx: SockAddrContext) -> i32 {
    let raw = ctx.sock_addr;
    // SAFETY: the context of an IPv4 program, whose socket is never null.
    unsafe {
        let sk = (*raw).__bindgen_anon_1.sk;
        let local = Addr::from_v4_word(word(&raw const (*sk).src_ip4));
        if let Some(peer) = shown_peer(raw, &local, user_address4(raw))
            && peer.addr.is_v4()
        {
            set_user4(raw, &peer);
        }
    }
    ALLOW
}

#[cgroup_sock_addr(getpeername6)]
pub fn show_peer6(ctx: SockAddrContext) -> i32 {
    let raw = ctx.sock_addr;
    // SAFETY: the context of an IPv6 program, whose socket is never null.
    unsafe {
        let sk = (*raw).__bindgen_anon_1.sk;
        let local = address(&raw const (*sk).src_ip6);
        if let Some(peer) = shown_peer(raw, &local, user_address6(raw)) {
            set_user6(raw, &peer);
        }
    }
    ALLOW
}

/// The peer to show: kept in the socket, or, where that failed for want of memory, in the map of presented peers.
/// The agent delivers from a loopback address, or from the pod's own (IPv6): only such a peer is looked up there.
#[inline(always)]
fn shown_peer(raw: *mut bpf_sock_addr, local: &Addr, peer: Addr) -> Option<Endpoint> {
    // SAFETY: the context's socket is never null; map entries are read only.
    unsafe {
        if let Some(view) = socket_view((*raw).__bindgen_anon_1.sk) {
            return Some(view.peer);
        }
        if !local.same(&peer) && !peer.is_loopback() {
            return None;
        }
        let key = FlowKey::new(netns_cookie(raw), Endpoint::new(peer, user_port(raw)));
        PEERS.get(&key).copied()
    }
}

#[cgroup_sock_addr(getsockname4)]
pub fn show_local4(ctx: SockAddrContext) -> i32 {
    let raw = ctx.sock_addr;
    // SAFETY: the context of an IPv4 program, whose socket is never null.
    unsafe {
        if user_address4(raw).is_loopback()
            && let Some(local) = shown_local(raw)
            && local.is_v4()
        {
            core::ptr::write_volatile(&raw mut (*raw).user_ip4, local.v4_word());
        }
    }
    ALLOW
}

#[cgroup_sock_addr(getsockname6)]
pub fn show_local6(ctx: SockAddrContext) -> i32 {
    let raw = ctx.sock_addr;
    // SAFETY: the context of an IPv6 program, whose socket is never null.
    unsafe {
        if user_address6(raw).is_loopback()
            && let Some(local) = shown_local(raw)
        {
            set_address(&raw mut (*raw).user_ip6, &local);
        }
    }
    ALLOW
}

#[inline(always)]
fn shown_local(raw: *mut bpf_sock_addr) -> Option<Addr> {
    // SAFETY: the context's socket is never null.
    let view = unsafe { socket_view((*raw).__bindgen_anon_1.sk) }?;
    (view.role == ROLE_CAPTURED && !view.local.is_none()).then_some(view.local)
}
