//! The lab: a mesh on one machine, and the library that the end-to-end tests build their clusters with.
//!
//! Network namespaces are nodes and pods, real processes are containers, one agent runs per node and one controller
//! per lab, all of them over real sockets. [`Lab`] is a tiny kubelet: it reads plain Kubernetes YAML, gives every pod
//! an address, names and a cgroup, starts its commands, probes them from the node and tells the controller.
//! It needs root and says so; it must never skip, and never leave anything behind.

pub mod cgroup;
pub mod hosts;
pub mod kube;
pub mod kubelet;
pub mod lab;
pub mod mesh;
pub mod metrics;
pub mod netns;
pub mod network;
pub mod pcap;
pub mod plan;
pub mod probe;
pub mod process;
pub mod state;
pub mod wait;

pub use lab::{Capture, Lab, LabConfig, Place};
pub use metrics::Metrics;
pub use pcap::Packets;
pub use process::{Background, Output};
pub use wait::until;
