//! One flow in a tunnel: payload both ways, an end for each side, or a reset for both.
//!
//! A [`FlowStream`] owns its tunnel. Dropped after both sides ended, it gives the tunnel back to where it came from
//! (the source's pool, the destination's loop); dropped before, it closes it, and the other side reads a reset. The
//! source's preface waits for the first payload so that both leave in one record; a source that has nothing to say
//! sends it as soon as it reads.

use std::{
    cell::RefCell,
    future::poll_fn,
    io::{self, IoSlice},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{
    frame::{DATA_BYTES_MAX, FrameDefect, HEAD_BYTES, Head, Reader, Reading, ResetReason},
    pool::Leased,
    preface::{PREFACE_BYTES, Preface},
};
use crate::{identity::PeerIdentity, tls::TlsStream};

/// What can end a flow beside its own two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FlowError {
    /// The destination refused the flow before it took it.
    #[error("the destination refused the flow: {0:?}")]
    Refused(ResetReason),
    /// The other side reset the flow.
    #[error("the flow was reset: {0:?}")]
    Reset(ResetReason),
    /// The peer sent something that is no frame.
    #[error("the peer broke the flow's framing: {0}")]
    Defect(#[from] FrameDefect),
}

impl From<FlowError> for io::Error {
    fn from(error: FlowError) -> io::Error {
        let kind = match error {
            FlowError::Refused(_) => io::ErrorKind::ConnectionRefused,
            FlowError::Reset(_) => io::ErrorKind::ConnectionReset,
            FlowError::Defect(_) => io::ErrorKind::InvalidData,
        };
        io::Error::new(kind, error)
    }
}

impl FlowError {
    /// The flow's own error inside an I/O error, if that is what it is.
    pub fn of(error: &io::Error) -> Option<FlowError> {
        error.get_ref()?.downcast_ref::<FlowError>().copied()
    }
}

/// Where a destination's tunnel waits between two flows.
pub(super) type Home = Rc<RefCell<Option<Box<TlsStream>>>>;

/// What becomes of the tunnel after the flow.
pub(super) enum Origin {
    /// Back to the source's pool.
    Pool(Leased),
    /// Back to the destination's loop.
    Server(Home),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writing {
    Open,
    Ended,
    Reset,
}

/// A flow and the tunnel that it has to itself.
pub struct FlowStream {
    inner: Box<Inner>,
}

struct Inner {
    /// Present until the drop.
    tls: Option<Box<TlsStream>>,
    origin: Option<Origin>,
    reader: Reader,
    writing: Writing,
    preface: Option<[u8; PREFACE_BYTES]>,
    reused: bool,
    /// The destination has sent nothing yet, so the source does not know that the flow was taken.
    unconfirmed: bool,
}

impl FlowStream {
    /// The source's end of a new flow.
    pub(super) fn source(tls: Box<TlsStream>, lease: Leased, preface: &Preface, reused: bool) -> FlowStream {
        FlowStream::new(
            tls,
            Origin::Pool(lease),
            Reader::new(),
            Some(preface.to_bytes()),
            reused,
        )
    }

    /// The destination's end.
    pub(super) fn destination(tls: Box<TlsStream>, home: Home) -> FlowStream {
        FlowStream::new(tls, Origin::Server(home), Reader::open(), None, false)
    }

    fn new(
        tls: Box<TlsStream>,
        origin: Origin,
        reader: Reader,
        preface: Option<[u8; PREFACE_BYTES]>,
        reused: bool,
    ) -> FlowStream {
        let inner = Inner {
            tls: Some(tls),
            unconfirmed: matches!(origin, Origin::Server(_)),
            origin: Some(origin),
            reader,
            writing: Writing::Open,
            preface,
            reused,
        };
        FlowStream { inner: Box::new(inner) }
    }

    /// Who is at the other end.
    pub fn peer(&self) -> Option<&PeerIdentity> {
        self.inner.tls.as_ref()?.peer()
    }

    /// Whether the tunnel carried another flow before: it may have been closed under us.
    pub fn is_reused(&self) -> bool {
        self.inner.reused
    }

    /// Sends the preface and waits until the destination took the flow or refused it. Only a flow whose preface asks
    /// for confirmation is sure to be answered before the application speaks. What came of payload stays to be read.
    pub async fn accepted(&mut self) -> io::Result<()> {
        poll_fn(|cx| self.inner.poll_accepted(cx)).await
    }

    /// Ends the flow both ways at once. Best effort: if the reason cannot be sent, the closing tunnel says as much.
    pub fn reset(&mut self, reason: ResetReason) {
        self.inner.reset(reason);
    }

    pub(super) fn accept_now(&mut self) -> io::Result<()> {
        self.inner.unconfirmed = false;
        self.inner.tls()?.write_now(&Head::Accept.to_bytes())
    }
}

impl Inner {
    fn tls(&mut self) -> io::Result<&mut TlsStream> {
        self.tls
            .as_deref_mut()
            .ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    fn read_failure(&self) -> Option<io::Error> {
        match self.reader.state() {
            Reading::Reset { reason, refused: true } => Some(FlowError::Refused(reason).into()),
            Reading::Reset { reason, refused: false } => Some(FlowError::Reset(reason).into()),
            Reading::Waiting | Reading::Open | Reading::Ended => None,
        }
    }

    fn poll_preface(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(preface) = self.preface {
            ready!(self.tls()?.poll_write_whole(cx, &[IoSlice::new(&preface)]))?;
            self.preface = None;
        }
        Poll::Ready(Ok(()))
    }

    /// Reads once from the tunnel into `buf` and strips the heads. Returns whether payload or an end came.
    fn poll_frames(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(self.tls()?).poll_read(cx, buf))?;
        let piece = buf.filled_mut().get_mut(before..).unwrap_or_default();
        if piece.is_empty() {
            // The tunnel ended within the flow.
            return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
        }
        let stripped = self.reader.strip(piece).map_err(FlowError::Defect)?;
        if let Some(rest) = piece.get(stripped.consumed..)
            && !rest.is_empty()
            && let Some(tls) = &mut self.tls
        {
            tls.unread(rest);
        }
        buf.set_filled(before + stripped.payload);
        Poll::Ready(Ok(()))
    }

    fn poll_accepted(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_preface(cx))?;
        ready!(Pin::new(self.tls()?).poll_flush(cx))?;
        while self.reader.state() == Reading::Waiting {
            // Exactly what is missing of the head, so that payload stays where it is.
            let mut head = [0; HEAD_BYTES];
            let missing = head.get_mut(..self.reader.head_missing()).unwrap_or_default();
            let mut buf = ReadBuf::new(missing);
            ready!(self.poll_frames(cx, &mut buf))?;
        }
        Poll::Ready(self.read_failure().map_or(Ok(()), Err))
    }

    fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        ready!(self.poll_preface(cx))?;
        let before = buf.filled().len();
        loop {
            if let Some(error) = self.read_failure() {
                return Poll::Ready(Err(error));
            }
            if self.reader.state() == Reading::Ended {
                return Poll::Ready(Ok(()));
            }
            ready!(self.poll_frames(cx, buf))?;
            if buf.filled().len() > before {
                return Poll::Ready(Ok(()));
            }
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        if self.writing != Writing::Open {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let room = DATA_BYTES_MAX - self.preface.map_or(0, |preface| preface.len());
        let data = data.get(..room).unwrap_or(data);
        let length = match u16::try_from(data.len()) {
            Ok(0) | Err(_) => return Poll::Ready(Ok(0)),
            Ok(length) => length,
        };
        let head = Head::Data(length).to_bytes();
        let preface = self.preface;
        let slices = [
            IoSlice::new(preface.as_ref().map_or(&[], |preface| preface.as_slice())),
            IoSlice::new(&head),
            IoSlice::new(data),
        ];
        ready!(self.tls()?.poll_write_whole(cx, &slices))?;
        (self.preface, self.unconfirmed) = (None, false);
        Poll::Ready(Ok(data.len()))
    }

    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_preface(cx))?;
        if self.writing == Writing::Open {
            ready!(self.tls()?.poll_write_whole(cx, &[IoSlice::new(&Head::End.to_bytes())]))?;
            self.writing = Writing::Ended;
        }
        Pin::new(self.tls()?).poll_flush(cx)
    }

    fn reset(&mut self, reason: ResetReason) {
        if self.preface.take().is_none() && self.writing != Writing::Reset && self.read_failure().is_none() {
            // A flow that was taken and then reset was not refused: the source must be able to tell.
            let accept = if self.unconfirmed {
                &Head::Accept.to_bytes()[..]
            } else {
                &[]
            };
            let frames = [accept, &Head::Reset(reason).to_bytes()].concat();
            if let Some(tls) = &mut self.tls {
                let _ = tls.write_now(&frames);
            }
        }
        self.writing = Writing::Reset;
    }

    fn is_clean(&self) -> bool {
        let unused = self.preface.is_some() && self.writing == Writing::Open;
        let both_ended = self.writing == Writing::Ended && self.reader.state() == Reading::Ended;
        let settled = self.tls.as_ref().is_some_and(|tls| tls.is_settled());
        (unused || both_ended) && settled
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let clean = self.is_clean();
        let (Some(mut tls), Some(origin)) = (self.tls.take(), self.origin.take()) else {
            return;
        };
        match origin {
            Origin::Pool(lease) if clean && !self.reader.is_retired() => lease.give_back(tls),
            Origin::Server(home) if clean => *home.borrow_mut() = Some(tls),
            Origin::Pool(_) | Origin::Server(_) => {
                // A flow that was cut must not look whole: without its end frame, the closing tunnel is a reset.
                tls.close_now();
            }
        }
    }
}

impl AsyncRead for FlowStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.get_mut().inner.poll_read(cx, buf)
    }
}

impl AsyncWrite for FlowStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.get_mut().inner.poll_write(cx, data)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let inner = &mut *self.get_mut().inner;
        ready!(inner.poll_preface(cx))?;
        Pin::new(inner.tls()?).poll_flush(cx)
    }

    /// Half-close: the other side reads an end, reading goes on here.
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().inner.poll_end(cx)
    }
}

impl std::fmt::Debug for FlowStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FlowStream")
            .field("peer", &self.peer())
            .field("reading", &self.inner.reader.state())
            .field("writing", &self.inner.writing)
            .finish_non_exhaustive()
    }
}
