//! The agent.

pub mod l7;
