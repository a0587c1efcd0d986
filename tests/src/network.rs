//! The lab's wires: a bridge as the fabric between nodes, and routed pods behind each node, IPv4 and IPv6.
//!
//! A pod has one address of each family on its end of a veth, and the node as its gateway; a node has a route for each
//! of its pods and for the pods of every other node. For programs outside of the mesh, Services are translated in the
//! node by nftables, as kube-proxy does; a lab whose pods are all enrolled has no such rule.

use std::{fmt::Write, net::IpAddr, process::Command};

use anyhow::Result;

use crate::{
    netns,
    plan::{self, Plan},
    state::{Node, Pod},
};

/// What a namespace that forwards needs. Reverse path filters are inherited from the machine, so they are set here.
const FORWARD: &[(&str, &str)] = &[
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
    ("ipv4/ip_forward", "1"),
    ("ipv6/conf/all/forwarding", "1"),
    ("ipv6/conf/default/accept_dad", "0"),
    ("ipv6/conf/all/accept_dad", "0"),
];
/// What an end of the network needs: addresses that work at once.
const END: &[(&str, &str)] = &[
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
    ("ipv6/conf/all/disable_ipv6", "0"),
    ("ipv6/conf/default/disable_ipv6", "0"),
    ("ipv6/conf/default/accept_dad", "0"),
    ("ipv6/conf/all/accept_dad", "0"),
];

/// Makes the fabric, the controller's end and all nodes, with the routes between them.
pub fn fabric(lab: &str, plan: Plan, nodes: &[Node]) -> Result<()> {
    let fabric = plan::fabric_netns(lab);
    let controller = plan::controller_netns(lab);
    let node_netns: Vec<String> = nodes.iter().map(|node| plan::node_netns(lab, &node.name)).collect();
    let mut all = vec![fabric.clone(), controller.clone()];
    all.extend(node_netns.iter().cloned());
    netns::create(&all)?;

    netns::sysctl(&fabric, END)?;
    netns::sysctl(&controller, END)?;
    let mut wires = vec![wire(&controller, "eth0", &fabric, "controller")];
    for (node, name) in nodes.iter().zip(&node_netns) {
        netns::sysctl(name, FORWARD)?;
        wires.push(wire(name, "eth0", &fabric, &format!("node{}", node.number)));
    }
    netns::batch(None, &wires)?;

    let mut ports = vec![
        "link add br0 type bridge".to_string(),
        "link set br0 up".into(),
        "link set lo up".into(),
        format!("addr add {}/24 dev br0", plan.fabric().v4),
    ];
    let names = nodes.iter().map(|node| format!("node{}", node.number));
    for port in std::iter::once("controller".to_string()).chain(names) {
        ports.push(format!("link set {port} master br0"));
        ports.push(format!("link set {port} up"));
    }
    netns::batch(Some(&fabric), &ports)?;

    netns::batch(Some(&controller), &end_lines(plan.controller()))?;
    for (node, name) in nodes.iter().zip(&node_netns) {
        let mut lines = end_lines(plan.node(node.number));
        for other in nodes.iter().filter(|other| other.number != node.number) {
            let [cidr4, cidr6] = plan.pod_cidrs(other.number);
            let via = plan.node(other.number);
            lines.push(format!("route add {cidr4} via {}", via.v4));
            lines.push(format!("route add {cidr6} via {}", via.v6));
        }
        netns::batch(Some(name), &lines)?;
    }
    Ok(())
}

fn wire(a: &str, a_device: &str, b: &str, b_device: &str) -> String {
    format!("link add {a_device} netns {a} type veth peer name {b_device} netns {b}")
}

fn end_lines(address: plan::Dual) -> Vec<String> {
    vec![
        "link set lo up".into(),
        "link set eth0 up".into(),
        format!("addr add {}/24 dev eth0", address.v4),
        format!("addr add {}/64 dev eth0 nodad", address.v6),
    ]
}

/// Makes a pod's namespace and connects it to its node.
pub fn pod(lab: &str, plan: Plan, node: &Node, pod: &Pod) -> Result<()> {
    let pod_netns = plan::pod_netns(lab, &pod.namespace, &pod.name);
    let node_netns = plan::node_netns(lab, &node.name);
    netns::create(std::slice::from_ref(&pod_netns))?;
    netns::sysctl(&pod_netns, END)?;
    let device = format!("pod{}", pod.slot);
    netns::batch(None, &[wire(&pod_netns, "eth0", &node_netns, &device)])?;

    let gateway = plan.gateway(node.number);
    let host = plan.node(node.number);
    let [v4, v6] = pod.addresses;
    netns::batch(
        Some(&node_netns),
        &[
            format!("link set {device} up"),
            format!("addr add {}/32 dev {device}", gateway.v4),
            format!("addr add {}/128 dev {device} nodad", gateway.v6),
            // The node speaks to its pods from its own address, as a kubelet does.
            format!("route add {v4}/32 dev {device} src {}", host.v4),
            format!("route add {v6}/128 dev {device} src {}", host.v6),
        ],
    )?;
    netns::batch(
        Some(&pod_netns),
        &[
            "link set lo up".into(),
            "link set eth0 up".into(),
            format!("addr add {v4}/32 dev eth0"),
            format!("addr add {v6}/128 dev eth0 nodad"),
            format!("route add {}/32 dev eth0 scope link", gateway.v4),
            format!("route add default via {}", gateway.v4),
            format!("route add {}/128 dev eth0", gateway.v6),
            format!("route add default via {}", gateway.v6),
        ],
    )
}

/// Takes a pod's namespace away; its wire goes with it.
pub fn remove_pod(lab: &str, pod: &Pod) -> Result<()> {
    netns::remove(&[plan::pod_netns(lab, &pod.namespace, &pod.name)])
}

/// One port of a Service and where it leads.
#[derive(Clone, Debug)]
pub struct ServiceRule {
    /// The cluster address.
    pub address: IpAddr,
    /// The port there.
    pub port: u16,
    /// `tcp` or `udp`.
    pub protocol: &'static str,
    /// The ready endpoints of the same family.
    pub endpoints: Vec<(IpAddr, u16)>,
}

/// Replaces the Service rules of a node; none at all removes the tables, and connection tracking with them.
pub fn service_rules(node_netns: &str, rules: &[ServiceRule]) -> Result<()> {
    let mut command = Command::new("nsenter");
    command
        .arg(format!("--net={}", netns::path(node_netns).display()))
        .args(["nft", "-f", "-"]);
    netns::feed(command, &ruleset(rules))
}

fn ruleset(rules: &[ServiceRule]) -> String {
    let mut text = String::new();
    for (family, table) in [(true, "ip"), (false, "ip6")] {
        // Adding before deleting makes the deletion succeed whether or not there was one.
        let _ = writeln!(text, "add table {table} services\ndelete table {table} services");
        let rules: Vec<_> = rules.iter().filter(|rule| rule.address.is_ipv4() == family).collect();
        if rules.is_empty() {
            continue;
        }
        let _ = writeln!(text, "table {table} services {{");
        for (chain, hook) in [("arriving", "prerouting"), ("local", "output")] {
            let _ = writeln!(text, " chain {chain} {{\n  type nat hook {hook} priority -100;");
            for rule in &rules {
                let head = format!("{table} daddr {} {} dport {}", rule.address, rule.protocol, rule.port);
                let targets: Vec<String> = rule
                    .endpoints
                    .iter()
                    .enumerate()
                    .map(|(number, (address, port))| format!("{number} : {address} . {port}"))
                    .collect();
                if !targets.is_empty() {
                    let _ = writeln!(
                        text,
                        "  {head} dnat {table} addr . port to numgen random mod {} map {{ {} }}",
                        targets.len(),
                        targets.join(", ")
                    );
                }
            }
            let _ = writeln!(text, " }}");
        }
        let _ = writeln!(text, "}}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_by_family_and_none_without_endpoints() {
        let rule = |address: &str, endpoints: &[(&str, u16)]| ServiceRule {
            address: address.parse().unwrap(),
            port: 80,
            protocol: "tcp",
            endpoints: endpoints
                .iter()
                .map(|(ip, port)| (ip.parse().unwrap(), *port))
                .collect(),
        };
        let text = ruleset(&[
            rule("10.1.240.1", &[("10.1.1.2", 8080), ("10.1.2.2", 8080)]),
            rule("fd00:1:ffff::1", &[("fd00:1:1::2", 8080)]),
            rule("10.1.240.2", &[]),
        ]);
        assert!(text.contains(
            "ip daddr 10.1.240.1 tcp dport 80 dnat ip addr . port to numgen random mod 2 map { 0 : 10.1.1.2 . 8080, 1 : 10.1.2.2 . 8080 }"
        ));
        assert!(text.contains("ip6 daddr fd00:1:ffff::1 tcp dport 80 dnat ip6 addr . port to numgen random mod 1"));
        assert!(!text.contains("10.1.240.2"));
        assert_eq!(ruleset(&[]).matches("chain").count(), 0);
    }
}
