//! HTTP/2 connections to applications of this node and to plain addresses, kept for the source's connection that they
//! were made for: the application sees one connection per source connection, as it would without the mesh.

use std::{cell::RefCell, net::SocketAddr};

use bytes::Bytes;
use h2::client::SendRequest;

use super::TargetStream;
use crate::{drain::Drain, event::Refusal, l7};

/// Connections that are kept for one source's connection.
const CONNECTIONS_MAX: usize = 8;

/// One source connection's HTTP/2 connections, by address.
#[derive(Default)]
pub struct Http2Targets(RefCell<Vec<(SocketAddr, SendRequest<Bytes>)>>);

impl Http2Targets {
    /// A connection that takes another stream.
    pub async fn get(&self, address: SocketAddr) -> Option<SendRequest<Bytes>> {
        let send = self
            .0
            .borrow()
            .iter()
            .find(|(to, _)| *to == address)
            .map(|(_, send)| send.clone())?;
        match send.ready().await {
            Ok(send) => Some(send),
            Err(_) => {
                self.forget(address);
                None
            }
        }
    }

    /// Closes the connection to the address when its streams are over.
    pub fn forget(&self, address: SocketAddr) {
        self.0.borrow_mut().retain(|(to, _)| *to != address);
    }

    /// Starts HTTP/2 on a new connection; a local task drives it and holds the drain.
    pub async fn start(
        &self,
        address: SocketAddr,
        stream: TargetStream,
        drain: &Drain,
    ) -> Result<SendRequest<Bytes>, Refusal> {
        let (send, connection) = l7::h2::client_builder()
            .handshake::<_, Bytes>(stream)
            .await
            .map_err(|_| Refusal::DestinationClosed)?;
        let guard = drain.guard();
        tokio::task::spawn_local(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, %address, "an HTTP/2 connection ended");
            }
            drop(guard);
        });
        let mut kept = self.0.borrow_mut();
        kept.retain(|(to, _)| *to != address);
        if kept.len() >= CONNECTIONS_MAX {
            kept.remove(0);
        }
        kept.push((address, send.clone()));
        Ok(send)
    }
}
