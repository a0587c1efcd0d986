//! `cgroup/sock_create`: in an enrolled pod, no MPTCP.
//!
//! An MPTCP socket's connect does not run the connect hooks, so it would go around the mesh. It is refused with
//! `EPROTONOSUPPORT`, upon which applications fall back to TCP as they do on a kernel without it. The same in a pod that
//! is not known yet. Any other protocol, and a namespace that is not enrolled, is untouched.

use aya_ebpf::{helpers::generated::bpf_set_retval, macros::cgroup_sock, programs::SockContext};
use mesh_abi::{Reason, capture};

use crate::{
    context::{netns_cookie, word},
    guard, hosted,
    maps::{PODS, count},
};

const ALLOW: i32 = 1;
const DENY: i32 = 0;
const IPPROTO_MPTCP: u32 = 262;

#[cgroup_sock(sock_create)]
pub fn check_protocol(ctx: SockContext) -> i32 {
    // SAFETY: a field of the context.
    if unsafe { word(&raw const (*ctx.sock).protocol) } != IPPROTO_MPTCP {
        return ALLOW;
    }
    let cookie = netns_cookie(ctx.sock);
    // SAFETY: the map entry is only tested for.
    if unsafe { PODS.get(&cookie) }.is_none() && hosted::entry(cookie).is_none() && !guard::is_stranger(cookie) {
        return ALLOW;
    }
    // SAFETY: sets the running program's return value.
    unsafe { bpf_set_retval(-capture::errno(Reason::OutboundProtocol)) };
    count(Reason::OutboundProtocol);
    DENY
}
