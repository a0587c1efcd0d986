//! `cgroup/connect4` and `connect6`: outbound connections of enrolled pods go to the agent's listener in the pod.
//!
//! | situation | answer |
//! | --- | --- |
//! | network namespace not enrolled (map miss) | untouched; the node's own to one of its pods is marked |
//! | the same, in a guarded cgroup and not known either | `ECONNREFUSED`, except to loopback |
//! | a process of an enrolled pod in the node's own namespace | as a pod; the node's own addresses pass |
//! | loopback, the pod's own address, excluded port, the agent's own socket | passes as asked |
//! | no agent listener of that family, or bound to a device that it cannot be taken off | `ENETUNREACH` |
//! | the original destination cannot be kept (no memory) | `ENOBUFS` |
//! | to another pod of this node, as a direct flow | goes there, see `direct` |
//! | no agent listens, fail mode refuse | `ECONNREFUSED`, by the kernel itself |
//! | no agent listens, fail mode pass | passes as asked |
//!
//! `connect6` sees v4-mapped destinations too; they are IPv4 here. UDP is not touched.

use aya_ebpf::{
    bindings::{bpf_sock_addr, bpf_sock_tuple},
    helpers::generated::{
        bpf_get_current_cgroup_id, bpf_set_retval, bpf_setsockopt, bpf_sk_lookup_tcp, bpf_sk_release,
    },
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use aya_log_ebpf::debug;
use core::mem::{size_of, zeroed};
use mesh_abi::{
    AGENT_MARK, Endpoint, FAIL_PASS, PodEntry, ROLE_CAPTURED, Reason, SocketView,
    capture::{self, Flow, Verdict},
};

use crate::{
    context::{
        forget_socket_view, keep_socket_view, netns_cookie, set_user4, set_user6, user_address4, user_address6,
        user_port, word,
    },
    direct, guard, hosted,
    maps::{AGENTS, PODS, config, count},
    node,
};

const ALLOW: i32 = 1;
const DENY: i32 = 0;
const IPPROTO_TCP: u32 = 6;
const SOL_SOCKET: i32 = 1;
const SO_BINDTODEVICE: i32 = 25;
/// `BPF_F_CURRENT_NETNS`.
const CURRENT_NETNS: u64 = u64::MAX;

#[cgroup_sock_addr(connect4)]
pub fn capture_connect4(ctx: SockAddrContext) -> i32 {
    let raw = ctx.sock_addr;
    // SAFETY: the context of an IPv4 connect program.
    let destination = unsafe { Endpoint::new(user_address4(raw), user_port(raw)) };
    match judge(&ctx, destination) {
        Answer::Allow => ALLOW,
        Answer::Deny => DENY,
        Answer::Redirect(agent) => {
            // SAFETY: as above; connect programs may write address and port.
            unsafe { set_user4(raw, &agent) };
            ALLOW
        }
    }
}

#[cgroup_sock_addr(connect6)]
pub fn capture_connect6(ctx: SockAddrContext) -> i32 {
    let raw = ctx.sock_addr;
    // SAFETY: the context of an IPv6 connect program.
    let destination = unsafe { Endpoint::new(user_address6(raw), user_port(raw)) };
    match judge(&ctx, destination) {
        Answer::Allow => ALLOW,
        Answer::Deny => DENY,
        Answer::Redirect(agent) => {
            // SAFETY: as above. A v4-mapped destination's agent is IPv4 and is written v4-mapped.
            unsafe { set_user6(raw, &agent) };
            ALLOW
        }
    }
}

enum Answer {
    Allow,
    Deny,
    Redirect(Endpoint),
}

#[inline(always)]
fn judge(ctx: &SockAddrContext, destination: Endpoint) -> Answer {
    let raw = ctx.sock_addr;
    let cookie = netns_cookie(raw);
    // SAFETY: the entry is read only; an update replaces it as a whole, and it outlives the program.
    let pod = unsafe { PODS.get(&cookie) };
    let pod = match pod {
        Some(pod) => Some(pod),
        None => match hosted::entry(cookie) {
            // The kubelet and the node's other daemons, and what a Service offers on each node.
            Some(_) if config().is_some_and(|config| config.is_node(&destination.addr)) => {
                return pass(raw, Reason::OutboundSelf);
            }
            pod => pod,
        },
    };
    // SAFETY: a field of the context.
    let is_tcp = unsafe { word(&raw const (*raw).protocol) } == IPPROTO_TCP;
    let Some(pod) = pod else {
        if !is_tcp || destination.addr.is_loopback() {
            return Answer::Allow;
        }
        if guard::is_stranger(cookie) && !is_agent_socket(raw) {
            guard::tell(cookie);
            return refuse(Reason::OutboundUnclassified);
        }
        node::mark(raw, cookie, &destination);
        return Answer::Allow;
    };
    let flow = Flow {
        destination,
        is_tcp,
        is_agent_socket: is_agent_socket(raw),
    };
    match capture::decide(Some(pod), &flow) {
        Verdict::Untouched => Answer::Allow,
        Verdict::Pass(reason) => pass(raw, reason),
        Verdict::Refuse(reason) => refuse(reason),
        Verdict::Agent(agent) => {
            if let Some(endpoint) = direct::decide(raw, cookie, destination) {
                return Answer::Redirect(endpoint);
            }
            let answer = redirect(raw, pod, destination, agent);
            debug!(
                ctx,
                "netns {} to {:i} port {}",
                cookie,
                destination.addr.octets(),
                destination.port
            );
            answer
        }
    }
}

/// Marked, and from a cgroup of an agent: a pod that may set marks is not believed.
#[inline(always)]
fn is_agent_socket(raw: *mut bpf_sock_addr) -> bool {
    // SAFETY: the context's socket is never null, and its mark is a field that may be read.
    let mark = unsafe { word(&raw const (*(*raw).__bindgen_anon_1.sk).mark) };
    if mark != AGENT_MARK {
        return false;
    }
    // SAFETY: the helper reads the current task; the map entry is only tested for.
    unsafe { AGENTS.get(&bpf_get_current_cgroup_id()).is_some() }
}

#[inline(always)]
fn pass(raw: *mut bpf_sock_addr, reason: Reason) -> Answer {
    // A socket may be connected again after `AF_UNSPEC`: what was kept of its captured life would now be a lie.
    // SAFETY: the context's socket is never null.
    unsafe { forget_socket_view((*raw).__bindgen_anon_1.sk) };
    count(reason);
    Answer::Allow
}

#[inline(always)]
fn refuse(reason: Reason) -> Answer {
    // SAFETY: sets the running program's return value.
    unsafe { bpf_set_retval(-capture::errno(reason)) };
    count(reason);
    Answer::Deny
}

#[inline(always)]
fn redirect(raw: *mut bpf_sock_addr, pod: &PodEntry, destination: Endpoint, agent: Endpoint) -> Answer {
    let passes_without_agent = match config() {
        Some(config) => config.fail_mode == FAIL_PASS,
        None => false,
    };
    if passes_without_agent && !has_listener(raw, &agent) {
        return pass(raw, Reason::OutboundAgentAbsentPass);
    }
    if !leave_device(raw) {
        return refuse(Reason::OutboundNoListener);
    }
    let view = SocketView {
        peer: destination,
        local: pod.address(destination.addr.is_v4()),
        role: ROLE_CAPTURED,
        number: 0,
    };
    // SAFETY: the context's socket is never null.
    if unsafe { keep_socket_view((*raw).__bindgen_anon_1.sk, &view) } {
        count(Reason::Captured);
        Answer::Redirect(agent)
    } else {
        refuse(Reason::OutboundNoMemory)
    }
}

/// Takes a socket off the device that it was bound to (`SO_BINDTODEVICE`): the agent is reached over the loopback, and
/// what goes out is the agent's socket. False if that cannot be done, since the connection would hang.
#[inline(always)]
fn leave_device(raw: *mut bpf_sock_addr) -> bool {
    // SAFETY: the context's socket is never null, and its device is a field that may be read.
    if unsafe { word(&raw const (*(*raw).__bindgen_anon_1.sk).bound_dev_if) } == 0 {
        return true;
    }
    let mut no_name = [0u8; 4];
    // SAFETY: the name lives through the call.
    let result = unsafe {
        bpf_setsockopt(
            raw.cast(),
            SOL_SOCKET,
            SO_BINDTODEVICE,
            no_name.as_mut_ptr().cast(),
            no_name.len() as i32,
        )
    };
    result == 0
}

/// Whether anything listens at the agent's address in this network namespace.
#[inline(always)]
fn has_listener(raw: *mut bpf_sock_addr, agent: &Endpoint) -> bool {
    // SAFETY: a tuple of integers, all of which may be zero.
    let mut tuple: bpf_sock_tuple = unsafe { zeroed() };
    let port = agent.port.to_be();
    let size = if agent.addr.is_v4() {
        // SAFETY: the IPv4 arm of the union.
        let ipv4 = unsafe { &mut tuple.__bindgen_anon_1.ipv4 };
        ipv4.saddr = agent.addr.v4_word();
        ipv4.daddr = agent.addr.v4_word();
        ipv4.dport = port;
        size_of::<aya_ebpf::bindings::bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1>()
    } else {
        // SAFETY: the IPv6 arm of the union.
        let ipv6 = unsafe { &mut tuple.__bindgen_anon_1.ipv6 };
        ipv6.saddr = agent.addr.words;
        ipv6.daddr = agent.addr.words;
        ipv6.dport = port;
        size_of::<aya_ebpf::bindings::bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2>()
    };
    // SAFETY: the tuple lives through the call; a socket that is found is released at once.
    unsafe {
        let found = bpf_sk_lookup_tcp(raw.cast(), &raw mut tuple, size as u32, CURRENT_NETNS, 0);
        if found.is_null() {
            return false;
        }
        bpf_sk_release(found.cast());
    }
    true
}
