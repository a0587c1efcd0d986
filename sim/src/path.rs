//! The agent's `path`, file by file: all of it but `direct`, which speaks to the kernel side alone.

#[path = "../../mesh-agent/src/path/deliver.rs"]
pub mod deliver;
#[path = "../../mesh-agent/src/path/inbound.rs"]
pub mod inbound;
#[path = "../../mesh-agent/src/path/judge.rs"]
pub mod judge;
#[path = "../../mesh-agent/src/path/names.rs"]
pub mod names;
#[path = "../../mesh-agent/src/path/outbound.rs"]
pub mod outbound;
#[path = "../../mesh-agent/src/path/replies.rs"]
pub mod replies;
#[path = "../../mesh-agent/src/path/requests_h2.rs"]
pub mod requests_h2;
#[path = "../../mesh-agent/src/path/requests_in.rs"]
pub mod requests_in;
#[path = "../../mesh-agent/src/path/requests_out/mod.rs"]
pub mod requests_out;
#[path = "../../mesh-agent/src/path/sniff.rs"]
pub mod sniff;
#[path = "../../mesh-agent/src/path/target.rs"]
pub mod target;
#[path = "../../mesh-agent/src/path/way.rs"]
pub mod way;

use std::{net::SocketAddr, sync::Arc};

use crate::{net::TcpStream, pods::Pod};

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
