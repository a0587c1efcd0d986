//! The agent.

pub mod l7;
pub mod identity;
pub mod net;
pub mod tls;
pub mod transport;
pub mod drain;
pub mod event;
pub mod view;
pub mod tunnel;
pub mod kernel;
pub mod pods;
pub mod relay;
pub mod traffic;
