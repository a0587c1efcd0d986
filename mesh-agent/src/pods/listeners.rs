//! The listeners in a pod's network namespace: one per worker, direction and family, in `SO_REUSEPORT` groups.
//!
//! They are bound to loopback, so only the kernel's redirection leads there (or the pod itself, whose connection then
//! has no original destination and is refused). The usual port is taken unless somebody listens on it: the pod's own
//! program, or an older agent, whose group must not be joined, because it will close with connections in its queue.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
};

use mesh_abi::{INBOUND_PORT, OUTBOUND_PORT};
use socket2::{Domain, Protocol, Socket, Type};

use super::Netns;

/// Connections that wait for one worker; the kernel lowers it to `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// One `SO_REUSEPORT` group: a listener per worker at one address.
#[derive(Debug)]
pub struct Group {
    /// Where it listens.
    pub address: SocketAddr,
    /// One for each worker.
    pub members: Vec<TcpListener>,
}

/// The groups for captured and those for steered connections: on 127.0.0.1, and on ::1 where the namespace has IPv6.
pub fn make(netns: &Netns, workers: usize) -> io::Result<(Vec<Group>, Vec<Group>)> {
    netns.run(|| Ok((groups(OUTBOUND_PORT, workers)?, groups(INBOUND_PORT, workers)?)))?
}

/// One more member for each group: for a worker that lost its own.
pub fn join(netns: &Netns, groups: &[SocketAddr]) -> io::Result<Vec<TcpListener>> {
    netns.run(|| groups.iter().map(|address| member(*address)).collect())?
}

fn groups(port: u16, workers: usize) -> io::Result<Vec<Group>> {
    let mut groups = vec![group(SocketAddr::from((Ipv4Addr::LOCALHOST, port)), workers)?];
    match group(SocketAddr::from((Ipv6Addr::LOCALHOST, port)), workers) {
        Ok(group) => groups.push(group),
        // IPv6 is compiled out, or disabled in this namespace: there is nothing to capture.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)) => {}
        Err(error) => return Err(error),
    }
    Ok(groups)
}

fn group(usual: SocketAddr, workers: usize) -> io::Result<Group> {
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
    Ok(Group { address, members })
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
