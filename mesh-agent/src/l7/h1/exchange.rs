//! One request on one target connection: the bytes of both directions, moved by one poll function of one task.
//!
//! The request's lane and the response's lane run at once, so that `Expect: 100-continue`, early responses and
//! streaming both ways need no care of their own. Each lane stops reading while its writer is full: back-pressure goes
//! through. Nothing that this file does waits for anything but the two wires and one timer.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use http::StatusCode;
use tokio::{io::AsyncWrite, time::Instant};

use super::{
    ResponseDefect,
    body::Incoming,
    buffer::{Left, Scratch, poll_drain, poll_read, with_scratch, write_now},
    chunk::ChunkDefect,
    codec::{Framing, RequestHead, ResponseHead, parse_response},
    field::FieldKind,
    write::{Outgoing, write_interim, write_response},
};
use crate::l7::{
    Attempt, Attempted, COPY_BYTES_MAX, Fault, Forward, Handler, Limits, RequestCopy, Version, Wire, h1::RequestDefect,
    timer::Timer,
};

/// The most bytes of later requests read while one is under way.
const PIPELINE_BYTES_MAX: usize = 16 * 1024;
/// The most interim responses to one request.
const INTERIM_MAX: u32 = 16;

/// Where the response is.
#[derive(Debug)]
enum Down {
    /// Its head has not come.
    Head,
    /// A 101 is being written; then the connection is a relay.
    Upgrading,
    /// Its body.
    Body(Incoming),
    /// All of it was written.
    Done,
}

/// How an attempt ended.
#[derive(Debug)]
pub(super) enum Outcome {
    /// Both messages are over.
    Done { keep_source: bool, keep_target: bool },
    /// The 101 was sent; what was read too much lies in the lanes.
    Upgrade,
    /// Try again on another connection.
    Again(Attempt),
    /// It failed. If nothing was sent to the source, it may be told.
    Failed(Fault),
}

/// What outlives an attempt: the source's side of the exchange.
pub(super) struct Up {
    /// The request's head and the start of its body, as sent. Kept until the request cannot be sent again.
    pub message: Vec<u8>,
    /// What of the body is still to come.
    pub body: Incoming,
    /// Bytes of body taken from the source.
    pub bytes: u64,
    /// The whole request lies in `message`.
    pub replayable: bool,
    /// The source will send nothing more.
    pub source_eof: bool,
    /// What came so far, if a copy is wanted.
    pub copy: Option<Kept>,
}

/// The bytes of a request that is copied.
pub(super) struct Kept {
    bytes: Vec<u8>,
    bytes_max: usize,
    too_long: bool,
}

impl Kept {
    /// Begins with the head.
    pub fn new(head: &[u8]) -> Kept {
        Kept {
            bytes: head.to_vec(),
            bytes_max: head.len() + COPY_BYTES_MAX,
            too_long: false,
        }
    }

    /// Keeps more of the body, as long as all of it is kept.
    pub fn push(&mut self, bytes: &[u8]) {
        self.too_long |= self.bytes.len() + bytes.len() > self.bytes_max;
        if self.too_long {
            self.bytes = Vec::new();
        } else {
            self.bytes.extend_from_slice(bytes);
        }
    }
}

impl Up {
    /// Gives the copy to whoever wants it, once the body is over.
    pub fn give_copy(&mut self, forward: &Forward) {
        if self.body.is_done()
            && let Some(copy) = self.copy.take()
            && !copy.too_long
            && let Some(to) = &forward.copy
        {
            to.give(|| RequestCopy::Http1(copy.bytes.into()));
        }
    }
}

/// The source's connection as an attempt needs it.
pub(super) struct SourceSide<'a, S> {
    pub wire: &'a mut S,
    pub left: &'a mut Left,
    pub timer: &'a mut Timer,
    pub draining: &'a mut dyn FnMut(&mut Context<'_>) -> bool,
}

/// The request as an attempt needs it.
pub(super) struct Asked<'a> {
    pub head: &'a RequestHead,
    pub forward: &'a Forward,
    /// Sending it twice is as good as once (RFC 9110 §9.2.2).
    pub idempotent: bool,
    pub retries: u32,
    pub fresh_tried: bool,
    pub deadline: Option<Instant>,
    /// No further attempt.
    pub exhausted: bool,
}

/// One attempt.
pub(super) struct Exchange<'a, H: Handler> {
    pub handler: &'a H,
    pub exchange: &'a mut H::Exchange,
    pub limits: &'a Limits,
    pub asked: Asked<'a>,
    pub source: SourceSide<'a, H::Source>,
    pub up: &'a mut Up,
    target: H::Target,
    reused: bool,
    written: usize,
    up_pending: Left,
    up_done: bool,
    /// The target takes no more of the body: the rest is read and dropped.
    up_broken: bool,
    up_dirty: bool,
    half_closed: bool,
    down: Down,
    down_left: Left,
    down_pending: Left,
    down_dirty: bool,
    down_chunk: bool,
    interim: u32,
    /// Anything of a response was written to the source.
    pub answered: bool,
    /// The final status that was sent.
    pub status: Option<StatusCode>,
    /// Bytes of body written to the source.
    pub down_bytes: u64,
    keep_source: bool,
    keep_target: bool,
    /// The response is over and the request's rest has only until the timer.
    finishing: bool,
}

impl<'a, H: Handler> Exchange<'a, H> {
    pub fn new(
        handler: &'a H,
        exchange: &'a mut H::Exchange,
        limits: &'a Limits,
        asked: Asked<'a>,
        source: SourceSide<'a, H::Source>,
        up: &'a mut Up,
        target: crate::l7::Target<H::Target>,
    ) -> Exchange<'a, H> {
        let attempt_deadline = asked.forward.attempt_timeout.map(|timeout| Instant::now() + timeout);
        source
            .timer
            .set([asked.deadline, attempt_deadline].into_iter().flatten().min());
        Exchange {
            handler,
            exchange,
            limits,
            asked,
            source,
            up,
            target: target.wire,
            reused: target.reused,
            written: 0,
            up_pending: Left::default(),
            up_done: false,
            up_broken: false,
            up_dirty: false,
            half_closed: false,
            down: Down::Head,
            down_left: Left::default(),
            down_pending: Left::default(),
            down_dirty: false,
            down_chunk: false,
            interim: 0,
            answered: false,
            status: None,
            down_bytes: 0,
            keep_source: true,
            keep_target: true,
            finishing: false,
        }
    }

    /// Lets the target go: to the pool, or with a reset if what it was sent is not whole.
    pub fn into_target(mut self, whole: bool) -> (H::Target, Left) {
        if !whole && !self.up_done {
            self.target.abort();
        }
        (self.target, self.down_left)
    }

    /// Moves what can be moved.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Outcome> {
        if let Poll::Ready(outcome) = self.poll_lanes(cx) {
            return Poll::Ready(outcome);
        }
        // Last, since the lanes move the deadline: a timer that was not polled since would wake nobody.
        if self.source.timer.poll(cx).is_ready() {
            return Poll::Ready(self.time_is_over());
        }
        Poll::Pending
    }

    fn poll_lanes(&mut self, cx: &mut Context<'_>) -> Poll<Outcome> {
        // A pooled connection that says something before it was asked, or is closed, is of no use.
        if self.reused && self.written == 0 && matches!(self.down, Down::Head) && !self.answered {
            let dead = with_scratch(|scratch| poll_read(&mut self.target, cx, &mut scratch.read)).is_ready();
            if dead {
                return Poll::Ready(self.target_failed(Fault::TargetClosed));
            }
        }
        if !self.up_done
            && let Err(fault) = with_scratch(|scratch| self.poll_up(cx, scratch))
        {
            // A source that has its answer may leave the rest of its request away.
            return Poll::Ready(if matches!(self.down, Down::Done) {
                Outcome::Done {
                    keep_source: false,
                    keep_target: false,
                }
            } else {
                Outcome::Failed(fault)
            });
        }
        let down = with_scratch(|scratch| self.poll_down(cx, scratch));
        if let Poll::Ready(outcome) = down {
            return Poll::Ready(outcome);
        }
        if matches!(self.down, Down::Done) {
            return self.poll_finish();
        }
        if self.up_done {
            return self.poll_source(cx);
        }
        Poll::Pending
    }

    fn time_is_over(&mut self) -> Outcome {
        if self.finishing {
            return Outcome::Done {
                keep_source: false,
                keep_target: false,
            };
        }
        let whole = self.asked.deadline.is_some_and(|deadline| deadline <= Instant::now());
        if whole {
            Outcome::Failed(Fault::RequestTimeout)
        } else {
            self.target_failed(Fault::AttemptTimeout)
        }
    }

    /// The target failed before the response's head: again, if that is safe.
    fn target_failed(&mut self, fault: Fault) -> Outcome {
        let untouched = self.down_left.is_empty() && !self.answered;
        let resendable = self.written == 0 || (self.up.replayable && self.asked.idempotent);
        if self.asked.exhausted {
            return Outcome::Failed(fault);
        }
        if untouched && resendable && self.reused && !self.asked.fresh_tried && fault == Fault::TargetClosed {
            return Outcome::Again(Attempt::Fresh);
        }
        if untouched
            && self.up.replayable
            && self
                .handler
                .again(self.exchange, Attempted::Failed(fault), self.asked.retries)
        {
            return Outcome::Again(Attempt::Retry(self.asked.retries + 1));
        }
        Outcome::Failed(fault)
    }

    /// The request's lane. `Err` is the source's doing; the target's failures show in the response's lane.
    fn poll_up(&mut self, cx: &mut Context<'_>, scratch: &mut Scratch) -> Result<(), Fault> {
        loop {
            match self.poll_up_write(cx) {
                Poll::Pending => return Ok(()),
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(_)) => {
                    (self.up_broken, self.keep_target) = (true, false);
                    self.up_pending = Left::default();
                }
            }
            if self.up.body.is_done() {
                self.up.give_copy(self.asked.forward);
                if !self.up_broken && self.up_dirty {
                    match Pin::new(&mut self.target).poll_flush(cx) {
                        Poll::Pending => return Ok(()),
                        Poll::Ready(Ok(())) => self.up_dirty = false,
                        Poll::Ready(Err(_)) => (self.up_broken, self.keep_target) = (true, false),
                    }
                }
                self.up_done = true;
                return Ok(());
            }
            if !self.source.left.is_empty() {
                let mut left = self.source.left.take();
                let used = self.up_body(cx, left.bytes(), &mut scratch.out)?;
                left.consume(used);
                *self.source.left = left;
                continue;
            }
            match poll_read(self.source.wire, cx, &mut scratch.read) {
                Poll::Pending => {
                    // Nothing more for now: what the target's side holds back must go.
                    if self.up_dirty && !self.up_broken && Pin::new(&mut self.target).poll_flush(cx).is_ready() {
                        self.up_dirty = false;
                    }
                    return Ok(());
                }
                Poll::Ready(Ok(0) | Err(_)) => {
                    self.up.source_eof = true;
                    return Err(Fault::SourceClosed);
                }
                Poll::Ready(Ok(count)) => {
                    let input = scratch.read.get(..count).unwrap_or_default();
                    let used = self.up_body(cx, input, &mut scratch.out)?;
                    self.source.left.push(input.get(used..).unwrap_or_default());
                }
            }
        }
    }

    fn poll_up_write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.up_broken {
            return Poll::Ready(Ok(()));
        }
        while let Some(rest) = self.up.message.get(self.written..).filter(|rest| !rest.is_empty()) {
            match Pin::new(&mut self.target).poll_write(cx, rest) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(count)) => (self.written, self.up_dirty) = (self.written + count, true),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
            }
        }
        if !self.up.replayable && self.up.message.capacity() > 0 && !self.up.body.is_done() {
            // Cannot be sent again: need not be kept.
            self.up.message = Vec::new();
            self.written = 0;
            self.reused = false;
        }
        poll_drain(&mut self.target, cx, &mut self.up_pending)
    }

    /// Passes a piece of the request's body on; returns how much of `input` belonged to it.
    fn up_body(&mut self, cx: &mut Context<'_>, input: &[u8], out: &mut Vec<u8>) -> Result<usize, Fault> {
        out.clear();
        let chunked = matches!(self.up.body, Incoming::Chunked(_));
        let used = if let Incoming::Length(remaining) = &mut self.up.body {
            // As it came: no copy unless the target is slow.
            let count = usize::try_from(*remaining).map_or(input.len(), |remaining| remaining.min(input.len()));
            *remaining -= count as u64;
            if *remaining == 0 {
                self.up.body = Incoming::Done;
            }
            self.up.bytes += count as u64;
            self.up_write(cx, input.get(..count).unwrap_or_default());
            count
        } else {
            let (used, bytes) = self
                .up
                .body
                .take(input, chunked, out)
                .map_err(|ChunkDefect| RequestDefect::Chunk)?;
            self.up.bytes += bytes as u64;
            self.up_write(cx, out);
            used
        };
        if let Some(copy) = &mut self.up.copy {
            copy.push(input.get(..used).unwrap_or_default());
        }
        Ok(used)
    }

    fn up_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) {
        if self.up_broken {
            return;
        }
        self.up_dirty = true;
        if write_now(&mut self.target, cx, bytes, &mut self.up_pending).is_err() {
            (self.up_broken, self.keep_target) = (true, false);
            self.up_pending = Left::default();
        }
    }

    /// The response's lane.
    fn poll_down(&mut self, cx: &mut Context<'_>, scratch: &mut Scratch) -> Poll<Outcome> {
        loop {
            match poll_drain(self.source.wire, cx, &mut self.down_pending) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(_)) => return Poll::Ready(Outcome::Failed(Fault::SourceClosed)),
            }
            match &self.down {
                Down::Done => return Poll::Pending,
                Down::Upgrading => match Pin::new(&mut *self.source.wire).poll_flush(cx) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(Ok(())) => return Poll::Ready(Outcome::Upgrade),
                    Poll::Ready(Err(_)) => return Poll::Ready(Outcome::Failed(Fault::SourceClosed)),
                },
                Down::Body(body) if body.is_done() => match Pin::new(&mut *self.source.wire).poll_flush(cx) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(Ok(())) => {
                        self.down = Down::Done;
                        return Poll::Pending;
                    }
                    Poll::Ready(Err(_)) => return Poll::Ready(Outcome::Failed(Fault::SourceClosed)),
                },
                Down::Head | Down::Body(_) => {}
            }
            scratch.out.clear();
            let step = match poll_read(&mut self.target, cx, &mut scratch.read) {
                Poll::Pending => {
                    if self.down_dirty && Pin::new(&mut *self.source.wire).poll_flush(cx).is_ready() {
                        self.down_dirty = false;
                    }
                    return Poll::Pending;
                }
                Poll::Ready(Ok(0)) => self.down_end(&mut scratch.out),
                Poll::Ready(Err(_)) => Err(self.down_broken()),
                Poll::Ready(Ok(count)) => {
                    let input = scratch.read.get(..count).unwrap_or_default();
                    if let Down::Body(Incoming::Length(remaining)) = &mut self.down {
                        // As it came: no copy unless the source is slow.
                        let body = usize::try_from(*remaining).map_or(count, |remaining| remaining.min(count));
                        *remaining -= body as u64;
                        if *remaining == 0 {
                            self.down = Down::Body(Incoming::Done);
                        }
                        self.down_bytes += body as u64;
                        self.keep_target &= body == count;
                        (self.down_dirty, self.answered) = (true, true);
                        let body = input.get(..body).unwrap_or_default();
                        if write_now(self.source.wire, cx, body, &mut self.down_pending).is_err() {
                            return Poll::Ready(Outcome::Failed(Fault::SourceClosed));
                        }
                        continue;
                    }
                    self.down_input(cx, input, &mut scratch.out)
                }
            };
            match step {
                Err(outcome) => return Poll::Ready(outcome),
                Ok(()) => {
                    if !scratch.out.is_empty() {
                        (self.down_dirty, self.answered) = (true, true);
                        if write_now(self.source.wire, cx, &scratch.out, &mut self.down_pending).is_err() {
                            return Poll::Ready(Outcome::Failed(Fault::SourceClosed));
                        }
                    }
                }
            }
        }
    }

    /// The target closed its side.
    fn down_end(&mut self, out: &mut Vec<u8>) -> Result<(), Outcome> {
        self.keep_target = false;
        if matches!(self.down, Down::Body(Incoming::UntilClose)) {
            self.down = Down::Body(Incoming::Done);
            if self.down_chunk {
                out.extend_from_slice(b"0\r\n\r\n");
            }
            return Ok(());
        }
        Err(self.down_broken())
    }

    fn down_broken(&mut self) -> Outcome {
        match self.down {
            Down::Head if self.down_left.is_empty() => self.target_failed(Fault::TargetClosed),
            Down::Head => Outcome::Failed(Fault::TargetClosed),
            _ => Outcome::Failed(Fault::ResponseCut),
        }
    }

    /// Reads a piece of the response and appends what goes to the source to `out`.
    fn down_input(&mut self, cx: &mut Context<'_>, input: &[u8], out: &mut Vec<u8>) -> Result<(), Outcome> {
        let mut joined = Left::default();
        let mut input = input;
        if !self.down_left.is_empty() {
            joined = self.down_left.take();
            joined.push(input);
            input = joined.bytes();
        }
        while matches!(self.down, Down::Head) {
            let parsed = parse_response(input, self.asked.head.is_head, self.limits);
            match parsed.map_err(|defect| Outcome::Failed(Fault::Response(defect)))? {
                None => {
                    self.down_left.push(input);
                    return Ok(());
                }
                Some(head) => {
                    let (bytes, rest) = input.split_at(head.bytes.min(input.len()));
                    input = rest;
                    if head.status.is_informational() {
                        self.down_interim(&head, bytes, out)?;
                    } else {
                        self.down_head(cx, &head, bytes, out)?;
                    }
                }
            }
            if input.is_empty() && matches!(self.down, Down::Head) {
                return Ok(());
            }
        }
        if let Down::Body(body) = &mut self.down {
            let taken = body.take(input, self.down_chunk, out);
            let (used, bytes) = taken.map_err(|ChunkDefect| Outcome::Failed(Fault::Response(ResponseDefect::Chunk)))?;
            self.down_bytes += bytes as u64;
            // Bytes behind the response answer nothing that was asked.
            self.keep_target &= used == input.len();
        } else {
            self.down_left.push(input);
        }
        drop(joined);
        Ok(())
    }

    fn down_interim(&mut self, head: &ResponseHead, bytes: &[u8], out: &mut Vec<u8>) -> Result<(), Outcome> {
        self.interim += 1;
        let upgrade = head
            .upgrade
            .filter(|_| self.asked.head.upgrade.is_some() && self.up_done);
        if head.status == StatusCode::SWITCHING_PROTOCOLS {
            if upgrade.is_none() {
                return Err(Outcome::Failed(Fault::Response(ResponseDefect::Interim)));
            }
            self.handler.responded(self.exchange, head.status);
            self.status = Some(head.status);
            self.down = Down::Upgrading;
            self.source.timer.set(None);
        } else if self.interim > INTERIM_MAX {
            return Err(Outcome::Failed(Fault::Response(ResponseDefect::Interim)));
        }
        // HTTP/1.0 knows no interim responses (RFC 9110 §15.2).
        if self.asked.head.version == Version::Http11 {
            write_interim(head, bytes, upgrade, out);
        }
        Ok(())
    }

    fn down_head(
        &mut self,
        cx: &mut Context<'_>,
        head: &ResponseHead,
        bytes: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(), Outcome> {
        let undelivered = |head: &ResponseHead| head.fields.iter().any(|field| field.kind == FieldKind::Undelivered);
        if self.up.replayable
            && !self.answered
            && !self.asked.exhausted
            && out.is_empty()
            && self.handler.again(
                self.exchange,
                Attempted::answered(head.status, undelivered(head)),
                self.asked.retries,
            )
        {
            return Err(Outcome::Again(Attempt::Retry(self.asked.retries + 1)));
        }
        self.handler.responded(self.exchange, head.status);
        self.status = Some(head.status);
        // The attempt's time is kept; the request's goes on to the last byte.
        self.source.timer.set(self.asked.deadline);
        let version = self.asked.head.version;
        let framing = match head.framing {
            Framing::Chunked | Framing::UntilClose if version == Version::Http11 => Framing::Chunked,
            Framing::Chunked | Framing::UntilClose => Framing::UntilClose,
            framing => framing,
        };
        // A source that waits for a 100 and gets its answer instead may leave its body away or send it: nobody knows
        // what its next bytes are (RFC 9110 §10.1.1).
        let unsure = self.asked.head.expect_continue && self.up.bytes == 0 && !self.up.body.is_done();
        self.keep_source = self.asked.head.keep_alive
            && framing != Framing::UntilClose
            && !unsure
            && !self.up.source_eof
            && !(self.source.draining)(cx);
        self.keep_target &= head.keep_alive;
        self.down_chunk = framing == Framing::Chunked;
        let outgoing = Outgoing {
            framing,
            keep_alive: self.keep_source,
            version,
        };
        write_response(head, bytes, &self.asked.forward.response_headers, outgoing, out);
        self.down = Down::Body(Incoming::new(head.framing));
        Ok(())
    }

    /// The response is over: so is the exchange, once the request is too. Its rest is given a little time.
    fn poll_finish(&mut self) -> Poll<Outcome> {
        if self.up_done {
            let keep_source = self.keep_source && !self.up.source_eof;
            return Poll::Ready(Outcome::Done {
                keep_source,
                keep_target: self.keep_target && !self.half_closed,
            });
        }
        if !self.keep_source {
            return Poll::Ready(Outcome::Done {
                keep_source: false,
                keep_target: false,
            });
        }
        if !self.finishing {
            self.finishing = true;
            self.source.timer.set(Some(Instant::now() + self.limits.linger));
        }
        Poll::Pending
    }

    /// The request was sent: what the source says now are later requests, or that it will say nothing more.
    fn poll_source(&mut self, cx: &mut Context<'_>) -> Poll<Outcome> {
        while !self.up.source_eof && self.source.left.len() < PIPELINE_BYTES_MAX {
            let read = with_scratch(|scratch| match poll_read(self.source.wire, cx, &mut scratch.read) {
                Poll::Ready(Ok(count)) => {
                    self.source.left.push(scratch.read.get(..count).unwrap_or_default());
                    Poll::Ready(Ok(count))
                }
                other => other,
            });
            match read {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(0)) => self.up.source_eof = true,
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(_)) => return Poll::Ready(Outcome::Failed(Fault::SourceClosed)),
            }
        }
        // The target hears that the source will say nothing more, as it would without us; it may still answer.
        if self.up.source_eof && !self.half_closed && !self.up_broken {
            match Pin::new(&mut self.target).poll_shutdown(cx) {
                Poll::Pending => {}
                Poll::Ready(_) => self.half_closed = true,
            }
        }
        Poll::Pending
    }
}
