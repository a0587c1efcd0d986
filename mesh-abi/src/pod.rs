//! What the agent tells the kernel programs about the node and its pods.

use crate::addr::{Addr, Endpoint};

/// Ports in a [`PortSet`].
pub const PORTS_MAX: usize = 32;
/// Addresses of one pod.
pub const POD_ADDRESSES_MAX: usize = 4;
/// Addresses of the node from which its kubelet probes.
pub const NODE_ADDRESSES_MAX: usize = 16;

/// [`Config::fail_mode`]: while no agent listens, connections are refused.
pub const FAIL_REFUSE: u32 = 0;
/// [`Config::fail_mode`]: while no agent listens, connections go on as if there were no mesh.
pub const FAIL_PASS: u32 = 1;

/// [`Config::guard`]: a namespace that is not enrolled is left alone.
pub const GUARD_OFF: u32 = 0;
/// [`Config::guard`]: below a guarded cgroup, a namespace that is neither enrolled nor known is refused.
pub const GUARD_REFUSE: u32 = 1;

/// A small set of ports in host byte order; 0 marks an empty place.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortSet {
    /// The ports.
    pub ports: [u16; PORTS_MAX],
}

/// A set of ports exceeds [`PORTS_MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooManyPorts;

/// Settings of the node: the one value of the `CONFIG` map.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// [`crate::ABI_VERSION`]; 0 before the agent's first start.
    pub abi_version: u32,
    /// [`FAIL_REFUSE`] or [`FAIL_PASS`].
    pub fail_mode: u32,
    /// Not 0: debug builds of the programs log what they do.
    pub debug: u32,
    /// [`GUARD_OFF`] or [`GUARD_REFUSE`].
    pub guard: u32,
    /// The cookie of the node's own network namespace; 0 if it is not known.
    pub home: u64,
    /// The node's own addresses; [`Addr::NONE`] marks an empty place.
    pub node: [Addr; NODE_ADDRESSES_MAX],
}

/// An enrolled pod, by netns cookie.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PodEntry {
    /// The agent's listener for IPv4 in the pod's network namespace.
    pub agent4: Endpoint,
    /// The agent's listener for IPv6; none where the namespace has no IPv6.
    pub agent6: Endpoint,
    /// The pod's addresses; [`Addr::NONE`] marks an empty place.
    pub addresses: [Addr; POD_ADDRESSES_MAX],
    /// Destination ports that are not captured.
    pub exclude_outbound: PortSet,
}

/// How connections to a pod's address are steered, by that address.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SteerEntry {
    /// The pod's netns cookie: an address may pass to another pod before this entry is swept.
    pub netns: u64,
    /// Ports that the node's kubelet probes.
    pub probes: PortSet,
    /// Local ports that are not steered.
    pub exclude_inbound: PortSet,
}

impl PortSet {
    /// The set of these ports; 0 is skipped.
    pub fn new(ports: &[u16]) -> Result<PortSet, TooManyPorts> {
        let mut set = PortSet::default();
        for &port in ports.iter().filter(|&&port| port != 0) {
            if set.contains(port) {
                continue;
            }
            let free = set.ports.iter_mut().find(|place| **place == 0).ok_or(TooManyPorts)?;
            *free = port;
        }
        Ok(set)
    }

    /// Whether the port is in the set.
    #[inline(always)]
    pub fn contains(&self, port: u16) -> bool {
        if port == 0 {
            return false;
        }
        for candidate in &self.ports {
            if *candidate == port {
                return true;
            }
        }
        false
    }
}

impl Config {
    /// Whether the address is one of the node's own.
    #[inline(always)]
    pub fn is_node(&self, addr: &Addr) -> bool {
        for candidate in &self.node {
            if candidate.same(addr) {
                return !addr.is_none();
            }
        }
        false
    }
}

impl PodEntry {
    /// Whether the address is one of the pod's own.
    #[inline(always)]
    pub fn is_own(&self, addr: &Addr) -> bool {
        for candidate in &self.addresses {
            if candidate.same(addr) {
                return !addr.is_none();
            }
        }
        false
    }

    /// The pod's first address of a family; [`Addr::NONE`] if it has none.
    #[inline(always)]
    pub fn address(&self, v4: bool) -> Addr {
        for candidate in &self.addresses {
            if !candidate.is_none() && candidate.is_v4() == v4 {
                return *candidate;
            }
        }
        Addr::NONE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_sets_are_bounded_and_hold_what_was_put_in() {
        let ports: Vec<u16> = (1..=PORTS_MAX as u16).collect();
        let set = PortSet::new(&ports).unwrap();
        assert!(ports.iter().all(|&port| set.contains(port)));
        assert!(!set.contains(0) && !set.contains(PORTS_MAX as u16 + 1));
        let doubled: Vec<u16> = ports.iter().chain(&ports).copied().collect();
        assert_eq!(PortSet::new(&doubled), Ok(set), "a port named twice takes one place");
        let over: Vec<u16> = (1..=PORTS_MAX as u16 + 1).collect();
        assert_eq!(PortSet::new(&over), Err(TooManyPorts));
        assert!(!PortSet::default().contains(0), "an empty place is not port 0");
    }
}
