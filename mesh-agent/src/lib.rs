//! The node agent: takes the connections of its node's pods, decides about them and carries them.
//!
//! `capture` accepts, `path` is the way of a connection, `l7`, `relay` and `tunnel` carry bytes; `view` holds what is
//! known, `identity` what is proven, `pods` and `kernel` what is captured; `event` tells. docs/architecture.md has the
//! ranks, docs/path.md the way of a connection.

pub mod admin;
pub mod agent;
pub mod capture;
pub mod config;
pub mod digits;
pub mod drain;
pub mod event;
pub mod identity;
pub mod keeper;
pub mod kernel;
pub mod l7;
pub mod net;
pub mod path;
pub mod pods;
pub mod relay;
pub mod tls;
pub mod traffic;
pub mod transport;
pub mod tunnel;
pub mod view;
pub mod worker;
