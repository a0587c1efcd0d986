//! The life of a source's connection: read a head, ask the handler, get a connection, exchange, and again.
//!
//! This is the straight line; `exchange` moves the bytes. A request that never got a verdict is answered here by its
//! defect's status and the connection closes, since where its end is nobody can tell.

use std::{
    future::{Future, poll_fn},
    io,
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Poll, ready},
    time::Duration,
};

use http::StatusCode;
use tokio::{
    io::{AsyncWrite, AsyncWriteExt},
    time::Instant,
};

use super::{
    RequestDefect,
    body::Incoming,
    buffer::{Left, poll_read, with_scratch},
    codec::{RequestHead, RequestView, parse_request},
    exchange::{Asked, Exchange, Kept, Outcome, SourceSide, Up},
    write::{write_reply, write_request},
};
use crate::l7::{
    Attempt, End, Facts, Fault, Forward, Handler, Limits, Reply, ServeError, Target, Verdict, Version, Wire,
    timer::Timer,
};

/// The most bytes read and dropped from a source that is being closed.
const LINGER_BYTES_MAX: usize = 1024 * 1024;
/// Attempts for one request, whatever a handler asks for.
const ATTEMPTS_MAX: u32 = 16;

/// A source's connection.
struct Connection<'a, H: Handler, D> {
    source: H::Source,
    left: Left,
    timer: Timer,
    drain: Pin<&'a mut D>,
    /// We drain, and an idle connection is kept until then.
    idle_until: Option<Instant>,
    eof: bool,
    limits: &'a Limits,
    handler: &'a H,
    index: u64,
}

/// What comes instead of a next request.
enum NoHead {
    /// The source closed, was idle for too long, or we drain.
    End,
    Refused(Fault),
    Failed(io::Error),
}

/// What becomes of the connection after a request.
enum After<H: Handler> {
    Keep,
    /// Our answer is whole: close so that it arrives.
    Close,
    /// What was sent is not whole: close so that nobody thinks so.
    Abort,
    /// The 101 was sent: the connection becomes a relay.
    Upgrade(Box<Upgrade<H>>),
}

struct Upgrade<H: Handler> {
    exchange: H::Exchange,
    wire: H::Target,
    left: Left,
    end: End,
}

/// Serves HTTP/1 requests of one source connection until it ends, is refused, or `drain` resolves and a request is over.
/// A connection without a request is then kept for as long as `drain` says: its source may be sending the next one at this
/// very moment, which is answered with the word that it was the last. Bytes already read are the source's own matter (`Transport` carries them as its prefix).
pub async fn serve<H: Handler>(
    source: H::Source,
    handler: Rc<H>,
    limits: &Limits,
    drain: impl Future<Output = Duration>,
) -> Result<(), ServeError> {
    let mut connection = Connection {
        source,
        left: Left::default(),
        timer: Timer::default(),
        drain: pin!(drain),
        idle_until: None,
        eof: false,
        limits,
        handler: &*handler,
        index: 0,
    };
    loop {
        let head = match connection.next_head().await {
            Ok(head) => head,
            Err(NoHead::End) => {
                // A closing TLS says so; nobody needs to hear more.
                let _ = Box::pin(connection.source.shutdown()).await;
                return Ok(());
            }
            Err(NoHead::Failed(error)) => return Err(ServeError::Source(error)),
            Err(NoHead::Refused(fault)) => {
                let sent = Box::pin(connection.refuse(fault)).await;
                handler.refused(fault, sent);
                Box::pin(connection.linger()).await;
                return Err(fault.into());
            }
        };
        // Boxed for as long as a request lives: a connection that waits for one is small.
        match Box::pin(connection.request(&head)).await {
            After::Keep => {}
            After::Close => {
                Box::pin(connection.linger()).await;
                return Ok(());
            }
            After::Abort => {
                connection.source.abort();
                return Ok(());
            }
            After::Upgrade(upgrade) => {
                let Connection { source, left, .. } = connection;
                Box::pin(relay(&*handler, source, left, upgrade)).await;
                return Ok(());
            }
        }
    }
}

/// Carries an upgraded connection to its end.
async fn relay<H: Handler>(handler: &H, mut source: H::Source, left: Left, upgrade: Box<Upgrade<H>>) {
    let Upgrade {
        mut exchange,
        mut wire,
        left: target_left,
        mut end,
    } = *upgrade;
    // What was read too much goes back in front of its stream.
    if !left.is_empty() {
        source.unread(left.bytes());
    }
    if !target_left.is_empty() {
        wire.unread(target_left.bytes());
    }
    let (sent, received) = handler.relay(&mut exchange, source, wire).await;
    end.upgraded = true;
    end.request_bytes += sent;
    end.response_bytes += received;
    handler.finish(exchange, end);
}

/// Whether we drain; notes at first until when a connection without a request is kept.
fn poll_draining(
    idle_until: &mut Option<Instant>,
    drain: Pin<&mut impl Future<Output = Duration>>,
    cx: &mut Context<'_>,
) -> bool {
    if idle_until.is_none()
        && let Poll::Ready(patience) = drain.poll(cx)
    {
        *idle_until = Some(Instant::now() + patience);
    }
    idle_until.is_some()
}

impl<'a, H: Handler, D: Future<Output = Duration>> Connection<'a, H, D> {
    fn poll_draining(&mut self, cx: &mut Context<'_>) -> bool {
        poll_draining(&mut self.idle_until, self.drain.as_mut(), cx)
    }

    async fn next_head(&mut self) -> Result<RequestHead, NoHead> {
        self.timer.set(None);
        let (mut looked_at, mut empty_lines) = (0, 0);
        poll_fn(|cx| {
            loop {
                // One empty line before a request is forgiven (RFC 9112 §2.2).
                if looked_at == 0 && self.left.bytes().starts_with(b"\r\n") && empty_lines < 1 {
                    self.left.consume(2);
                    empty_lines += 1;
                }
                let bytes = self.left.bytes();
                // A head is complete, and worth parsing, when a line is; garbage without lines is bounded.
                let news = bytes.get(looked_at..).unwrap_or_default();
                let line_is_long = bytes.len() > self.limits.request_line_bytes_max;
                if news.contains(&b'\n') || (line_is_long && !news.is_empty()) {
                    looked_at = bytes.len();
                    match parse_request(bytes, self.limits) {
                        Ok(Some(head)) => return Poll::Ready(Ok(head)),
                        Ok(None) => {}
                        Err(defect) => return Poll::Ready(Err(NoHead::Refused(defect.into()))),
                    }
                }
                if self.eof {
                    return Poll::Ready(Err(self.ended()));
                }
                match ready!(self.poll_more(cx)) {
                    Ok(0) => self.eof = true,
                    Ok(_) => {}
                    Err(no_head) => return Poll::Ready(Err(no_head)),
                }
            }
        })
        .await
    }

    fn ended(&self) -> NoHead {
        if self.left.is_empty() {
            NoHead::End
        } else {
            NoHead::Refused(Fault::SourceClosed)
        }
    }

    fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<Result<usize, NoHead>> {
        let idle = self.left.is_empty();
        let read = with_scratch(|scratch| {
            let count = ready!(poll_read(&mut self.source, cx, &mut scratch.read))?;
            self.left.push(scratch.read.get(..count).unwrap_or_default());
            Poll::Ready(Ok(count))
        });
        match read {
            Poll::Ready(Ok(count)) => {
                if idle && count > 0 {
                    self.timer.set(Some(Instant::now() + self.limits.head_timeout));
                }
                return Poll::Ready(Ok(count));
            }
            Poll::Ready(Err(error)) => return Poll::Ready(Err(NoHead::Failed(error))),
            Poll::Pending => {}
        }
        if !self.timer.is_set() {
            let time = if idle {
                self.limits.idle_timeout
            } else {
                self.limits.head_timeout
            };
            self.timer.set(Some(Instant::now() + time));
        }
        if idle
            && self.poll_draining(cx)
            && let Some(until) = self.idle_until
        {
            self.timer.cut(until);
        }
        if self.timer.poll(cx).is_ready() {
            let end = if idle {
                NoHead::End
            } else {
                NoHead::Refused(Fault::HeadTimeout)
            };
            return Poll::Ready(Err(end));
        }
        Poll::Pending
    }

    /// Serves one request, whose head is at the start of `left`.
    async fn request(&mut self, head: &RequestHead) -> After<H> {
        let started = Instant::now();
        let facts = Facts {
            version: head.version,
            upgrade: head.upgrade.is_some(),
            grpc: head.grpc,
            body: !Incoming::new(head.framing).is_done(),
            index: self.index,
        };
        self.index += 1;
        let view = RequestView {
            head,
            bytes: self.left.bytes(),
        };
        match self.handler.decide(&view, facts).await {
            Verdict::Reply(reply, exchange) => {
                self.left.consume(head.bytes);
                let (after, end) = Box::pin(self.reply(head, reply, End::default())).await;
                self.handler.finish(exchange, end);
                after
            }
            Verdict::Forward(forward, exchange) => self.forward(head, forward, exchange, started).await,
        }
    }

    async fn forward(
        &mut self,
        head: &RequestHead,
        forward: Forward,
        mut exchange: H::Exchange,
        started: Instant,
    ) -> After<H> {
        let method = head.method.bytes(self.left.bytes());
        let idempotent = matches!(method, b"GET" | b"HEAD" | b"OPTIONS" | b"TRACE" | b"PUT" | b"DELETE");
        let deadline = forward.request_timeout.map(|timeout| started + timeout);
        let mut up = match self.compose(head, &forward) {
            Ok(up) => up,
            Err(defect) => {
                let fault = Fault::Request(defect);
                let status = Box::pin(self.refuse(fault)).await;
                let end = End {
                    status,
                    fault: Some(fault),
                    replied: status.is_some(),
                    ..End::default()
                };
                self.handler.finish(exchange, end);
                return After::Close;
            }
        };
        up.give_copy(&forward);
        let (mut attempt, mut attempts, mut retries, mut fresh_tried) = (Attempt::First, 0, 0, false);
        loop {
            attempts += 1;
            let end = End {
                request_bytes: up.bytes,
                ..End::default()
            };
            let target = match self.connect(&mut exchange, attempt, deadline).await {
                Ok(target) => target,
                Err(connect_failure) => {
                    let (reply, fault) = match connect_failure {
                        ConnectFailure::Reply(reply) => (reply, None),
                        ConnectFailure::Late => {
                            let fault = Fault::RequestTimeout;
                            (self.handler.answer(fault), Some(fault))
                        }
                    };
                    let (after, mut end) = Box::pin(self.reply_instead(head, &up, reply, end)).await;
                    end.fault = fault;
                    self.handler.finish(exchange, end);
                    return after;
                }
            };
            match attempt {
                Attempt::Fresh => fresh_tried = true,
                Attempt::Retry(count) => retries = count,
                Attempt::First => {}
            }
            let exhausted = attempts >= ATTEMPTS_MAX;
            let asked = Asked {
                head,
                forward: &forward,
                idempotent,
                retries,
                fresh_tried,
                deadline,
                exhausted,
            };
            let Connection {
                source,
                left,
                timer,
                drain,
                idle_until,
                limits,
                handler,
                ..
            } = &mut *self;
            let mut draining = |cx: &mut Context<'_>| poll_draining(idle_until, drain.as_mut(), cx);
            let side = SourceSide {
                wire: source,
                left,
                timer,
                draining: &mut draining,
            };
            let mut run = Exchange::<H>::new(handler, &mut exchange, limits, asked, side, &mut up, target);
            let outcome = poll_fn(|cx| run.poll(cx)).await;
            let (answered, status, response_bytes) = (run.answered, run.status, run.down_bytes);
            let (wire, target_left) = run.into_target(matches!(outcome, Outcome::Done { .. } | Outcome::Upgrade));
            self.timer.set(None);
            self.eof |= up.source_eof;
            let end = End {
                status,
                request_bytes: up.bytes,
                response_bytes,
                ..End::default()
            };
            match outcome {
                Outcome::Again(next) => attempt = next,
                Outcome::Done {
                    keep_source,
                    keep_target,
                } => {
                    if keep_target {
                        self.handler.release(&mut exchange, wire);
                    }
                    self.handler.finish(exchange, end);
                    return if keep_source { After::Keep } else { After::Close };
                }
                Outcome::Upgrade => {
                    return After::Upgrade(Box::new(Upgrade {
                        exchange,
                        wire,
                        left: target_left,
                        end,
                    }));
                }
                Outcome::Failed(fault) => {
                    drop(wire);
                    let (after, mut end) = match fault.status() {
                        Some(_) if !answered => {
                            let reply = self.handler.answer(fault);
                            Box::pin(self.reply_instead(head, &up, reply, end)).await
                        }
                        _ => (After::Abort, end),
                    };
                    end.fault = Some(fault);
                    self.handler.finish(exchange, end);
                    return after;
                }
            }
        }
    }

    /// Writes the request for its target, with as much of its body as is there, and takes that from `left`.
    fn compose(&mut self, head: &RequestHead, forward: &Forward) -> Result<Up, RequestDefect> {
        let mut message = Vec::new();
        let (bytes, rest) = self.left.bytes().split_at(head.bytes.min(self.left.len()));
        write_request(head, bytes, forward, &mut message);
        let mut body = Incoming::new(head.framing);
        let chunked = matches!(body, Incoming::Chunked(_));
        let (used, count) = body
            .take(rest, chunked, &mut message)
            .map_err(|_| RequestDefect::Chunk)?;
        let copy = forward.copy.as_ref().map(|_| {
            let mut copy = Kept::new(bytes);
            copy.push(rest.get(..used).unwrap_or_default());
            copy
        });
        self.left.consume(head.bytes + used);
        Ok(Up {
            message,
            replayable: body.is_done(),
            body,
            bytes: count as u64,
            source_eof: self.eof,
            copy,
        })
    }

    async fn connect(
        &mut self,
        exchange: &mut H::Exchange,
        attempt: Attempt,
        deadline: Option<Instant>,
    ) -> Result<Target<H::Target>, ConnectFailure> {
        self.timer.set(deadline);
        // Boxed: a dial's future is large, and would make every idle connection as large.
        let mut connect = Box::pin(self.handler.connect(exchange, attempt));
        let timer = &mut self.timer;
        poll_fn(|cx| match connect.as_mut().poll(cx) {
            Poll::Ready(target) => Poll::Ready(target.map_err(ConnectFailure::Reply)),
            Poll::Pending => timer.poll(cx).map(|()| Err(ConnectFailure::Late)),
        })
        .await
    }

    /// Answers a request whose body, if it has one, was not touched.
    async fn reply(&mut self, head: &RequestHead, reply: Reply, end: End) -> (After<H>, End) {
        let mut body = Incoming::new(head.framing);
        let taken = body.take(self.left.bytes(), false, &mut Vec::new());
        let whole = match taken {
            Ok((used, _)) => {
                self.left.consume(used);
                body.is_done()
            }
            Err(_) => false,
        };
        self.write_reply(head, reply, whole, end).await
    }

    /// Answers a request that was on its way.
    async fn reply_instead(&mut self, head: &RequestHead, up: &Up, reply: Reply, end: End) -> (After<H>, End) {
        self.write_reply(head, reply, up.body.is_done(), end).await
    }

    async fn write_reply(&mut self, head: &RequestHead, reply: Reply, whole: bool, mut end: End) -> (After<H>, End) {
        if reply.abort {
            return (After::Abort, end);
        }
        let is_head = head.is_head;
        let draining = poll_fn(|cx| Poll::Ready(self.poll_draining(cx))).await;
        let keep = head.keep_alive && whole && !draining && !self.eof;
        let mut out = Vec::new();
        write_reply(&reply, head.version, keep, is_head, &mut out);
        end.replied = true;
        if self.send(&out).await.is_err() {
            end.fault = Some(Fault::SourceClosed);
            return (After::Abort, end);
        }
        end.status = Some(reply.status);
        end.response_bytes = if is_head { 0 } else { reply.body.len() as u64 };
        (if keep { After::Keep } else { After::Close }, end)
    }

    /// Answers a request that never got a verdict. Returns the status that was sent.
    async fn refuse(&mut self, fault: Fault) -> Option<StatusCode> {
        let status = fault.status()?;
        let mut out = Vec::new();
        write_reply(&self.handler.answer(fault), Version::Http11, false, false, &mut out);
        self.send(&out).await.ok()?;
        Some(status)
    }

    /// Writes a short answer within the time of a head: a source that does not read it holds nothing up.
    async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.timer.set(Some(Instant::now() + self.limits.head_timeout));
        let mut left = Left::default();
        left.push(bytes);
        let (source, timer) = (&mut self.source, &mut self.timer);
        let sent = poll_fn(|cx| {
            if super::buffer::poll_drain(source, cx, &mut left)?.is_ready() {
                return Pin::new(&mut *source).poll_flush(cx);
            }
            timer.poll(cx).map(|()| Err(io::ErrorKind::TimedOut.into()))
        })
        .await;
        self.timer.set(None);
        sent
    }

    /// Closes so that our last answer arrives: a close with unread input would be a reset, which may overtake it.
    async fn linger(&mut self) {
        self.left = Left::default();
        self.timer.set(Some(Instant::now() + self.limits.linger));
        let (mut shut, mut dropped) = (false, 0);
        poll_fn(|cx| {
            if !shut {
                match Pin::new(&mut self.source).poll_shutdown(cx) {
                    Poll::Ready(Ok(())) => shut = true,
                    Poll::Ready(Err(_)) => return Poll::Ready(()),
                    Poll::Pending => {}
                }
            }
            while dropped < LINGER_BYTES_MAX && !self.eof {
                match with_scratch(|scratch| poll_read(&mut self.source, cx, &mut scratch.read)) {
                    Poll::Ready(Ok(count)) if count > 0 => dropped += count,
                    Poll::Ready(_) => return Poll::Ready(()),
                    Poll::Pending => return self.timer.poll(cx),
                }
            }
            Poll::Ready(())
        })
        .await;
    }
}

enum ConnectFailure {
    Reply(Reply),
    Late,
}
