//! What a pod reads in `/etc/hosts`: the names of Services, in place of a cluster's DNS.

use std::{fmt::Write, net::IpAddr};

/// A Service's name and the addresses it stands for: its cluster addresses, or its pods' when it is headless.
#[derive(Clone, Debug)]
pub struct Name {
    /// The namespace.
    pub namespace: String,
    /// The Service's name, or `pod.service` for a pod of a headless one.
    pub name: String,
    /// The addresses.
    pub addresses: Vec<IpAddr>,
}

/// The file of a pod of `namespace` called `hostname`.
pub fn render(namespace: &str, hostname: &str, own: &[IpAddr], services: &[Name]) -> String {
    let mut text = String::from(
        "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\nff02::1 ip6-allnodes\nff02::2 ip6-allrouters\n",
    );
    let mut line = |address: &IpAddr, names: &str| {
        let _ = writeln!(text, "{address} {names}");
    };
    for address in own {
        line(address, hostname);
    }
    for service in services {
        let Name {
            namespace: ns, name, ..
        } = service;
        let mut names = format!("{name}.{ns}.svc.cluster.local {name}.{ns}.svc {name}.{ns}");
        if ns == namespace {
            names.push(' ');
            names.push_str(name);
        }
        for address in &service.addresses {
            line(address, &names);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_belong_to_the_own_namespace() {
        let services = [("shop", "cart", "10.1.240.1"), ("web", "api", "10.1.240.2")].map(|(ns, name, ip)| Name {
            namespace: ns.into(),
            name: name.into(),
            addresses: vec![ip.parse().unwrap()],
        });
        let text = render("shop", "front", &["10.1.1.2".parse().unwrap()], &services);
        let lines: Vec<&str> = text.lines().skip(4).collect();
        assert_eq!(
            lines,
            [
                "10.1.1.2 front",
                "10.1.240.1 cart.shop.svc.cluster.local cart.shop.svc cart.shop cart",
                "10.1.240.2 api.web.svc.cluster.local api.web.svc api.web",
            ]
        );
    }
}
