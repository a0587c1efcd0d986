//! One HTTP/2 request from its head to its last byte.
//!
//! As in HTTP/1's exchange: decide, connect, send, and both bodies at once. A reset on one side becomes the same reset
//! on the other; where nothing of a response was sent and the target did not speak, the source is told a status.

use std::{
    cell::Cell,
    future::{Future, poll_fn},
    pin::{Pin, pin},
    rc::Rc,
    task::{Poll, ready},
};

use bytes::Bytes;
use h2::{
    Reason, RecvStream, SendStream,
    client::{ResponseFuture, SendRequest},
    server::SendResponse,
};
use http::{HeaderMap, Method, Request as HttpRequest, Response, request::Parts};
use tokio::time::Instant;

use super::{copy::StreamCopy, head};
use crate::l7::{
    Attempt, Attempted, End, Facts, Fault, Forward, Handler, Limits, Reply, RequestCopy, UNDELIVERED_HEADER, Verdict,
    Version, timer::Timer,
};

/// What of a request's body is kept so that it can be sent again.
const REPLAY_BYTES_MAX: usize = 64 * 1024;
/// Attempts for one request, whatever a handler asks for.
const ATTEMPTS_MAX: u32 = 16;

/// What stays the same through all attempts.
struct Call<'a, H: Handler> {
    handler: &'a H,
    parts: &'a Parts,
    forward: &'a Forward,
    deadline: Option<Instant>,
    /// All that was read of the request's body is kept.
    replayable: Cell<bool>,
}

/// The request's body: what was read of it, as long as that can be sent again, and what is to come.
struct Body {
    stream: RecvStream,
    kept: Vec<Bytes>,
    trailers: Option<HeaderMap>,
    over: bool,
    bytes: u64,
}

/// The source's side of the response.
struct Answer {
    respond: SendResponse<Bytes>,
    stream: Option<SendStream<Bytes>>,
    end: End,
}

/// How an attempt failed.
enum Failure {
    /// A fault to report, or to try again.
    Fault(Fault),
    /// The target reset the stream: so do we.
    Reset(Reason),
    /// The source reset it, or went away.
    Source(Reason),
    /// The handler has no connection.
    Reply(Reply),
}

/// How an attempt that did not fail ended.
enum Sent {
    /// The response is over.
    Whole,
    /// The handler wants another attempt.
    Again,
}

/// Serves one stream.
pub(super) async fn run<H: Handler>(
    handler: Rc<H>,
    request: HttpRequest<RecvStream>,
    respond: SendResponse<Bytes>,
    limits: Limits,
    index: u64,
) {
    let started = Instant::now();
    let (parts, stream) = request.into_parts();
    let mut answer = Answer {
        respond,
        stream: None,
        end: End::default(),
    };
    let grpc = head::is_grpc(&parts.headers);
    let to_head = parts.method == Method::HEAD;
    if let Err(defect) = head::check(&parts, limits.headers_max) {
        let fault = Fault::Request(defect);
        answer.reply(&handler.answer(fault), grpc, to_head);
        return handler.refused(fault, answer.end.status);
    }
    let over = stream.is_end_stream();
    let facts = Facts {
        version: Version::Http2,
        upgrade: false,
        grpc,
        body: !over,
        index,
    };
    let (forward, mut exchange) = match handler.decide(&head::View(&parts), facts).await {
        Verdict::Forward(forward, exchange) => (forward, exchange),
        Verdict::Reply(reply, exchange) => {
            answer.reply(&reply, grpc, to_head);
            return handler.finish(exchange, answer.end);
        }
    };
    let mut body = Body {
        stream,
        kept: Vec::new(),
        trailers: None,
        over,
        bytes: 0,
    };
    let call = Call {
        handler: &*handler,
        parts: &parts,
        forward: &forward,
        deadline: forward.request_timeout.map(|timeout| started + timeout),
        replayable: Cell::new(true),
    };
    if body.over {
        body.give_copy(&parts, &forward, &call.replayable);
    }
    let result = call.attempts(&mut exchange, &mut body, &mut answer).await;
    answer.end.request_bytes = body.bytes;
    if let Err(failure) = result {
        answer.fail(&*handler, failure, grpc, to_head);
    }
    handler.finish(exchange, answer.end);
}

impl<H: Handler> Call<'_, H> {
    /// Sends the request until an attempt is answered or no further one is wanted.
    async fn attempts(&self, exchange: &mut H::Exchange, body: &mut Body, answer: &mut Answer) -> Result<(), Failure> {
        let (mut attempt, mut retries, mut fresh_tried) = (Attempt::First, 0, false);
        for number in 1.. {
            let retry = (number < ATTEMPTS_MAX).then_some(retries);
            let failure = match Box::pin(self.once(exchange, body, answer, attempt, retry)).await {
                Ok(Sent::Whole) => return Ok(()),
                Ok(Sent::Again) => None,
                Err(failure) => Some(failure),
            };
            let resendable = retry.is_some() && self.replayable.get() && answer.end.status.is_none();
            let mut again = |fault| resendable && self.handler.again(exchange, Attempted::Failed(fault), retries);
            attempt = match failure {
                None => Attempt::Retry(retries + 1),
                // The target did nothing with it: another connection may, and that is no retry.
                Some(Failure::Fault(Fault::StreamRefused)) if resendable && !fresh_tried => Attempt::Fresh,
                Some(Failure::Fault(fault)) if fault != Fault::RequestTimeout && again(fault) => {
                    Attempt::Retry(retries + 1)
                }
                Some(Failure::Reset(_)) if again(Fault::TargetClosed) => Attempt::Retry(retries + 1),
                Some(failure) => return Err(failure),
            };
            match attempt {
                Attempt::Fresh => fresh_tried = true,
                Attempt::Retry(count) => retries = count,
                Attempt::First => {}
            }
        }
        Ok(())
    }

    /// One attempt; `retry` counts those before it and is none for the last.
    async fn once(
        &self,
        exchange: &mut H::Exchange,
        body: &mut Body,
        answer: &mut Answer,
        attempt: Attempt,
        retry: Option<u32>,
    ) -> Result<Sent, Failure> {
        let mut timer = Timer::default();
        timer.set(self.deadline);
        let mut target = self.connect(exchange, attempt, answer, &mut timer).await?;
        // Neither a pause before the attempt nor the dial is part of it, as with HTTP/1.
        let attempt_deadline = self.forward.attempt_timeout.map(|timeout| Instant::now() + timeout);
        timer.set([self.deadline, attempt_deadline].into_iter().flatten().min());
        let request = head::outgoing(self.parts, self.forward).map_err(Failure::Fault)?;
        let ends = body.over && body.kept.is_empty() && body.trailers.is_none();
        let (response, mut up) = target
            .send_request(request, ends)
            .map_err(|_| Failure::Fault(Fault::StreamRefused))?;
        let head_came = Cell::new(false);
        let result = {
            let mut sending = pin!(body.send(&mut up, ends, (self.parts, self.forward, &self.replayable)));
            let mut receiving = pin!(self.receive(exchange, answer, response, retry, &head_came));
            let (mut sent, mut moved) = (false, false);
            poll_fn(|cx| {
                if !sent && let Poll::Ready(result) = sending.as_mut().poll(cx) {
                    // A target that takes no more may still answer; a source that broke off ends it all.
                    if let Err(failure @ Failure::Source(_)) = result {
                        return Poll::Ready(Err(failure));
                    }
                    sent = true;
                }
                if let Poll::Ready(result) = receiving.as_mut().poll(cx) {
                    return Poll::Ready(result);
                }
                if head_came.get() && !moved {
                    moved = true;
                    timer.set(self.deadline);
                }
                timer.poll(cx).map(|()| Err(self.late()))
            })
            .await
        };
        match &result {
            Ok(Sent::Whole) => {}
            Err(Failure::Source(reason)) => up.send_reset(*reason),
            _ => up.send_reset(Reason::CANCEL),
        }
        result
    }

    fn late(&self) -> Failure {
        let whole = self.deadline.is_some_and(|deadline| deadline <= Instant::now());
        Failure::Fault(if whole {
            Fault::RequestTimeout
        } else {
            Fault::AttemptTimeout
        })
    }

    /// A connection that takes another stream.
    async fn connect(
        &self,
        exchange: &mut H::Exchange,
        attempt: Attempt,
        answer: &mut Answer,
        timer: &mut Timer,
    ) -> Result<SendRequest<Bytes>, Failure> {
        let mut connect = pin!(async {
            let mut target = self
                .handler
                .connect_h2(exchange, attempt)
                .await
                .map_err(Failure::Reply)?;
            let ready = poll_fn(|cx| target.poll_ready(cx)).await;
            // Nothing was sent on it yet.
            ready.map_err(|_| Failure::Fault(Fault::StreamRefused))?;
            Ok(target)
        });
        poll_fn(|cx| {
            if let Poll::Ready(reason) = answer.respond.poll_reset(cx) {
                return Poll::Ready(Err(Failure::Source(reason.unwrap_or(Reason::CANCEL))));
            }
            match connect.as_mut().poll(cx) {
                Poll::Ready(target) => Poll::Ready(target),
                Poll::Pending => timer.poll(cx).map(|()| Err(self.late())),
            }
        })
        .await
    }

    /// Passes the response on.
    async fn receive(
        &self,
        exchange: &mut H::Exchange,
        answer: &mut Answer,
        mut response: ResponseFuture,
        retry: Option<u32>,
        head_came: &Cell<bool>,
    ) -> Result<Sent, Failure> {
        let response = poll_fn(|cx| {
            if let Poll::Ready(reason) = answer.respond.poll_reset(cx) {
                return Poll::Ready(Err(Failure::Source(reason.unwrap_or(Reason::CANCEL))));
            }
            while let Poll::Ready(Some(Ok(interim))) = response.poll_informational(cx) {
                // A source that is gone shows in its reset.
                let _ = answer.respond.send_informational(interim);
            }
            Pin::new(&mut response)
                .poll(cx)
                .map_err(|error| from_target(&error, false))
        })
        .await?;
        let (mut parts, mut body) = response.into_parts();
        let undelivered = parts.headers.remove(UNDELIVERED_HEADER).is_some();
        if let Some(retries) = retry
            && self.replayable.get()
            && self
                .handler
                .again(exchange, Attempted::answered(parts.status, undelivered), retries)
        {
            return Ok(Sent::Again);
        }
        self.handler.responded(exchange, parts.status);
        head_came.set(true);
        let source_is_gone = |_| Failure::Source(Reason::CANCEL);
        answer.end.grpc_status = head::grpc_status(&parts.headers);
        head::apply(&mut parts.headers, &self.forward.response_headers);
        let ends = body.is_end_stream();
        let mut head = Response::new(());
        *head.status_mut() = parts.status;
        *head.headers_mut() = parts.headers;
        let stream = answer.respond.send_response(head, ends).map_err(source_is_gone)?;
        let stream = answer.stream.insert(stream);
        answer.end.status = Some(parts.status);
        if ends {
            return Ok(Sent::Whole);
        }
        loop {
            let data = poll_fn(|cx| {
                if let Poll::Ready(reason) = stream.poll_reset(cx) {
                    return Poll::Ready(Err(Failure::Source(reason.unwrap_or(Reason::CANCEL))));
                }
                Poll::Ready(Ok(ready!(body.poll_data(cx))))
            })
            .await?;
            let Some(data) = data else { break };
            let data = data.map_err(|error| from_target(&error, true))?;
            let (count, ends) = (data.len(), body.is_end_stream());
            send(stream, data, ends).await.map_err(Failure::Source)?;
            answer.end.response_bytes += count as u64;
            // Fails only for more than was received.
            let _ = body.flow_control().release_capacity(count);
            if ends {
                return Ok(Sent::Whole);
            }
        }
        let trailers = poll_fn(|cx| body.poll_trailers(cx))
            .await
            .map_err(|error| from_target(&error, true))?;
        let sent = match trailers {
            None => stream.send_data(Bytes::new(), true),
            Some(trailers) => {
                answer.end.grpc_status = head::grpc_status(&trailers).or(answer.end.grpc_status);
                stream.send_trailers(trailers)
            }
        };
        sent.map_err(source_is_gone)?;
        Ok(Sent::Whole)
    }
}

impl Body {
    /// The request as it came, if all of it is there.
    fn give_copy(&self, parts: &Parts, forward: &Forward, replayable: &Cell<bool>) {
        if let Some(to) = &forward.copy
            && replayable.get()
        {
            to.give(|| {
                RequestCopy::Http2(Box::new(StreamCopy {
                    parts: parts.clone(),
                    body: self.kept.clone(),
                    trailers: self.trailers.clone(),
                }))
            });
        }
    }

    /// Sends what was kept of it, and then what comes. `ended` says that the head has ended the stream already.
    async fn send(
        &mut self,
        up: &mut SendStream<Bytes>,
        ended: bool,
        (parts, forward, replayable): (&Parts, &Forward, &Cell<bool>),
    ) -> Result<(), Failure> {
        if ended {
            return Ok(());
        }
        let target_takes_no_more = |_| Failure::Fault(Fault::TargetClosed);
        let ends_with_data = self.over && self.trailers.is_none();
        for (number, data) in self.kept.iter().enumerate() {
            let ends = ends_with_data && number + 1 == self.kept.len();
            send(up, data.clone(), ends).await.map_err(target_takes_no_more)?;
        }
        while !self.over {
            let Some(data) = poll_fn(|cx| self.stream.poll_data(cx)).await else {
                let trailers = poll_fn(|cx| self.stream.poll_trailers(cx)).await.map_err(from_source)?;
                (self.trailers, self.over) = (trailers, true);
                if self.trailers.is_none() {
                    up.send_data(Bytes::new(), true)
                        .map_err(|_| Failure::Fault(Fault::TargetClosed))?;
                }
                break;
            };
            let data = data.map_err(from_source)?;
            let count = data.len();
            self.bytes += count as u64;
            self.over = self.stream.is_end_stream();
            if self.bytes > REPLAY_BYTES_MAX as u64 {
                replayable.set(false);
                self.kept = Vec::new();
            } else {
                self.kept.push(data.clone());
            }
            send(up, data, self.over).await.map_err(target_takes_no_more)?;
            // Fails only for more than was received.
            let _ = self.stream.flow_control().release_capacity(count);
        }
        self.give_copy(parts, forward, replayable);
        match self.trailers.clone() {
            None => Ok(()),
            Some(trailers) => up
                .send_trailers(trailers)
                .map_err(|_| Failure::Fault(Fault::TargetClosed)),
        }
    }
}

/// Sends `data` as the reader's window allows. `Err` is the reason why the stream takes no more.
pub(super) async fn send(stream: &mut SendStream<Bytes>, mut data: Bytes, ends: bool) -> Result<(), Reason> {
    if data.is_empty() {
        return if ends {
            stream.send_data(data, true).map_err(|error| reason(&error))
        } else {
            Ok(())
        };
    }
    while !data.is_empty() {
        stream.reserve_capacity(data.len());
        let capacity = poll_fn(|cx| {
            while stream.capacity() == 0 {
                match ready!(stream.poll_capacity(cx)) {
                    Some(Ok(_)) => {}
                    Some(Err(error)) => return Poll::Ready(Err(reason(&error))),
                    None => return Poll::Ready(Err(Reason::CANCEL)),
                }
            }
            Poll::Ready(Ok(stream.capacity()))
        })
        .await?;
        let part = data.split_to(capacity.min(data.len()));
        stream
            .send_data(part, ends && data.is_empty())
            .map_err(|error| reason(&error))?;
    }
    Ok(())
}

fn reason(error: &h2::Error) -> Reason {
    error.reason().unwrap_or(Reason::CANCEL)
}

fn from_source(error: h2::Error) -> Failure {
    Failure::Source(reason(&error))
}

/// What an error of the target's connection or stream means; `began` says that the response's head came.
fn from_target(error: &h2::Error, began: bool) -> Failure {
    match error.reason() {
        // Streams that a GOAWAY names were not processed (RFC 9113 §6.8).
        _ if error.is_go_away() && error.is_remote() && !began => Failure::Fault(Fault::StreamRefused),
        Some(Reason::REFUSED_STREAM) if error.is_reset() && !began => Failure::Fault(Fault::StreamRefused),
        Some(reason) if error.is_reset() && error.is_remote() => Failure::Reset(reason),
        _ if began => Failure::Fault(Fault::ResponseCut),
        _ => Failure::Fault(Fault::TargetClosed),
    }
}

impl Answer {
    /// Answers in place of the target.
    fn reply(&mut self, reply: &Reply, grpc: bool, to_head: bool) {
        if reply.abort {
            return self.respond.send_reset(Reason::INTERNAL_ERROR);
        }
        let (response, body) = head::answer(reply, grpc, to_head);
        let status = response.status();
        self.end.replied = true;
        let Ok(mut stream) = self.respond.send_response(response, body.is_empty()) else {
            self.end.fault = Some(Fault::SourceClosed);
            return;
        };
        self.end.status = Some(status);
        self.end.grpc_status = grpc.then_some(reply.grpc.code());
        if !body.is_empty() {
            self.end.response_bytes = body.len() as u64;
            // A short text; a source that is gone does not miss it.
            let _ = stream.send_data(body, true);
        }
        self.stream = Some(stream);
    }

    /// Tells the source of a failure, as far as that is still possible.
    fn fail(&mut self, handler: &impl Handler, failure: Failure, grpc: bool, to_head: bool) {
        let began = self.stream.is_some();
        match failure {
            Failure::Reply(reply) => self.reply(&reply, grpc, to_head),
            Failure::Source(reason) => {
                self.end.fault = Some(Fault::SourceClosed);
                self.reset(reason);
            }
            Failure::Reset(reason) => {
                self.end.fault = Some(if began { Fault::ResponseCut } else { Fault::TargetClosed });
                self.reset(reason);
            }
            Failure::Fault(fault) => {
                self.end.fault = Some(fault);
                match &mut self.stream {
                    None => self.reply(&handler.answer(fault), grpc, to_head),
                    Some(stream) if grpc => {
                        self.end.grpc_status = Some(fault.grpc().code());
                        let trailers = head::grpc_trailers(fault.grpc(), &fault.to_string());
                        // A source that is gone does not miss it.
                        let _ = stream.send_trailers(trailers);
                    }
                    Some(_) => self.reset(Reason::INTERNAL_ERROR),
                }
            }
        }
    }

    fn reset(&mut self, reason: Reason) {
        match &mut self.stream {
            Some(stream) => stream.send_reset(reason),
            None => self.respond.send_reset(reason),
        }
    }
}
