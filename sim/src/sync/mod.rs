//! `tokio::sync` with a `watch` that wakes its receivers in the order in which they began to wait. Tokio's own spreads
//! them over eight lists at random, which is right for many threads and wrong for a run that must repeat.

pub use real_tokio::sync::*;

pub mod watch;
