//! The lean HTTP/1.1 engine: one task for a source's connection and, one after another, the connections that its
//! requests are sent on.
//!
//! * [`codec`]: heads, read strictly, of [`field`]s; [`chunk`]: the chunked coding; `write`: heads for the next hop. All pure.
//! * `engine`: the life of a source's connection: head, decision, connection, exchange, and again.
//! * `exchange`: the bytes of one request and its response; `body`: which of them are a body.
//! * `buffer`: scratch space of the thread, left-overs, the timer.
//!
//! Pipelined requests are taken in order, one at a time. What is ambiguous about a message's length or head is
//! refused with a status and the connection closed; it is never repaired.

mod body;
mod buffer;
pub mod chunk;
pub mod codec;
mod engine;
mod exchange;
pub mod field;
mod write;

use http::StatusCode;

pub use engine::serve;

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

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;
