//! Thread-owned scratch space and the left-overs that a connection may keep.
//!
//! A connection reads into the thread's scratch buffer and keeps only what it could not use yet; an idle one keeps
//! nothing. The scratch is borrowed for one poll step and never across an await.

use std::{
    cell::RefCell,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// How much is read at once: less costs bulk throughput, more gains nothing.
pub(super) const READ_BYTES: usize = 64 * 1024;

/// A thread's scratch space.
pub(super) struct Scratch {
    /// Where reads go.
    pub read: Box<[u8]>,
    /// Where messages are put together before they are written.
    pub out: Vec<u8>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch { read: vec![0; READ_BYTES].into(), out: Vec::new() });
}

/// Runs one poll step with the thread's scratch space.
pub(super) fn with_scratch<R>(step: impl FnOnce(&mut Scratch) -> R) -> R {
    SCRATCH.with(|scratch| {
        let mut scratch = scratch.borrow_mut();
        scratch.out.clear();
        let result = step(&mut scratch);
        // One huge response must not pin its memory to the thread for good.
        if scratch.out.capacity() > 4 * READ_BYTES {
            scratch.out = Vec::new();
        }
        result
    })
}

/// Bytes that wait: read and not used, or made and not written. Empty, it owns no memory.
#[derive(Default)]
pub(super) struct Left {
    bytes: Vec<u8>,
    start: usize,
}

impl Left {
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(self.start..).unwrap_or_default()
    }

    pub fn is_empty(&self) -> bool {
        self.start >= self.bytes.len()
    }

    pub fn len(&self) -> usize {
        self.bytes.len().saturating_sub(self.start)
    }

    pub fn push(&mut self, more: &[u8]) {
        if more.is_empty() {
            return;
        }
        if self.start > 0 {
            self.bytes.drain(..self.start.min(self.bytes.len()));
            self.start = 0;
        }
        self.bytes.extend_from_slice(more);
    }

    pub fn consume(&mut self, count: usize) {
        self.start += count;
        if self.start >= self.bytes.len() {
            *self = Left::default();
        }
    }

    /// The bytes, leaving nothing.
    pub fn take(&mut self) -> Left {
        std::mem::take(self)
    }
}

/// Reads once into `buffer`; `Ok(0)` is the end.
pub(super) fn poll_read(
    wire: &mut (impl AsyncRead + Unpin),
    cx: &mut Context<'_>,
    buffer: &mut [u8],
) -> Poll<io::Result<usize>> {
    let mut buffer = ReadBuf::new(buffer);
    ready!(Pin::new(wire).poll_read(cx, &mut buffer))?;
    Poll::Ready(Ok(buffer.filled().len()))
}

/// Writes all that waits.
pub(super) fn poll_drain(
    wire: &mut (impl AsyncWrite + Unpin),
    cx: &mut Context<'_>,
    left: &mut Left,
) -> Poll<io::Result<()>> {
    while !left.is_empty() {
        let count = ready!(Pin::new(&mut *wire).poll_write(cx, left.bytes()))?;
        if count == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        left.consume(count);
    }
    Poll::Ready(Ok(()))
}

/// Writes what the wire takes now and keeps the rest in `left`, which must be empty.
pub(super) fn write_now(
    wire: &mut (impl AsyncWrite + Unpin),
    cx: &mut Context<'_>,
    mut bytes: &[u8],
    left: &mut Left,
) -> io::Result<()> {
    while !bytes.is_empty() && left.is_empty() {
        match Pin::new(&mut *wire).poll_write(cx, bytes) {
            Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
            Poll::Ready(Ok(count)) => bytes = bytes.get(count..).unwrap_or_default(),
            Poll::Ready(Err(error)) => return Err(error),
            Poll::Pending => break,
        }
    }
    left.push(bytes);
    Ok(())
}
