//! TLS over a TCP socket, on rustls' unbuffered API.
//!
//! The buffers for reading and sealing belong to the thread, 64 KiB each; a connection keeps only what is left over
//! between two polls (a part of a record, plaintext that found no room, bytes that the socket did not take) and frees
//! that when it is empty. So an idle connection costs the session's keys and little else, and a busy one moves 64 KiB
//! with two system calls.
//!
//! A stream that ends without `close_notify` is an error here, never an end: a truncated transfer must not look whole.
//! Who the peer is gets decided by `identity::verify`; this file only carries the answer.

mod session;

use std::{
    cell::RefCell,
    fmt,
    future::poll_fn,
    io::{self, IoSlice},
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use rustls::{
    ClientConfig, ServerConfig,
    client::UnbufferedClientConnection,
    pki_types::{CertificateDer, ServerName},
    server::UnbufferedServerConnection,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use crate::{identity::PeerIdentity, kernel::lost};

use session::{LeftOver, Session, Stepped, Then};

/// Plaintext that one write seals at most: four full records.
const SEAL_BYTES_MAX: usize = 64 * 1024;
/// The thread's buffer for sealed records: what [`SEAL_BYTES_MAX`] becomes, and room for a key update.
const OUTPUT_BYTES: usize = SEAL_BYTES_MAX + 2048;
/// The thread's buffer for incoming records: one read of 64 KiB behind the rest of a record, or the largest handshake
/// message that rustls takes (64 KiB).
const INPUT_BYTES: usize = 64 * 1024 + 18 * 1024;

/// Room for one small sealed message: a frame's head or an alert, and a key update before it.
const SMALL_RECORD_BYTES: usize = 256;

struct Scratch {
    input: Box<[u8]>,
    output: Box<[u8]>,
    gather: Vec<u8>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        input: vec![0; INPUT_BYTES].into_boxed_slice(),
        output: vec![0; OUTPUT_BYTES].into_boxed_slice(),
        gather: Vec::new(),
    });
}

/// Why a TLS connection did not come about.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The peer broke the protocol, or its certificate was not accepted, or it did not accept ours.
    #[error("TLS: {0}")]
    Tls(rustls::Error),
    /// The socket failed or ended.
    #[error("the connection failed in the handshake")]
    Io(#[source] io::Error),
    /// The peer took too long.
    #[error("no handshake within {0:?}")]
    Timeout(Duration),
}

/// Something small to be sealed at once.
enum Small<'a> {
    Data(&'a [u8]),
    Close,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ReadSide {
    Open,
    /// `close_notify` was received: a true end.
    Ended,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WriteSide {
    Open,
    /// `close_notify` is sealed, perhaps not sent yet.
    Ending,
    Ended,
}

/// A TCP stream under TLS 1.3.
pub struct TlsStream {
    /// Before the socket, so that it is dropped before it.
    watch: Option<lost::Watch>,
    tcp: TcpStream,
    session: Session,
    /// Sealed bytes from the peer that do not make a whole record yet. Never holds a whole record.
    incoming: Vec<u8>,
    /// Plaintext not read yet.
    plain: LeftOver,
    /// Sealed bytes that the socket did not take yet.
    outgoing: LeftOver,
    read_side: ReadSide,
    write_side: WriteSide,
    failed: Option<rustls::Error>,
    peer: Option<Box<PeerIdentity>>,
}

impl TlsStream {
    /// Opens a session on a connected socket: `name` selects the session to resume, the identity is judged afterwards.
    pub async fn connect(
        tcp: TcpStream,
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
        timeout: Duration,
    ) -> Result<TlsStream, HandshakeError> {
        let session = UnbufferedClientConnection::new(config, name).map_err(HandshakeError::Tls)?;
        TlsStream::new(tcp, Session::Client(Box::new(session)), &[])
            .shake_hands(timeout)
            .await
    }

    /// Takes a session on an accepted socket whose first bytes (`prefix`) were already read.
    pub async fn accept(
        tcp: TcpStream,
        prefix: &[u8],
        config: Arc<ServerConfig>,
        timeout: Duration,
    ) -> Result<TlsStream, HandshakeError> {
        let session = UnbufferedServerConnection::new(config).map_err(HandshakeError::Tls)?;
        TlsStream::new(tcp, Session::Server(Box::new(session)), prefix)
            .shake_hands(timeout)
            .await
    }

    fn new(tcp: TcpStream, session: Session, prefix: &[u8]) -> TlsStream {
        TlsStream {
            watch: None,
            tcp,
            session,
            incoming: prefix.to_vec(),
            plain: LeftOver::default(),
            outgoing: LeftOver::default(),
            read_side: ReadSide::Open,
            write_side: WriteSide::Open,
            failed: None,
            peer: None,
        }
    }

    /// The socket.
    pub fn tcp(&self) -> &TcpStream {
        &self.tcp
    }

    /// The other end's address.
    pub fn peer_address(&self) -> io::Result<SocketAddr> {
        self.tcp.peer_addr()
    }

    /// The peer's certificates, leaf first. On a resumed session they are those of the session's first handshake, and
    /// no verifier saw them again.
    pub fn peer_certificates(&self) -> &[CertificateDer<'static>] {
        self.session.peer_certificates()
    }

    /// The protocol agreed on.
    pub fn alpn(&self) -> Option<&[u8]> {
        self.session.alpn()
    }

    /// Whether the handshake resumed an earlier session.
    pub fn is_resumed(&self) -> bool {
        self.session.is_resumed()
    }

    /// Who the peer proved to be, once [`TlsStream::set_peer`] was told.
    pub fn peer(&self) -> Option<&PeerIdentity> {
        self.peer.as_deref()
    }

    /// Gives the connection up when the peer is silent for too long.
    pub fn watch(&mut self, patience: Duration) {
        self.watch = Some(lost::watch(&self.tcp, patience));
    }

    /// Notes who the peer proved to be.
    pub fn set_peer(&mut self, peer: PeerIdentity) {
        self.peer = Some(Box::new(peer));
    }

    /// Puts plaintext back in front of the stream.
    pub fn unread(&mut self, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.plain.push_front(bytes);
        }
    }

    async fn shake_hands(mut self, timeout: Duration) -> Result<TlsStream, HandshakeError> {
        match tokio::time::timeout(timeout, poll_fn(|cx| self.poll_handshake(cx))).await {
            Ok(Ok(())) => Ok(self),
            Ok(Err(error)) => Err(match self.failed.take() {
                Some(tls) => HandshakeError::Tls(tls),
                None => HandshakeError::Io(error),
            }),
            Err(_) => Err(HandshakeError::Timeout(timeout)),
        }
    }

    fn poll_handshake(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            // What lies in `incoming` is either the prefix or a part of a message: both are safe to look at again.
            let mut incoming = std::mem::take(&mut self.incoming);
            let stepped = self.session.step(
                &mut incoming,
                |bytes| self.plain.push(bytes),
                &mut self.outgoing,
                Then::Nothing,
            );
            incoming.drain(..stepped.consumed);
            self.incoming = incoming;
            self.note(&stepped);
            let written = self.poll_outgoing(cx)?;
            if let Some(error) = &self.failed {
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, error.clone())));
            }
            ready!(written);
            if !self.session.is_handshaking() {
                self.free_incoming();
                return Poll::Ready(Ok(()));
            }
            if ready!(self.poll_fill(cx))? == 0 {
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
        }
    }

    fn note(&mut self, stepped: &Stepped) {
        if stepped.peer_closed {
            self.read_side = ReadSide::Ended;
        }
        if let Some(error) = &stepped.failed {
            self.failed.get_or_insert_with(|| error.clone());
        }
    }

    fn free_incoming(&mut self) {
        if self.incoming.is_empty() {
            self.incoming = Vec::new();
        }
    }

    /// Reads once from the socket to the end of `incoming`. Handshake only.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        SCRATCH.with_borrow_mut(|scratch| {
            if self.incoming.len() >= INPUT_BYTES {
                return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
            }
            let mut buf = ReadBuf::new(&mut scratch.input);
            ready!(Pin::new(&mut self.tcp).poll_read(cx, &mut buf))?;
            self.incoming.extend_from_slice(buf.filled());
            Poll::Ready(Ok(buf.filled().len()))
        })
    }

    /// Gives the socket what waits for it.
    fn poll_outgoing(&mut self, cx: &mut Context<'_>) -> io::Result<Poll<()>> {
        while !self.outgoing.is_empty() {
            match Pin::new(&mut self.tcp).poll_write(cx, self.outgoing.as_slice()) {
                Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(Ok(n)) => self.outgoing.advance(n),
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => return Ok(Poll::Pending),
            }
        }
        Ok(Poll::Ready(()))
    }

    /// Offers the socket what waits for it without waiting: used where the task's write waker is somebody else's.
    fn try_outgoing(&mut self) {
        while !self.outgoing.is_empty() {
            match self.tcp.try_write(self.outgoing.as_slice()) {
                Ok(n) if n > 0 => self.outgoing.advance(n),
                _ => return,
            }
        }
    }

    fn failure(&self) -> Option<io::Error> {
        self.failed
            .as_ref()
            .map(|error| io::Error::new(io::ErrorKind::InvalidData, error.clone()))
    }

    /// One read of the socket, opened. Returns whether plaintext or the end came out of it.
    fn poll_open(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut Scratch,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<bool>> {
        let kept = self.incoming.len();
        let Some(front) = scratch.input.get_mut(..kept) else {
            return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
        };
        front.copy_from_slice(&self.incoming);
        let mut input = ReadBuf::new(&mut scratch.input);
        input.set_filled(kept);
        if input.remaining() == 0 {
            return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
        }
        ready!(Pin::new(&mut self.tcp).poll_read(cx, &mut input))?;
        let filled = input.filled().len();
        if filled == kept {
            // An end without close_notify: somebody cut the stream.
            return Poll::Ready(Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "ended without close_notify",
            )));
        }
        let before = buf.filled().len();
        let input = scratch.input.get_mut(..filled).unwrap_or_default();
        let plain = &mut self.plain;
        let take = |bytes: &[u8]| {
            let (now, later) = bytes.split_at(bytes.len().min(buf.remaining()));
            buf.put_slice(now);
            plain.push(later);
        };
        let stepped = self.session.step(input, take, &mut self.outgoing, Then::Nothing);
        self.incoming.clear();
        self.incoming
            .extend_from_slice(input.get(stepped.consumed..).unwrap_or_default());
        self.free_incoming();
        self.note(&stepped);
        self.try_outgoing();
        Poll::Ready(Ok(buf.filled().len() > before || self.read_side == ReadSide::Ended))
    }

    /// Seals `data` and offers it to the socket. Everything is taken; what the socket refuses waits in `outgoing`.
    fn seal(&mut self, cx: &mut Context<'_>, data: &[u8], output: &mut [u8]) -> io::Result<usize> {
        let data = data.get(..SEAL_BYTES_MAX).unwrap_or(data);
        let stepped = self.session.step(
            &mut self.incoming,
            |bytes| self.plain.push(bytes),
            &mut self.outgoing,
            Then::Seal { data, into: output },
        );
        self.incoming.drain(..stepped.consumed);
        self.note(&stepped);
        if let Some(error) = self.failure() {
            return Err(error);
        }
        if !stepped.done {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let mut sealed = output.get(..stepped.sealed).unwrap_or_default();
        // Replies of the session were sealed before and must leave before.
        if self.poll_outgoing(cx)?.is_ready() {
            while !sealed.is_empty() {
                match Pin::new(&mut self.tcp).poll_write(cx, sealed) {
                    Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                    Poll::Ready(Ok(n)) => sealed = sealed.get(n..).unwrap_or_default(),
                    Poll::Ready(Err(error)) => return Err(error),
                    Poll::Pending => break,
                }
            }
        }
        self.outgoing.push(sealed);
        Ok(data.len())
    }

    /// Takes all of `slices` ([`SEAL_BYTES_MAX`] together at most) or nothing yet: a head and its payload are never parted
    /// by a pending write.
    pub(crate) fn poll_write_whole(&mut self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<()>> {
        let total: usize = slices.iter().map(|slice| slice.len()).sum();
        if total > SEAL_BYTES_MAX {
            return Poll::Ready(Err(io::ErrorKind::InvalidInput.into()));
        }
        ready!(Pin::new(self).poll_write_vectored(cx, slices))?;
        Poll::Ready(Ok(()))
    }

    /// Seals a few bytes and offers them to the socket without waiting. What it does not take leaves with the next
    /// write or flush.
    pub(crate) fn write_now(&mut self, data: &[u8]) -> io::Result<()> {
        if self.write_side != WriteSide::Open {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.say(Small::Data(data))
    }

    /// Ends the session in good order as far as that goes without waiting; for streams that are about to be dropped.
    pub(crate) fn close_now(&mut self) {
        if self.write_side == WriteSide::Open {
            self.write_side = WriteSide::Ending;
            let _ = self.say(Small::Close);
        }
    }

    /// Seals something small behind what waits for the socket and offers it all.
    fn say(&mut self, what: Small<'_>) -> io::Result<()> {
        if let Some(error) = self.failure() {
            return Err(error);
        }
        let mut sealed = [0u8; SMALL_RECORD_BYTES];
        let then = match what {
            Small::Data(data) => Then::Seal {
                data,
                into: &mut sealed,
            },
            Small::Close => Then::Close { into: &mut sealed },
        };
        let stepped = self.session.step(
            &mut self.incoming,
            |bytes| self.plain.push(bytes),
            &mut self.outgoing,
            then,
        );
        self.incoming.drain(..stepped.consumed);
        self.note(&stepped);
        if let Some(error) = self.failure() {
            return Err(error);
        }
        self.outgoing.push(sealed.get(..stepped.sealed).unwrap_or_default());
        self.try_outgoing();
        Ok(())
    }

    /// Whether an idle stream is still good: open, and with nothing unexpected to read. Session tickets are taken in on
    /// the way. Must not be called while a task waits to read: it takes the reader's place.
    pub(crate) fn is_quiet(&mut self) -> bool {
        let mut byte = [0u8; 1];
        let mut buf = ReadBuf::new(&mut byte);
        let mut cx = Context::from_waker(std::task::Waker::noop());
        Pin::new(self).poll_read(&mut cx, &mut buf).is_pending()
    }

    /// Open both ways, without a failure, and everything written is with the socket.
    pub(crate) fn is_settled(&self) -> bool {
        self.failed.is_none()
            && self.outgoing.is_empty()
            && self.read_side == ReadSide::Open
            && self.write_side == WriteSide::Open
    }

    fn poll_writable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(error) = self.failure() {
            return Poll::Ready(Err(error));
        }
        if self.write_side != WriteSide::Open {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        ready!(self.poll_outgoing(cx)?);
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for TlsStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        loop {
            if !this.plain.is_empty() {
                let n = this.plain.as_slice().len().min(buf.remaining());
                buf.put_slice(this.plain.as_slice().get(..n).unwrap_or_default());
                this.plain.advance(n);
                return Poll::Ready(Ok(()));
            }
            if this.read_side == ReadSide::Ended {
                return Poll::Ready(Ok(()));
            }
            if let Some(error) = this.failure() {
                return Poll::Ready(Err(error));
            }
            if ready!(SCRATCH.with_borrow_mut(|scratch| this.poll_open(cx, scratch, buf)))? {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl AsyncWrite for TlsStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_writable(cx))?;
        if data.is_empty() {
            return Poll::Ready(Ok(0));
        }
        Poll::Ready(SCRATCH.with_borrow_mut(|scratch| this.seal(cx, data, &mut scratch.output)))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut filled = slices.iter().filter(|slice| !slice.is_empty());
        match (filled.next(), filled.next()) {
            (None, _) => self.poll_write(cx, &[]),
            (Some(only), None) => self.poll_write(cx, only),
            _ => {
                let this = self.get_mut();
                ready!(this.poll_writable(cx))?;
                Poll::Ready(SCRATCH.with_borrow_mut(|Scratch { output, gather, .. }| {
                    // One record for a head and its body, not one each.
                    gather.clear();
                    for slice in slices {
                        let room = SEAL_BYTES_MAX - gather.len();
                        gather.extend_from_slice(slice.get(..room).unwrap_or(slice));
                    }
                    this.seal(cx, gather, output)
                }))
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_outgoing(cx)?);
        Poll::Ready(Ok(()))
    }

    /// Sends `close_notify`, then a FIN. Reading goes on until the peer does the same.
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.write_side == WriteSide::Open {
            this.write_side = WriteSide::Ending;
            // A session that failed has nothing left to say; the FIN says the rest.
            let _ = this.say(Small::Close);
        }
        ready!(this.poll_outgoing(cx)?);
        if this.write_side == WriteSide::Ending {
            ready!(Pin::new(&mut this.tcp).poll_shutdown(cx))?;
            this.write_side = WriteSide::Ended;
        }
        Poll::Ready(Ok(()))
    }
}

impl fmt::Debug for TlsStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsStream")
            .field("tcp", &self.tcp)
            .field("peer", &self.peer)
            .field("read_side", &self.read_side)
            .field("write_side", &self.write_side)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
