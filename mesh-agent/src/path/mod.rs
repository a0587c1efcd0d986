//! The way of a connection, stage by stage; docs/path.md draws it.
//!
//! Outbound: capture → identify → protocol → route → way → dial → relay or exchange → record.
//! Inbound: steer → identify → verify → judge → deliver → relay or exchange → record.
//!
//! [`outbound`] and [`inbound`] are the lists of stages; the other files are the stages. What goes to a pod of the same
//! node passes the source's stages and then the destination's [`judge`] and [`deliver`] at once, without TLS. A stage
//! gives the next type or a [`Refusal`](crate::event::Refusal); nothing here invents a permit.

pub mod deliver;
pub mod direct;
pub mod inbound;
pub mod judge;
pub mod names;
pub mod outbound;
pub mod replies;
pub mod requests_h2;
pub mod requests_in;
pub mod requests_out;
pub mod sniff;
pub mod target;
pub mod way;

use std::{net::SocketAddr, sync::Arc};

use tokio::net::TcpStream;

use crate::pods::Pod;

pub use target::TargetStream;

/// A connection taken from a pod's application or steered to it.
#[derive(Debug)]
pub struct Captured {
    /// The socket.
    pub stream: TcpStream,
    /// The pod in whose namespace it was taken.
    pub pod: Arc<Pod>,
    /// Who connected.
    pub source: SocketAddr,
    /// Where the source wanted to go.
    pub original_destination: SocketAddr,
}
