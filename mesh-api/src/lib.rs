//! What the mesh knows, without a socket or a clock.
//!
//! * [`identity`]: SPIFFE names. * [`workload`]: workloads, services, endpoints.
//! * [`document`]: the YAML that people write, parsed and validated, every problem at once.
//! * [`policy`]: checked policy values. * [`view`]: one immutable revision of it all, with flat lookups.
//! * [`authz`], [`route`], [`resilience`]: the pure decisions over a view.
//! * [`explain`]: all of them, told in words. * [`status`]: what routes and policies are told about themselves.
//! * [`backend`]: endpoints and how to send to them. * [`rule`]: the name of the rule that decided.
//! * [`wire`]: the protocol between controller, agents and `mesh-ctl`.
//!
//! * [`shared_map`]: a map that revisions share.
//! * `read`: typed values out of YAML and JSON. * [`yaml`]: YAML that every reader takes for the same.
//!
//! Dependency order (a module uses only those before it):
//! `shared_map, identity < workload < request, rule < read < policy < document < resilience < backend < route < reading < authz < view <
//! explain, status < wire`.

pub mod authz;
pub mod backend;
pub mod document;
pub mod explain;
pub mod identity;
pub mod policy;
mod read;
mod reading;
pub mod request;
pub mod resilience;
pub mod route;
pub mod rule;
pub mod shared_map;
pub mod status;
pub mod view;
pub mod wire;
pub mod workload;
pub mod yaml;
