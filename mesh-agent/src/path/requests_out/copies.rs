//! What mirrors get: copies of requests, sent beside them and forgotten.
//!
//! A copy goes the way of any request of its source — admitted, balanced, judged, recorded — to the mirror's backend and
//! no other. It never delays the request that it is a copy of, and nothing of it ever reaches the source. What is not
//! sent is counted.

use std::{
    cell::Cell,
    io,
    net::SocketAddr,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Buf, Bytes};
use http::StatusCode;
use mesh_api::{backend::Backend, request::Request, route::RouteRule};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{Asked, Exchange, RequestsOut};
use crate::{
    event::Refusal,
    l7::{
        self, Attempt, Attempted, CopyTo, End, Facts, Fault, Handler, Limits, Reply, RequestCopy, Target, Verdict,
        Wire, h2::StreamCopy,
    },
    path::target::TargetStream,
    pods::Pod,
    worker::Worker,
};

/// The time that a copy may take from its first byte to the last one of the answer.
const COPY_TIMEOUT: Duration = Duration::from_secs(30);

/// The copies of one request that are to be sent. Dropped, those that were not are counted.
pub(super) struct Copies {
    worker: Rc<Worker>,
    pod: Arc<Pod>,
    source: SocketAddr,
    original_destination: SocketAddr,
    rule: Arc<RouteRule>,
    backends: Vec<Arc<Backend>>,
}

impl Copies {
    /// Those that the rule's mirrors want of this request, chosen by chance.
    pub fn of(asking: &RequestsOut, rule: &Arc<RouteRule>) -> Option<CopyTo> {
        let wanted = rule.mirrors.iter().filter(|mirror| mirror.takes(rand::random()));
        let backends: Vec<_> = wanted
            .filter_map(|mirror| mirror.backend.as_ref().ok().cloned())
            .collect();
        if backends.is_empty() {
            return None;
        }
        let copies = Copies {
            worker: asking.worker.clone(),
            pod: asking.pod.clone(),
            source: asking.source,
            original_destination: asking.original_destination,
            rule: rule.clone(),
            backends,
        };
        Some(CopyTo::new(|copy| copies.send(&copy)))
    }

    fn send(mut self, copy: &RequestCopy) {
        for backend in std::mem::take(&mut self.backends) {
            let Some(place) = self.worker.copy_place() else {
                self.count();
                continue;
            };
            let asked = Asked::Copies {
                rule: self.rule.clone(),
                backend,
            };
            let sender = RequestsOut::asking(
                self.worker.clone(),
                self.pod.clone(),
                self.source,
                self.original_destination,
                asked,
            );
            let guard = self.worker.shared.drain.guard();
            let sending: Pin<Box<dyn Future<Output = ()>>> = match copy {
                RequestCopy::Http1(bytes) => Box::pin(send_http1(sender, bytes.clone())),
                RequestCopy::Http2(copy) => {
                    let copy = StreamCopy::clone(copy);
                    Box::pin(async move { l7::h2::send_copy(&sender, copy).await })
                }
            };
            tokio::task::spawn_local(async move {
                // One that takes too long is dropped, which closes its record.
                let _ = tokio::time::timeout(COPY_TIMEOUT, sending).await;
                drop((place, guard));
            });
        }
    }

    fn count(&self) {
        self.worker.shared.events.refused(Refusal::MirrorDropped);
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        for _ in &self.backends {
            self.count();
        }
    }
}

async fn send_http1(sender: RequestsOut, bytes: Bytes) {
    let over = Rc::new(Cell::new(false));
    let source = Source {
        bytes,
        over: over.clone(),
    };
    let handler = Rc::new(Sender { inner: sender, over });
    // It has no source that could be told.
    let _ = l7::h1::serve(source, handler, &Limits::default(), std::future::pending::<Duration>()).await;
}

/// A source that sends one request and takes any answer. It says that it will send nothing more only when the exchange
/// is over: a destination could take it for a source that gave up.
struct Source {
    bytes: Bytes,
    over: Rc<Cell<bool>>,
}

impl AsyncRead for Source {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.bytes.has_remaining() {
            let count = self.bytes.len().min(buffer.remaining());
            buffer.put_slice(&self.bytes.split_to(count));
            return Poll::Ready(Ok(()));
        }
        // While the exchange goes on its target wakes the task; what ends it runs in this very task.
        if self.over.get() {
            Poll::Ready(Ok(()))
        } else {
            Poll::Pending
        }
    }
}

impl AsyncWrite for Source {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(bytes.len()))
    }
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl Wire for Source {
    fn abort(&mut self) {}

    fn unread(&mut self, bytes: &[u8]) {
        self.bytes = [bytes, &self.bytes].concat().into();
    }
}

/// [`RequestsOut`] for the one request of a [`Source`].
struct Sender {
    inner: RequestsOut,
    over: Rc<Cell<bool>>,
}

impl Handler for Sender {
    type Source = Source;
    type Target = TargetStream;
    type Exchange = Exchange;

    async fn decide(&self, request: &dyn Request, facts: Facts) -> Verdict<Exchange> {
        self.inner.decide(request, facts).await
    }

    async fn connect(&self, exchange: &mut Exchange, attempt: Attempt) -> Result<Target<TargetStream>, Reply> {
        self.inner.connect(exchange, attempt).await
    }

    async fn connect_h2(
        &self,
        exchange: &mut Exchange,
        attempt: Attempt,
    ) -> Result<::h2::client::SendRequest<Bytes>, Reply> {
        self.inner.connect_h2(exchange, attempt).await
    }

    fn release(&self, exchange: &mut Exchange, wire: TargetStream) {
        self.inner.release(exchange, wire);
    }

    fn again(&self, exchange: &mut Exchange, attempted: Attempted, retries: u32) -> bool {
        self.inner.again(exchange, attempted, retries)
    }

    fn responded(&self, exchange: &mut Exchange, status: StatusCode) {
        self.inner.responded(exchange, status);
    }

    async fn relay(&self, _: &mut Exchange, _: Source, _: TargetStream) -> (u64, u64) {
        // Requests that ask for an upgrade are not copied.
        (0, 0)
    }

    fn answer(&self, fault: Fault) -> Reply {
        self.inner.answer(fault)
    }

    fn finish(&self, exchange: Exchange, end: End) {
        self.over.set(true);
        self.inner.finish(exchange, end);
    }

    fn refused(&self, fault: Fault, status: Option<StatusCode>) {
        self.over.set(true);
        self.inner.refused(fault, status);
    }
}
