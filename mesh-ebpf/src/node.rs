//! The node's own connections to its pods: see `mesh_abi::announce`.
//!
//! Asked for connections from namespaces that are not enrolled, and answered by one compare for all but the node's own
//! namespace. It refuses nothing: a socket that cannot be marked is not announced, and is judged where it arrives.

use aya_ebpf::bindings::bpf_sock_addr;
use mesh_abi::{Addr, Endpoint, ROLE_NODE, Reason, SocketView, announce};

use crate::{
    context::{forget_socket_view, keep_socket_view},
    guard,
    maps::{STEER, config, count},
};

/// Marks the socket if it is the node's own and connects to one of its pods. A socket may be connected again after
/// `AF_UNSPEC`: what an earlier connection was marked with goes.
#[inline(always)]
pub fn mark(raw: *mut bpf_sock_addr, netns: u64, destination: &Endpoint) {
    let Some(config) = config() else {
        return;
    };
    if config.home != netns {
        return;
    }
    // SAFETY: the map entry is only tested for.
    let is_pod = |addr: &Addr| unsafe { STEER.get(addr) }.is_some();
    let is_node = announce::is_node(config, netns, &destination.addr, is_pod, guard::is_guarded);
    // SAFETY: the context's socket is never null.
    unsafe {
        let sk = (*raw).__bindgen_anon_1.sk;
        if !is_node {
            forget_socket_view(sk);
            return;
        }
        let view = SocketView {
            peer: *destination,
            local: Addr::NONE,
            role: ROLE_NODE,
            number: 0,
        };
        if !keep_socket_view(sk, &view) {
            count(Reason::AnnouncementNotWritten);
        }
    }
}
