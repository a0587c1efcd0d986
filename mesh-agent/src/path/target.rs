//! Where a source's bytes go: an application of this node, a plain address, a tunnel of requests, or a flow in one.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Buf, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use super::deliver::AppStream;
use crate::{
    l7::Wire,
    net,
    relay::Duplex,
    tunnel::{FlowStream, PooledTransport, ResetReason},
};

/// A connection to a destination, with the bytes that were read from it too early.
pub struct TargetStream {
    kind: Kind,
    early: BytesMut,
}

/// What stands at the other end.
pub enum Kind {
    /// An application of this node.
    App(AppStream),
    /// A destination that is not in the mesh.
    Plain(TcpStream),
    /// A tunnel of requests to a peer.
    Tunnel(PooledTransport),
    /// A flow in a tunnel to a peer.
    Flow(FlowStream),
}

impl TargetStream {
    /// A connection from which nothing was read.
    pub fn new(kind: Kind) -> TargetStream {
        TargetStream {
            kind,
            early: BytesMut::new(),
        }
    }

    /// Whether an idle connection that is not a tunnel's may carry another request.
    pub fn is_quiet(&self) -> bool {
        self.early.is_empty()
            && match &self.kind {
                Kind::App(app) => app.is_quiet(),
                Kind::Plain(stream) => {
                    let mut byte = [0u8; 1];
                    matches!(stream.try_read(&mut byte), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
                }
                Kind::Tunnel(_) | Kind::Flow(_) => false,
            }
    }

    /// What stands at the other end, if nothing is left that was read too early.
    pub fn into_kind(self) -> Option<Kind> {
        self.early.is_empty().then_some(self.kind)
    }
}

macro_rules! each {
    ($this:expr, $stream:ident => $call:expr) => {
        match &mut $this.get_mut().kind {
            Kind::App($stream) => $call,
            Kind::Plain($stream) => $call,
            Kind::Tunnel($stream) => $call,
            Kind::Flow($stream) => $call,
        }
    };
}

impl AsyncRead for TargetStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.early.has_remaining() {
            let n = self.early.len().min(buf.remaining());
            buf.put_slice(&self.early.split_to(n));
            return Poll::Ready(Ok(()));
        }
        each!(self, stream => Pin::new(stream).poll_read(cx, buf))
    }
}

impl AsyncWrite for TargetStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        each!(self, stream => Pin::new(stream).poll_write(cx, buf))
    }
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        each!(self, stream => Pin::new(stream).poll_write_vectored(cx, bufs))
    }
    fn is_write_vectored(&self) -> bool {
        true
    }
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, stream => Pin::new(stream).poll_flush(cx))
    }
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, stream => Pin::new(stream).poll_shutdown(cx))
    }
}

impl Duplex for TargetStream {
    fn reset(&mut self) {
        match &mut self.kind {
            Kind::App(app) => net::reset_on_close(app.tcp()),
            Kind::Plain(stream) => net::reset_on_close(stream),
            Kind::Tunnel(tunnel) => tunnel.abort(),
            Kind::Flow(flow) => flow.reset(ResetReason::Reset),
        }
    }
}

impl Wire for TargetStream {
    fn abort(&mut self) {
        Duplex::reset(self);
    }

    fn unread(&mut self, bytes: &[u8]) {
        let rest = std::mem::take(&mut self.early);
        self.early.extend_from_slice(bytes);
        self.early.extend_from_slice(&rest);
    }
}
