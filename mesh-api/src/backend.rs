//! Backends: sets of endpoints with the traffic policy that applies to them.
//!
//! The end of routing and the start of balancing. A backend never changes: a new revision has new ones, and
//! [`BackendKey`] tells the agent's traffic state which old one it continues.

use std::{fmt, sync::Arc};

use crate::{
    resilience::TrafficSettings,
    workload::{AppProtocol, Endpoint, ObjectName, Service},
};

/// The identity of a backend across revisions: a service's port, or a subset of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BackendKey {
    /// The service.
    pub service: ObjectName,
    /// The service's port.
    pub port: u16,
    /// The name of the ServiceSubset, in the service's namespace.
    pub subset: Option<Arc<str>>,
}

impl fmt::Display for BackendKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.service, self.port)?;
        match &self.subset {
            Some(subset) => write!(f, "/{subset}"),
            None => Ok(()),
        }
    }
}

/// A set of endpoints: (service or subset, port).
#[derive(Clone, Debug)]
pub struct Backend {
    /// Its identity across revisions.
    pub key: BackendKey,
    /// The service, for names in telemetry.
    pub service: Arc<Service>,
    /// What the port speaks.
    pub protocol: AppProtocol,
    /// The endpoints with an IPv4 address, ordered by workload name.
    pub endpoints_v4: Vec<Endpoint>,
    /// The endpoints with an IPv6 address, ordered by workload name.
    pub endpoints_v6: Vec<Endpoint>,
    /// How to send to it.
    pub traffic: Arc<TrafficSettings>,
}

impl Backend {
    /// The endpoints of a family.
    pub fn endpoints(&self, ipv6: bool) -> &[Endpoint] {
        if ipv6 { &self.endpoints_v6 } else { &self.endpoints_v4 }
    }
}
