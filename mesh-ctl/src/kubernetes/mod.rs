//! The command line's way into a Kubernetes cluster: the kubeconfig, objects of any kind, the leading controller.
//!
//! It has the rights of whoever runs it and asks for nothing else. What the API server refuses is told as it is said;
//! nothing is tried again behind the user's back.

mod client;
mod forward;
pub mod objects;
pub mod policy;

pub use client::{Cluster, KubeArgs};
pub use forward::leader_channel;

/// The namespace of the mesh.
pub use mesh_api::policy::ROOT_NAMESPACE;
/// The name of the controller's Deployment, Service and Lease.
pub const CONTROLLER: &str = "nodemesh-controller";
/// The name of the agents' DaemonSet.
pub const AGENT: &str = "nodemesh-agent";
/// The port of the operator's API in the controller's pod, on loopback.
pub const OPERATOR_PORT: u16 = 15011;
/// Who writes, in the API server's records of fields.
pub const FIELD_MANAGER: &str = "mesh-ctl";
/// Who writes the status of routes and policies.
pub const CONTROLLER_NAME: &str = "nodemesh.io/mesh";
