//! The listeners in a pod's network namespace: one per worker, direction and family, in `SO_REUSEPORT` groups.
//!
//! They are bound to loopback, so only the kernel's redirection leads there (or the pod itself, whose connection then
//! has no original destination and is refused). What a keeper holds is taken; what it lacks is made, and held by it from
//! then on. The usual port is taken unless somebody listens on it: the pod's own program, or an older agent without a
//! keeper, whose group must not be joined, because it will close with connections in its queue.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
};

use mesh_abi::{INBOUND_PORT, OUTBOUND_PORT};
use socket2::{Domain, Protocol, Socket, Type};

use super::{Netns, Pod, kept::Kept};
use crate::keeper::{Direction, Slot};

/// Connections that wait for one worker; the kernel lowers it to `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// One `SO_REUSEPORT` group.
#[derive(Debug)]
pub struct Group {
    /// Which one.
    pub slot: Slot,
    /// Where it listens.
    pub address: SocketAddr,
    /// At least one for each worker; more if an earlier agent had more workers, and none may be left unserved.
    pub members: Vec<TcpListener>,
}

/// The groups for captured and those for steered connections: on 127.0.0.1, and on ::1 where the namespace has IPv6. What
/// arrives at a pod that shares the node's namespace is not steered.
pub fn obtain(pod: &Pod, workers: usize, mut kept: Option<&mut Kept>) -> io::Result<Vec<Group>> {
    let mut groups = Vec::with_capacity(Slot::ALL.len());
    for slot in Slot::ALL {
        if pod.is_hosted() && slot.direction == Direction::Inbound {
            continue;
        }
        match group(pod, slot, workers, kept.as_deref_mut()) {
            Ok(group) => groups.push(group),
            // IPv6 is compiled out, or disabled in this namespace: there is nothing to capture.
            Err(error) if slot.ipv6 && is_absent(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(groups)
}

/// One more member for each group: for a worker that lost its own.
pub fn join(netns: &Netns, groups: &[SocketAddr]) -> io::Result<Vec<TcpListener>> {
    netns.run(|| groups.iter().map(|address| member(*address)).collect())?
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}

fn group(pod: &Pod, slot: Slot, workers: usize, kept: Option<&mut Kept>) -> io::Result<Group> {
    let (netns, cookie) = (pod.netns(), pod.cookie());
    let Some(kept) = kept else {
        let (address, members) = netns.run(|| make(usual(slot), workers))??;
        return Ok(Group { slot, address, members });
    };
    let mut members = kept.take(cookie, slot);
    let mut held = members.len();
    if members.is_empty() {
        members = netns.run(|| make(usual(slot), workers))??.1;
        if kept.put(cookie, slot, 0, &members).is_err() {
            // Another generation was faster: its sockets count, and nobody knows of ours yet.
            members = kept.take(cookie, slot);
        }
        held = members.len();
    }
    let address = members.first().map(TcpListener::local_addr).transpose()?;
    let address = address.ok_or(io::ErrorKind::NotFound)?;
    while members.len() < workers {
        members.push(netns.run(|| member(address))??);
    }
    if let Some(more) = members.get(held..).filter(|more| !more.is_empty())
        && kept.put(cookie, slot, held, more).is_err()
    {
        // Another generation has added its own in this moment. Ours are served as long as we live.
        tracing::warn!(netns = %cookie, "listeners of this agent are not held");
    }
    Ok(Group { slot, address, members })
}

fn usual(slot: Slot) -> SocketAddr {
    let port = match slot.direction {
        Direction::Outbound => OUTBOUND_PORT,
        Direction::Inbound => INBOUND_PORT,
    };
    if slot.ipv6 {
        SocketAddr::from((Ipv6Addr::LOCALHOST, port))
    } else {
        SocketAddr::from((Ipv4Addr::LOCALHOST, port))
    }
}

/// A new group, in the calling thread's namespace.
fn make(usual: SocketAddr, workers: usize) -> io::Result<(SocketAddr, Vec<TcpListener>)> {
    let mut address = usual;
    match socket(usual, false) {
        Ok(_free) => {}
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => address.set_port(0),
        Err(error) => return Err(error),
    }
    let mut members = Vec::with_capacity(workers);
    for _ in 0..workers {
        let listener = member(address)?;
        address = listener.local_addr()?;
        members.push(listener);
    }
    Ok((address, members))
}

fn member(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = socket(address, true)?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// A bound socket. Without `shares_port` the bind fails where anybody listens, also one who would share.
fn socket(address: SocketAddr, shares_port: bool) -> io::Result<Socket> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM.nonblocking(),
        Some(Protocol::TCP),
    )?;
    // Connections of an earlier agent may linger in TIME_WAIT.
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(shares_port)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&address.into())?;
    Ok(socket)
}
