//! The keeper: a tiny process that holds the listeners of the node's pods, so that a connection waits instead of failing
//! while no agent serves.
//!
//! An agent puts every listener that it makes here before the kernel captures the pod, and takes them from here when it
//! starts; it withdraws them when the pod leaves the mesh. Two generations of agents that run side by side take the
//! *same* sockets, so that what waits in a queue is served by whichever of them lives.
//!
//! * [`codec`]: the messages; pure and total. `wire`: one message and its descriptors in one packet.
//! * [`store`]: what is held; pure. `server`: the process. [`client`]: the agent's end.
//!
//! The keeper knows no policy, no pod and no address, opens no connection, enters no namespace and never accepts.

pub mod client;
pub mod codec;
pub mod server;
pub mod store;
mod wire;

#[cfg(test)]
mod tests;

pub use client::{Client, ClientError};
pub use codec::{Direction, Slot};
pub use server::run;

/// The protocol's version, told in the first message each way. Messages are only added: a keeper answers one that it
/// does not know with a refusal, and the connection goes on.
pub const VERSION: u16 = 1;
/// Sockets that a keeper holds at most.
pub const SOCKETS_MAX: usize = 65_536;
/// Network namespaces that a keeper holds sockets of at most.
pub const NAMESPACES_MAX: usize = 4096;
/// Sockets of one slot: as many as an agent may have workers.
pub const SLOT_MAX: usize = 256;
/// Connections to a keeper at once: generations of agents, and those who ask.
pub const CONNECTIONS_MAX: usize = 16;
/// Descriptors in one packet; the kernel takes 253.
pub const PACKET_SOCKETS_MAX: usize = 64;
