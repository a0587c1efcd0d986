//! Tunnels: mTLS connections between agents, on the destination's own address and port.
//!
//! A source takes one from its worker's [`Pool`] — for requests ([`Pool::http1`], [`Pool::h2`]) or for one flow
//! ([`Pool::flow`]) — and a destination accepts it with [`server::accept`]. What a tunnel carries is told by its ALPN.
//! A flow has its tunnel to itself while it lives, and leaves it to the next one after a clean end on both sides, so
//! that a short connection pays no handshake. No byte enters a tunnel before the peer's identity was compared.

pub mod client;
pub mod flow;
pub mod frame;
pub mod pool;
pub mod preface;
pub mod server;
mod shared;
pub mod slots;

#[cfg(test)]
mod tests;

use std::{io, net::SocketAddr, time::Duration};

use mesh_api::identity::SpiffeId;

use crate::{
    identity::{Alpn, PeerError},
    net::{ConnectError, NetnsId},
    tls::HandshakeError,
};

pub use flow::{FlowError, FlowStream};
pub use frame::ResetReason;
pub use pool::{Pool, PoolConfig, PooledTransport};
pub use preface::{FlowTrace, Preface};
pub use server::{Accepted, FlowOffer, FlowServer, TunnelError};
pub use shared::{H2Lease, H2StreamGuard};

/// Between whom a tunnel runs. Tunnels with equal keys may stand in for each other.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TunnelKey {
    /// Whose credential opens it.
    pub source: SpiffeId,
    /// Who must answer.
    pub destination: SpiffeId,
    /// The destination's address and port.
    pub address: SocketAddr,
    /// The source's network namespace: it gives the tunnel its source address.
    pub netns: NetnsId,
}

/// How long a peer may be silent although it owes an answer, before its tunnel is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerPatience {
    /// Where the tunnel carries requests: another one, perhaps to another endpoint, can take the next request, so the
    /// sooner a lost peer is known the better.
    pub requests: Duration,
    /// Where it carries a flow, which nothing can replace: an outage of that length is outlived.
    pub flows: Duration,
}

impl Default for PeerPatience {
    fn default() -> PeerPatience {
        PeerPatience {
            requests: Duration::from_secs(20),
            flows: Duration::from_secs(120),
        }
    }
}

impl PeerPatience {
    fn of(self, alpn: Alpn) -> Duration {
        match alpn {
            Alpn::Http => self.requests,
            Alpn::Tcp => self.flows,
        }
    }
}

/// Whether another attempt is safe after a tunnel was not to be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// The same would happen again.
    Never,
    /// Nothing was sent; another endpoint may do.
    Safe,
}

/// Who is to blame that there is no tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// Us: no credential, a full pool.
    Source,
    /// The network or the destination did not answer.
    Network,
    /// The peer answered and was not who it should be, or broke the protocol.
    Peer,
}

/// Why there is no tunnel. Nothing was sent to the destination in any of these cases.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The source has no valid credential.
    #[error("{0} has no valid credential")]
    NoCredential(SpiffeId),
    /// As many tunnels are open as are allowed.
    #[error("the pool of tunnels is full")]
    PoolFull,
    /// No TCP connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// No TLS session.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// The peer did not choose the protocol that we offered.
    #[error("the peer did not agree on the tunnel's protocol")]
    Alpn,
    /// The peer's certificates prove nothing.
    #[error("the peer's certificate was not accepted")]
    Peer(#[from] PeerError),
    /// The peer is somebody else.
    #[error("expected {expected}, found {found}")]
    WrongIdentity {
        /// Whom the view names.
        expected: SpiffeId,
        /// Who answered.
        found: SpiffeId,
    },
    /// HTTP/2 did not start.
    #[error("HTTP/2 did not start")]
    H2(#[source] h2::Error),
}

impl DialError {
    /// The same error for somebody else who waited for the same tunnel. Of a system's error the kind is kept.
    fn copy(&self) -> DialError {
        let again = |error: &io::Error| io::Error::from(error.kind());
        match self {
            DialError::NoCredential(identity) => DialError::NoCredential(identity.clone()),
            DialError::PoolFull => DialError::PoolFull,
            DialError::Connect(ConnectError::Socket(error)) => ConnectError::Socket(again(error)).into(),
            DialError::Connect(ConnectError::Connect { address, source }) => ConnectError::Connect {
                address: *address,
                source: again(source),
            }
            .into(),
            DialError::Connect(ConnectError::Timeout { address, within }) => ConnectError::Timeout {
                address: *address,
                within: *within,
            }
            .into(),
            DialError::Handshake(HandshakeError::Tls(error)) => HandshakeError::Tls(error.clone()).into(),
            DialError::Handshake(HandshakeError::Io(error)) => HandshakeError::Io(again(error)).into(),
            DialError::Handshake(HandshakeError::Timeout(within)) => HandshakeError::Timeout(*within).into(),
            DialError::Alpn => DialError::Alpn,
            DialError::Peer(error) => DialError::Peer(error.clone()),
            DialError::WrongIdentity { expected, found } => DialError::WrongIdentity {
                expected: expected.clone(),
                found: found.clone(),
            },
            DialError::H2(error) => DialError::H2(error.reason().unwrap_or(h2::Reason::INTERNAL_ERROR).into()),
        }
    }

    /// Who is to blame.
    pub fn blame(&self) -> Blame {
        match self {
            DialError::NoCredential(_) | DialError::PoolFull => Blame::Source,
            DialError::Connect(ConnectError::Socket(_)) => Blame::Source,
            DialError::Connect(_) | DialError::Handshake(HandshakeError::Timeout(_) | HandshakeError::Io(_)) => {
                Blame::Network
            }
            DialError::Handshake(HandshakeError::Tls(_))
            | DialError::Alpn
            | DialError::Peer(_)
            | DialError::WrongIdentity { .. }
            | DialError::H2(_) => Blame::Peer,
        }
    }

    /// Whether another endpoint may be tried.
    pub fn retry(&self) -> Retry {
        match self.blame() {
            Blame::Source => Retry::Never,
            Blame::Network | Blame::Peer => Retry::Safe,
        }
    }
}
