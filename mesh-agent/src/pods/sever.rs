//! Ends a pod's TCP connections (`SOCK_DESTROY`); its application sees `ECONNABORTED`, the other end a reset.
//!
//! For two cases only. A node that has just started: the runtime starts pods as soon as it can, the agent among them,
//! and what a pod connected before its capture would go around the mesh for as long as it lives. What the pod accepted
//! is left alone: the other end's agent sees to that. And direct connections that lost their permit.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use super::Netns;

const NETLINK_SOCK_DIAG: libc::c_int = 4;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
/// `struct nlmsghdr`, `struct inet_diag_req_v2`, and in it `struct inet_diag_sockid`.
const HEAD: usize = 16;
const REQUEST: usize = 56;
const ID_IN_REQUEST: usize = 8;
const ID: usize = 48;
/// `struct inet_diag_msg`: family, state and two timers before the id.
const ID_IN_MESSAGE: usize = 4;
/// States of `enum` in net/tcp_states.h, as bits.
const LISTENING: u32 = 1 << 10;
/// ESTABLISHED, SYN_SENT, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT.
const CONNECTED: u32 = 1 << 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 8;
/// The most sockets that are ended at once; a pod with more keeps the rest.
const SOCKETS_MAX: usize = 65_536;

/// One TCP socket that has connected: its two ends, and its cookie, so that no other one is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketName {
    /// Its own address and port.
    pub source: SocketAddr,
    /// What it is connected to.
    pub destination: SocketAddr,
    /// `SO_COOKIE`.
    pub cookie: u64,
}

/// A socket as the kernel names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Named {
    family: u8,
    id: [u8; ID],
}

impl Named {
    fn local_port(&self) -> u16 {
        let [high, low, ..] = self.id;
        u16::from_be_bytes([high, low])
    }

    fn address(&self, at: usize) -> IpAddr {
        let mut bytes = [0_u8; 16];
        bytes.copy_from_slice(self.id.get(at..at + 16).unwrap_or(&[0; 16]));
        let [a, b, c, d, ..] = bytes;
        if i32::from(self.family) == libc::AF_INET {
            Ipv4Addr::new(a, b, c, d).into()
        } else {
            Ipv6Addr::from(bytes).to_canonical()
        }
    }

    /// Whether it was made by `connect` towards another: nobody listens on its port, and the other end is elsewhere.
    fn is_outbound(&self, listening: &BTreeSet<u16>) -> bool {
        let (local, remote) = (self.address(4), self.address(20));
        !listening.contains(&self.local_port()) && !remote.is_loopback() && local != remote
    }
}

impl From<&SocketName> for Named {
    fn from(socket: &SocketName) -> Named {
        let mut id = [0_u8; ID];
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(place) = id.get_mut(at..at + bytes.len()) {
                place.copy_from_slice(bytes);
            }
        };
        put(0, &socket.source.port().to_be_bytes());
        put(2, &socket.destination.port().to_be_bytes());
        for (at, ip) in [(4, socket.source.ip()), (20, socket.destination.ip())] {
            match ip.to_canonical() {
                IpAddr::V4(ip) => put(at, &ip.octets()),
                IpAddr::V6(ip) => put(at, &ip.octets()),
            }
        }
        // After the interface, which is any: the lower half of the cookie, then the upper one.
        put(40, &(socket.cookie as u32).to_ne_bytes());
        put(44, &((socket.cookie >> 32) as u32).to_ne_bytes());
        let family = match socket.destination.ip().to_canonical() {
            IpAddr::V4(_) => libc::AF_INET,
            IpAddr::V6(_) => libc::AF_INET6,
        };
        Named {
            family: family as u8,
            id,
        }
    }
}

/// Ends these sockets of the namespace's processes; returns how many there still were. Synchronous.
pub fn sever_sockets(netns: &Netns, sockets: &[SocketName]) -> io::Result<usize> {
    netns
        .run(|| {
            let diag = open()?;
            let named: Vec<Named> = sockets.iter().map(Named::from).collect();
            destroy_each(&diag, named.iter())
        })
        .flatten()
}

/// Ends what the namespace's processes have connected to others; returns how many connections that were. Synchronous.
pub fn sever(netns: &Netns) -> io::Result<usize> {
    netns.run(sever_here).flatten()
}

fn sever_here() -> io::Result<usize> {
    let diag = open()?;
    let mut listening = BTreeSet::new();
    let mut connected = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let family = family as u8;
        listening.extend(dump(&diag, family, LISTENING)?.iter().map(Named::local_port));
        connected.extend(dump(&diag, family, CONNECTED)?);
    }
    destroy_each(&diag, connected.iter().filter(|socket| socket.is_outbound(&listening)))
}

fn destroy_each<'a>(diag: &OwnedFd, sockets: impl Iterator<Item = &'a Named>) -> io::Result<usize> {
    let mut ended = 0;
    for socket in sockets {
        match destroy(diag, socket) {
            Ok(()) => ended += 1,
            // It ended by itself.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(ended)
}

fn open() -> io::Result<OwnedFd> {
    // SAFETY: a system call without pointers.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, NETLINK_SOCK_DIAG) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn send(diag: &OwnedFd, kind: u16, flags: libc::c_int, family: u8, states: u32, id: &[u8; ID]) -> io::Result<()> {
    let mut message = Vec::with_capacity(HEAD + REQUEST);
    message.extend(((HEAD + REQUEST) as u32).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend((flags as u16).to_ne_bytes());
    message.extend([0_u8; 8]);
    message.extend([family, libc::IPPROTO_TCP as u8, 0, 0]);
    message.extend(states.to_ne_bytes());
    message.extend(id);
    debug_assert_eq!(message.len(), HEAD + ID_IN_REQUEST + ID);
    // SAFETY: the message is ours and of the length given.
    let sent = unsafe { libc::send(diag.as_raw_fd(), message.as_ptr().cast(), message.len(), 0) };
    if sent < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Reads messages until the request is answered: an end, an acknowledgement or an error.
fn receive(diag: &OwnedFd, mut each: impl FnMut(&[u8])) -> io::Result<()> {
    let mut buffer = vec![0_u8; 32 * 1024];
    loop {
        // SAFETY: the buffer is ours and of the length given.
        let read = unsafe { libc::recv(diag.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        let read = usize::try_from(read).map_err(|_| io::Error::last_os_error())?;
        let mut rest = buffer.get(..read).unwrap_or_default();
        while let Some((head, after)) = rest.split_first_chunk::<HEAD>() {
            let [a, b, c, d, e, f, ..] = *head;
            let len = (u32::from_ne_bytes([a, b, c, d]) as usize).saturating_sub(HEAD);
            let kind = libc::c_int::from(u16::from_ne_bytes([e, f]));
            let Some(body) = after.get(..len) else { break };
            match kind {
                libc::NLMSG_DONE => return Ok(()),
                libc::NLMSG_ERROR => {
                    let code = body.first_chunk::<4>().map_or(0, |code| i32::from_ne_bytes(*code));
                    return if code == 0 {
                        Ok(())
                    } else {
                        Err(io::Error::from_raw_os_error(-code))
                    };
                }
                _ => each(body),
            }
            rest = after.get(len.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

fn dump(diag: &OwnedFd, family: u8, states: u32) -> io::Result<Vec<Named>> {
    let flags = libc::NLM_F_REQUEST | libc::NLM_F_DUMP;
    send(diag, SOCK_DIAG_BY_FAMILY, flags, family, states, &[0; ID])?;
    let mut found = Vec::new();
    receive(diag, |body| {
        let id = body
            .get(ID_IN_MESSAGE..ID_IN_MESSAGE + ID)
            .and_then(|id| id.try_into().ok());
        if let (Some(&family), Some(id)) = (body.first(), id)
            && found.len() < SOCKETS_MAX
        {
            found.push(Named { family, id });
        }
    })?;
    Ok(found)
}

fn destroy(diag: &OwnedFd, socket: &Named) -> io::Result<()> {
    let flags = libc::NLM_F_REQUEST | libc::NLM_F_ACK;
    send(diag, SOCK_DESTROY, flags, socket.family, u32::MAX, &socket.id)?;
    receive(diag, |_| {})
}
