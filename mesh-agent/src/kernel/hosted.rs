//! Enrolled pods that share the node's network namespace: captured as sources, by their cgroups.
//!
//! What arrives at them is not touched: their sockets have no namespace of their own to steer in. A cgroup's id is not
//! used again while the machine is up, so an entry that outlives its pod captures nobody.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use mesh_abi::{Endpoint, FlowKey, PodEntry, PortSet, maps as names};
use parking_lot::Mutex;

use super::{Kernel, KernelError, NetnsCookie, pod_addresses};

/// Marks a number that is a cgroup's id; the kernel counts cookies up from 1.
const HOSTED: u64 = 1 << 63;

/// A pod with the node's network to be captured: everything that the kernel programs need to know about it.
#[derive(Clone, Copy, Debug)]
pub struct HostedCapture<'a> {
    /// The id of the pod's cgroup2 directory.
    pub cgroup_id: u64,
    /// The node's addresses, as the pod has them; one of them is shown for the agent's loopback address.
    pub addresses: &'a [IpAddr],
    /// Where the agent listens for this pod's captured IPv4 connections, in the node's network namespace.
    pub outbound_v4: Option<SocketAddr>,
    /// The same for IPv6.
    pub outbound_v6: Option<SocketAddr>,
    /// Destination ports that are not captured.
    pub exclude_outbound: PortSet,
}

/// The ports of this agent's listeners for each of these pods, IPv4 and IPv6. A pod that was let go is remembered for the
/// connections that wait in its listeners.
pub struct Listeners {
    home: NetnsCookie,
    ports: Mutex<BTreeMap<u64, [u16; 2]>>,
}

impl Listeners {
    pub fn new(home: NetnsCookie) -> Listeners {
        Listeners {
            home,
            ports: Mutex::default(),
        }
    }

    /// The key of a captured connection that was accepted for the pod. That it was sent to the pod's own listener is part
    /// of it: whoever connects there without having been sent has no key, whatever port it comes from.
    pub fn flow_key(&self, cgroup_id: u64, source: SocketAddr) -> Option<FlowKey> {
        let ports = self.ports.lock().get(&cgroup_id).copied()?;
        let port = ports[usize::from(source.is_ipv6())];
        Some(FlowKey::captured(self.home.0, source.into(), port))
    }

    fn set(&self, cgroup_id: u64, ports: [u16; 2], is_enrolled: impl Fn(u64) -> bool) {
        let mut all = self.ports.lock();
        if all.len() >= names::HOSTED_MAX as usize {
            all.retain(|id, _| is_enrolled(*id));
        }
        all.insert(cgroup_id, ports);
    }
}

impl NetnsCookie {
    /// What stands for the cookie of a pod that shares the node's namespace.
    pub const fn hosted(cgroup_id: u64) -> NetnsCookie {
        NetnsCookie(HOSTED | cgroup_id)
    }

    /// The cgroup's id of a pod that shares the node's namespace; `None` for the cookie of a namespace.
    pub const fn cgroup_id(self) -> Option<u64> {
        if self.0 & HOSTED == 0 {
            None
        } else {
            Some(self.0 & !HOSTED)
        }
    }
}

impl Kernel {
    /// Captures what a pod of the node's network connects to, or changes what is known about it; live connections are
    /// not touched. [`Kernel::retire`] lets it go, by [`NetnsCookie::hosted`].
    pub fn enrol_hosted(&self, pod: &HostedCapture<'_>) -> Result<(), KernelError> {
        let entry = PodEntry {
            agent4: pod.outbound_v4.map_or(Endpoint::NONE, Endpoint::from),
            agent6: pod.outbound_v6.map_or(Endpoint::NONE, Endpoint::from),
            addresses: pod_addresses(pod.addresses)?,
            exclude_outbound: pod.exclude_outbound,
        };
        let _writer = self.writer.lock();
        let is_enrolled = |id| matches!(self.maps.hosted.get(&id), Ok(Some(_)));
        self.hosted
            .set(pod.cgroup_id, [entry.agent4.port, entry.agent6.port], is_enrolled);
        self.maps.hosted.set(&pod.cgroup_id, &entry)
    }
}
