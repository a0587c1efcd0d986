//! The address plan of a lab and the names of its namespaces: pure functions of the lab's name and index.
//!
//! Every lab has an index of its own, so that the addresses of two labs never meet:
//! `10.<index>.0.0/24` is the fabric, `10.<index>.<node>.0/24` the pods of a node, `10.<index>.240.0/20` the Services;
//! `fd00:<index>:…` likewise. Names carry the lab's name up to a dot, which no lab name may contain.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Result, ensure};

/// The longest name of a lab: cgroup, namespace and socket paths stay within their limits.
pub const NAME_MAX: usize = 32;
/// The first index of a lab.
pub const INDEX_MIN: u8 = 16;
/// The last index of a lab: this many labs run at once.
pub const INDEX_MAX: u8 = 250;
/// The most nodes of a lab.
pub const NODES_MAX: usize = 100;
/// The most pods of a node.
pub const PODS_PER_NODE_MAX: usize = 250;

/// Checks a lab's name: lower case letters, digits and hyphens.
pub fn check_name(name: &str) -> Result<()> {
    ensure!(
        !name.is_empty() && name.len() <= NAME_MAX,
        "lab name {name:?}: expected 1 to {NAME_MAX} characters"
    );
    ensure!(
        name.bytes()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-')
            && !name.starts_with('-'),
        "lab name {name:?}: expected lower case letters, digits and hyphens"
    );
    Ok(())
}

/// A pair of addresses, one of each family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dual {
    /// The IPv4 address.
    pub v4: Ipv4Addr,
    /// The IPv6 address.
    pub v6: Ipv6Addr,
}

impl Dual {
    /// Both, IPv4 first.
    pub fn both(self) -> [IpAddr; 2] {
        [IpAddr::V4(self.v4), IpAddr::V6(self.v6)]
    }
}

/// The addresses of one lab.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The lab's index.
    pub index: u8,
}

impl Plan {
    fn dual(self, third: u8, fourth: u8) -> Dual {
        Dual {
            v4: Ipv4Addr::new(10, self.index, third, fourth),
            v6: Ipv6Addr::new(
                0xfd00,
                u16::from(self.index),
                u16::from(third),
                0,
                0,
                0,
                0,
                u16::from(fourth),
            ),
        }
    }

    /// The fabric's bridge itself.
    pub fn fabric(self) -> Dual {
        self.dual(0, 1)
    }

    /// The controller, on the fabric.
    pub fn controller(self) -> Dual {
        self.dual(0, 2)
    }

    /// A node on the fabric; nodes count from 1.
    pub fn node(self, node: u8) -> Dual {
        self.dual(0, 10 + node)
    }

    /// The gateway that a node's pods see.
    pub fn gateway(self, node: u8) -> Dual {
        self.dual(node, 1)
    }

    /// The addresses of the pod with this slot (from 2) on the node.
    pub fn pod(self, node: u8, slot: u8) -> Dual {
        self.dual(node, slot)
    }

    /// The pods of a node as CIDRs, IPv4 and IPv6.
    pub fn pod_cidrs(self, node: u8) -> [String; 2] {
        let base = self.dual(node, 0);
        [format!("{}/24", base.v4), format!("{}/64", base.v6)]
    }

    /// The cluster addresses of the Service with this slot (from 1, below 4000).
    pub fn service(self, slot: u16) -> Dual {
        let [high, low] = slot.to_be_bytes();
        Dual {
            v4: Ipv4Addr::new(10, self.index, 240 + high, low),
            v6: Ipv6Addr::new(0xfd00, u16::from(self.index), 0xffff, 0, 0, 0, 0, slot),
        }
    }
}

/// The prefix of everything of this lab that has a machine-wide name.
pub fn prefix(lab: &str) -> String {
    format!("nm-{lab}.")
}

/// The network namespace of the fabric's bridge.
pub fn fabric_netns(lab: &str) -> String {
    format!("{}fabric", prefix(lab))
}

/// The network namespace of the controller.
pub fn controller_netns(lab: &str) -> String {
    format!("{}controller", prefix(lab))
}

/// The network namespace of a node.
pub fn node_netns(lab: &str, node: &str) -> String {
    format!("{}node.{node}", prefix(lab))
}

/// The network namespace of a pod.
pub fn pod_netns(lab: &str, namespace: &str, pod: &str) -> String {
    format!("{}pod.{namespace}.{pod}", prefix(lab))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_labs_nodes_pods_and_services_never_meet() {
        let mut seen = std::collections::HashSet::new();
        for index in [INDEX_MIN, 17, INDEX_MAX] {
            let plan = Plan { index };
            let mut all = vec![plan.fabric(), plan.controller()];
            for node in [1, 2, NODES_MAX as u8] {
                all.push(plan.node(node));
                all.push(plan.gateway(node));
                all.extend([2, 3, PODS_PER_NODE_MAX as u8].map(|slot| plan.pod(node, slot)));
            }
            all.extend([1, 255, 256, 3999].map(|slot| plan.service(slot)));
            for dual in all {
                for address in dual.both() {
                    assert!(seen.insert(address), "{address} twice");
                }
            }
        }
        assert_eq!(Plan { index: 20 }.pod_cidrs(2), ["10.20.2.0/24", "fd00:14:2::/64"]);
    }

    #[test]
    fn names() {
        for good in ["a", "demo", "t-routing-1"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", "A", "a.b", "a/b", "-a", "a_b", &"x".repeat(NAME_MAX + 1)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
        // The names of lab `a` are never a prefix of the names of lab `a-b`.
        assert!(!node_netns("a-b", "n").starts_with(&prefix("a")));
    }
}
