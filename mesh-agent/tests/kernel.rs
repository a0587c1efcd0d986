//! The kernel programs in the real kernel: real network namespaces, real sockets, real pins.
//!
//! Each test makes a small world of its own: a pod's network namespace and one outside, joined by a veth pair, and a
//! pin directory. The test's process plays the agent and, on threads, the applications. Needs root; a test never
//! passes by being skipped.

#[path = "world/mod.rs"]
mod world;

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
};

use mesh_abi::{PortSet, Reason};
use mesh_agent::kernel::{FailMode, Kernel};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use world::{World, accept, is_refused};

fn tcp(domain: Domain) -> Socket {
    Socket::new(domain, Type::STREAM, Some(Protocol::TCP)).unwrap()
}

/// The ways an application may connect.
#[derive(Clone, Copy, Debug)]
enum Way {
    V4,
    V6,
    V4Mapped,
    NonBlocking,
    Bound,
}

fn connect(way: Way, pod: IpAddr, to: SocketAddr) -> io::Result<Socket> {
    let address = match (way, to.ip()) {
        (Way::V4Mapped, IpAddr::V4(ip)) => SocketAddr::new(ip.to_ipv6_mapped().into(), to.port()),
        _ => to,
    };
    let socket = tcp(Domain::for_address(address));
    if let Way::Bound = way {
        socket.bind(&SocketAddr::new(pod, 0).into())?;
    }
    if let Way::NonBlocking = way {
        socket.set_nonblocking(true)?;
        match socket.connect(&address.into()) {
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
            other => other?,
        }
        world::writable(&socket)?;
        socket.set_nonblocking(false)?;
        return socket.take_error()?.map_or(Ok(socket), Err);
    }
    socket.connect(&address.into())?;
    Ok(socket)
}

fn shown(address: io::Result<SockAddr>) -> SocketAddr {
    let address = address.unwrap().as_socket().unwrap();
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[test]
fn every_way_to_connect_reaches_the_agent_and_shows_the_destination() {
    let world = World::new();
    let agent = world.capture(2);
    let cases = [
        (Way::V4, "203.0.113.7:80"),
        (Way::V6, "[2001:db8::7]:443"),
        (Way::V4Mapped, "203.0.113.8:81"),
        (Way::NonBlocking, "203.0.113.9:82"),
        (Way::NonBlocking, "[2001:db8::9]:83"),
        (Way::Bound, "203.0.113.10:84"),
        (Way::Bound, "[2001:db8::10]:85"),
    ];
    for (way, destination) in cases {
        let destination: SocketAddr = destination.parse().unwrap();
        let pod_ip = world.pod_ip(destination.is_ipv6());
        let application = world.in_pod(move || connect(way, pod_ip, destination)).unwrap();
        let (mut accepted, source) = accept(&agent.outbound);
        let original = world.kernel().take_original_destination(world.cookie(), source);
        assert_eq!(original, Some(destination), "{way:?}");
        assert_eq!(
            world.kernel().take_original_destination(world.cookie(), source),
            None,
            "{way:?}: an original destination is taken once"
        );
        assert_eq!(shown(application.peer_addr()), destination, "{way:?}: getpeername");
        assert_eq!(shown(application.local_addr()).ip(), pod_ip, "{way:?}: getsockname");
        accepted.write_all(b"hello").unwrap();
        drop(accepted);
        let mut text = String::new();
        TcpStream::from(application).read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello", "{way:?}");
    }
    assert_eq!(world.count(Reason::Captured), cases.len() as u64);
}
