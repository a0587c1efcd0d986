//! Layer 7: HTTP/1.1 and HTTP/2 between a source's connection and the connections its requests are sent on.
//!
//! The engines know framing and nothing else. What to do with a request — route, authorize, limit, balance, dial,
//! record — is asked of a [`Handler`], once at each step; `path` implements it at the source and at the destination.
//! One task owns the source's connection and the target's: no channel and no second task stand on the way of an
//! HTTP/1 request. The engines must never forward a byte of a request that was not decided, and never guess at a
//! message's length: what is ambiguous is refused.

pub mod detect;
pub mod h1;
pub mod h2;
pub mod headers;
mod timer;

use std::{borrow::Cow, cell::RefCell, io, time::Duration};

use bytes::Bytes;
use http::StatusCode;
use mesh_api::request::Request;
use tokio::io::{AsyncRead, AsyncWrite};

pub use headers::{HeaderChanges, Standard};

use crate::transport::Transport;

/// The header by which a destination's agent tells its peer that it delivered nothing of the request. It never leaves
/// the agents: the engines take it off every response that they forward.
pub const UNDELIVERED_HEADER: &str = "x-nodemesh-undelivered";

/// A byte stream that an engine owns: a socket or a tunnel.
pub trait Wire: AsyncRead + AsyncWrite + Unpin + 'static {
    /// Makes the coming close a reset: what was sent so far must not look whole to the reader.
    fn abort(&mut self);

    /// Puts bytes back in front of the stream: the next reader sees them first.
    fn unread(&mut self, bytes: &[u8]);
}

/// What the engine knows of a request beside its head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// How it came.
    pub version: Version,
    /// It asks for another protocol on this connection (`Upgrade`): a 101 turns it into a relay.
    pub upgrade: bool,
    /// Its content type is gRPC's: refusals are told by `grpc-status`.
    pub grpc: bool,
    /// Whether a body follows.
    pub body: bool,
    /// How many requests came before it on this connection.
    pub index: u64,
}

/// The protocol version that a request came with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// HTTP/1.0.
    Http10,
    /// HTTP/1.1.
    Http11,
    /// HTTP/2.
    Http2,
}

/// What is to become of a request.
#[expect(
    clippy::large_enum_variant,
    reason = "lives for one step of a request's way; a box would cost each request"
)]
pub enum Verdict<X> {
    /// Send it on, as changed. `X` accompanies it until [`Handler::finish`].
    Forward(Forward, X),
    /// Answer it here.
    Reply(Reply, X),
}

/// How to send a request on.
#[derive(Debug, Default)]
pub struct Forward {
    /// The path and query to send in place of those that came; `None` keeps them.
    pub target: Option<String>,
    /// The authority to send in place of the one that came.
    pub authority: Option<String>,
    /// Changes to the request's headers.
    pub request_headers: HeaderChanges,
    /// Changes to the response's headers (not to those of interim responses).
    pub response_headers: HeaderChanges,
    /// The headers that the mesh itself sets or strips.
    pub standard: Standard,
    /// The time from the decision to the last byte of the response; a 504 when it ends before the response began.
    pub request_timeout: Option<Duration>,
    /// The time that one attempt may take until the response's head.
    pub attempt_timeout: Option<Duration>,
    /// Who wants a copy of the request.
    pub copy: Option<CopyTo>,
}

/// The longest body of a request that is copied.
pub const COPY_BYTES_MAX: usize = 64 * 1024;

/// Takes the copy of a request once its body is over, whatever became of the request itself. Dropped without one if the
/// body was longer than [`COPY_BYTES_MAX`], or did not come to its end.
pub struct CopyTo(RefCell<Option<Taker>>);

type Taker = Box<dyn FnOnce(RequestCopy)>;

/// A whole request as it came.
pub enum RequestCopy {
    /// Its bytes: the head, and the body as it was framed.
    Http1(Bytes),
    /// The parts of a stream.
    Http2(Box<h2::StreamCopy>),
}

impl CopyTo {
    /// Gives the copy to `take`.
    pub fn new(take: impl FnOnce(RequestCopy) + 'static) -> CopyTo {
        CopyTo(RefCell::new(Some(Box::new(take))))
    }

    /// Gives the copy, the first time that it is asked to.
    fn give(&self, copy: impl FnOnce() -> RequestCopy) {
        let taker = self.0.borrow_mut().take();
        if let Some(taker) = taker {
            taker(copy());
        }
    }
}

impl std::fmt::Debug for CopyTo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CopyTo")
    }
}

/// An answer given by the agent.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The HTTP status.
    pub status: StatusCode,
    /// Further headers; names in lower case. Lengths and connection headers are the engine's.
    pub headers: Vec<(&'static str, String)>,
    /// A short text for people.
    pub body: Cow<'static, str>,
    /// What a gRPC source is told in place of `status`.
    pub grpc: GrpcStatus,
    /// Close the connection without an answer (HTTP/2: reset the stream).
    pub abort: bool,
}

/// The gRPC statuses that an agent answers with (grpc/grpc statuscodes.md).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GrpcStatus {
    /// 4
    DeadlineExceeded,
    /// 7
    PermissionDenied,
    /// 8
    ResourceExhausted,
    /// 12
    Unimplemented,
    /// 13
    Internal,
    /// 14
    Unavailable,
}

/// Why a connection for a request is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// The first one. A pooled connection is welcome.
    First,
    /// The pooled connection was dead before it took or answered anything: give one that was never used.
    /// The endpoint may stay the same; this does not count as a retry.
    Fresh,
    /// [`Handler::again`] asked for another attempt.
    Retry(u32),
}

/// A connection to send one HTTP/1 request on.
pub struct Target<W> {
    /// The stream.
    pub wire: W,
    /// It carried a request before: it may have been closed under us.
    pub reused: bool,
}

/// How far an attempt came when [`Handler::again`] is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempted {
    /// The response's head came, with this status; nothing of it was sent to the source.
    Status(StatusCode),
    /// The same, and it says that nothing was delivered ([`UNDELIVERED_HEADER`]). Only a peer's word counts.
    Undelivered(StatusCode),
    /// The connection failed, or its answer was not HTTP, or the attempt's time was over.
    Failed(Fault),
}

impl Attempted {
    fn answered(status: StatusCode, undelivered: bool) -> Attempted {
        if undelivered {
            Attempted::Undelivered(status)
        } else {
            Attempted::Status(status)
        }
    }
}

/// How a request ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct End {
    /// The status that the source was sent, if any.
    pub status: Option<StatusCode>,
    /// `grpc-status` of the response's headers or trailers.
    pub grpc_status: Option<u32>,
    /// Bytes of the request's body taken from the source.
    pub request_bytes: u64,
    /// Bytes of the response's body sent to the source.
    pub response_bytes: u64,
    /// The agent answered in place of the target ([`Verdict::Reply`], or a refusal after it).
    pub replied: bool,
    /// It became a relay (101).
    pub upgraded: bool,
    /// What went wrong; `None` is a whole exchange.
    pub fault: Option<Fault>,
}

/// What went wrong with a request or a connection, as the engines see it. `path` maps each to a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Fault {
    /// The source's message is not one we may forward.
    #[error("request refused: {0}")]
    Request(#[from] h1::RequestDefect),
    /// The source did not finish a head in time.
    #[error("the request's head did not come in time")]
    HeadTimeout,
    /// The source went away before its request or our response was whole.
    #[error("the source closed before the exchange was over")]
    SourceClosed,
    /// The target's message is not one we may forward.
    #[error("response refused: {0}")]
    Response(#[from] h1::ResponseDefect),
    /// The target closed or reset before the response's head.
    #[error("the target closed before it answered")]
    TargetClosed,
    /// The target closed or reset within the response.
    #[error("the target closed within its response")]
    ResponseCut,
    /// The request's time was over.
    #[error("the request's time was over")]
    RequestTimeout,
    /// An attempt's time was over.
    #[error("the attempt's time was over")]
    AttemptTimeout,
    /// The target refused the stream before it did any work (HTTP/2 REFUSED_STREAM or GOAWAY).
    #[error("the target refused the stream")]
    StreamRefused,
    /// The source broke HTTP/2 itself; the connection ends.
    #[error("the source broke HTTP/2")]
    SourceProtocol,
}

impl Fault {
    /// The status that the source is told when nothing of a response was sent yet; `None` when nobody listens.
    pub fn status(self) -> Option<StatusCode> {
        Some(match self {
            Fault::Request(defect) => defect.status(),
            Fault::HeadTimeout => StatusCode::REQUEST_TIMEOUT,
            Fault::Response(_) => StatusCode::BAD_GATEWAY,
            Fault::TargetClosed | Fault::StreamRefused => StatusCode::SERVICE_UNAVAILABLE,
            Fault::RequestTimeout | Fault::AttemptTimeout => StatusCode::GATEWAY_TIMEOUT,
            Fault::SourceClosed | Fault::ResponseCut | Fault::SourceProtocol => return None,
        })
    }

    /// The same for a gRPC source.
    pub fn grpc(self) -> GrpcStatus {
        match self {
            Fault::RequestTimeout | Fault::AttemptTimeout => GrpcStatus::DeadlineExceeded,
            Fault::Request(_) | Fault::Response(_) => GrpcStatus::Internal,
            _ => GrpcStatus::Unavailable,
        }
    }
}

impl Reply {
    /// A reply with a text and no further headers.
    pub fn new(status: StatusCode, grpc: GrpcStatus, body: impl Into<Cow<'static, str>>) -> Reply {
        Reply {
            status,
            headers: Vec::new(),
            body: body.into(),
            grpc,
            abort: false,
        }
    }

    /// What the source is told of a fault.
    pub fn of(fault: Fault) -> Reply {
        let status = fault.status().unwrap_or(StatusCode::BAD_GATEWAY);
        Reply::new(status, fault.grpc(), format!("{fault}\n"))
    }

    /// No answer: the connection closes, the stream is reset.
    pub fn abort() -> Reply {
        Reply {
            abort: true,
            ..Reply::new(StatusCode::SERVICE_UNAVAILABLE, GrpcStatus::Unavailable, "")
        }
    }

    /// Adds a header; the name is in lower case.
    pub fn with_header(mut self, name: &'static str, value: impl Into<String>) -> Reply {
        self.headers.push((name, value.into()));
        self
    }
}

impl GrpcStatus {
    /// The number on the wire.
    pub fn code(self) -> u32 {
        match self {
            GrpcStatus::DeadlineExceeded => 4,
            GrpcStatus::PermissionDenied => 7,
            GrpcStatus::ResourceExhausted => 8,
            GrpcStatus::Unimplemented => 12,
            GrpcStatus::Internal => 13,
            GrpcStatus::Unavailable => 14,
        }
    }
}

/// What decides about requests and finds connections for them. All calls for one source connection come from one task
/// (HTTP/2: one thread), so an implementation may be `!Send` and use `Rc` and `RefCell`.
///
/// For each request: `decide`, then (if forwarded) `connect` once or more, `responded`, `release` if the connection can
/// carry another request, and `finish` exactly once. An exchange that is dropped without `finish` was cancelled.
#[allow(async_fn_in_trait)]
pub trait Handler: 'static {
    /// The source's connection.
    type Source: Wire;
    /// A connection to a target.
    type Target: Wire;
    /// What accompanies one request: its record, guards, permit, the endpoint picked. Its drop must close the record.
    type Exchange;

    /// Judges a request by its head.
    async fn decide(&self, request: &dyn Request, facts: Facts) -> Verdict<Self::Exchange>;

    /// Gives a connection for an HTTP/1 request. A handler tries other endpoints by itself; an `Err` is final.
    async fn connect(&self, exchange: &mut Self::Exchange, attempt: Attempt) -> Result<Target<Self::Target>, Reply>;

    /// Gives an HTTP/2 connection to open the request's stream on.
    async fn connect_h2(
        &self,
        exchange: &mut Self::Exchange,
        attempt: Attempt,
    ) -> Result<::h2::client::SendRequest<Bytes>, Reply>;

    /// Takes a connection back which can carry another request. One that cannot is dropped instead.
    fn release(&self, exchange: &mut Self::Exchange, wire: Self::Target);

    /// Whether to try again; asked only while the request can be sent again whole and nothing was sent to the source.
    /// `retries` counts those made. `true` leads to `connect` with [`Attempt::Retry`].
    fn again(&self, exchange: &mut Self::Exchange, attempted: Attempted, retries: u32) -> bool {
        let _ = (exchange, attempted, retries);
        false
    }

    /// The response's head came: `status` goes to the source now. For breakers, latencies and the log.
    fn responded(&self, exchange: &mut Self::Exchange, status: StatusCode) {
        let _ = (exchange, status);
    }

    /// Carries bytes both ways after a 101, until either side ends; returns bytes (from the source, to the source).
    async fn relay(&self, exchange: &mut Self::Exchange, source: Self::Source, target: Self::Target) -> (u64, u64);

    /// What a source is told of a fault, while it can be told anything.
    fn answer(&self, fault: Fault) -> Reply {
        Reply::of(fault)
    }

    /// The request is over. Called exactly once for each exchange.
    fn finish(&self, exchange: Self::Exchange, end: End);

    /// A message that never came to `decide` was refused (malformed, too large, too slow). `status` is what was sent.
    fn refused(&self, fault: Fault, status: Option<StatusCode>);
}

/// Bounds of an engine, the same for both protocols.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The longest head, in bytes; above it 431.
    pub head_bytes_max: usize,
    /// The longest request line; above it 414.
    pub request_line_bytes_max: usize,
    /// The most header fields; above it 431.
    pub headers_max: usize,
    /// The time from the first byte of a head to its last.
    pub head_timeout: Duration,
    /// The time that a source's connection may stay without a request.
    pub idle_timeout: Duration,
    /// HTTP/2 streams at once on a source's connection.
    pub streams_max: u32,
    /// How long a closing HTTP/1 connection is read empty, so that our last answer is not overtaken by a reset.
    pub linger: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            head_bytes_max: 32 * 1024,
            request_line_bytes_max: 8 * 1024,
            headers_max: 100,
            head_timeout: Duration::from_secs(15),
            idle_timeout: Duration::from_secs(3600),
            streams_max: 256,
            linger: Duration::from_secs(2),
        }
    }
}

/// How the service of a source's connection ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The source's socket failed.
    #[error("the source's connection failed")]
    Source(#[source] io::Error),
    /// A message was refused and the connection closed.
    #[error(transparent)]
    Fault(#[from] Fault),
}

impl Wire for Transport {
    fn abort(&mut self) {
        self.set_linger_reset();
    }

    fn unread(&mut self, bytes: &[u8]) {
        Transport::unread(self, bytes);
    }
}
