//! Reading and writing the contexts word by word.
//!
//! Volatile, because the verifier allows four-byte accesses only and the compiler would join two into one of eight.

use core::ptr;

use aya_ebpf::{
    bindings::{bpf_sock, bpf_sock_addr},
    helpers::generated::{bpf_get_netns_cookie, bpf_sk_storage_delete, bpf_sk_storage_get},
};
use mesh_abi::{Addr, Endpoint, SocketView};

use crate::maps::SOCKETS;

/// `BPF_SK_STORAGE_GET_F_CREATE`.
const CREATE: u64 = 1;

/// Reads one word.
///
/// # Safety
/// `field` must point to a four-byte field of a program's context.
#[inline(always)]
pub unsafe fn word(field: *const u32) -> u32 {
    // SAFETY: the caller's promise; the verifier checks it.
    unsafe { ptr::read_volatile(field) }
}

/// Reads an IPv6 address.
///
/// # Safety
/// `field` must point to an address field of a program's context.
#[inline(always)]
pub unsafe fn address(field: *const [u32; 4]) -> Addr {
    let first: *const u32 = field.cast();
    // SAFETY: the four words of the field, by the caller's promise.
    unsafe {
        Addr {
            words: [word(first), word(first.add(1)), word(first.add(2)), word(first.add(3))],
        }
    }
}

/// One of the two addresses that a context holds side by side. Both are read before the family is looked at: were the
/// reads in the branches, the compiler would join them into one at a computed offset, which the verifier refuses.
#[inline(always)]
pub fn either(is_v4: bool, v4_word: u32, v6: Addr) -> Addr {
    if is_v4 { Addr::from_v4_word(v4_word) } else { v6 }
}

/// Writes an IPv6 address.
///
/// # Safety
/// `field` must point to a writable address field of a program's context.
#[inline(always)]
pub unsafe fn set_address(field: *mut [u32; 4], addr: &Addr) {
    let first: *mut u32 = field.cast();
    // SAFETY: the four words of the field, by the caller's promise.
    unsafe {
        ptr::write_volatile(first, addr.words[0]);
        ptr::write_volatile(first.add(1), addr.words[1]);
        ptr::write_volatile(first.add(2), addr.words[2]);
        ptr::write_volatile(first.add(3), addr.words[3]);
    }
}

/// The cookie of the network namespace of the context's socket.
#[inline(always)]
pub fn netns_cookie<C>(ctx: *mut C) -> u64 {
    // SAFETY: the helper reads the context of the running program.
    unsafe { bpf_get_netns_cookie(ctx.cast()) }
}

/// The IPv4 address in a socket address context.
///
/// # Safety
/// `ctx` must be the context of an IPv4 socket address program.
#[inline(always)]
pub unsafe fn user_address4(ctx: *mut bpf_sock_addr) -> Addr {
    // SAFETY: by the caller's promise.
    Addr::from_v4_word(unsafe { word(&raw const (*ctx).user_ip4) })
}

/// The IPv6 address in a socket address context.
///
/// # Safety
/// `ctx` must be the context of an IPv6 socket address program.
#[inline(always)]
pub unsafe fn user_address6(ctx: *mut bpf_sock_addr) -> Addr {
    // SAFETY: by the caller's promise.
    unsafe { address(&raw const (*ctx).user_ip6) }
}

/// The port in a socket address context, in host byte order.
///
/// # Safety
/// `ctx` must be the context of a socket address program.
#[inline(always)]
pub unsafe fn user_port(ctx: *mut bpf_sock_addr) -> u16 {
    // SAFETY: by the caller's promise. The field holds the port in network order in its low half.
    u16::from_be(unsafe { word(&raw const (*ctx).user_port) } as u16)
}

/// Writes address and port of an IPv4 socket address context.
///
/// # Safety
/// `ctx` must be the context of an IPv4 socket address program that may write it.
#[inline(always)]
pub unsafe fn set_user4(ctx: *mut bpf_sock_addr, endpoint: &Endpoint) {
    // SAFETY: by the caller's promise.
    unsafe {
        ptr::write_volatile(&raw mut (*ctx).user_ip4, endpoint.addr.v4_word());
        ptr::write_volatile(&raw mut (*ctx).user_port, u32::from(endpoint.port.to_be()));
    }
}

/// Writes address and port of an IPv6 socket address context; an IPv4 endpoint becomes v4-mapped.
///
/// # Safety
/// `ctx` must be the context of an IPv6 socket address program that may write it.
#[inline(always)]
pub unsafe fn set_user6(ctx: *mut bpf_sock_addr, endpoint: &Endpoint) {
    // SAFETY: by the caller's promise.
    unsafe {
        set_address(&raw mut (*ctx).user_ip6, &endpoint.addr);
        ptr::write_volatile(&raw mut (*ctx).user_port, u32::from(endpoint.port.to_be()));
    }
}

/// What is kept of a socket; null if nothing is.
///
/// # Safety
/// `sk` must be the context's socket, not null.
#[inline(always)]
pub unsafe fn socket_view(sk: *mut bpf_sock) -> Option<&'static SocketView> {
    // SAFETY: map and socket are the kernel's; the value lives as long as the socket, which outlives the program.
    unsafe {
        bpf_sk_storage_get(ptr::from_ref(&SOCKETS).cast_mut().cast(), sk.cast(), ptr::null_mut(), 0)
            .cast::<SocketView>()
            .as_ref()
    }
}

/// Keeps a view in the socket; says whether it could.
///
/// # Safety
/// `sk` must be the context's socket, not null.
#[inline(always)]
#[must_use]
pub unsafe fn keep_socket_view(sk: *mut bpf_sock, view: &SocketView) -> bool {
    let map = ptr::from_ref(&SOCKETS).cast_mut().cast();
    let initial = ptr::from_ref(view).cast_mut();
    // SAFETY: as in `socket_view`; the initial value is copied. A view from the socket's earlier life is replaced.
    unsafe {
        let kept = bpf_sk_storage_get(map, sk.cast(), initial.cast(), CREATE).cast::<SocketView>();
        if kept.is_null() {
            return false;
        }
        *kept = *view;
    }
    true
}

/// Forgets what was kept of a socket's earlier connection.
///
/// # Safety
/// `sk` must be the context's socket, not null.
#[inline(always)]
pub unsafe fn forget_socket_view(sk: *mut bpf_sock) {
    // SAFETY: as in `socket_view`. That there was nothing to forget is no error.
    unsafe { bpf_sk_storage_delete(ptr::from_ref(&SOCKETS).cast_mut().cast(), sk.cast()) };
}
