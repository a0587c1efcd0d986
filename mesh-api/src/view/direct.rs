//! Which flows between two workloads of one node need no agent: nothing about them is to be decided but who may speak
//! to whom, and that is known before they begin.
//!
//! A destination is direct if a MeshPolicy says so (`sameNode: direct`), its port is declared to carry opaque bytes, no
//! route, limit, traffic policy or rule about requests applies to it, and every endpoint of it is an enrolled workload of
//! the node. A source then may go there directly if the access rules of every one of those endpoints permit it. What
//! is not direct goes through the agent, which decides anew for each connection: leaving one out here is never wrong.

use std::{net::SocketAddr, sync::Arc};

use super::{Destination, ServicePortView, View};
use crate::{
    authz::{self, InboundPolicy, Permit, SourceAttributes},
    workload::{AppProtocol, Endpoint, Service, Workload},
};

/// The most endpoints of a destination that is direct.
pub const DIRECT_ENDPOINTS_MAX: usize = 8;

/// A destination whose flows from the same node may need no agent.
#[derive(Clone, Debug)]
pub struct DirectDestination {
    /// What sources ask for: a service's address and port, or a workload's own.
    pub asked: SocketAddr,
    /// The endpoints, each with what holds there.
    pub endpoints: Vec<(Endpoint, InboundPolicy)>,
    port: Option<Arc<ServicePortView>>,
}

/// Why a flow goes through the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum NotDirect {
    /// The port carries requests, or it is not declared what it carries.
    #[error("the port is not declared to carry opaque bytes")]
    Protocol,
    /// A route may apply.
    #[error("a route applies")]
    Routes,
    /// A TrafficPolicy applies.
    #[error("a TrafficPolicy applies")]
    Traffic,
    /// The service binds sources to endpoints.
    #[error("the service has session affinity")]
    Affinity,
    /// Nobody is there.
    #[error("no endpoint")]
    NoEndpoint,
    /// More than [`DIRECT_ENDPOINTS_MAX`].
    #[error("more than {DIRECT_ENDPOINTS_MAX} endpoints")]
    Endpoints,
    /// An endpoint is on another node.
    #[error("an endpoint is on another node")]
    OtherNode,
    /// An endpoint is not in the mesh, or not on this port.
    #[error("an endpoint is not in the mesh")]
    NotEnrolled,
    /// A RateLimit applies.
    #[error("a RateLimit applies")]
    Limits,
    /// An AccessPolicy asks about requests.
    #[error("an AccessPolicy asks about requests")]
    Requests,
    /// No MeshPolicy lets it.
    #[error("no MeshPolicy says `sameNode: direct`")]
    Off,
    /// The source is not in the mesh, or has no address of that family.
    #[error("the source is not in the mesh")]
    NotASource,
    /// An endpoint is the source itself.
    #[error("an endpoint is the source itself")]
    Itself,
    /// An endpoint does not let the source in.
    #[error("an endpoint denies it")]
    Denied,
}

impl View {
    /// Every destination on the node whose flows from there may need no agent.
    pub fn direct_destinations(&self, node: &str) -> Vec<DirectDestination> {
        let mut found = Vec::new();
        let mut here = self
            .workloads_on(node)
            .filter_map(|workload| self.inbound.get(&workload.name));
        if !here.any(|set| set.is_direct()) {
            return found;
        }
        for port in self.services().flat_map(|service| &service.ports) {
            if opaque(port.port.protocol).is_err() {
                continue;
            }
            for &ip in &port.service.addresses {
                let asked = SocketAddr::new(ip, port.port.port);
                // An address that two services claim is the one's that the view says it is.
                let is_it =
                    matches!(self.destination(asked), Destination::ServicePort(found) if Arc::ptr_eq(&found, port));
                if is_it && let Ok(destination) = self.direct_service(port, asked, node) {
                    found.push(destination);
                }
            }
        }
        for workload in self.workloads_on(node) {
            for policy in self.inbound.get(&workload.name).into_iter().flat_map(|set| set.ports()) {
                for &ip in &workload.addresses {
                    if let Ok(destination) = self.direct_workload(workload, SocketAddr::new(ip, policy.port), node) {
                        found.push(destination);
                    }
                }
            }
        }
        found
    }

    /// Whether flows to what is asked for may need no agent on that node.
    pub fn direct_destination(&self, asked: SocketAddr, node: &str) -> Result<DirectDestination, NotDirect> {
        match self.destination(asked) {
            Destination::ServicePort(port) => self.direct_service(&port, asked, node),
            Destination::Workload(endpoint) => self.direct_workload(&endpoint.workload, asked, node),
            Destination::NoPort(_) | Destination::Outside => Err(NotDirect::NotEnrolled),
        }
    }

    fn direct_service(
        &self,
        port: &Arc<ServicePortView>,
        asked: SocketAddr,
        node: &str,
    ) -> Result<DirectDestination, NotDirect> {
        opaque(port.port.protocol)?;
        if !port.backend.traffic.sources.is_empty() {
            return Err(NotDirect::Traffic);
        }
        let endpoints = port.backend.endpoints(asked.is_ipv6());
        match endpoints.len() {
            0 => return Err(NotDirect::NoEndpoint),
            1 => {}
            _ if port.service.session_affinity.is_some() => return Err(NotDirect::Affinity),
            2..=DIRECT_ENDPOINTS_MAX => {}
            _ => return Err(NotDirect::Endpoints),
        }
        let endpoints = endpoints.iter().map(|endpoint| {
            let policy = self.direct_endpoint(endpoint, node)?;
            Ok((endpoint.clone(), policy))
        });
        Ok(DirectDestination {
            asked,
            endpoints: endpoints.collect::<Result<_, _>>()?,
            port: Some(port.clone()),
        })
    }

    fn direct_workload(
        &self,
        workload: &Arc<Workload>,
        asked: SocketAddr,
        node: &str,
    ) -> Result<DirectDestination, NotDirect> {
        let endpoint = match self.destination(asked) {
            Destination::Workload(endpoint) if endpoint.workload.name == workload.name => endpoint,
            _ => return Err(NotDirect::NotEnrolled),
        };
        let policy = self.direct_endpoint(&endpoint, node)?;
        opaque(policy.protocol)?;
        Ok(DirectDestination {
            asked,
            endpoints: vec![(endpoint, policy)],
            port: None,
        })
    }

    /// What holds at an endpoint that may be reached without an agent.
    fn direct_endpoint(&self, endpoint: &Endpoint, node: &str) -> Result<InboundPolicy, NotDirect> {
        let workload = &endpoint.workload;
        let port = endpoint.address.port();
        if &*workload.node != node {
            return Err(NotDirect::OtherNode);
        }
        if !workload.enrolled || workload.host_network || workload.exclude_inbound_ports.contains(&port) {
            return Err(NotDirect::NotEnrolled);
        }
        let policy = self.inbound(&workload.name, port);
        if !policy.direct {
            return Err(NotDirect::Off);
        }
        if !policy.limits.is_empty() {
            return Err(NotDirect::Limits);
        }
        if policy.access.needs_requests() {
            return Err(NotDirect::Requests);
        }
        Ok(policy)
    }
}

impl DirectDestination {
    /// The service that is asked for; `None`: a workload's own address.
    pub fn service(&self) -> Option<&Arc<Service>> {
        self.port.as_ref().map(|port| &port.service)
    }

    /// The permits of a source that may go there directly: one for each endpoint.
    pub fn permits(&self, source: &Workload) -> Result<Vec<Permit>, NotDirect> {
        if !source.enrolled || source.host_network {
            return Err(NotDirect::NotASource);
        }
        let namespace = &*source.name.namespace;
        if let Some(port) = &self.port {
            let requests = port
                .routes
                .as_ref()
                .is_some_and(|routes| routes.has_routes_for(namespace));
            let flows = port.flows.as_ref().is_some_and(|flows| flows.has_routes_for(namespace));
            if requests || flows {
                return Err(NotDirect::Routes);
            }
        }
        let address = source.address(self.asked.is_ipv6()).ok_or(NotDirect::NotASource)?;
        let attributes = SourceAttributes {
            identity: Some(&source.identity),
            address,
            port: 0,
        };
        let permit = |(endpoint, policy): &(Endpoint, InboundPolicy)| {
            if endpoint.workload.name == source.name {
                return Err(NotDirect::Itself);
            }
            authz::decide_flow(policy, &attributes).map_err(|_| NotDirect::Denied)
        };
        self.endpoints.iter().map(permit).collect()
    }
}

fn opaque(protocol: AppProtocol) -> Result<(), NotDirect> {
    match protocol {
        AppProtocol::Tcp | AppProtocol::Tls => Ok(()),
        AppProtocol::Detect | AppProtocol::Http1 | AppProtocol::Http2 | AppProtocol::Grpc => Err(NotDirect::Protocol),
    }
}
