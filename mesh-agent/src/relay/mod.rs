//! Bytes both ways between two connections, in one task that owns both.
//!
//! Reads go into a buffer of the thread's, 64 KiB; a connection keeps memory only for what the other side did not take,
//! and then its own side is not read: that is all the back-pressure there is. An end on one side becomes an end on the
//! other, a reset becomes a reset, and nothing that looks like a clean end is ever made out of a failure. The relay ends
//! early when its `stop` future says so: then the permit is gone or the drain's patience is.

use std::{
    cell::{Cell, RefCell},
    future::Future,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Instant, Sleep},
};

use crate::{
    net,
    transport::Transport,
    tunnel::{FlowStream, PooledTransport, ResetReason},
};

/// Reads of one direction before the other one and other connections have their turn.
const TURNS_MAX: usize = 8;
/// What one read takes at most.
const BUFFER_BYTES: usize = 64 * 1024;

thread_local! {
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER_BYTES].into_boxed_slice());
}

/// A connection with two directions: `poll_shutdown` ends ours and leaves the other one open.
pub trait Duplex: AsyncRead + AsyncWrite + Unpin {
    /// Ends both directions so that the other side sees a reset, not an end.
    fn reset(&mut self);
}

impl Duplex for TcpStream {
    fn reset(&mut self) {
        net::reset_on_close(self);
    }
}

impl Duplex for Transport {
    fn reset(&mut self) {
        self.set_linger_reset();
    }
}

impl Duplex for PooledTransport {
    fn reset(&mut self) {
        self.abort();
    }
}

impl Duplex for FlowStream {
    fn reset(&mut self) {
        FlowStream::reset(self, ResetReason::Reset);
    }
}

impl<D: Duplex + ?Sized> Duplex for Box<D> {
    fn reset(&mut self) {
        (**self).reset();
    }
}

/// Bytes relayed so far; a permit's owner or a gauge may look while the relay runs.
#[derive(Debug, Default)]
pub struct Counters {
    sent: Cell<u64>,
    received: Cell<u64>,
}

impl Counters {
    /// From the first connection to the second.
    pub fn sent(&self) -> u64 {
        self.sent.get()
    }
    /// From the second connection to the first.
    pub fn received(&self) -> u64 {
        self.received.get()
    }
}

/// Why a relay is told to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The permit no longer holds.
    PermitLost,
    /// The agent goes away and waits no longer.
    Drained,
}

/// One of the two connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The first one.
    First,
    /// The second one.
    Second,
}

/// How a relay ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// Both sides ended.
    Closed,
    /// This side failed or was reset; the other one was reset in turn.
    Reset(Side),
    /// The permit no longer holds; both were reset.
    PermitLost,
    /// The agent went away; both were reset.
    Drained,
    /// Neither side said anything for the idle timeout; both were reset.
    IdleTimeout,
}

/// A relay's result.
#[derive(Debug)]
pub struct RelayEnd {
    /// Bytes from the first connection to the second.
    pub sent: u64,
    /// Bytes from the second connection to the first.
    pub received: u64,
    /// How it ended.
    pub how: How,
    /// The failure, where there was one.
    pub error: Option<io::Error>,
}

enum Failure {
    /// Reading from the direction's origin failed: it is dead.
    Read(io::Error),
    /// Writing to its target failed: the target takes nothing more, but may have said something before.
    Write(io::Error),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Moving,
    Ending,
    Done,
    /// The target takes nothing more.
    Broken,
}

/// One direction.
struct Lane {
    left: Vec<u8>,
    at: usize,
    phase: Phase,
    unflushed: bool,
}

impl Lane {
    fn new() -> Lane {
        Lane {
            left: Vec::new(),
            at: 0,
            phase: Phase::Moving,
            unflushed: false,
        }
    }

    /// Moves what there is to move. Ready when the direction is over.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut (impl AsyncRead + Unpin),
        to: &mut (impl AsyncWrite + Unpin),
        buffer: &mut [u8],
        count: &Cell<u64>,
        active: &mut bool,
    ) -> Poll<Result<(), Failure>> {
        for _ in 0..TURNS_MAX {
            match self.phase {
                Phase::Done | Phase::Broken => return Poll::Ready(Ok(())),
                Phase::Ending => {
                    return match Pin::new(&mut *to).poll_shutdown(cx) {
                        Poll::Ready(Ok(())) => {
                            self.phase = Phase::Done;
                            Poll::Ready(Ok(()))
                        }
                        // A target that is gone needs no end.
                        Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::NotConnected => {
                            self.phase = Phase::Done;
                            Poll::Ready(Ok(()))
                        }
                        Poll::Ready(Err(error)) => self.broken(error),
                        Poll::Pending => Poll::Pending,
                    };
                }
                Phase::Moving => {}
            }
            while let Some(waiting) = self.left.get(self.at..).filter(|waiting| !waiting.is_empty()) {
                match Pin::new(&mut *to).poll_write(cx, waiting) {
                    Poll::Ready(Ok(0)) => return self.broken(io::ErrorKind::WriteZero.into()),
                    Poll::Ready(Ok(n)) => {
                        self.at += n;
                        (self.unflushed, *active) = (true, true);
                        count.set(count.get() + n as u64);
                    }
                    Poll::Ready(Err(error)) => return self.broken(error),
                    Poll::Pending => return Poll::Pending,
                }
            }
            if self.at > 0 {
                (self.left, self.at) = (Vec::new(), 0);
            }

            let mut read = ReadBuf::new(buffer);
            match Pin::new(&mut *from).poll_read(cx, &mut read) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(Failure::Read(error))),
                Poll::Pending => {
                    if self.unflushed {
                        match Pin::new(&mut *to).poll_flush(cx) {
                            Poll::Ready(Ok(())) => self.unflushed = false,
                            Poll::Ready(Err(error)) => return self.broken(error),
                            Poll::Pending => {}
                        }
                    }
                    return Poll::Pending;
                }
            }
            let mut fresh = read.filled();
            if fresh.is_empty() {
                self.phase = Phase::Ending;
                continue;
            }
            *active = true;
            while !fresh.is_empty() {
                match Pin::new(&mut *to).poll_write(cx, fresh) {
                    Poll::Ready(Ok(0)) => return self.broken(io::ErrorKind::WriteZero.into()),
                    Poll::Ready(Ok(n)) => {
                        self.unflushed = true;
                        count.set(count.get() + n as u64);
                        fresh = fresh.get(n..).unwrap_or_default();
                    }
                    Poll::Ready(Err(error)) => return self.broken(error),
                    Poll::Pending => {
                        self.left = fresh.to_vec();
                        return Poll::Pending;
                    }
                }
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn broken(&mut self, error: io::Error) -> Poll<Result<(), Failure>> {
        (self.phase, self.left, self.at) = (Phase::Broken, Vec::new(), 0);
        Poll::Ready(Err(Failure::Write(error)))
    }
}

struct Relay<'a, A, B> {
    first: A,
    second: B,
    forth: Lane,
    back: Lane,
    counters: &'a Counters,
    /// A side that takes nothing more while what it said before is still on its way.
    failed: Option<(Side, io::Error)>,
}

impl<A: Duplex, B: Duplex> Relay<'_, A, B> {
    fn poll(&mut self, cx: &mut Context<'_>, active: &mut bool) -> Poll<(How, Option<io::Error>)> {
        BUFFER.with_borrow_mut(|buffer| {
            let (sent, received) = (&self.counters.sent, &self.counters.received);
            let forth = self
                .forth
                .poll(cx, &mut self.first, &mut self.second, buffer, sent, active);
            if let Poll::Ready(Err(failure)) = forth {
                match failure {
                    Failure::Read(error) => return Poll::Ready((How::Reset(Side::First), Some(error))),
                    Failure::Write(error) => _ = self.failed.get_or_insert((Side::Second, error)),
                }
            }
            let back = self
                .back
                .poll(cx, &mut self.second, &mut self.first, buffer, received, active);
            if let Poll::Ready(Err(failure)) = back {
                match failure {
                    Failure::Read(error) => return Poll::Ready((How::Reset(Side::Second), Some(error))),
                    Failure::Write(error) => _ = self.failed.get_or_insert((Side::First, error)),
                }
            }
            if self.forth.phase.is_over() && self.back.phase.is_over() {
                return Poll::Ready(match self.failed.take() {
                    Some((side, error)) => (How::Reset(side), Some(error)),
                    None => (How::Closed, None),
                });
            }
            Poll::Pending
        })
    }
}

impl Phase {
    fn is_over(self) -> bool {
        matches!(self, Phase::Done | Phase::Broken)
    }
}

/// An idle timer that is only moved when it fires: activity costs one store.
struct Idle {
    timeout: Duration,
    last: Instant,
    sleep: Pin<Box<Sleep>>,
}

impl Idle {
    fn new(timeout: Duration) -> Idle {
        Idle {
            timeout,
            last: Instant::now(),
            sleep: Box::pin(tokio::time::sleep(timeout)),
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>, active: bool) -> Poll<()> {
        if active {
            self.last = Instant::now();
        }
        while self.sleep.as_mut().poll(cx).is_ready() {
            let due = self.last + self.timeout;
            if Instant::now() >= due {
                return Poll::Ready(());
            }
            self.sleep.as_mut().reset(due);
        }
        Poll::Pending
    }
}

/// Relays between `first` and `second` until both ended, one failed, `stop` resolves or nothing moved for
/// `idle_timeout`. Both are closed when the future goes; a flow's tunnel goes back to where it came from after a clean
/// end.
///
/// A future by hand: an async function would hold both connections twice, as its arguments and as its variables, and
/// every open connection has one of these. For the same reason the caller pins `stop`.
pub fn relay<A: Duplex, B: Duplex, S: Future<Output = Stop> + Unpin>(
    first: A,
    second: B,
    counters: &Counters,
    idle_timeout: Option<Duration>,
    stop: S,
) -> Relaying<'_, A, B, S> {
    Relaying {
        relay: Relay {
            first,
            second,
            forth: Lane::new(),
            back: Lane::new(),
            counters,
            failed: None,
        },
        idle: idle_timeout.map(Idle::new),
        stop,
    }
}

/// A running relay, made by [`relay`].
pub struct Relaying<'a, A, B, S> {
    relay: Relay<'a, A, B>,
    idle: Option<Idle>,
    stop: S,
}

impl<A: Duplex, B: Duplex, S: Future<Output = Stop> + Unpin> Relaying<'_, A, B, S> {
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<(How, Option<io::Error>)> {
        if let Poll::Ready(stop) = Pin::new(&mut self.stop).poll(cx) {
            let how = match stop {
                Stop::PermitLost => How::PermitLost,
                Stop::Drained => How::Drained,
            };
            return Poll::Ready((how, None));
        }
        let mut active = false;
        if let Poll::Ready(end) = self.relay.poll(cx, &mut active) {
            return Poll::Ready(end);
        }
        match &mut self.idle {
            Some(idle) => idle.poll(cx, active).map(|()| (How::IdleTimeout, None)),
            None => Poll::Pending,
        }
    }
}

impl<A: Duplex, B: Duplex, S: Future<Output = Stop> + Unpin> Future for Relaying<'_, A, B, S> {
    type Output = RelayEnd;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<RelayEnd> {
        let this = self.get_mut();
        let (how, error) = ready!(this.poll_end(cx));
        if how != How::Closed {
            this.relay.first.reset();
            this.relay.second.reset();
        }
        Poll::Ready(RelayEnd {
            sent: this.relay.counters.sent(),
            received: this.relay.counters.received(),
            how,
            error,
        })
    }
}

#[cfg(test)]
mod tests;
