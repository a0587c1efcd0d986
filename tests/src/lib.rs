//! The lab: a mesh on one machine, and the library that the end-to-end tests build their clusters with.
//!
//! Network namespaces are nodes and pods, real processes are containers, one agent runs per node and one controller
//! per lab, all of them over real sockets. [`Lab`] is a tiny kubelet: it reads plain Kubernetes YAML, gives every pod
//! an address, names and a cgroup, starts its commands, probes them from the node and tells the controller.
//! It needs root and says so; it must never skip, and never leave anything behind.
//!
//! ```no_run
//! use mesh_tests::{Lab, LabConfig, Packets, Place, until};
//!
//! fn example() -> anyhow::Result<()> {
//!     let lab = Lab::up(LabConfig::test("example").file("fixtures/shop"))?; // meshed, two nodes, captured and ready
//!     let capture = lab.capture("tcp")?; // what passes between the nodes from here on
//!     let page = lab.exec("shop/visitor", &["curl", "-s", "http://cart/"])?.ok()?;
//!     assert!(page.starts_with("cart-v"));
//!     assert_eq!(Packets::parse(capture.stop()?)?.count("cart-v"), 0);
//!     lab.apply("kind: …")?; // pods, services and policies; returns when every agent holds them
//!     let served = lab.metrics("node-2")?.sum("mesh_requests_total", &[("reporter", "destination")]);
//!     let records = lab.access_log("node-2")?;
//!     let status = lab.ctl_json(&["status"])?;
//!     lab.kill_agent("node-2")?;
//!     lab.start_agent("node-2")?;
//!     let on_node = lab.exec_in(Place::Node("node-1"), &["ip", "route"])?;
//!     lab.down() // or drop it
//! }
//! ```

pub mod actors;
pub mod cgroup;
pub mod checks;
pub mod cluster;
pub mod hosts;
pub mod kube;
pub mod kubelet;
pub mod lab;
pub mod mesh;
pub mod metrics;
pub mod netns;
pub mod network;
pub mod pcap;
pub mod peers;
pub mod plan;
pub mod probe;
pub mod process;
pub mod state;
pub mod wait;

pub use checks::Checks;
pub use cluster::{Cluster, Scope};
pub use lab::{Capture, Lab, LabConfig, Place};
pub use metrics::Metrics;
pub use pcap::Packets;
pub use process::{Background, Output};
pub use wait::until;
