//! The controller and the command line as they are used: the real binary, real sockets, and a scripted agent.

mod agents;
mod cli;
mod cluster;
mod crash;
mod fake_api;
mod joining;
mod skew;
mod world;
