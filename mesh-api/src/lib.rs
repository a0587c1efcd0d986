//! What the mesh knows, without a socket or a clock.
//!
//! * [`identity`]: SPIFFE names. * [`workload`]: workloads, services, endpoints.
//! * [`document`]: the YAML that people write, parsed and validated, every problem at once.
//! * [`policy`]: checked policy values. * [`view`]: one immutable revision of it all, with flat lookups.
//! * [`authz`], [`route`], [`resilience`]: the pure decisions over a view.
//! * [`wire`]: the protocol between controller, agents and `mesh-ctl`.
//!
//! * [`read`]: typed values out of YAML and JSON.
//!
//! Dependency order (a module uses only those before it):
//! `identity < workload < read < policy < document < view < authz, route, resilience < wire`.

pub mod document;
pub mod identity;
pub mod policy;
mod read;
pub mod request;
pub mod wire;
pub mod workload;
