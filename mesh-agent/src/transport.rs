//! The byte stream under everything: a TCP socket, bare or under TLS, with the bytes that were already read from it.
//!
//! Sniffing reads before it knows who should have read; what it read is put back as a prefix and every later reader
//! sees the stream from its first byte. Nothing here decides anything: identity and policy are judged by the callers.

use std::{
    io::{self, IoSlice},
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Buf, BytesMut};
use mesh_api::identity::SpiffeId;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use crate::{net, tls::TlsStream};

/// A connection as the stages of the path see it.
#[derive(Debug)]
pub enum Transport {
    /// A bare socket and what was read from it before.
    Tcp {
        /// The socket.
        stream: TcpStream,
        /// Bytes that come before those in the socket.
        prefix: BytesMut,
    },
    /// A socket under TLS. Its prefix is held inside, as plaintext not yet read.
    Tls(Box<TlsStream>),
}

impl Transport {
    /// A bare socket whose first bytes were already read.
    pub fn from_tcp(stream: TcpStream, prefix: BytesMut) -> Transport {
        Transport::Tcp { stream, prefix }
    }

    /// A connection under TLS, after its handshake.
    pub fn from_tls(stream: TlsStream) -> Transport {
        Transport::Tls(Box::new(stream))
    }

    /// The identity that the peer proved; none on a bare socket.
    pub fn peer_identity(&self) -> Option<&SpiffeId> {
        match self {
            Transport::Tcp { .. } => None,
            Transport::Tls(tls) => tls.peer().map(|peer| &peer.spiffe),
        }
    }

    /// The other end's address.
    pub fn peer_address(&self) -> io::Result<SocketAddr> {
        self.tcp().peer_addr()
    }

    /// The socket itself.
    pub fn tcp(&self) -> &TcpStream {
        match self {
            Transport::Tcp { stream, .. } => stream,
            Transport::Tls(tls) => tls.tcp(),
        }
    }

    /// Makes the coming close a reset.
    pub fn set_linger_reset(&self) {
        net::reset_on_close(self.tcp());
    }

    /// Puts bytes back in front of the stream.
    pub fn unread(&mut self, bytes: &[u8]) {
        match self {
            Transport::Tcp { prefix, .. } => {
                let rest = std::mem::take(prefix);
                prefix.reserve(bytes.len() + rest.len());
                prefix.extend_from_slice(bytes);
                prefix.extend_from_slice(&rest);
            }
            Transport::Tls(tls) => tls.unread(bytes),
        }
    }

    /// The socket and its prefix, if there is no TLS on it.
    pub fn into_tcp(self) -> Result<(TcpStream, BytesMut), Transport> {
        match self {
            Transport::Tcp { stream, prefix } => Ok((stream, prefix)),
            tls => Err(tls),
        }
    }
}

impl AsyncRead for Transport {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Transport::Tcp { stream, prefix } if prefix.is_empty() => Pin::new(stream).poll_read(cx, buf),
            Transport::Tcp { prefix, .. } => {
                let n = prefix.len().min(buf.remaining());
                buf.put_slice(&prefix.split_to(n));
                if !prefix.has_remaining() {
                    *prefix = BytesMut::new();
                }
                Poll::Ready(Ok(()))
            }
            Transport::Tls(tls) => Pin::new(&mut **tls).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Transport {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Transport::Tcp { stream, .. } => Pin::new(stream).poll_write(cx, buf),
            Transport::Tls(tls) => Pin::new(&mut **tls).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Transport::Tcp { stream, .. } => Pin::new(stream).poll_write_vectored(cx, bufs),
            Transport::Tls(tls) => Pin::new(&mut **tls).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Transport::Tcp { stream, .. } => Pin::new(stream).poll_flush(cx),
            Transport::Tls(tls) => Pin::new(&mut **tls).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Transport::Tcp { stream, .. } => Pin::new(stream).poll_shutdown(cx),
            Transport::Tls(tls) => Pin::new(&mut **tls).poll_shutdown(cx),
        }
    }
}
