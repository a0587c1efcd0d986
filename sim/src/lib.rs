//! The deterministic simulator: the agent's own source files, compiled a second time over a seeded network and clock.
//!
//! The agent's modules are included by their paths and find here, under the names that they use, what the machine gives
//! them otherwise: `tokio::net` is [`net`] (sockets in memory), `tokio::sync::watch` wakes in order, `tokio::select!`
//! looks at its branches in order, `rand` and `foldhash` draw from the seed, `kernel` and `pods` are small models. So the
//! product has no switch, trait or feature for the simulator and pays nothing for it, and what runs here is what runs
//! there. docs/decisions/0012 has the reasons; `world` is where to begin reading.
//!
//! Nothing here may ask the machine for time, randomness or threads: a seed must mean one run.

// The agent's files bring their unit tests along; those are the agent's, so that for tests this crate is empty.
#![cfg(not(test))]
#![allow(
    dead_code,
    missing_docs,
    reason = "the agent's modules have doors that only the agent uses; the world is no API"
)]

extern crate tokio as real_tokio;

extern crate self as foldhash;
extern crate self as rand;
extern crate self as tokio;

pub use real_tokio::{io, join, runtime, task, time, try_join};

/// Branches are looked at in the order in which they are written.
macro_rules! select {
    (biased; $($branches:tt)*) => { real_tokio::select! { biased; $($branches)* } };
    ($($branches:tt)*) => { real_tokio::select! { biased; $($branches)* } };
}
pub(crate) use select;

/// `foldhash::fast`: a hash that is the same in every run, so that maps are walked in the same order.
pub mod fast {
    /// See above.
    pub type RandomState = std::hash::BuildHasherDefault<std::hash::DefaultHasher>;
}

pub mod chance;
pub mod kernel;
pub mod net;
pub mod path;
pub mod pods;
pub mod sync;

pub use chance::random;

#[path = "../../mesh-agent/src/capture.rs"]
pub mod capture;
#[path = "../../mesh-agent/src/digits.rs"]
pub mod digits;
#[path = "../../mesh-agent/src/drain.rs"]
pub mod drain;
#[path = "../../mesh-agent/src/event/mod.rs"]
pub mod event;
#[path = "../../mesh-agent/src/identity/mod.rs"]
pub mod identity;
#[path = "../../mesh-agent/src/l7/mod.rs"]
pub mod l7;
#[path = "../../mesh-agent/src/relay/mod.rs"]
pub mod relay;
#[path = "../../mesh-agent/src/tls/mod.rs"]
pub mod tls;
#[path = "../../mesh-agent/src/traffic/mod.rs"]
pub mod traffic;
#[path = "../../mesh-agent/src/transport.rs"]
pub mod transport;
#[path = "../../mesh-agent/src/tunnel/mod.rs"]
pub mod tunnel;
#[path = "../../mesh-agent/src/view/mod.rs"]
pub mod view;
#[path = "../../mesh-agent/src/worker.rs"]
pub mod worker;

pub mod world;
