//! Which way an endpoint is reached, and going there: an application of this node, a tunnel to a peer, or plain.
//!
//! The source's side only. What the view calls a member of the mesh is reached by a tunnel or not at all: there is no
//! falling back to plaintext when a handshake fails.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use mesh_api::{
    identity::SpiffeId,
    policy::MtlsMode,
    view::{InboundPolicy, View},
    workload::Endpoint,
};

use crate::{
    event::{ConnectionSecurity, Refusal},
    net::{ConnectError, SocketSource},
    pods::Pod,
    tls::HandshakeError,
    tunnel::{DialError, TunnelKey},
    worker::Worker,
};

/// How an endpoint is reached.
#[derive(Clone, Debug)]
pub enum Way {
    /// It is a captured pod of this node: one pass, no TLS, judged by this policy.
    Local(Arc<Pod>, InboundPolicy),
    /// Its node's agent is our peer.
    Tunnel(TunnelKey),
    /// It is not in the mesh, or not on this port.
    Plain,
}

impl Way {
    /// How it is protected.
    pub const fn security(&self) -> ConnectionSecurity {
        match self {
            Way::Local(..) => ConnectionSecurity::SameNode,
            Way::Tunnel(_) => ConnectionSecurity::MutualTls,
            Way::Plain => ConnectionSecurity::None,
        }
    }
}

/// Finds the way from a pod to an endpoint.
pub fn find(worker: &Worker, view: &View, source: &Pod, endpoint: &Endpoint) -> Result<Way, Refusal> {
    let workload = &endpoint.workload;
    let port = endpoint.address.port();
    if !workload.is_steered() || workload.exclude_inbound_ports.contains(&port) {
        return Ok(Way::Plain);
    }
    if workload.node == worker.shared.node {
        let pod = worker
            .shared
            .pods
            .by_name(&workload.name)
            .ok_or(Refusal::DialUnreachable)?;
        return Ok(Way::Local(pod, view.inbound(&workload.name, port)));
    }
    if view.inbound(&workload.name, port).mtls == MtlsMode::Off {
        return Ok(Way::Plain);
    }
    Ok(Way::Tunnel(key(source, &workload.identity, endpoint.address)))
}

/// The key of a pod's tunnels to an endpoint.
fn key(source: &Pod, destination: &SpiffeId, address: SocketAddr) -> TunnelKey {
    TunnelKey {
        source: source.identity().clone(),
        destination: destination.clone(),
        address,
        netns: SocketSource::netns(source),
    }
}

/// Dials in plaintext from the pod's own namespace and address.
pub async fn dial_plain(
    source: &Pod,
    address: SocketAddr,
    timeout: Duration,
) -> Result<tokio::net::TcpStream, Refusal> {
    crate::net::dial(source, address, timeout)
        .await
        .map_err(|error| connect_refusal(&error))
}

/// What a failed TCP connection is called.
pub fn connect_refusal(error: &ConnectError) -> Refusal {
    match error {
        ConnectError::Socket(error) => {
            tracing::warn!(%error, "a socket in the pod");
            Refusal::DialSocket
        }
        ConnectError::Connect { source, .. } => super::deliver::dial_refusal(source),
        ConnectError::Timeout { .. } => Refusal::DialTimeout,
    }
}

/// What a tunnel that was not to be had is called.
pub fn tunnel_refusal(error: &DialError) -> Refusal {
    tracing::debug!(error = error as &dyn std::error::Error, "no tunnel");
    match error {
        DialError::NoCredential(_) => Refusal::NoCredential,
        DialError::PoolFull => Refusal::Capacity,
        DialError::Connect(error) => connect_refusal(error),
        DialError::Handshake(HandshakeError::Timeout(_)) => Refusal::HandshakeTimeout,
        DialError::Handshake(_) | DialError::Alpn => Refusal::HandshakeFailed,
        DialError::Peer(_) | DialError::WrongIdentity { .. } => Refusal::PeerIdentityMismatch,
        DialError::H2(_) => Refusal::TunnelProtocol,
    }
}
