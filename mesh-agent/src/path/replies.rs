//! What a source is told when the mesh answers in place of the destination, and what the engines' faults are called.

use http::StatusCode;

use crate::{
    event::Refusal,
    l7::{
        Fault, GrpcStatus, Reply,
        h1::{RequestDefect, ResponseDefect},
    },
};

/// The header that names the refusal, so that a source can tell the mesh's answers from the application's.
pub const REFUSAL_HEADER: &str = "x-nodemesh-refusal";

/// The answer to a refused request.
pub fn refusal(refusal: Refusal, retry_after: Option<u64>) -> Reply {
    let status = refusal.http_status().unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
    let grpc = match status {
        // What the Gateway API wants of a call without a backend.
        _ if refusal == Refusal::BadBackend => GrpcStatus::Unavailable,
        StatusCode::FORBIDDEN => GrpcStatus::PermissionDenied,
        StatusCode::TOO_MANY_REQUESTS => GrpcStatus::ResourceExhausted,
        StatusCode::NOT_FOUND => GrpcStatus::Unimplemented,
        StatusCode::GATEWAY_TIMEOUT => GrpcStatus::DeadlineExceeded,
        StatusCode::INTERNAL_SERVER_ERROR => GrpcStatus::Internal,
        _ => GrpcStatus::Unavailable,
    };
    let reply = Reply::new(status, grpc, refusal.describe().trim()).with_header(REFUSAL_HEADER, refusal.name());
    match retry_after {
        Some(seconds) => reply.with_header("retry-after", seconds.to_string()),
        None => reply,
    }
}

/// The answer to a request that an engine gave up.
pub fn fault(fault: Fault) -> Reply {
    Reply::of(fault).with_header(REFUSAL_HEADER, fault_refusal(fault).name())
}

/// The answer of a redirecting rule.
pub fn redirect(status: u16, location: String) -> Reply {
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::FOUND);
    Reply::new(status, GrpcStatus::Unimplemented, "").with_header("location", location)
}

/// The answer to a preflight: these headers, or none for an origin that is not allowed.
pub fn preflight(headers: Vec<(&'static str, String)>) -> Reply {
    Reply {
        headers,
        ..Reply::new(StatusCode::NO_CONTENT, GrpcStatus::Unimplemented, "")
    }
}

/// What an engine's fault is called in records.
pub fn fault_refusal(fault: Fault) -> Refusal {
    match fault {
        Fault::Request(defect) => match defect {
            RequestDefect::Malformed => Refusal::HeadMalformed,
            RequestDefect::Version => Refusal::VersionUnsupported,
            RequestDefect::LineTooLong => Refusal::TargetTooLong,
            RequestDefect::HeadTooLarge => Refusal::HeadTooLarge,
            RequestDefect::Host => Refusal::HostInvalid,
            RequestDefect::Length => Refusal::LengthConflicting,
            RequestDefect::Coding => Refusal::TransferCodingUnknown,
            RequestDefect::Chunk => Refusal::ChunkMalformed,
            RequestDefect::Connect => Refusal::MethodRefused,
        },
        Fault::HeadTimeout => Refusal::HeadTimeout,
        Fault::SourceClosed => Refusal::SourceClosed,
        Fault::Response(
            ResponseDefect::Malformed
            | ResponseDefect::HeadTooLarge
            | ResponseDefect::Length
            | ResponseDefect::Chunk
            | ResponseDefect::Interim,
        ) => Refusal::ResponseMalformed,
        Fault::TargetClosed => Refusal::DestinationClosed,
        Fault::ResponseCut => Refusal::ResponseCut,
        Fault::RequestTimeout => Refusal::RequestTimeout,
        Fault::AttemptTimeout => Refusal::AttemptTimeout,
        Fault::StreamRefused => Refusal::StreamRefused,
        Fault::SourceProtocol => Refusal::Http2Protocol,
    }
}
