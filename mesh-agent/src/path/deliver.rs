//! The last step at the destination: a connection to the application, in its own network namespace, that shows it the
//! source's address. Takes a [`Permit`], so that nothing is delivered which was not authorized.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use mesh_api::authz::Permit;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpSocket, TcpStream},
};

use crate::{
    event::Refusal,
    kernel::{Kernel, PeerGuard},
    net,
    pods::Pod,
};

/// A connection to an application of this node.
pub struct AppStream {
    stream: TcpStream,
    _shown: PeerGuard,
}

impl std::fmt::Debug for AppStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.stream.fmt(f)
    }
}

/// Connects to `address`, one of the pod's own; the application sees `source` as its peer.
pub async fn connect(
    kernel: &Kernel,
    pod: &Arc<Pod>,
    address: SocketAddr,
    source: SocketAddr,
    timeout: Duration,
    _permit: &Permit,
) -> Result<AppStream, Refusal> {
    let (socket, local) = bound(pod, address.ip()).map_err(|error| {
        tracing::warn!(%error, pod = %pod.name(), "a socket in the pod");
        Refusal::DialSocket
    })?;
    let shown = kernel.present_peer(pod.cookie(), local, source).map_err(|error| {
        tracing::warn!(%error, pod = %pod.name(), "presenting a source");
        Refusal::Capacity
    })?;
    match tokio::time::timeout(timeout, socket.connect(address)).await {
        Err(_) => Err(Refusal::DialTimeout),
        Ok(Err(error)) => Err(dial_refusal(&error)),
        Ok(Ok(stream)) => {
            net::tune(&stream);
            Ok(AppStream { stream, _shown: shown })
        }
    }
}

/// A socket that the kernel programs let through to the application, at a port of the kernel's choice.
///
/// Whoever ends a connection first keeps its port in TIME-WAIT for a minute. To one address of the application that
/// would leave the agent 28,000 connections a minute if it called from one address too, so over IPv4 it calls from all
/// of 127.64.0.0/10. IPv6 has one loopback address; there it calls from the pod's own.
fn bound(pod: &Pod, ip: IpAddr) -> io::Result<(TcpSocket, SocketAddr)> {
    let socket = pod.socket(ip.is_ipv6())?;
    let from = match ip {
        IpAddr::V4(_) => {
            let [a, b, c, _] = rand::random::<u32>().to_be_bytes();
            IpAddr::V4(Ipv4Addr::new(127, 64 | (a & 0x3f), b, 1 | c))
        }
        IpAddr::V6(_) => ip,
    };
    socket.bind(SocketAddr::new(from, 0))?;
    let local = socket.local_addr()?;
    Ok((socket, local))
}

/// What a failed `connect()` is called.
pub fn dial_refusal(error: &io::Error) -> Refusal {
    match error.kind() {
        io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset => Refusal::DialRefused,
        io::ErrorKind::TimedOut => Refusal::DialTimeout,
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable | io::ErrorKind::NetworkDown => {
            Refusal::DialUnreachable
        }
        _ => Refusal::DialSocket,
    }
}

impl AppStream {
    /// The socket.
    pub fn tcp(&self) -> &TcpStream {
        &self.stream
    }

    /// Whether an idle connection is still open, with nothing unexpected to read.
    pub fn is_quiet(&self) -> bool {
        let mut byte = [0u8; 1];
        matches!(self.stream.try_read(&mut byte), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }
}

impl AsyncRead for AppStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for AppStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }
    fn is_write_vectored(&self) -> bool {
        true
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
