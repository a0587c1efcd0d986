//! Why the mesh did not carry a connection or a request: one closed enum for metric, log line, answer and test.
//!
//! Every module has narrow errors of its own; `path` maps each of them into a [`Refusal`] with an exhaustive match.
//! Codes are part of the interface (logs, dashboards): a variant may be added at the end of its group, never
//! renumbered and never given a second meaning. Nothing here decides anything.

use std::fmt;

use http::StatusCode;

/// Declares the enum and everything that must stay in step with it.
macro_rules! refusals {
    ($($(#[doc = $doc:literal])+ $variant:ident = $code:literal, $name:literal, $flags:literal, $status:expr;)+) => {
        /// Why a connection or a request was not carried.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u16)]
        pub enum Refusal {
            $($(#[doc = $doc])+ $variant = $code,)+
        }

        impl Refusal {
            /// All of them, by rising code.
            pub const ALL: &'static [Refusal] = &[$(Refusal::$variant),+];

            /// The name in logs and in the metric label `reason`; kebab-case, stable.
            pub const fn name(self) -> &'static str {
                match self { $(Refusal::$variant => $name,)+ }
            }

            /// The response flag, Envoy's where there is one, so that dashboards made for other meshes read ours.
            pub const fn response_flags(self) -> &'static str {
                match self { $(Refusal::$variant => $flags,)+ }
            }

            /// The status that an HTTP source is told; `None` where nobody can be told any more.
            pub const fn http_status(self) -> Option<StatusCode> {
                match self { $(Refusal::$variant => $status,)+ }
            }

            /// What happened, for people; the same text as in docs/events.md.
            pub const fn describe(self) -> &'static str {
                match self { $(Refusal::$variant => concat!($($doc),+),)+ }
            }
        }
    };
}

const BAD_REQUEST: Option<StatusCode> = Some(StatusCode::BAD_REQUEST);
const FORBIDDEN: Option<StatusCode> = Some(StatusCode::FORBIDDEN);
const NOT_FOUND: Option<StatusCode> = Some(StatusCode::NOT_FOUND);
const REQUEST_TIMEOUT: Option<StatusCode> = Some(StatusCode::REQUEST_TIMEOUT);
const URI_TOO_LONG: Option<StatusCode> = Some(StatusCode::URI_TOO_LONG);
const HEAD_TOO_LARGE: Option<StatusCode> = Some(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
const TOO_MANY: Option<StatusCode> = Some(StatusCode::TOO_MANY_REQUESTS);
const INTERNAL: Option<StatusCode> = Some(StatusCode::INTERNAL_SERVER_ERROR);
const NOT_IMPLEMENTED: Option<StatusCode> = Some(StatusCode::NOT_IMPLEMENTED);
const BAD_GATEWAY: Option<StatusCode> = Some(StatusCode::BAD_GATEWAY);
const UNAVAILABLE: Option<StatusCode> = Some(StatusCode::SERVICE_UNAVAILABLE);
const GATEWAY_TIMEOUT: Option<StatusCode> = Some(StatusCode::GATEWAY_TIMEOUT);
const VERSION_NOT_SUPPORTED: Option<StatusCode> = Some(StatusCode::HTTP_VERSION_NOT_SUPPORTED);

refusals! {
    // 1xx: where it should have gone.
    /// Routes are attached to the service and none matches the request.
    NoRoute = 100, "no-route", "NR", NOT_FOUND;
    /// The service has no endpoint that could serve (none exist, or none of the wanted address family).
    NoEndpoint = 101, "no-endpoint", "UH", UNAVAILABLE;
    /// The matched rule names a backend that does not exist or may not be used.
    BadBackend = 102, "bad-backend", "NC", INTERNAL;
    /// The kernel gave us a connection whose original destination is not on record.
    OriginalDestinationMissing = 104, "original-destination-missing", "NR", BAD_GATEWAY;
    /// The view names no workload at the address that the connection came to.
    UnknownDestination = 105, "unknown-destination", "NR", NOT_FOUND;

    // 2xx: protection of the destination.
    /// The circuit breaker is open: the backend failed too often.
    BreakerOpen = 200, "breaker-open", "UO", UNAVAILABLE;
    /// The backend's bound on connections is reached.
    BreakerConnections = 201, "breaker-connections", "UO", UNAVAILABLE;
    /// The backend's bound on requests that wait for a connection is reached.
    BreakerPending = 202, "breaker-pending", "UO", UNAVAILABLE;
    /// The backend's bound on concurrent requests is reached.
    BreakerRequests = 203, "breaker-requests", "UO", UNAVAILABLE;
    /// A rate limit's tokens are used up.
    RateLimited = 204, "rate-limited", "RL", TOO_MANY;
    /// A bound of the agent itself is reached (connections, tunnels, memory).
    Capacity = 205, "capacity", "OM", UNAVAILABLE;
    /// The agent drains and takes nothing new.
    Draining = 206, "draining", "LR", UNAVAILABLE;
    /// A copy of a request was not sent to its mirror: it was too long, or too many were under way.
    MirrorDropped = 207, "mirror-dropped", "-", None;

    // 3xx: who may.
    /// Access policy denied the connection by identity, address or port.
    AccessDeniedConnection = 300, "access-denied-connection", "UAEX", FORBIDDEN;
    /// Access policy denied the request by method, path or header.
    AccessDeniedRequest = 301, "access-denied-request", "UAEX", FORBIDDEN;
    /// Mutual TLS is strict and the source came in plaintext.
    PlaintextRefused = 302, "plaintext-refused", "UAEX", FORBIDDEN;
    /// The peer's certificate is valid but the view names another identity at its address.
    IdentityMismatch = 303, "identity-mismatch", "UAEX", FORBIDDEN;
    /// The peer proved an identity but the view knows no workload at its address.
    UnknownSource = 304, "unknown-source", "UAEX", FORBIDDEN;
    /// The agent has no credential for the workload yet and may not go without.
    NoCredential = 305, "no-credential", "UAEX", UNAVAILABLE;
    /// The permit that allowed an open connection no longer holds under the newest revision.
    PermitLost = 306, "permit-lost", "UAEX", None;
    /// The policy for this destination could not be compiled, and an invalid policy refuses.
    InvalidPolicy = 307, "invalid-policy", "UAEX", FORBIDDEN;

    // 4xx: reaching the destination.
    /// The connection to the destination was not established in time.
    DialTimeout = 400, "dial-timeout", "UF,UT", UNAVAILABLE;
    /// The destination refused the connection.
    DialRefused = 401, "dial-refused", "UF", UNAVAILABLE;
    /// There is no way to the destination (no route to host, network down).
    DialUnreachable = 402, "dial-unreachable", "UF", UNAVAILABLE;
    /// The socket could not be made or set up in the pod.
    DialSocket = 403, "dial-socket", "UF", UNAVAILABLE;
    /// The TLS handshake with the peer failed.
    HandshakeFailed = 404, "handshake-failed", "UF", UNAVAILABLE;
    /// The TLS handshake with the peer was not done in time.
    HandshakeTimeout = 405, "handshake-timeout", "UF,UT", UNAVAILABLE;
    /// The peer that we dialed proved another identity than the view names at its address.
    PeerIdentityMismatch = 406, "peer-identity-mismatch", "UF", UNAVAILABLE;
    /// The peer broke the tunnel's protocol.
    TunnelProtocol = 407, "tunnel-protocol", "UPE", BAD_GATEWAY;

    // 5xx: the source's misdeeds.
    /// The request's head is not HTTP.
    HeadMalformed = 500, "head-malformed", "DPE", BAD_REQUEST;
    /// The request's head is longer, or has more fields, than allowed.
    HeadTooLarge = 501, "head-too-large", "DPE", HEAD_TOO_LARGE;
    /// The request line is longer than allowed.
    TargetTooLong = 502, "target-too-long", "DPE", URI_TOO_LONG;
    /// The request carries lengths that contradict each other (Content-Length and Transfer-Encoding, or two of one), or
    /// one that is no number.
    LengthConflicting = 503, "length-conflicting", "DPE", BAD_REQUEST;
    /// A chunk's size or end is malformed.
    ChunkMalformed = 507, "chunk-malformed", "DPE", BAD_REQUEST;
    /// The transfer coding is not one we may forward.
    TransferCodingUnknown = 508, "transfer-coding-unknown", "DPE", NOT_IMPLEMENTED;
    /// The request names no host, or more than one, or one that is none.
    HostInvalid = 509, "host-invalid", "DPE", BAD_REQUEST;
    /// The version is not HTTP/1.0, HTTP/1.1 or HTTP/2.
    VersionUnsupported = 511, "version-unsupported", "DPE", VERSION_NOT_SUPPORTED;
    /// The source broke HTTP/2.
    Http2Protocol = 513, "http2-protocol", "DPE", None;
    /// The source did not send its request's head in time.
    HeadTimeout = 514, "head-timeout", "DT", REQUEST_TIMEOUT;
    /// The source broke the tunnel's protocol or its preface.
    SourceTunnelProtocol = 515, "source-tunnel-protocol", "DPE", None;
    /// The source's TLS handshake failed or its certificate is not of this mesh.
    SourceHandshakeFailed = 516, "source-handshake-failed", "DPE", None;
    /// The method is not one we may forward (CONNECT to a service).
    MethodRefused = 517, "method-refused", "DPE", Some(StatusCode::METHOD_NOT_ALLOWED);
    /// The source did not finish its TLS handshake in time.
    SourceHandshakeTimeout = 519, "source-handshake-timeout", "DT", None;

    // 6xx: the exchange itself.
    /// The request's time was over before the response was whole.
    RequestTimeout = 600, "request-timeout", "UT", GATEWAY_TIMEOUT;
    /// Each attempt's time was over.
    AttemptTimeout = 601, "attempt-timeout", "UT", GATEWAY_TIMEOUT;
    /// Nothing moved in either direction for too long.
    IdleTimeout = 602, "idle-timeout", "SI", None;
    /// The source closed before the exchange was over.
    SourceClosed = 603, "source-closed", "DC", None;
    /// The destination closed or reset before it answered.
    DestinationClosed = 604, "destination-closed", "UC", UNAVAILABLE;
    /// The destination closed or reset within its response.
    ResponseCut = 605, "response-cut", "UC", None;
    /// The destination's response is not one we may forward.
    ResponseMalformed = 606, "response-malformed", "UPE", BAD_GATEWAY;
    /// The destination refused the stream.
    StreamRefused = 607, "stream-refused", "UR", UNAVAILABLE;
    /// The agent itself failed; a log line says how.
    Internal = 608, "internal", "LR", INTERNAL;
}

impl Refusal {
    /// The stable number of this reason.
    pub const fn code(self) -> u16 {
        self as u16
    }

    /// The reason with that number.
    pub fn from_code(code: u16) -> Option<Refusal> {
        Refusal::ALL
            .binary_search_by_key(&code, |r| r.code())
            .ok()
            .and_then(|i| Refusal::ALL.get(i).copied())
    }

    /// Its place in [`Refusal::ALL`], for arrays of counters.
    pub(crate) fn index(self) -> usize {
        Refusal::ALL
            .binary_search_by_key(&self.code(), |r| r.code())
            .unwrap_or(0)
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_names_are_unique_and_rise() {
        let mut names = std::collections::HashSet::new();
        let mut last = 0;
        for refusal in Refusal::ALL {
            assert!(refusal.code() > last, "{refusal} does not rise");
            last = refusal.code();
            assert!(names.insert(refusal.name()), "{refusal} twice");
            assert_eq!(Refusal::from_code(refusal.code()), Some(*refusal));
            assert_eq!(Refusal::ALL[refusal.index()], *refusal);
            assert!(
                refusal
                    .name()
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            );
            assert!(!refusal.response_flags().is_empty());
        }
        assert_eq!(Refusal::from_code(1), None);
    }

    /// The numbers are an interface: this list is only appended to.
    #[test]
    fn codes_are_never_renumbered() {
        let fixed = [
            (Refusal::NoRoute, 100, "NR"),
            (Refusal::NoEndpoint, 101, "UH"),
            (Refusal::BreakerOpen, 200, "UO"),
            (Refusal::RateLimited, 204, "RL"),
            (Refusal::AccessDeniedConnection, 300, "UAEX"),
            (Refusal::PlaintextRefused, 302, "UAEX"),
            (Refusal::DialRefused, 401, "UF"),
            (Refusal::LengthConflicting, 503, "DPE"),
            (Refusal::RequestTimeout, 600, "UT"),
            (Refusal::SourceClosed, 603, "DC"),
            (Refusal::DestinationClosed, 604, "UC"),
        ];
        for (refusal, code, flags) in fixed {
            assert_eq!((refusal.code(), refusal.response_flags()), (code, flags), "{refusal}");
        }
    }
}
